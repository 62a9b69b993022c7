//! Which leaf is allowed from which Secure EPT entry state and in which operation state of the TD.
//!
//! Both tables are the module's own (1.5.05; identical in 2.0 for these leaves). A command consults its row first and
//! refines it afterwards: TDH.MEM.SEPT.ADD, for one, lists NL_MAPPED and still refuses it unless no L1 page is given.

use super::sept::SeptState as S;
use OpState as O;

/// What a TD as a whole may do: TDCS.OP_STATE.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum OpState {
    /// Before TDH.MNG.INIT.
    Uninitialized,
    /// Being built and measured.
    Initialized,
    /// Finalized; vCPUs may run.
    Runnable,
    /// Exporting while running.
    LiveExport,
    /// Exporting while stopped.
    PausedExport,
    /// Exported.
    PostExport,
    /// Importing memory, in order.
    MemoryImport,
    /// Importing state.
    StateImport,
    /// Importing memory, out of order.
    PostImport,
    /// Importing while running.
    LiveImport,
    /// Import failed.
    FailedImport,
}

impl OpState {
    /// All states; the index is the module's number of the state.
    pub const ALL: [(&'static str, Self); 11] = [
        ("UNINITIALIZED", O::Uninitialized),
        ("INITIALIZED", O::Initialized),
        ("RUNNABLE", O::Runnable),
        ("LIVE_EXPORT", O::LiveExport),
        ("PAUSED_EXPORT", O::PausedExport),
        ("POST_EXPORT", O::PostExport),
        ("MEMORY_IMPORT", O::MemoryImport),
        ("STATE_IMPORT", O::StateImport),
        ("POST_IMPORT", O::PostImport),
        ("LIVE_IMPORT", O::LiveImport),
        ("FAILED_IMPORT", O::FailedImport),
    ];

    /// Whether vCPUs may be running, so that a page must be blocked and tracked before it is taken away.
    #[must_use]
    pub const fn requires_tracking(self) -> bool {
        matches!(self, O::Runnable | O::LiveExport | O::LiveImport)
    }

    /// Whether TDH.MEM.PAGE.REMOVE leaves REMOVED behind instead of FREE.
    #[must_use]
    pub const fn import_in_progress(self) -> bool {
        matches!(self, O::MemoryImport | O::StateImport | O::PostImport | O::LiveImport)
    }
}

/// One row of the module's tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leaf {
    /// The leaf's name, in dotted form.
    pub name: &'static str,
    from: Option<u16>,
    during: Option<u16>,
}

impl Leaf {
    /// Whether the leaf may act on an entry in `state`; `None` where the table has no row for the leaf.
    #[must_use]
    pub const fn allowed_from(&self, state: S) -> Option<bool> {
        match self.from {
            Some(states) => Some(states >> state as u8 & 1 != 0),
            None => None,
        }
    }

    /// Whether the leaf may run in `state`; `None` where the table has no row for the leaf.
    #[must_use]
    pub const fn allowed_during(&self, state: OpState) -> Option<bool> {
        match self.during {
            Some(states) => Some(states >> state as u8 & 1 != 0),
            None => None,
        }
    }
}

const fn leaf(name: &'static str, from: Option<u16>, during: Option<u16>) -> Leaf {
    Leaf { name, from, during }
}

const fn from(states: &[S]) -> Option<u16> {
    let (mut set, mut i) = (0, 0);
    while i < states.len() {
        set |= 1 << states[i] as u8;
        i += 1;
    }
    Some(set)
}

const fn during(states: &[OpState]) -> Option<u16> {
    let (mut set, mut i) = (0, 0);
    while i < states.len() {
        set |= 1 << states[i] as u8;
        i += 1;
    }
    Some(set)
}

/// The leaf does not work on one Secure EPT entry.
const NO_ENTRY: Option<u16> = None;
/// The leaf is not checked against the operation state.
const NO_CHECK: Option<u16> = None;
const ALL_STATES: Option<u16> = Some(u16::MAX);
/// Leaves that change mappings.
const CHANGING: Option<u16> =
    during(&[O::Initialized, O::Runnable, O::LiveExport, O::PausedExport, O::PostExport, O::PostImport, O::LiveImport]);
/// Every state after TDH.MNG.INIT.
const BUILT: Option<u16> = Some(u16::MAX >> 5 & !1);
/// Leaves that write the TD's metadata or memory.
const WRITABLE: Option<u16> = during(&[
    O::Initialized,
    O::Runnable,
    O::LiveExport,
    O::MemoryImport,
    O::StateImport,
    O::PostImport,
    O::LiveImport,
    O::FailedImport,
]);

/// TDH.MEM.PAGE.ADD.
pub(super) const PAGE_ADD: Leaf = leaf("TDH.MEM.PAGE.ADD", from(&[S::Free]), during(&[O::Initialized]));
/// TDH.MEM.SEPT.ADD.
pub(super) const SEPT_ADD: Leaf = leaf(
    "TDH.MEM.SEPT.ADD",
    from(&[S::Free, S::NlMapped]),
    during(&[
        O::Initialized,
        O::Runnable,
        O::LiveExport,
        O::MemoryImport,
        O::StateImport,
        O::PostImport,
        O::LiveImport,
    ]),
);
/// TDH.MEM.PAGE.RELOCATE.
pub(super) const PAGE_RELOCATE: Leaf = leaf(
    "TDH.MEM.PAGE.RELOCATE",
    from(&[
        S::Mapped,
        S::Blocked,
        S::Blockedw,
        S::ExportedBlockedw,
        S::ExportedDirty,
        S::ExportedDirtyBlockedw,
        S::Pending,
        S::PendingBlocked,
        S::PendingBlockedw,
        S::PendingExportedBlockedw,
        S::PendingExportedDirty,
        S::PendingExportedDirtyBlockedw,
    ]),
    CHANGING,
);
/// TDH.MEM.PAGE.AUG.
pub(super) const PAGE_AUG: Leaf = leaf(
    "TDH.MEM.PAGE.AUG",
    from(&[S::Free, S::Removed]),
    during(&[O::Initialized, O::Runnable, O::LiveExport, O::LiveImport]),
);
/// TDH.MEM.RANGE.BLOCK.
pub(super) const RANGE_BLOCK: Leaf =
    leaf("TDH.MEM.RANGE.BLOCK", from(&[S::NlMapped, S::Mapped, S::Blockedw, S::Pending, S::PendingBlockedw]), CHANGING);
/// TDH.MEM.PAGE.DEMOTE.
pub(super) const PAGE_DEMOTE: Leaf =
    leaf("TDH.MEM.PAGE.DEMOTE", from(&[S::Mapped, S::Blocked, S::Pending, S::PendingBlocked]), CHANGING);
/// TDH.MR.EXTEND.
pub(super) const MR_EXTEND: Leaf = leaf("TDH.MR.EXTEND", from(&[S::Mapped]), during(&[O::Initialized]));
/// TDH.MR.FINALIZE.
pub(super) const MR_FINALIZE: Leaf = leaf("TDH.MR.FINALIZE", NO_ENTRY, during(&[O::Initialized]));
/// TDH.MEM.PAGE.PROMOTE.
pub(super) const PAGE_PROMOTE: Leaf = leaf("TDH.MEM.PAGE.PROMOTE", from(&[S::NlMapped, S::NlBlocked]), CHANGING);
/// TDH.MEM.SEPT.RD.
pub(super) const SEPT_RD: Leaf = leaf("TDH.MEM.SEPT.RD", ALL_STATES, BUILT);
/// TDH.MEM.PAGE.REMOVE.
pub(super) const PAGE_REMOVE: Leaf = leaf(
    "TDH.MEM.PAGE.REMOVE",
    from(&[S::Mapped, S::Blocked, S::Blockedw, S::Pending, S::PendingBlocked, S::PendingBlockedw]),
    during(&[
        O::Initialized,
        O::Runnable,
        O::LiveExport,
        O::PausedExport,
        O::PostExport,
        O::PostImport,
        O::LiveImport,
        O::FailedImport,
    ]),
);
/// TDH.MEM.SEPT.REMOVE.
pub(super) const SEPT_REMOVE: Leaf = leaf("TDH.MEM.SEPT.REMOVE", from(&[S::NlMapped, S::NlBlocked]), BUILT);
/// TDH.MEM.TRACK.
pub(super) const TRACK: Leaf = leaf(
    "TDH.MEM.TRACK",
    NO_ENTRY,
    during(&[
        O::Initialized,
        O::Runnable,
        O::LiveExport,
        O::PausedExport,
        O::PostExport,
        O::MemoryImport,
        O::StateImport,
        O::PostImport,
        O::LiveImport,
    ]),
);
/// TDH.MEM.RANGE.UNBLOCK.
pub(super) const RANGE_UNBLOCK: Leaf =
    leaf("TDH.MEM.RANGE.UNBLOCK", from(&[S::NlBlocked, S::Blocked, S::PendingBlocked]), CHANGING);
/// TDG.MEM.PAGE.ACCEPT.
pub(super) const PAGE_ACCEPT: Leaf =
    leaf("TDG.MEM.PAGE.ACCEPT", from(&[S::Pending, S::PendingExportedDirty]), NO_CHECK);

/// The host-side leaves, in the order of the module's tables.
pub const SEAMCALLS: [Leaf; 48] = [
    leaf("TDH.VP.ENTER", NO_ENTRY, during(&[O::Runnable, O::LiveExport, O::LiveImport])),
    leaf("TDH.MNG.ADDCX", NO_ENTRY, during(&[O::Uninitialized])),
    PAGE_ADD,
    SEPT_ADD,
    leaf("TDH.VP.ADDCX", NO_ENTRY, during(&[O::Initialized, O::StateImport])),
    PAGE_RELOCATE,
    PAGE_AUG,
    RANGE_BLOCK,
    leaf("TDH.VP.CREATE", NO_ENTRY, during(&[O::Initialized, O::StateImport])),
    leaf("TDH.MNG.RD", NO_ENTRY, BUILT),
    leaf(
        "TDH.MEM.RD",
        from(&[S::Mapped, S::Blockedw, S::ExportedBlockedw, S::ExportedDirty, S::ExportedDirtyBlockedw]),
        BUILT,
    ),
    leaf("TDH.MNG.WR", NO_ENTRY, WRITABLE),
    leaf("TDH.MEM.WR", from(&[S::Mapped, S::ExportedDirty]), WRITABLE),
    PAGE_DEMOTE,
    MR_EXTEND,
    MR_FINALIZE,
    leaf(
        "TDH.VP.FLUSH",
        NO_ENTRY,
        during(&[
            O::Uninitialized,
            O::Initialized,
            O::Runnable,
            O::LiveExport,
            O::PausedExport,
            O::PostExport,
            O::MemoryImport,
            O::StateImport,
            O::PostImport,
            O::LiveImport,
            O::FailedImport,
        ]),
    ),
    leaf("TDH.MNG.INIT", NO_ENTRY, during(&[O::Uninitialized])),
    leaf("TDH.VP.INIT", NO_ENTRY, during(&[O::Initialized])),
    PAGE_PROMOTE,
    SEPT_RD,
    leaf("TDH.VP.RD", NO_ENTRY, BUILT),
    PAGE_REMOVE,
    SEPT_REMOVE,
    TRACK,
    RANGE_UNBLOCK,
    leaf("TDH.VP.WR", NO_ENTRY, WRITABLE),
    leaf(
        "TDH.SERVTD.BIND",
        NO_ENTRY,
        during(&[O::Uninitialized, O::Initialized, O::Runnable, O::LiveExport, O::PostImport, O::LiveImport]),
    ),
    leaf("TDH.SERVTD.PREBIND", NO_ENTRY, during(&[O::Uninitialized, O::Initialized])),
    leaf("TDH.EXPORT.ABORT", NO_ENTRY, during(&[O::LiveExport, O::PausedExport, O::PostExport])),
    leaf(
        "TDH.EXPORT.BLOCKW",
        from(&[S::Mapped, S::ExportedDirty, S::Pending, S::PendingExportedDirty]),
        during(&[O::LiveExport]),
    ),
    leaf(
        "TDH.EXPORT.RESTORE",
        from(&[
            S::ExportedBlockedw,
            S::ExportedDirty,
            S::ExportedDirtyBlockedw,
            S::PendingExportedBlockedw,
            S::PendingExportedDirty,
            S::PendingExportedDirtyBlockedw,
        ]),
        during(&[O::Runnable]),
    ),
    leaf(
        "TDH.EXPORT.MEM",
        from(&[
            S::Mapped,
            S::Blockedw,
            S::ExportedBlockedw,
            S::ExportedDirty,
            S::ExportedDirtyBlockedw,
            S::Pending,
            S::PendingBlockedw,
            S::PendingExportedBlockedw,
            S::PendingExportedDirty,
            S::PendingExportedDirtyBlockedw,
        ]),
        during(&[O::LiveExport, O::PausedExport, O::PostExport]),
    ),
    leaf("TDH.EXPORT.PAUSE", NO_ENTRY, during(&[O::LiveExport])),
    leaf("TDH.EXPORT.TRACK", NO_ENTRY, during(&[O::LiveExport, O::PausedExport])),
    leaf("TDH.EXPORT.STATE.IMMUTABLE", NO_ENTRY, during(&[O::Runnable, O::LiveImport])),
    leaf("TDH.EXPORT.STATE.TD", NO_ENTRY, during(&[O::PausedExport])),
    leaf("TDH.EXPORT.STATE.VP", NO_ENTRY, during(&[O::PausedExport])),
    leaf(
        "TDH.EXPORT.UNBLOCKW",
        from(&[
            S::Blockedw,
            S::ExportedBlockedw,
            S::ExportedDirtyBlockedw,
            S::PendingBlockedw,
            S::PendingExportedBlockedw,
            S::PendingExportedDirtyBlockedw,
        ]),
        during(&[O::Runnable, O::LiveExport, O::PausedExport, O::PostExport]),
    ),
    leaf("TDH.IMPORT.ABORT", NO_ENTRY, during(&[O::MemoryImport, O::StateImport, O::PostImport, O::FailedImport])),
    leaf("TDH.IMPORT.END", NO_ENTRY, during(&[O::PostImport, O::LiveImport])),
    leaf("TDH.IMPORT.COMMIT", NO_ENTRY, during(&[O::PostImport])),
    leaf(
        "TDH.IMPORT.MEM",
        from(&[S::Free, S::Removed, S::Mapped, S::Pending]),
        during(&[O::MemoryImport, O::StateImport, O::PostImport, O::LiveImport]),
    ),
    leaf("TDH.IMPORT.TRACK", NO_ENTRY, during(&[O::MemoryImport, O::StateImport])),
    leaf("TDH.IMPORT.STATE.IMMUTABLE", NO_ENTRY, during(&[O::Uninitialized])),
    leaf("TDH.IMPORT.STATE.TD", NO_ENTRY, during(&[O::MemoryImport])),
    leaf("TDH.IMPORT.STATE.VP", NO_ENTRY, during(&[O::StateImport])),
    leaf("TDH.MIG.STREAM.CREATE", NO_ENTRY, during(&[O::Uninitialized, O::Initialized, O::Runnable])),
];

/// The guest-side leaves that work on one Secure EPT entry.
pub const TDCALLS: [Leaf; 3] = [
    PAGE_ACCEPT,
    leaf(
        "TDG.MEM.PAGE.ATTR.RD",
        from(&[
            S::Mapped,
            S::Blockedw,
            S::ExportedBlockedw,
            S::ExportedDirty,
            S::ExportedDirtyBlockedw,
            S::Pending,
            S::PendingBlockedw,
            S::PendingExportedBlockedw,
            S::PendingExportedDirty,
            S::PendingExportedDirtyBlockedw,
        ]),
        NO_CHECK,
    ),
    leaf("TDG.MEM.PAGE.ATTR.WR", from(&[S::Mapped, S::ExportedDirty, S::Pending, S::PendingExportedDirty]), NO_CHECK),
];
