//! The least time that an operation takes: of many short batches, the fastest. Other work on the machine can disturb most
//! of the batches and hardly all of them, so these numbers mean something on a busy machine too. The tables in `docs/` are
//! made of them.
//!
//! `cargo bench -p gmem-core --bench least -- WORD` measures what has the word in its name. The heap asks for huge pages, as that of
//! `gmem run` does; with `GLIBC_TUNABLES=` it does not.

use gmem_core::Vm;
use gmem_core::addr::{Gfn, Level, PAGE_SIZE, PageRange, Pfn, PfnRange};
use gmem_core::arch::Arch;
use gmem_core::file::FileFlags;
use gmem_core::ops::{self, Access, Claim, FileClaim, Origin, SetAttributes, SetRegion};
use gmem_core::page_set::PageSet;
use gmem_core::runs::{Linear, RunMap};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor::Side;
use gmem_core::vendor::cca::{Cca, Config, Platform, RealmParams, Rmm, RmmVersion};
use gmem_core::vendor::pkvm::{El2, VmHandle};
use gmem_core::vendor::snp::guest::{Caller, Translation, Validation};
use gmem_core::vendor::snp::rmp::{Asid, Rmp, RmpSize, RmpUpdate};
use gmem_core::vendor::tdx::status::TdxStatus;
use gmem_core::vendor::tdx::tables::OpState;
use gmem_core::vendor::tdx::{PageInfo, Tdx};
use gmem_core::vm::Rules;
use std::hint::black_box;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Instant;

const BATCHES: u32 = 1000;
const BATCH: u32 = 500;
const GIB: u64 = 1 << 18;
const TIB: u64 = 1 << 28;
const PAGE: u64 = PAGE_SIZE;

/// Prints the least time of one of the `commands` that a call of `run` is.
fn least(name: &str, commands: u32, mut run: impl FnMut()) {
    least_with(name, commands, &mut || 0, |_| run());
}

/// The same of a `run` that takes numbers, which are drawn before its time begins.
fn least_with(name: &str, commands: u32, draw: &mut impl FnMut() -> u64, mut run: impl FnMut(u64)) {
    let wanted = std::env::args().skip(1).filter(|word| !word.starts_with('-')).all(|word| name.contains(&word));
    if !wanted {
        return;
    }
    let mut numbers = [0; BATCH as usize];
    let mut batch = || {
        numbers.fill_with(&mut *draw);
        let start = Instant::now();
        numbers.iter().for_each(|&number| run(number));
        start.elapsed()
    };
    (0..4).for_each(|_| see(batch()));
    let best = (0..BATCHES).map(|_| batch()).min().unwrap_or_default();
    println!("| {name} | {:.1} ns |", best.as_nanos() as f64 / f64::from(BATCH * commands));
}

/// Looks at a result, and lets it go.
fn see<T>(value: T) {
    black_box(value);
}

/// Numbers below `limit`, without order.
fn random(limit: u64) -> impl FnMut() -> u64 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 32) * limit) >> 32
    }
}

/// The page of a 2 MiB block that differs from the others.
fn odd(block: u64) -> u64 {
    block * 512 + (block * 7919 + 13) % 512
}

fn page_set() {
    let set = PageSet::with_capacity(TIB, false);
    let (mut page, mut block) = (random(TIB), random(TIB / 512));
    least_with("set: look up, 1 TiB uniform", 1, &mut page, |page| see(set.get(page)));
    least("set: change and back, 1 TiB uniform", 2, || {
        set.set(TIB / 2 + 77, 1, true);
        set.set(TIB / 2 + 77, 1, false);
    });
    let mut value = false;
    least("set: change 1 TiB but for its first and last page", 1, || {
        value = !value;
        set.set(1, TIB - 2, value);
    });
    set.set(0, TIB, false);
    least("set: give 1 GiB two odd pages, which takes a bitmap, and one value again", 1, || {
        set.set(GIB + 5, 1, true);
        set.set(GIB + 7, 1, true);
        set.set(GIB, GIB, false);
    });
    let set = PageSet::with_capacity(TIB, false);
    (0..TIB / 512).for_each(|block| set.set(odd(block), 1, true));
    println!("one odd page in each 2 MiB of 1 TiB: {} bytes", set.heap_bytes());
    least_with("set: look up, one odd page in each 2 MiB", 1, &mut page, |page| see(set.get(page)));
    least_with("set: whether 2 MiB are alike, one odd page in each", 1, &mut block, |block| {
        see(set.uniform(block * 512, 512));
    });
    least_with("set: whether 1 GiB is alike, one odd page in each 2 MiB", 1, &mut page, |page| {
        see(set.uniform(page & !(GIB - 1), GIB));
    });
    least_with("set: clear the odd page of a block and set it", 2, &mut block, |block| {
        let page = odd(block);
        set.set(page, 1, false);
        set.set(page, 1, true);
    });
    least_with("set: set the page beside the odd page and clear it", 2, &mut block, |block| {
        let page = odd(block) ^ 1;
        set.set(page, 1, true);
        set.set(page, 1, false);
    });
    (0..TIB).step_by(2).for_each(|page| set.set(page, 1, true));
    println!("every other page of 1 TiB: {} bytes", set.heap_bytes());
    let mut near = random(TIB / 64);
    least_with("set: whether 2 MiB are alike, every other page", 1, &mut block, |block| {
        see(set.uniform(block * 512, 512));
    });
    let mut near_block = random(TIB / 512 / 64);
    least_with("set: whether 2 MiB are alike, every other page, within 16 GiB", 1, &mut near_block, |block| {
        see(set.uniform(block * 512, 512));
    });
    least_with("set: look up, every other page, within 16 GiB", 1, &mut near, |page| see(set.get(page)));
    least_with("set: look up, every other page", 1, &mut page, |page| see(set.get(page)));
    least_with("set: random pages to random values, within 16 GiB", 1, &mut near, |page| {
        set.set(page, 1, page & 2 != 0);
    });
    least_with("set: random pages to random values", 1, &mut page, |page| {
        set.set(page, 1, page & 2 != 0);
    });
}

/// The most that memory allows where pages differ without any order: a bitmap.
fn bitmap() {
    let mut bits = vec![0u64; (TIB / 64) as usize];
    let (mut page, mut near) = (random(TIB), random(TIB / 64));
    (0..bits.len()).for_each(|word| bits[word] = word as u64 * 0x9e37_79b9_7f4a_7c15);
    least_with("bitmap to compare with: look up, within 16 GiB", 1, &mut near, |page| {
        black_box(bits[(page / 64) as usize] >> (page % 64) & 1);
    });
    least_with("bitmap to compare with: look up", 1, &mut page, |page| {
        black_box(bits[(page / 64) as usize] >> (page % 64) & 1);
    });
    least_with("bitmap to compare with: random pages to random values", 1, &mut page, |page| {
        let word = &mut bits[(page / 64) as usize];
        *word = (*word & !(1 << (page % 64))) | (page >> 1 & 1) << (page % 64);
    });
}

fn set_attributes(vm: &mut Vm, start: u64, pages: u64, side: Side) {
    let range = PageRange::with_len(Gfn(start), pages).expect("a range");
    ops::run(&mut SetAttributes::new(range, side), vm, |_, _, action| see(action));
}

/// A VM whose first pages are bound to a file and private.
fn private_vm(pages: u64) -> Vm {
    let mut vm = Vm::new(Arch::SwProtected, Rules::default());
    let file = vm.create_file(pages * PAGE, 0, FileFlags::empty()).expect("valid");
    let claim = Claim {
        slot: 0,
        flags: SlotFlags::GUEST_MEMFD.bits(),
        guest_phys_addr: 0,
        memory_size: pages * PAGE,
        userspace_addr: 0,
        file: FileClaim::File(file),
        guest_memfd_offset: 0,
    };
    ops::run(&mut SetRegion::new(claim), &mut vm, |_, _, _| {}).expect("valid");
    set_attributes(&mut vm, 0, pages, Side::Private);
    vm
}

fn vm() {
    let mut vm = private_vm(TIB);
    let mut gfn = random(TIB);
    least_with("vm: attribute, 1 TiB private", 1, &mut gfn, |gfn| see(vm.attribute(Gfn(gfn))));
    least_with("vm: view, 1 TiB private", 1, &mut gfn, |gfn| see(vm.view(Gfn(gfn))));
    (0..TIB / 512).for_each(|block| set_attributes(&mut vm, odd(block), 1, Side::Shared));
    least_with("vm: attribute, one shared page in each 2 MiB", 1, &mut gfn, |gfn| see(vm.attribute(Gfn(gfn))));
    least_with("vm: view, one shared page in each 2 MiB", 1, &mut gfn, |gfn| see(vm.view(Gfn(gfn))));
    let mut side = Side::Private;
    least_with("vm: convert a random page with a slot", 1, &mut gfn, |gfn| {
        side = side.other();
        set_attributes(&mut vm, gfn, 1, side);
    });
    let mut vm = private_vm(16 * GIB);
    let mut near = random(16 * GIB);
    least_with("vm: private fault on a random page of 16 GiB", 1, &mut near, |page| {
        let access = Access { gfn: Gfn(page), claimed: Side::Private };
        let _ = black_box(ops::run(&mut ops::Fault::new(access, Origin::Guest), &mut vm, |_, _, action| see(action)));
    });
    least("vm: make one, create a file of 64 TiB", 1, || {
        let mut vm = Vm::new(Arch::SwProtected, Rules::default());
        let _ = black_box(vm.create_file(64 << 40, 0, FileFlags::empty()));
    });
    for (name, start, pages) in [("1 TiB", 0, TIB), ("1 TiB but for its edges", 1, TIB - 2)] {
        least(&format!("vm: make one, mark {name} private"), 1, || {
            let mut vm = Vm::new(Arch::SwProtected, Rules::default());
            set_attributes(&mut vm, start, pages, Side::Private);
            black_box(&vm);
        });
        let mut vm = Vm::new(Arch::SwProtected, Rules::default());
        set_attributes(&mut vm, start, pages, Side::Private);
        println!("{name} private: {} bytes", vm.attribute_heap_bytes());
    }
}

#[derive(Clone, PartialEq, Eq)]
struct Mapped(u64);

impl Linear for Mapped {
    fn advance(&self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages))
    }
}

fn runs() {
    let mut map = RunMap::new();
    (0..100_000u64).for_each(|run| map.insert(run * 16, 8, Mapped(run << 32)));
    let mut page = random(1_600_000);
    least_with("runs: look up, of 100,000", 1, &mut page, |page| see(map.get(page)));
    least_with("runs: first run of 2 MiB, of 100,000", 1, &mut page, |page| see(map.runs(page, 512).next()));
    least_with("runs: all runs of 2 MiB, of 100,000", 1, &mut page, |page| see(map.runs(page, 512).count()));
    least_with("runs: replace a page within a run, heal it", 2, &mut page, |page| {
        let run = page / 16;
        map.insert(run * 16 + 3, 1, Mapped(7));
        map.insert(run * 16 + 3, 1, Mapped(run << 32).advance(3));
    });
    least_with("runs: extend a run by a page, cut it", 2, &mut page, |page| {
        let run = page / 16;
        map.insert(run * 16 + 8, 1, Mapped(run << 32).advance(8));
        map.remove(run * 16 + 8, 1);
    });
}

/// The guest page behind a host page: the same, or with neighbours swapped so that no two pages are one run.
type Layout = fn(u64) -> u64;

fn snp() {
    const PAGES: u64 = 1 << 20;
    let layouts: [(&str, Layout); 2] = [("one run", |pfn| pfn), ("a million runs", |pfn| pfn ^ 1)];
    for (name, layout) in layouts {
        let mut rmp = Rmp::new(PfnRange::with_len(Pfn(0), PAGES).expect("a range"));
        let give = |rmp: &mut Rmp, pfn| {
            let update = RmpUpdate::private(Gfn(layout(pfn)), RmpSize::Page4K, Asid(1), false);
            rmp.rmpupdate(Pfn(pfn), update).expect("legal");
        };
        let validate = |rmp: &mut Rmp, pfn, to| {
            let at = Translation { gfn: Gfn(layout(pfn)), pfn: Pfn(pfn), nested: Level::Page4K };
            rmp.pvalidate(Caller::vmpl0(Asid(1)), at, RmpSize::Page4K, to).expect("legal");
        };
        (0..PAGES).for_each(|pfn| give(&mut rmp, pfn));
        if name == "one run" {
            least("snp: copy the table, release its million pages, one run", 1, || {
                see(rmp.clone().release(PfnRange::with_len(Pfn(0), PAGES).expect("a range")));
            });
        }
        for (order, step) in [("in order", 1), ("scattered", 389_399)] {
            let mut pfn = 0;
            least(&format!("snp: RMPUPDATE, {name}, {order}"), 2, || {
                pfn = (pfn + step) % PAGES;
                rmp.rmpupdate(Pfn(pfn), RmpUpdate::shared(RmpSize::Page4K)).expect("legal");
                give(&mut rmp, pfn);
            });
            least(&format!("snp: PVALIDATE, {name}, {order}"), 2, || {
                pfn = (pfn + step) % PAGES;
                validate(&mut rmp, pfn, Validation::Validate);
                validate(&mut rmp, pfn, Validation::Rescind);
            });
        }
    }
}

const SCATTERED: u64 = 16_384;
const FREE_PAGE: u64 = 0x77_7700_0000;

/// A TD of some gigabytes in which one entry of 128 is free; its pages are one run, or as many runs as pages.
fn busy_td(contiguous: bool) -> Tdx {
    let mut td = Tdx::default();
    let mut table = 0x70_0000_0000;
    let done = |status| assert_eq!(status, TdxStatus::SUCCESS);
    for level in [3u8, 2, 1] {
        for gpa in (0..SCATTERED << 13).step_by(1 << (12 + 9 * level)) {
            done(td.sept_add(PageInfo::new(gpa, level), table, 0).status);
            table += PAGE;
        }
    }
    for n in 0..SCATTERED {
        let page = if contiguous { n } else { n * 7919 % SCATTERED };
        done(td.page_aug(PageInfo::new(n << 13, 0), page << 13).status);
        if contiguous && n % 64 != 0 {
            done(td.page_aug(PageInfo::new(n << 13 | PAGE, 0), page << 13 | PAGE).status);
        }
    }
    td
}

fn free_entry(n: u64) -> PageInfo {
    PageInfo::new((n * 7 % 256 * 64) << 13 | PAGE, 0)
}

fn tdx() {
    for (name, contiguous) in [("contiguous", true), ("scattered", false)] {
        let busy = busy_td(contiguous);
        let mut n = 0;
        least(&format!("tdx: SEPT.RD, {name}"), 1, || {
            n += 1;
            black_box(busy.sept_read(free_entry(n)));
        });
        let mut td = busy.clone();
        least(&format!("tdx: PAGE.AUG, PAGE.REMOVE, {name}"), 2, || {
            n += 1;
            td.page_aug(free_entry(n), FREE_PAGE);
            assert_eq!(td.page_remove(free_entry(n)).rcx, FREE_PAGE);
        });
        least(&format!("tdx: RANGE.BLOCK, RANGE.UNBLOCK, {name}"), 2, || {
            n += 1;
            let at = PageInfo::new((n * 7 % SCATTERED) << 13, 0);
            assert_eq!(td.range_block(at).status, TdxStatus::SUCCESS);
            black_box(td.range_unblock(at));
        });
        td.set_op_state(OpState::Runnable);
        least(&format!("tdx: AUG, ACCEPT, BLOCK, TRACK, REMOVE, {name}"), 5, || {
            n += 1;
            let at = free_entry(n);
            td.page_aug(at, FREE_PAGE);
            black_box(td.page_accept(at));
            td.range_block(at);
            td.track();
            assert_eq!(td.page_remove(at).rcx, FREE_PAGE);
        });
    }
}

const RD: u64 = PAGE;

/// A realm whose first 2 MiB have a table, and 256 pages of it that are mapped.
fn realm() -> Rmm {
    let memory = PfnRange::new(Pfn(0), Pfn(1 << 20)).expect("a range");
    let mut rmm = Rmm::new(RmmVersion::V1_0, Platform::fake_host(memory)).expect("the version that is modelled");
    (1..1000).for_each(|granule| see(rmm.granule_delegate(granule * PAGE)));
    let params = RealmParams {
        flags: 0,
        s2sz: 48,
        sve_vl: 0,
        num_bps: 1,
        num_wps: 1,
        pmu_num_ctrs: 0,
        hash_algo: 0,
        vmid: 1,
        rtt_base: 2 * PAGE,
        rtt_level_start: 0,
        rtt_num_start: 1,
    };
    assert!(rmm.realm_create(RD, 2000 * PAGE, &params).is_success());
    (1..=3u64).for_each(|level| assert!(rmm.rtt_create(RD, (2 + level) * PAGE, 0, level).is_success()));
    (0..256).for_each(|page| assert!(rmm.data_create_unknown(RD, (100 + page) * PAGE, page * PAGE).is_success()));
    rmm
}

fn cca() {
    let mut rmm = realm();
    least("cca: GRANULE_DELEGATE, UNDELEGATE", 2, || {
        rmm.granule_delegate(3000 * PAGE);
        black_box(rmm.granule_undelegate(3000 * PAGE));
    });
    least("cca: DATA_CREATE_UNKNOWN, DATA_DESTROY", 2, || {
        rmm.data_create_unknown(RD, 900 * PAGE, 300 * PAGE);
        black_box(rmm.data_destroy(RD, 300 * PAGE));
    });
    least("cca: DATA_DESTROY, DATA_CREATE_UNKNOWN within a run", 2, || {
        rmm.data_destroy(RD, 128 * PAGE);
        black_box(rmm.data_create_unknown(RD, 228 * PAGE, 128 * PAGE));
    });
    least("cca: RTT_READ_ENTRY", 1, || see(rmm.rtt_read_entry(RD, 77 * PAGE, 3)));
    least("cca: RTT_CREATE, RTT_FOLD", 2, || {
        rmm.rtt_create(RD, 950 * PAGE, 1 << 21, 3);
        black_box(rmm.rtt_fold(RD, 1 << 21, 3));
    });
}

fn init_ripas() {
    let cca = Cca::new(&Config::default()).expect("the version that is modelled");
    let range = PageRange::with_len(Gfn(0), GIB).expect("a range");
    least("cca: copy a realm, RTT_INIT_RIPAS of 1 GiB", 1, || see(cca.clone().convert(range, Side::Private)));
}

fn pkvm() {
    let vm = VmHandle(1);
    let mut el2 = El2::new(PfnRange::with_len(Pfn(0), 1 << 30).expect("a range"));
    el2.create_vm(vm);
    for page in 0..256 {
        el2.host_donate_guest(Pfn(1000 + page), Gfn(page), vm).expect("legal");
    }
    el2.host_share_guest(Pfn(4096), Gfn(4096), Level::Page2M, vm).expect("legal");
    least("pkvm: host_donate_guest, host_reclaim_page_guest", 2, || {
        el2.host_donate_guest(Pfn(9000), Gfn(9000), vm).expect("legal");
        el2.host_reclaim_page_guest(Gfn(9000), vm).expect("legal");
    });
    least("pkvm: guest_share_host, guest_unshare_host", 2, || {
        el2.guest_share_host(vm, Gfn(128)).expect("legal");
        el2.guest_unshare_host(vm, Gfn(128)).expect("legal");
    });
    least("pkvm: host_donate_hyp, hyp_donate_host of 1 GiB", 2, || {
        let range = PfnRange::with_len(Pfn(1 << 20), GIB).expect("a range");
        el2.host_donate_hyp(range).expect("legal");
        el2.hyp_donate_host(range).expect("legal");
    });
    least("pkvm: host_share_hyp, host_unshare_hyp", 2, || {
        el2.host_share_hyp(Pfn(77)).expect("legal");
        el2.host_unshare_hyp(Pfn(77)).expect("legal");
    });
}

/// Begins again with a heap that asks for huge pages, as that of `gmem run` does. Another GLIBC_TUNABLES in the environment, an
/// empty one too, says what the heap is instead.
fn with_huge_pages() {
    const TUNABLES: &str = "GLIBC_TUNABLES";
    if std::env::var_os(TUNABLES).is_none()
        && let Ok(program) = std::env::current_exe()
    {
        let arguments = std::env::args_os().skip(1);
        let error = Command::new(program).args(arguments).env(TUNABLES, "glibc.malloc.hugetlb=1").exec();
        eprintln!("without huge pages: {error}");
    }
}

fn main() {
    with_huge_pages();
    println!("| operation | least time |\n|---|---|");
    page_set();
    bitmap();
    vm();
    runs();
    snp();
    tdx();
    cca();
    init_ripas();
    pkvm();
}
