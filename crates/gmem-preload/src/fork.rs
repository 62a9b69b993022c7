//! fork in a process with threads: a child must not find locks held by threads that it does not have.

use std::arch::naked_asm;
use std::cell::RefCell;
use std::ffi::c_int;

use gmem_host::sys::{SignalsBlocked, copy_from_client};
use gmem_uapi::ForkGuard;

use crate::own::{Cancellation, DEFERRED, own};
use crate::run::with_pin;
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
    static HELD: RefCell<Option<(Held, Cancellation)>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    fn pthread_atfork(prepare: Handler, parent: Handler, child: Handler) -> c_int;
}

type Handler = unsafe extern "C-unwind" fn();

pub(crate) fn register() {
    // SAFETY: the three functions are of this library, which is never unloaded.
    let _ = unsafe { pthread_atfork(prepare, parent, child) };
}

/// Holds this, and returns how the thread that held something before is to be cancelled again.
fn hold(what: Option<(Held, Cancellation)>) -> Cancellation {
    let before = HELD.try_with(|held| held.try_borrow_mut().map(|mut held| std::mem::replace(&mut *held, what)));
    before.ok().and_then(Result::ok).flatten().map_or(DEFERRED, |(_, cancellation)| cancellation)
}

extern "C-unwind" fn prepare() {
    // Until `parent` or `child`: a thread that is cancelled here would hold this for ever.
    let cancellation = Cancellation::defer();
    own((), || {
        // The first use in a thread may allocate.
        hold(None);
        hold(Some((Held::take(), cancellation)));
    });
}

extern "C-unwind" fn parent() {
    own(DEFERRED, || hold(None)).restore();
}

extern "C-unwind" fn child() {
    let cancellation = own(DEFERRED, || hold(None));
    own((), is_child);
    cancellation.restore();
}

fn is_child() {
    if let Some(process) = crate::process() {
        with_pin(|pin| process.is_child(pin));
    }
}

/// A fork for which libc runs no handlers. Without storage of the thread, which may not be allocated in a signal handler.
pub(crate) fn around<T: Returned + PartialEq + From<u8>>(fork: impl FnOnce() -> T + Copy) -> T {
    own(T::FAILED, || {
        // A handler that came in between would wait for what is held here.
        let _signals = SignalsBlocked::new();
        let held = Held::take();
        let child = fork();
        drop(held);
        if child == T::from(0) {
            is_child();
        }
        child
    })
}

/// Whether libc's `clone` makes a child with a copy of the memory, which calls a function on another stack. One that gets other
/// storage of its thread (CLONE_SETTLS) cannot be made as [`around`] does, and shares what gmem has moved.
pub(crate) fn calls_in_copy(function: usize, stack: usize, flags: c_int) -> bool {
    function != 0 && stack != 0 && flags & (libc::CLONE_VM | libc::CLONE_SETTLS) == 0
}

/// Calls `function(arg)` on `stack` and ends the process with what it returns, as the child of `clone` does.
///
/// # Safety
/// As libc's `clone` in the child.
#[unsafe(naked)]
pub(crate) unsafe extern "C-unwind" fn call(function: usize, arg: usize, stack: usize) -> ! {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_undefined rip",
        "and rdx, -16",
        "mov rsp, rdx",
        "xor ebp, ebp",
        "mov rax, rdi",
        "mov rdi, rsi",
        "call rax",
        "mov edi, eax",
        "mov eax, {exit}",
        "syscall",
        "hlt",
        ".cfi_endproc",
        exit = const libc::SYS_exit,
    )
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
