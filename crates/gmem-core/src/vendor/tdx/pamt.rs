//! PAMT: what every page of the TDX memory range is used for, and by whom.

use super::sept::shift;
use crate::addr::PfnRange;
use crate::runs::{Linear, RunMap};

/// Use of a page. The discriminant is the module's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(u8)]
pub enum PageType {
    /// Not directly assigned: free, or covered by an entry of another size.
    #[default]
    Nda = 0,
    /// Reserved area of the memory range.
    Reserved = 1,
    /// Guest memory.
    Reg = 3,
    /// TD root.
    Tdr = 4,
    /// TD control structure.
    Tdcx = 5,
    /// vCPU root.
    Tdvpr = 6,
    /// Secure EPT table.
    Ept = 8,
}

/// PAMT entry of one page of one size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct PamtEntry {
    /// Use.
    pub page_type: PageType,
    /// HPA of the owner's TDR. Keeps its value when the page becomes free, as in the module.
    pub owner: u64,
    /// TD epoch of the last TDH.MEM.RANGE.BLOCK. Keeps its value when the page becomes free.
    pub bepoch: u64,
}

impl Linear for PamtEntry {
    fn advance(&self, _: u64) -> Self {
        *self
    }
}

/// The PAMT of one memory range, with entries of 4 KiB, 2 MiB and 1 GiB.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Pamt {
    range: PfnRange,
    sizes: [RunMap<PamtEntry>; 3],
}

impl Pamt {
    pub(super) fn new(range: PfnRange) -> Self {
        Self { range, sizes: Default::default() }
    }

    /// The memory range that has a PAMT.
    #[must_use]
    pub fn range(&self) -> PfnRange {
        self.range
    }

    /// The entry of `size` (0 = 4 KiB) that covers `pfn`.
    #[must_use]
    pub fn entry(&self, size: u8, pfn: u64) -> PamtEntry {
        let entries = self.sizes.get(usize::from(size));
        entries.and_then(|entries| entries.get(pfn >> shift(size))).unwrap_or_default()
    }

    /// The size and the entry that describe `pfn`: the largest entry that is guest memory, else the 4 KiB one.
    #[must_use]
    pub fn leaf(&self, pfn: u64) -> (u8, PamtEntry) {
        let large = [2, 1].map(|size| (size, self.entry(size, pfn)));
        let found = large.into_iter().find(|(_, entry)| entry.page_type == PageType::Reg);
        found.unwrap_or_else(|| (0, self.entry(0, pfn)))
    }

    /// Whether all 4 KiB entries of the 2 MiB range at `pfn` are free.
    pub(super) fn is_2m_free(&self, pfn: u64) -> bool {
        self.children(1, pfn).all(|entry| entry.page_type == PageType::Nda)
    }

    pub(super) fn set(&mut self, size: u8, pfn: u64, entry: PamtEntry) {
        self.set_run(size, pfn >> shift(size), 1, entry);
    }

    pub(super) fn set_type(&mut self, size: u8, pfn: u64, page_type: PageType) {
        let entry = self.entry(size, pfn);
        self.set(size, pfn, PamtEntry { page_type, ..entry });
    }

    /// One entry of `size` becomes 512 of the size below, never blocked.
    pub(super) fn demote(&mut self, size: u8, pfn: u64) {
        let entry = self.entry(size, pfn);
        self.set(size, pfn, PamtEntry { page_type: PageType::Nda, ..entry });
        if let Some(below) = size.checked_sub(1) {
            self.set_run(below, pfn >> shift(size) << 9, 512, PamtEntry { bepoch: 0, ..entry });
        }
    }

    /// 512 entries become one of `size`; it keeps the epoch that it had before.
    pub(super) fn promote(&mut self, size: u8, pfn: u64) {
        let Some(below) = size.checked_sub(1) else { return };
        let first = self.entry(below, pfn);
        let bepoch = self.entry(size, pfn).bepoch;
        self.set(size, pfn, PamtEntry { bepoch, ..first });
        let start = pfn >> shift(size) << 9;
        let children: alloc::vec::Vec<_> = self.runs(below, start, 512).collect();
        for (at, count, entry) in children {
            self.set_run(below, at, count, PamtEntry { page_type: PageType::Nda, ..entry });
        }
    }

    fn children(&self, size: u8, pfn: u64) -> impl Iterator<Item = PamtEntry> {
        let below = size.saturating_sub(1);
        self.runs(below, pfn >> shift(size) << 9, 512).map(|(_, _, entry)| entry)
    }

    /// Runs of entries of `size` that were ever used, in `count` entries from `index`: `(index, count, entry)`.
    pub fn runs(&self, size: u8, index: u64, count: u64) -> impl Iterator<Item = (u64, u64, PamtEntry)> {
        let entries = self.sizes.get(usize::from(size));
        entries.into_iter().flat_map(move |entries| entries.runs(index, count))
    }

    fn set_run(&mut self, size: u8, index: u64, count: u64, entry: PamtEntry) {
        let Some(entries) = self.sizes.get_mut(usize::from(size)) else { return };
        if entry == PamtEntry::default() {
            entries.remove(index, count);
        } else {
            entries.insert(index, count, entry);
        }
    }

    /// Everything becomes free.
    pub(super) fn clear(&mut self) {
        self.sizes = Default::default();
    }
}
