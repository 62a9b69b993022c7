//! KVM's uAPI for guest private memory.
//!
//! Each ioctl, capability and errno stands in a table per kernel ([`profile`]); [`Process`] dispatches a client's calls onto
//! `gmem-core`, which decides, and `gmem-host`, which carries out. Nothing here knows how the calls were caught: a test can
//! drive it without any interposing.
#![forbid(unsafe_code)]

pub mod abi;
mod capability;
mod errno;
mod guard;
mod memfd;
pub mod native;
mod process;
pub mod profile;
mod snapshot;
mod vcpu;
mod vm;

pub use gmem_host::sys::Argument;
pub use memfd::FileCall;
pub use process::{Answer, Config, Entry, ForkGuard, Process, Run, Running};
pub use rustix::io::Errno;
