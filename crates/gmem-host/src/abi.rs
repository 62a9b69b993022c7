//! Numbers and layouts of the calls that gmem makes (`include/uapi/linux/kvm.h`), little endian, naturally aligned.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `KVM_CREATE_VM`
pub const CREATE_VM: u32 = 0xae01;
/// `KVM_CHECK_EXTENSION`
pub const CHECK_EXTENSION: u32 = 0xae03;
/// `KVM_GET_VCPU_MMAP_SIZE`
pub const GET_VCPU_MMAP_SIZE: u32 = 0xae04;
/// `KVM_CREATE_VCPU`
pub const CREATE_VCPU: u32 = 0xae41;
/// `KVM_RUN`
pub const RUN: u32 = 0xae80;
/// `KVM_ENABLE_CAP`
pub const ENABLE_CAP: u32 = 0x4068_aea3;
/// `KVM_SET_USER_MEMORY_REGION`
pub const SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
/// `KVM_PRE_FAULT_MEMORY`
pub const PRE_FAULT_MEMORY: u32 = 0xc040_aed5;
/// `KVM_CAP_DISABLE_QUIRKS2`
pub const CAP_DISABLE_QUIRKS2: u32 = 213;
/// `KVM_X86_QUIRK_SLOT_ZAP_ALL`: deleting a slot throws the whole stage-2 away.
pub const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

/// `struct kvm_userspace_memory_region`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MemoryRegion {
    /// Address space and number.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// Bytes.
    pub guest_phys_addr: u64,
    /// Bytes.
    pub memory_size: u64,
    /// Address in the VMM.
    pub userspace_addr: u64,
}

/// `struct kvm_enable_cap`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct EnableCap {
    /// Number.
    pub cap: u32,
    /// Must be 0.
    pub flags: u32,
    /// Of the capability.
    pub args: [u64; 4],
    /// Not looked at.
    pub pad: [u8; 64],
}

/// `struct kvm_pre_fault_memory`
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct PreFaultMemory {
    /// Bytes; advanced.
    pub gpa: u64,
    /// Bytes; reduced.
    pub size: u64,
    /// Must be 0.
    pub flags: u64,
    /// Not checked by the kernel.
    pub padding: [u64; 5],
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
        assert_eq!(size_of::<EnableCap>(), size_in(ENABLE_CAP));
        assert_eq!(size_of::<MemoryRegion>(), size_in(SET_USER_MEMORY_REGION));
        assert_eq!(size_of::<PreFaultMemory>(), size_in(PRE_FAULT_MEMORY));
    }
}
