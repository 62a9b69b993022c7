//! Pre- and postconditions of the commands, and invariants under random commands.

extern crate std;

mod properties;
mod verbs;

use super::*;
use crate::addr::{Pfn, PfnRange};
use crate::effort::some;
use crate::measure::cca::{HashAlgo, RecParams as BootState, Rim, Step};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use alloc::{format, vec};
use proptest::prelude::*;
use std::sync::LazyLock;

const PAGE: u64 = GRANULE_SIZE;
const BLOCK: u64 = 512 * PAGE;
const RUNNABLE: BootState = BootState { flags: 1, pc: 0, gprs: [0; 8] };

fn at(granule: u64) -> u64 {
    granule * PAGE
}

fn monitor() -> Rmm {
    let memory = PfnRange::new(Pfn(0), Pfn(8192)).unwrap();
    Rmm::new(RmmVersion::V1_0, Platform::fake_host(memory)).unwrap()
}

fn realm_params() -> RealmParams {
    RealmParams {
        flags: 0,
        s2sz: 39,
        sve_vl: 0,
        num_bps: 1,
        num_wps: 1,
        pmu_num_ctrs: 0,
        hash_algo: 0,
        vmid: 1,
        rtt_base: at(2),
        rtt_level_start: 1,
        rtt_num_start: 1,
    }
}

fn ok(reply: Reply) -> Reply {
    assert_eq!(reply.status, RmiStatus::Success, "{reply:?}");
    reply
}

/// A realm at granule 1 with tables 2 (root), 4 and 5 for the first 2 MiB; 100 is the host's, 21 to 29 are delegated.
fn new_realm() -> Rmm {
    static REALM: LazyLock<Rmm> = LazyLock::new(make_realm);
    REALM.clone()
}

fn make_realm() -> Rmm {
    let mut rmm = monitor();
    for granule in [1, 2, 4, 5].into_iter().chain(21..30) {
        ok(rmm.granule_delegate(at(granule)));
    }
    ok(rmm.realm_create(at(1), at(100), &realm_params()));
    ok(rmm.rtt_create(at(1), at(4), 0, 2));
    ok(rmm.rtt_create(at(1), at(5), 0, 3));
    rmm
}

fn add_rec(rmm: &mut Rmm, rec: u64, aux: u64, mpidr: u64, boot: BootState) -> Reply {
    let aux: Vec<u64> = (aux..aux + 16).map(at).collect();
    for granule in aux.iter().copied().chain([at(rec)]) {
        ok(rmm.granule_delegate(granule));
    }
    rmm.rec_create(at(1), at(rec), at(100), &RecParams { boot, mpidr, aux })
}

fn activate(rmm: &mut Rmm) {
    ok(add_rec(rmm, 30, 40, 0, RUNNABLE));
    ok(rmm.realm_activate(at(1)));
}

fn source(content: &[u8; 4096]) -> Source<'_> {
    Source { address: at(100), content, flags: 1 }
}

fn entry(rmm: &Rmm, ipa: u64) -> Entry {
    rmm.realm(at(1)).unwrap().rtt().walk(ipa, PAGE_LEVEL).entry
}

/// `A` assigned or `U` unassigned, and the first letter of the RIPAS.
fn letters(entry: Entry) -> &'static str {
    match (entry.hipas(), entry.ripas()) {
        (Hipas::Unassigned, Some(Ripas::Empty)) => "UE",
        (Hipas::Unassigned, Some(Ripas::Ram)) => "UR",
        (Hipas::Unassigned, Some(Ripas::Destroyed)) => "UD",
        (Hipas::Assigned, Some(Ripas::Empty)) => "AE",
        (Hipas::Assigned, Some(Ripas::Ram)) => "AR",
        (Hipas::Assigned, Some(Ripas::Destroyed)) => "AD",
        _ => "??",
    }
}

const STATES: [&str; 6] = ["UE", "UR", "UD", "AE", "AR", "AD"];

/// Brings the entry of IPA 0 into a state.
fn in_state(state: &str) -> Rmm {
    let mut rmm = new_realm();
    let (create, unknown) = ("UD AR AD", "AE AD");
    if create.contains(state) {
        ok(rmm.data_create(at(1), at(21), 0, source(&[7; 4096])));
    }
    if state.ends_with('D') {
        ok(rmm.data_destroy(at(1), 0));
    }
    if state == "UR" {
        ok(rmm.rtt_init_ripas(at(1), 0, PAGE));
    }
    if unknown.contains(state) {
        ok(rmm.data_create_unknown(at(1), at(21), 0));
    }
    assert_eq!(letters(entry(&rmm, 0)), state);
    rmm
}

fn ask(rmm: &mut Rmm, args: [u64; 5]) -> RealmOutcome {
    let mut regs = [0; 11];
    regs[..5].copy_from_slice(&args);
    ok(rmm.rec_enter(at(30), at(100), RecEntry::default()));
    rmm.realm_step(at(30), RealmStep::Smc(regs)).unwrap()
}

fn set_ripas(ripas: u64, destroyed: u64) -> impl Fn(&mut Rmm) -> Reply {
    move |rmm| {
        ask(rmm, [rsi::IPA_STATE_SET, 0, PAGE, ripas, destroyed]);
        rmm.rtt_set_ripas(at(1), at(30), 0, PAGE)
    }
}

type Command = dyn Fn(&mut Rmm) -> Reply;

/// The table of DEN0137 for a level 3 entry: the state after the command, `3` for RMI_ERROR_RTT at level 3, `R` for
/// RMI_ERROR_REALM. A refused command leaves everything as it was.
#[test]
fn every_command_on_every_entry_state() {
    let create: &Command = &|rmm| rmm.data_create(at(1), at(22), 0, source(&[1; 4096]));
    let unknown: &Command = &|rmm| rmm.data_create_unknown(at(1), at(22), 0);
    let destroy: &Command = &|rmm| rmm.data_destroy(at(1), 0);
    let init: &Command = &|rmm| rmm.rtt_init_ripas(at(1), 0, PAGE);
    let fold: &Command = &|rmm| rmm.rtt_fold(at(1), 0, 3);
    let drop_table: &Command = &|rmm| rmm.rtt_destroy(at(1), 0, 3);
    let (ram, ram_lossy) = (set_ripas(1, 0), set_ripas(1, 1));
    let (empty, empty_lossy) = (set_ripas(0, 0), set_ripas(0, 1));
    let new = RealmState::New;
    let active = RealmState::Active;
    let table: [(&str, RealmState, &Command, [&str; 6]); 14] = [
        ("DATA_CREATE", new, create, ["AR", "AR", "AR", "3", "3", "3"]),
        ("DATA_CREATE", active, create, ["R", "R", "R", "R", "R", "R"]),
        ("DATA_CREATE_UNKNOWN", new, unknown, ["AE", "AR", "AD", "3", "3", "3"]),
        ("DATA_CREATE_UNKNOWN", active, unknown, ["AE", "AR", "AD", "3", "3", "3"]),
        ("DATA_DESTROY", new, destroy, ["3", "3", "3", "UE", "UD", "UD"]),
        ("DATA_DESTROY", active, destroy, ["3", "3", "3", "UE", "UD", "UD"]),
        ("INIT_RIPAS", new, init, ["UR", "UR", "3", "3", "3", "3"]),
        ("INIT_RIPAS", active, init, ["R", "R", "R", "R", "R", "R"]),
        ("SET_RIPAS RAM", active, &ram, ["UR", "UR", "3", "AR", "AR", "3"]),
        ("SET_RIPAS RAM lossy", active, &ram_lossy, ["UR", "UR", "UR", "AR", "AR", "AR"]),
        ("SET_RIPAS EMPTY", active, &empty, ["UE", "UE", "3", "AE", "AE", "3"]),
        ("SET_RIPAS EMPTY lossy", active, &empty_lossy, ["UE", "UE", "UE", "AE", "AE", "AE"]),
        ("RTT_FOLD", new, fold, ["UE", "3", "3", "3", "3", "3"]),
        ("RTT_DESTROY", new, drop_table, ["UD", "UD", "UD", "3", "3", "3"]),
    ];
    let rows = table.into_iter().flat_map(|(name, realm_state, command, expected)| {
        STATES.into_iter().zip(expected).map(move |(before, want)| (name, realm_state, command, before, want))
    });
    for (name, realm_state, command, before, want) in some(rows, 7) {
        let mut rmm = in_state(before);
        if realm_state == RealmState::Active {
            activate(&mut rmm);
        }
        let reply = command(&mut rmm);
        let got = match reply.status {
            RmiStatus::Success => letters(entry(&rmm, 0)),
            RmiStatus::Rtt(3) => "3",
            RmiStatus::Realm(0) => "R",
            _ => "other",
        };
        assert_eq!(got, want, "{name} on {before} while {realm_state:?}");
        let unchanged = !reply.is_success();
        assert!(!unchanged || letters(entry(&rmm, 0)) == before, "{name} was refused and changed {before}");
    }
}

#[test]
fn who_sees_a_fault_depends_on_ripas() {
    for (state, data, fetch) in [
        ("UE", None, None),
        ("UR", Some(0x9000_0007), Some(0x8000_0007)),
        ("UD", Some(0x9000_0007), Some(0x8000_0007)),
        ("AE", None, None),
        ("AD", Some(0x9000_0007), Some(0x8000_0007)),
    ] {
        for (esr, want) in some([(0x9382_0007, data), (0x8200_0007, fetch)], 2) {
            let mut rmm = in_state(state);
            activate(&mut rmm);
            ok(rmm.rec_enter(at(30), at(100), RecEntry::default()));
            let got = rmm.realm_step(at(30), RealmStep::Sync { esr, ipa: 0, far: 0 }).unwrap();
            match want {
                None => assert_eq!(got, RealmOutcome::ExternalAbort, "{state}"),
                Some(esr) => assert_eq!(got, RealmOutcome::Exit(RecExit { esr, ..RecExit::default() }), "{state}"),
            }
        }
    }
}

#[test]
fn granules_move_only_between_host_and_delegated() {
    let mut rmm = new_realm();
    ok(rmm.data_create_unknown(at(1), at(21), 0));
    for granule in [1, 2, 4, 5, 21] {
        assert_eq!(rmm.granule_undelegate(at(granule)).status, RmiStatus::Input, "granule {granule}");
        assert_eq!(rmm.granule_delegate(at(granule)).status, RmiStatus::Input, "granule {granule}");
    }
    for address in [1, at(8192), u64::MAX, !0xfff] {
        assert_eq!(rmm.granule_delegate(address).status, RmiStatus::Input, "{address:#x}");
    }
    ok(rmm.granule_undelegate(at(29)));
    assert_eq!(rmm.granule(at(29)), Some(GranuleState::Ns));
}

#[test]
fn realm_parameters_are_checked() {
    type Spoil = fn(&mut RealmParams);
    let refused: [(&str, Spoil); 13] = [
        ("LPA2", |p| p.flags = 1),
        ("SVE", |p| p.flags = 2),
        ("PMU without counters", |p| p.flags = 4),
        ("width", |p| p.s2sz = 31),
        ("width beyond the platform", |p| p.s2sz = 49),
        ("breakpoints", |p| p.num_bps = 0),
        ("watchpoints", |p| p.num_wps = 2),
        ("algorithm", |p| p.hash_algo = 2),
        ("VMID", |p| p.vmid = 256),
        ("level", |p| p.rtt_level_start = 0),
        ("tables", |p| p.rtt_num_start = 2),
        ("table that is the host's", |p| p.rtt_base = at(3)),
        ("table that is the descriptor", |p| p.rtt_base = at(1)),
    ];
    let mut rmm = monitor();
    ok(rmm.granule_delegate(at(1)));
    ok(rmm.granule_delegate(at(2)));
    for (what, spoil) in refused {
        let mut params = realm_params();
        spoil(&mut params);
        let before = rmm.clone();
        assert_eq!(rmm.realm_create(at(1), at(100), &params).status, RmiStatus::Input, "{what}");
        assert_eq!(rmm, before, "{what}");
    }
    assert_eq!(rmm.realm_create(at(1), at(2), &realm_params()).status, RmiStatus::Input, "parameters not the host's");
    ok(rmm.realm_create(at(1), at(100), &realm_params()));
    assert_eq!(rmm.realm_create(at(1), at(100), &realm_params()).status, RmiStatus::Input, "twice");
}

#[test]
fn recs_are_created_in_order_and_only_before_activation() {
    let mut rmm = new_realm();
    assert_eq!(add_rec(&mut rmm, 30, 40, 1, RUNNABLE).status, RmiStatus::Input);
    let aux: Vec<u64> = (40..56).map(at).collect();
    let params = |mpidr, aux: &[u64]| RecParams { boot: RUNNABLE, mpidr, aux: aux.to_vec() };
    let mut same = aux.clone();
    same[15] = same[0];
    for bad in [&aux[1..], &same] {
        assert_eq!(rmm.rec_create(at(1), at(30), at(100), &params(0, bad)).status, RmiStatus::Input);
    }
    ok(rmm.rec_create(at(1), at(30), at(100), &params(0, &aux)));
    assert_eq!(rmm.refcount(at(1)), Some(1));
    assert_eq!(rmm.rec_enter(at(30), at(100), RecEntry::default()).status, RmiStatus::Realm(0));
    ok(rmm.realm_activate(at(1)));
    assert_eq!(rmm.realm_activate(at(1)).status, RmiStatus::Realm(0));
    assert_eq!(add_rec(&mut rmm, 31, 60, 1, RUNNABLE).status, RmiStatus::Realm(0));
    ok(rmm.rec_enter(at(30), at(100), RecEntry::default()));
    assert_eq!(rmm.rec_enter(at(30), at(100), RecEntry::default()).status, RmiStatus::Rec);
    assert_eq!(rmm.rec_destroy(at(30)).status, RmiStatus::Rec);
    assert_eq!(rmm.realm_step(at(30), RealmStep::Irq).unwrap(), exit(ExitKind::Irq));
    assert_eq!(rmm.realm_step(at(30), RealmStep::Irq), Err(StepError::NotRunning));
    assert_eq!(rmm.realm_destroy(at(1)).status, RmiStatus::Realm(0));
    ok(rmm.rec_destroy(at(30)));
    assert_eq!(rmm.granule(at(40)), Some(GranuleState::Delegated));
}

fn exit(kind: ExitKind) -> RealmOutcome {
    RealmOutcome::Exit(RecExit { kind, ..RecExit::default() })
}

#[test]
fn a_realm_that_switches_off_runs_no_more() {
    let mut rmm = new_realm();
    activate(&mut rmm);
    let off = 0x8400_0008;
    let exit = RecExit { kind: ExitKind::Psci, gprs: [off, 0], ..RecExit::default() };
    assert_eq!(ask(&mut rmm, [off, 0, 0, 0, 0]), RealmOutcome::Exit(exit));
    assert_eq!(rmm.rec_enter(at(30), at(100), RecEntry::default()).status, RmiStatus::Realm(1));
}

#[test]
fn turning_a_cpu_on_takes_the_hosts_word() {
    let mut rmm = new_realm();
    ok(add_rec(&mut rmm, 30, 40, 0, RUNNABLE));
    ok(add_rec(&mut rmm, 31, 60, 1, BootState::default()));
    ok(rmm.realm_activate(at(1)));
    assert_eq!(rmm.rec_enter(at(31), at(100), RecEntry::default()).status, RmiStatus::Rec);
    let on = 0xc400_0003;
    assert_eq!(ask(&mut rmm, [on, 0, 0x1000, 0, 0]), RealmOutcome::Resumed);
    assert_eq!(rmm.rec(at(30)).unwrap().regs()[0], (-4i64).cast_unsigned(), "itself");
    rmm.realm_step(at(30), RealmStep::Fiq).unwrap();
    assert!(matches!(ask(&mut rmm, [on, 1, 0x1000, 9, 0]), RealmOutcome::Exit(_)));
    assert_eq!(rmm.rec_enter(at(30), at(100), RecEntry::default()).status, RmiStatus::Rec, "request pending");
    assert_eq!(rmm.psci_complete(at(30), at(30), 0).status, RmiStatus::Input);
    ok(rmm.psci_complete(at(30), at(31), 0));
    assert_eq!(rmm.psci_complete(at(30), at(31), 0).status, RmiStatus::Input, "answered already");
    ok(rmm.rec_enter(at(31), at(100), RecEntry::default()));
    assert_eq!(rmm.rec(at(31)).unwrap().regs()[0], 9);
}

#[test]
fn measurements_of_the_realms_own() {
    let mut rmm = new_realm();
    activate(&mut rmm);
    assert_eq!(ask(&mut rmm, [rsi::MEASUREMENT_EXTEND, 1, 8, 0x1122, 0]), RealmOutcome::Resumed);
    let mut want = Rim::extensible(HashAlgo::Sha256);
    want.extend_by_realm(&0x1122u64.to_le_bytes());
    assert_eq!(rmm.realm(at(1)).unwrap().rem(0), Some(&want));
    let mut regs = [0; 11];
    (regs[0], regs[1]) = (rsi::MEASUREMENT_READ, 1);
    rmm.realm_step(at(30), RealmStep::Smc(regs)).unwrap();
    let read = rmm.rec(at(30)).unwrap().regs();
    let bytes: Vec<u8> = read[1..9].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!((read[0], &bytes[..]), (0, &want.field()[..]));
    for (slot, size) in [(0, 8), (5, 8), (1, 65)] {
        (regs[0], regs[1], regs[2]) = (rsi::MEASUREMENT_EXTEND, slot, size);
        rmm.realm_step(at(30), RealmStep::Smc(regs)).unwrap();
        assert_eq!(rmm.rec(at(30)).unwrap().regs()[0], rsi::ERROR_INPUT, "slot {slot}, {size} bytes");
    }
    (regs[0], regs[1]) = (rsi::HOST_CALL, 0);
    assert_eq!(rmm.realm_step(at(30), RealmStep::Smc(regs)), Err(StepError::NotModelled(rsi::HOST_CALL)));
}

#[test]
fn host_completes_unprotected_accesses() {
    let mut rmm = new_realm();
    activate(&mut rmm);
    let ipa = 1 << 38;
    let load = RealmStep::Sync { esr: 0x9382_0007, ipa, far: 0x1234 };
    let enter = |rmm: &mut Rmm, flags, gpr0| rmm.rec_enter(at(30), at(100), RecEntry { flags, gpr0 });
    assert_eq!(enter(&mut rmm, ENTER_EMUL_MMIO, 0).status, RmiStatus::Rec, "nothing to emulate");
    ok(enter(&mut rmm, 0, 0));
    let exit = RecExit { esr: 0x9180_0007, far: 0x234, hpfar: ipa >> 8, ..RecExit::default() };
    assert_eq!(rmm.realm_step(at(30), load).unwrap(), RealmOutcome::Exit(exit));
    ok(enter(&mut rmm, ENTER_EMUL_MMIO, 0xffff_ffff_8000_0001));
    assert_eq!(rmm.rec(at(30)).unwrap().regs()[2], 0x8000_0001, "a 32-bit load is zero-extended");
    rmm.realm_step(at(30), load).unwrap();
    ok(enter(&mut rmm, ENTER_INJECT_SEA, 0));
    rmm.realm_step(at(30), RealmStep::Sync { esr: 0x9382_0007, ipa: 1 << 39, far: 0 }).unwrap();
    rmm.realm_step(at(30), RealmStep::Fiq).unwrap();
    assert_eq!(enter(&mut rmm, ENTER_INJECT_SEA, 0).status, RmiStatus::Rec);
}

#[test]
fn a_block_folds_and_unfolds_without_a_trace() {
    let mut rmm = new_realm();
    // As one entry of level 2, which is measured as one.
    ok(rmm.rtt_fold(at(1), 0, 3));
    ok(rmm.rtt_init_ripas(at(1), 0, BLOCK));
    ok(rmm.rtt_create(at(1), at(5), 0, 3));
    for page in 0..512 {
        ok(rmm.granule_delegate(at(512 + page)));
        ok(rmm.data_create_unknown(at(1), at(512 + page), page * PAGE));
    }
    let unfolded = rmm.clone();
    assert_eq!(rmm.refcount(at(5)), Some(512));
    assert_eq!(ok(rmm.rtt_fold(at(1), 0, 3)).x[0], at(5));
    let read = rmm.rtt_read_entry(at(1), 0, 3).x;
    assert_eq!(read, [2, 1, at(512), 1]);
    assert_eq!(rmm.refcount(at(4)), Some(1), "the block counts like the table did");
    let destroyed = rmm.data_destroy(at(1), PAGE);
    assert_eq!((destroyed.status, destroyed.x), (RmiStatus::Rtt(2), [0, PAGE, 0, 0]));
    ok(rmm.rtt_create(at(1), at(5), 0, 3));
    assert_eq!(rmm, unfolded);
    // One page elsewhere, and the rest does not fold any more.
    ok(rmm.data_destroy(at(1), 9 * PAGE));
    ok(rmm.data_create_unknown(at(1), at(21), 9 * PAGE));
    assert_eq!(rmm.rtt_fold(at(1), 0, 3).status, RmiStatus::Rtt(3));
}

#[test]
fn unprotected_mappings_do_not_hold_their_table() {
    let mut rmm = new_realm();
    let ipa = 1 << 38;
    let descriptor = at(100) | 0xd8;
    ok(rmm.rtt_create(at(1), at(22), ipa, 2));
    assert_eq!(rmm.rtt_map_unprotected(at(1), ipa, 3, descriptor).status, RmiStatus::Rtt(2));
    ok(rmm.rtt_create(at(1), at(23), ipa, 3));
    for (ipa, level, descriptor) in [
        (0, 3, descriptor),
        (ipa, 0, descriptor),
        (ipa, 4, descriptor),
        (ipa + 1, 3, descriptor),
        (ipa, 3, descriptor | 0x100),
        (ipa, 3, at(100) | 0x10),
        (ipa, 2, descriptor),
    ] {
        let reply = rmm.rtt_map_unprotected(at(1), ipa, level, descriptor);
        assert_eq!(reply.status, RmiStatus::Input, "{ipa:#x} {level} {descriptor:#x}");
    }
    ok(rmm.rtt_map_unprotected(at(1), ipa, 3, descriptor));
    assert_eq!(rmm.rtt_map_unprotected(at(1), ipa, 3, descriptor).status, RmiStatus::Rtt(3));
    assert_eq!(rmm.rtt_read_entry(at(1), ipa, 3).x, [3, 1, descriptor, 0]);
    assert_eq!(rmm.refcount(at(23)), Some(0));
    assert_eq!(ok(rmm.rtt_destroy(at(1), ipa, 3)).x[..2], [at(23), ipa + (1 << 30)]);
    let unmap = rmm.rtt_unmap_unprotected(at(1), ipa, 3);
    assert_eq!((unmap.status, unmap.x[0]), (RmiStatus::Rtt(2), ipa + (1 << 30)));
}

#[test]
fn ripas_stops_at_the_first_entry_that_cannot_change() {
    let mut rmm = new_realm();
    ok(rmm.data_create_unknown(at(1), at(21), 3 * PAGE));
    assert_eq!(ok(rmm.rtt_init_ripas(at(1), 0, 8 * PAGE)).x[0], 3 * PAGE);
    assert_eq!(rmm.rtt_init_ripas(at(1), BLOCK, BLOCK + PAGE).status, RmiStatus::Rtt(2));
    let mut want = Rim::new(&realm_params().measured().unwrap());
    for page in 0..3 {
        want.extend(&Step::Ripas { base: page * PAGE, top: (page + 1) * PAGE });
    }
    assert_eq!(rmm.realm(at(1)).unwrap().rim(), &want);
    ok(rmm.data_create(at(1), at(22), 4 * PAGE, source(&[3; 4096])));
    ok(rmm.data_destroy(at(1), 4 * PAGE));
    activate(&mut rmm);
    ask(&mut rmm, [rsi::IPA_STATE_SET, 0, 8 * PAGE, 1, 0]);
    assert_eq!(ok(rmm.rtt_set_ripas(at(1), at(30), 0, 8 * PAGE)).x[0], 4 * PAGE);
    assert_eq!(rmm.rtt_set_ripas(at(1), at(30), 4 * PAGE, 8 * PAGE).status, RmiStatus::Rtt(3));
    ok(rmm.rec_enter(at(30), at(100), RecEntry { flags: ENTER_RIPAS_REJECT, gpr0: 0 }));
    assert_eq!(rmm.rec(at(30)).unwrap().regs()[..3], [0, 4 * PAGE, 1]);
    let mut regs = [0; 11];
    regs[..3].copy_from_slice(&[rsi::IPA_STATE_GET, 0, 8 * PAGE]);
    rmm.realm_step(at(30), RealmStep::Smc(regs)).unwrap();
    assert_eq!(rmm.rec(at(30)).unwrap().regs()[..3], [0, 4 * PAGE, 1]);
}

#[test]
fn other_versions_are_refused_by_name() {
    let memory = PfnRange::page(Pfn(0));
    let error = Rmm::new(RmmVersion::V2_0, Platform::fake_host(memory)).unwrap_err();
    assert_eq!(format!("{error}"), "RMM 2.0 is not modelled, only RMM 1.0");
    assert!(matches!(
        Cca::new(&Config { version: RmmVersion::V2_0, ..Config::default() }),
        Err(CreateError::Version(UnsupportedVersion(RmmVersion::V2_0)))
    ));
}
