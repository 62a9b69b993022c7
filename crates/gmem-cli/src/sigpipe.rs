//! What becomes of this process and of the program that it turns into when nobody reads their output.
//!
//! The runtime of Rust ignores `SIGPIPE` before `main`, and `exec` of the standard library sets it to its default. gmem ends by
//! it, as other tools do (`gmem check vectors | head`); a program under `gmem run` gets what gmem was given: services are often
//! started with the signal ignored (systemd's `IgnoreSIGPIPE=`).

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

static IGNORED_AT_START: AtomicBool = AtomicBool::new(false);

/// Run by the dynamic linker, ahead of the runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    // SAFETY: zeros are a value of the type, which libc only fills in; no action is set.
    let ignored = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &raw mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    };
    IGNORED_AT_START.store(ignored, Ordering::Relaxed);
}

/// Lets a closed standard output end this program.
///
/// With the signal ignored every command would report an error that is none.
pub(crate) fn end_by_it() {
    // SAFETY: no handler is installed, the default action is.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Lets `command` have the action that this process was started with.
pub(crate) fn inherit(command: &mut Command) {
    if IGNORED_AT_START.load(Ordering::Relaxed) {
        let ignore = || {
            // SAFETY: no handler is installed, and `signal` may be called between fork and exec.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
            Ok(())
        };
        // SAFETY: the closure makes one async-signal-safe call and allocates nothing.
        unsafe { command.pre_exec(ignore) };
    }
}
