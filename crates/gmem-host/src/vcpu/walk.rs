//! The guest's own page tables (Intel SDM volume 3, chapter 5; AMD APM volume 2, chapter 5).
//!
//! A table is guest memory too: reading an entry is an access, and so is setting its accessed or dirty bit. Reserved
//! bits and protection keys are not judged: where they fault, the processor delivers a page fault, and then the vCPU's
//! pending event says so.

use super::probe::{Probe, Rights, Step, Stop, Touch};
use super::state::{CR0_PG, CR0_WP, CR4_PAE, CR4_PSE, CR4_SMAP, CR4_SMEP, Cpu, EFER_NXE, RFLAGS_AC};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Address bits of an entry: up to 52, whatever the vCPU's MAXPHYADDR is. A frame above it is in no memslot.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// One format of page tables.
#[derive(Clone, Copy)]
struct Format {
    /// Bytes of an entry.
    entry: u64,
    /// Bits of the linear address that one level resolves.
    stride: u32,
    levels: u32,
    /// The highest level whose entries may map a page; the lowest is 1.
    largest: u32,
    /// PAE: entries of the top level have no permissions and no accessed bit.
    bare_top: bool,
}

impl Format {
    fn of(cpu: &Cpu) -> Self {
        let eight = Self { entry: 8, stride: 9, levels: 4, largest: 3, bare_top: false };
        match (cpu.long(), cpu.sregs.cr4 & CR4_PAE != 0) {
            (true, _) => Self { levels: (cpu.linear_bits() - 12) / 9, ..eight },
            (false, true) => Self { levels: 3, largest: 2, bare_top: true, ..eight },
            (false, false) => {
                let largest = if cpu.sregs.cr4 & CR4_PSE != 0 { 2 } else { 1 };
                Self { entry: 4, stride: 10, levels: 2, largest, bare_top: false }
            }
        }
    }

    /// The address of the top table.
    fn root(self, cpu: &Cpu) -> u64 {
        match (self.entry, self.bare_top) {
            (4, _) => cpu.sregs.cr3 & 0xffff_f000,
            (_, true) => cpu.sregs.cr3 & 0xffff_ffe0,
            (_, false) => cpu.sregs.cr3 & ADDRESS,
        }
    }

    /// Bits of the linear address below those that `level` resolves.
    fn shift(self, level: u32) -> u32 {
        12 + self.stride * (level - 1)
    }

    fn index(self, linear: u64, level: u32) -> u64 {
        // The top level of PAE has four entries because a linear address ends there.
        (linear >> self.shift(level)) & ((1 << self.stride) - 1)
    }

    /// The address that a large or small page's entry gives, without the offset.
    fn frame(self, entry: u64, level: u32) -> u64 {
        let offset = (1 << self.shift(level)) - 1;
        match (self.entry, level) {
            // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            (4, 2) => (entry & 0xffc0_0000) | ((entry >> 13 & 0xff) << 32),
            (4, _) => entry & 0xffff_f000,
            _ => entry & ADDRESS & !offset,
        }
    }
}

/// The intersection of the permissions of the entries on the way.
#[derive(Clone, Copy)]
struct Permissions {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Permissions {
    const ALL: Self = Self { writable: true, user: true, executable: true };

    fn and(self, entry: u64, wide: bool) -> Self {
        Self {
            writable: self.writable && entry & WRITABLE != 0,
            user: self.user && entry & USER != 0,
            executable: self.executable && !(wide && entry & NO_EXECUTE != 0),
        }
    }

    fn allow(self, cpu: &Cpu, touch: Touch, rights: Rights) -> bool {
        let user = rights == Rights::Current && cpu.cpl() == 3;
        let has = |register: u64, bit: u64| register & bit != 0;
        if user && !self.user {
            return false;
        }
        match touch {
            Touch::Fetch => self.fetchable(cpu, user),
            _ if touch.writes() && !self.writable && (user || has(cpu.sregs.cr0, CR0_WP)) => false,
            _ if user || !self.user || !has(cpu.sregs.cr4, CR4_SMAP) => true,
            _ => rights == Rights::Current && has(cpu.regs.rflags, RFLAGS_AC),
        }
    }

    fn fetchable(self, cpu: &Cpu, user: bool) -> bool {
        let no_execute = cpu.sregs.efer & EFER_NXE != 0 && !self.executable;
        let smep = !user && self.user && cpu.sregs.cr4 & CR4_SMEP != 0;
        !no_execute && !smep
    }
}

impl Probe<'_> {
    /// The guest physical address of `linear`. Accesses to tables on the way are checked like any other.
    pub(super) fn walk(&mut self, linear: u64, touch: Touch, rights: Rights) -> Step<u64> {
        if self.cpu.sregs.cr0 & CR0_PG == 0 {
            return Ok(linear & 0xffff_ffff);
        }
        if !canonical(linear, self.cpu.linear_bits()) {
            return Err(Stop::GuestFault);
        }
        let format = Format::of(&self.cpu);
        let mut table = format.root(&self.cpu);
        let mut permissions = Permissions::ALL;
        for level in (1..=format.levels).rev() {
            let at = table + format.index(linear, level) * format.entry;
            let entry = self.entry(at, format.entry)?;
            let leaf = is_leaf(format, entry, level)?;
            let bare = format.bare_top && level == format.levels;
            if !bare {
                permissions = permissions.and(entry, format.entry == 8);
                self.mark(at, entry, ACCESSED, format.entry)?;
            }
            if leaf {
                return self.leaf(format, entry, level, at, permissions, (linear, touch, rights));
            }
            table = format.frame(entry, 1);
        }
        Err(Stop::GuestFault)
    }

    fn leaf(
        &mut self,
        format: Format,
        entry: u64,
        level: u32,
        at: u64,
        permissions: Permissions,
        (linear, touch, rights): (u64, Touch, Rights),
    ) -> Step<u64> {
        if !permissions.allow(&self.cpu, touch, rights) {
            return Err(Stop::GuestFault);
        }
        if touch.writes() {
            self.mark(at, entry, DIRTY, format.entry)?;
        }
        let offset = linear & ((1 << format.shift(level)) - 1);
        Ok(format.frame(entry, level) | offset)
    }

    /// Reads the entry at guest physical address `at`.
    fn entry(&mut self, at: u64, len: u64) -> Step<u64> {
        self.physical(at, len, Touch::Load)?;
        let mut bytes = [0; 8];
        let (entry, _) = bytes.split_at_mut(if len == 4 { 4 } else { 8 });
        self.read(at, entry)?;
        let entry = u64::from_le_bytes(bytes);
        (entry & PRESENT != 0).then_some(entry).ok_or(Stop::GuestFault)
    }

    /// The processor's write of `bit` into an entry that lacks it.
    fn mark(&mut self, at: u64, entry: u64, bit: u64, len: u64) -> Step {
        if entry & bit == 0 { self.physical(at, len, Touch::Modify) } else { Ok(()) }
    }
}

fn is_leaf(format: Format, entry: u64, level: u32) -> Step<bool> {
    let large = level > 1 && entry & LARGE != 0;
    match (level, large) {
        (1, _) => Ok(true),
        (_, false) => Ok(false),
        (_, true) if level <= format.largest => Ok(true),
        // Without CR4.PSE the bit is ignored, elsewhere it is reserved.
        (_, true) if format.entry == 4 => Ok(false),
        (_, true) => Err(Stop::GuestFault),
    }
}

/// Whether the bits above the highest implemented one repeat it.
fn canonical(linear: u64, bits: u32) -> bool {
    let top = linear.cast_signed() >> (bits - 1);
    bits == 32 || top == 0 || top == -1
}
