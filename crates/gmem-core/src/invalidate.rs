//! The protocol by which a fault learns that what it looked up is no longer true.
//!
//! Every change that takes mappings away goes through `begin`, `add`, `end`. A fault takes a [`Snapshot`] before it looks
//! at anything (attribute, slot, file, page) and asks [`Invalidation::is_stale`] at the moment it would map. The answer
//! is yes if a change of the page's range is under way or if any change has ended since. Both halves are needed: `end`
//! bumps the sequence, and the range covers the time until then (Linux `mmu_invalidate_retry_gfn()`).

use crate::addr::{Gfn, GfnRange};
use crate::vendor::Side;

/// Which mappings a change is about.
///
/// An invalidation names exactly what goes away. A change of the VMM's own mapping says nothing of private memory, and a
/// hole in a private file says nothing of shared memory; for TDX and CCA a mapping that is zapped without need costs the
/// guest its memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Filter {
    /// Mappings of this side only.
    Only(Side),
    /// Mappings of both sides.
    Both,
}

impl Filter {
    /// Whether mappings of `side` are meant.
    #[must_use]
    pub fn includes(self, side: Side) -> bool {
        match self {
            Self::Only(only) => only == side,
            Self::Both => true,
        }
    }
}

/// The value of the sequence when a fault began.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Snapshot(u64);

/// Evidence that an invalidation has begun; [`Invalidation::end`] takes it back.
///
/// It has no public constructor and is consumed by `end`, so an operation can neither end what it did not begin nor end
/// twice. An operation that loses it leaves [`Invalidation::is_idle`] false, which [`Vm::audit`](crate::Vm::audit) reports.
/// It is cloned only together with the [`Vm`](crate::Vm) it belongs to, by whoever explores several futures of both.
#[must_use = "an invalidation that begins must end"]
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Begun(());

/// Sequence, number of changes under way, and the range that they cover.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Invalidation {
    sequence: u64,
    in_progress: u32,
    range: Option<GfnRange>,
}

impl Invalidation {
    /// Starts a change. Until ranges are added it covers nothing.
    pub fn begin(&mut self) -> Begun {
        if self.in_progress == 0 {
            self.range = None;
        }
        self.in_progress += 1;
        Begun(())
    }

    /// Adds pages to the change. The range only grows while any change is under way, so a fault elsewhere may retry
    /// without need, but none is missed.
    pub fn add(&mut self, _begun: &Begun, range: GfnRange) {
        self.range = Some(self.range.map_or(range, |all| all.hull(range)));
    }

    /// Ends a change: faults that began before now are stale.
    #[expect(clippy::needless_pass_by_value, reason = "taking the token back is the point")]
    pub fn end(&mut self, begun: Begun) {
        let Begun(()) = begun;
        self.sequence = self.sequence.wrapping_add(1);
        self.in_progress = self.in_progress.saturating_sub(1);
    }

    /// What a fault remembers before it looks at anything.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.sequence)
    }

    /// Whether a fault on `gfn` that began at `snapshot` has to start again.
    #[must_use]
    pub fn is_stale(&self, snapshot: Snapshot, gfn: Gfn) -> bool {
        let covered = self.in_progress > 0 && self.range.is_some_and(|range| range.contains(gfn));
        covered || self.sequence != snapshot.0
    }

    /// The pages that changes under way cover, if any is under way.
    #[must_use]
    pub fn covered(&self) -> Option<GfnRange> {
        self.range.filter(|_| self.in_progress > 0)
    }

    /// How many changes are under way.
    #[must_use]
    pub fn in_progress(&self) -> u32 {
        self.in_progress
    }

    /// Whether no change is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.in_progress == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PageRange;

    fn pages(start: u64, end: u64) -> GfnRange {
        PageRange::new(Gfn(start), Gfn(end)).unwrap()
    }

    #[test]
    fn a_fault_is_stale_during_and_after_a_change_of_its_page() {
        let mut inv = Invalidation::default();
        let before = inv.snapshot();
        assert!(!inv.is_stale(before, Gfn(5)));
        let begun = inv.begin();
        inv.add(&begun, pages(5, 6));
        assert!(inv.is_stale(before, Gfn(5)));
        assert!(!inv.is_stale(before, Gfn(6)), "another page is not covered while the change runs");
        let during = inv.snapshot();
        inv.end(begun);
        assert!(inv.is_stale(before, Gfn(6)), "any change that ended makes an older fault stale");
        assert!(inv.is_stale(during, Gfn(5)), "a fault that began in the middle is stale too");
        assert!(!inv.is_stale(inv.snapshot(), Gfn(5)));
    }

    #[test]
    fn ranges_only_grow_until_all_changes_have_ended() {
        let mut inv = Invalidation::default();
        let first = inv.begin();
        inv.add(&first, pages(0, 1));
        let second = inv.begin();
        inv.add(&second, pages(8, 9));
        inv.end(first);
        let now = inv.snapshot();
        assert!(inv.is_stale(now, Gfn(0)), "the union stays while the second change runs");
        inv.end(second);
        let third = inv.begin();
        assert!(!inv.is_stale(inv.snapshot(), Gfn(0)), "a new change starts from nothing");
        inv.end(third);
        assert!(inv.is_idle());
    }
}
