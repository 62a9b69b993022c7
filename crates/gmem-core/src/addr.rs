//! Page numbers, ranges of pages and mapping levels.
//!
//! A guest address is a claim until one of these constructors has accepted it. Afterwards alignment and the absence
//! of wrap-around are facts of the type, and no one checks them again.

use core::fmt;

/// Base-2 logarithm of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a base page. Every architecture that gmem models uses 4 KiB granules.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// A page number in one of the address spaces of this crate. See [`Gfn`], [`PageIndex`] and [`Pfn`].
pub trait PageNumber: Copy + Ord + fmt::Debug {
    /// Wraps a raw page number.
    fn from_raw(raw: u64) -> Self;
    /// The raw page number.
    fn raw(self) -> u64;

    /// The page `pages` after this one, or `None` when the number would wrap.
    fn checked_add(self, pages: u64) -> Option<Self> {
        self.raw().checked_add(pages).map(Self::from_raw)
    }

    /// The first page of the naturally aligned block of `level` that holds this page.
    fn align_down(self, level: Level) -> Self {
        Self::from_raw(self.raw() & !(level.pages() - 1))
    }
}

macro_rules! page_number {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl PageNumber for $name {
            fn from_raw(raw: u64) -> Self {
                Self(raw)
            }
            fn raw(self) -> u64 {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{:#x}"), self.0)
            }
        }
    };
}

page_number! {
    /// Guest frame number: a guest physical address divided by [`PAGE_SIZE`].
    Gfn, "gfn "
}
page_number! {
    /// Page offset within a guest_memfd file.
    PageIndex, "index "
}
page_number! {
    /// Page frame number of host memory.
    Pfn, "pfn "
}

impl Gfn {
    /// The guest physical address of the first byte of the page.
    ///
    /// Saturates for numbers that no guest physical address has.
    #[must_use]
    pub fn gpa(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }

    /// The page that holds guest physical address `gpa`.
    #[must_use]
    pub fn of_gpa(gpa: u64) -> Self {
        Self(gpa >> PAGE_SHIFT)
    }
}

/// Why a pair of byte values does not describe a [`PageRange`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeError {
    /// The length is zero.
    Empty,
    /// The start or the length is not a multiple of [`PAGE_SIZE`].
    Unaligned,
    /// The end lies beyond the address space. A range that ends exactly at 2^64 counts, as in the kernel.
    Wraps,
}

/// A range of pages, never empty and never wrapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange<P> {
    start: P,
    end: P,
}

/// A range of guest frames.
pub type GfnRange = PageRange<Gfn>;
/// A range of pages of a file.
pub type IndexRange = PageRange<PageIndex>;
/// A range of host page frames.
pub type PfnRange = PageRange<Pfn>;

impl<P: PageNumber> PageRange<P> {
    /// The range `[start, end)`, or `None` if it is empty.
    pub fn new(start: P, end: P) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// `count` pages from `start`, or `None` if that is no page or wraps.
    pub fn with_len(start: P, count: u64) -> Option<Self> {
        Self::new(start, start.checked_add(count)?)
    }

    /// The single page `page`; the last page number of the address space has no such range and saturates.
    pub fn page(page: P) -> Self {
        match page.checked_add(1) {
            Some(end) => Self { start: page, end },
            None => Self { start: P::from_raw(u64::MAX - 1), end: page },
        }
    }

    /// Validates a byte range.
    ///
    /// # Errors
    /// In this order: [`RangeError::Empty`], [`RangeError::Wraps`], [`RangeError::Unaligned`], which is the order of
    /// `kvm_vm_ioctl_set_mem_attributes()`; all three are EINVAL there.
    pub fn from_bytes(start: u64, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty);
        }
        let end = start.checked_add(len).ok_or(RangeError::Wraps)?;
        if (start | len) & (PAGE_SIZE - 1) != 0 {
            return Err(RangeError::Unaligned);
        }
        Ok(Self { start: P::from_raw(start >> PAGE_SHIFT), end: P::from_raw(end >> PAGE_SHIFT) })
    }

    /// First page.
    pub fn start(self) -> P {
        self.start
    }

    /// First page after the range.
    pub fn end(self) -> P {
        self.end
    }

    /// Number of pages, at least one.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u64 {
        self.end.raw() - self.start.raw()
    }

    /// Whether `page` lies in the range.
    pub fn contains(self, page: P) -> bool {
        self.start <= page && page < self.end
    }

    /// Whether every page of `other` lies in the range.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The pages that both ranges hold.
    pub fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The smallest range that covers both.
    #[must_use]
    pub fn hull(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    /// The smallest range of whole blocks of `level` that covers this one. Saturates at the end of the address space.
    #[must_use]
    pub fn align_out(self, level: Level) -> Self {
        let mask = level.pages() - 1;
        let end = self.end.raw().checked_add(mask).map_or(u64::MAX, |end| end & !mask);
        Self { start: self.start.align_down(level), end: P::from_raw(end) }
    }

    /// Every page, in ascending order.
    pub fn pages(self) -> impl DoubleEndedIterator<Item = P> {
        (self.start.raw()..self.end.raw()).map(P::from_raw)
    }

    /// The same distances from another origin: `start()` becomes `origin`. `None` if that wraps.
    pub fn rebase<Q: PageNumber>(self, origin: Q) -> Option<PageRange<Q>> {
        PageRange::with_len(origin, self.len())
    }
}

impl<P: PageNumber> fmt::Debug for PageRange<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}, {:#x})", self.start, self.end.raw())
    }
}

/// A mapping level of a stage-2 page table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Level {
    /// 4 KiB.
    #[default]
    Page4K,
    /// 2 MiB.
    Page2M,
    /// 1 GiB.
    Page1G,
}

impl Level {
    /// All levels, smallest first.
    pub const ALL: [Self; 3] = [Self::Page4K, Self::Page2M, Self::Page1G];

    /// Base pages that one entry of this level maps; a power of two.
    #[must_use]
    pub const fn pages(self) -> u64 {
        match self {
            Self::Page4K => 1,
            Self::Page2M => 512,
            Self::Page1G => 512 * 512,
        }
    }

    /// The next smaller level, if there is one.
    #[must_use]
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Page4K => None,
            Self::Page2M => Some(Self::Page4K),
            Self::Page1G => Some(Self::Page2M),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_ranges_are_refused_in_the_kernels_order() {
        let check = |start, len| GfnRange::from_bytes(start, len);
        assert_eq!(check(1, 0), Err(RangeError::Empty));
        assert_eq!(check(u64::MAX, 2), Err(RangeError::Wraps));
        assert_eq!(check(0u64.wrapping_sub(PAGE_SIZE), PAGE_SIZE), Err(RangeError::Wraps));
        assert_eq!(check(1, PAGE_SIZE), Err(RangeError::Unaligned));
        assert_eq!(check(PAGE_SIZE, 2 * PAGE_SIZE), Ok(GfnRange::new(Gfn(1), Gfn(3)).unwrap()));
    }

    #[test]
    fn aligning_out_covers_whole_blocks() {
        let range = GfnRange::new(Gfn(511), Gfn(513)).unwrap();
        assert_eq!(range.align_out(Level::Page2M), GfnRange::new(Gfn(0), Gfn(1024)).unwrap());
        assert_eq!(range.align_out(Level::Page4K), range);
    }
}
