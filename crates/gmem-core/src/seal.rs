//! The first form of the idea: an ordinary memfd that a seal turns into guest memory (`F_SEAL_GUEST`, August 2021).
//!
//! It was never merged, and its difficulties are why guest_memfd is a file of its own. It is modelled so that the questions of
//! that thread can be asked of it: the seal is only allowed while the file has neither pages nor mappings; afterwards
//! read, write and mmap are refused; holes and truncation work on whole pages, and where they cut a huge page that cannot
//! be split they are refused, because zeroing the part would be a write to guest memory; migration and swap always fail.
//!
//! Every method is atomic except a read, which looks at the seal before it copies and holds no lock in between, because
//! the lock that serialises the seal is too expensive for readers: see [`MemfdRead`].

use alloc::collections::BTreeSet;

/// Why an operation on a [`Memfd`] was refused. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SealError {
    /// The file has pages or mappings, so it cannot be sealed. EBUSY.
    InUse,
    /// The file is sealed: only a guest may touch it. EPERM.
    Sealed,
    /// The range is not one of whole pages. EINVAL.
    Partial,
    /// A huge page of a sealed file is cut and cannot be split. EBUSY.
    SplitFailed,
    /// The page is beyond the end. For a guest: EFAULT.
    BeyondEnd,
}

/// What a hole did to the pages in it that had memory.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Hole {
    /// Their memory went back to the host.
    pub freed: BTreeSet<u64>,
    /// Their memory is part of a huge page that stays; it was overwritten with zeros.
    pub zeroed: BTreeSet<u64>,
}

/// A memfd that can be sealed for guests.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Memfd {
    pages: u64,
    folio_pages: u64,
    sealed: bool,
    mappings: u32,
    present: BTreeSet<u64>,
    whole: BTreeSet<u64>,
}

impl Memfd {
    /// A file of `pages` pages that is backed by folios of `folio_pages` pages where they fit; 0 counts as 1.
    #[must_use]
    pub fn new(pages: u64, folio_pages: u64) -> Self {
        Self {
            pages,
            folio_pages: folio_pages.max(1),
            sealed: false,
            mappings: 0,
            present: BTreeSet::new(),
            whole: BTreeSet::new(),
        }
    }

    /// Whether only guests may touch the file.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Size in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether the page has memory.
    #[must_use]
    pub fn is_present(&self, page: u64) -> bool {
        self.present.contains(&page)
    }

    /// Turns the file into guest memory, for ever.
    ///
    /// # Errors
    /// [`SealError::InUse`].
    pub fn seal(&mut self) -> Result<(), SealError> {
        if !self.present.is_empty() || self.mappings > 0 {
            return Err(SealError::InUse);
        }
        self.sealed = true;
        Ok(())
    }

    /// The VMM maps the file.
    ///
    /// # Errors
    /// [`SealError::Sealed`].
    pub fn map(&mut self) -> Result<(), SealError> {
        self.refuse_sealed()?;
        self.mappings = self.mappings.saturating_add(1);
        Ok(())
    }

    /// The VMM unmaps the file.
    pub fn unmap(&mut self) {
        self.mappings = self.mappings.saturating_sub(1);
    }

    /// The VMM writes to a page.
    ///
    /// # Errors
    /// [`SealError::Sealed`], [`SealError::BeyondEnd`].
    pub fn write(&mut self, page: u64) -> Result<(), SealError> {
        self.refuse_sealed()?;
        self.touch(page)
    }

    /// A guest touches a page of the sealed file; the page comes into being.
    ///
    /// # Errors
    /// [`SealError::BeyondEnd`].
    pub fn touch(&mut self, page: u64) -> Result<(), SealError> {
        if page >= self.pages {
            return Err(SealError::BeyondEnd);
        }
        if !self.present.contains(&page) {
            self.add_folio(page);
        }
        Ok(())
    }

    fn add_folio(&mut self, page: u64) {
        let head = self.head_of(page);
        let end = head.saturating_add(self.folio_pages);
        let fits = end <= self.pages && self.present.range(head..end).next().is_none();
        if fits && self.folio_pages > 1 {
            self.whole.insert(head);
            self.present.extend(head..end);
        } else {
            self.present.insert(page);
        }
    }

    /// Takes the memory of the pages `[first, end)` away. Of a huge page that is cut and cannot be split, the part is zeroed
    /// and the memory stays (`truncate_inode_partial_folio()`).
    ///
    /// # Errors
    /// [`SealError::SplitFailed`] for such a huge page if the file is sealed.
    pub fn punch(&mut self, first: u64, end: u64, split: Split) -> Result<Hole, SealError> {
        let stays = match split {
            Split::Works => BTreeSet::new(),
            Split::Fails => [first, end].into_iter().filter_map(|edge| self.folio_cut_at(edge)).collect(),
        };
        if self.sealed && !stays.is_empty() {
            return Err(SealError::SplitFailed);
        }
        let touches = |head: u64| head < end && first < head.saturating_add(self.folio_pages);
        self.whole.retain(|head| stays.contains(head) || !touches(*head));
        let inside = self.present.iter().copied().filter(|page| (first..end).contains(page));
        let (zeroed, freed): (BTreeSet<_>, BTreeSet<_>) = inside.partition(|page| stays.contains(&self.head_of(*page)));
        self.present.retain(|page| !freed.contains(page));
        Ok(Hole { freed, zeroed })
    }

    fn head_of(&self, page: u64) -> u64 {
        page - page % self.folio_pages
    }

    fn folio_cut_at(&self, edge: u64) -> Option<u64> {
        let head = self.head_of(edge);
        (edge != head && self.whole.contains(&head)).then_some(head)
    }

    /// Gives the file a new size in bytes. A file that shrinks loses what is beyond its new end, as in a hole there.
    ///
    /// # Errors
    /// [`SealError::Partial`] on a sealed file, where zeroing the rest of a page would be a write to guest memory;
    /// [`SealError::SplitFailed`].
    pub fn truncate(&mut self, bytes: u64, split: Split) -> Result<Hole, SealError> {
        if self.sealed && !bytes.is_multiple_of(crate::addr::PAGE_SIZE) {
            return Err(SealError::Partial);
        }
        let pages = bytes.div_ceil(crate::addr::PAGE_SIZE);
        // Huge pages that could not be split reach beyond the old end.
        let hole = if pages < self.pages { self.punch(pages, u64::MAX, split)? } else { Hole::default() };
        self.pages = pages;
        Ok(hole)
    }

    /// The kernel wants to move or to swap a page out.
    ///
    /// # Errors
    /// [`SealError::Sealed`].
    pub fn relocate(&self) -> Result<(), SealError> {
        self.refuse_sealed()
    }

    fn refuse_sealed(&self) -> Result<(), SealError> {
        if self.sealed { Err(SealError::Sealed) } else { Ok(()) }
    }
}

/// Whether a huge page that is cut can be split.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Split {
    /// It can.
    Works,
    /// Someone holds a reference to it.
    Fails,
}

/// A read by the VMM: look at the seal, then copy. The two are not one step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MemfdRead {
    page: u64,
    permitted: bool,
}

/// What a read wants next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReadStep {
    /// Call again; others may come in between.
    Continue,
    /// Copy the page to the reader; zeros if it has no memory.
    Copy,
}

impl MemfdRead {
    /// Reads `page`.
    #[must_use]
    pub fn new(page: u64) -> Self {
        Self { page, permitted: false }
    }

    /// The next step. After [`ReadStep::Copy`] the read is over.
    ///
    /// # Errors
    /// [`SealError::Sealed`] if the file was sealed when the read began; [`SealError::BeyondEnd`].
    pub fn step(&mut self, memfd: &Memfd) -> Result<ReadStep, SealError> {
        if self.permitted {
            return if self.page < memfd.pages { Ok(ReadStep::Copy) } else { Err(SealError::BeyondEnd) };
        }
        memfd.refuse_sealed()?;
        self.permitted = true;
        Ok(ReadStep::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seal_needs_an_empty_file_and_then_keeps_the_vmm_out() {
        let mut memfd = Memfd::new(4, 1);
        memfd.write(0).unwrap();
        assert_eq!(memfd.seal(), Err(SealError::InUse));
        memfd.punch(0, 4, Split::Fails).unwrap();
        memfd.map().unwrap();
        assert_eq!(memfd.seal(), Err(SealError::InUse));
        memfd.unmap();
        memfd.seal().unwrap();
        assert_eq!(memfd.write(0), Err(SealError::Sealed));
        assert_eq!(memfd.map(), Err(SealError::Sealed));
        assert_eq!(memfd.relocate(), Err(SealError::Sealed));
        assert_eq!(MemfdRead::new(0).step(&memfd), Err(SealError::Sealed));
        memfd.touch(3).unwrap();
        assert_eq!(memfd.touch(4), Err(SealError::BeyondEnd));
    }

    #[test]
    fn a_cut_huge_page_is_split_or_the_cut_is_refused() {
        let mut memfd = Memfd::new(8, 4);
        memfd.seal().unwrap();
        memfd.touch(5).unwrap();
        let before = memfd.clone();
        assert_eq!(memfd.punch(5, 6, Split::Fails), Err(SealError::SplitFailed));
        assert_eq!(memfd.truncate(6 << 12, Split::Fails), Err(SealError::SplitFailed));
        assert_eq!(memfd.truncate(100, Split::Works), Err(SealError::Partial));
        assert_eq!(memfd, before, "a refused operation changes nothing");
        assert_eq!(memfd.truncate(6 << 12, Split::Works), Ok(freed([6, 7])));
        assert!(memfd.is_present(4) && memfd.is_present(5) && memfd.pages() == 6);
        assert_eq!(memfd.punch(4, 5, Split::Fails), Ok(freed([4])), "it is no huge page any more");
    }

    fn freed<const N: usize>(pages: [u64; N]) -> Hole {
        Hole { freed: BTreeSet::from(pages), zeroed: BTreeSet::new() }
    }

    #[test]
    fn of_an_unsealed_huge_page_that_cannot_be_split_a_part_is_zeroed_and_all_stays() {
        let mut memfd = Memfd::new(12, 4);
        for page in [0, 4, 8] {
            memfd.write(page).unwrap();
        }
        let hole = Hole { freed: BTreeSet::from([4, 5, 6, 7]), zeroed: BTreeSet::from([2, 3, 8]) };
        assert_eq!(memfd.punch(2, 9, Split::Fails), Ok(hole));
        assert!([0, 2, 3, 8, 11].into_iter().all(|page| memfd.is_present(page)));
        let beyond = Hole { freed: BTreeSet::new(), zeroed: BTreeSet::from([9, 10, 11]) };
        assert_eq!(memfd.truncate(9 << 12, Split::Fails), Ok(beyond));
        assert_eq!(memfd.truncate(10 << 12, Split::Works), Ok(Hole::default()), "growing takes nothing");
        assert_eq!(
            memfd.truncate(1 << 12, Split::Works),
            Ok(freed([1, 2, 3, 8, 9, 10, 11])),
            "beyond the old end, too"
        );
    }
}
