//! Host memory that shared slots show to the guest, and what a forked child may do.

use super::World;
use crate::agent::WINDOW_LEN;
use crate::machine::Mapping;
use crate::ops::{Area, Child, Discard};
use crate::sys::{self, Attributes, CreateGmem, Errno, Sys};
use crate::transcript::{bytes, result};

/// One area; a memfd behind it lives as long as its mapping.
pub(super) struct HostArea {
    pub(super) map: Mapping,
}

impl HostArea {
    pub(super) fn new(area: Area) -> Sys<Self> {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let (prot, flags) = match area {
            Area::Anonymous => (rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            Area::Memfd => return Self::memfd(),
            Area::SharedAnonymous => (rw, libc::MAP_SHARED | libc::MAP_ANONYMOUS),
            Area::ReadOnly => (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
            Area::NoAccess => (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        let map = Mapping::new(len(WINDOW_LEN), prot, flags, -1)?;
        if area == Area::Anonymous {
            // A kernel without huge pages refuses; nothing depends on it.
            let _ = map.advise(0, map.len, libc::MADV_HUGEPAGE);
        }
        Ok(Self { map })
    }

    fn memfd() -> Sys<Self> {
        let fd = sys::memfd(len(WINDOW_LEN))?;
        let map = Mapping::new(len(WINDOW_LEN), libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd);
        sys::close(fd)?;
        Ok(Self { map: map? })
    }
}

impl World {
    fn area(&self, vm: usize, area: Area) -> Option<&Mapping> {
        Some(&self.vms[vm].as_ref()?.areas[area as usize].map)
    }

    pub(super) fn host_read(&self, vm: usize, area: Area, offset: u64, size: u64) -> String {
        self.area(vm, area).map_or("absent".into(), |map| bytes(&map.read(len(offset), len(size))))
    }

    pub(super) fn host_write(&self, vm: usize, area: Area, offset: u64, size: u64, value: u8) -> String {
        let Some(map) = self.area(vm, area) else { return "absent".into() };
        map.fill(len(offset), len(size), value);
        "ok".into()
    }

    pub(super) fn host_discard(&self, vm: usize, area: Area, offset: u64, size: u64, how: Discard) -> String {
        let advice = match how {
            Discard::DontNeed => libc::MADV_DONTNEED,
            Discard::Remove => libc::MADV_REMOVE,
            Discard::Free => libc::MADV_FREE,
        };
        self.area(vm, area).map_or("absent".into(), |map| result(map.advise(len(offset), len(size), advice)))
    }

    pub(super) fn fork(&self, vm: usize, file: usize, child: Child) -> String {
        let (vm, vcpu, file) = (self.vm_fd(vm), self.vcpu_fd(vm), self.files[file]);
        in_child(|| match inherit(vm, vcpu, file, child) {
            Ok(_) => 0,
            Err(Errno(errno)) => errno,
        })
        .map_or_else(
            |errno| format!("fork {errno}"),
            |end| match end {
                Ok(0) => "child ok".into(),
                Ok(errno) => format!("child {}", Errno(errno)),
                Err(signal) => format!("child signal {signal}"),
            },
        )
    }
}

fn inherit(vm: i32, vcpu: i32, file: i32, child: Child) -> Sys<i64> {
    let page = 4096;
    match child {
        Child::Attributes => {
            let mut claim = Attributes { address: 1 << 30, size: page, ..Default::default() };
            sys::ioctl(vm, sys::KVM_SET_MEMORY_ATTRIBUTES, &mut claim)
        }
        Child::CreateGmem => {
            sys::ioctl(vm, sys::KVM_CREATE_GUEST_MEMFD, &mut CreateGmem { size: page, ..Default::default() })
        }
        Child::Allocate => super::file::fallocate(file, 1, 0, page),
        Child::Punch => super::file::fallocate(file, 3, 0, page),
        Child::Fstat => super::file::fstat(file).map(|_| 0),
        Child::Run => sys::ioctl_value(vcpu, sys::KVM_RUN, 0),
    }
}

/// Runs a function in a forked child: its value (0..=255), or the signal that ended it.
pub(super) fn in_child(act: impl FnOnce() -> i32) -> Sys<Result<i32, i32>> {
    // SAFETY: this mode has one thread; the child only makes system calls and ends without running destructors.
    let pid = unsafe {
        match libc::fork() {
            0 => libc::_exit(act()),
            pid => sys::fd_of(sys::check(pid)?),
        }
    };
    let mut status = 0;
    // SAFETY: a place for the status.
    while let Err(errno) = sys::check(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
        if errno.0 != libc::EINTR {
            return Err(errno);
        }
    }
    if libc::WIFSIGNALED(status) { Ok(Err(libc::WTERMSIG(status))) } else { Ok(Ok(libc::WEXITSTATUS(status))) }
}

/// A length or offset inside the window, as a memory size.
pub(super) fn len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
