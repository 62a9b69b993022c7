//! Random commands, legal and illegal, against what has to be true of any TD at any time.

use super::*;
use crate::effort::{cases, few};
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Run(Command<'static>),
    Accept(PageInfo),
    Begin(PageInfo),
    End(PageInfo),
    Enter(u16),
    Exit(u16),
    Touch { vcpu: u16, gfn: u64 },
}

/// Few addresses and pages, so that commands meet each other.
fn info() -> impl Strategy<Value = PageInfo> {
    let gpa = prop_oneof![24 => Just(0u64), 3 => Just(0x1000), 1 => Just(0x1f_f000), 4 => Just(0x20_0000), 1 => Just(1 << 47)];
    (gpa, prop_oneof![6 => Just(0u8), 4 => Just(1), 1 => Just(2), 1 => Just(3)])
        .prop_map(|(gpa, level)| at(gpa >> (12 + 9 * level) << (12 + 9 * level), level))
}

fn hpa() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0u64..5).prop_map(page),
        4 => (0u64..2).prop_map(|n| BIG + (n << 21)),
        4 => (0u64..3).prop_map(|n| BIG + (n << 12)),
        1 => Just(TDR),
        1 => Just(BIG + 8),
    ]
}

fn command() -> impl Strategy<Value = Command<'static>> {
    let version = 0u8..3;
    prop_oneof![
        2 => (info(), hpa(), version.clone()).prop_map(|(at, page, version)| Command::SeptAdd { at, page, version }),
        1 => (info(), version.clone()).prop_map(|(at, version)| Command::SeptRemove { at, version }),
        2 => (info(), hpa()).prop_map(|(at, page)| Command::PageAdd { at, page, source: 0 }),
        6 => (info(), hpa()).prop_map(|(at, page)| Command::PageAug { at, page }),
        8 => info().prop_map(|at| Command::PageRemove { at }),
        2 => (info(), version).prop_map(|(at, version)| Command::PagePromote { at, version }),
        3 => (info(), hpa()).prop_map(|(at, page)| Command::PageDemote { at, page }),
        4 => (info(), hpa()).prop_map(|(at, page)| Command::PageRelocate { at, page }),
        8 => info().prop_map(|at| Command::RangeBlock { at }),
        2 => info().prop_map(|at| Command::RangeUnblock { at }),
        6 => Just(Command::Track),
        1 => (0u64..0x3000).prop_map(|gpa| Command::MrExtend { gpa, chunk: &[1; 256] }),
        1 => hpa().prop_map(|page| Command::PageReclaim { page }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => command().prop_map(Step::Run),
        2 => info().prop_map(Step::Accept),
        2 => info().prop_map(Step::Begin),
        1 => info().prop_map(Step::End),
        2 => (0u16..3).prop_map(Step::Enter),
        1 => (0u16..3).prop_map(Step::Exit),
        4 => (0u16..2, prop_oneof![Just(0u64), Just(1), Just(511), Just(512)])
            .prop_map(|(vcpu, gfn)| Step::Touch { vcpu, gfn }),
    ]
}

/// The TLBs as hardware has them: filled by accesses, kept across exits, emptied by an entry in another epoch.
#[derive(Default)]
struct Tlb {
    inside: bool,
    epoch: u64,
    cached: BTreeMap<u64, u64>,
}

fn translate(td: &Tdx, gfn: u64) -> Option<u64> {
    let (level, entry) = td.sept().walk(3, 0, gfn);
    entry.state.has(SeptFlags::GUEST_FULLY_ACCESSIBLE_LEAF).then(|| entry.pfn(level) + (gfn & ((1 << (9 * level)) - 1)))
}

/// Where a guest frame points whatever blocks the way: what a stale TLB entry may still say.
fn points_to(td: &Tdx, gfn: u64) -> Option<u64> {
    (0..3).find_map(|level| {
        let entry = td.sept().entry(level, gfn);
        entry.state.is_leaf().then(|| entry.pfn(level) + (gfn & ((1 << (9 * level)) - 1)))
    })
}

fn check_tlbs(td: &Tdx, tlbs: &[Tlb; 2]) -> Result<(), TestCaseError> {
    for (gfn, pfn) in tlbs.iter().filter(|tlb| tlb.inside).flat_map(|tlb| &tlb.cached) {
        prop_assert_eq!(points_to(td, *gfn), Some(*pfn), "a vCPU still reaches a page that was taken away");
    }
    Ok(())
}

fn pages(level: u8) -> u64 {
    1 << (9 * level)
}

/// Walks the whole tree from the root, independently of the model's own bookkeeping.
fn check_tree(td: &Tdx) -> Result<(), TestCaseError> {
    let mut owned = BTreeSet::new();
    let mut reachable = 0;
    let mut tables = vec![(3u8, 0u64)];
    while let Some((level, first)) = tables.pop() {
        for (index, count, run) in td.sept().runs(level) {
            for i in (index..index + count).filter(|i| *i >> 9 == first) {
                let entry = crate::runs::Linear::advance(&run, i - index);
                let pfn = entry.pfn(level);
                reachable += 1;
                prop_assert!(owned.insert(pfn), "{pfn:#x} is used twice");
                if entry.state.is_leaf() {
                    prop_assert_eq!(td.pamt().leaf(pfn), (level, td.pamt().entry(level, pfn)));
                    prop_assert_eq!(td.pamt().entry(level, pfn).page_type, PageType::Reg);
                    prop_assert_eq!(pfn % pages(level), 0);
                    // A 2 MiB page has no 4 KiB entries below or pages assigned one by one.
                    if level > 0 {
                        prop_assert_eq!(td.sept().runs(level - 1).filter(|(at, _, _)| at >> 9 == i).count(), 0);
                        let below = td.pamt().runs(level - 1, pfn >> (9 * (level - 1)), 512);
                        prop_assert!(below.map(|(_, _, e)| e.page_type).all(|t| t == PageType::Nda));
                    }
                } else {
                    prop_assert_eq!(td.pamt().entry(0, pfn).page_type, PageType::Ept);
                    tables.push((level - 1, i));
                }
                prop_assert_eq!(td.pamt().leaf(pfn).1.owner, TDR);
            }
        }
    }
    let all: u64 = (0..5).flat_map(|level| td.sept().runs(level)).map(|(_, count, _)| count).sum();
    prop_assert_eq!(all, reachable, "an entry lies in no table");
    Ok(())
}

/// The quick walk ends where the one that hardware makes does.
fn check_walks(td: &Tdx) -> Result<(), TestCaseError> {
    for (gfn, level) in [0, 1, 511, 512, 1 << 18].into_iter().flat_map(|gfn| (0..4).map(move |level| (gfn, level))) {
        prop_assert_eq!(td.sept().walk(3, level, gfn), td.sept().walk_down(3, level, gfn));
    }
    Ok(())
}

/// While the guest has an entry, nobody takes the page from it.
fn check_locks(td: &Tdx) -> Result<(), TestCaseError> {
    for (level, index) in &td.locks.guest {
        let entry = td.sept().entry(*level, index << (9 * level));
        prop_assert!(entry.state.has(SeptFlags::ANY_PENDING_AND_GUEST_ACCEPTABLE), "{entry:?}");
    }
    Ok(())
}

fn check_children(td: &Tdx) -> Result<(), TestCaseError> {
    let used = |size| {
        let used = td.pamt().runs(size, 0, u64::MAX).filter(|(_, _, entry)| entry.page_type != PageType::Nda);
        used.map(move |(_, count, _)| count * pages(size)).sum::<u64>()
    };
    let root = u64::from(td.pamt().entry(0, TDR >> 12).page_type == PageType::Tdr);
    prop_assert_eq!(td.child_pages(), used(0) + used(1) + used(2) - root);
    Ok(())
}

fn apply(td: &mut Tdx, tlbs: &mut [Tlb; 2], step: &Step) -> Result<(), TestCaseError> {
    let before = td.clone();
    match *step {
        Step::Run(command) => {
            let status = td.execute(command).unwrap().status;
            // A mark of the host's priority comes and goes with the lock, not with the command.
            let kept =
                td.locks.guest == before.locks.guest && Tdx { locks: before.locks.clone(), ..td.clone() } == before;
            prop_assert!(status == T::SUCCESS || kept, "{command:?} refused with {status:?} but changed the TD");
        }
        Step::Accept(at) => {
            let accepted = td.page_accept(at);
            prop_assert!(accepted == Accepted::Returned(T::SUCCESS) || *td == before);
        }
        Step::Begin(at) => {
            let begun = td.page_accept_begin(at);
            prop_assert_eq!(begun.is_err(), *td == before);
        }
        Step::End(at) => {
            let ended = td.page_accept_end(at);
            prop_assert_eq!(ended.is_some(), *td != before);
        }
        Step::Enter(vcpu) if td.op_state() == OpState::Runnable && td.vcpu_enter(vcpu).is_ok() => {
            let tlb = &mut tlbs[usize::from(vcpu)];
            if tlb.epoch != td.tracking().epoch() {
                *tlb = Tlb { epoch: td.tracking().epoch(), ..Tlb::default() };
            }
            tlb.inside = true;
        }
        Step::Exit(vcpu) if td.vcpu_exit(vcpu).is_ok() => tlbs[usize::from(vcpu)].inside = false,
        Step::Touch { vcpu, gfn } if tlbs[usize::from(vcpu)].inside => {
            if let Some(pfn) = translate(td, gfn) {
                tlbs[usize::from(vcpu)].cached.insert(gfn, pfn);
            }
        }
        Step::Enter(_) | Step::Exit(_) | Step::Touch { .. } => {}
    }
    Ok(())
}

/// A TD that random steps would seldom reach: tables, a page that the guest uses, vCPUs that have it in their TLBs.
fn start(depth: u8, finalized: bool, mapped: bool, tlbs: &mut [Tlb; 2]) -> Result<Tdx, TestCaseError> {
    let mut td = td();
    for (level, n) in (1..=3).rev().zip(0..depth) {
        prop_assert_eq!(td.sept_add(at(0, level), page(20 + u64::from(n)), 0).status, T::SUCCESS);
    }
    if finalized {
        td.mr_finalize();
    }
    if mapped && depth >= 2 {
        let here = at(0, 3 - depth);
        prop_assert_eq!(td.page_aug(here, BIG).status, T::SUCCESS);
        prop_assert_eq!(td.page_accept(here), Accepted::Returned(T::SUCCESS));
        for vcpu in 0..2 {
            apply(&mut td, tlbs, &Step::Enter(vcpu))?;
            apply(&mut td, tlbs, &Step::Touch { vcpu, gfn: 0 })?;
        }
    }
    Ok(td)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]

    #[test]
    fn invariants_hold_after_every_command(
        depth in prop_oneof![1 => 0u8..2, 4 => 2u8..4],
        finalized in prop::bool::weighted(0.75),
        mapped in prop::bool::weighted(0.75),
        steps in prop::collection::vec(step(), 1..few(8, 80)),
    ) {
        let mut tlbs = <[Tlb; 2]>::default();
        let mut td = start(depth, finalized, mapped, &mut tlbs)?;
        for step in &steps {
            apply(&mut td, &mut tlbs, step)?;
            check_tree(&td)?;
            check_walks(&td)?;
            check_children(&td)?;
            check_locks(&td)?;
            check_tlbs(&td, &tlbs)?;
        }
    }
}
