//! The system calls of a KVM client, made through libc's ordinary symbols, and the numbers and layouts of the KVM uAPI
//! (Linux `include/uapi/linux/kvm.h`). Nothing here knows what the calls mean.

use std::ffi::CString;
use std::fmt;

/// The outcome of a system call: its value or its errno.
pub(crate) type Sys<T> = Result<T, Errno>;

/// An errno; its `Display` is the symbolic name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Errno(pub(crate) i32);

const ERRNO_NAMES: &[(i32, &str)] = &[
    (libc::EPERM, "EPERM"),
    (libc::ENOENT, "ENOENT"),
    (libc::EINTR, "EINTR"),
    (libc::EIO, "EIO"),
    (libc::ENXIO, "ENXIO"),
    (libc::EBADF, "EBADF"),
    (libc::EAGAIN, "EAGAIN"),
    (libc::ENOMEM, "ENOMEM"),
    (libc::EACCES, "EACCES"),
    (libc::EFAULT, "EFAULT"),
    (libc::EBUSY, "EBUSY"),
    (libc::EEXIST, "EEXIST"),
    (libc::EXDEV, "EXDEV"),
    (libc::ENODEV, "ENODEV"),
    (libc::EISDIR, "EISDIR"),
    (libc::EINVAL, "EINVAL"),
    (libc::EMFILE, "EMFILE"),
    (libc::ENOTTY, "ENOTTY"),
    (libc::EFBIG, "EFBIG"),
    (libc::ENOSPC, "ENOSPC"),
    (libc::ESPIPE, "ESPIPE"),
    (libc::ENOSYS, "ENOSYS"),
    (libc::EOVERFLOW, "EOVERFLOW"),
    (libc::EOPNOTSUPP, "EOPNOTSUPP"),
    (libc::E2BIG, "E2BIG"),
    (libc::EHWPOISON, "EHWPOISON"),
];

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match ERRNO_NAMES.iter().find(|(n, _)| *n == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "errno{}", self.0),
        }
    }
}

impl std::error::Error for Errno {}

/// Turns libc's "-1 and errno" into a [`Sys`].
pub(crate) fn check<T: Copy + Into<i64>>(ret: T) -> Sys<i64> {
    let ret = ret.into();
    if ret == -1 { Err(last_errno()) } else { Ok(ret) }
}

fn last_errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

pub(crate) const KVM_GET_API_VERSION: u64 = 0xAE00;
pub(crate) const KVM_CREATE_VM: u64 = 0xAE01;
pub(crate) const KVM_CHECK_EXTENSION: u64 = 0xAE03;
pub(crate) const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xAE04;
pub(crate) const KVM_GET_SUPPORTED_CPUID: u64 = 0xC008_AE05;
pub(crate) const KVM_CREATE_VCPU: u64 = 0xAE41;
pub(crate) const KVM_GET_DIRTY_LOG: u64 = 0x4010_AE42;
pub(crate) const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
pub(crate) const KVM_SET_USER_MEMORY_REGION2: u64 = 0x40A0_AE49;
pub(crate) const KVM_RUN: u64 = 0xAE80;
pub(crate) const KVM_GET_REGS: u64 = 0x8090_AE81;
pub(crate) const KVM_SET_REGS: u64 = 0x4090_AE82;
pub(crate) const KVM_GET_SREGS: u64 = 0x8138_AE83;
pub(crate) const KVM_SET_SREGS: u64 = 0x4138_AE84;
pub(crate) const KVM_SET_CPUID2: u64 = 0x4008_AE90;
pub(crate) const KVM_ENABLE_CAP: u64 = 0x4068_AEA3;
pub(crate) const KVM_SET_MEMORY_ATTRIBUTES: u64 = 0x4020_AED2;
pub(crate) const KVM_CREATE_GUEST_MEMFD: u64 = 0xC040_AED4;
pub(crate) const KVM_PRE_FAULT_MEMORY: u64 = 0xC040_AED5;

pub(crate) const KVM_CAP_EXIT_HYPERCALL: u32 = 201;
pub(crate) const KVM_CAP_VM_TYPES: u32 = 235;

pub(crate) const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
pub(crate) const KVM_MEM_READONLY: u32 = 1 << 1;
pub(crate) const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;
pub(crate) const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;
pub(crate) const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;
pub(crate) const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// Bit of the hypercall's attribute argument that asks for private memory.
pub(crate) const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;
pub(crate) const VM_TYPE_DEFAULT: u64 = 0;
pub(crate) const VM_TYPE_SW_PROTECTED: u64 = 1;

/// `struct kvm_userspace_memory_region2`; its first 32 bytes are the first version of the structure.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Region2 {
    pub(crate) slot: u32,
    pub(crate) flags: u32,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) hva: u64,
    pub(crate) gmem_offset: u64,
    pub(crate) gmem_fd: u32,
    pub(crate) pad1: u32,
    pub(crate) pad2: [u64; 14],
}

/// `struct kvm_create_guest_memfd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CreateGmem {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) reserved: [u64; 6],
}

/// `struct kvm_memory_attributes`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Attributes {
    pub(crate) address: u64,
    pub(crate) size: u64,
    pub(crate) attributes: u64,
    pub(crate) flags: u64,
}

/// `struct kvm_pre_fault_memory`; gpa and size advance over what was done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PreFault {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) padding: [u64; 5],
}

/// `struct kvm_dirty_log` with the address of the bitmap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct DirtyLog {
    pub(crate) slot: u32,
    pub(crate) padding: u32,
    pub(crate) bitmap: u64,
}

/// `struct kvm_enable_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct EnableCap {
    pub(crate) cap: u32,
    pub(crate) flags: u32,
    pub(crate) args: [u64; 4],
    pub(crate) pad: [u64; 8],
}

/// `struct kvm_cpuid2` with room for what any host reports.
#[repr(C)]
#[derive(Clone, Debug)]
pub(crate) struct Cpuid {
    pub(crate) count: u32,
    pub(crate) padding: u32,
    pub(crate) entries: [kvm_bindings::kvm_cpuid_entry2; 256],
}

/// A structure whose every bit pattern is a value, so that the kernel may fill it.
///
/// # Safety
/// The type must be plain integers without padding that matters, and as large as the ioctls that it is passed to expect.
pub(crate) unsafe trait Plain {}

// SAFETY: integers only, with the sizes that the ioctl numbers above carry.
unsafe impl Plain for Region2 {}
// SAFETY: as above.
unsafe impl Plain for CreateGmem {}
// SAFETY: as above.
unsafe impl Plain for Attributes {}
// SAFETY: as above.
unsafe impl Plain for PreFault {}
// SAFETY: as above; the bitmap it points at is the caller's business.
unsafe impl Plain for DirtyLog {}
// SAFETY: as above.
unsafe impl Plain for EnableCap {}
// SAFETY: as above; `count` bounds what the kernel writes.
unsafe impl Plain for Cpuid {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_bindings::kvm_sregs {}

/// An ioctl whose argument is a structure.
pub(crate) fn ioctl<T: Plain>(fd: i32, nr: u64, arg: &mut T) -> Sys<i64> {
    // SAFETY: `Plain` promises that the kernel may read and fill the structure.
    check(unsafe { libc::ioctl(fd, nr, std::ptr::from_mut(arg)) })
}

/// An ioctl whose argument is a number, or an address at which nothing of this program lies.
pub(crate) fn ioctl_value(fd: i32, nr: u64, arg: u64) -> Sys<i64> {
    // SAFETY: the argument is no address of memory that this program uses.
    check(unsafe { libc::ioctl(fd, nr, arg) })
}

/// Opens a path; `flags` are added to O_CLOEXEC.
pub(crate) fn open(path: &str, flags: i32) -> Sys<i32> {
    let path = CString::new(path).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: a terminated string.
    check(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) }).map(fd_of)
}

/// Closes a descriptor, or reports EBADF for -1 as the kernel does.
pub(crate) fn close(fd: i32) -> Sys<i64> {
    // SAFETY: the world owns each descriptor once and forgets it here.
    check(unsafe { libc::close(fd) })
}

/// A memfd of `len` bytes.
pub(crate) fn memfd(len: usize) -> Sys<i32> {
    // SAFETY: a terminated string; the fresh descriptor is this program's own.
    let fd = fd_of(check(unsafe { libc::memfd_create(c"conformance".as_ptr(), libc::MFD_CLOEXEC) })?);
    // SAFETY: no memory is passed.
    check(unsafe { libc::ftruncate(fd, off(len as u64)) })?;
    Ok(fd)
}

/// A pipe: read end, write end.
pub(crate) fn pipe() -> Sys<[i32; 2]> {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    Ok(ends)
}

/// `mmap`; `addr` 0 lets the kernel choose unless MAP_FIXED is among the flags.
///
/// # Safety
/// With MAP_FIXED nothing else may live in the range.
pub(crate) unsafe fn mmap(addr: usize, len: usize, prot: i32, flags: i32, fd: i32, offset: u64) -> Sys<usize> {
    // SAFETY: the caller's promise.
    let at = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, fd, off(offset)) };
    if at == libc::MAP_FAILED { Err(last_errno()) } else { Ok(at as usize) }
}

/// `munmap`.
///
/// # Safety
/// Nothing may use the range any more.
pub(crate) unsafe fn munmap(addr: usize, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { libc::munmap(addr as *mut libc::c_void, len) };
}

/// The signed form in which libc takes file offsets; the bits are the caller's.
#[allow(clippy::cast_possible_wrap, reason = "offsets that the kernel must refuse are negative there")]
pub(crate) const fn off(offset: u64) -> i64 {
    offset as i64
}

/// A descriptor that a system call returned.
pub(crate) fn fd_of(ret: i64) -> i32 {
    i32::try_from(ret).unwrap_or(-1)
}

/// The shared page of a vCPU (`struct kvm_run`), read field by field: the kernel changes it behind the compiler's back.
#[derive(Debug)]
pub(crate) struct RunPage {
    at: usize,
    len: usize,
}

impl RunPage {
    pub(crate) const EXIT_REASON: usize = 8;
    /// Where the part of the structure begins that depends on the exit reason.
    pub(crate) const BODY: usize = 32;

    /// Maps the run page of a vCPU.
    pub(crate) fn map(vcpu: i32, len: usize) -> Sys<Self> {
        // SAFETY: not a fixed mapping.
        let at = unsafe { mmap(0, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, vcpu, 0)? };
        Ok(Self { at, len })
    }

    /// Reads a field of `T` at a byte offset of the body.
    pub(crate) fn body<T: Copy>(&self, offset: usize) -> T {
        self.get(Self::BODY + offset)
    }

    /// Reads a field at a byte offset.
    pub(crate) fn get<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= self.len && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: inside the mapping and aligned; the callers read integers only.
        unsafe { ((self.at + offset) as *const T).read_volatile() }
    }

    /// Writes a field at a byte offset.
    pub(crate) fn put<T: Copy>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= self.len && offset.is_multiple_of(align_of::<T>()));
        // SAFETY: inside the mapping and aligned; the callers write integers only.
        unsafe { ((self.at + offset) as *mut T).write_volatile(value) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { munmap(self.at, self.len) }
    }
}
