//! Single rules of files, folios, the direct map, conversions and lifetimes, and the order of actions.

mod common;

use common::{ALL_FLAGS, HVA, Machine, claim, file, gfns, pages, private_claim, vm};
use gmem_core::addr::{Gfn, Level, PAGE_SIZE, PageIndex};
use gmem_core::arch::Arch;
use gmem_core::file::{AllocateError, CreateError, FileFlags, FileId, GetPageError};
use gmem_core::invalidate::Filter;
use gmem_core::ops::{
    Access, Action, ConvertError, ConvertInPlace, DirectMap, Fault, FaultEnd, Lock, MemoryFailure, Operation, Origin,
    Pages, Populate, Populated, PunchError, PunchHole, RestoreTemporarily, Source, Step, run,
};
use gmem_core::vendor::{AccessKind, HostOutcome, PopulateKind, Side};
use gmem_core::vm::{DirectMapFlush, FileFilter, Rules, Tracking, Unbacked, View, Vm};

/// A VM with private frames 0..`count` from the start of one file.
fn private_vm(count: u64, flags: FileFlags, rules: Rules) -> (Vm, Machine, FileId) {
    let (mut vm, mut machine) = (Vm::new(Arch::SwProtected, rules), Machine::default());
    let id = file(&mut vm, count, flags);
    machine.set_region(&mut vm, private_claim(0, 0, count, id, 0)).expect("valid");
    if vm.rules.tracking == Tracking::Attributes {
        machine.set_attributes(&mut vm, gfns(0, count), Side::Private);
    }
    machine.trace.clear();
    (vm, machine, id)
}

fn actions(machine: &mut Machine) -> Vec<Action> {
    std::mem::take(&mut machine.trace)
        .into_iter()
        .map(|(_, action)| action)
        .filter(|a| *a != Action::Continue)
        .collect()
}

#[test]
fn files_are_created_by_flags_first_and_size_then() {
    for arch in [Arch::Default, Arch::SwProtected] {
        let mut vm = vm(arch);
        let kernel = FileFlags::MMAP | FileFlags::INIT_SHARED;
        let supported = vm.file_flags(kernel).bits();
        assert_eq!(supported, if vm.has_private_memory() { 1 } else { 3 });
        for bit in 0..64 {
            let flag = 1 << bit;
            let expected = if flag & supported == 0 { Err(CreateError::Flags(flag)) } else { Ok(()) };
            assert_eq!(vm.create_file(PAGE_SIZE, flag, kernel).map(|_| ()), expected);
        }
        for size in [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 63, u64::MAX, u64::MAX - PAGE_SIZE + 1] {
            assert_eq!(vm.create_file(size, 0, kernel), Err(CreateError::Size(size)));
            assert_eq!(vm.create_file(size, 1 << 40, kernel), Err(CreateError::Flags(1 << 40)));
        }
        for size in [PAGE_SIZE, 64 << 40, (1 << 63) - PAGE_SIZE] {
            let id = vm.create_file(size, 0, kernel).expect("any size");
            assert_eq!(vm.file(id).map(gmem_core::file::File::pages), Some(size / PAGE_SIZE));
        }
    }
}

#[test]
fn ranges_of_fallocate() {
    let mut vm = vm(Arch::SwProtected);
    let id = file(&mut vm, 4, FileFlags::empty());
    let file = vm.file(id).expect("open");
    let p = PAGE_SIZE;
    for (offset, len, allocate, punch) in [
        (0, 4 * p, Ok(()), Ok(Some(pages(0, 4)))),
        (3 * p, 2 * p, Err(AllocateError::BeyondEnd), Ok(Some(pages(3, 4)))),
        (4 * p, p, Err(AllocateError::BeyondEnd), Ok(None)),
        (100 * p, p, Err(AllocateError::BeyondEnd), Ok(None)),
        (1, p, Err(AllocateError::Unaligned), Err(AllocateError::Unaligned)),
        (0, p - 1, Err(AllocateError::Unaligned), Err(AllocateError::Unaligned)),
        (100 * p + 1, p, Err(AllocateError::Unaligned), Err(AllocateError::Unaligned)),
        (0, 0, Err(AllocateError::Unaligned), Err(AllocateError::Unaligned)),
    ] {
        assert_eq!(file.check_allocate(offset, len).map(|_| ()), allocate, "{offset:#x} {len:#x}");
        assert_eq!(file.check_punch(offset, len), punch, "{offset:#x} {len:#x}");
    }
}

#[test]
fn what_keeps_what() {
    let (mut vm, mut machine, id) = private_vm(4, FileFlags::empty(), Rules::default());
    assert!(matches!(machine.fault(&mut vm, 1), FaultEnd::Mapped(_)));
    machine.set_region(&mut vm, claim(0, 0, 0)).expect("exists");
    assert!(vm.file(id).expect("open").is_present(PageIndex(1)), "deleting a slot frees nothing");
    assert_eq!(vm.attribute(Gfn(1)), Side::Private, "attributes outlive slots");
    assert_eq!(vm.view(Gfn(1)), View::Unbacked(Unbacked::NoSlot));
    machine.set_region(&mut vm, private_claim(0, 0, 4, id, 0)).expect("pages are free to bind again");
    assert!(!machine.trace.iter().any(|(_, action)| matches!(action, Action::Free(_))));
    machine.close(&mut vm, id);
    assert!(vm.file(id).is_none());
    assert_eq!(vm.view(Gfn(1)), View::Unbacked(Unbacked::FileClosed), "the slot stays without its file");
    assert!(matches!(machine.fault(&mut vm, 1), FaultEnd::MemoryFault(fault) if fault.side == Side::Private));
    machine.set_region(&mut vm, claim(0, 0, 0)).expect("it can be deleted");
}

#[test]
fn a_failed_page_stays_failed_until_it_is_punched() {
    let (mut vm, mut machine, id) = private_vm(4, FileFlags::empty(), Rules::default());
    machine.fault(&mut vm, 1);
    machine.run(&mut vm, &mut MemoryFailure::new(id, PageIndex(1)));
    assert_eq!(machine.mapping_of(Gfn(1)), None);
    for _ in 0..2 {
        assert!(matches!(machine.fault(&mut vm, 1), FaultEnd::PageError(_, GetPageError::Poisoned)));
        machine.set_attributes(&mut vm, gfns(1, 2), Side::Shared);
        machine.set_attributes(&mut vm, gfns(1, 2), Side::Private);
        machine.set_region(&mut vm, claim(0, 0, 0)).expect("exists");
        machine.set_region(&mut vm, private_claim(0, 0, 4, id, 0)).expect("valid");
        vm.file_mut(id).expect("open").allocate(pages(0, 4));
    }
    assert!(matches!(machine.fault(&mut vm, 0), FaultEnd::Mapped(_)), "its neighbours are well");
    machine.run(&mut vm, &mut PunchHole::new(id, pages(1, 2))).expect("no large folio");
    assert!(matches!(machine.fault(&mut vm, 1), FaultEnd::Mapped(_)));
}

#[test]
fn one_file_behind_many_slots() {
    let (mut vm, mut machine) = (vm(Arch::SwProtected), Machine::default());
    let id = file(&mut vm, 8, FileFlags::empty());
    for (slot, gfn, first) in [(0, 40, 6), (1, 20, 0), (2, 0, 3)] {
        machine.set_region(&mut vm, private_claim(slot, gfn, 2, id, first)).expect("disjoint");
    }
    machine.set_attributes(&mut vm, gfns(0, 64), Side::Private);
    for (gfn, index) in [(40, 6), (41, 7), (20, 0), (1, 4)] {
        machine.fault(&mut vm, gfn);
        assert_eq!(machine.pfn_of(Gfn(gfn)), vm.file(id).map(|file| file.pfn(PageIndex(index))));
    }
    machine.trace.clear();
    machine.run(&mut vm, &mut PunchHole::new(id, pages(1, 7))).expect("no large folio");
    let left: Vec<u64> = machine.stage2.keys().map(|gfn| gfn.0).collect();
    assert_eq!(left, [20, 41], "only frames of punched pages go");
    let zaps = actions(&mut machine).into_iter().filter(|action| matches!(action, Action::Zap { .. }));
    assert_eq!(zaps.count(), 3, "one per slot");
}

#[test]
fn conversion_in_place_stops_at_the_first_reference() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    let (mut vm, mut machine, id) = private_vm(8, FileFlags::MMAP | FileFlags::INIT_SHARED, rules);
    (0..8).for_each(|gfn| assert!(matches!(machine.fault(&mut vm, gfn), FaultEnd::Mapped(_))));
    vm.file_mut(id).expect("open").set_referenced(pages(5, 6), true);
    vm.file_mut(id).expect("open").set_referenced(pages(7, 8), true);
    let (before, mapped) = (vm.clone(), machine.stage2.clone());
    let mut convert = |vm: &mut Vm, a, b, side| machine.run(vm, &mut ConvertInPlace::new(id, pages(a, b), side));
    assert_eq!(convert(&mut vm, 2, 8, Side::Private), Err(ConvertError::Referenced(PageIndex(5))));
    assert_eq!(vm, before, "nothing was changed");
    assert_eq!(convert(&mut vm, 0, 5, Side::Private), Ok(()), "the others can");
    assert_eq!(convert(&mut vm, 0, 8, Side::Shared), Ok(()), "nobody else has references to private pages");
    vm.file_mut(id).expect("open").set_referenced(pages(0, 8), false);
    assert_eq!(convert(&mut vm, 0, 8, Side::Private), Ok(()));
    assert_eq!(mapped.len(), 8);
    assert!(machine.stage2.is_empty(), "the old side is gone");
    machine.run(&mut vm, &mut PunchHole::new(id, pages(0, 8))).expect("no large folio");
    assert_eq!(vm.file(id).map(|file| file.side(PageIndex(3))), Some(Side::Private), "a hole changes no side");
}

#[test]
fn conversion_in_place_refills_every_slot() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    let (mut vm, mut machine) = (Vm::new(Arch::SwProtected, rules), Machine::default());
    let id = file(&mut vm, 8, FileFlags::INIT_SHARED);
    machine.set_region(&mut vm, private_claim(0, 0, 4, id, 0)).expect("valid");
    machine.set_region(&mut vm, private_claim(1, 100, 4, id, 4)).expect("valid");
    machine.trace.clear();
    assert_eq!(machine.run(&mut vm, &mut ConvertInPlace::new(id, pages(2, 6), Side::Private)), Ok(()));
    let mut refilled = actions(&mut machine);
    refilled.retain(|action| matches!(action, Action::Refill(_)));
    refilled.sort_by_key(|action| format!("{action:?}"));
    assert_eq!(refilled, [Action::Refill(gfns(2, 4)), Action::Refill(gfns(100, 102))]);
}

#[test]
fn the_order_of_a_hole() {
    let (mut vm, mut machine, id) = private_vm(4, FileFlags::NO_DIRECT_MAP, Rules::default());
    machine.fault(&mut vm, 2);
    let hidden = Pages { file: id, range: pages(2, 3) };
    let seen = actions(&mut machine);
    let at = |action: &Action| seen.iter().position(|other| other == action);
    let mapped = seen.iter().position(|action| matches!(action, Action::Map(_)));
    let order = [
        at(&Action::Zero(hidden)),
        at(&Action::DirectMap(hidden, DirectMap::Remove)),
        at(&Action::FlushDirectMap),
        mapped,
    ];
    assert!(order.is_sorted() && order.iter().all(Option::is_some), "{seen:?}");
    let hole = Pages { file: id, range: pages(1, 4) };
    machine.run(&mut vm, &mut PunchHole::new(id, hole.range)).expect("no large folio");
    let filter = Filter::Only(Side::Private);
    assert_eq!(
        actions(&mut machine),
        [
            Action::Lock(Lock::FileExclusive(id)),
            Action::Zap { range: gfns(1, 4), filter },
            Action::Flush,
            Action::Lock(Lock::Folios(hole)),
            Action::DirectMap(hole, DirectMap::Restore),
            Action::Free(hole),
            Action::Unlock(Lock::Folios(hole)),
            Action::Unlock(Lock::FileExclusive(id)),
        ]
    );
}

#[test]
fn direct_map_without_flush_leaves_translations() {
    for (flush, left) in [(DirectMapFlush::Flush, 0), (DirectMapFlush::NoFlush, 512)] {
        let rules = Rules { direct_map_flush: flush, ..Rules::default() };
        let (mut vm, mut machine, id) = private_vm(1024, FileFlags::NO_DIRECT_MAP, rules);
        vm.file_mut(id).expect("open").set_folio_level(Level::Page2M);
        machine.fault(&mut vm, 700);
        assert_eq!(machine.off_direct_map.len(), 512, "every page of the folio");
        assert_eq!(machine.host_tlb.len(), left);
        let page = Pages { file: id, range: pages(700, 701) };
        machine.run(&mut vm, &mut RestoreTemporarily::new(page));
        assert_eq!(machine.off_direct_map.len(), 512, "and off again after its use");
        machine.close(&mut vm, id);
        assert!(machine.off_direct_map.is_empty());
    }
}

#[test]
fn a_fault_beside_a_populated_page_of_its_folio_zeroes_all_but_that_page() {
    let (mut vm, mut machine) = (Vm::new(Arch::snp(), Rules::default()), Machine::default());
    let id = file(&mut vm, 512, FileFlags::empty());
    vm.file_mut(id).expect("open").set_folio_level(Level::Page2M);
    machine.set_region(&mut vm, private_claim(0, 0, 512, id, 0)).expect("valid");
    machine.set_attributes(&mut vm, gfns(0, 512), Side::Private);
    let source = [7; 4096];
    for gfn in [3, 9] {
        let mut populate = Populate::new(gfns(gfn, gfn + 1), Source::Repeated(&source), PopulateKind::Measured);
        assert_eq!(machine.run(&mut vm, &mut populate), Populated { pages: 1, stopped: None });
    }
    vm.finalize().expect("launching");
    for gfn in [3, 5] {
        machine.trace.clear();
        assert!(matches!(machine.fault(&mut vm, gfn), FaultEnd::Mapped(_)));
        let zeroed: Vec<_> = actions(&mut machine)
            .into_iter()
            .filter_map(|action| match action {
                Action::Zero(pages) => Some(pages.range),
                _ => None,
            })
            .collect();
        let rest = [pages(0, 3), pages(4, 9), pages(10, 512)];
        assert_eq!(zeroed, if gfn == 3 { &rest[..] } else { &[] }, "what is mapped is clean, and once is enough");
    }
}

#[test]
fn a_folio_is_split_or_the_hole_is_refused() {
    let (mut vm, mut machine, id) = private_vm(1024, FileFlags::empty(), Rules::default());
    vm.file_mut(id).expect("open").set_folio_level(Level::Page2M);
    assert!(matches!(machine.fault(&mut vm, 600), FaultEnd::Mapped(mapping) if mapping.level == Level::Page2M));
    let before = vm.clone();
    let mut refused = PunchHole::new(id, pages(600, 601)).without_split();
    assert_eq!(machine.run(&mut vm, &mut refused), Err(PunchError::SplitFailed));
    assert_eq!(vm, before);
    machine
        .run(&mut vm, &mut PunchHole::new(id, pages(512, 1024)).without_split())
        .expect("whole folios need no split");
    machine.fault(&mut vm, 600);
    machine.run(&mut vm, &mut PunchHole::new(id, pages(600, 601))).expect("can be split");
    let file = vm.file(id).expect("open");
    assert_eq!((file.folio_level_at(PageIndex(599)), file.is_present(PageIndex(600))), (Level::Page4K, false));
    assert!(matches!(machine.fault(&mut vm, 601), FaultEnd::Mapped(mapping) if mapping.level == Level::Page4K));
}

#[test]
fn what_limits_a_mapping() {
    let level = |gfn, userspace_addr, offset, size: u64, mixed: Option<u64>| {
        let mut vm = vm(Arch::SwProtected);
        let id = file(&mut vm, 2048, FileFlags::empty());
        let wanted = gmem_core::ops::Claim { userspace_addr, ..private_claim(0, gfn, size, id, offset) };
        let mut machine = Machine::default();
        machine.set_region(&mut vm, wanted).expect("valid");
        machine.set_attributes(&mut vm, gfns(0, 4096), Side::Private);
        vm.file_mut(id).expect("open").set_folio_level(Level::Page2M);
        if let Some(gfn) = mixed {
            machine.set_attributes(&mut vm, gfns(gfn, gfn + 1), Side::Shared);
        }
        match machine.fault(&mut vm, gfn + 5) {
            FaultEnd::Mapped(mapping) => mapping.level,
            end => panic!("{end:?}"),
        }
    };
    assert_eq!(level(512, HVA, 0, 1024, None), Level::Page2M);
    assert_eq!(level(512, HVA + PAGE_SIZE, 0, 1024, None), Level::Page4K, "address and frame unlike");
    assert_eq!(level(512, HVA, 1, 1024, None), Level::Page4K, "file and frame unlike");
    assert_eq!(level(512, HVA, 0, 511, None), Level::Page4K, "the slot ends before the block");
    assert_eq!(level(512, HVA, 0, 1024, Some(1023)), Level::Page4K, "mixed attributes");
    assert_eq!(level(512, HVA, 0, 1024, Some(1024)), Level::Page2M, "the next block is another's");
}

/// Whatever an operation is, its actions keep to this: a zap is followed by a flush before anything is freed, put back or
/// refilled, and locks are let go in the reverse order. The machine checks the rest as they come.
#[test]
fn the_order_of_every_operation() {
    let (mut vm, mut machine, id) = private_vm(8, FileFlags::NO_DIRECT_MAP, Rules::default());
    (0..8).for_each(|gfn| assert!(matches!(machine.fault(&mut vm, gfn), FaultEnd::Mapped(_))));
    check_order(&actions(&mut machine));
    machine.set_attributes(&mut vm, gfns(2, 4), Side::Shared);
    check_order(&actions(&mut machine));
    machine.run(&mut vm, &mut MemoryFailure::new(id, PageIndex(0)));
    check_order(&actions(&mut machine));
    machine.run(&mut vm, &mut PunchHole::new(id, pages(0, 2))).expect("no large folio");
    check_order(&actions(&mut machine));
    machine.user_change = Some((HVA, HVA + 8 * PAGE_SIZE));
    machine.run(&mut vm, &mut gmem_core::ops::ChangeUserMapping::new(HVA, HVA + 8 * PAGE_SIZE));
    check_order(&actions(&mut machine));
    machine.close(&mut vm, id);
    check_order(&actions(&mut machine));
    machine.set_region(&mut vm, claim(0, 0, 0)).expect("exists");
    check_order(&actions(&mut machine));
    assert!(vm.create_file(PAGE_SIZE, ALL_FLAGS.bits(), ALL_FLAGS).is_err(), "a private VM has no INIT_SHARED");
}

fn check_order(actions: &[Action]) {
    let (mut zapped, mut locks) = (false, Vec::new());
    for action in actions {
        match action {
            Action::Zap { .. } => zapped = true,
            Action::Flush => zapped = false,
            Action::Lock(lock) => {
                assert!(locks.last().is_none_or(|last| last < lock), "locks have one order: {actions:?}");
                locks.push(*lock);
            }
            Action::Unlock(lock) => {
                assert!(!zapped, "{actions:?}");
                let held = locks.iter().position(|held| held == lock).expect("held");
                locks.remove(held);
            }
            Action::Free(_)
            | Action::DirectMap(..)
            | Action::Refill(_)
            | Action::ChangeUserMapping
            | Action::Map(_) => {
                assert!(!zapped, "{action:?} before the flush: {actions:?}");
            }
            _ => {}
        }
    }
    assert!(locks.is_empty() && !zapped, "{actions:?}");
}

/// A VM of `arch` whose only slot takes every page from a mappable file, with frame 0 shared and frame 1 private, both mapped.
fn mappable(arch: Arch, rules: Rules, flags: FileFlags) -> (Vm, Machine, FileId) {
    let (mut vm, mut machine) = (Vm::new(arch, rules), Machine::default());
    let id = file(&mut vm, 2, flags | FileFlags::MMAP);
    machine.set_region(&mut vm, private_claim(0, 0, 2, id, 0)).expect("valid");
    if vm.has_private_memory() {
        machine.set_attributes(&mut vm, gfns(1, 2), Side::Private);
    }
    machine.trace.clear();
    (vm, machine, id)
}

fn zap_filter(machine: &mut Machine) -> Option<Filter> {
    actions(machine).into_iter().find_map(|action| match action {
        Action::Zap { filter, .. } => Some(filter),
        _ => None,
    })
}

/// `kvm_gmem_get_invalidate_filter()` (6.12: `kvm_gmem_invalidate_begin()`; in place: `kvm_gmem_get_all_gfns_filter()`) names,
/// and `kvm_gfn_range_filter_to_root_types()` heeds it where roots are mirrored.
#[test]
fn what_a_change_of_a_mappable_file_zaps() {
    const PRIVATE: Filter = Filter::Only(Side::Private);
    let with = |tracking, file_filter| Rules { tracking, file_filter, ..Rules::default() };
    let by_kind = with(Tracking::Attributes, FileFilter::Kind);
    let always_private = with(Tracking::Attributes, FileFilter::Private);
    let in_place = with(Tracking::InPlace, FileFilter::Kind);
    let none = FileFlags::empty();
    for (what, arch, rules, flags, expected) in [
        ("TDX: the kind that is named", Arch::tdx(), by_kind, none, PRIVATE),
        ("TDX, always private", Arch::tdx(), always_private, none, PRIVATE),
        ("TDX in place", Arch::tdx(), in_place, none, Filter::Both),
        ("TDX in place, shared at first", Arch::tdx(), in_place, FileFlags::INIT_SHARED, Filter::Both),
        ("one table", Arch::SwProtected, by_kind, none, Filter::Both),
        ("one table, always private", Arch::SwProtected, always_private, none, Filter::Both),
        ("no private memory", Arch::Default, by_kind, FileFlags::INIT_SHARED, Filter::Both),
    ] {
        let (mut vm, mut machine, id) = mappable(arch, rules, flags);
        machine.run(&mut vm, &mut PunchHole::new(id, pages(0, 2))).expect("no large folio");
        assert_eq!(zap_filter(&mut machine), Some(expected), "{what}: punch");
        vm.file_mut(id).expect("open").allocate(pages(0, 2));
        machine.run(&mut vm, &mut MemoryFailure::new(id, PageIndex(0)));
        assert_eq!(zap_filter(&mut machine), Some(expected), "{what}: memory failure");
        machine.close(&mut vm, id);
        assert_eq!(zap_filter(&mut machine), Some(expected), "{what}: close");
    }
    let (mut vm, mut machine, id) = private_vm(2, FileFlags::empty(), by_kind);
    machine.run(&mut vm, &mut PunchHole::new(id, pages(0, 2))).expect("no large folio");
    assert_eq!(zap_filter(&mut machine), Some(PRIVATE), "a file that serves private faults alone");
}

/// What follows from that on TDX, in Linux as here: the shared mapping of a page of a mappable file outlives the page.
#[test]
fn a_hole_in_a_mappable_file_of_a_td_leaves_shared_mappings() {
    for (arch, left) in [(Arch::SwProtected, false), (Arch::tdx(), true)] {
        let (mut vm, _, id) = mappable(arch, Rules::default(), FileFlags::empty());
        let access = Access { gfn: Gfn(0), claimed: Side::Shared };
        let mut mapped = None;
        let end = run(&mut Fault::new(access, Origin::Guest), &mut vm, |_, _, action| {
            if let Action::Map(mapping) = action {
                mapped = Some(mapping);
            }
        });
        assert!(matches!(end, FaultEnd::Mapped(mapping) if mapping.side == Side::Shared), "{end:?}");
        run(&mut PunchHole::new(id, pages(0, 1)), &mut vm, |_, _, action| {
            if let Action::Zap { filter, .. } = action {
                mapped = mapped.filter(|mapping| !filter.includes(mapping.side));
            }
        })
        .expect("no large folio");
        assert_eq!(mapped.is_some(), left, "{:?}", vm.arch);
    }
}

/// `kvm_gmem_ioctl()`, then `kvm_gmem_set_attributes()`: what is not in place has no such call, a VM without private memory no
/// sides, and the range must lie in the file.
#[test]
fn what_can_be_converted_in_place() {
    let in_place = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    for (arch, rules, end, expected) in [
        (Arch::Default, Rules::default(), 9, Err(ConvertError::NotInPlace)),
        (Arch::SwProtected, Rules::default(), 2, Err(ConvertError::NotInPlace)),
        (Arch::Default, in_place, 9, Err(ConvertError::NoPrivateMemory)),
        (Arch::Default, in_place, 2, Err(ConvertError::NoPrivateMemory)),
        (Arch::SwProtected, in_place, 9, Err(ConvertError::BeyondEnd)),
        (Arch::SwProtected, in_place, 8, Ok(())),
    ] {
        for (side, flags) in [(Side::Private, FileFlags::INIT_SHARED), (Side::Shared, FileFlags::empty())] {
            let (mut vm, mut machine) = (Vm::new(arch.clone(), rules), Machine::default());
            let flags = flags & vm.file_flags(ALL_FLAGS);
            let id = file(&mut vm, 8, flags);
            let before = vm.clone();
            let result = machine.run(&mut vm, &mut ConvertInPlace::new(id, pages(1, end), side));
            assert_eq!(result, expected, "{arch:?} {rules:?} {end}");
            assert_eq!(result.is_ok(), vm != before);
            assert!(result.is_ok() || machine.trace.is_empty(), "refused before a lock is taken");
        }
    }
}

/// In place the file says what is private (`kvm_gmem_is_private_gfn()`), also to a VM whose accesses are always shared: it can
/// use files that were created shared, and gets memory-fault exits from others, which nothing can convert.
#[test]
fn a_vm_without_private_memory_in_place_needs_shared_files() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    for (flags, served) in [(FileFlags::INIT_SHARED, true), (FileFlags::empty(), false)] {
        for mmap in [FileFlags::MMAP, FileFlags::empty()] {
            let (mut vm, mut machine) = (Vm::new(Arch::Default, rules), Machine::default());
            let id = file(&mut vm, 2, flags | mmap);
            machine.set_region(&mut vm, private_claim(0, 0, 2, id, 0)).expect("valid");
            match machine.fault(&mut vm, 0) {
                FaultEnd::Mapped(mapping) => assert!(served && mapping.side == Side::Shared),
                FaultEnd::MemoryFault(fault) => assert!(!served && fault.side == Side::Shared),
                end => panic!("{end:?}"),
            }
        }
    }
}

/// `__kvm_gmem_invalidate_start()` calls `kvm_arch_gmem_invalidate_range()` for whatever changes: a guest's VMSA in the range has
/// to be set up anew.
#[test]
fn every_change_of_a_file_reloads_the_vmsas_in_it() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    type Change = fn(&mut Machine, &mut Vm, FileId);
    let changes: [(&str, Change); 4] = [
        ("punch", |machine, vm, id| machine.run(vm, &mut PunchHole::new(id, pages(1, 2))).expect("no large folio")),
        ("memory failure", |machine, vm, id| machine.run(vm, &mut MemoryFailure::new(id, PageIndex(1)))),
        ("conversion", |machine, vm, id| {
            machine.run(vm, &mut ConvertInPlace::new(id, pages(1, 2), Side::Shared)).expect("to shared");
        }),
        ("close", |machine, vm, id| machine.close(vm, id)),
    ];
    for (what, change) in changes {
        let (mut vm, mut machine) = (Vm::new(Arch::snp(), rules), Machine::default());
        let id = file(&mut vm, 4, FileFlags::empty());
        machine.set_region(&mut vm, private_claim(0, 8, 4, id, 0)).expect("valid");
        vm.file_mut(id).expect("open").allocate(pages(0, 4));
        let Arch::Snp(snp) = &mut vm.arch else { panic!("made so") };
        snp.set_guest_vmsa(Gfn(9));
        change(&mut machine, &mut vm, id);
        let Arch::Snp(snp) = &mut vm.arch else { panic!("made so") };
        assert_eq!(snp.take_reloads().into_iter().collect::<Vec<_>>(), [Gfn(9)], "{what}");
    }
}

/// `kvm_gmem_get_pfn()` asks the file and not the access whether the page is to be made private: on SNP a shared access to a
/// mappable file of the private kind takes the page from the host.
#[test]
fn the_file_decides_what_snp_makes_private() {
    for (gfn, side) in [(0, Side::Shared), (1, Side::Private)] {
        let (mut vm, mut machine, id) = mappable(Arch::snp(), Rules::default(), FileFlags::empty());
        let access = Access { gfn: Gfn(gfn), claimed: side };
        let end = machine.run(&mut vm, &mut Fault::new(access, Origin::Guest));
        assert!(matches!(end, FaultEnd::Mapped(mapping) if mapping.side == side), "{end:?}");
        assert_eq!(vm.arch.host_access(id.pfn(PageIndex(gfn)), AccessKind::Store), HostOutcome::Fault, "{side:?}");
    }
}

/// In place the access was compared before the file was locked. A conversion in between gave the page to the host, and the fault
/// finds out only when it is about to map.
#[test]
fn a_stale_fault_takes_no_converted_page_from_the_host() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    let (mut vm, mut machine) = (Vm::new(Arch::snp(), rules), Machine::default());
    let id = file(&mut vm, 1, FileFlags::MMAP);
    machine.set_region(&mut vm, private_claim(0, 0, 1, id, 0)).expect("valid");
    let access = Access { gfn: Gfn(0), claimed: Side::Private };
    let mut fault = Fault::new(access, Origin::Guest);
    while fault.step(&mut vm) != Step::Do(Action::Lock(Lock::FileShared(id))) {}
    machine.run(&mut vm, &mut ConvertInPlace::new(id, pages(0, 1), Side::Shared)).expect("to shared");
    assert_eq!(run(&mut fault, &mut vm, |_, _, _| {}), FaultEnd::Retry);
    assert_eq!(vm.arch.host_access(id.pfn(PageIndex(0)), AccessKind::Store), HostOutcome::Plain);
}

/// `kvm_gmem_punch_hole()` takes the folio out of the file whoever holds it, and a conversion counts references of what is there.
#[test]
fn a_reference_to_a_punched_page_is_none_to_its_place() {
    let rules = Rules { tracking: Tracking::InPlace, ..Rules::default() };
    let (mut vm, mut machine, id) = private_vm(4, FileFlags::MMAP | FileFlags::INIT_SHARED, rules);
    vm.file_mut(id).expect("open").set_referenced(pages(0, 2), true);
    machine.run(&mut vm, &mut PunchHole::new(id, pages(0, 1))).expect("no large folio");
    let mut convert =
        |index| machine.run(&mut vm, &mut ConvertInPlace::new(id, pages(index, index + 1), Side::Private));
    assert_eq!(convert(0), Ok(()));
    assert_eq!(convert(1), Err(ConvertError::Referenced(PageIndex(1))));
}
