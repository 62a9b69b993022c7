//! The guest: a few instructions that run in ring 0 and do one access per entry, and the page tables they run under.
//!
//! There is no command loop in the guest. The host points RIP at the stub of a command and the general registers at its
//! operands; the stub ends with an `out` to [`DONE_PORT`] (or [`WRONG_PORT`]), so whatever happens before that exit was
//! caused by the one access. Guest-virtual addresses below 1 GiB map to the same gpa with 2 MiB pages; the window of the
//! test is mapped a second time at [`ALIAS`] with 4 KiB pages, so that gva and gpa differ.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

/// The size of a page.
pub(crate) const PAGE: u64 = 4096;
/// First gpa of the memory that the operations work on.
pub(crate) const WINDOW: u64 = 16 << 20;
/// Bytes of the window.
pub(crate) const WINDOW_LEN: u64 = 8 << 20;
/// Distance from a gpa of the window to its second guest-virtual address.
pub(crate) const ALIAS: u64 = 1 << 30;
/// Bytes of the memory that holds code, stack and page tables, at gpa 0.
pub(crate) const AGENT_LEN: u64 = 64 << 10;
/// The port that a finished stub writes to.
pub(crate) const DONE_PORT: u16 = 0x10;
/// The port that the stress stub writes to when it read a value that it did not write.
pub(crate) const WRONG_PORT: u16 = 0x12;

const CODE: u64 = 0x1000;
const STACK_TOP: u64 = 0x3000;
const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const PD_LOW: u64 = 0x6000;
const PD_ALIAS: u64 = 0x7000;
const PT_ALIAS: u64 = 0x8000;

// Each stub starts on a multiple of 32 bytes, in the order of `Stub`. Operands: rbx the address, rdx the value, rcx a
// count, rsi and rdi the ends of a copy; the result is left in rax.
core::arch::global_asm!(
    ".pushsection .rodata.agent, \"a\"",
    ".balign 32",
    "gmem_conformance_agent:",
    // loads of 1, 2, 4, 8 bytes
    "movzx eax, byte ptr [rbx]",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "movzx eax, word ptr [rbx]",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "mov eax, dword ptr [rbx]",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "mov rax, qword ptr [rbx]",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // stores of 1, 2, 4, 8 bytes
    "mov byte ptr [rbx], dl",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "mov word ptr [rbx], dx",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "mov dword ptr [rbx], edx",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "mov qword ptr [rbx], rdx",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // locked read-modify-write: the old value
    "mov rax, rdx",
    "lock xadd qword ptr [rbx], rax",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // fill rcx quadwords at rdi with rax
    "rep stosq",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // copy rcx quadwords from rsi to rdi
    "rep movsq",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // sum of rcx quadwords at rbx, rotated so that order matters
    "xor eax, eax",
    "2: rol rax, 1",
    "add rax, qword ptr [rbx]",
    "add rbx, 8",
    "dec rcx",
    "jnz 2b",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // instruction fetch: the byte at rbx must be a `ret`
    "call rbx",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // plant a `ret` at rbx, then fetch it
    "mov byte ptr [rbx], 0xc3",
    "call rbx",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // hypercall, as Intel and as AMD spell it: number in rax, arguments in rbx, rcx, rdx, rsi
    "vmcall",
    "out 0x10, al",
    ".balign 32, 0xf4",
    "vmmcall",
    "out 0x10, al",
    ".balign 32, 0xf4",
    // one exit after the other
    "2: out 0x10, al",
    "jmp 2b",
    ".balign 32, 0xf4",
    // stress: rcx pages from rbx, each must hold rax at its first and last quadword and gets rdx; then report
    // (the last stub, so it may be longer than the others)
    "2: cmp rax, qword ptr [rbx]",
    "jne 3f",
    "cmp rax, qword ptr [rbx + 4088]",
    "jne 3f",
    "mov qword ptr [rbx], rdx",
    "mov qword ptr [rbx + 4088], rdx",
    "add rbx, 4096",
    "dec rcx",
    "jnz 2b",
    "out 0x10, al",
    "3: out 0x12, al",
    "gmem_conformance_agent_end:",
    ".popsection",
);

unsafe extern "C" {
    static gmem_conformance_agent: u8;
    static gmem_conformance_agent_end: u8;
}

/// The commands of the guest, in the order of their code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stub {
    /// Load of 1 byte; the wider ones follow.
    Load = 0,
    /// Store of 1 byte; the wider ones follow.
    Store = 4,
    /// `lock xadd` of 8 bytes.
    Xadd = 8,
    /// `rep stosq`.
    Fill = 9,
    /// `rep movsq`.
    Copy = 10,
    /// Sum of quadwords.
    Sum = 11,
    /// Call of an address.
    Fetch = 12,
    /// Store of a `ret` and call of it.
    Plant = 13,
    /// `vmcall`.
    Vmcall = 14,
    /// `vmmcall`.
    Vmmcall = 15,
    /// Outputs without end.
    Exits = 16,
    /// Check and rewrite the ends of many pages.
    Stress = 17,
}

fn code() -> &'static [u8] {
    // SAFETY: the two symbols enclose the bytes assembled above, which are read-only data.
    unsafe {
        let start = &raw const gmem_conformance_agent;
        let end = &raw const gmem_conformance_agent_end;
        std::slice::from_raw_parts(start, end as usize - start as usize)
    }
}

fn put(memory: &mut [u8], at: u64, entry: u64) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
}

/// Writes code and page tables into the guest memory at gpa 0; `memory` has [`AGENT_LEN`] bytes.
pub(crate) fn install(memory: &mut [u8]) {
    const TABLE: u64 = 0x3; // present, writable
    const LEAF: u64 = 0x63; // and accessed, dirty: the walk then never writes
    const LARGE: u64 = 1 << 7;
    let code_at = usize::try_from(CODE).unwrap_or(usize::MAX);
    memory[code_at..][..code().len()].copy_from_slice(code());
    put(memory, PML4, PDPT | TABLE | 0x20);
    put(memory, PDPT, PD_LOW | TABLE | 0x20);
    put(memory, PDPT + 8, PD_ALIAS | TABLE | 0x20);
    for i in 0..512 {
        put(memory, PD_LOW + i * 8, (i << 21) | LEAF | LARGE);
    }
    for table in 0..WINDOW_LEN >> 21 {
        put(memory, PD_ALIAS + ((WINDOW >> 21) + table) * 8, (PT_ALIAS + table * PAGE) | TABLE | 0x20);
        for i in 0..512 {
            put(memory, PT_ALIAS + table * PAGE + i * 8, (WINDOW + (table << 21) + (i << 12)) | LEAF);
        }
    }
}

/// Long mode in ring 0, no interrupts: an exception is a shutdown exit.
pub(crate) fn long_mode(sregs: &mut kvm_sregs) {
    let code =
        kvm_segment { limit: u32::MAX, selector: 8, type_: 0xb, present: 1, s: 1, l: 1, g: 1, ..Default::default() };
    let data =
        kvm_segment { limit: u32::MAX, selector: 16, type_: 3, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
    let task = kvm_segment { limit: 0x67, selector: 24, type_: 0xb, present: 1, ..Default::default() };
    let none = kvm_segment { unusable: 1, ..Default::default() };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.tr, sregs.ldt) = (task, none);
    (sregs.gdt.limit, sregs.idt.limit) = (0, 0);
    sregs.cr0 = 0x8001_0033; // PG WP NE ET MP PE
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LME LMA
}

/// The registers with which a stub begins; `wider` selects among the widths of a load or store.
pub(crate) fn entry(stub: Stub, wider: u64) -> kvm_regs {
    let rip = CODE + (stub_start(stub) + wider) * 32;
    kvm_regs { rip, rsp: STACK_TOP, rflags: 2, ..Default::default() }
}

fn stub_start(stub: Stub) -> u64 {
    stub as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stub_starts_where_the_table_says() {
        let at = |stub: Stub, wider: usize| &code()[(stub as usize + wider) * 32..];
        assert!(at(Stub::Load, 0).starts_with(&[0x0f, 0xb6, 0x03]));
        assert!(at(Stub::Load, 3).starts_with(&[0x48, 0x8b, 0x03]));
        assert!(at(Stub::Store, 0).starts_with(&[0x88, 0x13]));
        assert!(at(Stub::Store, 3).starts_with(&[0x48, 0x89, 0x13]));
        assert!(at(Stub::Xadd, 0)[3..].starts_with(&[0xf0, 0x48, 0x0f, 0xc1, 0x03]));
        assert!(at(Stub::Fill, 0).starts_with(&[0xf3, 0x48, 0xab]));
        assert!(at(Stub::Copy, 0).starts_with(&[0xf3, 0x48, 0xa5]));
        assert!(at(Stub::Fetch, 0).starts_with(&[0xff, 0xd3]));
        assert!(at(Stub::Plant, 0).starts_with(&[0xc6, 0x03, 0xc3]));
        assert!(at(Stub::Vmcall, 0).starts_with(&[0x0f, 0x01, 0xc1]));
        assert!(at(Stub::Vmmcall, 0).starts_with(&[0x0f, 0x01, 0xd9]));
        assert!(at(Stub::Exits, 0).starts_with(&[0xe6, 0x10, 0xeb, 0xfc]));
        assert!(at(Stub::Stress, 0).starts_with(&[0x48, 0x3b, 0x03]));
    }

    #[test]
    fn the_guest_fits_its_memory() {
        assert!(code().len() <= 0x1000);
        let last_table = PT_ALIAS + (WINDOW_LEN >> 21) * PAGE;
        assert!(last_table <= AGENT_LEN);
        install(&mut vec![0; usize::try_from(AGENT_LEN).unwrap_or(0)]);
    }
}
