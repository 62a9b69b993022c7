//! `gmem run` on clients that are hard on it. Each client is this test program itself, run again under gmem with the name of a
//! part in the environment; it uses libc only and knows nothing of gmem.

mod common;

use common::{has_kvm, under_gmem};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn gmem() -> Command {
    Command::new(env!("CARGO_BIN_EXE_gmem"))
}

#[test]
fn client() {
    match common::part().as_str() {
        "descriptor" => parts::descriptor_has_no_content(),
        "seccomp" => parts::strict_filter(),
        "closing" => parts::closes_everything(),
        "fork" => {
            parts::forks();
            parts::a_child_closes_its_parents_vm();
            parts::a_child_of_vfork_has_its_own_descriptors();
        }
        "pointers" => parts::bad_pointers(),
        "interrupt" => parts::a_long_call_ends_at_a_signal(),
        "limits" => parts::limits_leave_nothing_behind(),
        _ => {}
    }
}

#[test]
fn private_bytes_cannot_be_reached_through_the_descriptor() {
    under_gmem("descriptor");
}

#[test]
fn a_strict_seccomp_filter_stays_strict_and_gmem_works_behind_it() {
    under_gmem("seccomp");
}

#[test]
fn children_of_a_client_that_closes_every_descriptor_still_have_gmem() {
    under_gmem("closing");
}

#[test]
fn a_child_of_fork_has_its_own_descriptors_and_not_its_parents_vm() {
    under_gmem("fork");
}

#[test]
fn bad_pointers_are_errors() {
    under_gmem("pointers");
}

#[test]
fn a_signal_ends_an_allocation() {
    under_gmem("interrupt");
}

#[test]
fn what_fails_at_a_limit_can_be_tried_again() {
    under_gmem("limits");
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// That `gmem run ARGUMENTS` ends with this code, shows nothing, and says this.
#[track_caller]
fn refuses(arguments: &[&str], code: i32, why: &str) {
    let output = gmem().arg("run").args(arguments).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", text(&output));
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = text(&output);
    assert!(said.starts_with("gmem: ") && said.contains(why), "does not say {why:?}: {said}");
}

#[track_caller]
fn refuses_program(program: &Path, code: i32, why: &str) {
    refuses(&["--", program.to_str().unwrap()], code, why);
}

/// A folder of one test's own.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("run-{name}"));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn file(path: &Path, content: &[u8], mode: u32) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A program for x86-64 that names no dynamic linker: nothing but one segment, of `exit(0)`.
fn static_program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    let code = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]; // mov eax, 60; xor edi, edi; syscall
    let size = 64 + 56 + code.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves = |all: &[u16]| all.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>();
    let words = |all: &[u64]| all.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    bytes.extend(halves(&[2, 62, 1, 0])); // ET_EXEC, EM_X86_64, EV_CURRENT
    bytes.extend(words(&[BASE + 64 + 56, 64, 0])); // entry, program headers, section headers
    bytes.extend(halves(&[0, 0, 64, 56, 1, 64, 0, 0]));
    bytes.extend(halves(&[1, 0, 5, 0])); // PT_LOAD, read and execute
    bytes.extend(words(&[0, BASE, BASE, size, size, 4096]));
    bytes.extend(code);
    bytes
}

#[test]
fn what_cannot_be_executed_is_refused_with_a_reason_before_anything_starts() {
    let folder = folder("refused");
    let data = folder.join("data");
    file(&data, b"hello", 0o644);
    refuses(&["--", "./no-such-program"], 127, "no such file");
    refuses(&["--", "no-such-program"], 127, "not found in PATH");
    refuses_program(&folder, 126, "is a directory");
    refuses_program(&data, 126, "is not executable");
    file(&data, b"hello", 0o755);
    refuses_program(&data, 126, "is not a program for x86-64 Linux");
    file(&data, b"#!/no/such/interpreter -x\n", 0o755);
    refuses_program(&data, 126, "its interpreter /no/such/interpreter does not exist");
}

#[test]
fn static_programs_are_refused_also_where_a_script_names_them() {
    let folder = folder("static");
    let (program, script) = (folder.join("program"), folder.join("script"));
    file(&program, &static_program(), 0o755);
    refuses_program(&program, 126, "is statically linked");
    let name = program.display();
    for line in [format!("#!{name}"), format!("#! {name} -x"), format!("#!/usr/bin/env {name}")] {
        file(&script, format!("{line}\n").as_bytes(), 0o755);
        refuses_program(&script, 126, &format!("{name}: is statically linked"));
    }
}

#[test]
fn programs_that_gain_privileges_are_refused() {
    // SAFETY: a number.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("skipped: only root can give a file to another user");
    }
    let program = folder("privileges").join("true");
    let of = |user, group, mode| {
        fs::copy("/usr/bin/true", &program).unwrap();
        std::os::unix::fs::chown(&program, Some(user), Some(group)).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
    };
    of(65534, 0, 0o4755);
    refuses_program(&program, 126, "is set-user-ID");
    of(0, 65534, 0o2755);
    refuses_program(&program, 126, "is set-group-ID");
}

#[test]
fn wrong_types_and_profiles_are_refused_with_those_that_there_are() {
    refuses(&["--types", "itanium", "--", "true"], 2, "there are default, sw-protected");
    refuses(&["--types", "snp", "--", "true"], 2, "yet; there are default, sw-protected");
    refuses(&["--types", "", "--", "true"], 2, "a name is missing; there are default, sw-protected");
    if has_kvm() {
        refuses(&["--profile", "linux-1.0", "--", "true"], 2, "linux-6.12");
    }
}

/// In a mount namespace of its own, so that nobody else loses the device.
#[test]
fn a_device_that_is_not_kvms_is_refused() {
    // SAFETY: a number.
    let option = if unsafe { libc::geteuid() } == 0 { "-m" } else { "-rm" };
    let script = "mount --bind /dev/null /dev/kvm || exit 77; exec \"$0\" run -- true";
    let unshare = |words: &[&str]| Command::new("unshare").arg(option).args(words).stdin(Stdio::null()).output();
    if !unshare(&["true"]).is_ok_and(|output| output.status.success()) {
        return eprintln!("skipped: unshare(1) may not make a mount namespace");
    }
    let output = unshare(&["sh", "-c", script, env!("CARGO_BIN_EXE_gmem")]).unwrap();
    if output.status.code() == Some(77) {
        return eprintln!("skipped: no mount over /dev/kvm: {}", text(&output));
    }
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    assert!(text(&output).contains("/dev/kvm is something else than KVM's device"), "{output:?}");
}

/// The short help has no room for them, and once was all that there was.
#[test]
fn help_tells_the_exit_codes() {
    for command in ["run", "probe", "check"] {
        let help = gmem().args([command, "--help"]).output().unwrap();
        assert!(String::from_utf8_lossy(&help.stdout).contains("Exits with"), "{command}: {help:?}");
    }
}

mod parts {
    use crate::common::{
        KVM_CREATE_GUEST_MEMFD, KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION, errno, ioctl, open_kvm,
        protected_vm,
    };
    use std::ffi::{c_int, c_ulong};

    const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
    const KVM_CAP_VM_TYPES: usize = 235;
    const SIZE: u64 = 0x20_0000;

    fn create_file(vm: c_int) -> Result<c_int, i32> {
        let claim = [SIZE, 0, 0, 0, 0, 0, 0, 0];
        ioctl(vm, KVM_CREATE_GUEST_MEMFD, claim.as_ptr().addr())
    }

    fn set_private(vm: c_int) -> Result<c_int, i32> {
        let claim = [0u64, SIZE, 8, 0];
        ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, claim.as_ptr().addr())
    }

    pub(super) fn descriptor_has_no_content() {
        let file = create_file(protected_vm()).expect("a file");
        let mut byte = 0u8;
        let at = (&raw mut byte).cast();
        // SAFETY: `byte` is one byte; the descriptor is open.
        unsafe {
            assert_eq!((libc::read(file, at, 1), errno()), (-1, libc::EINVAL));
            assert_eq!((libc::pread(file, at, 1, 0), errno()), (-1, libc::ESPIPE));
            assert_eq!((libc::write(file, at, 1), errno()), (-1, libc::EINVAL));
            assert_eq!((libc::lseek(file, 0, libc::SEEK_SET), errno()), (-1, libc::ESPIPE));
            assert_eq!((libc::ftruncate(file, 0), errno()), (-1, libc::EINVAL));
            let flags = libc::MAP_SHARED;
            assert_eq!(libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, file, 0), libc::MAP_FAILED);
            assert_eq!(errno(), libc::ENODEV);
            let path = format!("/proc/self/fd/{file}\0");
            assert_eq!((libc::open(path.as_ptr().cast(), libc::O_RDWR), errno()), (-1, libc::ENXIO));
            let mut stat: libc::stat = std::mem::zeroed();
            assert_eq!(libc::fstat(file, &raw mut stat), 0);
            assert_eq!((stat.st_mode, stat.st_size, stat.st_blocks, stat.st_nlink), (0o100_600, 0x20_0000, 0, 1));
            assert_eq!(libc::fcntl(file, libc::F_GETFD), 0, "not close-on-exec");
        }
    }

    /// Kills the process at every system call but a few, as Firecracker's filters do.
    pub(super) fn strict_filter() {
        let vm = protected_vm();
        let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
        let ret = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
        let allow_if = |nr: libc::c_long| libc::sock_filter {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: u32::try_from(nr).expect("a system call number"),
        };
        let calls = [
            libc::SYS_ioctl,
            libc::SYS_write,
            libc::SYS_exit_group,
            libc::SYS_exit,
            libc::SYS_futex,
            libc::SYS_munmap,
            libc::SYS_mmap,
            libc::SYS_brk,
            libc::SYS_madvise,
            libc::SYS_sigaltstack,
            libc::SYS_rt_sigprocmask,
        ];
        let mut filter = vec![load(0)];
        for call in calls {
            filter.extend([allow_if(call), ret(libc::SECCOMP_RET_ALLOW)]);
        }
        filter.push(ret(libc::SECCOMP_RET_ERRNO | libc::EXDEV.unsigned_abs()));
        let len = u16::try_from(filter.len()).expect("a short program");
        let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
        // SAFETY: the program lives until the call returns.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let mode = libc::SECCOMP_MODE_FILTER as c_ulong;
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
            // The filter is as strict as it was for the client, also through libc's entry for any call.
            assert_eq!((libc::getpgid(0), errno()), (-1, libc::EXDEV));
            assert_eq!((libc::syscall(libc::SYS_memfd_create, c"x".as_ptr(), 0), errno()), (-1, libc::EXDEV));
        }
        // gmem copies structures, makes memfds and maps behind it.
        set_private(vm).expect("attributes behind the filter");
        create_file(vm).expect("a file behind the filter");
    }

    /// Guest memory and a file that outlive the closing of all descriptors but the client's own.
    fn closes_what_it_does_not_know() {
        let (vm, vcpu) = (protected_vm(), 0xae41);
        let file = create_file(vm).expect("a file");
        let _ = add_ram(vm, 0);
        let _ = ioctl(vm, vcpu, 0).expect("a vCPU");
        let own = [vm, file];
        for fd in (3..4096).filter(|fd| !own.contains(fd)) {
            // SAFETY: a descriptor that is none of the client's that it still uses.
            unsafe { libc::close(fd) };
        }
        let _ = add_ram(vm, 8);
        // SAFETY: a descriptor of this function's.
        unsafe {
            assert_eq!(libc::fallocate(file, 1, 0, 4096), 0);
            assert_eq!(libc::fallocate(file, 3, 0, 4096), 0);
        }
    }

    pub(super) fn closes_everything() {
        closes_what_it_does_not_know();
        // SAFETY: descriptors above the standard ones; Rust has none open that it would miss.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_close_range, 3, c_ulong::from(u32::MAX), 0), 0);
            for fd in 3..4096 {
                libc::close(fd);
            }
        }
        let script = "test -e \"${LD_PRELOAD%%:*}\"";
        let child = std::process::Command::new("/bin/sh").args(["-c", script]).output().expect("a child");
        assert!(child.status.success(), "{child:?}");
        assert!(child.stderr.is_empty(), "the dynamic linker complains: {child:?}");
        assert_ne!(ioctl(open_kvm().expect("a KVM"), KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES).expect("an answer") & 2, 0);
    }

    /// Private guest RAM with a 1 in its first byte, and everything else that is mapped, in a slot without a file.
    fn add_ram(vm: c_int, number: u64) -> *mut u8 {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, of which the first byte is written.
        let ram = unsafe {
            let ram = libc::mmap(std::ptr::null_mut(), 0x20_0000, prot, flags, -1, 0);
            assert_ne!(ram, libc::MAP_FAILED);
            ram.cast::<u8>().write_volatile(1);
            ram.cast::<u8>()
        };
        let page = (ram.addr() as u64) & !(SIZE - 1);
        let at = number << 41;
        let parts = [(number, at, SIZE, ram.addr() as u64), (number + 1, at + (1 << 40), 1 << 33, page)];
        for (number, gpa, size, hva) in parts {
            let claim = [number, gpa, size, hva];
            ioctl(vm, KVM_SET_USER_MEMORY_REGION, claim.as_ptr().addr()).expect("a slot");
        }
        ram
    }

    pub(super) fn forks() {
        let vm = protected_vm();
        let file = create_file(vm).expect("a file");
        let ram = add_ram(vm, 0);
        // SAFETY: the child makes system calls and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: memory that was mapped before the fork.
            let same = unsafe {
                let before = ram.read_volatile();
                ram.write_volatile(2);
                before == 1
            };
            let foreign = same && set_private(vm) == Err(libc::EIO);
            // SAFETY: descriptors of the child.
            unsafe {
                libc::close(file);
                libc::close(vm);
                libc::_exit(if foreign {
                    0
                } else if same {
                    2
                } else {
                    3
                });
            }
        }
        let mut status = 0;
        // SAFETY: a child of this process.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0, "the child must find its memory, and EIO from the VM's ioctls");
        // SAFETY: as above.
        assert_eq!(unsafe { ram.read_volatile() }, 1, "the child wrote to the parent's memory");
        set_private(vm).expect("the parent's VM is as it was");
        // SAFETY: the parent's descriptor is still a guest_memfd.
        assert_eq!(unsafe { libc::fallocate(file, 3, 0, 4096) }, 0);
    }

    /// Allocating this much takes longer than it takes for a signal to come, as a rule: on a busy machine the thread that sends them
    /// may not run meanwhile.
    pub(super) fn a_long_call_ends_at_a_signal() {
        extern "C" fn nothing(_: c_int) {}
        const LONG: u64 = 1 << 30;
        const TRIES: usize = 20;
        let claim = [LONG, 0, 0, 0, 0, 0, 0, 0];
        let file = ioctl(protected_vm(), KVM_CREATE_GUEST_MEMFD, claim.as_ptr().addr()).expect("a file");
        let done = std::sync::atomic::AtomicBool::new(false);
        // SAFETY: a handler that does nothing, this thread, which waits for the other one, and a descriptor of this function's.
        unsafe {
            assert_ne!(libc::signal(libc::SIGALRM, nothing as *const () as usize), libc::SIG_ERR);
            let this = libc::pthread_self();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        std::thread::sleep(std::time::Duration::from_millis(1));
                        libc::pthread_kill(this, libc::SIGALRM);
                    }
                });
                let interrupted = (0..TRIES).any(|_| {
                    let _ = libc::fallocate(file, 3, 0, LONG.cast_signed());
                    (libc::fallocate(file, 1, 0, LONG.cast_signed()), errno()) == (-1, libc::EINTR)
                });
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                assert!(interrupted, "no call was interrupted");
            });
            assert_eq!(libc::fallocate(file, 3, 0, LONG.cast_signed()), 0, "what was allocated can go");
        }
    }

    /// At the limit of open files, and at that of a file's size, whose signal would end the client.
    pub(super) fn limits_leave_nothing_behind() {
        const KVM_CREATE_VCPU: c_ulong = 0xae41;
        let vm = protected_vm();
        // SAFETY: limits of this process, and descriptors of this function's.
        unsafe {
            for (most, expected) in [(libc::RLIM_INFINITY, 0), (4096, libc::EFBIG)] {
                let small = libc::rlimit { rlim_cur: 4096, rlim_max: most };
                assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const small), 0);
                assert_eq!(create_file(vm).err().unwrap_or(0), expected);
                let mut now: libc::rlimit = std::mem::zeroed();
                assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut now), 0);
                assert_eq!(now.rlim_cur, 4096, "as it was");
            }
            let few = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
            assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few), 0);
            let mut all = Vec::new();
            loop {
                match libc::dup(vm) {
                    -1 => break,
                    fd => all.push(fd),
                }
            }
            for _ in 0..2 {
                assert_eq!(ioctl(vm, KVM_CREATE_VCPU, 0), Err(libc::EMFILE));
            }
            // One for the client, one for gmem.
            all.drain(..2).for_each(|fd| assert_eq!(libc::close(fd), 0));
        }
        ioctl(vm, KVM_CREATE_VCPU, 0).expect("the vCPU that could not be made before");
    }

    /// Where the parent has windows, a child has nothing, until it maps something there.
    pub(super) fn a_child_closes_its_parents_vm() {
        const LEN: usize = 64 << 20;
        let vm = protected_vm();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new mappings, of which the child writes its own; the child makes system calls and exits.
        let child = unsafe {
            let ram = libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0);
            assert_ne!(ram, libc::MAP_FAILED);
            let claim = [0, 0, LEN as u64, ram.addr() as u64];
            ioctl(vm, KVM_SET_USER_MEMORY_REGION, claim.as_ptr().addr()).expect("a slot");
            let child = libc::fork();
            if child == 0 {
                let own = libc::mmap(std::ptr::null_mut(), 2 * LEN, prot, flags, -1, 0);
                libc::memset(own, 1, 2 * LEN);
                libc::close(vm);
                let bytes = std::slice::from_raw_parts(own.cast::<u8>(), 2 * LEN);
                libc::_exit(if bytes.iter().step_by(4096).all(|byte| *byte == 1) { 0 } else { 2 });
            }
            child
        };
        let mut status = 0;
        // SAFETY: a child of this process.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0, "the child must keep what it maps");
    }

    pub(super) fn a_child_of_vfork_has_its_own_descriptors() {
        let vm = protected_vm();
        // SAFETY: the child makes one system call and exits.
        #[expect(deprecated, reason = "children of vfork are what is tested")]
        let child = unsafe { libc::vfork() };
        if child == 0 {
            // SAFETY: numbers; descriptors of the child.
            unsafe {
                libc::dup2(2, vm);
                libc::_exit(0);
            }
        }
        // SAFETY: a child of this process.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        set_private(vm).expect("the parent's descriptor is a VM still");
    }

    pub(super) fn bad_pointers() {
        let vm = protected_vm();
        for address in [0usize, 8, usize::MAX - 7, 0x7000_0000_0000_0000] {
            assert_eq!(ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, address), Err(libc::EFAULT));
            assert_eq!(ioctl(vm, KVM_CREATE_GUEST_MEMFD, address), Err(libc::EFAULT));
        }
    }
}

/// Whether a program under gmem finds SIGPIPE ignored, if gmem is started with that or without.
fn finds_sigpipe_ignored(ignored_before: bool) -> bool {
    let trap = if ignored_before { "trap '' PIPE" } else { ":" };
    let script = format!("{trap}; exec \"$0\" run -- grep SigIgn /proc/self/status");
    let shell = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_gmem")]).output().unwrap();
    let said = String::from_utf8_lossy(&shell.stdout).into_owned();
    let mask = said.strip_prefix("SigIgn:").and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.unwrap_or_else(|| panic!("{shell:?}")) & 1 << (libc::SIGPIPE - 1) != 0
}

#[test]
fn a_program_has_the_sigpipe_that_gmem_was_given() {
    if !has_kvm() {
        return;
    }
    assert!(finds_sigpipe_ignored(true));
    assert!(!finds_sigpipe_ignored(false));
}
