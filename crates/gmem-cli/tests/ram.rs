//! Guest RAM of every kind under `gmem run`: it is moved when it becomes guest memory, which a client must not notice. Each
//! client is this test program itself, run again under gmem with the name of a part in the environment; it uses libc only and
//! knows nothing of gmem. What it expects is what Linux does without gmem.

mod common;

use common::under_gmem;

#[test]
fn client() {
    match common::part().as_str() {
        "files" => parts::private_files(),
        "protection" => parts::protected_pages(),
        "freed" => parts::freed_by_libc(),
        "advice" => parts::advice(),
        "shared" => parts::shared_huge_pages(),
        "remap" => parts::moves_and_resizes(),
        "flags" => parts::locked_and_kept_from_children(),
        "slots" => parts::many_slots_of_one_mapping(),
        "later" => parts::flags_that_come_between_slots(),
        _ => {}
    }
}

#[test]
fn private_mappings_of_files_keep_their_bytes() {
    under_gmem("files");
}

#[test]
fn pages_that_cannot_be_read_keep_their_bytes() {
    under_gmem("protection");
}

#[test]
fn memory_that_libc_unmaps_by_itself_is_forgotten() {
    under_gmem("freed");
}

#[test]
fn advice_about_memory_does_what_it_does_to_private_memory() {
    under_gmem("advice");
}

#[test]
fn advice_about_shared_huge_pages_keeps_their_bytes() {
    under_gmem("shared");
}

#[test]
fn memory_that_is_moved_and_resized_stays_private_memory() {
    under_gmem("remap");
}

#[test]
fn locked_memory_and_what_children_and_dumps_are_not_to_have_stay_that() {
    under_gmem("flags");
}

#[test]
fn many_slots_of_one_mapping_take_one_descriptor_and_stay_apart() {
    under_gmem("slots");
}

#[test]
fn what_a_mapping_is_given_between_two_slots_of_it_stays() {
    under_gmem("later");
}

mod parts {
    use crate::common::{KVM_SET_USER_MEMORY_REGION, protected_vm};
    use std::ffi::{c_int, c_void};

    const PAGE: usize = 4096;
    const SIZE: usize = 1 << 20;
    const FILLED: u8 = 0x5a;
    const READ_WRITE: c_int = libc::PROT_READ | libc::PROT_WRITE;
    const ANONYMOUS: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

    /// Client memory. All accesses are checked against its length, as long as it is mapped.
    #[derive(Clone, Copy)]
    struct Ram {
        base: *mut u8,
        len: usize,
    }

    impl Ram {
        fn map(len: usize, flags: c_int, fd: c_int) -> Self {
            // SAFETY: a new mapping at an address of the kernel's choice.
            let base = unsafe { libc::mmap(std::ptr::null_mut(), len, READ_WRITE, flags, fd, 0) };
            assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            Self { base: base.cast(), len }
        }

        /// Anonymous memory with something in every byte.
        fn filled(len: usize) -> Self {
            let ram = Self::map(len, ANONYMOUS, -1);
            ram.fill(FILLED);
            ram
        }

        fn fill(self, byte: u8) {
            // SAFETY: the whole of a mapping that can be written.
            unsafe { self.base.write_bytes(byte, self.len) };
        }

        fn at(self, offset: usize) -> *mut c_void {
            assert!(offset < self.len);
            self.base.wrapping_add(offset).cast()
        }

        fn get(self, offset: usize) -> u8 {
            // SAFETY: within a mapping that can be read.
            unsafe { self.at(offset).cast::<u8>().read_volatile() }
        }

        fn set(self, offset: usize, byte: u8) {
            // SAFETY: within a mapping that can be written.
            unsafe { self.at(offset).cast::<u8>().write_volatile(byte) };
        }

        fn protect(self, offset: usize, len: usize, prot: c_int) {
            // SAFETY: memory that nothing but these functions uses.
            assert_eq!(unsafe { libc::mprotect(self.at(offset), len, prot) }, 0);
        }

        /// `madvise`; the error if there is one.
        fn advise(self, offset: usize, len: usize, advice: c_int) -> Result<(), i32> {
            // SAFETY: memory that nothing but these functions uses.
            let done = unsafe { libc::madvise(self.at(offset), len, advice) };
            if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
        }
    }

    /// Memory in another place, or of another size.
    fn remapped(ram: Ram, len: usize, flags: c_int) -> Ram {
        // SAFETY: memory that nothing but these functions uses; the caller forgets the old address if it has to.
        let base = unsafe { libc::mremap(ram.base.cast(), ram.len, len, flags) };
        assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Ram { base: base.cast(), len }
    }

    /// Makes a whole mapping guest memory, which moves it.
    fn register(vm: c_int, slot: u64, ram: Ram) {
        let claim = [slot, slot << 30, ram.len as u64, ram.base.addr() as u64];
        // SAFETY: a structure of the request's size.
        let done = unsafe { libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, claim.as_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    fn delete(vm: c_int, slot: u64) {
        let claim = [slot, 0, 0, 0];
        // SAFETY: a structure of the request's size.
        assert_eq!(unsafe { libc::ioctl(vm, KVM_SET_USER_MEMORY_REGION, claim.as_ptr()) }, 0);
    }

    /// A file of memory with something in all of its `len` bytes.
    fn filled_file(len: usize) -> c_int {
        let bytes = vec![FILLED; len];
        // SAFETY: a constant name, and bytes of this function's.
        unsafe {
            let fd = libc::memfd_create(c"ram".as_ptr(), 0);
            assert_eq!(libc::write(fd, bytes.as_ptr().cast(), len), len.cast_signed());
            fd
        }
    }

    pub(super) fn private_files() {
        const OWN: u8 = 0x77;
        let vm = protected_vm();
        // The mapping ends behind the file: those pages have nothing, and reading them would be SIGBUS.
        let file = filled_file(SIZE);
        let ram = Ram::map(2 * SIZE, libc::MAP_PRIVATE, file);
        ram.set(0, OWN);
        register(vm, 0, ram);
        assert_eq!([ram.get(0), ram.get(1), ram.get(PAGE), ram.get(SIZE - 1)], [OWN, FILLED, FILLED, FILLED]);
        ram.set(PAGE, OWN);
        let other = Ram::map(SIZE, libc::MAP_SHARED, file);
        assert_eq!([other.get(0), other.get(PAGE)], [FILLED, FILLED], "the file changes");

        // Of this one no page can be read, as with a device: it is left as it is.
        let nothing = Ram::map(SIZE, libc::MAP_PRIVATE, filled_file(0));
        register(vm, 1, nothing);
        // SAFETY: one byte, which the kernel cannot read.
        assert_eq!(unsafe { libc::write(file, nothing.at(0), 1) }, -1, "there is memory that was not there");
    }

    pub(super) fn protected_pages() {
        let vm = protected_vm();
        let ram = Ram::filled(SIZE);
        ram.protect(PAGE, PAGE, libc::PROT_NONE);
        ram.protect(3 * PAGE, PAGE, libc::PROT_WRITE);
        register(vm, 0, ram);
        ram.protect(0, SIZE, READ_WRITE);
        assert!((0..SIZE).step_by(PAGE).all(|offset| ram.get(offset) == FILLED));
    }

    /// Runs `work` in a child of fork, which must find what it looks for.
    fn in_child(work: impl FnOnce() -> bool) {
        // SAFETY: the child uses memory and exits.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::_exit(c_int::from(!work()));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert_eq!(status, 0, "in the child");
        }
    }

    /// Guest RAM from malloc: its free() unmaps without a call that can be seen, and what is there afterwards is something else.
    pub(super) fn freed_by_libc() {
        const LEN: usize = 8 << 20;
        const NEW: u8 = 0x11;
        let vm = protected_vm();
        // SAFETY: memory of this function's, used while it is allocated, or mapped.
        unsafe {
            let ram = Ram { base: libc::memalign(PAGE, LEN).cast(), len: LEN };
            ram.fill(FILLED);
            register(vm, 0, ram);
            delete(vm, 0);
            libc::free(ram.base.cast());
            let flags = ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let base = libc::mmap(ram.base.cast(), LEN, READ_WRITE, flags, -1, 0);
            assert_eq!(base, ram.base.cast(), "free() left it mapped");
            ram.fill(NEW);
            in_child(|| ram.get(PAGE) == NEW);
        }
    }

    /// Lengths are rounded up to pages, starts are not, and only shared memory can be removed from a file.
    pub(super) fn advice() {
        let vm = protected_vm();
        let ram = Ram::filled(SIZE);
        register(vm, 0, ram);
        assert_eq!(ram.advise(0, 100, libc::MADV_DONTNEED), Ok(()));
        assert_eq!([ram.get(0), ram.get(200), ram.get(PAGE - 1), ram.get(PAGE)], [0, 0, 0, FILLED]);
        assert_eq!(ram.advise(PAGE + 1, PAGE, libc::MADV_FREE), Err(libc::EINVAL));
        assert_eq!(ram.advise(PAGE, 0, libc::MADV_FREE), Ok(()));
        assert_eq!(ram.advise(4 * PAGE, PAGE, libc::MADV_REMOVE), Err(libc::EINVAL));
        assert!((PAGE..SIZE).step_by(PAGE).all(|offset| ram.get(offset) == FILLED));
        assert_eq!(ram.advise(2 * PAGE, 100, libc::MADV_FREE), Ok(()));
        assert_eq!(ram.get(3 * PAGE), FILLED);

        let file = Ram::map(SIZE, libc::MAP_PRIVATE, filled_file(SIZE));
        register(vm, 1, file);
        assert_eq!(file.advise(0, PAGE, libc::MADV_REMOVE), Err(libc::EACCES));
        assert_eq!(file.advise(0, PAGE, libc::MADV_FREE), Err(libc::EINVAL));
        assert_eq!(file.get(0), FILLED);
    }

    pub(super) fn shared_huge_pages() {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), 2 << 20, READ_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            eprintln!("skipped: no huge pages");
            return;
        }
        let ram = Ram { base: base.cast(), len: 2 << 20 };
        ram.fill(FILLED);
        register(protected_vm(), 0, ram);
        assert_eq!(ram.advise(0, ram.len, libc::MADV_DONTNEED), Ok(()));
        assert_eq!([ram.get(0), ram.get(PAGE)], [FILLED, FILLED]);
    }

    pub(super) fn moves_and_resizes() {
        const OWN: u8 = 0x77;
        let vm = protected_vm();
        let ram = Ram::filled(SIZE);
        register(vm, 0, ram);
        delete(vm, 0);
        let ram = remapped(ram, 8 * SIZE, libc::MREMAP_MAYMOVE);
        assert_eq!(ram.advise(0, PAGE, libc::MADV_DONTNEED), Ok(()));
        assert_eq!([ram.get(0), ram.get(PAGE), ram.get(SIZE), ram.get(8 * SIZE - 1)], [0, FILLED, 0, 0]);
        ram.set(4 * SIZE, OWN);
        in_child(|| {
            let same = ram.get(PAGE) == FILLED && ram.get(4 * SIZE) == OWN;
            ram.set(PAGE, 1);
            ram.set(4 * SIZE, 1);
            same
        });
        assert_eq!([ram.get(PAGE), ram.get(4 * SIZE)], [FILLED, OWN], "the child wrote to the parent's memory");

        let less = remapped(ram, 2 * PAGE, 0);
        let more = remapped(less, 8 * SIZE, libc::MREMAP_MAYMOVE);
        assert_eq!(
            [more.get(PAGE), more.get(2 * PAGE), more.get(4 * SIZE)],
            [FILLED, 0, 0],
            "what was cut off is back"
        );

        let ram = Ram::filled(SIZE);
        register(vm, 1, ram);
        let kept = remapped(ram, SIZE, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP);
        assert_eq!([ram.get(0), kept.get(0)], [0, FILLED]);
        ram.set(0, OWN);
        assert_eq!([ram.get(0), kept.get(0)], [OWN, FILLED]);

        // One half moves and grows beyond what is left of the other.
        let ram = Ram::filled(SIZE);
        register(vm, 2, ram);
        let half = Ram { len: SIZE / 2, ..ram };
        let moved = remapped(half, SIZE, libc::MREMAP_MAYMOVE);
        moved.set(SIZE / 2, OWN);
        assert_eq!([moved.get(0), moved.get(SIZE / 2 + 1), ram.get(SIZE / 2)], [FILLED, 0, FILLED]);
    }

    /// The `VmFlags` of the mapping that starts at `base`.
    fn flags(base: *const u8) -> Vec<String> {
        let all = std::fs::read_to_string("/proc/self/smaps").expect("mappings");
        let own = all.lines().skip_while(|line| !line.starts_with(&format!("{:x}-", base.addr())));
        let flags = own.filter_map(|line| line.strip_prefix("VmFlags: ")).next().expect("flags");
        flags.split_whitespace().map(str::to_owned).collect()
    }

    pub(super) fn locked_and_kept_from_children() {
        let vm = protected_vm();
        // Small enough for every limit of locked memory.
        let ram = Ram::filled(4 * PAGE);
        assert_eq!(ram.advise(0, ram.len, libc::MADV_DONTFORK), Ok(()));
        assert_eq!(ram.advise(0, ram.len, libc::MADV_DONTDUMP), Ok(()));
        // SAFETY: memory of this function's.
        assert_eq!(unsafe { libc::mlock(ram.base.cast(), ram.len) }, 0);
        register(vm, 0, ram);
        let flags = flags(ram.base);
        assert!(["lo", "dc", "dd"].iter().all(|flag| flags.iter().any(|has| has == flag)), "{flags:?}");
        for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
            assert_eq!(ram.advise(0, PAGE, advice), Err(libc::EINVAL), "it is locked");
        }
        assert_eq!(ram.get(0), FILLED);
        let ram = Ram::filled(4 * PAGE);
        assert_eq!(ram.advise(0, ram.len, libc::MADV_WIPEONFORK), Ok(()));
        register(vm, 1, ram);
        in_child(|| (0..ram.len).step_by(PAGE).all(|offset| ram.get(offset) == 0));
        assert_eq!(ram.get(0), FILLED);
    }

    /// A page of a mapping.
    fn page(ram: Ram, number: usize) -> Ram {
        Ram { base: ram.at(number * PAGE).cast(), len: PAGE }
    }

    fn open_files() -> usize {
        std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
    }

    pub(super) fn many_slots_of_one_mapping() {
        const SLOTS: u8 = 64;
        let at = |slot: u8| usize::from(slot) * PAGE;
        let vm = protected_vm();
        let ram = Ram::map(at(SLOTS), ANONYMOUS, -1);
        let before = open_files();
        for slot in 0..SLOTS {
            ram.set(at(slot), slot);
            register(vm, slot.into(), page(ram, slot.into()));
        }
        assert_eq!(open_files(), before + 1);
        assert!((0..SLOTS).all(|slot| ram.get(at(slot)) == slot));
        // One in the middle moves and grows, one is unmapped and mapped again: the others do not notice.
        let moved = remapped(page(ram, 20), 4 * PAGE, libc::MREMAP_MAYMOVE);
        assert_eq!([moved.get(0), moved.get(PAGE)], [20, 0]);
        moved.fill(FILLED);
        let flags = ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the page of a mapping of this function's.
        assert_eq!(unsafe { libc::mmap(ram.at(at(30)), PAGE, READ_WRITE, flags, -1, 0) }, ram.at(at(30)));
        assert_eq!(ram.get(at(30)), 0);
        ram.set(at(30), FILLED);
        register(vm, SLOTS.into(), page(ram, 30));
        assert_eq!(ram.advise(at(40), PAGE, libc::MADV_DONTNEED), Ok(()));
        for slot in (0..SLOTS).filter(|slot| *slot != 20) {
            let expected = match slot {
                30 => FILLED,
                40 => 0,
                slot => slot,
            };
            assert_eq!(ram.get(at(slot)), expected, "page {slot}");
        }
        in_child(|| ram.get(at(50)) == 50 && ram.get(at(30)) == FILLED && moved.get(PAGE) == FILLED);
    }

    pub(super) fn flags_that_come_between_slots() {
        const GIVEN: [&str; 2] = ["dd", "lo"];
        let vm = protected_vm();
        let ram = Ram::filled(4 * PAGE);
        register(vm, 0, page(ram, 0));
        assert_eq!(ram.advise(PAGE, 3 * PAGE, libc::MADV_DONTDUMP), Ok(()));
        register(vm, 1, page(ram, 1));
        // SAFETY: memory of this function's.
        assert_eq!(unsafe { libc::mlock(ram.at(2 * PAGE), 2 * PAGE) }, 0);
        register(vm, 2, page(ram, 2));
        // By number, and all of the rest.
        // SAFETY: as above.
        assert_eq!(unsafe { libc::syscall(libc::SYS_munlock, ram.at(3 * PAGE), PAGE) }, 0);
        register(vm, 3, page(ram, 3));
        let given = |number: usize| {
            let has = flags(page(ram, number).base);
            GIVEN.map(|flag| has.iter().any(|set| set == flag))
        };
        assert_eq!([given(0), given(1), given(2), given(3)], [[false; 2], [true, false], [true; 2], [true, false]]);
    }
}
