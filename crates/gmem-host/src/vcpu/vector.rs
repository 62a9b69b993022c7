//! Operands whose extent depends on vector, mask or control registers: gathers and scatters, masked moves, XSAVE areas.

use iced_x86::{Instruction, Mnemonic, Register, UsedMemory};

use super::probe::{Operand, Probe, Rights, Step, Touch};
use super::state::Width;

/// State components of the XSAVE area.
const YMM_HIGH: u32 = 2;
const OPMASK: u32 = 5;
const ZMM_HIGH: u32 = 6;
const ZMM_16_TO_31: u32 = 7;

/// Vector registers, from an XSAVE image in the standard format.
struct Vectors {
    image: Vec<u64>,
    ymm: usize,
    opmask: usize,
    zmm: usize,
    upper: usize,
}

impl Vectors {
    fn load(probe: &Probe<'_>) -> Step<Self> {
        let at = |number| usize::try_from(probe.source.component(number).offset).unwrap_or(usize::MAX);
        let (ymm, opmask, zmm, upper) = (at(YMM_HIGH), at(OPMASK), at(ZMM_HIGH), at(ZMM_16_TO_31));
        Ok(Self { image: probe.source.xsave()?, ymm, opmask, zmm, upper })
    }

    fn byte(&self, at: usize) -> u8 {
        let word = self.image.get(at / 8).copied().unwrap_or(0);
        word.to_le_bytes().get(at % 8).copied().unwrap_or(0)
    }

    /// Where byte `byte` of vector register `number` is.
    fn place(&self, number: usize, byte: usize) -> usize {
        match (number, byte) {
            (16.., _) => self.upper.saturating_add(64 * (number - 16)).saturating_add(byte),
            (_, 0..16) => 160 + 16 * number + byte,
            (_, 16..32) => self.ymm.saturating_add(16 * number).saturating_add(byte - 16),
            _ => self.zmm.saturating_add(32 * number).saturating_add(byte - 32),
        }
    }

    /// Element `element`, of `size` bytes (at most 8), with its sign.
    fn element(&self, register: Register, element: usize, size: usize) -> i64 {
        let size = size.clamp(1, 8);
        let mut bytes = [0; 8];
        for (offset, byte) in bytes.iter_mut().take(size).enumerate() {
            *byte = self.byte(self.place(register.number(), element * size + offset));
        }
        let spare = 64 - 8 * size;
        (i64::from_le_bytes(bytes) << spare) >> spare
    }

    fn opmask(&self, register: Register, bit: usize) -> bool {
        let at = self.opmask.saturating_add(8 * register.number()).saturating_add(bit / 8);
        self.byte(at) >> (bit % 8) & 1 != 0
    }
}

/// Adds the accesses of an explicit operand of one of these kinds; false if `memory` is an ordinary one.
pub(super) fn expand(
    probe: &mut Probe<'_>,
    instruction: &Instruction,
    memory: &UsedMemory,
    touch: Touch,
    operands: &mut Vec<Operand>,
) -> Step<bool> {
    let masked = instruction.has_op_mask() || is_masked_move(instruction);
    if memory.vsib_size() != 0 {
        indexed(probe, instruction, memory, touch, operands)?;
    } else if masked {
        masked_elements(probe, instruction, memory, touch, operands)?;
    } else if let Some(area) = Area::of(instruction.mnemonic()) {
        save_area(probe, instruction, memory, area, operands)?;
    } else {
        return Ok(false);
    }
    Ok(true)
}

fn is_masked_move(instruction: &Instruction) -> bool {
    use Mnemonic::{Vmaskmovpd, Vmaskmovps, Vpmaskmovd, Vpmaskmovq};
    matches!(instruction.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
}

/// Base, index and displacement; a vector index counts as zero.
fn start_offset(probe: &Probe<'_>, memory: &UsedMemory) -> u64 {
    let index = probe.cpu.gpr(memory.index()).wrapping_mul(u64::from(memory.scale()));
    memory.displacement().wrapping_add(probe.cpu.gpr(memory.base())).wrapping_add(index)
}

fn linear(probe: &Probe<'_>, memory: &UsedMemory, offset: u64) -> u64 {
    probe.cpu.linear(memory.segment(), offset & Width::from(memory.address_size()).mask())
}

/// Whether element `element` of `size` bytes takes part.
fn active(vectors: &Vectors, instruction: &Instruction, element: usize, size: usize) -> bool {
    if instruction.has_op_mask() {
        return vectors.opmask(instruction.op_mask(), element);
    }
    // AVX2 gathers name the mask third, masked moves second; its sign bits count.
    let mask = if is_masked_move(instruction) { instruction.op1_register() } else { instruction.op2_register() };
    mask == Register::None || vectors.element(mask, element, size) < 0
}

/// Gathers and scatters: one access for each element that is still to be done.
fn indexed(
    probe: &Probe<'_>,
    instruction: &Instruction,
    memory: &UsedMemory,
    touch: Touch,
    operands: &mut Vec<Operand>,
) -> Step {
    let vectors = Vectors::load(probe)?;
    let index_size = usize::try_from(memory.vsib_size()).unwrap_or(8).max(1);
    let size = memory.memory_size().element_size().max(1);
    let data = (0..2).map(|op| instruction.op_register(op)).find(|register| register.is_vector_register());
    let count = data.map_or(0, |data| (data.size() / size).min(memory.index().size() / index_size));
    for element in (0..count).filter(|element| active(&vectors, instruction, *element, size)) {
        let index = vectors.element(memory.index(), element, index_size).cast_unsigned();
        let offset = start_offset(probe, memory).wrapping_add(index.wrapping_mul(u64::from(memory.scale())));
        operands.push(Operand { linear: linear(probe, memory, offset), size: size as u64, touch, explicit: true });
    }
    Ok(())
}

/// Masked loads and stores: elements that are masked out are not accessed.
fn masked_elements(
    probe: &Probe<'_>,
    instruction: &Instruction,
    memory: &UsedMemory,
    touch: Touch,
    operands: &mut Vec<Operand>,
) -> Step {
    let vectors = Vectors::load(probe)?;
    let size = memory.memory_size().element_size().max(1);
    let bytes = memory.memory_size().size();
    let start = start_offset(probe, memory);
    let explicit = true;
    if instruction.is_broadcast() {
        if (0..64).any(|element| active(&vectors, instruction, element, size)) {
            operands.push(Operand { linear: linear(probe, memory, start), size: bytes as u64, touch, explicit });
        }
        return Ok(());
    }
    for element in (0..bytes / size).filter(|element| active(&vectors, instruction, *element, size)) {
        let offset = start.wrapping_add((element * size) as u64);
        operands.push(Operand { linear: linear(probe, memory, offset), size: size as u64, touch, explicit });
    }
    Ok(())
}

/// How an instruction of the XSAVE family uses its area.
#[derive(Clone, Copy)]
struct Area {
    touch: Touch,
    /// The compacted format; XRSTOR learns it from the header.
    compacted: bool,
}

impl Area {
    fn of(mnemonic: Mnemonic) -> Option<Self> {
        let area = |touch, compacted| Some(Self { touch, compacted });
        match mnemonic {
            Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => {
                area(Touch::Store, false)
            }
            Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xsaves | Mnemonic::Xsaves64 => area(Touch::Store, true),
            Mnemonic::Xrstor | Mnemonic::Xrstor64 => area(Touch::Load, false),
            Mnemonic::Xrstors | Mnemonic::Xrstors64 => area(Touch::Load, true),
            _ => None,
        }
    }
}

/// Header, legacy region, then each user component that takes part.
fn save_area(
    probe: &mut Probe<'_>,
    instruction: &Instruction,
    memory: &UsedMemory,
    area: Area,
    operands: &mut Vec<Operand>,
) -> Step {
    let start = linear(probe, memory, start_offset(probe, memory));
    let regs = &probe.cpu.regs;
    let requested = ((regs.rdx << 32) | (regs.rax & 0xffff_ffff)) & probe.source.xcr0()?;
    let mut push = |offset: u64, size: u64, touch| {
        operands.push(Operand { linear: start.wrapping_add(offset), size, touch, explicit: true });
    };
    push(512, 64, if area.touch == Touch::Store { Touch::Modify } else { Touch::Load });
    push(0, 512, area.touch);
    let (wanted, layout) = match area.touch {
        Touch::Load => restored(probe, instruction, start, requested)?,
        _ => (requested, area.compacted.then_some(requested)),
    };
    let mut next = 576;
    for number in (2..63).filter(|number| layout.unwrap_or(wanted) >> number & 1 != 0) {
        let component = probe.source.component(number);
        let size = u64::from(component.size);
        next = if component.aligned { u64::next_multiple_of(next, 64) } else { next };
        let offset = if layout.is_some() { next } else { u64::from(component.offset) };
        next += size;
        if wanted >> number & 1 != 0 {
            push(offset, size, area.touch);
        }
    }
    Ok(())
}

/// What a restore reads: the components that the header says are there, and for the compacted format those that have
/// room in it (XCOMP_BV, whose bit 63 names the format).
fn restored(probe: &mut Probe<'_>, instruction: &Instruction, start: u64, requested: u64) -> Step<(u64, Option<u64>)> {
    let xstate_bv = probe.load_u64(start.wrapping_add(512), Rights::Current)?;
    let xcomp_bv = probe.load_u64(start.wrapping_add(520), Rights::Current)?;
    let supervisor = matches!(instruction.mnemonic(), Mnemonic::Xrstors | Mnemonic::Xrstors64);
    let compacted = supervisor || xcomp_bv >> 63 != 0;
    Ok((requested & xstate_bv, compacted.then_some(xcomp_bv)))
}
