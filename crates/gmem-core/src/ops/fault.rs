use super::{Action, DirectMap, Lock, Operation, Pages, Step};
use crate::addr::{Gfn, IndexRange, Level, PageIndex, PageNumber, Pfn};
use crate::file::{FileFlags, FileId, GetPageError};
use crate::invalidate::Snapshot;
use crate::slot::SlotId;
use crate::vendor::{Mapping, Refusal, Side};
use crate::vm::{DirectMapFlush, Tracking, Vm};

/// What a guest did to take a fault.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// The frame.
    pub gfn: Gfn,
    /// The side that the hardware reports for the access. Ignored by architectures whose accesses have no side.
    pub claimed: Side,
}

/// Who wants the mapping.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Origin {
    /// A vCPU that runs.
    Guest,
    /// `KVM_PRE_FAULT_MEMORY`: like a read by the guest, on the side that the attribute says.
    Prefault,
}

/// Contents of a memory-fault exit. The size is one page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MemoryFault {
    /// The frame.
    pub gfn: Gfn,
    /// The side of the access, which is not that of the frame, or which nothing can back.
    pub side: Side,
}

/// How a fault ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultEnd {
    /// The frame is mapped: the guest runs on.
    Mapped(Mapping),
    /// Something changed meanwhile: the guest runs on and will fault again.
    Retry,
    /// The frame has no slot: the VMM emulates the access (MMIO). For a prefault: ENOENT.
    Emulate,
    /// KVM_RUN ends with EFAULT and `KVM_EXIT_MEMORY_FAULT`.
    MemoryFault(MemoryFault),
    /// The same exit, but the error is that of the page's lookup and not EFAULT.
    PageError(MemoryFault, GetPageError),
    /// The same exit; the architecture refused to make the page private.
    Refused(MemoryFault, Refusal),
    /// The VMM has no page at its address: KVM_RUN ends with a bare EFAULT.
    NoUserPage,
    /// The slot is being deleted or moved while a prefault meets it. EAGAIN where the kernel reports it.
    DyingSlot,
}

/// A stage-2 fault: snapshot the sequence, decide, get the page, make it private, map unless stale.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Fault {
    access: Access,
    origin: Origin,
    state: State,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum State {
    Snapshot,
    Decide(Snapshot),
    LockFile(Snapshot, Target),
    TakePage(Snapshot, Target),
    UserPage(Snapshot, Target, Option<Pfn>),
    MakePrivate(Snapshot, Target, Taken),
    LeaveDirectMap(Snapshot, Target, Taken),
    FlushDirectMap(Snapshot, Target, Taken),
    Commit(Snapshot, Target, Taken),
    UnlockFile(FileId, FaultEnd),
    End(FaultEnd),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Target {
    slot: SlotId,
    side: Side,
    from_file: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Taken {
    pfn: Pfn,
    level: Level,
    page: Option<(FileId, PageIndex, IndexRange)>,
}

impl Fault {
    /// A fault on `access`.
    #[must_use]
    pub fn new(access: Access, origin: Origin) -> Self {
        Self { access, origin, state: State::Snapshot }
    }

    /// The frame.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        self.access.gfn
    }

    /// Whether the fault is between its snapshot and its end: [`Action::Synchronize`] waits for it.
    #[must_use]
    pub fn is_reading_slots(&self) -> bool {
        !matches!(self.state, State::Snapshot | State::End(_))
    }

    /// Answers [`Action::GetUserPage`]. Without an answer, or with `None`, there is no such page.
    pub fn user_page(&mut self, pfn: Option<Pfn>) {
        if let State::UserPage(_, _, answer) = &mut self.state {
            *answer = pfn;
        }
    }

    /// Takes the snapshot anew, as if nothing had been looked up: for the explorer's broken protocols only.
    pub fn forget_snapshot(&mut self, vm: &Vm) {
        let now = vm.invalidation.snapshot();
        match &mut self.state {
            State::Decide(snapshot)
            | State::LockFile(snapshot, _)
            | State::TakePage(snapshot, _)
            | State::UserPage(snapshot, _, _)
            | State::MakePrivate(snapshot, _, _)
            | State::LeaveDirectMap(snapshot, _, _)
            | State::FlushDirectMap(snapshot, _, _)
            | State::Commit(snapshot, _, _) => *snapshot = now,
            State::Snapshot | State::UnlockFile(..) | State::End(_) => {}
        }
    }

    /// Whether the next step is the one that checks the snapshot and maps.
    #[must_use]
    pub fn is_about_to_map(&self) -> bool {
        matches!(self.state, State::Commit(..))
    }

    fn end(&mut self, end: FaultEnd) -> Step<FaultEnd> {
        self.state = State::End(end);
        Step::Done(end)
    }

    fn memory_fault(&self, side: Side) -> MemoryFault {
        MemoryFault { gfn: self.access.gfn, side }
    }

    fn side(&self, vm: &Vm) -> Side {
        let attribute = vm.attribute(self.access.gfn);
        match self.origin {
            Origin::Guest => vm.arch.access_side(self.access.claimed, attribute),
            Origin::Prefault => attribute,
        }
    }

    /// Mismatch first, then the slot, then what the slot can serve (`kvm_mmu_faultin_pfn()`).
    fn decide(&mut self, vm: &mut Vm, snapshot: Snapshot) -> Step<FaultEnd> {
        let side = self.side(vm);
        if side != vm.attribute(self.access.gfn) {
            return self.end(FaultEnd::MemoryFault(self.memory_fault(side)));
        }
        let Some(slot) = vm.slots.at(0, self.access.gfn) else {
            return self.without_slot(side);
        };
        if slot.invalid {
            return self.dying_slot(vm);
        }
        let target = Target { slot: slot.id, side, from_file: false };
        match slot.binding {
            None if side == Side::Private => self.end(FaultEnd::MemoryFault(self.memory_fault(side))),
            Some(binding) if side == Side::Private || binding.file_only => {
                self.state = State::LockFile(snapshot, Target { from_file: true, ..target });
                Step::Do(Action::Continue)
            }
            _ => {
                self.state = State::UserPage(snapshot, target, None);
                Step::Do(Action::GetUserPage { slot: target.slot, gfn: self.access.gfn })
            }
        }
    }

    fn without_slot(&mut self, side: Side) -> Step<FaultEnd> {
        match side {
            Side::Private => self.end(FaultEnd::MemoryFault(self.memory_fault(side))),
            Side::Shared => self.end(FaultEnd::Emulate),
        }
    }

    fn dying_slot(&mut self, vm: &Vm) -> Step<FaultEnd> {
        let reported = self.origin == Origin::Prefault && vm.rules.prefault_reports_dying_slot;
        self.end(if reported { FaultEnd::DyingSlot } else { FaultEnd::Retry })
    }

    /// With in-place conversion the file decides what is private, so the lookup excludes conversions.
    fn lock_file(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target) -> Step<FaultEnd> {
        self.state = State::TakePage(snapshot, target);
        match self.locked_file(vm, target) {
            Some(file) => Step::Do(Action::Lock(Lock::FileShared(file))),
            None => self.step(vm),
        }
    }

    fn locked_file(&self, vm: &Vm, target: Target) -> Option<FileId> {
        let in_place = vm.rules.tracking == Tracking::InPlace;
        in_place.then(|| vm.slots.get(target.slot)?.binding?.file).flatten()
    }

    fn take_page(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target) -> Step<FaultEnd> {
        let (file, index, folio) = match vm.take_page(target.slot, self.access.gfn) {
            Ok(page) => page,
            Err(error) => return self.page_error(vm, target, error),
        };
        let Some(inode) = vm.files.get_mut(&file) else {
            return self.page_error(vm, target, GetPageError::NoFile);
        };
        let taken =
            Taken { pfn: inode.pfn(index), level: inode.folio_level_at(index), page: Some((file, index, folio.pages)) };
        self.state = State::MakePrivate(snapshot, target, taken);
        if !folio.needs_zeroing {
            return Step::Do(Action::Continue);
        }
        inode.mark_up_to_date(folio.pages);
        Step::Do(Action::Zero(Pages { file, range: folio.pages }))
    }

    fn page_error(&mut self, vm: &Vm, target: Target, error: GetPageError) -> Step<FaultEnd> {
        let fault = self.memory_fault(target.side);
        let end = match error {
            GetPageError::NoFile => FaultEnd::MemoryFault(fault),
            GetPageError::NotBound | GetPageError::Poisoned => FaultEnd::PageError(fault, error),
        };
        self.unlock_then(vm, target, end)
    }

    fn unlock_then(&mut self, vm: &Vm, target: Target, end: FaultEnd) -> Step<FaultEnd> {
        match self.locked_file(vm, target).filter(|_| target.from_file) {
            Some(file) => {
                self.state = State::UnlockFile(file, end);
                Step::Do(Action::Unlock(Lock::FileShared(file)))
            }
            None => self.end(end),
        }
    }

    fn make_private(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        if target.side == Side::Private
            && let Err(refusal) = vm.arch.make_private(self.access.gfn, taken.pfn)
        {
            let fault = self.memory_fault(target.side);
            return self.unlock_then(vm, target, FaultEnd::Refused(fault, refusal));
        }
        self.state = State::LeaveDirectMap(snapshot, target, taken);
        Step::Do(Action::Continue)
    }

    /// After the page was prepared, because preparation may need the direct map; every page of the folio, not one.
    fn leave_direct_map(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        let hidden = taken.page.and_then(|(file, _, folio)| {
            let inode = vm.files.get_mut(&file)?;
            let leaves = inode.flags().contains(FileFlags::NO_DIRECT_MAP) && inode.on_direct_map(folio.start());
            leaves.then(|| inode.set_direct_map(folio, false))?;
            Some(Pages { file, range: folio })
        });
        match hidden {
            Some(pages) => {
                self.state = State::FlushDirectMap(snapshot, target, taken);
                Step::Do(Action::DirectMap(pages, DirectMap::Remove))
            }
            None => {
                self.state = State::Commit(snapshot, target, taken);
                self.step(vm)
            }
        }
    }

    fn flush_direct_map(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        self.state = State::Commit(snapshot, target, taken);
        match vm.rules.direct_map_flush {
            DirectMapFlush::Flush => Step::Do(Action::FlushDirectMap),
            DirectMapFlush::NoFlush => self.step(vm),
        }
    }

    /// Under mmu_lock: stale or map.
    fn commit(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        if vm.invalidation.is_stale(snapshot, self.access.gfn) {
            return self.unlock_then(vm, target, FaultEnd::Retry);
        }
        let mapping = self.mapping(vm, target, taken);
        if let Err(refusal) = vm.arch.map(mapping) {
            return self.refused_map(vm, target, refusal);
        }
        self.state = match self.locked_file(vm, target).filter(|_| target.from_file) {
            Some(file) => State::UnlockFile(file, FaultEnd::Mapped(mapping)),
            None => State::End(FaultEnd::Mapped(mapping)),
        };
        Step::Do(Action::Map(mapping))
    }

    fn refused_map(&mut self, vm: &Vm, target: Target, refusal: Refusal) -> Step<FaultEnd> {
        let busy = refusal.cause == crate::vendor::Cause::Busy;
        let fault = self.memory_fault(target.side);
        let end = if busy { FaultEnd::Retry } else { FaultEnd::Refused(fault, refusal) };
        self.unlock_then(vm, target, end)
    }

    fn mapping(&self, vm: &Vm, target: Target, taken: Taken) -> Mapping {
        let gfn = self.access.gfn;
        let slot = vm.slots.get(target.slot);
        let arch = vm.arch.max_level(taken.pfn, target.side).min(taken.level);
        let level = slot.map_or(Level::Page4K, |slot| vm.max_level(slot, gfn, arch));
        let head = gfn.align_down(level);
        let pfn = Pfn(taken.pfn.0.wrapping_sub(gfn.0 - head.0));
        Mapping { gfn: head, pfn, level, side: target.side }
    }
}

impl Operation for Fault {
    type Output = FaultEnd;

    fn step(&mut self, vm: &mut Vm) -> Step<FaultEnd> {
        match self.state.clone() {
            State::Snapshot => {
                self.state = State::Decide(vm.invalidation.snapshot());
                Step::Do(Action::Continue)
            }
            State::Decide(snapshot) => self.decide(vm, snapshot),
            State::LockFile(snapshot, target) => self.lock_file(vm, snapshot, target),
            State::TakePage(snapshot, target) => self.take_page(vm, snapshot, target),
            State::UserPage(snapshot, target, Some(pfn)) => {
                let taken = Taken { pfn, level: Level::Page4K, page: None };
                self.state = State::Commit(snapshot, target, taken);
                Step::Do(Action::Continue)
            }
            State::UserPage(_, _, None) => self.end(FaultEnd::NoUserPage),
            State::MakePrivate(snapshot, target, taken) => self.make_private(vm, snapshot, target, taken),
            State::LeaveDirectMap(snapshot, target, taken) => self.leave_direct_map(vm, snapshot, target, taken),
            State::FlushDirectMap(snapshot, target, taken) => self.flush_direct_map(vm, snapshot, target, taken),
            State::Commit(snapshot, target, taken) => self.commit(vm, snapshot, target, taken),
            State::UnlockFile(file, end) => {
                self.state = State::End(end);
                Step::Do(Action::Unlock(Lock::FileShared(file)))
            }
            State::End(end) => Step::Done(end),
        }
    }
}
