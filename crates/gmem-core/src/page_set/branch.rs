//! The inner node of the tree, and the order in which a writer changes it.

use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// Children whose tags, of two bits each, share a word.
const TAGS_PER_WORD: u64 = 32;
/// The lower bit of each of the tags in a word.
const LOWER_BITS: u64 = u64::MAX / 3;

/// `FAN_OUT` children, each of which exists once it has been mixed. `WORDS` is what their tags need.
///
/// A child is *attached* while its tag says mixed; what a detached child holds means nothing. When the writer is done,
/// a tag is mixed exactly if both values occur in the child. So equal contents have equal tags, and comparing needs
/// to follow mixed tags only.
pub(super) struct Branch<N, const FAN_OUT: usize, const WORDS: usize> {
    tags: [AtomicU64; WORDS],
    census: Census,
    children: [OnceBox<N>; FAN_OUT],
}

/// The tags of the children from `first` to `last`, which lie in `word`.
fn tag_mask(word: usize, first: u64, last: u64) -> u64 {
    let start = word as u64 * TAGS_PER_WORD;
    let end = start + TAGS_PER_WORD - 1;
    (u64::MAX << (2 * (first.max(start) - start))) & (u64::MAX >> (2 * (end - last.min(end))))
}

/// A word of tags that are all the same.
fn repeated(tag: Values) -> u64 {
    tag.bits() * LOWER_BITS
}

/// How many tags have the lower and the upper bit.
fn count(tags: u64) -> (u32, u32) {
    ((tags & LOWER_BITS).count_ones(), (tags & !LOWER_BITS).count_ones())
}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> Branch<N, FAN_OUT, WORDS> {
    /// The number of the child that has `page`.
    #[inline]
    fn child_of(page: u64) -> u64 {
        page >> N::SHIFT & (FAN_OUT as u64 - 1)
    }

    #[inline]
    fn tag(&self, child: u64) -> Values {
        // Acquire: see `put_tag`.
        let word = self.tags[index(child / TAGS_PER_WORD, WORDS)].load(Acquire);
        Values::from_bits(word >> (2 * (child % TAGS_PER_WORD)))
    }

    fn put_tag(&self, child: u64, tag: Values) {
        let word = &self.tags[index(child / TAGS_PER_WORD, WORDS)];
        let (tags, shift) = (word.load(Relaxed), 2 * (child % TAGS_PER_WORD));
        let old = Values::from_bits(tags >> shift);
        if old != tag {
            // Release, for `tag`: a reader that sees a child attached sees what it was reset to.
            word.store(tags ^ (old.bits() ^ tag.bits()) << shift, Release);
            self.census.replace(old, tag);
        }
    }

    /// The words with tags of the children from `first` to `last`, and which bits of them.
    fn words(&self, first: u64, last: u64) -> impl Iterator<Item = (usize, &AtomicU64, u64)> {
        let [first_word, last_word] = [first, last].map(|child| index(child / TAGS_PER_WORD, WORDS));
        let tags = self.tags.iter().enumerate().take(last_word + 1).skip(first_word);
        tags.map(move |(at, word)| (at, word, tag_mask(at, first, last)))
    }

    /// Replaces the tags of the children from `first` to `last`, if there are any.
    fn put_tags(&self, first: u64, last: u64, tag: Values) {
        if first > last {
            return;
        }
        for (_, word, mask) in self.words(first, last) {
            let old = word.load(Relaxed);
            let new = (old & !mask) | (repeated(tag) & mask);
            if old != new {
                word.store(new, Release);
                self.census.replace_many(count(old), count(new));
            }
        }
    }

    /// The child if it is attached.
    #[inline]
    fn attached(&self, child: u64, tag: Values) -> Option<&N> {
        if tag == Values::MIXED { self.children[index(child, FAN_OUT)].get() } else { None }
    }

    /// Attaches a detached child whose pages have `value`.
    fn attach(&self, child: u64, value: bool) -> &N {
        let node = self.children[index(child, FAN_OUT)].get_or_init(|| Box::new(N::uniform(value)));
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

    /// What occurs in the children from `first` to `last`; nothing if there are none.
    fn values_of_children(&self, first: u64, last: u64) -> Values {
        if first > last {
            return Values::NONE;
        }
        let tags = self.words(first, last).fold(0, |found, (_, word, mask)| found | (word.load(Acquire) & mask));
        Values::of(tags & LOWER_BITS != 0, tags & !LOWER_BITS != 0)
    }

    /// The first child from `first` to `last` in which `value` occurs.
    fn child_with(&self, first: u64, last: u64, value: bool) -> Option<u64> {
        self.words(first, last).find_map(|(at, word, mask)| {
            let tags = word.load(Acquire) & repeated(Values::only(value)) & mask;
            (tags != 0).then(|| at as u64 * TAGS_PER_WORD + u64::from(tags.trailing_zeros() / 2))
        })
    }

    /// The tags of all children, word by word; none that belong to no child.
    fn all_tags(&self) -> impl Iterator<Item = u64> {
        self.words(0, FAN_OUT as u64 - 1).map(|(_, word, mask)| word.load(Acquire) & mask)
    }

    fn each_attached(&self) -> impl Iterator<Item = (u64, &N)> {
        let mixed = (0..).zip(self.all_tags()).flat_map(|(word, tags)| {
            let both = tags & tags >> 1 & LOWER_BITS;
            (0..TAGS_PER_WORD).filter(move |at| both >> (2 * at) & 1 != 0).map(move |at| word * TAGS_PER_WORD + at)
        });
        mixed.filter_map(|child| Some((child, self.attached(child, Values::MIXED)?)))
    }
}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> Node for Branch<N, FAN_OUT, WORDS> {
    const SHIFT: u32 = N::SHIFT + FAN_OUT.trailing_zeros();

    fn uniform(value: bool) -> Self {
        let tag = Values::only(value);
        // A branch with one child has a word all the same, whose other tags no one reads.
        Self {
            tags: core::array::from_fn(|_| AtomicU64::new(repeated(tag))),
            census: Census::of(FAN_OUT as u64, tag),
            children: [const { OnceBox::new() }; FAN_OUT],
        }
    }

    fn reset(&self, value: bool) {
        let tag = Values::only(value);
        if self.whole() != tag {
            self.tags.iter().for_each(|word| word.store(repeated(tag), Release));
            self.census.set(FAN_OUT as u64, tag);
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.census.values()
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        let child = Self::child_of(page);
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
        let child = Self::child_of(page);
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
        let nodes = self.children.iter().filter_map(OnceBox::get);
        nodes.map(|node| size_of::<N>() + node.heap_bytes()).sum()
    }
}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> Clone for Branch<N, FAN_OUT, WORDS> {
    /// Copies what is attached. A copied child gets the tag that it then deserves: while a writer is at work it may
    /// have become uniform meanwhile.
    fn clone(&self) -> Self {
        let copy = Self {
            tags: self.tags.each_ref().map(|word| AtomicU64::new(word.load(Acquire))),
            census: Census::of(0, Values::NONE),
            children: [const { OnceBox::new() }; FAN_OUT],
        };
        let (lower, upper) = copy.all_tags().map(count).fold((0, 0), |sum, tags| (sum.0 + tags.0, sum.1 + tags.1));
        copy.census.replace_many((0, 0), (lower, upper));
        for (child, node) in self.each_attached() {
            if copy.tag(child) == Values::MIXED {
                let node = node.clone();
                copy.put_tag(child, node.whole());
                if copy.tag(child) == Values::MIXED {
                    let _ = copy.children[index(child, FAN_OUT)].set(Box::new(node));
                }
            }
        }
        copy
    }
}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> PartialEq for Branch<N, FAN_OUT, WORDS> {
    fn eq(&self, other: &Self) -> bool {
        let same = |(child, node)| other.attached(child, Values::MIXED) == Some(node);
        self.all_tags().eq(other.all_tags()) && self.each_attached().all(same)
    }
}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> Eq for Branch<N, FAN_OUT, WORDS> {}

impl<N: Node, const FAN_OUT: usize, const WORDS: usize> Hash for Branch<N, FAN_OUT, WORDS> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.all_tags().for_each(|tags| state.write_u64(tags));
        self.each_attached().for_each(|(_, node)| node.hash(state));
    }
}
