//! The few KVM calls that gmem makes itself.
//!
//! They are safe: what a vCPU does to memory it does to windows, which no Rust code refers to, and to memory that a client
//! declared to be its guest's.

use core::ptr::NonNull;

use rustix::fd::{BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::abi::{
    CAP_DISABLE_QUIRKS2, CHECK_EXTENSION, CREATE_VCPU, CREATE_VM, ENABLE_CAP, EnableCap, GET_VCPU_MMAP_SIZE,
    MemoryRegion, PRE_FAULT_MEMORY, PreFaultMemory, QUIRK_SLOT_ZAP_ALL, RUN, SET_USER_MEMORY_REGION,
};
use crate::sys;
use crate::vcpu::RunArea;

/// `KVM_CHECK_EXTENSION` on the system or a VM; 0 for what the kernel does not know.
#[must_use]
pub fn check_extension(fd: BorrowedFd<'_>, capability: u32) -> i32 {
    try_check_extension(fd, capability).unwrap_or(0)
}

/// The same on a descriptor that may be none of KVM's.
///
/// # Errors
/// ENOTTY and what else other descriptors answer.
pub fn try_check_extension(fd: BorrowedFd<'_>, capability: u32) -> Result<i32, Errno> {
    // SAFETY: the argument is a number.
    unsafe { sys::ioctl(fd, CHECK_EXTENSION, capability as usize) }
}

/// `KVM_CREATE_VM`. The descriptor has the number that the client would get.
///
/// # Errors
/// The kernel's.
pub fn create_vm(kvm: BorrowedFd<'_>, vm_type: usize) -> Result<OwnedFd, Errno> {
    // SAFETY: the argument is a number.
    let fd = unsafe { sys::ioctl(kvm, CREATE_VM, vm_type) }?;
    // SAFETY: the kernel has just made the descriptor and no one else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `KVM_CREATE_VCPU`.
///
/// # Errors
/// The kernel's.
pub fn create_vcpu(vm: BorrowedFd<'_>, id: usize) -> Result<OwnedFd, Errno> {
    // SAFETY: the argument is a number.
    let fd = unsafe { sys::ioctl(vm, CREATE_VCPU, id) }?;
    // SAFETY: the kernel has just made the descriptor and no one else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `KVM_SET_USER_MEMORY_REGION`.
///
/// # Errors
/// The kernel's.
pub fn set_region(vm: BorrowedFd<'_>, region: &MemoryRegion) -> Result<(), Errno> {
    // SAFETY: the kernel only reads the structure, which lives until the call returns.
    unsafe { sys::ioctl(vm, SET_USER_MEMORY_REGION, (&raw const *region).addr()) }.map(|_| ())
}

/// Disables `quirks` of a VM by `KVM_CAP_DISABLE_QUIRKS2`, and with them, where the host has it, the quirk that protected
/// types do not have: after it has struck, a prefault spins until the vCPU has run (seen on 6.12).
///
/// # Errors
/// The kernel's.
pub fn disable_quirks(vm: BorrowedFd<'_>, quirks: u64) -> Result<(), Errno> {
    let known = u64::try_from(check_extension(vm, CAP_DISABLE_QUIRKS2)).unwrap_or(0);
    let quirks = quirks | (known & QUIRK_SLOT_ZAP_ALL);
    if quirks == 0 {
        return Ok(());
    }
    let claim = EnableCap { cap: CAP_DISABLE_QUIRKS2, flags: 0, args: [quirks, 0, 0, 0], pad: [0; 64] };
    // SAFETY: the kernel only reads the structure, which lives until the call returns.
    unsafe { sys::ioctl(vm, ENABLE_CAP, (&raw const claim).addr()) }.map(|_| ())
}

/// `KVM_RUN`. A thread may be ended in it, by unwinding: who calls it for a client has nothing to drop.
///
/// # Errors
/// The kernel's.
#[inline]
pub fn run(vcpu: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: the guest touches what its slots show (see the module).
    unsafe { sys::long_ioctl(vcpu, RUN, 0) }
}

/// `KVM_PRE_FAULT_MEMORY` for `size` bytes from `gpa`; returns what is left of both.
///
/// # Errors
/// The kernel's; ENOTTY or EINVAL where it has no such call.
pub fn pre_fault(vcpu: BorrowedFd<'_>, gpa: u64, size: u64) -> Result<(u64, u64), Errno> {
    let mut range = PreFaultMemory { gpa, size, flags: 0, padding: [0; 5] };
    // SAFETY: the kernel reads and writes `range`, which has the size in the call's number.
    unsafe { sys::ioctl(vcpu, PRE_FAULT_MEMORY, (&raw mut range).addr()) }?;
    Ok((range.gpa, range.size))
}

/// A mapping of a vCPU's shared pages (`struct kvm_run`), unmapped on drop.
#[derive(Debug)]
pub struct RunMapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the pointer is used through `RunArea` only, whose contract covers all threads, and to unmap.
unsafe impl Send for RunMapping {}
// SAFETY: as above.
unsafe impl Sync for RunMapping {}

impl RunMapping {
    /// Bytes that the shared pages of a vCPU have.
    ///
    /// # Errors
    /// The kernel's.
    pub fn len_of(kvm: BorrowedFd<'_>) -> Result<usize, Errno> {
        // SAFETY: the call takes no argument.
        let len = unsafe { sys::ioctl(kvm, GET_VCPU_MMAP_SIZE, 0) }?;
        usize::try_from(len).map_err(|_| Errno::INVAL)
    }

    /// Maps the shared pages of `vcpu`, `len` bytes.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(len: usize, vcpu: BorrowedFd<'_>) -> Result<Self, Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let base = unsafe { rustix::mm::mmap(core::ptr::null_mut(), len, prot, MapFlags::SHARED, vcpu, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { base, len })
    }

    /// The fields of the mapping. To be used by the thread that has just returned from [`run`], as the client does.
    #[must_use]
    pub fn area(&self) -> RunArea {
        // SAFETY: the mapping is readable, writable and as long as the kernel says, and it lives as long as `self`, which
        // whoever runs the vCPU holds. The kernel lets one thread at a time run a vCPU.
        unsafe { RunArea::new(self.base) }
    }
}

impl Drop for RunMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; users of the address hold a reference to the mapping.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Whether a descriptor is `/dev/kvm`.
#[must_use]
pub fn is_kvm_device(fd: BorrowedFd<'_>) -> bool {
    const KVM_MINOR: u32 = 232;
    let Ok(stat) = rustix::fs::fstat(fd) else { return false };
    let character = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
    character && rustix::fs::major(stat.st_rdev) == 10 && rustix::fs::minor(stat.st_rdev) == KVM_MINOR
}

/// A descriptor that a client names by number, without owning it.
///
/// # Errors
/// EBADF for numbers that no descriptor has.
pub fn with_client_fd<T>(fd: i32, then: impl FnOnce(BorrowedFd<'_>) -> Result<T, Errno>) -> Result<T, Errno> {
    if fd < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the number is only passed to the kernel, which answers EBADF if it is not open; nothing here closes it or
    // assumes what it is.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    then(borrowed)
}

/// Whether a number names an open file. A descriptor of O_PATH is none to the kernel, too (`fget`).
#[must_use]
pub fn is_open(fd: i32) -> bool {
    let flags = with_client_fd(fd, |fd| rustix::fs::fcntl_getfl(fd));
    flags.is_ok_and(|flags| !flags.contains(rustix::fs::OFlags::PATH))
}

/// Makes the times of a client's file those of now, as a change of its content does.
pub fn touch(fd: i32) {
    use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
    let [now, omit] = [UTIME_NOW, UTIME_OMIT].map(|tv_nsec| Timespec { tv_sec: 0, tv_nsec });
    let times = Timestamps { last_access: omit, last_modification: now };
    let _ = with_client_fd(fd, |fd| rustix::fs::futimens(fd, &times));
}

/// Gives a descriptor away to the client.
#[must_use]
pub fn into_client(fd: OwnedFd) -> i32 {
    use rustix::fd::IntoRawFd;
    fd.into_raw_fd()
}
