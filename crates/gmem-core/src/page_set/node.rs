//! The nodes of the tree below a [`PageSet`](super::PageSet), and the order in which a writer changes them.

use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// Base-2 logarithm of the pages in a word, of the words in a leaf and of the children of a branch.
const FAN_OUT_SHIFT: u32 = 6;
const FAN_OUT: usize = 1 << FAN_OUT_SHIFT;
/// Children whose tags, of two bits each, share a word.
const TAGS_PER_WORD: u64 = 32;
/// The lower bit of each tag of a word.
const LOWER_BITS: u64 = u64::MAX / 3;

/// Which of the two values occur among some pages. This is also the tag of a child: a child with both is *mixed*.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Values(u64);

impl Values {
    pub(super) const NONE: Self = Self(0);
    pub(super) const MIXED: Self = Self(3);

    pub(super) fn only(value: bool) -> Self {
        Self(1 << u64::from(value))
    }

    /// What occurs in the children whose tags are among `tags`.
    fn of_tags(tags: u64) -> Self {
        Self(u64::from(tags & LOWER_BITS != 0) | (u64::from(tags & !LOWER_BITS != 0) << 1))
    }

    /// What occurs among the pages of `mask` in a word of pages.
    fn of_pages(word: u64, mask: u64) -> Self {
        Self(u64::from(!word & mask != 0) | (u64::from(word & mask != 0) << 1))
    }

    pub(super) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn has(self, value: bool) -> bool {
        self.0 & Self::only(value).0 != 0
    }

    pub(super) fn uniform(self) -> Option<bool> {
        match self.0 {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }

    /// A word of tags that are all this one.
    fn repeated(self) -> u64 {
        self.0 * LOWER_BITS
    }
}

/// The pages from `first` to `last`, both included, counted from the first page of the node that they are given to.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Span {
    /// The first and the last child of `1 << shift` pages that has pages of this span.
    fn children(self, shift: u32) -> (u64, u64) {
        (self.first >> shift, self.last >> shift)
    }

    /// The part that lies in `child`, counted from the child's first page.
    fn part(self, child: u64, shift: u32) -> Self {
        let base = child << shift;
        let last = base | ((1 << shift) - 1);
        Self { first: self.first.max(base) - base, last: self.last.min(last) - base }
    }

    fn is_whole(self, shift: u32) -> bool {
        self.len() == 1 << shift
    }

    fn len(self) -> u64 {
        self.last - self.first + 1
    }

    /// The bits of a word that stand for the pages of a span of at most 64.
    fn mask(self) -> u64 {
        (u64::MAX << (self.first & 63)) & (u64::MAX >> (63 - (self.last & 63)))
    }
}

fn slot(index: u64) -> usize {
    (index & 63) as usize
}

/// Part of the tree, of `1 << SHIFT` pages.
pub(super) trait Node: Clone + PartialEq + Hash {
    const SHIFT: u32;

    /// A node whose pages all have `value`.
    fn uniform(value: bool) -> Self;
    /// Gives all pages `value`. Only for a node that is detached, that is, whose tag is uniform and says `value`.
    fn reset(&self, value: bool);
    /// Which values occur in the whole node, in constant time. Only for the writer, or without one.
    fn whole(&self) -> Values;

    /// The value of `page`, of which only the bits below `SHIFT` count.
    fn get(&self, page: u64) -> bool;
    fn set(&self, span: Span, value: bool);
    fn values(&self, span: Span) -> Values;
    /// The first page of `span` that has `value`.
    fn find(&self, span: Span, value: bool) -> Option<u64>;
    /// Pages of `span` in the set.
    fn count(&self, span: Span) -> u64;
    /// Bytes allocated below this node, the node itself not counted.
    fn heap_bytes(&self) -> usize;
}

/// 64 pages, the whole tree of the smallest sets.
#[derive(Debug)]
pub(super) struct Word(AtomicU64);

impl Word {
    pub(super) fn uniform(value: bool) -> Self {
        Self(AtomicU64::new(if value { u64::MAX } else { 0 }))
    }

    fn load(&self) -> u64 {
        // Acquire: see `store`.
        self.0.load(Acquire)
    }

    fn store(&self, word: u64) {
        // Release, for `load`: whoever sees this change also sees the changes that the writer made before it.
        self.0.store(word, Release);
    }

    pub(super) fn get(&self, page: u64) -> bool {
        (self.load() >> (page & 63)) & 1 != 0
    }

    pub(super) fn set(&self, span: Span, value: bool) {
        self.replace(span, value);
    }

    /// Gives pages `value` and returns how many of them did not have it.
    fn replace(&self, span: Span, value: bool) -> u32 {
        let old = self.0.load(Relaxed);
        let new = if value { old | span.mask() } else { old & !span.mask() };
        if new == old {
            return 0;
        }
        self.store(new);
        (new ^ old).count_ones()
    }

    pub(super) fn values(&self, span: Span) -> Values {
        Values::of_pages(self.load(), span.mask())
    }

    pub(super) fn find(&self, span: Span, value: bool) -> Option<u64> {
        let word = self.load();
        let found = if value { word } else { !word } & span.mask();
        (found != 0).then(|| u64::from(found.trailing_zeros()))
    }

    pub(super) fn count(&self, span: Span) -> u64 {
        u64::from((self.load() & span.mask()).count_ones())
    }

    #[expect(clippy::unused_self, reason = "the same shape as the larger trees")]
    pub(super) fn heap_bytes(&self) -> usize {
        0
    }
}

impl Clone for Word {
    fn clone(&self) -> Self {
        Self(AtomicU64::new(self.load()))
    }
}

impl PartialEq for Word {
    fn eq(&self, other: &Self) -> bool {
        self.load() == other.load()
    }
}

impl Eq for Word {}

impl Hash for Word {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.load());
    }
}

/// 4096 pages (16 MiB), stored as the words themselves: the smallest unit that is allocated.
///
/// The 8 words of a 2 MiB block lie side by side, so asking for all of them costs hardly more than asking for one.
#[derive(Debug)]
pub(super) struct Leaf {
    words: [Word; FAN_OUT],
    /// Pages in the set, counted by the writer so that it knows at once when the leaf has become uniform again, and
    /// whether a detached leaf needs new words.
    ones: AtomicU64,
}

impl Leaf {
    const PAGES: u64 = 1 << Self::SHIFT;

    fn ones_if_uniform(value: bool) -> u64 {
        if value { Self::PAGES } else { 0 }
    }
}

impl Node for Leaf {
    const SHIFT: u32 = 2 * FAN_OUT_SHIFT;

    fn uniform(value: bool) -> Self {
        Self {
            words: core::array::from_fn(|_| Word::uniform(value)),
            ones: AtomicU64::new(Self::ones_if_uniform(value)),
        }
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            self.set(Span { first: 0, last: Self::PAGES - 1 }, value);
        }
    }

    fn whole(&self) -> Values {
        match self.ones.load(Relaxed) {
            0 => Values::only(false),
            Self::PAGES => Values::only(true),
            _ => Values::MIXED,
        }
    }

    fn get(&self, page: u64) -> bool {
        self.words[slot(page >> FAN_OUT_SHIFT)].get(page)
    }

    fn set(&self, span: Span, value: bool) {
        let (first, last) = span.children(FAN_OUT_SHIFT);
        let replace = |word| u64::from(self.words[slot(word)].replace(span.part(word, FAN_OUT_SHIFT), value));
        let changed = (first..=last).map(replace).sum();
        let ones = self.ones.load(Relaxed);
        self.ones.store(if value { ones.wrapping_add(changed) } else { ones.wrapping_sub(changed) }, Relaxed);
    }

    fn values(&self, span: Span) -> Values {
        let (first, last) = span.children(FAN_OUT_SHIFT);
        let mut values = Values::NONE;
        for word in first..=last {
            values = values.with(self.words[slot(word)].values(span.part(word, FAN_OUT_SHIFT)));
            if values == Values::MIXED {
                break;
            }
        }
        values
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        let (first, last) = span.children(FAN_OUT_SHIFT);
        (first..=last).find_map(|word| {
            let page = self.words[slot(word)].find(span.part(word, FAN_OUT_SHIFT), value)?;
            Some((word << FAN_OUT_SHIFT) + page)
        })
    }

    fn count(&self, span: Span) -> u64 {
        let (first, last) = span.children(FAN_OUT_SHIFT);
        (first..=last).map(|word| self.words[slot(word)].count(span.part(word, FAN_OUT_SHIFT))).sum()
    }

    fn heap_bytes(&self) -> usize {
        0
    }
}

impl Clone for Leaf {
    /// Counts the copied words anew: a writer at work may have changed some of them meanwhile.
    fn clone(&self) -> Self {
        let words = self.words.clone();
        let ones = words.iter().map(|word| u64::from(word.load().count_ones())).sum();
        Self { words, ones: AtomicU64::new(ones) }
    }
}

impl PartialEq for Leaf {
    fn eq(&self, other: &Self) -> bool {
        self.words == other.words
    }
}

impl Hash for Leaf {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.words.iter().for_each(|word| word.hash(state));
    }
}

/// 64 children, of which only those that are or have been mixed exist.
///
/// A child is *attached* while its tag says mixed. Its tag is mixed exactly while both values occur in it, as soon as
/// the writer is done; so equal contents have equal tags, and equality needs to follow mixed tags only. A detached
/// child is kept for the next time that it is needed.
#[derive(Debug)]
pub(super) struct Branch<N> {
    tags: [AtomicU64; 2],
    children: [OnceBox<N>; FAN_OUT],
}

/// The child at `slot`, ready to be attached: all its pages have `value`.
fn prepare<N: Node>(slot: &OnceBox<N>, value: bool) -> &N {
    match slot.get() {
        Some(node) => {
            node.reset(value);
            node
        }
        None => slot.get_or_init(|| Box::new(N::uniform(value))),
    }
}

impl<N: Node> Branch<N> {
    fn tag_word(&self, child: u64) -> (&AtomicU64, u64) {
        (&self.tags[usize::from(child & TAGS_PER_WORD != 0)], 2 * (child & (TAGS_PER_WORD - 1)))
    }

    fn tag(&self, child: u64) -> Values {
        let (word, shift) = self.tag_word(child);
        // Acquire: see `put_tags`.
        Values((word.load(Acquire) >> shift) & 3)
    }

    /// Replaces the tags of the children of one word from `first` to `last`.
    fn put_tags(&self, first: u64, last: u64, tag: Values) {
        let (word, low) = self.tag_word(first);
        let (_, high) = self.tag_word(last);
        let mask = Span { first: low, last: high + 1 }.mask();
        let old = word.load(Relaxed);
        let new = (old & !mask) | (tag.repeated() & mask);
        if new != old {
            // Release, for `tag` and `tags_from`: a reader that sees a child attached sees what it was reset to.
            word.store(new, Release);
        }
    }

    /// Makes the children from `first` to `last` uniform, none of them if `first` is beyond `last`.
    fn fill(&self, first: u64, last: u64, value: bool) {
        for (first, last) in halves(first, last) {
            self.put_tags(first, last, Values::only(value));
        }
    }

    /// The child if it is attached.
    fn attached(&self, child: u64, tag: Values) -> Option<&N> {
        if tag == Values::MIXED { self.children[slot(child)].get() } else { None }
    }

    fn set_part(&self, child: u64, span: Span, value: bool) {
        let part = span.part(child, N::SHIFT);
        let tag = self.tag(child);
        if tag == Values::only(value) {
            return;
        }
        if part.is_whole(N::SHIFT) {
            return self.put_tags(child, child, Values::only(value));
        }
        let node = match self.attached(child, tag) {
            Some(node) => node,
            None => {
                let node = prepare(&self.children[slot(child)], !value);
                self.put_tags(child, child, Values::MIXED);
                node
            }
        };
        node.set(part, value);
        self.put_tags(child, child, node.whole());
    }

    fn values_in_part(&self, child: u64, span: Span) -> Values {
        let part = span.part(child, N::SHIFT);
        let tag = self.tag(child);
        match self.attached(child, tag) {
            Some(node) if !part.is_whole(N::SHIFT) => node.values(part),
            _ => tag,
        }
    }

    /// Which values occur in the children from `first` to `last`, none of them if `first` is beyond `last`.
    fn values_of_children(&self, first: u64, last: u64) -> Values {
        let occurring = halves(first, last).map(|(first, last)| {
            let (word, low) = self.tag_word(first);
            let (_, high) = self.tag_word(last);
            // Acquire: see `put_tags`.
            word.load(Acquire) & Span { first: low, last: high + 1 }.mask()
        });
        Values::of_tags(occurring.fold(0, |all, tags| all | tags))
    }

    /// The first child from `first` to `last` in which `value` occurs.
    fn child_with(&self, first: u64, last: u64, value: bool) -> Option<u64> {
        halves(first, last).find_map(|(first, last)| {
            let (word, low) = self.tag_word(first);
            let (_, high) = self.tag_word(last);
            // Acquire: see `put_tags`.
            let tags = word.load(Acquire) & Values::only(value).repeated() & Span { first: low, last: high + 1 }.mask();
            let child = (first & TAGS_PER_WORD) + u64::from(tags.trailing_zeros() / 2);
            (tags != 0).then_some(child)
        })
    }

    fn each_attached(&self) -> impl Iterator<Item = (u64, &N)> {
        let children = 0..FAN_OUT as u64;
        children.filter_map(|child| Some((child, self.attached(child, self.tag(child))?)))
    }
}

/// The part of the children from `first` to `last` whose tags are in the first word and the part in the second.
fn halves(first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = (first, last.min(TAGS_PER_WORD - 1));
    let high = (first.max(TAGS_PER_WORD), last);
    [low, high].into_iter().filter(|(first, last)| first <= last)
}

impl<N: Node> Node for Branch<N> {
    const SHIFT: u32 = N::SHIFT + FAN_OUT_SHIFT;

    fn uniform(value: bool) -> Self {
        let tags = Values::only(value).repeated();
        Self { tags: [AtomicU64::new(tags), AtomicU64::new(tags)], children: [const { OnceBox::new() }; FAN_OUT] }
    }

    fn reset(&self, value: bool) {
        self.fill(0, FAN_OUT as u64 - 1, value);
    }

    fn whole(&self) -> Values {
        Values::of_tags(self.tags[0].load(Relaxed) | self.tags[1].load(Relaxed))
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        let child = page >> N::SHIFT;
        let tag = self.tag(child);
        match self.attached(child, tag) {
            Some(node) => node.get(page),
            None => tag.has(true),
        }
    }

    fn set(&self, span: Span, value: bool) {
        let (first, last) = span.children(N::SHIFT);
        self.set_part(first, span, value);
        if first < last {
            self.fill(first + 1, last - 1, value);
            self.set_part(last, span, value);
        }
    }

    fn values(&self, span: Span) -> Values {
        let (first, last) = span.children(N::SHIFT);
        let values = self.values_in_part(first, span);
        if first == last || values == Values::MIXED {
            return values;
        }
        values.with(self.values_of_children(first + 1, last - 1)).with(self.values_in_part(last, span))
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        let (mut first, last) = span.children(N::SHIFT);
        loop {
            let child = self.child_with(first, last, value)?;
            let part = span.part(child, N::SHIFT);
            let tag = self.tag(child);
            let found = match self.attached(child, tag) {
                Some(node) => node.find(part, value),
                None => tag.has(value).then_some(part.first),
            };
            if let Some(page) = found {
                return Some((child << N::SHIFT) + page);
            }
            first = child + 1;
        }
    }

    fn count(&self, span: Span) -> u64 {
        let (first, last) = span.children(N::SHIFT);
        let in_child = |child| {
            let part = span.part(child, N::SHIFT);
            let tag = self.tag(child);
            match self.attached(child, tag) {
                Some(node) => node.count(part),
                None if tag.has(true) => part.len(),
                None => 0,
            }
        };
        (first..=last).map(in_child).sum()
    }

    fn heap_bytes(&self) -> usize {
        self.children.iter().filter_map(OnceBox::get).map(|node| size_of::<N>() + node.heap_bytes()).sum()
    }
}

impl<N: Node> Clone for Branch<N> {
    /// Copies what is attached. A copied child gets the tag that it then deserves: while a writer is at work it may
    /// have become uniform meanwhile.
    fn clone(&self) -> Self {
        let copy = Self::uniform(false);
        for child in 0..FAN_OUT as u64 {
            let tag = self.tag(child);
            let node =
                self.attached(child, tag).map(|node| copy.children[slot(child)].get_or_init(|| Box::new(node.clone())));
            copy.put_tags(child, child, node.map_or(tag, Node::whole));
        }
        copy
    }
}

impl<N: Node> PartialEq for Branch<N> {
    fn eq(&self, other: &Self) -> bool {
        let same_tags = self.tags.iter().zip(&other.tags).all(|(a, b)| a.load(Acquire) == b.load(Acquire));
        same_tags && self.each_attached().all(|(child, node)| other.children[slot(child)].get() == Some(node))
    }
}

impl<N: Node> Hash for Branch<N> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.tags.iter().for_each(|tags| state.write_u64(tags.load(Acquire)));
        self.each_attached().for_each(|(_, node)| node.hash(state));
    }
}

/// A tree of more than one word. Its node is allocated when a page first differs from the initial value, and then
/// always attached.
#[derive(Debug)]
pub(super) struct Tree<N> {
    initial: bool,
    node: OnceBox<N>,
}

impl<N: Node> Tree<N> {
    pub(super) fn uniform(initial: bool) -> Self {
        Self { initial, node: OnceBox::new() }
    }

    #[inline]
    pub(super) fn get(&self, page: u64) -> bool {
        self.node.get().map_or(self.initial, |node| node.get(page))
    }

    pub(super) fn set(&self, span: Span, value: bool) {
        match self.node.get() {
            Some(node) => node.set(span, value),
            None if value == self.initial => {}
            None => prepare(&self.node, self.initial).set(span, value),
        }
    }

    pub(super) fn values(&self, span: Span) -> Values {
        self.node.get().map_or(Values::only(self.initial), |node| node.values(span))
    }

    pub(super) fn find(&self, span: Span, value: bool) -> Option<u64> {
        match self.node.get() {
            Some(node) => node.find(span, value),
            None => (value == self.initial).then_some(span.first),
        }
    }

    pub(super) fn count(&self, span: Span) -> u64 {
        match self.node.get() {
            Some(node) => node.count(span),
            None if self.initial => span.len(),
            None => 0,
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.node.get().map_or(0, |node| size_of::<N>() + node.heap_bytes())
    }

    /// The node unless it says nothing that its absence would not say.
    fn telling(&self) -> Option<&N> {
        self.node.get().filter(|node| node.whole() != Values::only(self.initial))
    }
}

impl<N: Node> Clone for Tree<N> {
    fn clone(&self) -> Self {
        let node = self.telling().map(|node| Box::new(node.clone()));
        Self { initial: self.initial, node: node.map_or_else(OnceBox::new, OnceBox::with_value) }
    }
}

impl<N: Node> PartialEq for Tree<N> {
    fn eq(&self, other: &Self) -> bool {
        self.initial == other.initial && self.telling() == other.telling()
    }
}

impl<N: Node> Eq for Tree<N> {}

impl<N: Node> Hash for Tree<N> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.initial.hash(state);
        self.telling().hash(state);
    }
}
