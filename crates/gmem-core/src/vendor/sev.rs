//! AMD SEV and SEV-ES: memory encryption without ownership.
//!
//! What they do *not* have matters as much as what they have: no table of owners, no refusal of a host write, no
//! validation, no private guest_memfd. `kvm->arch.has_private_mem` is set for SNP only, so the attribute PRIVATE, a
//! private fault and a populate do not exist for these guests (`__sev_guest_init()` in Linux `arch/x86/kvm/svm/sev.c`).
//!
//! Two advisory views of a page exist. The guest chooses the C-bit in its own page tables, which nested paging ignores; the
//! VMM keeps what the guest told it with KVM_HC_MAP_GPA_RANGE, which it needs for migration only. Nothing compares
//! them.
//!
//! The encryption tweak is the system physical address, so that ciphertext in another place decrypts to garbage. KVM
//! therefore pins the guest's memory (KVM_MEMORY_ENCRYPT_REG_REGION); a page that moves or is freed is lost.

use alloc::collections::BTreeSet;

use super::snp::firmware::FwError;
use super::{AccessKind, Cause, Contents, GuestOutcome, HostOutcome, Mapping, Populate, Refusal, Side, Status};
use crate::addr::{Gfn, GfnRange, Level, Pfn, PfnRange};
use crate::measure::sev::SevDigest;
use crate::runs::{Linear, RunMap};

/// Which of the two.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SevKind {
    /// Memory is encrypted.
    Sev,
    /// So are the registers of a vCPU that does not run.
    SevEs,
}

/// Life of a guest, as its firmware sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum SevState {
    /// Before LAUNCH_START.
    Init,
    /// Memory may be loaded.
    LaunchUpdate,
    /// LAUNCH_MEASURE has fixed the digest; a secret may be injected.
    LaunchSecret,
    /// After LAUNCH_FINISH.
    Running,
}

/// A page that was written through the guest's key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Encrypted;

impl Linear for Encrypted {
    fn advance(&self, _pages: u64) -> Self {
        Self
    }
}

/// The side that the VMM was told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Tracked;

impl Linear for Tracked {
    fn advance(&self, _pages: u64) -> Self {
        Self
    }
}

/// One SEV or SEV-ES VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Sev {
    kind: SevKind,
    state: SevState,
    digest: SevDigest,
    encrypted: RunMap<Encrypted>,
    tracked: RunMap<Tracked>,
    pinned: BTreeSet<(Pfn, Pfn)>,
    destroyed: bool,
}

const fn refused(cause: Cause) -> Refusal {
    Refusal { cause, status: Status::None }
}

impl Sev {
    /// A VM after KVM_SEV_INIT2.
    #[must_use]
    pub fn new(kind: SevKind) -> Self {
        Self {
            kind,
            state: SevState::Init,
            digest: SevDigest::new(),
            encrypted: RunMap::new(),
            tracked: RunMap::new(),
            pinned: BTreeSet::new(),
            destroyed: false,
        }
    }

    /// Where the guest is in its life.
    #[must_use]
    pub const fn state(&self) -> SevState {
        self.state
    }

    /// Launch digest so far.
    #[must_use]
    pub fn launch_digest(&self) -> [u8; 32] {
        self.digest.digest()
    }

    fn in_state(&self, state: SevState) -> Result<(), Refusal> {
        if self.state == state { Ok(()) } else { Err(FwError::InvalidGuestState.into()) }
    }

    /// LAUNCH_START.
    ///
    /// # Errors
    /// [`FwError::InvalidGuestState`] after the first.
    pub fn launch_start(&mut self) -> Result<(), Refusal> {
        self.in_state(SevState::Init)?;
        self.state = SevState::LaunchUpdate;
        Ok(())
    }

    /// LAUNCH_UPDATE_DATA: encrypts these host pages in place and measures their bytes.
    ///
    /// # Errors
    /// [`FwError::InvalidGuestState`] before LAUNCH_START and after LAUNCH_MEASURE.
    pub fn launch_update_data(&mut self, pages: PfnRange, bytes: &[u8]) -> Result<(), Refusal> {
        self.in_state(SevState::LaunchUpdate)?;
        self.digest.update(bytes);
        self.encrypted.insert(pages.start().0, pages.len(), Encrypted);
        Ok(())
    }

    /// LAUNCH_UPDATE_VMSA: encrypts and measures a vCPU's registers.
    ///
    /// # Errors
    /// [`Cause::Invalid`] without SEV-ES, from KVM; then [`FwError::InvalidGuestState`].
    pub fn launch_update_vmsa(&mut self, vmsa: &[u8; 4096]) -> Result<(), Refusal> {
        if self.kind == SevKind::Sev {
            return Err(refused(Cause::Invalid));
        }
        self.in_state(SevState::LaunchUpdate)?;
        self.digest.update(vmsa);
        Ok(())
    }

    /// LAUNCH_MEASURE: fixes the digest. The owner receives a keyed hash of it, which is not modelled.
    /// Choice: asking again is allowed and gives the same digest.
    ///
    /// # Errors
    /// [`FwError::InvalidGuestState`] unless memory may be loaded or the digest is fixed already.
    pub fn launch_measure(&mut self) -> Result<[u8; 32], Refusal> {
        if self.state != SevState::LaunchSecret {
            self.in_state(SevState::LaunchUpdate)?;
        }
        self.state = SevState::LaunchSecret;
        Ok(self.launch_digest())
    }

    /// KVM_MEMORY_ENCRYPT_REG_REGION: pins host pages. Nothing else stops the host from moving them.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Sev::destroy`].
    pub fn register_region(&mut self, pages: PfnRange) -> Result<(), Refusal> {
        self.alive()?;
        self.pinned.insert((pages.start(), pages.end()));
        Ok(())
    }

    /// KVM_MEMORY_ENCRYPT_UNREG_REGION, for exactly one registered region.
    ///
    /// # Errors
    /// [`Cause::Invalid`] when it is not registered.
    pub fn unregister_region(&mut self, pages: PfnRange) -> Result<(), Refusal> {
        let registered = self.pinned.remove(&(pages.start(), pages.end()));
        if registered { Ok(()) } else { Err(refused(Cause::Invalid)) }
    }

    /// The side that the guest last told the VMM with KVM_HC_MAP_GPA_RANGE; encrypted memory is the state at reset.
    #[must_use]
    pub fn tracked_side(&self, gfn: Gfn) -> Side {
        if self.tracked.get(gfn.0).is_some() { Side::Shared } else { Side::Private }
    }

    const fn alive(&self) -> Result<(), Refusal> {
        if self.destroyed { Err(refused(Cause::VmDead)) } else { Ok(()) }
    }

    /// Every access is to shared memory: KVM does not see the C-bit.
    #[must_use]
    pub const fn access_side(&self, _claimed: Side, _attribute: Side) -> Side {
        Side::Shared
    }

    /// No limit: nested paging has no second table to agree with.
    #[must_use]
    pub const fn max_level(&self, _pfn: Pfn, _side: Side) -> Level {
        Level::Page1G
    }

    /// The hook exists and does nothing: `sev_gmem_prepare()` returns for guests that are not SNP.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Sev::destroy`].
    pub const fn make_private(&mut self, _gfn: Gfn, _pfn: Pfn) -> Result<(), Refusal> {
        self.alive()
    }

    /// A nested mapping is made; nothing checks it.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Sev::destroy`].
    pub const fn map(&mut self, _mapping: Mapping) -> Result<(), Refusal> {
        self.alive()
    }

    /// A nested mapping goes. Ciphertext stays where it is and so stays readable for the guest.
    pub const fn unmap(&mut self, _mapping: Mapping) -> Contents {
        Contents::Kept
    }

    /// Nothing to prepare for.
    pub const fn invalidate(&mut self, _range: GfnRange) {}

    /// Pages leave the guest. What it wrote through its key is garbage to everyone else.
    pub fn reclaim(&mut self, range: PfnRange) -> Contents {
        let encrypted = self.encrypted.runs(range.start().0, range.len()).next().is_some();
        self.encrypted.remove(range.start().0, range.len());
        if encrypted { Contents::Undefined } else { Contents::Kept }
    }

    /// There is no private file to populate; memory is loaded with [`Sev::launch_update_data`].
    ///
    /// # Errors
    /// [`Cause::NotSupported`], always.
    pub const fn populate(&mut self, _gfn: Gfn, _pfn: Pfn, _page: Populate<'_>) -> Result<(), Refusal> {
        Err(refused(Cause::NotSupported))
    }

    /// LAUNCH_FINISH. KVM does not look whether LAUNCH_MEASURE came first; the firmware does.
    ///
    /// # Errors
    /// [`FwError::InvalidGuestState`] before LAUNCH_MEASURE and the second time.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        self.in_state(SevState::LaunchSecret)?;
        self.state = SevState::Running;
        Ok(())
    }

    /// KVM_PRE_FAULT_MEMORY maps shared memory at any time; it measures and assigns nothing.
    #[must_use]
    pub const fn prefault_allowed(&self) -> bool {
        true
    }

    /// The guest tells the VMM what its C-bits are now. Only the VMM's record changes.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Sev::destroy`].
    pub fn convert(&mut self, range: GfnRange, side: Side) -> Result<(), Refusal> {
        self.alive()?;
        match side {
            Side::Shared => self.tracked.insert(range.start().0, range.len(), Tracked),
            Side::Private => self.tracked.remove(range.start().0, range.len()),
        }
        Ok(())
    }

    /// The guest touches a page with its C-bit set for [`Side::Private`]. Nothing can fault, whatever the VMM believes;
    /// the wrong C-bit reads garbage.
    pub fn guest_access(&mut self, mapping: Mapping, kind: AccessKind) -> GuestOutcome {
        if kind == AccessKind::Store {
            match mapping.side {
                Side::Private => self.encrypted.insert(mapping.pfn.0, mapping.level.pages(), Encrypted),
                Side::Shared => self.encrypted.remove(mapping.pfn.0, mapping.level.pages()),
            }
        }
        GuestOutcome::Done
    }

    /// The host touches a page. It reads ciphertext of what the guest wrote with its key, and its writes destroy it
    /// without a fault.
    #[must_use]
    pub fn host_access(&mut self, pfn: Pfn, kind: AccessKind) -> HostOutcome {
        match (self.encrypted.get(pfn.0).is_some(), kind) {
            (false, _) => HostOutcome::Plain,
            (true, AccessKind::Store) => HostOutcome::Corrupted,
            (true, AccessKind::Load | AccessKind::Fetch) => HostOutcome::Ciphertext,
        }
    }

    /// DEACTIVATE and DECOMMISSION: the key is gone, and pinned pages are let go.
    pub fn destroy(&mut self) {
        self.destroyed = true;
        self.pinned.clear();
    }

    /// Whether the VM can never run again; only [`Sev::destroy`] does that.
    #[must_use]
    pub const fn is_dead(&self) -> bool {
        self.destroyed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effort::{cases, few};
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;
    use sha2::{Digest, Sha256};

    const INVALID_STATE: Refusal = Refusal { cause: Cause::Invalid, status: Status::SevFirmware(2) };

    fn page(pfn: u64) -> PfnRange {
        PfnRange::page(Pfn(pfn))
    }

    #[test]
    fn launch_commands_by_state() {
        let mut sev = Sev::new(SevKind::SevEs);
        assert_eq!(sev.launch_update_data(page(0), &[1]), Err(INVALID_STATE));
        assert_eq!(sev.finalize(), Err(INVALID_STATE));
        sev.launch_start().unwrap();
        assert_eq!(sev.launch_start(), Err(INVALID_STATE));
        sev.launch_update_data(page(0), b"a").unwrap();
        sev.launch_update_vmsa(&[0; 4096]).unwrap();
        assert_eq!(sev.finalize(), Err(INVALID_STATE));
        let digest = sev.launch_measure().unwrap();
        assert_eq!(sev.launch_measure(), Ok(digest));
        assert_eq!(sev.launch_update_data(page(0), b"b"), Err(INVALID_STATE));
        assert_eq!(sev.launch_update_vmsa(&[0; 4096]), Err(INVALID_STATE));
        sev.finalize().unwrap();
        assert_eq!(sev.launch_update_data(page(0), b"b"), Err(INVALID_STATE));
        assert_eq!(sev.launch_digest(), digest);
        assert_eq!(sev.state(), SevState::Running);
    }

    #[test]
    fn plain_sev_has_no_vmsa() {
        let mut sev = Sev::new(SevKind::Sev);
        assert_eq!(sev.launch_update_vmsa(&[0; 4096]), Err(refused(Cause::Invalid)));
        assert_eq!(sev.launch_update_vmsa(&[0; 4096]).unwrap_err().status, Status::None);
    }

    #[test]
    fn nothing_stops_the_host() {
        let mut sev = Sev::new(SevKind::Sev);
        let mapping = |side| Mapping { gfn: Gfn(1), pfn: Pfn(9), level: Level::Page4K, side };
        assert_eq!(sev.host_access(Pfn(9), AccessKind::Store), HostOutcome::Plain);
        assert_eq!(sev.guest_access(mapping(Side::Private), AccessKind::Store), GuestOutcome::Done);
        assert_eq!(sev.host_access(Pfn(9), AccessKind::Load), HostOutcome::Ciphertext);
        assert_eq!(sev.host_access(Pfn(9), AccessKind::Store), HostOutcome::Corrupted);
        assert_eq!(sev.reclaim(page(9)), Contents::Undefined);
        assert_eq!(sev.reclaim(page(9)), Contents::Kept);
        sev.guest_access(mapping(Side::Private), AccessKind::Store);
        sev.guest_access(mapping(Side::Shared), AccessKind::Store);
        assert_eq!(sev.host_access(Pfn(9), AccessKind::Load), HostOutcome::Plain);
    }

    #[test]
    fn conversions_are_only_written_down() {
        let mut sev = Sev::new(SevKind::Sev);
        sev.convert(GfnRange::page(Gfn(4)), Side::Shared).unwrap();
        assert_eq!((sev.tracked_side(Gfn(4)), sev.tracked_side(Gfn(5))), (Side::Shared, Side::Private));
        assert_eq!(sev.access_side(Side::Private, Side::Private), Side::Shared);
        sev.convert(GfnRange::page(Gfn(4)), Side::Private).unwrap();
        assert_eq!(sev, Sev::new(SevKind::Sev));
    }

    #[test]
    fn regions_are_unregistered_as_they_were_registered() {
        let mut sev = Sev::new(SevKind::Sev);
        let region = PfnRange::with_len(Pfn(0), 4).unwrap();
        sev.register_region(region).unwrap();
        assert_eq!(sev.unregister_region(page(0)).unwrap_err().cause, Cause::Invalid);
        sev.unregister_region(region).unwrap();
        sev.destroy();
        assert_eq!(sev.register_region(region).unwrap_err().cause, Cause::VmDead);
    }

    /// What the firmware, KVM and the guest may ask, on 16 pages.
    #[derive(Clone, Copy, Debug)]
    enum Op {
        Start,
        Data(PfnRange, u8),
        Vmsa(u8),
        Measure,
        Finish,
        Register(PfnRange),
        Unregister(PfnRange),
        Tell(GfnRange, Side),
        Guest(u64, Side, AccessKind),
        Host(u64, AccessKind),
        Zap(u64),
        Reclaim(PfnRange),
        Destroy,
    }

    fn op() -> impl Strategy<Value = Op> {
        let pages = || (0u64..16, 1u64..5).prop_map(|(at, len)| PfnRange::with_len(Pfn(at), len).unwrap());
        let side = || prop_oneof![Just(Side::Private), Just(Side::Shared)];
        let kind = || prop_oneof![Just(AccessKind::Load), Just(AccessKind::Store)];
        prop_oneof![
            2 => Just(Op::Start),
            4 => (pages(), any::<u8>()).prop_map(|(pages, byte)| Op::Data(pages, byte)),
            2 => any::<u8>().prop_map(Op::Vmsa),
            1 => Just(Op::Measure),
            1 => Just(Op::Finish),
            2 => pages().prop_map(Op::Register),
            2 => pages().prop_map(Op::Unregister),
            2 => (0u64..16, side()).prop_map(|(gfn, side)| Op::Tell(GfnRange::page(Gfn(gfn)), side)),
            4 => (0u64..16, side(), kind()).prop_map(|(pfn, side, kind)| Op::Guest(pfn, side, kind)),
            4 => (0u64..16, kind()).prop_map(|(pfn, kind)| Op::Host(pfn, kind)),
            1 => (0u64..16).prop_map(Op::Zap),
            1 => pages().prop_map(Op::Reclaim),
            1 => prop::bool::weighted(0.1).prop_map(|gone| if gone { Op::Destroy } else { Op::Measure }),
        ]
    }

    /// The same VM, page by page and from the documents: a launch in four phases, the bytes that count, who wrote each
    /// page last through the key, what the VMM was told.
    #[derive(Default)]
    struct Naive {
        phase: u8,
        measured: Vec<u8>,
        encrypted: [bool; 24],
        told_shared: [bool; 16],
        pinned: Vec<PfnRange>,
        destroyed: bool,
    }

    fn index(page: u64) -> usize {
        usize::try_from(page).unwrap()
    }

    impl Naive {
        fn step(&mut self, kind: SevKind, op: Op) -> bool {
            match op {
                Op::Start if self.phase == 0 => self.phase = 1,
                Op::Data(pages, byte) if self.phase == 1 => {
                    self.measured.extend([byte; 32]);
                    pages.pages().for_each(|pfn| self.encrypted[index(pfn.0)] = true);
                }
                Op::Vmsa(byte) if self.phase == 1 && kind == SevKind::SevEs => self.measured.extend([byte; 4096]),
                Op::Measure if self.phase == 1 || self.phase == 2 => self.phase = 2,
                Op::Finish if self.phase == 2 => self.phase = 3,
                Op::Register(pages) if !self.destroyed => {
                    self.pinned.retain(|pinned| *pinned != pages);
                    self.pinned.push(pages);
                }
                Op::Unregister(pages) if self.pinned.contains(&pages) => self.pinned.retain(|pinned| *pinned != pages),
                Op::Tell(gfns, side) if !self.destroyed => {
                    gfns.pages().for_each(|gfn| self.told_shared[index(gfn.0)] = side == Side::Shared);
                }
                Op::Guest(pfn, side, AccessKind::Store) => self.encrypted[index(pfn)] = side == Side::Private,
                Op::Reclaim(pages) => pages.pages().for_each(|pfn| self.encrypted[index(pfn.0)] = false),
                Op::Destroy => {
                    self.destroyed = true;
                    self.pinned.clear();
                }
                Op::Guest(..) | Op::Host(..) | Op::Zap(_) => {}
                _ => return false,
            }
            true
        }
    }

    fn apply(sev: &mut Sev, op: Op) -> bool {
        let at = |pfn, side| Mapping { gfn: Gfn(pfn), pfn: Pfn(pfn), level: Level::Page4K, side };
        match op {
            Op::Start => sev.launch_start().is_ok(),
            Op::Data(pages, byte) => sev.launch_update_data(pages, &[byte; 32]).is_ok(),
            Op::Vmsa(byte) => sev.launch_update_vmsa(&[byte; 4096]).is_ok(),
            Op::Measure => sev.launch_measure().is_ok(),
            Op::Finish => sev.finalize().is_ok(),
            Op::Register(pages) => sev.register_region(pages).is_ok(),
            Op::Unregister(pages) => sev.unregister_region(pages).is_ok(),
            Op::Tell(gfns, side) => sev.convert(gfns, side).is_ok(),
            Op::Guest(pfn, side, kind) => sev.guest_access(at(pfn, side), kind) == GuestOutcome::Done,
            Op::Host(pfn, kind) => {
                let _ = sev.host_access(Pfn(pfn), kind);
                true
            }
            Op::Zap(pfn) => sev.unmap(at(pfn, Side::Shared)) == Contents::Kept,
            Op::Reclaim(pages) => {
                let _ = sev.reclaim(pages);
                true
            }
            Op::Destroy => {
                sev.destroy();
                true
            }
        }
    }

    fn agrees(sev: &mut Sev, naive: &Naive) -> Result<(), TestCaseError> {
        let phases = [SevState::Init, SevState::LaunchUpdate, SevState::LaunchSecret, SevState::Running];
        prop_assert_eq!((sev.state(), sev.is_dead()), (phases[usize::from(naive.phase)], naive.destroyed));
        prop_assert_eq!(sev.launch_digest(), <[u8; 32]>::from(Sha256::digest(&naive.measured)));
        prop_assert_eq!(sev.pinned.len(), naive.pinned.len());
        for page in 0..16 {
            let read = if naive.encrypted[index(page)] { HostOutcome::Ciphertext } else { HostOutcome::Plain };
            prop_assert_eq!(sev.host_access(Pfn(page), AccessKind::Load), read, "page {}", page);
            let told = if naive.told_shared[index(page)] { Side::Shared } else { Side::Private };
            prop_assert_eq!(sev.tracked_side(Gfn(page)), told);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(256)))]

        #[test]
        fn random_commands_agree_with_a_model_of_pages(es: bool, ops in prop::collection::vec(op(), 1..few(8, 60))) {
            let kind = if es { SevKind::SevEs } else { SevKind::Sev };
            let (mut sev, mut naive) = (Sev::new(kind), Naive::default());
            for op in ops {
                let before = sev.clone();
                let done = apply(&mut sev, op);
                prop_assert_eq!(done, naive.step(kind, op), "{:?}", op);
                prop_assert!(done || sev == before, "{:?} was refused and changed something", op);
                agrees(&mut sev, &naive)?;
            }
        }
    }
}
