//! A root that allocates nothing until its pages differ.

use super::node::{Node, Span, Values};
use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Release},
};
use once_cell::race::OnceBox;

/// A node, or as long as there was no need for one the value of all its pages.
///
/// The node is never given up, so a reader needs no tag to know that it is attached.
pub(super) struct Lazy<N> {
    /// Does not change any more once the node exists.
    value: AtomicBool,
    node: OnceBox<N>,
}

impl<N: Node> Lazy<N> {
    #[inline]
    pub(super) fn node(&self) -> Option<&N> {
        self.node.get()
    }

    /// The node, unless there is none and all pages have `value`.
    fn node_for(&self, value: bool) -> Option<&N> {
        match self.node.get() {
            None if self.value() == value => None,
            _ => Some(self.node.get_or_init(|| N::boxed(self.value()))),
        }
    }

    #[inline]
    fn value(&self) -> bool {
        self.value.load(Acquire)
    }
}

impl<N: Node> Node for Lazy<N> {
    const SHIFT: u32 = N::SHIFT;
    type Dense = N::Dense;

    fn uniform(value: bool) -> Self {
        Self { value: AtomicBool::new(value), node: OnceBox::new() }
    }

    fn reset(&self, value: bool) {
        match self.node.get() {
            Some(node) => node.reset(value),
            None => self.value.store(value, Release),
        }
    }

    fn whole(&self) -> Values {
        self.node.get().map_or_else(|| Values::only(self.value()), N::whole)
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        match self.node.get() {
            Some(node) => node.get(page),
            None => self.value(),
        }
    }

    fn set(&self, span: Span, value: bool) -> Result<(), Box<N::Dense>> {
        if span.is_whole(Self::SHIFT) {
            self.reset(value);
            return Ok(());
        }
        self.node_for(value).map_or(Ok(()), |node| node.set(span, value))
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> Result<bool, Box<N::Dense>> {
        self.node_for(value).map_or(Ok(false), |node| node.set_page(page, value))
    }

    fn values(&self, span: Span) -> Values {
        self.node.get().map_or_else(|| Values::only(self.value()), |node| node.values(span))
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        match self.node.get() {
            Some(node) => node.find(span, value),
            None => (self.value() == value).then_some(span.first),
        }
    }

    fn count(&self, span: Span) -> u64 {
        match self.node.get() {
            Some(node) => node.count(span),
            None if self.value() => span.len(),
            None => 0,
        }
    }

    fn heap_bytes(&self) -> usize {
        self.node.get().map_or(0, |node| size_of::<N>() + node.heap_bytes())
    }
}
