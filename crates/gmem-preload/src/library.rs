//! Descriptors that a client must not close: the one through which children load this library, and gmem's own.
//!
//! `gmem run` keeps the library in a memfd. Clients that close every descriptor they do not know, as daemons and jailers do,
//! would leave their children without gmem, and themselves without guest memory.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};

use gmem_host::fds::next_hidden;

static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// Learns the library's number from the environment.
pub(crate) fn find() {
    let number = std::env::var("GMEM_LIBRARY_FD").ok().and_then(|number| number.parse().ok());
    DESCRIPTOR.store(number.unwrap_or(-1), Ordering::Relaxed);
}

/// Whether `fd` is to stay open.
pub(crate) fn keeps(fd: c_int) -> bool {
    u32::try_from(fd).is_ok_and(|fd| next_kept(fd, fd).is_some())
}

/// The first descriptor in `first..=last` that is to stay open.
fn next_kept(first: u32, last: u32) -> Option<u32> {
    let own = u32::try_from(DESCRIPTOR.load(Ordering::Relaxed)).ok();
    let own = own.filter(|own| (first..=last).contains(own));
    own.into_iter().chain(next_hidden(first, last)).min()
}

/// `first..=last` without what is to stay open, part by part: the first result that is not 0, or 0.
pub(crate) fn around(first: u32, last: u32, mut part: impl FnMut(u32, u32) -> c_int) -> c_int {
    let mut result = 0;
    let mut start = Some(first).filter(|first| *first <= last);
    while let Some(from) = start {
        let kept = next_kept(from, last);
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
    fn ranges_go_around_the_library() {
        DESCRIPTOR.store(10, Ordering::Relaxed);
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
        assert_eq!(parts(3, u32::MAX), [(3, 9), (11, u32::MAX)]);
        assert_eq!(parts(10, 10), []);
        assert_eq!(parts(11, 20), [(11, 20)]);
        assert_eq!(parts(0, 10), [(0, 9)]);
        assert_eq!(parts(5, 4), []);
        assert!(keeps(10) && !keeps(11) && !keeps(-1));
        assert_eq!(around(3, 20, |_, _| -1), -1);
    }
}
