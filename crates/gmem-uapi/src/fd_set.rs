//! A set of descriptor numbers that is read without a lock.

use std::sync::atomic::{AtomicU64, Ordering};

/// Which descriptors may be gmem's. Nearly every call of a client is about one that is not, and may come from a signal handler
/// that interrupted a holder of any lock.
#[derive(Debug)]
pub(crate) struct FdSet {
    words: Box<[AtomicU64]>,
}

impl FdSet {
    /// Numbers below this, the kernel's default for the most, are told apart in 128 KiB; all above count as members.
    const LIMIT: usize = 1 << 20;

    fn place(&self, fd: i32) -> Option<(&AtomicU64, u64)> {
        let index = usize::try_from(fd).ok()?;
        Some((self.words.get(index / 64)?, 1 << (index % 64)))
    }

    /// Whether `fd` may be a member; exact below the limit.
    pub(crate) fn contains(&self, fd: i32) -> bool {
        self.place(fd).map_or(fd >= 0, |(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    pub(crate) fn set(&self, fd: i32, member: bool) {
        match (self.place(fd), member) {
            (Some((word, bit)), true) => word.fetch_or(bit, Ordering::Release),
            (Some((word, bit)), false) => word.fetch_and(!bit, Ordering::Release),
            (None, _) => 0,
        };
    }
}

impl Default for FdSet {
    fn default() -> Self {
        Self { words: (0..Self::LIMIT / 64).map(|_| AtomicU64::new(0)).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_told_from_their_neighbours() {
        let set = FdSet::default();
        for fd in [0, 63, 64, (1 << 20) - 1] {
            assert!(!set.contains(fd));
            set.set(fd, true);
            assert!(set.contains(fd) && !set.contains(fd ^ 1));
            set.set(fd, false);
            assert!(!set.contains(fd));
        }
    }

    #[test]
    fn no_number_is_lost() {
        let set = FdSet::default();
        set.set(i32::MAX, true);
        assert!(set.contains(i32::MAX));
        assert!(!set.contains(-1));
    }
}
