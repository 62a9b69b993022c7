//! What libc's many ways to a descriptor say of a guest_memfd under `gmem run`: what the kernel says. Each client is this test
//! program itself, run again under gmem with the name of a part in the environment; it uses libc only and knows nothing of
//! gmem.

mod common;

use common::under_gmem;

#[test]
fn client() {
    match common::part().as_str() {
        "paths" => parts::paths(),
        "names" => parts::names(),
        "closing" => parts::closing(),
        "numbers" => parts::numbers(),
        "fortified" => parts::fortified(),
        "refusals" => parts::refusals(),
        "forks" => parts::forks(),
        "hidden" => parts::hidden(),
        "stale" => parts::stale(),
        "limits" => parts::limits(),
        _ => {}
    }
}

#[test]
fn a_path_that_cannot_be_read_is_an_error() {
    under_gmem("paths");
}

#[test]
fn no_name_of_a_descriptor_opens_its_file_again() {
    under_gmem("names");
}

#[test]
fn gmem_forgets_a_descriptor_when_it_is_closed_and_only_then() {
    under_gmem("closing");
}

#[test]
fn system_calls_by_number_are_answered_as_by_name() {
    under_gmem("numbers");
}

#[test]
fn programs_built_with_fortify_source_get_the_same_answers() {
    under_gmem("fortified");
}

#[test]
fn calls_are_refused_with_the_errno_of_the_kernel() {
    under_gmem("refusals");
}

#[test]
fn a_child_has_its_own_memory_however_it_was_made() {
    under_gmem("forks");
}

#[test]
fn a_client_may_have_the_numbers_of_gmems_own_descriptors() {
    under_gmem("hidden");
}

#[test]
fn a_number_that_was_closed_unseen_is_its_next_files() {
    under_gmem("stale");
}

#[test]
fn the_limit_of_file_sizes_holds_for_all_but_guest_memfds() {
    under_gmem("limits");
}

mod parts {
    use crate::common::{
        KVM_CREATE_GUEST_MEMFD, KVM_CREATE_VCPU, KVM_CREATE_VM, KVM_RUN, KVM_SET_USER_MEMORY_REGION, PRIVATE,
        create_file, ioctl, open_kvm, protected_vm, set_attributes,
    };
    use std::ffi::{CStr, CString, c_char, c_int, c_long, c_void};
    use std::ptr::{null, null_mut};

    const SIZE: u64 = 0x20_0000;
    /// No page is there.
    const BAD: *const c_char = std::ptr::without_provenance(8);
    const NOWHERE: c_int = libc::AT_FDCWD;

    unsafe extern "C" {
        fn _Fork() -> c_int;
        fn __read_chk(fd: c_int, buffer: *mut c_void, count: usize, room: usize) -> isize;
        fn __pread_chk(fd: c_int, buffer: *mut c_void, count: usize, offset: i64, room: usize) -> isize;
        fn __pread64_chk(fd: c_int, buffer: *mut c_void, count: usize, offset: i64, room: usize) -> isize;
        fn __readlink_chk(path: *const c_char, buffer: *mut c_char, size: usize, room: usize) -> isize;
        fn __readlinkat_chk(dir: c_int, path: *const c_char, buffer: *mut c_char, size: usize, room: usize) -> isize;
        fn __open_2(path: *const c_char, flags: c_int) -> c_int;
        fn __open64_2(path: *const c_char, flags: c_int) -> c_int;
        fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
        fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    }

    /// What a call returned, or its errno.
    fn result(returned: impl Into<i64>) -> Result<i64, i32> {
        match returned.into() {
            -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
            value => Ok(value),
        }
    }

    fn sized(returned: isize) -> Result<i64, i32> {
        result(returned as i64)
    }

    fn file() -> c_int {
        let claim = [SIZE, 0, 0, 0, 0, 0, 0, 0];
        ioctl(protected_vm(), KVM_CREATE_GUEST_MEMFD, claim.as_ptr().addr()).expect("a file")
    }

    /// An ordinary file with four bytes in it.
    fn memfd() -> c_int {
        // SAFETY: a new descriptor and a constant.
        unsafe {
            let fd = libc::memfd_create(c"x".as_ptr(), 0);
            assert_eq!(libc::write(fd, c"four".as_ptr().cast(), 4), 4);
            assert_eq!(libc::lseek(fd, 0, libc::SEEK_SET), 0);
            fd
        }
    }

    fn name_of(fd: c_int) -> CString {
        CString::new(format!("/proc/self/fd/{fd}")).unwrap()
    }

    /// Whether gmem takes a descriptor for a guest_memfd, whose allocation it then does.
    fn is_guest_memfd(fd: c_int) -> bool {
        // SAFETY: any descriptor will do.
        unsafe { libc::fallocate(fd, 1, 0, 4096) == 0 && libc::lseek(fd, 0, libc::SEEK_SET) == -1 }
    }

    pub(super) fn paths() {
        let open_all = || {
            let mut byte: c_char = 0;
            // SAFETY: the kernel finds that the path cannot be read.
            unsafe {
                assert_eq!(result(libc::open(BAD, libc::O_RDONLY)), Err(libc::EFAULT));
                assert_eq!(result(libc::openat(NOWHERE, BAD, libc::O_RDONLY)), Err(libc::EFAULT));
                assert_eq!(sized(libc::readlink(BAD, &raw mut byte, 1)), Err(libc::EFAULT));
                assert_eq!(sized(libc::readlinkat(NOWHERE, BAD, &raw mut byte, 1)), Err(libc::EFAULT));
                assert_eq!(result(libc::syscall(libc::SYS_open, BAD, 0)), Err(libc::EFAULT));
                assert_eq!(result(libc::chmod(BAD, 0)), Err(libc::EFAULT));
            }
        };
        open_all();
        let fd = file();
        open_all();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping of two pages, of which the second goes; each string ends where the first one does.
        unsafe {
            let pages = libc::mmap(null_mut(), 8192, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0).cast::<u8>();
            assert_eq!(libc::munmap(pages.add(4096).cast(), 4096), 0);
            for (path, expected) in [(name_of(fd), Err(libc::ENXIO)), (c"/none".to_owned(), Err(libc::ENOENT))] {
                let bytes = path.as_bytes_with_nul();
                let at = pages.add(4096 - bytes.len());
                at.copy_from(bytes.as_ptr(), bytes.len());
                assert_eq!(result(libc::open(at.cast(), libc::O_RDWR)), expected);
            }
            // Without its end the string goes on where nothing is.
            pages.add(4095).write(b'x');
            assert_eq!(result(libc::open(pages.add(4090).cast(), libc::O_RDWR)), Err(libc::EFAULT));
            let long = CString::new(format!("/proc/self/fd/{}{fd}", "../fd/".repeat(20))).unwrap();
            let other = result(libc::open(long.as_ptr(), libc::O_PATH));
            assert!(other.is_ok(), "a long path is the kernel's: {other:?}");
        }
    }

    pub(super) fn names() {
        let fd = file();
        let own = std::process::id();
        let names = [
            format!("/proc/self/fd/{fd}"),
            format!("/proc/thread-self/fd/{fd}"),
            format!("/proc/{own}/fd/{fd}"),
            format!("/dev/fd/{fd}"),
        ];
        for name in names.map(|name| CString::new(name).unwrap()) {
            let path = name.as_ptr();
            // SAFETY: the path is a string, and the buffer has the size given.
            unsafe {
                for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
                    assert_eq!(result(libc::open(path, flags)), Err(libc::ENXIO), "{name:?}");
                    assert_eq!(result(libc::openat(NOWHERE, path, flags)), Err(libc::ENXIO), "{name:?}");
                }
                assert_eq!(result(libc::creat(path, 0o600)), Err(libc::ENXIO), "{name:?}");
                for mode in [c"r", c"r+", c"w"] {
                    assert!(libc::fopen(path, mode.as_ptr()).is_null(), "{name:?}");
                    assert_eq!(result(-1), Err(libc::ENXIO), "{name:?}");
                }
                assert_eq!(result(libc::open(path, libc::O_RDONLY | libc::O_NOFOLLOW)), Err(libc::ELOOP), "{name:?}");
                assert_eq!(
                    result(libc::open(path, libc::O_RDONLY | libc::O_DIRECTORY)),
                    Err(libc::ENOTDIR),
                    "{name:?}"
                );
                let reference = libc::open(path, libc::O_PATH);
                assert!(reference >= 0, "{name:?}");
                libc::close(reference);
                let mut buffer = [0u8; 64];
                let len = libc::readlink(path, buffer.as_mut_ptr().cast(), 64);
                let said = buffer.get(..usize::try_from(len).unwrap()).unwrap();
                assert_eq!(said, b"/[kvm-gmem] (deleted)", "{name:?}");
                assert_eq!(sized(libc::readlink(path, buffer.as_mut_ptr().cast(), 0)), Err(libc::EINVAL), "{name:?}");
            }
        }
        let ordinary = memfd();
        // SAFETY: a string.
        assert!(unsafe { libc::open(name_of(ordinary).as_ptr(), libc::O_RDWR) } >= 0, "other files open again");
    }

    pub(super) fn closing() {
        let fd = file();
        let first = fd.unsigned_abs();
        let close_range = |flags: c_int| {
            // SAFETY: descriptors of this function's.
            result(unsafe { libc::close_range(first, first, flags) })
        };
        assert_eq!(close_range(0x80), Err(libc::EINVAL));
        assert_eq!(close_range(0x80 | 4), Err(libc::EINVAL));
        assert!(is_guest_memfd(fd), "nothing was closed");
        assert_eq!(close_range(4), Ok(0), "close-on-exec");
        assert!(is_guest_memfd(fd), "nothing was closed");
        // SAFETY: a descriptor of this function's.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_GETFD) }, 1);
        streams();
        // Last: from here on this thread has a table of its own, which /proc/self does not show.
        assert_eq!(close_range(2), Ok(0));
        assert_eq!(memfd(), fd, "the lowest number");
        assert!(!is_guest_memfd(fd));
    }

    /// libc closes descriptors of its own accord.
    fn streams() {
        let fd = file();
        let mut bytes = [0u8; 4];
        // SAFETY: descriptors and a stream of this function's, and a buffer of four bytes.
        unsafe {
            let stream = libc::fdopen(fd, c"r".as_ptr());
            assert!(!stream.is_null());
            assert_eq!(libc::fclose(stream), 0);
            assert_eq!(memfd(), fd, "the lowest number");
            assert_eq!((libc::read(fd, bytes.as_mut_ptr().cast(), 4), &bytes), (4, b"four"));
            let stream = libc::fdopen(file(), c"r".as_ptr());
            let stream = libc::freopen(name_of(memfd()).as_ptr(), c"r".as_ptr(), stream);
            assert!(!stream.is_null());
            assert_eq!(libc::fgetc(stream), i32::from(b'f'));
            assert_eq!(libc::lseek(libc::fileno(stream), 0, libc::SEEK_SET), 0, "an ordinary file");
        }
    }

    /// By number, with up to six arguments.
    fn call(number: c_long, args: &[i64]) -> Result<i64, i32> {
        let arg = |index: usize| args.get(index).copied().unwrap_or(0);
        // SAFETY: the callers pass what the call takes.
        result(unsafe { libc::syscall(number, arg(0), arg(1), arg(2), arg(3), arg(4), arg(5)) })
    }

    fn address<T>(of: *const T) -> i64 {
        i64::try_from(of.addr()).unwrap()
    }

    pub(super) fn numbers() {
        let (fd, memfd) = (i64::from(file()), i64::from(memfd()));
        let mut buffer = [0u8; 64];
        let at = address(buffer.as_mut_ptr());
        let vector = [at, 64];
        let vectors = address(vector.as_ptr());
        let [inval, spipe, nxio] = [libc::EINVAL, libc::ESPIPE, libc::ENXIO].map(Err);
        let name = name_of(file());
        let path = address(name.as_ptr());
        let here = i64::from(NOWHERE);
        let offset = 0i64;
        let offset_at = address(&raw const offset);
        let answers = [
            (libc::SYS_read, vec![fd, at, 64], inval),
            (libc::SYS_write, vec![fd, at, 64], inval),
            (libc::SYS_readv, vec![fd, vectors, 1], inval),
            (libc::SYS_writev, vec![fd, vectors, 1], inval),
            (libc::SYS_pread64, vec![fd, at, 64, 0], spipe),
            (libc::SYS_pread64, vec![fd, at, 64, -1], inval),
            (libc::SYS_pwrite64, vec![fd, at, 64, 0], spipe),
            (libc::SYS_preadv, vec![fd, vectors, 1, 0, 0], spipe),
            (libc::SYS_pwritev, vec![fd, vectors, 1, 0, 0], spipe),
            (libc::SYS_preadv2, vec![fd, vectors, 1, 0, 0, 0], spipe),
            (libc::SYS_preadv2, vec![fd, vectors, 1, -1, -1, 0], inval),
            (libc::SYS_pwritev2, vec![fd, vectors, 1, 0, 0, 0], spipe),
            (libc::SYS_lseek, vec![fd, 0, 0], spipe),
            (libc::SYS_fsync, vec![fd], inval),
            (libc::SYS_fdatasync, vec![fd], inval),
            (libc::SYS_ftruncate, vec![fd, 0], inval),
            (libc::SYS_fchmod, vec![fd, 0o600], inval),
            (libc::SYS_fchown, vec![fd, 0, 0], inval),
            (libc::SYS_utimensat, vec![fd, 0, 0, 0], inval),
            (libc::SYS_sendfile, vec![memfd, fd, 0, 16], inval),
            (libc::SYS_sendfile, vec![memfd, fd, offset_at, 16], spipe),
            (libc::SYS_splice, vec![fd, 0, memfd, 0, 16, 0], inval),
            (libc::SYS_copy_file_range, vec![fd, 0, memfd, 0, 16, 0], Err(libc::EXDEV)),
            (libc::SYS_copy_file_range, vec![memfd, 0, fd, 0, 16, 0], Err(libc::EXDEV)),
            (libc::SYS_fallocate, vec![fd, 0, 0, 4096], Err(libc::EOPNOTSUPP)),
            (libc::SYS_fallocate, vec![fd, 1, 0, 4096], Ok(0)),
            (libc::SYS_open, vec![path, i64::from(libc::O_RDWR)], nxio),
            (libc::SYS_openat, vec![here, path, i64::from(libc::O_RDWR)], nxio),
            (libc::SYS_readlink, vec![path, at, 64], Ok(21)),
            (libc::SYS_readlinkat, vec![here, path, at, 64], Ok(21)),
            // And of other files what the kernel says.
            (libc::SYS_read, vec![memfd, at, 64], Ok(4)),
            (libc::SYS_pread64, vec![memfd, at, 64, 1], Ok(3)),
            (libc::SYS_preadv, vec![memfd, vectors, 1, 2, 0], Ok(2)),
            (libc::SYS_fsync, vec![memfd], Ok(0)),
        ];
        for (number, args, expected) in answers {
            assert_eq!(call(number, &args), expected, "system call {number} with {args:?}");
        }
        // SAFETY: all zeros are a structure of numbers, which the kernel fills.
        let (mut stat, mut statx): (libc::stat, libc::statx) = unsafe { std::mem::zeroed() };
        let (stat_at, statx_at) = (address(&raw mut stat), address(&raw mut statx));
        let empty = i64::from(libc::AT_EMPTY_PATH);
        let nothing = address(c"".as_ptr());
        assert_eq!((call(libc::SYS_fstat, &[fd, stat_at]), stat.st_nlink), (Ok(0), 1));
        for (directory, path, flags) in [(fd, nothing, empty), (here, path, 0)] {
            stat.st_nlink = 0;
            statx.stx_nlink = 0;
            assert_eq!((call(libc::SYS_newfstatat, &[directory, path, stat_at, flags]), stat.st_nlink), (Ok(0), 1));
            assert_eq!((call(libc::SYS_statx, &[directory, path, flags, 4, statx_at]), statx.stx_nlink), (Ok(0), 1));
        }
        let elsewhere = [memfd, nothing, stat_at, empty];
        assert_eq!((call(libc::SYS_newfstatat, &elsewhere), stat.st_nlink), (Ok(0), 0), "a memfd has no link");
    }

    pub(super) fn fortified() {
        let (fd, ordinary) = (file(), memfd());
        let name = name_of(fd);
        let path = name.as_ptr();
        let mut buffer = [0u8; 64];
        let at = buffer.as_mut_ptr();
        // SAFETY: the buffer has the size given, and the path is a string.
        unsafe {
            assert_eq!(sized(__read_chk(fd, at.cast(), 64, 64)), Err(libc::EINVAL));
            assert_eq!(sized(__pread_chk(fd, at.cast(), 64, 0, 64)), Err(libc::ESPIPE));
            assert_eq!(sized(__pread64_chk(fd, at.cast(), 64, 0, 64)), Err(libc::ESPIPE));
            assert_eq!(sized(__readlink_chk(path, at.cast(), 64, 64)), Ok(21));
            assert_eq!(sized(__readlinkat_chk(NOWHERE, path, at.cast(), 64, 64)), Ok(21));
            assert_eq!(result(__open_2(path, libc::O_RDONLY)), Err(libc::ENXIO));
            assert_eq!(result(__open64_2(path, libc::O_RDONLY)), Err(libc::ENXIO));
            assert_eq!(result(__openat_2(NOWHERE, path, libc::O_RDONLY)), Err(libc::ENXIO));
            assert_eq!(result(__openat64_2(NOWHERE, path, libc::O_RDONLY)), Err(libc::ENXIO));
            assert_eq!(sized(__read_chk(ordinary, at.cast(), 64, 64)), Ok(4));
            assert_eq!(sized(__pread64_chk(ordinary, at.cast(), 64, 3, 64)), Ok(1));
            assert_eq!(result(__open_2(c"/none".as_ptr(), libc::O_RDONLY)), Err(libc::ENOENT));
            // Asked for more than there is room for, libc ends the process, whatever the descriptor is.
            let child = libc::fork();
            if child == 0 {
                let silent = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
                libc::dup2(silent, 2);
                libc::_exit(i32::from(__read_chk(fd, at.cast(), 65, 64) != -1));
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{status:#x}");
        }
    }

    pub(super) fn refusals() {
        let (fd, ordinary) = (file(), memfd());
        let name = name_of(fd);
        let path = name.as_ptr();
        let empty: &CStr = c"";
        let mut byte = 0u8;
        let at: *mut c_void = (&raw mut byte).cast();
        let copy = |from: c_int, to: c_int, flags: u32| {
            // SAFETY: descriptors, and no offsets.
            sized(unsafe { libc::copy_file_range(from, null_mut(), to, null_mut(), 4, flags) })
        };
        // SAFETY: the byte is one byte, the strings are strings, and a time that is not there is now.
        unsafe {
            assert_eq!(sized(libc::pread(fd, at, 1, -1)), Err(libc::EINVAL));
            assert_eq!(sized(libc::pwrite(fd, at, 1, -4096)), Err(libc::EINVAL));
            assert_eq!(sized(libc::pread(fd, at, 1, 0)), Err(libc::ESPIPE));
            assert_eq!(result(libc::futimes(fd, null())), Err(libc::EINVAL));
            assert_eq!(result(libc::fchownat(fd, empty.as_ptr(), 0, 0, libc::AT_EMPTY_PATH)), Err(libc::EINVAL));
            assert_eq!(result(libc::fsetxattr(fd, c"user.x".as_ptr(), at, 1, 0)), Err(libc::EOPNOTSUPP));
            assert_eq!(sized(libc::fgetxattr(fd, c"user.x".as_ptr(), at, 1)), Err(libc::EOPNOTSUPP));
            assert_eq!(result(libc::fremovexattr(fd, c"user.x".as_ptr())), Err(libc::EOPNOTSUPP));
            assert_eq!(sized(libc::readahead(fd, 0, 4096)), Err(libc::EINVAL));
            let mut offset = 0;
            assert_eq!(sized(libc::sendfile(ordinary, fd, &raw mut offset, 4)), Err(libc::ESPIPE));
            assert_eq!(sized(libc::sendfile(ordinary, fd, null_mut(), 4)), Err(libc::EINVAL));
            for result in [
                result(libc::chmod(path, 0o644)),
                result(libc::chown(path, 0, 0)),
                result(libc::truncate(path, 0)),
                result(libc::utimes(path, null())),
                result(libc::utimensat(NOWHERE, path, null(), 0)),
                result(libc::fchmodat(NOWHERE, path, 0o644, 0)),
            ] {
                assert_eq!(result, Err(libc::EINVAL));
            }
            // The same of an ordinary file.
            assert_eq!(result(libc::chmod(name_of(ordinary).as_ptr(), 0o600)), Ok(0));
            assert_eq!(result(libc::futimes(ordinary, null())), Ok(0));
        }
        assert_eq!(copy(fd, ordinary, 0), Err(libc::EXDEV));
        assert_eq!(copy(fd, ordinary, 1), Err(libc::EINVAL));
        assert_eq!(copy(fd, 9999, 1), Err(libc::EBADF));
    }

    /// Guest RAM, which gmem keeps in memory that a child would share.
    fn guest_ram() -> *mut u8 {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let len = usize::try_from(SIZE).unwrap();
        // SAFETY: a new mapping.
        let ram = unsafe { libc::mmap(null_mut(), len, prot, flags, -1, 0) };
        assert_ne!(ram, libc::MAP_FAILED);
        let claim = [0, 0, SIZE, ram.addr() as u64];
        ioctl(protected_vm(), KVM_SET_USER_MEMORY_REGION, claim.as_ptr().addr()).expect("a slot");
        ram.cast()
    }

    /// What each child does: it finds what was there, and writes to guest RAM.
    extern "C" fn write(ram: *mut c_void) -> c_int {
        let ram = ram.cast::<u8>();
        // SAFETY: memory that was mapped before the child was made.
        unsafe {
            let same = ram.read_volatile() == 1;
            ram.write_volatile(2);
            c_int::from(!same)
        }
    }

    /// Makes a child that writes to guest RAM and ends.
    fn child_writes(ram: *mut u8, what: &str, make: impl FnOnce() -> i64) {
        // SAFETY: memory that was mapped before the child was made; one that goes on here makes no calls but its last one.
        unsafe {
            ram.write_volatile(1);
            let child = make();
            if child == 0 {
                libc::_exit(write(ram.cast()));
            }
            let child = c_int::try_from(child).unwrap();
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &raw mut status, 0), child, "{what}");
            assert_eq!(status, 0, "{what}: the child finds what was there");
            assert_eq!(ram.read_volatile(), 1, "{what}: the child wrote to its parent's memory");
        }
    }

    pub(super) fn forks() {
        let ram = guest_ram();
        let signal = i64::from(libc::SIGCHLD);
        // `struct clone_args`: the flags first, the signal fifth.
        let claim = [0, 0, 0, 0, signal, 0, 0, 0];
        let claim = address(claim.as_ptr());
        // SAFETY: the child of each writes and ends.
        child_writes(ram, "_Fork", || i64::from(unsafe { _Fork() }));
        child_writes(ram, "fork by number", || call(libc::SYS_fork, &[]).unwrap());
        child_writes(ram, "clone by number", || call(libc::SYS_clone, &[signal]).unwrap());
        child_writes(ram, "clone3 by number", || call(libc::SYS_clone3, &[claim, 64]).unwrap());
        // SAFETY: as above.
        child_writes(ram, "fork", || i64::from(unsafe { libc::fork() }));
        let (mut stack, mut told) = (vec![0u128; 1024], [0; 2]);
        let [parent_tid, child_tid] = &mut told;
        let mut clone = |flags: c_int| {
            let (top, none) = (stack.as_mut_ptr_range().end.cast(), null_mut::<c_void>());
            let (parent_tid, child_tid) = (&raw mut *parent_tid, &raw mut *child_tid);
            let flags = flags | libc::CLONE_PARENT_SETTID | libc::SIGCHLD;
            // SAFETY: the child has a stack for its function, and the kernel a place for its number.
            i64::from(unsafe { libc::clone(write, top, flags, ram.cast(), parent_tid, none, child_tid) })
        };
        child_writes(ram, "clone", || clone(libc::CLONE_CHILD_SETTID));
        // SAFETY: as above.
        let seen = unsafe {
            ram.write_volatile(1);
            let child = clone(libc::CLONE_VM | libc::CLONE_CHILD_SETTID);
            assert_eq!(libc::waitpid(c_int::try_from(child).unwrap(), null_mut(), 0), c_int::try_from(child).unwrap());
            (ram.read_volatile(), child)
        };
        assert_eq!(
            (seen, told),
            ((2, seen.1), [c_int::try_from(seen.1).unwrap(); 2]),
            "a child with its parent's memory"
        );
    }

    /// A vCPU that comes back from KVM_RUN at once.
    fn vcpu_that_does_not_run(vm: c_int) -> c_int {
        let vcpu = ioctl(vm, KVM_CREATE_VCPU, 0).expect("a vCPU");
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping of `struct kvm_run`, whose second byte is `immediate_exit`.
        unsafe {
            let run = libc::mmap(null_mut(), 4096, prot, flags, vcpu, 0);
            assert_ne!(run, libc::MAP_FAILED);
            run.cast::<u8>().add(1).write_volatile(1);
        }
        vcpu
    }

    pub(super) fn hidden() {
        const LIMIT: c_int = 512;
        let limit = libc::rlimit { rlim_cur: 512, rlim_max: 1024 };
        // SAFETY: a limit of this process's own.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }, 0);
        let library: c_int = std::env::var("GMEM_LIBRARY_FD").unwrap().parse().unwrap();
        let vm = protected_vm();
        let fd = create_file(vm, SIZE).expect("a file");
        let vcpu = vcpu_that_does_not_run(vm);
        let clients = memfd();
        // SAFETY: descriptors of this function's, and numbers above all that it knows.
        unsafe {
            assert_eq!(result(libc::fallocate(fd, 1, 0, 8192)), Ok(0));
            for number in 300..LIMIT {
                assert_eq!(result(libc::dup2(9999, number)), Err(libc::EBADF));
            }
            let put = |number: c_int| match number % 4 {
                0 => result(libc::dup2(clients, number)),
                1 => result(libc::dup3(clients, number, 0)),
                2 => call(libc::SYS_dup2, &[clients.into(), number.into()]),
                _ => call(libc::SYS_dup3, &[clients.into(), number.into(), 0]),
            };
            let numbers = || (300..LIMIT).chain(Some(library).filter(|library| *library >= LIMIT));
            let limit = libc::rlimit { rlim_cur: 1024, ..limit };
            for number in 300..LIMIT {
                assert_eq!(put(number), Ok(number.into()));
            }
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
            assert_eq!(put(library), Ok(library.into()));
            assert_eq!(ioctl(vcpu, KVM_RUN, 0), Err(libc::EINTR));
            assert_eq!(set_attributes(vm, 0, SIZE, PRIVATE), Ok(0));
            assert_eq!(result(libc::fallocate(fd, 3, 0, 4096)), Ok(0), "a hole in the guest_memfd");
            assert_eq!(result(libc::fallocate(fd, 1, 0, 4096)), Ok(0));
            let mut bytes = [0u8; 4];
            for number in numbers() {
                assert_eq!(libc::pread(number, bytes.as_mut_ptr().cast(), 4, 0), 4);
                assert_eq!(&bytes, b"four", "what is at {number} is the client's, and as it was");
                assert_eq!(result(libc::close(number)), Ok(0));
                assert_eq!(result(libc::fcntl(number, libc::F_GETFD)), Err(libc::EBADF), "{number} is closed");
            }
            assert_eq!(ioctl(vcpu, KVM_RUN, 0), Err(libc::EINTR));
        }
        let script = "test -e \"${LD_PRELOAD%%:*}\" && test ! -e /proc/self/fd/$0";
        let child = std::process::Command::new("/bin/sh").args(["-c", script, &library.to_string()]).output();
        let child = child.expect("a child");
        assert!(child.status.success() && child.stderr.is_empty(), "it has the library: {child:?}");
    }

    /// By an instruction that gmem does not stand in front of.
    fn close_unseen(fd: c_int) {
        let mut result = libc::SYS_close;
        // SAFETY: closes a descriptor that nobody uses any more.
        unsafe {
            std::arch::asm!("syscall", inout("rax") result, in("rdi") i64::from(fd), lateout("rcx") _, lateout("r11") _);
        }
        assert_eq!(result, 0);
    }

    pub(super) fn stale() {
        let fd = file();
        close_unseen(fd);
        // SAFETY: no descriptor.
        assert_eq!(result(unsafe { libc::ftruncate(fd, 0) }), Err(libc::EBADF));
        let fd = file();
        close_unseen(fd);
        assert_eq!(memfd(), fd, "the lowest number");
        let mut bytes = [0u8; 4];
        // SAFETY: an ordinary file, and a buffer of four bytes.
        unsafe {
            assert_eq!((libc::read(fd, bytes.as_mut_ptr().cast(), 4), &bytes), (4, b"four"));
            assert_eq!(result(libc::lseek(fd, 0, libc::SEEK_END)), Ok(4));
            let mut stat: libc::stat = std::mem::zeroed();
            assert_eq!((libc::fstat(fd, &raw mut stat), stat.st_nlink), (0, 0), "a memfd has no link");
            let page = libc::mmap(null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
            assert_eq!(page.cast::<[u8; 4]>().read(), *b"four");
        }
        close_unseen(fd);
        assert_eq!(file(), fd, "the lowest number");
        assert!(is_guest_memfd(fd));
        close_unseen(fd);
        assert_eq!(open_kvm(), Ok(fd), "the lowest number");
        assert!(ioctl(fd, KVM_CREATE_VM, 1).is_ok());
    }

    pub(super) fn limits() {
        use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
        const FILES: usize = 3000;
        static SIGNALS: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn count(_: c_int) {
            SIGNALS.fetch_add(1, Ordering::Relaxed);
        }
        let limit = libc::rlimit { rlim_cur: 4096, rlim_max: libc::RLIM_INFINITY };
        let (vm, ordinary, done) = (protected_vm(), memfd(), AtomicBool::new(false));
        // SAFETY: a limit and signals of this process's own.
        unsafe {
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::signal(libc::SIGCHLD, count as *const () as usize);
        }
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // SAFETY: a constant.
                    let written = unsafe { libc::pwrite(ordinary, c"four".as_ptr().cast(), 4, 8192) };
                    assert_eq!(sized(written), Err(libc::EFBIG));
                }
            });
            for _ in 0..FILES {
                // SAFETY: a descriptor of this function's.
                unsafe { libc::close(create_file(vm, SIZE).expect("a file")) };
            }
            done.store(true, Ordering::Relaxed);
            writer.join().expect("no write goes beyond the limit");
        });
        // SAFETY: no child is expected.
        let child = unsafe { libc::waitpid(-1, null_mut(), libc::WNOHANG | libc::__WALL) };
        assert_eq!(result(child), Err(libc::ECHILD));
        assert_eq!(SIGNALS.load(Ordering::Relaxed), 0);
    }
}
