//! A machine for tests: it carries the actions of operations out on a model of stage-2 tables, host memory, locks and the
//! direct map, and complains at the moment when an action would break something.
#![allow(dead_code, reason = "each test uses a part")]

mod actor;

use std::collections::{BTreeMap, BTreeSet};

use gmem_core::addr::{Gfn, GfnRange, IndexRange, Level, PAGE_SIZE, PageIndex, PageRange, Pfn};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId};
use gmem_core::invalidate::Filter;
use gmem_core::ops::{
    Access, Action, Claim, CloseFile, DirectMap, Fault, FaultEnd, FileClaim, Lock, Operation, Origin, Pages,
    RegionError, SetAttributes, SetRegion, Step,
};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor::{Mapping, Side};
use gmem_core::vm::{Rules, View, Vm};

#[allow(unused_imports, reason = "each test uses a part")]
pub(crate) use actor::{Actor, Outcome, interleave};

/// Flags of files of the newest kernel, and the one that is not upstream.
pub(crate) const ALL_FLAGS: FileFlags = FileFlags::all();
/// Address of the VMM's memory for the first frame, in most tests.
pub(crate) const HVA: u64 = 0x7000_0000_0000;

pub(crate) fn gfns(start: u64, end: u64) -> GfnRange {
    PageRange::new(Gfn(start), Gfn(end)).expect("a range of the test")
}

pub(crate) fn pages(start: u64, end: u64) -> IndexRange {
    PageRange::new(PageIndex(start), PageIndex(end)).expect("a range of the test")
}

pub(crate) fn vm(arch: Arch) -> Vm {
    Vm::new(arch, Rules::default())
}

/// A file of `count` pages.
pub(crate) fn file(vm: &mut Vm, count: u64, flags: FileFlags) -> FileId {
    vm.create_file(count * PAGE_SIZE, flags.bits(), ALL_FLAGS).expect("a file of the test")
}

/// A valid claim of a slot without a file: frames `[gfn, gfn + count)` at the address that belongs to them.
pub(crate) fn claim(slot: u32, gfn: u64, count: u64) -> Claim {
    Claim {
        slot,
        flags: 0,
        guest_phys_addr: gfn * PAGE_SIZE,
        memory_size: count * PAGE_SIZE,
        userspace_addr: HVA + gfn * PAGE_SIZE,
        file: FileClaim::BadDescriptor,
        guest_memfd_offset: 0,
    }
}

/// The same with a file behind it, from page `first` on.
pub(crate) fn private_claim(slot: u32, gfn: u64, count: u64, file: FileId, first: u64) -> Claim {
    Claim {
        flags: SlotFlags::GUEST_MEMFD.bits(),
        file: FileClaim::File(file),
        guest_memfd_offset: first * PAGE_SIZE,
        ..claim(slot, gfn, count)
    }
}

/// Bytes of a page of a file, as far as tests care.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bytes {
    /// Whatever the host's last user of the memory left there.
    Foreign,
    Zero,
    Written(u8),
}

/// Everything that actions act on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    /// Stage-2 tables, by first frame.
    pub(crate) stage2: BTreeMap<Gfn, Mapping>,
    /// Zapped and not flushed yet: a vCPU may still use them.
    pub(crate) tlb: Vec<Mapping>,
    /// Bytes of file pages; absent means [`Bytes::Foreign`].
    pub(crate) bytes: BTreeMap<(FileId, u64), Bytes>,
    /// Pages that the host cannot reach, and translations that it may still have.
    pub(crate) off_direct_map: BTreeSet<(FileId, u64)>,
    pub(crate) host_tlb: BTreeSet<(FileId, u64)>,
    /// How often the VMM has changed the page at an address, in pages.
    pub(crate) user_generation: BTreeMap<u64, u64>,
    /// Addresses where the VMM has nothing, in pages.
    pub(crate) user_holes: BTreeSet<u64>,
    /// What the next [`Action::ChangeUserMapping`] changes, in bytes.
    pub(crate) user_change: Option<(u64, u64)>,
    /// Held locks, with their number of holders.
    locks: BTreeMap<Lock, u32>,
    /// Every action, in order, with who asked for it.
    pub(crate) trace: Vec<(usize, Action)>,
    /// First frame number of each file.
    bases: BTreeMap<FileId, u64>,
}

impl Machine {
    /// Runs `operation` alone, to its end, and checks what must hold between operations.
    pub(crate) fn run<O: Operation + AskUserPage>(&mut self, vm: &mut Vm, operation: &mut O) -> O::Output {
        loop {
            match operation.step(vm) {
                Step::Do(action) => {
                    assert!(!self.blocks(&action), "alone, and yet {action:?} has to wait");
                    self.carry_out(vm, 0, &action, operation);
                }
                Step::Done(output) => {
                    self.assert_quiet(vm);
                    return output;
                }
            }
        }
    }

    pub(crate) fn set_region(&mut self, vm: &mut Vm, claim: Claim) -> Result<(), RegionError> {
        self.run(vm, &mut SetRegion::new(claim))
    }

    pub(crate) fn set_attributes(&mut self, vm: &mut Vm, range: GfnRange, side: Side) {
        self.run(vm, &mut SetAttributes::new(range, side));
    }

    pub(crate) fn close(&mut self, vm: &mut Vm, file: FileId) {
        self.run(vm, &mut CloseFile::new(file));
    }

    pub(crate) fn fault(&mut self, vm: &mut Vm, gfn: u64) -> FaultEnd {
        let access = Access { gfn: Gfn(gfn), claimed: Side::Private };
        self.run(vm, &mut Fault::new(access, Origin::Guest))
    }

    pub(crate) fn prefault(&mut self, vm: &mut Vm, gfn: u64) -> FaultEnd {
        let access = Access { gfn: Gfn(gfn), claimed: Side::Shared };
        self.run(vm, &mut Fault::new(access, Origin::Prefault))
    }

    /// The mapping that translates `gfn`.
    pub(crate) fn mapping_of(&self, gfn: Gfn) -> Option<Mapping> {
        let (_, mapping) = self.stage2.range(..=gfn).next_back()?;
        frames_of(mapping).contains(gfn).then_some(*mapping)
    }

    /// The host frame behind `gfn`.
    pub(crate) fn pfn_of(&self, gfn: Gfn) -> Option<Pfn> {
        let mapping = self.mapping_of(gfn)?;
        Some(Pfn(mapping.pfn.0 + (gfn.0 - mapping.gfn.0)))
    }

    /// The VMM's page at `hva`, if it has one.
    pub(crate) fn user_pfn(&self, hva: u64) -> Option<Pfn> {
        let page = hva / PAGE_SIZE;
        let generation = self.user_generation.get(&page).copied().unwrap_or(0);
        (!self.user_holes.contains(&page)).then_some(Pfn((generation << 36) | (page & 0xf_ffff_ffff)))
    }

    /// The page of a file that a host frame is.
    pub(crate) fn page_at(&self, pfn: Pfn) -> Option<(FileId, u64)> {
        let (file, base) = self.bases.iter().filter(|(_, base)| **base <= pfn.0).max_by_key(|(_, base)| **base)?;
        Some((*file, pfn.0 - base))
    }

    pub(crate) fn bytes_of(&self, page: (FileId, u64)) -> Bytes {
        self.bytes.get(&page).copied().unwrap_or(Bytes::Foreign)
    }

    /// Whether the lock that an action asks for is held in a way that excludes it.
    pub(crate) fn blocks(&self, action: &Action) -> bool {
        let held = |lock: Lock| self.locks.contains_key(&lock);
        match action {
            Action::Lock(Lock::FileShared(id)) => held(Lock::FileExclusive(*id)),
            Action::Lock(lock @ Lock::FileExclusive(id)) => held(*lock) || held(Lock::FileShared(*id)),
            Action::Lock(lock @ Lock::Slots) => held(*lock),
            Action::Lock(Lock::Folios(pages)) => self.locks.keys().any(|lock| {
                matches!(lock, Lock::Folios(other) if other.file == pages.file && other.range.intersect(pages.range).is_some())
            }),
            _ => false,
        }
    }

    pub(crate) fn carry_out(&mut self, vm: &Vm, who: usize, action: &Action, asked: &mut impl AskUserPage) {
        for file in vm.files() {
            self.bases.entry(file.id()).or_insert(file.pfn(PageIndex(0)).0);
        }
        self.trace.push((who, action.clone()));
        match action {
            Action::Lock(lock) => *self.locks.entry(*lock).or_default() += 1,
            Action::Unlock(lock) => self.unlock(*lock),
            Action::Zap { range, filter } => self.zap(*range, *filter),
            Action::Flush => self.tlb.clear(),
            Action::Zero(pages) => self.fill(*pages, Bytes::Zero),
            Action::CopyIn(pages) => self.fill(*pages, Bytes::Written(0xcc)),
            Action::Free(pages) => self.free(*pages),
            Action::DirectMap(pages, direction) => self.direct_map(*pages, *direction),
            Action::FlushDirectMap => self.host_tlb.clear(),
            Action::UseDirectMap(pages) => self.use_direct_map(*pages),
            Action::GetUserPage { slot, gfn } => {
                let slot = vm.slots().get(*slot).expect("a fault names a slot that exists");
                asked.answer(self.user_pfn(slot.hva_of(*gfn)));
            }
            Action::ChangeUserMapping => self.change_user_mapping(),
            Action::Map(mapping) => self.map(vm, *mapping),
            Action::Continue
            | Action::Synchronize
            | Action::DropUserMappings(_)
            | Action::MapUser(_)
            | Action::Refill(_) => {}
        }
    }

    fn unlock(&mut self, lock: Lock) {
        let count = self
            .locks
            .get_mut(&lock)
            .unwrap_or_else(|| panic!("{lock:?} is let go and was not held: {:?}", self.trace));
        *count -= 1;
        if *count == 0 {
            self.locks.remove(&lock);
        }
    }

    fn zap(&mut self, range: GfnRange, filter: Filter) {
        let gone = |mapping: &Mapping| filter.includes(mapping.side) && frames_of(mapping).intersect(range).is_some();
        self.tlb.extend(self.stage2.values().filter(|mapping| gone(mapping)).copied());
        self.stage2.retain(|_, mapping| !gone(mapping));
    }

    fn fill(&mut self, pages: Pages, bytes: Bytes) {
        for index in pages.range.pages() {
            let page = (pages.file, index.0);
            assert!(!self.off_direct_map.contains(&page), "the host writes {page:?}, which is off the direct map");
            self.bytes.insert(page, bytes);
        }
    }

    fn free(&mut self, pages: Pages) {
        for mapping in self.stage2.values().chain(&self.tlb) {
            for page in self.pages_behind(mapping) {
                let freed = page.0 == pages.file && pages.range.contains(PageIndex(page.1));
                assert!(!freed, "{page:?} is freed and a vCPU can reach it through {mapping:?}: {:?}", self.trace);
            }
        }
        let inside = |page: &(FileId, u64)| page.0 == pages.file && pages.range.contains(PageIndex(page.1));
        assert!(!self.off_direct_map.iter().any(inside), "freed while off the direct map: {:?}", self.trace);
        self.host_tlb.retain(|page| !inside(page));
        self.bytes.retain(|page, _| !inside(page));
    }

    fn direct_map(&mut self, pages: Pages, direction: DirectMap) {
        // A hole may be as large as the file; only pages that left can come back.
        match direction {
            DirectMap::Remove => {
                let all: Vec<_> = pages.range.pages().map(|index| (pages.file, index.0)).collect();
                self.off_direct_map.extend(&all);
                self.host_tlb.extend(&all);
            }
            DirectMap::Restore => {
                self.off_direct_map.retain(|page| page.0 != pages.file || !pages.range.contains(PageIndex(page.1)));
            }
        }
    }

    fn use_direct_map(&self, pages: Pages) {
        for index in pages.range.pages() {
            assert!(!self.off_direct_map.contains(&(pages.file, index.0)), "used through the direct map: {index:?}");
        }
    }

    fn change_user_mapping(&mut self) {
        if let Some((start, end)) = self.user_change {
            for page in start / PAGE_SIZE..end.div_ceil(PAGE_SIZE) {
                *self.user_generation.entry(page).or_default() += 1;
            }
        }
    }

    fn map(&mut self, vm: &Vm, mapping: Mapping) {
        assert_eq!(mapping.gfn.0 % mapping.level.pages(), 0, "{mapping:?}");
        self.zap_replaced(mapping);
        self.stage2.insert(mapping.gfn, mapping);
        for page in self.pages_behind(&mapping) {
            assert_ne!(self.bytes_of(page), Bytes::Foreign, "the guest gets to see what was in {page:?} before");
            let hides = vm.file(page.0).is_some_and(|file| file.flags().contains(FileFlags::NO_DIRECT_MAP));
            assert!(!hides || self.off_direct_map.contains(&page), "mapped while on the direct map: {page:?}");
        }
    }

    /// A new entry may replace one of the same frames, of any size.
    fn zap_replaced(&mut self, new: Mapping) {
        self.stage2.retain(|_, old| frames_of(old).intersect(frames_of(&new)).is_none());
    }

    fn pages_behind(&self, mapping: &Mapping) -> Vec<(FileId, u64)> {
        let pfns = mapping.pfn.0..mapping.pfn.0 + mapping.level.pages();
        pfns.filter_map(|pfn| self.page_at(Pfn(pfn))).collect()
    }

    /// What must hold whenever no operation is under way: nothing is left open, and the tables show nothing that the VM
    /// does not.
    pub(crate) fn assert_quiet(&self, vm: &Vm) {
        assert_eq!(vm.audit(), [], "{:?}", self.trace);
        assert!(vm.invalidation().is_idle());
        assert!(self.locks.is_empty(), "still held: {:?} after {:?}", self.locks, self.trace);
        assert!(self.tlb.is_empty(), "zapped and never flushed: {:?}", self.tlb);
        for mapping in self.stage2.values() {
            for gfn in frames_of(mapping).pages() {
                self.assert_shown(vm, *mapping, gfn);
            }
        }
    }

    fn assert_shown(&self, vm: &Vm, mapping: Mapping, gfn: Gfn) {
        let expected = match vm.view(gfn) {
            View::UserMemory { hva } => (self.user_pfn(hva), Side::Shared),
            View::FilePage { file, index, side } => {
                let file = vm.file(file).filter(|file| file.is_present(index));
                (file.map(|file| file.pfn(index)), side)
            }
            view => panic!("{mapping:?} is stale: {gfn:?} has {view:?} after {:?}", self.trace),
        };
        let is = (self.pfn_of(gfn), mapping.side);
        assert_eq!(is, expected, "{mapping:?} is stale at {gfn:?} after {:?}", self.trace);
    }
}

pub(crate) fn frames_of(mapping: &Mapping) -> GfnRange {
    PageRange::with_len(mapping.gfn, mapping.level.pages()).expect("mappings do not wrap")
}

/// Operations that may ask for the VMM's page.
pub(crate) trait AskUserPage {
    fn answer(&mut self, _pfn: Option<Pfn>) {}
}

impl AskUserPage for Fault {
    fn answer(&mut self, pfn: Option<Pfn>) {
        self.user_page(pfn);
    }
}

macro_rules! asks_nothing {
    ($($operation:ty),*) => { $(impl AskUserPage for $operation {})* };
}

asks_nothing!(
    SetAttributes,
    SetRegion,
    CloseFile,
    gmem_core::ops::PunchHole,
    gmem_core::ops::MemoryFailure,
    gmem_core::ops::ConvertInPlace,
    gmem_core::ops::ChangeUserMapping,
    gmem_core::ops::RestoreTemporarily,
    gmem_core::ops::Populate<'_>
);

/// A fault's mapping at the smallest level.
pub(crate) fn is_page(mapping: &Mapping) -> bool {
    mapping.level == Level::Page4K
}
