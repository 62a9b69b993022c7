//! What KVM does with EL2: the verbs of the vendor seam for one virtual machine.

use super::el2::{El2, Error, GuestPage, PageState, VmHandle};
use crate::addr::{Gfn, GfnRange, Level, PageNumber, Pfn, PfnRange};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Refusal, Side, Status,
};
use alloc::vec::Vec;

/// The one VM of this model.
const VM: VmHandle = VmHandle(1);
/// Physical memory of the model, in pages: 48 bits.
const MEMORY_PAGES: u64 = 1 << 36;

/// One virtual machine under pKVM.
///
/// Private pages are donated to the guest, shared ones are pages of the host that the guest may use, which is how KVM
/// treats protected and other VMs. A guest's own sharing leaves the donation in place.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Pkvm {
    el2: El2,
    dead: bool,
}

impl Default for Pkvm {
    fn default() -> Self {
        Self::new()
    }
}

fn refusal(error: Error) -> Refusal {
    let cause = match error {
        Error::Perm => Cause::NotOwner,
        Error::NoEnt => Cause::NotTracked,
        Error::TooBig | Error::Inval => Cause::Invalid,
        Error::Again => Cause::Again,
        Error::Fault => Cause::Fault,
        Error::Busy => Cause::Busy,
        Error::HwPoison => Cause::Poisoned,
    };
    Refusal { cause, status: Status::Pkvm(error.errno()) }
}

fn unasked(cause: Cause) -> Refusal {
    Refusal { cause, status: Status::None }
}

/// The pages of a mapping.
fn pages(mapping: Mapping) -> impl Iterator<Item = (Gfn, Pfn)> {
    (0..mapping.level.pages())
        .filter_map(move |page| Some((mapping.gfn.checked_add(page)?, mapping.pfn.checked_add(page)?)))
}

impl Pkvm {
    /// A VM without memory.
    #[must_use]
    pub fn new() -> Self {
        let memory = PfnRange::with_len(Pfn(0), MEMORY_PAGES).unwrap_or(PfnRange::page(Pfn(0)));
        let mut el2 = El2::new(memory);
        el2.create_vm(VM);
        Self { el2, dead: false }
    }

    /// The hypervisor, for assertions.
    #[must_use]
    pub fn el2(&self) -> &El2 {
        &self.el2
    }

    /// The guest's state of a page.
    #[must_use]
    pub fn guest_state(&self, gfn: Gfn) -> PageState {
        self.el2.guest_state(VM, gfn)
    }

    fn require_alive(&self) -> Result<(), Refusal> {
        if self.dead { Err(unasked(Cause::VmDead)) } else { Ok(()) }
    }

    /// Which side an access is on: the guest's addresses do not say, so it is what the host tracks.
    #[must_use]
    pub fn access_side(&self, _claimed: Side, attribute: Side) -> Side {
        attribute
    }

    /// Largest mapping: pages are donated one by one, and shared singly or as 2 MiB blocks.
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
        self.require_alive()
    }

    /// Donates private pages, shares others.
    ///
    /// # Errors
    /// [`Cause::NotOwner`] where the host does not own a page or the guest has one there.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        self.require_alive()?;
        if mapping.side == Side::Shared {
            return self.el2.host_share_guest(mapping.pfn, mapping.gfn, mapping.level, VM).map_err(refusal);
        }
        // Nothing is donated unless everything can be.
        for (gfn, pfn) in pages(mapping) {
            self.el2.may_donate_guest(pfn, gfn, VM).map_err(refusal)?;
        }
        for (gfn, pfn) in pages(mapping) {
            self.el2.host_donate_guest(pfn, gfn, VM).map_err(refusal)?;
        }
        Ok(())
    }

    /// Takes a mapping away. A donated page stays with the guest: KVM does not unmap memory of a protected VM while it
    /// lives.
    pub fn unmap(&mut self, mapping: Mapping) -> Contents {
        if mapping.side == Side::Shared {
            // A mapping that is gone already is what the caller wanted.
            let _ = self.el2.host_unshare_guest(mapping.gfn, mapping.level, VM);
        }
        Contents::Kept
    }

    /// Nothing: KVM acts when the mappings go.
    pub fn invalidate(&mut self, _range: GfnRange) {}

    /// A page leaves the file. One that the guest owns is taken by force: it is wiped and the guest is left with poison.
    pub fn reclaim(&mut self, range: PfnRange) -> Contents {
        let mut contents = Contents::Kept;
        // Pages that EL2 does not track are the host's anyway.
        let tracked: Vec<(u64, u64)> =
            self.el2.physical_pages(range).map(|(first, len, _)| (first, first.saturating_add(len))).collect();
        for pfn in tracked.into_iter().flat_map(|(first, end)| first..end).map(Pfn) {
            contents = match self.el2.host_force_reclaim_page_guest(pfn) {
                Ok(()) if contents != Contents::Undefined => Contents::Zeroed,
                Ok(()) | Err(Error::Again) => contents,
                Err(_) => Contents::Undefined,
            };
        }
        contents
    }

    /// An initial page: the host has written it, and it is donated with its content.
    ///
    /// # Errors
    /// [`Cause::NotSupported`] for a measured page, as nothing is measured, and for kinds of other architectures;
    /// [`Cause::Invalid`] without a source; [`Cause::NotOwner`] as for [`Pkvm::map`].
    pub fn populate(&mut self, gfn: Gfn, pfn: Pfn, page: Populate<'_>) -> Result<(), Refusal> {
        match (page.kind, page.source) {
            (PopulateKind::Unmeasured, Some(_)) => {
                self.map(Mapping { gfn, pfn, level: Level::Page4K, side: Side::Private })
            }
            (PopulateKind::Unmeasured, None) => Err(unasked(Cause::Invalid)),
            _ => Err(unasked(Cause::NotSupported)),
        }
    }

    /// Nothing: there is no launch to end.
    ///
    /// # Errors
    /// [`Cause::VmDead`].
    pub fn finalize(&mut self) -> Result<(), Refusal> {
        self.require_alive()
    }

    /// Whether memory may be mapped before it is used: always.
    #[must_use]
    pub fn prefault_allowed(&self) -> bool {
        !self.dead
    }

    /// The host cannot change the side of a page that the guest has; it can only follow the guest's hypercall.
    ///
    /// # Errors
    /// [`Cause::NotSupported`] if the guest has a page of the other side in the range.
    pub fn convert(&mut self, range: GfnRange, side: Side) -> Result<(), Refusal> {
        self.require_alive()?;
        let contrary = |page: &GuestPage| match *page {
            GuestPage::Mapped { state: PageState::Owned, .. } => side == Side::Shared,
            GuestPage::Mapped { .. } => side == Side::Private,
            GuestPage::Poison => false,
        };
        let overlaps = |first: u64, len: u64| first < range.end().0 && range.start().0 < first.saturating_add(len);
        let refused = self.el2.guest_pages(VM).any(|(first, len, page)| overlaps(first, len) && contrary(page));
        if refused { Err(unasked(Cause::NotSupported)) } else { Ok(()) }
    }

    /// The guest touches memory.
    pub fn guest_access(&mut self, mapping: Mapping, _kind: AccessKind) -> GuestOutcome {
        match self.el2.guest(VM, mapping.gfn) {
            Some(GuestPage::Mapped { .. }) => GuestOutcome::Done,
            Some(GuestPage::Poison) => GuestOutcome::Exit(ExitReason::Poisoned),
            None => GuestOutcome::Exit(ExitReason::NotPresent),
        }
    }

    /// The guest shares pages with the host (gives them up) or takes them back. A page that it does not have yet makes the host map it
    /// first.
    pub fn guest_accept(&mut self, mapping: Mapping, acceptance: Acceptance) -> GuestOutcome {
        for (gfn, _) in pages(mapping) {
            let done = match acceptance {
                Acceptance::GiveUp => self.el2.guest_share_host(VM, gfn),
                Acceptance::Accept => self.el2.guest_unshare_host(VM, gfn),
            };
            match done {
                Ok(()) => {}
                Err(Error::NoEnt) => return GuestOutcome::Exit(ExitReason::NotPresent),
                Err(Error::HwPoison) => return GuestOutcome::Exit(ExitReason::Poisoned),
                Err(_) => return GuestOutcome::Exception(GuestException::CallRefused),
            }
        }
        GuestOutcome::Done
    }

    /// The host touches a page. One that a guest owns is taken by force, after which the access succeeds: the guest's
    /// bytes are gone, which is reported as [`HostOutcome::Corrupted`].
    pub fn host_access(&mut self, pfn: Pfn, _kind: AccessKind) -> HostOutcome {
        match self.el2.host_force_reclaim_page_guest(pfn) {
            Ok(()) => HostOutcome::Corrupted,
            Err(Error::Again) => HostOutcome::Plain,
            Err(_) => HostOutcome::Fault,
        }
    }

    /// The VM goes away: what the guest owned comes back, wiped unless it was shared.
    pub fn destroy(&mut self) {
        let runs: Vec<(u64, u64, GuestPage)> =
            self.el2.guest_pages(VM).map(|(first, len, page)| (first, len, *page)).collect();
        for (first, len, page) in runs {
            let GuestPage::Mapped { state, level, .. } = page else { continue };
            for gfn in (first..first.saturating_add(len)).map(Gfn) {
                let _ = match state {
                    PageState::SharedBorrowed => self.el2.host_unshare_guest(gfn, level, VM),
                    _ => self.el2.host_reclaim_page_guest(gfn, VM).map(|_| ()),
                };
            }
        }
        let _ = self.el2.destroy_vm(VM);
        self.dead = true;
    }

    /// Whether the VM was destroyed. Poison stops a vCPU, but KVM does not declare the VM dead for it.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead
    }
}
