//! Secure EPT: entry states and their encodings, entries, and the sparse tree of a TD.

use crate::runs::{Linear, RunMap};
use SeptFlags as F;
use bitflags::bitflags;

/// Bit 63 of an entry: an EPT violation does not become #VE. Always set, and all there is of a free entry.
const SUPPRESS_VE: u64 = 1 << 63;
/// Bit 11: the entry is locked. Visible only to the guest's failed TDG.MEM.PAGE.ACCEPT.
pub(super) const LOCKED: u64 = 1 << 11;
const RWX: u64 = 7;
const WRITE_BACK: u64 = 6 << 3;
const HPA: u64 = 0x000f_ffff_ffff_f000;
/// What the host sees of a leaf: RWX, memory type, IPAT, PS, HPA, suppress #VE.
const VISIBLE_LEAF: u64 = SUPPRESS_VE | HPA | 0xff;
/// What the host sees of a table: RWX and PS, not even where it is.
const VISIBLE_TABLE: u64 = RWX | 1 << 7;

bitflags! {
    /// What the module may do with an entry in some state.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct SeptFlags: u32 {
        /// TDH.EXPORT.MEM may export it while the TD runs.
        const LIVE_EXPORT_ALLOWED = 1 << 0;
        /// TDH.EXPORT.MEM may export it while the TD is paused.
        const PAUSED_EXPORT_ALLOWED = 1 << 1;
        /// It may be exported for the first time.
        const FIRST_TIME_EXPORT_ALLOWED = 1 << 2;
        /// It may be exported again.
        const RE_EXPORT_ALLOWED = 1 << 3;
        /// Its export may be cancelled.
        const EXPORT_CANCEL_ALLOWED = 1 << 4;
        /// It may be imported for the first time.
        const FIRST_TIME_IMPORT_ALLOWED = 1 << 5;
        /// It may be imported again.
        const RE_IMPORT_ALLOWED = 1 << 6;
        /// Its import may be cancelled.
        const IMPORT_CANCEL_ALLOWED = 1 << 7;
        /// MAPPED or PENDING: what TDH.MEM.PAGE.PROMOTE merges.
        const MAPPED_OR_PENDING = 1 << 8;
        /// Any EXPORTED state.
        const ANY_EXPORTED = 1 << 9;
        /// Exported and written since.
        const ANY_EXPORTED_AND_DIRTY = 1 << 10;
        /// Exported and not written since.
        const ANY_EXPORTED_AND_NON_DIRTY = 1 << 11;
        /// The guest has not accepted it.
        const ANY_PENDING = 1 << 12;
        /// TDG.MEM.PAGE.ACCEPT takes it.
        const ANY_PENDING_AND_GUEST_ACCEPTABLE = 1 << 13;
        /// No new translation can be made.
        const ANY_BLOCKED = 1 << 14;
        /// No new writable translation can be made.
        const ANY_BLOCKEDW = 1 << 15;
        /// The guest reads, writes and executes it.
        const GUEST_FULLY_ACCESSIBLE_LEAF = 1 << 16;
        /// Taking it away needs blocking and tracking.
        const TLB_TRACKING_REQUIRED = 1 << 17;
        /// The guest can at least read it.
        const GUEST_ACCESSIBLE_LEAF = 1 << 18;
    }
}

/// State of a Secure EPT entry. The discriminant is the module's index of the state.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum SeptState {
    /// Nothing is mapped.
    Free,
    /// Taken away during an import.
    Removed,
    /// A table.
    NlMapped,
    /// A table that no walk enters.
    NlBlocked,
    /// A page of the guest.
    Mapped,
    /// A page that no walk reaches.
    Blocked,
    /// A page blocked for writing.
    Blockedw,
    /// Exported and blocked for writing.
    ExportedBlockedw,
    /// Exported, written since.
    ExportedDirty,
    /// Exported, written since, blocked for writing.
    ExportedDirtyBlockedw,
    /// A page that the guest has to accept.
    Pending,
    /// A pending page that is blocked.
    PendingBlocked,
    /// A pending page that is blocked for writing.
    PendingBlockedw,
    /// Exported while pending, blocked for writing.
    PendingExportedBlockedw,
    /// Exported while pending; unblocked since.
    PendingExportedDirty,
    /// Exported while pending, dirty, blocked for writing.
    PendingExportedDirtyBlockedw,
}

/// Facts about one [`SeptState`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateFacts {
    /// Name in Intel's documents.
    pub name: &'static str,
    /// The module's seven state bits: D, TDEX, TDBW, TDB, TDP, IPAT, PS, from bit 0.
    pub encoding: u8,
    /// What TDH.MEM.SEPT.RD reports in RDX bits 15:8.
    pub public: u8,
    /// What may be done with it.
    pub flags: SeptFlags,
}

const fn row(name: &'static str, encoding: u8, public: u8, flags: &[SeptFlags]) -> StateFacts {
    let (mut set, mut i) = (SeptFlags::empty(), 0);
    while i < flags.len() {
        set = set.union(flags[i]);
        i += 1;
    }
    StateFacts { name, encoding, public, flags: set }
}

static STATES: [StateFacts; 16] = [
    row("FREE", 0xe, 0x00, &[F::FIRST_TIME_IMPORT_ALLOWED]),
    row("REMOVED", 0xc, 0x05, &[F::FIRST_TIME_IMPORT_ALLOWED]),
    row("NL_MAPPED", 0x0, 0x84, &[F::TLB_TRACKING_REQUIRED]),
    row("NL_BLOCKED", 0x8, 0x81, &[F::ANY_BLOCKED, F::TLB_TRACKING_REQUIRED]),
    row(
        "MAPPED",
        0x60,
        0x04,
        &[
            F::PAUSED_EXPORT_ALLOWED,
            F::FIRST_TIME_EXPORT_ALLOWED,
            F::RE_IMPORT_ALLOWED,
            F::IMPORT_CANCEL_ALLOWED,
            F::MAPPED_OR_PENDING,
            F::GUEST_FULLY_ACCESSIBLE_LEAF,
            F::TLB_TRACKING_REQUIRED,
            F::GUEST_ACCESSIBLE_LEAF,
        ],
    ),
    row("BLOCKED", 0x68, 0x01, &[F::ANY_BLOCKED, F::TLB_TRACKING_REQUIRED]),
    row(
        "BLOCKEDW",
        0x64,
        0x08,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::FIRST_TIME_EXPORT_ALLOWED,
            F::ANY_BLOCKEDW,
            F::TLB_TRACKING_REQUIRED,
            F::GUEST_ACCESSIBLE_LEAF,
        ],
    ),
    row(
        "EXPORTED_BLOCKEDW",
        0x66,
        0x09,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_NON_DIRTY,
            F::ANY_BLOCKEDW,
            F::GUEST_ACCESSIBLE_LEAF,
        ],
    ),
    row(
        "EXPORTED_DIRTY",
        0x63,
        0x0b,
        &[
            F::PAUSED_EXPORT_ALLOWED,
            F::RE_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_DIRTY,
            F::GUEST_FULLY_ACCESSIBLE_LEAF,
            F::TLB_TRACKING_REQUIRED,
            F::GUEST_ACCESSIBLE_LEAF,
        ],
    ),
    row(
        "EXPORTED_DIRTY_BLOCKEDW",
        0x67,
        0x0c,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::RE_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_DIRTY,
            F::ANY_BLOCKEDW,
            F::TLB_TRACKING_REQUIRED,
            F::GUEST_ACCESSIBLE_LEAF,
        ],
    ),
    row(
        "PENDING",
        0x70,
        0x02,
        &[
            F::PAUSED_EXPORT_ALLOWED,
            F::FIRST_TIME_EXPORT_ALLOWED,
            F::RE_IMPORT_ALLOWED,
            F::IMPORT_CANCEL_ALLOWED,
            F::MAPPED_OR_PENDING,
            F::ANY_PENDING,
            F::ANY_PENDING_AND_GUEST_ACCEPTABLE,
            F::TLB_TRACKING_REQUIRED,
        ],
    ),
    row("PENDING_BLOCKED", 0x78, 0x03, &[F::ANY_PENDING, F::ANY_BLOCKED, F::TLB_TRACKING_REQUIRED]),
    row(
        "PENDING_BLOCKEDW",
        0x74,
        0x10,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::FIRST_TIME_EXPORT_ALLOWED,
            F::ANY_PENDING,
            F::ANY_BLOCKEDW,
            F::TLB_TRACKING_REQUIRED,
        ],
    ),
    row(
        "PENDING_EXPORTED_BLOCKEDW",
        0x76,
        0x11,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_NON_DIRTY,
            F::ANY_PENDING,
            F::ANY_BLOCKEDW,
        ],
    ),
    row(
        "PENDING_EXPORTED_DIRTY",
        0x73,
        0x13,
        &[
            F::PAUSED_EXPORT_ALLOWED,
            F::RE_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_DIRTY,
            F::ANY_PENDING,
            F::ANY_PENDING_AND_GUEST_ACCEPTABLE,
            F::TLB_TRACKING_REQUIRED,
        ],
    ),
    row(
        "PENDING_EXPORTED_DIRTY_BLOCKEDW",
        0x77,
        0x14,
        &[
            F::LIVE_EXPORT_ALLOWED,
            F::PAUSED_EXPORT_ALLOWED,
            F::RE_EXPORT_ALLOWED,
            F::EXPORT_CANCEL_ALLOWED,
            F::ANY_EXPORTED,
            F::ANY_EXPORTED_AND_DIRTY,
            F::ANY_PENDING,
            F::ANY_BLOCKEDW,
            F::TLB_TRACKING_REQUIRED,
        ],
    ),
];

impl SeptState {
    /// All states in the order of their index.
    pub const ALL: [Self; 16] = [
        Self::Free,
        Self::Removed,
        Self::NlMapped,
        Self::NlBlocked,
        Self::Mapped,
        Self::Blocked,
        Self::Blockedw,
        Self::ExportedBlockedw,
        Self::ExportedDirty,
        Self::ExportedDirtyBlockedw,
        Self::Pending,
        Self::PendingBlocked,
        Self::PendingBlockedw,
        Self::PendingExportedBlockedw,
        Self::PendingExportedDirty,
        Self::PendingExportedDirtyBlockedw,
    ];

    /// What the module knows about the state.
    #[must_use]
    pub fn facts(self) -> &'static StateFacts {
        &STATES[self as usize]
    }

    /// Whether the state has all of `flags`.
    #[must_use]
    pub fn has(self, flags: SeptFlags) -> bool {
        self.facts().flags.contains(flags)
    }

    /// Whether an entry in this state maps a page: its PS bit, which is part of the encoding.
    #[must_use]
    pub fn is_leaf(self) -> bool {
        self.facts().encoding & 1 << 6 != 0
    }

    /// The hardware's R, W and X bits of an entry in this state.
    #[must_use]
    pub fn permissions(self) -> u64 {
        match self {
            Self::NlMapped | Self::Mapped | Self::ExportedDirty => RWX,
            state if state.has(F::GUEST_ACCESSIBLE_LEAF) => 0b101,
            _ => 0,
        }
    }

    /// The state after TDH.MEM.RANGE.BLOCK, for the states that it takes.
    #[must_use]
    pub const fn blocked(self) -> Option<Self> {
        match self {
            Self::NlMapped => Some(Self::NlBlocked),
            Self::Mapped | Self::Blockedw => Some(Self::Blocked),
            Self::Pending | Self::PendingBlockedw => Some(Self::PendingBlocked),
            _ => None,
        }
    }

    /// The state without the block; a state that is not blocked stays.
    #[must_use]
    pub const fn unblocked(self) -> Self {
        match self {
            Self::NlBlocked => Self::NlMapped,
            Self::Blocked => Self::Mapped,
            Self::PendingBlocked => Self::Pending,
            other => other,
        }
    }

    /// The seven state bits at their places in an entry: D 9, TDEX to TDP 53 to 56, IPAT and PS 6 and 7.
    fn bits(self) -> u64 {
        let encoding = u64::from(self.facts().encoding);
        (encoding & 1) << 9 | (encoding >> 1 & 0xf) << 53 | (encoding >> 5) << 6
    }
}

/// A Secure EPT entry.
///
/// An entry maps or points to a frame that is counted in units of what it maps (tables are 4 KiB pages), so that the
/// entries of a contiguous range are one run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Septe {
    /// State.
    pub state: SeptState,
    /// 4 KiB chunks of a 2 MiB page that an interrupted TDG.MEM.PAGE.ACCEPT has initialised (bits 20:12): 0 to 511.
    pub accepted: u16,
    frame: u64,
}

impl Septe {
    /// An entry that maps nothing.
    pub const FREE: Self = Self { state: SeptState::Free, accepted: 0, frame: 0 };
    /// What TDH.MEM.PAGE.REMOVE leaves behind during an import. Its migration epoch is not modelled.
    pub const REMOVED: Self = Self { state: SeptState::Removed, accepted: 0, frame: 0 };

    /// An entry of `level` that maps the page at `pfn`, which is aligned to `level`.
    #[must_use]
    pub const fn leaf(state: SeptState, pfn: u64, level: u8) -> Self {
        Self { state, accepted: 0, frame: pfn >> shift(level) }
    }

    /// An entry that points to the table in the 4 KiB page `pfn`.
    #[must_use]
    pub const fn table(pfn: u64) -> Self {
        Self { state: SeptState::NlMapped, accepted: 0, frame: pfn }
    }

    /// Frame number of the page or table; the entry is one of `level`.
    #[must_use]
    pub fn pfn(self, level: u8) -> u64 {
        if self.state.is_leaf() { self.frame.wrapping_shl(shift(level)) } else { self.frame }
    }

    /// The same entry in another state.
    #[must_use]
    pub const fn with(self, state: SeptState) -> Self {
        Self { state, ..self }
    }

    /// The same entry with another accept counter.
    #[must_use]
    pub const fn with_accepted(self, accepted: u16) -> Self {
        Self { accepted, ..self }
    }

    /// The same entry, its accept counter cleared if it is pending.
    #[must_use]
    pub fn without_counter(self) -> Self {
        if self.state.has(F::ANY_PENDING_AND_GUEST_ACCEPTABLE) { Self { accepted: 0, ..self } } else { self }
    }

    /// The entry as it is in memory, unlocked.
    #[must_use]
    pub fn raw(self, level: u8) -> u64 {
        let base = self.pfn(level).wrapping_shl(12) & HPA | u64::from(self.accepted) << 12;
        let memory_type = if self.state.is_leaf() { WRITE_BACK } else { 0 };
        SUPPRESS_VE | base | self.state.bits() | memory_type | self.state.permissions()
    }

    /// The entry as the host may see it: RCX of TDH.MEM.SEPT.RD and of refusals.
    #[must_use]
    pub fn visible(self, level: u8) -> u64 {
        match self.state {
            SeptState::Free => SUPPRESS_VE,
            state if state.is_leaf() => self.raw(level) & VISIBLE_LEAF,
            _ => self.raw(level) & VISIBLE_TABLE,
        }
    }

    /// Level and public state: RDX of TDH.MEM.SEPT.RD and of refusals.
    #[must_use]
    pub fn info(self, level: u8) -> u64 {
        u64::from(self.state.facts().public) << 8 | u64::from(level)
    }
}

impl Linear for Septe {
    fn advance(&self, pages: u64) -> Self {
        Self { frame: self.frame.wrapping_add(pages), ..*self }
    }
}

/// Base-2 logarithm of the 4 KiB pages that an entry of `level` covers.
pub(super) const fn shift(level: u8) -> u32 {
    9 * level as u32
}

/// The Secure EPT of a TD: per level the runs of entries that are not free.
#[derive(Clone, PartialEq, Eq, Hash, Default, Debug)]
pub struct Sept {
    levels: [RunMap<Septe>; 5],
    blocked_tables: u64,
}

impl Sept {
    /// The entry of `level` for the guest frame `gfn`, whether or not a walk would reach it.
    #[must_use]
    pub fn entry(&self, level: u8, gfn: u64) -> Septe {
        let entries = self.levels.get(usize::from(level));
        entries.and_then(|entries| entries.get(gfn >> shift(level))).unwrap_or(Septe::FREE)
    }

    /// Walks from the root, whose entries are of level `top`, to `level`.
    ///
    /// Returns where the walk ended: at `level`, or above it where an entry has no permissions or maps a page.
    #[must_use]
    pub fn walk(&self, top: u8, level: u8, gfn: u64) -> (u8, Septe) {
        if self.blocked_tables == 0 { self.walk_up(top, level, gfn) } else { self.walk_down(top, level, gfn) }
    }

    pub(super) fn walk_down(&self, top: u8, level: u8, gfn: u64) -> (u8, Septe) {
        let mut at = top;
        loop {
            let entry = self.entry(at, gfn);
            if at <= level || entry.state.permissions() == 0 || entry.state.is_leaf() {
                return (at, entry);
            }
            at -= 1;
        }
    }

    /// The same from below. An entry that is not free lies in a table that exists, and while no table is blocked a walk
    /// reaches it: most walks need one look.
    fn walk_up(&self, top: u8, level: u8, gfn: u64) -> (u8, Septe) {
        for at in level..top {
            let entry = self.entry(at, gfn);
            match entry.state {
                SeptState::Free => {}
                SeptState::NlMapped if at > level => return (at - 1, Septe::FREE),
                _ => return (at, entry),
            }
        }
        match self.entry(top, gfn) {
            entry if top > level && entry.state == SeptState::NlMapped => (top - 1, Septe::FREE),
            entry => (top, entry),
        }
    }

    /// The entries, not free ones, of the table that the entry of `level` for `gfn` points to: `(index, count, first)`.
    pub(super) fn children(&self, level: u8, gfn: u64) -> impl Iterator<Item = (u64, u64, Septe)> {
        let start = gfn >> shift(level) << 9;
        let entries = level.checked_sub(1).and_then(|below| self.levels.get(usize::from(below)));
        entries.into_iter().flat_map(move |entries| entries.runs(start, 512)).map(move |(at, n, e)| (at - start, n, e))
    }

    /// Replaces the entry of `level` for `gfn`, which is in state `old`.
    pub(super) fn set(&mut self, level: u8, gfn: u64, old: SeptState, entry: Septe) {
        let blocked = |state| u64::from(state == SeptState::NlBlocked);
        self.blocked_tables = self.blocked_tables.wrapping_add(blocked(entry.state)).wrapping_sub(blocked(old));
        self.set_run(level, gfn >> shift(level), 1, entry);
    }

    /// Replaces the entries of the table under the entry of `level` for `gfn`: 512 that continue `first`, or free ones.
    pub(super) fn set_children(&mut self, level: u8, gfn: u64, first: Septe) {
        if let Some(below) = level.checked_sub(1) {
            self.set_run(below, gfn >> shift(level) << 9, 512, first);
        }
    }

    fn set_run(&mut self, level: u8, index: u64, count: u64, entry: Septe) {
        let Some(entries) = self.levels.get_mut(usize::from(level)) else { return };
        if entry.state == SeptState::Free {
            entries.remove(index, count);
        } else {
            entries.insert(index, count, entry);
        }
    }

    /// Runs of entries of `level` that are not free: `(index, count, first entry)`.
    pub fn runs(&self, level: u8) -> impl Iterator<Item = (u64, u64, Septe)> {
        let entries = self.levels.get(usize::from(level));
        entries.into_iter().flat_map(RunMap::iter).map(|(at, n, entry)| (at, n, *entry))
    }
}
