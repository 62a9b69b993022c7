//! Realm Translation Tables.
//!
//! Entries are kept per level and keyed by entry number (IPA divided by what an entry of the level maps), so that runs
//! of equal or contiguous entries are one value however many tables they cross. A table of level L exists exactly where
//! level L has entries, which is where the parent entry is [`Entry::Table`]; reference counts are what the entries say.

use super::rmi::{GRANULE_SIZE, Hipas, PAGE_LEVEL, Ripas};
use crate::runs::{Linear, RunMap};

/// Entries of a table.
const ENTRIES: u64 = 512;
/// Attributes of an unprotected mapping that the host chooses: MemAttr in bits 4:2, S2AP in bits 7:6.
pub const NS_ATTR_MASK: u64 = 0xdc;

/// An RTT entry. Frames are counted in what one entry of the level maps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Entry {
    /// Protected, no memory.
    Unassigned(Ripas),
    /// Protected, memory of the realm; `frame` is its address divided by the size of the entry.
    Assigned {
        /// What the realm expects.
        ripas: Ripas,
        /// Physical frame.
        frame: u64,
    },
    /// Unprotected, no memory.
    UnassignedNs,
    /// Unprotected, memory of the host.
    AssignedNs {
        /// Physical frame.
        frame: u64,
        /// MemAttr and S2AP, the bits of [`NS_ATTR_MASK`].
        attr: u8,
    },
    /// A table of the next level, at this granule number.
    Table(u64),
}

impl Linear for Entry {
    fn advance(&self, entries: u64) -> Self {
        match *self {
            Self::Unassigned(_) | Self::UnassignedNs => *self,
            Self::Assigned { ripas, frame } => Self::Assigned { ripas, frame: frame.wrapping_add(entries) },
            Self::AssignedNs { frame, attr } => Self::AssignedNs { frame: frame.wrapping_add(entries), attr },
            Self::Table(granule) => Self::Table(granule.wrapping_add(entries)),
        }
    }
}

impl Entry {
    /// Host IPA state.
    #[must_use]
    pub const fn hipas(&self) -> Hipas {
        match self {
            Self::Unassigned(_) | Self::UnassignedNs => Hipas::Unassigned,
            Self::Assigned { .. } | Self::AssignedNs { .. } => Hipas::Assigned,
            Self::Table(_) => Hipas::Table,
        }
    }

    /// Realm IPA state, if the entry is a protected leaf.
    #[must_use]
    pub const fn ripas(&self) -> Option<Ripas> {
        match *self {
            Self::Unassigned(ripas) | Self::Assigned { ripas, .. } => Some(ripas),
            Self::UnassignedNs | Self::AssignedNs { .. } | Self::Table(_) => None,
        }
    }

    /// Whether the entry refers to memory, so that a scan for the end of a non-live region stops at it.
    #[must_use]
    pub const fn is_live(&self) -> bool {
        !matches!(self, Self::Unassigned(_) | Self::UnassignedNs)
    }

    /// Whether the entry counts in the reference count of its table. Unprotected mappings do not: the host may drop a
    /// table that holds them.
    #[must_use]
    pub const fn is_counted(&self) -> bool {
        matches!(self, Self::Assigned { .. } | Self::Table(_))
    }

    /// The entry with another RIPAS, or `None` where that may not be changed.
    pub(super) fn with_ripas(self, to: Ripas, change: ChangeDestroyed) -> Option<Self> {
        if self.ripas()? == Ripas::Destroyed && change == ChangeDestroyed::No {
            return None;
        }
        match self {
            Self::Unassigned(_) => Some(Self::Unassigned(to)),
            Self::Assigned { frame, .. } => Some(Self::Assigned { ripas: to, frame }),
            Self::UnassignedNs | Self::AssignedNs { .. } | Self::Table(_) => None,
        }
    }

    /// The first entry of a table that takes the place of this leaf. `None` for a table.
    fn unfolded(self) -> Option<Self> {
        match self {
            Self::Unassigned(_) | Self::UnassignedNs => Some(self),
            Self::Assigned { ripas, frame } => Some(Self::Assigned { ripas, frame: frame.wrapping_mul(ENTRIES) }),
            Self::AssignedNs { frame, attr } => Some(Self::AssignedNs { frame: frame.wrapping_mul(ENTRIES), attr }),
            Self::Table(_) => None,
        }
    }

    /// The leaf that takes the place of a table whose first entry is this and whose others continue it.
    fn folded(self) -> Option<Self> {
        let aligned = |frame: u64| frame.is_multiple_of(ENTRIES).then_some(frame / ENTRIES);
        match self {
            Self::Unassigned(_) | Self::UnassignedNs => Some(self),
            Self::Assigned { ripas, frame } => Some(Self::Assigned { ripas, frame: aligned(frame)? }),
            Self::AssignedNs { frame, attr } => Some(Self::AssignedNs { frame: aligned(frame)?, attr }),
            Self::Table(_) => None,
        }
    }
}

/// `RsiRipasChangeDestroyed`: whether the realm agrees to lose what was in destroyed memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ChangeDestroyed {
    /// 0: destroyed memory stays destroyed.
    #[default]
    No,
    /// 1: destroyed memory may become RAM or EMPTY.
    Yes,
}

/// Where a table walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Walk {
    /// Level of the entry.
    pub level: u8,
    /// Number of the entry at its level.
    pub index: u64,
    /// The entry.
    pub entry: Entry,
}

impl Walk {
    /// Number of the first entry after the table that holds this one.
    fn table_end(&self) -> u64 {
        (self.index | (ENTRIES - 1)) + 1
    }

    /// The first address that the entry maps.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.index << shift(self.level)
    }
}

/// Base-2 logarithm of what an entry of `level` maps.
#[must_use]
pub(super) const fn shift(level: u8) -> u32 {
    12 + 9 * (PAGE_LEVEL.saturating_sub(level)) as u32
}

/// Whether `address` is a multiple of what an entry of `level` maps.
pub(super) const fn is_aligned(address: u64, level: u8) -> bool {
    address & ((1 << shift(level)) - 1) == 0
}

/// All tables of a realm.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rtt {
    ipa_bits: u8,
    start: u8,
    levels: [RunMap<Entry>; 4],
}

impl Rtt {
    /// Root tables of a space of `ipa_bits` bits: the lower half protected and EMPTY, the upper half unprotected.
    pub(super) fn new(ipa_bits: u8, start: u8) -> Self {
        let mut rtt = Self { ipa_bits, start, levels: Default::default() };
        let half = 1 << u32::from(ipa_bits.saturating_sub(1)).saturating_sub(shift(start));
        rtt.level_mut(start).insert(0, half, Entry::Unassigned(Ripas::Empty));
        rtt.level_mut(start).insert(half, half, Entry::UnassignedNs);
        rtt
    }

    /// Bytes of the IPA space.
    #[must_use]
    pub fn ipa_size(&self) -> u64 {
        1 << self.ipa_bits
    }

    /// Bytes of the protected half, which starts at 0.
    #[must_use]
    pub fn par_size(&self) -> u64 {
        1 << self.ipa_bits.saturating_sub(1)
    }

    /// Level of the root tables.
    #[must_use]
    pub fn start_level(&self) -> u8 {
        self.start
    }

    /// Whether `ipa` is protected.
    #[must_use]
    pub fn in_par(&self, ipa: u64) -> bool {
        ipa < self.par_size()
    }

    /// Runs of entries of `level`: `(first entry number, entries, first entry)`.
    pub fn entries(&self, level: u8) -> impl Iterator<Item = (u64, u64, &Entry)> {
        self.level(level).iter()
    }

    fn level(&self, level: u8) -> &RunMap<Entry> {
        &self.levels[usize::from(level & 3)]
    }

    fn level_mut(&mut self, level: u8) -> &mut RunMap<Entry> {
        &mut self.levels[usize::from(level & 3)]
    }

    /// Walks towards `target` until a leaf. `ipa` must lie in the IPA space.
    #[must_use]
    pub fn walk(&self, ipa: u64, target: u8) -> Walk {
        // Entries of a level exist only below a table entry, so the deepest level that has one is where a walk from
        // the root would end.
        let found = (self.start..=target).rev().find_map(|level| {
            let index = ipa >> shift(level);
            self.level(level).get(index).map(|entry| Walk { level, index, entry })
        });
        let root = Walk { level: self.start, index: ipa >> shift(self.start), entry: Entry::Unassigned(Ripas::Empty) };
        found.unwrap_or(root)
    }

    /// Replaces the entry that a walk found.
    pub(super) fn set(&mut self, walk: &Walk, entry: Entry) {
        self.level_mut(walk.level).insert(walk.index, 1, entry);
    }

    /// End of the region without live entries that starts at `ipa`, as far as the table of `walk` shows: `ipa` itself
    /// if its entry is live.
    #[must_use]
    pub(super) fn skip_non_live(&self, ipa: u64, walk: &Walk) -> u64 {
        if walk.entry.is_live() {
            return ipa;
        }
        let end = walk.table_end();
        let live = self.level(walk.level).runs(walk.index, end - walk.index).find(|(_, _, entry)| entry.is_live());
        live.map_or(end, |(index, _, _)| index) << shift(walk.level)
    }

    /// The run of equal or continuing entries that starts at entry `index`, cut at `end`.
    pub(super) fn run(&self, level: u8, index: u64, end: u64) -> Option<(u64, Entry)> {
        let (at, len, entry) = self.level(level).runs(index, end.saturating_sub(index)).next()?;
        (at == index).then_some((len, entry))
    }

    /// First entry number that a range operation from `walk` to address `top` may not touch.
    pub(super) fn range_end(walk: &Walk, top: u64) -> u64 {
        walk.table_end().min(top >> shift(walk.level))
    }

    /// Gives `len` entries from `index` the value `entry` and its continuation.
    pub(super) fn fill(&mut self, level: u8, index: u64, len: u64, entry: Entry) {
        self.level_mut(level).insert(index, len, entry);
    }

    /// Reference count of the table of `level` whose first entry is number `first`.
    #[must_use]
    pub(super) fn refcount(&self, level: u8, first: u64) -> u64 {
        self.level(level).runs(first, ENTRIES).filter(|(_, _, entry)| entry.is_counted()).map(|(_, len, _)| len).sum()
    }

    /// Whether any entry of the table is counted; stops at the first.
    pub(super) fn is_referenced(&self, level: u8, first: u64) -> bool {
        self.level(level).runs(first, ENTRIES).any(|(_, _, entry)| entry.is_counted())
    }

    /// Whether any root entry is counted.
    pub(super) fn root_is_referenced(&self) -> bool {
        self.level(self.start).iter().any(|(_, _, entry)| entry.is_counted())
    }

    /// Number of the first entry of the table that replaces or hangs below the entry of `parent`.
    pub(super) fn child_first(parent: &Walk) -> u64 {
        parent.index << 9
    }

    /// Puts a table at granule number `granule` in the place of the leaf `parent`. `false` if that is a table.
    pub(super) fn unfold(&mut self, parent: &Walk, granule: u64) -> bool {
        let Some(first) = parent.entry.unfolded() else { return false };
        self.fill(parent.level + 1, Self::child_first(parent), ENTRIES, first);
        self.set(parent, Entry::Table(granule));
        true
    }

    /// The leaf that could replace the table below `parent`, if its entries are homogeneous.
    pub(super) fn foldable(&self, parent: &Walk) -> Option<Entry> {
        let first = Self::child_first(parent);
        let (len, entry) = self.run(parent.level + 1, first, first + ENTRIES)?;
        if len == ENTRIES { entry.folded() } else { None }
    }

    /// Removes the table below `parent` and puts `leaf` in its place.
    pub(super) fn drop_table(&mut self, parent: &Walk, leaf: Entry) {
        self.level_mut(parent.level + 1).remove(Self::child_first(parent), ENTRIES);
        self.set(parent, leaf);
    }

    /// The level and the first entry number of the table at granule number `granule`, other than a root table.
    pub(super) fn find_table(&self, granule: u64) -> Option<(u8, u64)> {
        (self.start..PAGE_LEVEL).find_map(|level| {
            self.level(level).iter().find_map(|(index, len, entry)| match *entry {
                Entry::Table(first) if (first..first + len).contains(&granule) => {
                    Some((level + 1, (index + (granule - first)) << 9))
                }
                _ => None,
            })
        })
    }

    /// Physical address that a leaf of `level` maps, or that of the table.
    #[must_use]
    pub fn address(entry: &Entry, level: u8) -> Option<u64> {
        match *entry {
            Entry::Unassigned(_) | Entry::UnassignedNs => None,
            Entry::Assigned { frame, .. } | Entry::AssignedNs { frame, .. } => Some(frame << shift(level)),
            Entry::Table(granule) => Some(granule * GRANULE_SIZE),
        }
    }
}
