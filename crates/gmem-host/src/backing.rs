//! Memory behind guest_memfds and behind guest RAM that had to become shareable.

use core::ffi::c_void;

use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MlockFlags, MremapFlags, ProtFlags};

use crate::fds::{self, Held, Hidden};
use crate::maps::{FileId, VmFlags};

/// Pages that gmem owns and that no descriptor of the client names.
///
/// A memfd: absent pages read as zeros and take no memory, a page is zeroed when it is first used, and a hole takes every
/// mapping of its pages away, KVM's among them.
#[derive(Debug)]
pub struct Backing {
    fd: Hidden,
}

impl Backing {
    /// Memory of `size` bytes that takes none until it is used.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM; EFBIG beyond a file size limit of the process's that it may not lift.
    pub fn new(size: u64) -> Result<Self, Errno> {
        let fd = rustix::fs::memfd_create("gmem", MemfdFlags::CLOEXEC)?;
        fds::set_size(&fd, size)?;
        Ok(Self { fd: fds::hide(fd)? })
    }

    /// Makes `size` bytes of what has at most `at_most` so far; the new ones are zeros.
    ///
    /// # Errors
    /// EINVAL if there are more already, EFBIG beyond the process's file size limit.
    pub(crate) fn grow(&self, at_most: u64, size: u64) -> Result<(), Errno> {
        let now = u64::try_from(rustix::fs::fstat(self.fd.hold())?.st_size).unwrap_or(u64::MAX);
        if now > at_most { Err(Errno::INVAL) } else { fds::set_size(self.fd.hold(), size) }
    }

    /// What `/proc/self/maps` calls it.
    #[must_use]
    pub(crate) fn id(&self) -> Option<FileId> {
        FileId::of(self.fd.hold()).ok()
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> Held<'_> {
        self.fd.hold()
    }

    /// Maps the memory where and how the client asks for it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn map_for_client(
        &self,
        address: usize,
        len: usize,
        prot: u32,
        flags: u32,
        offset: u64,
    ) -> Result<usize, Errno> {
        let (prot, flags) = (ProtFlags::from_bits_retain(prot), MapFlags::from_bits_retain(flags));
        // SAFETY: the client asked for exactly this call; what it replaces with MAP_FIXED is its own decision.
        unsafe { rustix::mm::mmap(pointer(address), len, prot, flags, self.fd.hold(), offset) }.map(|base| base.addr())
    }

    /// Writes into the memory.
    ///
    /// # Errors
    /// ENOMEM, ENOSPC.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        match rustix::io::pwrite(self.fd.hold(), bytes, offset)? {
            n if n == bytes.len() => Ok(()),
            _ => Err(Errno::IO),
        }
    }

    /// Gives memory to the bytes `[offset, offset + len)`.
    ///
    /// # Errors
    /// ENOMEM, ENOSPC, EINTR.
    pub fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(self.fd.hold(), FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Takes the memory of the bytes `[offset, offset + len)` away, and every mapping of it.
    ///
    /// # Errors
    /// None is expected; passed on if there is one.
    pub fn punch(&self, offset: u64, len: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(self.fd.hold(), FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
    }

    /// Maps bytes at a fixed address, replacing what is there in one step.
    ///
    /// # Errors
    /// ENOMEM when the process has too many mappings (`vm.max_map_count`).
    ///
    /// # Safety
    /// `[address, address + len)` must be address space that the caller owns and that holds nothing Rust code refers to.
    pub unsafe fn map_at(&self, address: usize, len: usize, offset: u64) -> Result<(), Errno> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: of the caller.
        unsafe { self.map_protected_at(address, len, offset, prot.bits()) }
    }

    /// The same with the protection given (`PROT_*`).
    ///
    /// # Errors
    /// As [`Backing::map_at`].
    ///
    /// # Safety
    /// As [`Backing::map_at`].
    pub unsafe fn map_protected_at(&self, address: usize, len: usize, offset: u64, prot: u32) -> Result<(), Errno> {
        // SAFETY: of the caller.
        unsafe { self.map_fixed(address, len, offset, prot, MapFlags::SHARED) }
    }

    /// Maps bytes at a fixed address so that writes there stay with this process.
    ///
    /// # Errors
    /// As [`Backing::map_at`].
    ///
    /// # Safety
    /// As [`Backing::map_at`].
    pub unsafe fn map_private_at(&self, address: usize, len: usize, offset: u64, prot: u32) -> Result<(), Errno> {
        // SAFETY: of the caller.
        unsafe { self.map_fixed(address, len, offset, prot, MapFlags::PRIVATE) }
    }

    unsafe fn map_fixed(&self, at: usize, len: usize, offset: u64, prot: u32, kind: MapFlags) -> Result<(), Errno> {
        let (flags, prot) = (kind | MapFlags::FIXED, ProtFlags::from_bits_retain(prot));
        // SAFETY: the caller owns the target range.
        unsafe { rustix::mm::mmap(pointer(at), len, prot, flags, self.fd.hold(), offset) }.map(|_| ())
    }
}

pub(crate) fn pointer(address: usize) -> *mut c_void {
    core::ptr::without_provenance_mut(address)
}

/// Maps nothing at a fixed address: an access by a vCPU ends in a fault.
///
/// # Errors
/// ENOMEM when the process has too many mappings.
///
/// # Safety
/// As [`Backing::map_at`].
pub unsafe fn map_nothing_at(address: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: of the caller.
    unsafe { map_new_at(address, len, ProtFlags::empty().bits()) }
}

/// Maps new private memory at a fixed address.
///
/// # Errors
/// ENOMEM.
///
/// # Safety
/// As [`Backing::map_at`].
pub(crate) unsafe fn map_new_at(address: usize, len: usize, prot: u32) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let prot = ProtFlags::from_bits_retain(prot);
    // SAFETY: the caller owns the target range.
    unsafe { rustix::mm::mmap_anonymous(pointer(address), len, prot, flags) }.map(|_| ())
}

/// Maps the pages of the shared mapping at `from` a second time, at `to`.
///
/// # Errors
/// EFAULT when nothing is mapped at `from`, EINVAL when the mapping there cannot be duplicated (private, or of a device).
///
/// # Safety
/// As [`Backing::map_at`] for `[to, to + len)`.
pub unsafe fn alias_at(from: usize, to: usize, len: usize) -> Result<(), Errno> {
    let flags = MremapFlags::MAYMOVE;
    // SAFETY: an old length of zero duplicates a shared mapping and leaves the original alone; the caller owns the target.
    unsafe { rustix::mm::mremap_fixed(pointer(from), 0, len, flags, pointer(to)) }.map(|_| ())
}

/// Maps the page of the shared mapping at `from` a second time, for a moment: whether that can be done.
///
/// # Errors
/// As [`alias_at`].
pub(crate) fn duplicate_page(from: usize) -> Result<(), Errno> {
    // SAFETY: an old length of zero duplicates a shared mapping, at an address of the kernel's choice, and leaves the original
    // alone.
    let copy = unsafe { rustix::mm::mremap(pointer(from), 0, 4096, MremapFlags::MAYMOVE) }?;
    // SAFETY: mapped a moment ago; nothing refers to it.
    unsafe { rustix::mm::munmap(copy, 4096) }
}

/// Leaves a range out of the children of fork, which have no use for a window.
///
/// # Safety
/// `[address, address + len)` must be mapped by the caller.
pub(crate) unsafe fn keep_from_children(address: usize, len: usize) {
    // SAFETY: the advice changes nothing about the memory of this process. Refused for device mappings, which windows have not.
    let _ = unsafe { rustix::mm::madvise(pointer(address), len, Advice::LinuxDontFork) };
}

/// Asks for huge pages where the host allows them; a host that does not is no error.
///
/// # Safety
/// `[address, address + len)` must be mapped by the caller.
pub unsafe fn prefer_huge_pages(address: usize, len: usize) {
    // SAFETY: the advice changes no contents.
    let _ = unsafe { rustix::mm::madvise(pointer(address), len, Advice::LinuxHugepage) };
}

/// Gives a mapping what the client had asked for where it is now. What the host refuses the client does without.
///
/// # Safety
/// `[address, address + len)` must be mapped by the caller, which must want all that `flags` has.
pub(crate) unsafe fn restore_flags(address: usize, len: usize, flags: &VmFlags) {
    let advice = [("dc", Advice::LinuxDontFork), ("dd", Advice::LinuxDontDump), ("nh", Advice::LinuxNoHugepage)];
    for (_, advice) in advice.into_iter().filter(|(flag, _)| flags.has(flag)) {
        // SAFETY: the advice changes no contents; who may not have the memory did not have it before.
        let _ = unsafe { rustix::mm::madvise(pointer(address), len, advice) };
    }
    if flags.has("lo") {
        let how = if flags.has("lf") { MlockFlags::ONFAULT } else { MlockFlags::empty() };
        // SAFETY: locking changes no contents.
        let _ = unsafe { rustix::mm::mlock_with(pointer(address), len, how) };
    }
}
