//! Cost of RMM commands: one page each, and ranges of RAM.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use gmem_core::addr::{Gfn, GfnRange, Pfn, PfnRange};
use gmem_core::vendor::Side;
use gmem_core::vendor::cca::{Cca, Config, Platform, RealmParams, Rmm, RmmVersion};
use std::hint::black_box;

const PAGE: u64 = 4096;
const RD: u64 = 0x1000;

/// A realm whose first 2 MiB have a table, and 256 pages of it that are mapped.
fn realm() -> Rmm {
    let memory = PfnRange::new(Pfn(0), Pfn(1 << 20)).unwrap();
    let mut rmm = Rmm::new(RmmVersion::V1_0, Platform::fake_host(memory)).unwrap();
    for granule in 1..1000 {
        rmm.granule_delegate(granule * PAGE);
    }
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
    for level in 1..=3 {
        assert!(rmm.rtt_create(RD, (2 + level) * PAGE, 0, level).is_success());
    }
    for page in 0..256 {
        assert!(rmm.data_create_unknown(RD, (100 + page) * PAGE, page * PAGE).is_success());
    }
    rmm
}

fn one_page(c: &mut Criterion) {
    let mut rmm = realm();
    c.bench_function("cca/delegate+undelegate", |b| {
        b.iter(|| {
            rmm.granule_delegate(black_box(3000 * PAGE));
            rmm.granule_undelegate(black_box(3000 * PAGE))
        });
    });
    c.bench_function("cca/data_create_unknown+destroy", |b| {
        b.iter(|| {
            rmm.data_create_unknown(RD, black_box(900 * PAGE), black_box(300 * PAGE));
            rmm.data_destroy(RD, black_box(300 * PAGE))
        });
    });
    c.bench_function("cca/data_destroy+create inside a run", |b| {
        b.iter(|| {
            rmm.data_destroy(RD, black_box(128 * PAGE));
            rmm.data_create_unknown(RD, black_box(228 * PAGE), black_box(128 * PAGE))
        });
    });
    c.bench_function("cca/rtt_read_entry", |b| b.iter(|| rmm.rtt_read_entry(RD, black_box(77 * PAGE), 3)));
    c.bench_function("cca/rtt_create+fold", |b| {
        b.iter(|| {
            rmm.rtt_create(RD, black_box(950 * PAGE), 1 << 21, 3);
            rmm.rtt_fold(RD, black_box(1 << 21), 3)
        });
    });
}

fn ranges(c: &mut Criterion) {
    c.bench_function("cca/init_ripas 1 GiB", |b| {
        let cca = Cca::new(&Config::default()).unwrap();
        let range = GfnRange::with_len(Gfn(0), 1 << 18).unwrap();
        b.iter_batched_ref(|| cca.clone(), |cca| cca.convert(range, Side::Private), BatchSize::SmallInput);
    });
    c.bench_function("cca/clone", |b| {
        let rmm = realm();
        b.iter(|| black_box(&rmm).clone());
    });
}

criterion_group!(benches, one_page, ranges);
criterion_main!(benches);
