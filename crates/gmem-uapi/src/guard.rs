//! Guards: real slots that show nothing, over private frames that have no slot.
//!
//! The kernel ends an access to a private frame without a slot in a memory fault. A stock KVM takes such a frame for a device
//! and emulates the instruction: a write has left its instruction behind when userspace hears of it. Over a guard the access
//! faults instead, with the vCPU precisely before the instruction. Where a guard cannot be had (beyond the host's physical
//! addresses, no number left) the emulated access is put back as well as it can be.

use std::collections::BTreeMap;

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange};
use gmem_core::slot::SlotId;
use gmem_core::vendor::Side;
use gmem_host::kvm;
use gmem_host::window::Window;
use rustix::fd::BorrowedFd;

use crate::abi::MemoryRegion;

/// Guards at a time; a guest whose memory is private in more places than this without slots is none that runs.
const MOST: usize = 256;

/// The guards of a VM, by first frame.
#[derive(Debug, Default)]
pub(crate) struct Guards {
    by_frame: BTreeMap<Gfn, Guard>,
}

#[derive(Debug)]
struct Guard {
    number: u16,
    window: Window,
}

impl Guards {
    /// Brings the guards over `range` in line with attributes and slots.
    pub(crate) fn update(&mut self, vm: BorrowedFd<'_>, core: &Vm, range: GfnRange) {
        // Where there is a slot there is no guard: most conversions end here.
        if core.slots().at(0, range.start()).is_some_and(|slot| slot.gfns.covers(range)) {
            return;
        }
        let range = self.clear(vm, range);
        for gap in unguarded(core, range) {
            self.add(vm, core, gap);
        }
    }

    /// Takes guards with frames in `range` away; returns the range that has none now.
    pub(crate) fn clear(&mut self, vm: BorrowedFd<'_>, range: GfnRange) -> GfnRange {
        let touched =
            self.by_frame.range(..range.end()).filter(|(_, guard)| guard.window.gfns().intersect(range).is_some());
        let touched: Vec<Gfn> = touched.map(|(first, _)| *first).collect();
        touched.into_iter().filter_map(|first| self.remove(vm, first)).fold(range, GfnRange::hull)
    }

    /// Makes a number free that the client wants; returns the frames that lost their guard.
    pub(crate) fn release_number(&mut self, vm: BorrowedFd<'_>, number: u16) -> Option<GfnRange> {
        let (&first, _) = self.by_frame.iter().find(|(_, guard)| guard.number == number)?;
        self.remove(vm, first)
    }

    fn remove(&mut self, vm: BorrowedFd<'_>, first: Gfn) -> Option<GfnRange> {
        let guard = self.by_frame.remove(&first)?;
        let region = region(guard.number, guard.window.gfns(), 0, 0);
        // Deleting a slot that is there cannot fail.
        let _ = kvm::set_region(vm, &region);
        Some(guard.window.gfns())
    }

    fn add(&mut self, vm: BorrowedFd<'_>, core: &Vm, gap: GfnRange) {
        /// `KVM_MEM_MAX_NR_PAGES`
        const MOST_PAGES: u64 = (1 << 31) - 1;
        let gap = GfnRange::with_len(gap.start(), gap.len().min(MOST_PAGES)).unwrap_or(gap);
        let (Some(number), Ok(window)) = (self.free_number(core), Window::reserve(gap)) else { return };
        let region = region(number, gap, gap.len() * gmem_core::addr::PAGE_SIZE, window.base() as u64);
        if kvm::set_region(vm, &region).is_ok() {
            self.by_frame.insert(gap.start(), Guard { number, window });
        }
    }

    /// The highest number that neither the client nor another guard has: clients count from 0.
    fn free_number(&self, core: &Vm) -> Option<u16> {
        if self.by_frame.len() == MOST {
            return None;
        }
        let taken = |number: &u16| {
            let own = self.by_frame.values().any(|guard| guard.number == *number);
            own || core.slots().get(SlotId { space: 0, number: *number }).is_some()
        };
        (0..core.rules.max_slots).rev().find(|number| !taken(number))
    }
}

fn region(number: u16, gfns: GfnRange, memory_size: u64, userspace_addr: u64) -> MemoryRegion {
    let guest_phys_addr = gfns.start().gpa();
    MemoryRegion { slot: u32::from(number), flags: 0, guest_phys_addr, memory_size, userspace_addr }
}

/// The private parts of `range` that have no slot.
fn unguarded(core: &Vm, range: GfnRange) -> Vec<GfnRange> {
    let mut gaps = Vec::new();
    let mut start = range.start();
    for slot in core.slots().overlapping_in(0, range) {
        gaps.extend(GfnRange::new(start, slot.gfns.start()));
        start = slot.gfns.end();
    }
    gaps.extend(GfnRange::new(start, range.end()));
    let private =
        |gap: GfnRange| core.attribute_runs(gap).filter(|(_, side)| *side == Side::Private).map(|(run, _)| run);
    gaps.into_iter().flat_map(private).take(MOST).collect()
}
