//! What KVM asks of TDX, in the order in which KVM issues the leaves (`arch/x86/kvm/vmx/tdx.c`, 7.2).
//!
//! TDX has neither a prepare nor a reclaim hook: a page changes hands when its mapping does. That is why an unmap that
//! ordinary memory would not notice destroys the page here, and why KVM declares the VM dead when a leaf is refused for
//! any reason but a lock. Where it meets a lock, a fault is tried again; what takes a mapping away cannot fail, so KVM keeps
//! all vCPUs out, whose locks they were, and repeats the leaf once.

use super::pamt::PageType;
use super::sept::SeptState;
use super::status::TdxStatus;
use super::tables::OpState;
use super::{Accepted, Answer, Lifecycle, PageInfo, Tdx};
use crate::addr::{Gfn, GfnRange, Level, PageNumber, Pfn, PfnRange};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestOutcome, HostOutcome, Mapping, Populate, PopulateKind,
    Refusal, Side, Status,
};

impl Tdx {
    /// Whether an access is private: the guest says so with the shared bit of the address.
    #[must_use]
    pub fn access_side(&self, claimed: Side, _attribute: Side) -> Side {
        claimed
    }

    /// The largest mapping: private memory is mapped in 4 KiB pages (`tdx_gmem_max_mapping_level`).
    #[must_use]
    pub fn max_level(&self, _pfn: Pfn, side: Side) -> Level {
        match side {
            Side::Private => Level::Page4K,
            Side::Shared => Level::Page1G,
        }
    }

    /// Nothing: TDX has no prepare hook.
    ///
    /// # Errors
    /// None; the signature is that of every architecture.
    pub fn make_private(&mut self, _gfn: Gfn, _pfn: Pfn) -> Result<(), Refusal> {
        Ok(())
    }

    /// Makes a mapping: missing tables, then PAGE.ADD before and PAGE.AUG after the TD is finalized.
    ///
    /// Shared mappings are not the module's business and always succeed.
    ///
    /// # Errors
    /// [`Cause::Busy`] for a lock: fault again. [`Cause::NoMemory`] when [`Config::tables`](super::Config::tables) are
    /// used up. [`Cause::VmDead`] for anything else, a level above 4 KiB included; the VM is dead from then on.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        if mapping.side == Side::Shared {
            return Ok(());
        }
        self.alive()?;
        if mapping.level != Level::Page4K {
            return Err(self.bug(TdxStatus::SUCCESS));
        }
        self.add_tables(mapping.gfn)?;
        let (at, page) = (page_info(mapping.gfn, 0), mapping.pfn.0.wrapping_shl(12));
        let answer =
            if self.op_state() == OpState::Runnable { self.page_aug(at, page) } else { self.page_add(at, page, 0) };
        self.require(answer)
    }

    fn add_tables(&mut self, gfn: Gfn) -> Result<(), Refusal> {
        loop {
            let (level, entry) = self.sept.walk(self.top_level(), 0, gfn.0);
            if level == 0 || entry.state != SeptState::Free {
                return Ok(());
            }
            let page = self.config.tables.start().checked_add(self.tables_used);
            let page = page.filter(|page| self.config.tables.contains(*page));
            let page = page.ok_or(Refusal { cause: Cause::NoMemory, status: Status::None })?;
            let answer = self.sept_add(page_info(gfn, level), page.0.wrapping_shl(12), 0);
            self.require(answer)?;
            self.tables_used += 1;
        }
    }

    /// Takes a mapping away: RANGE.BLOCK, TRACK and a kick of all vCPUs, PAGE.REMOVE.
    ///
    /// The guest's bytes are gone: a page that is mapped again comes back pending. A private mapping that does not exist
    /// makes the VM dead. Shared mappings keep their contents.
    pub fn unmap(&mut self, mapping: Mapping) -> Contents {
        if mapping.side == Side::Shared {
            return Contents::Kept;
        }
        let at = page_info(mapping.gfn, level_number(mapping.level));
        if self.try_unmap(at).is_err() {
            return Contents::Kept;
        }
        Contents::Undefined
    }

    fn try_unmap(&mut self, at: PageInfo) -> Result<(), Refusal> {
        self.without_vcpus(|td| td.range_block(at))?;
        if self.op_state() == OpState::Runnable {
            // `tdx_track()`: a new epoch, and an IPI that makes every vCPU enter it.
            self.without_vcpus(Self::track)?;
            self.kick();
        }
        self.without_vcpus(|td| td.page_remove(at))
    }

    /// `tdh_do_no_vcpus()`: a leaf that meets a lock is repeated once, with all vCPUs outside, and must succeed then.
    fn without_vcpus(&mut self, leaf: impl Fn(&mut Self) -> Answer) -> Result<(), Refusal> {
        let mut status = leaf(self).status;
        if status.code() == TdxStatus::OPERAND_BUSY {
            self.kick();
            status = leaf(self).status;
        }
        if status == TdxStatus::SUCCESS { Ok(()) } else { Err(self.bug(status)) }
    }

    /// KVM_REQ_OUTSIDE_GUEST_MODE: an IPI, upon which vCPUs leave. They enter again later.
    fn kick(&mut self) {
        self.end_accepts();
        self.tracking.kick();
    }

    /// Nothing: TDX has no invalidate hook. The unmap that follows does the work.
    pub fn invalidate(&mut self, _range: GfnRange) {}

    /// A page leaves the file. TDX has no reclaim hook: the bytes stay as they are.
    ///
    /// [`Contents::Undefined`] if a TD still owns one of the pages, which is a bug of the caller.
    pub fn reclaim(&mut self, range: PfnRange) -> Contents {
        let large = [1, 2].iter().any(|size| self.owns_any(*size, range));
        if large || self.owns_any(0, range) { Contents::Undefined } else { Contents::Kept }
    }

    fn owns_any(&self, size: u8, range: PfnRange) -> bool {
        let shift = super::sept::shift(size);
        let first = range.start().0 >> shift;
        let count = (range.end().0.saturating_sub(1) >> shift) - first + 1;
        self.pamt.runs(size, first, count).any(|(_, _, entry)| entry.page_type != PageType::Nda)
    }

    /// KVM_TDX_INIT_MEM_REGION, one page: PAGE.ADD and, if measured, 16 times MR.EXTEND.
    ///
    /// # Errors
    /// [`Cause::Invalid`] once finalized or for an address with the shared bit; [`Cause::NotSupported`] without a source
    /// and for kinds of pages that TDX does not have; [`Cause::Exists`] if the page is mapped; and those of [`map`](Self::map).
    pub fn populate(&mut self, gfn: Gfn, pfn: Pfn, page: Populate<'_>) -> Result<(), Refusal> {
        self.alive()?;
        let refuse = |cause| Err(Refusal { cause, status: Status::None });
        if self.op_state() == OpState::Runnable || !self.is_private_gpa(gfn.gpa()) {
            return refuse(Cause::Invalid);
        }
        let measured = match page.kind {
            PopulateKind::Measured => true,
            PopulateKind::Unmeasured => false,
            PopulateKind::Zero | PopulateKind::Secrets | PopulateKind::Cpuid => return refuse(Cause::NotSupported),
        };
        let Some(source) = page.source else { return refuse(Cause::NotSupported) };
        if self.sept.walk(self.top_level(), 0, gfn.0).1.state.is_leaf() {
            return refuse(Cause::Exists);
        }
        self.map(Mapping { gfn, pfn, level: Level::Page4K, side: Side::Private })?;
        if measured { self.extend_page(gfn, source) } else { Ok(()) }
    }

    fn extend_page(&mut self, gfn: Gfn, source: &[u8; 4096]) -> Result<(), Refusal> {
        for (i, chunk) in (0..).zip(source.as_chunks().0) {
            let answer = self.mr_extend(gfn.gpa().wrapping_add(i * 256), chunk);
            self.require(answer)?;
        }
        Ok(())
    }

    /// KVM_TDX_FINALIZE_VM.
    ///
    /// # Errors
    /// [`Cause::Invalid`] without a key or when finalized already; [`Cause::Busy`] for a lock; else the VM is dead.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        self.alive()?;
        if self.lifecycle() != Lifecycle::KeysConfigured || self.op_state() == OpState::Runnable {
            return Err(Refusal { cause: Cause::Invalid, status: Status::None });
        }
        let answer = self.mr_finalize();
        self.require(answer)
    }

    /// Whether KVM_PRE_FAULT_MEMORY works: only once finalized.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        !self.dead && self.op_state() == OpState::Runnable
    }

    /// A range changes sides. Only KVM's attributes change; the mappings of the old side are unmapped by the caller.
    ///
    /// # Errors
    /// [`Cause::VmDead`].
    pub fn convert(&mut self, _range: GfnRange, _to: Side) -> Result<(), Refusal> {
        self.alive()
    }

    /// The guest touches an address. A pending page that the TD takes no #VE for makes KVM declare the VM dead.
    pub fn guest_access(&mut self, mapping: Mapping, _kind: AccessKind) -> GuestOutcome {
        if mapping.side == Side::Shared {
            return GuestOutcome::Done;
        }
        let outcome = self.private_access(mapping.gfn.0);
        self.dead |= outcome == GuestOutcome::Exit(ExitReason::PendingTd);
        outcome
    }

    /// The guest accepts a page, as often as interrupts make it try. `Done` if the instruction returned, whatever it said.
    pub fn guest_accept(&mut self, mapping: Mapping, what: Acceptance) -> GuestOutcome {
        if mapping.side == Side::Shared || what == Acceptance::GiveUp {
            return GuestOutcome::Done;
        }
        let at = page_info(mapping.gfn, level_number(mapping.level));
        loop {
            match self.page_accept(at) {
                Accepted::Returned(_) => return GuestOutcome::Done,
                Accepted::TdExit(_) => return GuestOutcome::Exit(ExitReason::NotPresent),
                Accepted::Interrupted => {}
            }
        }
    }

    /// The host touches a page. Reading a page of the TD shows nothing of it; a write poisons the line for the guest.
    ///
    /// What hardware does on a read depends on its integrity mode; this model takes the one that gives no poison.
    #[must_use]
    pub fn host_access(&mut self, pfn: Pfn, kind: AccessKind) -> HostOutcome {
        match (self.pamt.leaf(pfn.0).1.page_type, kind) {
            (PageType::Nda | PageType::Reserved, _) => HostOutcome::Plain,
            (_, AccessKind::Store) => HostOutcome::MachineCheck,
            (_, AccessKind::Load | AccessKind::Fetch) => HostOutcome::Ciphertext,
        }
    }

    /// The VM goes away: the key is released, then every page is reclaimed, the TD root last.
    pub fn destroy(&mut self) {
        self.set_vcpus(0);
        self.lifecycle = Lifecycle::Teardown;
        // What TDH.PHYMEM.PAGE.RECLAIM of each page would leave, without visiting each page.
        self.pamt.clear();
        self.sept = super::Sept::default();
        self.locks = super::EntryLocks::default();
        self.child_pages = 0;
        self.rooted = false;
        self.dead = true;
    }

    /// Whether KVM has given the VM up.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead
    }

    fn alive(&self) -> Result<(), Refusal> {
        if self.dead { Err(Refusal { cause: Cause::VmDead, status: Status::None }) } else { Ok(()) }
    }

    /// `KVM_BUG_ON()`: a leaf failed in a way that KVM did not expect.
    fn bug(&mut self, status: TdxStatus) -> Refusal {
        self.dead = true;
        Refusal { cause: Cause::VmDead, status: Status::Tdx(status.0) }
    }

    fn require(&mut self, answer: Answer) -> Result<(), Refusal> {
        match answer.status {
            TdxStatus::SUCCESS => Ok(()),
            status if status.code() == TdxStatus::OPERAND_BUSY => {
                Err(Refusal { cause: Cause::Busy, status: Status::Tdx(status.0) })
            }
            status => Err(self.bug(status)),
        }
    }
}

fn level_number(level: Level) -> u8 {
    match level {
        Level::Page4K => 0,
        Level::Page2M => 1,
        Level::Page1G => 2,
    }
}

/// The operand for the entry of `level` that covers `gfn`.
fn page_info(gfn: Gfn, level: u8) -> PageInfo {
    let first = gfn.0 >> super::sept::shift(level) << super::sept::shift(level);
    PageInfo::new(Gfn(first).gpa(), level)
}
