//! A virtual machine's memory: slots, attributes, files and the rules of its architecture.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::addr::{Gfn, GfnRange, IndexRange, Level, PageIndex, PageRange};
use crate::arch::Arch;
use crate::file::{CreateError, File, FileFlags, FileId, GetPageError};
use crate::invalidate::{Filter, Invalidation};
use crate::page_set::PageSet;
use crate::slot::{Binding, Slot, SlotFlags, SlotId, Slots};
use crate::vendor::{Refusal, Side};

/// Frames that a guest physical address of 52 bits can name.
pub const MAX_FRAMES: u64 = 1 << (52 - crate::addr::PAGE_SHIFT);

/// Where the truth about private and shared is kept, and what differs between kernels inside the subsystem.
///
/// Errnos are not here: they are chosen at the uAPI.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rules {
    /// Who knows whether a page is private.
    pub tracking: Tracking,
    /// Which mappings a change of a file takes away.
    pub file_filter: FileFilter,
    /// A page that already has contents may not be populated again (6.12, 6.18: EEXIST from the core; later kernels leave
    /// it to the architecture).
    pub populate_once: bool,
    /// A populate keeps the file's lock over all of its pages and reads their sources meanwhile (6.12, 6.18). Later kernels
    /// look the source of a page up first, and lock the file for that page.
    pub populate_keeps_lock: bool,
    /// A prefault that meets a slot being deleted ends with EAGAIN (6.18 on); else it is retried inside the kernel (6.12).
    pub prefault_reports_dying_slot: bool,
    /// VMs without private memory take slots with files too (6.18 on).
    pub files_without_private_memory: bool,
    /// Where a slot ends in its file is reckoned in signed numbers (6.18): an end beyond 2^63 is negative, hence not beyond
    /// the end of any file, and the slot is bound to pages that the file does not have. Others reckon in unsigned numbers.
    pub signed_offsets: bool,
    /// Whether pages are bound already is found out last, after the architecture has looked at the slot
    /// (`kvm_gmem_commit_memory_region()`, 7.3); before, binding was one step ahead of that (`kvm_gmem_bind()`).
    pub binds_last: bool,
    /// What happens to translations of the direct map when pages leave it.
    pub direct_map_flush: DirectMapFlush,
    /// Memory slots per address space.
    pub max_slots: u16,
    /// End of the addresses that a process may name (`TASK_SIZE_MAX`), which depends on the paging levels of the host.
    pub user_end: u64,
    /// The first frame that slots cannot have: on x86 one more than `kvm_mmu_max_gfn()`, which depends on the physical
    /// addresses of the host; on arm64 the size of the VM's IPA space.
    pub frames_end: u64,
}

/// Who knows whether a page is private.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Tracking {
    /// `KVM_SET_MEMORY_ATTRIBUTES`, per VM.
    Attributes,
    /// `KVM_SET_MEMORY_ATTRIBUTES2`, per file: conversion in place. It is a setting of the host and holds for VMs without
    /// private memory, too: their files cannot be converted, those created shared can be used, and accesses to others end in
    /// memory-fault exits, because the access is shared and the file says private.
    InPlace,
}

/// Which mappings a change of a file takes away.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FileFilter {
    /// Private ones (6.12).
    Private,
    /// Those of the kind that the file was created with (`kvm_gmem_get_invalidate_filter()`, 6.18 on).
    Kind,
}

/// What happens to translations of the direct map when pages leave it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DirectMapFlush {
    /// They are flushed at once.
    Flush,
    /// They stay until they are evicted: the bytes can still be read through them.
    NoFlush,
}

impl Rules {
    /// The newest kernel that has been released; older ones are described by what they do differently.
    pub const NEWEST: Self = Self {
        tracking: Tracking::Attributes,
        file_filter: FileFilter::Kind,
        populate_once: false,
        populate_keeps_lock: false,
        prefault_reports_dying_slot: true,
        files_without_private_memory: true,
        signed_offsets: false,
        binds_last: true,
        direct_map_flush: DirectMapFlush::Flush,
        max_slots: 32_764,
        user_end: (1 << 47) - crate::addr::PAGE_SIZE,
        frames_end: MAX_FRAMES,
    };
}

impl Default for Rules {
    fn default() -> Self {
        Self::NEWEST
    }
}

/// What a guest frame is backed by, as a fault would find it now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum View {
    /// No slot: an access is the VMM's to emulate.
    NoSlot,
    /// The VMM's own mapping, at this address for the first frame of the run.
    UserMemory {
        /// Address of the VMM's mapping.
        hva: u64,
    },
    /// A page of a file, at this index for the first frame of the run.
    FilePage {
        /// Which file.
        file: FileId,
        /// Which page.
        index: PageIndex,
        /// On which side the guest has it.
        side: Side,
    },
    /// A private frame that nothing can back: the access ends in a memory-fault exit.
    Unbacked(Unbacked),
}

/// Why nothing can back a private frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unbacked {
    /// The frame has no slot.
    NoSlot,
    /// The slot has no file.
    SlotWithoutFile,
    /// The file has been closed.
    FileClosed,
    /// The page has a memory error.
    Poisoned,
    /// The file ends before the page ([`GetPageError::BeyondEnd`]).
    BeyondEnd,
}

/// A virtual machine's memory.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Vm {
    /// What differs between kernels.
    pub rules: Rules,
    /// The architecture.
    pub arch: Arch,
    pub(crate) slots: Slots,
    pub(crate) private: PageSet,
    pub(crate) invalidation: Invalidation,
    pub(crate) files: BTreeMap<FileId, File>,
    /// Changes of the VMM's mappings under way (`mn_active_invalidate_count`). Part of the invalidation protocol.
    pub(crate) user_changes: u32,
    next_file: u32,
}

impl Vm {
    /// A VM without slots, files or attributes.
    #[must_use]
    pub fn new(arch: Arch, rules: Rules) -> Self {
        Self {
            rules,
            arch,
            slots: Slots::default(),
            private: PageSet::with_capacity(MAX_FRAMES, false),
            invalidation: Invalidation::default(),
            files: BTreeMap::new(),
            user_changes: 0,
            next_file: 0,
        }
    }

    /// The same VM for at most `frames` guest frames; attributes beyond them read as shared.
    ///
    /// Keeps small models small.
    #[must_use]
    pub fn with_frames(arch: Arch, rules: Rules, frames: u64) -> Self {
        Self { private: PageSet::with_capacity(frames.min(MAX_FRAMES), false), ..Self::new(arch, rules) }
    }

    /// Whether guests of this VM can have private memory at all.
    #[must_use]
    pub fn has_private_memory(&self) -> bool {
        self.arch.has_private_memory()
    }

    /// Address spaces of the VM: a VM with private memory has no SMM.
    #[must_use]
    pub fn address_spaces(&self) -> u16 {
        if self.has_private_memory() { 1 } else { crate::slot::SPACES }
    }

    /// The flags that [`Vm::create_file`] takes of those that the kernel has at all.
    #[must_use]
    pub fn file_flags(&self, kernel: FileFlags) -> FileFlags {
        let in_place = self.rules.tracking == Tracking::InPlace;
        if self.has_private_memory() && !in_place { kernel - FileFlags::INIT_SHARED } else { kernel }
    }

    /// `KVM_CREATE_GUEST_MEMFD`, with `size` in bytes.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn create_file(&mut self, size: u64, flags: u64, kernel: FileFlags) -> Result<FileId, CreateError> {
        let id = FileId(self.next_file);
        let file = File::new(id, size, flags, self.file_flags(kernel))?;
        self.next_file = self.next_file.wrapping_add(1);
        self.files.insert(id, file);
        Ok(id)
    }

    /// The launch ends: what the architecture needs to know of the slots it is told, and then that no more comes.
    ///
    /// # Errors
    /// What the architecture refuses.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        let private: Vec<GfnRange> =
            self.slots.iter().filter(|slot| slot.binding.is_some()).map(|slot| slot.gfns).collect();
        private.into_iter().for_each(|gfns| self.arch.declare_memory(gfns));
        self.arch.finalize()
    }

    /// The slots.
    #[must_use]
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// A file.
    #[must_use]
    pub fn file(&self, id: FileId) -> Option<&File> {
        self.files.get(&id)
    }

    /// A file, to allocate in it or to record references to its pages.
    pub fn file_mut(&mut self, id: FileId) -> Option<&mut File> {
        self.files.get_mut(&id)
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = &File> {
        self.files.values()
    }

    /// State of the invalidation protocol.
    #[must_use]
    pub fn invalidation(&self) -> &Invalidation {
        &self.invalidation
    }

    /// The same, for a caller with changes of its own to bracket.
    pub fn invalidation_mut(&mut self) -> &mut Invalidation {
        &mut self.invalidation
    }

    /// The gfn's private attribute, wherever it is kept (`kvm_mem_is_private()`).
    #[must_use]
    pub fn attribute(&self, gfn: Gfn) -> Side {
        let private = match self.rules.tracking {
            Tracking::Attributes => self.private.get(gfn.0),
            Tracking::InPlace => self.in_place_side(gfn) == Some(Side::Private),
        };
        if private { Side::Private } else { Side::Shared }
    }

    fn in_place_side(&self, gfn: Gfn) -> Option<Side> {
        let slot = self.slots.at(0, gfn)?;
        let file = self.files.get(&slot.binding?.file?)?;
        Some(file.side(slot.index_of(gfn)?))
    }

    /// The attribute of the whole of `range`, or `None` where it is mixed.
    #[must_use]
    pub fn uniform_attribute(&self, range: GfnRange) -> Option<Side> {
        match self.rules.tracking {
            Tracking::Attributes => {
                let private = self.private.uniform(range.start().0, range.len())?;
                Some(if private { Side::Private } else { Side::Shared })
            }
            Tracking::InPlace => {
                let first = self.attribute(range.start());
                range.pages().all(|gfn| self.attribute(gfn) == first).then_some(first)
            }
        }
    }

    /// Runs of equal attributes in `range`; attributes need no slot.
    pub fn attribute_runs(&self, range: GfnRange) -> impl Iterator<Item = (GfnRange, Side)> {
        self.private.runs(range.start().0, range.len()).filter_map(|(start, len, private)| {
            let side = if private { Side::Private } else { Side::Shared };
            Some((PageRange::with_len(Gfn(start), len)?, side))
        })
    }

    /// Bytes of heap that the attributes take.
    #[must_use]
    pub fn attribute_heap_bytes(&self) -> usize {
        self.private.heap_bytes()
    }

    /// What backs `gfn` for an access of the attribute's kind.
    #[must_use]
    pub fn view(&self, gfn: Gfn) -> View {
        self.view_in(0, gfn)
    }

    /// What backs `gfn` in address space `space`.
    #[must_use]
    pub fn view_in(&self, space: u16, gfn: Gfn) -> View {
        let side = self.attribute(gfn);
        match (self.slots.at(space, gfn), side) {
            (None, Side::Shared) => View::NoSlot,
            (None, Side::Private) => View::Unbacked(Unbacked::NoSlot),
            (Some(slot), side) => self.slot_view(slot, gfn, side),
        }
    }

    fn slot_view(&self, slot: &Slot, gfn: Gfn, side: Side) -> View {
        match slot.binding {
            None if side == Side::Private => View::Unbacked(Unbacked::SlotWithoutFile),
            Some(binding) if side == Side::Private || binding.file_only => self.file_view(slot, gfn, side),
            _ => View::UserMemory { hva: slot.hva_of(gfn) },
        }
    }

    fn file_view(&self, slot: &Slot, gfn: Gfn, side: Side) -> View {
        match self.bound_page(slot, gfn) {
            Ok((file, index)) => View::FilePage { file: file.id(), index, side },
            Err(GetPageError::Poisoned) => View::Unbacked(Unbacked::Poisoned),
            Err(GetPageError::BeyondEnd) => View::Unbacked(Unbacked::BeyondEnd),
            Err(GetPageError::NoFile | GetPageError::NotBound) => View::Unbacked(Unbacked::FileClosed),
        }
    }

    /// The file and page behind `gfn` of `slot` (`kvm_gmem_get_pfn()` up to the folio).
    pub(crate) fn bound_page(&self, slot: &Slot, gfn: Gfn) -> Result<(&File, PageIndex), GetPageError> {
        let id = slot.binding.and_then(|binding| binding.file).ok_or(GetPageError::NoFile)?;
        let file = self.files.get(&id).filter(|file| file.is_open()).ok_or(GetPageError::NoFile)?;
        let index = slot.index_of(gfn).ok_or(GetPageError::NotBound)?;
        if file.slot_at(index) != Some(slot.id) {
            return Err(GetPageError::NotBound);
        }
        match index.0 < file.pages() {
            false => Err(GetPageError::BeyondEnd),
            true if file.is_poisoned(index) => Err(GetPageError::Poisoned),
            true => Ok((file, index)),
        }
    }

    /// Looks the page behind `gfn` up and allocates it if it is absent.
    pub(crate) fn take_page(
        &mut self,
        slot: SlotId,
        gfn: Gfn,
    ) -> Result<(FileId, PageIndex, IndexRange), GetPageError> {
        let slot = self.slots.get(slot).ok_or(GetPageError::NoFile)?;
        let (file, index) = self.bound_page(slot, gfn)?;
        let id = file.id();
        let file = self.files.get_mut(&id).ok_or(GetPageError::NoFile)?;
        Ok((id, index, file.folio_at(index)))
    }

    /// Runs of frames of `slot` within `range` that one mapping of each kind can serve: what a window has to show.
    ///
    /// Costs what the edges of attributes and poisoned pages cost, not one step per frame.
    pub fn views(&self, slot: &Slot, range: GfnRange) -> impl Iterator<Item = (GfnRange, View)> {
        let mut next = slot.gfns.intersect(range);
        core::iter::from_fn(move || {
            let rest = next?;
            let (run, view) = self.view_run(slot, rest);
            next = GfnRange::new(run.end(), rest.end());
            Some((run, view))
        })
    }

    fn view_run(&self, slot: &Slot, rest: GfnRange) -> (GfnRange, View) {
        let gfn = rest.start();
        if rest.len() == 1 {
            return (rest, self.slot_view(slot, gfn, self.attribute(gfn)));
        }
        let (side, mut end) = self.attribute_run(rest);
        let view = self.slot_view(slot, gfn, side);
        if let (Some(pages), Some(file)) = (slot.file_pages(), self.bound_file(slot))
            && let Some(first) = slot.index_of(gfn)
        {
            let file_end = if first.0 < file.pages() { file.pages() } else { u64::MAX };
            let last = first.0.saturating_add(end.0 - gfn.0).min(pages.end().0).min(file_end);
            let same = file.same_poison_until(first, PageIndex(last));
            end = end.min(Gfn(gfn.0 + (same.0 - first.0)));
        }
        (GfnRange::new(gfn, end).unwrap_or(PageRange::page(gfn)), view)
    }

    fn bound_file(&self, slot: &Slot) -> Option<&File> {
        self.files.get(&slot.binding?.file?)
    }

    /// The side of the first frame of `rest`, and where the frames that share it end.
    fn attribute_run(&self, rest: GfnRange) -> (Side, Gfn) {
        match self.rules.tracking {
            Tracking::Attributes => {
                let run = self.attribute_runs(rest).next();
                run.map_or((Side::Shared, rest.end()), |(run, side)| (side, run.end()))
            }
            Tracking::InPlace => {
                let first = self.attribute(rest.start());
                (first, rest.pages().find(|gfn| self.attribute(*gfn) != first).unwrap_or(rest.end()))
            }
        }
    }

    /// The largest level at which `gfn` of `slot` may be mapped: alignment of slot and backing, uniform attribute, folio,
    /// architecture (`kvm_mmu_max_mapping_level()`).
    #[must_use]
    pub fn max_level(&self, slot: &Slot, gfn: Gfn, folio: Level) -> Level {
        let fits = |level: Level| level <= folio && self.block_is_uniform(slot, gfn, level);
        Level::ALL.into_iter().rev().find(|level| fits(*level)).unwrap_or_default()
    }

    fn block_is_uniform(&self, slot: &Slot, gfn: Gfn, level: Level) -> bool {
        let block = PageRange::page(gfn).align_out(level);
        let mask = level.pages() - 1;
        // The kernel compares with userspace_addr even where the file serves the page.
        let skew = (slot.userspace_addr >> crate::addr::PAGE_SHIFT) ^ slot.gfns.start().0;
        // A block of the file is a block of the guest only where both start at the same distance from one.
        let file_skew = slot.binding.map_or(0, |binding| binding.first.0 ^ slot.gfns.start().0);
        let aligned = (skew | file_skew) & mask == 0;
        slot.gfns.covers(block) && aligned && self.uniform_attribute(block).is_some()
    }

    /// The filter of a change of `file`.
    ///
    /// Where pages convert in place the kernel names both sides. Otherwise it names one, though guests have the pages of a
    /// file that serves every fault on both. It heeds what it names only where the sides have tables of their own
    /// (`kvm_gfn_range_filter_to_root_types()`): there the mappings of the other side survive, shared ones of freed pages
    /// of a mappable file among them. Elsewhere every mapping goes, which is what this says then.
    pub(crate) fn file_filter(&self, file: &File) -> Filter {
        let one_table = !self.arch.has_separate_tables() && self.serves_every_fault(file.flags());
        match (self.rules.tracking, self.rules.file_filter) {
            (Tracking::InPlace, _) => Filter::Both,
            _ if one_table => Filter::Both,
            (_, FileFilter::Private) => Filter::Only(Side::Private),
            (_, FileFilter::Kind) => Filter::Only(file.kind()),
        }
    }

    /// The frames that one mapping could cover together with some of `gfns`, which `file` backs: while those go, a fault on
    /// another page of the same large folio must not map them again.
    pub(crate) fn could_be_mapped_with(&self, file: FileId, gfns: GfnRange) -> GfnRange {
        let level = self.files.get(&file).map_or(Level::Page4K, File::folio_level);
        let slot = self.slots.at(0, gfns.start());
        slot.and_then(|slot| slot.gfns.intersect(gfns.align_out(level))).unwrap_or(gfns)
    }

    /// The frames that slots bind to `pages` of `file`.
    pub(crate) fn frames_of(&self, file: &File, pages: IndexRange) -> Vec<GfnRange> {
        let slots = file.bound_slots(pages).filter_map(|id| self.slots.get(id));
        slots.filter_map(|slot| slot.gfns_of(pages)).collect()
    }

    /// Faults in the bookkeeping, as text; empty between operations.
    ///
    /// Used by tests and by the explorer after every operation: a binding and its slot must name each other, and no
    /// invalidation may be left open.
    #[must_use]
    pub fn audit(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        if !self.invalidation.is_idle() {
            faults.push(Fault::InvalidationOpen);
        }
        for slot in self.slots.iter() {
            if let Some(Binding { file: Some(id), first, .. }) = slot.binding {
                let bound = self.files.get(&id).and_then(|file| file.slot_at(first));
                if bound != Some(slot.id) {
                    faults.push(Fault::SlotNotBound(slot.id));
                }
            }
        }
        for file in self.files.values() {
            let all = file.all_pages();
            let dangling = all.into_iter().flat_map(|all| file.bound_slots(all)).find(|id| {
                let slot = self.slots.get(*id);
                slot.and_then(|slot| slot.binding).and_then(|binding| binding.file) != Some(file.id())
            });
            faults.extend(dangling.map(Fault::BindingWithoutSlot));
        }
        faults
    }

    /// Flags of a slot with a file, for [`Slot::flags`].
    pub(crate) fn is_private_slot(flags: SlotFlags) -> bool {
        flags.contains(SlotFlags::GUEST_MEMFD)
    }
}

/// A violated invariant of the bookkeeping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// An invalidation began and has not ended.
    InvalidationOpen,
    /// The slot names a file that does not name the slot.
    SlotNotBound(SlotId),
    /// A file names a slot that does not name the file.
    BindingWithoutSlot(SlotId),
}
