//! Pre- and postconditions per command.

use alloc::vec::Vec;

use proptest::prelude::*;

use super::command::{Command, CommandError, run_bytes};
use super::firmware::*;
use super::guest::*;
use super::rmp::*;
use super::*;

mod properties;
mod verbs;

const A: Asid = Asid(1);
const B: Asid = Asid(2);
const GCTX: Pfn = Pfn(2044);

fn machine() -> Machine {
    Machine::new(PfnRange::new(Pfn(0), Pfn(2048)).unwrap())
}

fn private(gfn: u64, size: RmpSize) -> RmpUpdate {
    RmpUpdate::private(Gfn(gfn), size, A, false)
}

/// A machine with an active guest of ASID 1 in LAUNCH.
fn launching() -> Machine {
    let mut machine = machine();
    machine.rmp.rmpupdate(GCTX, RmpUpdate::firmware()).unwrap();
    machine.gctx_create(GCTX).unwrap();
    let start = LaunchStart { policy: POLICY_RESERVED_ONE, imi_enabled: false };
    machine.launch_start(GCTX, start).unwrap();
    machine.activate(GCTX, A).unwrap();
    machine
}

/// An entry in a given state, made with commands only where commands can make it.
fn machine_in(state: PageState) -> Machine {
    let mut machine = launching();
    let gfn = Gfn(7);
    let page = Pfn(5);
    let give = |machine: &mut Machine, immutable| {
        machine.rmp.rmpupdate(page, RmpUpdate::private(gfn, RmpSize::Page4K, A, immutable)).unwrap();
    };
    match state {
        PageState::Hypervisor => {}
        PageState::HvFixed => {
            machine.shutdown().unwrap();
            machine.init(&[PfnRange::page(page)]).unwrap();
        }
        PageState::Firmware => machine.rmp.rmpupdate(page, RmpUpdate::firmware()).unwrap(),
        PageState::Reclaim => {
            machine.rmp.rmpupdate(page, RmpUpdate::firmware()).unwrap();
            machine.page_reclaim(page, RmpSize::Page4K).unwrap();
        }
        PageState::Context => {
            machine.rmp.rmpupdate(page, RmpUpdate::firmware()).unwrap();
            machine.gctx_create(page).unwrap();
        }
        PageState::Metadata => {
            let bits = EntryBits::ASSIGNED | EntryBits::IMMUTABLE;
            let entry = Entry { gfn: Gfn(3), asid: Asid::HOST, bits, permissions: RESET_PERMISSIONS };
            machine.rmp.set(PfnRange::page(page), entry);
        }
        PageState::PreGuest => give(&mut machine, true),
        PageState::PreSwap => {
            give(&mut machine, false);
            validate(&mut machine, 7, 5).unwrap();
            give(&mut machine, true);
        }
        PageState::GuestInvalid => give(&mut machine, false),
        PageState::GuestValid => {
            give(&mut machine, false);
            validate(&mut machine, 7, 5).unwrap();
        }
    }
    machine
}

fn at(gfn: u64, pfn: u64) -> Translation {
    Translation { gfn: Gfn(gfn), pfn: Pfn(pfn), nested: Level::Page4K }
}

fn validate(machine: &mut Machine, gfn: u64, pfn: u64) -> Result<Pvalidated, GuestError> {
    machine.rmp.pvalidate(Caller::vmpl0(A), at(gfn, pfn), RmpSize::Page4K, Validation::Validate)
}

const ALL_STATES: [PageState; 10] = [
    PageState::Hypervisor,
    PageState::HvFixed,
    PageState::Firmware,
    PageState::Reclaim,
    PageState::Context,
    PageState::Metadata,
    PageState::PreGuest,
    PageState::PreSwap,
    PageState::GuestInvalid,
    PageState::GuestValid,
];

/// Applies a command to a page in each state: `Ok` names the state after it.
fn table(apply: impl Fn(&mut Machine) -> Result<(), CommandError>, expected: [Result<PageState, CommandError>; 10]) {
    for (state, expected) in ALL_STATES.into_iter().zip(expected) {
        let mut machine = machine_in(state);
        assert_eq!(machine.rmp.state(Pfn(5)), Some(state));
        let before = machine.clone();
        let got = apply(&mut machine).map(|()| machine.rmp.state(Pfn(5)).unwrap());
        assert_eq!(got, expected, "from {state:?}");
        assert!(got.is_ok() || machine == before, "a refused command changed {state:?}");
    }
}

const PERMISSION: Result<PageState, CommandError> = Err(CommandError::Rmp(RmpError::Permission));
const RMP_FAULT: Result<PageState, CommandError> =
    Err(CommandError::Fault(Fault::Nested(Npf::from_bits_retain(1 << 31 | 1 << 34))));
const PAGE_STATE: Result<PageState, CommandError> = Err(CommandError::Firmware(FwError::InvalidPageState));

#[test]
fn rmpupdate_by_state() {
    use PageState::*;
    let share = |m: &mut Machine| Command::RmpUpdate(Pfn(5), RmpUpdate::shared(RmpSize::Page4K)).apply(m);
    table(
        share,
        [
            Ok(Hypervisor),
            PERMISSION,
            PERMISSION,
            Ok(Hypervisor),
            PERMISSION,
            PERMISSION,
            PERMISSION,
            PERMISSION,
            Ok(Hypervisor),
            Ok(Hypervisor),
        ],
    );
    let other = RmpUpdate::private(Gfn(7), RmpSize::Page4K, B, false);
    table(
        |m| Command::RmpUpdate(Pfn(5), other).apply(m),
        [
            Ok(GuestInvalid),
            PERMISSION,
            PERMISSION,
            Ok(GuestInvalid),
            PERMISSION,
            PERMISSION,
            PERMISSION,
            PERMISSION,
            Ok(GuestInvalid),
            Ok(GuestInvalid),
        ],
    );
    let freeze = RmpUpdate::private(Gfn(7), RmpSize::Page4K, A, true);
    table(
        |m| Command::RmpUpdate(Pfn(5), freeze).apply(m),
        [
            Ok(PreGuest),
            PERMISSION,
            PERMISSION,
            Ok(PreGuest),
            PERMISSION,
            PERMISSION,
            PERMISSION,
            PERMISSION,
            Ok(PreGuest),
            Ok(PreSwap),
        ],
    );
}

#[test]
fn pvalidate_by_state() {
    use PageState::*;
    let guest = Caller::vmpl0(A);
    let to =
        |validation| move |m: &mut Machine| Command::Pvalidate(guest, at(7, 5), RmpSize::Page4K, validation).apply(m);
    let mut expected = [RMP_FAULT; 10];
    (expected[8], expected[9]) = (Ok(GuestValid), Ok(GuestValid));
    table(to(Validation::Validate), expected);
    (expected[8], expected[9]) = (Ok(GuestInvalid), Ok(GuestInvalid));
    table(to(Validation::Rescind), expected);
}

#[test]
fn launch_update_and_reclaim_by_state() {
    use PageState::*;
    let mut expected = [PAGE_STATE; 10];
    expected[6] = Ok(GuestValid);
    // Restarting the platform, which fixes a page, has taken the guest away.
    expected[1] = Err(CommandError::Firmware(FwError::InvalidGuest));
    table(|m| Command::LaunchUpdate(GCTX, Pfn(5), RmpSize::Page4K, 1).apply(m), expected);
    table(
        |m| Command::PageReclaim(Pfn(5), RmpSize::Page4K).apply(m),
        [
            Ok(Hypervisor),
            PAGE_STATE,
            Ok(Reclaim),
            Ok(Reclaim),
            PAGE_STATE,
            Ok(Reclaim),
            Ok(GuestInvalid),
            Ok(GuestValid),
            Ok(GuestInvalid),
            Ok(GuestValid),
        ],
    );
}

#[test]
fn host_and_guest_accesses_by_state() {
    let write = Permissions::WRITE;
    let guest = |m: &mut Machine, encrypted| {
        Command::GuestAccess(Caller::vmpl0(A), at(7, 5), Access { needs: write, encrypted }).apply(m)
    };
    let mut expected = ALL_STATES.map(|_| RMP_FAULT);
    expected[8] = Err(CommandError::Fault(Fault::NotValidated));
    expected[9] = Ok(PageState::GuestValid);
    table(|m| guest(m, true), expected);
    let owned = |state: &PageState| matches!(state, PageState::Hypervisor | PageState::HvFixed);
    let shared = CommandError::Fault(Fault::Nested(Npf::RMP));
    table(|m| guest(m, false), ALL_STATES.map(|s| if owned(&s) { Ok(s) } else { Err(shared) }));
    let host = |m: &mut Machine| Command::HostWrite(Pfn(5), Level::Page4K).apply(m);
    table(host, ALL_STATES.map(|s| if owned(&s) { Ok(s) } else { Err(CommandError::HostFault) }));
    let large = |m: &mut Machine| Command::HostWrite(Pfn(0), Level::Page2M).apply(m);
    table(large, ALL_STATES.map(|s| if owned(&s) { Ok(s) } else { Err(CommandError::HostFault) }));
}

#[test]
fn rmpupdate_operands() {
    let mut rmp = machine().rmp;
    let mut check = |pfn, update, want| assert_eq!(rmp.rmpupdate(Pfn(pfn), update), want, "{pfn} {update:?}");
    let small = private(7, RmpSize::Page4K);
    check(2048, small, Err(RmpError::Input));
    check(u64::MAX, small, Err(RmpError::Input));
    check(1, private(512, RmpSize::Page2M), Err(RmpError::Input));
    check(512, private(1, RmpSize::Page2M), Err(RmpError::Input));
    check(0, RmpUpdate { asid: Asid(0x400), ..small }, Err(RmpError::Input));
    check(0, RmpUpdate { gfn: Gfn(1 << 40), ..small }, Err(RmpError::Input));
    check(0, RmpUpdate { asid: A, ..RmpUpdate::shared(RmpSize::Page4K) }, Err(RmpError::Input));
    check(0, RmpUpdate { immutable: true, ..RmpUpdate::shared(RmpSize::Page4K) }, Err(RmpError::Input));
    check(513, small, Ok(()));
    check(512, private(512, RmpSize::Page2M), Err(RmpError::Overlap));
    check(0, private(0, RmpSize::Page2M), Ok(()));
    check(0, small, Err(RmpError::Overlap));
    check(9, small, Err(RmpError::Overlap));
    check(0, private(1024, RmpSize::Page2M), Ok(()));
    check(0, RmpUpdate::shared(RmpSize::Page2M), Ok(()));
    check(9, small, Ok(()));
}

#[test]
fn smashing_keeps_validation_and_addresses() {
    let mut rmp = machine().rmp;
    rmp.rmpupdate(Pfn(512), private(1024, RmpSize::Page2M)).unwrap();
    let large = Translation { nested: Level::Page2M, ..at(1024, 512) };
    let guest = Caller::vmpl0(A);
    rmp.pvalidate(guest, large, RmpSize::Page2M, Validation::Validate).unwrap();
    assert_eq!(rmp.psmash(Pfn(513)), Err(RmpError::BadAddress));
    assert_eq!(rmp.psmash(Pfn(0)), Err(RmpError::Input));
    rmp.lock(Pfn(600));
    assert_eq!(rmp.psmash(Pfn(512)), Err(RmpError::InUse));
    rmp.unlock(Pfn(600));
    rmp.psmash(Pfn(512)).unwrap();
    let entry = rmp.entry(Pfn(700)).unwrap();
    assert_eq!((entry.gfn, entry.size(), entry.state()), (Gfn(1212), RmpSize::Page4K, PageState::GuestValid));
    assert_eq!(rmp.run_count(), 1);
}

#[test]
fn sizes_of_guest_instructions() {
    let mut rmp = machine().rmp;
    rmp.rmpupdate(Pfn(512), private(512, RmpSize::Page2M)).unwrap();
    rmp.rmpupdate(Pfn(0), private(0, RmpSize::Page4K)).unwrap();
    let guest = Caller::vmpl0(A);
    let mut ask = |gfn: u64, nested, size| {
        let at = Translation { nested, ..at(gfn, gfn) };
        rmp.pvalidate(guest, at, size, Validation::Validate)
    };
    let sizem = GuestError::Fault(Fault::Nested(Npf::RMP | Npf::ENC | Npf::SIZEM));
    assert_eq!(ask(513, Level::Page2M, RmpSize::Page4K), Err(sizem));
    assert_eq!(ask(512, Level::Page4K, RmpSize::Page2M), Err(sizem));
    assert_eq!(ask(513, Level::Page2M, RmpSize::Page2M), Err(GuestError::Code(RmpError::Input)));
    assert_eq!(ask(0, Level::Page4K, RmpSize::Page2M), Err(GuestError::Code(RmpError::SizeMismatch)));
    assert_eq!(ask(0, Level::Page2M, RmpSize::Page4K), Err(sizem));
    assert_eq!(ask(512, Level::Page1G, RmpSize::Page2M), Ok(Pvalidated::Changed));
    assert_eq!(ask(512, Level::Page2M, RmpSize::Page2M), Ok(Pvalidated::Unchanged));
}

#[test]
fn privilege_levels() {
    let mut machine = machine_in(PageState::GuestValid);
    let vmpl = |level| Caller { asid: A, vmpl: Vmpl::new(level).unwrap() };
    let to = |target, permissions| RmpAdjust { target: Vmpl::new(target).unwrap(), permissions, vmsa: false };
    let rw = Permissions::READ | Permissions::WRITE;
    let mut adjust = |from, adjust| machine.rmp.rmpadjust(vmpl(from), at(7, 5), RmpSize::Page4K, adjust);
    let permission = Err(GuestError::Code(RmpError::Permission));
    assert_eq!(adjust(0, to(0, rw)), permission);
    assert_eq!(adjust(1, to(2, rw)), permission, "it grants what it does not have");
    assert_eq!(adjust(0, to(1, rw)), Ok(()));
    assert_eq!(adjust(1, to(2, rw)), Ok(()));
    assert_eq!(adjust(1, to(2, Permissions::all())), permission);
    let access = |level, needs| machine.rmp.guest_access(vmpl(level), at(7, 5), Access { needs, encrypted: true });
    assert_eq!(access(1, Permissions::WRITE), Ok(()));
    let denied = Err(Fault::Nested(Npf::RMP | Npf::ENC | Npf::VMPL));
    assert_eq!(access(1, Permissions::EXECUTE_USER), denied);
    assert_eq!(access(3, Permissions::READ), denied);
    assert_eq!(machine.rmp.rmpquery(vmpl(0), at(7, 5), Vmpl::new(2).unwrap()), Ok(rw));
    let high = machine.rmp.pvalidate(vmpl(1), at(7, 5), RmpSize::Page4K, Validation::Rescind);
    assert_eq!(high, Err(GuestError::Code(RmpError::Permission)));
}

#[test]
fn a_running_vmsa_is_in_use() {
    let mut machine = machine_in(PageState::PreGuest);
    assert_eq!(machine.rmp.enter(A, Pfn(5)), Err(RmpError::Permission));
    Command::LaunchUpdate(GCTX, Pfn(5), RmpSize::Page4K, 2).apply(&mut machine).unwrap();
    assert_eq!(machine.rmp.enter(B, Pfn(5)), Err(RmpError::Permission));
    machine.rmp.enter(A, Pfn(5)).unwrap();
    assert_eq!(machine.rmp.enter(A, Pfn(5)), Err(RmpError::InUse));
    let share = RmpUpdate::shared(RmpSize::Page4K);
    assert_eq!(machine.rmp.rmpupdate(Pfn(5), share), Err(RmpError::InUse));
    machine.rmp.unlock(Pfn(5));
    assert_eq!(machine.rmp.rmpupdate(Pfn(5), share), Ok(()));
}

/// Which pages serve as VMCB and as VMSA, by their state.
#[test]
fn vmrun_wants_a_vmcb_of_the_hosts_and_a_vmsa_of_the_guests() {
    let gp = Err(VmrunError::GeneralProtection);
    for state in ALL_STATES {
        let mut machine = machine_in(state);
        let before = machine.clone();
        let host = matches!(state, PageState::Hypervisor | PageState::HvFixed);
        let want = if host { Err(VmrunError::Invalid) } else { gp };
        assert_eq!(machine.rmp.vmrun(Pfn(5), A, Pfn(6)), want, "{state:?} as VMCB");
        assert_eq!(machine.rmp.vmrun(Pfn(6), A, Pfn(5)), Err(VmrunError::Invalid), "{state:?}, not marked, as VMSA");
        assert_eq!(machine, before);
    }
    let mut machine = machine_in(PageState::PreGuest);
    Command::LaunchUpdate(GCTX, Pfn(5), RmpSize::Page4K, 2).apply(&mut machine).unwrap();
    let (vmcb, vmsa) = (Pfn(6), Pfn(5));
    assert_eq!(machine.rmp.vmrun(vmcb, B, vmsa), Err(VmrunError::Invalid), "another guest's");
    machine.rmp.vmrun(vmcb, A, vmsa).unwrap();
    assert_eq!(machine.rmp.vmrun(vmcb, A, vmsa), gp);
    assert_eq!(machine.rmp.vmrun(Pfn(7), A, vmsa), Err(VmrunError::Invalid), "running elsewhere");
    let give = RmpUpdate::private(Gfn(6), RmpSize::Page4K, A, false);
    assert_eq!(machine.rmp.rmpupdate(vmcb, give), Err(RmpError::InUse));
    assert_eq!(machine.rmp.rmpupdate(vmsa, RmpUpdate::shared(RmpSize::Page4K)), Err(RmpError::InUse));
    machine.rmp.vmexit(vmcb, vmsa);
    assert_eq!(machine.rmp.rmpupdate(vmcb, give), Ok(()));
}

/// The firmware's order of checks: each row violates the named check and every later one that it can.
#[test]
fn launch_update_checks_in_order() {
    let mut machine = launching();
    let page = |machine: &mut Machine, pfn, size, asid| {
        machine.rmp.rmpupdate(Pfn(pfn), RmpUpdate::private(Gfn(pfn), size, asid, true)).unwrap();
    };
    page(&mut machine, 0, RmpSize::Page2M, A);
    page(&mut machine, 512, RmpSize::Page4K, B);
    page(&mut machine, 513, RmpSize::Page4K, A);
    let update =
        |machine: &mut Machine, pfn, size, kind| Command::LaunchUpdate(GCTX, Pfn(pfn), size, kind).apply(machine);
    let mut check = |pfn, size, kind, error| {
        assert_eq!(update(&mut machine, pfn, size, kind), Err(CommandError::Firmware(error)), "{pfn} {kind}");
    };
    check(600, RmpSize::Page2M, 9, FwError::InvalidPageState);
    check(512, RmpSize::Page2M, 9, FwError::InvalidPageSize);
    check(1, RmpSize::Page2M, 6, FwError::InvalidAddress);
    check(0, RmpSize::Page2M, 6, FwError::InvalidPageSize);
    check(0, RmpSize::Page2M, 9, FwError::InvalidParam);
    check(512, RmpSize::Page4K, 1, FwError::InvalidPageOwner);
    // Two minutes for Miri: it is measured as 512 pages.
    if !cfg!(miri) {
        update(&mut machine, 0, RmpSize::Page2M, 3).unwrap();
    }
    machine.launch_finish(GCTX, None).unwrap();
    let got = update(&mut machine, 513, RmpSize::Page4K, 1);
    assert_eq!(got, Err(CommandError::Firmware(FwError::InvalidGuestState)));
    let got = Command::LaunchUpdate(Pfn(1), Pfn(600), RmpSize::Page4K, 9).apply(&mut machine);
    assert_eq!(got, Err(CommandError::Firmware(FwError::InvalidGuest)));
    machine.shutdown().unwrap();
    let got = update(&mut machine, 600, RmpSize::Page4K, 9);
    assert_eq!(got, Err(CommandError::Firmware(FwError::InvalidPlatformState)));
}

#[test]
fn lives_of_guests() {
    let mut machine = launching();
    let start = LaunchStart { policy: POLICY_RESERVED_ONE, imi_enabled: false };
    assert_eq!(machine.launch_start(GCTX, start), Err(FwError::InvalidGuestState));
    assert_eq!(machine.activate(GCTX, B), Err(FwError::Active));
    let second = Pfn(2045);
    machine.rmp.rmpupdate(second, RmpUpdate::firmware()).unwrap();
    machine.gctx_create(second).unwrap();
    assert_eq!(machine.activate(second, A), Err(FwError::AsidOwned));
    assert_eq!(machine.activate(second, Asid(0)), Err(FwError::InvalidAsid));
    machine.launch_start(second, start).unwrap();
    assert_eq!(machine.launch_finish(second, None), Err(FwError::Inactive));
    machine.decommission(GCTX).unwrap();
    assert_eq!(machine.activate(second, A), Err(FwError::DfFlushRequired));
    machine.df_flush().unwrap();
    machine.activate(second, A).unwrap();
    let block = |digest, policy| Some(IdBlock { digest, policy });
    assert_eq!(machine.launch_finish(second, block([1; 48], 0)), Err(FwError::BadMeasurement));
    assert_eq!(machine.launch_finish(second, block([0; 48], 0)), Err(FwError::PolicyFailure));
    machine.launch_finish(second, block([0; 48], POLICY_RESERVED_ONE)).unwrap();
    assert_eq!(machine.rmp.state(GCTX), Some(PageState::Firmware));
}

#[test]
fn unsmash_needs_512_equal_pages() {
    let mut machine = machine();
    let page = |machine: &mut Machine, pfn| {
        machine.rmp.rmpupdate(Pfn(pfn), RmpUpdate::private(Gfn(pfn), RmpSize::Page4K, A, true)).unwrap();
    };
    (512..1023).for_each(|pfn| page(&mut machine, pfn));
    assert_eq!(machine.page_unsmash(Pfn(512)), Err(FwError::InvalidPageState));
    page(&mut machine, 1023);
    assert_eq!(machine.page_unsmash(Pfn(513)), Err(FwError::InvalidAddress));
    machine.page_unsmash(Pfn(512)).unwrap();
    assert_eq!(machine.rmp.entry(Pfn(1023)).map(|entry| entry.size()), Some(RmpSize::Page2M));
}
