//! pKVM on arm64: who owns a page, as the hypervisor at EL2 tracks it (`arch/arm64/kvm/hyp/nvhe/mem_protect.c`, Linux
//! 7.2), and KVM's use of it.
//!
//! Every page has one owner: the host, the hypervisor or a guest. The owner may share it. [`El2`] keeps the state and has
//! one method per hypercall, with the kernel's errors; [`Pkvm`] is one virtual machine on top, the verbs of
//! [`crate::vendor`].
//!
//! - A page that the host donates is gone for the host. It comes back when the VM is torn down, wiped unless it was
//!   shared, or by force when the host touches it: then it is wiped too and the guest's mapping is poison, at which the
//!   guest's vCPU stops for good.
//! - Protected VMs do not use guest_memfd in Linux 7.2, and nothing is measured: the VM's own firmware verifies what it
//!   boots.
//!
//! Not modelled: the memory that EL2 needs for stage 2 tables (`-ENOMEM`; KVM tops it up before the calls), pages that
//! are not memory (MMIO), permissions and access flags of guest mappings, the proxying of FF-A itself.

mod el2;
mod kvm;
#[cfg(test)]
mod tests;

pub use el2::{El2, Error, GuestPage, PageState, Physical, VmHandle};
pub use kvm::Pkvm;
