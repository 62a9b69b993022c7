//! The nodes of the tree below a [`PageSet`](super::PageSet), and the order in which a writer changes them.

use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// Base-2 logarithm of the pages in a word and of the children of a branch.
const FAN_OUT_SHIFT: u32 = 6;
const FAN_OUT: usize = 1 << FAN_OUT_SHIFT;
/// Children whose tags, of two bits each, share a word.
const TAGS_PER_WORD: u64 = 32;
/// The lower bit of each of the tags of a branch.
const LOWER_BITS: u128 = u128::MAX / 3;

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
    fn of_tags(tags: u128) -> Self {
        let [low, high] = in_words(tags);
        let [tags, lower_bits] = [low | high, in_words(LOWER_BITS)[0]];
        Self(u64::from(tags & lower_bits != 0) | (u64::from(tags & !lower_bits != 0) << 1))
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

    /// The tags of a branch whose children all have this one.
    fn repeated(self) -> u128 {
        u128::from(self.0) * LOWER_BITS
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

    /// Whether the span holds whole children of `1 << shift` pages only.
    fn is_aligned(self, shift: u32) -> bool {
        (self.first | (self.last + 1)) & ((1 << shift) - 1) == 0
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

/// Part of the tree, of `1 << SHIFT` pages.
pub(super) trait Node: Clone + PartialEq + Hash {
    const SHIFT: u32;

    /// A node whose pages all have `value`.
    fn uniform(value: bool) -> Self;
    /// Gives all pages `value` in constant time. For a node that is detached: the tag above it says `value`.
    fn reset(&self, value: bool);
    /// Which values occur in the whole node, in constant time.
    fn whole(&self) -> Values;

    /// The value of `page`, of which only the bits below `SHIFT` count.
    fn get(&self, page: u64) -> bool;
    fn set(&self, span: Span, value: bool);
    /// `set` for one page in an attached node. Returns whether the node may have become uniform: a page that makes a
    /// child mixed leaves the ancestors of the child as mixed as they were, so mostly nothing is left to do above.
    fn set_page(&self, page: u64, value: bool) -> bool;
    fn values(&self, span: Span) -> Values;
    /// The first page of `span` that has `value`.
    fn find(&self, span: Span, value: bool) -> Option<u64>;
    /// Pages of `span` in the set.
    fn count(&self, span: Span) -> u64;
    /// Bytes allocated below this node, the node itself not counted.
    fn heap_bytes(&self) -> usize;
}

/// A bitmap of 64 pages.
pub(super) struct Word(AtomicU64);

impl Word {
    fn load(&self) -> u64 {
        // Acquire: see `store`.
        self.0.load(Acquire)
    }

    fn store(&self, word: u64) {
        // Release, for `load`: whoever sees this change also sees the changes that the writer made before it.
        self.0.store(word, Release);
    }
}

impl Node for Word {
    const SHIFT: u32 = FAN_OUT_SHIFT;

    fn uniform(value: bool) -> Self {
        Self(AtomicU64::new(if value { u64::MAX } else { 0 }))
    }

    fn reset(&self, value: bool) {
        let word = if value { u64::MAX } else { 0 };
        // Looking first is faster where the word is not cached: loads overlap, stores wait for one another.
        if self.0.load(Relaxed) != word {
            self.store(word);
        }
    }

    fn whole(&self) -> Values {
        Values::of_pages(self.load(), u64::MAX)
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        (self.load() >> (page & 63)) & 1 != 0
    }

    fn set(&self, span: Span, value: bool) {
        let old = self.0.load(Relaxed);
        self.store(if value { old | span.mask() } else { old & !span.mask() });
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> bool {
        let (old, bit) = (self.0.load(Relaxed), 1 << (page & 63));
        let new = if value { old | bit } else { old & !bit };
        self.store(new);
        new == 0 || new == u64::MAX
    }

    fn values(&self, span: Span) -> Values {
        Values::of_pages(self.load(), span.mask())
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        let word = self.load();
        let found = if value { word } else { !word } & span.mask();
        (found != 0).then(|| u64::from(found.trailing_zeros()))
    }

    fn count(&self, span: Span) -> u64 {
        u64::from((self.load() & span.mask()).count_ones())
    }

    fn heap_bytes(&self) -> usize {
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

/// 64 children, which exist, all together, once one of them has been mixed.
///
/// A child is *attached* while its tag says mixed; what a detached child holds means nothing. When the writer is done,
/// a tag is mixed exactly if both values occur in the child. So equal contents have equal tags, and comparing needs
/// to follow mixed tags only.
///
/// The tags lie next to the pointer, and the branches below one branch next to each other, so that a descent touches
/// one cache line per level, and the last one only where single pages differ. The 8 tags of a 2 MiB block are read at
/// once.
pub(super) struct Branch<N> {
    tags: [AtomicU64; 2],
    children: OnceBox<[N; FAN_OUT]>,
}

/// The tags of the children from `first` to `last`; none if `first` is the one after `last`.
fn tag_mask(first: u64, last: u64) -> u128 {
    (u128::MAX << (2 * (first & 63))) & (u128::MAX >> (2 * (63 - (last & 63))))
}

/// The tags that the first and the second word of a branch hold.
fn in_words(tags: u128) -> [u64; 2] {
    [(tags << 64 >> 64) as u64, (tags >> 64) as u64]
}

fn replace_tags(word: &AtomicU64, mask: u64, tags: u64) {
    let old = word.load(Relaxed);
    let new = (old & !mask) | tags;
    if new != old {
        // Release, for `tag` and `tags`: a reader that sees a child attached sees what it was reset to.
        word.store(new, Release);
    }
}

impl<N: Node> Branch<N> {
    /// All tags, each as it was at some moment of the call.
    fn tags(&self) -> u128 {
        // Acquire: see `replace_tags`.
        let [low, high] = self.tags.each_ref().map(|word| word.load(Acquire));
        u128::from(low) | (u128::from(high) << 64)
    }

    /// The word that holds the tag of `child`, and by how many bits it is shifted there.
    fn place(&self, child: u64) -> (&AtomicU64, u64) {
        (&self.tags[usize::from(child & TAGS_PER_WORD != 0)], 2 * (child & (TAGS_PER_WORD - 1)))
    }

    #[inline]
    fn tag(&self, child: u64) -> Values {
        let (word, shift) = self.place(child);
        // Acquire: see `replace_tags`.
        Values((word.load(Acquire) >> shift) & 3)
    }

    fn put_tag(&self, child: u64, tag: Values) {
        let (word, shift) = self.place(child);
        replace_tags(word, 3 << shift, tag.0 << shift);
    }

    /// Replaces the tags of the children from `first` to `last`.
    fn put_tags(&self, first: u64, last: u64, tag: Values) {
        let masks = in_words(tag_mask(first, last));
        let tags = in_words(tag.repeated());
        for ((word, mask), tags) in self.tags.iter().zip(masks).zip(tags) {
            replace_tags(word, mask, tags & mask);
        }
    }

    /// The child if it is attached.
    #[inline]
    fn attached(&self, child: u64, tag: Values) -> Option<&N> {
        if tag == Values::MIXED { self.children.get().map(|nodes| &nodes[(child & 63) as usize]) } else { None }
    }

    /// Attaches a detached child whose pages have `value`.
    fn attach(&self, child: u64, value: bool) -> &N {
        let nodes = self.children.get_or_init(|| Box::new(core::array::from_fn(|_| N::uniform(value))));
        let node = &nodes[(child & 63) as usize];
        node.reset(value);
        self.put_tag(child, Values::MIXED);
        node
    }

    fn set_part(&self, child: u64, span: Span, value: bool) {
        let part = span.part(child, N::SHIFT);
        let tag = self.tag(child);
        if tag == Values::only(value) {
            return;
        }
        if part.is_whole(N::SHIFT) {
            return self.put_tag(child, Values::only(value));
        }
        let node = self.attached(child, tag).unwrap_or_else(|| self.attach(child, !value));
        node.set(part, value);
        self.put_tag(child, node.whole());
    }

    fn values_in_part(&self, child: u64, span: Span) -> Values {
        let (tag, part) = (self.tag(child), span.part(child, N::SHIFT));
        match self.attached(child, tag) {
            Some(node) if !part.is_whole(N::SHIFT) => node.values(part),
            _ => tag,
        }
    }

    fn values_of_children(&self, first: u64, last: u64) -> Values {
        Values::of_tags(self.tags() & tag_mask(first, last))
    }

    /// The first child from `first` to `last` in which `value` occurs.
    fn child_with(&self, first: u64, last: u64, value: bool) -> Option<u64> {
        let tags = self.tags() & Values::only(value).repeated() & tag_mask(first, last);
        (tags != 0).then(|| u64::from(tags.trailing_zeros() / 2))
    }

    fn any_mixed(&self) -> bool {
        let tags = self.tags();
        tags & (tags >> 1) & LOWER_BITS != 0
    }

    fn each_attached(&self) -> impl Iterator<Item = (u64, &N)> {
        let children = 0..FAN_OUT as u64;
        children.filter_map(|child| Some((child, self.attached(child, self.tag(child))?)))
    }
}

impl<N: Node> Node for Branch<N> {
    const SHIFT: u32 = N::SHIFT + FAN_OUT_SHIFT;

    fn uniform(value: bool) -> Self {
        let tags = in_words(Values::only(value).repeated());
        Self { tags: tags.map(AtomicU64::new), children: OnceBox::new() }
    }

    fn reset(&self, value: bool) {
        let tags = in_words(Values::only(value).repeated());
        self.tags.iter().zip(tags).for_each(|(word, tags)| replace_tags(word, u64::MAX, tags));
    }

    fn whole(&self) -> Values {
        Values::of_tags(self.tags())
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
            self.put_tags(first + 1, last - 1, Values::only(value));
            self.set_part(last, span, value);
        }
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> bool {
        let child = page >> N::SHIFT & 63;
        let tag = self.tag(child);
        if tag == Values::only(value) {
            return false;
        }
        let node = self.attached(child, tag).unwrap_or_else(|| self.attach(child, !value));
        if !node.set_page(page, value) {
            return false;
        }
        self.put_tag(child, node.whole());
        self.whole() != Values::MIXED
    }

    #[inline]
    fn values(&self, span: Span) -> Values {
        let (first, last) = span.children(N::SHIFT);
        if first == last {
            return self.values_in_part(first, span);
        }
        let values = self.values_of_children(first, last);
        if values != Values::MIXED || span.is_aligned(N::SHIFT) {
            return values;
        }
        let edges = self.values_in_part(first, span).with(self.values_in_part(last, span));
        edges.with(self.values_of_children(first + 1, last - 1))
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        let (mut first, last) = span.children(N::SHIFT);
        while first <= last {
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
        None
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
        let below = |nodes: &[N; FAN_OUT]| nodes.iter().map(Node::heap_bytes).sum::<usize>();
        self.children.get().map_or(0, |nodes| size_of_val(nodes) + below(nodes))
    }
}

impl<N: Node> Clone for Branch<N> {
    /// Copies what is attached. A copied child gets the tag that it then deserves: while a writer is at work it may
    /// have become uniform meanwhile.
    fn clone(&self) -> Self {
        let copy = Self { tags: in_words(self.tags()).map(AtomicU64::new), children: OnceBox::new() };
        if !copy.any_mixed() {
            return copy;
        }
        let nodes: Box<[N; FAN_OUT]> = Box::new(core::array::from_fn(|child| {
            let child = child as u64;
            let node = self.attached(child, copy.tag(child)).map_or_else(|| N::uniform(false), N::clone);
            if copy.tag(child) == Values::MIXED {
                copy.put_tag(child, node.whole());
            }
            node
        }));
        Self { children: OnceBox::with_value(nodes), ..copy }
    }
}

impl<N: Node> PartialEq for Branch<N> {
    fn eq(&self, other: &Self) -> bool {
        let same = |(child, node)| other.attached(child, Values::MIXED) == Some(node);
        self.tags() == other.tags() && self.each_attached().all(same)
    }
}

impl<N: Node> Eq for Branch<N> {}

impl<N: Node> Hash for Branch<N> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(self.tags());
        self.each_attached().for_each(|(_, node)| node.hash(state));
    }
}
