//! Operations of the core under way, with one type for all of them.

use gmem_core::Vm;
use gmem_core::addr::Pfn;
use gmem_core::file::GetPageError;
use gmem_core::ops::{
    ChangeUserMapping, CloseFile, ConvertError, ConvertInPlace, Fault, FaultEnd, MemoryFailure, Operation, Populate,
    PopulateError, Populated, Prefault, PrefaultError, PunchError, PunchHole, Reach, RegionError, RestoreTemporarily,
    SetAttributes, SetRegion, Step, UserFault,
};
use gmem_core::vendor::{Cause, Refusal};

use crate::value::{Errno, Seen};

/// One of the core's operations.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum CoreOp {
    Attributes(SetAttributes),
    Close(CloseFile),
    Convert(ConvertInPlace),
    Fault(Fault),
    Populate(Populate<'static>, u64),
    Poison(MemoryFailure),
    Prefault(Prefault, u64),
    Punch(PunchHole),
    Region(SetRegion),
    Restore(RestoreTemporarily),
    User(ChangeUserMapping),
    UserFault(UserFault),
}

/// How an operation ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum End {
    Fault(FaultEnd),
    Seen(Seen),
}

fn follow<O: Operation>(op: &mut O, vm: &mut Vm, end: impl FnOnce(O::Output) -> Seen) -> Step<End> {
    match op.step(vm) {
        Step::Do(action) => Step::Do(action),
        Step::Done(output) => Step::Done(End::Seen(end(output))),
    }
}

impl Operation for CoreOp {
    type Output = End;

    fn step(&mut self, vm: &mut Vm) -> Step<End> {
        match self {
            Self::Attributes(op) => follow(op, vm, |()| Seen::Ok),
            Self::Close(op) => follow(op, vm, |()| Seen::Ok),
            Self::Convert(op) => follow(op, vm, of_convert),
            Self::Fault(op) => match op.step(vm) {
                Step::Do(action) => Step::Do(action),
                Step::Done(end) => Step::Done(End::Fault(end)),
            },
            Self::Populate(op, pages) => {
                let pages = *pages;
                follow(op, vm, |end| of_populate(end, pages))
            }
            Self::Poison(op) => follow(op, vm, |()| Seen::Ok),
            Self::Prefault(op, pages) => {
                let pages = *pages;
                follow(op, vm, |result| of_prefault(result, pages))
            }
            Self::Punch(op) => follow(op, vm, of_punch),
            Self::Region(op) => follow(op, vm, of_region),
            Self::Restore(op) => follow(op, vm, |()| Seen::Ok),
            Self::User(op) => follow(op, vm, |_| Seen::Ok),
            Self::UserFault(op) => follow(op, vm, |result| result.map_or(Seen::HostFault, |()| Seen::Ok)),
        }
    }

    fn reach(&self) -> Reach {
        match self {
            Self::Attributes(op) => op.reach(),
            Self::Close(op) => op.reach(),
            Self::Convert(op) => op.reach(),
            Self::Fault(op) => op.reach(),
            Self::Populate(op, _) => op.reach(),
            Self::Poison(op) => op.reach(),
            Self::Prefault(op, _) => op.reach(),
            Self::Punch(op) => op.reach(),
            Self::Region(op) => op.reach(),
            Self::Restore(op) => op.reach(),
            Self::User(op) => op.reach(),
            Self::UserFault(op) => op.reach(),
        }
    }
}

impl CoreOp {
    /// Answers [`Action::GetUserPage`](gmem_core::ops::Action::GetUserPage).
    pub(crate) fn user_page(&mut self, pfn: Option<Pfn>) {
        match self {
            Self::Fault(fault) => fault.user_page(pfn),
            Self::Prefault(prefault, _) => prefault.user_page(pfn),
            _ => {}
        }
    }

    /// Whether a change of slots has to wait for it.
    pub(crate) fn is_reading_slots(&self) -> bool {
        match self {
            Self::Fault(fault) => fault.is_reading_slots(),
            Self::Prefault(prefault, _) => prefault.fault().is_some_and(Fault::is_reading_slots),
            _ => false,
        }
    }
}

fn of_convert(result: Result<(), ConvertError>) -> Seen {
    match result {
        Ok(()) => Seen::Ok,
        Err(ConvertError::NotInPlace) => Seen::Errno(Errno::ENOTTY),
        Err(ConvertError::NoPrivateMemory | ConvertError::BeyondEnd) => Seen::Errno(Errno::EINVAL),
        Err(ConvertError::Referenced(_)) => Seen::Errno(Errno::EAGAIN),
    }
}

fn of_punch(result: Result<(), PunchError>) -> Seen {
    match result {
        Ok(()) => Seen::Ok,
        Err(PunchError::SplitFailed) => Seen::Errno(Errno::EBUSY),
    }
}

fn of_populate(end: Populated, pages: u64) -> Seen {
    Seen::Errno(match end.result() {
        Ok(done) => return of_progress(done, pages),
        Err(PopulateError::Interrupted) => Errno::EINTR,
        Err(PopulateError::NoSource) => Errno::EFAULT,
        Err(PopulateError::NoPrivateSlot | PopulateError::NotPrivate) => Errno::EINVAL,
        Err(PopulateError::Page(error)) => of_page(error),
        Err(PopulateError::Populated) => Errno::EEXIST,
        Err(PopulateError::Refused(refusal)) => of_refusal(refusal),
    })
}

fn of_region(result: Result<(), RegionError>) -> Seen {
    Seen::Errno(match result {
        Ok(()) => return Seen::Ok,
        Err(RegionError::Overlap | RegionError::PagesBound) => Errno::EEXIST,
        Err(RegionError::BadDescriptor) => Errno::EBADF,
        Err(_) => Errno::EINVAL,
    })
}

fn of_prefault(result: Result<u64, PrefaultError>, pages: u64) -> Seen {
    match result {
        Ok(done) => of_progress(done, pages),
        Err(PrefaultError::NotAllowed) => Seen::Errno(Errno::EOPNOTSUPP),
        Err(PrefaultError::VmDead) => Seen::Errno(Errno::EIO),
        Err(PrefaultError::Fault(_, end)) => Seen::Errno(match end {
            FaultEnd::Emulate => Errno::ENOENT,
            FaultEnd::DyingSlot => Errno::EAGAIN,
            FaultEnd::PageError(_, error) => of_page(error),
            FaultEnd::Refused(_, refusal) => of_refusal(refusal),
            FaultEnd::Mapped(_) | FaultEnd::Retry | FaultEnd::MemoryFault(_) | FaultEnd::NoUserPage => Errno::EFAULT,
        }),
    }
}

fn of_progress(done: u64, pages: u64) -> Seen {
    if done >= pages { Seen::Ok } else { Seen::Partly(u8::try_from(done).unwrap_or(u8::MAX)) }
}

pub(crate) fn of_page(error: GetPageError) -> Errno {
    match error {
        GetPageError::NoFile | GetPageError::BeyondEnd => Errno::EFAULT,
        GetPageError::NotBound => Errno::EIO,
        GetPageError::Poisoned => Errno::EHWPOISON,
    }
}

pub(crate) fn of_refusal(refusal: Refusal) -> Errno {
    match refusal.cause {
        Cause::NotTracked => Errno::ENOENT,
        Cause::Invalid => Errno::EINVAL,
        Cause::Exists => Errno::EEXIST,
        Cause::Busy => Errno::EBUSY,
        Cause::Again => Errno::EAGAIN,
        Cause::NotSupported => Errno::EOPNOTSUPP,
        Cause::NotOwner => Errno::EPERM,
        Cause::NoMemory => Errno::ENOMEM,
        Cause::Poisoned => Errno::EHWPOISON,
        Cause::VmDead => Errno::EIO,
        Cause::Fault => Errno::EFAULT,
        Cause::NoDevice => Errno::ENXIO,
    }
}
