use super::direct_map::hide_folio;
use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{Gfn, IndexRange, Level, PageIndex, PageNumber, Pfn};
use crate::file::{FileId, GetPageError};
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

/// A stage-2 fault: note the side of the access, snapshot the sequence, decide, get the page, make it private, map unless
/// stale.
///
/// The side comes first, as in Linux: where it is that of the attribute (SW_PROTECTED, every prefault) it can be out of
/// date when it is compared with the attribute later. That ends in a memory-fault exit that tells of nothing wrong any
/// more, and in nothing worse.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Fault {
    access: Access,
    origin: Origin,
    state: State,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum State {
    Side,
    Snapshot(Side),
    Decide(Snapshot, Side),
    LockFile(Snapshot, Target),
    TakePage(Snapshot, Target),
    Zero(Snapshot, Target, Taken),
    UserPage(Snapshot, Target, Option<Pfn>),
    MakePrivate(Snapshot, Target, Taken),
    LeaveDirectMap(Snapshot, Target, Taken),
    FlushDirectMap(Snapshot, Target, Taken),
    UnlockFolio(Snapshot, Target, Taken),
    Commit(Snapshot, Target, Taken),
    Fail(Target, FaultEnd),
    UnlockFile(FileId, FaultEnd),
    End(FaultEnd),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Target {
    slot: SlotId,
    side: Side,
    /// The file whose lock is held. What the slot says may change when the file is closed.
    locked: Option<FileId>,
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
        Self { access, origin, state: State::Side }
    }

    /// The frame.
    #[must_use]
    pub fn gfn(&self) -> Gfn {
        self.access.gfn
    }

    /// Whether the fault is between its snapshot and its end: [`Action::Synchronize`] waits for it.
    #[must_use]
    pub fn is_reading_slots(&self) -> bool {
        !matches!(self.state, State::Side | State::Snapshot(_) | State::End(_))
    }

    /// Answers [`Action::GetUserPage`]. Without an answer, or with `None`, there is no such page.
    pub fn user_page(&mut self, pfn: Option<Pfn>) {
        if let State::UserPage(_, _, answer) = &mut self.state {
            *answer = pfn;
        }
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
    fn decide(&mut self, vm: &mut Vm, snapshot: Snapshot, side: Side) -> Step<FaultEnd> {
        if side != vm.attribute(self.access.gfn) {
            return self.end(FaultEnd::MemoryFault(self.memory_fault(side)));
        }
        let Some(slot) = vm.slots.at(0, self.access.gfn) else {
            return self.without_slot(side);
        };
        if slot.invalid {
            return self.dying_slot(vm);
        }
        let target = Target { slot: slot.id, side, locked: None };
        match slot.binding {
            None if side == Side::Private => self.end(FaultEnd::MemoryFault(self.memory_fault(side))),
            Some(binding) if side == Side::Private || binding.file_only => {
                self.state = State::LockFile(snapshot, target);
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
        let in_place = vm.rules.tracking == Tracking::InPlace;
        let locked = in_place.then(|| vm.slots.get(target.slot)?.binding?.file).flatten();
        self.state = State::TakePage(snapshot, Target { locked, ..target });
        match locked {
            Some(file) => Step::Do(Action::Lock(Lock::FileShared(file))),
            None => self.step(vm),
        }
    }

    fn take_page(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target) -> Step<FaultEnd> {
        let (file, index, folio) = match vm.take_page(target.slot, self.access.gfn) {
            Ok(page) => page,
            Err(error) => return self.page_error(target, error),
        };
        let Some(inode) = vm.files.get(&file) else {
            return self.page_error(target, GetPageError::NoFile);
        };
        let taken =
            Taken { pfn: inode.pfn(index), level: inode.folio_level_at(index), page: Some((file, index, folio)) };
        self.state = State::Zero(snapshot, target, taken);
        Step::Do(Action::Lock(Lock::Folios(Pages { file, range: folio })))
    }

    /// Whether the bytes are someone else's is known only under the folio's lock: another fault may have been faster.
    fn zero(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        if !still_there(vm, taken) {
            return self.unlock_folio(vm, taken, State::Fail(target, FaultEnd::Retry));
        }
        let stale = taken.page.and_then(|(file, _, folio)| zero_next(vm, file, folio));
        let (action, more) = stale.map_or((Action::Continue, false), |(pages, more)| (Action::Zero(pages), more));
        if !more {
            self.state = State::MakePrivate(snapshot, target, taken);
        }
        Step::Do(action)
    }

    fn unlock_folio(&mut self, vm: &mut Vm, taken: Taken, next: State) -> Step<FaultEnd> {
        self.state = next;
        match taken.page {
            Some((file, _, range)) => Step::Do(Action::Unlock(Lock::Folios(Pages { file, range }))),
            None => self.step(vm),
        }
    }

    fn page_error(&mut self, target: Target, error: GetPageError) -> Step<FaultEnd> {
        let fault = self.memory_fault(target.side);
        let end = match error {
            GetPageError::NoFile | GetPageError::BeyondEnd => FaultEnd::MemoryFault(fault),
            GetPageError::NotBound | GetPageError::Poisoned => FaultEnd::PageError(fault, error),
        };
        self.unlock_then(target, end)
    }

    fn unlock_then(&mut self, target: Target, end: FaultEnd) -> Step<FaultEnd> {
        match target.locked {
            Some(file) => {
                self.state = State::End(end);
                Step::Do(Action::Unlock(Lock::FileShared(file)))
            }
            None => self.end(end),
        }
    }

    fn make_private(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        if is_prepared(vm, target, taken)
            && let Err(refusal) = vm.arch.make_private(self.access.gfn, taken.pfn)
        {
            let end = FaultEnd::Refused(self.memory_fault(target.side), refusal);
            return self.unlock_folio(vm, taken, State::Fail(target, end));
        }
        self.state = State::LeaveDirectMap(snapshot, target, taken);
        Step::Do(Action::Continue)
    }

    /// After the page was prepared, because preparation may need the direct map; every page of the folio, not one.
    fn leave_direct_map(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        let hidden = taken.page.and_then(|(file, _, range)| hide_folio(vm, Pages { file, range }));
        match hidden {
            Some(pages) => {
                self.state = State::FlushDirectMap(snapshot, target, taken);
                Step::Do(Action::DirectMap(pages, DirectMap::Remove))
            }
            None => self.unlock_folio(vm, taken, State::Commit(snapshot, target, taken)),
        }
    }

    fn flush_direct_map(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        self.state = State::UnlockFolio(snapshot, target, taken);
        match vm.rules.direct_map_flush {
            DirectMapFlush::Flush => Step::Do(Action::FlushDirectMap),
            DirectMapFlush::NoFlush => self.step(vm),
        }
    }

    /// Under mmu_lock: stale or map.
    fn commit(&mut self, vm: &mut Vm, snapshot: Snapshot, target: Target, taken: Taken) -> Step<FaultEnd> {
        if vm.invalidation.is_stale(snapshot, self.access.gfn) {
            return self.unlock_then(target, FaultEnd::Retry);
        }
        let mapping = self.mapping(vm, target, taken);
        if let Err(refusal) = vm.arch.map(mapping) {
            return self.refused_map(target, refusal);
        }
        self.state = match target.locked {
            Some(file) => State::UnlockFile(file, FaultEnd::Mapped(mapping)),
            None => State::End(FaultEnd::Mapped(mapping)),
        };
        Step::Do(Action::Map(mapping))
    }

    fn refused_map(&mut self, target: Target, refusal: Refusal) -> Step<FaultEnd> {
        let busy = refusal.cause == crate::vendor::Cause::Busy;
        let fault = self.memory_fault(target.side);
        let end = if busy { FaultEnd::Retry } else { FaultEnd::Refused(fault, refusal) };
        self.unlock_then(target, end)
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

/// Takes the next pages of a folio that have to be zeroed before anyone sees them, and says whether there are more. Under the
/// folio's lock, or that of its file.
pub(super) fn zero_next(vm: &mut Vm, file: FileId, folio: IndexRange) -> Option<(Pages, bool)> {
    let inode = vm.files.get_mut(&file)?;
    let range = inode.first_stale(folio)?;
    inode.mark_up_to_date(range);
    Some((Pages { file, range }, inode.first_stale(folio).is_some()))
}

/// Whether the architecture is told of the page before it is mapped. A private access is always one to a private page; where
/// there is a hook (`kvm_arch_gmem_make_private()`) the file decides, and a shared access to a page of a private file, which
/// one that serves every fault allows, makes the page private as well.
///
/// Not so in place: the access was compared before the file was locked, and a conversion since then may have given the page
/// to the host. That the fault is stale is found only after this, so the file alone says, whose lock is held now.
fn is_prepared(vm: &Vm, target: Target, taken: Taken) -> bool {
    let file = taken.page.and_then(|(file, index, _)| Some((vm.files.get(&file)?, index)));
    let of_private_file = file.is_some_and(|(file, index)| file.side(index) == Side::Private);
    let is_private_access = target.side == Side::Private;
    match vm.rules.tracking {
        Tracking::InPlace => of_private_file && (is_private_access || vm.arch.prepares_by_file()),
        Tracking::Attributes => is_private_access || (of_private_file && vm.arch.prepares_by_file()),
    }
}

/// Whether the folio is what it was when it was looked up: until its lock was had it could be freed or split, and others of its
/// pages may be in use (`filemap_lock_folio()` looks again, too).
fn still_there(vm: &Vm, taken: Taken) -> bool {
    taken.page.is_none_or(|(file, index, folio)| {
        vm.files.get(&file).is_some_and(|file| file.folio_range(index) == Some(folio))
    })
}

impl Operation for Fault {
    type Output = FaultEnd;

    fn step(&mut self, vm: &mut Vm) -> Step<FaultEnd> {
        match self.state.clone() {
            State::Side => {
                self.state = State::Snapshot(self.side(vm));
                Step::Do(Action::Continue)
            }
            State::Snapshot(side) => {
                self.state = State::Decide(vm.invalidation.snapshot(), side);
                Step::Do(Action::Continue)
            }
            State::Decide(snapshot, side) => self.decide(vm, snapshot, side),
            State::LockFile(snapshot, target) => self.lock_file(vm, snapshot, target),
            State::TakePage(snapshot, target) => self.take_page(vm, snapshot, target),
            State::UserPage(snapshot, target, Some(pfn)) => {
                let taken = Taken { pfn, level: Level::Page4K, page: None };
                self.state = State::Commit(snapshot, target, taken);
                Step::Do(Action::Continue)
            }
            State::UserPage(_, _, None) => self.end(FaultEnd::NoUserPage),
            State::Zero(snapshot, target, taken) => self.zero(vm, snapshot, target, taken),
            State::UnlockFolio(snapshot, target, taken) => {
                self.unlock_folio(vm, taken, State::Commit(snapshot, target, taken))
            }
            State::Fail(target, end) => self.unlock_then(target, end),
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

    fn reach(&self) -> Reach {
        let truth = Parts::ATTRIBUTES | Parts::SLOTS | Parts::FILES;
        match self.state {
            State::Side | State::Decide(..) => Reach::reads(truth),
            State::Snapshot(_) => Reach::reads(Parts::INVALIDATION),
            State::MakePrivate(..) => Reach::writes(Parts::ARCH).and_reads(Parts::SLOTS | Parts::FILES),
            State::UserPage(..) | State::UnlockFolio(..) | State::UnlockFile(..) | State::End(_) => Reach::NOTHING,
            State::Fail(..) => Reach::reads(Parts::SLOTS),
            State::LockFile(..) | State::TakePage(..) | State::Zero(..) => {
                Reach::writes(Parts::FILES).and_reads(Parts::SLOTS)
            }
            State::LeaveDirectMap(..) => Reach::writes(Parts::FILES),
            State::FlushDirectMap(..) => Reach::NOTHING,
            State::Commit(..) => Reach::writes(Parts::ARCH).and_reads(Parts::all()),
        }
    }
}
