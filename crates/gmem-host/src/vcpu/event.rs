//! Delivery of an exception or interrupt: vector table, descriptors, task state, and the frame on the stack (Intel SDM
//! volume 3, sections 7.12 and 7.14; volume 1 section 6.5 for real mode).

use iced_x86::Register;

use super::layout::Events;
use super::probe::{Probe, Rights, Step, Stop, Touch};
use super::segment;
use super::state::Width;

/// What raised an event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Origin {
    /// `INT n` and its kin.
    Instruction,
    /// An exception with an error code.
    WithErrorCode,
    /// An interrupt, or an exception without one.
    Plain,
}

/// The event that the vCPU delivers before it executes anything.
///
/// An access during delivery leaves the event injected: KVM reinjects it. Software interrupts are not reported by KVM;
/// RIP still stands on their instruction.
pub(super) fn next(events: &Events) -> Option<(u8, Origin)> {
    let exception = match events.exception_has_error_code {
        0 => (events.exception_nr, Origin::Plain),
        _ => (events.exception_nr, Origin::WithErrorCode),
    };
    match events {
        Events { exception_injected: 1.., .. } => Some(exception),
        Events { nmi_injected: 1.., .. } => Some((2, Origin::Plain)),
        Events { interrupt_injected: 1.., .. } => Some((events.interrupt_nr, Origin::Plain)),
        Events { exception_pending: 1.., .. } => Some(exception),
        Events { nmi_pending: 1.., nmi_masked: 0, .. } => Some((2, Origin::Plain)),
        _ => None,
    }
}

/// Follows the delivery of `vector`.
pub(super) fn deliver(probe: &mut Probe<'_>, vector: u8, origin: Origin) -> Step {
    let error_code = u64::from(origin == Origin::WithErrorCode);
    match (probe.cpu.protected(), probe.cpu.long()) {
        (false, _) => real(probe, vector),
        (true, true) => long(probe, vector, error_code),
        (true, false) => protected(probe, vector, error_code),
    }
}

/// The address of `vector`'s entry of `size` bytes.
fn table_entry(probe: &Probe<'_>, vector: u8, size: u64) -> Step<u64> {
    let idt = &probe.cpu.sregs.idt;
    let offset = u64::from(vector) * size;
    let inside = offset + size - 1 <= u64::from(idt.limit);
    inside.then_some(idt.base.wrapping_add(offset)).ok_or(Stop::GuestFault)
}

fn real(probe: &mut Probe<'_>, vector: u8) -> Step {
    let entry = table_entry(probe, vector, 4)?;
    probe.touch(entry, 4, Touch::Load, Rights::System)?;
    let width = probe.cpu.stack();
    push(probe, probe.cpu.segment_base(Register::SS), probe.cpu.regs.rsp, width, (3, 2))
}

/// `count` pushes of `size` bytes below `pointer`.
fn push(probe: &mut Probe<'_>, base: u64, pointer: u64, width: Width, (count, size): (u64, u64)) -> Step {
    for number in 1..=count {
        let offset = pointer.wrapping_sub(number * size) & width.mask();
        probe.touch(base.wrapping_add(offset), size, Touch::Store, Rights::System)?;
    }
    Ok(())
}

/// Privilege level of a handler in the code segment `selector`.
fn handler_level(probe: &mut Probe<'_>, selector: u16) -> Step<u8> {
    let code = segment::descriptor(probe, selector)?.ok_or(Stop::GuestFault)?;
    let cpl = probe.cpu.cpl();
    Ok(if code.is_conforming() { cpl } else { code.dpl().min(cpl) })
}

fn long(probe: &mut Probe<'_>, vector: u8, error_code: u64) -> Step {
    let entry = table_entry(probe, vector, 16)?;
    let low = probe.load_u64(entry, Rights::System)?;
    probe.touch(entry.wrapping_add(8), 8, Touch::Load, Rights::System)?;
    let level = handler_level(probe, (low >> 16 & 0xffff) as u16)?;
    let task = probe.cpu.sregs.tr.base;
    let pointer = match (low >> 32 & 7, level < probe.cpu.cpl()) {
        (0, false) => probe.cpu.regs.rsp,
        (0, true) => probe.load_u64(task.wrapping_add(4 + 8 * u64::from(level)), Rights::System)?,
        (stack, _) => probe.load_u64(task.wrapping_add(0x1c + 8 * stack), Rights::System)?,
    };
    push(probe, 0, pointer & !15, Width::Bits64, (5 + error_code, 8))
}

fn protected(probe: &mut Probe<'_>, vector: u8, error_code: u64) -> Step {
    let entry = table_entry(probe, vector, 8)?;
    let gate = probe.load_u64(entry, Rights::System)?;
    let size = match gate >> 40 & 0x1f {
        0x06 | 0x07 => 2,
        0x0e | 0x0f => 4,
        // A task gate, or no gate at all, which faults.
        _ => return Err(Stop::Unknown),
    };
    let level = handler_level(probe, (gate >> 16 & 0xffff) as u16)?;
    if level == probe.cpu.cpl() {
        let width = probe.cpu.stack();
        let base = probe.cpu.segment_base(Register::SS);
        return push(probe, base, probe.cpu.regs.rsp, width, (3 + error_code, size));
    }
    let (base, pointer, width) = inner_stack(probe, level)?;
    let segments = if probe.cpu.virtual_8086() { 4 } else { 0 };
    push(probe, base, pointer, width, (5 + segments + error_code, size))
}

/// Stack of privilege level `level`, from the task state: segment base, pointer, and its width.
fn inner_stack(probe: &mut Probe<'_>, level: u8) -> Step<(u64, u64, Width)> {
    let task = probe.cpu.sregs.tr.base;
    let level = u64::from(level);
    let (pointer, selector) = if probe.cpu.sregs.tr.type_ & 8 != 0 {
        let at = task.wrapping_add(4 + 8 * level);
        (u64::from(probe.load_u32(at, Rights::System)?), probe.load_u16(at.wrapping_add(4), Rights::System)?)
    } else {
        let at = task.wrapping_add(2 + 4 * level);
        (u64::from(probe.load_u16(at, Rights::System)?), probe.load_u16(at.wrapping_add(2), Rights::System)?)
    };
    let stack = segment::descriptor(probe, selector)?.ok_or(Stop::GuestFault)?;
    let width = if stack.is_32bit() { Width::Bits32 } else { Width::Bits16 };
    Ok((stack.base(), pointer, width))
}
