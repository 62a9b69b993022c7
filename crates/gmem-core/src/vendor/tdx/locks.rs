//! Locks of Secure EPT entries: bits 11 (locked) and 52 (host priority) of each.
//!
//! A SEAMCALL is one step of this model, so only TDG.MEM.PAGE.ACCEPT, whose two halves a caller can take apart
//! ([`Tdx::page_accept_begin`](super::Tdx::page_accept_begin)), is ever met holding one. The host that is refused leaves its
//! mark on the entry, and from then on the guest is refused until the host has had the lock: a guest that accepts over and over
//! cannot keep the host out (`sept_lock_acquire_host`, `sept_lock_acquire_guest` in TDX module 1.5.05).

use super::sept::shift;
use alloc::collections::BTreeSet;

/// Level and index of an entry.
type Key = (u8, u64);

/// The entries that are not simply unlocked.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub(super) struct EntryLocks {
    /// Locked by a TDCALL in progress.
    pub(super) guest: BTreeSet<Key>,
    /// Refused to a SEAMCALL, and to none since.
    host_priority: BTreeSet<Key>,
}

fn key(level: u8, gfn: u64) -> Key {
    (level, gfn >> shift(level))
}

impl EntryLocks {
    /// A SEAMCALL wants the entry, and has it until it ends. False if the guest has it.
    pub(super) fn take_by_host(&mut self, level: u8, gfn: u64) -> bool {
        let key = key(level, gfn);
        let free = !self.guest.contains(&key);
        if free {
            self.host_priority.remove(&key);
        } else {
            self.host_priority.insert(key);
        }
        free
    }

    /// The same for the 512 entries of the table that the entry points to; stops at the first that the guest has.
    pub(super) fn take_children_by_host(&mut self, level: u8, gfn: u64) -> bool {
        let Some(below) = level.checked_sub(1) else { return true };
        let first = key(level, gfn).1 << 9;
        let held = self.guest.range((below, first)..(below, first + 512)).next().copied();
        let end = held.map_or(first + 512, |(_, held)| held);
        self.host_priority.retain(|(at, index)| *at != below || !(first..end).contains(index));
        self.host_priority.extend(held);
        held.is_none()
    }

    /// Whether a TDCALL may have the entry: no other has it, and the host is not to have it first.
    pub(super) fn free_for_guest(&self, level: u8, gfn: u64) -> bool {
        let key = key(level, gfn);
        !self.host_priority.contains(&key) && !self.guest.contains(&key)
    }

    /// A TDCALL takes the entry, which is free, and keeps it until [`EntryLocks::release`].
    pub(super) fn take_by_guest(&mut self, level: u8, gfn: u64) {
        self.guest.insert(key(level, gfn));
    }

    /// Whether a TDCALL has the entry.
    pub(super) fn held_by_guest(&self, level: u8, gfn: u64) -> bool {
        self.guest.contains(&key(level, gfn))
    }

    /// The TDCALL that has the entry ends. False if there is none.
    pub(super) fn release(&mut self, level: u8, gfn: u64) -> bool {
        self.guest.remove(&key(level, gfn))
    }

    /// An entry that a TDCALL has: level and first guest frame.
    pub(super) fn held(&self) -> Option<(u8, u64)> {
        self.guest.first().map(|(level, index)| (*level, index << shift(*level)))
    }
}
