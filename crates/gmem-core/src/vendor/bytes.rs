//! Arbitrary bytes as commands, one entry per architecture: what fuzzers and random tests call.
//!
//! Each entry decodes the bytes to commands on a small machine, where addresses meet, and runs them. Every input is
//! legal. A refused command must change nothing; the first that does is the [`Violation`]. SNP commands are values and are
//! decoded by [`super::snp::command`].

use alloc::vec::Vec;

use super::AccessKind;
use super::cca::{Platform, RealmParams, RealmStep, RecEntry, RecParams, Reply, Rmm, RmmVersion, Source};
use super::pkvm::{El2, Error, VmHandle};
use super::sev::{Sev, SevKind};
use super::snp::command::Command as SnpCommand;
use super::snp::firmware::Machine;
use super::tdx::{Accepted, Command as TdxCommand, Config, PageInfo, Tdx};
use crate::addr::{Gfn, Level, PageRange, Pfn, PfnRange};
use crate::measure::cca::RecParams as BootState;

/// A refused command that changed something: how many commands came before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Commands before the one that was refused.
    pub after: usize,
}

/// Runs commands while there are bytes; `run` says whether a command was done. Returns how many were.
fn drive<M: Clone + PartialEq>(
    mut machine: M,
    bytes: &[u8],
    mut run: impl FnMut(&mut M, [u8; 4]) -> bool,
) -> Result<usize, Violation> {
    let mut done = 0;
    for (after, bytes) in bytes.as_chunks().0.iter().enumerate() {
        let before = machine.clone();
        if run(&mut machine, *bytes) {
            done += 1;
        } else if machine != before {
            return Err(Violation { after });
        }
    }
    Ok(done)
}

fn memory(pages: u64) -> PfnRange {
    PfnRange::with_len(Pfn(0), pages).unwrap_or(PfnRange::page(Pfn(0)))
}

/// SNP: RMP, firmware and guest instructions. A restart of the firmware is two commands and may end between them.
///
/// # Errors
/// [`Violation`].
pub fn snp(bytes: &[u8]) -> Result<usize, Violation> {
    let mut machine = Machine::new(memory(2048));
    let mut done = 0;
    for (after, bytes) in bytes.as_chunks().0.iter().enumerate() {
        let (command, before) = (SnpCommand::decode(*bytes), machine.clone());
        if command.apply(&mut machine).is_ok() {
            done += 1;
        } else if machine != before && !matches!(command, SnpCommand::Restart(_)) {
            return Err(Violation { after });
        }
    }
    Ok(done)
}

/// TDX: SEAMCALL leaves, ACCEPT, vCPU entry and exit.
///
/// # Errors
/// [`Violation`].
pub fn tdx(bytes: &[u8]) -> Result<usize, Violation> {
    let config =
        Config { memory: memory(4096), tdr: Pfn(4000), tables: PageRange::page(Pfn(4095)), ..Config::default() };
    drive(Tdx::new(config), bytes, tdx_command)
}

fn tdx_command(td: &mut Tdx, [op, place, page, extra]: [u8; 4]) -> bool {
    let level = (place >> 6).min(if extra & 0x80 == 0 { 1 } else { 3 });
    let gfn = [0, 1, 511, 512][usize::from(place & 3)] | u64::from(place & 0x3c == 0x3c) << 35;
    let at = PageInfo::new(Gfn(gfn >> (9 * level) << (9 * level)).gpa(), level);
    let hpa = [1024, 1025, 1536, 2048, 2049, 2050, 2051, 4000][usize::from(page & 7)] << 12 | u64::from(page == 0xff);
    let version = extra % 3;
    let command = match op % 20 {
        0 | 1 => TdxCommand::SeptAdd { at, page: hpa, version },
        2 => TdxCommand::SeptRemove { at, version },
        3 => TdxCommand::PageAdd { at, page: hpa, source: 0 },
        4..7 => TdxCommand::PageAug { at, page: hpa },
        7 => TdxCommand::PageRemove { at },
        8 => TdxCommand::PagePromote { at, version },
        9 => TdxCommand::PageDemote { at, page: hpa },
        10 => TdxCommand::PageRelocate { at, page: hpa },
        11 => TdxCommand::RangeBlock { at },
        12 => TdxCommand::RangeUnblock { at },
        13 => TdxCommand::Track,
        14 => TdxCommand::MrExtend { gpa: Gfn(gfn).gpa() | u64::from(extra) << 8, chunk: &[1; 256] },
        15 if extra < 16 => TdxCommand::MrFinalize,
        15 => TdxCommand::SeptRead { at },
        16 => return matches!(td.page_accept(at), Accepted::Returned(status) if !status.is_error()),
        17 => return td.vcpu_enter(u16::from(extra & 3)).is_ok(),
        18 => return td.vcpu_exit(u16::from(extra & 3)).is_ok(),
        _ if extra == 0 => TdxCommand::VpFlushDone,
        _ if extra == 1 => TdxCommand::KeyFreeId,
        _ => TdxCommand::PageReclaim { page: hpa },
    };
    td.execute(command).is_ok_and(|answer| !answer.status.is_error())
}

const GRANULE: u64 = 4096;
const RD: u64 = GRANULE;
const REC: u64 = 30 * GRANULE;
/// A granule of the host for parameters.
const PARAMS: u64 = 100 * GRANULE;

/// CCA: RMI commands and steps of the realm. A step may fail half-way, as an exit does; only RMI commands are compared.
///
/// # Errors
/// [`Violation`].
pub fn cca(bytes: &[u8]) -> Result<usize, Violation> {
    let Ok(mut rmm) = Rmm::new(RmmVersion::V1_0, Platform::fake_host(memory(4096))) else { return Ok(0) };
    for granule in (1..40).chain(40..56) {
        rmm.granule_delegate(granule * GRANULE);
    }
    drive(rmm, bytes, |rmm, [op, ipa, granule, extra]| {
        let ipa =
            ([0, 1, 2, 511, 512, 1 << 18, 1 << 26, 1 << 27][usize::from(ipa & 7)] * GRANULE) | u64::from(ipa == 0xff);
        let granule = ((u64::from(granule % 64) + 1) * GRANULE) | u64::from(granule == 0xff);
        cca_command(rmm, op, ipa, granule, u64::from(extra))
    })
}

fn cca_command(rmm: &mut Rmm, op: u8, ipa: u64, granule: u64, extra: u64) -> bool {
    let (level, top) = (extra & 3, ipa.saturating_add((extra >> 2) * GRANULE));
    let reply: Reply = match op % 22 {
        0 => rmm.granule_delegate(granule),
        1 => rmm.granule_undelegate(granule),
        2 | 3 => {
            rmm.rtt_create(RD, granule, ipa >> (12 + 9 * (4 - level.max(1))) << (12 + 9 * (4 - level.max(1))), level)
        }
        4 => rmm.rtt_destroy(RD, ipa, level),
        5 => rmm.rtt_fold(RD, ipa, level),
        6 => rmm.data_create(RD, granule, ipa, Source { address: PARAMS, content: &[7; 4096], flags: extra & 3 }),
        7..10 => rmm.data_create_unknown(RD, granule, ipa),
        10 => rmm.data_destroy(RD, ipa),
        11 => rmm.rtt_init_ripas(RD, ipa, top),
        12 => rmm.rtt_set_ripas(RD, REC, ipa, top),
        13 => rmm.rtt_map_unprotected(RD, ipa, level, granule | (extra & 0xfc)),
        14 => rmm.rtt_unmap_unprotected(RD, ipa, level),
        15 => rmm.realm_create(RD, PARAMS, &realm_params(extra)),
        16 => rmm.rec_create(RD, REC, PARAMS, &rec_params(extra)),
        17 if extra < 64 => rmm.realm_activate(RD),
        17 | 18 => rmm.rec_enter(REC, PARAMS, RecEntry::default()),
        19 if extra < 8 => rmm.rec_destroy(REC),
        20 if extra < 8 => rmm.realm_destroy(RD),
        _ => {
            // What the realm does is no command that could be refused.
            let _ = rmm.realm_step(REC, realm_step(ipa, top, extra));
            return true;
        }
    };
    reply.is_success()
}

fn realm_params(extra: u64) -> RealmParams {
    let start = if extra & 0x40 == 0 { 1 } else { extra & 3 };
    RealmParams {
        flags: u64::from(extra == 0xff),
        s2sz: 39,
        sve_vl: 0,
        num_bps: 1,
        num_wps: 1,
        pmu_num_ctrs: 0,
        hash_algo: (extra >> 2) & 1,
        vmid: 1,
        rtt_base: 2 * GRANULE,
        rtt_level_start: i64::try_from(start).unwrap_or(0),
        rtt_num_start: 1,
    }
}

fn rec_params(extra: u64) -> RecParams {
    let aux: Vec<u64> = (40..56).map(|granule| granule * GRANULE).collect();
    RecParams { boot: BootState { flags: u64::from(extra & 7 != 0), pc: 0, gprs: [0; 8] }, mpidr: extra >> 7, aux }
}

fn realm_step(ipa: u64, top: u64, extra: u64) -> RealmStep {
    if extra & 1 == 0 {
        return RealmStep::Sync { esr: 0x9000_0007, ipa, far: 0 };
    }
    let mut smc = [0; 11];
    smc[..5].copy_from_slice(&[0xc400_0197, ipa, top, extra >> 1 & 3, extra >> 3 & 1]);
    RealmStep::Smc(smc)
}

/// pKVM: what host, hypervisor and two guests ask of EL2.
///
/// # Errors
/// [`Violation`].
pub fn pkvm(bytes: &[u8]) -> Result<usize, Violation> {
    let mut el2 = El2::new(memory(2048));
    el2.create_vm(VmHandle(1));
    drive(el2, bytes, |el2, bytes| pkvm_call(el2, bytes).is_ok())
}

fn pkvm_call(el2: &mut El2, [op, pfn, gfn, extra]: [u8; 4]) -> Result<(), Error> {
    let vm = VmHandle(if extra & 7 == 7 { 2 } else { 1 });
    let level = if extra & 0x18 == 0x18 { Level::Page2M } else { Level::Page4K };
    let pick = |byte: u8| [0, 1, 2, 512, 513, 1024, 2047, 2048][usize::from(byte & 7)];
    let (pfn, gfn) = (Pfn(pick(pfn)), Gfn(pick(gfn)));
    let pages = PfnRange::with_len(pfn, u64::from(extra >> 5) + 1).unwrap_or(PageRange::page(pfn));
    match op % 18 {
        0 => el2.host_share_hyp(pfn),
        1 => el2.host_unshare_hyp(pfn),
        2 => el2.host_donate_hyp(pages),
        3 => el2.hyp_donate_host(pages),
        4 => el2.hyp_pin_shared_mem(pages),
        5 => {
            el2.hyp_unpin_shared_mem(pages);
            Ok(())
        }
        6 => el2.host_share_ffa(pages),
        7 => el2.host_unshare_ffa(pages),
        8..10 => el2.host_donate_guest(pfn, gfn, vm),
        10 => el2.host_share_guest(pfn, gfn, level, vm),
        11 => el2.host_unshare_guest(gfn, level, vm),
        12 => el2.guest_share_host(vm, gfn),
        13 => el2.guest_unshare_host(vm, gfn),
        14 => el2.host_reclaim_page_guest(gfn, vm).map(|_| ()),
        15 => el2.host_force_reclaim_page_guest(pfn),
        16 => el2.destroy_vm(vm),
        _ => {
            if el2.create_vm(vm) {
                Ok(())
            } else {
                Err(Error::Busy)
            }
        }
    }
}

/// SEV and SEV-ES: launch commands, pinning, accesses of both sides.
///
/// # Errors
/// [`Violation`].
pub fn sev(bytes: &[u8]) -> Result<usize, Violation> {
    let kind = if bytes.len() & 4 == 0 { SevKind::Sev } else { SevKind::SevEs };
    drive(Sev::new(kind), bytes, |sev, [op, pfn, len, extra]| {
        let pages = PfnRange::with_len(Pfn(u64::from(pfn)), u64::from(len) + 1).unwrap_or(PageRange::page(Pfn(0)));
        let write = if extra & 1 == 0 { AccessKind::Load } else { AccessKind::Store };
        match op % 10 {
            0 => sev.launch_start().is_ok(),
            1 | 2 => sev.launch_update_data(pages, &[extra; 16]).is_ok(),
            3 => sev.launch_update_vmsa(&[extra; 4096]).is_ok(),
            4 if extra < 32 => sev.launch_measure().is_ok(),
            5 if extra < 32 => sev.finalize().is_ok(),
            6 => sev.register_region(pages).is_ok(),
            7 => sev.unregister_region(pages).is_ok(),
            8 => {
                sev.reclaim(pages);
                true
            }
            9 if extra == 9 => {
                sev.destroy();
                true
            }
            _ => {
                let _ = sev.host_access(pages.start(), write);
                true
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effort::{cases, few};
    use proptest::prelude::*;

    type Entry = fn(&[u8]) -> Result<usize, Violation>;
    const ENTRIES: [(&str, Entry); 5] = [("snp", snp), ("tdx", tdx), ("cca", cca), ("pkvm", pkvm), ("sev", sev)];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases(64)))]
        #[test]
        fn refused_commands_change_nothing(bytes in prop::collection::vec(any::<u8>(), 0..few(40, 1600))) {
            for (name, entry) in ENTRIES {
                prop_assert!(entry(&bytes).is_ok(), "{}: {:?}", name, entry(&bytes));
            }
        }
    }

    /// A decoder whose commands are all refused would test nothing.
    #[test]
    fn commands_meet() {
        let mut state = 1u64;
        let bytes: Vec<u8> = (0..few(160, 20_000))
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state.to_le_bytes()[5]
            })
            .collect();
        for (name, entry) in ENTRIES {
            let done = entry(&bytes).unwrap();
            assert!(done > bytes.len() / 8 / 50, "{name}: only {done} commands were done");
        }
    }
}
