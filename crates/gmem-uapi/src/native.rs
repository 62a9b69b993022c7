//! What the host's own KVM has.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::abi::cap;
use crate::profile::{self, Profile};

/// The host's KVM, as far as guest private memory is concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Native {
    /// Bit mask of the VM types.
    pub vm_types: u32,
    /// `KVM_CAP_GUEST_MEMFD`.
    pub guest_memfd: bool,
    /// `KVM_CAP_GUEST_MEMFD_FLAGS`, 0 where the capability does not exist.
    pub file_flags: u32,
    /// `KVM_CAP_MEMORY_ATTRIBUTES`.
    pub attributes: u32,
    /// `KVM_CAP_PRE_FAULT_MEMORY`.
    pub prefault: bool,
    /// `KVM_CAP_USER_MEMORY2`.
    pub user_memory2: bool,
    /// Kernel release.
    pub release: String,
}

impl Native {
    /// Asks `/dev/kvm`.
    ///
    /// # Errors
    /// Why it cannot be opened: ENOENT, EACCES, ENODEV. ENOTTY: it is not KVM's device.
    pub fn probe() -> Result<Self, Errno> {
        let kvm = open()?;
        if !gmem_host::kvm::is_kvm_device(kvm.as_fd()) {
            return Err(Errno::NOTTY);
        }
        let check = |capability| gmem_host::kvm::check_extension(kvm.as_fd(), capability);
        let mask = |capability| u32::try_from(check(capability)).unwrap_or(0);
        Ok(Self {
            // Kernels before the capability have the default type only.
            vm_types: mask(cap::VM_TYPES) | 1,
            guest_memfd: check(cap::GUEST_MEMFD) > 0,
            file_flags: mask(cap::GUEST_MEMFD_FLAGS),
            attributes: mask(cap::MEMORY_ATTRIBUTES),
            prefault: check(cap::PRE_FAULT_MEMORY) > 0,
            user_memory2: check(cap::USER_MEMORY2) > 0,
            release: release(),
        })
    }

    /// The profile of the host's kernel.
    #[must_use]
    pub fn profile(&self) -> &'static Profile {
        profile::of_release(&self.release)
    }

    /// Whether the host has VM type `vm_type` with the behaviour of `profile`.
    #[must_use]
    pub fn has_type(&self, vm_type: u32, profile: &Profile) -> bool {
        let there = vm_type < 32 && self.vm_types & 1 << vm_type != 0;
        there && self.guest_memfd && profile.name == self.profile().name
    }
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// The kernel's.
pub fn open() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

/// The kernel's release.
#[must_use]
pub fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}
