//! Intel TDX: a trust domain as TDX module 1.5 sees it, and KVM's use of the module.
//!
//! | part | what it is |
//! |---|---|
//! | [`sept`] | Secure EPT entries, their states and encodings, the tree |
//! | locks | who has an entry, and who is to have it next |
//! | [`pamt`] | which page belongs to whom |
//! | [`tracking`] | epochs: when a blocked translation is out of every TLB |
//! | [`tables`] | which leaf is allowed from which entry state and in which operation state |
//! | [`status`] | completion codes |
//! | commands | the SEAMCALL leaves, as methods of [`Tdx`] and as data ([`Command`]) |
//! | guest | TDG.MEM.PAGE.ACCEPT and the guest's accesses |
//! | [`map_gpa`] | how the guest asks for pages to change sides, and what the VMM is asked |
//! | verbs | what KVM asks of the architecture (`arch/x86/kvm/vmx/tdx.c`) |
//!
//! The order of checks is the module's: TDR, fatal, key state, operation state, level and alignment, guest address, walk,
//! entry state, tracking, then the operand pages. A refused command changes nothing; an [`Answer`] is what RAX, RCX, RDX and
//! R8 hold afterwards.
//!
//! The model has one TD, and each SEAMCALL is one step: a lock is busy only where a command takes it twice, and while the guest
//! is in the middle of [`Tdx::page_accept`]. TDH.VP.ENTER, which takes the lock of the whole tree when it suspects that the host
//! steps the guest, and that of the epoch, makes nobody wait here. Not modelled, and refused
//! with [`NotModelled`]: leaves of migration, of service TDs and of metadata access. TDs have no L2 guests, so a version 1
//! leaf acts on the L1 table alone. The migration states exist in the tables; the migration epoch of REMOVED does not.

mod command;
mod commands;
mod guest;
mod locks;
pub mod map_gpa;
pub mod pamt;
pub mod sept;
pub mod status;
pub mod tables;
pub mod tracking;
mod verbs;

#[cfg(test)]
mod tests;

use crate::addr::{Pfn, PfnRange};
use crate::measure::tdx::Mrtd;
use locks::EntryLocks;
use pamt::{PageType, Pamt, PamtEntry};
use sept::{Sept, Septe};
use status::TdxStatus;
use tables::OpState;
use tracking::{Tracking, VcpuError};

pub use command::{Command, NotModelled};
pub use guest::{Accepted, EptViolation};

/// An operand that names no page: all ones.
pub const NULL_PA: u64 = u64::MAX;

/// TDCX pages of a TD without L2 guests.
const TDCX_PAGES: u64 = 6;

/// A guest address and a level as a caller gives them in RCX: level in bits 2:0, page number in bits 51:12.
///
/// A claim: nothing about it is checked before a command checks it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageInfo(pub u64);

impl PageInfo {
    /// The operand for `gpa` in bytes and a level (0 = 4 KiB).
    #[must_use]
    pub const fn new(gpa: u64, level: u8) -> Self {
        Self(gpa | level as u64)
    }

    const fn level(self) -> u8 {
        (self.0 & 7) as u8
    }

    const fn gfn(self) -> u64 {
        self.0 << 12 >> 24
    }

    const fn reserved(self) -> u64 {
        self.0 & 0xfff0_0000_0000_0ff8
    }
}

/// What a command returns: RAX, and RCX, RDX and R8 where the leaf defines them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Answer {
    /// RAX.
    pub status: TdxStatus,
    /// RCX: an entry, or the address of a page that became free.
    pub rcx: u64,
    /// RDX: level and state of the entry, or the owner of a page.
    pub rdx: u64,
    /// R8: size of a reclaimed page.
    pub r8: u64,
}

impl Answer {
    const fn of(status: TdxStatus) -> Self {
        Self { status, rcx: 0, rdx: 0, r8: 0 }
    }

    fn entry(status: TdxStatus, entry: Septe, level: u8) -> Self {
        Self { status, rcx: entry.visible(level), rdx: entry.info(level), r8: 0 }
    }
}

/// Life of a TD's key: TDR.LIFECYCLE_STATE. The discriminant is the module's number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Lifecycle {
    /// A key id is assigned, no key is configured.
    HkidAssigned,
    /// Keys are in use; the only state in which TDH.MEM.* leaves work.
    KeysConfigured,
    /// No vCPU may run any more; caches hold data under the key.
    Blocked,
    /// The key id is released; pages can be reclaimed.
    Teardown,
}

impl Lifecycle {
    /// All states; the index is the module's number of the state.
    pub const ALL: [Self; 4] = [Self::HkidAssigned, Self::KeysConfigured, Self::Blocked, Self::Teardown];
}

/// Width of guest physical addresses, which decides the shared bit and the depth of the Secure EPT.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GpaWidth {
    /// Shared bit 47, four levels.
    Bits48,
    /// Shared bit 51, five levels.
    Bits52,
}

impl GpaWidth {
    const fn shared_bit(self) -> u32 {
        match self {
            Self::Bits48 => 47,
            Self::Bits52 => 51,
        }
    }

    const fn top_level(self) -> u8 {
        match self {
            Self::Bits48 => 3,
            Self::Bits52 => 4,
        }
    }
}

/// What a guest access to a pending page does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PendingAccess {
    /// The guest takes #VE.
    VirtualizationException,
    /// TD exit: ATTRIBUTES.SEPT_VE_DISABLE or TD_CTLS.PENDING_VE_DISABLE, what Linux guests ask for.
    TdExit,
}

/// The platform and the TD that a model starts with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Config {
    /// The TDX memory range (TDMR), covered by a PAMT.
    pub memory: PfnRange,
    /// Page of the TD root; the TDCX pages follow it.
    pub tdr: Pfn,
    /// Pages that the verbs make Secure EPT tables of. Nobody else may use them.
    pub tables: PfnRange,
    /// Number of vCPUs.
    pub vcpus: u16,
    /// Guest physical address width.
    pub gpa_width: GpaWidth,
    /// What touching a pending page does.
    pub pending_access: PendingAccess,
    /// First of the key id bits of a physical address.
    pub hkid_start_bit: u8,
}

impl Default for Config {
    /// 2^34 pages of memory, the upper 2^30 of them for tables, one vCPU, 48-bit guest addresses, Linux's choice of TD exits.
    fn default() -> Self {
        const END: u64 = 1 << 34;
        const TABLES: u64 = END - (1 << 30);
        let range = |start, end| PfnRange::new(Pfn(start), Pfn(end)).unwrap_or(PfnRange::page(Pfn(start)));
        Self {
            memory: range(0, END),
            tdr: Pfn(TABLES),
            tables: range(TABLES + 1 + TDCX_PAGES, END),
            vcpus: 1,
            gpa_width: GpaWidth::Bits48,
            pending_access: PendingAccess::TdExit,
            hkid_start_bit: 46,
        }
    }
}

/// The launch measurement: a stream until TDH.MR.FINALIZE, then MRTD.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Measurement {
    /// Still growing.
    Open(Mrtd),
    /// TDCS.MRTD.
    Final([u8; 48]),
}

/// A trust domain together with the part of the platform that it can see.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tdx {
    config: Config,
    lifecycle: Lifecycle,
    fatal: bool,
    op_state: OpState,
    child_pages: u64,
    tracking: Tracking,
    measurement: Measurement,
    sept: Sept,
    locks: EntryLocks,
    pamt: Pamt,
    interrupt_in: Option<u32>,
    tables_used: u64,
    /// Whether the TDR page is still one, which every command checks first.
    rooted: bool,
    dead: bool,
}

impl Default for Tdx {
    fn default() -> Self {
        Self::new(Config::default())
    }
}

impl Tdx {
    /// A TD in the state after TDH.MNG.INIT and TDH.VP.INIT: keys configured, INITIALIZED, nothing mapped.
    #[must_use]
    pub fn new(config: Config) -> Self {
        let mut pamt = Pamt::new(config.memory);
        let owner = config.tdr.0 << 12;
        pamt.set(0, config.tdr.0, PamtEntry { page_type: PageType::Tdr, ..PamtEntry::default() });
        for page in 1..=TDCX_PAGES {
            let entry = PamtEntry { page_type: PageType::Tdcx, owner, bepoch: 0 };
            pamt.set(0, config.tdr.0.wrapping_add(page), entry);
        }
        Self {
            config,
            lifecycle: Lifecycle::KeysConfigured,
            fatal: false,
            op_state: OpState::Initialized,
            child_pages: TDCX_PAGES,
            tracking: Tracking::new(config.vcpus),
            measurement: Measurement::Open(Mrtd::new()),
            sept: Sept::default(),
            locks: EntryLocks::default(),
            pamt,
            interrupt_in: None,
            tables_used: 0,
            rooted: true,
            dead: false,
        }
    }

    /// The configuration that the TD was made with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Key state.
    #[must_use]
    pub fn lifecycle(&self) -> Lifecycle {
        self.lifecycle
    }

    /// Operation state.
    #[must_use]
    pub fn op_state(&self) -> OpState {
        self.op_state
    }

    /// 4 KiB pages that the TD owns besides its TDR: TDR.CHLDCNT.
    #[must_use]
    pub fn child_pages(&self) -> u64 {
        self.child_pages
    }

    /// Epoch and reference counts.
    #[must_use]
    pub fn tracking(&self) -> &Tracking {
        &self.tracking
    }

    /// The Secure EPT.
    #[must_use]
    pub fn sept(&self) -> &Sept {
        &self.sept
    }

    /// The PAMT.
    #[must_use]
    pub fn pamt(&self) -> &Pamt {
        &self.pamt
    }

    /// The launch measurement.
    #[must_use]
    pub fn measurement(&self) -> &Measurement {
        &self.measurement
    }

    /// HPA of the TD root, which is also how the PAMT names the TD.
    #[must_use]
    pub fn tdr(&self) -> u64 {
        self.config.tdr.0 << 12
    }

    /// TDH.VP.ENTER as far as tracking goes: the vCPU joins the current epoch.
    ///
    /// # Errors
    /// The vCPU does not exist or is inside already.
    pub fn vcpu_enter(&mut self, vcpu: u16) -> Result<(), VcpuError> {
        self.tracking.enter(vcpu)
    }

    /// TD exit: the vCPU leaves the epoch in which it entered.
    ///
    /// # Errors
    /// The vCPU does not exist or is not inside.
    pub fn vcpu_exit(&mut self, vcpu: u16) -> Result<(), VcpuError> {
        self.tracking.exit(vcpu)
    }

    /// An interrupt will be found pending by the `polls`-th poll from now; `None` withdraws it.
    ///
    /// TDG.MEM.PAGE.ACCEPT polls after each 4 KiB of a 2 MiB page but the last, PROMOTE and DEMOTE once.
    pub fn set_interrupt(&mut self, polls: Option<u32>) {
        self.interrupt_in = polls;
    }

    /// Puts the TD into `state` without the leaves that lead there, as the drivers of recorded runs do.
    pub fn set_op_state(&mut self, state: OpState) {
        self.op_state = state;
    }

    /// Puts the key into `state` without the leaves that lead there.
    pub fn set_lifecycle(&mut self, state: Lifecycle) {
        self.lifecycle = state;
    }

    /// Says whether the module has found the TD's memory corrupted: TDR.FATAL.
    pub fn set_fatal(&mut self, fatal: bool) {
        self.fatal = fatal;
    }

    /// Replaces the vCPUs; all are outside.
    pub fn set_vcpus(&mut self, vcpus: u16) {
        self.tracking.set_vcpus(vcpus);
    }

    fn interrupt_pending(&mut self) -> bool {
        let left = self.interrupt_in.map(|polls| polls.saturating_sub(1));
        self.interrupt_in = left.filter(|left| *left > 0);
        left == Some(0)
    }
}
