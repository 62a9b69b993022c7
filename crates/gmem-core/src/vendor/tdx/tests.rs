use super::sept::{SeptFlags, SeptState as S};
use super::status::{Operand, TdxStatus as T};
use super::*;
use crate::addr::{Gfn, Level};
use crate::vendor::{
    Acceptance, AccessKind, Cause, Contents, ExitReason, GuestOutcome, HostOutcome, Mapping, Populate, PopulateKind,
    Side,
};
use alloc::vec::Vec;

mod properties;

const TDR: u64 = 0x4000_0000;
const BIG: u64 = 0x5000_0000;

/// A TD in a 1 GiB range, as small as the recordings' one.
fn td() -> Tdx {
    let memory = PfnRange::new(Pfn(TDR >> 12), Pfn(0x8000_0000 >> 12)).unwrap();
    let tables = PfnRange::new(Pfn(0x7000_0000 >> 12), Pfn(0x8000_0000 >> 12)).unwrap();
    Tdx::new(Config { memory, tdr: Pfn(TDR >> 12), tables, vcpus: 2, ..Config::default() })
}

fn page(n: u64) -> u64 {
    0x4010_0000 + (n << 12)
}

fn at(gpa: u64, level: u8) -> PageInfo {
    PageInfo::new(gpa, level)
}

/// A TD with tables down to `lowest` for address 0, in `op_state`.
fn with_tables(lowest: u8, op_state: OpState) -> Tdx {
    let mut td = td();
    td.set_op_state(op_state);
    for level in (lowest..=3).rev() {
        assert_eq!(td.sept_add(at(0, level), page(u64::from(level)), 0).status, T::SUCCESS);
    }
    td
}

fn state(td: &Tdx, gpa: u64, level: u8) -> S {
    let read = td.sept_read(at(gpa, level));
    assert_eq!(read.status, T::SUCCESS, "no entry at {gpa:#x} level {level}");
    S::ALL.into_iter().find(|state| u64::from(state.facts().public) == read.rdx >> 8).unwrap()
}

fn run(td: &mut Tdx, command: Command<'_>) -> T {
    td.execute(command).unwrap().status
}

#[test]
fn operands_are_checked_in_the_modules_order() {
    const SHARED: u64 = 1 << 47;
    let rcx = T::OPERAND_INVALID.about(Operand::Rcx);
    let r8 = T::OPERAND_INVALID.about(Operand::R8);
    let aug = |at, page| Command::PageAug { at, page };
    let rows = [
        (aug(at(SHARED, 0), page(9)), rcx),
        (aug(at(1 << 48, 0), page(9)), rcx),
        (aug(at(1 << 52, 0), page(9)), rcx),
        (aug(at(0x1000, 1), BIG), rcx),
        (aug(at(0x800, 0), page(9)), rcx),
        (aug(at(0, 2), page(9)), rcx),
        (aug(at(0x4000_0000, 0), page(9)), T::EPT_WALK_FAILED.about(Operand::Rcx)),
        (aug(at(0, 0), page(9) + 1), r8),
        (aug(at(0, 0), page(9) | 1 << 46), r8),
        (aug(at(0, 0), page(9) | 1 << 63), r8),
        (aug(at(0x20_0000, 1), page(9)), r8),
        (aug(at(0, 0), 0x8000_0000), T::OPERAND_ADDR_RANGE_ERROR.about(Operand::R8)),
        (aug(at(0, 0), 0x3fff_f000), T::OPERAND_ADDR_RANGE_ERROR.about(Operand::R8)),
        (aug(at(0, 0), TDR), T::OPERAND_BUSY.about(Operand::R8)),
        (aug(at(0x20_0000, 1), TDR), T::OPERAND_BUSY.about(Operand::R8)),
        (aug(at(0, 0), TDR + 0x1000), T::PAGE_METADATA_INCORRECT.about(Operand::R8)),
        (aug(at(0, 0), page(3)), T::PAGE_METADATA_INCORRECT.about(Operand::R8)),
        (aug(at(0x20_0000, 1), 0x4020_0000), T::SUCCESS),
        (aug(at(0, 0), 0x4020_1000), T::PAGE_METADATA_INCORRECT.about(Operand::R8)),
        (Command::SeptAdd { at: at(0, 0), page: page(9), version: 0 }, rcx),
        (Command::SeptAdd { at: at(0, 4), page: page(9), version: 0 }, rcx),
        (Command::SeptAdd { at: at(0, 1), page: page(9), version: 2 }, T::OPERAND_INVALID.about(Operand::Rax)),
        (Command::SeptAdd { at: at(0, 1), page: NULL_PA, version: 0 }, r8),
        (Command::SeptAdd { at: at(0, 1), page: NULL_PA, version: 1 }, T::SUCCESS),
        (
            Command::SeptAdd { at: at(0x40_0000, 1), page: NULL_PA, version: 1 },
            T::EPT_ENTRY_STATE_INCORRECT.about(Operand::Rcx),
        ),
        (
            Command::SeptAdd { at: at(0x40_0000, 1), page: page(3), version: 0 },
            T::PAGE_METADATA_INCORRECT.about(Operand::R8),
        ),
        (Command::PageAdd { at: at(0, 0), page: page(9), source: 0x10 }, T::OPERAND_INVALID.about(Operand::R9)),
        (Command::PageAdd { at: at(0, 0), page: 1, source: 0x10 }, T::OPERAND_INVALID.about(Operand::R9)),
        (Command::PageAdd { at: at(0, 0), page: 1, source: 0 }, r8),
        (Command::MrExtend { gpa: 0x80, chunk: &[0; 256] }, rcx),
        (Command::MrExtend { gpa: SHARED, chunk: &[0; 256] }, rcx),
        (Command::PageReclaim { page: 0x10 }, rcx),
        (Command::PageReclaim { page: 0 }, T::OPERAND_ADDR_RANGE_ERROR.about(Operand::Rcx)),
        (Command::PageReclaim { page: page(9) }, T::PAGE_METADATA_INCORRECT.about(Operand::Rcx)),
        (Command::PageReclaim { page: page(3) }, T::LIFECYCLE_STATE_INCORRECT),
        (Command::PageReclaim { page: 0x4020_1000 }, rcx),
        (Command::KeyFreeId, T::LIFECYCLE_STATE_INCORRECT),
    ];
    let mut td = with_tables(1, OpState::Initialized);
    for (command, expected) in rows {
        assert_eq!(run(&mut td, command), expected, "{command:?}");
    }
    assert_eq!(td.execute(Command::Other("TDH.EXPORT.MEM")), Err(NotModelled("TDH.EXPORT.MEM")));
}

#[test]
fn relocating_a_page_onto_itself_is_noticed_before_tracking() {
    let mut td = with_tables(1, OpState::Runnable);
    td.page_aug(at(0, 0), page(9));
    assert_eq!(td.page_relocate(at(0, 0), page(9)).status, T::OPERAND_INVALID.about(Operand::R8));
    assert_eq!(td.page_relocate(at(0, 0), page(10)).status, T::GPA_RANGE_NOT_BLOCKED.about(Operand::Rcx));
}

#[test]
fn the_td_comes_before_every_other_check() {
    let mut td = with_tables(1, OpState::Initialized);
    let bad = Command::PageAug { at: at(1 << 47, 7), page: 1 };
    td.set_op_state(OpState::PausedExport);
    assert_eq!(run(&mut td, bad), T::OP_STATE_INCORRECT);
    td.set_lifecycle(Lifecycle::Blocked);
    assert_eq!(run(&mut td, bad), T::TD_KEYS_NOT_CONFIGURED);
    td.set_fatal(true);
    assert_eq!(run(&mut td, bad), T::TD_FATAL);
    td.destroy();
    assert_eq!(run(&mut td, bad), T::PAGE_METADATA_INCORRECT.about(Operand::Rdx));
    assert_eq!(run(&mut td, Command::Track), T::PAGE_METADATA_INCORRECT.about(Operand::Rcx));
}

#[test]
fn tracking_waits_for_the_vcpu_that_entered_in_the_blocking_epoch() {
    let mut td = with_tables(1, OpState::Runnable);
    td.page_aug(at(0, 0), page(9));
    td.vcpu_enter(0).unwrap();
    td.range_block(at(0, 0));
    assert_eq!(td.track().status, T::SUCCESS);
    assert_eq!(td.page_remove(at(0, 0)).status, T::TLB_TRACKING_NOT_DONE.about(Operand::Rcx));
    assert_eq!(td.track().status, T::PREVIOUS_TLB_EPOCH_BUSY);
    td.vcpu_exit(0).unwrap();
    td.vcpu_enter(0).unwrap();
    assert_eq!(td.page_remove(at(0, 0)).rcx, page(9));
    assert_eq!(td.vcpu_enter(0), Err(VcpuError(0)));
    assert_eq!(td.vcpu_exit(1), Err(VcpuError(1)));
    assert_eq!(td.vcpu_enter(2), Err(VcpuError(2)));
}

#[test]
fn an_interrupted_accept_continues_and_a_block_makes_it_start_again() {
    let mut td = with_tables(2, OpState::Runnable);
    td.page_aug(at(0, 1), BIG);
    td.set_interrupt(Some(100));
    assert_eq!(td.page_accept(at(0, 1)), Accepted::Interrupted);
    let read = td.sept_read(at(0, 1));
    assert_eq!((read.rcx, read.rdx), (1 << 63 | BIG | 100 << 12 | 0xf0, 0x201));
    td.set_interrupt(Some(50));
    assert_eq!(td.page_accept(at(0, 1)), Accepted::Interrupted);
    assert_eq!(td.sept().entry(1, 0).accepted, 150);
    td.range_block(at(0, 1));
    td.track();
    td.range_unblock(at(0, 1));
    assert_eq!(td.sept().entry(1, 0).accepted, 0);
    td.set_interrupt(Some(512));
    assert_eq!(td.page_accept(at(0, 1)), Accepted::Returned(T::SUCCESS));
    assert_eq!(td.sept_read(at(0, 1)).rcx, 1 << 63 | BIG | 0xf7);
}

#[test]
fn an_accept_in_progress_keeps_the_host_out_and_then_the_host_comes_first() {
    let mut td = with_tables(1, OpState::Runnable);
    td.page_aug(at(0, 0), page(9));
    td.page_aug(at(0x1000, 0), page(10));
    let busy = T::OPERAND_BUSY.about(Operand::Rcx);
    td.page_accept_begin(at(0, 0)).unwrap();
    assert_eq!(td.page_accept(at(0, 0)), Accepted::Returned(busy), "another vCPU");
    assert_eq!(td.page_accept(at(0x1000, 0)), Accepted::Returned(T::SUCCESS), "another entry");
    assert_eq!(td.page_add(at(0, 0), page(11), 0).status, T::OP_STATE_INCORRECT);
    let before = td.clone();
    assert_eq!(td.sept_read(at(0, 0)).status, busy);
    assert_eq!(td, before);
    let blocked = td.range_block(at(0, 0));
    let entry = before.sept().entry(0, 0);
    assert_eq!((blocked.status, blocked.rcx, blocked.rdx), (busy, entry.visible(0), entry.info(0)));
    assert_eq!(td.sept(), before.sept());
    // The walk goes through the table's entry, which is not locked.
    assert_eq!(td.range_block(at(0, 1)).status, T::SUCCESS);
    assert_eq!(td.range_unblock(at(0, 1)).status, T::TLB_TRACKING_NOT_DONE.about(Operand::Rcx));
    td.track();
    assert_eq!(td.range_unblock(at(0, 1)).status, T::SUCCESS);
    assert_eq!(td.page_accept_end(at(0, 0)), Some(Accepted::Returned(T::SUCCESS)));
    assert_eq!(td.page_accept_end(at(0, 0)), None);
    assert_eq!(td.page_accept(at(0, 0)), Accepted::Returned(busy), "the host was refused and comes first");
    assert_eq!(td.range_block(at(0, 0)).status, T::SUCCESS);
    assert!(matches!(td.page_accept(at(0, 0)), Accepted::TdExit(_)), "the host has had its turn");
}

#[test]
fn what_the_guest_holds_is_not_promoted_or_split() {
    let busy = T::OPERAND_BUSY.about(Operand::Rcx);
    let mut td = with_tables(2, OpState::Runnable);
    td.page_aug(at(0, 1), BIG);
    td.page_accept_begin(at(0, 1)).unwrap();
    assert_eq!(td.page_demote(at(0, 1), page(9)).status, busy);
    assert_eq!(td.page_remove(at(0, 1)).status, busy);
    let mut td = with_tables(1, OpState::Runnable);
    (0..512).for_each(|n| assert_eq!(td.page_aug(at(n << 12, 0), BIG + (n << 12)).status, T::SUCCESS));
    td.page_accept_begin(at(7 << 12, 0)).unwrap();
    td.range_block(at(0, 1));
    td.track();
    assert_eq!(td.page_promote(at(0, 1), 0).status, busy);
    td.range_unblock(at(0, 1));
    assert_eq!(td.page_accept_end(at(7 << 12, 0)), Some(Accepted::Returned(T::SUCCESS)));
    let wanted = T::OPERAND_BUSY.about(Operand::Rcx);
    assert_eq!(td.page_accept(at(7 << 12, 0)), Accepted::Returned(wanted), "the host comes first");
    assert_eq!(td.page_accept(at(6 << 12, 0)), Accepted::Returned(T::SUCCESS));
}

#[test]
fn an_interrupt_makes_promote_and_demote_give_their_operands_back() {
    let mut td = with_tables(2, OpState::Runnable);
    td.page_aug(at(0, 1), BIG);
    td.range_block(at(0, 1));
    td.track();
    td.set_interrupt(Some(1));
    let before = td.sept().clone();
    let answer = td.page_demote(at(0, 1), page(9));
    assert_eq!((answer.status, answer.rcx, answer.rdx), (T::INTERRUPTED_RESTARTABLE, 1, TDR));
    assert_eq!(td.sept(), &before);
    assert_eq!(td.page_demote(at(0, 1), page(9)).status, T::SUCCESS);
}

#[test]
fn a_gigabyte_is_promoted_and_demoted_in_constant_memory() {
    let range = |start: u64, end: u64| PfnRange::new(Pfn(start), Pfn(end)).unwrap();
    let config = Config { memory: range(0, 1 << 20), tdr: Pfn(0), ..Config::default() };
    let mut td = Tdx::new(config);
    td.set_op_state(OpState::Runnable);
    assert_eq!(td.sept_add(at(0, 3), 0x10_0000, 0).status, T::SUCCESS);
    assert_eq!(td.sept_add(at(0, 2), 0x10_1000, 0).status, T::SUCCESS);
    for n in 0..512 {
        assert_eq!(td.page_aug(at(n << 21, 1), 0x8000_0000 + (n << 21)).status, T::SUCCESS);
        assert_eq!(td.page_accept(at(n << 21, 1)), Accepted::Returned(T::SUCCESS));
    }
    assert_eq!(td.sept().runs(1).count(), 1);
    td.range_block(at(0, 2));
    td.track();
    assert_eq!(td.page_promote(at(0, 2), 0).rcx, 0x10_1000);
    assert_eq!((state(&td, 0, 2), td.pamt().leaf(0x8_1234).0), (S::Mapped, 2));
    assert_eq!(td.child_pages(), 6 + 1 + 512 * 512);
    assert_eq!(td.page_accept(at(0x20_0000, 1)), Accepted::Returned(T::PAGE_ALREADY_ACCEPTED.at_level(2)));
    td.range_block(at(0, 2));
    td.track();
    assert_eq!(td.page_demote(at(0, 2), 0x10_1000).status, T::SUCCESS);
    assert_eq!(td.sept_read(at(0x3fe0_0000, 1)).rcx, 1 << 63 | 0xbfe0_00f7);
    td.range_block(at(0x20_0000, 1));
    td.track();
    assert_eq!(td.page_demote(at(0x20_0000, 1), 0x10_2000).status, T::SUCCESS);
    assert!(td.sept().runs(1).count() <= 3 && td.pamt().runs(1, 0, u64::MAX).count() <= 3);
}

#[test]
fn removing_during_an_import_leaves_a_mark_that_aug_accepts() {
    let mut td = with_tables(1, OpState::Runnable);
    td.page_aug(at(0, 0), page(9));
    td.set_op_state(OpState::PostImport);
    assert_eq!(td.page_remove(at(0, 0)).rcx, page(9));
    assert_eq!(state(&td, 0, 0), S::Removed);
    td.set_op_state(OpState::LiveImport);
    assert_eq!(td.page_aug(at(0, 0), page(9)).status, T::SUCCESS);
}

#[test]
fn a_td_of_52_address_bits_has_five_levels_and_its_shared_bit_at_51() {
    let mut td = Tdx::new(Config { gpa_width: GpaWidth::Bits52, ..*td().config() });
    assert_eq!(td.sept_add(at(1 << 48, 4), page(1), 0).status, T::SUCCESS);
    assert_eq!(td.sept_add(at(1 << 48, 3), page(2), 0).status, T::SUCCESS);
    assert_eq!(td.sept_read(at(1 << 51, 0)).status, T::OPERAND_INVALID.about(Operand::Rcx));
}

#[test]
fn teardown_reclaims_every_page_and_the_root_last() {
    let mut td = with_tables(1, OpState::Runnable);
    td.page_aug(at(0, 0), page(9));
    td.page_aug(at(0x20_0000, 1), BIG);
    td.vcpu_enter(0).unwrap();
    assert_eq!(td.vp_flush_done().status, T::FLUSHVP_NOT_DONE);
    td.vcpu_exit(0).unwrap();
    assert_eq!((td.vp_flush_done().status, td.key_free_id().status), (T::SUCCESS, T::SUCCESS));
    assert_eq!(td.page_reclaim(TDR).status, T::TD_ASSOCIATED_PAGES_EXIST);
    let children = (1..=6).map(|n| TDR + (n << 12)).chain([1, 2, 3, 9].map(page)).chain([BIG]);
    for child in children {
        let answer = td.page_reclaim(child);
        assert_eq!((answer.status, answer.rdx, answer.r8), (T::SUCCESS, TDR, u64::from(child == BIG)), "{child:#x}");
    }
    assert_eq!(td.child_pages(), 0);
    assert_eq!(td.page_reclaim(TDR).rcx, PageType::Tdr as u64);
    assert_eq!(td.page_reclaim(TDR).status, T::PAGE_METADATA_INCORRECT.about(Operand::Rcx));
}

#[test]
fn finalizing_needs_a_vcpu_and_closes_the_measurement() {
    let mut td = with_tables(1, OpState::Initialized);
    td.page_add(at(0, 0), page(9), 0);
    td.mr_extend(0x100, &[7; 256]);
    td.set_vcpus(0);
    assert_eq!(td.mr_finalize().status, T::NO_VCPUS);
    td.set_vcpus(1);
    assert_eq!(td.mr_finalize().status, T::SUCCESS);
    let mut mrtd = Mrtd::new();
    mrtd.page_add(0);
    mrtd.extend(0x100, &[7; 256]);
    assert_eq!(td.measurement(), &Measurement::Final(mrtd.digest()));
    assert_eq!(td.mr_finalize().status, T::OP_STATE_INCORRECT);
}

// ---- verbs ----

fn mapping(gfn: u64, pfn: u64) -> Mapping {
    Mapping { gfn: Gfn(gfn), pfn: Pfn(pfn), level: Level::Page4K, side: Side::Private }
}

fn populated(page: &[u8; 4096]) -> Tdx {
    let mut td = Tdx::default();
    let measured = Populate { source: Some(page), kind: PopulateKind::Measured };
    td.populate(Gfn(3), Pfn(30), measured).unwrap();
    td
}

#[test]
fn what_is_populated_is_what_is_measured() {
    let mut td = populated(&[5; 4096]);
    let page = &[6; 4096];
    let refused = |result: Result<(), crate::vendor::Refusal>| result.unwrap_err().cause;
    let populate = |source, kind| Populate { source, kind };
    let (measured, unmeasured) = (PopulateKind::Measured, PopulateKind::Unmeasured);
    assert_eq!(refused(td.populate(Gfn(3), Pfn(31), populate(Some(page), measured))), Cause::Exists);
    assert_eq!(refused(td.populate(Gfn(4), Pfn(31), populate(None, measured))), Cause::NotSupported);
    assert_eq!(refused(td.populate(Gfn(4), Pfn(31), populate(Some(page), PopulateKind::Secrets))), Cause::NotSupported);
    assert_eq!(refused(td.populate(Gfn(1 << 35), Pfn(31), populate(Some(page), measured))), Cause::Invalid);
    td.populate(Gfn(4), Pfn(31), populate(Some(page), unmeasured)).unwrap();
    assert!(!td.prefault_allowed());
    td.finalize().unwrap();
    let mut mrtd = Mrtd::new();
    mrtd.page(0x3000, Some(&[5; 4096]));
    mrtd.page(0x4000, None);
    assert_eq!(td.measurement(), &Measurement::Final(mrtd.digest()));
    assert!(td.prefault_allowed());
    assert_eq!(refused(td.finalize()), Cause::Invalid);
    assert_eq!(refused(td.populate(Gfn(5), Pfn(32), populate(Some(page), unmeasured))), Cause::Invalid);
    assert!(!td.is_dead());
}

#[test]
fn an_unmap_loses_the_page_and_the_guest_must_accept_again() {
    let mut td = populated(&[5; 4096]);
    td.finalize().unwrap();
    td.vcpu_enter(0).unwrap();
    let page = mapping(3, 30);
    assert_eq!(td.guest_access(page, AccessKind::Load), GuestOutcome::Done);
    assert_eq!(td.host_access(Pfn(30), AccessKind::Load), HostOutcome::Ciphertext);
    assert_eq!(td.host_access(Pfn(30), AccessKind::Store), HostOutcome::MachineCheck);
    assert_eq!(td.unmap(page), Contents::Undefined);
    assert_eq!(td.host_access(Pfn(30), AccessKind::Load), HostOutcome::Plain);
    assert_eq!(td.guest_access(page, AccessKind::Load), GuestOutcome::Exit(ExitReason::NotPresent));
    td.map(mapping(3, 40)).unwrap();
    assert_eq!(td.guest_accept(page, Acceptance::Accept), GuestOutcome::Done);
    assert_eq!(td.guest_access(page, AccessKind::Store), GuestOutcome::Done);
    assert_eq!(td.unmap(mapping(3, 40)), Contents::Undefined);
    assert!(!td.is_dead());
}

#[test]
fn kvm_tries_again_what_met_a_lock() {
    let mut td = Tdx::default();
    td.finalize().unwrap();
    td.vcpu_enter(0).unwrap();
    let page = mapping(3, 30);
    td.map(page).unwrap();
    td.page_accept_begin(at(3 << 12, 0)).unwrap();
    let same = td.map(mapping(3, 31)).unwrap_err();
    assert_eq!((same.cause, td.is_dead()), (Cause::Busy, false), "a fault is tried again");
    // The vCPU is kicked, and its instruction ends, for nothing.
    assert_eq!(td.unmap(page), Contents::Undefined);
    assert!(!td.is_dead());
    assert_eq!(td.page_accept_end(at(3 << 12, 0)), None);
    assert_eq!(td.guest_access(page, AccessKind::Load), GuestOutcome::Exit(ExitReason::NotPresent));
    assert_eq!(td.host_access(Pfn(30), AccessKind::Store), HostOutcome::Plain);
}

#[test]
fn a_kicked_vcpu_leaves_a_large_page_half_accepted() {
    let mut td = with_tables(2, OpState::Runnable);
    td.page_aug(at(0, 1), BIG);
    td.page_accept_begin(at(0, 1)).unwrap();
    td.end_accepts();
    assert_eq!((state(&td, 0, 1), td.sept().entry(1, 0).accepted), (S::Pending, 1));
}

#[test]
fn touching_a_pending_page_kills_the_vm_or_the_guest_is_told() {
    for (pending_access, dead) in [(PendingAccess::TdExit, true), (PendingAccess::VirtualizationException, false)] {
        let mut td = Tdx::new(Config { pending_access, ..Config::default() });
        td.finalize().unwrap();
        td.map(mapping(3, 30)).unwrap();
        let outcome = td.guest_access(mapping(3, 30), AccessKind::Load);
        assert_eq!(outcome == GuestOutcome::Exit(ExitReason::PendingTd), dead);
        assert_eq!(td.is_dead(), dead);
    }
}

#[test]
fn what_kvm_does_not_expect_kills_the_vm() {
    type Bug = fn(&mut Tdx);
    let bugs: [(&str, Bug); 5] = [
        ("unmap of nothing", |td| assert_eq!(td.unmap(mapping(9, 90)), Contents::Kept)),
        ("map of a mapped page", |td| assert!(td.map(mapping(3, 50)).is_err())),
        ("map of a page in use", |td| assert!(td.map(mapping(5, 30)).is_err())),
        ("map of 2 MiB", |td| {
            assert!(td.map(Mapping { level: Level::Page2M, ..mapping(512, 512) }).is_err());
        }),
        ("finalize without a vCPU", |td| {
            *td = Tdx::new(Config { vcpus: 0, ..Config::default() });
            assert_eq!(td.finalize().unwrap_err().cause, Cause::VmDead);
        }),
    ];
    for (name, bug) in bugs {
        let mut td = populated(&[0; 4096]);
        bug(&mut td);
        assert!(td.is_dead(), "{name}");
        assert_eq!(td.map(mapping(6, 60)).unwrap_err().cause, Cause::VmDead, "{name}");
    }
}

#[test]
fn tables_come_from_their_pool_and_run_out() {
    let tables = PfnRange::with_len(Pfn(0x1000), 3).unwrap();
    let mut td = Tdx::new(Config { tables, ..Config::default() });
    td.map(mapping(0, 1)).unwrap();
    td.map(mapping(1, 2)).unwrap();
    assert_eq!(td.map(mapping(512, 3)).unwrap_err().cause, Cause::NoMemory);
    assert!(!td.is_dead());
    assert_eq!(td.child_pages(), 6 + 3 + 2);
}

#[test]
fn a_td_page_must_not_leave_the_file_and_destroying_frees_all() {
    let mut td = populated(&[0; 4096]);
    let range = PfnRange::with_len(Pfn(25), 10).unwrap();
    assert_eq!(td.reclaim(range), Contents::Undefined);
    td.destroy();
    assert_eq!(td.reclaim(range), Contents::Kept);
    assert_eq!(td.host_access(Pfn(30), AccessKind::Store), HostOutcome::Plain);
    assert_eq!((td.lifecycle(), td.child_pages(), td.is_dead()), (Lifecycle::Teardown, 0, true));
}

#[test]
fn uniform_memory_is_one_run() {
    let mut td = with_tables(1, OpState::Runnable);
    for n in 0..512 {
        assert_eq!(td.page_aug(at(n << 12, 0), BIG + (n << 12)).status, T::SUCCESS);
    }
    assert_eq!(td.sept().runs(0).count(), 1);
    assert_eq!(td.pamt().runs(0, BIG >> 12, 512).collect::<Vec<_>>().len(), 1);
}
