//! Which address space this is.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The identity of an address space: threads and children of vfork share it, a child of fork has its own, however it was made.
///
/// KVM compares address spaces in this way before it does anything for a caller (`kvm_vm_ioctl`, `kvm_vcpu_ioctl`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressSpace(u64);

/// What a child of fork finds empty.
#[derive(Debug, Default)]
struct Own {
    number: AtomicU64,
    process: AtomicU32,
}

impl AddressSpace {
    /// That of the caller. No system call after the first time.
    ///
    /// # Errors
    /// ENOMEM; EINVAL on a kernel before 4.14.
    pub fn current() -> Result<Self, Errno> {
        /// Numbers given out in this process and in those that it was forked from.
        static LAST: AtomicU64 = AtomicU64::new(0);
        let own = own()?;
        match own.number.load(Ordering::Relaxed) {
            0 => {
                let new = LAST.fetch_add(1, Ordering::Relaxed) + 1;
                let old = own.number.compare_exchange(0, new, Ordering::Relaxed, Ordering::Relaxed);
                Ok(Self(old.err().unwrap_or(new)))
            }
            known => Ok(Self(known)),
        }
    }
}

/// The caller is a process with this address space, and not a child of vfork, which shares it without being one.
///
/// To be called early and by a child of fork; otherwise the first caller that asks is taken for it.
pub fn enter() {
    if let Ok(own) = own() {
        own.process.store(caller(), Ordering::Relaxed);
    }
}

/// Whether the caller is the process of [`enter`]: a child of vfork is not, and its descriptors are its own.
#[must_use]
pub fn is_own() -> bool {
    process() == caller()
}

/// A process with this address space: the caller, or the parent of a caller that was made by vfork.
pub(crate) fn process() -> u32 {
    let Ok(own) = own() else { return caller() };
    match own.process.load(Ordering::Relaxed) {
        0 => {
            let caller = caller();
            own.process.store(caller, Ordering::Relaxed);
            caller
        }
        known => known,
    }
}

/// The calling process.
pub(crate) fn caller() -> u32 {
    rustix::process::getpid().as_raw_nonzero().get().cast_unsigned()
}

/// Address of the page that tells; it must stay what it is.
pub(crate) fn page() -> Result<usize, Errno> {
    static PAGE: OnceLock<Result<usize, Errno>> = OnceLock::new();
    *PAGE.get_or_init(wiped_page)
}

fn own() -> Result<&'static Own, Errno> {
    let page = page()?;
    // SAFETY: the page was mapped for reading and writing, is large enough and aligned, is never unmapped and is only used
    // here; zeros are a value of the type, and its fields may change at any time.
    Ok(unsafe { &*core::ptr::with_exposed_provenance::<Own>(page) })
}

/// A page that the kernel fills with zeros in a child of fork.
fn wiped_page() -> Result<usize, Errno> {
    const PAGE: usize = 4096;
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let page = unsafe { rustix::mm::mmap_anonymous(core::ptr::null_mut(), PAGE, prot, flags) }?;
    // SAFETY: the advice is about the page that was mapped a moment ago, which nothing refers to.
    unsafe { rustix::mm::madvise(page, PAGE, Advice::LinuxWipeOnFork) }?;
    Ok(page.expose_provenance())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_share_it() {
        let here = AddressSpace::current().unwrap();
        let there = std::thread::spawn(|| AddressSpace::current().unwrap()).join().unwrap();
        assert_eq!(here, there);
        assert!(std::thread::spawn(is_own).join().unwrap());
    }
}
