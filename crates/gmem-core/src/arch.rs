//! The architecture of a VM: one of the modules in [`vendor`](crate::vendor).
//!
//! The set is closed and each member is a struct of its own, so this is an enum with one method per verb and no trait:
//! a reader sees every architecture's answer to a verb in one place.

use crate::addr::{Gfn, GfnRange, Level, Pfn, PfnRange};
use crate::vendor::{Cause, Mapping, Populate, Refusal, Side, Status};

/// The architecture of a VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Arch {
    /// `KVM_X86_DEFAULT_VM`: no private memory.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: private memory by attribute, nothing enforced by hardware.
    SwProtected,
}

impl Arch {
    /// Whether guests can have private memory (`kvm_arch_has_private_mem()`).
    #[must_use]
    pub fn has_private_memory(&self) -> bool {
        match self {
            Self::Default => false,
            Self::SwProtected => true,
        }
    }

    /// Which side an access is on: hardware says so for most architectures; SW_PROTECTED takes the attribute, so that an
    /// access never contradicts it.
    #[must_use]
    pub fn access_side(&self, _claimed: Side, attribute: Side) -> Side {
        match self {
            Self::Default => Side::Shared,
            Self::SwProtected => attribute,
        }
    }

    /// The largest mapping that the architecture allows.
    #[must_use]
    pub fn max_level(&self, _pfn: Pfn, _side: Side) -> Level {
        Level::Page1G
    }

    /// A page of a private file was looked up and is about to be mapped.
    ///
    /// # Errors
    /// What the architecture refuses.
    pub fn make_private(&mut self, _gfn: Gfn, _pfn: Pfn) -> Result<(), Refusal> {
        Ok(())
    }

    /// A mapping is about to be entered.
    ///
    /// # Errors
    /// What the architecture refuses; [`Cause::Busy`] means that the fault is to be retried.
    pub fn map(&mut self, _mapping: Mapping) -> Result<(), Refusal> {
        Ok(())
    }

    /// Frames of a file are about to go.
    pub fn invalidate(&mut self, _range: GfnRange) {}

    /// Pages leave the guest.
    pub fn reclaim(&mut self, _pages: PfnRange) {}

    /// A page gets its initial contents.
    ///
    /// # Errors
    /// [`Cause::NotSupported`] where launches do not exist.
    pub fn populate(&mut self, _gfn: Gfn, _pfn: Pfn, _page: Populate<'_>) -> Result<(), Refusal> {
        Err(Refusal { cause: Cause::NotSupported, status: Status::None })
    }

    /// Whether frames may be prefaulted now.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        true
    }
}
