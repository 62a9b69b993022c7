//! Which errno stands for which refusal: the one total table.

use gmem_core::file::{AllocateError, CreateError, GetPageError};
use gmem_core::ops::{FaultEnd, RegionError};
use gmem_core::vendor::Cause;
use rustix::io::Errno;

use crate::profile::Profile;

pub(crate) fn create(error: CreateError) -> Errno {
    match error {
        CreateError::Flags(_) | CreateError::Size(_) => Errno::INVAL,
    }
}

pub(crate) fn allocate(error: AllocateError) -> Errno {
    match error {
        AllocateError::Unaligned | AllocateError::BeyondEnd => Errno::INVAL,
    }
}

pub(crate) fn region(profile: &Profile, error: RegionError) -> Errno {
    match error {
        RegionError::SlotNumber
        | RegionError::Flags
        | RegionError::Geometry
        | RegionError::NoSuchSlot
        | RegionError::TooManyPages
        | RegionError::Immutable
        | RegionError::ReadOnly
        | RegionError::File
        | RegionError::Unreachable => Errno::INVAL,
        RegionError::Overlap => Errno::EXIST,
        RegionError::BadDescriptor => Errno::BADF,
        RegionError::PagesBound => profile.pages_bound,
    }
}

pub(crate) fn page(error: GetPageError) -> Errno {
    match error {
        GetPageError::NoFile | GetPageError::BeyondEnd => Errno::FAULT,
        GetPageError::NotBound => Errno::IO,
        GetPageError::Poisoned => Errno::HWPOISON,
    }
}

pub(crate) fn cause(cause: Cause) -> Errno {
    match cause {
        Cause::NotTracked => Errno::NOENT,
        Cause::Invalid => Errno::INVAL,
        Cause::Exists => Errno::EXIST,
        Cause::Busy => Errno::BUSY,
        Cause::Again => Errno::AGAIN,
        Cause::NotSupported => Errno::OPNOTSUPP,
        Cause::NotOwner => Errno::PERM,
        Cause::NoMemory => Errno::NOMEM,
        Cause::Poisoned => Errno::HWPOISON,
        Cause::VmDead => Errno::IO,
        Cause::Fault => Errno::FAULT,
        Cause::NoDevice => Errno::NXIO,
    }
}

/// How a prefault of one page ends: done, or the errno.
pub(crate) fn prefault(end: FaultEnd) -> Result<(), Errno> {
    match end {
        FaultEnd::Mapped(_) => Ok(()),
        FaultEnd::Retry | FaultEnd::DyingSlot => Err(Errno::AGAIN),
        FaultEnd::Emulate => Err(Errno::NOENT),
        FaultEnd::MemoryFault(_) | FaultEnd::NoUserPage => Err(Errno::FAULT),
        FaultEnd::PageError(_, error) => Err(page(error)),
        FaultEnd::Refused(_, refusal) => Err(cause(refusal.cause)),
    }
}
