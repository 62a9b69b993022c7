//! The inner node of the tree, and the order in which a writer changes it.

use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicU8,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// `FAN_OUT` children, each of which exists once it has been mixed, and in the dense form too once its plain form could
/// not say what its pages are.
///
/// A plain child is *attached* while its tag is mixed, and what a detached one holds means nothing. The dense form of a child
/// takes its place for ever, and always says what its pages are, whatever the tag: so a look-up, which is what there is most
/// of, need not ask the tag first. Where pages lie without order a look-up waits for memory, and costs what keeps the
/// processor from beginning the next ones meanwhile, above all its branches.
///
/// When the writer is done, a tag is mixed exactly if both values occur in the child. Tags are bytes, although two bits would do,
/// for the same reason. A range operation passes over all tags of its range instead, 1024 of them for 1 TiB.
pub(super) struct Branch<N: Node, const FAN_OUT: usize> {
    tags: [AtomicU8; FAN_OUT],
    census: Census,
    children: Places<N, FAN_OUT>,
    dense: Places<N::Dense, FAN_OUT>,
}

/// Where nodes come to be. On the heap, where it is made: the caller may be a client's thread, whose stack may not have the room.
type Places<N, const FAN_OUT: usize> = Box<[OnceBox<N>; FAN_OUT]>;

fn places<N, const FAN_OUT: usize>() -> Places<N, FAN_OUT> {
    /// For no length but the right one.
    #[cold]
    #[inline(never)]
    fn otherwise<N, const FAN_OUT: usize>() -> Places<N, FAN_OUT> {
        Box::new([const { OnceBox::new() }; FAN_OUT])
    }
    let all: Box<[OnceBox<N>]> = (0..FAN_OUT).map(|_| OnceBox::new()).collect();
    all.try_into().unwrap_or_else(|_| otherwise())
}

/// A child in the form that is attached.
pub(super) enum Attached<'a, N: Node> {
    Plain(&'a N),
    Dense(&'a N::Dense),
}

/// Evaluates the same expression for whatever form a child has.
macro_rules! in_form {
    ($child:expr, $node:ident => $body:expr) => {
        match $child {
            Attached::Plain($node) => $body,
            Attached::Dense($node) => $body,
        }
    };
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

    /// The child in the form that says where it has which value, if it has both.
    #[inline]
    pub(super) fn attached(&self, child: u64, tag: Values) -> Option<Attached<'_, N>> {
        if tag != Values::MIXED {
            return None;
        }
        let place = index(child, FAN_OUT);
        match self.dense[place].get() {
            Some(dense) => Some(Attached::Dense(dense)),
            None => self.children[place].get().map(Attached::Plain),
        }
    }

    /// Attaches a child whose pages have `value`.
    fn attach(&self, child: u64, value: bool) -> Attached<'_, N> {
        let place = index(child, FAN_OUT);
        let attached = match self.dense[place].get() {
            Some(dense) => Attached::Dense(dense),
            None => {
                let node = self.children[place].get_or_init(|| N::boxed(value));
                node.reset(value);
                Attached::Plain(node)
            }
        };
        self.put_tag(child, Values::MIXED);
        attached
    }

    /// What follows from a change of a child's pages.
    fn changed(&self, child: u64, node: &impl Node) {
        self.put_tag(child, node.whole());
    }

    /// Gives all pages of a child `value`.
    fn set_whole(&self, child: u64, value: bool) {
        let tag = self.tag(child);
        if tag == Values::only(value) {
            return;
        }
        if let Some(dense) = self.dense[index(child, FAN_OUT)].get() {
            // Before the first page changes: a tag that is not mixed must be true.
            self.put_tag(child, Values::MIXED);
            dense.reset(value);
        }
        self.put_tag(child, Values::only(value));
    }

    fn set_part(&self, child: u64, span: Span, value: bool) {
        let part = span.part(child, N::SHIFT);
        let tag = self.tag(child);
        if part.is_whole(N::SHIFT) {
            return self.set_whole(child, value);
        }
        if tag == Values::only(value) {
            return;
        }
        let dense = match self.attached(child, tag).unwrap_or_else(|| self.attach(child, !value)) {
            Attached::Plain(node) => match node.set(part, value) {
                Ok(()) => return self.changed(child, node),
                Err(dense) => self.dense[index(child, FAN_OUT)].get_or_init(|| dense),
            },
            Attached::Dense(node) => node,
        };
        // The dense form can say everything.
        let _ = dense.set(part, value);
        self.changed(child, dense);
    }

    fn values_in_part(&self, child: u64, span: Span) -> Values {
        let (tag, part) = (self.tag(child), span.part(child, N::SHIFT));
        match self.attached(child, tag) {
            Some(attached) if !part.is_whole(N::SHIFT) => in_form!(attached, node => node.values(part)),
            _ => tag,
        }
    }

    /// What occurs in the children from `first` to `last`; nothing if there are none.
    fn values_of_children(&self, first: u64, last: u64) -> Values {
        self.tags(first, last).fold(Values::NONE, |found, (_, tag)| found.with(tag))
    }
}

impl<N: Node, const FAN_OUT: usize> Node for Branch<N, FAN_OUT> {
    const SHIFT: u32 = N::SHIFT + FAN_OUT.trailing_zeros();
    type Dense = Self;

    fn uniform(value: bool) -> Self {
        Self {
            tags: core::array::from_fn(|_| AtomicU8::new(Values::only(value).bits())),
            census: Census::of(FAN_OUT as u64, Values::only(value)),
            children: places(),
            dense: places(),
        }
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            self.dense.iter().filter_map(OnceBox::get).for_each(|dense| dense.reset(value));
            self.tags.iter().for_each(|place| place.store(Values::only(value).bits(), Release));
            self.census.set(FAN_OUT as u64, Values::only(value));
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.census.values()
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        let child = Self::child_of(page);
        if let Some(dense) = self.dense[index(child, FAN_OUT)].get() {
            return dense.get(page);
        }
        let tag = self.tag(child);
        match self.attached(child, tag) {
            Some(attached) => in_form!(attached, node => node.get(page)),
            None => tag.has(true),
        }
    }

    fn set(&self, span: Span, value: bool) -> Result<(), Box<Self>> {
        let (first, last) = span.children(N::SHIFT);
        self.set_part(first, span, value);
        if first < last {
            (first + 1..last).for_each(|child| self.set_whole(child, value));
            self.set_part(last, span, value);
        }
        Ok(())
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> Result<bool, Box<Self>> {
        let child = Self::child_of(page);
        let alone = || Span::page(page & ((1 << Self::SHIFT) - 1));
        match self.attached(child, self.tag(child)) {
            Some(Attached::Dense(node)) => match node.set_page(page, value) {
                Ok(false) => return Ok(false),
                _ => self.changed(child, node),
            },
            Some(Attached::Plain(node)) => match node.set_page(page, value) {
                Ok(false) => return Ok(false),
                Ok(true) => self.changed(child, node),
                Err(dense) => {
                    let _ = self.dense[index(child, FAN_OUT)].get_or_init(|| dense);
                    self.set_part(child, alone(), value);
                }
            },
            None => self.set_part(child, alone(), value),
        }
        Ok(self.whole() != Values::MIXED)
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
            let found = |attached: Attached<'_, N>| in_form!(attached, node => node.find(part, value));
            let page = self.attached(child, tag).map_or(Some(part.first), found)?;
            Some((child << N::SHIFT) + page)
        })
    }

    fn count(&self, span: Span) -> u64 {
        let (first, last) = span.children(N::SHIFT);
        let in_child = |(child, tag): (u64, Values)| {
            let part = span.part(child, N::SHIFT);
            match self.attached(child, tag) {
                Some(attached) => in_form!(attached, node => node.count(part)),
                None if tag.has(true) => part.len(),
                None => 0,
            }
        };
        self.tags(first, last).map(in_child).sum()
    }

    fn heap_bytes(&self) -> usize {
        let nodes = self.children.iter().filter_map(OnceBox::get);
        let dense = self.dense.iter().filter_map(OnceBox::get);
        let below = nodes.map(|node| size_of::<N>() + node.heap_bytes()).sum::<usize>();
        below + dense.map(size_of_val).sum::<usize>() + size_of_val(&*self.children) + size_of_val(&*self.dense)
    }
}
