//! `KVM_RUN` and `KVM_PRE_FAULT_MEMORY` on a vCPU of an emulated VM.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PAGE_SIZE};
use gmem_core::ops::{Access, Fault, FaultEnd, MemoryFault, Origin};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor::Side;
use gmem_core::vm::View;
use gmem_host::fds::Hidden;
use gmem_host::kvm::{self, RunMapping};
use gmem_host::sys::{self, Argument, SignalsBlocked};
use gmem_host::vcpu::{self, GuestView, Mmio, PendingWrite, Progress, RunArea};
use gmem_host::window::Shows;
use rustix::fd::{AsFd, RawFd};
use rustix::io::Errno;

use crate::abi::{self, PreFaultMemory};
use crate::errno;
use crate::vm::{VmObject, lock};

/// Times that an access which nothing forbids is tried again. A window is replaced in microseconds; something that lasts
/// longer than this is a client that unmapped its guest's memory.
const MOST_RETRIES: u32 = 10_000;

/// A vCPU of an emulated VM.
#[derive(Debug)]
pub(crate) struct VcpuObject {
    fd: Hidden,
    mapping: RunMapping,
    vm: Arc<VmObject>,
    /// A write that the host's KVM has taken out of the guest and that has not reached memory.
    pending: Rare<PendingWrite>,
    emulating: Emulating,
    host_prefaults: bool,
}

/// What is mostly not there: to see that costs one load, and no lock, at every exit of a vCPU.
#[derive(Debug)]
struct Rare<T> {
    exists: AtomicBool,
    value: Mutex<Option<T>>,
}

impl<T> Default for Rare<T> {
    fn default() -> Self {
        Self { exists: AtomicBool::new(false), value: Mutex::new(None) }
    }
}

impl<T> Rare<T> {
    /// Whether it is there. One thread at a time runs a vCPU, so that none misses what it has set itself.
    fn exists(&self) -> bool {
        self.exists.load(Ordering::Relaxed)
    }

    /// For those who have blocked signals: a handler that comes to the same vCPU would wait for its own thread.
    fn put(&self, value: Option<T>) {
        self.change(lock(&self.value), value);
    }

    /// For all others. Who interrupted another change makes none.
    fn try_put(&self, value: Option<T>) {
        if value.is_some() || self.exists() {
            let _ = self.value.try_lock().map(|place| self.change(place, value));
        }
    }

    /// What is there, unless someone is at it, as for [`Rare::try_put`].
    fn try_get(&self) -> Option<T>
    where
        T: Copy,
    {
        self.value.try_lock().ok().and_then(|value| *value)
    }

    fn change(&self, mut place: MutexGuard<'_, Option<T>>, value: Option<T>) {
        self.exists.store(value.is_some(), Ordering::Relaxed);
        *place = value;
    }
}

/// What the client was last given to emulate as a device's, and no other exit has come since. KVM finishes that instruction when the
/// vCPU runs again: what it still has to access its emulator takes for a device's, too, where there is nothing to access.
#[derive(Debug, Default)]
struct Emulating {
    /// As [`Emulated::code`], or 0. One thread at a time runs a vCPU.
    what: AtomicU64,
    /// Where the vCPU stood after the last write that ended with a page.
    before: Rare<Progress>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Emulated {
    Read,
    /// Up to this address.
    Write(u64),
}

impl Emulated {
    fn of(mmio: &Mmio) -> Self {
        if mmio.is_write { Self::Write(mmio.gpa.wrapping_add(u64::from(mmio.len))) } else { Self::Read }
    }

    /// Whether the next access of the same instruction may be that to the next page.
    fn ends_a_page(self) -> bool {
        matches!(self, Self::Write(end) if end.is_multiple_of(PAGE_SIZE))
    }

    /// Physical addresses have 52 bits.
    fn code(self) -> u64 {
        match self {
            Self::Read => 1,
            Self::Write(end) => end << 2 | 2,
        }
    }
}

impl Emulating {
    fn set(&self, what: Option<Emulated>) {
        self.what.store(what.map_or(0, Emulated::code), Ordering::Relaxed);
    }

    fn get(&self) -> Option<Emulated> {
        match self.what.load(Ordering::Relaxed) {
            0 => None,
            1 => Some(Emulated::Read),
            write => Some(Emulated::Write(write >> 2)),
        }
    }
}

/// How `KVM_RUN` goes on after the host's KVM came back.
pub(crate) enum Next {
    /// The client gets this.
    Return(Result<i32, Errno>),
    /// The access was met in a gap, or has been made good: run on.
    RunOn,
}

impl VcpuObject {
    pub(crate) fn new(fd: Hidden, vm: Arc<VmObject>, host_prefaults: bool) -> Result<Self, Errno> {
        let mapping = RunMapping::new(vm.run_len, fd.hold().as_fd())?;
        Ok(Self { fd, mapping, vm, pending: Rare::default(), emulating: Emulating::default(), host_prefaults })
    }

    pub(crate) fn vm(&self) -> &VmObject {
        &self.vm
    }

    fn run_area(&self) -> RunArea {
        self.mapping.area()
    }

    /// The vCPU's descriptor at this moment.
    pub(crate) fn number(&self) -> RawFd {
        self.fd.number()
    }

    /// Whether nothing stands between the client and the real `KVM_RUN`.
    pub(crate) fn is_ready(&self) -> bool {
        !self.pending.exists()
    }

    /// Whether the exit is the client's as it is, as nearly all are. If not, nothing has happened.
    pub(crate) fn has_left(&self) -> bool {
        let run = self.run_area();
        let emulated = run.mmio().map(|mmio| (Gfn::of_gpa(mmio.gpa), Emulated::of(&mmio)));
        let is_the_clients = match emulated {
            Some((gfn, emulated)) => !emulated.ends_a_page() && !self.vm.may_be_memory(gfn),
            None => !run.is_emulation_failure(),
        };
        if is_the_clients {
            self.emulating.set(emulated.map(|(_, emulated)| emulated));
        }
        is_the_clients
    }

    /// `KVM_RUN`, whole.
    pub(crate) fn run(&self) -> Result<i32, Errno> {
        if let Some(result) = self.before_run() {
            return result;
        }
        let mut retries = 0;
        loop {
            let number = self.number();
            match self.after_run(number, self.fd.call(kvm::run), retries) {
                Next::Return(result) => return result,
                Next::RunOn => retries += 1,
            }
        }
    }

    /// What the client gets if its `KVM_RUN` does not come to the real one.
    pub(crate) fn before_run(&self) -> Option<Result<i32, Errno>> {
        if self.is_ready() {
            return None;
        }
        let _signals = SignalsBlocked::new();
        self.continue_pending()
    }

    /// How `KVM_RUN` goes on after this result of the real one, which was made on `number` after so many retries.
    pub(crate) fn after_run(&self, number: RawFd, result: Result<i32, Errno>, retries: u32) -> Next {
        let next = match result {
            Ok(value) => self.after_exit(value),
            // It met the client's file where the descriptor had been a moment ago.
            Err(error) if error != Errno::INTR && number != self.number() => Next::RunOn,
            Err(Errno::FAULT) => self.after_fault(),
            error => Next::Return(error),
        };
        match next {
            Next::RunOn if retries == MOST_RETRIES => Next::Return(Err(Errno::FAULT)),
            next => next,
        }
    }

    /// The host's KVM emulated something; where that was an access to a frame that the guest has, or that must fault, it is
    /// not the client's to emulate.
    fn after_exit(&self, value: i32) -> Next {
        if self.has_left() {
            return Next::Return(Ok(value));
        }
        if let Some(mmio) = self.run_area().mmio() {
            return self.after_mmio(value, &mmio);
        }
        self.emulating.set(None);
        self.after_failed_emulation(value)
    }

    /// A host that emulates cannot fetch an instruction that nothing backs. Any other failure is the client's.
    fn after_failed_emulation(&self, value: i32) -> Next {
        let _signals = SignalsBlocked::new();
        if !self.vm.read().core.has_private_memory() {
            return Next::Return(Ok(value));
        }
        let mut forbidden = |gfn, kind| self.is_unreachable(gfn, kind);
        let found = vcpu::locate_failed_emulation(self.fd.hold().as_fd(), self, &mut forbidden);
        match found {
            Ok(Some(access)) => self.end_access(access),
            Ok(None) | Err(_) => Next::Return(Ok(value)),
        }
    }

    fn after_mmio(&self, value: i32, mmio: &Mmio) -> Next {
        // Seen without a lock, so that signals need not be blocked.
        if !self.vm.may_be_memory(Gfn::of_gpa(mmio.gpa)) {
            self.emulates(mmio);
            return Next::Return(Ok(value));
        }
        let _signals = SignalsBlocked::new();
        if self.is_device(mmio.access()) {
            self.emulates(mmio);
            return Next::Return(Ok(value));
        }
        self.emulating.set(None);
        let taken = if mmio.is_write { self.take_write() } else { self.take_read() };
        match taken {
            Err(error) => Next::Return(Err(error)),
            Ok(()) => match self.continue_pending() {
                Some(result) => Next::Return(result),
                None => self.retry_read(mmio),
            },
        }
    }

    fn retry_read(&self, mmio: &Mmio) -> Next {
        if mmio.is_write {
            return Next::RunOn;
        }
        match self.fault(Gfn::of_gpa(mmio.gpa)) {
            Some(errno) => Next::Return(Err(errno)),
            None => Next::RunOn,
        }
    }

    /// Whether an access is the client's to emulate on the kernel that is being emulated, too.
    fn is_device(&self, access: vcpu::Access) -> bool {
        let (gfn, is_write) = (Gfn::of_gpa(access.gpa), access.kind == vcpu::AccessKind::Store);
        let state = self.vm.read();
        let read_only = || is_write && is_read_only(&state.core, gfn);
        match state.core.view(gfn) {
            View::NoSlot => true,
            View::UserMemory { .. } => read_only() || state.is_the_hosts(gfn) || !state.client_allows(gfn, is_write),
            View::FilePage { .. } => false,
            // Such an access faults, over a guard. KVM takes the frame for a device only in the middle of an instruction that
            // the client emulates anyway, or in the moment before the guard was there; and every write to a read-only slot,
            // which it does not look for the page of.
            View::Unbacked(_) => match self.emulating.get() {
                None => false,
                Some(Emulated::Write(end)) if read_only() => end == access.gpa && self.is_where_it_was(end),
                Some(Emulated::Read | Emulated::Write(_)) => true,
            },
        }
    }

    /// The client is to emulate this.
    fn emulates(&self, mmio: &Mmio) {
        let emulated = Emulated::of(mmio);
        if emulated.ends_a_page() {
            self.emulating.before.try_put(vcpu::progress(self.fd.hold().as_fd()).ok());
        }
        self.emulating.set(Some(emulated));
    }

    /// Whether the vCPU is at the instruction that wrote up to `end`.
    fn is_where_it_was(&self, end: u64) -> bool {
        let before = self.emulating.before.try_get().filter(|_| Emulated::Write(end).ends_a_page());
        before.is_some() && before == vcpu::progress(self.fd.hold().as_fd()).ok()
    }

    fn take_read(&self) -> Result<(), Errno> {
        vcpu::put_back_read(self.fd.hold().as_fd(), self.run_area())
    }

    fn take_write(&self) -> Result<(), Errno> {
        let write = vcpu::collect_write(self.fd.hold().as_fd(), self.run_area())?;
        self.pending.put(Some(write));
        Ok(())
    }

    /// Carries out what is pending. `None`: all is written, the guest can run; otherwise what the client gets.
    fn continue_pending(&self) -> Option<Result<i32, Errno>> {
        let mut pending = lock(&self.pending.value);
        let write = pending.as_mut()?;
        for _ in 0..MOST_RETRIES {
            let Some(access) = write.carry_out(|gpa, bytes| self.write_guest(gpa, bytes)) else {
                drop(pending);
                self.pending.put(None);
                return None;
            };
            let gfn = Gfn::of_gpa(access.gpa);
            if self.is_device(access) {
                // The frame was converted and is the client's to emulate now: it gets the write, and that piece is done.
                if let Some(piece) = write.take_first() {
                    self.run_area().set_mmio_write(piece.gpa, piece.data());
                }
                return Some(Ok(0));
            }
            // Without an error the frame has become reachable between the two looks at it.
            if let Some(errno) = self.fault(gfn) {
                return Some(Err(errno));
            }
        }
        Some(Err(Errno::FAULT))
    }

    /// The client gave the vCPU other registers.
    pub(crate) fn forget_pending(&self) {
        if self.pending.exists() {
            let _signals = SignalsBlocked::new();
            self.pending.put(None);
        }
    }

    fn write_guest(&self, gpa: u64, bytes: &[u8]) -> bool {
        let state = self.vm.read();
        if is_read_only(&state.core, Gfn::of_gpa(gpa)) {
            return false;
        }
        let place = place(state.window_at(Gfn::of_gpa(gpa)), gpa);
        place.is_some_and(|address| sys::copy_to_client(address, bytes).is_ok())
    }

    /// The host's KVM could not reach a page and does not say which.
    fn after_fault(&self) -> Next {
        let _signals = SignalsBlocked::new();
        let mut forbidden = |gfn, kind| self.is_unreachable(gfn, kind);
        let found = vcpu::locate(self.fd.hold().as_fd(), self, &mut forbidden);
        match found {
            Ok(Some(access)) => self.end_access(access),
            Ok(None) => Next::RunOn,
            Err(error) => Next::Return(Err(error)),
        }
    }

    fn is_unreachable(&self, gfn: Gfn, kind: vcpu::AccessKind) -> bool {
        let state = self.vm.read();
        match state.core.view(gfn) {
            View::Unbacked(_) => true,
            View::NoSlot | View::FilePage { .. } => false,
            View::UserMemory { .. } => !state.client_allows(gfn, kind == vcpu::AccessKind::Store),
        }
    }

    /// How `KVM_RUN` goes on after an access to a frame that cannot be reached.
    fn end_access(&self, access: vcpu::Access) -> Next {
        let gfn = Gfn::of_gpa(access.gpa);
        if !self.is_unreachable(gfn, access.kind) {
            return Next::RunOn;
        }
        if matches!(self.vm.read().core.view(gfn), View::UserMemory { .. }) {
            // The client has no such page: the kernel says nothing more either.
            return Next::Return(Err(Errno::FAULT));
        }
        self.fault(gfn).map_or(Next::RunOn, |errno| Next::Return(Err(errno)))
    }

    /// Lets the core decide about a fault on `gfn`. `None`: it can be mapped, the guest runs on.
    fn fault(&self, gfn: Gfn) -> Option<Errno> {
        let access = Access { gfn, claimed: Side::Private };
        match self.vm.fault(&mut Fault::new(access, Origin::Guest)) {
            FaultEnd::Mapped(_) | FaultEnd::Retry | FaultEnd::Emulate | FaultEnd::DyingSlot => None,
            FaultEnd::MemoryFault(fault) => Some(self.exit(fault, Errno::FAULT)),
            FaultEnd::PageError(fault, error) => Some(self.exit(fault, errno::page(error))),
            FaultEnd::Refused(fault, refusal) => Some(self.exit(fault, errno::cause(refusal.cause))),
            FaultEnd::NoUserPage => Some(Errno::FAULT),
        }
    }

    fn exit(&self, fault: MemoryFault, errno: Errno) -> Errno {
        self.run_area().set_memory_fault(fault.gfn.gpa(), PAGE_SIZE, fault.side == Side::Private);
        errno
    }

    /// `KVM_PRE_FAULT_MEMORY`.
    pub(crate) fn pre_fault(&self, arg: Argument) -> Result<i32, Errno> {
        let signals = SignalsBlocked::new();
        self.vm().check_owner()?;
        let mut claim: PreFaultMemory = abi::read(arg)?;
        let result = self.pre_fault_claim(&mut claim, &signals);
        // The structure goes back in any case, so that a bad place for it is the error that counts.
        abi::write(arg, &claim).and(result).map(|()| 0)
    }

    fn pre_fault_claim(&self, claim: &mut PreFaultMemory, signals: &SignalsBlocked) -> Result<(), Errno> {
        if claim.flags != 0 {
            return Err(Errno::INVAL);
        }
        let range = GfnRange::from_bytes(claim.gpa, claim.size).map_err(|_| Errno::INVAL)?;
        let (done, end) = self.pre_fault_range(range, signals);
        claim.gpa += done;
        claim.size -= done;
        if done == 0 { end } else { Ok(()) }
    }

    /// Bytes done, and why it stopped.
    fn pre_fault_range(&self, range: GfnRange, signals: &SignalsBlocked) -> (u64, Result<(), Errno>) {
        let mut done = 0;
        let mut next = Some(range);
        while let Some(rest) = next {
            let run = match self.vm.pre_fault_run(rest) {
                Ok(run) => run,
                Err(error) => return (done, Err(error)),
            };
            let (bytes, result) = self.touch(run, signals);
            done += bytes;
            if result.is_err() || bytes < run.len() * PAGE_SIZE {
                return (done, result);
            }
            next = GfnRange::new(run.end(), range.end());
        }
        (done, Ok(()))
    }

    /// Lets the host prefault what it can, a piece at a time: no slot changes meanwhile, because Linux 6.12 tries again for
    /// ever when one is deleted under it, and the deletion waits for it (`kvm_tdp_map_page`).
    fn touch(&self, run: GfnRange, signals: &SignalsBlocked) -> (u64, Result<(), Errno>) {
        const PIECE: u64 = 2 << 20;
        let size = run.len() * PAGE_SIZE;
        if !self.host_prefaults {
            return (size, Ok(()));
        }
        let mut done = 0;
        while done < size {
            let state = self.vm.read();
            let (gpa, len) = (run.start().gpa() + done, (size - done).min(PIECE));
            let slot = state.core.slots().at(0, Gfn::of_gpa(gpa)).ok_or(Errno::NOENT);
            if signals.is_interrupted() {
                return (done, Err(Errno::INTR));
            }
            match slot.and_then(|_| kvm::pre_fault(self.fd.hold().as_fd(), gpa, len)) {
                Ok((_, left)) if left < len => done += len - left,
                end => return (done, end.map(|_| ())),
            }
        }
        (size, Ok(()))
    }
}

fn is_read_only(core: &Vm, gfn: Gfn) -> bool {
    core.slots().at(0, gfn).is_some_and(|slot| slot.flags.contains(SlotFlags::READONLY))
}

/// The address of `gpa` in a window, unless nothing is shown there.
fn place(window: Option<(usize, Shows)>, gpa: u64) -> Option<usize> {
    let (base, shows) = window?;
    let offset = usize::try_from(gpa % PAGE_SIZE).ok()?;
    (shows != Shows::Nothing).then_some(base + offset)
}

impl GuestView for VcpuObject {
    fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let state = self.vm.read();
        let place = place(state.window_at(Gfn::of_gpa(gpa)), gpa);
        place.is_some_and(|address| sys::copy_from_client(address, buffer).is_ok())
    }
}
