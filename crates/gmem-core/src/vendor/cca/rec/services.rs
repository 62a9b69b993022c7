//! What a realm asks for: RSI and PSCI calls.

use super::*;

/// RSI calls that return to the realm, in the registers X0 to X3.
pub(super) fn answer(realm: &mut Realm, function: u64, args: &[u64; 11]) -> [u64; 4] {
    match function {
        SMCCC_VERSION => [SMCCC_VERSION_1_2, 0, 0, 0],
        rsi::VERSION => [u64::from(args[1] != ABI_VERSION), ABI_VERSION, ABI_VERSION, 0],
        rsi::FEATURES => [0; 4],
        rsi::MEASUREMENT_EXTEND => [measurement_extend(realm, args), 0, 0, 0],
        rsi::IPA_STATE_GET => ipa_state_get(realm, args[1], args[2]),
        _ => [u64::MAX, 0, 0, 0],
    }
}

/// X1 to X8 are the measurement, zero padded; index 0 is the RIM.
pub(super) fn measurement_read(realm: &Realm, vcpu: &mut Rec) -> RealmOutcome {
    let index = usize::try_from(vcpu.regs[1]).unwrap_or(usize::MAX);
    let found = if index == 0 { Some(&realm.rim) } else { realm.rem.get(index - 1) };
    let Some(measurement) = found else {
        vcpu.set_result([rsi::ERROR_INPUT, 0, 0, 0]);
        return RealmOutcome::Resumed;
    };
    vcpu.regs[0] = 0;
    for (register, bytes) in vcpu.regs[1..].iter_mut().zip(measurement.field().as_chunks::<8>().0) {
        *register = u64::from_le_bytes(*bytes);
    }
    RealmOutcome::Resumed
}

fn measurement_extend(realm: &mut Realm, args: &[u64; 11]) -> u64 {
    let mut value = [0; 64];
    for (bytes, register) in value.as_chunks_mut::<8>().0.iter_mut().zip(&args[3..]) {
        *bytes = register.to_le_bytes();
    }
    // Index 0 is the RIM, which the realm cannot extend.
    let slot = args[1].checked_sub(1).and_then(|slot| usize::try_from(slot).ok());
    let value = usize::try_from(args[2]).ok().and_then(|size| value.get(..size));
    match (slot.and_then(|slot| realm.rem.get_mut(slot)), value) {
        (Some(rem), Some(value)) => {
            rem.extend_by_realm(value);
            0
        }
        _ => rsi::ERROR_INPUT,
    }
}

/// The end of the run of equal RIPAS from `base`, as far as one table shows it, and that RIPAS.
fn ipa_state_get(realm: &Realm, base: u64, top: u64) -> [u64; 4] {
    let refused = [rsi::ERROR_INPUT, 0, 0, 0];
    if !is_range_in_par(realm, base, top) {
        return refused;
    }
    let walk = realm.rtt.walk(base, PAGE_LEVEL);
    let Some(ripas) = walk.entry.ripas() else { return refused };
    let end = Rtt::range_end(&walk, top.saturating_add((1 << shift(walk.level)) - 1));
    let mut index = walk.index;
    while let Some((len, entry)) = realm.rtt.run(walk.level, index, end) {
        if entry.ripas() != Some(ripas) {
            break;
        }
        index += len;
    }
    [0, (index << shift(walk.level)).min(top), u64::from(ripas.raw()), 0]
}

fn is_range_in_par(realm: &Realm, base: u64, top: u64) -> bool {
    base < top && top <= realm.rtt.par_size() && is_aligned(base | top, PAGE_LEVEL)
}

pub(super) fn ipa_state_set(realm: &Realm, vcpu: &mut Rec) -> RealmOutcome {
    let [_, base, top, ripas, destroyed, ..] = vcpu.regs;
    let ripas = match ripas {
        0 => Some(Ripas::Empty),
        1 => Some(Ripas::Ram),
        _ => None,
    };
    let (Some(ripas), true) = (ripas, is_range_in_par(realm, base, top)) else {
        vcpu.set_result([rsi::ERROR_INPUT, 0, 0, 0]);
        return RealmOutcome::Resumed;
    };
    let destroyed = if destroyed == 1 { ChangeDestroyed::Yes } else { ChangeDestroyed::No };
    vcpu.ripas_change = RipasChange { base, top, addr: base, ripas, destroyed };
    vcpu.set_result([0, top, 0, 0]);
    RealmOutcome::Exit(RecExit {
        kind: ExitKind::RipasChange,
        ripas_base: base,
        ripas_top: top,
        ripas_value: ripas.raw(),
        ..RecExit::default()
    })
}

/// RSI_REALM_CONFIG writes to the realm's memory. Where that is missing the host gets an abort and the call is repeated.
pub(super) fn realm_config(realm: &Realm, vcpu: &mut Rec) -> RealmOutcome {
    let ipa = vcpu.regs[1];
    let valid = is_aligned(ipa, PAGE_LEVEL) && realm.rtt.in_par(ipa);
    let walk = if valid { Some(realm.rtt.walk(ipa, PAGE_LEVEL)) } else { None };
    let result = match walk {
        Some(Walk { entry: Entry::Assigned { ripas: Ripas::Ram, .. }, .. }) => 0,
        Some(Walk { entry, level, .. }) if entry.ripas() != Some(Ripas::Empty) => {
            let esr = esr::EC_DATA_ABORT | (esr::FSC_TRANSLATION + u64::from(level));
            return RealmOutcome::Exit(RecExit { esr, hpfar: ipa >> 8, ..RecExit::default() });
        }
        _ => rsi::ERROR_INPUT,
    };
    vcpu.set_result([result, 0, 0, 0]);
    RealmOutcome::Resumed
}

pub(super) fn psci_call(realm: &mut Realm, vcpu: &mut Rec, function: u64) -> RealmOutcome {
    let base = function & !psci::SMC64;
    let has_64 = matches!(base, psci::CPU_SUSPEND | psci::CPU_ON | psci::AFFINITY_INFO);
    let known = if base == function || has_64 { base } else { 0 };
    let result = match known {
        psci::VERSION => 0x1_0001,
        psci::FEATURES => psci_features(vcpu.regs[1]),
        psci::CPU_SUSPEND => return psci_notify(vcpu, 1),
        psci::CPU_OFF => {
            vcpu.runnable = false;
            return psci_notify(vcpu, 1);
        }
        psci::CPU_ON if !realm.rtt.in_par(vcpu.regs[2]) => psci::INVALID_ADDRESS,
        psci::AFFINITY_INFO if vcpu.regs[2] != 0 => psci::INVALID_PARAMS,
        psci::CPU_ON | psci::AFFINITY_INFO => match rec_index_of_mpidr(vcpu.regs[1]) {
            target if target >= realm.next_rec => psci::INVALID_PARAMS,
            target if target != vcpu.index => return psci_request(vcpu),
            _ if known == psci::CPU_ON => psci::ALREADY_ON,
            _ => 0,
        },
        psci::SYSTEM_OFF | psci::SYSTEM_RESET => {
            realm.state = RealmState::SystemOff;
            return RealmOutcome::Exit(psci_exit(vcpu, 1));
        }
        _ => psci::NOT_SUPPORTED,
    };
    vcpu.set_result([result, 0, 0, 0]);
    RealmOutcome::Resumed
}

fn psci_features(function: u64) -> u64 {
    let base = function & !psci::SMC64;
    let both = matches!(base, psci::CPU_SUSPEND | psci::CPU_ON | psci::AFFINITY_INFO);
    let only_32 =
        matches!(function, psci::CPU_OFF | psci::SYSTEM_OFF | psci::SYSTEM_RESET | psci::FEATURES | SMCCC_VERSION);
    if both || only_32 { psci::SUCCESS } else { psci::NOT_SUPPORTED }
}

fn psci_exit(vcpu: &Rec, arguments: usize) -> RecExit {
    let mut gprs = [0; 2];
    for (to, from) in gprs.iter_mut().zip(&vcpu.regs).take(arguments) {
        *to = *from;
    }
    RecExit { kind: ExitKind::Psci, gprs, ..RecExit::default() }
}

/// A call of which the host is only told.
fn psci_notify(vcpu: &mut Rec, arguments: usize) -> RealmOutcome {
    let exit = psci_exit(vcpu, arguments);
    vcpu.set_result([psci::SUCCESS, 0, 0, 0]);
    RealmOutcome::Exit(exit)
}

/// A call that the host has to answer before the REC may run again; the registers keep the request.
fn psci_request(vcpu: &mut Rec) -> RealmOutcome {
    vcpu.psci_pending = true;
    RealmOutcome::Exit(psci_exit(vcpu, 2))
}
