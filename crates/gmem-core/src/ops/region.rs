use super::{Action, Lock, Operation, Parts, Reach, Step};
use crate::addr::{Gfn, GfnRange, PAGE_SHIFT, PAGE_SIZE, PageIndex};
use crate::file::{File, FileFlags, FileId};
use crate::invalidate::Filter;
use crate::slot::{Binding, Slot, SlotFlags, SlotId};
use crate::vm::Vm;

/// Pages that one slot may have (`KVM_MEM_MAX_NR_PAGES`).
const MAX_PAGES: u64 = (1 << 31) - 1;

/// What a client says in `KVM_SET_USER_MEMORY_REGION2`. All of it is a claim.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Claim {
    /// Address space and number, packed.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// Bytes.
    pub guest_phys_addr: u64,
    /// Bytes; 0 deletes the slot.
    pub memory_size: u64,
    /// Address in the VMM.
    pub userspace_addr: u64,
    /// What the descriptor turned out to be.
    pub file: FileClaim,
    /// Bytes.
    pub guest_memfd_offset: u64,
}

/// What the descriptor in a claim is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FileClaim {
    /// Not an open descriptor.
    BadDescriptor,
    /// Something other than a guest_memfd.
    NotGuestMemfd,
    /// A guest_memfd of another VM.
    OtherVm,
    /// A file of this VM.
    File(FileId),
}

/// Why a slot cannot be set. In the order of the kernel's checks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RegionError {
    /// Bits 15:0 of the slot are not below [`max_slots`](crate::vm::Rules::max_slots) (`KVM_USER_MEM_SLOTS`). Looked at before
    /// everything else and whatever the claim asks for, a delete included. An address space (bits 31:16) that the VM has
    /// not is [`RegionError::Geometry`]. EINVAL.
    SlotNumber,
    /// Flags that do not exist or exclude each other. EINVAL.
    Flags,
    /// A read-only slot of a VM whose state is protected: KVM could not emulate the writes (`kvm_arch_has_readonly_mem()`).
    /// EINVAL.
    ReadOnly,
    /// Size, gpa, address or offset not aligned, not addressable, wrapping or too large, or no such address space. EINVAL.
    Geometry,
    /// A delete names no slot. EINVAL.
    NoSuchSlot,
    /// The pages of all slots together would not fit a machine word. EINVAL.
    TooManyPages,
    /// A slot with a file cannot be changed, and of others neither size, address nor these flags. EINVAL.
    Immutable,
    /// Other slots have some of the frames. EEXIST.
    Overlap,
    /// The descriptor is not open. EBADF.
    BadDescriptor,
    /// Not a guest_memfd, of another VM, or offset and size pass its end. EINVAL.
    File,
    /// Some of the file's pages are bound already. EINVAL up to 6.18, EEXIST from 7.2 on. Found out before
    /// [`RegionError::Unreachable`] where [`binds_last`](crate::vm::Rules::binds_last) is not set.
    PagesBound,
    /// No guest of the VM can reach the last of the frames (`kvm_arch_prepare_memory_region()`). EINVAL on x86, EFAULT on arm64.
    Unreachable,
}

/// What a valid claim does.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Change {
    Create(Slot),
    Delete(SlotId),
    Move(SlotId, Slot),
    Flags(SlotId, SlotFlags),
    Nothing,
}

/// Sets a slot: all checks in the kernel's order, then the change in steps.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SetRegion {
    claim: Claim,
    state: State,
    /// Whose bindings change, while its lock is held.
    file: Option<FileId>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Check,
    Zap(Change),
    Flush(Change),
    Synchronize(Change),
    LockFile(Change),
    Commit(Change),
    UnlockFile(FileId),
    Unlock,
    Done(Output),
}

type Output = Result<(), RegionError>;

impl SetRegion {
    /// Carries `claim` out, or refuses it.
    #[must_use]
    pub fn new(claim: Claim) -> Self {
        Self { claim, state: State::Lock, file: None }
    }

    fn next(&mut self, state: State, action: Action) -> Step<Output> {
        self.state = state;
        Step::Do(action)
    }

    fn unlock(&mut self, result: Output) -> Step<Output> {
        self.next(State::Done(result), Action::Unlock(Lock::Slots))
    }

    fn check(&mut self, vm: &mut Vm) -> Step<Output> {
        match check(vm, &self.claim) {
            Err(error) => self.unlock(Err(error)),
            Ok(Change::Nothing) => self.unlock(Ok(())),
            Ok(change @ (Change::Create(_) | Change::Flags(..))) => {
                self.next(State::LockFile(change), Action::Continue)
            }
            Ok(change @ (Change::Delete(id) | Change::Move(id, _))) => {
                if let Some(slot) = vm.slots.get_mut(id) {
                    slot.invalid = true;
                }
                self.next(State::Synchronize(change), Action::Continue)
            }
        }
    }

    /// Faults that still read the old slot may map from it; their mappings go with the zap that follows.
    fn synchronize(&mut self, change: Change) -> Step<Output> {
        self.next(State::Zap(change), Action::Synchronize)
    }

    fn zap(&mut self, vm: &Vm, change: Change) -> Step<Output> {
        let id = match &change {
            Change::Delete(id) | Change::Move(id, _) => Some(*id),
            Change::Create(_) | Change::Flags(..) | Change::Nothing => None,
        };
        match id.and_then(|id| vm.slots.get(id)) {
            Some(slot) => {
                let range = slot.gfns;
                self.next(State::Flush(change), Action::Zap { range, filter: Filter::Both })
            }
            None => self.next(State::LockFile(change), Action::Continue),
        }
    }

    /// Bindings change only under the file's exclusive lock: a hole that is being punched has looked at them already and
    /// would free pages that a new binding lets the guest map.
    fn lock_file(&mut self, vm: &mut Vm, change: Change) -> Step<Output> {
        let file = bound_file(vm, &change);
        self.state = State::Commit(change);
        match file {
            Some(file) => Step::Do(Action::Lock(Lock::FileExclusive(file))),
            None => self.step(vm),
        }
    }

    /// Slots stay where they are while the VMM changes mappings that they show: the change covers the frames that it found,
    /// and a fault on new ones would find the old page (`kvm_swap_active_memslots()` waits, too).
    fn commit(&mut self, vm: &mut Vm, change: Change) -> Step<Output> {
        if vm.user_changes > 0 {
            return self.next(State::Commit(change), Action::Continue);
        }
        let file = bound_file(vm, &change);
        let refill = apply(vm, change);
        let next = file.map_or(State::Unlock, State::UnlockFile);
        self.next(next, refill.map_or(Action::Continue, Action::Refill))
    }
}

/// The file whose bindings `change` changes.
fn bound_file(vm: &Vm, change: &Change) -> Option<FileId> {
    let slot = match change {
        Change::Create(slot) => Some(slot),
        Change::Delete(id) => vm.slots.get(*id),
        Change::Move(..) | Change::Flags(..) | Change::Nothing => None,
    };
    slot?.binding?.file
}

fn apply(vm: &mut Vm, change: Change) -> Option<GfnRange> {
    match change {
        Change::Create(slot) => {
            let range = slot.gfns;
            bind(vm, &slot);
            vm.slots.insert(slot);
            Some(range)
        }
        Change::Delete(id) => {
            let slot = vm.slots.remove(id)?;
            unbind(vm, &slot);
            None
        }
        Change::Move(id, slot) => {
            let range = slot.gfns;
            vm.slots.remove(id);
            vm.slots.insert(slot);
            Some(range)
        }
        Change::Flags(id, flags) => {
            vm.slots.get_mut(id)?.flags = flags;
            None
        }
        Change::Nothing => None,
    }
}

fn bind(vm: &mut Vm, slot: &Slot) {
    if let (Some(Binding { file: Some(file), .. }), Some(pages)) = (slot.binding, slot.file_pages())
        && let Some(file) = vm.files.get_mut(&file)
    {
        file.bind(pages, slot.id);
    }
}

fn unbind(vm: &mut Vm, slot: &Slot) {
    if let Some(Binding { file: Some(file), first, .. }) = slot.binding
        && let Some(file) = vm.files.get_mut(&file)
    {
        file.unbind(first);
    }
}

/// All checks of a claim, changing nothing.
///
/// # Errors
/// The first that applies, in the kernel's order.
pub fn check_claim(vm: &Vm, claim: &Claim) -> Result<(), RegionError> {
    check(vm, claim).map(|_| ())
}

fn check(vm: &Vm, claim: &Claim) -> Result<Change, RegionError> {
    let id = SlotId::from_raw(claim.slot);
    if id.number >= vm.rules.max_slots {
        return Err(RegionError::SlotNumber);
    }
    let flags = check_flags(vm, claim)?;
    check_geometry(vm, claim, id)?;
    let old = vm.slots.get(id);
    if claim.memory_size == 0 {
        return old.map(|_| Change::Delete(id)).ok_or(RegionError::NoSuchSlot);
    }
    let pages = claim.memory_size >> PAGE_SHIFT;
    let gfns = crate::slot::frames(Gfn::of_gpa(claim.guest_phys_addr), pages).ok_or(RegionError::Geometry)?;
    let slot = Slot { id, gfns, userspace_addr: claim.userspace_addr, flags, binding: None, invalid: false };
    match old {
        None => check_create(vm, claim, slot),
        Some(old) => check_change(vm, old, slot),
    }
}

fn check_flags(vm: &Vm, claim: &Claim) -> Result<SlotFlags, RegionError> {
    let flags = SlotFlags::from_bits(claim.flags).ok_or(RegionError::Flags)?;
    if !Vm::is_private_slot(flags) {
        let forbidden = flags.contains(SlotFlags::READONLY) && !vm.arch.has_readonly_slots();
        return if forbidden { Err(RegionError::ReadOnly) } else { Ok(flags) };
    }
    let excluded = flags.intersects(SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READONLY);
    if excluded || !vm.takes_private_slots() { Err(RegionError::Flags) } else { Ok(flags) }
}

fn check_geometry(vm: &Vm, claim: &Claim, id: SlotId) -> Result<(), RegionError> {
    let aligned = |value: u64| value.is_multiple_of(PAGE_SIZE);
    let pages_aligned = [claim.memory_size, claim.guest_phys_addr, claim.userspace_addr].into_iter().all(aligned);
    let user_end = claim.userspace_addr.checked_add(claim.memory_size);
    let reachable = user_end.is_some_and(|end| end <= vm.rules.user_end);
    let file = claim.flags & SlotFlags::GUEST_MEMFD.bits() == 0
        || (aligned(claim.guest_memfd_offset) && claim.guest_memfd_offset.checked_add(claim.memory_size).is_some());
    let fits = claim.guest_phys_addr.checked_add(claim.memory_size).is_some();
    let small = claim.memory_size >> PAGE_SHIFT <= MAX_PAGES;
    let known_space = id.space < vm.address_spaces();
    if pages_aligned && reachable && file && known_space && fits && small { Ok(()) } else { Err(RegionError::Geometry) }
}

fn check_create(vm: &Vm, claim: &Claim, mut slot: Slot) -> Result<Change, RegionError> {
    vm.slots.pages().checked_add(slot.gfns.len()).ok_or(RegionError::TooManyPages)?;
    check_overlap(vm, &slot)?;
    if Vm::is_private_slot(slot.flags) {
        slot.binding = Some(check_file(vm, claim)?);
    }
    if vm.rules.binds_last {
        check_reach(vm, &slot).and_then(|()| check_unbound(vm, &slot))?;
    } else {
        check_unbound(vm, &slot).and_then(|()| check_reach(vm, &slot))?;
    }
    Ok(Change::Create(slot))
}

/// A slot with a file is immutable, even against being set again as it is; of another one only the frames may move and
/// dirty logging may change.
fn check_change(vm: &Vm, old: &Slot, new: Slot) -> Result<Change, RegionError> {
    let fixed = SlotFlags::READONLY | SlotFlags::GUEST_MEMFD;
    let changed = old.flags.symmetric_difference(new.flags).intersects(fixed)
        || old.userspace_addr != new.userspace_addr
        || old.gfns.len() != new.gfns.len();
    if Vm::is_private_slot(new.flags) || changed {
        return Err(RegionError::Immutable);
    }
    if old.gfns != new.gfns {
        check_overlap(vm, &new)?;
        check_reach(vm, &new)?;
        return Ok(Change::Move(old.id, new));
    }
    Ok(if old.flags == new.flags { Change::Nothing } else { Change::Flags(old.id, new.flags) })
}

fn check_overlap(vm: &Vm, slot: &Slot) -> Result<(), RegionError> {
    let mut others = vm.slots.overlapping_in(slot.id.space, slot.gfns).filter(|other| other.id != slot.id);
    others.next().map_or(Ok(()), |_| Err(RegionError::Overlap))
}

/// The kernel asks this of a slot that moves only after it has taken the mappings of the old frames away, which come back
/// by faults.
fn check_reach(vm: &Vm, slot: &Slot) -> Result<(), RegionError> {
    let last = Gfn(slot.gfns.end().0.saturating_sub(1));
    let reachable = last.0 < vm.rules.frames_end && !vm.arch.is_alias(last);
    if reachable { Ok(()) } else { Err(RegionError::Unreachable) }
}

fn check_unbound(vm: &Vm, slot: &Slot) -> Result<(), RegionError> {
    let file = slot.binding.and_then(|binding| vm.file(binding.file?));
    let bound = file.zip(slot.file_pages()).is_some_and(|(file, pages)| file.is_bound(pages));
    if bound { Err(RegionError::PagesBound) } else { Ok(()) }
}

fn check_file(vm: &Vm, claim: &Claim) -> Result<Binding, RegionError> {
    let id = match claim.file {
        FileClaim::BadDescriptor => return Err(RegionError::BadDescriptor),
        FileClaim::NotGuestMemfd | FileClaim::OtherVm => return Err(RegionError::File),
        FileClaim::File(id) => id,
    };
    // A file whose last descriptor has gone is no longer named by any, even while its memory is still being freed.
    let file = vm.file(id).filter(|file| file.is_open()).ok_or(RegionError::BadDescriptor)?;
    let first = PageIndex(claim.guest_memfd_offset >> PAGE_SHIFT);
    if !ends_within(vm, claim, file) {
        return Err(RegionError::File);
    }
    Ok(Binding { file: Some(id), first, file_only: vm.serves_every_fault(file.flags()) })
}

/// Whether the kernel finds that the claim's pages end within the file. That offset and size do not wrap is known already.
fn ends_within(vm: &Vm, claim: &Claim, file: &File) -> bool {
    let size = file.pages().saturating_mul(PAGE_SIZE);
    let end = claim.guest_memfd_offset.wrapping_add(claim.memory_size);
    if vm.rules.signed_offsets {
        !claim.guest_memfd_offset.cast_signed().is_negative() && end.cast_signed() <= size.cast_signed()
    } else {
        end <= size
    }
}

impl Vm {
    /// Whether slots of this VM may have files. Up to 6.12 only those of VMs with private memory.
    #[must_use]
    pub fn takes_private_slots(&self) -> bool {
        self.has_private_memory() || self.rules.files_without_private_memory
    }

    /// Whether slots bound to a file with these flags take every page from it.
    #[must_use]
    pub fn serves_every_fault(&self, flags: FileFlags) -> bool {
        flags.contains(FileFlags::MMAP) || self.rules.tracking == crate::vm::Tracking::InPlace
    }
}

impl Operation for SetRegion {
    type Output = Output;

    fn step(&mut self, vm: &mut Vm) -> Step<Output> {
        match core::mem::replace(&mut self.state, State::Check) {
            State::Lock => self.next(State::Check, Action::Lock(Lock::Slots)),
            State::Check => self.check(vm),
            State::Synchronize(change) => self.synchronize(change),
            State::Zap(change) => self.zap(vm, change),
            State::Flush(change) => self.next(State::LockFile(change), Action::Flush),
            State::LockFile(change) => self.lock_file(vm, change),
            State::Commit(change) => self.commit(vm, change),
            State::UnlockFile(file) => self.next(State::Unlock, Action::Unlock(Lock::FileExclusive(file))),
            State::Unlock => self.unlock(Ok(())),
            State::Done(result) => {
                self.state = State::Done(result);
                Step::Done(result)
            }
        }
    }

    fn reach(&self) -> Reach {
        match &self.state {
            State::Lock
            | State::Synchronize(_)
            | State::Flush(_)
            | State::UnlockFile(_)
            | State::Unlock
            | State::Done(_) => Reach::NOTHING,
            State::Check => Reach::writes(Parts::SLOTS).and_reads(Parts::all()),
            State::Zap(_) => Reach::reads(Parts::SLOTS),
            State::LockFile(_) | State::Commit(_) => {
                Reach::writes(Parts::SLOTS | Parts::FILES).and_reads(Parts::INVALIDATION)
            }
        }
    }
}
