//! The descriptor through which children load this library.
//!
//! `gmem run` keeps the library in a memfd. Clients that close every descriptor they do not know, as daemons and jailers do,
//! must not close this one, or their children would run without gmem.

use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, Ordering};

static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// Learns the number from the environment.
pub(crate) fn find() {
    let number = std::env::var("GMEM_LIBRARY_FD").ok().and_then(|number| number.parse().ok());
    DESCRIPTOR.store(number.unwrap_or(-1), Ordering::Relaxed);
}

/// Whether `fd` is the library's.
pub(crate) fn is(fd: c_int) -> bool {
    fd >= 0 && fd == DESCRIPTOR.load(Ordering::Relaxed)
}

/// `first..=last` without the library's descriptor.
pub(crate) fn around(first: u32, last: u32) -> [Option<(u32, u32)>; 2] {
    match u32::try_from(DESCRIPTOR.load(Ordering::Relaxed)) {
        Ok(own) if first <= own && own <= last => {
            let below = own.checked_sub(1).filter(|end| first <= *end).map(|end| (first, end));
            let above = own.checked_add(1).filter(|start| *start <= last).map(|start| (start, last));
            [below, above]
        }
        _ => [Some((first, last)), None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_around_the_library() {
        DESCRIPTOR.store(10, Ordering::Relaxed);
        assert_eq!(around(3, u32::MAX), [Some((3, 9)), Some((11, u32::MAX))]);
        assert_eq!(around(10, 10), [None, None]);
        assert_eq!(around(11, 20), [Some((11, 20)), None]);
    }
}
