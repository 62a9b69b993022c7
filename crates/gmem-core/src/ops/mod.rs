//! Operations as resumable machines.
//!
//! An operation that takes several steps in the kernel takes the same steps here. [`Operation::step`] changes the state a
//! little and says what must now be done; the caller does it and calls again. The order of steps is written here, once.
//!
//! One call of `step` together with the [`Action`] that it asks for is one atomic transition: whatever the kernel does
//! under one hold of mmu_lock is one step here, and nothing else may come between the step and its action. Between two
//! transitions anything may happen that the held [`Lock`]s allow.

mod attributes;
mod close;
mod convert;
mod direct_map;
mod fault;
mod hva;
mod poison;
mod populate;
mod prefault;
mod punch;
mod region;
mod user_fault;

pub use attributes::SetAttributes;
pub use close::CloseFile;
pub use convert::{ConvertError, ConvertInPlace};
pub use direct_map::RestoreTemporarily;
pub use fault::{Access, Fault, FaultEnd, MemoryFault, Origin};
pub use hva::ChangeUserMapping;
pub use poison::MemoryFailure;
pub use populate::{Populate, PopulateError, Populated, Source};
pub use prefault::{Prefault, PrefaultError};
pub use punch::{PunchError, PunchHole};
pub use region::{Claim, FileClaim, RegionError, SetRegion, check_claim};
pub use user_fault::{UserFault, UserFaultError};

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange, IndexRange};
use crate::file::FileId;
use crate::invalidate::Filter;
use crate::slot::SlotId;
use crate::vendor::Mapping;
use crate::vm::Vm;

/// Something that happens to a [`Vm`] in several steps.
pub trait Operation {
    /// How it ends.
    type Output;

    /// Takes the next step. After [`Step::Done`] it must not be called again; if it is, it repeats its answer or does
    /// nothing.
    fn step(&mut self, vm: &mut Vm) -> Step<Self::Output>;

    /// What the next step may look at and change in the [`Vm`], at most. Two steps that do not reach into what the other
    /// changes have the same effect in either order; whoever explores interleavings needs only one of them.
    fn reach(&self) -> Reach {
        Reach::ALL
    }
}

bitflags! {
    /// Parts of a [`Vm`].
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Parts: u8 {
        /// The slots.
        const SLOTS = 1 << 0;
        /// Who is private, where that is kept per VM.
        const ATTRIBUTES = 1 << 1;
        /// The invalidation protocol.
        const INVALIDATION = 1 << 2;
        /// The files: pages, sides, bindings.
        const FILES = 1 << 3;
        /// The architecture.
        const ARCH = 1 << 4;
    }
}

/// What a step may look at and change.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Reach {
    /// Looked at.
    pub reads: Parts,
    /// Changed; may also be looked at.
    pub writes: Parts,
}

impl Reach {
    /// Everything.
    pub const ALL: Self = Self { reads: Parts::all(), writes: Parts::all() };
    /// Nothing: the step only tells what to do next.
    pub const NOTHING: Self = Self { reads: Parts::empty(), writes: Parts::empty() };

    /// Looks at `reads` and changes nothing.
    #[must_use]
    pub const fn reads(reads: Parts) -> Self {
        Self { reads, writes: Parts::empty() }
    }

    /// Looks at `reads` too.
    #[must_use]
    pub const fn and_reads(self, reads: Parts) -> Self {
        Self { reads: self.reads.union(reads), writes: self.writes }
    }

    /// Changes `writes`.
    #[must_use]
    pub const fn writes(writes: Parts) -> Self {
        Self { reads: Parts::empty(), writes }
    }
}

/// What a step asks of the caller.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Step<T> {
    /// Do this, then step again.
    Do(Action),
    /// The operation has ended.
    Done(T),
}

/// What the caller has to carry out between two steps.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    /// Nothing; others may come in between.
    Continue,
    /// Wait until the lock can be had, then take it. A caller that runs one operation at a time does nothing.
    Lock(Lock),
    /// Let the lock go.
    Unlock(Lock),
    /// Take the mappings of these frames out of the stage-2 tables. Precise: for TDX and CCA a mapping that goes without
    /// need kills the guest.
    Zap {
        /// The frames.
        range: GfnRange,
        /// Which of their mappings.
        filter: Filter,
    },
    /// Make sure that no vCPU uses a translation that has been zapped.
    Flush,
    /// Wait until every fault that may have seen the old slots has ended (`synchronize_srcu`).
    Synchronize,
    /// Write zeros over the pages.
    Zero(Pages),
    /// Copy the page's source, if it has one, into the page.
    CopyIn(Pages),
    /// Give the memory of the pages back to the host. Whoever gets it next may read and write it.
    Free(Pages),
    /// Take the pages out of the host's direct map, or put them back.
    DirectMap(Pages, DirectMap),
    /// Flush the host's own translations of the direct map.
    FlushDirectMap,
    /// Take the VMM's own mappings of the file's pages away; it may fault them back where that is allowed.
    DropUserMappings(Pages),
    /// Enter the pages into the VMM's mapping of the file.
    MapUser(Pages),
    /// Find the VMM's page behind a frame, and tell the fault with [`Fault::user_page`] or
    /// [`Prefault::user_page`].
    GetUserPage {
        /// The slot.
        slot: SlotId,
        /// The frame.
        gfn: Gfn,
    },
    /// Change the VMM's own mapping (what the MMU notifier brackets).
    ChangeUserMapping,
    /// Let the vCPU or the host touch the page that was put back temporarily.
    UseDirectMap(Pages),
    /// Enter a mapping into the stage-2 tables.
    Map(Mapping),
    /// These frames may now be mapped anew. A stage-2 that is filled by faults has nothing to do; one that is kept complete
    /// (a window) brings the frames in line with [`Vm::views`].
    Refill(GfnRange),
}

/// Pages of a file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Pages {
    /// The file.
    pub file: FileId,
    /// Its pages.
    pub range: IndexRange,
}

/// Directions of [`Action::DirectMap`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DirectMap {
    /// The host can no longer reach the pages.
    Remove,
    /// The host can reach the pages again.
    Restore,
}

/// The kernel's locks that operations take, in the order in which they may be taken. mmu_lock is not among them: what is
/// done under it is one step.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Lock {
    /// `slots_lock` of the VM.
    Slots,
    /// `filemap_invalidate_lock` of a file, exclusive: bindings and pages must not change.
    FileExclusive(FileId),
    /// The same lock, shared.
    FileShared(FileId),
    /// The locks of the folios that hold these pages. Whoever finds or makes a page keeps it until the page is prepared;
    /// whoever frees pages takes it first, so that nothing is prepared after it was given back.
    Folios(Pages),
}

/// Runs an operation to its end, alone.
///
/// `carry_out` performs each action. For callers that hold a lock over the whole [`Vm`], and for tests.
pub fn run<O: Operation>(
    operation: &mut O,
    vm: &mut Vm,
    mut carry_out: impl FnMut(&mut O, &mut Vm, Action),
) -> O::Output {
    loop {
        match operation.step(vm) {
            Step::Do(action) => carry_out(operation, vm, action),
            Step::Done(output) => return output,
        }
    }
}
