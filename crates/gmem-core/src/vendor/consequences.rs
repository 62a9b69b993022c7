//! What happens to a guest's memory, asked of every architecture's model.
//!
//! A [`scenario`] builds a VM, lets it use one page, and then does to that page what the [`Event`] says, with the verbs of
//! [`super`] in the order in which KVM uses them. The [`Consequence`] is what the models answered; nothing in it is looked
//! up. The questions are those under which guest_memfd was designed: whether a hole that is punched under a guest costs
//! it the bytes or its life, and whether a mere change of the VMM's mappings may do so.
//!
//! Between the verbs stands a small KVM: one frame, its attribute, its mapping in tables that the architecture does not
//! have itself, and the fault path (side, mismatch, make private, map, try again). The guest is a careful one: it accepts
//! a page before it first touches it, and it does not accept a page again by itself, because a page that has to be
//! accepted twice has lost what the guest wrote.

use alloc::boxed::Box;

use super::cca::{self, Cca};
use super::pkvm::Pkvm;
use super::sev::{Sev, SevKind};
use super::snp::{RmpFault, Snp};
use super::tdx::Tdx;
use super::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Refusal, Side, Status,
};
use crate::addr::{Gfn, GfnRange, Level, Pfn, PfnRange};
use crate::arch::Arch;
use crate::invalidate::Filter;

/// First frame of a 2 MiB block.
const GFN: Gfn = Gfn(0x200);
/// The page of the file behind it, first of a 2 MiB folio.
const PAGE: Pfn = Pfn(0x1000);
/// The page that the file gives after the first has been freed.
const FRESH: Pfn = Pfn(0x2000);
/// The VMM's page.
const USER_PAGE: Pfn = Pfn(0x4000);

/// The columns of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Architecture {
    /// An ordinary VM.
    Default,
    /// SW_PROTECTED_VM.
    SwProtected,
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX, with Linux's choice of TD exits.
    Tdx,
    /// Arm CCA.
    Cca,
    /// Protected KVM.
    Pkvm,
}

impl Architecture {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 8] =
        [Self::Default, Self::SwProtected, Self::Sev, Self::SevEs, Self::Snp, Self::Tdx, Self::Cca, Self::Pkvm];

    /// The name that commands use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwProtected => "sw-protected",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Cca => "cca",
            Self::Pkvm => "pkvm",
        }
    }
}

/// The rows of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// A hole is punched where the guest has a page in use; then the guest reads it.
    Punch,
    /// The VMM's own mapping of the same range changes; then the guest reads its page.
    UserMappingChange,
    /// The guest writes with a private address to a page that is shared.
    PrivateAccess,
    /// The guest writes with a shared address to a page that is private.
    SharedAccess,
    /// The mapping of a page in use is zapped, the page is not freed; then the guest reads it.
    Refault,
    /// A page of initial memory is populated a second time.
    PopulateTwice,
    /// One 4 KiB page of a 2 MiB page in use is punched; then the guest reads another.
    Split,
    /// The VM is destroyed while its file stays open; then the host writes to the page.
    Destroy,
    /// The host writes to a page in use; then the guest reads it.
    HostWrite,
    /// A page is prefaulted before the launch has ended; then it ends and the guest reads the page.
    EarlyPrefault,
}

impl Event {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 10] = [
        Self::Punch,
        Self::UserMappingChange,
        Self::PrivateAccess,
        Self::SharedAccess,
        Self::Refault,
        Self::PopulateTwice,
        Self::Split,
        Self::Destroy,
        Self::HostWrite,
        Self::EarlyPrefault,
    ];

    /// What happens, in a few words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Punch => "punch of a page in use",
            Self::UserMappingChange => "VMA change over the same range",
            Self::PrivateAccess => "private access to a shared page",
            Self::SharedAccess => "shared access to a private page",
            Self::Refault => "zap and refault",
            Self::PopulateTwice => "populate twice",
            Self::Split => "2 MiB page split",
            Self::Destroy => "VM destroyed, file still open",
            Self::HostWrite => "host write to a page in use",
            Self::EarlyPrefault => "prefault before finalize",
        }
    }
}

/// How the guest goes on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Guest {
    /// As if nothing had happened.
    Runs,
    /// The access waits until the VMM has converted the page, and then succeeds.
    WaitsForConversion,
    /// The vCPU takes an exception; the access succeeds once the guest has accepted the page again.
    AcceptsAgain,
    /// The vCPU exits over and over without seeing anything; only another vCPU could accept the page again.
    StuckUntilAccepted,
    /// The access can never succeed.
    Stuck,
    /// The VM is dead.
    Dead,
}

/// Who learns of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Told {
    /// Nobody.
    Nobody,
    /// The guest.
    Guest(GuestException),
    /// KVM, which does not tell the VMM.
    Kvm(ExitReason),
    /// The VMM, with an errno.
    Vmm(Refusal),
    /// Whoever of the host touched the page.
    Host(HostOutcome),
}

/// One cell of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Consequence {
    /// Whether what the guest wrote, or what was loaded for it, is gone.
    pub lost: bool,
    /// How the guest goes on.
    pub guest: Guest,
    /// Who learns of it.
    pub told: Told,
    /// What a host read of the page finds afterwards.
    pub host: HostOutcome,
}

/// Plays `event` on a VM of `architecture`. `None` where it cannot come about: [`Event::Split`] needs 2 MiB mappings.
#[must_use]
pub fn scenario(architecture: Architecture, event: Event) -> Option<Consequence> {
    let vm = match event {
        Event::PopulateTwice | Event::EarlyPrefault => Machine::new(architecture)?,
        Event::PrivateAccess => Machine::launched(architecture, Side::Shared)?,
        Event::Split => Machine::launched(architecture, Side::Private)?.used(Level::Page2M),
        _ => Machine::launched(architecture, Side::Private)?.used(Level::Page4K),
    };
    match event {
        Event::Punch => Some(vm.punch()),
        Event::UserMappingChange => Some(vm.user_mapping_change()),
        Event::PrivateAccess => Some(vm.private_access()),
        Event::SharedAccess => Some(vm.after(Side::Shared, AccessKind::Store)),
        Event::Refault => Some(vm.refault()),
        Event::PopulateTwice => Some(vm.populate_twice()),
        Event::Split => vm.split(),
        Event::Destroy => Some(vm.destroy()),
        Event::HostWrite => Some(vm.host_write()),
        Event::EarlyPrefault => Some(vm.early_prefault()),
    }
}

/// A VM whose architecture has nothing in hardware: what the verbs that [`Arch`] does not have do there.
#[derive(Clone)]
struct Plain {
    arch: Arch,
    dead: bool,
}

#[derive(Clone)]
enum Model {
    Plain(Plain),
    Sev(Box<Sev>),
    Snp(Box<Snp>),
    Tdx(Box<Tdx>),
    Cca(Box<Cca>),
    Pkvm(Box<Pkvm>),
}

/// Asks the model; the first arm is for VMs without hardware of their own.
macro_rules! ask {
    ($model:expr, $plain:pat => $nothing:expr, $m:ident => $verb:expr) => {
        match $model {
            Model::Plain($plain) => $nothing,
            Model::Sev($m) => $verb,
            Model::Snp($m) => $verb,
            Model::Tdx($m) => $verb,
            Model::Cca($m) => $verb,
            Model::Pkvm($m) => $verb,
        }
    };
}

impl Model {
    fn new(architecture: Architecture) -> Option<Self> {
        Some(match architecture {
            Architecture::Default => Self::Plain(Plain { arch: Arch::Default, dead: false }),
            Architecture::SwProtected => Self::Plain(Plain { arch: Arch::SwProtected, dead: false }),
            Architecture::Sev => Self::Sev(Box::new(Sev::new(SevKind::Sev))),
            Architecture::SevEs => Self::Sev(Box::new(Sev::new(SevKind::SevEs))),
            Architecture::Snp => Self::Snp(Box::default()),
            Architecture::Tdx => Self::Tdx(Box::default()),
            Architecture::Cca => Self::Cca(Box::new(Cca::new(&cca::Config::default()).ok()?)),
            Architecture::Pkvm => Self::Pkvm(Box::default()),
        })
    }

    fn has_private_memory(&self) -> bool {
        match self {
            Self::Plain(plain) => plain.arch.has_private_memory(),
            Self::Sev(_) => false,
            Self::Snp(_) | Self::Tdx(_) | Self::Cca(_) | Self::Pkvm(_) => true,
        }
    }

    /// Whether the architecture's own tables translate this side, so that it is the model that says "not present".
    fn translates(&self, side: Side) -> bool {
        match self {
            Self::Plain(_) | Self::Sev(_) | Self::Snp(_) => false,
            Self::Tdx(_) => side == Side::Private,
            Self::Cca(_) | Self::Pkvm(_) => true,
        }
    }

    /// Whether private and shared addresses differ in a bit that KVM's tables translate too.
    fn has_two_halves(&self) -> bool {
        matches!(self, Self::Tdx(_) | Self::Cca(_))
    }

    fn access_side(&self, claimed: Side, attribute: Side) -> Side {
        ask!(self, plain => plain.arch.access_side(claimed, attribute), m => m.access_side(claimed, attribute))
    }

    fn max_level(&self, pfn: Pfn, side: Side) -> Level {
        ask!(self, plain => plain.arch.max_level(pfn, side), m => m.max_level(pfn, side))
    }

    fn make_private(&mut self, pfn: Pfn, max: Level) -> Result<(), Refusal> {
        match self {
            // The one architecture whose entry for a page has a size that is chosen here.
            Self::Snp(snp) => snp.prepare(GFN, pfn, max),
            model => ask!(model, plain => plain.arch.make_private(GFN, pfn), m => m.make_private(GFN, pfn)),
        }
    }

    fn map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        ask!(self, plain => plain.arch.map(mapping), m => m.map(mapping))
    }

    fn unmap(&mut self, mapping: Mapping) -> Contents {
        ask!(self, _ => Contents::Kept, m => m.unmap(mapping))
    }

    fn invalidate(&mut self, range: GfnRange) {
        ask!(self, plain => plain.arch.invalidate(range), m => m.invalidate(range));
    }

    fn reclaim(&mut self, pages: PfnRange) -> Contents {
        ask!(self, _ => Contents::Kept, m => m.reclaim(pages))
    }

    fn populate(&mut self, page: Populate<'_>) -> Result<(), Refusal> {
        ask!(self, plain => plain.arch.populate(GFN, PAGE, page), m => m.populate(GFN, PAGE, page))
    }

    /// The launch ends; SEV's firmware wants to have begun and measured it.
    fn finalize(&mut self) -> Result<(), Refusal> {
        if let Self::Sev(sev) = self {
            sev.launch_start()?;
            sev.launch_measure()?;
        }
        ask!(self, _ => Ok(()), m => m.finalize())
    }

    fn prefault_allowed(&self) -> bool {
        ask!(self, plain => plain.arch.prefault_allowed(), m => m.prefault_allowed())
    }

    fn convert(&mut self, range: GfnRange, side: Side) -> Result<(), Refusal> {
        ask!(self, _ => Ok(()), m => m.convert(range, side))
    }

    fn guest_access(&mut self, mapping: Mapping, kind: AccessKind) -> GuestOutcome {
        ask!(self, _ => GuestOutcome::Done, m => m.guest_access(mapping, kind))
    }

    fn guest_accept(&mut self, mapping: Mapping) -> GuestOutcome {
        match self {
            Self::Plain(_) | Self::Sev(_) => GuestOutcome::Done,
            Self::Snp(m) => m.guest_accept(mapping, Acceptance::Accept),
            Self::Tdx(m) => m.guest_accept(mapping, Acceptance::Accept),
            Self::Cca(m) => m.guest_accept(mapping, Acceptance::Accept),
            Self::Pkvm(m) => m.guest_accept(mapping, Acceptance::Accept),
        }
    }

    fn host_access(&mut self, pfn: Pfn, kind: AccessKind) -> HostOutcome {
        ask!(self, _ => HostOutcome::Plain, m => m.host_access(pfn, kind))
    }

    fn destroy(&mut self) {
        ask!(self, plain => plain.dead = true, m => m.destroy());
    }

    fn is_dead(&self) -> bool {
        ask!(self, plain => plain.dead, m => m.is_dead())
    }
}

/// How an access of the guest ended, after KVM has done what it can.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Done,
    Exception(GuestException),
    /// KVM has served the exit and it comes again.
    Exit(ExitReason),
    /// The access is on the other side than the attribute.
    MemoryFault,
    Refused(Refusal),
}

/// One VM with one frame, and what KVM keeps of it.
#[derive(Clone)]
struct Machine {
    model: Model,
    attribute: Side,
    page: Pfn,
    level: Level,
    mapped: Option<Mapping>,
    lost: bool,
}

impl Machine {
    /// Before the launch ends.
    fn new(architecture: Architecture) -> Option<Self> {
        let model = Model::new(architecture)?;
        Some(Self { model, attribute: Side::Shared, page: PAGE, level: Level::Page4K, mapped: None, lost: false })
    }

    /// After the launch, with the frame on `side` if the VM has it.
    fn launched(architecture: Architecture, side: Side) -> Option<Self> {
        let mut vm = Self::new(architecture)?;
        if side == Side::Private {
            vm.set_private();
        }
        vm.model.finalize().ok()?;
        Some(vm)
    }

    fn set_private(&mut self) {
        if self.model.has_private_memory() {
            let block = GfnRange::page(GFN).align_out(Level::Page2M);
            let converted = self.model.convert(block, Side::Private);
            debug_assert!(converted.is_ok(), "{converted:?}");
            self.attribute = Side::Private;
        }
    }

    /// The guest has written to its page, which is part of a folio of this size.
    fn used(mut self, folio: Level) -> Self {
        self.level = folio;
        self.accept();
        let seen = self.access(Side::Private, AccessKind::Store);
        debug_assert!(seen == Seen::Done, "the guest cannot use its memory");
        self
    }

    // ---- what happens ----

    fn punch(mut self) -> Consequence {
        self.free(PfnRange::page(self.page));
        (self.page, self.lost) = (FRESH, true);
        self.after(Side::Private, AccessKind::Load)
    }

    /// What a change of the file does to the page's mapping and to the pages that go.
    fn free(&mut self, pages: PfnRange) {
        self.model.invalidate(GfnRange::page(GFN));
        self.zap(Filter::Both);
        self.model.reclaim(pages);
    }

    fn user_mapping_change(mut self) -> Consequence {
        self.zap(Filter::Only(Side::Shared));
        self.after(Side::Private, AccessKind::Load)
    }

    fn private_access(mut self) -> Consequence {
        self.access(Side::Shared, AccessKind::Store);
        self.after(Side::Private, AccessKind::Store)
    }

    fn refault(mut self) -> Consequence {
        self.zap(Filter::Both);
        self.after(Side::Private, AccessKind::Load)
    }

    fn populate_twice(mut self) -> Consequence {
        self.set_private();
        let page = |kind| Populate { source: Some(&[0; 4096]), kind };
        let first = self.model.populate(page(PopulateKind::Measured));
        let kind = if first.is_ok() { PopulateKind::Measured } else { PopulateKind::Unmeasured };
        let loaded = first.or_else(|_| self.model.populate(page(kind)));
        let again = loaded.and_then(|()| self.model.populate(page(kind)));
        let ended = self.model.finalize();
        debug_assert!(ended.is_ok(), "{ended:?}");
        // A page that was not loaded has to be accepted like any other.
        if loaded.is_err() {
            self.accept();
        }
        self.reported(again)
    }

    fn split(mut self) -> Option<Consequence> {
        self.mapped.filter(|mapping| mapping.level == Level::Page2M)?;
        self.free(PfnRange::page(Pfn(self.page.0 + 1)));
        self.level = Level::Page4K;
        Some(self.after(Side::Private, AccessKind::Load))
    }

    fn destroy(mut self) -> Consequence {
        let before = self.clone().model.host_access(self.backing(), AccessKind::Load);
        self.model.destroy();
        let host = self.clone().model.host_access(self.backing(), AccessKind::Load);
        let write = self.model.host_access(self.backing(), AccessKind::Store);
        // A page that changed hands did so without its bytes.
        Consequence { lost: before != host, guest: Guest::Dead, told: told_host(write), host }
    }

    fn host_write(mut self) -> Consequence {
        let write = self.model.host_access(self.backing(), AccessKind::Store);
        self.lost |= matches!(write, HostOutcome::Corrupted | HostOutcome::MachineCheck);
        let after = self.after(Side::Private, AccessKind::Load);
        if after.told == Told::Nobody { Consequence { told: told_host(write), ..after } } else { after }
    }

    fn early_prefault(mut self) -> Consequence {
        self.set_private();
        let refused = Err(Refusal { cause: Cause::NotSupported, status: Status::None });
        let prefaulted = if self.model.prefault_allowed() { self.fault_in() } else { refused };
        let ended = self.model.finalize();
        debug_assert!(ended.is_ok(), "{ended:?}");
        self.accept();
        self.reported(prefaulted)
    }

    /// The consequence of a request of the VMM's that was answered with `answer`, and of a read by the guest after it.
    fn reported(self, answer: Result<(), Refusal>) -> Consequence {
        let after = self.after(Side::Private, AccessKind::Load);
        answer.map_or_else(|refusal| Consequence { told: Told::Vmm(refusal), ..after }, |()| after)
    }

    /// The consequence of what was done before, as the guest's next access shows it.
    fn after(mut self, side: Side, kind: AccessKind) -> Consequence {
        let seen = self.access(side, kind);
        let guest = self.fate(seen, side, kind);
        let host = self.clone().model.host_access(self.backing(), AccessKind::Load);
        Consequence { lost: self.lost, guest, told: told(seen), host }
    }

    fn fate(&self, seen: Seen, side: Side, kind: AccessKind) -> Guest {
        let mut other = self.clone();
        match seen {
            _ if self.model.is_dead() => Guest::Dead,
            Seen::Done => Guest::Runs,
            Seen::MemoryFault => {
                other.zap(Filter::Only(self.attribute));
                other.attribute = side;
                other.if_accessible(side, kind, Guest::WaitsForConversion)
            }
            Seen::Exception(_) => other.if_accepted(side, kind, Guest::AcceptsAgain),
            Seen::Exit(_) => other.if_accepted(side, kind, Guest::StuckUntilAccepted),
            Seen::Refused(_) => Guest::Stuck,
        }
    }

    fn if_accepted(mut self, side: Side, kind: AccessKind, then: Guest) -> Guest {
        self.attribute = side;
        self.accept();
        self.if_accessible(side, kind, then)
    }

    fn if_accessible(mut self, side: Side, kind: AccessKind, then: Guest) -> Guest {
        let converted = self.model.convert(GfnRange::page(GFN), side);
        if side == Side::Private && converted.is_ok() {
            self.accept();
        }
        if self.access(side, kind) == Seen::Done { then } else { Guest::Stuck }
    }

    // ---- KVM ----

    /// The page that backs the frame now.
    fn backing(&self) -> Pfn {
        match self.attribute {
            Side::Shared if self.model.has_private_memory() => USER_PAGE,
            _ => self.page,
        }
    }

    fn mapping(&self, side: Side) -> Mapping {
        self.mapped.map_or_else(
            || Mapping { gfn: GFN, pfn: self.backing(), level: Level::Page4K, side },
            |mapped| Mapping { side, ..mapped },
        )
    }

    fn zap(&mut self, filter: Filter) {
        if let Some(mapping) = self.mapped.take_if(|mapping| filter.includes(mapping.side)) {
            self.lost |= self.model.unmap(mapping) != Contents::Kept;
        }
    }

    /// The fault path from the look-up of the page on.
    fn fault_in(&mut self) -> Result<(), Refusal> {
        let (side, pfn) = (self.attribute, self.backing());
        if side == Side::Private {
            self.model.make_private(pfn, self.level)?;
        }
        let level = self.level.min(self.model.max_level(pfn, side));
        let mapping = Mapping { gfn: GFN, pfn, level, side };
        self.model.map(mapping)?;
        self.mapped = Some(mapping);
        Ok(())
    }

    fn is_present(&self, side: Side) -> bool {
        let halves = self.model.has_two_halves();
        self.model.translates(side) || self.mapped.is_some_and(|mapping| !halves || mapping.side == side)
    }

    /// The guest touches the frame, and KVM serves the faults that this leads to.
    fn access(&mut self, side: Side, kind: AccessKind) -> Seen {
        let mut served = false;
        loop {
            let present = self.is_present(side);
            let mapping = self.mapping(side);
            let absent = GuestOutcome::Exit(ExitReason::NotPresent);
            let reason = match if present { self.model.guest_access(mapping, kind) } else { absent } {
                GuestOutcome::Done => return Seen::Done,
                GuestOutcome::Exception(exception) => return Seen::Exception(exception),
                GuestOutcome::Exit(reason @ (ExitReason::PendingTd | ExitReason::Poisoned)) => {
                    return Seen::Exit(reason);
                }
                GuestOutcome::Exit(reason) => reason,
            };
            if self.model.access_side(side, self.attribute) != self.attribute {
                return Seen::MemoryFault;
            }
            if served {
                return Seen::Exit(reason);
            }
            served = true;
            if let Err(refusal) = self.serve() {
                return Seen::Refused(refusal);
            }
        }
    }

    fn serve(&mut self) -> Result<(), Refusal> {
        let (page, attribute) = (self.backing(), self.attribute);
        if let Model::Snp(snp) = &mut self.model
            && let RmpFault::Smashed { .. } = snp.rmp_fault(GFN, Some(page), attribute)
        {
            self.zap(Filter::Both);
        }
        self.fault_in()
    }

    /// The guest accepts its page; KVM and the VMM do what it takes.
    fn accept(&mut self) {
        for _ in 0..3 {
            if self.attribute == Side::Private && !self.is_present(Side::Private) && self.fault_in().is_err() {
                return;
            }
            let mapping = self.mapping(Side::Private);
            match self.model.guest_accept(mapping) {
                GuestOutcome::Exit(ExitReason::RipasChange) => {
                    // What the VMM grants is the realm's wish, which the next access shows.
                    let _ = self.model.convert(GfnRange::page(GFN), Side::Private);
                    return;
                }
                GuestOutcome::Exit(ExitReason::NotPresent) => {
                    if self.fault_in().is_err() {
                        return;
                    }
                }
                GuestOutcome::Done | GuestOutcome::Exit(_) | GuestOutcome::Exception(_) => return,
            }
        }
    }
}

fn told(seen: Seen) -> Told {
    let errno = |cause| Told::Vmm(Refusal { cause, status: Status::None });
    match seen {
        Seen::Done => Told::Nobody,
        Seen::Exception(exception) => Told::Guest(exception),
        // A memory-fault exit is -1 with EFAULT, and so is what KVM makes of a page that was taken by force.
        Seen::MemoryFault | Seen::Exit(ExitReason::Poisoned) => errno(Cause::Fault),
        Seen::Exit(ExitReason::PendingTd) => errno(Cause::VmDead),
        Seen::Exit(reason) => Told::Kvm(reason),
        Seen::Refused(refusal) => Told::Vmm(refusal),
    }
}

fn told_host(write: HostOutcome) -> Told {
    match write {
        HostOutcome::Fault | HostOutcome::MachineCheck => Told::Host(write),
        HostOutcome::Plain | HostOutcome::Ciphertext | HostOutcome::Corrupted => Told::Nobody,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(architecture: Architecture, event: Event) -> Consequence {
        scenario(architecture, event).unwrap()
    }

    fn errno(cause: Cause) -> Told {
        Told::Vmm(Refusal { cause, status: Status::None })
    }

    /// "For a realm guest if the memory is pulled from the guest then the guest is effectively dead." (S. Price, 2024-02-09)
    #[test]
    fn a_hole_under_a_guest_costs_the_bytes_everywhere_and_more_where_they_are_protected() {
        assert!(Architecture::ALL.into_iter().all(|architecture| of(architecture, Event::Punch).lost));
        let told = |architecture| (of(architecture, Event::Punch).guest, of(architecture, Event::Punch).told);
        assert_eq!(told(Architecture::SwProtected), (Guest::Runs, Told::Nobody));
        assert_eq!(
            told(Architecture::Snp),
            (Guest::AcceptsAgain, Told::Guest(GuestException::NotValidated)),
            "#VC, and the VM lives"
        );
        assert_eq!(told(Architecture::Tdx), (Guest::Dead, errno(Cause::VmDead)));
        assert_eq!(told(Architecture::Cca), (Guest::StuckUntilAccepted, Told::Kvm(ExitReason::RealmAbort)));
        assert_eq!(told(Architecture::Pkvm), (Guest::Stuck, errno(Cause::Fault)));
    }

    /// "avoiding issues with VMA updates causing spurious unmaps": the same thread's third option.
    #[test]
    fn a_change_of_the_vmms_mapping_touches_no_private_page() {
        for architecture in Architecture::ALL {
            let after = of(architecture, Event::UserMappingChange);
            assert_eq!((after.lost, after.guest, after.told), (false, Guest::Runs, Told::Nobody), "{architecture:?}");
        }
    }

    /// "Is it possible to invalidate and then refault a protected page without affecting the memory contents?"
    #[test]
    fn only_some_can_refault_a_private_page() {
        for architecture in [Architecture::SwProtected, Architecture::Sev, Architecture::Snp] {
            let after = of(architecture, Event::Refault);
            assert_eq!((after.lost, after.guest), (false, Guest::Runs), "{architecture:?}");
        }
        let tdx = of(Architecture::Tdx, Event::Refault);
        assert_eq!((tdx.lost, tdx.guest), (true, Guest::Dead));
        let cca = of(Architecture::Cca, Event::Refault);
        assert_eq!((cca.lost, cca.guest), (true, Guest::StuckUntilAccepted));
    }

    /// Whether the hardware or only the attribute says which side an access is on (M. Roth, 2023-02-20).
    #[test]
    fn a_mismatch_needs_hardware_that_knows_the_side() {
        for event in [Event::PrivateAccess, Event::SharedAccess] {
            for architecture in [Architecture::Snp, Architecture::Tdx] {
                let after = of(architecture, event);
                assert_eq!((after.guest, after.told), (Guest::WaitsForConversion, errno(Cause::Fault)), "{event:?}");
            }
            let soft = of(Architecture::SwProtected, event);
            assert_eq!((soft.guest, soft.told), (Guest::Runs, Told::Nobody), "{event:?}");
        }
        let cca = of(Architecture::Cca, Event::PrivateAccess);
        assert_eq!(cca.told, Told::Guest(GuestException::ExternalAbort), "the realm is told, not the host");
    }

    #[test]
    fn launches_are_guarded() {
        assert_eq!(of(Architecture::Snp, Event::PopulateTwice).told, errno(Cause::Exists));
        for architecture in [Architecture::Snp, Architecture::Tdx] {
            assert_eq!(of(architecture, Event::EarlyPrefault).told, errno(Cause::NotSupported));
        }
        assert_eq!(of(Architecture::SwProtected, Event::EarlyPrefault).told, Told::Nobody);
    }

    #[test]
    fn a_file_outlives_its_vm_and_keeps_snp_pages_from_the_host() {
        let snp = of(Architecture::Snp, Event::Destroy);
        assert_eq!((snp.guest, snp.told), (Guest::Dead, Told::Host(HostOutcome::Fault)));
        assert_eq!(of(Architecture::SwProtected, Event::Destroy).host, HostOutcome::Plain);
    }

    #[test]
    fn every_cell_has_an_answer_but_splits_of_what_is_never_mapped_large() {
        for (architecture, event) in Architecture::ALL.into_iter().flat_map(|a| Event::ALL.map(|e| (a, e))) {
            let small = [Architecture::Tdx, Architecture::Cca, Architecture::Pkvm].contains(&architecture);
            let absent = event == Event::Split && small;
            assert_eq!(scenario(architecture, event).is_none(), absent, "{architecture:?} {event:?}");
        }
    }
}
