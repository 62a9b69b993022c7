//! The inner node of the tree, and the order in which a writer changes it.

use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// `FAN_OUT` children, each of which exists once it has been mixed.
///
/// A child is *attached* while its tag says mixed; what a detached child holds means nothing. When the writer is done,
/// a tag is mixed exactly if both values occur in the child. So equal contents have equal tags, and comparing needs
/// to follow mixed tags only.
///
/// Tags are bytes, although two bits would do: single pages are what a guest converts most, and where they lie without
/// order, their cost is the number of instructions that the processor can look ahead while it waits for memory. A
/// range operation passes over all tags of its range instead, 1024 of them for 1 TiB.
pub(super) struct Branch<N, const FAN_OUT: usize> {
    tags: [AtomicU8; FAN_OUT],
    census: Census,
    children: [OnceBox<N>; FAN_OUT],
}

impl<N: Node, const FAN_OUT: usize> Branch<N, FAN_OUT> {
    /// The number of the child that has `page`.
    #[inline]
    fn child_of(page: u64) -> u64 {
        page >> N::SHIFT & (FAN_OUT as u64 - 1)
    }

    #[inline]
    fn tag(&self, child: u64) -> Values {
        // Acquire: see `put_tag`.
        Values::from_bits(self.tags[index(child, FAN_OUT)].load(Acquire))
    }

    fn put_tag(&self, child: u64, tag: Values) {
        let place = &self.tags[index(child, FAN_OUT)];
        let old = Values::from_bits(place.load(Relaxed));
        if old != tag {
            // Release, for `tag`: a reader that sees a child attached sees what it was reset to.
            place.store(tag.bits(), Release);
            self.census.replace(old, tag);
        }
    }

    /// The tags of the children from `first` to `last`, if there are any, with the children's numbers.
    fn tags(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, Values)> {
        (first..=last).map(|child| (child, self.tag(child)))
    }

    /// The child if it is attached.
    #[inline]
    pub(super) fn attached(&self, child: u64, tag: Values) -> Option<&N> {
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
        self.tags(first, last).fold(Values::NONE, |found, (_, tag)| found.with(tag))
    }

    fn all_tags(&self) -> impl Iterator<Item = Values> {
        self.tags.iter().map(|tag| Values::from_bits(tag.load(Acquire)))
    }

    fn each_attached(&self) -> impl Iterator<Item = (u64, &N)> {
        (0..).zip(self.all_tags()).filter_map(|(child, tag)| Some((child, self.attached(child, tag)?)))
    }
}

impl<N: Node, const FAN_OUT: usize> Node for Branch<N, FAN_OUT> {
    const SHIFT: u32 = N::SHIFT + FAN_OUT.trailing_zeros();

    fn uniform(value: bool) -> Self {
        let tag = Values::only(value);
        Self {
            tags: core::array::from_fn(|_| AtomicU8::new(tag.bits())),
            census: Census::of(FAN_OUT as u64, tag),
            children: [const { OnceBox::new() }; FAN_OUT],
        }
    }

    fn reset(&self, value: bool) {
        let tag = Values::only(value);
        if self.whole() != tag {
            self.tags.iter().for_each(|place| place.store(tag.bits(), Release));
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
            (first + 1..last).for_each(|child| self.put_tag(child, Values::only(value)));
            self.set_part(last, span, value);
        }
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> bool {
        let child = Self::child_of(page);
        match self.attached(child, self.tag(child)) {
            Some(node) if !node.set_page(page, value) => return false,
            Some(node) => self.put_tag(child, node.whole()),
            None => self.set_part(child, Span::page(page & ((1 << Self::SHIFT) - 1)), value),
        }
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
        let (first, last) = span.children(N::SHIFT);
        self.tags(first, last).filter(|(_, tag)| tag.has(value)).find_map(|(child, tag)| {
            let part = span.part(child, N::SHIFT);
            let page = self.attached(child, tag).map_or(Some(part.first), |node| node.find(part, value))?;
            Some((child << N::SHIFT) + page)
        })
    }

    fn count(&self, span: Span) -> u64 {
        let (first, last) = span.children(N::SHIFT);
        let in_child = |(child, tag)| {
            let part = span.part(child, N::SHIFT);
            match self.attached(child, tag) {
                Some(node) => node.count(part),
                None if tag.has(true) => part.len(),
                None => 0,
            }
        };
        self.tags(first, last).map(in_child).sum()
    }

    fn heap_bytes(&self) -> usize {
        let nodes = self.children.iter().filter_map(OnceBox::get);
        nodes.map(|node| size_of::<N>() + node.heap_bytes()).sum()
    }
}

impl<N: Node, const FAN_OUT: usize> Clone for Branch<N, FAN_OUT> {
    /// Copies what is attached. A copied child gets the tag that it then deserves: while a writer is at work it may
    /// have become uniform meanwhile.
    fn clone(&self) -> Self {
        let copy = Self::uniform(false);
        for (child, tag) in (0..).zip(self.all_tags()) {
            let node = self.attached(child, tag).cloned();
            copy.put_tag(child, node.as_ref().map_or(tag, N::whole));
            if let (Some(node), Values::MIXED) = (node, copy.tag(child)) {
                let _ = copy.children[index(child, FAN_OUT)].set(Box::new(node));
            }
        }
        copy
    }
}

impl<N: Node, const FAN_OUT: usize> PartialEq for Branch<N, FAN_OUT> {
    fn eq(&self, other: &Self) -> bool {
        let same = |(child, node)| other.attached(child, Values::MIXED) == Some(node);
        self.all_tags().eq(other.all_tags()) && self.each_attached().all(same)
    }
}

impl<N: Node, const FAN_OUT: usize> Eq for Branch<N, FAN_OUT> {}

impl<N: Node, const FAN_OUT: usize> Hash for Branch<N, FAN_OUT> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for tags in self.tags.chunks(32) {
            state.write_u64(tags.iter().fold(0, |word, tag| word << 2 | u64::from(tag.load(Acquire))));
        }
        self.each_attached().for_each(|(_, node)| node.hash(state));
    }
}
