//! Completion status of SEAMCALL and TDCALL leaves (RAX), as the TDX module 1.5 defines them.

use core::fmt;

/// RAX after a SEAMCALL or TDCALL: a code in bits 63:32 and a detail in bits 31:0.
///
/// The detail is an [`Operand`] for most errors, the mapping level for TDG.MEM.PAGE.ACCEPT, zero otherwise. Bit 63 set
/// means error; a code without it belongs to the success class even when nothing was done
/// ([`GPA_RANGE_ALREADY_BLOCKED`](Self::GPA_RANGE_ALREADY_BLOCKED)).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TdxStatus(pub u64);

/// Which operand an error is about: bits 31:0 of RAX.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum Operand {
    /// RAX: leaf number and version.
    Rax = 0,
    /// RCX.
    Rcx = 1,
    /// RDX.
    Rdx = 2,
    /// R8.
    R8 = 8,
    /// R9.
    R9 = 9,
}

macro_rules! statuses {
    ($($name:ident = $code:literal,)*) => {
        impl TdxStatus {
            $(
                #[doc = concat!("`TDX_", stringify!($name), "`.")]
                pub const $name: Self = Self($code << 32);
            )*

            /// Every code of module 1.5.05 with its name.
            pub const ALL: &'static [(&'static str, Self)] = &[$((concat!("TDX_", stringify!($name)), Self::$name),)*];
        }
    };
}

statuses! {
    SUCCESS = 0x0000_0000,
    NON_RECOVERABLE_VCPU = 0x4000_0001,
    NON_RECOVERABLE_TD = 0x6000_0002,
    INTERRUPTED_RESUMABLE = 0x8000_0003,
    INTERRUPTED_RESTARTABLE = 0x8000_0004,
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005,
    INVALID_RESUMPTION = 0xc000_0006,
    NON_RECOVERABLE_TD_WRONG_APIC_MODE = 0xe000_0007,
    CROSS_TD_FAULT = 0x8000_0008,
    CROSS_TD_TRAP = 0x9000_0009,
    NON_RECOVERABLE_TD_CORRUPTED_MD = 0x6000_000a,
    OPERAND_INVALID = 0xc000_0100,
    OPERAND_ADDR_RANGE_ERROR = 0xc000_0101,
    OPERAND_BUSY = 0x8000_0200,
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201,
    SYS_BUSY = 0x8000_0202,
    RND_NO_ENTROPY = 0x8000_0203,
    OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204,
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205,
    PAGE_METADATA_INCORRECT = 0xc000_0300,
    PAGE_ALREADY_FREE = 0x0000_0301,
    PAGE_NOT_OWNED_BY_TD = 0xc000_0302,
    PAGE_NOT_FREE = 0xc000_0303,
    TD_ASSOCIATED_PAGES_EXIST = 0xc000_0400,
    SYS_INIT_NOT_PENDING = 0xc000_0500,
    SYS_LP_INIT_NOT_DONE = 0xc000_0502,
    SYS_LP_INIT_DONE = 0xc000_0503,
    SYS_NOT_READY = 0xc000_0505,
    SYS_SHUTDOWN = 0xc000_0506,
    SYS_KEY_CONFIG_NOT_PENDING = 0xc000_0507,
    SYS_STATE_INCORRECT = 0xc000_0508,
    SYS_INVALID_HANDOFF = 0xc000_0509,
    SYS_INCOMPATIBLE_SIGSTRUCT = 0xc000_050a,
    SYS_LP_INIT_NOT_PENDING = 0xc000_050b,
    SYS_CONFIG_NOT_PENDING = 0xc000_050c,
    INCOMPATIBLE_SEAM_CAPABILITIES = 0xc000_050d,
    TD_FATAL = 0xe000_0604,
    TD_NON_DEBUG = 0xc000_0605,
    TDCS_NOT_ALLOCATED = 0xc000_0606,
    LIFECYCLE_STATE_INCORRECT = 0xc000_0607,
    OP_STATE_INCORRECT = 0xc000_0608,
    NO_VCPUS = 0xc000_0609,
    TDCX_NUM_INCORRECT = 0xc000_0610,
    X2APIC_ID_NOT_UNIQUE = 0xc000_0621,
    VCPU_STATE_INCORRECT = 0xc000_0700,
    VCPU_ASSOCIATED = 0x8000_0701,
    VCPU_NOT_ASSOCIATED = 0x8000_0702,
    NO_VALID_VE_INFO = 0xc000_0704,
    MAX_VCPUS_EXCEEDED = 0xc000_0705,
    TSC_ROLLBACK = 0xc000_0706,
    TD_VMCS_FIELD_NOT_INITIALIZED = 0xc000_0730,
    KEY_GENERATION_FAILED = 0x8000_0800,
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810,
    KEY_STATE_INCORRECT = 0xc000_0811,
    KEY_CONFIGURED = 0x0000_0815,
    WBCACHE_NOT_COMPLETE = 0x8000_0817,
    HKID_NOT_FREE = 0xc000_0820,
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821,
    WBCACHE_RESUME_ERROR = 0xc000_0823,
    FLUSHVP_NOT_DONE = 0x8000_0824,
    NUM_ACTIVATED_HKIDS_NOT_SUPPORTED = 0xc000_0825,
    INCORRECT_CPUID_VALUE = 0xc000_0900,
    LIMIT_CPUID_MAXVAL_SET = 0xc000_0901,
    INCONSISTENT_CPUID_FIELD = 0xc000_0902,
    CPUID_MAX_SUBLEAVES_UNRECOGNIZED = 0xc000_0903,
    CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xc000_0904,
    INVALID_WBINVD_SCOPE = 0xc000_0905,
    INVALID_PKG_ID = 0xc000_0906,
    ENABLE_MONITOR_FSM_NOT_SET = 0xc000_0907,
    CPUID_LEAF_NOT_SUPPORTED = 0xc000_0908,
    SMRR_NOT_LOCKED = 0xc000_0910,
    INVALID_SMRR_CONFIGURATION = 0xc000_0911,
    SMRR_OVERLAPS_CMR = 0xc000_0912,
    SMRR_LOCK_NOT_SUPPORTED = 0xc000_0913,
    SMRR_NOT_SUPPORTED = 0xc000_0914,
    INCONSISTENT_MSR = 0xc000_0920,
    INCORRECT_MSR_VALUE = 0xc000_0921,
    SEAMREPORT_NOT_AVAILABLE = 0xc000_0930,
    SEAMDB_GETREF_NOT_AVAILABLE = 0xc000_0931,
    SEAMDB_REPORT_NOT_AVAILABLE = 0xc000_0932,
    SEAMVERIFYREPORT_NOT_AVAILABLE = 0xc000_0933,
    INVALID_TDMR = 0xc000_0a00,
    NON_ORDERED_TDMR = 0xc000_0a01,
    TDMR_OUTSIDE_CMRS = 0xc000_0a02,
    TDMR_ALREADY_INITIALIZED = 0x0000_0a03,
    INVALID_PAMT = 0xc000_0a10,
    PAMT_OUTSIDE_CMRS = 0xc000_0a11,
    PAMT_OVERLAP = 0xc000_0a12,
    INVALID_RESERVED_IN_TDMR = 0xc000_0a20,
    NON_ORDERED_RESERVED_IN_TDMR = 0xc000_0a21,
    CMR_LIST_INVALID = 0xc000_0a22,
    EPT_WALK_FAILED = 0xc000_0b00,
    EPT_ENTRY_FREE = 0xc000_0b01,
    EPT_ENTRY_NOT_FREE = 0xc000_0b02,
    EPT_ENTRY_NOT_PRESENT = 0xc000_0b03,
    EPT_ENTRY_NOT_LEAF = 0xc000_0b04,
    EPT_ENTRY_LEAF = 0xc000_0b05,
    GPA_RANGE_NOT_BLOCKED = 0xc000_0b06,
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0b07,
    TLB_TRACKING_NOT_DONE = 0xc000_0b08,
    EPT_INVALID_PROMOTE_CONDITIONS = 0xc000_0b09,
    PAGE_ALREADY_ACCEPTED = 0x0000_0b0a,
    PAGE_SIZE_MISMATCH = 0xc000_0b0b,
    GPA_RANGE_BLOCKED = 0xc000_0b0c,
    EPT_ENTRY_STATE_INCORRECT = 0xc000_0b0d,
    EPT_PAGE_NOT_FREE = 0xc000_0b0e,
    L2_SEPT_WALK_FAILED = 0xc000_0b0f,
    L2_SEPT_ENTRY_NOT_FREE = 0xc000_0b10,
    PAGE_ATTR_INVALID = 0xc000_0b11,
    L2_SEPT_PAGE_NOT_PROVIDED = 0xc000_0b12,
    METADATA_FIELD_ID_INCORRECT = 0xc000_0c00,
    METADATA_FIELD_NOT_WRITABLE = 0xc000_0c01,
    METADATA_FIELD_NOT_READABLE = 0xc000_0c02,
    METADATA_FIELD_VALUE_NOT_VALID = 0xc000_0c03,
    METADATA_LIST_OVERFLOW = 0xc000_0c04,
    INVALID_METADATA_LIST_HEADER = 0xc000_0c05,
    REQUIRED_METADATA_FIELD_MISSING = 0xc000_0c06,
    METADATA_ELEMENT_SIZE_INCORRECT = 0xc000_0c07,
    METADATA_LAST_ELEMENT_INCORRECT = 0xc000_0c08,
    METADATA_FIELD_CURRENTLY_NOT_WRITABLE = 0xc000_0c09,
    METADATA_WR_MASK_NOT_VALID = 0xc000_0c0a,
    METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0c0b,
    METADATA_FIELD_SKIP = 0x0000_0c0c,
    SERVTD_ALREADY_BOUND_FOR_TYPE = 0xc000_0d00,
    SERVTD_TYPE_MISMATCH = 0xc000_0d01,
    SERVTD_ATTR_MISMATCH = 0xc000_0d02,
    SERVTD_INFO_HASH_MISMATCH = 0xc000_0d03,
    SERVTD_UUID_MISMATCH = 0xc000_0d04,
    SERVTD_NOT_BOUND = 0xc000_0d05,
    SERVTD_BOUND = 0xc000_0d06,
    TARGET_UUID_MISMATCH = 0xc000_0d07,
    TARGET_UUID_UPDATED = 0xc000_0d08,
    INVALID_MBMD = 0xc000_0e00,
    INCORRECT_MBMD_MAC = 0xc000_0e01,
    NOT_WRITE_BLOCKED = 0xc000_0e02,
    ALREADY_WRITE_BLOCKED = 0x0000_0e03,
    NOT_EXPORTED = 0xc000_0e04,
    MIGRATION_STREAM_STATE_INCORRECT = 0xc000_0e05,
    MAX_MIGS_NUM_EXCEEDED = 0xc000_0e06,
    EXPORTED_DIRTY_PAGES_REMAIN = 0xc000_0e07,
    MIGRATION_DECRYPTION_KEY_NOT_SET = 0xc000_0e08,
    TD_NOT_MIGRATABLE = 0xc000_0e09,
    PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xc000_0e0a,
    NUM_MIGS_HIGHER_THAN_CREATED = 0xc000_0e0b,
    IMPORT_MISMATCH = 0xc000_0e0c,
    MIGRATION_EPOCH_OVERFLOW = 0xc000_0e0d,
    MAX_EXPORTS_EXCEEDED = 0xc000_0e0e,
    INVALID_PAGE_MAC = 0xc000_0e0f,
    MIGRATED_IN_CURRENT_EPOCH = 0xc000_0e10,
    DISALLOWED_IMPORT_OVER_REMOVED = 0xc000_0e11,
    SOME_VCPUS_NOT_MIGRATED = 0xc000_0e12,
    ALL_VCPUS_IMPORTED = 0xc000_0e13,
    MIN_MIGS_NOT_CREATED = 0xc000_0e14,
    VCPU_ALREADY_EXPORTED = 0xc000_0e15,
    INVALID_MIGRATION_DECRYPTION_KEY = 0xc000_0e16,
    INVALID_CPUSVN = 0xc000_1000,
    INVALID_REPORTMACSTRUCT = 0xc000_1001,
    L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100,
    L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101,
    L2_EXIT_PENDING_INTERRUPT = 0x0000_1102,
    PENDING_INTERRUPT = 0x0000_1120,
    TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140,
    TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141,
    TD_EXIT_ON_L2_TO_L1 = 0x0000_1142,
    GLA_NOT_CANONICAL = 0xc000_1160,
}

impl TdxStatus {
    /// The same code about `operand`.
    #[must_use]
    pub const fn about(self, operand: Operand) -> Self {
        Self(self.0 | operand as u64)
    }

    /// The same code with a mapping level (0 = 4 KiB) as its detail.
    #[must_use]
    pub const fn at_level(self, level: u8) -> Self {
        Self(self.0 | level as u64)
    }

    /// The code without its detail.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & !0xffff_ffff)
    }

    /// Whether the code belongs to the error class.
    #[must_use]
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// The module's name of the code, or `None` for a code that module 1.5.05 does not have.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        Self::ALL.iter().find(|(_, code)| *code == self.code()).map(|(name, _)| *name)
    }
}

impl fmt::Debug for TdxStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x} {}", self.0, self.name().unwrap_or("unknown"))
    }
}
