//! fork in a process with threads: a child must not find locks held by threads that it does not have.

use std::cell::RefCell;

use gmem_uapi::ForkGuard;

thread_local! {
    static HELD: RefCell<Option<ForkGuard<'static>>> = const { RefCell::new(None) };
}

pub(crate) fn register() {
    // SAFETY: the three functions are of this library, which is never unloaded.
    let _ = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
}

fn hold(guard: Option<ForkGuard<'static>>) {
    let _ = HELD.try_with(|held| held.try_borrow_mut().map(|mut held| *held = guard));
}

extern "C" fn prepare() {
    hold(crate::process().map(gmem_uapi::Process::before_fork));
}

extern "C" fn parent() {
    hold(None);
}

extern "C" fn child() {
    hold(None);
    if let Some(process) = crate::process() {
        process.is_child();
    }
}
