//! The SEV-SNP launch digest: a chain of SHA-384 over one PAGE_INFO structure per 4 KiB page.
//!
//! PAGE_INFO is that of the SEV-SNP firmware ABI (AMD document 56860, section of SNP_LAUNCH_UPDATE):
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0x00 | 48 | digest so far |
//! | 0x30 | 48 | SHA-384 of the contents for NORMAL and VMSA, else zero |
//! | 0x60 | 2 | length, 0x70 |
//! | 0x62 | 1 | page type |
//! | 0x63 | 1 | bit 0: initial migration image |
//! | 0x64 | 1 | reserved |
//! | 0x65 | 3 | permissions of VMPL1, VMPL2, VMPL3 |
//! | 0x68 | 8 | guest physical address |
//!
//! Some published calculators put the permissions in reverse order at 0x64. AMD's firmware and coconut-svsm agree on
//! the layout above; the difference shows only with permissions that are not zero, which KVM never passes.

use sha2::{Digest, Sha384};

/// Bytes of a launch digest.
pub const DIGEST_LEN: usize = 48;

/// The guest physical address at which every VMSA of a KVM guest is measured: all ones in the bits that an RMP entry
/// has.
pub const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// Where the firmware zeroes a VMSA before it hashes the page: GUEST_TSC_SCALE and GUEST_TSC_OFFSET.
const VMSA_TSC_FIELDS: core::ops::Range<usize> = 0x2f0..0x300;

/// PAGE_TYPE of SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
#[repr(u8)]
pub enum PageType {
    /// Contents are measured and encrypted.
    Normal = 1,
    /// Initial register state of a vCPU; measured.
    Vmsa = 2,
    /// The firmware writes zeros.
    Zero = 3,
    /// Contents are encrypted, not measured.
    Unmeasured = 4,
    /// The firmware writes the guest's secrets.
    Secrets = 5,
    /// The firmware checks a table of CPUID answers.
    Cpuid = 6,
}

impl PageType {
    /// All page types in the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Normal, Self::Vmsa, Self::Zero, Self::Unmeasured, Self::Secrets, Self::Cpuid];

    /// The type with this number, if the firmware knows it.
    #[must_use]
    pub fn from_raw(raw: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.raw() == raw)
    }

    /// The firmware's number.
    #[must_use]
    pub const fn raw(self) -> u8 {
        self as u8
    }

    /// Whether the digest covers the bytes of the page and not only its address and type.
    #[must_use]
    pub const fn measures_contents(self) -> bool {
        matches!(self, Self::Normal | Self::Vmsa)
    }

    /// The name that vector files and reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Normal => "NORMAL",
            Self::Vmsa => "VMSA",
            Self::Zero => "ZERO",
            Self::Unmeasured => "UNMEASURED",
            Self::Secrets => "SECRETS",
            Self::Cpuid => "CPUID",
        }
    }
}

/// The parts of PAGE_INFO that a launch update chooses for a whole page, besides its contents.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageInfo {
    /// What kind of page it is.
    pub kind: PageType,
    /// Guest physical address in bytes.
    pub gpa: u64,
    /// Whether the page belongs to an initial migration image.
    pub imi: bool,
    /// Permissions of VMPL1, VMPL2 and VMPL3.
    pub vmpl: [u8; 3],
}

impl PageInfo {
    /// A page as KVM loads it: no permissions below VMPL0, no migration image.
    #[must_use]
    pub const fn new(kind: PageType, gpa: u64) -> Self {
        Self { kind, gpa, imi: false, vmpl: [0; 3] }
    }
}

/// The hash that stands for the contents of a page in PAGE_INFO.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ContentsHash(pub [u8; DIGEST_LEN]);

impl ContentsHash {
    /// The hash of pages whose contents are not measured.
    pub const NONE: Self = Self([0; DIGEST_LEN]);

    /// Hashes a page as the firmware does for this type. Bytes after the 4096th are ignored, missing ones are zero.
    #[must_use]
    pub fn of(kind: PageType, contents: &[u8]) -> Self {
        if !kind.measures_contents() {
            return Self::NONE;
        }
        let mut page = [0; 4096];
        for (to, from) in page.iter_mut().zip(contents) {
            *to = *from;
        }
        if kind == PageType::Vmsa {
            page[VMSA_TSC_FIELDS].fill(0);
        }
        Self(Sha384::digest(page).into())
    }
}

/// A launch digest that pages are added to.
///
/// ```
/// use gmem_core::measure::snp::{PageInfo, PageType, SnpDigest};
/// let mut digest = SnpDigest::new();
/// digest.update(PageInfo::new(PageType::Zero, 0), &[]);
/// assert_eq!(digest.digest()[..4], [0x70, 0xc0, 0xec, 0xaa]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnpDigest([u8; DIGEST_LEN]);

impl Default for SnpDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl SnpDigest {
    /// The digest of a guest without pages: zero.
    #[must_use]
    pub const fn new() -> Self {
        Self([0; DIGEST_LEN])
    }

    /// A digest that continues one computed elsewhere.
    #[must_use]
    pub const fn resume(digest: [u8; DIGEST_LEN]) -> Self {
        Self(digest)
    }

    /// Adds one page of 4 KiB; see [`ContentsHash::of`] for `contents` of another length.
    pub fn update(&mut self, page: PageInfo, contents: &[u8]) {
        self.update_hashed(page, ContentsHash::of(page.kind, contents));
    }

    /// Adds one page of 4 KiB whose contents were hashed before.
    pub fn update_hashed(&mut self, page: PageInfo, contents: ContentsHash) {
        self.0 = Sha384::digest(self.encode(page, contents)).into();
    }

    /// The PAGE_INFO structure that adding this page hashes.
    #[must_use]
    pub fn encode(&self, page: PageInfo, contents: ContentsHash) -> [u8; 0x70] {
        let mut info = [0; 0x70];
        info[..0x30].copy_from_slice(&self.0);
        info[0x30..0x60].copy_from_slice(&contents.0);
        info[0x60..0x62].copy_from_slice(&0x70u16.to_le_bytes());
        info[0x62] = page.kind.raw();
        info[0x63] = u8::from(page.imi);
        info[0x65..0x68].copy_from_slice(&page.vmpl);
        info[0x68..].copy_from_slice(&page.gpa.to_le_bytes());
        info
    }

    /// The digest so far.
    #[must_use]
    pub const fn digest(&self) -> [u8; DIGEST_LEN] {
        self.0
    }
}

impl core::fmt::Debug for SnpDigest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
