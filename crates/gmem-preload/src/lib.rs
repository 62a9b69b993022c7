//! The `LD_PRELOAD` library: libc entry points to [`gmem_uapi::Process`], nothing else.
//!
//! Every function has one shape: ask the process whether the call is gmem's; if it is, give its answer, else make the real
//! call. A panic inside gmem becomes EIO and never reaches the client.

mod alloc;
mod calls;
mod fork;
mod library;
mod own;
mod paths;
mod real;
mod run;
mod seccomp;

use std::ffi::c_int;
use std::panic::catch_unwind;
use std::sync::OnceLock;

use gmem_uapi::native::Native;
use gmem_uapi::{Answer, Config, Errno, Process, profile};

use crate::own::own;

static PROCESS: OnceLock<Option<Process>> = OnceLock::new();

/// The process, once the library is initialised and if it was told what to be.
fn process() -> Option<&'static Process> {
    PROCESS.get()?.as_ref()
}

/// Variables through which `gmem run` says what to be; both or nothing.
const PROFILE: &str = "GMEM_PROFILE";
const EMULATED: &str = "GMEM_EMULATED_TYPES";

fn from_environment() -> Option<Process> {
    let profile = profile::by_name(&std::env::var(PROFILE).ok()?)?;
    let emulated = std::env::var(EMULATED).ok()?.parse().ok()?;
    let native = Native::probe().ok()?;
    Some(Process::new(Config { profile, emulated }, native))
}

extern "C" fn initialise() {
    real::resolve_all();
    library::find();
    let process = catch_unwind(from_environment).unwrap_or(None);
    let _ = PROCESS.set(process);
    fork::register();
    seccomp::prepare();
}

/// Run by the dynamic linker before the client's own code.
#[used]
#[unsafe(link_section = ".init_array")]
static INITIALISE: extern "C" fn() = initialise;

fn set_errno(error: Errno) {
    // SAFETY: libc gives every thread a valid address for its errno.
    unsafe { *libc::__errno_location() = error.raw_os_error() };
}

/// A value that a libc function returns, with its way to say that it failed.
trait Returned: Copy {
    const FAILED: Self;
}

impl Returned for c_int {
    const FAILED: Self = -1;
}

impl Returned for i64 {
    const FAILED: Self = -1;
}

impl Returned for isize {
    const FAILED: Self = -1;
}

impl Returned for usize {
    /// `MAP_FAILED`
    const FAILED: Self = usize::MAX;
}

impl Returned for *mut libc::FILE {
    const FAILED: Self = std::ptr::null_mut();
}

/// Asks gmem, and makes the real call if it is none of its business.
fn answer<T: Returned>(ask: impl FnOnce(&Process) -> Answer<T> + Copy, real: impl FnOnce() -> T + Copy) -> T {
    let Some(process) = process() else { return real() };
    give(own(Answer::Done(Err(Errno::IO)), || ask(process)), real)
}

fn give<T: Returned>(answer: Answer<T>, real: impl FnOnce() -> T + Copy) -> T {
    match answer {
        Answer::Pass => real(),
        Answer::Done(Ok(value)) => value,
        Answer::Done(Err(error)) => {
            set_errno(error);
            T::FAILED
        }
    }
}

/// Tells gmem of something that has happened, or is about to; the client's errno stays as it is.
fn tell(what: impl FnOnce(&Process) + Copy) {
    let Some(process) = process() else { return };
    // SAFETY: libc gives every thread a valid address for its errno.
    let errno = unsafe { *libc::__errno_location() };
    own((), || what(process));
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}
