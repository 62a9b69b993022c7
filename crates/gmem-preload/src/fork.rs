//! fork in a process with threads: a child must not find locks held by threads that it does not have.

use std::cell::RefCell;

use gmem_host::sys::{SignalsBlocked, copy_from_client};
use gmem_uapi::ForkGuard;

use crate::{Returned, alloc};

/// What a fork must find free. The heaps go first: whoever waits for another lock may need one next.
struct Held {
    _heaps: alloc::Taken,
    _process: Option<ForkGuard<'static>>,
}

impl Held {
    fn take() -> Self {
        let process = crate::process().map(gmem_uapi::Process::before_fork);
        // Last: who holds one of gmem's locks may allocate.
        Self { _process: process, _heaps: alloc::take_all() }
    }
}

thread_local! {
    static HELD: RefCell<Option<Held>> = const { RefCell::new(None) };
}

pub(crate) fn register() {
    // SAFETY: the three functions are of this library, which is never unloaded.
    let _ = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
}

fn hold(what: Option<Held>) {
    let _ = HELD.try_with(|held| held.try_borrow_mut().map(|mut held| *held = what));
}

extern "C" fn prepare() {
    // The first use in a thread may allocate.
    hold(None);
    hold(Some(Held::take()));
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

/// A fork for which libc runs no handlers. Without storage of the thread, which may not be allocated in a signal handler.
pub(crate) fn around<T: Returned + PartialEq + From<u8>>(fork: impl FnOnce() -> T) -> T {
    // A handler that came in between would wait for what is held here.
    let _signals = SignalsBlocked::new();
    let held = Held::take();
    let child = fork();
    drop(held);
    if let (true, Some(process)) = (child == T::from(0), crate::process()) {
        process.is_child();
    }
    child
}

/// Whether `clone` by number is what fork does: the child has a copy of the memory, and goes on with this stack.
pub(crate) fn copies_memory(flags: usize, stack: usize) -> bool {
    stack == 0 && flags & CLONE_VM == 0
}

const CLONE_VM: usize = 0x100;

/// The same of `clone3`, from its structure.
pub(crate) fn copies_memory_as_told(address: usize, size: usize) -> bool {
    const FLAGS: usize = 0;
    const STACK: usize = 40;
    let field = |offset: usize| {
        let mut field = [0; size_of::<usize>()];
        let end = offset + field.len();
        let known = end <= size && copy_from_client(address.wrapping_add(offset), &mut field).is_ok();
        known.then(|| usize::from_ne_bytes(field))
    };
    field(FLAGS).zip(field(STACK)).is_some_and(|(flags, stack)| copies_memory(flags, stack))
}
