//! `KVM_SET_USER_MEMORY_REGION2`: every check, and which of two that fail is reported.

mod common;

use common::{HVA, Machine, claim, file, gfns, private_claim, vm};
use gmem_core::addr::{Gfn, PAGE_SIZE};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId};
use gmem_core::ops::{Claim, FaultEnd, FileClaim, RegionError, SetRegion, check_claim};
use gmem_core::slot::{SlotFlags, SlotId};
use gmem_core::vendor::Side;
use gmem_core::vm::{Rules, Unbacked, View, Vm};

const MIB2: u64 = 512;
const NEW: u32 = 9;
/// `kvm_mmu_max_gfn()` + 1 of a host with 46 bits of physical address.
const FRAMES_END: u64 = 1 << 34;

/// A VM with slot 0 (file, frames 0..4), slot 1 (no file, frames 16..20) and a file of 16 pages.
fn world() -> (Vm, FileId) {
    let mut vm = vm(Arch::SwProtected);
    vm.rules.frames_end = FRAMES_END;
    let id = file(&mut vm, 16, FileFlags::empty());
    let mut machine = Machine::default();
    machine.set_region(&mut vm, private_claim(0, 0, 4, id, 0)).expect("valid");
    machine.set_region(&mut vm, claim(1, 16, 4)).expect("valid");
    (vm, id)
}

/// One way to make a claim wrong.
struct Wrong {
    what: &'static str,
    error: RegionError,
    spoil: fn(&mut Claim),
}

fn wrong(what: &'static str, error: RegionError, spoil: fn(&mut Claim)) -> Wrong {
    Wrong { what, error, spoil }
}

/// Ways to spoil a claim that creates a slot with a file, in the order of the kernel's checks. Each touches fields that the
/// ones of later checks leave alone, or that they may add to.
fn of_create() -> Vec<Wrong> {
    vec![
        wrong("number beyond the limit", RegionError::SlotNumber, |claim| claim.slot = 32_764),
        wrong("unknown flag", RegionError::Flags, |claim| claim.flags |= 1 << 3),
        wrong("dirty log with a file", RegionError::Flags, |claim| claim.flags |= 1),
        wrong("read-only with a file", RegionError::Flags, |claim| claim.flags |= 2),
        wrong("address unaligned", RegionError::Geometry, |claim| claim.userspace_addr |= 0x10),
        wrong("second address space", RegionError::Geometry, |claim| claim.slot |= 1 << 16),
        wrong("frames of another slot", RegionError::Overlap, |claim| claim.guest_phys_addr = 17 * PAGE_SIZE),
        wrong("no descriptor", RegionError::BadDescriptor, |claim| claim.file = FileClaim::BadDescriptor),
        wrong("no guest_memfd", RegionError::File, |claim| {
            if claim.file != FileClaim::BadDescriptor {
                claim.file = FileClaim::NotGuestMemfd;
            }
        }),
        wrong("of another VM", RegionError::File, |claim| {
            if claim.file != FileClaim::BadDescriptor {
                claim.file = FileClaim::OtherVm;
            }
        }),
        wrong("past the end of the file", RegionError::File, |claim| claim.guest_memfd_offset = 15 * PAGE_SIZE),
        wrong("beyond every guest's reach", RegionError::Unreachable, |claim| {
            if claim.guest_phys_addr != 17 * PAGE_SIZE {
                claim.guest_phys_addr = FRAMES_END * PAGE_SIZE - 3 * PAGE_SIZE;
            }
        }),
        wrong("pages bound already", RegionError::PagesBound, |claim| {
            if claim.guest_memfd_offset != 15 * PAGE_SIZE {
                claim.guest_memfd_offset = 3 * PAGE_SIZE;
            }
        }),
    ]
}

fn refused(vm: &Vm, claim: Claim) -> Option<RegionError> {
    let (mut changed, mut machine) = (vm.clone(), Machine::default());
    let result = machine.set_region(&mut changed, claim);
    assert_eq!(check_claim(vm, &claim), result, "the check alone says the same: {claim:?}");
    if result.is_err() {
        assert_eq!(&changed, vm, "a refused claim changes nothing: {claim:?}");
    }
    result.err()
}

#[test]
fn the_first_check_that_fails_is_the_one_reported() {
    let (vm, id) = world();
    let good = private_claim(NEW, 32, 4, id, 8);
    assert_eq!(refused(&vm, good), None);
    let wrongs = of_create();
    for (at, first) in wrongs.iter().enumerate() {
        let mut one = good;
        (first.spoil)(&mut one);
        assert_eq!(refused(&vm, one), Some(first.error), "{}", first.what);
        for second in &wrongs[at + 1..] {
            let mut both = good;
            // An earlier check's wrong comes last, so that it is not undone.
            (second.spoil)(&mut both);
            (first.spoil)(&mut both);
            assert_eq!(refused(&vm, both), Some(first.error), "{} and {}", first.what, second.what);
        }
    }
}

/// What is wrong, and how to make it so.
type Spoil = (&'static str, fn(&mut Claim));

#[test]
fn geometry() {
    let (vm, id) = world();
    let spoils: [Spoil; 11] = [
        ("size unaligned", |claim| claim.memory_size += 1),
        ("gpa unaligned", |claim| claim.guest_phys_addr += 0x200),
        ("address unaligned", |claim| claim.userspace_addr += 1),
        ("address not canonical", |claim| claim.userspace_addr = 0x8000_0000_0000_0000),
        ("address ends beyond user space", |claim| claim.userspace_addr = (1 << 47) - 2 * PAGE_SIZE),
        ("address wraps", |claim| claim.userspace_addr = 0u64.wrapping_sub(PAGE_SIZE)),
        ("offset unaligned", |claim| claim.guest_memfd_offset = 0x800),
        ("offset wraps", |claim| claim.guest_memfd_offset = 0u64.wrapping_sub(PAGE_SIZE)),
        ("gpa wraps", |claim| claim.guest_phys_addr = 0u64.wrapping_sub(2 * PAGE_SIZE)),
        ("too many pages", |claim| {
            claim.memory_size = (1 << 31) * PAGE_SIZE;
            claim.userspace_addr = 0;
        }),
        ("no such address space", |claim| claim.slot |= 1 << 16),
    ];
    for (what, spoil) in spoils {
        let mut claim = private_claim(NEW, 32, 4, id, 8);
        spoil(&mut claim);
        assert_eq!(refused(&vm, claim), Some(RegionError::Geometry), "{what}");
    }
    let most = Claim { memory_size: ((1 << 31) - 1) * PAGE_SIZE, userspace_addr: 0, ..claim(NEW, 1 << 20, 1) };
    assert_eq!(refused(&vm, most), None, "2^31 - 1 pages, and address 0 is legal");
    let offset = Claim { guest_memfd_offset: 1, ..claim(NEW, 32, 4) };
    assert_eq!(refused(&vm, offset), None, "without a file nobody looks at the offset");
    let near_the_limit =
        Claim { guest_memfd_offset: (i64::MAX as u64) & !(PAGE_SIZE - 1), ..private_claim(NEW, 32, 1, id, 0) };
    assert_eq!(refused(&vm, near_the_limit), Some(RegionError::File));
}

#[test]
fn deleting_looks_at_number_flags_and_geometry_only() {
    let (vm, _) = world();
    let rubbish = Claim {
        flags: SlotFlags::GUEST_MEMFD.bits(),
        guest_phys_addr: 1 << 40,
        guest_memfd_offset: 1 << 40,
        ..claim(0, 0, 0)
    };
    assert_eq!(refused(&vm, rubbish), None);
    assert_eq!(refused(&vm, Claim { flags: 8, ..rubbish }), Some(RegionError::Flags));
    assert_eq!(refused(&vm, Claim { guest_phys_addr: 1, ..rubbish }), Some(RegionError::Geometry));
    assert_eq!(refused(&vm, Claim { slot: 5, ..rubbish }), Some(RegionError::NoSuchSlot));
    assert_eq!(refused(&vm, Claim { slot: 40_000, ..rubbish }), Some(RegionError::SlotNumber));
}

#[test]
fn what_may_change_in_a_slot() {
    let (vm, id) = world();
    let own = claim(1, 16, 4);
    let log = SlotFlags::LOG_DIRTY_PAGES.bits();
    for (what, claim, expected) in [
        ("nothing", own, None),
        ("dirty logging", Claim { flags: log, ..own }, None),
        ("frames", Claim { guest_phys_addr: 100 * PAGE_SIZE, ..own }, None),
        ("frames that overlap the old ones", Claim { guest_phys_addr: 18 * PAGE_SIZE, ..own }, None),
        ("frames of another", Claim { guest_phys_addr: 2 * PAGE_SIZE, ..own }, Some(RegionError::Overlap)),
        ("read-only", Claim { flags: 2, ..own }, Some(RegionError::Immutable)),
        ("address", Claim { userspace_addr: HVA, ..own }, Some(RegionError::Immutable)),
        ("size", Claim { memory_size: PAGE_SIZE, ..own }, Some(RegionError::Immutable)),
        (
            "size, over another slot",
            Claim { memory_size: PAGE_SIZE, guest_phys_addr: 0, ..own },
            Some(RegionError::Immutable),
        ),
        ("a file", private_claim(1, 16, 4, id, 8), Some(RegionError::Immutable)),
        (
            "a file that is none",
            Claim { file: FileClaim::BadDescriptor, ..private_claim(1, 16, 4, id, 8) },
            Some(RegionError::Immutable),
        ),
        ("a slot with a file, as it is", private_claim(0, 0, 4, id, 0), Some(RegionError::Immutable)),
        ("a slot with a file, without it", claim(0, 0, 4), Some(RegionError::Immutable)),
        ("a slot with a file, elsewhere", private_claim(0, 64, 4, id, 0), Some(RegionError::Immutable)),
    ] {
        assert_eq!(refused(&vm, claim), expected, "{what}");
    }
}

#[test]
fn files_need_a_vm_that_takes_them() {
    for (arch, old, allowed) in
        [(Arch::Default, true, false), (Arch::Default, false, true), (Arch::SwProtected, true, true)]
    {
        let rules = Rules { files_without_private_memory: !old, ..Rules::default() };
        let mut vm = Vm::new(arch, rules);
        let id = file(&mut vm, 4, FileFlags::empty());
        let expected = (!allowed).then_some(RegionError::Flags);
        assert_eq!(refused(&vm, private_claim(0, 0, 4, id, 0)), expected, "{:?}", vm.arch);
    }
}

#[test]
fn address_spaces_are_apart() {
    let mut vm = vm(Arch::Default);
    let mut machine = Machine::default();
    assert_eq!(machine.set_region(&mut vm, claim(0, 0, 4)), Ok(()));
    assert_eq!(machine.set_region(&mut vm, claim(1 << 16, 0, 4)), Ok(()), "SMM has frames of its own");
    assert_eq!(refused(&vm, claim(2 << 16, 64, 4)), Some(RegionError::Geometry));
    assert_eq!(machine.set_region(&mut vm, claim(1 << 16, 0, 0)), Ok(()));
    assert!(vm.slots().at(0, Gfn(0)).is_some() && vm.slots().at(1, Gfn(0)).is_none());
}

#[test]
fn slots_are_counted_up_to_the_limit() {
    let mut vm = vm(Arch::SwProtected);
    vm.rules.max_slots = 64;
    let id = file(&mut vm, 128, FileFlags::empty());
    let mut machine = Machine::default();
    for slot in 0..64 {
        let number = u64::from(slot);
        assert_eq!(machine.set_region(&mut vm, private_claim(slot, number * MIB2, 2, id, number * 2)), Ok(()));
    }
    assert_eq!(refused(&vm, claim(64, 1 << 20, 1)), Some(RegionError::SlotNumber));
    assert_eq!(vm.slots().pages(), 128);
    let raw = SlotId::from_raw(63);
    assert_eq!(vm.slots().get(raw).and_then(|slot| slot.binding).map(|binding| binding.first.0), Some(126));
    machine.run(&mut vm, &mut SetRegion::new(claim(63, 0, 0))).expect("exists");
    assert_eq!(
        refused(&vm, private_claim(63, 1 << 20, 2, id, 126)),
        None,
        "what a deleted slot had can be bound again"
    );
}

/// The same claim for other frames; the address stays where user space is.
fn at(claim: Claim, gfn: u64) -> Claim {
    Claim { guest_phys_addr: gfn * PAGE_SIZE, ..claim }
}

/// `kvm_arch_prepare_memory_region()`: the last frame is what counts, for new slots and moves.
#[test]
fn slots_end_where_guests_can_reach() {
    let (vm, id) = world();
    for (what, end, expected) in
        [("the last frame", FRAMES_END, None), ("one more", FRAMES_END + 1, Some(RegionError::Unreachable))]
    {
        assert_eq!(refused(&vm, at(claim(NEW, 32, 4), end - 4)), expected, "new: {what}");
        assert_eq!(refused(&vm, at(private_claim(NEW, 32, 4, id, 8), end - 4)), expected, "new with a file: {what}");
        let moved = at(claim(1, 16, 4), end - 4);
        assert_eq!(refused(&vm, moved), expected, "moved: {what}");
        assert_eq!(refused(&vm, Claim { memory_size: 0, ..moved }), None, "a delete looks at no frames");
    }
}

/// The frame that a TD calls by its address with the shared bit is no other frame (`kvm_is_gfn_alias()`, bit 47 of 48).
#[test]
fn the_shared_bit_of_a_td_is_no_part_of_a_slot() {
    const SHARED: u64 = 1 << (47 - 12);
    let td = vm(Arch::tdx());
    for (first, expected) in [
        (SHARED - 2, None),
        (SHARED - 1, Some(RegionError::Unreachable)),
        (SHARED, Some(RegionError::Unreachable)),
        // Only the last frame is looked at.
        (2 * SHARED - 1, None),
    ] {
        assert_eq!(refused(&td, at(claim(0, 0, 2), first)), expected, "{first:#x}");
        assert_eq!(refused(&vm(Arch::snp()), at(claim(0, 0, 2), first)), None, "{first:#x}");
    }
}

/// 7.3 binds in `kvm_gmem_commit_memory_region()`, last of all; before, `kvm_gmem_bind()` came ahead of
/// `kvm_arch_prepare_memory_region()`.
#[test]
fn bound_pages_are_found_out_before_or_after_the_architecture_looks() {
    let (mut vm, id) = world();
    let frames = FRAMES_END - 3;
    for (binds_last, first) in [(true, RegionError::Unreachable), (false, RegionError::PagesBound)] {
        vm.rules.binds_last = binds_last;
        assert_eq!(refused(&vm, private_claim(NEW, 32, 4, id, 3)), Some(RegionError::PagesBound));
        assert_eq!(refused(&vm, at(private_claim(NEW, 32, 4, id, 8), frames)), Some(RegionError::Unreachable));
        assert_eq!(refused(&vm, at(private_claim(NEW, 32, 4, id, 3), frames)), Some(first), "{binds_last}");
        assert_eq!(
            refused(&vm, at(private_claim(NEW, 32, 4, id, 15), frames)),
            Some(RegionError::File),
            "{binds_last}"
        );
    }
}

/// `kvm_arch_has_readonly_mem()`: not where `has_protected_state`. It is part of the check of flags, so it fails a delete, too.
#[test]
fn guests_with_protected_state_have_no_readonly_slots() {
    let readonly = Claim { flags: SlotFlags::READONLY.bits(), ..claim(0, 0, 4) };
    for arch in [Arch::Default, Arch::SwProtected] {
        assert_eq!(refused(&vm(arch), readonly), None);
    }
    for arch in [Arch::snp(), Arch::tdx()] {
        let vm = vm(arch);
        assert_eq!(refused(&vm, readonly), Some(RegionError::ReadOnly));
        assert_eq!(refused(&vm, Claim { guest_phys_addr: 1, ..readonly }), Some(RegionError::ReadOnly));
        assert_eq!(refused(&vm, Claim { memory_size: 0, ..readonly }), Some(RegionError::ReadOnly));
        assert_eq!(refused(&vm, Claim { slot: 40_000, ..readonly }), Some(RegionError::SlotNumber));
    }
}

/// `kvm_gmem_bind()` of 6.18 as the C compiler reads it, in numbers that do not wrap: `offset < 0 || offset + size > i_size`
/// in 64 signed bits.
fn refused_by_6_18(offset: u64, size: u64, file_size: u64) -> bool {
    let signed = |value: i128| (value + (1 << 63)).rem_euclid(1 << 64) - (1 << 63);
    let offset = signed(offset.into());
    offset < 0 || signed(offset + i128::from(size)) > i128::from(file_size)
}

#[test]
fn an_end_in_the_file_that_is_negative_is_accepted_by_6_18_alone() {
    const SIZE: u64 = 4 * PAGE_SIZE;
    const HALF: u64 = 1 << 63;
    let offsets = [
        0,
        12 * PAGE_SIZE,
        13 * PAGE_SIZE,
        HALF - SIZE - PAGE_SIZE,
        HALF - SIZE,
        HALF - PAGE_SIZE,
        HALF,
        HALF + PAGE_SIZE,
        0u64.wrapping_sub(2 * SIZE),
    ];
    let (mut vm, id) = world();
    for signed_offsets in [false, true] {
        vm.rules.signed_offsets = signed_offsets;
        for offset in offsets {
            let claim = Claim { guest_memfd_offset: offset, ..private_claim(NEW, 32, 4, id, 0) };
            let past = match signed_offsets {
                true => refused_by_6_18(offset, SIZE, 16 * PAGE_SIZE),
                false => offset + SIZE > 16 * PAGE_SIZE,
            };
            let bound = (offset == 0).then_some(RegionError::PagesBound);
            let expected = if past { Some(RegionError::File) } else { bound };
            assert_eq!(refused(&vm, claim), expected, "{offset:#x}, signed: {signed_offsets}");
        }
        let wraps = Claim { guest_memfd_offset: 0u64.wrapping_sub(SIZE), ..private_claim(NEW, 32, 4, id, 0) };
        assert_eq!(refused(&vm, wraps), Some(RegionError::Geometry), "64 unsigned bits are looked at by all");
    }
    assert!(!refused_by_6_18(HALF - PAGE_SIZE, SIZE, 16 * PAGE_SIZE), "what was observed on 6.18.44");
}

#[test]
fn pages_beyond_the_end_are_bound_and_never_served() {
    let (mut vm, id) = world();
    vm.rules.signed_offsets = true;
    let mut machine = Machine::default();
    let last = (1 << 51) - 1;
    machine.set_region(&mut vm, private_claim(NEW, 32, 2, id, last)).expect("6.18 does not see it");
    let again = private_claim(NEW + 1, 64, 1, id, last);
    assert_eq!(refused(&vm, again), Some(RegionError::PagesBound));
    machine.set_attributes(&mut vm, gfns(32, 34), Side::Private);
    let unbacked = View::Unbacked(Unbacked::BeyondEnd);
    for gfn in [32, 33] {
        assert!(matches!(machine.fault(&mut vm, gfn), FaultEnd::MemoryFault(fault) if fault.gfn == Gfn(gfn)));
        assert_eq!(vm.view(Gfn(gfn)), unbacked);
    }
    let slot = vm.slots().get(SlotId::from_raw(NEW)).expect("set");
    assert_eq!(vm.views(slot, gfns(32, 34)).collect::<Vec<_>>(), [(gfns(32, 34), unbacked)]);
    machine.set_region(&mut vm, claim(NEW, 0, 0)).expect("exists");
    machine.set_region(&mut vm, again).expect("free again");
    machine.close(&mut vm, id);
}
