//! The verbs: what KVM's use of the monitor means for a guest and for the host.

use super::{BLOCK, PAGE, RUNNABLE};
use crate::addr::{Gfn, GfnRange, Level, Pfn, PfnRange};
use crate::measure::cca::{HashAlgo, Step};
use crate::vendor::cca::*;
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestException, GuestOutcome, HostOutcome, Mapping, Populate,
    PopulateKind, Side, Status,
};

fn private(gfn: u64, pfn: u64) -> Mapping {
    Mapping { gfn: Gfn(gfn), pfn: Pfn(pfn), level: Level::Page4K, side: Side::Private }
}

fn range(first: u64, len: u64) -> GfnRange {
    GfnRange::with_len(Gfn(first), len).unwrap()
}

fn booted() -> Cca {
    let mut cca = Cca::new(&Config::default()).unwrap();
    cca.convert(range(0, 1024), Side::Private).unwrap();
    cca.finalize().unwrap();
    cca
}

#[test]
fn a_life_of_a_vm() {
    let mut cca = Cca::new(&Config::default()).unwrap();
    assert_eq!(cca.map(private(0, 0x100)).unwrap_err().cause, Cause::Busy);
    assert!(!cca.prefault_allowed());
    cca.convert(range(0, 1024), Side::Private).unwrap();
    let page = Populate { source: Some(&[9; 4096]), kind: PopulateKind::Measured };
    cca.populate(Gfn(1024), Pfn(0x500), page).unwrap();
    let twice = cca.populate(Gfn(1024), Pfn(0x501), page).unwrap_err();
    assert_eq!((twice.cause, twice.status), (Cause::NoDevice, Status::Rmi(0x304)));
    assert_eq!(cca.host_access(Pfn(0x500), AccessKind::Load), HostOutcome::Fault);
    assert_eq!(cca.host_access(Pfn(0x501), AccessKind::Store), HostOutcome::Plain);
    cca.finalize().unwrap();
    assert_eq!(cca.finalize().unwrap_err().cause, Cause::Busy);
    assert_eq!(cca.populate(Gfn(1025), Pfn(0x502), page).unwrap_err().cause, Cause::Busy);
    assert_eq!(cca.guest_access(private(1024, 0), AccessKind::Fetch), GuestOutcome::Done);
    let fault = GuestOutcome::Exit(ExitReason::NotPresent);
    assert_eq!(cca.guest_access(private(3, 0), AccessKind::Load), fault);
    cca.map(private(3, 0x600)).unwrap();
    assert_eq!(cca.guest_access(private(3, 0), AccessKind::Load), GuestOutcome::Done);
    cca.destroy();
    assert!(cca.is_dead());
    assert_eq!(cca.map(private(3, 0x700)).unwrap_err().cause, Cause::VmDead);
    let all = PfnRange::new(Pfn(0), Pfn(1 << 36)).unwrap();
    assert_eq!(cca.rmm().granules_in(all).count(), 0, "every granule is the host's again");
}

#[test]
fn the_measurement_is_of_what_was_populated() {
    let mut cca = Cca::new(&Config { hash: HashAlgo::Sha512, ..Config::default() }).unwrap();
    cca.convert(range(512, 512), Side::Private).unwrap();
    for (gfn, kind) in [(0, PopulateKind::Measured), (1, PopulateKind::Unmeasured)] {
        cca.populate(Gfn(gfn), Pfn(0x500 + gfn), Populate { source: Some(&[5; 4096]), kind }).unwrap();
    }
    cca.finalize().unwrap();
    let params = crate::measure::cca::RealmParams {
        s2sz: 48,
        num_bps: 1,
        num_wps: 1,
        hash_algo: HashAlgo::Sha512,
        ..Default::default()
    };
    let steps = [
        // Only the tables that the populated pages need exist when RIPAS is initialised.
        Step::Ripas { base: BLOCK, top: 2 * BLOCK },
        Step::Data { ipa: 0, flags: 1, content: &[5; 4096] },
        Step::Data { ipa: PAGE, flags: 0, content: &[5; 4096] },
        Step::Rec(RUNNABLE),
    ];
    let want = crate::measure::cca::measure(&params, steps, |_, _| ());
    assert_eq!(cca.realm().unwrap().rim(), &want);
}

#[test]
fn zapping_memory_in_use_loses_it_for_good() {
    let mut cca = booted();
    cca.map(private(7, 0x100)).unwrap();
    assert_eq!(cca.unmap(private(7, 0x100)), Contents::Zeroed);
    assert_eq!(cca.host_access(Pfn(0x100), AccessKind::Load), HostOutcome::Plain);
    let abort = GuestOutcome::Exit(ExitReason::RealmAbort);
    assert_eq!(cca.guest_access(private(7, 0), AccessKind::Load), abort);
    cca.map(private(7, 0x101)).unwrap();
    assert_eq!(cca.guest_access(private(7, 0), AccessKind::Load), abort, "new memory does not help");
    let asked = cca.guest_accept(private(7, 0), Acceptance::Accept);
    assert_eq!(asked, GuestOutcome::Exit(ExitReason::RipasChange));
    cca.convert(range(7, 1), Side::Private).unwrap();
    assert_eq!(cca.guest_access(private(7, 0), AccessKind::Load), GuestOutcome::Done);
}

#[test]
fn giving_memory_up_makes_it_the_realms_own_fault() {
    let mut cca = booted();
    cca.map(private(7, 0x100)).unwrap();
    let nobody_asked = cca.convert(range(7, 1), Side::Shared).unwrap_err();
    assert_eq!(nobody_asked.cause, Cause::Invalid);
    cca.guest_accept(private(7, 0), Acceptance::GiveUp);
    assert_eq!(cca.convert(range(8, 1), Side::Shared).unwrap_err().cause, Cause::Invalid);
    cca.convert(range(7, 1), Side::Shared).unwrap();
    assert_eq!(cca.reclaim(PfnRange::page(Pfn(0x100))), Contents::Kept);
    assert_eq!(cca.host_access(Pfn(0x100), AccessKind::Load), HostOutcome::Plain);
    let abort = GuestOutcome::Exception(GuestException::ExternalAbort);
    assert_eq!(cca.guest_access(private(7, 0), AccessKind::Load), abort);
}

#[test]
fn shared_memory_is_never_executable_and_never_anothers() {
    let mut cca = booted();
    let shared = Mapping { side: Side::Shared, ..private(9, 0x100) };
    cca.map(shared).unwrap();
    assert_eq!(cca.guest_access(shared, AccessKind::Store), GuestOutcome::Done);
    let abort = GuestOutcome::Exception(GuestException::ExternalAbort);
    assert_eq!(cca.guest_access(shared, AccessKind::Fetch), abort);
    cca.map(private(9, 0x100)).unwrap();
    let fault = GuestOutcome::Exit(ExitReason::NotPresent);
    assert_eq!(cca.guest_access(shared, AccessKind::Load), fault, "the granule was delegated meanwhile");
    cca.map(Mapping { pfn: Pfn(0x200), ..shared }).unwrap();
    assert_eq!(cca.guest_access(shared, AccessKind::Load), GuestOutcome::Done);
    assert_eq!(cca.unmap(shared), Contents::Kept);
    assert_eq!(cca.guest_access(shared, AccessKind::Load), fault);
}

#[test]
fn a_refused_verb_changes_nothing() {
    let mut cca = booted();
    cca.map(private(2000, 0x100)).unwrap();
    let before = cca.clone();
    // Not an address; not aligned for the size; a page of the range is there already.
    let shared = |gfn, pfn, level| Mapping { level, side: Side::Shared, ..private(gfn, pfn) };
    for mapping in [
        shared(1 << 20, 1 << 40, Level::Page4K),
        shared(1 << 20, 3, Level::Page2M),
        shared((1 << 20) + 1, 512, Level::Page2M),
        Mapping { level: Level::Page2M, ..private(1536, 0x400) },
        private(1 << 40, 0x500),
    ] {
        assert_eq!(cca.map(mapping).unwrap_err().cause, Cause::NoDevice, "{mapping:?}");
        assert_eq!(cca, before, "{mapping:?}");
    }
    // A page that was delegated already counts as mapped by another vCPU.
    cca.map(private(1 << 20, 0x100)).unwrap();
    assert_eq!(cca, before);
}

#[test]
fn a_page_in_use_cannot_be_reclaimed() {
    let mut cca = booted();
    cca.map(private(7, 0x100)).unwrap();
    assert_eq!(cca.reclaim(PfnRange::page(Pfn(0x100))), Contents::Undefined);
    assert_eq!(cca.guest_access(private(7, 0), AccessKind::Load), GuestOutcome::Done);
}

#[test]
fn a_gigabyte_of_ram_is_a_few_runs() {
    let mut cca = Cca::new(&Config::default()).unwrap();
    cca.convert(range(0, 4 << 18), Side::Private).unwrap();
    let runs: usize = (0..=PAGE_LEVEL).map(|level| cca.realm().unwrap().rtt().entries(level).count()).sum();
    assert!(runs < 12, "{runs} runs for 4 GiB");
}
