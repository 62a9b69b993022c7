//! The SEAMCALL leaves that manage a TD's memory.
//!
//! Each leaf is a method that returns an [`Answer`]; inside, a refusal is the `Err` of a `Result`, so that the order of
//! the statements is the order of the checks and nothing is written before the last of them.

use super::pamt::{PageType, PamtEntry};
use super::sept::{SeptFlags, SeptState, Septe};
use super::status::{Operand, TdxStatus};
use super::tables::{self, Leaf, OpState};
use super::{Answer, Lifecycle, Measurement, NULL_PA, PageInfo, Tdx};
use crate::addr::Pfn;

type Checked<T> = Result<T, Answer>;

/// Where a command's walk ended.
#[derive(Clone, Copy)]
struct Located {
    gfn: u64,
    level: u8,
    entry: Septe,
}

impl Located {
    /// A refusal about the entry, which the caller is shown.
    fn refuse(self, status: TdxStatus) -> Answer {
        Answer::entry(status.about(Operand::Rcx), self.entry, self.level)
    }

    /// Whether the entry's state is in the leaf's row.
    fn require(self, leaf: &Leaf) -> Checked<()> {
        match leaf.allowed_from(self.entry.state) {
            Some(false) => Err(self.refuse(TdxStatus::EPT_ENTRY_STATE_INCORRECT)),
            _ => Ok(()),
        }
    }

    /// Frame number of the page or table that the entry refers to.
    fn pfn(self) -> u64 {
        self.entry.pfn(self.level)
    }

    /// Size of the PAMT entry of that page: tables are 4 KiB.
    fn size(self) -> u8 {
        if self.entry.state.is_leaf() { self.level } else { 0 }
    }
}

fn refuse(status: TdxStatus, operand: Operand) -> Answer {
    Answer::of(status.about(operand))
}

fn freed(pfn: u64) -> Answer {
    Answer { rcx: pfn << 12, ..Answer::default() }
}

fn either(result: Checked<Answer>) -> Answer {
    result.unwrap_or_else(|refused| refused)
}

impl Tdx {
    /// TDH.MEM.SEPT.ADD: an empty table in `page` becomes the target of a free entry.
    ///
    /// With version 1 `page` may be [`NULL_PA`], which changes nothing and needs a table to exist.
    pub fn sept_add(&mut self, at: PageInfo, page: u64, version: u8) -> Answer {
        either(self.try_sept_add(at, page, version))
    }

    /// TDH.MEM.SEPT.REMOVE: takes an empty table away; RCX is its page.
    pub fn sept_remove(&mut self, at: PageInfo, version: u8) -> Answer {
        either(self.try_sept_remove(at, version))
    }

    /// TDH.MEM.SEPT.RD: the entry in RCX, its level and state in RDX. Unlike other leaves that find the guest at the entry, it
    /// leaves no mark of the host's priority here, because it changes nothing.
    pub fn sept_read(&self, at: PageInfo) -> Answer {
        either(self.try_sept_read(at))
    }

    /// TDH.MEM.PAGE.ADD: `page`, with the contents of `source`, becomes measured guest memory.
    pub fn page_add(&mut self, at: PageInfo, page: u64, source: u64) -> Answer {
        either(self.try_page_add(at, page, source))
    }

    /// TDH.MEM.PAGE.AUG: `page` becomes guest memory that the guest has to accept. Legal before TDH.MR.FINALIZE, too.
    pub fn page_aug(&mut self, at: PageInfo, page: u64) -> Answer {
        either(self.try_page_aug(at, page))
    }

    /// TDH.MEM.PAGE.REMOVE: the page leaves the guest, unscrubbed; RCX is its address.
    pub fn page_remove(&mut self, at: PageInfo) -> Answer {
        either(self.try_page_remove(at))
    }

    /// TDH.MEM.PAGE.PROMOTE: 512 contiguous pages become one; RCX is the page of the table that they were in.
    pub fn page_promote(&mut self, at: PageInfo, version: u8) -> Answer {
        either(self.try_page_promote(at, version))
    }

    /// TDH.MEM.PAGE.DEMOTE: a page becomes 512, listed in a table in `page`. The block, if any, is gone.
    pub fn page_demote(&mut self, at: PageInfo, page: u64) -> Answer {
        either(self.try_page_demote(at, page))
    }

    /// TDH.MEM.PAGE.RELOCATE: the contents and the mapping move to `page`; RCX is the page that became free.
    pub fn page_relocate(&mut self, at: PageInfo, page: u64) -> Answer {
        either(self.try_page_relocate(at, page))
    }

    /// TDH.MEM.RANGE.BLOCK: no new translation goes through the entry.
    pub fn range_block(&mut self, at: PageInfo) -> Answer {
        either(self.try_range_block(at))
    }

    /// TDH.MEM.RANGE.UNBLOCK: undoes TDH.MEM.RANGE.BLOCK.
    pub fn range_unblock(&mut self, at: PageInfo) -> Answer {
        either(self.try_range_unblock(at))
    }

    /// TDH.MEM.TRACK: starts the next epoch. RCX and RDX are untouched by this leaf; the answer has zeros.
    pub fn track(&mut self) -> Answer {
        either(self.try_track())
    }

    /// TDH.MR.EXTEND: measures the 256 bytes at `gpa`.
    pub fn mr_extend(&mut self, gpa: u64, chunk: &[u8; 256]) -> Answer {
        either(self.try_mr_extend(gpa, chunk))
    }

    /// TDH.MR.FINALIZE: closes the measurement; vCPUs may run.
    pub fn mr_finalize(&mut self) -> Answer {
        either(self.try_mr_finalize())
    }

    /// TDH.PHYMEM.PAGE.RECLAIM: a page of a TD without key becomes free; RCX, RDX and R8 are its type, owner and size.
    pub fn page_reclaim(&mut self, page: u64) -> Answer {
        either(self.try_page_reclaim(page))
    }

    /// TDH.MNG.VPFLUSHDONE: no vCPU is on any processor any more.
    pub fn vp_flush_done(&mut self) -> Answer {
        either(self.try_vp_flush_done())
    }

    /// TDH.MNG.KEY.FREEID: releases the key id; the guest's memory can never be read again.
    pub fn key_free_id(&mut self) -> Answer {
        either(self.try_key_free_id())
    }

    // ---- checks that commands share ----

    pub(super) fn top_level(&self) -> u8 {
        self.config.gpa_width.top_level()
    }

    /// The TD named by `operand` exists.
    fn check_tdr(&self, operand: Operand) -> Checked<()> {
        if self.rooted { Ok(()) } else { Err(refuse(TdxStatus::PAGE_METADATA_INCORRECT, operand)) }
    }

    /// The TD is sound, has its keys, and `leaf` may run in its operation state.
    fn check_td_state(&self, leaf: &Leaf) -> Checked<()> {
        if self.fatal {
            return Err(Answer::of(TdxStatus::TD_FATAL));
        }
        if self.lifecycle != Lifecycle::KeysConfigured {
            return Err(Answer::of(TdxStatus::TD_KEYS_NOT_CONFIGURED));
        }
        match leaf.allowed_during(self.op_state) {
            Some(false) => Err(Answer::of(TdxStatus::OP_STATE_INCORRECT)),
            _ => Ok(()),
        }
    }

    fn begin(&self, leaf: &Leaf) -> Checked<()> {
        self.check_tdr(Operand::Rdx)?;
        self.check_td_state(leaf)
    }

    pub(super) fn is_private_gpa(&self, gpa: u64) -> bool {
        gpa >> self.config.gpa_width.shared_bit() == 0
    }

    /// Checks level, alignment and guest address, and walks to the entry.
    fn locate(&self, at: PageInfo, lowest: u8, highest: u8) -> Checked<Located> {
        let (level, gfn) = (at.level(), at.gfn());
        let aligned = gfn & ((1 << super::sept::shift(level)) - 1) == 0;
        if at.reserved() != 0 || !(lowest..=highest).contains(&level) || !aligned || !self.is_private_gpa(gfn << 12) {
            return Err(refuse(TdxStatus::OPERAND_INVALID, Operand::Rcx));
        }
        let (reached, entry) = self.sept.walk(self.top_level(), level, gfn);
        let found = Located { gfn, level: reached, entry };
        if reached == level { Ok(found) } else { Err(found.refuse(TdxStatus::EPT_WALK_FAILED)) }
    }

    /// The same, and takes the entry's lock.
    fn lock(&mut self, at: PageInfo, lowest: u8, highest: u8) -> Checked<Located> {
        let found = self.locate(at, lowest, highest)?;
        let taken = self.locks.take_by_host(found.level, found.gfn);
        if taken { Ok(found) } else { Err(found.refuse(TdxStatus::OPERAND_BUSY)) }
    }

    /// Where the TD may run, a page or table must be blocked and tracked before its mapping changes.
    fn check_tracked(&self, found: Located) -> Checked<()> {
        let required = found.entry.state.has(SeptFlags::TLB_TRACKING_REQUIRED) && self.op_state.requires_tracking();
        if !required {
            return Ok(());
        }
        if !found.entry.state.has(SeptFlags::ANY_BLOCKED) {
            return Err(found.refuse(TdxStatus::GPA_RANGE_NOT_BLOCKED));
        }
        let bepoch = self.pamt.entry(found.size(), found.pfn()).bepoch;
        if self.tracking.is_tracked(bepoch) {
            Ok(())
        } else {
            Err(refuse(TdxStatus::TLB_TRACKING_NOT_DONE, Operand::Rcx))
        }
    }

    /// A physical address that a caller gives for a page of the TD: aligned, without key id, within the machine.
    fn check_hpa(&self, hpa: u64, size: u8, operand: Operand) -> Checked<u64> {
        let aligned = hpa & ((4096 << super::sept::shift(size)) - 1) == 0;
        if !aligned || hpa >> self.config.hkid_start_bit.min(63) != 0 {
            return Err(refuse(TdxStatus::OPERAND_INVALID, operand));
        }
        let pfn = hpa >> 12;
        if self.pamt.range().contains(Pfn(pfn)) {
            Ok(pfn)
        } else {
            Err(refuse(TdxStatus::OPERAND_ADDR_RANGE_ERROR, operand))
        }
    }

    /// A free page of `size` (0 = 4 KiB, 1 = 2 MiB) that a command is about to use.
    fn free_page(&self, hpa: u64, size: u8, operand: Operand) -> Checked<u64> {
        let pfn = self.check_hpa(hpa, size, operand)?;
        // The command holds the PAMT locks on the way to its own TDR; taking one of them exclusively fails.
        if pfn == self.config.tdr.0 >> super::sept::shift(size) << super::sept::shift(size) {
            return Err(refuse(TdxStatus::OPERAND_BUSY, operand));
        }
        let (covered_by, entry) = self.pamt.leaf(pfn);
        if covered_by > 0 || entry.page_type != PageType::Nda || size > 0 && !self.pamt.is_2m_free(pfn) {
            return Err(refuse(TdxStatus::PAGE_METADATA_INCORRECT, operand));
        }
        Ok(pfn)
    }

    /// A page of the host that a command reads.
    fn check_source(&self, hpa: u64) -> Checked<()> {
        // Every key id but zero is taken to be a private one: how many are shared is a matter of the platform. The
        // module's own memory (SEAMRR) is not modelled.
        if hpa & 0xfff != 0 || hpa >> self.config.hkid_start_bit.min(63) != 0 {
            return Err(refuse(TdxStatus::OPERAND_INVALID, Operand::R9));
        }
        Ok(())
    }

    fn check_version(version: u8) -> Checked<()> {
        if version > 1 { Err(refuse(TdxStatus::OPERAND_INVALID, Operand::Rax)) } else { Ok(()) }
    }

    fn check_interrupt(&mut self, at: PageInfo) -> Checked<()> {
        // The leaf returns its operands unchanged so that the caller can repeat it.
        if self.interrupt_pending() {
            let status = TdxStatus::INTERRUPTED_RESTARTABLE;
            return Err(Answer { status, rcx: at.0, rdx: self.tdr(), r8: 0 });
        }
        Ok(())
    }

    fn own(&mut self, size: u8, pfn: u64, page_type: PageType) {
        self.pamt.set(size, pfn, PamtEntry { page_type, owner: self.tdr(), bepoch: 0 });
    }

    // ---- tables ----

    fn try_sept_read(&self, at: PageInfo) -> Checked<Answer> {
        self.begin(&tables::SEPT_RD)?;
        let found = self.locate(at, 0, self.top_level())?;
        let busy = self.locks.held_by_guest(found.level, found.gfn);
        let status = if busy { TdxStatus::OPERAND_BUSY.about(Operand::Rcx) } else { TdxStatus::SUCCESS };
        Ok(Answer::entry(status, found.entry, found.level))
    }

    fn try_sept_add(&mut self, at: PageInfo, page: u64, version: u8) -> Checked<Answer> {
        Self::check_version(version)?;
        self.begin(&tables::SEPT_ADD)?;
        let found = self.lock(at, 1, self.top_level())?;
        found.require(&tables::SEPT_ADD)?;
        if page == NULL_PA {
            return Self::check_no_page(found, version);
        }
        if found.entry.state != SeptState::Free {
            return Err(found.refuse(TdxStatus::EPT_ENTRY_STATE_INCORRECT));
        }
        // Bit 63 marks a page that an earlier, interrupted call did not use.
        let pfn = self.free_page(page & !(1 << 63), 0, Operand::R8)?;
        self.own(0, pfn, PageType::Ept);
        self.sept.set(found.level, found.gfn, found.entry.state, Septe::table(pfn));
        self.child_pages = self.child_pages.wrapping_add(1);
        Ok(Answer::default())
    }

    fn check_no_page(found: Located, version: u8) -> Checked<Answer> {
        match (version, found.entry.state) {
            (0, _) => Err(refuse(TdxStatus::OPERAND_INVALID, Operand::R8)),
            (_, SeptState::NlMapped) => Ok(Answer::default()),
            _ => Err(found.refuse(TdxStatus::EPT_ENTRY_STATE_INCORRECT)),
        }
    }

    fn try_sept_remove(&mut self, at: PageInfo, version: u8) -> Checked<Answer> {
        Self::check_version(version)?;
        self.begin(&tables::SEPT_REMOVE)?;
        let found = self.lock(at, 1, self.top_level())?;
        found.require(&tables::SEPT_REMOVE)?;
        self.check_tracked(found)?;
        if self.sept.children(found.level, found.gfn).next().is_some() {
            return Err(found.refuse(TdxStatus::EPT_PAGE_NOT_FREE));
        }
        self.sept.set(found.level, found.gfn, found.entry.state, Septe::FREE);
        Ok(self.free_table(found.pfn()))
    }

    fn free_table(&mut self, pfn: u64) -> Answer {
        self.pamt.set_type(0, pfn, PageType::Nda);
        self.child_pages = self.child_pages.wrapping_sub(1);
        freed(pfn)
    }

    // ---- pages ----

    fn try_page_add(&mut self, at: PageInfo, page: u64, source: u64) -> Checked<Answer> {
        self.begin(&tables::PAGE_ADD)?;
        // With the lock of the whole tree, and none of the entry.
        let found = self.locate(at, 0, 0)?;
        found.require(&tables::PAGE_ADD)?;
        self.check_source(source)?;
        let pfn = self.free_page(page, 0, Operand::R8)?;
        self.map_page(found, pfn, SeptState::Mapped);
        if let Measurement::Open(mrtd) = &mut self.measurement {
            mrtd.page_add(found.gfn << 12);
        }
        Ok(Answer::default())
    }

    fn try_page_aug(&mut self, at: PageInfo, page: u64) -> Checked<Answer> {
        self.begin(&tables::PAGE_AUG)?;
        let found = self.lock(at, 0, 1)?;
        found.require(&tables::PAGE_AUG)?;
        let pfn = self.free_page(page, found.level, Operand::R8)?;
        self.map_page(found, pfn, SeptState::Pending);
        Ok(Answer::default())
    }

    fn map_page(&mut self, found: Located, pfn: u64, state: SeptState) {
        self.own(found.level, pfn, PageType::Reg);
        self.sept.set(found.level, found.gfn, found.entry.state, Septe::leaf(state, pfn, found.level));
        self.child_pages = self.child_pages.wrapping_add(1 << super::sept::shift(found.level));
    }

    fn try_page_remove(&mut self, at: PageInfo) -> Checked<Answer> {
        self.begin(&tables::PAGE_REMOVE)?;
        let found = self.lock(at, 0, 2)?;
        found.require(&tables::PAGE_REMOVE)?;
        self.check_tracked(found)?;
        let left = if self.op_state.import_in_progress() { Septe::REMOVED } else { Septe::FREE };
        self.sept.set(found.level, found.gfn, found.entry.state, left);
        self.pamt.set_type(found.level, found.pfn(), PageType::Nda);
        self.child_pages = self.child_pages.wrapping_sub(1 << super::sept::shift(found.level));
        Ok(freed(found.pfn()))
    }

    fn try_page_promote(&mut self, at: PageInfo, version: u8) -> Checked<Answer> {
        Self::check_version(version)?;
        self.begin(&tables::PAGE_PROMOTE)?;
        let found = self.lock(at, 1, 2)?;
        found.require(&tables::PAGE_PROMOTE)?;
        self.check_tracked(found)?;
        if !self.locks.take_children_by_host(found.level, found.gfn) {
            return Err(found.refuse(TdxStatus::OPERAND_BUSY));
        }
        let first = self.mergeable(found).ok_or_else(|| found.refuse(TdxStatus::EPT_INVALID_PROMOTE_CONDITIONS))?;
        self.check_interrupt(at)?;
        let pfn = first.pfn(found.level - 1);
        self.pamt.promote(found.level, pfn);
        self.sept.set_children(found.level, found.gfn, Septe::FREE);
        let merged = Septe::leaf(first.state, pfn, found.level).with_accepted(first.accepted);
        self.sept.set(found.level, found.gfn, found.entry.state, merged);
        Ok(self.free_table(found.pfn()))
    }

    /// The first of 512 entries that are all MAPPED or all PENDING and map one aligned range.
    fn mergeable(&self, found: Located) -> Option<Septe> {
        let mut children = self.sept.children(found.level, found.gfn);
        let (0, mut covered, first) = children.next()? else { return None };
        let below = found.level.checked_sub(1)?;
        let aligned = first.pfn(below) & ((1 << super::sept::shift(found.level)) - 1) == 0;
        // A half-accepted 2 MiB page counts as pending: the counters are not compared, and the first one stays.
        let expected = first.without_counter();
        let continues = |at: u64, entry: Septe| entry.without_counter() == crate::runs::Linear::advance(&expected, at);
        for (at, count, entry) in children {
            if at != covered || !continues(at, entry) {
                return None;
            }
            covered += count;
        }
        (covered == 512 && aligned && first.state.has(SeptFlags::MAPPED_OR_PENDING)).then_some(first)
    }

    fn try_page_demote(&mut self, at: PageInfo, page: u64) -> Checked<Answer> {
        self.begin(&tables::PAGE_DEMOTE)?;
        let found = self.lock(at, 1, 2)?;
        found.require(&tables::PAGE_DEMOTE)?;
        self.check_tracked(found)?;
        let table = self.free_page(page, 0, Operand::R8)?;
        self.check_interrupt(at)?;
        self.pamt.demote(found.level, found.pfn());
        let child = Septe::leaf(found.entry.state.unblocked(), found.pfn(), found.level - 1);
        self.sept.set(found.level, found.gfn, found.entry.state, Septe::table(table));
        self.sept.set_children(found.level, found.gfn, child);
        // Unlike SEPT.ADD this leaf leaves the page's old epoch in place.
        let bepoch = self.pamt.entry(0, table).bepoch;
        self.pamt.set(0, table, PamtEntry { page_type: PageType::Ept, owner: self.tdr(), bepoch });
        self.child_pages = self.child_pages.wrapping_add(1);
        Ok(Answer::default())
    }

    fn try_page_relocate(&mut self, at: PageInfo, page: u64) -> Checked<Answer> {
        self.begin(&tables::PAGE_RELOCATE)?;
        let found = self.lock(at, 0, 0)?;
        found.require(&tables::PAGE_RELOCATE)?;
        let old = found.pfn();
        if page == old << 12 {
            return Err(refuse(TdxStatus::OPERAND_INVALID, Operand::R8));
        }
        self.check_tracked(found)?;
        let pfn = self.free_page(page, 0, Operand::R8)?;
        self.pamt.set_type(0, old, PageType::Nda);
        self.own(0, pfn, PageType::Reg);
        self.sept.set(0, found.gfn, found.entry.state, Septe::leaf(found.entry.state.unblocked(), pfn, 0));
        Ok(freed(old))
    }

    // ---- blocking and tracking ----

    fn try_range_block(&mut self, at: PageInfo) -> Checked<Answer> {
        self.begin(&tables::RANGE_BLOCK)?;
        let found = self.lock(at, 0, self.top_level())?;
        if found.entry.state.has(SeptFlags::ANY_BLOCKED) {
            return Err(found.refuse(TdxStatus::GPA_RANGE_ALREADY_BLOCKED));
        }
        found.require(&tables::RANGE_BLOCK)?;
        let Some(state) = found.entry.state.blocked() else {
            return Err(found.refuse(TdxStatus::EPT_ENTRY_STATE_INCORRECT));
        };
        // A later ACCEPT starts again, but only 2 MiB entries have their counter cleared here.
        let entry = if found.level == 1 { found.entry.without_counter() } else { found.entry };
        self.sept.set(found.level, found.gfn, found.entry.state, entry.with(state));
        let (size, pfn) = (found.size(), found.pfn());
        let (bepoch, entry) = (self.tracking.epoch(), self.pamt.entry(size, pfn));
        if entry.bepoch != bepoch {
            self.pamt.set(size, pfn, PamtEntry { bepoch, ..entry });
        }
        Ok(Answer::default())
    }

    fn try_range_unblock(&mut self, at: PageInfo) -> Checked<Answer> {
        self.begin(&tables::RANGE_UNBLOCK)?;
        let found = self.lock(at, 0, self.top_level())?;
        found.require(&tables::RANGE_UNBLOCK)?;
        self.check_tracked(found)?;
        self.sept.set(found.level, found.gfn, found.entry.state, found.entry.with(found.entry.state.unblocked()));
        Ok(Answer::default())
    }

    fn try_track(&mut self) -> Checked<Answer> {
        self.check_tdr(Operand::Rcx)?;
        self.check_td_state(&tables::TRACK)?;
        if self.tracking.advance() {
            Ok(Answer::default())
        } else {
            Err(Answer::of(TdxStatus::PREVIOUS_TLB_EPOCH_BUSY))
        }
    }

    // ---- measurement ----

    fn try_mr_extend(&mut self, gpa: u64, chunk: &[u8; 256]) -> Checked<Answer> {
        self.begin(&tables::MR_EXTEND)?;
        if gpa & 0xff != 0 || !self.is_private_gpa(gpa) {
            return Err(refuse(TdxStatus::OPERAND_INVALID, Operand::Rcx));
        }
        let (level, entry) = self.sept.walk(self.top_level(), 0, gpa >> 12);
        if !entry.state.is_leaf() || entry.state.permissions() == 0 {
            return Err(Answer::entry(TdxStatus::EPT_ENTRY_NOT_PRESENT.about(Operand::Rcx), entry, level));
        }
        if tables::MR_EXTEND.allowed_from(entry.state) == Some(false) {
            return Err(Answer::of(TdxStatus::EPT_ENTRY_NOT_PRESENT));
        }
        if let Measurement::Open(mrtd) = &mut self.measurement {
            mrtd.extend(gpa, chunk);
        }
        Ok(Answer::default())
    }

    fn try_mr_finalize(&mut self) -> Checked<Answer> {
        self.check_tdr(Operand::Rcx)?;
        self.check_td_state(&tables::MR_FINALIZE)?;
        if self.tracking.vcpus() == 0 {
            return Err(Answer::of(TdxStatus::NO_VCPUS));
        }
        if let Measurement::Open(mrtd) = &self.measurement {
            self.measurement = Measurement::Final(mrtd.digest());
        }
        self.op_state = OpState::Runnable;
        Ok(Answer::default())
    }

    // ---- teardown ----

    fn try_page_reclaim(&mut self, page: u64) -> Checked<Answer> {
        let pfn = self.check_hpa(page, 0, Operand::Rcx)?;
        let (size, entry) = self.pamt.leaf(pfn);
        if matches!(entry.page_type, PageType::Nda | PageType::Reserved) {
            return Err(refuse(TdxStatus::PAGE_METADATA_INCORRECT, Operand::Rcx));
        }
        // Type, owner and size are reported whatever comes next.
        let report = |status| Answer { status, rcx: entry.page_type as u64, rdx: entry.owner, r8: u64::from(size) };
        let pages = 1 << super::sept::shift(size);
        if pfn & (pages - 1) != 0 {
            return Err(report(TdxStatus::OPERAND_INVALID.about(Operand::Rcx)));
        }
        if self.lifecycle != Lifecycle::Teardown {
            return Err(report(TdxStatus::LIFECYCLE_STATE_INCORRECT));
        }
        if entry.page_type != PageType::Tdr {
            self.child_pages = self.child_pages.wrapping_sub(pages);
        } else if self.child_pages != 0 {
            return Err(report(TdxStatus::TD_ASSOCIATED_PAGES_EXIST));
        }
        self.rooted &= entry.page_type != PageType::Tdr;
        self.pamt.set(size, pfn, PamtEntry { page_type: PageType::Nda, ..entry });
        Ok(report(TdxStatus::SUCCESS))
    }

    fn try_vp_flush_done(&mut self) -> Checked<Answer> {
        self.check_tdr(Operand::Rcx)?;
        if self.lifecycle > Lifecycle::KeysConfigured {
            return Err(Answer::of(TdxStatus::LIFECYCLE_STATE_INCORRECT));
        }
        // A vCPU outside counts as flushed: TDH.VP.FLUSH is not modelled.
        if self.tracking.any_inside() {
            return Err(Answer::of(TdxStatus::FLUSHVP_NOT_DONE));
        }
        self.lifecycle = Lifecycle::Blocked;
        Ok(Answer::default())
    }

    fn try_key_free_id(&mut self) -> Checked<Answer> {
        self.check_tdr(Operand::Rcx)?;
        if self.lifecycle != Lifecycle::Blocked {
            return Err(Answer::of(TdxStatus::LIFECYCLE_STATE_INCORRECT));
        }
        self.lifecycle = Lifecycle::Teardown;
        Ok(Answer::default())
    }
}
