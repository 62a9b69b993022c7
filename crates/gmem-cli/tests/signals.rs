//! Signal handlers that call gmem, wherever their thread is. Each client is this test program itself, run again under gmem with
//! the name of a part in the environment; it uses libc only and knows nothing of gmem.

mod common;

use common::under_gmem;

#[test]
fn client() {
    match common::part().as_str() {
        "malloc" => parts::handler_in_malloc(),
        "descriptors" => parts::handler_in_a_look_up(),
        "device" => parts::handler_at_a_device(),
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

mod parts {
    use std::ffi::{c_int, c_ulong};
    use std::ptr::null_mut;
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
        const KVM_CREATE_VCPU: c_ulong = 0xae41;
        const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
        const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
        const KVM_SET_REGS: c_ulong = 0x4090_ae82;
        const KVM_RUN: c_ulong = 0xae80;
        let vm = protected_vm();
        let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0).expect("a vCPU");
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let ram = unsafe { libc::mmap(null_mut(), 4096, prot, flags, -1, 0) };
        assert_ne!(ram, libc::MAP_FAILED);
        // mov [0x8000], al; jmp back to it
        let code = [0xa2, 0x00, 0x80, 0xeb, 0xfb];
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
        let mut exits = 0;
        amid_signals(vm, convert, || match ioctl(vcpu, KVM_RUN, 0) {
            Ok(_) => exits += 1,
            Err(error) => assert_eq!(error, libc::EINTR, "{}", errno()),
        });
        assert!(exits > 100, "{exits} exits");
    }
}
