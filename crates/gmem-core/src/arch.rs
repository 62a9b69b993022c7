//! The architecture of a VM: one of the modules in [`vendor`](crate::vendor).
//!
//! The set is closed and each member is a struct of its own, so this is an enum with one method per verb and no trait:
//! a reader sees every architecture's answer to a verb in one place.
//!
//! The core names a file's pages by numbers that no machine has ([`FileId::pfn`](crate::file::FileId::pfn)): any two pages of
//! any two files differ, whatever their sizes. The architectures check frames against the machine's memory, so on the
//! way to them numbers are folded into one: 2^29 frames (2 TiB) for each of the first 28 files. Larger files alias.

use alloc::boxed::Box;

use crate::addr::{Gfn, GfnRange, Level, PageRange, Pfn, PfnRange};
use crate::vendor::cca::{self, Cca};
use crate::vendor::pkvm::{PageState, Pkvm};
use crate::vendor::sev::{Sev, SevKind};
use crate::vendor::snp::Snp;
use crate::vendor::tdx::{GpaWidth, Tdx};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    Refusal, Side, Status,
};

/// The architecture of a VM.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Arch {
    /// `KVM_X86_DEFAULT_VM`: no private memory.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: private memory by attribute, nothing enforced by hardware.
    SwProtected,
    /// `KVM_X86_SEV_VM`, `KVM_X86_SEV_ES_VM`.
    Sev(Box<Sev>),
    /// `KVM_X86_SNP_VM`.
    Snp(Box<Snp>),
    /// `KVM_X86_TDX_VM`.
    Tdx(Box<Tdx>),
    /// A realm.
    Cca(Box<Cca>),
    /// `KVM_VM_TYPE_ARM_PROTECTED`.
    Pkvm(Box<Pkvm>),
}

/// How a guest gives private pages up, beside asking the VMM to convert them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum GiveUp {
    /// By an instruction or a call that is over before it asks: PVALIDATE with 0, pKVM MEM_SHARE.
    BeforeConversion,
    /// The call is what asks, and takes effect when the VMM has converted: RSI_IPA_STATE_SET to EMPTY.
    WithConversion,
}

/// Evaluates the same expression for the architecture that there is, or another one where there is none.
macro_rules! each {
    ($arch:expr, $vendor:ident => $body:expr, else $otherwise:expr) => {
        match $arch {
            Arch::Default | Arch::SwProtected => $otherwise,
            Arch::Sev($vendor) => $body,
            Arch::Snp($vendor) => $body,
            Arch::Tdx($vendor) => $body,
            Arch::Cca($vendor) => $body,
            Arch::Pkvm($vendor) => $body,
        }
    };
}

/// Frames of the machine that one file has.
const FILE_SHIFT: u32 = 29;

/// The machine's number for a frame of the core; see the [module](self).
fn frame(pfn: Pfn) -> Pfn {
    let (file, page) = (pfn.0 >> 51, pfn.0 & ((1 << FILE_SHIFT) - 1));
    Pfn((file << FILE_SHIFT) | page)
}

fn frames(range: PfnRange) -> PfnRange {
    PageRange::with_len(frame(range.start()), range.len()).unwrap_or(range)
}

fn placed(mapping: Mapping) -> Mapping {
    Mapping { pfn: frame(mapping.pfn), ..mapping }
}

impl Arch {
    /// SEV or SEV-ES, launched with no memory of its own to measure.
    #[must_use]
    pub fn sev(kind: SevKind) -> Self {
        let mut sev = Sev::new(kind);
        // Cannot fail in the state that a VM begins in.
        let _ = sev.launch_start();
        Self::Sev(Box::new(sev))
    }

    /// SEV-SNP with a launch that has begun.
    #[must_use]
    pub fn snp() -> Self {
        Self::Snp(Box::default())
    }

    /// TDX after the TD was initialised.
    #[must_use]
    pub fn tdx() -> Self {
        Self::Tdx(Box::default())
    }

    /// A realm that is not active yet.
    ///
    /// # Errors
    /// [`cca::CreateError`].
    pub fn cca(config: &cca::Config) -> Result<Self, cca::CreateError> {
        Cca::new(config).map(|cca| Self::Cca(Box::new(cca)))
    }

    /// pKVM.
    #[must_use]
    pub fn pkvm() -> Self {
        Self::Pkvm(Box::default())
    }

    /// Whether guests can have private memory (`kvm_arch_has_private_mem()`).
    #[must_use]
    pub fn has_private_memory(&self) -> bool {
        match self {
            Self::Default | Self::Sev(_) => false,
            Self::SwProtected | Self::Snp(_) | Self::Tdx(_) | Self::Cca(_) | Self::Pkvm(_) => true,
        }
    }

    /// Whether slots can be read-only (`kvm_arch_has_readonly_mem()`): KVM emulates the writes to them, which it cannot do
    /// for a guest whose registers it does not see. Not modelled: SEV-ES has none either.
    #[must_use]
    pub fn has_readonly_slots(&self) -> bool {
        !matches!(self, Self::Snp(_) | Self::Tdx(_))
    }

    /// Whether a frame is another name of one: with TDX the address of a shared page has a bit that its frame has not
    /// (`kvm_is_gfn_alias()`).
    #[must_use]
    pub fn is_alias(&self, gfn: Gfn) -> bool {
        let Self::Tdx(tdx) = self else { return false };
        let shared_bit = match tdx.config().gpa_width {
            GpaWidth::Bits48 => 47,
            GpaWidth::Bits52 => 51,
        };
        gfn.0 & (1 << (shared_bit - crate::addr::PAGE_SHIFT)) != 0
    }

    /// Which side an access is on: hardware says so for most architectures; SW_PROTECTED takes the attribute.
    #[must_use]
    pub fn access_side(&self, claimed: Side, attribute: Side) -> Side {
        let without = if self.has_private_memory() { attribute } else { Side::Shared };
        each!(self, vendor => vendor.access_side(claimed, attribute), else without)
    }

    /// The largest mapping that the architecture allows.
    #[must_use]
    pub fn max_level(&self, pfn: Pfn, side: Side) -> Level {
        each!(self, vendor => vendor.max_level(frame(pfn), side), else Level::Page1G)
    }

    /// Whether [`Arch::make_private`] is told of every page of a private file, whatever the side of the access: Linux has a
    /// hook for that on SNP only. Elsewhere pages become private when they are mapped so.
    #[must_use]
    pub fn prepares_by_file(&self) -> bool {
        matches!(self, Self::Snp(_))
    }

    /// A page of a private file was looked up and is about to be mapped.
    ///
    /// # Errors
    /// What the architecture refuses.
    pub fn make_private(&mut self, gfn: Gfn, pfn: Pfn) -> Result<(), Refusal> {
        each!(self, vendor => vendor.make_private(gfn, frame(pfn)), else Ok(()))
    }

    /// [`Arch::make_private`] as Linux did it before 7.3: of SNP's table as much in one entry as `max` and the frames around it
    /// allow.
    ///
    /// # Errors
    /// What the architecture refuses.
    pub fn prepare(&mut self, gfn: Gfn, pfn: Pfn, max: Level) -> Result<(), Refusal> {
        match self {
            Self::Snp(snp) => snp.prepare(gfn, frame(pfn), max),
            other => other.make_private(gfn, pfn),
        }
    }

    /// A mapping is about to be entered. One that is there already is no error and changes nothing: another vCPU was
    /// faster, and KVM does not even ask the architecture (`RET_PF_SPURIOUS`).
    ///
    /// # Errors
    /// What the architecture refuses; [`Cause::Busy`] means that the fault is to be retried.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        if self.has_mapping(mapping) {
            return Ok(());
        }
        let mapping = placed(mapping);
        each!(self, vendor => vendor.map(mapping), else Ok(()))
    }

    /// Whether a table of the architecture's own has a page at this frame that it would refuse to map again.
    fn has_mapping(&self, mapping: Mapping) -> bool {
        let private = mapping.side == Side::Private;
        match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Snp(_) => false,
            Self::Tdx(tdx) => private && tdx.sept().entry(0, mapping.gfn.0).state.is_leaf(),
            Self::Cca(cca) => private && is_assigned(cca, mapping.gfn),
            Self::Pkvm(pkvm) => pkvm.guest_state(mapping.gfn) != PageState::NoPage,
        }
    }

    /// A mapping was zapped. Says what becomes of the page's bytes.
    pub fn unmap(&mut self, mapping: Mapping) -> Contents {
        let mapping = placed(mapping);
        each!(self, vendor => vendor.unmap(mapping), else Contents::Kept)
    }

    /// Frames of a file are about to go.
    pub fn invalidate(&mut self, range: GfnRange) {
        each!(self, vendor => vendor.invalidate(range), else ());
    }

    /// Pages leave the guest. Says what their next owner finds in them.
    pub fn reclaim(&mut self, pages: PfnRange) -> Contents {
        each!(self, vendor => vendor.reclaim(frames(pages)), else Contents::Kept)
    }

    /// A page gets its initial contents.
    ///
    /// # Errors
    /// [`Cause::NotSupported`] where launches do not exist.
    pub fn populate(&mut self, gfn: Gfn, pfn: Pfn, page: Populate<'_>) -> Result<(), Refusal> {
        let none = Err(Refusal { cause: Cause::NotSupported, status: Status::None });
        each!(self, vendor => vendor.populate(gfn, frame(pfn), page), else none)
    }

    /// Whether the initial memory of a range is loaded by a call of `kvm_gmem_populate()` for each page, all under one hold of
    /// slots_lock (`tdx_vcpu_init_mem_region()`). Elsewhere one call is for the range.
    #[must_use]
    pub(crate) fn populates_by_page(&self) -> bool {
        matches!(self, Self::Tdx(_))
    }

    /// Whether a page that is populated is in the guest's tables from then on, so that whoever takes its file's pages away has
    /// to take it out of them: where what the guest gets is put there by those who protect it (`TDH.MEM.PAGE.ADD`,
    /// `RMI_DATA_CREATE`, pKVM's donation). A page of an SNP guest gets there by its first fault.
    #[must_use]
    pub(crate) fn populates_tables(&self) -> bool {
        matches!(self, Self::Tdx(_) | Self::Cca(_) | Self::Pkvm(_))
    }

    /// The launch ends.
    ///
    /// # Errors
    /// What the architecture refuses; nothing where launches do not exist.
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        each!(self, vendor => vendor.finalize(), else Ok(()))
    }

    /// Whether frames may be prefaulted now.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        each!(self, vendor => vendor.prefault_allowed(), else true)
    }

    /// A range changes sides.
    ///
    /// # Errors
    /// What the architecture refuses.
    pub fn convert(&mut self, range: GfnRange, to: Side) -> Result<(), Refusal> {
        each!(self, vendor => vendor.convert(range, to), else Ok(()))
    }

    /// The guest touches memory through a translation. The side of `mapping` is that of the access.
    pub fn guest_access(&mut self, mapping: Mapping, kind: AccessKind) -> GuestOutcome {
        let mapping = placed(mapping);
        each!(self, vendor => vendor.guest_access(mapping, kind), else GuestOutcome::Done)
    }

    /// The guest accepts (validates) a private page that is mapped, of a frame with this attribute. Says what it finds there, or
    /// why it cannot.
    ///
    /// # Errors
    /// The outcome of the instruction when it does not succeed. [`ExitReason::RipasChange`]: the VMM is asked to convert the
    /// frame, with KVM_EXIT_MEMORY_FAULT, and the realm waits; once it is converted, this call is to be repeated.
    pub fn guest_accept(&mut self, mapping: Mapping, attribute: Side) -> Result<Contents, GuestOutcome> {
        let mapping = placed(mapping);
        let before = self.guest_probe(mapping);
        let outcome = match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Pkvm(_) => return Ok(Contents::Kept),
            Self::Snp(snp) => snp.guest_accept(mapping, Acceptance::Accept),
            Self::Tdx(tdx) => tdx.guest_accept(mapping, Acceptance::Accept),
            Self::Cca(_) if before == GuestOutcome::Done => return Ok(Contents::Kept),
            Self::Cca(cca) => change_ripas(cca, mapping, Acceptance::Accept, attribute),
        };
        match (outcome, before) {
            (GuestOutcome::Done, GuestOutcome::Done) => Ok(Contents::Kept),
            (GuestOutcome::Done, _) if matches!(self, Self::Tdx(_)) => Ok(Contents::Zeroed),
            (GuestOutcome::Done, _) => Ok(Contents::Undefined),
            (refused, _) => Err(refused),
        }
    }

    /// Whether guests tell hardware, firmware or hypervisor that they give a page up, and when.
    #[must_use]
    pub fn give_up(&self) -> Option<GiveUp> {
        match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Tdx(_) => None,
            Self::Snp(_) | Self::Pkvm(_) => Some(GiveUp::BeforeConversion),
            Self::Cca(_) => Some(GiveUp::WithConversion),
        }
    }

    /// The guest gives up a private page, of a frame with this attribute. Says what becomes of the page's bytes: those that a
    /// realm still has when its RIPAS changes go with that.
    ///
    /// # Errors
    /// The outcome of the instruction when it does not succeed; [`ExitReason::RipasChange`] as in [`Arch::guest_accept`].
    pub fn guest_give_up(&mut self, mapping: Mapping, attribute: Side) -> Result<Contents, GuestOutcome> {
        let mapping = placed(mapping);
        let (outcome, contents) = match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Tdx(_) => return Ok(Contents::Kept),
            Self::Snp(snp) => (snp.guest_accept(mapping, Acceptance::GiveUp), Contents::Kept),
            Self::Cca(cca) => (change_ripas(cca, mapping, Acceptance::GiveUp, attribute), Contents::Zeroed),
            Self::Pkvm(pkvm) => (pkvm.guest_accept(mapping, Acceptance::GiveUp), Contents::Kept),
        };
        if outcome == GuestOutcome::Done { Ok(contents) } else { Err(outcome) }
    }

    /// What a load would meet, without its consequences.
    fn guest_probe(&self, mapping: Mapping) -> GuestOutcome {
        each!(&mut self.clone(), vendor => vendor.guest_access(mapping, AccessKind::Load), else GuestOutcome::Done)
    }

    /// The host touches a page.
    pub fn host_access(&mut self, pfn: Pfn, kind: AccessKind) -> HostOutcome {
        each!(self, vendor => vendor.host_access(frame(pfn), kind), else HostOutcome::Plain)
    }

    /// Whether private and shared mappings live in tables of their own, so that a change of one side leaves the other
    /// alone. Elsewhere every zap takes whatever is mapped.
    #[must_use]
    pub fn has_separate_tables(&self) -> bool {
        match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Snp(_) | Self::Pkvm(_) => false,
            Self::Tdx(_) | Self::Cca(_) => true,
        }
    }

    /// Whether frames of this side are translated by a table that hypervisor or firmware keep, which KVM only asks to change.
    /// [`Arch::guest_access`] then has an answer for frames that are not mapped, too.
    #[must_use]
    pub fn has_own_table(&self, side: Side) -> bool {
        match self {
            Self::Default | Self::SwProtected | Self::Sev(_) | Self::Snp(_) => false,
            Self::Tdx(_) => side == Side::Private,
            Self::Cca(_) | Self::Pkvm(_) => true,
        }
    }

    /// Before a realm runs, KVM tells the RMM which frames are memory (`kvm_activate_realm()`). Frames that were populated
    /// are memory already and are refused, which changes nothing.
    pub(crate) fn declare_memory(&mut self, range: GfnRange) {
        if let Self::Cca(cca) = self {
            for gfn in range.pages() {
                let _ = cca.convert(PageRange::page(gfn), Side::Private);
            }
        }
    }

    /// Whether no verb changes anything.
    #[must_use]
    pub fn is_stateless(&self) -> bool {
        matches!(self, Self::Default | Self::SwProtected)
    }

    /// Whether the VM is dead.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        each!(self, vendor => vendor.is_dead(), else false)
    }

    /// The VM goes away.
    pub fn destroy(&mut self) {
        each!(self, vendor => vendor.destroy(), else ());
    }
}

fn is_assigned(cca: &Cca, gfn: Gfn) -> bool {
    let walk = cca.realm().map(|realm| realm.rtt().walk(gfn.gpa(), 3));
    walk.is_some_and(|walk| matches!(walk.entry, cca::Entry::Assigned { .. }))
}

/// The realm asks for RAM or for none. KVM leaves that to the VMM while the frame is on the other side, and does what the realm
/// asked for when the vCPU is run again and the frame has been converted (`kvm_complete_ripas_change()`). A VMM that refuses
/// does not run the vCPU again: KVM never rejects a change with the flag of RMI_REC_ENTER.
///
/// The waiting request is not kept here, where one REC stands for all vCPUs, but made anew: nobody can tell the difference.
fn change_ripas(cca: &mut Cca, mapping: Mapping, what: Acceptance, attribute: Side) -> GuestOutcome {
    let side = if what == Acceptance::Accept { Side::Private } else { Side::Shared };
    let protected = cca.realm().is_some_and(|realm| realm.rtt().in_par(mapping.gfn.gpa()));
    if protected && attribute != side {
        return GuestOutcome::Exit(ExitReason::RipasChange);
    }
    match cca.guest_accept(mapping, what) {
        GuestOutcome::Exit(ExitReason::RipasChange) => {
            let range = PageRange::with_len(mapping.gfn, mapping.level.pages());
            let granted = range.is_some_and(|range| cca.convert(range, side).is_ok());
            if granted { GuestOutcome::Done } else { GuestOutcome::Exception(GuestException::CallRefused) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PageIndex;
    use crate::file::FileId;

    fn architectures() -> [Arch; 7] {
        [
            Arch::Default,
            Arch::SwProtected,
            Arch::sev(SevKind::SevEs),
            Arch::snp(),
            Arch::tdx(),
            Arch::cca(&cca::Config::default()).unwrap(),
            Arch::pkvm(),
        ]
    }

    #[test]
    fn a_private_page_can_be_mapped_twice_accepted_and_used_everywhere() {
        for mut arch in architectures() {
            if !arch.has_private_memory() {
                continue;
            }
            let pfn = FileId(3).pfn(PageIndex(5));
            let mapping = Mapping { gfn: Gfn(7), pfn, level: Level::Page4K, side: Side::Private };
            let ram = arch.convert(PageRange::page(Gfn(7)), Side::Private);
            assert!(arch.finalize().is_ok() && ram.is_ok(), "{arch:?}");
            for _ in 0..2 {
                arch.make_private(mapping.gfn, mapping.pfn).unwrap();
                arch.map(mapping).unwrap();
            }
            arch.guest_accept(mapping, Side::Private).unwrap();
            assert_eq!(arch.guest_access(mapping, AccessKind::Store), GuestOutcome::Done);
            assert!(!arch.is_dead());
        }
    }

    #[test]
    fn a_page_that_was_given_up_is_not_the_guests_any_more() {
        for mut arch in architectures().into_iter().filter(|arch| arch.give_up().is_some()) {
            let mapping =
                Mapping { gfn: Gfn(7), pfn: FileId(3).pfn(PageIndex(5)), level: Level::Page4K, side: Side::Private };
            let ram = arch.convert(PageRange::page(Gfn(7)), Side::Private);
            assert!(arch.finalize().is_ok() && ram.is_ok(), "{arch:?}");
            arch.make_private(mapping.gfn, mapping.pfn).unwrap();
            arch.map(mapping).unwrap();
            arch.guest_accept(mapping, Side::Private).unwrap();
            assert_ne!(arch.host_access(mapping.pfn, AccessKind::Fetch), HostOutcome::Plain);
            if let Arch::Pkvm(_) = &arch {
                // The look above took the page by force.
                arch = Arch::pkvm();
                arch.map(mapping).unwrap();
            }
            assert!(arch.guest_give_up(mapping, Side::Shared).is_ok(), "{arch:?}");
            let shared = arch.host_access(mapping.pfn, AccessKind::Load) == HostOutcome::Plain;
            let usable = arch.guest_access(mapping, AccessKind::Load) == GuestOutcome::Done;
            assert_eq!(usable, matches!(arch, Arch::Pkvm(_)), "{arch:?}");
            assert_eq!(shared, !matches!(arch, Arch::Snp(_)), "RMP entries change at the conversion: {arch:?}");
        }
    }

    #[test]
    fn a_realm_waits_until_the_vmm_has_converted() {
        let mut arch = Arch::cca(&cca::Config::default()).unwrap();
        let mapping = Mapping { gfn: Gfn(7), pfn: Pfn(5), level: Level::Page4K, side: Side::Private };
        arch.convert(PageRange::page(Gfn(7)), Side::Private).unwrap();
        arch.finalize().unwrap();
        arch.map(mapping).unwrap();
        let before = arch.clone();
        let asked = Err(GuestOutcome::Exit(ExitReason::RipasChange));
        assert_eq!(arch.guest_give_up(mapping, Side::Private), asked);
        assert_eq!(arch, before, "the VMM may leave it at that, and the page is the realm's");
        assert_eq!(arch.guest_give_up(mapping, Side::Shared), Ok(Contents::Zeroed));
        assert_eq!(arch.guest_accept(mapping, Side::Shared), asked);
        assert_eq!(arch.guest_accept(mapping, Side::Private), Ok(Contents::Undefined));
        let outside = Mapping { gfn: Gfn(1 << 35), ..mapping };
        let refused = Err(GuestOutcome::Exception(GuestException::CallRefused));
        assert_eq!(
            arch.guest_give_up(outside, Side::Private),
            refused,
            "the monitor says so, and the VMM never hears of it"
        );
    }
}
