//! gmem's own memory under `gmem run`: it asks neither libc nor the client for any. Each client is this test program itself, run
//! again under gmem with the name of a part in the environment; it uses libc only and knows nothing of gmem.

mod common;

use common::under_gmem;

#[test]
fn client() {
    match common::part().as_str() {
        "filter" => parts::filter_without_memory(),
        "mappings" => parts::no_mapping_is_left(),
        "back" => parts::back_from_the_limit(),
        "fork" => parts::forks_amid_allocations(),
        _ => {}
    }
}

#[test]
fn a_filter_that_forbids_to_ask_for_memory_stops_the_client_and_not_gmem() {
    under_gmem("filter");
}

fn limit_can_be_reached() -> bool {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|text| text.trim().parse().ok());
    let can = limit.is_some_and(|limit: u32| limit <= 1 << 17);
    if !can {
        eprintln!("skipped: vm.max_map_count is too high for a test to reach");
    }
    can
}

#[test]
fn small_things_work_when_the_process_has_all_mappings_that_it_may_have() {
    if limit_can_be_reached() {
        under_gmem("mappings");
    }
}

#[test]
fn a_guest_of_too_many_pieces_can_be_made_whole() {
    if limit_can_be_reached() {
        under_gmem("back");
    }
}

#[test]
fn children_that_were_forked_while_other_threads_use_gmem_can_use_it() {
    under_gmem("fork");
}

mod parts {
    use std::ffi::{c_int, c_ulong};
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::common::{PAGE, PRIVATE, create_file, ioctl, protected_vm, set_attributes, try_protected_vm};

    /// Makes every second page private and shared again, which takes a piece of gmem's memory for each.
    fn scatter(vm: c_int) -> Result<(), i32> {
        for attributes in [PRIVATE, 0] {
            for page in 0..4000 {
                set_attributes(vm, page * 2 * PAGE, PAGE, attributes)?;
            }
        }
        Ok(())
    }

    /// Kills the process at every system call but a few, none of which gives it memory.
    pub(super) fn filter_without_memory() {
        const SIZE: u64 = 64 << 20;
        let vm = protected_vm();
        let file = create_file(vm, SIZE).expect("a file");
        let instruction = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
        let calls = [
            libc::SYS_ioctl,
            libc::SYS_write,
            libc::SYS_exit_group,
            libc::SYS_fallocate,
            libc::SYS_rt_sigreturn,
            libc::SYS_close,
            libc::SYS_madvise,
            libc::SYS_munmap,
            libc::SYS_read,
            // Rust's library, in a debug build, asks whether a descriptor that it closes is open; that goes through libc.
            libc::SYS_fcntl,
        ];
        let mut filter = vec![instruction(0x20, 0, 0)];
        for call in calls {
            let number = u32::try_from(call).expect("a system call number");
            filter.extend([instruction(0x15, 1, number), instruction(0x06, 0, libc::SECCOMP_RET_ALLOW)]);
        }
        filter.push(instruction(0x06, 0, libc::SECCOMP_RET_KILL_PROCESS));
        let len = u16::try_from(filter.len()).expect("a short program");
        let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
        // SAFETY: the program lives until the call returns.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER as c_ulong;
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
        }
        let mut files = [-1; 64];
        let outcome = scatter(vm).and_then(|()| set_attributes(vm, 0, SIZE, PRIVATE)).and_then(|_| {
            for file in &mut files {
                *file = create_file(vm, PAGE)?;
            }
            Ok(())
        });
        // SAFETY: descriptors of this function's; this process ends without what Rust would do, which asks for memory.
        unsafe {
            let len = SIZE.cast_signed();
            let allocated = libc::fallocate(file, 1, 0, len) == 0 && libc::fallocate(file, 3, 0, len) == 0;
            let closed = files.iter().all(|file| libc::close(*file) == 0);
            libc::_exit(match (outcome, allocated, closed) {
                (Err(_), ..) => 2,
                (_, false, _) => 3,
                (.., false) => 4,
                _ => 0,
            });
        }
    }

    /// Neither gmem nor anyone else can map anything, until this thread gives back what it has taken.
    pub(super) fn no_mapping_is_left() {
        const ROOM: usize = 4 << 30;
        let vm = protected_vm();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let write = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, which is cut into pieces and never used; between that and its end nothing here allocates.
        let outcome = unsafe {
            let room = libc::mmap(std::ptr::null_mut(), ROOM, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(room, libc::MAP_FAILED);
            let cut = |at: usize| libc::mprotect(room.wrapping_byte_add(at), 4096, write) == 0;
            let full = !(0..ROOM).step_by(2 * 4096).all(cut);
            // A cut takes two. Shared memory is never joined to a mapping that is there.
            let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            let map = |_| libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, shared, -1, 0);
            let none_left = (0..8).map(map).any(|mapped| mapped == libc::MAP_FAILED);
            let outcome = scatter(vm);
            libc::munmap(room, ROOM);
            assert!(full && none_left, "the limit was not reached");
            outcome
        };
        assert_eq!(outcome, Ok(()));
        create_file(vm, PAGE).expect("a file");
    }

    /// Every second page of the guest is converted, until the process may have no more mappings; then all of them back.
    pub(super) fn back_from_the_limit() {
        const SIZE: u64 = 1 << 29;
        const KVM_SET_USER_MEMORY_REGION2: c_ulong = 0x40a0_ae49;
        let vm = protected_vm();
        let file = create_file(vm, SIZE).expect("a file");
        let (prot, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping.
        let ram = unsafe { libc::mmap(std::ptr::null_mut(), 1 << 29, prot, kind, -1, 0) };
        assert_ne!(ram, libc::MAP_FAILED);
        let mut slot = [0u64; 20];
        // KVM_MEM_GUEST_MEMFD, above slot 0; the size, the address, the offset in the file and the file.
        (slot[0], slot[2], slot[3]) = (4 << 32, SIZE, ram.addr() as u64);
        slot[5] = u64::try_from(file).expect("a descriptor");
        ioctl(vm, KVM_SET_USER_MEMORY_REGION2, slot.as_ptr().addr()).expect("a slot");
        let refused = (0..SIZE / PAGE / 2).find_map(|page| set_attributes(vm, page * 2 * PAGE, PAGE, PRIVATE).err());
        let back = [PAGE, SIZE].map(|len| set_attributes(vm, 0, len, 0));
        assert_eq!((refused, back), (Some(libc::ENOMEM), [Ok(0); 2]));
    }

    /// A child has one thread, and the heaps and its parent's VMs as the others left them.
    pub(super) fn forks_amid_allocations() {
        const CHILDREN: usize = 50;
        const KEEP_SIZE: c_int = 1;
        const PUNCH_HOLE: c_int = 2;
        let vms = [protected_vm(), protected_vm()];
        let shared = create_file(vms[0], 64 * PAGE).expect("a file");
        // SAFETY: a call about a descriptor.
        let change = move |mode| unsafe { libc::fallocate(shared, mode | KEEP_SIZE, 0, 64 * 4096) };
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let done = &done;
            for vm in vms {
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        scatter(vm).expect("attributes");
                    }
                });
            }
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    assert_eq!([change(0), change(PUNCH_HOLE)], [0; 2]);
                }
            });
            for _ in 0..CHILDREN {
                // SAFETY: the child makes system calls and exits; it ends by itself if one of them never returns.
                let child = unsafe { libc::fork() };
                if child == 0 {
                    // SAFETY: as above.
                    unsafe { libc::alarm(20) };
                    let works = try_protected_vm().and_then(|vm| {
                        for page in 0..100 {
                            set_attributes(vm, page * 2 * PAGE, PAGE, PRIVATE)?;
                        }
                        create_file(vm, PAGE)
                    });
                    let works = if change(0) == 0 { works } else { Err(255) };
                    // SAFETY: as above.
                    unsafe { libc::_exit(works.map_or_else(|error| error, |_| 0)) };
                }
                let mut status = 0;
                // SAFETY: a child of this process.
                unsafe { libc::waitpid(child, &raw mut status, 0) };
                if status != 0 {
                    done.store(true, Ordering::Relaxed);
                }
                assert_eq!(status, 0, "the child could not use gmem");
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
