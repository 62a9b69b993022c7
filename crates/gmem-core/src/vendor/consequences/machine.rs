//! One VM with one page, and what of a machine the core does not have: a stage-2 table and a vCPU.

use alloc::vec::Vec;

use super::{GuestException, GuestOutcome, refused};
use crate::addr::{Gfn, GfnRange, IndexRange, Level, PAGE_SIZE, PageIndex, PageRange, Pfn};
use crate::arch::{Arch, GiveUp};
use crate::file::{FileFlags, FileId, GetPageError};
use crate::invalidate::Filter;
use crate::ops::{
    Access, Action, ChangeUserMapping, Claim, Fault, FaultEnd, FileClaim, Operation, Origin, Populate, PopulateError,
    Prefault, PrefaultError, PunchHole, SetAttributes, SetRegion, Source, run,
};
use crate::slot::SlotFlags;
use crate::vendor::{AccessKind, Cause, Contents, ExitReason, HostOutcome, Mapping, PopulateKind, Refusal, Side};
use crate::vm::{Rules, View, Vm};

/// The guest's frame, first of a 2 MiB block.
const GFN: Gfn = Gfn(0x200);
/// Address of the VMM's memory for it, in the same place of a 2 MiB block.
const HVA: u64 = 0x7000_0000_0000;
/// The VMM's page there.
const USER_PAGE: Pfn = Pfn(0x4000);
/// What is populated. Its bytes do not matter.
static SOURCE: [u8; 4096] = [0; 4096];

/// How an access of the guest ended, after KVM has done what it can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    Done,
    Exception(GuestException),
    /// KVM has served the exit and it comes again.
    Exit(ExitReason),
    /// The access is on the other side than the attribute.
    MemoryFault,
    Refused(Refusal),
}

#[derive(Clone)]
pub(super) struct Machine {
    vm: Vm,
    file: FileId,
    /// Frames of the slot, and pages of the file.
    pages: u64,
    stage2: Vec<Mapping>,
    /// Whether what the guest has in its page is gone.
    pub(super) lost: bool,
}

impl Machine {
    /// A VM before its launch ends, whose one slot is backed by one folio of this size.
    ///
    /// A VM without private memory has a file, too: one that the VMM may map and that serves every access.
    pub(super) fn new(arch: Arch, folio: Level) -> Option<Self> {
        let shared = FileFlags::MMAP | FileFlags::INIT_SHARED;
        let flags = if arch.has_private_memory() { FileFlags::empty() } else { shared };
        let pages = folio.pages();
        let mut vm = Vm::with_frames(arch, Rules::NEWEST, GFN.0 + pages);
        let file = vm.create_file(pages * PAGE_SIZE, flags.bits(), shared).ok()?;
        vm.file_mut(file)?.set_folio_level(folio);
        let mut machine = Self { vm, file, pages, stage2: Vec::new(), lost: false };
        machine.set_slot(pages);
        Some(machine)
    }

    // ---- the VMM ----

    fn set_slot(&mut self, pages: u64) {
        let claim = Claim {
            slot: 0,
            flags: SlotFlags::GUEST_MEMFD.bits(),
            guest_phys_addr: GFN.gpa(),
            memory_size: pages * PAGE_SIZE,
            userspace_addr: HVA,
            file: FileClaim::File(self.file),
            guest_memfd_offset: 0,
        };
        let set = self.run(&mut SetRegion::new(claim));
        debug_assert!(set.is_ok(), "{set:?}");
    }

    /// Takes the mappings of the slot away and leaves the pages in the file.
    pub(super) fn recreate_slot(&mut self) {
        self.set_slot(0);
        self.set_slot(self.pages);
    }

    pub(super) fn set_attribute(&mut self, side: Side) {
        if self.vm.has_private_memory()
            && let Some(range) = GfnRange::with_len(GFN, self.pages)
        {
            self.run(&mut SetAttributes::new(range, side));
        }
    }

    pub(super) fn make_private(&mut self) {
        self.set_attribute(Side::Private);
    }

    /// Linux up to 7.2 prepares as much of a folio as one mapping could cover; later kernels do it page by page, and then no
    /// private mapping is large.
    pub(super) fn prepare_large(&mut self) {
        let prepared = self.vm.arch.prepare(GFN, self.file.pfn(PageIndex(0)), Level::Page2M);
        debug_assert!(prepared.is_ok(), "{prepared:?}");
    }

    pub(super) fn populate(&mut self, kind: PopulateKind) -> Result<(), Refusal> {
        let mut populate = Populate::new(PageRange::page(GFN), Source::Repeated(&SOURCE), kind);
        self.run(&mut populate).result().map(drop).map_err(|error| match error {
            PopulateError::NoPrivateSlot | PopulateError::NotPrivate => refused(Cause::Invalid),
            PopulateError::Interrupted => refused(Cause::Again),
            PopulateError::NoSource => refused(Cause::Fault),
            PopulateError::Populated => refused(Cause::Exists),
            PopulateError::Page(error) => of_page(error),
            PopulateError::Refused(refusal) => refusal,
        })
    }

    pub(super) fn prefault(&mut self) -> Result<(), Refusal> {
        let mut prefault = Prefault::new(PageRange::page(GFN));
        let done = self.run_with(&mut prefault, |prefault| prefault.user_page(Some(USER_PAGE)));
        done.map(|_| ()).map_err(|error| match error {
            PrefaultError::NotAllowed => refused(Cause::NotSupported),
            PrefaultError::VmDead => refused(Cause::VmDead),
            PrefaultError::Fault(_, end) => of_fault(end),
        })
    }

    /// The launch ends; SEV's firmware wants to have measured it.
    pub(super) fn launch(&mut self) {
        if let Arch::Sev(sev) = &mut self.vm.arch {
            let _ = sev.launch_measure();
        }
        let ended = self.vm.finalize();
        debug_assert!(ended.is_ok(), "{ended:?}");
    }

    /// After the launch, with the frame private if the VM has that.
    pub(super) fn launched(mut self) -> Self {
        self.make_private();
        self.launch();
        self
    }

    pub(super) fn punch(&mut self, index: u64) {
        let hole: IndexRange = PageRange::page(PageIndex(index));
        let punched = self.run(&mut PunchHole::new(self.file, hole));
        debug_assert!(punched.is_ok(), "{punched:?}");
    }

    pub(super) fn change_user_mapping(&mut self) {
        self.run(&mut ChangeUserMapping::new(HVA, HVA + PAGE_SIZE));
    }

    // ---- the host ----

    /// The page that backs the frame now.
    fn backing(&self) -> Pfn {
        match self.vm.view(GFN) {
            View::UserMemory { .. } => USER_PAGE,
            View::FilePage { .. } | View::NoSlot | View::Unbacked(_) => self.file.pfn(PageIndex(0)),
        }
    }

    pub(super) fn host_access(&mut self, kind: AccessKind) -> HostOutcome {
        let page = self.backing();
        self.vm.arch.host_access(page, kind)
    }

    /// What a host read of the page would find.
    pub(super) fn host_reads(&self) -> HostOutcome {
        self.clone().host_access(AccessKind::Load)
    }

    // ---- the guest ----

    pub(super) fn is_dead(&self) -> bool {
        self.vm.arch.is_dead()
    }

    /// The guest has written to its page.
    pub(super) fn used(mut self) -> Self {
        self.accept();
        let seen = self.access(Side::Private, AccessKind::Store);
        debug_assert!(seen == Seen::Done, "the guest cannot use its memory: {seen:?}");
        self
    }

    /// The guest gives its page up, the VMM converts it, and the guest has written to it since.
    pub(super) fn given_up(mut self) -> Self {
        let when = self.vm.arch.give_up();
        if when == Some(GiveUp::BeforeConversion) {
            self.give_up();
        }
        self.set_attribute(Side::Shared);
        if when == Some(GiveUp::WithConversion) {
            self.give_up();
        }
        let seen = self.access(Side::Shared, AccessKind::Store);
        debug_assert!(seen == Seen::Done, "the guest cannot use shared memory: {seen:?}");
        self.lost = false;
        self
    }

    fn give_up(&mut self) {
        let page = Mapping { gfn: GFN, pfn: self.backing(), level: Level::Page4K, side: Side::Private };
        let mapping = self.translation(Side::Private).unwrap_or(page);
        let given = self.vm.arch.guest_give_up(mapping, self.vm.attribute(GFN));
        debug_assert!(given.is_ok(), "{given:?}");
    }

    pub(super) fn has_large_mapping(&self) -> bool {
        self.stage2.iter().any(|mapping| mapping.level == Level::Page2M)
    }

    fn translation(&self, side: Side) -> Option<Mapping> {
        let separate = self.vm.arch.has_separate_tables();
        let found = self.stage2.iter().find(|mapping| covers(mapping, GFN) && (!separate || mapping.side == side));
        found.map(|mapping| Mapping { side, ..*mapping })
    }

    /// The hardware walks the table; one that is the architecture's own knows more of a frame than whether it is mapped.
    fn walk(&mut self, side: Side, kind: AccessKind) -> GuestOutcome {
        let absent = Mapping { gfn: GFN, pfn: self.backing(), level: Level::Page4K, side };
        let own = self.vm.arch.has_own_table(side);
        match self.translation(side).or(own.then_some(absent)) {
            Some(mapping) => self.vm.arch.guest_access(mapping, kind),
            None => GuestOutcome::Exit(ExitReason::NotPresent),
        }
    }

    /// The guest touches the frame, and KVM serves the fault that this leads to, once.
    pub(super) fn access(&mut self, side: Side, kind: AccessKind) -> Seen {
        let mut served = false;
        loop {
            match self.walk(side, kind) {
                GuestOutcome::Done => return Seen::Done,
                GuestOutcome::Exception(exception) => return Seen::Exception(exception),
                // KVM ends the run without a look at the frame.
                GuestOutcome::Exit(reason @ (ExitReason::PendingTd | ExitReason::Poisoned)) => {
                    return Seen::Exit(reason);
                }
                GuestOutcome::Exit(reason) if served => return Seen::Exit(reason),
                GuestOutcome::Exit(_) => served = true,
            }
            match self.fault(side) {
                FaultEnd::Mapped(_) | FaultEnd::Retry => {}
                FaultEnd::MemoryFault(_) => return Seen::MemoryFault,
                other => return Seen::Refused(of_fault(other)),
            }
        }
    }

    fn fault(&mut self, claimed: Side) -> FaultEnd {
        let mut fault = Fault::new(Access { gfn: GFN, claimed }, Origin::Guest);
        self.run_with(&mut fault, |fault| fault.user_page(Some(USER_PAGE)))
    }

    /// The guest accepts its page, which KVM maps for that if need be.
    pub(super) fn accept(&mut self) {
        if !self.vm.has_private_memory() {
            return;
        }
        if self.translation(Side::Private).is_none() {
            self.fault(Side::Private);
        }
        if let Some(mapping) = self.translation(Side::Private) {
            // Whether it helped is seen by the next access.
            let _ = self.vm.arch.guest_accept(mapping, self.vm.attribute(GFN));
        }
    }

    // ---- what operations ask for ----

    fn run<O: Operation>(&mut self, operation: &mut O) -> O::Output {
        self.run_with(operation, |_| {})
    }

    fn run_with<O: Operation>(&mut self, operation: &mut O, answer: impl Fn(&mut O)) -> O::Output {
        let Self { vm, stage2, lost, file, .. } = self;
        run(operation, vm, |operation, vm, action| match action {
            Action::Zap { range, filter } => *lost |= zap(vm, stage2, range, filter),
            Action::Map(mapping) => {
                let separate = vm.arch.has_separate_tables();
                stage2.retain(|old| !covers(&mapping, old.gfn) || (separate && old.side != mapping.side));
                stage2.push(mapping);
            }
            Action::Free(pages) => *lost |= pages.file == *file && pages.range.contains(PageIndex(0)),
            Action::GetUserPage { .. } => answer(operation),
            _ => {}
        })
    }
}

/// Takes mappings out and tells the architecture of each. Says whether the guest's page lost its bytes by that. The filter
/// counts only where the sides have tables of their own.
fn zap(vm: &mut Vm, stage2: &mut Vec<Mapping>, range: GfnRange, filter: Filter) -> bool {
    let separate = vm.arch.has_separate_tables();
    let hit =
        |mapping: &Mapping| (!separate || filter.includes(mapping.side)) && gfns(mapping).intersect(range).is_some();
    let (out, rest): (Vec<Mapping>, Vec<Mapping>) = stage2.drain(..).partition(hit);
    *stage2 = rest;
    let lost = |mapping: Mapping| vm.arch.unmap(mapping) != Contents::Kept && covers(&mapping, GFN);
    out.into_iter().map(lost).fold(false, |any, lost| any | lost)
}

fn gfns(mapping: &Mapping) -> GfnRange {
    PageRange::page(mapping.gfn).align_out(mapping.level)
}

fn covers(mapping: &Mapping, gfn: Gfn) -> bool {
    gfns(mapping).contains(gfn)
}

fn of_page(error: GetPageError) -> Refusal {
    refused(if error == GetPageError::Poisoned { Cause::Poisoned } else { Cause::Fault })
}

fn of_fault(end: FaultEnd) -> Refusal {
    match end {
        FaultEnd::Refused(_, refusal) => refusal,
        FaultEnd::PageError(_, error) => of_page(error),
        FaultEnd::DyingSlot => refused(Cause::Again),
        FaultEnd::Emulate => refused(Cause::NotTracked),
        FaultEnd::Mapped(_) | FaultEnd::Retry | FaultEnd::MemoryFault(_) | FaultEnd::NoUserPage => {
            refused(Cause::Fault)
        }
    }
}
