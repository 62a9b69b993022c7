//! Pre- and postconditions of the calls, invariants under random calls, and the verbs.

use super::*;
use crate::addr::{Gfn, GfnRange, Level, PageRange, Pfn, PfnRange};
use crate::effort::{cases, few, some};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Side, Status,
};
use PageState::{NoPage, Owned, SharedBorrowed, SharedOwned};
use alloc::vec::Vec;
use proptest::prelude::*;

const VM: VmHandle = VmHandle(1);
const OTHER: VmHandle = VmHandle(2);
const PFN: Pfn = Pfn(3);
const GFN: Gfn = Gfn(8);

fn memory() -> PfnRange {
    PfnRange::with_len(Pfn(0), 2048).unwrap()
}

fn machine() -> El2 {
    let mut el2 = El2::new(memory());
    assert!(el2.create_vm(VM) && el2.create_vm(OTHER) && !el2.create_vm(VM));
    el2
}

type Call = fn(&mut El2) -> Result<(), Error>;

const HOST_SHARE_HYP: Call = |el2| el2.host_share_hyp(PFN);
const HOST_UNSHARE_HYP: Call = |el2| el2.host_unshare_hyp(PFN);
const HOST_DONATE_HYP: Call = |el2| el2.host_donate_hyp(PageRange::page(PFN));
const HYP_DONATE_HOST: Call = |el2| el2.hyp_donate_host(PageRange::page(PFN));
const PIN: Call = |el2| el2.hyp_pin_shared_mem(PageRange::page(PFN));
const SHARE_FFA: Call = |el2| el2.host_share_ffa(PageRange::page(PFN));
const UNSHARE_FFA: Call = |el2| el2.host_unshare_ffa(PageRange::page(PFN));
const DONATE_GUEST: Call = |el2| el2.host_donate_guest(PFN, GFN, VM);
const SHARE_GUEST: Call = |el2| el2.host_share_guest(PFN, GFN, Level::Page4K, VM);
const UNSHARE_GUEST: Call = |el2| el2.host_unshare_guest(GFN, Level::Page4K, VM);
const GUEST_SHARE: Call = |el2| el2.guest_share_host(VM, GFN);
const GUEST_UNSHARE: Call = |el2| el2.guest_unshare_host(VM, GFN);
const RECLAIM: Call = |el2| el2.host_reclaim_page_guest(GFN, VM).map(|_| ());
const FORCE: Call = |el2| el2.host_force_reclaim_page_guest(PFN);

fn states(el2: &El2) -> (PageState, PageState, PageState) {
    let page = el2.physical(PFN).unwrap();
    (page.host, page.hyp, el2.guest_state(VM, GFN))
}

/// From the state that some calls lead to, one more call: the error, or the states of host, hypervisor and guest.
#[test]
fn every_call_from_every_state() {
    use Error::{Again, Busy, HwPoison, NoEnt, Perm};
    let refused = Err::<(PageState, PageState, PageState), Error>;
    let (hosts, hyps) = ((Owned, NoPage, NoPage), (NoPage, Owned, NoPage));
    let poison = (Owned, NoPage, PageState::Poison);
    let with_hyp = (SharedOwned, SharedBorrowed, NoPage);
    let with_guest = (SharedOwned, NoPage, SharedBorrowed);
    let guests = (NoPage, NoPage, Owned);
    let lent = (SharedBorrowed, NoPage, SharedOwned);
    let starts: [(&str, &[Call]); 8] = [
        ("host", &[]),
        ("hyp", &[HOST_DONATE_HYP]),
        ("shared with hyp", &[HOST_SHARE_HYP]),
        ("pinned", &[HOST_SHARE_HYP, PIN]),
        ("shared with guest", &[SHARE_GUEST]),
        ("guest", &[DONATE_GUEST]),
        ("shared by guest", &[DONATE_GUEST, GUEST_SHARE]),
        ("poison", &[DONATE_GUEST, FORCE]),
    ];
    let p = refused(Perm);
    let none = refused(NoEnt);
    let again = refused(Again);
    type Row = [Result<(PageState, PageState, PageState), Error>; 8];
    let table: [(&str, Call, Row); 13] = [
        (
            "host_share_hyp",
            HOST_SHARE_HYP,
            [Ok(with_hyp), p, p, p, p, p, p, Ok((SharedOwned, SharedBorrowed, poison.2))],
        ),
        ("host_unshare_hyp", HOST_UNSHARE_HYP, [p, p, Ok(hosts), refused(Busy), p, p, p, p]),
        ("host_donate_hyp", HOST_DONATE_HYP, [Ok(hyps), p, p, p, p, p, p, Ok((NoPage, Owned, poison.2))]),
        ("hyp_donate_host", HYP_DONATE_HOST, [p, Ok(hosts), p, p, p, p, p, p]),
        ("pin", PIN, [p, p, Ok(with_hyp), Ok(with_hyp), p, p, p, p]),
        (
            "share_ffa",
            SHARE_FFA,
            [Ok((SharedOwned, NoPage, NoPage)), p, p, p, p, p, p, Ok((SharedOwned, NoPage, poison.2))],
        ),
        ("donate_guest", DONATE_GUEST, [Ok(guests), p, p, p, p, p, p, p]),
        ("share_guest", SHARE_GUEST, [Ok(with_guest), p, p, p, p, p, p, p]),
        ("unshare_guest", UNSHARE_GUEST, [none, none, none, none, Ok(hosts), p, p, none]),
        ("guest_share", GUEST_SHARE, [none, none, none, none, p, Ok(lent), p, refused(HwPoison)]),
        ("guest_unshare", GUEST_UNSHARE, [none, none, none, none, p, p, Ok(guests), refused(HwPoison)]),
        ("reclaim", RECLAIM, [none, none, none, none, p, Ok(hosts), Ok(hosts), Ok(poison)]),
        ("force_reclaim", FORCE, [again, p, again, again, again, Ok(poison), again, again]),
    ];
    for (name, call, row) in table {
        for ((start, way), want) in some(starts.into_iter().zip(row), 3) {
            let mut el2 = machine();
            way.iter().for_each(|call| call(&mut el2).unwrap());
            let before = el2.clone();
            let got = call(&mut el2).map(|()| states(&el2));
            assert_eq!(got, want, "{name} from {start}");
            assert!(got.is_ok() || el2 == before, "{name} was refused and changed {start}");
        }
    }
}

#[test]
fn ffa_looks_only_at_the_host() {
    let mut el2 = machine();
    SHARE_FFA(&mut el2).unwrap();
    assert_eq!(PIN(&mut el2), Err(Error::Perm));
    UNSHARE_FFA(&mut el2).unwrap();
    assert_eq!(UNSHARE_FFA(&mut el2), Err(Error::Perm));
    assert_eq!(el2, machine());
}

#[test]
fn ranges_change_whole_or_not_at_all() {
    let mut el2 = machine();
    el2.host_share_hyp(Pfn(5)).unwrap();
    let before = el2.clone();
    let pages = |first, len| PfnRange::with_len(Pfn(first), len).unwrap();
    assert_eq!(el2.host_donate_hyp(pages(0, 8)), Err(Error::Perm));
    assert_eq!(el2.host_donate_hyp(pages(2047, 2)), Err(Error::Inval));
    assert_eq!(el2, before);
    el2.host_donate_hyp(pages(6, 1000)).unwrap();
    el2.hyp_donate_host(pages(7, 999)).unwrap();
    assert_eq!(el2.physical_pages(memory()).count(), 2);
}

#[test]
fn blocks_are_shared_and_unshared_as_blocks() {
    let mut el2 = machine();
    let share = |el2: &mut El2, pfn, gfn, level| el2.host_share_guest(Pfn(pfn), Gfn(gfn), level, VM);
    for (pfn, gfn, level) in [(1, 512, Level::Page2M), (512, 1, Level::Page2M), (0, 0, Level::Page1G)] {
        assert_eq!(share(&mut el2, pfn, gfn, level), Err(Error::Inval));
    }
    share(&mut el2, 512, 1024, Level::Page2M).unwrap();
    assert_eq!(share(&mut el2, 0, 1030, Level::Page4K), Err(Error::Perm));
    assert_eq!(el2.host_unshare_guest(Gfn(1024), Level::Page4K, VM), Err(Error::TooBig));
    assert_eq!(el2.guest_share_host(VM, Gfn(1030)), Err(Error::TooBig));
    assert_eq!(el2.physical(Pfn(1023)).unwrap().shares, 1);
    el2.host_unshare_guest(Gfn(1024), Level::Page2M, VM).unwrap();
    assert_eq!(el2, machine());
}

#[test]
fn force_needs_memory_and_a_guest() {
    let mut el2 = machine();
    assert_eq!(el2.host_force_reclaim_page_guest(Pfn(4096)), Err(Error::Fault));
    HOST_DONATE_HYP(&mut el2).unwrap();
    assert_eq!(FORCE(&mut el2), Err(Error::Perm));
    assert_eq!(el2.host_share_hyp(Pfn(4096)), Err(Error::Inval));
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Host(usize, u64),
    Pin(u64),
    Unpin(u64),
    DonateGuest(u64, u64, VmHandle),
    ShareGuest(u64, u64, VmHandle),
    UnshareGuest(u64, VmHandle),
    GuestShare(u64, VmHandle),
    GuestUnshare(u64, VmHandle),
    Reclaim(u64, VmHandle),
    Force(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let pfn = || 0u64..4;
    let gfn = || 0u64..4;
    let vm = || prop_oneof![Just(VM), Just(OTHER), Just(VmHandle(9))];
    prop_oneof![
        (0usize..6, pfn()).prop_map(|(call, pfn)| Op::Host(call, pfn)),
        pfn().prop_map(Op::Pin),
        pfn().prop_map(Op::Unpin),
        (pfn(), gfn(), vm()).prop_map(|(pfn, gfn, vm)| Op::DonateGuest(pfn, gfn, vm)),
        (pfn(), gfn(), vm()).prop_map(|(pfn, gfn, vm)| Op::ShareGuest(pfn, gfn, vm)),
        (gfn(), vm()).prop_map(|(gfn, vm)| Op::UnshareGuest(gfn, vm)),
        (gfn(), vm()).prop_map(|(gfn, vm)| Op::GuestShare(gfn, vm)),
        (gfn(), vm()).prop_map(|(gfn, vm)| Op::GuestUnshare(gfn, vm)),
        (gfn(), vm()).prop_map(|(gfn, vm)| Op::Reclaim(gfn, vm)),
        pfn().prop_map(Op::Force),
    ]
}

fn apply(el2: &mut El2, op: Op) -> Result<(), Error> {
    let page = |pfn| PageRange::page(Pfn(pfn));
    match op {
        Op::Host(0, pfn) => el2.host_share_hyp(Pfn(pfn)),
        Op::Host(1, pfn) => el2.host_unshare_hyp(Pfn(pfn)),
        Op::Host(2, pfn) => el2.host_donate_hyp(page(pfn)),
        Op::Host(3, pfn) => el2.hyp_donate_host(page(pfn)),
        Op::Host(4, pfn) => el2.host_share_ffa(page(pfn)),
        // The proxy of FF-A takes back only what it has shared.
        Op::Host(_, pfn) => match el2.physical(Pfn(pfn)) {
            Some(Physical { hyp: NoPage, shares: 0, .. }) => el2.host_unshare_ffa(page(pfn)),
            _ => Err(Error::Perm),
        },
        Op::Pin(pfn) => el2.hyp_pin_shared_mem(page(pfn)),
        Op::Unpin(pfn) => {
            el2.hyp_unpin_shared_mem(page(pfn));
            Ok(())
        }
        Op::DonateGuest(pfn, gfn, vm) => el2.host_donate_guest(Pfn(pfn), Gfn(gfn), vm),
        Op::ShareGuest(pfn, gfn, vm) => el2.host_share_guest(Pfn(pfn), Gfn(gfn), Level::Page4K, vm),
        Op::UnshareGuest(gfn, vm) => el2.host_unshare_guest(Gfn(gfn), Level::Page4K, vm),
        Op::GuestShare(gfn, vm) => el2.guest_share_host(vm, Gfn(gfn)),
        Op::GuestUnshare(gfn, vm) => el2.guest_unshare_host(vm, Gfn(gfn)),
        Op::Reclaim(gfn, vm) => el2.host_reclaim_page_guest(Gfn(gfn), vm).map(|_| ()),
        Op::Force(pfn) => el2.host_force_reclaim_page_guest(Pfn(pfn)),
    }
}

/// All that refers to a page: the states of the host and the hypervisor, and of each guest mapping.
fn views(el2: &El2, pfn: Pfn) -> Vec<(PageState, Option<(VmHandle, Gfn)>)> {
    let page = el2.physical(pfn).unwrap();
    let mut views = alloc::vec![(page.host, None), (page.hyp, None)];
    for vm in [VM, OTHER] {
        for gfn in (0..4).map(Gfn) {
            if let Some(GuestPage::Mapped { state, pfn: mapped, .. }) = el2.guest(vm, gfn)
                && mapped == pfn
            {
                views.push((state, Some((vm, gfn))));
            }
        }
    }
    views
}

fn assert_one_owner(el2: &El2) {
    for pfn in (0..4).map(Pfn) {
        let page = el2.physical(pfn).unwrap();
        let views = views(el2, pfn);
        let owners: Vec<_> = views.iter().filter(|(state, _)| matches!(state, Owned | SharedOwned)).collect();
        assert_eq!(owners.len(), 1, "{pfn:?} {views:?}");
        assert_eq!(owners[0].1, page.guest, "{pfn:?}: the record of the owner");
        let borrowers = views.iter().filter(|(state, _)| *state == SharedBorrowed).count();
        // What FF-A borrows is not recorded anywhere else.
        assert!(borrowers == 0 || owners[0].0 == SharedOwned, "{pfn:?} {views:?}");
        let guests = views[2..].iter().filter(|(state, _)| *state == SharedBorrowed).count();
        assert_eq!(u32::try_from(guests).unwrap(), page.shares, "{pfn:?}");
        assert!(page.pins == 0 || page.hyp == SharedBorrowed, "{pfn:?} is pinned");
        assert!(page.host != PageState::Poison && page.hyp != PageState::Poison);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]
    #[test]
    fn random_calls_keep_one_owner(ops in prop::collection::vec(op(), 1..few(12, 120))) {
        let mut el2 = machine();
        for op in ops {
            let before = el2.clone();
            let result = apply(&mut el2, op);
            if result.is_err() {
                prop_assert_eq!(&el2, &before, "{:?} was refused", op);
            }
            assert_one_owner(&el2);
        }
    }
}

fn private(gfn: u64, pfn: u64) -> Mapping {
    Mapping { gfn: Gfn(gfn), pfn: Pfn(pfn), level: Level::Page4K, side: Side::Private }
}

#[test]
fn a_donated_page_is_gone_until_it_is_taken_by_force() {
    let mut vm = Pkvm::new();
    vm.map(private(1, 7)).unwrap();
    let refused = vm.map(private(2, 7)).unwrap_err();
    assert_eq!((refused.cause, refused.status), (Cause::NotOwner, Status::Pkvm(-1)));
    assert_eq!(vm.guest_access(private(1, 7), AccessKind::Store), GuestOutcome::Done);
    assert_eq!(vm.unmap(private(1, 7)), Contents::Kept);
    assert_eq!(vm.guest_access(private(1, 7), AccessKind::Store), GuestOutcome::Done, "a zap does not take it");
    assert_eq!(vm.host_access(Pfn(7), AccessKind::Load), HostOutcome::Corrupted);
    assert_eq!(vm.host_access(Pfn(7), AccessKind::Load), HostOutcome::Plain);
    let poisoned = GuestOutcome::Exit(ExitReason::Poisoned);
    assert_eq!(vm.guest_access(private(1, 7), AccessKind::Load), poisoned);
    assert_eq!(vm.guest_accept(private(1, 7), Acceptance::GiveUp), poisoned);
    assert_eq!(vm.map(private(1, 8)).unwrap_err().cause, Cause::NotOwner, "poison stays");
}

#[test]
fn the_guest_decides_what_the_host_may_reach() {
    let mut vm = Pkvm::new();
    vm.map(private(1, 7)).unwrap();
    let range = GfnRange::page(Gfn(1));
    assert_eq!(vm.convert(range, Side::Shared).unwrap_err().cause, Cause::NotSupported);
    assert_eq!(vm.guest_accept(private(1, 7), Acceptance::GiveUp), GuestOutcome::Done);
    vm.convert(range, Side::Shared).unwrap();
    assert_eq!(vm.host_access(Pfn(7), AccessKind::Store), HostOutcome::Plain);
    let refused = GuestOutcome::Exception(GuestException::CallRefused);
    assert_eq!(vm.guest_accept(private(1, 7), Acceptance::GiveUp), refused);
    assert_eq!(vm.guest_accept(private(1, 7), Acceptance::Accept), GuestOutcome::Done);
    let absent = GuestOutcome::Exit(ExitReason::NotPresent);
    assert_eq!(vm.guest_accept(private(5, 0), Acceptance::GiveUp), absent);
}

#[test]
fn teardown_gives_everything_back() {
    let mut vm = Pkvm::new();
    for page in 0..5 {
        vm.map(private(page, 100 + page)).unwrap();
    }
    let block = Mapping { gfn: Gfn(512), pfn: Pfn(1024), level: Level::Page2M, side: Side::Shared };
    vm.map(block).unwrap();
    vm.guest_accept(private(0, 0), Acceptance::GiveUp);
    assert_eq!(vm.reclaim(PfnRange::with_len(Pfn(101), 2).unwrap()), Contents::Zeroed);
    vm.destroy();
    assert!(vm.is_dead());
    let all = PfnRange::with_len(Pfn(0), 1 << 30).unwrap();
    assert_eq!(vm.el2().physical_pages(all).count(), 0);
    assert_eq!(vm.map(private(0, 100)).unwrap_err().cause, Cause::VmDead);
}

#[test]
fn a_large_mapping_is_donated_whole_or_not_at_all() {
    let mut vm = Pkvm::new();
    vm.map(private(600, 5)).unwrap();
    let large = Mapping { level: Level::Page2M, ..private(512, 1024) };
    let before = vm.clone();
    assert!(vm.map(large).is_err());
    assert_eq!(vm, before);
}

#[test]
fn nothing_is_measured() {
    let mut vm = Pkvm::new();
    let page = |kind, source| Populate { source, kind };
    let bytes = [0; 4096];
    let populate = |vm: &mut Pkvm, page| vm.populate(Gfn(0), Pfn(1), page).map_err(|refusal| refusal.cause);
    assert_eq!(populate(&mut vm, page(PopulateKind::Measured, Some(&bytes))), Err(Cause::NotSupported));
    assert_eq!(populate(&mut vm, page(PopulateKind::Unmeasured, None)), Err(Cause::Invalid));
    populate(&mut vm, page(PopulateKind::Unmeasured, Some(&bytes))).unwrap();
    assert_eq!(vm.guest_state(Gfn(0)), Owned);
}
