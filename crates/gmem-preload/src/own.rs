//! Where gmem's own code begins and ends in a client's thread.
//!
//! glibc ends a thread, one that is cancelled or one that calls `pthread_exit` in a signal handler, by unwinding its stack. It
//! ends the process if that meets a frame that catches, or one that has something to drop but not at the instruction where
//! an asynchronous cancellation came. So frames with anything to catch or drop are entered by [`own`] only, in which no thread
//! is cancelled. All others, the exported functions first, have nothing but values that are `Copy`; what a compiler leaves there of
//! closures all the same goes by optimisation, which every profile has here. Nor do they have what checks itself in a debug build
//! and then ends in a frame that does not unwind: loops over slices, volatile accesses.

use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;

/// `PTHREAD_CANCEL_DEFERRED`
pub(crate) const DEFERRED: Cancellation = Cancellation(0);

unsafe extern "C-unwind" {
    /// Without a system call; acts on what is pending if it may.
    fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
}

/// When a thread is cancelled: wherever it is, or only in certain calls, none of which gmem's code makes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Cancellation(c_int);

impl Cancellation {
    /// Puts cancellation off, and returns what is to be restored.
    pub(crate) fn defer() -> Self {
        let mut before = DEFERRED.0;
        // SAFETY: libc writes the old type, to a place for it.
        let _ = unsafe { pthread_setcanceltype(DEFERRED.0, &raw mut before) };
        Self(before)
    }

    /// A cancellation that has come meanwhile acts here.
    pub(crate) fn restore(self) {
        if self != DEFERRED {
            // SAFETY: a type that the thread had, and no place for the old one.
            let _ = unsafe { pthread_setcanceltype(self.0, null_mut()) };
        }
    }
}

/// Does what is gmem's own: the thread is not cancelled in it, and a panic in it becomes `panicked`.
pub(crate) fn own<T: Copy>(panicked: T, work: impl FnOnce() -> T + Copy) -> T {
    let cancellation = Cancellation::defer();
    let result = caught(panicked, work);
    cancellation.restore();
    result
}

/// Apart from its callers' frames, which must have nothing to catch.
#[inline(never)]
fn caught<T: Copy>(panicked: T, work: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or(panicked)
}
