//! Numbers and layouts of the uAPI (`include/uapi/linux/kvm.h`), little endian, naturally aligned: those that gmem answers, and
//! those that it asks the host for itself.

pub use gmem_host::abi::{
    CHECK_EXTENSION, CREATE_VCPU, CREATE_VM, ENABLE_CAP, EnableCap, MemoryRegion, PRE_FAULT_MEMORY, PreFaultMemory,
    RUN, SET_USER_MEMORY_REGION,
};
use gmem_host::sys::Argument;
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `KVM_SET_REGS`
pub const SET_REGS: u32 = 0x4090_ae82;
/// `KVM_SET_SREGS`
pub const SET_SREGS: u32 = 0x4138_ae84;
/// `KVM_SET_SREGS2`
pub const SET_SREGS2: u32 = 0x4140_aecd;
/// `KVM_SET_USER_MEMORY_REGION2`
pub const SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
/// `KVM_SET_MEMORY_ATTRIBUTES`
pub const SET_MEMORY_ATTRIBUTES: u32 = 0x4020_aed2;
/// `KVM_CREATE_GUEST_MEMFD`
pub const CREATE_GUEST_MEMFD: u32 = 0xc040_aed4;

/// Calls that the VFS answers before a file is asked (`do_vfs_ioctl`): FIGETBSZ, FIONBIO, FIONCLEX, FIOCLEX, FIOASYNC.
pub(crate) const VFS_IOCTLS: [u32; 5] = [0x2, 0x5421, 0x5450, 0x5451, 0x5452];
/// The same for regular files, which newer kernels take a guest_memfd for none of: FIONREAD, FIOQSIZE.
pub(crate) const SIZE_IOCTLS: [u32; 2] = [0x541b, 0x5460];

/// Whether a call changes which mappings a userfaultfd has a part in (`include/uapi/linux/userfaultfd.h`): UFFDIO_REGISTER,
/// UFFDIO_UNREGISTER. Like [`may_concern_kvm`] without a loop: a thread may be cancelled here, and must not be in a frame of the
/// library's.
pub(crate) fn is_registration(request: u32) -> bool {
    matches!(request, 0xc020_aa00 | 0x8010_aa01)
}

/// Whether `request` is one of KVM's (type byte 0xae).
#[must_use]
pub fn is_kvm(request: u32) -> bool {
    request >> 8 & 0xff == 0xae
}

/// Whether a call of KVM's is one that gmem may have something to say to. All others reach the real KVM: on the file that stands
/// for a guest_memfd they fail with ENOTTY, as they do on one.
pub(crate) fn may_concern_kvm(request: u32) -> bool {
    matches!(
        request,
        CREATE_VM
            | CHECK_EXTENSION
            | CREATE_VCPU
            | ENABLE_CAP
            | SET_USER_MEMORY_REGION
            | SET_USER_MEMORY_REGION2
            | SET_MEMORY_ATTRIBUTES
            | CREATE_GUEST_MEMFD
            | RUN
            | SET_REGS
            | SET_SREGS
            | SET_SREGS2
            | PRE_FAULT_MEMORY
    )
}

/// Capabilities that gmem answers itself.
pub mod cap {
    /// `KVM_CAP_DISABLE_QUIRKS`
    pub const DISABLE_QUIRKS: u32 = 116;
    /// `KVM_CAP_DISABLE_QUIRKS2`
    pub use gmem_host::abi::CAP_DISABLE_QUIRKS2 as DISABLE_QUIRKS2;
    /// `KVM_CAP_MULTI_ADDRESS_SPACE`
    pub const MULTI_ADDRESS_SPACE: u32 = 118;
    /// `KVM_CAP_USER_MEMORY2`
    pub const USER_MEMORY2: u32 = 231;
    /// `KVM_CAP_MEMORY_FAULT_INFO`
    pub const MEMORY_FAULT_INFO: u32 = 232;
    /// `KVM_CAP_MEMORY_ATTRIBUTES`
    pub const MEMORY_ATTRIBUTES: u32 = 233;
    /// `KVM_CAP_GUEST_MEMFD`
    pub const GUEST_MEMFD: u32 = 234;
    /// `KVM_CAP_VM_TYPES`
    pub const VM_TYPES: u32 = 235;
    /// `KVM_CAP_PRE_FAULT_MEMORY`
    pub const PRE_FAULT_MEMORY: u32 = 236;
    /// `KVM_CAP_GUEST_MEMFD_FLAGS`
    pub const GUEST_MEMFD_FLAGS: u32 = 244;
}

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`
pub const ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// `struct kvm_userspace_memory_region2`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MemoryRegion2 {
    /// The older structure.
    pub region: MemoryRegion,
    /// Bytes.
    pub guest_memfd_offset: u64,
    /// Descriptor.
    pub guest_memfd: u32,
    /// Not checked by the kernel.
    pub pad1: u32,
    /// Not checked by the kernel.
    pub pad2: [u64; 14],
}

/// `struct kvm_memory_attributes`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MemoryAttributes {
    /// Bytes.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// `KVM_MEMORY_ATTRIBUTE_*`.
    pub attributes: u64,
    /// Must be 0.
    pub flags: u64,
}

/// `struct kvm_create_guest_memfd`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct CreateGuestMemfd {
    /// Bytes.
    pub size: u64,
    /// `GUEST_MEMFD_FLAG_*`.
    pub flags: u64,
    /// Not checked by the kernel.
    pub reserved: [u64; 6],
}

/// Copies a structure that a client points to.
///
/// # Errors
/// EFAULT.
pub(crate) fn read<T: FromBytes + IntoBytes>(from: Argument) -> Result<T, Errno> {
    let mut value = T::new_zeroed();
    from.copy_from(value.as_mut_bytes())?;
    Ok(value)
}

/// Copies a structure to where a client points.
///
/// # Errors
/// EFAULT.
pub(crate) fn write<T: IntoBytes + Immutable>(to: Argument, value: &T) -> Result<(), Errno> {
    to.copy_to(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The size is part of an ioctl's number.
    #[test]
    fn sizes_are_those_in_the_numbers() {
        fn size_in(request: u32) -> usize {
            (request >> 16 & 0x3fff) as usize
        }
        assert_eq!(size_of::<MemoryRegion2>(), size_in(SET_USER_MEMORY_REGION2));
        assert_eq!(size_of::<MemoryAttributes>(), size_in(SET_MEMORY_ATTRIBUTES));
        assert_eq!(size_of::<CreateGuestMemfd>(), size_in(CREATE_GUEST_MEMFD));
    }
}
