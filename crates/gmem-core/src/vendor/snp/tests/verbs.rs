//! The verbs of the seam.

use super::*;

fn private_mapping(gfn: u64, pfn: u64, level: Level) -> Mapping {
    Mapping { gfn: Gfn(gfn), pfn: Pfn(pfn), level, side: Side::Private }
}

const NOT_VALIDATED: GuestOutcome = GuestOutcome::Exception(GuestException::NotValidated);

#[test]
fn a_punched_page_kills_the_guest_not_the_vm() {
    let mut snp = Snp::default();
    snp.finalize().unwrap();
    let mapping = private_mapping(9, 3, Level::Page4K);
    snp.make_private(Gfn(9), Pfn(3)).unwrap();
    snp.make_private(Gfn(9), Pfn(3)).unwrap();
    snp.map(mapping).unwrap();
    assert_eq!(snp.guest_access(mapping, AccessKind::Load), NOT_VALIDATED);
    assert_eq!(snp.guest_accept(mapping, Acceptance::Accept), GuestOutcome::Done);
    assert_eq!(snp.guest_access(mapping, AccessKind::Store), GuestOutcome::Done);
    assert_eq!(snp.host_access(Pfn(3), AccessKind::Store), HostOutcome::Fault);
    assert_eq!(snp.host_access(Pfn(3), AccessKind::Load), HostOutcome::Ciphertext);
    assert_eq!(snp.unmap(mapping), Contents::Kept);
    assert_eq!(snp.guest_access(mapping, AccessKind::Load), GuestOutcome::Done);
    assert_eq!(snp.reclaim(PfnRange::page(Pfn(3))), Contents::Undefined);
    assert_eq!(snp.reclaim(PfnRange::page(Pfn(3))), Contents::Kept);
    assert_eq!(snp.host_access(Pfn(3), AccessKind::Store), HostOutcome::Plain);
    snp.make_private(Gfn(9), Pfn(3)).unwrap();
    assert_eq!(snp.guest_access(mapping, AccessKind::Load), NOT_VALIDATED);
    assert!(!snp.is_dead());
}

#[test]
fn populate_refuses_and_leaves_no_trace() {
    let page = [0u8; 4096];
    let measured = |source| Populate { source, kind: PopulateKind::Measured };
    let mut snp = Snp::default();
    let mut wrong_cpuid = page;
    wrong_cpuid[0] = 65;
    let before = snp.clone();
    let cpuid = Populate { source: Some(&wrong_cpuid), kind: PopulateKind::Cpuid };
    let refusal = snp.populate(Gfn(0), Pfn(0), cpuid).unwrap_err();
    assert_eq!(refusal, Refusal { cause: Cause::Invalid, status: Status::SevFirmware(0x16) });
    assert_eq!(snp.populate(Gfn(0), Pfn(0), measured(None)).unwrap_err().cause, Cause::Invalid);
    let outside = snp.populate(Gfn(0), Pfn(1 << 36), measured(Some(&page)));
    assert_eq!(outside.unwrap_err().cause, Cause::NotTracked);
    assert!(snp == before);
    snp.populate(Gfn(0), Pfn(0), measured(Some(&page))).unwrap();
    assert_eq!(snp.launch_digest()[..4], [0x9d, 0x13, 0x63, 0x4b]);
    assert_eq!(snp.populate(Gfn(0), Pfn(0), measured(Some(&page))).unwrap_err().cause, Cause::Exists);
    assert_eq!(snp.guest_access(private_mapping(0, 0, Level::Page4K), AccessKind::Load), GuestOutcome::Done);
    snp.finalize().unwrap();
    let late = snp.populate(Gfn(1), Pfn(1), measured(Some(&page))).unwrap_err();
    assert_eq!(late.status, Status::SevFirmware(2));
    assert_eq!(snp.host_access(Pfn(1), AccessKind::Store), HostOutcome::Plain);
}

#[test]
fn large_pages_are_smashed_by_a_small_request() {
    let mut snp = Snp::default();
    snp.prepare(Gfn(1024 + 7), Pfn(512 + 7), Level::Page2M).unwrap();
    assert_eq!(snp.max_level(Pfn(700), Side::Private), Level::Page2M);
    assert_eq!(snp.max_level(Pfn(1100), Side::Private), Level::Page4K);
    assert_eq!(snp.max_level(Pfn(700), Side::Shared), Level::Page1G);
    let small = private_mapping(1030, 518, Level::Page2M);
    let accept = Mapping { level: Level::Page4K, ..small };
    let sizem = GuestOutcome::Exit(ExitReason::Rmp { size_mismatch: true, vmpl: false });
    assert_eq!(snp.guest_accept(accept, Acceptance::Accept), sizem);
    let zap = GfnRange::with_len(Gfn(1024), 512).unwrap();
    assert_eq!(snp.rmp_fault(Gfn(1030), Some(Pfn(518)), Side::Private), RmpFault::Smashed { zap });
    assert_eq!(snp.rmp_fault(Gfn(1030), Some(Pfn(518)), Side::Private), RmpFault::Spurious);
    assert_eq!(snp.rmp_fault(Gfn(1030), Some(Pfn(518)), Side::Shared), RmpFault::Ignored);
    assert_eq!(snp.rmp_fault(Gfn(1030), None, Side::Private), RmpFault::Ignored);
    assert_eq!(snp.guest_accept(accept, Acceptance::Accept), GuestOutcome::Done);
    let odd = private_mapping(1025, 513, Level::Page2M);
    assert_ne!(snp.clone().guest_accept(odd, Acceptance::Accept), GuestOutcome::Done, "it ends outside the entry");
    let whole = private_mapping(1024, 512, Level::Page2M);
    assert_eq!(snp.guest_accept(whole, Acceptance::Accept), GuestOutcome::Done);
    assert_eq!(snp.guest_access(private_mapping(1535, 1023, Level::Page4K), AccessKind::Fetch), GuestOutcome::Done);
}

#[test]
fn punching_a_part_of_a_large_page_keeps_the_rest() {
    let mut snp = Snp::default();
    snp.prepare(Gfn(512), Pfn(512), Level::Page2M).unwrap();
    let large = private_mapping(512, 512, Level::Page2M);
    assert_eq!(snp.guest_accept(large, Acceptance::Accept), GuestOutcome::Done);
    let part = PfnRange::with_len(Pfn(600), 8).unwrap();
    assert_eq!(snp.reclaim(part), Contents::Undefined);
    let around = |pfn: u64| snp.clone().guest_access(private_mapping(pfn, pfn, Level::Page4K), AccessKind::Load);
    assert_eq!((around(599), around(608)), (GuestOutcome::Done, GuestOutcome::Done));
    assert_ne!(around(600), GuestOutcome::Done);
}

#[test]
fn vmsas_are_measured_last_and_the_id_block_is_checked() {
    let mut snp = Snp::default();
    snp.add_vmsa(Pfn(40), &[0x11; 4096]);
    snp.set_id_block(IdBlock { digest: [0; 48], policy: POLICY_RESERVED_ONE });
    let before = snp.clone();
    assert_eq!(snp.finalize().unwrap_err().status, Status::SevFirmware(0x0b));
    assert!(snp == before);
    let mut digest = crate::measure::snp::SnpDigest::new();
    let info = crate::measure::snp::PageInfo::new(PageType::Vmsa, VMSA_GPA);
    digest.update(info, &[0x11; 4096]);
    snp.set_id_block(IdBlock { digest: digest.digest(), policy: POLICY_RESERVED_ONE });
    assert!(!snp.prefault_allowed());
    snp.finalize().unwrap();
    assert!(snp.prefault_allowed());
    snp.rmp_mut().enter(Asid(1), Pfn(40)).unwrap();
}

#[test]
fn a_file_outlives_its_vm() {
    let mut snp = Snp::default();
    snp.add_vmsa(Pfn(40), &[0; 4096]);
    snp.finalize().unwrap();
    snp.make_private(Gfn(0), Pfn(0)).unwrap();
    snp.set_guest_vmsa(Gfn(0));
    snp.invalidate(GfnRange::page(Gfn(1)));
    assert!(snp.take_reloads().is_empty());
    snp.invalidate(GfnRange::page(Gfn(0)));
    assert_eq!(snp.take_reloads().len(), 1);
    snp.destroy();
    assert!(snp.is_dead());
    assert_eq!(snp.host_access(Pfn(0), AccessKind::Store), HostOutcome::Fault);
    assert_eq!(snp.make_private(Gfn(1), Pfn(1)).unwrap_err().cause, Cause::VmDead);
    assert_eq!(snp.reclaim(PfnRange::page(Pfn(0))), Contents::Undefined);
    assert_eq!(snp.machine().rmp.run_count(), 0, "nothing of the VM is left in the table");
}
