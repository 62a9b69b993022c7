//! RECs: entering a realm, what the realm does there, and what the host and the realm see of it.
//!
//! RMI_REC_ENTER is split at the boundary between host and realm. [`Rmm::rec_enter`] does what the RMM does before the
//! realm runs; [`Rmm::realm_step`] is one exception that the realm takes, after which it either runs on or leaves to the
//! host. A REC that runs is busy, so the commands of other CPUs can be interleaved.

mod services;

use super::rmi::{ABI_VERSION, GranuleState, PAGE_LEVEL, RealmState, RecParams, Reply, Ripas, RmiStatus};
use super::rmm::{Realm, Rmm, rec_index_of_mpidr};
use super::rtt::{ChangeDestroyed, Entry, Rtt, Walk, is_aligned, shift};
use alloc::vec::Vec;
use services::{answer, ipa_state_set, measurement_read, psci_call, realm_config};

/// RMI_REC_ENTER flag: the host has emulated the access that the REC stopped at.
pub const ENTER_EMUL_MMIO: u64 = 1 << 0;
/// RMI_REC_ENTER flag: the access that the REC stopped at is to be a synchronous external abort in the realm.
pub const ENTER_INJECT_SEA: u64 = 1 << 1;
/// RMI_REC_ENTER flag: the host rejects the RIPAS change that the REC asked for.
pub const ENTER_RIPAS_REJECT: u64 = 1 << 4;

/// SMC identifiers of the Realm Services Interface.
pub mod rsi {
    /// RSI_VERSION.
    pub const VERSION: u64 = 0xc400_0190;
    /// RSI_FEATURES.
    pub const FEATURES: u64 = 0xc400_0191;
    /// RSI_MEASUREMENT_READ.
    pub const MEASUREMENT_READ: u64 = 0xc400_0192;
    /// RSI_MEASUREMENT_EXTEND.
    pub const MEASUREMENT_EXTEND: u64 = 0xc400_0193;
    /// RSI_ATTESTATION_TOKEN_INIT.
    pub const ATTESTATION_TOKEN_INIT: u64 = 0xc400_0194;
    /// RSI_ATTESTATION_TOKEN_CONTINUE.
    pub const ATTESTATION_TOKEN_CONTINUE: u64 = 0xc400_0195;
    /// RSI_REALM_CONFIG.
    pub const REALM_CONFIG: u64 = 0xc400_0196;
    /// RSI_IPA_STATE_SET.
    pub const IPA_STATE_SET: u64 = 0xc400_0197;
    /// RSI_IPA_STATE_GET.
    pub const IPA_STATE_GET: u64 = 0xc400_0198;
    /// RSI_HOST_CALL.
    pub const HOST_CALL: u64 = 0xc400_0199;
    /// RSI_ERROR_INPUT.
    pub const ERROR_INPUT: u64 = 1;
}

/// PSCI functions that a realm may call; the 64-bit form of each has bit 30 set.
mod psci {
    pub(super) const VERSION: u64 = 0x8400_0000;
    pub(super) const CPU_SUSPEND: u64 = 0x8400_0001;
    pub(super) const CPU_OFF: u64 = 0x8400_0002;
    pub(super) const CPU_ON: u64 = 0x8400_0003;
    pub(super) const AFFINITY_INFO: u64 = 0x8400_0004;
    pub(super) const SYSTEM_OFF: u64 = 0x8400_0008;
    pub(super) const SYSTEM_RESET: u64 = 0x8400_0009;
    pub(super) const FEATURES: u64 = 0x8400_000a;
    /// Bit that tells the 64-bit from the 32-bit calling convention.
    pub(super) const SMC64: u64 = 1 << 30;

    pub(super) const SUCCESS: u64 = 0;
    pub(super) const NOT_SUPPORTED: u64 = u64::MAX;
    pub(super) const INVALID_PARAMS: u64 = u64::MAX - 1;
    pub(super) const DENIED: u64 = u64::MAX - 2;
    pub(super) const ALREADY_ON: u64 = u64::MAX - 3;
    pub(super) const INVALID_ADDRESS: u64 = u64::MAX - 8;
    pub(super) const AFFINITY_OFF: u64 = 1;
}

const SMCCC_VERSION: u64 = 0x8000_0000;
const SMCCC_VERSION_1_2: u64 = 0x1_0002;

/// Fields of ESR_EL2 (Arm ARM D24.2.40).
mod esr {
    pub(super) const EC: u64 = 0x3f << 26;
    pub(super) const EC_WFX: u64 = 1 << 26;
    pub(super) const EC_HVC: u64 = 0x16 << 26;
    pub(super) const EC_INSTRUCTION_ABORT: u64 = 0x20 << 26;
    pub(super) const EC_DATA_ABORT: u64 = 0x24 << 26;
    pub(super) const WFX_TI: u64 = 1;
    pub(super) const ISV: u64 = 1 << 24;
    pub(super) const SAS: u64 = 3 << 22;
    pub(super) const SSE: u64 = 1 << 21;
    pub(super) const SRT_SHIFT: u32 = 16;
    pub(super) const SF: u64 = 1 << 15;
    pub(super) const SET: u64 = 3 << 11;
    pub(super) const SET_UNCONTAINABLE: u64 = 2 << 11;
    pub(super) const FNV: u64 = 1 << 10;
    pub(super) const EA: u64 = 1 << 9;
    pub(super) const WNR: u64 = 1 << 6;
    pub(super) const FSC: u64 = 0x3f;
    pub(super) const FSC_TRANSLATION: u64 = 0x04;
    pub(super) const FSC_EXTERNAL: u64 = 0x10;
    /// What the host may know of an abort that it cannot emulate.
    pub(super) const PLAIN: u64 = EC | SET | FNV | EA | FSC;
    /// What the host needs in order to emulate an access.
    pub(super) const EMULATED: u64 = PLAIN | ISV | SAS | SF | WNR;
}

/// A RIPAS change that the realm has asked for. `base == top` means none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RipasChange {
    /// First address.
    pub base: u64,
    /// First address after the range.
    pub top: u64,
    /// First address that the host has not changed yet. It keeps its value after the request is over.
    pub addr: u64,
    /// What the range shall become.
    pub ripas: Ripas,
    /// Whether destroyed memory may change too.
    pub destroyed: ChangeDestroyed,
}

impl RipasChange {
    /// Whether the realm waits for it.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.base != self.top
    }
}

/// The exception with which the REC last left to the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
struct LastExit {
    esr: u64,
    ipa: u64,
}

/// A Realm Execution Context, a vCPU of a realm.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rec {
    pub(super) rd: u64,
    pub(super) aux: Vec<u64>,
    pub(super) ripas_change: RipasChange,
    index: u64,
    runnable: bool,
    running: bool,
    psci_pending: bool,
    regs: [u64; 31],
    last: LastExit,
}

impl Rec {
    pub(super) fn new(rd: u64, index: u64, params: &RecParams) -> Self {
        let mut regs = [0; 31];
        regs[..8].copy_from_slice(&params.boot.gprs);
        Self {
            rd,
            aux: params.aux.clone(),
            ripas_change: RipasChange::default(),
            index,
            runnable: params.boot.is_runnable(),
            running: false,
            psci_pending: false,
            regs,
            last: LastExit::default(),
        }
    }

    /// General purpose registers of the realm, X0 to X30.
    #[must_use]
    pub fn regs(&self) -> &[u64; 31] {
        &self.regs
    }

    /// Whether it is between [`Rmm::rec_enter`] and an exit.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// The RIPAS change that the host is asked for.
    #[must_use]
    pub fn ripas_change(&self) -> RipasChange {
        self.ripas_change
    }

    fn set_result(&mut self, result: [u64; 4]) {
        self.regs[..4].copy_from_slice(&result);
    }

    /// RMI_REC_ENTER answers a pending RIPAS change. A rejected change to EMPTY is reported as accepted; the realm learns
    /// only from the address how far it went.
    fn complete_ripas_change(&mut self, flags: u64) {
        let change = self.ripas_change;
        if !change.is_pending() {
            return;
        }
        let rejected = flags & ENTER_RIPAS_REJECT != 0 && change.ripas == Ripas::Ram && change.addr != change.top;
        self.regs[..3].copy_from_slice(&[0, change.addr, u64::from(rejected)]);
        (self.ripas_change.base, self.ripas_change.top) = (0, 0);
    }

    /// Whether the flags of RMI_REC_ENTER fit the exit before it. `par_size` bounds the protected addresses.
    fn accepts(&self, flags: u64, par_size: u64) -> bool {
        let data_abort = self.last.esr & esr::EC == esr::EC_DATA_ABORT;
        if flags & ENTER_INJECT_SEA != 0 {
            return data_abort && self.last.ipa >= par_size;
        }
        flags & ENTER_EMUL_MMIO == 0 || data_abort && self.last.esr & esr::ISV != 0
    }

    /// Puts the value of an emulated load where the instruction wants it.
    fn complete_mmio(&mut self, flags: u64, value: u64) {
        let syndrome = self.last.esr;
        if flags & ENTER_EMUL_MMIO == 0 || flags & ENTER_INJECT_SEA != 0 || syndrome & esr::WNR != 0 {
            return;
        }
        let target = usize::try_from(syndrome >> esr::SRT_SHIFT & 0x1f).unwrap_or(31);
        if let Some(register) = self.regs.get_mut(target) {
            *register = loaded(syndrome, value);
        }
    }
}

/// `value` cut and extended as the load that `syndrome` describes does it.
fn loaded(syndrome: u64, value: u64) -> u64 {
    let unused = 64 - (8u32 << (syndrome >> 22 & 3));
    let zero_extended = value << unused >> unused;
    if syndrome & esr::SSE == 0 {
        return zero_extended;
    }
    let signed = ((value << unused).cast_signed() >> unused).cast_unsigned();
    if syndrome & esr::SF == 0 { signed & u64::from(u32::MAX) } else { signed }
}

/// What the host passes with RMI_REC_ENTER.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RecEntry {
    /// [`ENTER_EMUL_MMIO`], [`ENTER_INJECT_SEA`], [`ENTER_RIPAS_REJECT`]; others have no effect here.
    pub flags: u64,
    /// Value of an emulated load.
    pub gpr0: u64,
}

/// What a realm does that makes the RMM run.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RealmStep {
    /// SMC with X0 to X10; an RSI or PSCI call.
    Smc([u64; 11]),
    /// An exception that the hardware reports with a syndrome: an abort of stage 2, WFx, HVC.
    Sync {
        /// ESR_EL2.
        esr: u64,
        /// The faulting address, of which HPFAR_EL2 holds the page.
        ipa: u64,
        /// FAR_EL2.
        far: u64,
    },
    /// An interrupt for the host.
    Irq,
    /// A fast interrupt.
    Fiq,
}

/// Why a REC left to the host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum ExitKind {
    /// 0: an abort, or another synchronous exception.
    #[default]
    Sync,
    /// 1: interrupt.
    Irq,
    /// 2: fast interrupt.
    Fiq,
    /// 3: PSCI call.
    Psci,
    /// 4: the realm asks for a RIPAS change.
    RipasChange,
}

impl ExitKind {
    /// The encoding in `RmiRecExit`.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Sync => 0,
            Self::Irq => 1,
            Self::Fiq => 2,
            Self::Psci => 3,
            Self::RipasChange => 4,
        }
    }
}

/// `RmiRecExit`: all that the host learns. Fields that do not belong to the reason are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RecExit {
    /// Why.
    pub kind: ExitKind,
    /// Syndrome, cut to what the host may know.
    pub esr: u64,
    /// Offset of the access in its page, for unprotected addresses.
    pub far: u64,
    /// HPFAR_EL2: the page of the access, shifted right by 8.
    pub hpfar: u64,
    /// Value of an emulated store in the first, or the arguments of a PSCI call.
    pub gprs: [u64; 2],
    /// First address of a RIPAS change.
    pub ripas_base: u64,
    /// First address after it.
    pub ripas_top: u64,
    /// What it shall become.
    pub ripas_value: u8,
}

/// What came of a step of the realm.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RealmOutcome {
    /// The realm runs on; X0.. hold the result of a call.
    Resumed,
    /// The realm takes a synchronous external abort. The host is not told.
    ExternalAbort,
    /// The realm takes an undefined instruction exception.
    Undefined,
    /// The REC stops.
    Exit(RecExit),
}

/// A step that cannot be answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StepError {
    /// The REC does not exist or does not run: the caller's mistake.
    NotRunning,
    /// An RSI call that is not modelled, because it depends on the contents of memory or on attestation.
    NotModelled(u64),
    /// An uncontainable external abort, which takes the whole system down.
    SystemDown,
}

impl Rmm {
    /// RMI_REC_ENTER up to the point at which the realm runs. `run` is the granule for `RmiRecRun`.
    pub fn rec_enter(&mut self, rec: u64, run: u64, entry: RecEntry) -> Reply {
        self.try_enter(rec, run, entry).err().unwrap_or(RmiStatus::Success).into()
    }

    fn try_enter(&mut self, rec: u64, run: u64, entry: RecEntry) -> Result<(), RmiStatus> {
        let run_is_host = self.is_in(run, GranuleState::Ns);
        let vcpu = self.recs.get_mut(&rec).filter(|_| run_is_host).ok_or(RmiStatus::Input)?;
        let realm = self.realms.get(&vcpu.rd).ok_or(RmiStatus::Input)?;
        if vcpu.running {
            return Err(RmiStatus::Rec);
        }
        match realm.state {
            RealmState::New => return Err(RmiStatus::Realm(0)),
            RealmState::SystemOff => return Err(RmiStatus::Realm(1)),
            RealmState::Active => {}
        }
        if !vcpu.runnable || vcpu.psci_pending || !vcpu.accepts(entry.flags, realm.rtt.par_size()) {
            return Err(RmiStatus::Rec);
        }
        vcpu.complete_mmio(entry.flags, entry.gpr0);
        vcpu.complete_ripas_change(entry.flags);
        vcpu.last.esr = 0;
        vcpu.running = true;
        Ok(())
    }

    /// One exception of the realm that runs on `rec`.
    ///
    /// # Errors
    /// [`StepError`]; nothing changes.
    pub fn realm_step(&mut self, rec: u64, step: RealmStep) -> Result<RealmOutcome, StepError> {
        let rd = self.recs.get(&rec).filter(|vcpu| vcpu.running).ok_or(StepError::NotRunning)?.rd;
        let outcome = match step {
            RealmStep::Smc(args) => self.smc(rec, rd, &args)?,
            RealmStep::Sync { esr, ipa, far } => self.sync(rec, rd, esr, ipa, far)?,
            RealmStep::Irq => exit_of(ExitKind::Irq),
            RealmStep::Fiq => exit_of(ExitKind::Fiq),
        };
        if let (RealmOutcome::Exit(_), Some(vcpu)) = (outcome, self.recs.get_mut(&rec)) {
            vcpu.running = false;
            if let RealmStep::Sync { esr, ipa, .. } = step {
                vcpu.last = LastExit { esr, ipa };
            }
        }
        Ok(outcome)
    }

    fn sync(&self, rec: u64, rd: u64, syndrome: u64, ipa: u64, far: u64) -> Result<RealmOutcome, StepError> {
        let Some(realm) = self.realms.get(&rd) else { return Err(StepError::NotRunning) };
        let exit = |exit| Ok(RealmOutcome::Exit(exit));
        match syndrome & esr::EC {
            esr::EC_HVC => Ok(RealmOutcome::Undefined),
            esr::EC_WFX => exit(RecExit { esr: syndrome & (esr::EC | esr::WFX_TI), ..RecExit::default() }),
            esr::EC_DATA_ABORT | esr::EC_INSTRUCTION_ABORT if is_external(syndrome) => match syndrome & esr::SET {
                esr::SET_UNCONTAINABLE => Err(StepError::SystemDown),
                _ => exit(RecExit { esr: syndrome & esr::PLAIN, ..RecExit::default() }),
            },
            esr::EC_DATA_ABORT => {
                let register = usize::try_from(syndrome >> esr::SRT_SHIFT & 0x1f).unwrap_or(31);
                let stored = self.recs.get(&rec).and_then(|vcpu| vcpu.regs.get(register)).copied().unwrap_or(0);
                Ok(data_abort(realm, syndrome, ipa, far, stored))
            }
            esr::EC_INSTRUCTION_ABORT => Ok(instruction_abort(realm, syndrome, ipa)),
            _ => exit(RecExit::default()),
        }
    }

    fn smc(&mut self, rec: u64, rd: u64, args: &[u64; 11]) -> Result<RealmOutcome, StepError> {
        let function = args[0] & 0xffff_ffff;
        let modelled =
            !matches!(function, rsi::HOST_CALL | rsi::ATTESTATION_TOKEN_INIT | rsi::ATTESTATION_TOKEN_CONTINUE);
        let (Some(realm), Some(vcpu), true) = (self.realms.get_mut(&rd), self.recs.get_mut(&rec), modelled) else {
            return Err(StepError::NotModelled(function));
        };
        vcpu.regs[..11].copy_from_slice(args);
        Ok(match function {
            0x8400_0000..=0x8400_001f | 0xc400_0000..=0xc400_001f => psci_call(realm, vcpu, function),
            rsi::IPA_STATE_SET => ipa_state_set(realm, vcpu),
            rsi::REALM_CONFIG => realm_config(realm, vcpu),
            rsi::MEASUREMENT_READ => measurement_read(realm, vcpu),
            _ => {
                vcpu.set_result(answer(realm, function, args));
                RealmOutcome::Resumed
            }
        })
    }

    /// RMI_PSCI_COMPLETE: the host answers a PSCI request of `calling` that concerns `target`, with a PSCI status.
    pub fn psci_complete(&mut self, calling: u64, target: u64, status: u64) -> Reply {
        self.try_psci_complete(calling, target, status).err().unwrap_or(RmiStatus::Success).into()
    }

    fn try_psci_complete(&mut self, calling: u64, target: u64, status: u64) -> Result<(), RmiStatus> {
        let caller = self.recs.get(&calling).filter(|rec| calling != target && !rec.running).ok_or(RmiStatus::Input)?;
        let other = self.recs.get(&target).ok_or(RmiStatus::Input)?;
        let (function, mpidr, entry_arg) = (caller.regs[0] & !psci::SMC64, caller.regs[1], caller.regs[3]);
        if !caller.psci_pending || caller.rd != other.rd || rec_index_of_mpidr(mpidr) != other.index {
            return Err(RmiStatus::Input);
        }
        let is_on = other.running || other.runnable;
        let turn_on = function == psci::CPU_ON;
        let allowed = status == psci::SUCCESS || turn_on && status == psci::DENIED;
        if !allowed {
            return Err(RmiStatus::Input);
        }
        let result = match (turn_on, is_on) {
            (true, true) => psci::ALREADY_ON,
            (true, false) => status,
            (false, on) => {
                if on {
                    0
                } else {
                    psci::AFFINITY_OFF
                }
            }
        };
        if turn_on
            && !is_on
            && status == psci::SUCCESS
            && let Some(other) = self.recs.get_mut(&target)
        {
            other.regs[0] = entry_arg;
            other.runnable = true;
        }
        if let Some(caller) = self.recs.get_mut(&calling) {
            caller.set_result([result, 0, 0, 0]);
            caller.psci_pending = false;
        }
        // The request is over even when the host is told that a CPU that is on cannot be denied.
        if turn_on && is_on && status == psci::DENIED { Err(RmiStatus::Input) } else { Ok(()) }
    }
}

fn exit_of(kind: ExitKind) -> RealmOutcome {
    RealmOutcome::Exit(RecExit { kind, ..RecExit::default() })
}

fn is_external(syndrome: u64) -> bool {
    matches!(syndrome & esr::FSC, esr::FSC_EXTERNAL | 0x13..=0x17)
}

/// HPFAR_EL2 of an address.
fn hpfar(ipa: u64) -> u64 {
    ipa >> 12 << 4
}

/// Whether an access is a fault that the realm has to deal with itself: beyond its address space, or not used.
fn is_realms_own(realm: &Realm, ipa: u64) -> bool {
    ipa >= realm.rtt.ipa_size()
        || realm.rtt.in_par(ipa) && realm.rtt.walk(ipa, PAGE_LEVEL).entry.ripas() == Some(Ripas::Empty)
}

fn data_abort(realm: &Realm, syndrome: u64, ipa: u64, far: u64, register: u64) -> RealmOutcome {
    if is_realms_own(realm, ipa) {
        return RealmOutcome::ExternalAbort;
    }
    if realm.rtt.in_par(ipa) {
        return RealmOutcome::Exit(RecExit { esr: syndrome & esr::PLAIN, hpfar: hpfar(ipa), ..RecExit::default() });
    }
    let stored = if syndrome & esr::WNR == 0 { 0 } else { loaded(syndrome & !esr::SSE, register) };
    RealmOutcome::Exit(RecExit {
        esr: syndrome & esr::EMULATED,
        far: far & 0xfff,
        hpfar: hpfar(ipa),
        gprs: [stored, 0],
        ..RecExit::default()
    })
}

fn instruction_abort(realm: &Realm, syndrome: u64, ipa: u64) -> RealmOutcome {
    if is_realms_own(realm, ipa) || !realm.rtt.in_par(ipa) {
        return RealmOutcome::ExternalAbort;
    }
    let translation = syndrome & esr::FSC & !3 == esr::FSC_TRANSLATION;
    let told = if translation { (syndrome & esr::PLAIN, hpfar(ipa)) } else { (0, 0) };
    RealmOutcome::Exit(RecExit { esr: told.0, hpfar: told.1, ..RecExit::default() })
}
