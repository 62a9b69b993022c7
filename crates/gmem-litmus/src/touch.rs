//! What a transition reaches into: the basis of the reduction.
//!
//! Two transitions of different threads that do not write what the other reads or writes have the same effect in either
//! order, and neither enables or disables the other. What a step of the core reaches into it says itself
//! ([`Operation::reach`](gmem_core::ops::Operation::reach)); what an action reaches into is said here. Everything not
//! considered counts as reaching into everything.

use bitflags::bitflags;
use gmem_core::ops::{Action, Lock, Parts, Reach};

use crate::program::{Op, ThreadKind};

bitflags! {
    /// Parts of a state, threads excepted. The lower eight bits are those of [`Parts`].
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub(crate) struct Objects: u32 {
        const SLOTS = 1 << 0;
        const ATTRIBUTES = 1 << 1;
        const INVALIDATION = 1 << 2;
        const FILES = 1 << 3;
        const ARCH = 1 << 4;
        const SLOTS_LOCK = 1 << 8;
        const FILE_LOCKS = 1 << 9;
        const STAGE2 = 1 << 10;
        const CACHED = 1 << 11;
        const BYTES = 1 << 12;
        const DIRECT_MAP = 1 << 13;
        const USER = 1 << 14;
        const VMM_TABLE = 1 << 15;
        const READERS = 1 << 16;
        const MEMFDS = 1 << 17;
        const LIFE = 1 << 18;
        /// What happened is only ever added to and never looked at, so no two records conflict: they only read this.
        const EVENTS = 1 << 19;
        const FOLIO_LOCKS = 1 << 20;
    }
}

/// What is read and what is written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Touch {
    pub(crate) reads: Objects,
    pub(crate) writes: Objects,
}

impl Touch {
    pub(crate) const ALL: Self = Self { reads: Objects::all(), writes: Objects::all() };
    /// The guest looks for a translation and may cache one. Whether the VM lives is looked at too.
    pub(crate) const WALK: Self = Self {
        reads: Objects::ATTRIBUTES
            .union(Objects::SLOTS)
            .union(Objects::FILES)
            .union(Objects::STAGE2)
            .union(Objects::ARCH)
            .union(Objects::LIFE),
        writes: Objects::CACHED,
    };
    /// The guest touches memory.
    pub(crate) const MEMORY: Self = Self { reads: Objects::empty(), writes: Objects::BYTES.union(Objects::ARCH) };
    /// Who is private is looked at.
    pub(crate) const TRUTH: Self =
        Self { reads: Objects::ATTRIBUTES.union(Objects::SLOTS).union(Objects::FILES), writes: Objects::empty() };

    /// Something is recorded.
    pub(crate) const EVENT: Self = Self { reads: Objects::EVENTS, writes: Objects::empty() };
    /// Whether a fault reads the slots.
    pub(crate) const READERS: Self = Self { reads: Objects::empty(), writes: Objects::READERS };

    /// Whether the VM's descriptor is open is looked at.
    pub(crate) const LIFE: Self = Self::reads(Objects::LIFE);
    /// The files are looked at.
    pub(crate) const FILES: Self = Self::reads(Objects::FILES);

    const fn reads(reads: Objects) -> Self {
        Self { reads, writes: Objects::empty() }
    }

    const fn writes(writes: Objects) -> Self {
        Self { reads: Objects::empty(), writes }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.reads |= other.reads;
        self.writes |= other.writes;
    }

    fn with(mut self, other: Self) -> Self {
        self.add(other);
        self
    }

    /// Whether the order of two transitions, or of sets of them, can matter.
    pub(crate) fn conflicts(self, other: Self) -> bool {
        let theirs = other.reads | other.writes;
        self.writes.intersects(theirs) || other.writes.intersects(self.reads | self.writes)
    }

    /// Leaves parts out that no step of this exploration changes.
    pub(crate) fn without(self, constant: Objects) -> Self {
        Self { reads: self.reads - constant, writes: self.writes - constant }
    }

    /// Whether more than the core is reached into.
    pub(crate) fn reaches_machine(self) -> bool {
        const CORE: Objects = Objects::from_bits_retain(0xff);
        !(self.reads | self.writes).difference(CORE).is_empty()
    }

    pub(crate) fn of_reach(reach: Reach) -> Self {
        let objects = |parts: Parts| Objects::from_bits_retain(u32::from(parts.bits()));
        Self { reads: objects(reach.reads), writes: objects(reach.writes) }
    }

    pub(crate) fn of_action(action: &Action) -> Self {
        match action {
            Action::Continue | Action::Refill(_) => Self::default(),
            Action::Lock(lock) | Action::Unlock(lock) => Self::writes(of_lock(*lock)),
            Action::Zap { .. } => Self::writes(Objects::STAGE2 | Objects::ARCH | Objects::BYTES),
            Action::Flush => Self::writes(Objects::CACHED),
            Action::Synchronize => Self::writes(Objects::READERS),
            Action::Zero(_) => Self::writes(Objects::BYTES | Objects::DIRECT_MAP | Objects::ARCH),
            Action::CopyIn(_) => Self::writes(Objects::BYTES).with(Self::reads(Objects::SLOTS | Objects::FILES)),
            Action::Free(_) => Self::writes(Objects::BYTES | Objects::STAGE2 | Objects::CACHED | Objects::VMM_TABLE),
            Action::DirectMap(..) | Action::FlushDirectMap | Action::UseDirectMap(_) => {
                Self::writes(Objects::DIRECT_MAP)
            }
            Action::DropUserMappings(_) | Action::MapUser(_) => Self::writes(Objects::VMM_TABLE),
            Action::GetUserPage { .. } => {
                Self::writes(Objects::USER | Objects::BYTES).with(Self::reads(Objects::SLOTS))
            }
            Action::ChangeUserMapping => {
                Self::writes(Objects::USER | Objects::BYTES | Objects::STAGE2 | Objects::CACHED)
            }
            Action::Map(_) => Self::writes(Objects::STAGE2),
        }
    }

    /// What an operation of a program may reach into from its first step to its last.
    pub(crate) fn of_op(op: &Op, kind: ThreadKind, in_place: bool) -> Self {
        let everything_of_vm = Touch::reads(Objects::from_bits_retain(0x1f));
        let change = everything_of_vm.with(Self::writes(
            Objects::INVALIDATION | Objects::STAGE2 | Objects::ARCH | Objects::BYTES | Objects::CACHED,
        ));
        let fault = everything_of_vm.with(Self::WALK).with(Self::MEMORY).with(Self::writes(
            Objects::FILES
                | Objects::STAGE2
                | Objects::DIRECT_MAP
                | Objects::USER
                | Objects::READERS
                | Objects::FOLIO_LOCKS
                | if in_place { Objects::FILE_LOCKS } else { Objects::empty() },
        ));
        let convert = if in_place {
            change.with(Self::writes(Objects::FILES | Objects::FILE_LOCKS | Objects::VMM_TABLE))
        } else {
            change.with(Self::writes(Objects::ATTRIBUTES | Objects::SLOTS_LOCK))
        };
        match op {
            Op::Access { .. } | Op::Accept { .. } => match kind {
                ThreadKind::Vcpu { converts: true, .. } => fault.with(convert),
                _ => fault,
            },
            Op::Prefault { .. } => fault,
            Op::Request { .. } => convert,
            Op::Share { .. } => fault.with(convert),
            Op::SetAttributes { .. } => {
                change.with(Self::writes(Objects::ATTRIBUTES | Objects::SLOTS_LOCK)).with(Self::reads(Objects::LIFE))
            }
            Op::Punch { .. } | Op::Poison { .. } => change
                .with(Self::writes(Objects::FILES | Objects::FILE_LOCKS | Objects::DIRECT_MAP | Objects::VMM_TABLE)),
            Op::ChangeUser { .. } => change.with(Self::writes(Objects::USER)),
            _ => Self::ALL,
        }
    }
}

fn of_lock(lock: Lock) -> Objects {
    match lock {
        Lock::Slots => Objects::SLOTS_LOCK,
        Lock::FileExclusive(_) | Lock::FileShared(_) => Objects::FILE_LOCKS,
        Lock::Folios(_) => Objects::FOLIO_LOCKS,
    }
}
