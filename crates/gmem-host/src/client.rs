//! The client's own guest memory, made shareable.
//!
//! A window can show the client's pages only if a second mapping of them can be made, page by page. Shared mappings allow
//! that, but not those of hugetlb pages, which cannot be mapped in part; these and private mappings are moved into a memfd
//! at the same address when they become guest memory. The client does not notice, except that
//! operations which depend on the memory being private anonymous memory are translated by [`ClientMemory::advise_dontneed`].
//!
//! A private mapping of a file is copied whole and is no mapping of the file any more: what others write to the file later is
//! not seen, `MADV_DONTNEED` gives zeros instead of the file's bytes, and pages beyond the file's end read as zeros.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::Advice;

use crate::backing::{self, Backing};
use crate::maps::{Area, Maps, Sharing, VmFlags};
use crate::sys;

/// Ranges of client memory that were moved into memfds.
#[derive(Debug, Default)]
pub struct ClientMemory {
    moved: BTreeMap<usize, Moved>,
    /// How many were left when all were last looked at.
    looked_at: usize,
    rest: Option<Rest>,
}

/// What is left of a mapping of which a part was moved, and its flags: to find those takes as long as there are mappings, and slots
/// are often parts of one mapping.
#[derive(Debug)]
struct Rest {
    range: (usize, usize),
    flags: VmFlags,
}

#[derive(Clone, Debug)]
struct Moved {
    end: usize,
    /// Offset of the first byte in the backing.
    offset: u64,
    was: Was,
    /// A child of fork is to find zeros (`MADV_WIPEONFORK`).
    wiped: bool,
    backing: Arc<Backing>,
}

/// How the client had it mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Was {
    Anonymous,
    PrivateFile,
    Shared,
}

impl From<&Area> for Was {
    fn from(area: &Area) -> Self {
        match (area.sharing, area.file) {
            (Sharing::Shared, _) => Self::Shared,
            (_, Some(_)) => Self::PrivateFile,
            (_, None) => Self::Anonymous,
        }
    }
}

impl Moved {
    /// Memory for what is mapped in `area`, which lies in huge pages as the area does.
    fn new(area: &Area, wiped: bool) -> Result<Self, Errno> {
        let offset = (area.start % HUGE) as u64;
        let backing = Arc::new(Backing::new(offset + (area.end - area.start) as u64)?);
        Ok(Self { end: area.end, offset, was: area.into(), wiped, backing })
    }

    /// Whether an area within this piece, which starts at `base`, is still what it was moved to: libc unmaps memory of its own
    /// without a call that gmem sees.
    fn is_in(&self, base: usize, area: &Area) -> bool {
        let offset = self.offset + (area.start - base) as u64;
        area.file.is_some() && area.file == self.backing.id() && area.offset == offset
    }

    /// The parts of this piece, which starts at `base`, that are mapped.
    fn mapped(&self, base: usize, maps: &Maps) -> Result<Vec<(usize, Self)>, Errno> {
        let areas = self.areas(base, maps)?.into_iter();
        Ok(areas.map(|area| (area.start, Self { end: area.end, offset: area.offset, ..self.clone() })).collect())
    }

    /// The same as areas.
    fn areas(&self, base: usize, maps: &Maps) -> Result<Vec<Area>, Errno> {
        let mut areas = maps.areas(base, self.end)?;
        areas.retain(|area| self.is_in(base, area));
        Ok(areas)
    }
}

/// Moved memory that the client has mapped elsewhere now, by the addresses there.
#[derive(Debug, Default)]
pub struct Carried(Vec<(usize, Moved)>);

impl Carried {
    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A mapping of the last piece goes on beyond it, in `area`, which gets memory of its own: more of the backing, or if that
    /// has been used for something else, new memory like any other.
    fn grow(&mut self, area: &Area) {
        let Some((start, last)) = self.0.last_mut().filter(|(_, last)| last.end == area.start) else { return };
        let from = last.offset + (area.start - *start) as u64;
        let len = area.end - area.start;
        if last.backing.grow(from, from + len as u64).is_ok() {
            last.end = area.end;
        } else if last.was != Was::Shared {
            // SAFETY: the client has just got this range from the kernel, and expects zeros there.
            let _ = unsafe { backing::map_new_at(area.start, len, area.prot) };
        }
    }
}

/// Client memory that is mapped in one way, as the source of a second mapping.
#[derive(Clone, Debug)]
pub struct Source {
    /// Where the client has it, and how.
    pub area: Area,
    /// Where it lies in a backing, if it was moved there.
    moved: Option<(Arc<Backing>, u64)>,
}

impl Source {
    /// The part within `[start, end)`.
    pub(crate) fn part(&self, start: usize, end: usize) -> Option<Self> {
        let area = self.area.part(start, end)?;
        let further = (area.start - self.area.start) as u64;
        let moved = self.moved.as_ref().map(|(backing, offset)| (Arc::clone(backing), offset + further));
        Some(Self { area, moved })
    }

    /// Maps it a second time, at `to`. What was moved replaces the target in one step; the rest leaves it unmapped in between.
    ///
    /// # Errors
    /// ENOMEM when the process has too many mappings; others for what cannot be duplicated, and then the target may be unmapped.
    ///
    /// # Safety
    /// As [`Backing::map_at`] for as many bytes at `to`.
    pub(crate) unsafe fn map_at(&self, to: usize) -> Result<(), Errno> {
        let len = self.area.end - self.area.start;
        // SAFETY: of the caller.
        unsafe {
            match &self.moved {
                Some((backing, offset)) => backing.map_protected_at(to, len, *offset, self.area.prot),
                None => backing::alias_at(self.area.start, to, len),
            }
        }
    }
}

const PAGE: usize = 4096;
/// Bytes of a huge page.
const HUGE: usize = 1 << 21;
/// Pieces of moved memory that are all looked at whenever one is added.
const FEW: usize = 16;
/// Bytes whose page map is read at once.
const BLOCK: usize = 1 << 25;

impl ClientMemory {
    /// Makes every mapping in `[start, start + len)` one that can be duplicated. Holes stay holes.
    ///
    /// A hugetlb file that another process maps as well is no longer the same memory afterwards.
    ///
    /// Other threads must not write to private mappings in the range meanwhile: a write between the copy and the replacement
    /// would be lost.
    ///
    /// # Errors
    /// ENOMEM, EMFILE; EOPNOTSUPP for memory that a userfaultfd has a part in, which would be told of no fault any more. What was
    /// moved before the error stays moved, which changes nothing for the client.
    pub fn make_shareable(&mut self, start: usize, len: usize) -> Result<(), Errno> {
        let end = start.saturating_add(len);
        let maps = Maps::now()?;
        let areas = maps.areas(start, end)?;
        self.forget_unmapped(start, end, &maps)?;
        for area in areas {
            match area.sharing {
                Sharing::Private => self.move_to_memfd(&area, &maps)?,
                Sharing::Shared if is_hugetlb(&area) => self.move_to_memfd(&area, &maps)?,
                Sharing::Shared | Sharing::Program => {}
            }
        }
        Ok(())
    }

    fn move_to_memfd(&mut self, area: &Area, maps: &Maps) -> Result<(), Errno> {
        let (start, end) = (area.start, area.end);
        let len = end - start;
        let whole = maps.around(start)?;
        let flags = match self.rest.take() {
            Some(rest) if whole == Some(rest.range) => rest.flags,
            _ => VmFlags::at(start).unwrap_or_default(),
        };
        if flags.has_userfaultfd() {
            return Err(Errno::OPNOTSUPP);
        }
        let wiped = flags.has("wf");
        let moved = self.room_after(start, len, (area.into(), wiped)).map_or_else(|| Moved::new(area, wiped), Ok)?;
        let (backing, offset) = (&moved.backing, moved.offset);
        if !copy_contents(area, backing, offset)? {
            return Ok(());
        }
        // SAFETY: the client's mapping of this range is replaced by one with the same contents at the same address.
        unsafe {
            backing.map_protected_at(start, len, offset, area.prot)?;
            backing::prefer_huge_pages(start, len);
            backing::restore_flags(start, len, &flags);
        }
        self.cut(start, end);
        self.moved.insert(start, moved);
        self.rest = whole.filter(|whole| end < whole.1).map(|whole| Rest { range: (end, whole.1), flags });
        Ok(())
    }

    /// Room for `len` bytes from `start` in the backing of what was moved right before there, as long as nothing else has it: slots of
    /// one mapping take one descriptor, and become one mapping again.
    fn room_after(&self, start: usize, len: usize, how: (Was, bool)) -> Option<Moved> {
        let (&base, before) = self.moved.range(..start).next_back()?;
        if before.end != start || (before.was, before.wiped) != how {
            return None;
        }
        let offset = before.offset + (start - base) as u64;
        before.backing.grow(offset, offset + len as u64).ok()?;
        Some(Moved { end: start + len, offset, ..before.clone() })
    }

    /// What the client has mapped in `[start, start + len)`, in ascending order.
    ///
    /// # Errors
    /// Those of reading `/proc/self/maps`.
    pub fn sources(&self, maps: &Maps, start: usize, len: usize) -> Result<Vec<Source>, Errno> {
        let mut sources = Vec::new();
        for area in maps.areas(start, start.saturating_add(len))? {
            let whole = Source { area, moved: None };
            let mut next = area.start;
            for (from, piece) in self.pieces(area.start, area.end) {
                let Some(area) = area.part(from, piece.end).filter(|area| piece.is_in(from, area)) else { continue };
                sources.extend(whole.part(next, from));
                next = area.end;
                sources.push(Source { area, moved: Some((piece.backing, piece.offset)) });
            }
            sources.extend(whole.part(next, area.end));
        }
        Ok(sources)
    }

    /// `MADV_DONTNEED` on memory that was private: the client expects zeros afterwards, which on shared memory only a hole gives.
    /// Whole pages go, as many as `len` touches.
    ///
    /// # Errors
    /// Those of punching the hole.
    pub fn advise_dontneed(&self, start: usize, len: usize) -> Result<(), Errno> {
        let len = len.checked_next_multiple_of(PAGE).unwrap_or(len);
        for (from, piece) in self.pieces(start, start.saturating_add(len)).filter(|(_, piece)| piece.was != Was::Shared)
        {
            piece.backing.punch(piece.offset, (piece.end - from) as u64)?;
        }
        Ok(())
    }

    /// `MADV_FREE`, which the host refuses for shared memory: lazily freed memory may as well be freed at once. `None` where
    /// the host's answer is the right one.
    #[must_use]
    pub fn advise_free(&self, start: usize, len: usize) -> Option<Result<(), Errno>> {
        let end = end_of_pages(start, len)?;
        let maps = self.pieces(start, end).next().and_then(|_| Maps::now().ok())?;
        let anonymous = self.pieces(start, end).filter(|(_, piece)| piece.was == Was::Anonymous);
        let mut mapped = anonymous.flat_map(|(from, piece)| piece.mapped(from, &maps).unwrap_or_default());
        let whole = mapped.try_fold(start, |next, (from, piece)| (from == next).then_some(piece.end)) == Some(end);
        whole.then(|| {
            // SAFETY: the memory is shared, so that this changes nothing, but it is refused for the same reasons.
            unsafe { rustix::mm::madvise(backing::pointer(start), end - start, Advice::LinuxDontNeed) }?;
            self.advise_dontneed(start, len)
        })
    }

    /// `MADV_REMOVE`: the error for memory that was private, which has no file to remove anything from, or not one that it may
    /// write to.
    #[must_use]
    pub fn refuses_removal(&self, start: usize, len: usize) -> Option<Errno> {
        let end = end_of_pages(start, len)?;
        let maps = self.pieces(start, end).next().and_then(|_| Maps::now().ok())?;
        let mut mapped = self
            .pieces(start, end)
            .filter(|(from, piece)| piece.areas(*from, &maps).is_ok_and(|areas| !areas.is_empty()));
        mapped.find_map(|(_, piece)| match piece.was {
            Was::Anonymous => Some(Errno::INVAL),
            Was::PrivateFile => Some(Errno::ACCESS),
            Was::Shared => None,
        })
    }

    /// What was moved within `[start, end)`, by address.
    fn pieces(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, Moved)> {
        let before = self.moved.range(..start).next_back();
        before.into_iter().chain(self.moved.range(start..end)).filter_map(move |(&base, moved)| {
            let (from, end) = (base.max(start), moved.end.min(end));
            (from < end).then(|| (from, Moved { end, offset: moved.offset + (from - base) as u64, ..moved.clone() }))
        })
    }

    /// What was moved within `[start, end)` and is mapped no longer is gone; elsewhere, too, if it is cheap to find out: where there
    /// is little, or as much again as there was the last time.
    fn forget_unmapped(&mut self, start: usize, end: usize, maps: &Maps) -> Result<(), Errno> {
        let all = self.moved.len() <= FEW || self.moved.len() >= 2 * self.looked_at;
        let (start, end) = if all { (0, usize::MAX) } else { (start, end) };
        let still: Result<Vec<_>, _> = self.pieces(start, end).map(|(base, moved)| moved.mapped(base, maps)).collect();
        let still = still?;
        self.cut(start, end);
        self.moved.extend(still.into_iter().flatten());
        if all {
            self.looked_at = self.moved.len();
        }
        Ok(())
    }

    /// The client replaced or unmapped `[start, end)`: what was moved there is gone.
    pub fn forget(&mut self, start: usize, end: usize) {
        self.rest.take_if(|rest| rest.range.0 < end && start < rest.range.1);
        self.cut(start, end);
    }

    fn cut(&mut self, start: usize, end: usize) {
        let touched: Vec<usize> = {
            let before = self.moved.range(..start).next_back();
            before.into_iter().chain(self.moved.range(start..end)).map(|(&base, _)| base).collect()
        };
        for base in touched {
            let Some(moved) = self.moved.remove(&base) else { continue };
            if start > base {
                let head = Moved { end: moved.end.min(start), backing: moved.backing.clone(), ..moved };
                self.moved.insert(base, head);
            }
            if moved.end > end {
                let offset = moved.offset + (end - base) as u64;
                self.moved.insert(end, Moved { offset, ..moved });
            }
        }
    }

    /// The client moved or resized its mapping of `[start, start + old)`, which is at `[base, base + new)` now; with `keeps` the
    /// old one is still there. What was moved to memfds there goes along, by [`ClientMemory::put_down`], when all that is known of
    /// both ranges was forgotten.
    #[must_use]
    pub fn pick_up(&self, (start, old): (usize, usize), (base, new): (usize, usize), keeps: bool) -> Carried {
        let (old, new) = (old.next_multiple_of(PAGE), new.next_multiple_of(PAGE));
        // An old length of zero makes a second mapping.
        let common = if old == 0 { new } else { old.min(new) };
        let mut pieces = self.pieces(start, start + common).peekable();
        let Some(maps) = pieces.peek().and_then(|_| Maps::now().ok()) else { return Carried::default() };
        let there = |address: usize| base + (address - start);
        let moved = pieces.map(|(from, piece)| (there(from), Moved { end: there(piece.end), ..piece }));
        let mapped = moved.flat_map(|(from, piece)| piece.mapped(from, &maps).unwrap_or_default());
        let mut carried = Carried(mapped.collect());
        for area in maps.areas(base + common, base + new).unwrap_or_default() {
            carried.grow(&area);
        }
        if keeps && old > 0 {
            self.leave_nothing_behind(start, start + old, &maps);
        }
        carried
    }

    /// The old mapping of private memory that was moved with `MREMAP_DONTUNMAP` is empty afterwards.
    fn leave_nothing_behind(&self, start: usize, end: usize, maps: &Maps) {
        for (from, piece) in self.pieces(start, end).filter(|(_, piece)| piece.was != Was::Shared) {
            for area in piece.areas(from, maps).unwrap_or_default() {
                // SAFETY: the client's mapping of this range, of which it expects that it holds nothing any more.
                let _ = unsafe { backing::map_new_at(area.start, area.end - area.start, area.prot) };
            }
        }
    }

    /// See [`ClientMemory::pick_up`].
    pub fn put_down(&mut self, carried: Carried) {
        for (base, moved) in carried.0 {
            self.forget(base, moved.end);
            self.moved.insert(base, moved);
        }
    }

    /// This process is a child of fork: memory that was private when it was moved becomes private again. The child has what
    /// was there at the fork, as long as the parent does not change it before the child does.
    ///
    /// What cannot be mapped (`vm.max_map_count`) stays shared with the parent.
    pub fn make_private(&mut self) {
        let moved = std::mem::take(&mut self.moved);
        if moved.is_empty() {
            return;
        }
        let Ok(maps) = Maps::now() else { return };
        for (start, moved) in moved.into_iter().filter(|(_, moved)| moved.was != Was::Shared) {
            for area in moved.areas(start, &maps).unwrap_or_default() {
                let (at, len) = (area.start, area.end - area.start);
                // SAFETY: the client's mapping of this range is replaced by one with the contents that it expects.
                let _ = unsafe {
                    match moved.wiped {
                        true => backing::map_new_at(at, len, area.prot),
                        false => moved.backing.map_private_at(at, len, area.offset, area.prot),
                    }
                };
            }
        }
    }

    /// The client changed what the kernel keeps about a mapping: by `madvise`, `mlock` or a userfaultfd.
    pub fn flags_changed(&mut self) {
        self.rest = None;
    }

    /// Whether anything was moved.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty()
    }
}

/// Where the pages of an `madvise` end, if the kernel accepts its range and has anything to do.
fn end_of_pages(start: usize, len: usize) -> Option<usize> {
    let end = start.checked_add(len.checked_next_multiple_of(PAGE)?)?;
    (start.is_multiple_of(PAGE) && start < end).then_some(end)
}

/// Whether a shared mapping is of huge pages: a single page of it cannot be mapped a second time, and yet it is memory, which
/// the mapping of a device is not.
fn is_hugetlb(area: &Area) -> bool {
    let cannot_be_duplicated = backing::duplicate_page(area.start).is_err_and(|error| error == Errno::INVAL);
    cannot_be_duplicated && sys::copy_from_client(area.start, &mut [0u8; 8]).is_ok()
}

/// Copies the pages of an area that hold anything but zeros, so that memory which was never touched stays absent. Whether all
/// of them could be read: if not, the area must stay as it is.
///
/// A page beyond the end of a file cannot be read, and is nothing that a guest could have had. A file of which no page can be
/// read may be a device.
fn copy_contents(area: &Area, to: &Backing, offset: u64) -> Result<bool, Errno> {
    let memory = OwnMemory::open();
    let pagemap = open_pagemap().ok();
    let may_lack_pages = area.file.is_some() && area.allows(false);
    let mut is_memory = area.file.is_none();
    let mut bytes = vec![0; PAGE];
    for block in (area.start..area.end).step_by(BLOCK) {
        let end = (block + BLOCK).min(area.end);
        // A file has bytes also where this process has no page yet.
        let known = pagemap.as_ref().filter(|_| area.file.is_none());
        let pages = known.and_then(|pagemap| present_pages(pagemap, block, end));
        for page in pages.unwrap_or_else(|| (block..end).step_by(PAGE).collect()) {
            let read = memory.read(page, &mut bytes);
            is_memory |= read;
            if read && bytes.iter().any(|byte| *byte != 0) {
                to.write(offset + (page - area.start) as u64, &bytes)?;
            } else if !read && !may_lack_pages {
                return Ok(false);
            }
        }
    }
    Ok(is_memory)
}

/// The memory of this process, to be read whatever its protection is, if the kernel allows that.
struct OwnMemory(Option<rustix::fd::OwnedFd>);

impl OwnMemory {
    fn open() -> Self {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
        Self(rustix::fs::open("/proc/self/mem", flags, rustix::fs::Mode::empty()).ok())
    }

    fn read(&self, address: usize, bytes: &mut [u8]) -> bool {
        let forced = self.0.as_ref().and_then(|file| rustix::io::pread(file, &mut *bytes, address as u64).ok());
        forced == Some(bytes.len()) || sys::copy_from_client(address, bytes).is_ok()
    }
}

fn open_pagemap() -> Result<rustix::fd::OwnedFd, Errno> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open("/proc/self/pagemap", flags, rustix::fs::Mode::empty())
}

/// Addresses of the pages in `[start, end)` that the process has, present or swapped; `None` if the kernel does not say.
fn present_pages(pagemap: &rustix::fd::OwnedFd, start: usize, end: usize) -> Option<Vec<usize>> {
    const PRESENT_OR_SWAPPED: u8 = 0xc0;
    let mut entries = vec![0u8; (end - start) / PAGE * 8];
    let n = rustix::io::pread(pagemap, &mut entries, (start / PAGE * 8) as u64).ok()?;
    let there = |entry: &[u8]| entry.last().is_some_and(|top| top & PRESENT_OR_SWAPPED != 0);
    let pages = entries[..n].chunks(8).enumerate().filter(|(_, entry)| there(entry));
    (n == entries.len()).then(|| pages.map(|(page, _)| start + page * PAGE).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of moved memory, which is not mapped, that holds something, and what is left of that.
    fn after_dontneed(was: Was) -> u8 {
        let backing = Arc::new(Backing::new(PAGE as u64).unwrap());
        backing.write(0, &[0x5a; PAGE]).unwrap();
        let mut memory = ClientMemory::default();
        memory.moved.insert(PAGE, Moved { end: 2 * PAGE, offset: 0, was, wiped: false, backing: Arc::clone(&backing) });
        memory.advise_dontneed(PAGE, 1).unwrap();
        let mut bytes = [1u8; PAGE];
        rustix::io::pread(backing.fd(), &mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        bytes[0]
    }

    /// libc's `free` unmaps without a call that gmem sees: what was moved there must not be kept for long.
    #[test]
    fn memory_that_was_unmapped_unseen_is_given_back() {
        let mut memory = ClientMemory::default();
        let mut most = 0;
        for page in 1..=1000 {
            let backing = Arc::new(Backing::new(PAGE as u64).unwrap());
            let piece = Moved { end: (page + 1) * PAGE, offset: 0, was: Was::Anonymous, wiped: false, backing };
            memory.moved.insert(page * PAGE, piece);
            most = most.max(memory.moved.len());
            // Nothing of this is mapped.
            memory.make_shareable(PAGE, 0).unwrap();
        }
        assert!(most <= FEW + 1 && memory.moved.is_empty(), "{most}, then {}", memory.moved.len());
    }

    #[test]
    fn memory_that_is_not_needed_goes_unless_it_was_shared() {
        assert_eq!(after_dontneed(Was::Anonymous), 0);
        assert_eq!(after_dontneed(Was::PrivateFile), 0);
        assert_eq!(after_dontneed(Was::Shared), 0x5a);
    }
}
