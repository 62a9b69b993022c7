//! Random sequences of operations, valid and invalid, next to a model that keeps every page by itself.
//!
//! The model is written from the description of the uAPI: no ranges, no steps, no invalidation.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{ALL_FLAGS, Bytes, HVA, Machine, claim, gfns, private_claim, vm};
use gmem_core::addr::{Gfn, PAGE_SIZE, PageIndex};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId, GetPageError};
use gmem_core::ops::{ChangeUserMapping, FaultEnd, MemoryFailure, MemoryFault, PunchHole, RegionError};
use gmem_core::vendor::Side;
use gmem_core::vm::{Unbacked, View, Vm};
use proptest::collection::vec;
use proptest::prelude::*;

const FRAMES: u64 = 16;
const PAGES: u64 = 8;

#[derive(Clone, Debug)]
struct Slot {
    gfn: u64,
    count: u64,
    hva: u64,
    /// File, whether it is still open, first page.
    binding: Option<(usize, u64)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backs {
    User(u64),
    Page(usize, u64),
}

#[derive(Clone, Debug, Default)]
struct Inode {
    mappable: bool,
    closed: bool,
    present: BTreeSet<u64>,
    poisoned: BTreeSet<u64>,
    written: BTreeMap<u64, u8>,
}

#[derive(Clone, Debug, Default)]
struct Model {
    has_private: bool,
    slots: BTreeMap<u32, Slot>,
    private: BTreeSet<u64>,
    files: Vec<Inode>,
    mapped: BTreeMap<u64, (Backs, Side)>,
    holes: BTreeSet<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sees {
    Nothing,
    Closed,
    Poisoned,
    NoFile,
    Backs(Backs),
}

impl Model {
    fn side(&self, gfn: u64) -> Side {
        if self.private.contains(&gfn) { Side::Private } else { Side::Shared }
    }

    fn sees(&self, gfn: u64) -> Sees {
        let slot = self.slots.values().find(|slot| slot.gfn <= gfn && gfn < slot.gfn + slot.count);
        let Some(slot) = slot else { return Sees::Nothing };
        let offset = gfn - slot.gfn;
        let private = self.side(gfn) == Side::Private;
        match slot.binding {
            Some((id, first)) if private || self.files[id].mappable => match &self.files[id] {
                file if file.closed => Sees::Closed,
                file if file.poisoned.contains(&(first + offset)) => Sees::Poisoned,
                _ => Sees::Backs(Backs::Page(id, first + offset)),
            },
            None if private => Sees::NoFile,
            _ => Sees::Backs(Backs::User(slot.hva + offset * PAGE_SIZE)),
        }
    }

    fn region(&mut self, number: u32, new: &Slot) -> Result<(), RegionError> {
        if new.count == 0 {
            let old = self.slots.remove(&number).ok_or(RegionError::NoSuchSlot)?;
            self.mapped.retain(|gfn, _| !(old.gfn..old.gfn + old.count).contains(gfn));
            return Ok(());
        }
        let old = self.slots.get(&number).cloned();
        if let Some(old) = &old
            && (new.binding.is_some() || old.binding.is_some() || old.hva != new.hva || old.count != new.count)
        {
            return Err(RegionError::Immutable);
        }
        let pages = |slot: &Slot| (slot.gfn..slot.gfn + slot.count).collect::<BTreeSet<_>>();
        let others = || self.slots.iter().filter(|(other, _)| **other != number).map(|(_, slot)| slot);
        if others().any(|other| !pages(other).is_disjoint(&pages(new))) {
            return Err(RegionError::Overlap);
        }
        if let Some((id, first)) = new.binding {
            if self.files[id].closed {
                return Err(RegionError::BadDescriptor);
            }
            if first + new.count > PAGES {
                return Err(RegionError::File);
            }
            let bound = |slot: &Slot| match slot.binding {
                Some((file, first)) if file == id => (first..first + slot.count).collect(),
                _ => BTreeSet::new(),
            };
            if others().any(|other| !bound(other).is_disjoint(&bound(new))) {
                return Err(RegionError::PagesBound);
            }
        }
        if let Some(old) = old
            && old.gfn != new.gfn
        {
            self.mapped.retain(|gfn, _| !pages(&old).contains(gfn));
        }
        self.slots.insert(number, new.clone());
        Ok(())
    }

    fn attributes(&mut self, start: u64, end: u64, side: Side) {
        for gfn in start..end {
            let changes = self.side(gfn) != side;
            let _ = if side == Side::Private { self.private.insert(gfn) } else { self.private.remove(&gfn) };
            if changes {
                self.mapped.remove(&gfn);
            }
        }
    }

    fn unmap_pages(&mut self, id: usize, gone: impl Fn(u64) -> bool) {
        self.mapped.retain(|_, (backs, _)| !matches!(backs, Backs::Page(file, page) if *file == id && gone(*page)));
    }

    fn punch(&mut self, id: usize, start: u64, end: u64) {
        let hole = start..end.min(PAGES);
        self.unmap_pages(id, |page| hole.contains(&page));
        let file = &mut self.files[id];
        file.present.retain(|page| !hole.contains(page));
        file.poisoned.retain(|page| !hole.contains(page));
        file.written.retain(|page, _| !hole.contains(page));
    }

    fn close(&mut self, id: usize) {
        self.unmap_pages(id, |_| true);
        self.files[id] = Inode { closed: true, mappable: self.files[id].mappable, ..Inode::default() };
    }

    fn poison(&mut self, id: usize, page: u64) {
        if self.files[id].present.contains(&page) {
            self.files[id].poisoned.insert(page);
            self.unmap_pages(id, |other| other == page);
        }
    }

    fn change_user(&mut self, start: u64, end: u64) {
        let change = |hva: &u64| (start..end).contains(hva);
        self.mapped.retain(|_, (backs, _)| !matches!(backs, Backs::User(hva) if change(hva)));
    }

    /// How a fault ends, apart from the mapping.
    fn fault(&mut self, gfn: u64) -> Result<(), FaultEnd> {
        let side = self.side(gfn);
        let exit = MemoryFault { gfn: Gfn(gfn), side };
        match self.sees(gfn) {
            Sees::Nothing if side == Side::Shared => Err(FaultEnd::Emulate),
            Sees::Nothing | Sees::NoFile | Sees::Closed => Err(FaultEnd::MemoryFault(exit)),
            Sees::Poisoned => Err(FaultEnd::PageError(exit, GetPageError::Poisoned)),
            Sees::Backs(Backs::User(hva)) if self.holes.contains(&(hva / PAGE_SIZE)) => Err(FaultEnd::NoUserPage),
            Sees::Backs(backs) => {
                if let Backs::Page(id, page) = backs {
                    self.files[id].present.insert(page);
                }
                self.mapped.insert(gfn, (backs, side));
                Ok(())
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Create(bool),
    Region { slot: u32, gfn: u64, count: u64, hva: u64, file: Option<(usize, u64)> },
    Attributes(u64, u64, Side),
    Allocate(usize, u64, u64),
    Punch(usize, u64, u64),
    Close(usize),
    Poison(usize, u64),
    User(u64, u64),
    Fault(u64),
    Prefault(u64),
    Write(u64, u8),
}

fn op() -> impl Strategy<Value = Op> {
    let side = prop_oneof![Just(Side::Shared), Just(Side::Private)];
    let file = proptest::option::weighted(0.7, (any::<usize>(), 0..PAGES));
    let region = (0..4u32, 0..FRAMES, 0..6u64, 0..3u64, file);
    prop_oneof![
        1 => any::<bool>().prop_map(Op::Create),
        5 => region.prop_map(|(slot, gfn, count, hva, file)| Op::Region { slot, gfn, count, hva, file }),
        4 => (0..FRAMES, 1..FRAMES, side).prop_map(|(gfn, count, side)| Op::Attributes(gfn, count, side)),
        1 => (any::<usize>(), 0..PAGES + 2, 0..PAGES).prop_map(|(file, start, len)| Op::Allocate(file, start, len)),
        2 => (any::<usize>(), 0..PAGES + 2, 0..PAGES).prop_map(|(file, start, len)| Op::Punch(file, start, len)),
        1 => any::<usize>().prop_map(Op::Close),
        1 => (any::<usize>(), 0..PAGES).prop_map(|(file, page)| Op::Poison(file, page)),
        1 => (0..FRAMES, 1..FRAMES).prop_map(|(page, count)| Op::User(page, count)),
        8 => (0..FRAMES).prop_map(Op::Fault),
        2 => (0..FRAMES).prop_map(Op::Prefault),
        4 => (0..FRAMES, 1..=255u8).prop_map(|(gfn, byte)| Op::Write(gfn, byte)),
    ]
}

/// The subsystem and its model, side by side.
struct Both {
    vm: Vm,
    machine: Machine,
    ids: Vec<FileId>,
    model: Model,
}

impl Both {
    fn new(arch: Arch) -> Self {
        let has_private = arch.has_private_memory();
        let model = Model { has_private, holes: [HVA / PAGE_SIZE + 3].into(), ..Model::default() };
        let mut machine = Machine::default();
        machine.user_holes.clone_from(&model.holes);
        let mut both = Self { vm: vm(arch), machine, ids: Vec::new(), model };
        both.apply(&Op::Create(false));
        both.apply(&Op::Create(true));
        both
    }

    fn apply(&mut self, op: &Op) {
        let pick = |file: usize| file % self.ids.len().max(1);
        match *op {
            Op::Create(mappable) => self.create(mappable),
            Op::Region { slot, gfn, count, hva, file } => {
                self.region(slot, gfn, count, hva, file.map(|(file, first)| (pick(file), first)));
            }
            Op::Attributes(gfn, count, side) if self.model.has_private => {
                self.machine.set_attributes(&mut self.vm, gfns(gfn, gfn + count), side);
                self.model.attributes(gfn, gfn + count, side);
            }
            Op::Attributes(..) => {}
            Op::Allocate(file, start, len) => self.allocate(pick(file), start, len),
            Op::Punch(file, start, len) => self.punch(pick(file), start, len),
            Op::Close(file) => {
                let file = pick(file);
                self.machine.close(&mut self.vm, self.ids[file]);
                self.model.close(file);
            }
            Op::Poison(file, page) => {
                let file = pick(file);
                self.machine.run(&mut self.vm, &mut MemoryFailure::new(self.ids[file], PageIndex(page)));
                self.model.poison(file, page);
            }
            Op::User(page, count) => self.change_user(HVA + page * PAGE_SIZE, HVA + (page + count) * PAGE_SIZE),
            Op::Fault(gfn) => {
                let end = self.machine.fault(&mut self.vm, gfn);
                self.compare_fault(gfn, end);
            }
            Op::Prefault(gfn) => {
                let end = self.machine.prefault(&mut self.vm, gfn);
                self.compare_fault(gfn, end);
            }
            Op::Write(gfn, byte) => self.write(gfn, byte),
        }
    }

    fn create(&mut self, mappable: bool) {
        let flags = if mappable { FileFlags::MMAP } else { FileFlags::empty() };
        let id = self.vm.create_file(PAGES * PAGE_SIZE, flags.bits(), ALL_FLAGS).expect("valid");
        self.ids.push(id);
        self.model.files.push(Inode { mappable, ..Inode::default() });
    }

    fn region(&mut self, slot: u32, gfn: u64, count: u64, hva: u64, file: Option<(usize, u64)>) {
        let hva = HVA + (gfn + hva) * PAGE_SIZE;
        let plain = match file {
            Some((file, first)) => private_claim(slot, gfn, count, self.ids[file], first),
            None => claim(slot, gfn, count),
        };
        let result = self.machine.set_region(&mut self.vm, gmem_core::ops::Claim { userspace_addr: hva, ..plain });
        assert_eq!(result, self.model.region(slot, &Slot { gfn, count, hva, binding: file }));
    }

    fn allocate(&mut self, file: usize, start: u64, len: u64) {
        let Some(inode) = self.vm.file_mut(self.ids[file]) else {
            assert!(self.model.files[file].closed);
            return;
        };
        let range = inode.check_allocate(start * PAGE_SIZE, len * PAGE_SIZE).ok();
        assert_eq!(range.is_some(), len > 0 && start + len <= PAGES);
        if let Some(range) = range {
            inode.allocate(range);
            self.model.files[file].present.extend(start..start + len);
        }
    }

    fn punch(&mut self, file: usize, start: u64, len: u64) {
        let Some(inode) = self.vm.file(self.ids[file]) else { return };
        let range = inode.check_punch(start * PAGE_SIZE, len * PAGE_SIZE);
        assert_eq!(range.is_ok(), len > 0, "a hole beyond the end is legal");
        if let Ok(Some(range)) = range {
            assert_eq!(self.machine.run(&mut self.vm, &mut PunchHole::new(self.ids[file], range)), Ok(()));
        }
        self.model.punch(file, start, start + len);
    }

    fn change_user(&mut self, start: u64, end: u64) {
        self.machine.user_change = Some((start, end));
        self.machine.run(&mut self.vm, &mut ChangeUserMapping::new(start, end));
        self.model.change_user(start, end);
    }

    fn compare_fault(&mut self, gfn: u64, end: FaultEnd) {
        match self.model.fault(gfn) {
            Ok(()) => assert!(matches!(end, FaultEnd::Mapped(mapping) if mapping.gfn == Gfn(gfn)), "{end:?}"),
            Err(expected) => assert_eq!(end, expected),
        }
    }

    /// The guest writes through what it has mapped.
    fn write(&mut self, gfn: u64, byte: u8) {
        if let Some(page) = self.machine.pfn_of(Gfn(gfn)).and_then(|pfn| self.machine.page_at(pfn)) {
            self.machine.bytes.insert(page, Bytes::Written(byte));
        }
        if let Some((Backs::Page(file, page), _)) = self.model.mapped.get(&gfn) {
            self.model.files[*file].written.insert(*page, byte);
        }
    }

    fn compare(&self) {
        for gfn in 0..FRAMES + 6 {
            assert_eq!(self.vm.attribute(Gfn(gfn)), self.model.side(gfn));
            assert_eq!(self.vm.view(Gfn(gfn)), self.expected_view(gfn), "{gfn}");
            let mapped = self.machine.mapping_of(Gfn(gfn)).map(|mapping| (self.machine.pfn_of(Gfn(gfn)), mapping.side));
            let expected = self.model.mapped.get(&gfn).map(|(backs, side)| (self.frame(*backs), *side));
            assert_eq!(mapped, expected, "what is mapped at {gfn}");
            self.compare_bytes(gfn);
        }
        for (id, inode) in self.ids.iter().zip(&self.model.files) {
            let present = |page| self.vm.file(*id).is_some_and(|file| file.is_present(PageIndex(page)));
            assert_eq!((0..PAGES).filter(|page| present(*page)).collect::<BTreeSet<_>>(), inode.present);
        }
    }

    /// What a guest reads where a page of a file is mapped: what it wrote since the page came, or else zeros.
    fn compare_bytes(&self, gfn: u64) {
        if let Some((Backs::Page(file, page), _)) = self.model.mapped.get(&gfn) {
            let written = self.model.files[*file].written.get(page);
            let expected = written.map_or(Bytes::Zero, |byte| Bytes::Written(*byte));
            assert_eq!(self.machine.bytes_of((self.ids[*file], *page)), expected);
        }
    }

    fn frame(&self, backs: Backs) -> Option<gmem_core::addr::Pfn> {
        match backs {
            Backs::User(hva) => self.machine.user_pfn(hva),
            Backs::Page(file, page) => self.vm.file(self.ids[file]).map(|file| file.pfn(PageIndex(page))),
        }
    }

    fn expected_view(&self, gfn: u64) -> View {
        let side = self.model.side(gfn);
        match self.model.sees(gfn) {
            Sees::Nothing if side == Side::Shared => View::NoSlot,
            Sees::Nothing => View::Unbacked(Unbacked::NoSlot),
            Sees::NoFile => View::Unbacked(Unbacked::SlotWithoutFile),
            Sees::Closed => View::Unbacked(Unbacked::FileClosed),
            Sees::Poisoned => View::Unbacked(Unbacked::Poisoned),
            Sees::Backs(Backs::User(hva)) => View::UserMemory { hva },
            Sees::Backs(Backs::Page(file, page)) => {
                View::FilePage { file: self.ids[file], index: PageIndex(page), side }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 600 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_subsystem_is_what_the_model_is(private in any::<bool>(), ops in vec(op(), 0..60)) {
        let mut both = Both::new(if private { Arch::SwProtected } else { Arch::Default });
        for op in &ops {
            both.apply(op);
            both.compare();
        }
    }
}
