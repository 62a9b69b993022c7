//! System calls that the libraries in use do not wrap, issued from this crate's own code.
//!
//! Everything in this crate enters the kernel from the text of the object it is linked into, never through libc: a client
//! may have a seccomp filter that knows nothing of gmem, and a rule for one range of instruction addresses can be put in
//! front of it.

use core::arch::{asm, naked_asm};
use core::{hint, ptr};

use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::io::Errno;

use crate::address_space;

const SYS_RT_SIGACTION: usize = 13;
const SYS_RT_SIGPROCMASK: usize = 14;
const SYS_IOCTL: usize = 16;
const SYS_RT_SIGPENDING: usize = 127;
const SYS_PROCESS_VM_READV: usize = 310;
const SYS_PROCESS_VM_WRITEV: usize = 311;

/// # Safety
/// The call must be one that cannot break memory safety with these arguments.
#[inline]
unsafe fn syscall6(nr: usize, args: [usize; 6]) -> Result<usize, Errno> {
    let ret: isize;
    // SAFETY: the registers are those of the x86-64 kernel ABI; rcx and r11 are clobbered by `syscall`. What the call itself
    // does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => ret,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result(ret)
}

fn result(ret: isize) -> Result<usize, Errno> {
    usize::try_from(ret).map_err(|_| errno(ret))
}

#[cold]
fn errno(ret: isize) -> Errno {
    i32::try_from(-ret).map_or(Errno::INVAL, Errno::from_raw_os_error)
}

/// `ioctl` as the kernel has it, from which glibc may unwind the thread: a signal can end it there.
#[unsafe(naked)]
unsafe extern "C-unwind" fn bare_ioctl(fd: usize, request: usize, arg: usize) -> isize {
    naked_asm!(".cfi_startproc", "mov eax, {}", "syscall", "ret", ".cfi_endproc", const SYS_IOCTL)
}

/// As [`ioctl`], for a call that lasts: the thread may be ended in it. Neither this function nor its callers in this crate have
/// anything to drop, so that they are unwound as frames of C are.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// As [`ioctl`].
#[inline]
pub(crate) unsafe fn long_ioctl(fd: BorrowedFd<'_>, request: u32, arg: usize) -> Result<i32, Errno> {
    let fd = usize::try_from(fd.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: passed on to the caller.
    let ret = unsafe { bare_ioctl(fd, request as usize, arg) };
    match i32::try_from(ret) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(errno(ret)),
    }
}

/// `ioctl` with an argument that is a number or an address which only the kernel interprets.
///
/// # Errors
/// The kernel's.
///
/// # Safety
/// `request` and `arg` must not make the kernel write to memory that Rust code relies on.
pub unsafe fn ioctl(fd: BorrowedFd<'_>, request: u32, arg: usize) -> Result<i32, Errno> {
    let fd = usize::try_from(fd.as_raw_fd()).map_err(|_| Errno::BADF)?;
    // SAFETY: passed on to the caller.
    let value = unsafe { syscall6(SYS_IOCTL, [fd, request as usize, arg, 0, 0, 0]) }?;
    i32::try_from(value).map_err(|_| Errno::OVERFLOW)
}

/// `ftruncate` under the file size limit `limit`, its current and its maximal value, by a child whose limits are its own. All else
/// it shares with this process, and it is gone when this returns.
///
/// # Errors
/// The kernel's; EAGAIN if there may be no more processes.
pub(crate) fn truncate_under_limit(fd: BorrowedFd<'_>, size: u64, limit: [u64; 2]) -> Result<(), Errno> {
    const SYS_CLONE: usize = 56;
    const SYS_WAIT4: usize = 61;
    /// `CLONE_VM`, `CLONE_FS`, `CLONE_FILES` and `CLONE_VFORK`, and no signal at its end.
    const FLAGS: usize = 0x100 | 0x200 | 0x400 | 0x4000;
    const WALL: usize = 0x4000_0000;
    // The child must not run the client's handlers.
    let _signals = SignalsBlocked::new();
    let mut done = -1isize;
    let mut pid = SYS_CLONE.cast_signed();
    // SAFETY: the registers are those of the x86-64 kernel ABI. The child has this stack, while this thread waits for its end;
    // it leaves the stack alone, writes `done` and ends within these instructions. `prlimit64` reads `limit`.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor edi, edi",
            "mov esi, 1", // RLIMIT_FSIZE
            "mov rdx, {limit}",
            "xor r10d, r10d",
            "mov eax, 302", // prlimit64
            "syscall",
            "mov rdi, {fd}",
            "mov rsi, {size}",
            "mov eax, 77", // ftruncate
            "syscall",
            "mov [{done}], rax",
            "xor edi, edi",
            "mov eax, 60", // exit
            "syscall",
            "ud2",
            "2:",
            limit = in(reg) limit.as_ptr(),
            fd = in(reg) i64::from(fd.as_raw_fd()),
            size = in(reg) size,
            done = in(reg) &raw mut done,
            inout("rax") pid,
            inout("rdi") FLAGS => _,
            inout("rsi") 0usize => _,
            inout("rdx") 0usize => _,
            inout("r10") 0usize => _,
            in("r8") 0usize,
            out("rcx") _,
            out("r11") _,
            options(nostack)
        );
    }
    let error = |value: isize| i32::try_from(-value).map_or(Errno::INVAL, Errno::from_raw_os_error);
    let pid = usize::try_from(pid).map_err(|_| error(pid))?;
    // SAFETY: of a child of this function's.
    let _ = unsafe { syscall6(SYS_WAIT4, [pid, 0, WALL, 0, 0, 0]) };
    if done == 0 { Ok(()) } else { Err(error(done)) }
}

/// While it lives, this thread takes no signals.
///
/// A signal handler of the client may call into gmem; it must not find this thread holding a lock that the call needs.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: u64,
}

impl SignalsBlocked {
    /// Blocks every signal that can be blocked.
    #[must_use]
    pub fn new() -> Self {
        Self { before: set_signal_mask(u64::MAX) }
    }

    /// Whether a signal has come that this thread would have taken: a long call is to end early.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        let mut pending = 0u64;
        // SAFETY: the kernel writes `pending`, which has the size given.
        let known = unsafe { syscall6(SYS_RT_SIGPENDING, [(&raw mut pending).addr(), size_of::<u64>(), 0, 0, 0, 0]) };
        let wanted = if known.is_ok() { pending & !self.before } else { 0 };
        (1..=64).filter(|signal| wanted & 1 << (signal - 1) != 0).any(is_taken)
    }
}

impl Default for SignalsBlocked {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        set_signal_mask(self.before);
    }
}

/// Whether a signal does something when it is taken. While it is blocked, the kernel keeps it also if it does not.
fn is_taken(signal: u64) -> bool {
    const SIG_DFL: u64 = 0;
    const SIG_IGN: u64 = 1;
    /// CHLD, CONT, URG, WINCH.
    const IGNORED_BY_DEFAULT: [u64; 4] = [17, 18, 23, 28];
    // `struct sigaction` of the kernel: the handler, flags, restorer and mask.
    let mut action = [0u64; 4];
    let number = usize::try_from(signal).unwrap_or(0);
    let args = [number, 0, (&raw mut action).addr(), size_of::<u64>(), 0, 0];
    // SAFETY: the kernel writes `action`, which has the size of its structure, and changes nothing.
    let known = unsafe { syscall6(SYS_RT_SIGACTION, args) };
    let ignored = match action[0] {
        SIG_IGN => true,
        SIG_DFL => IGNORED_BY_DEFAULT.contains(&signal),
        _ => false,
    };
    known.is_err() || !ignored
}

/// Sets the mask and returns the old one.
fn set_signal_mask(mask: u64) -> u64 {
    const SIG_SETMASK: usize = 2;
    let mut old = 0u64;
    let args = [SIG_SETMASK, (&raw const mask).addr(), (&raw mut old).addr(), size_of::<u64>(), 0, 0];
    // SAFETY: the kernel reads `mask` and writes `old`, both of the size given.
    let _ = unsafe { syscall6(SYS_RT_SIGPROCMASK, args) };
    old
}

#[repr(C)]
struct IoVec {
    base: usize,
    len: usize,
}

fn transfer(nr: usize, local: usize, remote: usize, len: usize) -> Result<(), Errno> {
    let (local, remote) = (IoVec { base: local, len }, IoVec { base: remote, len });
    let transfer = |process: u32| {
        let args = [process as usize, (&raw const local).addr(), 1, (&raw const remote).addr(), 1, 0];
        // SAFETY: both vectors live until the call returns. `local` names memory that the two callers below borrow for the
        // right kind of access; `remote` is checked by the kernel.
        unsafe { syscall6(nr, args) }
    };
    let done = match transfer(address_space::process()) {
        // A child of vfork may not be allowed to name its parent.
        Err(Errno::PERM | Errno::SRCH) => transfer(address_space::caller()),
        done => done,
    };
    if done == Ok(len) { Ok(()) } else { Err(Errno::FAULT) }
}

/// Copies from an address that a client gave, which may be bad.
///
/// # Errors
/// EFAULT if any byte cannot be read; the buffer may then be partly filled.
pub fn copy_from_client(address: usize, buffer: &mut [u8]) -> Result<(), Errno> {
    transfer(SYS_PROCESS_VM_READV, buffer.as_mut_ptr().addr(), address, buffer.len())
}

/// Copies to an address that a client gave, which may be bad.
///
/// # Errors
/// EFAULT if any byte cannot be written.
///
/// The address must be one that the client expects the kernel to write to: a client that names memory of its own Rust or
/// C objects here gets what it would get from the kernel.
pub fn copy_to_client(address: usize, bytes: &[u8]) -> Result<(), Errno> {
    transfer(SYS_PROCESS_VM_WRITEV, bytes.as_ptr().addr(), address, bytes.len())
}

/// What a client passes to a call of its own: a number, or an address that may be bad.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    value: usize,
    /// An address on the calling thread's stack, which is there from the frame of whoever asks up to here; or 0.
    stack: usize,
}

impl From<usize> for Argument {
    fn from(value: usize) -> Self {
        Self { value, stack: 0 }
    }
}

impl Argument {
    /// With the stack pointer that the client's call came with. What C code passes to an ioctl is next to that as a rule, and
    /// then need not be copied by the kernel, which costs a third of what replacing a page of a window does.
    ///
    /// # Safety
    /// `stack` must lie in a frame of the stack that every user of this value runs on, and that frame must still be there then.
    #[must_use]
    pub unsafe fn beside(value: usize, stack: usize) -> Self {
        Self { value, stack }
    }

    /// The number.
    #[must_use]
    pub fn value(self) -> usize {
        self.value
    }

    /// Copies from the address.
    ///
    /// # Errors
    /// As [`copy_from_client`].
    pub fn copy_from(self, buffer: &mut [u8]) -> Result<(), Errno> {
        if !self.is_on_live_pages(buffer.len()) {
            return copy_from_client(self.value, buffer);
        }
        // SAFETY: the pages can be read, because frames that are in use lie on them. What is there is the client's, which may
        // change it meanwhile on its own account; `copy` allows for a bad address that is the buffer's own.
        unsafe { ptr::copy(ptr::with_exposed_provenance(self.value), buffer.as_mut_ptr(), buffer.len()) };
        Ok(())
    }

    /// Copies to the address.
    ///
    /// # Errors
    /// As [`copy_to_client`].
    pub fn copy_to(self, bytes: &[u8]) -> Result<(), Errno> {
        copy_to_client(self.value, bytes)
    }

    /// Whether `len` bytes lie on pages that hold a part of the stack from this function's frame up to `self.stack`.
    fn is_on_live_pages(self, len: usize) -> bool {
        const IN_PAGE: usize = 4095;
        let own = 0u8;
        let first = hint::black_box(&raw const own).addr() & !IN_PAGE;
        let end = self.value.checked_add(len);
        first <= self.value && end.is_some_and(|end| end <= self.stack | IN_PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_errors_and_not_signals() {
        let mut word = [0u8; 8];
        assert_eq!(copy_from_client(16, &mut word), Err(Errno::FAULT));
        assert_eq!(copy_to_client(usize::MAX - 100, &word), Err(Errno::FAULT));
        let source = 0x1122_3344_5566_7788u64.to_le_bytes();
        copy_from_client(source.as_ptr().addr(), &mut word).unwrap();
        assert_eq!(word, source);
    }

    #[test]
    fn arguments_are_read_from_live_pages_only() {
        let source = 0x1122_3344_5566_7788u64.to_le_bytes();
        // SAFETY: this function's frame, on the stack of all that it calls.
        let at = |address| unsafe { Argument::beside(address, source.as_ptr().addr()) };
        let page = source.as_ptr().addr() & !4095;
        assert!(at(source.as_ptr().addr()).is_on_live_pages(8));
        assert!(at(page + 4080).is_on_live_pages(8), "above the frame, and still on its page");
        assert!(!at(page + 4090).is_on_live_pages(8), "beyond it");
        assert!(!at(page - (1 << 20)).is_on_live_pages(8), "below all frames");
        assert!(!at(usize::MAX).is_on_live_pages(8));
        assert!(!Argument::from(source.as_ptr().addr()).is_on_live_pages(8), "nothing is known of the stack");
        for argument in [at(source.as_ptr().addr()), Argument::from(source.as_ptr().addr())] {
            let mut word = [0u8; 8];
            argument.copy_from(&mut word).unwrap();
            assert_eq!(word, source);
        }
    }
}
