//! The reverse map table: one entry per 4 KiB page of host memory, and the host's instructions on it.
//!
//! Sources: AMD64 APM volume 2, section 15.36; Microsoft's descriptions of the intrinsics `__rmpupdate` and `__psmash`;
//! Linux `arch/x86/virt/svm/sev.c`. Where these leave a choice open, the comment says so with the word *choice*.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;

use bitflags::bitflags;

use crate::addr::{Gfn, Level, PageNumber, Pfn, PfnRange};
use crate::runs::{Linear, RunMap, Span};

/// An address space identifier. Zero is the host's; an RMP entry has room for ten bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Asid(pub u16);

impl Asid {
    /// The host, and the firmware.
    pub const HOST: Self = Self(0);
    /// The largest number that an entry can hold.
    pub const MAX: Self = Self(0x3ff);
}

/// Answer of RMPUPDATE, PSMASH, PVALIDATE, RMPADJUST, RMPQUERY and RMPREAD in EAX, other than success.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u32)]
pub enum RmpError {
    /// An operand is misaligned, out of range or not covered by the table.
    Input = 1,
    /// The executing guest or VMPL, or the state of the entry, does not permit it.
    Permission = 2,
    /// The entry is locked, or the page is an active VMCB or VMSA.
    InUse = 3,
    /// A 4 KiB entry and a 2 MiB entry would cover the same page.
    Overlap = 4,
    /// The guest's request and the entry differ in size.
    SizeMismatch = 6,
    /// PSMASH: not the address of a 2 MiB region of the table.
    BadAddress = 7,
}

impl RmpError {
    /// EAX.
    #[must_use]
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// Size of an RMP entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RmpSize {
    /// 4 KiB.
    Page4K,
    /// 2 MiB.
    Page2M,
}

impl RmpSize {
    /// Base pages of an entry of this size.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.level().pages()
    }

    /// The mapping level of the same size.
    #[must_use]
    pub const fn level(self) -> Level {
        match self {
            Self::Page4K => Level::Page4K,
            Self::Page2M => Level::Page2M,
        }
    }

    /// Whether a page number is a multiple of the size.
    #[must_use]
    pub const fn aligned(self, page: u64) -> bool {
        page & (self.pages() - 1) == 0
    }
}

bitflags! {
    /// Bits of an RMP entry.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct EntryBits: u8 {
        /// A guest or the firmware owns the page.
        const ASSIGNED = 1 << 0;
        /// The page belongs to a 2 MiB entry.
        const LARGE = 1 << 1;
        /// RMPUPDATE is refused.
        const IMMUTABLE = 1 << 2;
        /// The page holds a VMSA.
        const VMSA = 1 << 3;
        /// The guest has accepted the page.
        const VALIDATED = 1 << 4;
    }

    /// What a VMPL may do with a page.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Permissions: u8 {
        /// Data reads.
        const READ = 1 << 0;
        /// Data writes.
        const WRITE = 1 << 1;
        /// Instruction fetches at CPL 3.
        const EXECUTE_USER = 1 << 2;
        /// Instruction fetches below CPL 3.
        const EXECUTE_SUPERVISOR = 1 << 3;
        /// Supervisor shadow stack.
        const SHADOW_STACK = 1 << 4;
    }
}

/// Permissions after a page has changed hands: everything for VMPL0, nothing for the others.
pub const RESET_PERMISSIONS: [Permissions; 4] =
    [Permissions::all(), Permissions::empty(), Permissions::empty(), Permissions::empty()];

/// The entry of one 4 KiB page. A page of a 2 MiB entry has its own guest address here, as PSMASH would give it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entry {
    /// Guest page that the host page backs.
    pub gfn: Gfn,
    /// Owner.
    pub asid: Asid,
    /// State bits.
    pub bits: EntryBits,
    /// Permissions of VMPL0 to VMPL3.
    pub permissions: [Permissions; 4],
}

impl Linear for Entry {
    /// Guest pages follow one another; the address field of firmware pages is not an address and stays.
    fn advance(&self, pages: u64) -> Self {
        let step = if self.asid == Asid::HOST { 0 } else { pages };
        Self { gfn: Gfn(self.gfn.0.wrapping_add(step)), ..*self }
    }
}

/// States that the SNP firmware ABI (56860, "page states") derives from an entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageState {
    /// The host's own page.
    Hypervisor,
    /// The host's for as long as SNP is on; only SNP_SHUTDOWN frees it.
    HvFixed,
    /// The firmware's.
    Firmware,
    /// Given back by the firmware; the host may take it with RMPUPDATE.
    Reclaim,
    /// A guest context.
    Context,
    /// Metadata of pages that were swapped out.
    Metadata,
    /// A guest's, immutable, before SNP_LAUNCH_UPDATE.
    PreGuest,
    /// A guest's validated page, immutable, before it is swapped out.
    PreSwap,
    /// A guest's, not accepted.
    GuestInvalid,
    /// A guest's, accepted.
    GuestValid,
}

impl Entry {
    /// The size of the entry that the page belongs to.
    #[must_use]
    pub const fn size(&self) -> RmpSize {
        if self.bits.contains(EntryBits::LARGE) { RmpSize::Page2M } else { RmpSize::Page4K }
    }

    /// Whether a guest or the firmware owns the page.
    #[must_use]
    pub const fn assigned(&self) -> bool {
        self.bits.contains(EntryBits::ASSIGNED)
    }

    /// The state that the firmware would read.
    #[must_use]
    pub fn state(&self) -> PageState {
        let immutable = self.bits.contains(EntryBits::IMMUTABLE);
        let validated = self.bits.contains(EntryBits::VALIDATED);
        match (self.assigned(), self.asid == Asid::HOST) {
            (false, _) if immutable => PageState::HvFixed,
            (false, _) => PageState::Hypervisor,
            (true, true) => self.firmware_state(immutable),
            (true, false) => match (immutable, validated) {
                (true, false) => PageState::PreGuest,
                (true, true) => PageState::PreSwap,
                (false, false) => PageState::GuestInvalid,
                (false, true) => PageState::GuestValid,
            },
        }
    }

    fn firmware_state(&self, immutable: bool) -> PageState {
        match immutable {
            false => PageState::Reclaim,
            true if self.bits.contains(EntryBits::VMSA) => PageState::Context,
            true if self.gfn != Gfn(0) => PageState::Metadata,
            true => PageState::Firmware,
        }
    }

    /// Whether two entries agree in everything that RMPUPDATE resets a page for: owner, guest address, size. One that is no
    /// guest's is reset always.
    fn same_owner(&self, other: &Self) -> bool {
        let deciding = EntryBits::ASSIGNED | EntryBits::LARGE;
        let same = self.asid == other.asid && self.gfn == other.gfn;
        same && self.asid != Asid::HOST && (self.bits & deciding) == (other.bits & deciding)
    }
}

/// The state that RMPUPDATE is asked to give a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmpUpdate {
    /// Guest page; ignored when the page becomes the host's.
    pub gfn: Gfn,
    /// Whether a guest or the firmware will own the page.
    pub assigned: bool,
    /// Whether later RMPUPDATEs are to be refused.
    pub immutable: bool,
    /// Size of the entry.
    pub size: RmpSize,
    /// Owner; zero with `assigned` makes a firmware page.
    pub asid: Asid,
}

impl RmpUpdate {
    /// The update that makes pages the host's again, `rmp_make_shared()` in Linux.
    #[must_use]
    pub const fn shared(size: RmpSize) -> Self {
        Self { gfn: Gfn(0), assigned: false, immutable: false, size, asid: Asid::HOST }
    }

    /// The update that gives pages to a guest, `rmp_make_private()` in Linux.
    #[must_use]
    pub const fn private(gfn: Gfn, size: RmpSize, asid: Asid, immutable: bool) -> Self {
        Self { gfn, assigned: true, immutable, size, asid }
    }

    /// The update that gives a page to the firmware.
    #[must_use]
    pub const fn firmware() -> Self {
        Self { gfn: Gfn(0), assigned: true, immutable: true, size: RmpSize::Page4K, asid: Asid::HOST }
    }

    /// Choice: an unassigned page with an owner or the immutable bit, an owner that no entry can hold and a guest
    /// address that is misaligned or too wide are bad operands (code 1); VeriSMo's model faults instead.
    fn legal(&self) -> bool {
        if !self.assigned {
            return !self.immutable && self.asid == Asid::HOST;
        }
        self.asid <= Asid::MAX && self.size.aligned(self.gfn.0) && self.gfn.0 < 1 << 40
    }

    fn entry(&self) -> Entry {
        let mut bits = EntryBits::empty();
        bits.set(EntryBits::ASSIGNED, self.assigned);
        bits.set(EntryBits::LARGE, self.size == RmpSize::Page2M);
        bits.set(EntryBits::IMMUTABLE, self.immutable);
        Entry { gfn: self.gfn, asid: self.asid, bits, permissions: RESET_PERMISSIONS }
    }
}

/// The table. Pages without an entry are the host's; pages outside `covered` are the host's for ever.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rmp {
    covered: PfnRange,
    entries: RunMap<Entry>,
    in_use: BTreeSet<Pfn>,
}

impl Rmp {
    /// A table that covers these pages, all of them the host's.
    #[must_use]
    pub fn new(covered: PfnRange) -> Self {
        Self { covered, entries: RunMap::new(), in_use: BTreeSet::new() }
    }

    /// The pages that have entries.
    #[must_use]
    pub const fn covered(&self) -> PfnRange {
        self.covered
    }

    /// The entry of a page; `None` for the host's pages, covered or not.
    #[must_use]
    pub fn entry(&self, pfn: Pfn) -> Option<Entry> {
        self.entries.get(pfn.0)
    }

    /// What the firmware, or Linux's `snp_lookup_rmpentry()`, would say of a page; `None` outside the table.
    #[must_use]
    pub fn state(&self, pfn: Pfn) -> Option<PageState> {
        self.covered.contains(pfn).then(|| self.entry(pfn).map_or(PageState::Hypervisor, |entry| entry.state()))
    }

    /// Whether every page of a range belongs to the host, which is what a host write through a mapping of that size
    /// needs. Pages outside the table always do.
    #[must_use]
    pub fn hypervisor_owned(&self, range: PfnRange) -> bool {
        !self.runs(range).any(|(_, entry)| entry.assigned())
    }

    /// The runs of entries that have pages in a range, cut to it. Host pages have none.
    pub fn runs(&self, range: PfnRange) -> impl Iterator<Item = (PfnRange, Entry)> {
        self.entries
            .runs(range.start().0, range.len())
            .filter_map(|(first, pages, entry)| Some((PfnRange::with_len(Pfn(first), pages)?, entry)))
    }

    /// Every run of entries in ascending order.
    pub fn all_runs(&self) -> impl Iterator<Item = (PfnRange, Entry)> {
        self.entries.iter().filter_map(|(first, pages, entry)| Some((PfnRange::with_len(Pfn(first), pages)?, *entry)))
    }

    /// Number of runs, a measure of memory.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.entries.run_count()
    }

    /// Marks a page as held by a running vCPU, another CPU or the firmware: updates answer
    /// [`RmpError::InUse`] until [`Rmp::unlock`].
    pub fn lock(&mut self, pfn: Pfn) {
        self.in_use.insert(pfn);
    }

    /// Ends [`Rmp::lock`].
    pub fn unlock(&mut self, pfn: Pfn) {
        self.in_use.remove(&pfn);
    }

    /// Whether [`Rmp::lock`] is in force for a page.
    #[must_use]
    pub fn is_locked(&self, pfn: Pfn) -> bool {
        self.in_use.contains(&pfn)
    }

    /// RMPUPDATE, executed by the host.
    ///
    /// A change of owner, guest address or size resets Validated, VMSA and the permissions. Choice: an update that
    /// changes none of them, and so one that only sets Immutable, keeps them; otherwise no page could reach the
    /// firmware's PRE_SWAP state. Choice: the checks apply in the order of their codes.
    ///
    /// # Errors
    /// [`RmpError::Input`], [`RmpError::Permission`] (immutable), [`RmpError::InUse`], [`RmpError::Overlap`].
    pub fn rmpupdate(&mut self, pfn: Pfn, update: RmpUpdate) -> Result<(), RmpError> {
        let range = self.operand(pfn, update.size).filter(|_| update.legal()).ok_or(RmpError::Input)?;
        let unlocked = self.check_unlocked(range);
        let page = self.entries.span(range.start().0, range.len());
        let old = page.first();
        check_mutable(&page, old, update.size)?;
        unlocked?;
        check_overlap(&page, old, update.size)?;
        write(page, old, update);
        Ok(())
    }

    fn operand(&self, pfn: Pfn, size: RmpSize) -> Option<PfnRange> {
        let range = PfnRange::with_len(pfn, size.pages())?;
        (size.aligned(pfn.0) && self.covered.covers(range)).then_some(range)
    }

    fn check_unlocked(&self, range: PfnRange) -> Result<(), RmpError> {
        let locked = !self.in_use.is_empty() && self.in_use.range(range.start()..range.end()).next().is_some();
        if locked { Err(RmpError::InUse) } else { Ok(()) }
    }

    /// PSMASH, executed by the host: a 2 MiB entry becomes 512 of 4 KiB in the same state.
    ///
    /// Choice: an address that is misaligned or outside the table is 7, one that has no 2 MiB entry is 1.
    ///
    /// # Errors
    /// [`RmpError::BadAddress`], [`RmpError::Input`], [`RmpError::InUse`].
    pub fn psmash(&mut self, pfn: Pfn) -> Result<(), RmpError> {
        let range = self.operand(pfn, RmpSize::Page2M).ok_or(RmpError::BadAddress)?;
        let entry = self.entry(pfn).filter(|entry| entry.size() == RmpSize::Page2M).ok_or(RmpError::Input)?;
        self.check_unlocked(range)?;
        self.set(range, Entry { bits: entry.bits - EntryBits::LARGE, ..entry });
        Ok(())
    }

    /// Makes every page of a range the host's, as RMPUPDATE on each of its entries would, at the cost of its runs.
    ///
    /// 2 MiB entries that reach over an end of the range are smashed first. Immutable and locked entries refuse and
    /// stay. Returns the number of pages that changed hands.
    pub fn release(&mut self, range: PfnRange) -> u64 {
        self.smash_edge(range.start());
        self.smash_edge(range.end());
        let runs: Vec<_> = self.runs(range).collect();
        runs.into_iter().map(|(run, entry)| self.release_run(run, entry)).sum()
    }

    fn smash_edge(&mut self, edge: Pfn) {
        let head = edge.align_down(Level::Page2M);
        if head != edge && self.entry(edge).is_some_and(|entry| entry.size() == RmpSize::Page2M) {
            // A locked entry refuses, and then stays whole below as well.
            let _ = self.psmash(head);
        }
    }

    fn release_run(&mut self, run: PfnRange, entry: Entry) -> u64 {
        let whole = whole_entries(run, entry.size()).filter(|_| !entry.bits.contains(EntryBits::IMMUTABLE));
        let Some(whole) = whole else { return 0 };
        let size = entry.size();
        let held: Vec<_> = self.in_use.range(whole.start()..whole.end()).copied().collect();
        self.entries.remove(whole.start().0, whole.len());
        let mut kept = 0;
        let mut from = whole.start();
        for pfn in held.into_iter().map(|pfn| pfn.align_down(size.level())) {
            let Some(keep) = PfnRange::with_len(pfn, size.pages()).filter(|_| pfn >= from) else { continue };
            self.set(keep, entry.advance(pfn.0 - run.start().0));
            kept += keep.len();
            from = keep.end();
        }
        whole.len() - kept
    }

    /// The pages of an entry of `size` that begins at `pfn`, for a guest instruction.
    pub(super) fn page(&mut self, pfn: Pfn, size: RmpSize) -> Span<'_, Entry> {
        self.entries.span(pfn.0, size.pages())
    }

    /// Writes an entry as the firmware does, which the caller has checked.
    pub(super) fn set(&mut self, range: PfnRange, entry: Entry) {
        self.entries.insert(range.start().0, range.len(), entry);
    }

    /// Writes all pages of the entry that `pfn` belongs to, given the new entry of `pfn` itself.
    pub(super) fn set_whole(&mut self, pfn: Pfn, entry: Entry) {
        let size = entry.size();
        let first = pfn.align_down(size.level());
        let back = if entry.asid == Asid::HOST { 0 } else { pfn.0 - first.0 };
        let entry = Entry { gfn: Gfn(entry.gfn.0.wrapping_sub(back)), ..entry };
        self.entries.insert(first.0, size.pages(), entry);
    }

    /// Makes host pages unavailable to anyone else, as SNP_INIT_EX does for pages that the host names; pages that are
    /// taken or outside the table stay as they are.
    pub(super) fn fix(&mut self, range: PfnRange) {
        let Some(range) = range.intersect(self.covered).filter(|range| self.hypervisor_owned(*range)) else { return };
        let bits = EntryBits::IMMUTABLE;
        self.set(range, Entry { gfn: Gfn(0), asid: Asid::HOST, bits, permissions: RESET_PERMISSIONS });
    }

    /// Takes the entries of pages away without RMPUPDATE, as the firmware does.
    pub(super) fn clear(&mut self, range: PfnRange) {
        self.entries.remove(range.start().0, range.len());
    }

    /// Whether RMPUPDATE could make a 2 MiB entry at `pfn`: aligned, covered, and no page of it taken
    /// (`is_large_rmp_possible()` in `arch/x86/kvm/svm/sev.c`).
    #[must_use]
    pub fn large_possible(&self, pfn: Pfn) -> bool {
        self.operand(pfn, RmpSize::Page2M).is_some_and(|range| self.hypervisor_owned(range))
    }
}

/// Choice: for a 2 MiB update the head's immutable bit decides, and so does that of a page the host has fixed;
/// any other entry inside the region is an overlap.
fn check_mutable(page: &Span<'_, Entry>, head: Option<Entry>, size: RmpSize) -> Result<(), RmpError> {
    let immutable = |entry: &Entry| entry.bits.contains(EntryBits::IMMUTABLE);
    let fixed = |entry: &Entry| immutable(entry) && !entry.assigned();
    let refused = head.is_some_and(|head| immutable(&head))
        || (size == RmpSize::Page2M && page.runs().any(|(_, _, entry)| fixed(&entry)));
    if refused { Err(RmpError::Permission) } else { Ok(()) }
}

/// Choice: a 4 KiB update inside a 2 MiB entry overlaps at its first page too.
fn check_overlap(page: &Span<'_, Entry>, head: Option<Entry>, size: RmpSize) -> Result<(), RmpError> {
    let small = |entry: &Entry| entry.assigned() && entry.size() == RmpSize::Page4K;
    let overlaps = match size {
        RmpSize::Page4K => head.is_some_and(|head| head.assigned() && head.size() == RmpSize::Page2M),
        RmpSize::Page2M => page.runs().any(|(_, _, entry)| small(&entry)),
    };
    if overlaps { Err(RmpError::Overlap) } else { Ok(()) }
}

fn write(page: Span<'_, Entry>, old: Option<Entry>, update: RmpUpdate) {
    if !update.assigned {
        return page.remove();
    }
    let mut entry = update.entry();
    if let Some(old) = old.filter(|old| old.same_owner(&entry)) {
        entry.bits |= old.bits & (EntryBits::VALIDATED | EntryBits::VMSA);
        entry.permissions = old.permissions;
    }
    page.insert(entry);
}

/// The entries that lie in a run as a whole. An end that cuts a 2 MiB entry is one that PSMASH refused to smash.
fn whole_entries(run: PfnRange, size: RmpSize) -> Option<PfnRange> {
    let start = Pfn(run.start().0.checked_next_multiple_of(size.pages())?);
    PfnRange::new(start, run.end().align_down(size.level()))
}
