//! What one TDX command costs, in a TD with many scattered pages: `cargo bench -p gmem-core --bench tdx`.
//!
//! The throughput line counts commands: its inverse is the time of one.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gmem_core::vendor::tdx::status::TdxStatus;
use gmem_core::vendor::tdx::tables::OpState;
use gmem_core::vendor::tdx::{PageInfo, Tdx};
use std::hint::black_box;

const SCATTERED: u64 = 16_384;
const FREE_PAGE: u64 = 0x77_7700_0000;

/// How the guest's pages lie in the host's memory.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// As a file of huge folios has them: one run.
    Contiguous,
    /// Each from another place: as many runs as pages.
    Scattered,
}

/// A TD in which every page of the first gigabytes but the odd ones of a scattered layout is pending.
fn busy_td(layout: Layout) -> Tdx {
    let mut td = Tdx::default();
    let mut table = 0x70_0000_0000;
    for level in [3, 2, 1] {
        let step = 1 << (12 + 9 * level);
        for gpa in (0..SCATTERED << 13).step_by(step) {
            assert_eq!(
                td.sept_add(PageInfo::new(gpa, u8::try_from(level).unwrap()), table, 0).status,
                TdxStatus::SUCCESS
            );
            table += 4096;
        }
    }
    for n in 0..SCATTERED {
        let page = if layout == Layout::Contiguous { n } else { n * 7919 % SCATTERED };
        assert_eq!(td.page_aug(PageInfo::new(n << 13, 0), page << 13).status, TdxStatus::SUCCESS);
        if layout == Layout::Contiguous && n % 64 != 0 {
            assert_eq!(td.page_aug(PageInfo::new(n << 13 | 4096, 0), page << 13 | 4096).status, TdxStatus::SUCCESS);
        }
    }
    td
}

/// A free entry: both layouts leave one in 128 pages out.
fn free_entry(n: u64) -> PageInfo {
    PageInfo::new((n * 7 % 256 * 64) << 13 | 4096, 0)
}

fn commands(c: &mut Criterion) {
    one_page(c, "tdx contiguous", &busy_td(Layout::Contiguous));
    one_page(c, "tdx scattered", &busy_td(Layout::Scattered));
}

fn one_page(c: &mut Criterion, name: &str, td: &Tdx) {
    let mut group = c.benchmark_group(name);

    group.throughput(Throughput::Elements(1));
    group.bench_function("SEPT.RD", |b| {
        let mut n = 0;
        b.iter(|| {
            n += 1;
            td.sept_read(black_box(free_entry(n)))
        });
    });

    group.throughput(Throughput::Elements(2));
    group.bench_function("PAGE.AUG + PAGE.REMOVE", |b| {
        let (mut td, mut n) = (td.clone(), 0);
        b.iter(|| {
            n += 1;
            assert_eq!(td.page_aug(free_entry(n), FREE_PAGE).status, TdxStatus::SUCCESS);
            td.page_remove(free_entry(n))
        });
    });
    group.bench_function("RANGE.BLOCK + RANGE.UNBLOCK", |b| {
        let (mut td, mut n) = (td.clone(), 0);
        b.iter(|| {
            n += 1;
            let at = PageInfo::new((n * 7 % SCATTERED) << 13, 0);
            assert_eq!(td.range_block(at).status, TdxStatus::SUCCESS);
            td.range_unblock(at)
        });
    });

    group.throughput(Throughput::Elements(5));
    group.bench_function("AUG, ACCEPT, BLOCK, TRACK, REMOVE", |b| {
        let (mut td, mut n) = (td.clone(), 0);
        td.set_op_state(OpState::Runnable);
        b.iter(|| {
            n += 1;
            let at = free_entry(n);
            td.page_aug(at, FREE_PAGE);
            black_box(td.page_accept(at));
            td.range_block(at);
            td.track();
            assert_eq!(td.page_remove(at).rcx, FREE_PAGE);
        });
    });

    group.finish();
}

criterion_group!(benches, commands);
criterion_main!(benches);
