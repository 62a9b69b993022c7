//! The words of the Realm Management Interface: versions, status codes, states and parameters (DEN0137 1.0-rel0, B4).

use crate::addr::PfnRange;
use crate::measure::cca::{HashAlgo, RealmParams as MeasuredParams, RecParams as MeasuredRec};
use crate::runs::Linear;
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a granule.
pub const GRANULE_SIZE: u64 = 4096;
/// Level of the tables whose entries map one granule.
pub const PAGE_LEVEL: u8 = 3;
/// Lowest level at which an entry may map memory, a 1 GiB block.
pub const MIN_BLOCK_LEVEL: u8 = 1;
/// Value of `RMI_ABI_VERSION` for version 1.0.
pub const ABI_VERSION: u64 = 1 << 16;

/// A version of the RMM specification.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmmVersion {
    /// Major number.
    pub major: u16,
    /// Minor number.
    pub minor: u16,
}

impl RmmVersion {
    /// DEN0137 1.0-rel0, the version that this module models.
    pub const V1_0: Self = Self { major: 1, minor: 0 };
    /// RMM 2.0, which the Linux series of 2026 speaks and which is not modelled: RIPAS is not measured, commands take
    /// ranges and may answer `RMI_INCOMPLETE`, granules are scrubbed when they are given back.
    pub const V2_0: Self = Self { major: 2, minor: 0 };

    /// # Errors
    /// [`UnsupportedVersion`] for everything but [`RmmVersion::V1_0`].
    pub fn require_modelled(self) -> Result<(), UnsupportedVersion> {
        if self == Self::V1_0 { Ok(()) } else { Err(UnsupportedVersion(self)) }
    }
}

impl fmt::Display for RmmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RMM {}.{}", self.major, self.minor)
    }
}

/// The caller asked for a version of the RMM whose rules differ from the modelled ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct UnsupportedVersion(pub RmmVersion);

impl fmt::Display for UnsupportedVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not modelled, only {}", self.0, RmmVersion::V1_0)
    }
}

impl core::error::Error for UnsupportedVersion {}

/// `RmiCommandReturnCode`: status and index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RmiStatus {
    /// RMI_SUCCESS.
    Success,
    /// RMI_ERROR_INPUT: an argument is wrong, including a granule in the wrong state.
    Input,
    /// RMI_ERROR_REALM: the realm's state forbids it. REC_ENTER gives index 1 when the realm was switched off.
    Realm(u8),
    /// RMI_ERROR_REC: the REC's state forbids it.
    Rec,
    /// RMI_ERROR_RTT: the table walk ended at this level, or the entry there forbids it.
    Rtt(u8),
}

impl RmiStatus {
    /// X0: the status in bits 7:0, the index in bits 15:8.
    #[must_use]
    pub const fn raw(self) -> u64 {
        let status = match self {
            Self::Success => 0,
            Self::Input => 1,
            Self::Realm(_) => 2,
            Self::Rec => 3,
            Self::Rtt(_) => 4,
        };
        status | (self.index() as u64) << 8
    }

    /// The index.
    #[must_use]
    pub const fn index(self) -> u8 {
        match self {
            Self::Realm(index) | Self::Rtt(index) => index,
            Self::Success | Self::Input | Self::Rec => 0,
        }
    }

    /// The specification's name of the status.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Success => "RMI_SUCCESS",
            Self::Input => "RMI_ERROR_INPUT",
            Self::Realm(_) => "RMI_ERROR_REALM",
            Self::Rec => "RMI_ERROR_REC",
            Self::Rtt(_) => "RMI_ERROR_RTT",
        }
    }
}

/// The answer to an RMI command.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Reply {
    /// X0.
    pub status: RmiStatus,
    /// X1 to X4; zero where the command has no such output.
    pub x: [u64; 4],
}

impl Reply {
    /// An answer whose outputs are X1 onwards; at most four.
    #[must_use]
    pub fn new<const N: usize>(status: RmiStatus, outputs: [u64; N]) -> Self {
        const { assert!(N <= 4) };
        let mut x = [0; 4];
        x[..N].copy_from_slice(&outputs);
        Self { status, x }
    }

    /// Whether the command did what it was asked to do.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.status == RmiStatus::Success
    }
}

impl From<RmiStatus> for Reply {
    fn from(status: RmiStatus) -> Self {
        Self::new(status, [])
    }
}

/// What a granule of memory is used for. The numbers are those of TF-RMM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum GranuleState {
    /// 0: the host's.
    #[default]
    Ns,
    /// 1: given to the RMM, unused, zero.
    Delegated,
    /// 2: Realm Descriptor.
    Rd,
    /// 3: Realm Execution Context.
    Rec,
    /// 4: auxiliary memory of a REC.
    RecAux,
    /// 5: memory of a realm.
    Data,
    /// 6: Realm Translation Table.
    Rtt,
}

impl GranuleState {
    /// The number of the state in TF-RMM.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Ns => 0,
            Self::Delegated => 1,
            Self::Rd => 2,
            Self::Rec => 3,
            Self::RecAux => 4,
            Self::Data => 5,
            Self::Rtt => 6,
        }
    }
}

impl Linear for GranuleState {
    fn advance(&self, _pages: u64) -> Self {
        *self
    }
}

/// Realm IPA state: what the realm may expect of an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Ripas {
    /// 0: not used; an access is an external abort in the realm.
    #[default]
    Empty,
    /// 1: memory.
    Ram,
    /// 2: the host took memory away; an access exits to the host for ever.
    Destroyed,
}

impl Ripas {
    /// The encoding.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Empty => 0,
            Self::Ram => 1,
            Self::Destroyed => 2,
        }
    }
}

/// Host IPA state: what the host has put behind an address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Hipas {
    /// 0: nothing.
    Unassigned,
    /// 1: memory.
    Assigned,
    /// 2: a table of the next level.
    Table,
}

impl Hipas {
    /// The encoding in X2 of RMI_RTT_READ_ENTRY.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Unassigned => 0,
            Self::Assigned => 1,
            Self::Table => 2,
        }
    }
}

/// State of a realm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RealmState {
    /// Being built; no REC may run.
    New,
    /// Running; nothing can be measured any more.
    Active,
    /// The realm has asked to be switched off or reset.
    SystemOff,
}

/// What the machine and its RMM offer: RMI feature register 0 and the memory that can be delegated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Platform {
    /// Memory that the RMM tracks.
    pub memory: PfnRange,
    /// Widest IPA space of a realm, in bits; at most 48, as LPA2 is not modelled.
    pub s2sz: u8,
    /// Breakpoints, minus one.
    pub num_bps: u8,
    /// Watchpoints, minus one.
    pub num_wps: u8,
    /// PMU counters.
    pub pmu_num_ctrs: u8,
    /// Longest SVE vector, if there is SVE.
    pub sve_vl: Option<u8>,
    /// VMIDs that exist: 256 or 65536.
    pub vmids: u32,
    /// Auxiliary granules that each REC needs, at most [`Platform::MAX_REC_AUX`].
    pub rec_aux: u8,
}

impl Platform {
    /// Most auxiliary granules that `RmiRecParams` can name.
    pub const MAX_REC_AUX: u8 = 16;

    /// The machine that TF-RMM's `fake_host` build pretends to be, apart from LPA2.
    #[must_use]
    pub const fn fake_host(memory: PfnRange) -> Self {
        Self { memory, s2sz: 48, num_bps: 1, num_wps: 1, pmu_num_ctrs: 31, sve_vl: None, vmids: 256, rec_aux: 16 }
    }

    /// RMI feature register 0. The number of list registers and the order of the number of RECs read as zero.
    #[must_use]
    pub fn feature_register_0(&self) -> u64 {
        let sve = self.sve_vl.map_or(0, |vl| 1 << 9 | u64::from(vl & 0xf) << 10);
        u64::from(self.s2sz)
            | sve
            | u64::from(self.num_bps & 0x3f) << 14
            | u64::from(self.num_wps & 0x3f) << 20
            | 1 << 26
            | u64::from(self.pmu_num_ctrs & 0x1f) << 27
            | 0b11 << 32
    }
}

/// `RmiRealmParams`, without the personalisation value, which nothing here depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RealmParams {
    /// Bit 0 LPA2 (refused), bit 1 SVE, bit 2 PMU.
    pub flags: u64,
    /// Width of the IPA space in bits.
    pub s2sz: u64,
    /// SVE vector length.
    pub sve_vl: u8,
    /// Breakpoints, minus one; 0 is reserved.
    pub num_bps: u8,
    /// Watchpoints, minus one; 0 is reserved.
    pub num_wps: u8,
    /// PMU counters.
    pub pmu_num_ctrs: u8,
    /// `RmiHashAlgorithm`.
    pub hash_algo: u64,
    /// Virtual machine identifier, unique among realms.
    pub vmid: u64,
    /// Address of the first root table.
    pub rtt_base: u64,
    /// Level at which a walk starts.
    pub rtt_level_start: i64,
    /// Number of concatenated root tables.
    pub rtt_num_start: u64,
}

impl RealmParams {
    /// The fields that are measured, or `None` if the algorithm or the width is unknown.
    #[must_use]
    pub fn measured(&self) -> Option<MeasuredParams> {
        Some(MeasuredParams {
            flags: self.flags,
            s2sz: u8::try_from(self.s2sz).ok()?,
            sve_vl: self.sve_vl,
            num_bps: self.num_bps,
            num_wps: self.num_wps,
            pmu_num_ctrs: self.pmu_num_ctrs,
            hash_algo: HashAlgo::from_raw(self.hash_algo)?,
        })
    }
}

/// `RmiRecParams`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct RecParams {
    /// The measured fields.
    pub boot: MeasuredRec,
    /// Must name the number of RECs that were created before: Aff0 in bits 3:0, Aff1..3 in bits 31:8.
    pub mpidr: u64,
    /// Addresses of the auxiliary granules.
    pub aux: Vec<u64>,
}
