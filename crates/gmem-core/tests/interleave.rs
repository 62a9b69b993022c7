//! Operations in random interleavings: after all have ended, nothing that the guest can reach contradicts the VM.

mod common;

use common::{Actor, HVA, Machine, claim, file, gfns, interleave, pages, private_claim};
use gmem_core::addr::{Gfn, Level, PAGE_SIZE, PageIndex};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId};
use gmem_core::ops::{
    Access, ChangeUserMapping, CloseFile, ConvertInPlace, Fault, MemoryFailure, Origin, PunchHole, SetAttributes,
    SetRegion,
};
use gmem_core::vendor::Side;
use gmem_core::vm::{FileFilter, Rules, Tracking, Vm};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

const FRAMES: u64 = 12;

fn side() -> impl Strategy<Value = Side> {
    select(vec![Side::Shared, Side::Private])
}

fn range(limit: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..limit, 1..=limit).prop_map(move |(start, len)| (start, (start + len).min(limit)))
}

/// Whose turn it is, for a few steps at a time: some races need one to wait while others go a long way.
fn schedule() -> impl Strategy<Value = Vec<u8>> {
    let runs = vec((any::<u8>(), 1..12usize), 0..12);
    runs.prop_map(|runs| runs.into_iter().flat_map(|(who, steps)| vec![who; steps]).collect())
}

/// What an actor is to be, before the VM that it acts on exists.
#[derive(Clone, Debug)]
enum Plan {
    Attributes(u64, u64, Side),
    Delete(u32),
    Move(u64),
    Create(u64),
    Punch(usize, u64, u64),
    Close(usize),
    Poison(usize, u64),
    Convert(usize, u64, u64, Side),
    User(u64, u64),
    Fault(u64, Origin),
}

fn plan() -> impl Strategy<Value = Plan> {
    prop_oneof![
        (range(FRAMES), side()).prop_map(|((a, b), side)| Plan::Attributes(a, b, side)),
        (0..4u32).prop_map(Plan::Delete),
        (0..FRAMES).prop_map(Plan::Move),
        (4..7u64).prop_map(Plan::Create),
        (0..2usize, range(8)).prop_map(|(file, (a, b))| Plan::Punch(file, a, b)),
        (0..2usize).prop_map(Plan::Close),
        (0..2usize, 0..8u64).prop_map(|(file, page)| Plan::Poison(file, page)),
        (0..2usize, range(8), side()).prop_map(|(file, (a, b), side)| Plan::Convert(file, a, b, side)),
        range(FRAMES).prop_map(|(a, b)| Plan::User(a, b)),
        (0..FRAMES, select(vec![Origin::Guest, Origin::Prefault])).prop_map(|(gfn, origin)| Plan::Fault(gfn, origin)),
    ]
}

impl Plan {
    /// The file whose descriptor the operation is a call on: it cannot be closed meanwhile.
    fn uses(&self) -> Option<usize> {
        match self {
            Self::Punch(file, ..) | Self::Convert(file, ..) => Some(*file),
            Self::Create(_) => Some(1),
            _ => None,
        }
    }

    fn actor(&self, files: &[FileId]) -> Actor {
        match *self {
            Self::Attributes(a, b, side) => Actor::Attributes(SetAttributes::new(gfns(a, b), side)),
            Self::Delete(slot) => Actor::Region(SetRegion::new(claim(slot, 0, 0))),
            Self::Move(gfn) => {
                // Slot 2 has no file and keeps its address.
                let moved = claim(2, 8, 2);
                Actor::Region(SetRegion::new(gmem_core::ops::Claim { guest_phys_addr: gfn * PAGE_SIZE, ..moved }))
            }
            Self::Create(first) => Actor::Region(SetRegion::new(private_claim(3, 10, 2, files[1], first))),
            Self::Punch(file, a, b) => Actor::Punch(PunchHole::new(files[file], pages(a, b))),
            Self::Close(file) => Actor::Close(CloseFile::new(files[file])),
            Self::Poison(file, page) => Actor::Poison(MemoryFailure::new(files[file], PageIndex(page))),
            Self::Convert(file, a, b, side) => Actor::Convert(ConvertInPlace::new(files[file], pages(a, b), side)),
            Self::User(a, b) => Actor::User(ChangeUserMapping::new(HVA + a * PAGE_SIZE, HVA + b * PAGE_SIZE)),
            Self::Fault(gfn, origin) => {
                Actor::Fault(Fault::new(Access { gfn: Gfn(gfn), claimed: Side::Private }, origin))
            }
        }
    }
}

/// Two slots bound to parts of file 0 and file 1, one without a file, and room for one more.
fn setup(arch: Arch, rules: Rules, flags: [FileFlags; 2]) -> (Vm, Machine, Vec<FileId>) {
    let (mut vm, mut machine) = (Vm::with_frames(arch, rules, 64), Machine::default());
    let files: Vec<FileId> = flags.into_iter().map(|flags| file(&mut vm, 8, flags)).collect();
    for claim in [private_claim(0, 0, 4, files[0], 2), private_claim(1, 4, 4, files[1], 0), claim(2, 8, 2)] {
        machine.set_region(&mut vm, claim).expect("a slot of the test");
    }
    (vm, machine, files)
}

fn world() -> impl Strategy<Value = (Vm, Machine, Vec<FileId>)> {
    let flags = || {
        let bits = vec![FileFlags::MMAP, FileFlags::INIT_SHARED, FileFlags::NO_DIRECT_MAP];
        vec(select(bits), 0..3).prop_map(|all| all.into_iter().fold(FileFlags::empty(), FileFlags::union))
    };
    let rules =
        (select(vec![Tracking::Attributes, Tracking::InPlace]), select(vec![FileFilter::Private, FileFilter::Kind]));
    let arch = select(vec![Arch::Default, Arch::SwProtected, Arch::SwProtected]);
    (arch, rules, flags(), flags()).prop_map(|(arch, (tracking, file_filter), a, b)| {
        let rules = Rules { tracking, file_filter, ..Rules::default() };
        let init = if arch.has_private_memory() && tracking == Tracking::Attributes {
            FileFlags::INIT_SHARED
        } else {
            FileFlags::empty()
        };
        setup(arch, rules, [a - init, b - init])
    })
}

/// Those of `plans` that can happen at once: attributes exist only where the VM has private memory, conversions only in
/// place, a call on a descriptor excludes its close, and the machine knows of one change of the VMM's mappings at a time.
fn possible(vm: &Vm, plans: Vec<Plan>) -> Vec<Plan> {
    let in_place = vm.rules.tracking == Tracking::InPlace;
    let (private, mut kept) = (vm.has_private_memory(), Vec::<Plan>::new());
    for plan in plans {
        let closes = |file| kept.iter().any(|plan| matches!(plan, Plan::Close(closed) if *closed == file));
        let possible = match plan {
            Plan::Attributes(..) => !in_place && private,
            Plan::Convert(file, ..) => in_place && private && !closes(file),
            Plan::Close(file) => !kept.iter().any(|plan| plan.uses() == Some(file)),
            Plan::User(..) => !kept.iter().any(|plan| matches!(plan, Plan::User(..))),
            _ => !plan.uses().is_some_and(closes),
        };
        if possible {
            kept.push(plan);
        }
    }
    kept
}

fn fault_everywhere(machine: &mut Machine, vm: &mut Vm) {
    for gfn in 0..FRAMES {
        machine.fault(vm, gfn);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 3000 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_stale_mapping_survives(
        (mut vm, mut machine, files) in world(),
        private in range(FRAMES),
        faulted in any::<bool>(),
        plans in vec(plan(), 2..4),
        faults in vec(0..FRAMES, 1..3),
        schedule in schedule(),
    ) {
        let plans: Vec<Plan> = plans.into_iter().chain(faults.into_iter().map(|gfn| Plan::Fault(gfn, Origin::Guest))).collect();
        let plans = possible(&vm, plans);
        if vm.rules.tracking == Tracking::Attributes && vm.has_private_memory() {
            machine.set_attributes(&mut vm, gfns(private.0, private.1), Side::Private);
        }
        if faulted {
            fault_everywhere(&mut machine, &mut vm);
        }
        machine.trace.clear();
        for plan in &plans {
            if let Plan::User(a, b) = plan {
                machine.user_change = Some((HVA + a * PAGE_SIZE, HVA + b * PAGE_SIZE));
            }
        }
        let mut actors: Vec<Actor> = plans.iter().map(|plan| plan.actor(&files)).collect();
        interleave(&mut machine, &mut vm, &mut actors, &schedule);
        // What is there now is found by new faults, and stays consistent.
        fault_everywhere(&mut machine, &mut vm);
    }

}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same over folios of 2 MiB: what happens to one page concerns every mapping of its folio.
    #[test]
    #[cfg_attr(miri, ignore = "the oracle looks at 1024 pages after every step: many minutes for one case")]
    fn no_stale_huge_mapping_survives(
        punch in range(1024), attribute in range(1024), poison in 0..1024u64, first in select(vec![0u64, 1, 512]),
        which in 0..3u8, faults in vec(0..1024u64, 1..3), schedule in schedule(), hides in any::<bool>(),
    ) {
        let (mut vm, mut machine) = (Vm::with_frames(Arch::SwProtected, Rules::default(), 4096), Machine::default());
        let flags = if hides { FileFlags::NO_DIRECT_MAP } else { FileFlags::empty() };
        let id = file(&mut vm, 2048, flags);
        vm.file_mut(id).expect("open").set_folio_level(Level::Page2M);
        machine.set_region(&mut vm, private_claim(0, 0, 1024, id, first)).expect("valid");
        machine.set_attributes(&mut vm, gfns(0, 1024), Side::Private);
        machine.trace.clear();
        let first_actor = match which {
            0 => Actor::Punch(PunchHole::new(id, pages(punch.0 + first, punch.1 + first))),
            1 => Actor::Poison(MemoryFailure::new(id, PageIndex(poison + first))),
            _ => Actor::Attributes(SetAttributes::new(gfns(attribute.0, attribute.1), Side::Shared)),
        };
        let fault = |gfn| Actor::Fault(Fault::new(Access { gfn: Gfn(gfn), claimed: Side::Private }, Origin::Guest));
        let mut actors: Vec<Actor> = faults.iter().map(|&gfn| fault(gfn)).collect();
        actors.push(first_actor);
        interleave(&mut machine, &mut vm, &mut actors, &schedule);
        for gfn in (0..1024).step_by(37).chain(faults) {
            machine.fault(&mut vm, gfn);
        }
    }
}

/// Slots come while something else changes the memory that they will show.
fn newcomers() -> Vec<Vec<Plan>> {
    let fault = |gfn| Plan::Fault(gfn, Origin::Guest);
    vec![
        vec![Plan::Create(4), Plan::Punch(1, 4, 6), fault(10)],
        vec![Plan::Create(4), Plan::Poison(1, 4), fault(10)],
        vec![Plan::Create(4), Plan::Attributes(10, 12, Side::Shared), fault(10)],
        vec![Plan::Move(10), Plan::User(8, 10), fault(10)],
        vec![Plan::Delete(1), Plan::Punch(1, 0, 4), fault(4)],
        vec![Plan::Delete(2), Plan::User(8, 10), fault(8)],
        vec![Plan::Close(1), Plan::Delete(1), fault(4)],
        vec![Plan::Close(1), Plan::Poison(1, 0), fault(4)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 4000 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn newcomers_show_nothing_stale(plans in select(newcomers()), schedule in schedule(), hides in any::<bool>()) {
        let flags = if hides { FileFlags::NO_DIRECT_MAP } else { FileFlags::empty() };
        let (mut vm, mut machine, files) = setup(Arch::SwProtected, Rules::default(), [flags; 2]);
        machine.set_attributes(&mut vm, gfns(0, 12), Side::Private);
        if plans.iter().any(|plan| matches!(plan, Plan::User(..))) {
            machine.set_attributes(&mut vm, gfns(8, 12), Side::Shared);
        }
        machine.user_change = Some((HVA + 8 * PAGE_SIZE, HVA + 10 * PAGE_SIZE));
        vm.file_mut(files[1]).expect("open").allocate(pages(0, 8));
        machine.trace.clear();
        let mut actors: Vec<Actor> = plans.iter().map(|plan| plan.actor(&files)).collect();
        interleave(&mut machine, &mut vm, &mut actors, &schedule);
    }
}
