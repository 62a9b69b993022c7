//! The uAPI by numbers and bytes, on the host's own `/dev/kvm`, without any interposing.

use std::panic::{RefUnwindSafe, UnwindSafe};

use gmem_uapi::abi::{self, CreateGuestMemfd, MemoryAttributes, MemoryRegion, MemoryRegion2, PreFaultMemory, cap};
use gmem_uapi::native::{self, Native};
use gmem_uapi::profile::{self, Profile};
use gmem_uapi::{Answer, Config, Errno, FileCall, Process};
use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::mm::{MapFlags, ProtFlags};

const PAGE: u64 = 4096;
const GUEST_MEMFD: u32 = 4;
/// An address at which nothing is mapped.
const BAD: usize = 0x10;

/// A client of gmem's that sees one kernel.
struct Client {
    process: Process,
    kvm: OwnedFd,
}

impl RefUnwindSafe for Client {}
impl UnwindSafe for Client {}

impl Client {
    /// `None`, with a word about what is missing, where the host has no KVM.
    fn new(profile: &'static Profile) -> Option<Self> {
        let (native, kvm) = match Native::probe().and_then(|native| Ok((native, native::open()?))) {
            Ok(both) => both,
            Err(error) => {
                eprintln!("SKIP: /dev/kvm: {error}");
                return None;
            }
        };
        let config = Config::for_host(&native, profile, Config::TYPES, true);
        Some(Self { process: Process::new(config, native), kvm })
    }

    fn ioctl<T>(&self, fd: i32, request: u32, arg: *mut T) -> Result<i32, Errno> {
        self.ioctl_number(fd, request, arg.addr())
    }

    fn ioctl_number(&self, fd: i32, request: u32, arg: usize) -> Result<i32, Errno> {
        match self.process.ioctl(fd, request, arg.into()) {
            Answer::Done(result) => result,
            Answer::Pass => panic!("{request:#x} is gmem's to answer"),
        }
    }

    fn capability(&self, fd: i32, capability: u32) -> Result<i32, Errno> {
        self.ioctl_number(fd, abi::CHECK_EXTENSION, capability as usize)
    }

    fn vm(&self, vm_type: usize) -> i32 {
        self.ioctl_number(self.kvm.as_raw_fd(), abi::CREATE_VM, vm_type).expect("an emulated type")
    }

    fn file(&self, vm: i32, size: u64, flags: u64) -> Result<i32, Errno> {
        let mut claim = CreateGuestMemfd { size, flags, reserved: [7; 6] };
        self.ioctl(vm, abi::CREATE_GUEST_MEMFD, &raw mut claim)
    }

    fn region(&self, vm: i32, mut region: MemoryRegion2) -> Result<i32, Errno> {
        self.ioctl(vm, abi::SET_USER_MEMORY_REGION2, &raw mut region)
    }

    fn attributes(&self, vm: i32, address: u64, size: u64, attributes: u64, flags: u64) -> Result<i32, Errno> {
        let mut claim = MemoryAttributes { address, size, attributes, flags };
        self.ioctl(vm, abi::SET_MEMORY_ATTRIBUTES, &raw mut claim)
    }

    fn fallocate(&self, fd: i32, mode: i32, offset: i64, len: i64) -> Result<i64, Errno> {
        self.call(fd, FileCall::Fallocate { mode, offset, len })
    }

    fn call(&self, fd: i32, call: FileCall) -> Result<i64, Errno> {
        match self.process.file_call(fd, call) {
            Answer::Done(result) => result,
            Answer::Pass => panic!("{call:?} is gmem's to answer"),
        }
    }

    fn mmap(&self, fd: i32, len: u64, flags: MapFlags) -> Result<usize, Errno> {
        let prot = (ProtFlags::READ | ProtFlags::WRITE).bits();
        let len = usize::try_from(len).expect("64 bits");
        match self.process.mmap(0, len, prot, flags.bits(), fd, 0) {
            Answer::Done(result) => result,
            Answer::Pass => panic!("gmem's to answer"),
        }
    }

    /// What the interposer does for `close`.
    fn close(&self, fd: i32) {
        self.process.closed(fd);
        // SAFETY: the number was given to the test and nobody else uses it.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

/// Guest memory of the client.
fn memory(len: u64) -> u64 {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let len = usize::try_from(len).expect("64 bits");
    // SAFETY: a new mapping at an address of the kernel's choice.
    unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }.expect("memory").addr() as u64
}

fn unmap(address: u64, len: u64) {
    let (address, len) = (usize::try_from(address).expect("64 bits"), usize::try_from(len).expect("64 bits"));
    // SAFETY: guest memory of the test that no reference points to.
    unsafe { rustix::mm::munmap(std::ptr::without_provenance_mut(address), len) }.expect("mapped");
}

fn slot(number: u32, gpa: u64, size: u64, address: u64) -> MemoryRegion2 {
    let region =
        MemoryRegion { slot: number, flags: 0, guest_phys_addr: gpa, memory_size: size, userspace_addr: address };
    MemoryRegion2 { region, guest_memfd_offset: 0, guest_memfd: 0, pad1: 7, pad2: [7; 14] }
}

fn private_slot(number: u32, gpa: u64, size: u64, address: u64, fd: i32, offset: u64) -> MemoryRegion2 {
    let mut claim = slot(number, gpa, size, address);
    claim.region.flags = GUEST_MEMFD;
    MemoryRegion2 { guest_memfd: fd.cast_unsigned(), guest_memfd_offset: offset, ..claim }
}

fn profile(name: &str) -> &'static Profile {
    profile::by_name(name).expect("a profile")
}

macro_rules! client {
    ($profile:expr) => {
        match Client::new(profile($profile)) {
            Some(client) => client,
            None => return,
        }
    };
}

#[test]
fn capabilities() {
    for (name, system_flags, vm_flags, default_has_files) in
        [("linux-6.12", 0, [0, 0], 0), ("linux-6.18", 3, [3, 1], 1), ("linux-7.3", 3, [3, 1], 1)]
    {
        let client = client!(name);
        let kvm = client.kvm.as_raw_fd();
        let vms = [client.vm(0), client.vm(1)];
        for fd in [kvm, vms[0], vms[1]] {
            for one in [cap::USER_MEMORY2, cap::MEMORY_FAULT_INFO, cap::PRE_FAULT_MEMORY] {
                assert_eq!(client.capability(fd, one), Ok(1), "{name} {one}");
            }
            assert_eq!(client.capability(fd, cap::VM_TYPES).map(|types| types & 3), Ok(3), "{name}");
        }
        let all = |capability| [kvm, vms[0], vms[1]].map(|fd| client.capability(fd, capability));
        assert_eq!(all(cap::MEMORY_ATTRIBUTES), [Ok(8), Ok(0), Ok(8)], "{name}");
        assert_eq!(all(cap::GUEST_MEMFD), [Ok(1), Ok(default_has_files), Ok(1)], "{name}");
        let flags = [system_flags, vm_flags[0], vm_flags[1]].map(Ok);
        assert_eq!(all(cap::GUEST_MEMFD_FLAGS), flags, "{name}");
        assert_eq!(client.capability(vms[1], cap::MULTI_ADDRESS_SPACE), Ok(1), "{name}");
        assert_eq!(client.process.ioctl(vms[1], abi::CHECK_EXTENSION, 0.into()), Answer::Pass, "the host's to answer");
        vms.into_iter().for_each(|fd| client.close(fd));
    }
}

#[test]
fn other_vm_types_are_the_hosts() {
    let client = client!("linux-7.3");
    for vm_type in [2, 5, 31, 32, 1 << 31, usize::MAX] {
        assert_eq!(client.process.ioctl(client.kvm.as_raw_fd(), abi::CREATE_VM, vm_type.into()), Answer::Pass);
    }
}

#[test]
fn creating_files() {
    for (name, allowed) in [("linux-6.12", [0u64, 0]), ("linux-6.18", [3, 1]), ("linux-7.3", [3, 1])] {
        let client = client!(name);
        for (vm_type, allowed) in allowed.into_iter().enumerate() {
            let vm = client.vm(vm_type);
            let bad = client.ioctl_number(vm, abi::CREATE_GUEST_MEMFD, BAD);
            assert_eq!(bad, Err(Errno::FAULT), "{name}");
            for bit in 0..64 {
                let created = client.file(vm, PAGE, 1 << bit);
                assert_eq!(created.is_ok(), 1 << bit & allowed != 0, "{name} type {vm_type} bit {bit}: {created:?}");
                created.into_iter().for_each(|fd| client.close(fd));
            }
            for size in [0, 1, PAGE - 1, PAGE + 1, 1 << 63, u64::MAX] {
                assert_eq!(client.file(vm, size, 0), Err(Errno::INVAL), "{name} {size:#x}");
            }
            for size in [PAGE, 64 << 40, (1 << 63) - PAGE] {
                let fd = client.file(vm, size, 0).expect("any size");
                check_status(fd, size);
                client.close(fd);
            }
            client.close(vm);
        }
    }
}

fn check_status(fd: i32, size: u64) {
    // SAFETY: open until the caller closes it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let status = rustix::fs::fstat(fd).expect("open");
    assert_eq!((status.st_mode, status.st_size.cast_unsigned(), status.st_blocks), (0o100_600, size, 0));
    assert_eq!(rustix::io::fcntl_getfd(fd), Ok(rustix::io::FdFlags::empty()), "not close-on-exec");
}

#[test]
fn setting_slots() {
    for (name, bound) in [("linux-6.12", Errno::INVAL), ("linux-6.18", Errno::INVAL), ("linux-7.3", Errno::EXIST)] {
        let client = client!(name);
        let (vm, other) = (client.vm(1), client.vm(1));
        let (fd, foreign) = (client.file(vm, 8 * PAGE, 0).expect("valid"), client.file(other, PAGE, 0).expect("valid"));
        let at = memory(64 * PAGE);
        assert_eq!(client.ioctl_number(vm, abi::SET_USER_MEMORY_REGION2, BAD), Err(Errno::FAULT));
        assert_eq!(client.ioctl_number(vm, abi::SET_USER_MEMORY_REGION, BAD), Err(Errno::FAULT));
        assert_eq!(client.region(vm, private_slot(0, 0, 4 * PAGE, at, fd, 0)), Ok(0), "{name}");
        let good = private_slot(1, 32 * PAGE, 2 * PAGE, at + 32 * PAGE, fd, 4 * PAGE);
        let with = |change: fn(&mut MemoryRegion2)| {
            let mut claim = good;
            change(&mut claim);
            client.region(vm, claim)
        };
        assert_eq!(with(|claim| claim.region.flags |= 8), Err(Errno::INVAL));
        assert_eq!(with(|claim| claim.region.flags |= 1), Err(Errno::INVAL));
        assert_eq!(with(|claim| claim.region.slot = 1 << 16), Err(Errno::INVAL), "no SMM");
        assert_eq!(with(|claim| claim.region.guest_phys_addr = PAGE), Err(Errno::EXIST));
        assert_eq!(with(|claim| (claim.region.guest_phys_addr, claim.guest_memfd) = (PAGE, 9999)), Err(Errno::EXIST));
        assert_eq!(with(|claim| claim.guest_memfd = 9999), Err(Errno::BADF));
        assert_eq!(with(|claim| claim.guest_memfd = u32::MAX), Err(Errno::BADF));
        assert_eq!(with(|claim| claim.guest_memfd_offset = 7 * PAGE), Err(Errno::INVAL), "past the end");
        assert_eq!(with(|claim| claim.guest_memfd_offset = 3 * PAGE), Err(bound), "{name}");
        for fd in [client.kvm.as_raw_fd(), vm, foreign] {
            let claim = MemoryRegion2 { guest_memfd: fd.cast_unsigned(), ..good };
            assert_eq!(client.region(vm, claim), Err(Errno::INVAL), "not a file of this VM");
        }
        // An end beyond 2^63 is negative to 6.18, hence not past the end of the file. One of the frames is private already.
        let past_signed = if name == "linux-6.18" { Ok(0) } else { Err(Errno::INVAL) };
        assert_eq!(client.attributes(vm, 32 * PAGE, PAGE, 8, 0), Ok(0));
        assert_eq!(with(|claim| claim.guest_memfd_offset = (1 << 63) - PAGE), past_signed, "{name}");
        assert_eq!(client.attributes(vm, 33 * PAGE, PAGE, 8, 0), Ok(0));
        assert_eq!(client.region(vm, private_slot(1, 0, 0, 0, -1, 0)), past_signed, "{name}");
        assert_eq!(client.attributes(vm, 32 * PAGE, 2 * PAGE, 0, 0), Ok(0));
        assert_eq!(client.region(vm, good), Ok(0));
        assert_eq!(client.region(vm, good), Err(Errno::INVAL), "not even as it is");
        let mut old = good.region;
        assert_eq!(client.ioctl(vm, abi::SET_USER_MEMORY_REGION, &raw mut old), Err(Errno::INVAL));
        let delete = private_slot(1, 0, 0, 0, -1, 0);
        assert_eq!((client.region(vm, delete), client.region(vm, delete)), (Ok(0), Err(Errno::INVAL)));
        [fd, foreign, vm, other].into_iter().for_each(|fd| client.close(fd));
    }
}

#[test]
fn slots_of_ordinary_vms() {
    for (name, allowed) in [("linux-6.12", Err(Errno::INVAL)), ("linux-6.18", Ok(0)), ("linux-7.3", Ok(0))] {
        let client = client!(name);
        let vm = client.vm(0);
        let fd = client.file(vm, 4 * PAGE, 0).expect("of any VM");
        let at = memory(4 * PAGE);
        assert_eq!(client.region(vm, private_slot(0, 0, 4 * PAGE, at, fd, 0)), allowed, "{name}");
        assert_eq!(client.attributes(vm, 0, PAGE, 8, 0), Err(Errno::INVAL));
        assert_eq!(client.attributes(vm, 0, PAGE, 0, 0), Ok(0));
        [fd, vm].into_iter().for_each(|fd| client.close(fd));
    }
}

#[test]
fn setting_attributes() {
    let client = client!("linux-7.3");
    let vm = client.vm(1);
    assert_eq!(client.ioctl_number(vm, abi::SET_MEMORY_ATTRIBUTES, BAD), Err(Errno::FAULT));
    for (address, size, attributes, flags) in [
        (0, PAGE, 8, 1),
        (0, PAGE, 1, 0),
        (0, PAGE, 16, 0),
        (0, 0, 8, 0),
        (1, PAGE, 8, 0),
        (0, PAGE + 1, 8, 0),
        (u64::MAX - PAGE + 1, PAGE, 8, 0),
        (u64::MAX - PAGE + 1, 2 * PAGE, 8, 0),
    ] {
        let result = client.attributes(vm, address, size, attributes, flags);
        assert_eq!(result, Err(Errno::INVAL), "{address:#x} {size:#x} {attributes} {flags}");
    }
    for attributes in [8, 8, 0] {
        assert_eq!(client.attributes(vm, 1 << 40, 1 << 40, attributes, 0), Ok(0), "no slot, no matter");
    }
    client.close(vm);
}

#[test]
fn prefaulting() {
    let client = client!("linux-7.3");
    let vm = client.vm(1);
    let fd = client.file(vm, 4 * PAGE, 0).expect("valid");
    let at = memory(4 * PAGE);
    assert_eq!(client.region(vm, private_slot(0, 0, 4 * PAGE, at, fd, 0)), Ok(0));
    assert_eq!(client.attributes(vm, 0, 2 * PAGE, 8, 0), Ok(0));
    let vcpu = client.ioctl_number(vm, abi::CREATE_VCPU, 0).expect("a first vCPU");
    let prefault = |gpa, size, flags| {
        let mut claim = PreFaultMemory { gpa, size, flags, padding: [7; 5] };
        (client.ioctl(vcpu, abi::PRE_FAULT_MEMORY, &raw mut claim), claim.gpa, claim.size)
    };
    assert_eq!(client.ioctl_number(vcpu, abi::PRE_FAULT_MEMORY, BAD), Err(Errno::FAULT));
    for (gpa, size, flags) in [(0, PAGE, 1), (1, PAGE, 0), (0, 1, 0), (0, 0, 0), (u64::MAX - PAGE + 1, PAGE, 0)] {
        assert_eq!(prefault(gpa, size, flags), (Err(Errno::INVAL), gpa, size), "{gpa:#x} {size:#x} {flags}");
    }
    assert_eq!(prefault(0, 4 * PAGE, 0), (Ok(0), 4 * PAGE, 0), "private and shared");
    assert_eq!(prefault(3 * PAGE, 3 * PAGE, 0), (Ok(0), 4 * PAGE, 2 * PAGE), "as far as the slot goes");
    assert_eq!(prefault(4 * PAGE, PAGE, 0), (Err(Errno::NOENT), 4 * PAGE, PAGE));
    // The client's memory is there for half of a slot.
    let half = memory(4 * PAGE);
    unmap(half + 2 * PAGE, 2 * PAGE);
    assert_eq!(client.region(vm, slot(1, 1 << 30, 4 * PAGE, half)), Ok(0));
    assert_eq!(prefault(1 << 30, 4 * PAGE, 0), (Ok(0), (1 << 30) + 2 * PAGE, 2 * PAGE));
    let gone = (1 << 30) + 2 * PAGE;
    assert_eq!(prefault(gone, PAGE, 0), (Err(Errno::FAULT), gone, PAGE));
    // It comes back, and can be read in the end.
    let (at, len) = (usize::try_from(half + 2 * PAGE).expect("64 bits"), usize::try_from(2 * PAGE).expect("64 bits"));
    let (place, flags) = (std::ptr::without_provenance_mut(at), MapFlags::PRIVATE | MapFlags::FIXED);
    // SAFETY: address space of the test that was unmapped above.
    unsafe { rustix::mm::mmap_anonymous(place, len, ProtFlags::empty(), flags) }.expect("free");
    client.process.mapping_changed(at, len);
    assert_eq!(prefault(gone, PAGE, 0).0, Err(Errno::FAULT), "not readable");
    let prot = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
    // SAFETY: mapped a moment ago; no reference points to it.
    unsafe { rustix::mm::mprotect(place, len, prot) }.expect("mapped");
    client.process.protection_changed(at, len);
    assert_eq!(prefault(gone, 2 * PAGE, 0).0, Ok(0));
    client.close(fd);
    assert_eq!(prefault(0, PAGE, 0).0, Err(Errno::FAULT), "the file is gone");
    [vcpu, vm].into_iter().for_each(|fd| client.close(fd));
}

#[test]
fn calls_on_the_file() {
    let client = client!("linux-7.3");
    let vm = client.vm(1);
    let fd = client.file(vm, 4 * PAGE, 0).expect("valid");
    for call in [FileCall::ReadWrite, FileCall::ChangeInode, FileCall::Sync, FileCall::Splice] {
        assert_eq!(client.call(fd, call), Err(Errno::INVAL), "{call:?}");
    }
    for call in [FileCall::ReadWriteAt(0), FileCall::Seek(0)] {
        assert_eq!(client.call(fd, call), Err(Errno::SPIPE), "{call:?}");
    }
    for mode in 0..0x100 {
        let expected = if matches!(mode, 1 | 3) { Ok(0) } else { Err(Errno::OPNOTSUPP) };
        assert_eq!(client.fallocate(fd, mode, 0, 4096), expected, "{mode:#x}");
        assert_eq!(client.fallocate(fd, mode, -4096, 4096), Err(Errno::INVAL));
        assert_eq!(client.fallocate(fd, mode, 0, 0), Err(Errno::INVAL));
    }
    for (offset, len, allocate, punch) in [
        (0, 4 * 4096, Ok(0), Ok(0)),
        (1, 4096, Err(Errno::INVAL), Err(Errno::INVAL)),
        (0, 4095, Err(Errno::INVAL), Err(Errno::INVAL)),
        (3 * 4096, 2 * 4096, Err(Errno::INVAL), Ok(0)),
        (4 * 4096, 4096, Err(Errno::INVAL), Ok(0)),
        (0x7fff_ffff_ffff_f000, 4096, Err(Errno::FBIG), Err(Errno::FBIG)),
    ] {
        assert_eq!(client.fallocate(fd, 1, offset, len), allocate, "{offset:#x} {len:#x}");
        assert_eq!(client.fallocate(fd, 3, offset, len), punch, "{offset:#x} {len:#x}");
    }
    assert_eq!(client.mmap(fd, PAGE, MapFlags::SHARED), Err(Errno::NODEV));
    assert_eq!(client.mmap(fd, PAGE, MapFlags::PRIVATE), Err(Errno::NODEV));
    assert_eq!(client.mmap(fd, 0, MapFlags::SHARED), Err(Errno::INVAL), "mmap itself looks first");
    assert_eq!(client.mmap(fd, PAGE, MapFlags::empty()), Err(Errno::INVAL), "neither shared nor private");
    assert_eq!(client.ioctl_number(fd, 0x5401, 0), Err(Errno::NOTTY));
    const FIOCLEX: u32 = 0x5451;
    assert_eq!(client.process.ioctl(fd, FIOCLEX, 0.into()), Answer::Pass, "answered for every file");
    const FIONREAD: u32 = 0x541b;
    assert_eq!(client.process.ioctl(fd, FIONREAD, 0.into()), Answer::Done(Err(Errno::NOTTY)), "since 6.18");
    assert_eq!(client.ioctl_number(fd, abi::SET_MEMORY_ATTRIBUTES, BAD), Err(Errno::NOTTY));
    [fd, vm].into_iter().for_each(|fd| client.close(fd));
}

#[test]
fn allocating_and_punching_change_the_times_of_a_file() {
    let client = client!("linux-7.3");
    let vm = client.vm(1);
    let fd = client.file(vm, 4 * PAGE, 0).expect("valid");
    // SAFETY: open until the end of the test.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let modified = || rustix::fs::fstat(borrowed).expect("open").st_mtime;
    for mode in [1, 3] {
        let past = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 };
        let times = rustix::fs::Timestamps { last_access: past, last_modification: past };
        rustix::fs::futimens(borrowed, &times).expect("a file of the test's own");
        assert_eq!(client.fallocate(fd, mode, 1, 1), Err(Errno::INVAL));
        assert_eq!(modified(), 1, "a refused call changes nothing");
        assert_eq!(client.fallocate(fd, mode, 0, 4096), Ok(0));
        assert_ne!(modified(), 1);
    }
    [fd, vm].into_iter().for_each(|fd| client.close(fd));
}

/// The file of a mapping is known by what it refuses: to be collapsed into huge pages.
#[test]
fn a_mapping_that_moves_keeps_its_file() {
    const COLLAPSE: i32 = 25;
    let client = client!("linux-7.3");
    let vm = client.vm(0);
    let fd = client.file(vm, 4 * PAGE, 3).expect("mappable and shared");
    let at = client.mmap(fd, 4 * PAGE, MapFlags::SHARED).expect("mappable");
    let len = usize::try_from(4 * PAGE).expect("64 bits");
    let is_mapped = |at| client.process.advice(at, len, COLLAPSE) == Answer::Done(Err(Errno::INVAL));
    let (moved, copy) = (at + (1 << 40), at + (2 << 40));
    client.process.mapping_moved((at, len), (moved, len), false);
    assert_eq!((is_mapped(at), is_mapped(moved)), (false, true));
    client.process.mapping_moved((moved, 0), (copy, len), true);
    client.close(fd);
    assert_eq!((is_mapped(moved), is_mapped(copy)), (true, true));
    client.process.mapping_changed(moved, len);
    client.process.mapping_changed(copy, len);
    assert!(!is_mapped(copy));
    unmap(at as u64, 4 * PAGE);
    client.close(vm);
}

#[test]
fn mapping_files_that_can_be() {
    let client = client!("linux-7.3");
    let vm = client.vm(0);
    let fd = client.file(vm, 4 * PAGE, 3).expect("mappable and shared");
    assert_eq!(client.mmap(fd, PAGE, MapFlags::PRIVATE), Err(Errno::INVAL));
    let executable = client.process.mmap(0, 4096, 5, MapFlags::SHARED.bits(), fd, 0);
    assert_eq!(executable, Answer::Done(Err(Errno::PERM)));
    let at = client.mmap(fd, 4 * PAGE, MapFlags::SHARED).expect("mappable");
    let len = usize::try_from(4 * PAGE).expect("64 bits");
    // SAFETY: mapped a moment ago, four pages long, and nobody else has it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(std::ptr::without_provenance_mut::<u8>(at), len) };
    bytes.fill(0xaa);
    assert_eq!(client.fallocate(fd, 3, 0, 4096), Ok(0));
    assert!(bytes[..4096].iter().all(|byte| *byte == 0), "a hole reads as zeros");
    assert!(bytes[4096..].iter().all(|byte| *byte == 0xaa), "and nothing else changed");
    // The mapping keeps the file; the VM's memory is still bound to it.
    client.close(fd);
    assert!(bytes[4096..].iter().all(|byte| *byte == 0xaa));
    client.process.mapping_changed(at, len);
    client.close(vm);
}

#[test]
fn duplicates_keep_a_file_open() {
    let client = client!("linux-7.3");
    let vm = client.vm(1);
    let fd = client.file(vm, 4 * PAGE, 0).expect("valid");
    // SAFETY: open; the copy is the test's own.
    let copy = rustix::io::dup(unsafe { BorrowedFd::borrow_raw(fd) }).expect("a descriptor");
    client.process.duplicated(fd, copy.as_raw_fd());
    let at = memory(4 * PAGE);
    assert_eq!(client.region(vm, private_slot(0, 0, 4 * PAGE, at, fd, 0)), Ok(0));
    client.close(fd);
    assert_eq!(client.process.file_size(fd), None);
    assert_eq!(client.process.file_size(copy.as_raw_fd()), Some(4 * PAGE));
    assert_eq!(client.region(vm, private_slot(1, 64 * PAGE, PAGE, at, copy.as_raw_fd(), 0)), Err(Errno::EXIST));
    // The file outlives the VM's descriptor, and can still be allocated and punched.
    client.close(vm);
    assert_eq!(client.fallocate(copy.as_raw_fd(), 1, 0, 4096), Ok(0));
    assert_eq!(client.fallocate(copy.as_raw_fd(), 3, 0, 4096), Ok(0));
    client.process.closed(copy.as_raw_fd());
}
