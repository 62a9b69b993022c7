//! The architectures behind the vendor seam.
//!
//! Every architecture is one module with the same shape: a state machine with the architecture's own commands and
//! status codes, and on top of it the *verbs* below, which are what KVM asks of an architecture. The core knows only
//! the verbs; `gmem check` and the property tests drive the commands.
//!
//! | verb | when KVM uses it | kernel name |
//! |---|---|---|
//! | `access_side` | an access faults: is it private? | `PFERR_PRIVATE_ACCESS`, `kvm_mem_is_private()` |
//! | `max_level` | a mapping is about to be made | `gmem_max_mapping_level` |
//! | `make_private` | a page of a private file was looked up | `gmem_make_private` (before 7.3 `gmem_prepare`) |
//! | `map` | under mmu_lock, the fault is not stale | `set_spte`, TDX SEPT, CCA RTT |
//! | `unmap` | a mapping is zapped | `remove_external_spte`, `realm_unmap_range` |
//! | `invalidate` | a range of a file is about to go | `gmem_invalidate_range` |
//! | `reclaim` | a page leaves the file | `kvm_arch_gmem_reclaim()` |
//! | `populate` | a measured initial page | callback of `kvm_gmem_populate()` |
//! | `finalize` | the launch ends | SNP_LAUNCH_FINISH, TDX FINALIZE_VM, REALM_ACTIVATE |
//! | `convert` | a range changes sides | attributes, page state change, SET_RIPAS |
//! | `guest_access`, `guest_accept` | the guest runs | hardware page walk, PVALIDATE, ACCEPT, RSI |
//! | `host_access` | the host touches the page | RMP, TD owner bit, GPT, host stage 2 |
//! | `destroy` | the VM goes away | `vm_destroy` |
//!
//! A refused verb or command changes nothing.

pub mod bytes;
pub mod cca;
pub mod consequences;
pub mod pkvm;
pub mod sev;
pub mod snp;
pub mod tdx;

use crate::addr::{Gfn, Level, Pfn};

/// The two kinds of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Side {
    /// The host can reach it.
    Shared,
    /// Only the guest can reach it.
    Private,
}

impl Side {
    /// The opposite side.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Shared => Self::Private,
            Self::Private => Self::Shared,
        }
    }
}

/// Why an architecture refused a verb, in the words of the kernel's errno table.
///
/// The number that a client sees is chosen in `gmem-uapi`; here only the reason is named.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cause {
    /// The architecture does not track the page (SNP: outside the RMP). ENOENT.
    NotTracked,
    /// An argument or a state that the architecture refuses. EINVAL.
    Invalid,
    /// The page already is what it should become. EEXIST.
    Exists,
    /// Another user holds the resource; the caller retries. EBUSY.
    Busy,
    /// Try again after something else finished. EAGAIN.
    Again,
    /// The architecture has no such operation. EOPNOTSUPP.
    NotSupported,
    /// The operation is not permitted for the page's owner. EPERM.
    NotOwner,
    /// No memory for a table. ENOMEM.
    NoMemory,
    /// The page is poisoned. EHWPOISON.
    Poisoned,
    /// The VM is dead, now or by this call. EIO.
    VmDead,
    /// The guest cannot be resumed with this address. EFAULT.
    Fault,
    /// The architecture failed in a way that KVM reports as ENXIO.
    NoDevice,
}

/// The architecture's own answer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Status {
    /// The architecture was not asked.
    None,
    /// EAX of RMPUPDATE, PSMASH, PVALIDATE or RMPADJUST.
    Rmp(u32),
    /// Status code of an SEV or SNP firmware command.
    SevFirmware(u32),
    /// RAX of a SEAMCALL or TDCALL.
    Tdx(u64),
    /// X0 of an RMI command: status in bits 7:0, index in bits 15:8.
    Rmi(u64),
    /// Return value of a pKVM hypercall, a negative errno.
    Pkvm(i32),
}

/// A refused verb.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Refusal {
    /// Why, in KVM's words.
    pub cause: Cause,
    /// Why, in the architecture's words.
    pub status: Status,
}

/// What became of the bytes of a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Contents {
    /// Unchanged.
    Kept,
    /// Zero.
    Zeroed,
    /// Neither the old bytes nor zero can be relied on: wrong key, another owner, never written.
    Undefined,
}

/// What a guest does about a page on its own side: the argument of every `guest_accept`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Acceptance {
    /// Makes the page its own: PVALIDATE, TDG.MEM.PAGE.ACCEPT, RSI_IPA_STATE_SET to RAM (giving up the content of
    /// destroyed memory), pKVM MEM_UNSHARE.
    Accept,
    /// Gives the page up: PVALIDATE with 0, RSI_IPA_STATE_SET to EMPTY, pKVM MEM_SHARE. TDX guests have no such call.
    GiveUp,
}

/// How a guest touches memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum AccessKind {
    /// Data read.
    Load,
    /// Data write.
    Store,
    /// Instruction fetch.
    Fetch,
}

/// How a guest's access to a page that has a stage-2 mapping ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestOutcome {
    /// The access was performed.
    Done,
    /// The vCPU exits and KVM's fault path runs.
    Exit(ExitReason),
    /// The guest takes an exception of its own; the host is not told.
    Exception(GuestException),
}

/// Why the hardware left the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ExitReason {
    /// No mapping, or one that does not allow the access.
    NotPresent,
    /// SNP nested page fault with the RMP bit and these further EXITINFO1 bits.
    Rmp {
        /// The RMP entry and the nested mapping or the request differ in size.
        size_mismatch: bool,
        /// The VMPL has no permission.
        vmpl: bool,
    },
    /// TDX: the page is PENDING and the TD does not take #VE; KVM declares the TD dead.
    PendingTd,
    /// CCA: synchronous exit to the host; only the realm itself can make the page usable again.
    RealmAbort,
    /// CCA: the realm asks the host to change the RIPAS of a range.
    RipasChange,
    /// pKVM: the page was taken by force; the vCPU cannot be resumed.
    Poisoned,
}

/// An exception that a guest receives because of the state of a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestException {
    /// SNP #VC with error code 0x404, PAGE_NOT_VALIDATED.
    NotValidated,
    /// TDX #VE: the page is pending acceptance.
    VirtualizationException,
    /// CCA synchronous external abort, injected into the realm.
    ExternalAbort,
    /// CCA, pKVM: the call with which the guest asked for a change returns an error.
    CallRefused,
}

/// How a host access to the page ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HostOutcome {
    /// The host sees or changes the guest's plain bytes.
    Plain,
    /// The host reads bytes that say nothing of the guest's.
    Ciphertext,
    /// The host's write destroyed guest data without a fault (SEV: garbled plaintext).
    Corrupted,
    /// The host takes a fault: #PF with the RMP bit, granule protection fault, stage-2 abort.
    Fault,
    /// The line is poisoned: whoever consumes it takes a machine check.
    MachineCheck,
}

/// A 4 KiB block of initial memory and how it is to be measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Populate<'a> {
    /// Bytes of the page; `None` where the architecture provides them (SNP ZERO).
    pub source: Option<&'a [u8; 4096]>,
    /// What the architecture does with the page.
    pub kind: PopulateKind,
}

/// Kinds of initial pages, over all architectures.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PopulateKind {
    /// Contents are measured.
    Measured,
    /// Contents are loaded, not measured.
    Unmeasured,
    /// SNP: a page of zeros.
    Zero,
    /// SNP: filled by the firmware.
    Secrets,
    /// SNP: checked by the firmware.
    Cpuid,
}

/// One translation that an architecture is asked to make or to take away.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Mapping {
    /// First guest frame.
    pub gfn: Gfn,
    /// First host frame; contiguous for levels above 4 KiB.
    pub pfn: Pfn,
    /// Size.
    pub level: Level,
    /// Which side it belongs to.
    pub side: Side,
}
