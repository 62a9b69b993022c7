//! Signal handlers that call gmem, wherever their thread is, and threads that are ended in gmem's calls. Each client is this test program itself, run again under gmem with
//! the name of a part in the environment; it uses libc only and knows nothing of gmem.

mod common;

use common::under_gmem;

#[test]
fn client() {
    match common::part().as_str() {
        "malloc" => parts::handler_in_malloc(),
        "descriptors" => parts::handler_in_a_look_up(),
        "device" => parts::handler_at_a_device(),
        "cancelled" => parts::cancelled_anywhere(),
        "exits" => parts::exits_in_a_handler(),
        "runs" => parts::handler_runs_another_vcpu(),
        "closed" => parts::closed_while_it_runs(),
        _ => {}
    }
}

#[test]
fn a_handler_that_interrupts_malloc_may_call_gmem() {
    under_gmem("malloc");
}

#[test]
fn a_handler_may_close_a_descriptor_that_is_being_looked_up() {
    under_gmem("descriptors");
}

#[test]
fn a_handler_that_interrupts_a_device_access_of_the_guest_may_change_the_vm() {
    under_gmem("device");
}

#[test]
fn a_thread_may_be_cancelled_anywhere_in_a_call() {
    under_gmem("cancelled");
}

#[test]
fn a_handler_may_end_the_thread_that_runs_a_vcpu() {
    under_gmem("exits");
}

#[test]
fn a_handler_may_run_a_vcpu_while_its_thread_runs_another() {
    under_gmem("runs");
}

#[test]
fn a_vcpu_that_is_closed_while_it_runs_is_gone_when_it_stops() {
    under_gmem("closed");
}

mod parts {
    use std::ffi::{c_int, c_ulong, c_void};
    use std::ptr::{null, null_mut, without_provenance_mut};
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
    use std::time::{Duration, Instant};

    use crate::common::{
        KVM_SET_USER_MEMORY_REGION, PAGE, PRIVATE, create_file, errno, ioctl, protected_vm, set_attributes,
    };

    static VM: AtomicI32 = AtomicI32::new(-1);
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    static REFUSED: AtomicU64 = AtomicU64::new(0);

    /// What a handler does the `n`-th time, without a change of errno.
    fn handle(act: impl FnOnce(c_int, u64) -> bool) {
        // SAFETY: libc gives every thread a valid address for its errno.
        let at = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let before = unsafe { *at };
        if !act(VM.load(Ordering::Relaxed), HANDLED.fetch_add(1, Ordering::Relaxed)) {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as above.
        unsafe { *at = before };
    }

    extern "C" fn convert(_: c_int) {
        handle(|vm, n| set_attributes(vm, (n % 64) * 2 * PAGE, PAGE, (n & 1) * PRIVATE).is_ok());
    }

    extern "C" fn reopen(_: c_int) {
        handle(|vm, _| {
            let Ok(file) = create_file(vm, PAGE) else { return false };
            // SAFETY: descriptors that are closed once.
            unsafe { libc::close(libc::dup(file)) | libc::close(file) == 0 }
        });
    }

    /// Does `work` again and again for two seconds, while signals come.
    fn amid_signals(vm: c_int, handler: extern "C" fn(c_int), mut work: impl FnMut()) {
        const LONG: Duration = Duration::from_secs(2);
        VM.store(vm, Ordering::Relaxed);
        let done = AtomicBool::new(false);
        // SAFETY: a handler that makes system calls.
        let old = unsafe { libc::signal(libc::SIGALRM, handler as *const () as usize) };
        assert_ne!(old, libc::SIG_ERR);
        // SAFETY: nothing to keep.
        let this = unsafe { libc::pthread_self() };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let begin = Instant::now();
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_micros(100));
                    // SAFETY: that thread waits for this one.
                    unsafe { libc::pthread_kill(this, libc::SIGALRM) };
                    if begin.elapsed() > LONG * 15 {
                        eprintln!("the thread waits for itself");
                        // SAFETY: ends the process.
                        unsafe { libc::_exit(9) };
                    }
                }
            });
            let begin = Instant::now();
            while begin.elapsed() < LONG {
                work();
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(HANDLED.load(Ordering::Relaxed) > 100, "{HANDLED:?} signals");
        assert_eq!(REFUSED.load(Ordering::Relaxed), 0);
    }

    pub(super) fn handler_in_malloc() {
        let vm = protected_vm();
        let mut random = 1u64;
        let mut blocks = [null_mut(); 256];
        amid_signals(vm, convert, || {
            for block in &mut blocks {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // SAFETY: a block is freed once.
                unsafe { libc::free(*block) };
                // SAFETY: the block is not used.
                *block = unsafe { libc::malloc(1100 + (random >> 33) as usize % 20 * 517) };
            }
            set_attributes(vm, 1 << 32, PAGE, (random >> 40 & 1) * PRIVATE).expect("attributes");
        });
        // SAFETY: as above.
        blocks.iter().for_each(|block| unsafe { libc::free(*block) });
    }

    pub(super) fn handler_in_a_look_up() {
        let vm = protected_vm();
        let file = create_file(vm, PAGE).expect("a file");
        amid_signals(vm, reopen, || {
            // An ioctl that gmem refuses after the look-up, without a system call.
            assert_eq!((0..100).filter(|_| ioctl(file, 0xae80, 1) == Err(libc::ENOTTY)).count(), 100);
        });
    }

    pub(super) fn handler_at_a_device() {
        let vm = protected_vm();
        let vcpu = guest(vm, TO_A_DEVICE);
        let mut exits = 0;
        amid_signals(vm, convert, || match ioctl(vcpu, KVM_RUN, 0) {
            Ok(_) => exits += 1,
            Err(error) => assert_eq!(error, libc::EINTR, "{}", errno()),
        });
        assert!(exits > 100, "{exits} exits");
    }

    const KVM_RUN: c_ulong = 0xae80;
    /// mov [0x8000], al; jmp back to it
    const TO_A_DEVICE: [u8; 5] = [0xa2, 0x00, 0x80, 0xeb, 0xfb];
    /// jmp to itself
    const FOR_EVER: [u8; 5] = [0xeb, 0xfe, 0, 0, 0];

    /// A vCPU that runs `code`.
    fn guest(vm: c_int, code: [u8; 5]) -> c_int {
        const KVM_CREATE_VCPU: c_ulong = 0xae41;
        const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
        const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
        const KVM_SET_REGS: c_ulong = 0x4090_ae82;
        let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0).expect("a vCPU");
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let ram = unsafe { libc::mmap(null_mut(), 4096, prot, flags, -1, 0) };
        assert_ne!(ram, libc::MAP_FAILED);
        // SAFETY: the page that was mapped a moment ago.
        unsafe { ram.cast::<[u8; 5]>().write(code) };
        // At a place that the handlers do not convert.
        let slot = [0, 0x1_0000, PAGE, ram.addr() as u64];
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, slot.as_ptr().addr()).expect("a slot");
        let mut sregs = [0u64; 0x138 / 8];
        ioctl(vcpu, KVM_GET_SREGS, sregs.as_mut_ptr().addr()).expect("sregs");
        // The code segment: its base, and its selector after the limit.
        sregs[0] = 0x1_0000;
        sregs[1] = sregs[1] & !(0xffff << 32) | 0x1000 << 32;
        ioctl(vcpu, KVM_SET_SREGS, sregs.as_ptr().addr()).expect("sregs");
        let mut regs = [0u64; 0x90 / 8];
        regs[17] = 2;
        ioctl(vcpu, KVM_SET_REGS, regs.as_ptr().addr()).expect("regs");
        vcpu
    }

    unsafe extern "C-unwind" {
        fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
        fn pthread_exit(value: *mut c_void) -> !;
    }

    static FILE: AtomicI32 = AtomicI32::new(-1);
    static VCPU: AtomicI32 = AtomicI32::new(-1);

    type Thread = extern "C-unwind" fn(*mut c_void) -> *mut c_void;
    /// Makes one call again and again, anywhere in which it may be cancelled. There is nothing to drop here.
    extern "C-unwind" fn caller(call: *mut c_void) -> *mut c_void {
        const ASYNCHRONOUS: c_int = 1;
        let (vm, file, vcpu) = (VM.load(Ordering::Relaxed), FILE.load(Ordering::Relaxed), VCPU.load(Ordering::Relaxed));
        let request = crate::common::KVM_SET_MEMORY_ATTRIBUTES;
        let (private, shared) = ([0, 64 * PAGE, PRIVATE, 0], [0, 64 * PAGE, 0, 0]);
        let (name, none) = (c"/dev/fd/0".as_ptr(), c"/dev/none".as_ptr());
        // SAFETY: each argument is a number, the address of what the call takes, or bad.
        unsafe {
            pthread_setcanceltype(ASYNCHRONOUS, null_mut());
            loop {
                let _ = match call.addr() {
                    0 => libc::ioctl(vm, request, &raw const private) == libc::ioctl(vm, request, &raw const shared),
                    1 => libc::ioctl(vcpu, KVM_RUN, 0) == 0,
                    2 => libc::fallocate(file, 1, 0, 4096) == 0,
                    3 => libc::lseek(file, 0, 0) == 0,
                    4 => libc::syscall(libc::SYS_lseek, file, 0, 0) == 0,
                    5 => libc::close(-1) == 0,
                    6 => libc::readlink(name, null_mut(), 1) == 0,
                    7 => libc::munmap(null_mut(), 4096) == 0,
                    _ => libc::open(none, 0) == 0,
                };
            }
        }
    }

    const CALLS: usize = 9;

    /// Starts `thread`, does something to it after a while, and returns what it ended with.
    fn ended(thread: Thread, argument: *mut c_void, wait: Duration, end: impl FnOnce(libc::pthread_t)) -> *mut c_void {
        let (mut id, mut value) = (0, null_mut());
        // SAFETY: a thread that is joined once. Unwinding leaves it as it would leave one of C.
        unsafe {
            let thread = std::mem::transmute::<Thread, extern "C" fn(*mut c_void) -> *mut c_void>(thread);
            assert_eq!(libc::pthread_create(&raw mut id, null(), thread, argument), 0);
            std::thread::sleep(wait);
            end(id);
            assert_eq!(libc::pthread_join(id, &raw mut value), 0);
        }
        value
    }

    /// Open descriptors of VMs and vCPUs, gmem's own among them.
    fn open_vms() -> usize {
        let all = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
        all.filter_map(|path| std::fs::read_link(path).ok())
            .filter(|file| file.to_string_lossy().contains("kvm"))
            .count()
    }

    pub(super) fn cancelled_anywhere() {
        // SAFETY: ends the process if a lock is held for ever.
        unsafe { libc::alarm(50) };
        for code in [TO_A_DEVICE, FOR_EVER] {
            let vm = protected_vm();
            let (file, vcpu) = (create_file(vm, 64 * PAGE).expect("a file"), guest(vm, code));
            VM.store(vm, Ordering::Relaxed);
            FILE.store(file, Ordering::Relaxed);
            VCPU.store(vcpu, Ordering::Relaxed);
            for (call, round) in (0..CALLS).flat_map(|call| (0..100).map(move |round| (call, round))) {
                let wait = Duration::from_micros(500 + round * 7);
                // SAFETY: a thread that was not joined yet.
                let value = ended(caller, without_provenance_mut(call), wait, |thread| unsafe {
                    assert_eq!(libc::pthread_cancel(thread), 0);
                });
                assert_eq!(value, without_provenance_mut(usize::MAX), "{call}: not PTHREAD_CANCELED");
                set_attributes(vm, 0, 64 * PAGE, round % 2 * PRIVATE).expect("attributes");
            }
            // SAFETY: descriptors of this function's.
            [file, vcpu, vm].into_iter().for_each(|fd| assert_eq!(unsafe { libc::close(fd) }, 0));
            assert_eq!(open_vms(), 0, "a cancelled thread keeps something");
        }
    }

    extern "C-unwind" fn end_thread(_: c_int) {
        // SAFETY: the handler interrupts KVM_RUN, or what its thread does between two.
        unsafe { pthread_exit(without_provenance_mut(5)) }
    }

    extern "C-unwind" fn runner(_: *mut c_void) -> *mut c_void {
        let vcpu = VCPU.load(Ordering::Relaxed);
        loop {
            // SAFETY: the call takes no argument.
            unsafe { libc::ioctl(vcpu, KVM_RUN, 0) };
        }
    }

    pub(super) fn exits_in_a_handler() {
        let vm = protected_vm();
        let vcpu = guest(vm, FOR_EVER);
        VCPU.store(vcpu, Ordering::Relaxed);
        // SAFETY: a handler that ends its thread.
        assert_ne!(unsafe { libc::signal(libc::SIGUSR1, end_thread as *const () as usize) }, libc::SIG_ERR);
        for _ in 0..5 {
            // SAFETY: a thread that was not joined yet.
            let value = ended(runner, null_mut(), Duration::from_millis(100), |thread| unsafe {
                assert_eq!(libc::pthread_kill(thread, libc::SIGUSR1), 0);
            });
            assert_eq!(value, without_provenance_mut(5));
        }
        assert!(open_vms() > 2);
        // SAFETY: descriptors of this function's.
        [vcpu, vm].into_iter().for_each(|fd| assert_eq!(unsafe { libc::close(fd) }, 0));
        assert_eq!(open_vms(), 0, "the thread keeps something");
    }

    extern "C" fn run_another(_: c_int) {
        handle(|vm, _| {
            let vcpu = guest(vm, TO_A_DEVICE);
            let ran = ioctl(vcpu, KVM_RUN, 0) == Ok(0);
            // The one that was interrupted, too: nobody has its entry any more.
            [vcpu, vm, VCPU.load(Ordering::Relaxed), FILE.load(Ordering::Relaxed)]
                .into_iter()
                // SAFETY: descriptors that are closed once.
                .for_each(|fd| assert_eq!(unsafe { libc::close(fd) }, 0));
            ran
        });
    }

    /// Sends `signal` to this thread after a while.
    fn interrupted(signal: c_int, before: impl FnOnce() + Send, work: impl FnOnce()) {
        // SAFETY: nothing to keep.
        let this = unsafe { libc::pthread_self() };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                before();
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(this, signal) };
            });
            work();
        });
    }

    pub(super) fn handler_runs_another_vcpu() {
        // SAFETY: a handler that makes system calls.
        assert_ne!(unsafe { libc::signal(libc::SIGUSR1, run_another as *const () as usize) }, libc::SIG_ERR);
        for _ in 0..5 {
            let vm = protected_vm();
            let vcpu = guest(vm, FOR_EVER);
            VCPU.store(vcpu, Ordering::Relaxed);
            FILE.store(vm, Ordering::Relaxed);
            VM.store(protected_vm(), Ordering::Relaxed);
            interrupted(
                libc::SIGUSR1,
                || (),
                || {
                    assert_eq!(ioctl(vcpu, KVM_RUN, 0), Err(libc::EINTR));
                },
            );
            assert_eq!(REFUSED.load(Ordering::Relaxed), 0);
            assert_eq!(open_vms(), 0, "the handler or its thread keeps something");
        }
        assert_eq!(HANDLED.load(Ordering::Relaxed), 5);
    }

    extern "C" fn nothing(_: c_int) {}

    pub(super) fn closed_while_it_runs() {
        // SAFETY: a handler that does nothing.
        assert_ne!(unsafe { libc::signal(libc::SIGUSR1, nothing as *const () as usize) }, libc::SIG_ERR);
        for _ in 0..5 {
            let vm = protected_vm();
            let vcpu = guest(vm, FOR_EVER);
            let close = || {
                // SAFETY: descriptors that are closed once.
                [vcpu, vm].into_iter().for_each(|fd| assert_eq!(unsafe { libc::close(fd) }, 0));
                assert!(open_vms() > 0, "what runs is still there");
            };
            interrupted(libc::SIGUSR1, close, || assert_eq!(ioctl(vcpu, KVM_RUN, 0), Err(libc::EINTR)));
            assert_eq!(open_vms(), 0, "the thread keeps something");
        }
    }
}
