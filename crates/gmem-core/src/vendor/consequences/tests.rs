//! The table against what documents and kernel sources say of its cells. Where none decides, there is no row here.

use super::Architecture::{Cca, Default, Pkvm, Sev, SevEs, Snp, SwProtected, Tdx};
use super::Event::{
    Destroy, EarlyPrefault, HostWrite, PopulateTwice, PrivateAccess, Punch, Refault, SharedAccess, Split,
    UserMappingChange,
};
use super::Guest::{AcceptsAgain, Dead, Runs, Stuck, StuckUntilAccepted, WaitsForConversion};
use super::*;
use crate::effort::some;

const KEPT: bool = false;
const LOST: bool = true;

const fn errno(cause: Cause) -> Told {
    Told::Vmm(refused(cause))
}

const EFAULT: Told = errno(Cause::Fault);
const EIO: Told = errno(Cause::VmDead);
const HOST_FAULT: Told = Told::Host(HostOutcome::Fault);

/// What happens, to whom, whether the bytes are lost, how the guest goes on, who is told, and who says so.
type Row = (Event, &'static [Architecture], bool, Guest, Told, &'static str);

const ROWS: &[Row] = &[
    (
        Punch,
        &[Default, SwProtected],
        LOST,
        Runs,
        Told::Nobody,
        "kvm_gmem_punch_hole(): freed, and zeroed when it is had again",
    ),
    (Punch, &[Sev, SevEs], LOST, Runs, Told::Nobody, "APM vol 2 15.34: no page has an owner, so nothing can fault"),
    (
        Punch,
        &[Snp],
        LOST,
        AcceptsAgain,
        Told::Guest(GuestException::NotValidated),
        "sev_gmem_invalidate() makes the page shared, RMPUPDATE clears Validated, and then APM vol 2 table 15-39: #VC 0x404. The VM lives.",
    ),
    (
        Punch,
        &[Tdx],
        LOST,
        Dead,
        EIO,
        "PAGE.REMOVE and AUG leave it PENDING (TDX module 1.5.05), and tdx_handle_ept_violation() gives such a TD up",
    ),
    (
        Punch,
        &[Cca],
        LOST,
        StuckUntilAccepted,
        Told::Kvm(ExitReason::RealmAbort),
        "TF-RMM 1.0: DATA_DESTROY leaves DESTROYED, which CREATE_UNKNOWN keeps; only RSI_IPA_STATE_SET helps",
    ),
    (
        Punch,
        &[Pkvm],
        LOST,
        Stuck,
        EFAULT,
        "host_force_reclaim_page_guest() poisons; __pkvm_vcpu_in_poison_fault() ends KVM_RUN",
    ),
    (
        UserMappingChange,
        &Architecture::ALL,
        KEPT,
        Runs,
        Told::Nobody,
        "MMU notifiers zap with KVM_FILTER_SHARED, and what they zap comes back",
    ),
    (
        PrivateAccess,
        &[Default, SwProtected, Pkvm],
        KEPT,
        Runs,
        Told::Nobody,
        "kvm_mmu_page_fault() takes the side from the attribute; pKVM's addresses have none",
    ),
    (PrivateAccess, &[Sev, SevEs], KEPT, Runs, Told::Nobody, "APM vol 2 15.34: nested paging ignores the C-bit"),
    (
        PrivateAccess,
        &[Snp],
        KEPT,
        WaitsForConversion,
        EFAULT,
        "npf_interception(): PFERR_GUEST_ENC is a private access; kvm_mmu_faultin_pfn() compares",
    ),
    (
        PrivateAccess,
        &[Tdx],
        KEPT,
        WaitsForConversion,
        EFAULT,
        "vt_is_tdx_private_gpa(); kvm_mmu_faultin_pfn() compares",
    ),
    (
        PrivateAccess,
        &[Cca],
        KEPT,
        AcceptsAgain,
        Told::Guest(GuestException::ExternalAbort),
        "TF-RMM 1.0: UNASSIGNED/EMPTY is an external abort in the realm",
    ),
    (SharedAccess, &[Default, SwProtected, Sev, SevEs, Pkvm], KEPT, Runs, Told::Nobody, "as the private access"),
    (
        SharedAccess,
        &[Snp],
        KEPT,
        WaitsForConversion,
        EFAULT,
        "APM vol 2 table 15-39: a write with C=0 needs a page of the hypervisor",
    ),
    (
        SharedAccess,
        &[Tdx],
        KEPT,
        WaitsForConversion,
        EFAULT,
        "the shared half of the tables has nothing; kvm_mmu_faultin_pfn() compares",
    ),
    (Refault, &[Default, SwProtected, Sev, SevEs], KEPT, Runs, Told::Nobody, "the file keeps the page"),
    (
        Refault,
        &[Snp],
        KEPT,
        Runs,
        Told::Nobody,
        "the RMP entry stays as it is, and sev_gmem_prepare() returns early for a page that is assigned",
    ),
    (Refault, &[Tdx], LOST, Dead, EIO, "as the hole: zapping is PAGE.REMOVE"),
    (
        Refault,
        &[Cca],
        LOST,
        StuckUntilAccepted,
        Told::Kvm(ExitReason::RealmAbort),
        "as the hole: zapping is DATA_DESTROY",
    ),
    (
        PopulateTwice,
        &[Default, Sev, SevEs],
        KEPT,
        Runs,
        errno(Cause::Invalid),
        "kvm_gmem_populate(): the frame must be private, and these VMs have no such attribute",
    ),
    (PopulateTwice, &[SwProtected], KEPT, Runs, errno(Cause::NotSupported), "no launch, no hook"),
    (PopulateTwice, &[Snp], KEPT, Runs, errno(Cause::Exists), "sev_gmem_post_populate(): assigned already is EEXIST"),
    (
        PopulateTwice,
        &[Cca],
        KEPT,
        Runs,
        Told::Vmm(Refusal { cause: Cause::NoDevice, status: Status::Rmi(0x304) }),
        "TF-RMM 1.0: DATA_CREATE of an assigned entry is ERROR_RTT, level 3",
    ),
    (
        PopulateTwice,
        &[Pkvm],
        KEPT,
        Runs,
        Told::Vmm(Refusal { cause: Cause::NotOwner, status: Status::Pkvm(-1) }),
        "__pkvm_host_donate_guest(): the host does not own the page any more",
    ),
    (Split, &[Default, SwProtected, Sev, SevEs], KEPT, Runs, Told::Nobody, "a smaller mapping of the same pages"),
    (
        Split,
        &[Snp],
        KEPT,
        Runs,
        Told::Nobody,
        "sev_gmem_invalidate() smashes an entry that is covered in part; PSMASH keeps Validated",
    ),
    (
        Destroy,
        &[Default, SwProtected, Sev, SevEs],
        KEPT,
        Dead,
        Told::Nobody,
        "kvm_get_kvm() of the file; no host write can fault",
    ),
    (Destroy, &[Snp], KEPT, Dead, HOST_FAULT, "the same; APM vol 2 table 15-39: #PF with the RMP bit"),
    (Destroy, &[Cca], KEPT, Dead, HOST_FAULT, "the same; a granule protection fault"),
    (Destroy, &[Tdx], KEPT, Dead, Told::Host(HostOutcome::MachineCheck), "the same; the TD-owner bit poisons the line"),
    (HostWrite, &[Default, SwProtected], KEPT, Runs, Told::Nobody, "nothing enforces anything"),
    (HostWrite, &[Sev, SevEs], LOST, Runs, Told::Nobody, "APM vol 2 15.34: garbled and no fault"),
    (HostWrite, &[Snp], KEPT, Runs, HOST_FAULT, "APM vol 2 table 15-39: #PF with the RMP bit"),
    (HostWrite, &[Tdx], LOST, Runs, Told::Host(HostOutcome::MachineCheck), "the TD-owner bit poisons the line"),
    (HostWrite, &[Cca], KEPT, Runs, HOST_FAULT, "a granule protection fault"),
    (HostWrite, &[Pkvm], LOST, Stuck, EFAULT, "pkvm_force_reclaim_guest_page() is offered the host's fault"),
    (EarlyPrefault, &[Default, SwProtected, Sev, SevEs, Pkvm], KEPT, Runs, Told::Nobody, "nothing is measured by page"),
    (
        EarlyPrefault,
        &[Snp, Tdx],
        KEPT,
        Runs,
        errno(Cause::NotSupported),
        "pre_fault_allowed is set by the end of the launch",
    ),
];

#[test]
fn every_cell_that_a_document_decides_is_as_it_says() {
    for (event, architectures, lost, guest, told, why) in some(ROWS, 5) {
        for architecture in some(*architectures, 2) {
            let cell = scenario(*architecture, *event).unwrap();
            assert_eq!((cell.lost, cell.guest, cell.told), (*lost, *guest, *told), "{architecture:?} {event:?}: {why}");
        }
    }
}

#[test]
fn no_cell_is_decided_twice_and_few_by_nobody() {
    let undecided = [(Refault, Pkvm), (PopulateTwice, Tdx), (SharedAccess, Cca), (EarlyPrefault, Cca), (Destroy, Pkvm)];
    let cells = Architecture::ALL.into_iter().flat_map(|a| Event::ALL.map(|e| (a, e)));
    for (architecture, event) in some(cells, 13) {
        let rows = ROWS.iter().filter(|(of, among, ..)| *of == event && among.contains(&architecture)).count();
        let open = undecided.contains(&(event, architecture)) || scenario(architecture, event).is_none();
        assert_eq!(rows, usize::from(!open), "{architecture:?} {event:?}");
    }
}

/// TDX: `tdx_gmem_max_mapping_level()`. CCA: RMI_DATA_CREATE is for one granule. pKVM: pages are donated one by one.
#[test]
fn what_is_mapped_in_single_pages_is_never_split() {
    for architecture in some(Architecture::ALL, 5) {
        let single = [Tdx, Cca, Pkvm].contains(&architecture);
        assert_eq!(scenario(architecture, Split).is_none(), single, "{architecture:?}");
    }
}

/// What the host's reads find is what each architecture's own documents say of a page that is the guest's.
#[test]
fn the_host_reads_no_guests_bytes_where_hardware_protects_them() {
    for (architectures, found) in [
        (&[Default, SwProtected][..], HostOutcome::Plain),
        (&[Sev, SevEs, Snp, Tdx][..], HostOutcome::Ciphertext),
        (&[Cca][..], HostOutcome::Fault),
        // The page is taken from the guest, wiped.
        (&[Pkvm][..], HostOutcome::Corrupted),
    ] {
        let cells = architectures.iter().flat_map(|a| [UserMappingChange, Destroy].map(|e| (*a, e)));
        for (architecture, event) in some(cells, 3) {
            assert_eq!(scenario(architecture, event).unwrap().host, found, "{architecture:?} {event:?}");
        }
    }
}
