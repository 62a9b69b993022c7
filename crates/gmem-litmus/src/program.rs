//! A litmus program, as the parser leaves it.

use gmem_core::addr::{Gfn, GfnRange, IndexRange, Level, PageIndex, PageRange};
use gmem_core::file::FileFlags;
use gmem_core::vendor::{AccessKind, Side};
use gmem_core::vm::Rules;

use crate::machine::Events;
use crate::value::{Seen, Value};

/// The types of VM that a program can be about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum VmType {
    /// No private memory.
    Default,
    /// Private memory by attribute only.
    SwProtected,
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
    /// Arm CCA.
    Cca,
    /// pKVM on arm64.
    Pkvm,
}

impl VmType {
    /// Every type, in the order of reports.
    pub const ALL: &'static [Self] =
        &[Self::Default, Self::SwProtected, Self::Sev, Self::SevEs, Self::Snp, Self::Tdx, Self::Cca, Self::Pkvm];

    /// Its word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwProtected => "sw-protected",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Cca => "cca",
            Self::Pkvm => "pkvm",
        }
    }

    /// The type with this word.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|vm_type| vm_type.name() == name)
    }
}

/// A litmus program.
#[derive(Clone, Debug)]
pub struct Program {
    /// What it is about, one sentence.
    pub question: String,
    /// Where that was asked.
    pub asked: String,
    /// The types of VM that it is about.
    pub types: Vec<VmType>,
    /// Values that the program names.
    pub values: Vec<String>,
    pub(crate) rules: Rules,
    pub(crate) manual_launch: bool,
    pub(crate) files: Vec<FileDecl>,
    pub(crate) memfds: Vec<MemfdDecl>,
    pub(crate) slots: Vec<SlotDecl>,
    pub(crate) private: Vec<GfnRange>,
    pub(crate) setup: Vec<Stmt>,
    pub(crate) threads: Vec<Thread>,
    pub(crate) conditions: Vec<Condition>,
}

#[derive(Clone, Debug)]
pub(crate) struct FileDecl {
    pub(crate) name: String,
    pub(crate) pages: u64,
    pub(crate) flags: FileFlags,
    pub(crate) folios: Level,
}

#[derive(Clone, Debug)]
pub(crate) struct MemfdDecl {
    pub(crate) name: String,
    pub(crate) pages: u64,
    pub(crate) folio: u64,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct SlotDecl {
    pub(crate) number: u16,
    pub(crate) gfns: GfnRange,
    pub(crate) file: Option<(usize, PageIndex)>,
    /// First page of the VMM's memory behind the slot.
    pub(crate) user: u64,
}

impl SlotDecl {
    /// The pages of the file behind the slot.
    fn pages(&self) -> Option<(usize, IndexRange)> {
        let (file, first) = self.file?;
        Some((file, PageRange::with_len(first, self.gfns.len())?))
    }

    pub(crate) fn shares_pages_with(&self, other: &Self) -> bool {
        let both = self.pages().zip(other.pages());
        both.is_some_and(|((file, own), (of, theirs))| file == of && own.intersect(theirs).is_some())
    }

    pub(crate) fn fits(&self, file: Option<&FileDecl>) -> bool {
        self.pages().zip(file).is_some_and(|((_, pages), file)| pages.end().0 <= file.pages)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Thread {
    pub(crate) name: String,
    pub(crate) kind: ThreadKind,
    pub(crate) stmts: Vec<Stmt>,
    pub(crate) registers: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ThreadKind {
    /// The number among vCPUs, and whether memory-fault exits are answered by converting and running again.
    Vcpu { number: usize, converts: bool },
    /// A thread of the VMM or of the host.
    Other,
}

#[derive(Clone, Debug)]
pub(crate) struct Stmt {
    pub(crate) op: Op,
    pub(crate) register: Option<usize>,
    /// Results that the author pins; empty for none.
    pub(crate) expect: Vec<Seen>,
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// Operations of a program.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Op {
    Access { gfn: Gfn, kind: AccessKind, claimed: Option<Side>, value: Value },
    Accept { range: GfnRange },
    Request { range: GfnRange, to: Side },
    Share { range: GfnRange },
    SetAttributes { range: GfnRange, to: Side },
    Allocate { file: usize, range: IndexRange },
    Punch { file: usize, range: IndexRange, may_split: bool },
    Prefault { range: GfnRange },
    Populate { range: GfnRange, value: Value, measured: bool },
    Finalize,
    CreateSlot(SlotDecl),
    DeleteSlot { number: u16 },
    MoveSlot { number: u16, to: Gfn },
    ChangeUser { first: u64, end: u64, change: UserChange },
    CloseFile { file: usize },
    CloseVm,
    HostRead { page: HostPage },
    HostWrite { page: HostPage, value: Value },
    Convert { file: usize, range: IndexRange, to: Side },
    Pin { file: usize, range: IndexRange, pinned: bool },
    Reclaim { file: usize, index: PageIndex },
    Migrate { file: usize, index: PageIndex },
    Poison { file: usize, index: PageIndex },
    RestoreTemporarily { file: usize, index: PageIndex },
    Reuse { file: usize, index: PageIndex },
    Split { gfn: Gfn },
    Collapse { gfn: Gfn },
    Memfd { memfd: usize, op: MemfdOp },
}

/// What the VMM does to its own memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum UserChange {
    Unmap,
    Remap,
    DontNeed,
}

/// A page as the host sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum HostPage {
    /// The VMM's own memory, by page.
    User(u64),
    /// A file's page through the VMM's mapping of the file.
    Mapped { file: usize, index: PageIndex },
    /// A file's page through the kernel's direct map.
    Direct { file: usize, index: PageIndex },
}

/// Operations on a memfd of the first form of the idea, which a seal makes private.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MemfdOp {
    Seal,
    Map,
    Unmap,
    Read(u64),
    Write(u64, Value),
    GuestWrite(u64, Value),
    Punch { first: u64, end: u64, may_split: bool },
    Truncate { bytes_from: u64, may_split: bool },
    Migrate(u64),
    Swap(u64),
}

/// What the author says of outcomes.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    pub(crate) kind: ConditionKind,
    /// Only for these types; empty for all.
    pub(crate) types: Vec<VmType>,
    pub(crate) expr: Expr,
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// Kinds of [`Condition`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ConditionKind {
    /// No interleaving ends like this.
    Forbidden,
    /// Some interleaving ends like this.
    Required,
    /// Every interleaving ends like this, or as another `allowed` or `required` says.
    Allowed,
}

/// A predicate over outcomes.
#[derive(Clone, Debug)]
pub(crate) enum Expr {
    Atom(Atom),
    Not(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
}

impl Expr {
    /// The events that are named without a `not`.
    pub(crate) fn names(&self) -> Events {
        match self {
            Self::Atom(Atom::Event(event)) => *event,
            Self::Atom(_) | Self::Not(_) => Events::empty(),
            Self::And(left, right) | Self::Or(left, right) => left.names() | right.names(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Atom {
    Register { thread: usize, register: usize, is: Seen },
    Event(Events),
    GuestDead,
    Leaked(u64),
    Measured { gfn: Option<Gfn>, times: u64 },
}

impl Expr {
    /// Whether the event decides anything here.
    fn asks_for(&self, event: Events) -> bool {
        match self {
            Self::Atom(Atom::Event(one)) => one.intersects(event),
            Self::Atom(_) => false,
            Self::Not(inner) => inner.asks_for(event),
            Self::And(left, right) | Self::Or(left, right) => left.asks_for(event) || right.asks_for(event),
        }
    }
}

impl Program {
    /// Whether a condition depends on the event.
    pub(crate) fn asks_for(&self, event: Events) -> bool {
        self.conditions.iter().any(|condition| condition.expr.asks_for(event))
    }

    /// Number of vCPUs.
    pub(crate) fn vcpus(&self) -> usize {
        self.threads.iter().filter(|thread| matches!(thread.kind, ThreadKind::Vcpu { .. })).count()
    }

    /// Frames that the program names, rounded up.
    pub(crate) fn frames(&self) -> u64 {
        let slots = self.slots.iter().map(|slot| slot.gfns.end().0);
        let stmts = self.setup.iter().chain(self.threads.iter().flat_map(|thread| &thread.stmts));
        let more = stmts.filter_map(|stmt| match stmt.op {
            Op::CreateSlot(slot) => Some(slot.gfns.end().0),
            Op::MoveSlot { to, .. } => Some(to.0 + 1024),
            Op::SetAttributes { range, .. }
            | Op::Request { range, .. }
            | Op::Share { range }
            | Op::Accept { range }
            | Op::Prefault { range }
            | Op::Populate { range, .. } => Some(range.end().0),
            Op::Access { gfn, .. } | Op::Split { gfn } | Op::Collapse { gfn } => Some(gfn.0 + 1),
            _ => None,
        });
        let private = self.private.iter().map(|range| range.end().0);
        slots.chain(more).chain(private).max().unwrap_or(1).next_power_of_two().max(64)
    }
}
