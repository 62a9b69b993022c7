//! `KVM_RUN`, in which a thread may be ended, by a signal handler or another thread. What it needs over the real call is
//! therefore not in a frame of its stack.

use std::cell::Cell;
use std::ffi::c_int;
use std::sync::atomic::{Ordering, compiler_fence};

use gmem_host::kvm;
use gmem_host::sys::SignalsBlocked;
use gmem_uapi::{Answer, Errno, Process, Run, Running};
use rustix::fd::{BorrowedFd, RawFd};

use crate::own::own;
use crate::process;

/// The vCPU that a thread runs.
struct Place {
    running: Cell<Option<Running>>,
    is_changing: Cell<bool>,
}

thread_local! {
    static PLACE: Place = const { Place { running: Cell::new(None), is_changing: Cell::new(false) } };
}

impl Place {
    /// `None` in a handler that came amid another change.
    fn replace(&self, running: Option<Running>) -> Option<Option<Running>> {
        if self.is_changing.replace(true) {
            return None;
        }
        compiler_fence(Ordering::SeqCst);
        let old = self.running.replace(running);
        compiler_fence(Ordering::SeqCst);
        self.is_changing.set(false);
        Some(old)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _signals = SignalsBlocked::new();
        // The thread was ended in the real call.
        drop(self.running.take());
    }
}

/// What comes next.
#[derive(Clone, Copy)]
enum Step {
    Enter(RawFd),
    End(Answer<c_int>),
}

const PANICKED: Step = Step::End(Answer::Done(Err(Errno::IO)));

/// `KVM_RUN` on `fd`.
pub(crate) fn run(process: &Process, fd: c_int) -> Answer<c_int> {
    let mut step = own(PANICKED, || keep(fd, process.before_run(fd)));
    loop {
        match step {
            Step::End(answer) => return answer,
            Step::Enter(vcpu) => {
                // SAFETY: the number is only passed to the kernel; it is that of the vCPU in `PLACE`.
                let result = kvm::run(unsafe { BorrowedFd::borrow_raw(vcpu) });
                step = own(PANICKED, || go_on(fd, result));
            }
        }
    }
}

fn keep(fd: c_int, run: Run) -> Step {
    let running = match run {
        Run::Enter(running) => running,
        Run::End(answer) => return Step::End(answer),
    };
    let number = running.number();
    match PLACE.try_with(|place| place.replace(Some(running))) {
        // A vCPU that was left there is one that a handler has left by a jump, or of a call that it interrupts.
        Ok(Some(_)) => Step::Enter(number),
        _ => Step::End(all_at_once(fd)),
    }
}

fn go_on(fd: c_int, result: Result<c_int, Errno>) -> Step {
    match PLACE.try_with(|place| place.replace(None)) {
        Ok(Some(Some(running))) => keep(fd, Process::after_run(running, result)),
        // A handler that interrupted this call ran a vCPU itself.
        _ => Step::End(Answer::Done(result)),
    }
}

/// For a thread that cannot keep anything: it is ending, or a handler came amid the change.
fn all_at_once(fd: c_int) -> Answer<c_int> {
    process().map_or(Answer::Pass, |process| process.run(fd))
}
