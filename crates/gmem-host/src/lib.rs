//! Linux mechanism of gmem: memory that backs guests, windows that show it to KVM, and vCPU fix-ups.
//!
//! This crate knows how, never what or when: policy is in `gmem-core` and `gmem-uapi`. Its unsafe code is about address
//! space that it reserved itself or that a client declared to be guest memory.

pub mod abi;
pub mod address_space;
pub mod backing;
pub mod client;
pub mod fds;
pub mod kvm;
pub mod maps;
mod spare;
pub mod sys;
pub mod table;
pub mod vcpu;
pub mod window;
