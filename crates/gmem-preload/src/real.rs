//! The functions that this library stands in front of.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{FILE, mode_t, off_t, pid_t, size_t, ssize_t};

fn next(cache: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = cache.load(Ordering::Relaxed);
    if !known.is_null() {
        return known;
    }
    // SAFETY: the name is a C string; RTLD_NEXT looks in the objects after this one.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    cache.store(found, Ordering::Relaxed);
    found
}

macro_rules! real {
    ($($(#[$meta:meta])* $name:ident($($arg:ident: $type:ty),* $(,)?) -> $ret:ty;)*) => {
        $(
            /// # Safety
            /// As the function of this name in libc.
            $(#[$meta])*
            pub(crate) unsafe fn $name($($arg: $type),*) -> $ret {
                static CACHE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
                let name = const {
                    match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => c"",
                    }
                };
                let found = next(&CACHE, name);
                if found.is_null() {
                    crate::set_errno(gmem_uapi::Errno::NOSYS);
                    return <$ret as crate::Returned>::FAILED;
                }
                // SAFETY: libc's function of this name has this type on x86-64; the arguments are the caller's.
                unsafe {
                    let function: unsafe extern "C-unwind" fn($($type),*) -> $ret = std::mem::transmute(found);
                    function($($arg),*)
                }
            }
        )*
    };
}

real! {
    ioctl(fd: c_int, request: c_ulong, arg: usize) -> c_int;
    close(fd: c_int) -> c_int;
    close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    fclose(stream: *mut FILE) -> c_int;
    freopen64(path: *const c_char, mode: *const c_char, stream: *mut FILE) -> *mut FILE;
    dup(fd: c_int) -> c_int;
    dup2(fd: c_int, copy: c_int) -> c_int;
    dup3(fd: c_int, copy: c_int, flags: c_int) -> c_int;
    fcntl64(fd: c_int, command: c_int, arg: usize) -> c_int;
    mmap64(address: usize, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> usize;
    munmap(address: usize, len: size_t) -> c_int;
    mprotect(address: usize, len: size_t, prot: c_int) -> c_int;
    pkey_mprotect(address: usize, len: size_t, prot: c_int, key: c_int) -> c_int;
    mremap(address: usize, old: size_t, new: size_t, flags: c_int, target: usize) -> usize;
    madvise(address: usize, len: size_t, advice: c_int) -> c_int;
    mlock(address: usize, len: size_t) -> c_int;
    mlock2(address: usize, len: size_t, flags: c_uint) -> c_int;
    munlock(address: usize, len: size_t) -> c_int;
    mlockall(flags: c_int) -> c_int;
    munlockall() -> c_int;
    read(fd: c_int, buffer: *mut c_void, count: size_t) -> ssize_t;
    write(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t;
    readv(fd: c_int, vectors: *const c_void, count: c_int) -> ssize_t;
    writev(fd: c_int, vectors: *const c_void, count: c_int) -> ssize_t;
    pread64(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t) -> ssize_t;
    pwrite64(fd: c_int, buffer: *const c_void, count: size_t, offset: off_t) -> ssize_t;
    preadv64(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t;
    pwritev64(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t) -> ssize_t;
    preadv64v2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t;
    pwritev64v2(fd: c_int, vectors: *const c_void, count: c_int, offset: off_t, flags: c_int) -> ssize_t;
    lseek64(fd: c_int, offset: off_t, whence: c_int) -> off_t;
    ftruncate64(fd: c_int, len: off_t) -> c_int;
    fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int;
    fsync(fd: c_int) -> c_int;
    fdatasync(fd: c_int) -> c_int;
    fchmod(fd: c_int, mode: mode_t) -> c_int;
    fchown(fd: c_int, owner: c_uint, group: c_uint) -> c_int;
    futimens(fd: c_int, times: *const c_void) -> c_int;
    utimensat(dir: c_int, path: *const c_char, times: *const c_void, flags: c_int) -> c_int;
    futimes(fd: c_int, times: *const c_void) -> c_int;
    futimesat(dir: c_int, path: *const c_char, times: *const c_void) -> c_int;
    utimes(path: *const c_char, times: *const c_void) -> c_int;
    utime(path: *const c_char, times: *const c_void) -> c_int;
    chmod(path: *const c_char, mode: mode_t) -> c_int;
    fchmodat(dir: c_int, path: *const c_char, mode: mode_t, flags: c_int) -> c_int;
    chown(path: *const c_char, owner: c_uint, group: c_uint) -> c_int;
    fchownat(dir: c_int, path: *const c_char, owner: c_uint, group: c_uint, flags: c_int) -> c_int;
    truncate64(path: *const c_char, len: off_t) -> c_int;
    fgetxattr(fd: c_int, name: *const c_char, value: *mut c_void, size: size_t) -> ssize_t;
    fsetxattr(fd: c_int, name: *const c_char, value: *const c_void, size: size_t, flags: c_int) -> c_int;
    fremovexattr(fd: c_int, name: *const c_char) -> c_int;
    readahead(fd: c_int, offset: off_t, count: size_t) -> ssize_t;
    posix_fallocate64(fd: c_int, offset: off_t, len: off_t) -> c_int;
    sendfile64(to: c_int, from: c_int, offset: *mut c_void, count: size_t) -> ssize_t;
    splice(from: c_int, from_offset: *mut c_void, to: c_int, to_offset: *mut c_void, len: size_t, flags: c_uint) -> ssize_t;
    copy_file_range(from: c_int, from_offset: *mut c_void, to: c_int, to_offset: *mut c_void, len: size_t, flags: c_uint) -> ssize_t;
    fstat64(fd: c_int, stat: *mut libc::stat) -> c_int;
    __fxstat64(version: c_int, fd: c_int, stat: *mut libc::stat) -> c_int;
    fstatat64(dir: c_int, path: *const c_char, stat: *mut libc::stat, flags: c_int) -> c_int;
    statx(dir: c_int, path: *const c_char, flags: c_int, mask: c_uint, stat: *mut libc::statx) -> c_int;
    open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    openat64(dir: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    creat64(path: *const c_char, mode: mode_t) -> c_int;
    fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE;
    readlink(path: *const c_char, buffer: *mut c_char, size: size_t) -> ssize_t;
    readlinkat(dir: c_int, path: *const c_char, buffer: *mut c_char, size: size_t) -> ssize_t;
    #[expect(non_snake_case, reason = "libc's name for it")]
    _Fork() -> pid_t;
    clone(function: usize, stack: usize, flags: c_int, arg: usize, parent_tid: usize, tls: usize, child_tid: usize) -> c_int;
    __read_chk(fd: c_int, buffer: *mut c_void, count: size_t, room: size_t) -> ssize_t;
    __pread64_chk(fd: c_int, buffer: *mut c_void, count: size_t, offset: off_t, room: size_t) -> ssize_t;
    __readlink_chk(path: *const c_char, buffer: *mut c_char, size: size_t, room: size_t) -> ssize_t;
    __readlinkat_chk(dir: c_int, path: *const c_char, buffer: *mut c_char, size: size_t, room: size_t) -> ssize_t;
    __open64_2(path: *const c_char, flags: c_int) -> c_int;
    __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int;
    syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long;
}

/// Looks up what may be called where looking up is not allowed: in signal handlers, after fork, under a seccomp filter.
pub(crate) fn resolve_all() {
    // SAFETY: calls that fail at once and change nothing: a descriptor that cannot exist, an empty range, no function.
    unsafe {
        let _ = ioctl(-1, 0, 0);
        let _ = close(-1);
        let _ = dup2(-1, -1);
        let _ = dup3(-1, -1, 0);
        let _ = read(-1, std::ptr::null_mut(), 0);
        let _ = write(-1, std::ptr::null(), 0);
        let _ = madvise(0, 0, 0);
        let _ = munmap(1, 0);
        let _ = clone(0, 0, 0, 0, 0, 0, 0);
        let _ = syscall(-1, 0, 0, 0, 0, 0, 0);
    }
}
