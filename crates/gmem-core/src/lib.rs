//! Guest private memory as state machines.
//!
//! This crate is the subsystem that Linux calls guest_memfd together with everything that has to agree with it. It
//! performs no I/O, starts no thread, holds no lock and knows no Linux structure layout: an operation that the kernel
//! performs in several steps is a resumable machine here, and the caller carries out what each step asks for.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod addr;
pub mod arch;
#[cfg(test)]
mod effort;
pub mod file;
pub mod invalidate;
pub mod measure;
pub mod ops;
pub mod page_set;
pub mod runs;
pub mod seal;
pub mod slot;
pub mod vendor;
pub mod vm;

pub use vm::Vm;
