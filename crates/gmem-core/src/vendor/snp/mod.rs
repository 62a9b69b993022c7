//! AMD SEV-SNP: page ownership in a reverse map table (RMP), guests that validate their pages, a measuring firmware.
//!
//! | module | what it is |
//! |---|---|
//! | [`rmp`] | the table, its page states, and the host's instructions RMPUPDATE and PSMASH |
//! | [`guest`] | what is checked on each access and by VMRUN, and PVALIDATE, RMPADJUST, RMPQUERY |
//! | [`psc`] | page state change requests of the guest and what the VMM is asked |
//! | [`firmware`] | guest contexts and launch commands on one [`firmware::Machine`] |
//! | [`command`] | every command as a value, for random tests and replay |
//! | this one | [`Snp`], one VM as KVM runs it: the verbs of [`super`] |
//!
//! Facts that decide designs:
//!
//! - A conversion alone does nothing to the table. A page becomes the guest's when it is looked up for a private fault and the host's
//!   again when it leaves the file, and that takes Validated away: punching a page in use is legal for the host and
//!   fatal for the guest, which takes #VC on its next access. The VM does not die.
//! - A host write to a page of a guest faults the host; a read sees ciphertext.
//! - `make_private` is idempotent because KVM returns early for an assigned page, not because of RMPUPDATE.
//!
//! Where the documents leave a choice open, the function that makes it says *choice*. Not modelled: swapping, migration,
//! the firmware's filling of secrets and CPUID answers, and shadow-stack permission checks.

pub mod command;
pub mod firmware;
pub mod guest;
pub mod psc;
pub mod rmp;

#[cfg(test)]
mod tests;

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use self::firmware::{FwError, GuestState, IdBlock, LaunchStart, LaunchUpdate, Loaded, Machine};
use self::guest::{Access, Caller, Fault, GuestError, Npf, Translation, Validation};
use self::rmp::{Asid, Permissions, Rmp, RmpError, RmpSize, RmpUpdate};
use super::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Refusal, Side, Status,
};
use crate::addr::{Gfn, GfnRange, Level, PageNumber, Pfn, PfnRange};
use crate::measure::snp::{ContentsHash, PageType, VMSA_GPA};

impl From<RmpError> for Refusal {
    /// Linux retries FAIL_OVERLAP until it goes away; every other code is a failure.
    fn from(error: RmpError) -> Self {
        let cause = if error == RmpError::Overlap { Cause::Busy } else { Cause::Invalid };
        Self { cause, status: Status::Rmp(error.code()) }
    }
}

impl From<FwError> for Refusal {
    fn from(error: FwError) -> Self {
        Self { cause: Cause::Invalid, status: Status::SevFirmware(error.code()) }
    }
}

const fn refused(cause: Cause) -> Refusal {
    Refusal { cause, status: Status::None }
}

/// What identifies a VM to the machine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SnpConfig {
    /// Host pages that the table covers.
    pub covered: PfnRange,
    /// The guest's address space.
    pub asid: Asid,
    /// Host page for the guest context.
    pub gctx: Pfn,
}

impl Default for SnpConfig {
    /// A table over 2^36 pages whose last page holds the context of a guest with ASID 1.
    fn default() -> Self {
        let last = Pfn((1 << 36) - 1);
        Self { covered: PfnRange::page(last).hull(PfnRange::page(Pfn(0))), asid: Asid(1), gctx: last }
    }
}

/// What KVM's handler of RMP faults did (`sev_handle_rmp_fault()`). It never kills the VM.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RmpFault {
    /// A warning in the log; the guest resumes and probably faults again: a shared gfn, no page, or an unassigned one.
    Ignored,
    /// Another vCPU was faster, or the entry is 4 KiB already; the guest resumes.
    Spurious,
    /// A 2 MiB entry was smashed; these guest pages have to be unmapped so that they come back as 4 KiB.
    Smashed {
        /// What to unmap.
        zap: GfnRange,
    },
}

/// A vCPU's initial state, kept until the launch ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct InitialVmsa {
    pfn: Pfn,
    hash: ContentsHash,
}

/// One SNP VM as KVM runs it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Snp {
    machine: Machine,
    config: SnpConfig,
    id_block: Option<IdBlock>,
    vmsas: Vec<InitialVmsa>,
    guest_vmsas: BTreeSet<Gfn>,
    reloads: BTreeSet<Gfn>,
    destroyed: bool,
}

impl Default for Snp {
    /// A VM of [`SnpConfig::default`] whose launch has begun.
    fn default() -> Self {
        let mut snp = Self::new(SnpConfig::default());
        let start = LaunchStart { policy: firmware::POLICY_RESERVED_ONE, imi_enabled: false };
        let started = snp.launch_start(start);
        debug_assert!(started.is_ok(), "the default configuration is a legal launch");
        snp
    }
}

impl Snp {
    /// A VM after KVM_SEV_INIT2: it has an ASID and no guest context.
    #[must_use]
    pub fn new(config: SnpConfig) -> Self {
        Self {
            machine: Machine::new(config.covered),
            config,
            id_block: None,
            vmsas: Vec::new(),
            guest_vmsas: BTreeSet::new(),
            reloads: BTreeSet::new(),
            destroyed: false,
        }
    }

    /// The machine, for a look at its state.
    #[must_use]
    pub const fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The table, for instructions that KVM does not issue.
    pub const fn rmp_mut(&mut self) -> &mut Rmp {
        &mut self.machine.rmp
    }

    /// The launch digest so far; zero before the launch.
    #[must_use]
    pub fn launch_digest(&self) -> [u8; 48] {
        self.machine.guest(self.config.gctx).map_or([0; 48], |guest| guest.digest.digest())
    }

    /// KVM_SEV_SNP_LAUNCH_START: gives the firmware a context page, starts the launch and activates the ASID.
    ///
    /// # Errors
    /// [`Cause::Invalid`] when there is a context, or with the firmware's answer.
    pub fn launch_start(&mut self, start: LaunchStart) -> Result<(), Refusal> {
        if self.destroyed || self.machine.guest(self.config.gctx).is_some() {
            return Err(refused(Cause::Invalid));
        }
        let SnpConfig { gctx, asid, .. } = self.config;
        let mut machine = self.machine.clone();
        machine.rmp.rmpupdate(gctx, RmpUpdate::firmware())?;
        machine.gctx_create(gctx)?;
        machine.launch_start(gctx, start)?;
        machine.activate(gctx, asid)?;
        self.machine = machine;
        Ok(())
    }

    /// Names a vCPU's initial state, which [`Snp::finalize`] will measure in the order of these calls.
    pub fn add_vmsa(&mut self, pfn: Pfn, contents: &[u8; 4096]) {
        self.vmsas.push(InitialVmsa { pfn, hash: ContentsHash::of(PageType::Vmsa, contents) });
    }

    /// The ID block that [`Snp::finalize`] will have checked.
    pub const fn set_id_block(&mut self, block: IdBlock) {
        self.id_block = Some(block);
    }

    /// Remembers that a vCPU's VMSA is this guest page, because the guest said so (AP creation).
    pub fn set_guest_vmsa(&mut self, gfn: Gfn) {
        self.guest_vmsas.insert(gfn);
    }

    /// VMSAs whose vCPU has to look its page up again since the last call (KVM_REQ_VMSA_PAGE_RELOAD).
    pub fn take_reloads(&mut self) -> BTreeSet<Gfn> {
        core::mem::take(&mut self.reloads)
    }

    /// The side of an access: what the guest's C-bit claims. The attribute decides only whether that is a mismatch.
    #[must_use]
    pub const fn access_side(&self, claimed: Side, _attribute: Side) -> Side {
        claimed
    }

    /// The largest mapping of a page: that of its entry; 4 KiB for pages without one; no limit for shared memory.
    #[must_use]
    pub fn max_level(&self, pfn: Pfn, side: Side) -> Level {
        match side {
            Side::Shared => Level::Page1G,
            Side::Private => self.machine.rmp.entry(pfn).map_or(Level::Page4K, |entry| entry.size().level()),
        }
    }

    /// Gives a page to the guest, unless it already belongs to a guest (Linux 7.3, one page at a time).
    ///
    /// # Errors
    /// [`Cause::NotTracked`] outside the table; [`Cause::Invalid`] or [`Cause::Busy`] with the answer of RMPUPDATE;
    /// [`Cause::VmDead`] after [`Snp::destroy`].
    pub fn make_private(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Refusal> {
        self.prepare(gfn, pfn, Level::Page4K)
    }

    /// [`Snp::make_private`] as Linux before 7.3: a 2 MiB entry if `max` allows it, both numbers are aligned and no page of the
    /// region is taken.
    ///
    /// # Errors
    /// As [`Snp::make_private`].
    pub fn prepare(&mut self, gfn: Gfn, pfn: Pfn, max: Level) -> Result<(), Refusal> {
        if self.destroyed {
            return Err(refused(Cause::VmDead));
        }
        if !self.machine.rmp.covered().contains(pfn) {
            return Err(refused(Cause::NotTracked));
        }
        if self.machine.rmp.entry(pfn).is_some_and(|entry| entry.assigned()) {
            return Ok(());
        }
        let (gfn, pfn, size) = self.prepared_size(gfn, pfn, max);
        let update = RmpUpdate::private(gfn, size, self.config.asid, false);
        Ok(self.machine.rmp.rmpupdate(pfn, update)?)
    }

    fn prepared_size(&self, gfn: Gfn, pfn: Pfn, max: Level) -> (Gfn, Pfn, RmpSize) {
        let head = (gfn.align_down(Level::Page2M), pfn.align_down(Level::Page2M));
        let congruent = gfn.0 - head.0.0 == pfn.0 - head.1.0;
        if max >= Level::Page2M && congruent && self.machine.rmp.large_possible(head.1) {
            return (head.0, head.1, RmpSize::Page2M);
        }
        (gfn, pfn, RmpSize::Page4K)
    }

    /// A nested mapping is made. SNP has no table of its own for that.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Snp::destroy`].
    pub const fn map(&mut self, _mapping: Mapping) -> Result<(), Refusal> {
        if self.destroyed { Err(refused(Cause::VmDead)) } else { Ok(()) }
    }

    /// A nested mapping is taken away. The page stays the guest's and keeps its bytes.
    pub const fn unmap(&mut self, _mapping: Mapping) -> Contents {
        Contents::Kept
    }

    /// Pages of the file are about to go: vCPUs whose VMSA is among them have to look it up again.
    pub fn invalidate(&mut self, range: GfnRange) {
        self.reloads.extend(self.guest_vmsas.range(range.start()..range.end()));
    }

    /// Pages leave the file: those of a guest become the host's and lose their contents.
    ///
    /// Entries that RMPUPDATE refuses to change stay; the kernel only warns about them. Works after
    /// [`Snp::destroy`], because a file outlives its VM.
    pub fn reclaim(&mut self, range: PfnRange) -> Contents {
        if self.machine.rmp.release(range) > 0 { Contents::Undefined } else { Contents::Kept }
    }

    /// Loads and measures a page of initial memory.
    ///
    /// # Errors
    /// [`Cause::Invalid`] without a launch, without bytes for a page that is not ZERO, or with the firmware's code;
    /// [`Cause::NotTracked`]; [`Cause::Exists`] for a page that a guest has.
    pub fn populate(&mut self, gfn: Gfn, pfn: Pfn, page: Populate<'_>) -> Result<(), Refusal> {
        let kind = page_type(page.kind);
        let no_context = self.machine.guest(self.config.gctx).is_none();
        if no_context || (page.source.is_none() && kind != PageType::Zero) {
            return Err(refused(Cause::Invalid));
        }
        match self.machine.rmp.rmpread(pfn) {
            Err(_) => return Err(refused(Cause::NotTracked)),
            Ok(Some(entry)) if entry.assigned() => return Err(refused(Cause::Exists)),
            Ok(_) => {}
        }
        let update = RmpUpdate::private(gfn, RmpSize::Page4K, self.config.asid, true);
        self.machine.rmp.rmpupdate(pfn, update)?;
        let contents = Loaded::Bytes(page.source.map_or(&[], |bytes| bytes.as_slice()));
        let update = launch_page(pfn, kind, contents);
        self.machine.launch_update(self.config.gctx, update).map_err(|error| {
            self.take_back(pfn);
            error.into()
        })
    }

    /// `snp_page_reclaim()`: a page that the firmware refused or gave back becomes the host's again. Only a locked page
    /// does not, and that one is lost to the host as in Linux.
    fn take_back(&mut self, pfn: Pfn) {
        let _ = self.machine.page_reclaim(pfn, RmpSize::Page4K);
        let _ = self.machine.rmp.rmpupdate(pfn, RmpUpdate::shared(RmpSize::Page4K));
    }

    /// Ends the launch: loads the VMSAs, checks the ID block, lets the guest run. Costs a copy of the table's runs.
    ///
    /// # Errors
    /// [`Cause::Invalid`] with the answer of RMPUPDATE or of the firmware.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        let gctx = self.config.gctx;
        let mut machine = self.machine.clone();
        for vmsa in &self.vmsas {
            let update = RmpUpdate::private(Gfn::of_gpa(VMSA_GPA), RmpSize::Page4K, self.config.asid, true);
            machine.rmp.rmpupdate(vmsa.pfn, update)?;
            machine.launch_update(gctx, launch_page(vmsa.pfn, PageType::Vmsa, Loaded::Hashed(vmsa.hash)))?;
        }
        machine.launch_finish(gctx, self.id_block)?;
        self.machine = machine;
        Ok(())
    }

    /// Whether KVM_PRE_FAULT_MEMORY is allowed: after the launch, so that no page is the guest's before it is measured.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        self.machine.guest(self.config.gctx).is_some_and(|guest| guest.state == GuestState::Running)
    }

    /// A range changes sides. The table changes later: at the next private fault, or when the page leaves the file.
    ///
    /// # Errors
    /// [`Cause::VmDead`] after [`Snp::destroy`].
    pub const fn convert(&mut self, _range: GfnRange, _side: Side) -> Result<(), Refusal> {
        if self.destroyed { Err(refused(Cause::VmDead)) } else { Ok(()) }
    }

    /// The guest touches a page at VMPL0 through this mapping, with its C-bit set for [`Side::Private`].
    #[must_use]
    pub fn guest_access(&mut self, mapping: Mapping, kind: AccessKind) -> GuestOutcome {
        let needs = match kind {
            AccessKind::Load => Permissions::READ,
            AccessKind::Store => Permissions::WRITE,
            AccessKind::Fetch => Permissions::EXECUTE_SUPERVISOR,
        };
        let access = Access { needs, encrypted: mapping.side == Side::Private };
        let guest = Caller::vmpl0(self.config.asid);
        match self.machine.rmp.guest_access(guest, translation(mapping), access) {
            Ok(()) => GuestOutcome::Done,
            Err(fault) => fault.into(),
        }
    }

    /// The guest validates the pages of a mapping or gives them back, as Linux does: a 2 MiB request that PVALIDATE
    /// answers with a code is repeated page by page. A page that was in the wanted state already counts as done.
    pub fn guest_accept(&mut self, mapping: Mapping, acceptance: Acceptance) -> GuestOutcome {
        let to = match acceptance {
            Acceptance::Accept => Validation::Validate,
            Acceptance::GiveUp => Validation::Rescind,
        };
        let size = if mapping.level == Level::Page4K { RmpSize::Page4K } else { RmpSize::Page2M };
        self.accept_parts(mapping, size, to)
    }

    fn accept_parts(&mut self, whole: Mapping, size: RmpSize, to: Validation) -> GuestOutcome {
        for offset in (0..whole.level.pages()).step_by(if size == RmpSize::Page4K { 1 } else { 512 }) {
            let (gfn, pfn) = (whole.gfn.checked_add(offset), whole.pfn.checked_add(offset));
            let (Some(gfn), Some(pfn)) = (gfn, pfn) else { break };
            // KVM maps at the size of the entry, so that a request finds a nested mapping of its own size.
            let part = Mapping { gfn, pfn, level: size.level(), side: whole.side };
            let outcome = match self.pvalidate(part, size, to) {
                Err(GuestError::Fault(fault)) => fault.into(),
                Err(GuestError::Code(_)) if size == RmpSize::Page2M => self.accept_parts(part, RmpSize::Page4K, to),
                Err(GuestError::Code(_)) | Ok(()) => GuestOutcome::Done,
            };
            if outcome != GuestOutcome::Done {
                return outcome;
            }
        }
        GuestOutcome::Done
    }

    fn pvalidate(&mut self, mapping: Mapping, size: RmpSize, to: Validation) -> Result<(), GuestError> {
        let guest = Caller::vmpl0(self.config.asid);
        self.machine.rmp.pvalidate(guest, translation(mapping), size, to).map(|_| ())
    }

    /// The host touches a page through a 4 KiB mapping; see [`Rmp::host_write`] for larger ones.
    #[must_use]
    pub fn host_access(&mut self, pfn: Pfn, kind: AccessKind) -> HostOutcome {
        match (self.machine.rmp.hypervisor_owned(PfnRange::page(pfn)), kind) {
            (true, _) => HostOutcome::Plain,
            (false, AccessKind::Store) => HostOutcome::Fault,
            (false, AccessKind::Load | AccessKind::Fetch) => HostOutcome::Ciphertext,
        }
    }

    /// KVM's handler for a nested fault with the RMP bit that the ordinary fault path did not resolve.
    ///
    /// `pfn` is the page that the file has for `gfn`, if any.
    pub fn rmp_fault(&mut self, gfn: Gfn, pfn: Option<Pfn>, attribute: Side) -> RmpFault {
        let entry = pfn.and_then(|pfn| Some((pfn, self.machine.rmp.entry(pfn)?)));
        let Some((pfn, entry)) = entry.filter(|(_, entry)| attribute == Side::Private && entry.assigned()) else {
            return RmpFault::Ignored;
        };
        if entry.size() == RmpSize::Page4K {
            return RmpFault::Spurious;
        }
        match self.machine.rmp.psmash(pfn.align_down(Level::Page2M)) {
            Ok(()) => RmpFault::Smashed { zap: GfnRange::page(gfn).align_out(Level::Page2M) },
            // Linux repeats PSMASH while another CPU holds the entry; the guest faults again with the same effect.
            Err(_) => RmpFault::Spurious,
        }
    }

    /// The VM goes away: its context and VMSA pages are the host's again. Pages of files stay the guest's until they
    /// leave the file.
    pub fn destroy(&mut self) {
        self.destroyed = true;
        let gctx = self.config.gctx;
        if self.machine.decommission(gctx).is_ok() {
            self.take_back(gctx);
        }
        for vmsa in core::mem::take(&mut self.vmsas) {
            self.machine.rmp.unlock(vmsa.pfn);
            self.machine.rmp.release(PfnRange::page(vmsa.pfn));
        }
        self.guest_vmsas.clear();
        self.reloads.clear();
    }

    /// Whether the VM can never run again. Nothing that happens to memory kills an SNP VM; only [`Snp::destroy`] does.
    #[must_use]
    pub const fn is_dead(&self) -> bool {
        self.destroyed
    }
}

const fn page_type(kind: PopulateKind) -> PageType {
    match kind {
        PopulateKind::Measured => PageType::Normal,
        PopulateKind::Unmeasured => PageType::Unmeasured,
        PopulateKind::Zero => PageType::Zero,
        PopulateKind::Secrets => PageType::Secrets,
        PopulateKind::Cpuid => PageType::Cpuid,
    }
}

const fn launch_page(pfn: Pfn, kind: PageType, contents: Loaded<'_>) -> LaunchUpdate<'_> {
    LaunchUpdate { pfn, size: RmpSize::Page4K, kind: kind.raw(), imi: false, vmpl: [0; 3], contents }
}

const fn translation(mapping: Mapping) -> Translation {
    Translation { gfn: mapping.gfn, pfn: mapping.pfn, nested: mapping.level }
}

impl From<Fault> for GuestOutcome {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NotValidated => Self::Exception(GuestException::NotValidated),
            Fault::Nested(bits) => {
                Self::Exit(ExitReason::Rmp { size_mismatch: bits.contains(Npf::SIZEM), vmpl: bits.contains(Npf::VMPL) })
            }
        }
    }
}
