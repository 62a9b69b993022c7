//! A rule for gmem's own system calls in front of a client's seccomp filter.
//!
//! gmem enters the kernel from its own text only (see `gmem_host::sys`). A filter that a client installs gets a prologue
//! that allows calls from this range of instruction addresses; for every other address, the client's own among them, the
//! filter is what the client wrote.

use std::ffi::c_int;
use std::sync::OnceLock;

use gmem_host::maps::Maps;

/// `struct sock_filter`
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    k: u32,
}

/// `struct sock_fprog`
#[repr(C)]
struct Program {
    len: u16,
    filter: *const Instruction,
}

const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
/// Offset of `instruction_pointer` in `struct seccomp_data`.
const IP_LOW: u32 = 8;
const IP_HIGH: u32 = 12;
/// `BPF_MAXINSNS`
const MOST_INSTRUCTIONS: usize = 4096;

/// Calls `install` with the address of the client's program behind gmem's rule, or of the client's program as it is if it
/// cannot be extended.
///
/// # Safety
/// `program` is what the client passed as a `struct sock_fprog`.
pub(crate) unsafe fn with_own_rule<T>(program: usize, install: impl FnOnce(usize) -> T) -> T {
    if crate::process().is_some() {
        gmem_host::vcpu::prepare();
    }
    let Some(text) = own_text() else { return install(program) };
    // SAFETY: of the caller.
    let Some(instructions) = (unsafe { read_program(program) }) else { return install(program) };
    let mut all = prologue(text);
    all.extend(instructions);
    let Ok(len) = u16::try_from(all.len()) else { return install(program) };
    if all.len() > MOST_INSTRUCTIONS {
        return install(program);
    }
    let extended = Program { len, filter: all.as_ptr() };
    install((&raw const extended).addr())
}

/// # Safety
/// As [`with_own_rule`].
unsafe fn read_program(program: usize) -> Option<Vec<Instruction>> {
    let mut header = [0u8; size_of::<Program>()];
    gmem_host::sys::copy_from_client(program, &mut header).ok()?;
    let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
    let address = usize::from_ne_bytes(header[8..].try_into().ok()?);
    let mut bytes = vec![0u8; len * size_of::<Instruction>()];
    gmem_host::sys::copy_from_client(address, &mut bytes).ok()?;
    Some(bytes.chunks_exact(size_of::<Instruction>()).filter_map(decode).collect())
}

fn decode(bytes: &[u8]) -> Option<Instruction> {
    let [a, b, jump_true, jump_false, k @ ..] = bytes else { return None };
    Some(Instruction {
        code: u16::from_ne_bytes([*a, *b]),
        jump_true: *jump_true,
        jump_false: *jump_false,
        k: u32::from_ne_bytes(k.try_into().ok()?),
    })
}

/// Allows system calls whose instruction ends in `(start, end]`. Both bounds lie in one 4 GiB block.
fn prologue((start, end): (u64, u64)) -> Vec<Instruction> {
    let op = |code, k, jump_true, jump_false| Instruction { code, jump_true, jump_false, k };
    let low = |address: u64| (address & 0xffff_ffff) as u32;
    let high = (start >> 32) as u32;
    vec![
        op(LOAD_WORD, IP_HIGH, 0, 0),
        op(JUMP_EQUAL, high, 0, 4),
        op(LOAD_WORD, IP_LOW, 0, 0),
        op(JUMP_GREATER_EQUAL, low(start), 0, 2),
        op(JUMP_GREATER_EQUAL, low(end), 1, 0),
        op(RETURN, ALLOW, 0, 0),
    ]
}

/// Where this library's instructions are; `None` if they straddle a 4 GiB boundary.
fn own_text() -> Option<(u64, u64)> {
    static TEXT: OnceLock<Option<(u64, u64)>> = OnceLock::new();
    *TEXT.get_or_init(|| {
        let here = (own_text as fn() -> _) as usize;
        let (start, end) = Maps::now().ok()?.around(here).ok()??;
        (start >> 32 == (end - 1) >> 32).then_some((start as u64, end as u64))
    })
}

/// Finds the text before a filter may forbid to look.
pub(crate) fn prepare() -> c_int {
    c_int::from(own_text().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A filter evaluator for the instructions of the prologue.
    fn run(program: &[Instruction], ip: u64) -> Option<u32> {
        let (mut at, mut word) = (0, 0u32);
        while let Some(op) = program.get(at) {
            at += 1;
            match op.code {
                LOAD_WORD if op.k == IP_LOW => word = (ip & 0xffff_ffff) as u32,
                LOAD_WORD => word = (ip >> 32) as u32,
                JUMP_EQUAL => at += usize::from(if word == op.k { op.jump_true } else { op.jump_false }),
                JUMP_GREATER_EQUAL => at += usize::from(if word >= op.k { op.jump_true } else { op.jump_false }),
                _ => return Some(op.k),
            }
        }
        None
    }

    #[test]
    fn only_addresses_in_the_text_are_allowed() {
        let text = (0x7f01_2345_6000, 0x7f01_2346_0000);
        let program = prologue(text);
        for (ip, allowed) in [
            (text.0, true),
            (text.1 - 1, true),
            (text.0 - 1, false),
            (text.1, false),
            (text.0 & 0xffff_ffff, false),
            (text.0 + (1 << 32), false),
        ] {
            assert_eq!(run(&program, ip) == Some(ALLOW), allowed, "{ip:#x}");
        }
    }
}
