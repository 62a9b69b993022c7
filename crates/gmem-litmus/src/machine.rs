//! Everything that the core leaves to its callers: locks, tables, cached translations and the contents of memory.

use std::collections::BTreeSet;

use bitflags::bitflags;
use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, IndexRange, PageIndex, PageNumber, PageRange, Pfn, PfnRange};
use gmem_core::file::FileId;
use gmem_core::invalidate::Filter;
use gmem_core::ops::{DirectMap, Lock, Pages};
use gmem_core::runs::{Linear, RunMap};
use gmem_core::vendor::{Contents, Mapping, Side};

use crate::value::Value;

bitflags! {
    /// What happened on the way. Most of it must never happen in any program.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
    pub struct Events: u16 {
        /// A guest touched memory that had been given back.
        const USE_AFTER_FREE = 1 << 0;
        /// A guest read bytes of someone else.
        const SAW_FOREIGN = 1 << 1;
        /// A host thread read a value that a guest had put into private memory.
        const HOST_SAW_SECRET = 1 << 2;
        /// The kernel touched a page that it cannot reach: an oops.
        const HOST_OOPS = 1 << 3;
        /// Threads wait for one another for ever.
        const DEADLOCK = 1 << 4;
        /// The bookkeeping of the core is inconsistent at the end, or an invalidation was left open.
        const INCONSISTENT = 1 << 5;
        /// At the end the guest has a mapping that is not what its frame is backed by.
        const STALE_MAPPING = 1 << 6;
        /// An operation ended in another way than the program pins.
        const UNEXPECTED = 1 << 7;
        /// No end can be reached any more.
        const LIVELOCK = 1 << 8;
        /// A vCPU left with a memory-fault exit although nothing was wrong any more when the VMM looked.
        const SPURIOUS_EXIT = 1 << 9;
        /// The guest came to harm: it is dead, or a vCPU cannot go on.
        const GUEST_DEAD = 1 << 10;
        /// Whoever got memory that had been given back found it out of the direct map.
        const HIDDEN_AFTER_FREE = 1 << 11;
        /// A mapping that was taken away came back unchanged: taking it was not needed. Only told to programs that ask.
        const REFAULTED = 1 << 12;
    }
}

impl Events {
    /// What is forbidden in every program.
    pub const NEVER: Self = Self::USE_AFTER_FREE
        .union(Self::SAW_FOREIGN)
        .union(Self::HOST_OOPS)
        .union(Self::DEADLOCK)
        .union(Self::INCONSISTENT)
        .union(Self::STALE_MAPPING)
        .union(Self::UNEXPECTED)
        .union(Self::LIVELOCK)
        .union(Self::HIDDEN_AFTER_FREE);

    /// What can only be told when everything has ended.
    pub(crate) const NEVER_AT_END: Self = Self::DEADLOCK.union(Self::INCONSISTENT).union(Self::STALE_MAPPING);

    const NAMES: &'static [(&'static str, Self)] = &[
        ("use-after-free", Self::USE_AFTER_FREE),
        ("saw-foreign", Self::SAW_FOREIGN),
        ("host-saw-secret", Self::HOST_SAW_SECRET),
        ("host-oops", Self::HOST_OOPS),
        ("deadlock", Self::DEADLOCK),
        ("inconsistent", Self::INCONSISTENT),
        ("stale-mapping", Self::STALE_MAPPING),
        ("unexpected", Self::UNEXPECTED),
        ("livelock", Self::LIVELOCK),
        ("spurious-exit", Self::SPURIOUS_EXIT),
        ("guest-dead", Self::GUEST_DEAD),
        ("hidden-after-free", Self::HIDDEN_AFTER_FREE),
        ("refaulted", Self::REFAULTED),
    ];

    /// The words of the events that are set.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().filter(move |(_, event)| self.contains(*event)).map(|(name, _)| *name)
    }

    pub(crate) fn of_word(word: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == word).map(|(_, event)| *event)
    }

    pub(crate) fn all_words() -> impl Iterator<Item = &'static str> {
        Self::NAMES.iter().map(|(name, _)| *name)
    }
}

/// What a page holds and whether the guest put it there privately.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Bytes {
    pub(crate) value: Value,
    pub(crate) secret: bool,
}

impl Linear for Bytes {
    fn advance(&self, _pages: u64) -> Self {
        *self
    }
}

/// Marks runs of pages that belong to a set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Member;

impl Linear for Member {
    fn advance(&self, _pages: u64) -> Self {
        Self
    }
}

/// The VMM's own memory at one page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct UserPage {
    /// `None` when nothing is mapped there.
    pub(crate) version: Option<u8>,
    newest: u8,
}

/// A translation, in a table or cached by a vCPU.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Entry {
    pub(crate) mapping: Mapping,
    /// Pages behind it that were given back meanwhile.
    gone: Vec<PfnRange>,
}

impl Entry {
    fn frames(&self) -> Option<PfnRange> {
        PageRange::with_len(self.mapping.pfn, self.mapping.level.pages())
    }

    fn gfns(&self) -> Option<GfnRange> {
        PageRange::with_len(self.mapping.gfn, self.mapping.level.pages())
    }

    /// The frame behind `gfn`, and whether it was given back.
    pub(crate) fn frame(&self, gfn: Gfn) -> (Pfn, bool) {
        let pfn = Pfn(self.mapping.pfn.0.wrapping_add(gfn.0.wrapping_sub(self.mapping.gfn.0)));
        (pfn, self.gone.iter().any(|range| range.contains(pfn)))
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct Locks {
    slots: Option<u8>,
    /// Holders by file: bit per thread for shared, one thread for exclusive.
    files: Vec<(FileId, Option<u8>, u16)>,
    /// Pages whose folios are locked, and by whom.
    folios: Vec<(FileId, PageIndex, PageIndex, u8)>,
}

/// The machine around the core.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Machine {
    locks: Locks,
    stage2: Vec<Entry>,
    cached: Vec<Vec<Entry>>,
    bytes: RunMap<Bytes>,
    user: Vec<(u64, UserPage)>,
    hidden: RunMap<Member>,
    host_cached: BTreeSet<Pfn>,
    mapped_by_vmm: BTreeSet<(FileId, PageIndex)>,
    /// Threads between snapshot and end of a fault.
    reading: u16,
    /// For each thread that waits for readers: which ones are left.
    waits: Vec<(u8, u16)>,
    pub(crate) measured: Vec<(Gfn, u8)>,
    pub(crate) events: Events,
    pub(crate) vm_closed: bool,
    freed: RunMap<Member>,
    /// Mappings that were taken away, where the program asks for them.
    lost: Option<Vec<Mapping>>,
}

impl Default for Events {
    fn default() -> Self {
        Self::empty()
    }
}

/// First frame of the VMM's own memory; far from those of files.
const USER_FRAMES: u64 = 1 << 40;

impl Machine {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self { cached: vec![Vec::new(); vcpus], ..Self::default() }
    }

    // Locks.

    pub(crate) fn can_lock(&self, lock: Lock) -> bool {
        match lock {
            Lock::Slots => self.locks.slots.is_none(),
            Lock::FileExclusive(file) => self.holders(file) == (None, 0),
            Lock::FileShared(file) => self.holders(file).0.is_none(),
            Lock::Folios(Pages { file, range }) => {
                let apart = |(of, start, end, _): &(FileId, PageIndex, PageIndex, u8)| {
                    *of != file || *end <= range.start() || range.end() <= *start
                };
                self.locks.folios.iter().all(apart)
            }
        }
    }

    fn holders(&self, file: FileId) -> (Option<u8>, u16) {
        let found = self.locks.files.iter().find(|(id, ..)| *id == file);
        found.map_or((None, 0), |(_, exclusive, shared)| (*exclusive, *shared))
    }

    fn set_holders(&mut self, file: FileId, exclusive: Option<u8>, shared: u16) {
        self.locks.files.retain(|(id, ..)| *id != file);
        if exclusive.is_some() || shared != 0 {
            self.locks.files.push((file, exclusive, shared));
            self.locks.files.sort_unstable();
        }
    }

    pub(crate) fn lock(&mut self, thread: u8, lock: Lock) {
        match lock {
            Lock::Slots => self.locks.slots = Some(thread),
            Lock::FileExclusive(file) => self.set_holders(file, Some(thread), 0),
            Lock::FileShared(file) => {
                let shared = self.holders(file).1 | (1 << thread);
                self.set_holders(file, None, shared);
            }
            Lock::Folios(Pages { file, range }) => {
                self.locks.folios.push((file, range.start(), range.end(), thread));
                self.locks.folios.sort_unstable();
            }
        }
    }

    pub(crate) fn unlock(&mut self, thread: u8, lock: Lock) {
        match lock {
            Lock::Slots => self.locks.slots = self.locks.slots.filter(|holder| *holder != thread),
            Lock::FileExclusive(file) if self.holders(file).0 == Some(thread) => self.set_holders(file, None, 0),
            Lock::FileExclusive(_) => {}
            Lock::FileShared(file) => {
                let (exclusive, shared) = self.holders(file);
                self.set_holders(file, exclusive, shared & !(1 << thread));
            }
            Lock::Folios(Pages { file, range }) => {
                self.locks.folios.retain(|locked| *locked != (file, range.start(), range.end(), thread));
            }
        }
    }

    // Readers of the slots.

    /// Says whether that is a change.
    pub(crate) fn set_reading(&mut self, thread: u8, reading: bool) -> bool {
        let bit = 1 << thread;
        let was = self.reading & bit != 0;
        if reading {
            self.reading |= bit;
            return !was;
        }
        self.reading &= !bit;
        for (_, left) in &mut self.waits {
            *left &= !bit;
        }
        was
    }

    /// Waits for the readers of now, not for those to come.
    pub(crate) fn start_waiting(&mut self, thread: u8) {
        self.waits.push((thread, self.reading & !(1 << thread)));
        self.waits.sort_unstable();
    }

    pub(crate) fn is_waiting(&self, thread: u8) -> bool {
        self.waits.iter().any(|(waiter, _)| *waiter == thread)
    }

    /// Whether `thread` still waits. Forgets the wait when it is over.
    pub(crate) fn still_waits(&mut self, thread: u8) -> bool {
        let waits = self.waits.iter().any(|(waiter, left)| *waiter == thread && *left != 0);
        if !waits {
            self.waits.retain(|(waiter, _)| *waiter != thread);
        }
        waits
    }

    // Stage 2.

    /// Remembers from now on which mappings were taken away.
    pub(crate) fn remember_lost(&mut self) {
        self.lost = Some(Vec::new());
    }

    /// Whether this very mapping was taken away before.
    pub(crate) fn was_lost(&self, mapping: Mapping) -> bool {
        self.lost.as_ref().is_some_and(|lost| lost.contains(&mapping))
    }

    pub(crate) fn map(&mut self, mapping: Mapping, separate: bool) {
        let entry = Entry { mapping, gone: Vec::new() };
        let gfns = entry.gfns();
        self.stage2.retain(|old| {
            let apart = separate && old.mapping.side != mapping.side;
            apart || old.gfns().zip(gfns).is_none_or(|(old, new)| old.intersect(new).is_none())
        });
        self.stage2.push(entry);
        self.stage2.sort_unstable_by_key(|entry| (entry.mapping.gfn, entry.mapping.side));
    }

    /// Takes the mappings that overlap out and tells the architecture of each. The filter counts only where the
    /// sides have tables of their own.
    pub(crate) fn zap(&mut self, vm: &mut Vm, range: GfnRange, filter: Filter) {
        let separate = vm.arch.has_separate_tables();
        let hit = |entry: &Entry| {
            let meant = !separate || filter.includes(entry.mapping.side);
            meant && entry.gfns().is_some_and(|gfns| gfns.intersect(range).is_some())
        };
        let (out, rest): (Vec<Entry>, Vec<Entry>) = self.stage2.drain(..).partition(hit);
        self.stage2 = rest;
        if let Some(lost) = &mut self.lost {
            lost.extend(out.iter().map(|entry| entry.mapping));
            lost.sort_unstable_by_key(|mapping| (mapping.gfn, mapping.pfn, mapping.side));
            lost.dedup();
        }
        for entry in out {
            let contents = vm.arch.unmap(entry.mapping);
            if let (Side::Private, Some(frames)) = (entry.mapping.side, entry.frames()) {
                self.becomes(frames, contents);
            }
        }
    }

    pub(crate) fn flush(&mut self) {
        self.cached.iter_mut().for_each(Vec::clear);
    }

    fn find(entries: &[Entry], gfn: Gfn, side: Option<Side>) -> Option<&Entry> {
        entries.iter().find(|entry| {
            let right = side.is_none_or(|side| side == entry.mapping.side);
            right && entry.gfns().is_some_and(|gfns| gfns.contains(gfn))
        })
    }

    pub(crate) fn cached(&self, vcpu: usize, gfn: Gfn, side: Option<Side>) -> Option<&Entry> {
        Self::find(self.cached.get(vcpu)?, gfn, side)
    }

    pub(crate) fn in_table(&self, gfn: Gfn, side: Option<Side>) -> Option<&Entry> {
        Self::find(&self.stage2, gfn, side)
    }

    /// Caches the table's translation.
    pub(crate) fn cache(&mut self, vcpu: usize, entry: Entry) {
        if let Some(entries) = self.cached.get_mut(vcpu) {
            entries.push(entry);
            entries.sort_unstable_by_key(|entry| (entry.mapping.gfn, entry.mapping.side));
        }
    }

    pub(crate) fn drop_cached(&mut self, vcpu: usize, gfn: Gfn) {
        if let Some(entries) = self.cached.get_mut(vcpu) {
            entries.retain(|entry| entry.gfns().is_none_or(|gfns| !gfns.contains(gfn)));
        }
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.stage2
    }

    /// Replaces a mapping by smaller ones of the same frames.
    pub(crate) fn split_mapping(&mut self, gfn: Gfn) -> Option<Mapping> {
        let at = self.stage2.iter().position(|entry| entry.gfns().is_some_and(|gfns| gfns.contains(gfn)))?;
        let whole = self.stage2.get(at)?.mapping;
        let level = whole.level.smaller()?;
        self.stage2.remove(at);
        let parts = whole.level.pages() / level.pages();
        self.stage2.extend((0..parts).filter_map(|part| {
            let offset = part * level.pages();
            let (gfn, pfn) = (whole.gfn.checked_add(offset)?, whole.pfn.checked_add(offset)?);
            Some(Entry { mapping: Mapping { gfn, pfn, level, side: whole.side }, gone: Vec::new() })
        }));
        self.stage2.sort_unstable_by_key(|entry| (entry.mapping.gfn, entry.mapping.side));
        Some(whole)
    }

    // Memory.

    pub(crate) fn bytes(&self, pfn: Pfn) -> Bytes {
        self.bytes.get(pfn.0).unwrap_or(Bytes { value: Value::Foreign, secret: false })
    }

    pub(crate) fn write(&mut self, pfn: Pfn, value: Value, secret: bool) {
        self.bytes.insert(pfn.0, 1, Bytes { value, secret });
    }

    /// What the page holds is no secret of the guest's any more.
    pub(crate) fn publish(&mut self, pfn: Pfn) {
        let value = self.bytes(pfn).value;
        self.write(pfn, value, false);
    }

    pub(crate) fn fill(&mut self, frames: PfnRange, value: Value) {
        self.bytes.insert(frames.start().0, frames.len(), Bytes { value, secret: false });
    }

    pub(crate) fn becomes(&mut self, frames: PfnRange, contents: Contents) {
        match contents {
            Contents::Kept => {}
            Contents::Zeroed => self.fill(frames, Value::Zero),
            Contents::Undefined => self.fill(frames, Value::Scrambled),
        }
    }

    /// The host gets memory back and gives it to someone else.
    pub(crate) fn free(&mut self, frames: PfnRange) {
        let had: Vec<_> = self.bytes.runs(frames.start().0, frames.len()).map(|(start, len, _)| (start, len)).collect();
        for (start, len) in had {
            self.freed.insert(start, len, Member);
        }
        self.bytes.remove(frames.start().0, frames.len());
        for entry in self.stage2.iter_mut().chain(self.cached.iter_mut().flatten()) {
            if let Some(both) = entry.frames().and_then(|own| own.intersect(frames)) {
                entry.gone.push(both);
            }
        }
    }

    /// Frames that hold what a guest wrote privately.
    pub(crate) fn secret_frames(&self) -> Vec<Pfn> {
        let runs = self.bytes.iter().filter(|(_, _, bytes)| bytes.secret);
        runs.flat_map(|(start, len, _)| (start..start.saturating_add(len)).map(Pfn)).collect()
    }

    /// Frames that were given back at some time.
    pub(crate) fn freed(&self) -> impl Iterator<Item = Pfn> {
        self.freed.iter().flat_map(|(start, len, _)| (start..start.saturating_add(len)).map(Pfn))
    }

    pub(crate) fn frames_of(vm: &Vm, pages: Pages) -> Option<PfnRange> {
        pages.range.rebase(vm.file(pages.file)?.pfn(pages.range.start()))
    }

    // The direct map.

    pub(crate) fn change_direct_map(&mut self, frames: PfnRange, change: DirectMap) {
        match change {
            DirectMap::Remove => self.hidden.insert(frames.start().0, frames.len(), Member),
            DirectMap::Restore => self.hidden.remove(frames.start().0, frames.len()),
        }
    }

    pub(crate) fn is_hidden(&self, pfn: Pfn) -> bool {
        self.hidden.get(pfn.0).is_some()
    }

    /// Whether the host reaches the page through the direct map now, and by that has its translation cached.
    pub(crate) fn host_reaches(&mut self, pfn: Pfn) -> bool {
        if self.is_hidden(pfn) {
            return self.host_cached.contains(&pfn);
        }
        self.host_cached.insert(pfn);
        true
    }

    pub(crate) fn flush_host(&mut self) {
        self.host_cached.clear();
    }

    // The VMM's memory.

    fn user_slot(&mut self, page: u64) -> &mut UserPage {
        let at = match self.user.binary_search_by_key(&page, |(number, _)| *number) {
            Ok(at) => at,
            Err(at) => {
                self.user.insert(at, (page, UserPage { version: Some(0), newest: 0 }));
                at
            }
        };
        &mut self.user[at].1
    }

    /// The frame of the VMM's own page, faulted in if need be.
    pub(crate) fn user_frame(&mut self, page: u64) -> Option<Pfn> {
        let version = self.user_slot(page).version?;
        let pfn = user_pfn(page, version);
        if self.bytes.get(pfn.0).is_none() {
            self.write(pfn, Value::Zero, false);
        }
        Some(pfn)
    }

    /// Whether `pfn` is what the VMM has at `page` now.
    pub(crate) fn is_user_frame(&self, page: u64, pfn: Pfn) -> bool {
        let found = self.user.iter().find(|(number, _)| *number == page);
        found.and_then(|(_, slot)| slot.version).is_some_and(|version| user_pfn(page, version) == pfn)
    }

    /// The VMM's page goes; `mapped` tells whether a new one is there from now on.
    pub(crate) fn replace_user(&mut self, page: u64, mapped: bool) {
        let slot = self.user_slot(page);
        let old = slot.version;
        slot.newest += 1;
        slot.version = mapped.then_some(slot.newest);
        if let Some(frames) = old.and_then(|version| PageRange::with_len(user_pfn(page, version), 1)) {
            self.free(frames);
        }
    }

    // The VMM's mapping of a file.

    pub(crate) fn map_for_vmm(&mut self, pages: Pages) {
        self.mapped_by_vmm.extend(pages.range.pages().map(|index| (pages.file, index)));
    }

    pub(crate) fn is_mapped_for_vmm(&self, file: FileId, index: PageIndex) -> bool {
        self.mapped_by_vmm.contains(&(file, index))
    }

    pub(crate) fn unmap_for_vmm(&mut self, file: FileId, range: IndexRange) {
        self.mapped_by_vmm.retain(|(of, index)| *of != file || !range.contains(*index));
    }
}

fn user_pfn(page: u64, version: u8) -> Pfn {
    Pfn(USER_FRAMES + (page << 8) + u64::from(version))
}

/// The page of the VMM's own memory that the frame is or was at.
pub(crate) fn user_page(pfn: Pfn) -> Option<u64> {
    pfn.0.checked_sub(USER_FRAMES).filter(|offset| *offset < USER_FRAMES).map(|offset| offset >> 8)
}
