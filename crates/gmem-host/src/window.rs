//! Windows: the stage-2 view of a memory slot as a range of this process's address space.
//!
//! The real memory slot of KVM has the window's address as its `userspace_addr`. What is mapped into the window is what the
//! guest has: the VMM's own page for a shared frame, a page of gmem's backing for a private one, nothing for a frame that
//! must not be reached. The kernel's MMU notifier takes KVM's mappings away whenever the window changes.

use std::collections::BTreeMap;

use gmem_core::addr::{Gfn, GfnRange, PAGE_SHIFT};
use gmem_core::runs::{Linear, RunMap};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::address_space::AddressSpace;
use crate::backing::{self, Backing};
use crate::client::Source;
use crate::maps::Area;
use crate::spare;

/// What a window shows for a run of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shows {
    /// Nothing.
    Nothing,
    /// The VMM's memory at this address.
    Client(usize),
    /// Backing number `.0` from byte `.1` on.
    Backing(u32, u64),
}

impl Linear for Shows {
    fn advance(&self, pages: u64) -> Self {
        let bytes = pages << PAGE_SHIFT;
        match *self {
            Self::Nothing => Self::Nothing,
            Self::Client(address) => Self::Client(address.wrapping_add(usize::try_from(bytes).unwrap_or(usize::MAX))),
            Self::Backing(file, offset) => Self::Backing(file, offset.wrapping_add(bytes)),
        }
    }
}

/// Backings by number, as a window needs them.
pub type Backings = BTreeMap<u32, Backing>;

/// A reserved range of address space that stands for the frames of one slot.
///
/// Invariant: `base..base + len` was mapped by [`Window::reserve`] and is unmapped by `drop` only; no Rust reference ever
/// points into it. Every unsafe call below relies on this.
#[derive(Debug)]
pub struct Window {
    base: usize,
    len: usize,
    gfns: GfnRange,
    shown: RunMap<Shows>,
    /// How the client has its memory for the slot mapped: a run of it may not be one mapping.
    client: Vec<Source>,
    /// Where it is. A child of fork has a copy of this value, and something else at these addresses.
    owner: AddressSpace,
}

const HUGE_1G: usize = 1 << 30;
const HUGE_2M: usize = 1 << 21;

impl Window {
    /// Address space for `gfns`, congruent with the guest address so that huge mappings fit, showing nothing.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn reserve(gfns: GfnRange) -> Result<Self, Errno> {
        let len = usize::try_from(gfns.len()).ok().and_then(|pages| pages.checked_mul(1 << PAGE_SHIFT));
        let len = len.ok_or(Errno::NOMEM)?;
        let owner = AddressSpace::current()?;
        let align = if len >= HUGE_1G { HUGE_1G } else { HUGE_2M };
        let room = len.checked_add(align).ok_or(Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let start =
            unsafe { rustix::mm::mmap_anonymous(core::ptr::null_mut(), room, ProtFlags::empty(), flags) }?.addr();
        let wanted = usize::try_from(gfns.start().gpa()).unwrap_or(0) & (align - 1);
        let base = start + (wanted.wrapping_sub(start) & (align - 1));
        trim(start, base);
        trim(base + len, start + room);
        // Where there is no room for them a conversion will be refused.
        let _ = spare::take_back();
        let mut shown = RunMap::new();
        shown.insert(gfns.start().0, gfns.len(), Shows::Nothing);
        Ok(Self { base, len, gfns, shown, client: Vec::new(), owner })
    }

    /// Address of the first frame.
    #[must_use]
    pub fn base(&self) -> usize {
        self.base
    }

    /// The frames.
    #[must_use]
    pub fn gfns(&self) -> GfnRange {
        self.gfns
    }

    /// The same window for frames that start elsewhere.
    pub fn move_to(&mut self, start: Gfn) -> Result<(), Errno> {
        let gfns = self.gfns.rebase(start).ok_or(Errno::INVAL)?;
        let mut shown = RunMap::new();
        for (first, len, shows) in self.shown.iter() {
            shown.insert(first - self.gfns.start().0 + start.0, len, *shows);
        }
        (self.gfns, self.shown) = (gfns, shown);
        Ok(())
    }

    /// Learns how the client's memory is mapped where [`Shows::Client`] of this window points to.
    pub fn learn_client(&mut self, sources: Vec<Source>) {
        self.client = sources;
    }

    /// Whether the client's memory at `address` can be read, or written.
    #[must_use]
    pub fn client_allows(&self, address: usize, write: bool) -> bool {
        let mut areas = self.client.iter().map(|source| source.area);
        areas.find(|area| area.start <= address && address < area.end).is_some_and(|area| area.allows(write))
    }

    /// Where the client's mapping at `address` ends, if that can be read.
    #[must_use]
    pub fn client_end(&self, address: usize) -> Option<usize> {
        let mut areas = self.client.iter().map(|source| source.area);
        areas
            .find(|area| area.start <= address && address < area.end)
            .filter(|area| area.allows(false))
            .map(|area| area.end)
    }

    /// Where a frame of the window lies, and what is shown there.
    #[must_use]
    pub fn at(&self, gfn: Gfn) -> Option<(usize, Shows)> {
        let shows = self.shown.get(gfn.0)?;
        Some((self.address_of(gfn), shows))
    }

    fn address_of(&self, gfn: Gfn) -> usize {
        let bytes = (gfn.0 - self.gfns.start().0) << PAGE_SHIFT;
        self.base + usize::try_from(bytes).unwrap_or(0)
    }

    /// Shows `shows` for `range` from now on. Pieces that show it already are left alone.
    ///
    /// # Errors
    /// ENOMEM when the process has too many mappings; what has been changed until then stays and is remembered.
    pub fn show(&mut self, range: GfnRange, shows: Shows, backings: &Backings) -> Result<(), Errno> {
        let Some(range) = self.gfns.intersect(range) else { return Ok(()) };
        let same = |(start, _, shown): (u64, u64, Shows)| shown == shows.advance(start - range.start().0);
        if self.shown.runs(range.start().0, range.len()).all(same) {
            return Ok(());
        }
        self.replace(range, shows, backings)
    }

    /// Like [`Window::show`], also where nothing seems to change: the client's own mapping was replaced.
    ///
    /// # Errors
    /// As [`Window::show`].
    pub fn replace(&mut self, range: GfnRange, shows: Shows, backings: &Backings) -> Result<(), Errno> {
        let Some(range) = self.gfns.intersect(range) else { return Ok(()) };
        let mut room = Ok(());
        match self.map(range, shows, backings) {
            Err(Errno::NOMEM) => {
                spare::release();
                let done = self.join(backings).and_then(|()| self.map(range, shows, backings));
                room = spare::take_back();
                done?;
            }
            done => done?,
        }
        self.shown.insert(range.start().0, range.len(), shows);
        room
    }

    /// Maps every run anew, as one: seams (see [`map`]) count as mappings, of which a process has a limited number.
    fn join(&self, backings: &Backings) -> Result<(), Errno> {
        let runs =
            self.shown.iter().filter_map(|(start, len, shows)| Some((GfnRange::with_len(Gfn(start), len)?, *shows)));
        runs.into_iter().try_for_each(|(range, shows)| self.map(range, shows, backings))
    }

    fn map(&self, range: GfnRange, shows: Shows, backings: &Backings) -> Result<(), Errno> {
        let address = self.address_of(range.start());
        let len = usize::try_from(range.len() << PAGE_SHIFT).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the range lies in the window, by the invariant of the type and because callers cut it.
        unsafe { map(address, len, shows, backings, &self.client) }
    }
}

/// Maps what a part of a window shows.
///
/// A part of 2 MiB or more is advised about; a smaller one is not, so that the kernel never makes one mapping of the two. A
/// page that was converted once keeps a mapping of its own: to replace that is twice as fast as to cut a page out of a larger
/// one, which takes away KVM's translations of the 2 MiB around it as well (`vma_adjust_trans_huge`).
///
/// # Safety
/// `[address, address + len)` must lie in a window.
unsafe fn map(address: usize, len: usize, shows: Shows, backings: &Backings, client: &[Source]) -> Result<(), Errno> {
    // SAFETY: all three replace a part of a window, which the caller owns.
    unsafe {
        match shows {
            Shows::Nothing => backing::map_nothing_at(address, len),
            Shows::Client(from) => {
                alias(from, address, len, client)?;
                if len >= HUGE_2M {
                    backing::keep_from_children(address, len);
                }
                Ok(())
            }
            Shows::Backing(number, offset) => {
                let backing = backings.get(&number).ok_or(Errno::BADF)?;
                backing.map_at(address, len, offset)?;
                if len >= HUGE_2M {
                    backing::prefer_huge_pages(address, len);
                }
                Ok(())
            }
        }
    }
}

/// Aliases the client's memory, mapping by mapping; holes in it become holes of the window, as KVM would find them.
///
/// # Safety
/// `[to, to + len)` must lie in a window.
unsafe fn alias(from: usize, to: usize, len: usize, client: &[Source]) -> Result<(), Errno> {
    let end = from.saturating_add(len);
    let target = |address: usize| address.wrapping_add(to.wrapping_sub(from));
    let mut next = from;
    for piece in client.iter().filter_map(|source| source.part(from, end)) {
        let Area { start, end, .. } = piece.area;
        // SAFETY: both lie in the part of the window that the caller named.
        unsafe {
            nothing_between(target(next), target(start))?;
            match piece.map_at(target(start)) {
                Err(Errno::NOMEM) => return Err(Errno::NOMEM),
                // A device mapping cannot be duplicated; it stays out of the guest's reach. The failed call may have
                // unmapped its target.
                Err(_) => backing::map_nothing_at(target(start), end - start)?,
                Ok(()) => {}
            }
        }
        next = end;
    }
    // SAFETY: as above.
    unsafe { nothing_between(target(next), target(end)) }
}

/// # Safety
/// `[start, end)` must lie in a window.
unsafe fn nothing_between(start: usize, end: usize) -> Result<(), Errno> {
    // SAFETY: of the caller.
    if start < end { unsafe { backing::map_nothing_at(start, end - start) } } else { Ok(()) }
}

fn trim(start: usize, end: usize) {
    if start < end {
        // SAFETY: both callers name parts of a mapping that was made a moment ago and that nothing refers to.
        let _ = unsafe { rustix::mm::munmap(backing::pointer(start), end - start) };
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if AddressSpace::current() == Ok(self.owner) {
            trim(self.base, self.base + self.len);
        }
    }
}
