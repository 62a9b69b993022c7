//! What the nodes of the tree below a [`PageSet`](super::PageSet) have in common.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Which of the two values occur among some pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Values(u8);

impl Values {
    pub(super) const NONE: Self = Self(0);
    pub(super) const MIXED: Self = Self(3);

    #[inline]
    pub(super) fn only(value: bool) -> Self {
        Self(1 << u8::from(value))
    }

    /// From a byte, as [`bits`](Self::bits) returns them.
    #[inline]
    pub(super) const fn from_bits(bits: u8) -> Self {
        Self(bits)
    }

    #[inline]
    pub(super) const fn bits(self) -> u8 {
        self.0
    }

    pub(super) fn of(has_false: bool, has_true: bool) -> Self {
        Self(u8::from(has_false) | (u8::from(has_true) << 1))
    }

    pub(super) fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[inline]
    pub(super) fn has(self, value: bool) -> bool {
        self.0 & Self::only(value).0 != 0
    }

    pub(super) fn uniform(self) -> Option<bool> {
        match self.0 {
            1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }
}

/// The pages from `first` to `last`, both included, counted from the first page of the node that they are given to.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Span {
    /// The one page.
    pub(super) fn page(page: u64) -> Self {
        Self { first: page, last: page }
    }

    /// The first and the last child of `1 << shift` pages that has pages of this span.
    pub(super) fn children(self, shift: u32) -> (u64, u64) {
        (self.first >> shift, self.last >> shift)
    }

    /// Whether the span holds whole children of `1 << shift` pages only.
    pub(super) fn is_aligned(self, shift: u32) -> bool {
        (self.first | (self.last + 1)) & ((1 << shift) - 1) == 0
    }

    /// The part that lies in `child`, counted from the child's first page.
    pub(super) fn part(self, child: u64, shift: u32) -> Self {
        let base = child << shift;
        let last = base | ((1 << shift) - 1);
        Self { first: self.first.max(base) - base, last: self.last.min(last) - base }
    }

    pub(super) fn is_whole(self, shift: u32) -> bool {
        self.len() == 1 << shift
    }

    pub(super) fn len(self) -> u64 {
        self.last - self.first + 1
    }
}

/// The number of a child in a node with `children`, a power of two that is at most 65536, from a number that has more bits.
#[inline]
pub(super) const fn index(number: u64, children: usize) -> usize {
    (number & 0xffff) as usize & (children - 1)
}

/// Part of the tree, of `1 << SHIFT` pages.
pub(super) trait Node: Sized {
    const SHIFT: u32;
    /// What says the pages when this one cannot: the node itself where it always can.
    type Dense: Node;

    /// A node whose pages all have `value`.
    fn uniform(value: bool) -> Self;
    /// The same on the heap.
    fn boxed(value: bool) -> Box<Self> {
        Box::new(Self::uniform(value))
    }
    /// Gives all pages `value`, in constant time if they have it. For a node that is detached, whose pages have `value` by the
    /// tag above it, and for a bitmap.
    fn reset(&self, value: bool);
    /// Which values occur in the whole node, in constant time. For the writer, and for a node that no one changes.
    fn whole(&self) -> Values;

    /// The value of `page`, of which only the bits below `SHIFT` count.
    fn get(&self, page: u64) -> bool;
    /// Gives the pages of `span` `value`.
    ///
    /// # Errors
    /// What some of them are cannot be said any more. Those have the value that they had, others may have the new one. Returns
    /// the same pages in the denser form, which can say everything, and in which the change is to be made once more.
    fn set(&self, span: Span, value: bool) -> Result<(), Box<Self::Dense>>;
    /// `set` for one page, given with any bits above `SHIFT`, in an attached node. Returns whether the node may have
    /// become uniform: mostly it has not, and nothing is left to do above.
    ///
    /// # Errors
    /// As [`Node::set`].
    fn set_page(&self, page: u64, value: bool) -> Result<bool, Box<Self::Dense>>;
    fn values(&self, span: Span) -> Values;
    /// The first page of `span` that has `value`.
    fn find(&self, span: Span, value: bool) -> Option<u64>;
    /// Pages of `span` in the set.
    fn count(&self, span: Span) -> u64;
    /// Bytes allocated below this node, the node itself not counted.
    fn heap_bytes(&self) -> usize;
}

/// How many children of a node have a page with each value: below, outside of the set; in the upper half, in it.
///
/// Only the writer uses it. It says in constant time whether a node has become uniform, and whether a detached node is
/// already what it shall be reset to.
pub(super) struct Census(AtomicU32);

impl Census {
    /// Of no children.
    pub(super) const fn blank() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Of `children`, less than 65536, that have `values` each.
    pub(super) fn of(children: u64, values: Values) -> Self {
        Self(AtomicU32::new(Self::sum(children, values)))
    }

    fn sum(children: u64, values: Values) -> u32 {
        Self::share(values).wrapping_mul((children & 0xffff) as u32)
    }

    fn share(values: Values) -> u32 {
        u32::from(values.0 & 1) | u32::from(values.0 >> 1) << 16
    }

    /// A child had the values `old` and has `new`.
    #[inline]
    pub(super) fn replace(&self, old: Values, new: Values) {
        let difference = Self::share(new).wrapping_sub(Self::share(old));
        // Relaxed: no one reads it but the writer.
        self.0.store(self.0.load(Relaxed).wrapping_add(difference), Relaxed);
    }

    pub(super) fn set(&self, children: u64, values: Values) {
        self.0.store(Self::sum(children, values), Relaxed);
    }

    #[inline]
    pub(super) fn values(&self) -> Values {
        let census = self.0.load(Relaxed);
        Values::of(census & 0xffff != 0, census >> 16 != 0)
    }
}
