//! Descriptor loads: what an instruction that names a segment reads from the GDT or LDT, and the far returns that
//! continue on an outer stack.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::probe::{Operand, Probe, Rights, Step, Stop, Touch};

/// Type bit of a code or data descriptor that the processor sets when it loads it.
const ACCESSED: u64 = 1 << 40;
/// Descriptor bit that tells code and data from system descriptors.
const CODE_OR_DATA: u64 = 1 << 44;

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor(pub(super) u64);

impl Descriptor {
    pub(super) fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }

    pub(super) fn base(self) -> u64 {
        (self.0 >> 16 & 0xff_ffff) | (self.0 >> 56 & 0xff) << 24
    }

    /// The D/B bit.
    pub(super) fn is_32bit(self) -> bool {
        self.0 >> 54 & 1 != 0
    }

    /// A code segment that keeps the privilege level of its caller.
    pub(super) fn is_conforming(self) -> bool {
        self.0 >> 42 & 3 == 3
    }
}

/// Reads the descriptor of `selector` and marks it accessed, as loading a segment register does.
pub(super) fn descriptor(probe: &mut Probe<'_>, selector: u16) -> Step<Option<Descriptor>> {
    let offset = u64::from(selector & !7);
    if selector & !3 == 0 {
        return Ok(None);
    }
    let sregs = &probe.cpu.sregs;
    let (base, limit) = match selector & 4 {
        0 => (sregs.gdt.base, u64::from(sregs.gdt.limit)),
        _ => (sregs.ldt.base, u64::from(sregs.ldt.limit)),
    };
    if offset + 7 > limit {
        return Err(Stop::GuestFault);
    }
    let at = base.wrapping_add(offset);
    let raw = probe.load_u64(at, Rights::System)?;
    if raw & CODE_OR_DATA != 0 && raw & ACCESSED == 0 {
        probe.touch(at, 8, Touch::Modify, Rights::System)?;
    }
    Ok(Some(Descriptor(raw)))
}

/// The descriptors that `instruction` loads once it has read its operands.
pub(super) fn loads(probe: &mut Probe<'_>, instruction: &Instruction, operands: &[Operand]) -> Step {
    if !probe.cpu.has_descriptors() {
        return Ok(());
    }
    match instruction.mnemonic() {
        Mnemonic::Retf => far_return(probe, operands, 1),
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => interrupt_return(probe, operands),
        _ => match selector(probe, instruction, operands)? {
            Some(selector) => load(probe, instruction, selector),
            None => Ok(()),
        },
    }
}

fn load(probe: &mut Probe<'_>, instruction: &Instruction, selector: u16) -> Step {
    descriptor(probe, selector)?;
    // A system descriptor has a second half in long mode, and LTR marks the first one busy.
    let sregs = &probe.cpu.sregs;
    let at = sregs.gdt.base.wrapping_add(u64::from(selector & !7));
    let system = matches!(instruction.mnemonic(), Mnemonic::Ltr | Mnemonic::Lldt) && selector & !3 != 0;
    if system && probe.cpu.long() {
        probe.touch(at.wrapping_add(8), 8, Touch::Load, Rights::System)?;
    }
    if system && instruction.mnemonic() == Mnemonic::Ltr {
        probe.touch(at, 8, Touch::Modify, Rights::System)?;
    }
    Ok(())
}

/// The selector that a load of a segment register, a far jump or call, LTR, LLDT or a descriptor query is about.
fn selector(probe: &mut Probe<'_>, instruction: &Instruction, operands: &[Operand]) -> Step<Option<u16>> {
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Pop if instruction.op0_register().is_segment_register() => {
            source(probe, instruction, instruction.op_count().saturating_sub(1), operands).map(Some)
        }
        Mnemonic::Ltr | Mnemonic::Lldt | Mnemonic::Verr | Mnemonic::Verw => {
            source(probe, instruction, 0, operands).map(Some)
        }
        Mnemonic::Lar | Mnemonic::Lsl => source(probe, instruction, 1, operands).map(Some),
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => far(probe, operands),
        Mnemonic::Jmp | Mnemonic::Call => match instruction.op0_kind() {
            OpKind::FarBranch16 | OpKind::FarBranch32 => Ok(Some(instruction.far_branch_selector())),
            _ if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() => far(probe, operands),
            _ => Ok(None),
        },
        _ => Ok(None),
    }
}

/// A selector in operand `op`, be it a register, memory, or for POP the top of the stack.
fn source(probe: &mut Probe<'_>, instruction: &Instruction, op: u32, operands: &[Operand]) -> Step<u16> {
    let register = instruction.op_register(op);
    if instruction.op_kind(op) == OpKind::Register && !register.is_segment_register() {
        let bytes = probe.cpu.gpr(register).to_le_bytes();
        return Ok(u16::from_le_bytes([bytes[0], bytes[1]]));
    }
    let operand = operands.first().ok_or(Stop::Unknown)?;
    probe.load_u16(operand.linear, Rights::Current)
}

/// The selector behind the offset of a far pointer in memory.
fn far(probe: &mut Probe<'_>, operands: &[Operand]) -> Step<Option<u16>> {
    let pointer = operands.iter().find(|operand| operand.explicit).ok_or(Stop::Unknown)?;
    let at = pointer.linear.wrapping_add(pointer.size.saturating_sub(2));
    probe.load_u16(at, Rights::Current).map(Some)
}

/// CS from the `number`th word popped; an outer privilege level pops SS and the stack pointer as well.
fn far_return(probe: &mut Probe<'_>, operands: &[Operand], number: usize) -> Step {
    let cs = operands.get(number).ok_or(Stop::Unknown)?;
    let selector = probe.load_u16(cs.linear, Rights::Current)?;
    descriptor(probe, selector)?;
    let long_frame = operands.len() >= 5;
    let outer = selector & 3 > u16::from(probe.cpu.cpl());
    if !outer && !long_frame {
        return Ok(());
    }
    let ss = match operands.get(4) {
        Some(ss) => ss.linear,
        None => outer_stack(probe, operands)?,
    };
    let selector = probe.load_u16(ss, Rights::Current)?;
    descriptor(probe, selector).map(drop)
}

/// Touches the outer stack pointer behind the words popped so far; the address of the stack selector behind it.
fn outer_stack(probe: &mut Probe<'_>, operands: &[Operand]) -> Step<u64> {
    let last = operands.last().ok_or(Stop::Unknown)?;
    let at = last.linear.wrapping_add(last.size);
    probe.touch(at, last.size * 2, Touch::Load, Rights::Current)?;
    Ok(at.wrapping_add(last.size))
}

fn interrupt_return(probe: &mut Probe<'_>, operands: &[Operand]) -> Step {
    let flags = operands.get(2).ok_or(Stop::Unknown)?;
    if flags.size == 4 && !probe.cpu.long() {
        let value = probe.load_u32(flags.linear, Rights::Current)?;
        if u64::from(value) & super::state::RFLAGS_VM != 0 && probe.cpu.cpl() == 0 {
            // Back to virtual-8086 mode: ESP, SS, ES, DS, FS and GS follow, without descriptors.
            return probe.touch(flags.linear.wrapping_add(4), 24, Touch::Load, Rights::Current);
        }
    }
    far_return(probe, operands, 1)
}
