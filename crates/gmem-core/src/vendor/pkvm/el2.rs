//! Page ownership at EL2.

use crate::addr::{Gfn, GfnRange, Level, PageNumber, PageRange, Pfn, PfnRange};
use crate::runs::{Linear, RunMap};
use alloc::collections::BTreeMap;
use core::fmt;

/// `enum pkvm_page_state`: what one component may do with a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageState {
    /// 0: owned, for itself.
    Owned,
    /// 1: owned and shared with another component.
    SharedOwned,
    /// 2: lent by its owner.
    SharedBorrowed,
    /// 3: not accessible.
    NoPage,
    /// 4: was taken from a guest by force.
    Poison,
}

impl PageState {
    /// The kernel's name, without its prefix.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Owned => "OWNED",
            Self::SharedOwned => "SHARED_OWNED",
            Self::SharedBorrowed => "SHARED_BORROWED",
            Self::NoPage => "NOPAGE",
            Self::Poison => "POISON",
        }
    }
}

/// Why a hypercall was refused. Nothing changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Error {
    /// A component has the page in another state than the call needs.
    Perm,
    /// The guest has no mapping there.
    NoEnt,
    /// The guest's mapping is larger than a page, or than what the call names.
    TooBig,
    /// The page is not in a state in which force helps; look again.
    Again,
    /// Not memory.
    Fault,
    /// Pinned, or shared as often as can be counted.
    Busy,
    /// Bad size, or a range that is not memory.
    Inval,
    /// The guest lost the page to the host.
    HwPoison,
}

impl Error {
    /// The negative errno that EL2 returns.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Perm => -1,
            Self::NoEnt => -2,
            Self::TooBig => -7,
            Self::Again => -11,
            Self::Fault => -14,
            Self::Busy => -16,
            Self::Inval => -22,
            Self::HwPoison => -133,
        }
    }

    /// The errno's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Perm => "EPERM",
            Self::NoEnt => "ENOENT",
            Self::TooBig => "E2BIG",
            Self::Again => "EAGAIN",
            Self::Fault => "EFAULT",
            Self::Busy => "EBUSY",
            Self::Inval => "EINVAL",
            Self::HwPoison => "EHWPOISON",
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl core::error::Error for Error {}

/// A virtual machine, as the host names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VmHandle(pub u16);

/// What EL2 keeps of a page of memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Physical {
    /// The host's state.
    pub host: PageState,
    /// The hypervisor's state.
    pub hyp: PageState,
    /// Mappings of guests with which the host shares it.
    pub shares: u32,
    /// Pins of the hypervisor, which keep the host from taking the page back.
    pub pins: u16,
    /// The guest that owns it, and where it is mapped there.
    pub guest: Option<(VmHandle, Gfn)>,
}

impl Physical {
    /// A page of the host, which all memory is at first.
    pub const HOST: Self = Self { host: PageState::Owned, hyp: PageState::NoPage, shares: 0, pins: 0, guest: None };
    /// A page of the hypervisor.
    pub const HYP: Self = Self { host: PageState::NoPage, hyp: PageState::Owned, ..Self::HOST };
}

impl Linear for Physical {
    fn advance(&self, pages: u64) -> Self {
        let guest = self.guest.map(|(vm, gfn)| (vm, Gfn(gfn.0.wrapping_add(pages))));
        Self { guest, ..*self }
    }
}

/// A guest's stage 2 entry.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestPage {
    /// Mapped.
    Mapped {
        /// The guest's state.
        state: PageState,
        /// What is mapped.
        pfn: Pfn,
        /// Size of the entry that maps it.
        level: Level,
    },
    /// Taken by force.
    Poison,
}

impl Linear for GuestPage {
    fn advance(&self, pages: u64) -> Self {
        match *self {
            Self::Mapped { state, pfn, level } => Self::Mapped { state, pfn: Pfn(pfn.0.wrapping_add(pages)), level },
            Self::Poison => Self::Poison,
        }
    }
}

type Guest = RunMap<GuestPage>;

/// The hypervisor's view of memory.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct El2 {
    memory: PfnRange,
    /// Pages that are not [`Physical::HOST`].
    pages: RunMap<Physical>,
    vms: BTreeMap<VmHandle, Guest>,
}

impl El2 {
    /// All of `memory` belongs to the host.
    #[must_use]
    pub fn new(memory: PfnRange) -> Self {
        Self { memory, pages: RunMap::new(), vms: BTreeMap::new() }
    }

    /// Gives pages to the hypervisor at boot, whatever their state.
    pub fn reserve(&mut self, pages: PfnRange) {
        self.update(pages, |_| Physical::HYP);
    }

    /// Makes a VM known. `false` if there is one of this handle.
    pub fn create_vm(&mut self, vm: VmHandle) -> bool {
        let fresh = !self.vms.contains_key(&vm);
        if fresh {
            self.vms.insert(vm, RunMap::new());
        }
        fresh
    }

    /// Forgets a VM.
    ///
    /// # Errors
    /// [`Error::NoEnt`] if there is none, [`Error::Busy`] while the guest has pages.
    pub fn destroy_vm(&mut self, vm: VmHandle) -> Result<(), Error> {
        let guest = self.vms.get(&vm).ok_or(Error::NoEnt)?;
        if guest.iter().any(|(_, _, page)| *page != GuestPage::Poison) {
            return Err(Error::Busy);
        }
        self.vms.remove(&vm);
        Ok(())
    }

    /// What EL2 keeps of a page, or `None` if it is not memory.
    #[must_use]
    pub fn physical(&self, pfn: Pfn) -> Option<Physical> {
        self.memory.contains(pfn).then(|| self.pages.get(pfn.0).unwrap_or(Physical::HOST))
    }

    /// A guest's entry.
    #[must_use]
    pub fn guest(&self, vm: VmHandle, gfn: Gfn) -> Option<GuestPage> {
        self.vms.get(&vm)?.get(gfn.0)
    }

    /// A guest's state of a page; [`PageState::NoPage`] where it has none.
    #[must_use]
    pub fn guest_state(&self, vm: VmHandle, gfn: Gfn) -> PageState {
        match self.guest(vm, gfn) {
            None => PageState::NoPage,
            Some(GuestPage::Poison) => PageState::Poison,
            Some(GuestPage::Mapped { state, .. }) => state,
        }
    }

    /// Runs of a guest's entries: `(first gfn, pages, first entry)`.
    pub fn guest_pages(&self, vm: VmHandle) -> impl Iterator<Item = (u64, u64, &GuestPage)> {
        self.vms.get(&vm).into_iter().flat_map(RunMap::iter)
    }

    /// Runs of pages in `range` that are not simply the host's: `(first pfn, pages, first page)`.
    pub fn physical_pages(&self, range: PfnRange) -> impl Iterator<Item = (u64, u64, Physical)> {
        self.pages.runs(range.start().0, range.len())
    }

    /// Whether every page satisfies `holds`, a property that does not depend on the guest's gfn.
    fn all(&self, range: PfnRange, holds: impl Fn(&Physical) -> bool) -> bool {
        let mut tracked = 0;
        for (_, len, page) in self.pages.runs(range.start().0, range.len()) {
            if !holds(&page) {
                return false;
            }
            tracked += len;
        }
        tracked == range.len() || holds(&Physical::HOST)
    }

    /// Replaces every page by what `change` makes of it; linear runs stay linear.
    fn update(&mut self, range: PfnRange, change: impl Fn(Physical) -> Physical) {
        let (mut at, end) = (range.start().0, range.end().0);
        while at < end {
            let next = self.pages.runs(at, end - at).next();
            let (len, page) = match next {
                Some((start, len, page)) if start == at => (len, page),
                Some((start, ..)) => (start - at, Physical::HOST),
                None => (end - at, Physical::HOST),
            };
            match change(page) {
                Physical::HOST => self.pages.remove(at, len),
                changed => self.pages.insert(at, len, changed),
            }
            at += len;
        }
    }

    fn is_memory(&self, range: PfnRange) -> Result<(), Error> {
        if self.memory.covers(range) { Ok(()) } else { Err(Error::Inval) }
    }

    fn host_is(&self, range: PfnRange, state: PageState) -> Result<(), Error> {
        self.is_memory(range)?;
        if self.all(range, |page| page.host == state) { Ok(()) } else { Err(Error::Perm) }
    }

    fn hyp_is(&self, range: PfnRange, state: PageState) -> Result<(), Error> {
        if self.all(range, |page| page.hyp == state) { Ok(()) } else { Err(Error::Perm) }
    }

    /// `__pkvm_host_share_hyp`.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the host owns the page for itself.
    pub fn host_share_hyp(&mut self, pfn: Pfn) -> Result<(), Error> {
        let page = PageRange::page(pfn);
        self.host_is(page, PageState::Owned)?;
        self.hyp_is(page, PageState::NoPage)?;
        self.update(page, |page| Physical { host: PageState::SharedOwned, hyp: PageState::SharedBorrowed, ..page });
        Ok(())
    }

    /// `__pkvm_host_unshare_hyp`.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the page is shared with the hypervisor, [`Error::Busy`] while it is pinned.
    pub fn host_unshare_hyp(&mut self, pfn: Pfn) -> Result<(), Error> {
        let page = PageRange::page(pfn);
        self.host_is(page, PageState::SharedOwned)?;
        self.hyp_is(page, PageState::SharedBorrowed)?;
        if !self.all(page, |page| page.pins == 0) {
            return Err(Error::Busy);
        }
        self.update(page, |page| Physical { host: PageState::Owned, hyp: PageState::NoPage, ..page });
        Ok(())
    }

    /// `__pkvm_host_donate_hyp`: all pages or none.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the host owns the pages for itself.
    pub fn host_donate_hyp(&mut self, pages: PfnRange) -> Result<(), Error> {
        self.host_is(pages, PageState::Owned)?;
        self.hyp_is(pages, PageState::NoPage)?;
        self.update(pages, |_| Physical::HYP);
        Ok(())
    }

    /// `__pkvm_hyp_donate_host`: all pages or none.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the hypervisor owns the pages.
    pub fn hyp_donate_host(&mut self, pages: PfnRange) -> Result<(), Error> {
        self.is_memory(pages)?;
        self.hyp_is(pages, PageState::Owned)?;
        self.host_is(pages, PageState::NoPage)?;
        self.update(pages, |_| Physical::HOST);
        Ok(())
    }

    /// `hyp_pin_shared_mem`: the host cannot unshare pinned pages.
    ///
    /// # Errors
    /// [`Error::Perm`] unless all pages are shared with the hypervisor, [`Error::Busy`] at the highest count, where the
    /// kernel stops with a BUG.
    pub fn hyp_pin_shared_mem(&mut self, pages: PfnRange) -> Result<(), Error> {
        self.host_is(pages, PageState::SharedOwned)?;
        self.hyp_is(pages, PageState::SharedBorrowed)?;
        if !self.all(pages, |page| page.pins < u16::MAX) {
            return Err(Error::Busy);
        }
        self.update(pages, |page| Physical { pins: page.pins.saturating_add(1), ..page });
        Ok(())
    }

    /// `hyp_unpin_shared_mem`. Pages that are not pinned stay so.
    pub fn hyp_unpin_shared_mem(&mut self, pages: PfnRange) {
        if let Some(pages) = pages.intersect(self.memory) {
            self.update(pages, |page| Physical { pins: page.pins.saturating_sub(1), ..page });
        }
    }

    /// `__pkvm_host_share_ffa`: only the host's state is looked at.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the host owns the pages for itself.
    pub fn host_share_ffa(&mut self, pages: PfnRange) -> Result<(), Error> {
        self.host_is(pages, PageState::Owned)?;
        self.update(pages, |page| Physical { host: PageState::SharedOwned, ..page });
        Ok(())
    }

    /// `__pkvm_host_unshare_ffa`: only the host's state is looked at, so the caller must know that it was FF-A with whom
    /// the pages were shared.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the host shares the pages.
    pub fn host_unshare_ffa(&mut self, pages: PfnRange) -> Result<(), Error> {
        self.host_is(pages, PageState::SharedOwned)?;
        self.update(pages, |page| Physical { host: PageState::Owned, ..page });
        Ok(())
    }

    fn guest_is_empty(&self, vm: VmHandle, range: GfnRange) -> Result<(), Error> {
        let guest = self.vms.get(&vm).ok_or(Error::NoEnt)?;
        let empty = guest.runs(range.start().0, range.len()).next().is_none();
        if empty { Ok(()) } else { Err(Error::Perm) }
    }

    /// Whether [`El2::host_donate_guest`] would succeed.
    ///
    /// # Errors
    /// Those of the call.
    pub fn may_donate_guest(&self, pfn: Pfn, gfn: Gfn, vm: VmHandle) -> Result<(), Error> {
        self.host_is(PageRange::page(pfn), PageState::Owned)?;
        self.guest_is_empty(vm, PageRange::page(gfn))
    }

    /// `__pkvm_host_donate_guest`, of one page.
    ///
    /// # Errors
    /// [`Error::Perm`] unless the host owns the page for itself and the guest has nothing there, not even poison.
    pub fn host_donate_guest(&mut self, pfn: Pfn, gfn: Gfn, vm: VmHandle) -> Result<(), Error> {
        self.may_donate_guest(pfn, gfn, vm)?;
        let donated = Physical { host: PageState::NoPage, guest: Some((vm, gfn)), ..Physical::HOST };
        self.update(PageRange::page(pfn), |_| donated);
        self.set_guest(vm, gfn, GuestPage::Mapped { state: PageState::Owned, pfn, level: Level::Page4K });
        Ok(())
    }

    fn set_guest(&mut self, vm: VmHandle, gfn: Gfn, page: GuestPage) {
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.insert(gfn.0, 1, page);
        }
    }

    /// `__pkvm_host_share_guest`, for VMs that are not protected: one page, or a 2 MiB block.
    ///
    /// # Errors
    /// [`Error::Inval`] for another size or a misaligned block, [`Error::Perm`] unless the guest has nothing there and
    /// the host owns the pages or shares them with guests only, [`Error::Busy`] at the highest count.
    pub fn host_share_guest(&mut self, pfn: Pfn, gfn: Gfn, level: Level, vm: VmHandle) -> Result<(), Error> {
        let aligned = pfn == pfn.align_down(level) && gfn == gfn.align_down(level) && level != Level::Page1G;
        let pages = PageRange::with_len(pfn, level.pages()).filter(|_| aligned).ok_or(Error::Inval)?;
        let gfns = PageRange::with_len(gfn, level.pages()).ok_or(Error::Inval)?;
        self.is_memory(pages)?;
        self.guest_is_empty(vm, gfns)?;
        let owned = |page: &Physical| page.host == PageState::Owned;
        let shared = |page: &Physical| page.host == PageState::SharedOwned && page.shares > 0;
        if !self.all(pages, |page| page.shares < u32::MAX) {
            return Err(Error::Busy);
        }
        if !self.all(pages, |page| owned(page) || shared(page)) {
            return Err(Error::Perm);
        }
        self.update(pages, |page| Physical {
            host: PageState::SharedOwned,
            shares: page.shares.saturating_add(1),
            ..page
        });
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.insert(gfn.0, level.pages(), GuestPage::Mapped { state: PageState::SharedBorrowed, pfn, level });
        }
        Ok(())
    }

    /// `__pkvm_host_unshare_guest`, of the size that was shared.
    ///
    /// # Errors
    /// [`Error::NoEnt`] without a mapping, [`Error::TooBig`] if the mapping has another size, [`Error::Perm`] unless it
    /// is borrowed from the host.
    pub fn host_unshare_guest(&mut self, gfn: Gfn, level: Level, vm: VmHandle) -> Result<(), Error> {
        let Some(GuestPage::Mapped { state, pfn, level: mapped }) = self.guest(vm, gfn) else {
            return Err(Error::NoEnt);
        };
        if mapped != level {
            return Err(Error::TooBig);
        }
        if state != PageState::SharedBorrowed || gfn != gfn.align_down(level) {
            return Err(Error::Perm);
        }
        let pages = PageRange::with_len(pfn, level.pages()).ok_or(Error::Inval)?;
        self.host_is(pages, PageState::SharedOwned)?;
        self.update(pages, |page| {
            let shares = page.shares.saturating_sub(1);
            let host = if shares == 0 { PageState::Owned } else { PageState::SharedOwned };
            Physical { host, shares, ..page }
        });
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.remove(gfn.0, level.pages());
        }
        Ok(())
    }

    /// A page that the guest names in a hypercall.
    fn guest_page(&self, vm: VmHandle, gfn: Gfn, state: PageState) -> Result<Pfn, Error> {
        match self.guest(vm, gfn) {
            None => Err(Error::NoEnt),
            Some(GuestPage::Poison) => Err(Error::HwPoison),
            Some(GuestPage::Mapped { level, .. }) if level != Level::Page4K => Err(Error::TooBig),
            Some(GuestPage::Mapped { state: found, pfn, .. }) if found == state => Ok(pfn),
            Some(GuestPage::Mapped { .. }) => Err(Error::Perm),
        }
    }

    /// As [`El2::guest_page`], and the host must have the page in state `host`.
    fn guest_and_host_page(&self, vm: VmHandle, gfn: Gfn, from: PageState, host: PageState) -> Result<Pfn, Error> {
        let pfn = self.guest_page(vm, gfn, from)?;
        self.host_is(PageRange::page(pfn), host)?;
        Ok(pfn)
    }

    /// `__pkvm_guest_share_host`: the guest lends its page to the host.
    ///
    /// # Errors
    /// [`Error::NoEnt`], [`Error::HwPoison`], [`Error::TooBig`] for the mapping, [`Error::Perm`] unless the guest owns the
    /// page for itself.
    pub fn guest_share_host(&mut self, vm: VmHandle, gfn: Gfn) -> Result<(), Error> {
        let pfn = self.guest_and_host_page(vm, gfn, PageState::Owned, PageState::NoPage)?;
        self.update(PageRange::page(pfn), |page| Physical { host: PageState::SharedBorrowed, ..page });
        self.set_guest(vm, gfn, GuestPage::Mapped { state: PageState::SharedOwned, pfn, level: Level::Page4K });
        Ok(())
    }

    /// `__pkvm_guest_unshare_host`: the guest takes its page back from the host.
    ///
    /// # Errors
    /// As for [`El2::guest_share_host`], with [`Error::Perm`] unless the page is lent.
    pub fn guest_unshare_host(&mut self, vm: VmHandle, gfn: Gfn) -> Result<(), Error> {
        let pfn = self.guest_and_host_page(vm, gfn, PageState::SharedOwned, PageState::SharedBorrowed)?;
        self.update(PageRange::page(pfn), |page| Physical { host: PageState::NoPage, ..page });
        self.set_guest(vm, gfn, GuestPage::Mapped { state: PageState::Owned, pfn, level: Level::Page4K });
        Ok(())
    }

    /// `__pkvm_host_reclaim_page_guest`, when a VM is torn down. Answers whether the page was wiped, which it is unless
    /// the guest had shared it; poison has nothing to give back.
    ///
    /// # Errors
    /// [`Error::NoEnt`] without a mapping, [`Error::Perm`] unless the guest owns the page.
    pub fn host_reclaim_page_guest(&mut self, gfn: Gfn, vm: VmHandle) -> Result<bool, Error> {
        let (pfn, wiped) = match self.guest(vm, gfn) {
            None => return Err(Error::NoEnt),
            Some(GuestPage::Poison) => return Ok(false),
            Some(GuestPage::Mapped { level, .. }) if level != Level::Page4K => return Err(Error::TooBig),
            Some(GuestPage::Mapped { state: PageState::Owned, pfn, .. }) => (pfn, true),
            Some(GuestPage::Mapped { state: PageState::SharedOwned, pfn, .. }) => (pfn, false),
            Some(GuestPage::Mapped { .. }) => return Err(Error::Perm),
        };
        self.host_is(PageRange::page(pfn), if wiped { PageState::NoPage } else { PageState::SharedBorrowed })?;
        self.update(PageRange::page(pfn), |_| Physical::HOST);
        if let Some(guest) = self.vms.get_mut(&vm) {
            guest.remove(gfn.0, 1);
        }
        Ok(wiped)
    }

    /// `__pkvm_host_force_reclaim_page_guest`: the host takes a page from a guest that owns it for itself. The page is
    /// wiped and the guest keeps poison.
    ///
    /// # Errors
    /// [`Error::Fault`] if it is not memory, [`Error::Again`] if the host can reach it, [`Error::Perm`] if its owner is no
    /// guest.
    pub fn host_force_reclaim_page_guest(&mut self, pfn: Pfn) -> Result<(), Error> {
        let page = self.physical(pfn).ok_or(Error::Fault)?;
        if page.host != PageState::NoPage {
            return Err(Error::Again);
        }
        let (vm, gfn) = page.guest.ok_or(Error::Perm)?;
        if self.guest_state(vm, gfn) != PageState::Owned {
            return Err(Error::Perm);
        }
        self.set_guest(vm, gfn, GuestPage::Poison);
        self.update(PageRange::page(pfn), |_| Physical::HOST);
        Ok(())
    }
}
