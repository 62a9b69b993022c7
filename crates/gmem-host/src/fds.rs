//! Descriptors that a client does not notice.

use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{Timespec, nanosleep};

use crate::sys::{self, SignalsBlocked};

/// A descriptor of gmem's own in the client's process. A client that closes all descriptors it does not know, as daemons and
/// jailers do, does not close this one: whoever stands in front of `close` asks [`next_hidden`]. And where the client puts one of
/// its own this one moves away ([`make_way`]).
#[derive(Debug)]
pub struct Hidden(Arc<Place>);

#[derive(Debug)]
struct Place {
    number: AtomicI32,
    /// Those who use the number that they have found here.
    users: AtomicUsize,
}

/// A hidden descriptor in use. It stays where it is, so this must not be kept: a client may wait for the number.
#[derive(Debug)]
pub struct Held<'a> {
    place: &'a Place,
    fd: BorrowedFd<'a>,
}

/// Numbers that are hidden, a bit each. [`hidden_copy`] asks for none beyond.
static NUMBERS: [AtomicU64; 1024] = [const { AtomicU64::new(0) }; 1024];

/// Whose they are. A number that a descriptor has left stays until it is known to have no user.
static PLACES: Mutex<BTreeMap<i32, Arc<Place>>> = Mutex::new(BTreeMap::new());

/// Keeps hidden descriptors from being made, moved and closed.
#[derive(Debug)]
pub struct Changes {
    places: MutexGuard<'static, BTreeMap<i32, Arc<Place>>>,
    _signals: SignalsBlocked,
}

/// Waits until no hidden descriptor is being made, moved or closed, and keeps others from it.
#[must_use]
pub fn changes() -> Changes {
    let signals = SignalsBlocked::new();
    Changes { places: PLACES.lock().unwrap_or_else(PoisonError::into_inner), _signals: signals }
}

impl Changes {
    fn add(&mut self, fd: OwnedFd, place: &Arc<Place>) -> i32 {
        let number = fd.into_raw_fd();
        mark(number, |word, bit| word.fetch_or(bit, Ordering::Relaxed));
        self.places.insert(number, Arc::clone(place));
        number
    }

    fn remove(&mut self, number: i32) {
        self.places.remove(&number);
        mark(number, |word, bit| word.fetch_and(!bit, Ordering::Relaxed));
    }
}

/// The process is a child of fork: of the threads that use hidden descriptors it has none.
pub fn is_child() {
    changes().places.values().for_each(|place| place.users.store(0, Ordering::Relaxed));
}

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
    /// Hides a descriptor where it is.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        let place = Arc::new(Place { number: AtomicI32::new(fd.as_raw_fd()), users: AtomicUsize::new(0) });
        changes().add(fd, &place);
        Self(place)
    }

    /// Its number, which may have changed by the time it is looked at.
    #[must_use]
    pub fn number(&self) -> i32 {
        self.0.number.load(Ordering::Acquire)
    }

    /// The descriptor, to be used now.
    #[must_use]
    pub fn hold(&self) -> Held<'_> {
        // SeqCst here and for the number, as in `make_way`: either this finds the new number, or its user is seen there.
        self.0.users.fetch_add(1, Ordering::SeqCst);
        let number = self.0.number.load(Ordering::SeqCst);
        // SAFETY: open as long as there is a user who has found the number here.
        Held { place: &self.0, fd: unsafe { BorrowedFd::borrow_raw(number) } }
    }

    /// Makes a call that may last as long as it likes, and that no other kind of file knows: if the client's file was met where
    /// the descriptor had been a moment ago, it is made again.
    ///
    /// # Errors
    /// Those of `call`.
    pub fn call<T>(&self, call: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>) -> Result<T, Errno> {
        loop {
            let number = self.number();
            // SAFETY: what is not gmem's by now refuses the call.
            match call(unsafe { BorrowedFd::borrow_raw(number) }) {
                Err(error) if error != Errno::INTR && self.number() != number => {}
                result => return result,
            }
        }
    }

    /// Makes it a descriptor of what `fd` is one of, for which no new number is needed.
    ///
    /// # Errors
    /// None is expected; passed on if there is one.
    pub fn become_copy_of(&mut self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let _changes = changes();
        // SAFETY: gmem's own, and not closed.
        let mut own = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.number()) });
        rustix::io::dup3(fd, &mut own, rustix::io::DupFlags::CLOEXEC)
    }
}

impl AsFd for Held<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        // Release: who sees no user is after what it did.
        self.place.users.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let mut changes = changes();
        let number = self.number();
        changes.remove(number);
        // SAFETY: gmem's own, and nobody has it any more.
        close(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

impl Place {
    fn is_unused(&self) -> bool {
        /// Calls on descriptors that are held end soon, unless the caller interrupted one itself.
        const PATIENCE: u32 = 1000;
        const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        (0..PATIENCE).any(|_| {
            let unused = self.users.load(Ordering::SeqCst) == 0;
            if !unused {
                let _ = nanosleep(&PAUSE);
            }
            unused
        })
    }
}

/// Puts the client's descriptor at `number` by `replace`, which is dup2 or dup3 and returns less than 0 if it fails. A hidden one
/// that is there moves away first.
///
/// # Errors
/// EMFILE if the process has no number left for that, EBUSY if the hidden one stays in use.
pub fn make_way(number: i32, replace: impl FnOnce() -> i32) -> Result<i32, Errno> {
    let mut changes = changes();
    let Some(place) = changes.places.get(&number).map(Arc::clone) else {
        drop(changes);
        return Ok(replace());
    };
    // SAFETY: gmem's own until it is replaced below.
    let old = unsafe { BorrowedFd::borrow_raw(number) };
    if place.number.load(Ordering::Relaxed) == number {
        let copy = copy_out_of_the_way(old)?;
        rustix::io::fcntl_setfd(&copy, rustix::io::fcntl_getfd(old)?)?;
        let new = changes.add(copy, &place);
        place.number.store(new, Ordering::SeqCst);
    }
    if !place.is_unused() {
        return Err(Errno::BUSY);
    }
    let result = replace();
    if result < 0 {
        // SAFETY: as above; nobody uses it.
        close(unsafe { OwnedFd::from_raw_fd(number) });
    }
    changes.remove(number);
    Ok(result)
}

/// Closes a descriptor by a system call of gmem's own: the standard library goes by libc's `close`, which a client's filter
/// may forbid.
fn close(fd: OwnedFd) {
    // SAFETY: the descriptor was owned, and is not any more.
    unsafe { rustix::io::close(fd.into_raw_fd()) };
}

fn mark(number: i32, change: impl FnOnce(&AtomicU64, u64) -> u64) {
    let Ok(number) = usize::try_from(number) else { return };
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
pub fn hidden_copy(fd: impl AsFd) -> Result<Hidden, Errno> {
    let copy = copy_out_of_the_way(fd.as_fd())?;
    // Who is making way may wait for it.
    drop(fd);
    Ok(Hidden::new(copy))
}

fn copy_out_of_the_way(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u16::MAX));
    let limit = i32::try_from(limit.min(1 << 16)).unwrap_or(1 << 16);
    let high = (limit - limit / 8).max(3);
    let copy = |first| rustix::io::fcntl_dupfd_cloexec(fd, first);
    copy(high).or_else(|_| copy(3)).or_else(|_| copy(0))
}

/// Gives a new file its size. The process's file size limit, which no guest_memfd has, does not count as far as it may be lifted.
///
/// # Errors
/// EFBIG beyond a limit that may not be lifted, EAGAIN if that takes a process more than there may be.
pub(crate) fn set_size(fd: impl AsFd, size: u64) -> Result<(), Errno> {
    let limit = getrlimit(Resource::Fsize);
    let allows = |most: Option<u64>| most.is_none_or(|most| size <= most);
    match (allows(limit.current), allows(limit.maximum)) {
        (true, _) => rustix::fs::ftruncate(&fd, size),
        // The kernel would also send SIGXFSZ.
        (false, false) => Err(Errno::FBIG),
        // Not by this process: what its other threads write must stay within the limit.
        (false, true) => sys::truncate_under_limit(fd.as_fd(), size, [limit.maximum.unwrap_or(u64::MAX); 2]),
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

    fn memfd() -> OwnedFd {
        rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC).unwrap()
    }

    fn inode(fd: impl AsFd) -> u64 {
        rustix::fs::fstat(fd).unwrap().st_ino
    }

    /// dup2 by a client.
    fn put(fd: &OwnedFd, number: i32) -> Result<i32, Errno> {
        make_way(number, || {
            // SAFETY: a number that gmem had, or that a test has put a file at.
            let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
            rustix::io::dup2(fd, &mut target).map_or(-1, |()| number)
        })
    }

    #[test]
    fn hidden_numbers_are_known_as_long_as_they_are_open() {
        let file = memfd();
        let mut hidden = hidden_copy(&file).unwrap();
        let number = hidden.number().cast_unsigned();
        hidden.become_copy_of(file.as_fd()).unwrap();
        assert_eq!(next_hidden(number, number), Some(number));
        assert!(next_hidden(0, u32::MAX).is_some_and(|first| first <= number));
        assert_ne!(next_hidden(number + 1, u32::MAX), Some(number));
        assert_eq!(next_hidden(1 << 16, u32::MAX), None);
        drop(hidden);
        assert_ne!(next_hidden(number, number), Some(number));
    }

    #[test]
    fn a_hidden_descriptor_makes_way_and_stays_what_it_is() {
        let (own, clients) = (memfd(), memfd());
        let hidden = hidden_copy(&own).unwrap();
        let number = hidden.number();
        assert_eq!(put(&clients, number), Ok(number));
        // SAFETY: put there a line above.
        let copy = unsafe { OwnedFd::from_raw_fd(number) };
        assert_eq!(inode(&copy), inode(&clients));
        assert_eq!(inode(hidden.hold()), inode(&own));
        let moved = hidden.number().cast_unsigned();
        assert!(moved != number.cast_unsigned() && next_hidden(moved, moved).is_some());
        assert_eq!(next_hidden(number.cast_unsigned(), number.cast_unsigned()), None);
        assert_eq!(make_way(hidden.number(), || -1), Ok(-1), "the client's call failed");
        assert_eq!(inode(hidden.hold()), inode(&own));
    }

    #[test]
    fn the_number_of_a_descriptor_in_use_is_not_given_away() {
        let (own, clients) = (memfd(), memfd());
        let hidden = hidden_copy(&own).unwrap();
        let held = hidden.hold();
        let number = hidden.number();
        assert_eq!(put(&clients, number), Err(Errno::BUSY));
        assert_eq!(inode(&held), inode(&own));
        assert_ne!(hidden.number(), number, "others find the new one");
        drop(held);
        assert_eq!(put(&clients, number), Ok(number));
        // SAFETY: put there a line above.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }

    #[test]
    fn a_call_that_meets_the_clients_file_is_made_again() {
        let (own, clients) = (memfd(), memfd());
        let hidden = hidden_copy(&own).unwrap();
        let number = hidden.number();
        let result = hidden.call(|fd| {
            if hidden.number() == number {
                assert_eq!(put(&clients, number), Ok(number));
            }
            if inode(fd) == inode(&own) { Ok(()) } else { Err(Errno::NOTTY) }
        });
        assert_eq!(result, Ok(()));
        assert_eq!(hidden.call(|_| Err::<(), _>(Errno::NOTTY)), Err(Errno::NOTTY));
        // SAFETY: put there above.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    }
}
