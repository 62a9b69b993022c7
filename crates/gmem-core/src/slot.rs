//! Memory slots: which guest frames have memory, from where, and with which file behind them.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange, IndexRange, PageIndex, PageNumber, PageRange};
use crate::file::FileId;

bitflags! {
    /// Flags of a slot, with the values of `KVM_MEM_*`.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct SlotFlags: u32 {
        /// Writes are logged.
        const LOG_DIRTY_PAGES = 1 << 0;
        /// Guest writes exit to the VMM.
        const READONLY = 1 << 1;
        /// The slot has a guest_memfd.
        const GUEST_MEMFD = 1 << 2;
    }
}

/// Address space and number of a slot, as packed in `kvm_userspace_memory_region2.slot`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct SlotId {
    /// Address space; 1 is SMM on x86.
    pub space: u16,
    /// Number within the address space.
    pub number: u16,
}

impl SlotId {
    /// Unpacks the field: address space in bits 31:16, number in bits 15:0.
    #[must_use]
    pub fn from_raw(raw: u32) -> Self {
        let [a, b, c, d] = raw.to_le_bytes();
        Self { space: u16::from_le_bytes([c, d]), number: u16::from_le_bytes([a, b]) }
    }
}

/// Where the private pages of a slot come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Binding {
    /// The file, or `None` once its last descriptor has been closed: the slot stays and its private faults fail.
    pub file: Option<FileId>,
    /// The file page behind the slot's first frame.
    pub first: PageIndex,
    /// Every fault, shared or private, is served from the file (`KVM_MEMSLOT_GMEM_ONLY`).
    pub file_only: bool,
}

/// One memory slot.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Slot {
    /// Who it is.
    pub id: SlotId,
    /// Its guest frames.
    pub gfns: GfnRange,
    /// Address of the VMM's mapping of the first byte. Legal for file-only slots too, where it is not used.
    pub userspace_addr: u64,
    /// Flags as given.
    pub flags: SlotFlags,
    /// Private backing, if the slot was created with one.
    pub binding: Option<Binding>,
    /// The slot is being deleted or moved: faults that meet it start again (`KVM_MEMSLOT_INVALID`).
    pub invalid: bool,
}

impl Slot {
    /// The file page behind `gfn`, if the slot has a binding and holds the frame.
    #[must_use]
    pub fn index_of(&self, gfn: Gfn) -> Option<PageIndex> {
        let binding = self.binding?;
        self.gfns.contains(gfn).then(|| PageIndex(binding.first.0 + (gfn.0 - self.gfns.start().0)))
    }

    /// The file pages that the slot is bound to.
    #[must_use]
    pub fn file_pages(&self) -> Option<IndexRange> {
        self.gfns.rebase(self.binding?.first)
    }

    /// The frames behind those of `pages` that the slot is bound to.
    #[must_use]
    pub fn gfns_of(&self, pages: IndexRange) -> Option<GfnRange> {
        let own = self.file_pages()?;
        let both = own.intersect(pages)?;
        let first = self.gfns.start().checked_add(both.start().0 - own.start().0)?;
        both.rebase(first)
    }

    /// The address of the VMM's mapping of `gfn`.
    #[must_use]
    pub fn hva_of(&self, gfn: Gfn) -> u64 {
        self.userspace_addr.wrapping_add(gfn.gpa().wrapping_sub(self.gfns.start().gpa()))
    }
}

/// The slots of a VM, by number and by frame.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Slots {
    by_id: BTreeMap<SlotId, Slot>,
    /// In ascending order, for each address space. Slots come and go seldom and are looked for all the time.
    by_frame: [Vec<(GfnRange, SlotId)>; SPACES as usize],
    pages: u64,
}

impl Slots {
    /// The slot with this number.
    #[must_use]
    pub fn get(&self, id: SlotId) -> Option<&Slot> {
        self.by_id.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: SlotId) -> Option<&mut Slot> {
        self.by_id.get_mut(&id)
    }

    /// All slots, by number.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.by_id.values()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.by_id.values_mut()
    }

    /// The slot of address space `space` that holds `gfn`.
    #[must_use]
    pub fn at(&self, space: u16, gfn: Gfn) -> Option<&Slot> {
        let slots = self.by_frame.get(usize::from(space))?;
        let (gfns, id) = slots.get(ending_by(slots, gfn))?;
        if gfns.contains(gfn) { self.by_id.get(id) } else { None }
    }

    /// The slots of any address space that have frames in `range`.
    pub fn overlapping(&self, range: GfnRange) -> impl Iterator<Item = &Slot> {
        self.overlapping_in(0, range).chain(self.overlapping_in(1, range))
    }

    /// The slots of address space `space` that have frames in `range`, in ascending order.
    pub fn overlapping_in(&self, space: u16, range: GfnRange) -> impl Iterator<Item = &Slot> {
        let slots = self.by_frame.get(usize::from(space)).map_or(&[][..], Vec::as_slice);
        let upwards = slots.get(ending_by(slots, range.start())..).unwrap_or_default();
        let before_end = upwards.iter().take_while(move |(gfns, _)| gfns.start() < range.end());
        before_end.filter_map(|(_, id)| self.by_id.get(id))
    }

    /// Pages in all slots together.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn insert(&mut self, slot: Slot) {
        self.remove(slot.id);
        self.pages += slot.gfns.len();
        if let Some(slots) = self.by_frame.get_mut(usize::from(slot.id.space)) {
            slots.insert(ending_by(slots, slot.gfns.start()), (slot.gfns, slot.id));
        }
        self.by_id.insert(slot.id, slot);
    }

    pub(crate) fn remove(&mut self, id: SlotId) -> Option<Slot> {
        let slot = self.by_id.remove(&id)?;
        if let Some(slots) = self.by_frame.get_mut(usize::from(id.space)) {
            slots.retain(|(_, other)| *other != id);
        }
        self.pages -= slot.gfns.len();
        Some(slot)
    }
}

/// How many of `slots` end at or before `gfn`.
fn ending_by(slots: &[(GfnRange, SlotId)], gfn: Gfn) -> usize {
    slots.partition_point(|(gfns, _)| gfns.end() <= gfn)
}

/// Address spaces that any architecture has: x86 has a second one for SMM.
pub(crate) const SPACES: u16 = 2;

/// Frames `[gfn, gfn + pages)`, when neither is out of bounds.
pub(crate) fn frames(gfn: Gfn, pages: u64) -> Option<GfnRange> {
    PageRange::with_len(gfn, pages)
}
