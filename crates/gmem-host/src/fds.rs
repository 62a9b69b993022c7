//! Descriptors that a client does not notice.

use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicU64, Ordering};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A descriptor of gmem's own in the client's process. A client that closes all descriptors it does not know, as daemons and
/// jailers do, does not close this one: whoever stands in front of `close` asks [`next_hidden`].
#[derive(Debug)]
pub struct Hidden(ManuallyDrop<OwnedFd>);

/// Numbers that are hidden, a bit each. [`hidden_copy`] asks for none beyond.
static NUMBERS: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

/// The first hidden number in `first..=last`.
#[must_use]
pub fn next_hidden(first: u32, last: u32) -> Option<u32> {
    let word_of = |number: u32| number / 64;
    let words = (word_of(first)..=word_of(last)).zip(NUMBERS.get(word_of(first) as usize..)?);
    words.into_iter().find_map(|(at, word)| {
        let below = if at == word_of(first) { (1 << (first % 64)) - 1 } else { 0 };
        let found = word.load(Ordering::Relaxed) & !below;
        (found != 0).then(|| at * 64 + found.trailing_zeros()).filter(|number| *number <= last)
    })
}

impl Hidden {
    fn new(fd: OwnedFd) -> Self {
        mark(&fd, |word, bit| word.fetch_or(bit, Ordering::Relaxed));
        Self(ManuallyDrop::new(fd))
    }

    /// Makes it a descriptor of what `fd` is one of, for which no new number is needed.
    ///
    /// # Errors
    /// None is expected; passed on if there is one.
    pub fn become_copy_of(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        rustix::io::dup3(fd, &mut self.0, rustix::io::DupFlags::CLOEXEC)
    }
}

impl AsFd for Hidden {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        mark(&self.0, |word, bit| word.fetch_and(!bit, Ordering::Relaxed));
        // SAFETY: the value is not used any more.
        close(unsafe { ManuallyDrop::take(&mut self.0) });
    }
}

/// Closes a descriptor by a system call of gmem's own: the standard library goes by libc's `close`, which a client's filter
/// may forbid.
fn close(fd: OwnedFd) {
    // SAFETY: the descriptor was owned, and is not any more.
    unsafe { rustix::io::close(fd.into_raw_fd()) };
}

fn mark(fd: &OwnedFd, change: impl FnOnce(&AtomicU64, u64) -> u64) {
    let Ok(number) = usize::try_from(fd.as_raw_fd()) else { return };
    if let Some(word) = NUMBERS.get(number / 64) {
        change(word, 1 << (number % 64));
    }
}

/// Moves a descriptor out of the way of the client's numbering: the kernel gives clients the lowest free number, and some
/// depend on it.
///
/// # Errors
/// EMFILE if the process has no number left; the original is closed in any case.
pub fn hide(fd: OwnedFd) -> Result<Hidden, Errno> {
    let hidden = hidden_copy(fd.as_fd());
    close(fd);
    hidden
}

/// A second descriptor for `fd`, out of the way likewise.
///
/// # Errors
/// EMFILE.
pub fn hidden_copy(fd: BorrowedFd<'_>) -> Result<Hidden, Errno> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u16::MAX));
    let limit = i32::try_from(limit.min(1 << 16)).unwrap_or(1 << 16);
    let high = (limit - limit / 8).max(3);
    let copy = rustix::io::fcntl_dupfd_cloexec(fd, high).or_else(|_| rustix::io::fcntl_dupfd_cloexec(fd, 3));
    copy.map(Hidden::new)
}

/// Gives a new file its size. The process's file size limit, which no guest_memfd has, is lifted meanwhile.
///
/// # Errors
/// EFBIG beyond a limit that may not be lifted; the kernel would also send SIGXFSZ.
pub(crate) fn set_size(fd: impl AsFd, size: u64) -> Result<(), Errno> {
    let limit = getrlimit(Resource::Fsize);
    let allows = |most: Option<u64>| most.is_none_or(|most| size <= most);
    match (allows(limit.current), allows(limit.maximum)) {
        (true, _) => rustix::fs::ftruncate(&fd, size),
        (false, false) => Err(Errno::FBIG),
        (false, true) => {
            setrlimit(Resource::Fsize, Rlimit { current: limit.maximum, ..limit })?;
            let done = rustix::fs::ftruncate(&fd, size);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_numbers_are_known_as_long_as_they_are_open() {
        let file = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC).unwrap();
        let mut hidden = hidden_copy(file.as_fd()).unwrap();
        let number = hidden.as_fd().as_raw_fd().cast_unsigned();
        hidden.become_copy_of(file.as_fd()).unwrap();
        assert_eq!(next_hidden(number, number), Some(number));
        assert!(next_hidden(0, u32::MAX).is_some_and(|first| first <= number));
        assert_ne!(next_hidden(number + 1, u32::MAX), Some(number));
        assert_eq!(next_hidden(1 << 16, u32::MAX), None);
        drop(hidden);
        assert_ne!(next_hidden(number, number), Some(number));
    }
}
