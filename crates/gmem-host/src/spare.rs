//! Mappings that a process has for need.
//!
//! Linux refuses `mmap` to a process that has more than `vm.max_map_count` mappings, also where it would leave fewer: a guest
//! that was converted page by page could never be made whole again. So some are kept that mean nothing, to be given up for a
//! moment. What then leaves no room for them is refused.

use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::backing::pointer;

const PAGE: usize = 4096;
/// As many as `mremap` wants to have left.
const COUNT: usize = 8;

/// Addresses of the pages. With this lock no other is taken.
static SPARE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// Gives them up.
pub(crate) fn release() {
    for page in SPARE.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // SAFETY: mapped by `take_back`; nothing refers to it.
        let _ = unsafe { rustix::mm::munmap(pointer(page), PAGE) };
    }
}

/// Has them again, as many as there is room for.
///
/// # Errors
/// ENOMEM if there is not room for all.
pub(crate) fn take_back() -> Result<(), Errno> {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    while spare.len() < COUNT {
        spare.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        // Shared: two of them that lie side by side stay two.
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page =
            unsafe { rustix::mm::mmap_anonymous(core::ptr::null_mut(), PAGE, ProtFlags::empty(), MapFlags::SHARED) }?;
        spare.push(page.addr());
    }
    Ok(())
}
