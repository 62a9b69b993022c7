//! `KVM_RUN`, in which a thread may be ended, by a signal handler or another thread. What it needs over the real call is
//! therefore not in a frame of its stack, but pinned.

use std::cell::OnceCell;
use std::ffi::c_int;

use gmem_host::kvm;
use gmem_host::sys::SignalsBlocked;
use gmem_host::table::Pin;
use gmem_uapi::{Answer, Entry, Errno, Process, Run, Running};
use rustix::fd::BorrowedFd;

use crate::own::own;
use crate::process;

thread_local! {
    /// Where the vCPU that this thread runs is pinned. Apart from `END`: to look at what has nothing to drop costs nothing.
    static PIN: OnceCell<Pin<'static, Entry>> = const { OnceCell::new() };
    static END: End = const { End };
}

/// The end of a thread, maybe in the real call.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        let _signals = SignalsBlocked::new();
        // SAFETY: the thread has left the functions below, and gmem's own code does not end threads.
        with_pin(|pin| pin.map(|pin| unsafe { pin.end() }));
    }
}

pub(crate) fn with_pin<R>(work: impl FnOnce(Option<&Pin<'static, Entry>>) -> R) -> R {
    PIN.with(|pin| work(pin.get()))
}

const PANICKED: Run = Run::End(Answer::Done(Err(Errno::IO)));

/// `KVM_RUN` on `fd`. What nearly all calls do comes first, and has no frame to be unwound but this.
#[inline]
pub(crate) fn run(fd: c_int) -> Answer<c_int> {
    with_pin(|pin| {
        let Some(pin) = pin else { return run_first(fd) };
        let Some(running) = Running::enter(pin, fd) else { return run_rarely(pin, fd) };
        match enter(running) {
            Ok(value) if running.leave(pin) => Answer::Done(Ok(value)),
            result => go_on(pin, running, result),
        }
    })
}

#[inline]
fn enter(running: Running) -> Result<c_int, Errno> {
    // SAFETY: the number is only passed to the kernel; it is that of the vCPU that is pinned.
    kvm::run(unsafe { BorrowedFd::borrow_raw(running.number()) })
}

/// A thread's first `KVM_RUN`, or one while it ends.
#[cold]
fn run_first(fd: c_int) -> Answer<c_int> {
    let Some(process) = whose(fd) else { return Answer::Pass };
    own((), || set_up(process));
    with_pin(|pin| match pin {
        Some(pin) => begin(process, pin, fd),
        None => own(Answer::Done(Err(Errno::IO)), || process.run(fd)),
    })
}

/// The process, if `fd` is one of gmem's.
fn whose(fd: c_int) -> Option<&'static Process> {
    process().filter(|process| process.knows(fd))
}

fn set_up(process: &'static Process) {
    // No handler makes another.
    let _signals = SignalsBlocked::new();
    if END.try_with(|_| ()).is_ok() {
        PIN.with(|pin| {
            pin.get_or_init(|| process.pin());
        });
    }
}

/// What may be none of gmem's, or not come to the real call.
#[cold]
fn run_rarely(pin: &Pin<'static, Entry>, fd: c_int) -> Answer<c_int> {
    whose(fd).map_or(Answer::Pass, |process| begin(process, pin, fd))
}

fn begin(process: &Process, pin: &Pin<'static, Entry>, fd: c_int) -> Answer<c_int> {
    go_on_from(process, pin, own(PANICKED, || process.before_run(pin, fd)))
}

#[cold]
fn go_on(pin: &Pin<'static, Entry>, running: Running, result: Result<c_int, Errno>) -> Answer<c_int> {
    match process() {
        Some(process) => go_on_from(process, pin, own(PANICKED, || process.after_run(pin, running, result))),
        None => Answer::Done(result),
    }
}

fn go_on_from(process: &Process, pin: &Pin<'static, Entry>, mut run: Run) -> Answer<c_int> {
    loop {
        match run {
            Run::End(answer) => return answer,
            Run::Enter(running) => {
                let result = enter(running);
                run = own(PANICKED, || process.after_run(pin, running, result));
            }
        }
    }
}
