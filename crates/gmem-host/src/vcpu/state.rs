//! The state of a vCPU as far as an address computation needs it, and where it comes from.

use iced_x86::{CodeSize, Register};
use rustix::io::Errno;

use super::layout::{Events, Regs, Segment, Sregs};

pub(super) const CR0_PE: u64 = 1;
pub(super) const CR0_WP: u64 = 1 << 16;
pub(super) const CR0_PG: u64 = 1 << 31;
pub(super) const CR4_PSE: u64 = 1 << 4;
pub(super) const CR4_PAE: u64 = 1 << 5;
pub(super) const CR4_LA57: u64 = 1 << 12;
pub(super) const CR4_SMEP: u64 = 1 << 20;
pub(super) const CR4_SMAP: u64 = 1 << 21;
pub(super) const EFER_LMA: u64 = 1 << 10;
pub(super) const EFER_NXE: u64 = 1 << 11;
pub(super) const RFLAGS_VM: u64 = 1 << 17;
pub(super) const RFLAGS_AC: u64 = 1 << 18;

/// One state component of an XSAVE area (CPUID leaf 0DH).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Component {
    pub(super) size: u32,
    pub(super) offset: u32,
    /// Whether it starts at a multiple of 64 in the compacted format.
    pub(super) aligned: bool,
}

/// Where a vCPU's state comes from: its descriptor, or a test's hand.
pub(super) trait Source {
    fn regs(&self) -> Result<Regs, Errno>;
    fn sregs(&self) -> Result<Sregs, Errno>;
    fn events(&self) -> Result<Events, Errno>;
    fn xcr0(&self) -> Result<u64, Errno>;
    /// The XSAVE image in the standard format.
    fn xsave(&self) -> Result<Vec<u64>, Errno>;
    fn component(&self, number: u32) -> Component;
}

/// Bits of an address or of a stack pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Width {
    Bits16,
    Bits32,
    Bits64,
}

impl From<CodeSize> for Width {
    fn from(size: CodeSize) -> Self {
        match size {
            CodeSize::Code16 => Self::Bits16,
            CodeSize::Code32 => Self::Bits32,
            _ => Self::Bits64,
        }
    }
}

impl Width {
    pub(super) fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xffff,
            Self::Bits32 => 0xffff_ffff,
            Self::Bits64 => u64::MAX,
        }
    }

    pub(super) fn bits(self) -> u32 {
        self.mask().count_ones()
    }

    /// `value`, a displacement of this width, extended with its sign.
    pub(super) fn sign_extend(self, value: u64) -> u64 {
        let spare = 64 - self.bits();
        ((value << spare).cast_signed() >> spare).cast_unsigned()
    }
}

/// Registers at the moment of the access.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cpu {
    pub(super) regs: Regs,
    pub(super) sregs: Sregs,
}

impl Cpu {
    pub(super) fn protected(&self) -> bool {
        self.sregs.cr0 & CR0_PE != 0
    }

    pub(super) fn virtual_8086(&self) -> bool {
        self.protected() && self.regs.rflags & RFLAGS_VM != 0
    }

    /// Whether segment registers hold selectors of descriptors.
    pub(super) fn has_descriptors(&self) -> bool {
        self.protected() && !self.virtual_8086()
    }

    /// Long mode, 64-bit or compatibility.
    pub(super) fn long(&self) -> bool {
        self.sregs.efer & EFER_LMA != 0
    }

    /// Size of code: what the decoder calls its bitness.
    pub(super) fn code(&self) -> Width {
        match (self.long() && self.sregs.cs.l != 0, self.sregs.cs.db != 0) {
            (true, _) => Width::Bits64,
            (false, true) => Width::Bits32,
            (false, false) => Width::Bits16,
        }
    }

    /// Size of the stack pointer.
    pub(super) fn stack(&self) -> Width {
        match (self.code(), self.sregs.ss.db != 0) {
            (Width::Bits64, _) => Width::Bits64,
            (_, true) => Width::Bits32,
            (_, false) => Width::Bits16,
        }
    }

    /// Current privilege level.
    pub(super) fn cpl(&self) -> u8 {
        match (self.protected(), self.virtual_8086()) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => self.sregs.ss.dpl & 3,
        }
    }

    /// Bits in a linear address; above them a 64-bit address repeats the highest one.
    pub(super) fn linear_bits(&self) -> u32 {
        match (self.long(), self.sregs.cr4 & CR4_LA57 != 0) {
            (false, _) => 32,
            (true, false) => 48,
            (true, true) => 57,
        }
    }

    pub(super) fn segment(&self, register: Register) -> Option<&Segment> {
        match register {
            Register::CS => Some(&self.sregs.cs),
            Register::DS => Some(&self.sregs.ds),
            Register::ES => Some(&self.sregs.es),
            Register::FS => Some(&self.sregs.fs),
            Register::GS => Some(&self.sregs.gs),
            Register::SS => Some(&self.sregs.ss),
            _ => None,
        }
    }

    /// What a segment register adds to an offset; 64-bit code has no base but those of FS and GS.
    pub(super) fn segment_base(&self, register: Register) -> u64 {
        match register {
            Register::CS | Register::DS | Register::ES | Register::SS if self.code() == Width::Bits64 => 0,
            _ => self.segment(register).map_or(0, |segment| segment.base),
        }
    }

    /// The linear address of `offset` in a segment: wraps at 4 GiB except in 64-bit code.
    pub(super) fn linear(&self, segment: Register, offset: u64) -> u64 {
        self.clip(self.segment_base(segment).wrapping_add(offset))
    }

    /// `linear` as the current code size would form it.
    pub(super) fn clip(&self, linear: u64) -> u64 {
        match self.code() {
            Width::Bits64 => linear,
            _ => linear & Width::Bits32.mask(),
        }
    }

    /// Value of a general purpose register, of its low part for a smaller one; 0 for anything else.
    pub(super) fn gpr(&self, register: Register) -> u64 {
        let value = self.gpr64(register.full_register());
        match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => value & 0xffff,
            _ if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) => value >> 8 & 0xff,
            _ => value & 0xff,
        }
    }

    fn gpr64(&self, register: Register) -> u64 {
        let r = &self.regs;
        match register {
            Register::RAX => r.rax,
            Register::RBX => r.rbx,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::RSP => r.rsp,
            Register::RBP => r.rbp,
            _ if register.is_gpr64() => r.r8_to_r15.get(register.number().wrapping_sub(8)).copied().unwrap_or(0),
            _ => 0,
        }
    }
}
