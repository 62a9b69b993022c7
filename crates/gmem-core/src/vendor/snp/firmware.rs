//! The firmware's guest contexts and launch commands.
//!
//! Source: the SEV-SNP firmware ABI (AMD document 56860) and AMD's published firmware for its order of checks. Choices:
//!
//! - the guest's secrets and corrected CPUID tables are the machine's, so SECRETS pages have undefined contents here and a
//!   CPUID page is refused only for a count above 64;
//! - SNP_LAUNCH_START refuses a policy without bit 17, which the ABI requires to be one, as INVALID_PARAM;
//! - a DECOMMISSION leaves the ASID to be flushed: ACTIVATE answers DFFLUSH_REQUIRED until DF_FLUSH.
//!
//! SNP_PAGE_SWAP_OUT, SNP_PAGE_SWAP_IN, SNP_PAGE_MOVE and migration are not modelled: no page becomes METADATA, and
//! PRE_SWAP is reached with RMPUPDATE only.

use alloc::collections::{BTreeMap, BTreeSet};

use super::rmp::{Asid, Entry, EntryBits, PageState, Permissions, RESET_PERMISSIONS, Rmp, RmpSize};
use crate::addr::{PAGE_SIZE, Pfn, PfnRange};
use crate::measure::snp::{ContentsHash, PageInfo, PageType, SnpDigest};

/// Policy bit that has to be one.
pub const POLICY_RESERVED_ONE: u64 = 1 << 17;
/// Most entries of a CPUID page.
const CPUID_COUNT_MAX: u32 = 64;

/// Status of a firmware command other than success.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum FwError {
    /// The platform is not initialised, or already is.
    InvalidPlatformState = 0x01,
    /// The guest's life has no such command now.
    InvalidGuestState = 0x02,
    /// The guest's policy forbids it.
    PolicyFailure = 0x07,
    /// The guest has no activated ASID.
    Inactive = 0x08,
    /// An address is misaligned or not usable.
    InvalidAddress = 0x09,
    /// The launch digest is not the expected one.
    BadMeasurement = 0x0b,
    /// Another guest has the ASID.
    AsidOwned = 0x0c,
    /// No such ASID.
    InvalidAsid = 0x0d,
    /// The ASID was used before and DF_FLUSH has not run since.
    DfFlushRequired = 0x0f,
    /// Not a guest context.
    InvalidGuest = 0x10,
    /// The guest is active already.
    Active = 0x12,
    /// A parameter is malformed.
    InvalidParam = 0x16,
    /// The RMP entry has another size.
    InvalidPageSize = 0x19,
    /// The page is in another state.
    InvalidPageState = 0x1a,
    /// The page is another guest's.
    InvalidPageOwner = 0x1c,
}

impl FwError {
    /// The number in the command's status.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// Life of a guest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GuestState {
    /// The context exists.
    Init,
    /// Between SNP_LAUNCH_START and SNP_LAUNCH_FINISH.
    Launch,
    /// May run.
    Running,
}

/// Life of the platform.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PlatformState {
    /// Before SNP_INIT_EX and after SNP_SHUTDOWN_EX.
    Uninit,
    /// Ready.
    Init,
}

/// What the firmware keeps in a guest context page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Gctx {
    /// Where the guest is in its life.
    pub state: GuestState,
    /// Its address space, once activated.
    pub asid: Option<Asid>,
    /// Its policy, from SNP_LAUNCH_START.
    pub policy: u64,
    /// Launch digest.
    pub digest: SnpDigest,
    /// Digest of the initial migration image.
    pub imi_digest: SnpDigest,
    /// Whether every page of the launch has to belong to an initial migration image.
    pub imi_enabled: bool,
}

/// Bytes of a page that is loaded, or a hash made earlier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loaded<'a> {
    /// Contents in order; pages beyond the end are zero, as fresh memory is.
    Bytes(&'a [u8]),
    /// The hash of a 4 KiB page, see [`ContentsHash::of`].
    Hashed(ContentsHash),
}

impl Loaded<'_> {
    fn hash(&self, kind: PageType, page: u64) -> ContentsHash {
        match *self {
            Self::Hashed(hash) => hash,
            Self::Bytes(bytes) => {
                let offset = usize::try_from(page.saturating_mul(PAGE_SIZE)).unwrap_or(usize::MAX);
                ContentsHash::of(kind, bytes.get(offset..).unwrap_or_default())
            }
        }
    }

    fn cpuid_count(&self) -> u32 {
        match *self {
            Self::Bytes([a, b, c, d, ..]) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        }
    }
}

/// Parameters of SNP_LAUNCH_START.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LaunchStart {
    /// Guest policy.
    pub policy: u64,
    /// Whether the launch loads an initial migration image.
    pub imi_enabled: bool,
}

/// Parameters of SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaunchUpdate<'a> {
    /// First host page.
    pub pfn: Pfn,
    /// Size of the page.
    pub size: RmpSize,
    /// PAGE_TYPE as the host wrote it.
    pub kind: u8,
    /// Whether the page belongs to an initial migration image.
    pub imi: bool,
    /// Permissions of VMPL1 to VMPL3.
    pub vmpl: [u8; 3],
    /// What is in the page.
    pub contents: Loaded<'a>,
}

/// What SNP_LAUNCH_FINISH compares, if the host passes an ID block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct IdBlock {
    /// Expected launch digest.
    pub digest: [u8; 48],
    /// Expected policy.
    pub policy: u64,
}

/// The machine: one table, one firmware, any number of guests.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Machine {
    /// The reverse map table, for instructions of hosts and guests.
    pub rmp: Rmp,
    platform: PlatformState,
    guests: BTreeMap<Pfn, Gctx>,
    unflushed: BTreeSet<Asid>,
}

impl Machine {
    /// A machine after SNP_INIT_EX, with a table that covers these pages.
    #[must_use]
    pub fn new(covered: PfnRange) -> Self {
        Self {
            rmp: Rmp::new(covered),
            platform: PlatformState::Init,
            guests: BTreeMap::new(),
            unflushed: BTreeSet::new(),
        }
    }

    /// A guest's context.
    #[must_use]
    pub fn guest(&self, gctx: Pfn) -> Option<&Gctx> {
        self.guests.get(&gctx)
    }

    /// Every guest context and its page.
    pub fn guests(&self) -> impl Iterator<Item = (Pfn, &Gctx)> {
        self.guests.iter().map(|(&pfn, gctx)| (pfn, gctx))
    }

    /// SNP_INIT_EX, with pages that stay the host's for as long as SNP is on.
    ///
    /// # Errors
    /// [`FwError::InvalidPlatformState`] when it already ran.
    pub fn init(&mut self, fixed: &[PfnRange]) -> Result<(), FwError> {
        if self.platform == PlatformState::Init {
            return Err(FwError::InvalidPlatformState);
        }
        self.platform = PlatformState::Init;
        fixed.iter().for_each(|range| self.rmp.fix(*range));
        Ok(())
    }

    /// SNP_SHUTDOWN_EX: guests are gone, fixed pages are the host's, firmware pages can be reclaimed.
    ///
    /// # Errors
    /// [`FwError::InvalidPlatformState`] before SNP_INIT_EX.
    pub fn shutdown(&mut self) -> Result<(), FwError> {
        self.ready()?;
        self.platform = PlatformState::Uninit;
        self.guests.clear();
        self.unflushed.clear();
        let runs: alloc::vec::Vec<_> = self.rmp.all_runs().collect();
        for (range, entry) in runs {
            match entry.state() {
                PageState::HvFixed => self.rmp.clear(range),
                PageState::Firmware | PageState::Context | PageState::Metadata => {
                    self.rmp.set(range, reclaimed(entry));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn ready(&self) -> Result<(), FwError> {
        if self.platform == PlatformState::Init { Ok(()) } else { Err(FwError::InvalidPlatformState) }
    }

    /// SNP_GCTX_CREATE: a firmware page becomes a guest context.
    ///
    /// # Errors
    /// [`FwError::InvalidPlatformState`], [`FwError::InvalidPageState`].
    pub fn gctx_create(&mut self, page: Pfn) -> Result<(), FwError> {
        self.ready()?;
        let entry = self.page_in(page, PageState::Firmware)?;
        self.rmp.set(PfnRange::page(page), Entry { bits: entry.bits | EntryBits::VMSA, ..entry });
        let (digest, imi_digest) = (SnpDigest::new(), SnpDigest::new());
        let state = GuestState::Init;
        self.guests.insert(page, Gctx { state, asid: None, policy: 0, digest, imi_digest, imi_enabled: false });
        Ok(())
    }

    fn page_in(&self, page: Pfn, state: PageState) -> Result<Entry, FwError> {
        let small = |entry: &Entry| entry.size() == RmpSize::Page4K;
        let entry = self.rmp.entry(page).filter(|entry| entry.state() == state).ok_or(FwError::InvalidPageState)?;
        Some(entry).filter(small).ok_or(FwError::InvalidPageSize)
    }

    fn context(&self, gctx: Pfn) -> Result<Gctx, FwError> {
        self.ready()?;
        self.guests.get(&gctx).copied().ok_or(FwError::InvalidGuest)
    }

    /// SNP_ACTIVATE: binds an ASID to the guest.
    ///
    /// # Errors
    /// [`FwError::InvalidGuest`], [`FwError::Active`], [`FwError::InvalidAsid`], [`FwError::AsidOwned`],
    /// [`FwError::DfFlushRequired`].
    pub fn activate(&mut self, gctx: Pfn, asid: Asid) -> Result<(), FwError> {
        let guest = self.context(gctx)?;
        if guest.asid.is_some() {
            return Err(FwError::Active);
        }
        if asid == Asid::HOST || asid > Asid::MAX {
            return Err(FwError::InvalidAsid);
        }
        if self.guests.values().any(|other| other.asid == Some(asid)) {
            return Err(FwError::AsidOwned);
        }
        if self.unflushed.contains(&asid) {
            return Err(FwError::DfFlushRequired);
        }
        self.guests.insert(gctx, Gctx { asid: Some(asid), ..guest });
        Ok(())
    }

    /// DF_FLUSH: ASIDs of guests that are gone may be used again.
    ///
    /// # Errors
    /// [`FwError::InvalidPlatformState`].
    pub fn df_flush(&mut self) -> Result<(), FwError> {
        self.ready()?;
        self.unflushed.clear();
        Ok(())
    }

    /// SNP_LAUNCH_START.
    ///
    /// # Errors
    /// [`FwError::InvalidGuest`], [`FwError::InvalidGuestState`], [`FwError::InvalidParam`] for a policy without bit 17.
    pub fn launch_start(&mut self, gctx: Pfn, start: LaunchStart) -> Result<(), FwError> {
        let guest = self.context(gctx)?;
        if guest.state != GuestState::Init {
            return Err(FwError::InvalidGuestState);
        }
        if start.policy & POLICY_RESERVED_ONE == 0 {
            return Err(FwError::InvalidParam);
        }
        let LaunchStart { policy, imi_enabled } = start;
        self.guests.insert(gctx, Gctx { state: GuestState::Launch, policy, imi_enabled, ..guest });
        Ok(())
    }

    /// SNP_LAUNCH_UPDATE: measures a PRE_GUEST page and makes it GUEST_VALID.
    ///
    /// A 2 MiB page is measured as 512 of 4 KiB.
    ///
    /// # Errors
    /// In the firmware's order: [`FwError::InvalidPlatformState`], [`FwError::InvalidGuest`],
    /// [`FwError::InvalidPageState`], [`FwError::InvalidPageSize`], [`FwError::InvalidAddress`],
    /// [`FwError::InvalidPageSize`] for types that are 4 KiB only, [`FwError::InvalidParam`] for an unknown type,
    /// [`FwError::InvalidGuestState`], [`FwError::Inactive`], [`FwError::InvalidPageOwner`],
    /// [`FwError::InvalidParam`] for an image that does not match, and for a CPUID page that is wrong.
    pub fn launch_update(&mut self, gctx: Pfn, update: LaunchUpdate<'_>) -> Result<(), FwError> {
        let mut guest = self.context(gctx)?;
        let entry = self.check_page(update)?;
        let kind = PageType::from_raw(update.kind).ok_or(FwError::InvalidParam)?;
        check_guest(&guest, &entry, update)?;
        if kind == PageType::Cpuid && update.contents.cpuid_count() > CPUID_COUNT_MAX {
            return Err(FwError::InvalidParam);
        }
        let gpa = |page| entry.gfn.0.wrapping_add(page).wrapping_mul(PAGE_SIZE);
        for page in 0..update.size.pages() {
            let info = PageInfo { kind, gpa: gpa(page), imi: update.imi, vmpl: update.vmpl };
            let contents = update.contents.hash(kind, page);
            guest.digest.update_hashed(info, contents);
            if update.imi {
                guest.imi_digest.update_hashed(info, contents);
            }
        }
        self.rmp.set_whole(update.pfn, launched(entry, kind, update.vmpl));
        self.guests.insert(gctx, guest);
        Ok(())
    }

    fn check_page(&self, update: LaunchUpdate<'_>) -> Result<Entry, FwError> {
        let pre_guest = |entry: &Entry| entry.state() == PageState::PreGuest;
        let entry = self.rmp.entry(update.pfn).filter(pre_guest).ok_or(FwError::InvalidPageState)?;
        if entry.size() != update.size {
            return Err(FwError::InvalidPageSize);
        }
        if !update.size.aligned(update.pfn.0) {
            return Err(FwError::InvalidAddress);
        }
        let kind = PageType::from_raw(update.kind);
        let small_only = matches!(kind, Some(PageType::Vmsa | PageType::Secrets | PageType::Cpuid));
        if small_only && update.size != RmpSize::Page4K {
            return Err(FwError::InvalidPageSize);
        }
        Ok(entry)
    }

    /// SNP_LAUNCH_FINISH.
    ///
    /// # Errors
    /// [`FwError::InvalidGuest`], [`FwError::InvalidGuestState`], [`FwError::Inactive`], [`FwError::BadMeasurement`],
    /// [`FwError::PolicyFailure`].
    pub fn launch_finish(&mut self, gctx: Pfn, id_block: Option<IdBlock>) -> Result<(), FwError> {
        let guest = self.context(gctx)?;
        if guest.state != GuestState::Launch {
            return Err(FwError::InvalidGuestState);
        }
        if guest.asid.is_none() {
            return Err(FwError::Inactive);
        }
        if id_block.is_some_and(|block| block.digest != guest.digest.digest()) {
            return Err(FwError::BadMeasurement);
        }
        if id_block.is_some_and(|block| block.policy != guest.policy) {
            return Err(FwError::PolicyFailure);
        }
        self.guests.insert(gctx, Gctx { state: GuestState::Running, ..guest });
        Ok(())
    }

    /// SNP_PAGE_RECLAIM.
    ///
    /// # Errors
    /// [`FwError::InvalidPlatformState`]; [`FwError::InvalidAddress`] outside the table or misaligned;
    /// [`FwError::InvalidPageSize`]; [`FwError::InvalidPageState`]. A page that is mutable already is a success.
    pub fn page_reclaim(&mut self, page: Pfn, size: RmpSize) -> Result<(), FwError> {
        self.ready()?;
        if !self.rmp.covered().contains(page) || !size.aligned(page.0) {
            return Err(FwError::InvalidAddress);
        }
        let Some(entry) = self.rmp.entry(page) else { return Ok(()) };
        if entry.size() != size {
            return Err(FwError::InvalidPageSize);
        }
        let mutable = match entry.state() {
            PageState::Metadata | PageState::Firmware => reclaimed(entry),
            PageState::PreGuest | PageState::PreSwap => Entry { bits: entry.bits - EntryBits::IMMUTABLE, ..entry },
            PageState::HvFixed | PageState::Context => return Err(FwError::InvalidPageState),
            _ => return Ok(()),
        };
        self.rmp.set_whole(page, mutable);
        Ok(())
    }

    /// SNP_PAGE_UNSMASH: 512 entries of 4 KiB become one of 2 MiB.
    ///
    /// # Errors
    /// [`FwError::InvalidAddress`]; [`FwError::InvalidPageState`] unless all are one guest's, immutable, no VMSA, equal in
    /// state and permissions, with consecutive guest pages from a 2 MiB boundary.
    pub fn page_unsmash(&mut self, page: Pfn) -> Result<(), FwError> {
        self.ready()?;
        let range = PfnRange::with_len(page, RmpSize::Page2M.pages()).ok_or(FwError::InvalidAddress)?;
        if !RmpSize::Page2M.aligned(page.0) || !self.rmp.covered().covers(range) {
            return Err(FwError::InvalidAddress);
        }
        let mut runs = self.rmp.runs(range);
        let whole = runs.next().filter(|(run, entry)| *run == range && unsmashable(entry));
        let (_, entry) = whole.ok_or(FwError::InvalidPageState)?;
        drop(runs);
        self.rmp.set(range, Entry { bits: entry.bits | EntryBits::LARGE, ..entry });
        Ok(())
    }

    /// SNP_DECOMMISSION: the guest is gone, its context page is the firmware's. Its pages stay assigned.
    ///
    /// # Errors
    /// [`FwError::InvalidGuest`].
    pub fn decommission(&mut self, gctx: Pfn) -> Result<(), FwError> {
        let guest = self.context(gctx)?;
        self.guests.remove(&gctx);
        self.unflushed.extend(guest.asid);
        if let Some(entry) = self.rmp.entry(gctx) {
            self.rmp.set(PfnRange::page(gctx), Entry { bits: entry.bits - EntryBits::VMSA, ..entry });
        }
        Ok(())
    }
}

fn check_guest(guest: &Gctx, page: &Entry, update: LaunchUpdate<'_>) -> Result<(), FwError> {
    if guest.state != GuestState::Launch {
        return Err(FwError::InvalidGuestState);
    }
    let asid = guest.asid.ok_or(FwError::Inactive)?;
    if page.asid != asid {
        return Err(FwError::InvalidPageOwner);
    }
    if guest.imi_enabled && !update.imi {
        return Err(FwError::InvalidParam);
    }
    Ok(())
}

fn reclaimed(entry: Entry) -> Entry {
    Entry { bits: entry.bits - (EntryBits::IMMUTABLE | EntryBits::VMSA), ..entry }
}

fn launched(entry: Entry, kind: PageType, [one, two, three]: [u8; 3]) -> Entry {
    let mut bits = (entry.bits | EntryBits::VALIDATED) - EntryBits::IMMUTABLE;
    bits.set(EntryBits::VMSA, kind == PageType::Vmsa);
    let [most, ..] = RESET_PERMISSIONS;
    let permissions = [most, permissions(one), permissions(two), permissions(three)];
    Entry { bits, permissions, ..entry }
}

fn permissions(raw: u8) -> Permissions {
    Permissions::from_bits_truncate(raw)
}

fn unsmashable(entry: &Entry) -> bool {
    let small = entry.size() == RmpSize::Page4K && RmpSize::Page2M.aligned(entry.gfn.0);
    let mutable = !entry.bits.contains(EntryBits::IMMUTABLE) || entry.bits.contains(EntryBits::VMSA);
    small && entry.asid != Asid::HOST && entry.assigned() && !mutable
}
