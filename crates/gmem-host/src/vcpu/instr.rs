//! The accesses of the instruction at RIP, in the order in which the processor makes them.

use gmem_core::addr::PAGE_SIZE as PAGE;
use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, UsedMemory,
};

use super::event::{self, Origin};
use super::probe::{Operand, Probe, Rights, Step, Stop, Touch};
use super::state::Width;
use super::{segment, vector};

/// No instruction is longer.
const LONGEST: usize = 15;

/// Follows the instruction at RIP up to its last access.
pub(super) fn follow(probe: &mut Probe<'_>) -> Step {
    let instruction = fetch(probe)?;
    if repeats_zero_times(probe, &instruction) {
        return Ok(());
    }
    if let Some(vector) = software_interrupt(&instruction) {
        return event::deliver(probe, vector, Origin::Instruction);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&instruction);
    let explicit = usize::from((0..instruction.op_count()).any(|op| is_explicit(&instruction, info.op_access(op), op)));
    let operands = operands(probe, &instruction, info.used_memory(), explicit)?;
    // A far call loads its descriptor between reading the pointer and pushing the return address.
    let reads = operands.iter().position(|operand| operand.touch == Touch::Store).unwrap_or(operands.len());
    let (reads, writes) = operands.split_at(reads);
    touch_all(probe, reads)?;
    segment::loads(probe, &instruction, &operands)?;
    touch_all(probe, writes)
}

fn touch_all(probe: &mut Probe<'_>, operands: &[Operand]) -> Step {
    operands.iter().try_for_each(|operand| probe.touch(operand.linear, operand.size, operand.touch, Rights::Current))
}

fn is_explicit(instruction: &Instruction, access: OpAccess, op: u32) -> bool {
    instruction.op_kind(op) == OpKind::Memory && !matches!(access, OpAccess::None | OpAccess::NoMemAccess)
}

/// Fetches and decodes. The page that follows RIP's is only touched if the instruction reaches into it.
fn fetch(probe: &mut Probe<'_>) -> Step<Instruction> {
    let rip = probe.cpu.regs.rip;
    let mut bytes = [0; LONGEST];
    let longest = LONGEST as u64;
    let mut have = 0;
    while have < longest {
        let linear = probe.cpu.linear(Register::CS, rip.wrapping_add(have));
        let part = (PAGE - linear % PAGE).min(longest - have);
        let gpa = probe.walk(linear, Touch::Fetch, Rights::Current)?;
        probe.physical(gpa, 1, Touch::Fetch)?;
        let (from, to) = (index(have), index(have + part));
        probe.read(gpa, bytes.get_mut(from..to).ok_or(Stop::Unknown)?)?;
        have += part;
        let code = bytes.get(..to).ok_or(Stop::Unknown)?;
        let mut decoder = Decoder::with_ip(probe.cpu.code().bits(), code, rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        match decoder.last_error() {
            DecoderError::None => return Ok(instruction),
            DecoderError::NoMoreBytes => {}
            _ => return Err(Stop::GuestFault),
        }
    }
    Err(Stop::GuestFault)
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Address size of a string instruction, from its operands.
fn string_width(instruction: &Instruction) -> Option<Width> {
    (0..instruction.op_count()).find_map(|op| match instruction.op_kind(op) {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(Width::Bits16),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(Width::Bits32),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(Width::Bits64),
        _ => None,
    })
}

fn repeats_zero_times(probe: &Probe<'_>, instruction: &Instruction) -> bool {
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    repeats && string_width(instruction).is_some_and(|width| probe.cpu.regs.rcx & width.mask() == 0)
}

fn software_interrupt(instruction: &Instruction) -> Option<u8> {
    match instruction.code() {
        Code::Int_imm8 => Some(instruction.immediate8()),
        Code::Int3 => Some(3),
        Code::Int1 => Some(1),
        _ => None,
    }
}

/// The operands in the order of the accesses: what is read, then what is written, each in the order of the decoder,
/// which lists pushes and pops one by one.
fn operands(
    probe: &mut Probe<'_>,
    instruction: &Instruction,
    used: &[UsedMemory],
    explicit: usize,
) -> Step<Vec<Operand>> {
    let mut operands = Vec::with_capacity(used.len());
    for (number, memory) in used.iter().enumerate() {
        let explicit = number < explicit;
        let touch = touch_of(memory.access());
        if explicit && vector::expand(probe, instruction, memory, touch, &mut operands)? {
            continue;
        }
        let linear = address(probe, instruction, memory, explicit);
        let size = size_of_operand(instruction, memory);
        operands.push(Operand { linear, size, touch, explicit });
    }
    // ENTER copies frame pointers one at a time; everything else reads before it writes.
    if instruction.mnemonic() != Mnemonic::Enter {
        operands.sort_by_key(|operand| operand.touch == Touch::Store);
    }
    Ok(operands)
}

fn touch_of(access: OpAccess) -> Touch {
    match access {
        OpAccess::Write | OpAccess::CondWrite => Touch::Store,
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => Touch::Modify,
        _ => Touch::Load,
    }
}

/// Bytes of one access. The decoder leaves the size of a repeated string instruction's memory open, because it is that
/// of all iterations; the vCPU stands before one of them.
fn size_of_operand(instruction: &Instruction, memory: &UsedMemory) -> u64 {
    let size = match memory.memory_size().size() {
        _ if is_cache_line_zero(instruction) => 64,
        0 => instruction.memory_size().size(),
        size => size,
    };
    (size as u64).clamp(1, PAGE)
}

fn is_cache_line_zero(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Clzero
}

/// The linear address of a memory operand without a vector index.
fn address(probe: &Probe<'_>, instruction: &Instruction, memory: &UsedMemory, explicit: bool) -> u64 {
    let cpu = &probe.cpu;
    if !explicit && memory.segment() == Register::SS && memory.base() != Register::None {
        return stack_address(probe, memory);
    }
    let index = cpu.gpr(memory.index()).wrapping_mul(u64::from(memory.scale()));
    let mut offset = memory.displacement().wrapping_add(cpu.gpr(memory.base())).wrapping_add(index);
    if explicit {
        offset = offset.wrapping_add(bit_offset(probe, instruction));
    }
    let linear = cpu.linear(memory.segment(), offset & Width::from(memory.address_size()).mask());
    // Clearing a cache line ignores where in the line the address points.
    if is_cache_line_zero(instruction) { linear & !63 } else { linear }
}

/// The decoder sizes the stack pointer like the code; the processor sizes it like the stack segment.
fn stack_address(probe: &Probe<'_>, memory: &UsedMemory) -> u64 {
    let displacement = Width::from(memory.address_size()).sign_extend(memory.displacement());
    let pointer = probe.cpu.gpr(memory.base().full_register());
    probe.cpu.linear(Register::SS, pointer.wrapping_add(displacement) & probe.cpu.stack().mask())
}

/// BT, BTS, BTR and BTC with a register address a bit string: the register's upper part selects the word, signed.
fn bit_offset(probe: &Probe<'_>, instruction: &Instruction) -> u64 {
    let is_bit_test = matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    let register = instruction.op1_register();
    if !is_bit_test || instruction.op1_kind() != OpKind::Register {
        return 0;
    }
    let width = match register.size() {
        2 => Width::Bits16,
        4 => Width::Bits32,
        _ => Width::Bits64,
    };
    let bit = width.sign_extend(probe.cpu.gpr(register)).cast_signed();
    let bits = i64::from(width.bits());
    (bit.div_euclid(bits) * (bits / 8)).cast_unsigned()
}
