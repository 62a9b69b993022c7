//! The exported functions. Each is the libc function of its name, so the safety of each is that function's. A thread may be
//! ended in any of them (see [`own`](mod@crate::own)).
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "C passes all of these in registers of 64 bits, and libc's types have fixed widths on x86-64"
)]

use std::arch::naked_asm;
use std::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};

use gmem_uapi::{Answer, Argument, Errno, FileCall, Process};
use libc::{mode_t, off_t, pid_t, size_t, ssize_t};

use crate::own::own;
use crate::paths::{file_named, file_named_at, is_file};
use crate::run::run;
use crate::{answer, fork, give, library, process, real, seccomp, tell};

/// The kernel compares the low 32 bits; C callers may pass a sign-extended number.
fn request(number: c_ulong) -> u32 {
    number as u32
}

fn unsigned(value: off_t) -> u64 {
    u64::from_ne_bytes(value.to_ne_bytes())
}

fn bits(value: c_int) -> u32 {
    u32::from_ne_bytes(value.to_ne_bytes())
}

/// A file call of several whose answers are small errors or 0.
fn file_call(fd: c_int, call: FileCall, real: impl FnOnce() -> i64 + Copy) -> i64 {
    answer(|process| process.file_call(fd, call), real)
}

fn file_call_int(fd: c_int, call: FileCall, real: impl FnOnce() -> c_int + Copy) -> c_int {
    c_int::try_from(file_call(fd, call, || i64::from(real()))).unwrap_or(-1)
}

macro_rules! export {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) -> $ret:ty $body:block)*) => {
        $(
            $(#[$meta])*
            #[doc = concat!("`", stringify!($name), "` of libc.")]
            #[unsafe(no_mangle)]
            pub(crate) unsafe extern "C-unwind" fn $name($($arg: $type),*) -> $ret {
                // SAFETY: the arguments go to libc's function of this name, or to gmem, which treats them as claims.
                unsafe { $body }
            }
        )*
    };
}

/// `ioctl` of libc, which tells where on the stack it was called.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub(crate) unsafe extern "C-unwind" fn ioctl(fd: c_int, number: c_ulong, arg: usize) -> c_int {
    naked_asm!(".cfi_startproc", "mov rcx, rsp", "jmp {}", ".cfi_endproc", sym ioctl_with_stack)
}

unsafe extern "C-unwind" fn ioctl_with_stack(fd: c_int, number: c_ulong, arg: usize, stack: usize) -> c_int {
    // SAFETY: the arguments are the client's.
    let real = move || unsafe { real::ioctl(fd, number, arg) };
    if Process::is_run(request(number), arg) {
        return give(run(fd), real);
    }
    any_ioctl((fd, number, arg), stack, real)
}

/// Apart from `KVM_RUN`, which needs none of what this has in its frame.
#[inline(never)]
fn any_ioctl((fd, number, arg): (c_int, c_ulong, usize), stack: usize, real: impl FnOnce() -> c_int + Copy) -> c_int {
    if Process::is_registration(request(number)) {
        return flags_changed(real());
    }
    if !process().is_some_and(|process| process.may_concern(fd, request(number))) {
        return real();
    }
    // SAFETY: the return address to the client lies there, and this thread goes on using that stack until it returns.
    let argument = unsafe { Argument::beside(arg, stack) };
    answer(|process| process.ioctl(fd, request(number), argument), real)
}

export! {
    fn close(fd: c_int) -> c_int {
        if own(false, || library::keeps(fd)) {
            return 0;
        }
        // Before the real call: afterwards another thread may get the number.
        tell(|process| process.closed(fd));
        real::close(fd)
    }

    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
        const UNSHARE: c_int = 2;
        const CLOEXEC: c_int = 4;
        if flags & !(UNSHARE | CLOEXEC) != 0 {
            // Refused, and nothing is closed.
            return real::close_range(first, last, flags);
        }
        if flags & CLOEXEC == 0 {
            let clip = |fd: c_uint| c_int::try_from(fd).unwrap_or(c_int::MAX);
            tell(|process| process.closed_range(clip(first), clip(last)));
        }
        if first > last {
            return real::close_range(first, last, flags);
        }
        own(-1, || library::around(first, last, |first, last| real::close_range(first, last, flags)))
    }

    fn closefrom(first: c_int) -> () {
        let _ = close_range(c_uint::try_from(first).unwrap_or(0), c_uint::MAX, 0);
    }

    fn fclose(stream: *mut libc::FILE) -> c_int {
        // libc closes the descriptor without going through `close`.
        tell(|process| process.closed(libc::fileno(stream)));
        real::fclose(stream)
    }

    fn freopen(path: *const c_char, mode: *const c_char, stream: *mut libc::FILE) -> *mut libc::FILE {
        freopen64(path, mode, stream)
    }

    fn freopen64(path: *const c_char, mode: *const c_char, stream: *mut libc::FILE) -> *mut libc::FILE {
        // The same, and the new file may get the number.
        tell(|process| process.closed(libc::fileno(stream)));
        real::freopen64(path, mode, stream)
    }

    fn dup(fd: c_int) -> c_int {
        duplicated(fd, real::dup(fd))
    }

    fn dup2(fd: c_int, copy: c_int) -> c_int {
        if fd == copy {
            return real::dup2(fd, copy);
        }
        duplicated(fd, library::make_way(copy, || real::dup2(fd, copy)))
    }

    fn dup3(fd: c_int, copy: c_int, flags: c_int) -> c_int {
        duplicated(fd, library::make_way(copy, || real::dup3(fd, copy, flags)))
    }

    fn fcntl(fd: c_int, command: c_int, arg: usize) -> c_int {
        fcntl64(fd, command, arg)
    }

    fn fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int {
        if matches!(command, libc::F_ADD_SEALS | libc::F_GET_SEALS) && is_file(fd) {
            return file_call_int(fd, FileCall::Seals, || -1);
        }
        let result = real::fcntl64(fd, command, arg);
        match command {
            libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => duplicated(fd, result),
            _ => result,
        }
    }

    fn mmap(address: usize, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> usize {
        mmap64(address, len, prot, flags, fd, offset)
    }

    fn mmap64(address: usize, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> usize {
        let anonymous = flags & libc::MAP_ANONYMOUS != 0;
        answer(
            |process| match anonymous {
                true => Answer::Pass,
                false => process.mmap(address, len, bits(prot), bits(flags), fd, unsigned(offset)),
            },
            || {
                let base = real::mmap64(address, len, prot, flags, fd, offset);
                // Guest memory may be replaced, or come back at an address that was unmapped before.
                if base != usize::MAX {
                    tell(|process| process.mapping_changed(base, len));
                }
                base
            },
        )
    }

    fn munmap(address: usize, len: size_t) -> c_int {
        let result = real::munmap(address, len);
        if result == 0 {
            tell(|process| process.mapping_changed(address, len));
        }
        result
    }

    fn mprotect(address: usize, len: size_t, prot: c_int) -> c_int {
        let result = real::mprotect(address, len, prot);
        if result == 0 {
            tell(|process| process.protection_changed(address, len));
        }
        result
    }

    fn pkey_mprotect(address: usize, len: size_t, prot: c_int, key: c_int) -> c_int {
        let result = real::pkey_mprotect(address, len, prot, key);
        if result == 0 {
            tell(|process| process.protection_changed(address, len));
        }
        result
    }

    fn mremap(address: usize, old: size_t, new: size_t, flags: c_int, target: usize) -> usize {
        let base = real::mremap(address, old, new, flags, target);
        if base != usize::MAX {
            // An old length of 0 makes a second mapping of the same.
            let keeps = old == 0 || flags & libc::MREMAP_DONTUNMAP != 0;
            tell(|process| process.mapping_moved((address, old), (base, new), keeps));
        }
        base
    }

    fn madvise(address: usize, len: size_t, advice: c_int) -> c_int {
        let result = answer(|process| process.advice(address, len, advice), || real::madvise(address, len, advice));
        match advice {
            libc::MADV_DONTNEED | libc::MADV_DONTNEED_LOCKED if result == 0 => {
                tell(|process| { let _ = process.advise_dontneed(address, len); });
            }
            libc::MADV_DONTFORK..=libc::MADV_KEEPONFORK => tell(Process::flags_changed),
            _ => {}
        }
        result
    }

    fn mlock(address: usize, len: size_t) -> c_int {
        flags_changed(real::mlock(address, len))
    }

    fn mlock2(address: usize, len: size_t, flags: c_uint) -> c_int {
        flags_changed(real::mlock2(address, len, flags))
    }

    fn munlock(address: usize, len: size_t) -> c_int {
        flags_changed(real::munlock(address, len))
    }

    fn mlockall(flags: c_int) -> c_int {
        flags_changed(real::mlockall(flags))
    }

    fn munlockall() -> c_int {
        flags_changed(real::munlockall())
    }

    fn read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWrite, || real::read(fd, buffer, count))
    }

    fn write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWrite, || real::write(fd, buffer, count))
    }

    fn readv(fd: c_int, vectors: *const c_void, count: c_int) -> ssize_t {
        answer_size(fd, FileCall::ReadWrite, || real::readv(fd, vectors, count))
    }

    fn writev(fd: c_int, vectors: *const c_void, count: c_int) -> ssize_t {
        answer_size(fd, FileCall::ReadWrite, || real::writev(fd, vectors, count))
    }

    fn pread(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t {
        pread64(fd, buffer, count, offset)
    }

    fn pread64(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWriteAt(offset), || real::pread64(fd, buffer, count, offset))
    }

    fn pwrite(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
        pwrite64(fd, buffer, count, offset)
    }

    fn pwrite64(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWriteAt(offset), || real::pwrite64(fd, buffer, count, offset))
    }

    fn preadv(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t {
        preadv64(fd, vectors, count, offset)
    }

    fn preadv64(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWriteAt(offset), || real::preadv64(fd, vectors, count, offset))
    }

    fn pwritev(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t {
        pwritev64(fd, vectors, count, offset)
    }

    fn pwritev64(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t {
        answer_size(fd, FileCall::ReadWriteAt(offset), || real::pwritev64(fd, vectors, count, offset))
    }

    fn preadv2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t {
        preadv64v2(fd, vectors, count, offset, flags)
    }

    fn preadv64v2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t {
        answer_size(fd, at(offset), || real::preadv64v2(fd, vectors, count, offset, flags))
    }

    fn pwritev2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t {
        pwritev64v2(fd, vectors, count, offset, flags)
    }

    fn pwritev64v2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t {
        answer_size(fd, at(offset), || real::pwritev64v2(fd, vectors, count, offset, flags))
    }

    fn lseek(fd: c_int, offset: off_t, whence: c_int) -> off_t {
        lseek64(fd, offset, whence)
    }

    fn lseek64(fd: c_int, offset: off_t, whence: c_int) -> off_t {
        file_call(fd, FileCall::Seek(whence), || real::lseek64(fd, offset, whence))
    }

    fn ftruncate(fd: c_int, len: off_t) -> c_int {
        ftruncate64(fd, len)
    }

    fn ftruncate64(fd: c_int, len: off_t) -> c_int {
        file_call_int(fd, FileCall::ChangeInode, || real::ftruncate64(fd, len))
    }

    fn fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
        fallocate64(fd, mode, offset, len)
    }

    fn fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
        let call = FileCall::Fallocate { mode, offset, len };
        file_call_int(fd, call, || real::fallocate64(fd, mode, offset, len))
    }

    fn fsync(fd: c_int) -> c_int {
        file_call_int(fd, FileCall::Sync, || real::fsync(fd))
    }

    fn fdatasync(fd: c_int) -> c_int {
        file_call_int(fd, FileCall::Sync, || real::fdatasync(fd))
    }

    fn fchmod(fd: c_int, mode: mode_t) -> c_int {
        file_call_int(fd, FileCall::ChangeInode, || real::fchmod(fd, mode))
    }

    fn fchown(fd: c_int, owner: c_uint, group: c_uint) -> c_int {
        file_call_int(fd, FileCall::ChangeInode, || real::fchown(fd, owner, group))
    }

    fn futimens(fd: c_int, times: *const c_void) -> c_int {
        file_call_int(fd, FileCall::ChangeInode, || real::futimens(fd, times))
    }

    fn utimensat(dir: c_int, path: *const c_char, times: *const c_void, flags: c_int) -> c_int {
        let fd = if path.is_null() { dir } else { file_named_at(dir, path, flags) };
        file_call_int(fd, FileCall::ChangeInode, || real::utimensat(dir, path, times, flags))
    }

    fn futimes(fd: c_int, times: *const c_void) -> c_int {
        file_call_int(fd, FileCall::ChangeInode, || real::futimes(fd, times))
    }

    fn futimesat(dir: c_int, path: *const c_char, times: *const c_void) -> c_int {
        let fd = if path.is_null() { dir } else { file_named(path) };
        file_call_int(fd, FileCall::ChangeInode, || real::futimesat(dir, path, times))
    }

    fn utimes(path: *const c_char, times: *const c_void) -> c_int {
        file_call_int(file_named(path), FileCall::ChangeInode, || real::utimes(path, times))
    }

    fn utime(path: *const c_char, times: *const c_void) -> c_int {
        file_call_int(file_named(path), FileCall::ChangeInode, || real::utime(path, times))
    }

    fn chmod(path: *const c_char, mode: mode_t) -> c_int {
        file_call_int(file_named(path), FileCall::ChangeInode, || real::chmod(path, mode))
    }

    fn fchmodat(dir: c_int, path: *const c_char, mode: mode_t, flags: c_int) -> c_int {
        let fd = file_named_at(dir, path, flags);
        file_call_int(fd, FileCall::ChangeInode, || real::fchmodat(dir, path, mode, flags))
    }

    fn chown(path: *const c_char, owner: c_uint, group: c_uint) -> c_int {
        file_call_int(file_named(path), FileCall::ChangeInode, || real::chown(path, owner, group))
    }

    fn fchownat(dir: c_int, path: *const c_char, owner: c_uint, group: c_uint, flags: c_int) -> c_int {
        let fd = file_named_at(dir, path, flags);
        file_call_int(fd, FileCall::ChangeInode, || real::fchownat(dir, path, owner, group, flags))
    }

    fn truncate(path: *const c_char, len: off_t) -> c_int {
        truncate64(path, len)
    }

    fn truncate64(path: *const c_char, len: off_t) -> c_int {
        file_call_int(file_named(path), FileCall::ChangeInode, || real::truncate64(path, len))
    }

    fn fgetxattr(fd: c_int, name: *const c_char, value: *mut c_void, size: size_t) -> ssize_t {
        answer_size(fd, FileCall::Attribute, || real::fgetxattr(fd, name, value, size))
    }

    fn fsetxattr(fd: c_int, name: *const c_char, value: *const c_void, size: size_t, flags: c_int) -> c_int {
        file_call_int(fd, FileCall::Attribute, || real::fsetxattr(fd, name, value, size, flags))
    }

    fn fremovexattr(fd: c_int, name: *const c_char) -> c_int {
        file_call_int(fd, FileCall::Attribute, || real::fremovexattr(fd, name))
    }

    fn readahead(fd: c_int, offset: off_t, count: size_t) -> ssize_t {
        answer_size(fd, FileCall::Sync, || real::readahead(fd, offset, count))
    }

    fn posix_fallocate(fd: c_int, offset: off_t, len: off_t) -> c_int {
        posix_fallocate64(fd, offset, len)
    }

    fn posix_fallocate64(fd: c_int, offset: off_t, len: off_t) -> c_int {
        if !is_file(fd) {
            return real::posix_fallocate64(fd, offset, len);
        }
        // It returns the error instead of setting errno. Where a file cannot be allocated it writes to each block, which this
        // file refuses as well.
        match offset.checked_add(len) {
            _ if offset < 0 || len <= 0 => libc::EINVAL,
            None => libc::EFBIG,
            Some(_) => libc::ESPIPE,
        }
    }

    fn sendfile(to: c_int, from: c_int, offset: *mut c_void, count: size_t) -> ssize_t {
        sendfile64(to, from, offset, count)
    }

    fn sendfile64(to: c_int, from: c_int, offset: *mut c_void, count: size_t) -> ssize_t {
        let (fd, call) = sending(to, from, offset.addr());
        answer_size(fd, call, || real::sendfile64(to, from, offset, count))
    }

    fn splice(from: c_int, from_offset: *mut c_void, to: c_int, to_offset: *mut c_void, len: size_t, flags: c_uint) -> ssize_t {
        answer_size(either(from, to), FileCall::Splice, || real::splice(from, from_offset, to, to_offset, len, flags))
    }

    fn copy_file_range(from: c_int, from_offset: *mut c_void, to: c_int, to_offset: *mut c_void, len: size_t, flags: c_uint) -> ssize_t {
        let (fd, call) = copying(from, to, flags);
        answer_size(fd, call, || real::copy_file_range(from, from_offset, to, to_offset, len, flags))
    }

    fn fstat(fd: c_int, stat: *mut libc::stat) -> c_int {
        fstat64(fd, stat)
    }

    fn fstat64(fd: c_int, stat: *mut libc::stat) -> c_int {
        patch(fd, stat, real::fstat64(fd, stat))
    }

    fn __fxstat(version: c_int, fd: c_int, stat: *mut libc::stat) -> c_int {
        __fxstat64(version, fd, stat)
    }

    fn __fxstat64(version: c_int, fd: c_int, stat: *mut libc::stat) -> c_int {
        patch(fd, stat, real::__fxstat64(version, fd, stat))
    }

    fn fstatat(dir: c_int, path: *const c_char, stat: *mut libc::stat, flags: c_int) -> c_int {
        fstatat64(dir, path, stat, flags)
    }

    fn fstatat64(dir: c_int, path: *const c_char, stat: *mut libc::stat, flags: c_int) -> c_int {
        patch_at((dir, path, flags), stat, real::fstatat64(dir, path, stat, flags))
    }

    fn statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, stat: *mut libc::statx) -> c_int {
        patch_x((dir, path, flags), stat, real::statx(dir, path, flags, mask, stat))
    }

    fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        open64(path, flags, mode)
    }

    fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        if opens_file(path, flags) { refuse() } else { real::open64(path, flags, mode) }
    }

    fn openat(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        openat64(dir, path, flags, mode)
    }

    fn openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
        if opens_file(path, flags) { refuse() } else { real::openat64(dir, path, flags, mode) }
    }

    fn creat(path: *const c_char, mode: mode_t) -> c_int {
        creat64(path, mode)
    }

    fn creat64(path: *const c_char, mode: mode_t) -> c_int {
        if opens_file(path, 0) { refuse() } else { real::creat64(path, mode) }
    }

    fn fopen(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
        fopen64(path, mode)
    }

    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
        if opens_file(path, 0) { refuse() } else { real::fopen64(path, mode) }
    }

    fn readlink(path: *const c_char, buffer: *mut c_char, size: size_t) -> ssize_t {
        if reads_name(path, size) { give_name(buffer, size) } else { real::readlink(path, buffer, size) }
    }

    fn readlinkat(dir: c_int, path: *const c_char, buffer: *mut c_char, size: size_t) -> ssize_t {
        if reads_name(path, size) { give_name(buffer, size) } else { real::readlinkat(dir, path, buffer, size) }
    }

    fn _Fork() -> pid_t {
        fork::around(|| real::_Fork())
    }

    fn clone(function: usize, stack: usize, flags: c_int, arg: usize, parent_tid: usize, tls: usize, child_tid: usize) -> c_int {
        if !fork::calls_in_copy(function, stack, flags) {
            return real::clone(function, stack, flags, arg, parent_tid, tls, child_tid);
        }
        // A child of fork, on the copy of this stack first.
        let number = libc::SYS_clone;
        let child = fork::around(|| real::syscall(number, flags as usize, 0, parent_tid, child_tid, tls, 0));
        if child == 0 {
            fork::call(function, arg, stack)
        }
        c_int::try_from(child).unwrap_or(-1)
    }

    fn __clone(function: usize, stack: usize, flags: c_int, arg: usize, parent_tid: usize, tls: usize, child_tid: usize) -> c_int {
        clone(function, stack, flags, arg, parent_tid, tls, child_tid)
    }

    fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int {
        if option != libc::PR_SET_SECCOMP || a != libc::SECCOMP_MODE_FILTER as c_ulong {
            return real::prctl(option, a, b, c, d);
        }
        own(-1, || seccomp::with_own_rule(b as usize, |program| real::prctl(option, a, program as c_ulong, c, d)))
    }

    fn syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long {
        by_number(number, [a, b, c, d, e, f])
    }
}

// What the functions above are called with _FORTIFY_SOURCE. They end the process if `room`, the size of the buffer, is less
// than what is asked for, or if a file would be made without a mode; that is left to libc.
export! {
    fn __read_chk(fd: c_int, buffer: *mut c_void, count: size_t, room: size_t) -> ssize_t {
        answer_size(in_room(fd, count, room), FileCall::ReadWrite, || real::__read_chk(fd, buffer, count, room))
    }

    fn __pread_chk(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t, room: size_t) -> ssize_t {
        __pread64_chk(fd, buffer, count, offset, room)
    }

    fn __pread64_chk(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t, room: size_t) -> ssize_t {
        let call = FileCall::ReadWriteAt(offset);
        answer_size(in_room(fd, count, room), call, || real::__pread64_chk(fd, buffer, count, offset, room))
    }

    fn __readlink_chk(path: *const c_char, buffer: *mut c_char, size: size_t, room: size_t) -> ssize_t {
        if size <= room && reads_name(path, size) {
            return give_name(buffer, size);
        }
        real::__readlink_chk(path, buffer, size, room)
    }

    fn __readlinkat_chk(dir: c_int, path: *const c_char, buffer: *mut c_char, size: size_t, room: size_t) -> ssize_t {
        if size <= room && reads_name(path, size) {
            return give_name(buffer, size);
        }
        real::__readlinkat_chk(dir, path, buffer, size, room)
    }

    fn __open_2(path: *const c_char, flags: c_int) -> c_int {
        __open64_2(path, flags)
    }

    fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
        if flags & NEEDS_MODE == 0 && opens_file(path, flags) { refuse() } else { real::__open64_2(path, flags) }
    }

    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        __openat64_2(dir, path, flags)
    }

    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
        if flags & NEEDS_MODE == 0 && opens_file(path, flags) { refuse() } else { real::__openat64_2(dir, path, flags) }
    }
}

/// O_TMPFILE holds O_DIRECTORY, with which no file is opened anyway.
const NEEDS_MODE: c_int = libc::O_CREAT | libc::O_DIRECTORY;

/// The descriptor, or none if libc is to see that the buffer is too small.
fn in_room(fd: c_int, count: size_t, room: size_t) -> c_int {
    if count <= room { fd } else { -1 }
}

/// Only the calls that gmem stands in front of; everything else goes on as it came.
///
/// # Safety
/// As `syscall` of libc.
unsafe fn by_number(number: c_long, args: [usize; 6]) -> c_long {
    let [a, b, c, d, e, f] = args;
    let int = |value: usize| value as c_int;
    let address = |value: usize| value as c_long;
    let path = |value: usize| value as *const c_char;
    let stat = |value: usize| value as *mut libc::stat;
    // SAFETY: the same call with the same arguments.
    let real = || unsafe { real::syscall(number, a, b, c, d, e, f) };
    if let Some((fd, call)) = on_file(number, args) {
        return file_call(fd, call, real);
    }
    // SAFETY: the same call with the same arguments, through the function that stands for it.
    unsafe {
        match number {
            libc::SYS_ioctl => c_long::from(ioctl(int(a), b as c_ulong, c)),
            libc::SYS_close => c_long::from(close(int(a))),
            libc::SYS_close_range => c_long::from(close_range(a as c_uint, b as c_uint, int(c))),
            libc::SYS_dup => c_long::from(dup(int(a))),
            libc::SYS_dup2 => c_long::from(dup2(int(a), int(b))),
            libc::SYS_dup3 => c_long::from(dup3(int(a), int(b), int(c))),
            libc::SYS_fcntl => c_long::from(fcntl64(int(a), int(b), c)),
            libc::SYS_mmap => address(mmap64(a, b, int(c), int(d), int(e), f as off_t)),
            libc::SYS_munmap => c_long::from(munmap(a, b)),
            libc::SYS_mprotect => c_long::from(mprotect(a, b, int(c))),
            libc::SYS_pkey_mprotect => c_long::from(pkey_mprotect(a, b, int(c), int(d))),
            libc::SYS_mremap => address(mremap(a, b, c, int(d), e)),
            libc::SYS_madvise => c_long::from(madvise(a, b, int(c))),
            libc::SYS_mlock | libc::SYS_mlock2 | libc::SYS_munlock | libc::SYS_mlockall | libc::SYS_munlockall => {
                flags_changed(real())
            }
            libc::SYS_fstat => patch(int(a), stat(b), real()),
            libc::SYS_newfstatat => patch_at((int(a), path(b), int(d)), stat(c), real()),
            libc::SYS_statx => patch_x((int(a), path(b), int(c)), e as *mut libc::statx, real()),
            libc::SYS_open if opens_file(path(a), int(b)) => refuse(),
            libc::SYS_openat if opens_file(path(b), int(c)) => refuse(),
            libc::SYS_creat if opens_file(path(a), 0) => refuse(),
            libc::SYS_readlink if reads_name(path(a), c) => give_name(b as *mut c_char, c) as c_long,
            libc::SYS_readlinkat if reads_name(path(b), d) => give_name(c as *mut c_char, d) as c_long,
            libc::SYS_fork => fork::around(real),
            libc::SYS_clone if fork::copies_memory(a, b) => fork::around(real),
            libc::SYS_clone3 if fork::copies_memory_as_told(a, b) => fork::around(real),
            libc::SYS_seccomp if a == libc::SECCOMP_SET_MODE_FILTER as usize => {
                own(-1, || seccomp::with_own_rule(c, |program| real::syscall(number, a, b, program, d, e, f)))
            }
            _ => real(),
        }
    }
}

/// What a call by number is to the guest_memfd that it may be about.
fn on_file(number: c_long, args: [usize; 6]) -> Option<(c_int, FileCall)> {
    let [a, b, c, d, e, f] = args;
    let fd = a as c_int;
    let offset = |value: usize| value as off_t;
    let path = |value: usize| value as *const c_char;
    Some(match number {
        libc::SYS_read | libc::SYS_readv | libc::SYS_write | libc::SYS_writev => (fd, FileCall::ReadWrite),
        // The vector forms have the offset's low half first, which on x86-64 is all of it.
        libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_pwrite64 | libc::SYS_pwritev => {
            (fd, FileCall::ReadWriteAt(offset(d)))
        }
        libc::SYS_preadv2 | libc::SYS_pwritev2 => (fd, at(offset(d))),
        libc::SYS_lseek => (fd, FileCall::Seek(c as c_int)),
        libc::SYS_fsync | libc::SYS_fdatasync | libc::SYS_readahead => (fd, FileCall::Sync),
        libc::SYS_ftruncate | libc::SYS_fchmod | libc::SYS_fchown => (fd, FileCall::ChangeInode),
        libc::SYS_utimensat | libc::SYS_futimesat if b == 0 => (fd, FileCall::ChangeInode),
        libc::SYS_utimensat => (file_named_at(fd, path(b), d as c_int), FileCall::ChangeInode),
        libc::SYS_fchownat => (file_named_at(fd, path(b), e as c_int), FileCall::ChangeInode),
        libc::SYS_futimesat | libc::SYS_fchmodat => (file_named(path(b)), FileCall::ChangeInode),
        libc::SYS_truncate | libc::SYS_chmod | libc::SYS_chown | libc::SYS_utimes | libc::SYS_utime => {
            (file_named(path(a)), FileCall::ChangeInode)
        }
        libc::SYS_fgetxattr | libc::SYS_fsetxattr | libc::SYS_fremovexattr => (fd, FileCall::Attribute),
        libc::SYS_fallocate => (fd, FileCall::Fallocate { mode: b as c_int, offset: offset(c), len: offset(d) }),
        libc::SYS_sendfile => sending(fd, b as c_int, c),
        libc::SYS_splice => (either(fd, c as c_int), FileCall::Splice),
        libc::SYS_copy_file_range => copying(fd, c as c_int, f as c_uint),
        _ => return None,
    })
}

fn answer_size(fd: c_int, call: FileCall, real: impl FnOnce() -> ssize_t + Copy) -> ssize_t {
    // The fast way for everything that is no guest_memfd: one lookup.
    if !is_file(fd) {
        return real();
    }
    file_call(fd, call, || real() as i64) as ssize_t
}

/// An offset of -1 means the file's position, as read and write use it.
fn at(offset: off_t) -> FileCall {
    if offset == -1 { FileCall::ReadWrite } else { FileCall::ReadWriteAt(offset) }
}

/// Whichever of two descriptors is a guest_memfd.
fn either(one: c_int, other: c_int) -> c_int {
    if is_file(one) { one } else { other }
}

fn sending(to: c_int, from: c_int, offset: usize) -> (c_int, FileCall) {
    let call = if offset != 0 && is_file(from) { FileCall::SendFrom } else { FileCall::Splice };
    (either(from, to), call)
}

fn copying(from: c_int, to: c_int, flags: c_uint) -> (c_int, FileCall) {
    let (fd, other) = if is_file(from) { (from, to) } else { (to, from) };
    (fd, FileCall::CopyRange { other, same_kind: is_file(other), flags })
}

/// A call that may change what the kernel keeps about mappings.
fn flags_changed<T: Copy>(result: T) -> T {
    tell(Process::flags_changed);
    result
}

fn duplicated(fd: c_int, copy: c_int) -> c_int {
    if copy >= 0 {
        tell(|process| process.duplicated(fd, copy));
    }
    copy
}

/// A guest_memfd's inode has one link; the memfd that stands for it has none.
///
/// # Safety
/// `stat` must have been filled if `result` is 0.
unsafe fn patch<T: Copy + PartialEq + From<u8>>(fd: c_int, stat: *mut libc::stat, result: T) -> T {
    if result == T::from(0) && is_file(fd) {
        // SAFETY: filled by the call that returned 0.
        unsafe { (*stat).st_nlink = 1 };
    }
    result
}

/// The same where a path names the file. Only what has no link needs a second look.
///
/// # Safety
/// As [`patch`].
unsafe fn patch_at<T: Copy + PartialEq + From<u8>>(
    (dir, path, flags): (c_int, *const c_char, c_int),
    stat: *mut libc::stat,
    result: T,
) -> T {
    // SAFETY: of the caller.
    unsafe {
        if result == T::from(0) && (*stat).st_nlink == 0 {
            return patch(file_named_at(dir, path, flags), stat, result);
        }
    }
    result
}

/// The same for `statx`.
///
/// # Safety
/// As [`patch`].
unsafe fn patch_x<T: Copy + PartialEq + From<u8>>(
    (dir, path, flags): (c_int, *const c_char, c_int),
    stat: *mut libc::statx,
    result: T,
) -> T {
    // SAFETY: filled by the call that returned 0.
    unsafe {
        if result == T::from(0) && (*stat).stx_nlink == 0 && is_file(file_named_at(dir, path, flags)) {
            (*stat).stx_nlink = 1;
        }
    }
    result
}

/// Whether a path is that of a guest_memfd and these flags would open it again, which the file refuses.
fn opens_file(path: *const c_char, flags: c_int) -> bool {
    // These do not come as far as the file: the name is opened, or it is refused for what it is.
    const OTHER: c_int = libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY;
    const NEW: c_int = libc::O_CREAT | libc::O_EXCL;
    flags & OTHER == 0 && flags & NEW != NEW && file_named(path) >= 0
}

/// Whether `readlink` would give the name of a guest_memfd. The kernel takes the size for an int, and refuses none first.
fn reads_name(path: *const c_char, size: size_t) -> bool {
    size as c_int > 0 && file_named(path) >= 0
}

/// What /proc/self/fd says of a guest_memfd; like readlink, cut and without a terminator.
///
/// # Safety
/// As the buffer of `readlink`.
unsafe fn give_name(buffer: *mut c_char, size: size_t) -> ssize_t {
    let given = own(Err(Errno::IO), || {
        let name = process().map_or("", Process::file_name).as_bytes();
        let name = &name[..name.len().min(size)];
        gmem_host::sys::copy_to_client(buffer.addr(), name).map(|()| name.len() as ssize_t)
    });
    give(Answer::Done(given), || -1)
}

fn refuse<T: crate::Returned>() -> T {
    crate::set_errno(Errno::NXIO);
    T::FAILED
}
