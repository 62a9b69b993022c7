//! What the nodes of the tree below a [`PageSet`](super::PageSet) have in common, and the smallest of them.

use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Which of the two values occur among some pages. This is also the tag of a child: a child with both is *mixed*.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Values(u64);

impl Values {
    pub(super) const NONE: Self = Self(0);
    pub(super) const MIXED: Self = Self(3);

    /// From two bits, as [`bits`](Self::bits) returns them.
    #[inline]
    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits & 3)
    }

    #[inline]
    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    #[inline]
    pub(super) fn only(value: bool) -> Self {
        Self(1 << u64::from(value))
    }

    pub(super) fn of(has_false: bool, has_true: bool) -> Self {
        Self(u64::from(has_false) | (u64::from(has_true) << 1))
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

    /// The bits of a word that stand for the pages of a span of at most 64.
    pub(super) fn mask(self) -> u64 {
        (u64::MAX << (self.first & 63)) & (u64::MAX >> (63 - (self.last & 63)))
    }
}

/// The number of a child in a node with `children`, a power of two that is at most 65536, from a number that has more bits.
#[inline]
pub(super) const fn index(number: u64, children: usize) -> usize {
    (number & 0xffff) as usize & (children - 1)
}

/// Part of the tree, of `1 << SHIFT` pages.
pub(super) trait Node: Clone + PartialEq + Hash {
    const SHIFT: u32;

    /// A node whose pages all have `value`.
    fn uniform(value: bool) -> Self;
    /// Gives all pages `value`, in constant time if they have it. For a node that is detached: the tag above it says
    /// `value`.
    fn reset(&self, value: bool);
    /// Which values occur in the whole node, in constant time. For the writer, and for a node that no one changes.
    fn whole(&self) -> Values;

    /// The value of `page`, of which only the bits below `SHIFT` count.
    fn get(&self, page: u64) -> bool;
    fn set(&self, span: Span, value: bool);
    /// `set` for one page, given with any bits above `SHIFT`, in an attached node. Returns whether the node may have
    /// become uniform: mostly it has not, and nothing is left to do above.
    fn set_page(&self, page: u64, value: bool) -> bool;
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
pub(super) struct Census(AtomicU64);

impl Census {
    /// Of `children` that have `values` each.
    pub(super) fn of(children: u64, values: Values) -> Self {
        Self(AtomicU64::new(Self::share(values).wrapping_mul(children)))
    }

    fn share(values: Values) -> u64 {
        (values.0 & 1) | (values.0 >> 1) << 32
    }

    /// A child had the values `old` and has `new`.
    #[inline]
    pub(super) fn replace(&self, old: Values, new: Values) {
        self.add(Self::share(new).wrapping_sub(Self::share(old)));
    }

    /// Tags have been replaced whose lower and upper bits were set as often as `old` says.
    pub(super) fn replace_many(&self, old: (u32, u32), new: (u32, u32)) {
        let shares = |(lower, upper): (u32, u32)| u64::from(lower) | u64::from(upper) << 32;
        self.add(shares(new).wrapping_sub(shares(old)));
    }

    fn add(&self, difference: u64) {
        // Relaxed: no one reads it but the writer.
        self.0.store(self.0.load(Relaxed).wrapping_add(difference), Relaxed);
    }

    pub(super) fn set(&self, children: u64, values: Values) {
        self.0.store(Self::share(values).wrapping_mul(children), Relaxed);
    }

    #[inline]
    pub(super) fn values(&self) -> Values {
        let census = self.0.load(Relaxed);
        Values::of(census & 0xffff_ffff != 0, census >> 32 != 0)
    }
}

/// A bitmap of 64 pages.
pub(super) struct Word(AtomicU64);

impl Word {
    pub(super) const fn new(bits: u64) -> Self {
        Self(AtomicU64::new(bits))
    }

    #[inline]
    pub(super) fn load(&self) -> u64 {
        // Acquire: see `store`.
        self.0.load(Acquire)
    }

    #[inline]
    pub(super) fn store(&self, word: u64) {
        // Release, for `load`: whoever sees this change also sees the changes that the writer made before it.
        self.0.store(word, Release);
    }
}

impl Node for Word {
    const SHIFT: u32 = 6;

    fn uniform(value: bool) -> Self {
        Self::new(if value { u64::MAX } else { 0 })
    }

    fn reset(&self, value: bool) {
        self.store(if value { u64::MAX } else { 0 });
    }

    fn whole(&self) -> Values {
        self.values(Span { first: 0, last: 63 })
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
        let (old, at) = (self.0.load(Relaxed), page & 63);
        // Without a branch on the value: who sets pages to what they were not makes it depend on memory that is on its way,
        // and a wrong guess then throws away all that the processor has begun meanwhile.
        let new = (old & !(1 << at)) | u64::from(value) << at;
        self.store(new);
        new == 0 || new == u64::MAX
    }

    fn values(&self, span: Span) -> Values {
        let (word, mask) = (self.load(), span.mask());
        Values::of(!word & mask != 0, word & mask != 0)
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
        Self::new(self.load())
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
