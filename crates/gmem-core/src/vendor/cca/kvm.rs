//! What KVM does with an RMM: the verbs of the vendor seam for one realm.
//!
//! The order of commands is that of the Linux series for RMM 1.0: delegate, create missing tables, create data; destroy
//! data, undelegate. Tables and the realm's own granules come from a pool that no guest memory shares.

mod mapping;

use super::data::Source;
use super::rec::{RealmOutcome, RealmStep, RecEntry, rsi};
use super::rmi::{
    GRANULE_SIZE, GranuleState, PAGE_LEVEL, Platform, RealmParams, RealmState, RecParams, Reply, Ripas, RmiStatus,
    RmmVersion, UnsupportedVersion,
};
use super::rmm::{Realm, Rmm, root_tables};
use super::rtt::{Entry, Rtt, shift};
use crate::addr::{Gfn, GfnRange, Level, PAGE_SIZE, PageNumber, Pfn, PfnRange};
use crate::measure::cca::{HashAlgo, RecParams as BootState};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Refusal, Side, Status,
};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::fmt;

/// Physical memory of the model, in pages: 48 bits.
const MEMORY_PAGES: u64 = 1 << 36;
/// First page of the pool, at 15/16 of memory, where no caller is expected to have guest memory.
const POOL_START: u64 = MEMORY_PAGES / 16 * 15;
/// MemAttr normal write-back, S2AP read and write.
const NS_ATTRIBUTES: u64 = 0xd8;

/// What kind of realm to create.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Config {
    /// Version of the RMM.
    pub version: RmmVersion,
    /// Width of the IPA space in bits, 32 to 48; the upper half is for unprotected memory.
    pub ipa_bits: u8,
    /// Algorithm of the measurements.
    pub hash: HashAlgo,
    /// Registers of the one REC.
    pub boot: BootState,
}

impl Default for Config {
    fn default() -> Self {
        let boot = BootState { flags: 1, ..BootState::default() };
        Self { version: RmmVersion::V1_0, ipa_bits: 48, hash: HashAlgo::Sha256, boot }
    }
}

/// Why there is no realm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CreateError {
    /// The RMM speaks another version.
    Version(UnsupportedVersion),
    /// The RMM refused the parameters.
    Refused(RmiStatus),
}

impl fmt::Display for CreateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(error) => error.fmt(f),
            Self::Refused(status) => write!(f, "the realm was refused: {}", status.name()),
        }
    }
}

impl core::error::Error for CreateError {}

/// Granules for tables and control structures.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Pool {
    next: u64,
    free: BTreeSet<u64>,
}

impl Pool {
    fn new() -> Self {
        Self { next: POOL_START, free: BTreeSet::new() }
    }

    /// Address of a granule that is the host's.
    fn take(&mut self) -> Option<u64> {
        if let Some(granule) = self.free.pop_first() {
            return Some(granule * GRANULE_SIZE);
        }
        let granule = self.next;
        (granule < MEMORY_PAGES).then(|| {
            self.next += 1;
            granule * GRANULE_SIZE
        })
    }

    /// Equal sets of used granules are equal pools, which keeps equal VMs equal.
    fn give(&mut self, address: u64) {
        self.free.insert(address / GRANULE_SIZE);
        while self.free.last().is_some_and(|last| last + 1 == self.next) {
            self.free.pop_last();
            self.next -= 1;
        }
    }
}

/// One confidential VM: a realm with one REC, and what KVM keeps for it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Cca {
    rmm: Rmm,
    rd: u64,
    rec: Option<u64>,
    /// A granule of the host through which parameters, run structures and source pages are passed.
    scratch: u64,
    boot: BootState,
    pool: Pool,
    ipa_bits: u8,
    dead: bool,
}

fn refusal(cause: Cause, status: RmiStatus) -> Refusal {
    Refusal { cause, status: Status::Rmi(status.raw()) }
}

fn unasked(cause: Cause) -> Refusal {
    Refusal { cause, status: Status::None }
}

fn address(pfn: Pfn) -> u64 {
    // A number that is no address saturates to one that is not aligned, which the RMM refuses.
    pfn.0.saturating_mul(PAGE_SIZE)
}

fn level_of(level: Level) -> u8 {
    match level {
        Level::Page4K => 3,
        Level::Page2M => 2,
        Level::Page1G => 1,
    }
}

impl Cca {
    /// A realm in state NEW.
    ///
    /// # Errors
    /// [`CreateError::Version`] for an RMM that is not 1.0, [`CreateError::Refused`] for an IPA width that the platform
    /// does not have.
    pub fn new(config: &Config) -> Result<Self, CreateError> {
        let memory = PfnRange::new(Pfn(0), Pfn(MEMORY_PAGES)).ok_or(CreateError::Refused(RmiStatus::Input))?;
        let rmm = Rmm::new(config.version, Platform::fake_host(memory)).map_err(CreateError::Version)?;
        let mut pool = Pool::new();
        let scratch = POOL_START * GRANULE_SIZE;
        pool.next += 1;
        let (boot, ipa_bits) = (config.boot, config.ipa_bits);
        let mut cca = Self { rmm, rd: 0, rec: None, scratch, boot, pool, ipa_bits, dead: false };
        cca.create_realm(config.hash).map_err(CreateError::Refused)?;
        Ok(cca)
    }

    fn create_realm(&mut self, hash: HashAlgo) -> Result<(), RmiStatus> {
        let bits = u64::from(self.ipa_bits);
        // The deepest start level needs the fewest tables per walk; KVM concatenates root tables to get there.
        let start = [2, 1, 0].into_iter().find_map(|start| Some((start, root_tables(bits, start)?)));
        let (rtt_level_start, rtt_num_start) = start.ok_or(RmiStatus::Input)?;
        let rtt_base = self.take_delegated().ok_or(RmiStatus::Input)?;
        for _ in 1..rtt_num_start {
            self.take_delegated().ok_or(RmiStatus::Input)?;
        }
        self.rd = self.take_delegated().ok_or(RmiStatus::Input)?;
        let params = RealmParams {
            flags: 0,
            s2sz: bits,
            sve_vl: 0,
            num_bps: 1,
            num_wps: 1,
            pmu_num_ctrs: 0,
            hash_algo: u64::from(hash.raw()),
            vmid: 1,
            rtt_base,
            rtt_level_start,
            rtt_num_start,
        };
        done(self.rmm.realm_create(self.rd, self.scratch, &params))
    }

    /// The monitor, for its own commands and for assertions.
    #[must_use]
    pub fn rmm(&self) -> &Rmm {
        &self.rmm
    }

    /// The realm, until it is destroyed.
    #[must_use]
    pub fn realm(&self) -> Option<&Realm> {
        self.rmm.realm(self.rd)
    }

    /// Address of the unprotected alias of a guest page, or of the page itself.
    fn ipa(&self, gfn: Gfn, side: Side) -> u64 {
        let alias = 1 << self.ipa_bits.saturating_sub(1);
        match side {
            Side::Private => gfn.gpa(),
            Side::Shared => gfn.gpa() | alias,
        }
    }

    fn take_delegated(&mut self) -> Option<u64> {
        let granule = self.pool.take()?;
        self.rmm.granule_delegate(granule);
        Some(granule)
    }

    fn give_back(&mut self, granule: u64) {
        // A granule that the RMM does not let go is leaked, as in KVM.
        if self.rmm.granule_undelegate(granule).is_success() {
            self.pool.give(granule);
        }
    }

    fn state(&self) -> Option<RealmState> {
        self.realm().map(Realm::state)
    }

    fn require(&self, state: RealmState) -> Result<(), Refusal> {
        match self.state() {
            _ if self.dead => Err(unasked(Cause::VmDead)),
            None => Err(unasked(Cause::VmDead)),
            Some(found) if found == state => Ok(()),
            Some(_) => Err(refusal(Cause::Busy, RmiStatus::Realm(0))),
        }
    }

    /// Which side an access is on: the address bit that the realm used decides, not what the host tracks.
    #[must_use]
    pub fn access_side(&self, claimed: Side, _attribute: Side) -> Side {
        claimed
    }

    /// Largest mapping: RMI_DATA_CREATE maps single granules, unprotected memory may use 2 MiB blocks.
    #[must_use]
    pub fn max_level(&self, _pfn: Pfn, side: Side) -> Level {
        match side {
            Side::Private => Level::Page4K,
            Side::Shared => Level::Page2M,
        }
    }

    /// Nothing: a page becomes private when it is mapped.
    ///
    /// # Errors
    /// [`Cause::VmDead`].
    pub fn make_private(&mut self, _gfn: Gfn, _pfn: Pfn) -> Result<(), Refusal> {
        if self.is_dead() { Err(unasked(Cause::VmDead)) } else { Ok(()) }
    }

    /// Nothing: KVM acts when the mappings go.
    pub fn invalidate(&mut self, _range: GfnRange) {}

    /// A page leaves the file. One that the RMM still uses cannot be taken back and is leaked to it.
    pub fn reclaim(&mut self, pages: PfnRange) -> Contents {
        let mut contents = Contents::Kept;
        // Granules that the RMM does not track are the host's anyway.
        let tracked: Vec<(u64, u64)> =
            self.rmm.granules_in(pages).map(|(first, len, _)| (first, first.saturating_add(len))).collect();
        for granule in tracked.into_iter().flat_map(|(first, end)| first..end) {
            if !self.rmm.granule_undelegate(granule * GRANULE_SIZE).is_success() {
                contents = Contents::Undefined;
            }
        }
        contents
    }

    /// Copies an initial page into the realm and measures it or only its address.
    ///
    /// # Errors
    /// [`Cause::Busy`] after activation, [`Cause::NotSupported`] for kinds of other architectures, [`Cause::Invalid`]
    /// without a source, [`Cause::NoDevice`] where the RMM refuses, such as a page that is there already.
    pub fn populate(&mut self, gfn: Gfn, pfn: Pfn, page: Populate<'_>) -> Result<(), Refusal> {
        self.require(RealmState::New)?;
        let flags = match page.kind {
            PopulateKind::Measured => 1,
            PopulateKind::Unmeasured => 0,
            PopulateKind::Zero | PopulateKind::Secrets | PopulateKind::Cpuid => {
                return Err(unasked(Cause::NotSupported));
            }
        };
        let content = page.source.ok_or(unasked(Cause::Invalid))?;
        let (ipa, granule) = (gfn.gpa(), address(pfn));
        self.check_unassigned(ipa)?;
        done(self.rmm.granule_delegate(granule)).map_err(no_device)?;
        let source = Source { address: self.scratch, content, flags };
        let created = self.with_tables(ipa, PAGE_LEVEL, |cca| {
            done(cca.rmm.data_create(cca.rd, granule, ipa, source)).map_err(no_device)
        });
        if created.is_err() {
            self.rmm.granule_undelegate(granule);
        }
        created
    }

    /// Creates the REC and activates the realm, as KVM does when a vCPU first runs.
    ///
    /// # Errors
    /// [`Cause::Busy`] if that was done before. Any other failure kills the VM.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        self.require(RealmState::New)?;
        let activated = self.create_rec().and_then(|()| done(self.rmm.realm_activate(self.rd)));
        activated.map_err(|status| {
            self.dead = true;
            refusal(Cause::VmDead, status)
        })
    }

    fn create_rec(&mut self) -> Result<(), RmiStatus> {
        let rec = self.take_delegated().ok_or(RmiStatus::Input)?;
        let count = self.rmm.rec_aux_count(self.rd).x[0];
        let aux: Option<Vec<u64>> = (0..count).map(|_| self.take_delegated()).collect();
        let params = RecParams { boot: self.boot, mpidr: 0, aux: aux.ok_or(RmiStatus::Input)? };
        done(self.rmm.rec_create(self.rd, rec, self.scratch, &params))?;
        self.rec = Some(rec);
        Ok(())
    }

    /// Whether memory may be mapped before it is used: only in an active realm.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        self.require(RealmState::Active).is_ok()
    }

    /// Changes the side of a range. Before activation private means RMI_RTT_INIT_RIPAS, which is measured. Afterwards the
    /// realm must have asked for the change with RSI_IPA_STATE_SET and `range` must start where the request stands; memory
    /// that the realm gives up is destroyed.
    ///
    /// # Errors
    /// [`Cause::Invalid`] if the realm asked for something else, [`Cause::NoDevice`] where the RMM refuses an entry: the
    /// part before it is converted, and the realm is told how far that went.
    pub fn convert(&mut self, range: GfnRange, side: Side) -> Result<(), Refusal> {
        let (base, top) = (range.start().gpa(), range.end().gpa());
        match self.state() {
            _ if self.dead => Err(unasked(Cause::VmDead)),
            None | Some(RealmState::SystemOff) => Err(unasked(Cause::VmDead)),
            Some(RealmState::New) if side == Side::Shared => Ok(()),
            Some(RealmState::New) => self.for_each_entry(base, top, |cca, at| cca.rmm.rtt_init_ripas(cca.rd, at, top)),
            Some(RealmState::Active) => self.convert_active(base, top, side),
        }
    }

    fn convert_active(&mut self, base: u64, top: u64, side: Side) -> Result<(), Refusal> {
        let wanted = if side == Side::Private { Ripas::Ram } else { Ripas::Empty };
        let asked = self.rec.and_then(|rec| Some((rec, self.rmm.rec(rec)?.ripas_change())));
        let Some((rec, change)) = asked.filter(|(_, change)| change.is_pending() && change.ripas == wanted) else {
            return Err(refusal(Cause::Invalid, RmiStatus::Input));
        };
        if base != change.addr || top > change.top {
            return Err(refusal(Cause::Invalid, RmiStatus::Input));
        }
        let changed = self.for_each_entry(base, top, |cca, at| cca.rmm.rtt_set_ripas(cca.rd, rec, at, top));
        if side == Side::Shared {
            let reached = self.rmm.rec(rec).map_or(base, |rec| rec.ripas_change().addr);
            self.destroy_data(base, reached);
        }
        changed
    }

    /// Repeats a command that stops at the end of a table or where it needs smaller entries.
    fn for_each_entry(
        &mut self,
        base: u64,
        top: u64,
        command: impl Fn(&mut Self, u64) -> Reply,
    ) -> Result<(), Refusal> {
        let mut at = base;
        while at < top {
            let reply = command(self, at);
            match reply.status {
                RmiStatus::Success => at = reply.x[0],
                RmiStatus::Rtt(level) if level < PAGE_LEVEL && self.is_split_needed(at, top, level) => {
                    self.ensure_tables(at, level + 1)?;
                }
                status => return Err(no_device(status)),
            }
        }
        Ok(())
    }

    /// Whether the entry of `level` at `at` reaches beyond `[at, top)`.
    fn is_split_needed(&self, at: u64, top: u64, level: u8) -> bool {
        let size = 1u64 << shift(level);
        !at.is_multiple_of(size) || top - at < size
    }

    /// The realm touches memory.
    pub fn guest_access(&mut self, mapping: Mapping, kind: AccessKind) -> GuestOutcome {
        let ipa = self.ipa(mapping.gfn, mapping.side);
        let Some(rec) = self.enter() else { return GuestOutcome::Exit(ExitReason::RealmAbort) };
        let Some(rtt) = self.realm().map(Realm::rtt).filter(|rtt| ipa < rtt.ipa_size()) else {
            return GuestOutcome::Exception(GuestException::ExternalAbort);
        };
        let walk = rtt.walk(ipa, PAGE_LEVEL);
        if self.translates(&walk.entry, walk.level, ipa, kind) {
            return GuestOutcome::Done;
        }
        let esr = syndrome(kind, walk.level);
        match self.rmm.realm_step(rec, RealmStep::Sync { esr, ipa, far: 0 }) {
            Ok(RealmOutcome::Exit(_)) if walk.entry.ripas() == Some(Ripas::Destroyed) => {
                GuestOutcome::Exit(ExitReason::RealmAbort)
            }
            Ok(RealmOutcome::Exit(_)) | Err(_) => GuestOutcome::Exit(ExitReason::NotPresent),
            Ok(RealmOutcome::Resumed) => GuestOutcome::Done,
            Ok(RealmOutcome::ExternalAbort | RealmOutcome::Undefined) => {
                GuestOutcome::Exception(GuestException::ExternalAbort)
            }
        }
    }

    /// Whether stage 2 and the granule protection check let the access through.
    fn translates(&self, entry: &Entry, level: u8, ipa: u64, kind: AccessKind) -> bool {
        match *entry {
            Entry::Assigned { ripas, .. } => ripas == Ripas::Ram,
            Entry::AssignedNs { attr, .. } => {
                let needed = match kind {
                    AccessKind::Load => 0x40,
                    AccessKind::Store => 0x80,
                    // Unprotected memory is never executable.
                    AccessKind::Fetch => return false,
                };
                let offset = ipa & ((1 << shift(level)) - 1) & !(GRANULE_SIZE - 1);
                let granule = Rtt::address(entry, level).unwrap_or(0) + offset;
                attr & needed != 0 && matches!(self.rmm.granule(granule), None | Some(GranuleState::Ns))
            }
            Entry::Unassigned(_) | Entry::UnassignedNs | Entry::Table(_) => false,
        }
    }

    /// Runs the REC if it does not run; a RIPAS change that the host has dealt with is answered by that.
    fn enter(&mut self) -> Option<u64> {
        let rec = self.rec.filter(|_| !self.dead)?;
        if self.rmm.rec(rec)?.is_running() {
            return Some(rec);
        }
        self.rmm.rec_enter(rec, self.scratch, RecEntry::default()).is_success().then_some(rec)
    }

    /// The realm asks for a RIPAS change of the mapping's pages. The REC exits with the request, which
    /// [`Cca::convert`] grants; the next step of the realm sees the answer.
    pub fn guest_accept(&mut self, mapping: Mapping, acceptance: Acceptance) -> GuestOutcome {
        let Some(rec) = self.enter() else { return GuestOutcome::Exit(ExitReason::RealmAbort) };
        let base = mapping.gfn.gpa();
        let top = base.saturating_add(mapping.level.pages() * PAGE_SIZE);
        let mut args = [0; 11];
        args[..5].copy_from_slice(&[rsi::IPA_STATE_SET, base, top, u64::from(acceptance == Acceptance::Accept), 1]);
        match self.rmm.realm_step(rec, RealmStep::Smc(args)) {
            Ok(RealmOutcome::Exit(_)) => GuestOutcome::Exit(ExitReason::RipasChange),
            // The monitor refuses a range outside the protected half without telling the host.
            _ => GuestOutcome::Exception(GuestException::CallRefused),
        }
    }

    /// The host touches a page: only its own are accessible, others are a granule protection fault.
    pub fn host_access(&mut self, pfn: Pfn, _kind: AccessKind) -> HostOutcome {
        match self.rmm.granule(address(pfn)) {
            None | Some(GranuleState::Ns) => HostOutcome::Plain,
            Some(_) => HostOutcome::Fault,
        }
    }

    /// The VM goes away: REC, data, tables, realm, and every granule back to the host.
    pub fn destroy(&mut self) {
        if let Some(rec) = self.rec.take() {
            self.destroy_rec(rec);
        }
        self.destroy_data(0, u64::MAX);
        self.destroy_tables();
        let roots = self.realm().map(|realm| (realm.rtt_base, realm.rtt_num_start));
        if let Some((base, count)) = roots
            && self.rmm.realm_destroy(self.rd).is_success()
        {
            (0..count).for_each(|table| self.give_back(base + table * GRANULE_SIZE));
            self.give_back(self.rd);
        }
    }

    fn destroy_rec(&mut self, rec: u64) {
        let aux = self.rmm.rec(rec).map(|rec| (rec.aux.clone(), rec.is_running()));
        let Some((aux, running)) = aux else { return };
        if running {
            // Destroying a VM kicks its vCPUs first.
            let _ = self.rmm.realm_step(rec, RealmStep::Irq);
        }
        self.rmm.rec_destroy(rec);
        aux.into_iter().chain([rec]).for_each(|granule| self.give_back(granule));
    }

    fn destroy_tables(&mut self) {
        for level in (0..PAGE_LEVEL).rev() {
            let parents: Vec<(u64, u64)> = self.realm().map_or_else(Vec::new, |realm| {
                let runs = realm.rtt().entries(level).filter(|(_, _, entry)| matches!(entry, Entry::Table(_)));
                runs.map(|(first, len, _)| (first, len)).collect()
            });
            for parent in parents.into_iter().flat_map(|(first, len)| first..first + len) {
                let reply = self.rmm.rtt_destroy(self.rd, parent << shift(level), u64::from(level + 1));
                if reply.is_success() {
                    self.give_back(reply.x[0]);
                }
            }
        }
    }

    /// Whether KVM has declared the VM dead, or it was destroyed.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead || self.realm().is_none()
    }
}

fn no_device(status: RmiStatus) -> Refusal {
    refusal(Cause::NoDevice, status)
}

fn done(reply: Reply) -> Result<(), RmiStatus> {
    if reply.is_success() { Ok(()) } else { Err(reply.status) }
}

/// ESR_EL2 of a translation fault at `level`.
fn syndrome(kind: AccessKind, level: u8) -> u64 {
    let class: u64 = match kind {
        AccessKind::Fetch => 0x20,
        AccessKind::Load | AccessKind::Store => 0x24,
    };
    let write = if kind == AccessKind::Store { 1 << 6 } else { 0 };
    class << 26 | write | (4 + u64::from(level))
}
