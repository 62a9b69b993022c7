//! The pages of a 2 MiB block that are in the set, when they are one run.

use super::node::{Span, Values};

/// Base-2 logarithm of the pages in a block.
pub(super) const BLOCK_SHIFT: u32 = 9;
/// Pages of a block.
const BLOCK: u32 = 1 << BLOCK_SHIFT;

/// The pages of a block in the set, as one run on the circle that the block's pages form when the first follows the
/// last: so all the pages but a run are one run too.
///
/// This is the state of most blocks that are not uniform: one odd page, or the edge of a range. Bits 0 to 8 are the first
/// page and bits 9 to 18 the number of pages; no pages and all pages have first page 0, so each state has one form.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Arc(u32);

impl Arc {
    #[inline]
    pub(super) fn uniform(value: bool) -> Self {
        Self(if value { BLOCK << 9 } else { 0 })
    }

    /// `len` pages from `start`, both taken as numbers on the circle.
    fn new(start: u32, len: u32) -> Self {
        match len {
            0 => Self::uniform(false),
            BLOCK.. => Self::uniform(true),
            _ => Self((start % BLOCK) | (len << 9)),
        }
    }

    #[inline]
    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    #[inline]
    pub(super) const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    #[inline]
    fn start(self) -> u32 {
        self.0 % BLOCK
    }

    #[inline]
    fn len(self) -> u32 {
        self.0 >> 9
    }

    /// The pages that are not in this one.
    fn complement(self) -> Self {
        Self::new(self.start() + self.len(), BLOCK - self.len())
    }

    /// How far after the first page `page` lies.
    #[inline]
    fn offset(self, page: u32) -> u32 {
        page.wrapping_sub(self.start()) % BLOCK
    }

    #[inline]
    pub(super) fn get(self, page: u64) -> bool {
        self.offset((page & 0x1ff) as u32) < self.len()
    }

    /// The pages of both, if they are one run.
    fn union(self, other: Self) -> Option<Self> {
        let (lower, upper) = (self.offset(other.start()), other.offset(self.start()));
        if self.len() == 0 || other.len() == BLOCK {
            Some(other)
        } else if lower <= self.len() {
            Some(Self::new(self.start(), self.len().max(lower + other.len())))
        } else {
            (upper <= other.len()).then(|| Self::new(other.start(), other.len().max(upper + self.len())))
        }
    }

    /// This state after the pages of `span` were given `value`, if it is one run.
    pub(super) fn set(self, span: Span, value: bool) -> Option<Self> {
        let changed = Self::new((span.first & 0x1ff) as u32, (span.len() & 0x3ff) as u32);
        if value { self.union(changed) } else { self.complement().union(changed).map(Self::complement) }
    }

    #[inline]
    pub(super) fn whole(self) -> Values {
        match self.len() {
            0 => Values::only(false),
            BLOCK => Values::only(true),
            _ => Values::MIXED,
        }
    }

    pub(super) fn values(self, span: Span) -> Values {
        Values::of(self.find(span, false).is_some(), self.find(span, true).is_some())
    }

    /// The first page of `span` that has `value`.
    pub(super) fn find(self, span: Span, value: bool) -> Option<u64> {
        let wanted = if value { self } else { self.complement() };
        if wanted.get(span.first) {
            return Some(span.first);
        }
        // What the run has on the other side of the block's end lies before the span.
        let start = u64::from(wanted.start());
        (wanted.len() > 0 && span.first < start && start <= span.last).then_some(start)
    }

    /// Pages of `span` in the set.
    pub(super) fn count(self, span: Span) -> u64 {
        let end = u64::from(self.start() + self.len());
        let both = |from: u64, to: u64| to.min(span.last + 1).saturating_sub(from.max(span.first));
        both(u64::from(self.start()), end.min(u64::from(BLOCK))) + both(0, end.saturating_sub(u64::from(BLOCK)))
    }

    /// The 64 pages from `64 * index`, as a bitmap.
    pub(super) fn word(self, index: u64) -> u64 {
        let pages = Span { first: index * 64, last: index * 64 + 63 };
        let below = |end: u64| match end.saturating_sub(pages.first) {
            bits @ 0..64 => (1 << bits) - 1,
            _ => u64::MAX,
        };
        let end = u64::from(self.start() + self.len());
        (below(end) & !below(u64::from(self.start()))) | below(end.saturating_sub(u64::from(BLOCK)))
    }
}
