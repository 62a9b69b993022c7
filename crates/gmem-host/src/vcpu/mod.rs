//! Where a forbidden guest access was, and putting accesses back, on the vCPU of a stock x86-64 KVM.
//!
//! A gfn that the guest must not reach has no mapping in its window. What KVM makes of an access there depends on how
//! the host runs guest code:
//!
//! 1. **VMX and SVM** return a bare EFAULT from `KVM_RUN`, with a stale `exit_reason` and no address. The vCPU stands
//!    precisely before the instruction, before the current iteration of a repeated one, or before an interrupted event
//!    delivery. [`locate`] follows what the processor was about to do, through the guest's page tables, until it meets
//!    the forbidden frame.
//! 2. **An emulator** (a KVM that interprets ring 0, or an ordinary one in the middle of an instruction that it
//!    emulates) takes the frame for a device: `KVM_RUN` returns 0 with `KVM_EXIT_MMIO` and the address. A read is undone
//!    with [`put_back_read`]; a write has already left the instruction behind and is kept in a [`PendingWrite`]. An
//!    instruction that it cannot fetch is an internal error ([`RunArea::is_emulation_failure`]), which
//!    [`locate_failed_emulation`] explains. Outside ring 0 an ordinary KVM gives the guest an invalid-opcode exception
//!    instead, unless the VM has `KVM_CAP_EXIT_ON_EMULATION_FAILURE`.
//!
//! Nothing here needs privileges, logs, prints or panics, and every system call is issued from this library's own text.
//!
//! # Invariants
//!
//! - Only the frame that the processor would touch first is reported: an access behind one on which the guest itself
//!   faults (page not present, no permission, a descriptor beyond its table) is never reached.
//! - An event that is being delivered comes before the instruction at RIP; nothing else of the instruction is looked at.
//! - Guest memory is input. It is read only after its frame has been asked about, through [`GuestView`], and each loop
//!   over it is bounded.
//!
//! # Known gaps
//!
//! In each of these cases `locate` finds nothing (`None`), or looks at more than the processor would:
//!
//! - system management mode (another address space) and nested guests (another stage of translation);
//! - task gates and task switches, call gates, `INT n` redirected in virtual-8086 mode, `INTO`, `BOUND`;
//! - shadow stacks, protection keys, address tagging (LAM, UAI), reserved bits in page tables;
//! - supervisor state components of XSAVES and XRSTORS; XSAVE and its kin are taken to store every requested component,
//!   also those that are in their initial state; AVX-512 compress and expand are taken as masked moves, MASKMOVQ and
//!   MASKMOVDQU as whole stores;
//! - PAE's four top entries are taken to be read from memory, which a VMX processor does only when CR3 is loaded.

mod event;
mod exit;
mod instr;
mod kvm;
mod layout;
mod probe;
mod segment;
mod state;
#[cfg(test)]
mod tests;
mod vector;
mod walk;

use std::os::fd::BorrowedFd;

use gmem_core::addr::Gfn;
use rustix::io::Errno;

pub use exit::{Fragment, Mmio, PendingWrite, RunArea, collect_write, put_back_read};

use probe::{Probe, Step, Stop};
use state::{Cpu, Source};

/// Guest physical memory, for reading page tables, descriptors and code.
pub trait GuestView {
    /// Fills `buf` from guest physical address `gpa`; false if some of it is not memory. `buf` never crosses a page.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> bool;
}

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AccessKind {
    /// Reads data, a page-table entry or a descriptor.
    Load,
    /// Writes, or reads and writes one location.
    Store,
    /// Reads code.
    Fetch,
}

/// One guest access, cut to the page that is forbidden.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// Guest physical address of the first byte in that page.
    pub gpa: u64,
    /// Bytes in that page, 1 to 4096; 1 for an instruction fetch, whose length the page itself would have to tell.
    pub size: u32,
    /// Load, store or fetch.
    pub kind: AccessKind,
}

/// Fills the decoder's tables, which the first decoded instruction would otherwise do.
///
/// They are nearly half a megabyte, and most clients never need them. Call it before a system call filter of the client's
/// comes into force: it may forbid what the allocator then does.
pub fn prepare() {
    let mut decoder = iced_x86::Decoder::new(64, &[0x90], iced_x86::DecoderOptions::NONE);
    let instruction = decoder.decode();
    let _ = iced_x86::InstructionInfoFactory::new().info(&instruction);
}

/// How far a vCPU has come. No instruction has ended between two that are equal, nor an iteration of a repeated one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress(layout::Regs);

/// How far `vcpu`, which must not be running, has come.
///
/// # Errors
/// What `KVM_GET_REGS` returns.
pub fn progress(vcpu: BorrowedFd<'_>) -> Result<Progress, Errno> {
    Source::regs(&kvm::Vcpu(vcpu)).map(Progress)
}

/// The first access, in the processor's order, of what `vcpu` does next that touches a forbidden frame.
///
/// `forbidden` says for a frame and a kind of access whether it must not succeed; for a read-modify-write it is asked
/// about both kinds. `None` means that nothing of it is forbidden: the access met a gap while a window was replaced, and
/// the caller runs the vCPU again.
///
/// The vCPU must not be running. With `KVM_CAP_SYNC_REGS` the registers are those of the vCPU, not a client's changes
/// to the shared area that the next `KVM_RUN` would take over.
///
/// # Errors
/// What the vCPU's `KVM_GET_*` calls return.
pub fn locate<V: GuestView>(
    vcpu: BorrowedFd<'_>,
    view: &V,
    forbidden: &mut dyn FnMut(Gfn, AccessKind) -> bool,
) -> Result<Option<Access>, Errno> {
    locate_in(&kvm::Vcpu(vcpu), view, forbidden)
}

/// [`locate`] for an exit that is [`RunArea::is_emulation_failure`]: usually KVM could not fetch the instruction.
///
/// If the answer is an access, the vCPU stands before it as if nothing had happened. If it is `None`, nothing has been
/// changed and the exit is the client's.
///
/// # Errors
/// What the vCPU's `KVM_GET_*` and `KVM_SET_VCPU_EVENTS` calls return.
pub fn locate_failed_emulation<V: GuestView>(
    vcpu: BorrowedFd<'_>,
    view: &V,
    forbidden: &mut dyn FnMut(Gfn, AccessKind) -> bool,
) -> Result<Option<Access>, Errno> {
    const UD_VECTOR: u8 = 6;
    let vcpu = kvm::Vcpu(vcpu);
    let events = vcpu.events()?;
    let found = follow(&vcpu, view, forbidden, None)?;
    // `handle_emulation_failure()` queues an invalid-opcode exception beside the exit; the guest has not earned it.
    if found.is_some() && events.exception_nr == UD_VECTOR {
        vcpu.set_events(layout::Events { exception_injected: 0, exception_pending: 0, ..events })?;
    }
    Ok(found)
}

fn locate_in(
    source: &dyn Source,
    view: &dyn GuestView,
    forbidden: &mut dyn FnMut(Gfn, AccessKind) -> bool,
) -> Result<Option<Access>, Errno> {
    let event = event::next(&source.events()?);
    follow(source, view, forbidden, event)
}

/// Follows the delivery of `event`, or the instruction at RIP.
fn follow(
    source: &dyn Source,
    view: &dyn GuestView,
    forbidden: &mut dyn FnMut(Gfn, AccessKind) -> bool,
    event: Option<(u8, event::Origin)>,
) -> Result<Option<Access>, Errno> {
    let cpu = Cpu { regs: source.regs()?, sregs: source.sregs()? };
    let mut probe = Probe { cpu, source, view, forbidden };
    let end: Step = match event {
        Some((vector, origin)) => event::deliver(&mut probe, vector, origin),
        None => instr::follow(&mut probe),
    };
    match end {
        Err(Stop::Found(access)) => Ok(Some(access)),
        Err(Stop::Failed(errno)) => Err(errno),
        Ok(()) | Err(Stop::GuestFault | Stop::Unknown) => Ok(None),
    }
}
