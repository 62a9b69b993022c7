//! Descriptors that a client must not close: the one through which children load this library, and gmem's own.
//!
//! `gmem run` keeps the library in a memfd. Clients that close every descriptor they do not know, as daemons and jailers do,
//! would leave their children without gmem, and themselves without guest memory. Those that put a descriptor of their own at one of
//! these numbers get it; what was there moves.

use std::ffi::{CStr, c_int};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use gmem_host::address_space;
use gmem_host::fds::{self, Hidden, next_hidden};
use gmem_uapi::Answer;

static LIBRARY: OnceLock<Hidden> = OnceLock::new();
/// The number of it that the environment has.
static KNOWN: AtomicI32 = AtomicI32::new(-1);

/// The variable that has it.
const NUMBER: &CStr = c"GMEM_LIBRARY_FD";

/// Learns the library's number from the environment.
pub(crate) fn find() {
    let number = NUMBER.to_str().ok().and_then(|name| std::env::var(name).ok());
    let Some(number) = number.and_then(|number| number.parse().ok()) else { return };
    if gmem_host::kvm::is_open(number) {
        KNOWN.store(number, Ordering::Relaxed);
        // SAFETY: made by `gmem run` for this library, or by this library for a program that it ran in.
        let _ = LIBRARY.set(Hidden::new(unsafe { OwnedFd::from_raw_fd(number) }));
    }
}

/// Whether `fd` is to stay open.
pub(crate) fn keeps(fd: c_int) -> bool {
    u32::try_from(fd).is_ok_and(|fd| next_hidden(fd, fd).is_some())
}

/// `replace` puts a descriptor of the client's at `number`; one that is to stay open goes elsewhere first.
pub(crate) fn make_way(number: c_int, replace: impl Fn() -> c_int) -> c_int {
    // A child of vfork has descriptors of its own, but not the memory that tells where they are.
    if !keeps(number) || !address_space::is_own() {
        return replace();
    }
    let done = |_: &_| {
        let done = fds::make_way(number, &replace);
        follow();
        Answer::Done(done)
    };
    crate::answer(done, &replace)
}

/// Tells children where the library is, if that has changed.
fn follow() {
    let Some(now) = LIBRARY.get().map(Hidden::number) else { return };
    let before = KNOWN.swap(now, Ordering::Relaxed);
    if before != now {
        let preload = |number: c_int| format!("/proc/self/fd/{number:/>5}");
        rewrite(c"LD_PRELOAD", &preload(before), &preload(now));
        rewrite(NUMBER, &format!("{before:05}"), &format!("{now:05}"));
    }
}

/// Changes how the value of a variable begins, in its place: the client may hold its address.
fn rewrite(name: &CStr, before: &str, now: &str) {
    // SAFETY: a C string.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    // SAFETY: what getenv returns is a C string.
    let begins = !value.is_null() && unsafe { CStr::from_ptr(value) }.to_bytes().starts_with(before.as_bytes());
    if begins && before.len() == now.len() {
        // SAFETY: the environment's strings may be written to, and this one has these bytes.
        unsafe { value.cast::<u8>().copy_from(now.as_ptr(), now.len()) };
    }
}

/// `first..=last` without what is to stay open, part by part: the first result that is not 0, or 0.
pub(crate) fn around(first: u32, last: u32, mut part: impl FnMut(u32, u32) -> c_int) -> c_int {
    let mut result = 0;
    let mut start = Some(first).filter(|first| *first <= last);
    while let Some(from) = start {
        let kept = next_hidden(from, last);
        let end = kept.map_or(Some(last), |kept| kept.checked_sub(1)).filter(|end| from <= *end);
        if let (Some(end), 0) = (end, result) {
            result = part(from, end);
        }
        start = kept.and_then(|kept| kept.checked_add(1)).filter(|next| *next <= last);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_around_what_stays_open() {
        // SAFETY: a new descriptor of this test's.
        let file = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"x".as_ptr(), 0)) };
        let hidden = fds::hidden_copy(&file).unwrap();
        let (fd, at) = (hidden.number(), hidden.number().cast_unsigned());
        let parts = |first, last| {
            let mut parts = Vec::new();
            assert_eq!(
                around(first, last, |first, last| {
                    parts.push((first, last));
                    0
                }),
                0
            );
            parts
        };
        assert_eq!(parts(3, u32::MAX), [(3, at - 1), (at + 1, u32::MAX)]);
        assert_eq!(parts(at, at), []);
        assert_eq!(parts(at + 1, at + 10), [(at + 1, at + 10)]);
        assert_eq!(parts(0, at), [(0, at - 1)]);
        assert_eq!(parts(5, 4), []);
        assert!(keeps(fd) && !keeps(fd + 1) && !keeps(-1));
        assert_eq!(around(3, at + 10, |_, _| -1), -1);
    }
}
