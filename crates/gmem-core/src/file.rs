//! A guest_memfd: pages that only a guest can have.
//!
//! Linux separates the inode, which stores pages, from the file, which is one VM's view of it. Every inode has one file
//! today, so this type is both: storage (which pages are present, clean, poisoned, shared) and view (bindings to slots).

use alloc::collections::BTreeMap;

use bitflags::bitflags;

use crate::addr::{IndexRange, Level, PAGE_SIZE, PageIndex, PageNumber, PageRange, Pfn};
use crate::page_set::PageSet;
use crate::slot::SlotId;
use crate::vendor::Side;

bitflags! {
    /// Flags of `KVM_CREATE_GUEST_MEMFD`.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct FileFlags: u64 {
        /// The VMM may map the file; slots bound to it take every page from it.
        const MMAP = 1 << 0;
        /// Pages are shared until converted.
        const INIT_SHARED = 1 << 1;
        /// Pages leave the host's direct map while they belong to the file. Not upstream; value of the v12 postings.
        const NO_DIRECT_MAP = 1 << 2;
    }
}

/// Number of a file within its VM. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct FileId(pub u32);

impl FileId {
    /// The frame that stands for a page of this file. Stable for the life of the file; distinct between files.
    #[must_use]
    pub fn pfn(self, index: PageIndex) -> Pfn {
        Pfn(((u64::from(self.0) + 1) << 51) | index.0)
    }
}

/// Why a file cannot be created. All of them are EINVAL in Linux.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CreateError {
    /// Flags that the VM does not support.
    Flags(u64),
    /// The size is zero, negative as a signed number, or not a multiple of the page size.
    Size(u64),
}

/// Why `fallocate` was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocateError {
    /// Offset or length is not a multiple of the page size. EINVAL.
    Unaligned,
    /// The range to allocate passes the end of the file. EINVAL.
    BeyondEnd,
}

/// Why the page behind a frame could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GetPageError {
    /// The file is gone, or was never there. EFAULT.
    NoFile,
    /// The page belongs to another binding. EIO; a defect of the caller.
    NotBound,
    /// The page has a memory error. EHWPOISON.
    Poisoned,
    /// The file ends before the page, to which only [`signed_offsets`](crate::vm::Rules::signed_offsets) let it be bound.
    /// Linux makes such a page all the same; here the frame has none, and the error is EFAULT.
    BeyondEnd,
}

/// The kernel cannot move or evict guest memory: the mapping is inaccessible and unevictable, so migration ends with
/// EOPNOTSUPP and reclaim does not look at it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Unmovable(pub PageIndex);

/// One guest_memfd.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct File {
    id: FileId,
    pages: u64,
    flags: FileFlags,
    open: bool,
    present: PageSet,
    up_to_date: PageSet,
    poisoned: PageSet,
    off_direct_map: PageSet,
    referenced: PageSet,
    shared: PageSet,
    large: BTreeMap<PageIndex, Level>,
    folio_level: Level,
    bindings: BTreeMap<PageIndex, Bound>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Bound {
    end: PageIndex,
    slot: SlotId,
}

impl File {
    /// Validates a request of `KVM_CREATE_GUEST_MEMFD` in the kernel's order: flags, then size.
    ///
    /// `size` is in bytes. There is no upper bound but that of a signed 64-bit number, and nothing is allocated.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn new(id: FileId, size: u64, flags: u64, supported: FileFlags) -> Result<Self, CreateError> {
        let known = FileFlags::from_bits(flags).filter(|flags| supported.contains(*flags));
        let flags = known.ok_or(CreateError::Flags(flags))?;
        let positive = i64::try_from(size).is_ok_and(|size| size > 0);
        if !positive || !size.is_multiple_of(PAGE_SIZE) {
            return Err(CreateError::Size(size));
        }
        let pages = size / PAGE_SIZE;
        let set = || PageSet::with_capacity(pages, false);
        Ok(Self {
            id,
            pages,
            flags,
            open: true,
            present: set(),
            up_to_date: set(),
            poisoned: set(),
            off_direct_map: set(),
            referenced: set(),
            shared: PageSet::with_capacity(pages, flags.contains(FileFlags::INIT_SHARED)),
            large: BTreeMap::new(),
            folio_level: Level::Page4K,
            bindings: BTreeMap::new(),
        })
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Size in pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Flags as given at creation.
    #[must_use]
    pub fn flags(&self) -> FileFlags {
        self.flags
    }

    /// Whether a descriptor of the file is still open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Lets the file use folios of up to `level` where a whole aligned block is absent.
    ///
    /// Linux has 4 KiB only; larger ones exist here so that splitting can be studied.
    pub fn set_folio_level(&mut self, level: Level) {
        self.folio_level = level;
    }

    /// The largest folio that the file may use.
    #[must_use]
    pub fn folio_level(&self) -> Level {
        self.folio_level
    }

    /// The whole file.
    #[must_use]
    pub fn all_pages(&self) -> Option<IndexRange> {
        PageRange::with_len(PageIndex(0), self.pages)
    }

    /// Validates an allocating `fallocate`.
    ///
    /// # Errors
    /// [`AllocateError`], alignment first.
    pub fn check_allocate(&self, offset: u64, len: u64) -> Result<IndexRange, AllocateError> {
        let range = IndexRange::from_bytes(offset, len).map_err(|_| AllocateError::Unaligned)?;
        if range.end().0 > self.pages { Err(AllocateError::BeyondEnd) } else { Ok(range) }
    }

    /// Validates a hole, and cuts it to the file: a hole at or after the end is legal and does nothing.
    ///
    /// # Errors
    /// [`AllocateError::Unaligned`].
    pub fn check_punch(&self, offset: u64, len: u64) -> Result<Option<IndexRange>, AllocateError> {
        let range = IndexRange::from_bytes(offset, len).map_err(|_| AllocateError::Unaligned)?;
        Ok(self.all_pages().and_then(|all| all.intersect(range)))
    }

    /// [`FileId::pfn`].
    #[must_use]
    pub fn pfn(&self, index: PageIndex) -> Pfn {
        self.id.pfn(index)
    }

    /// Whether the page has memory.
    #[must_use]
    pub fn is_present(&self, index: PageIndex) -> bool {
        self.present.get(index.0)
    }

    /// Whether `pfn` stands for a page of this file that has memory.
    #[must_use]
    pub fn present_has(&self, pfn: Pfn) -> bool {
        let index = pfn.0.checked_sub(self.pfn(PageIndex(0)).0);
        index.is_some_and(|index| index < self.pages && self.present.get(index))
    }

    /// Whether the page has a memory error.
    #[must_use]
    pub fn is_poisoned(&self, index: PageIndex) -> bool {
        self.poisoned.get(index.0)
    }

    /// Which side the file itself says the page is on (in-place conversion; otherwise the initial state).
    #[must_use]
    pub fn side(&self, index: PageIndex) -> Side {
        if self.shared.get(index.0) { Side::Shared } else { Side::Private }
    }

    /// Whether the file as a whole was created for private pages (`kvm_gmem_is_private_mem()` before in-place).
    #[must_use]
    pub fn kind(&self) -> Side {
        if self.flags.contains(FileFlags::INIT_SHARED) { Side::Shared } else { Side::Private }
    }

    pub(crate) fn set_side(&mut self, range: IndexRange, side: Side) {
        self.shared.set(range.start().0, range.len(), side == Side::Shared);
    }

    /// The first page of `range` that is not on `side` yet.
    pub(crate) fn has_other_side(&self, range: IndexRange, side: Side) -> bool {
        !self.shared.all(range.start().0, range.len(), side == Side::Shared)
    }

    /// Gives memory to absent pages without zeroing them: zeroing waits for the first use.
    pub fn allocate(&mut self, range: IndexRange) {
        if self.folio_level == Level::Page4K {
            self.present.set(range.start().0, range.len(), true);
            return;
        }
        let mut next = range.start();
        while next < range.end() {
            next = self.folio_at(next).end();
        }
    }

    /// The pages of the folio that holds `index`, allocated if it was absent.
    pub(crate) fn folio_at(&mut self, index: PageIndex) -> IndexRange {
        match self.folio_range(index) {
            Some(pages) => pages,
            None => self.new_folio(index),
        }
    }

    /// The pages of the present folio that holds `index`.
    #[must_use]
    pub fn folio_range(&self, index: PageIndex) -> Option<IndexRange> {
        if !self.present.get(index.0) {
            return None;
        }
        let large = [Level::Page1G, Level::Page2M].into_iter().find_map(|level| {
            let head = index.align_down(level);
            (self.large.get(&head) == Some(&level)).then_some((head, level.pages()))
        });
        let (head, pages) = large.unwrap_or((index, 1));
        PageRange::with_len(head, pages)
    }

    fn new_folio(&mut self, index: PageIndex) -> IndexRange {
        let mut level = self.folio_level;
        let range = loop {
            let block = PageRange::page(index).align_out(level);
            let free = block.end().0 <= self.pages && self.present.all(block.start().0, block.len(), false);
            match level.smaller() {
                Some(smaller) if !free => level = smaller,
                _ => break block,
            }
        };
        if level != Level::Page4K {
            self.large.insert(range.start(), level);
        }
        self.present.set(range.start().0, range.len(), true);
        range
    }

    /// The pages that `index`'s folio maps at most.
    #[must_use]
    pub fn folio_level_at(&self, index: PageIndex) -> Level {
        self.folio_range(index).map_or(Level::Page4K, |range| match range.len() {
            512 => Level::Page2M,
            1 => Level::Page4K,
            _ => Level::Page1G,
        })
    }

    pub(crate) fn mark_up_to_date(&mut self, pages: IndexRange) {
        self.up_to_date.set(pages.start().0, pages.len(), true);
    }

    pub(crate) fn is_up_to_date(&self, index: PageIndex) -> bool {
        self.up_to_date.get(index.0)
    }

    /// The first run of pages of `range` whose bytes are still those of whoever had the memory before.
    ///
    /// A large folio is not of one piece: some of its pages may have been populated, and zeroing must not touch those, nor may a
    /// mapping of the whole show the others as they are.
    pub(crate) fn first_stale(&self, range: IndexRange) -> Option<IndexRange> {
        first_run(&self.up_to_date, range, false)
    }

    /// The first run of pages of `range` that the host's direct map lacks.
    #[must_use]
    pub fn first_off_direct_map(&self, range: IndexRange) -> Option<IndexRange> {
        first_run(&self.off_direct_map, range, true)
    }

    pub(crate) fn set_direct_map(&mut self, pages: IndexRange, present: bool) {
        self.off_direct_map.set(pages.start().0, pages.len(), !present);
    }

    /// Whether the host's direct map has the page.
    #[must_use]
    pub fn on_direct_map(&self, index: PageIndex) -> bool {
        !self.off_direct_map.get(index.0)
    }

    pub(crate) fn poison(&mut self, index: PageIndex) {
        self.poisoned.set(index.0, 1, true);
    }

    /// The kernel wants the memory of a page for itself, by migration or reclaim.
    ///
    /// # Errors
    /// [`Unmovable`] for every page that has memory.
    pub fn relocate(&self, index: PageIndex) -> Result<(), Unmovable> {
        if self.is_present(index) { Err(Unmovable(index)) } else { Ok(()) }
    }

    /// Records that someone besides the page cache holds, or no longer holds, references to pages: pins for DMA, mappings
    /// of the VMM that cannot be dropped. They stand in the way of an in-place conversion.
    pub fn set_referenced(&mut self, pages: IndexRange, referenced: bool) {
        self.referenced.set(pages.start().0, pages.len(), referenced);
    }

    /// The first page of `range` with references besides the page cache's.
    #[must_use]
    pub fn first_referenced(&self, range: IndexRange) -> Option<PageIndex> {
        first_run(&self.referenced, range, true).map(PageRange::start)
    }

    /// The first page of `[first, last)` whose poison differs from `first`'s, or `last`.
    pub(crate) fn same_poison_until(&self, first: PageIndex, last: PageIndex) -> PageIndex {
        let mut runs = self.poisoned.runs(first.0, last.0.saturating_sub(first.0));
        runs.next().map_or(last, |(start, len, _)| PageIndex(start + len))
    }

    /// Runs of present pages in `range`.
    pub fn present_runs(&self, range: IndexRange) -> impl Iterator<Item = IndexRange> {
        let runs = self.present.runs(range.start().0, range.len());
        runs.filter(|(_, _, present)| *present).filter_map(|(start, len, _)| PageRange::with_len(PageIndex(start), len))
    }

    /// Takes memory away from pages. A folio that is only partly covered is split first.
    ///
    /// References of others keep the memory and not its place in the file: what comes there next is another folio.
    pub(crate) fn free(&mut self, range: IndexRange) {
        self.split(range);
        let of_the_page = [
            &mut self.present,
            &mut self.up_to_date,
            &mut self.poisoned,
            &mut self.off_direct_map,
            &mut self.referenced,
        ];
        for set in of_the_page {
            set.set(range.start().0, range.len(), false);
        }
    }

    /// Splits the large folios that `range` cuts or covers into base pages.
    pub(crate) fn split(&mut self, range: IndexRange) {
        let touches = |head: PageIndex, level: Level| {
            PageRange::with_len(head, level.pages()).is_some_and(|folio: IndexRange| folio.intersect(range).is_some())
        };
        self.large.retain(|&head, &mut level| !touches(head, level));
    }

    /// The pages of every folio, present or possible, that has pages in `range`.
    ///
    /// A change of a part of a folio concerns whoever maps, prepares or hides the folio as a whole.
    pub(crate) fn whole_folios(&self, range: IndexRange) -> IndexRange {
        let last = PageIndex(range.end().0.saturating_sub(1));
        let present = self.folio_level_at(range.start()).max(self.folio_level_at(last));
        range.align_out(self.folio_level.max(present))
    }

    /// Whether `range` cuts a large folio in two.
    #[must_use]
    pub fn cuts_folio(&self, range: IndexRange) -> bool {
        let edges = [range.start(), range.end()];
        edges.into_iter().any(|edge| {
            let inside = |folio: IndexRange| folio.start() < edge && edge < folio.end();
            self.folio_range(edge).is_some_and(inside)
        })
    }

    /// Whether any page of `range` is bound to a slot.
    #[must_use]
    pub fn is_bound(&self, range: IndexRange) -> bool {
        self.bound_slots(range).next().is_some()
    }

    /// The slot that `index` is bound to.
    #[must_use]
    pub fn slot_at(&self, index: PageIndex) -> Option<SlotId> {
        let (_, bound) = self.bindings.range(..=index).next_back()?;
        (index < bound.end).then_some(bound.slot)
    }

    /// The slots bound to pages of `range`, in file order.
    pub fn bound_slots(&self, range: IndexRange) -> impl Iterator<Item = SlotId> {
        let before = self.bindings.range(..range.start()).next_back().filter(|(_, bound)| bound.end > range.start());
        let inside = self.bindings.range(range.start()..range.end());
        before.into_iter().chain(inside).map(|(_, bound)| bound.slot)
    }

    pub(crate) fn bind(&mut self, range: IndexRange, slot: SlotId) {
        self.bindings.insert(range.start(), Bound { end: range.end(), slot });
    }

    pub(crate) fn unbind(&mut self, first: PageIndex) {
        self.bindings.remove(&first);
    }

    pub(crate) fn close(&mut self) {
        self.open = false;
        self.bindings.clear();
    }
}

fn first_run(set: &PageSet, range: IndexRange, wanted: bool) -> Option<IndexRange> {
    let mut runs = set.runs(range.start().0, range.len());
    let (start, len, _) = runs.find(|(_, _, member)| *member == wanted)?;
    PageRange::with_len(PageIndex(start), len)
}
