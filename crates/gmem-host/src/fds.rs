//! Descriptors that a client does not notice.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Moves a descriptor out of the way of the client's numbering: the kernel gives clients the lowest free number, and some
/// depend on it.
///
/// # Errors
/// EMFILE if the process has no number left; the original is closed in any case.
#[expect(clippy::needless_pass_by_value, reason = "the original must not stay open")]
pub fn hide(fd: OwnedFd) -> Result<OwnedFd, Errno> {
    hidden_copy(fd.as_fd())
}

/// A second descriptor for `fd`, out of the way likewise.
///
/// # Errors
/// EMFILE.
pub fn hidden_copy(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u16::MAX));
    let limit = i32::try_from(limit.min(1 << 16)).unwrap_or(1 << 16);
    let high = (limit - limit / 8).max(3);
    rustix::io::fcntl_dupfd_cloexec(fd, high).or_else(|_| rustix::io::fcntl_dupfd_cloexec(fd, 3))
}

/// Gives a new file its size. The process's file size limit, which no guest_memfd has, is lifted meanwhile.
///
/// # Errors
/// EFBIG beyond a limit that may not be lifted; the kernel would also send SIGXFSZ.
pub(crate) fn set_size(fd: &OwnedFd, size: u64) -> Result<(), Errno> {
    let limit = getrlimit(Resource::Fsize);
    let allows = |most: Option<u64>| most.is_none_or(|most| size <= most);
    match (allows(limit.current), allows(limit.maximum)) {
        (true, _) => rustix::fs::ftruncate(fd, size),
        (false, false) => Err(Errno::FBIG),
        (false, true) => {
            setrlimit(Resource::Fsize, Rlimit { current: limit.maximum, ..limit })?;
            let done = rustix::fs::ftruncate(fd, size);
            setrlimit(Resource::Fsize, limit)?;
            done
        }
    }
}

/// The descriptor that a client gets for a guest_memfd: it has the right size and no content, and nothing can be done with
/// it that would give it any. Not close-on-exec, as the kernel's is not.
///
/// # Errors
/// EMFILE, ENFILE, ENOMEM; EFBIG beyond a file size limit of the process's that it may not lift.
pub fn placeholder(size: u64) -> Result<OwnedFd, Errno> {
    let fd = rustix::fs::memfd_create("kvm-gmem", MemfdFlags::ALLOW_SEALING)?;
    set_size(&fd, size)?;
    rustix::fs::fchmod(&fd, Mode::RUSR | Mode::WUSR)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals)?;
    Ok(fd)
}
