//! guest_memfd files: creation, the ordinary system calls, mappings.

use super::host::{in_child, len};
use super::{FileMapping, World};
use crate::ops::{DupHow, FileCall};
use crate::sys::{self, CreateGmem, Errno, Sys, check, off};
use crate::transcript::{bytes, descriptor, result};

impl World {
    pub(super) fn file_create(&mut self, vm: usize, file: usize, size: u64, flags: u64, reserved: u64) -> String {
        self.forget(file);
        let mut claim = CreateGmem { size, flags, reserved: [reserved; 6] };
        let created = sys::ioctl(self.vm_fd(vm), sys::KVM_CREATE_GUEST_MEMFD, &mut claim);
        self.files[file] = created.map_or(-1, sys::fd_of);
        descriptor(created)
    }

    fn forget(&mut self, file: usize) {
        if self.files[file] != -1 {
            let _ = sys::close(std::mem::replace(&mut self.files[file], -1));
        }
    }

    pub(super) fn file_close(&mut self, file: usize) -> String {
        result(sys::close(std::mem::replace(&mut self.files[file], -1)))
    }

    pub(super) fn file_dup(&mut self, from: usize, to: usize, how: DupHow) -> String {
        let (old, target) = (self.files[from], self.files[to]);
        // SAFETY: descriptors only; dup3 replaces one that this world owns.
        let new = check(unsafe {
            match how {
                DupHow::Dup => libc::dup(old),
                DupHow::DupFd => libc::fcntl(old, libc::F_DUPFD, 3),
                DupHow::DupFdCloexec => libc::fcntl(old, libc::F_DUPFD_CLOEXEC, 3),
                DupHow::Dup3 if target == -1 => libc::dup(old),
                DupHow::Dup3 => libc::dup3(old, target, libc::O_CLOEXEC),
            }
        });
        if let Ok(new) = new.map(sys::fd_of)
            && new != target
        {
            self.forget(to);
            self.files[to] = new;
        }
        descriptor(new)
    }

    pub(super) fn fallocate(&self, file: usize, mode: u64, offset: u64, len: u64) -> String {
        result(fallocate(self.files[file], i32::try_from(mode).unwrap_or(0), offset, len))
    }

    pub(super) fn file_call(&self, fd: i32, call: FileCall) -> String {
        use FileCall as C;
        let mut buffer = [0x5a_u8; 64];
        let at = buffer.as_mut_ptr().cast::<libc::c_void>();
        let vector = libc::iovec { iov_base: at, iov_len: 16 };
        // SAFETY: every address is that of the buffer or the vector, with lengths inside them.
        unsafe {
            match call {
                C::Fstat => fstat(fd).map_or_else(|errno| errno.to_string(), |s| stat_line(&s)),
                C::Statx => statx(fd),
                C::Read(n) => result(check(libc::read(fd, at, n) as i64)),
                C::Write(n) => result(check(libc::write(fd, at, n) as i64)),
                C::Pread => result(check(libc::pread(fd, at, 8, 0) as i64)),
                C::Pwrite => result(check(libc::pwrite(fd, at, 8, 0) as i64)),
                C::Readv => result(check(libc::readv(fd, &raw const vector, 1) as i64)),
                C::Writev => result(check(libc::writev(fd, &raw const vector, 1) as i64)),
                C::Preadv => result(check(libc::preadv(fd, &raw const vector, 1, 0) as i64)),
                C::Pwritev => result(check(libc::pwritev(fd, &raw const vector, 1, 0) as i64)),
                C::Lseek(whence) => result(check(libc::lseek(fd, 0, whence))),
                C::Ftruncate(size) => result(check(libc::ftruncate(fd, off(size.0)))),
                C::Fsync => result(check(libc::fsync(fd))),
                C::Fdatasync => result(check(libc::fdatasync(fd))),
                C::Fchmod => result(check(libc::fchmod(fd, 0o644))),
                C::Futimens => result(check(libc::futimens(fd, std::ptr::null()))),
                C::GetFd => result(check(libc::fcntl(fd, libc::F_GETFD))),
                C::GetFl => result(check(libc::fcntl(fd, libc::F_GETFL))),
                C::GetSeals => result(check(libc::fcntl(fd, libc::F_GET_SEALS))),
                C::AddSeals => result(check(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_GROW))),
                C::ReOpen => self.re_open(fd),
                C::Name => name(fd),
                C::Ioctl(nr) => result(sys::ioctl_value(fd, nr.0, 0)),
                C::Poll => poll(fd),
                C::SendfileFrom => through_pipe(|_, write| libc::sendfile(write, fd, std::ptr::null_mut(), 16) as i64),
                C::SendfileTo => result(check(libc::sendfile(fd, self.memfd, &mut 0, 16) as i64)),
                C::SpliceFrom => through_pipe(|_, write| splice(fd, write)),
                C::SpliceTo => through_pipe(|read, _| splice(read, fd)),
                C::CopyRangeFrom => result(check(libc::copy_file_range(fd, &mut 0, self.memfd, &mut 0, 16, 0) as i64)),
                C::CopyRangeTo => result(check(libc::copy_file_range(self.memfd, &mut 0, fd, &mut 0, 16, 0) as i64)),
            }
        }
    }

    fn re_open(&self, fd: i32) -> String {
        match sys::open(&format!("/proc/self/fd/{fd}"), libc::O_RDWR) {
            Err(errno) => errno.to_string(),
            Ok(new) => {
                let _ = sys::close(new);
                "ok".into()
            }
        }
    }

    pub(super) fn file_map(&mut self, map: usize, fd: i32, range: (u64, u64), shared: bool, write: bool) -> String {
        self.file_unmap(map);
        let prot = libc::PROT_READ | if write { libc::PROT_WRITE } else { 0 };
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // SAFETY: not a fixed mapping.
        let mapped = unsafe { sys::mmap(0, len(range.1), prot, flags, fd, range.0) };
        if let Ok(at) = mapped {
            self.maps[map] = Some(FileMapping { at, len: len(range.1), write });
        }
        descriptor(mapped.map(|_| 0))
    }

    pub(super) fn file_unmap(&mut self, map: usize) -> String {
        let Some(gone) = self.maps[map].take() else { return "absent".into() };
        // SAFETY: nothing refers to the mapping any more.
        unsafe { sys::munmap(gone.at, gone.len) };
        "ok".into()
    }

    fn mapped(&self, map: usize, offset: u64) -> Option<(usize, bool)> {
        let map = self.maps[map].as_ref()?;
        (len(offset) + 8 <= map.len).then(|| (map.at + len(offset), map.write))
    }

    /// Reads through a pipe, so that a page that cannot be had is EFAULT and not a signal.
    pub(super) fn map_read(&self, map: usize, offset: u64) -> String {
        let Some((at, _)) = self.mapped(map, offset) else { return "absent".into() };
        let mut got = [0_u8; 8];
        let outcome = through_pipe(|read, write| {
            // SAFETY: the kernel copies from the mapping or refuses; `got` has eight bytes.
            unsafe {
                match libc::write(write, at as *const libc::c_void, 8) {
                    8 => libc::read(read, got.as_mut_ptr().cast(), 8) as i64,
                    other => other as i64,
                }
            }
        });
        format!("{outcome} {}", bytes(&got))
    }

    pub(super) fn map_write(&self, map: usize, offset: u64, value: u8) -> String {
        let Some((at, _)) = self.mapped(map, offset) else { return "absent".into() };
        through_pipe(|read, write| {
            // SAFETY: the kernel copies into the mapping or refuses.
            unsafe {
                libc::write(write, [value; 8].as_ptr().cast(), 8);
                libc::read(read, at as *mut libc::c_void, 8) as i64
            }
        })
    }

    /// Touches a page directly, in a child, because it may be a signal.
    pub(super) fn map_touch(&self, map: usize, offset: u64) -> String {
        let Some((at, write)) = self.mapped(map, offset) else { return "absent".into() };
        let end = in_child(|| {
            // SAFETY: inside a mapping that exists; the child may die of it.
            unsafe {
                let value = (at as *const u8).read_volatile();
                if write {
                    (at as *mut u8).write_volatile(value);
                }
                i32::from(value)
            }
        });
        match end {
            Err(errno) => format!("fork {errno}"),
            Ok(Ok(value)) => format!("byte {value:02x}"),
            Ok(Err(libc::SIGBUS)) => "SIGBUS".into(),
            Ok(Err(libc::SIGSEGV)) => "SIGSEGV".into(),
            Ok(Err(signal)) => format!("signal {signal}"),
        }
    }
}

/// `fallocate`.
pub(super) fn fallocate(fd: i32, mode: i32, offset: u64, len: u64) -> Sys<i64> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::fallocate(fd, mode, off(offset), off(len)) })
}

/// `fstat`.
pub(super) fn fstat(fd: i32) -> Sys<libc::stat> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: a place for the result, whose fields are integers and were zeroed.
    unsafe {
        check(libc::fstat(fd, stat.as_mut_ptr()))?;
        Ok(stat.assume_init())
    }
}

/// Whether a slot of this file takes all its memory from the file: a file that can be mapped does.
pub(super) fn is_mappable(fd: i32) -> bool {
    // SAFETY: not a fixed mapping, and gone at once.
    unsafe {
        let mapped = sys::mmap(0, 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
        mapped.is_ok_and(|at| {
            sys::munmap(at, 4096);
            true
        })
    }
}

fn stat_line(s: &libc::stat) -> String {
    format!(
        "mode {:o} size {:#x} blksize {} blocks {} nlink {}",
        s.st_mode, s.st_size, s.st_blksize, s.st_blocks, s.st_nlink
    )
}

fn statx(fd: i32) -> String {
    let mut s = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path and a place for the result, whose fields are integers and were zeroed.
    let (outcome, s) = unsafe {
        let outcome =
            check(libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_BASIC_STATS, s.as_mut_ptr()));
        (outcome, s.assume_init())
    };
    match outcome {
        Err(errno) => errno.to_string(),
        Ok(_) => format!(
            "mode {:o} size {:#x} blksize {} blocks {} nlink {}",
            s.stx_mode, s.stx_size, s.stx_blksize, s.stx_blocks, s.stx_nlink
        ),
    }
}

fn name(fd: i32) -> String {
    match std::fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(link) => link.display().to_string(),
        Err(error) => Errno(error.raw_os_error().unwrap_or(0)).to_string(),
    }
}

fn poll(fd: i32) -> String {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN | libc::POLLOUT, revents: 0 };
    // SAFETY: one structure.
    let outcome = check(unsafe { libc::poll(&raw mut poll, 1, 0) });
    format!("{} events {:#x}", result(outcome), poll.revents)
}

fn splice(from: i32, to: i32) -> i64 {
    // SAFETY: no offsets are passed.
    unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), 8, libc::SPLICE_F_NONBLOCK) as i64 }
}

/// Runs a call that needs a fresh pipe; the function's -1 means errno.
fn through_pipe(act: impl FnOnce(i32, i32) -> i64) -> String {
    let [read, write] = match sys::pipe() {
        Ok(ends) => ends,
        Err(errno) => return format!("pipe {errno}"),
    };
    let outcome = check(act(read, write));
    let (_, _) = (sys::close(read), sys::close(write));
    result(outcome)
}
