//! One-page commands on a table of a million pages, in the order of addresses and in a scattered one.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use gmem_core::addr::{Gfn, Level, Pfn, PfnRange};
use gmem_core::vendor::snp::guest::{Caller, Translation, Validation};
use gmem_core::vendor::snp::rmp::{Asid, Rmp, RmpSize, RmpUpdate};

const PAGES: u64 = 1 << 20;

fn covered() -> PfnRange {
    PfnRange::with_len(Pfn(0), PAGES).expect("not empty")
}

fn give(rmp: &mut Rmp, pfn: u64) {
    let update = RmpUpdate::private(Gfn(pfn), RmpSize::Page4K, Asid(1), false);
    rmp.rmpupdate(Pfn(pfn), update).expect("legal");
}

/// A million pages of one guest; every second one lies elsewhere in the guest, so that no two are one run.
fn table(scattered: bool) -> Rmp {
    let mut rmp = Rmp::new(covered());
    for pfn in 0..PAGES {
        let gfn = if scattered { pfn ^ 1 } else { pfn };
        let update = RmpUpdate::private(Gfn(gfn), RmpSize::Page4K, Asid(1), false);
        rmp.rmpupdate(Pfn(pfn), update).expect("legal");
    }
    rmp
}

fn validate(rmp: &mut Rmp, gfn: u64, pfn: u64, to: Validation) {
    let at = Translation { gfn: Gfn(gfn), pfn: Pfn(pfn), nested: Level::Page4K };
    let _ = black_box(rmp.pvalidate(Caller::vmpl0(Asid(1)), at, RmpSize::Page4K, to));
}

fn commands(criterion: &mut Criterion) {
    let mut pfn = 0;
    let mut next = |step: u64| {
        pfn = (pfn + step) % PAGES;
        pfn
    };
    let scatter = 389_399;

    let mut rmp = table(false);
    criterion.bench_function("snp/rmpupdate/in order, there and back", |bench| {
        bench.iter(|| {
            let pfn = next(1);
            rmp.rmpupdate(Pfn(pfn), RmpUpdate::shared(RmpSize::Page4K)).expect("legal");
            give(&mut rmp, pfn);
        });
    });
    criterion.bench_function("snp/pvalidate/in order", |bench| {
        bench.iter(|| {
            let pfn = next(1);
            validate(&mut rmp, pfn, pfn, Validation::Validate);
        });
    });
    let mut rmp = table(true);
    criterion.bench_function("snp/pvalidate/scattered, a million runs, there and back", |bench| {
        bench.iter(|| {
            let pfn = next(scatter);
            validate(&mut rmp, pfn ^ 1, pfn, Validation::Validate);
            validate(&mut rmp, pfn ^ 1, pfn, Validation::Rescind);
        });
    });
    criterion.bench_function("snp/rmpupdate/scattered, a million runs", |bench| {
        bench.iter(|| {
            let pfn = next(scatter);
            let update = RmpUpdate::private(Gfn(pfn ^ 1), RmpSize::Page4K, Asid(2), false);
            rmp.rmpupdate(Pfn(pfn), update).expect("legal");
        });
    });
    let whole = table(false);
    criterion.bench_function("snp/release/all of a million pages in one run", |bench| {
        bench.iter(|| black_box(whole.clone().release(covered())));
    });
}

criterion_group!(benches, commands);
criterion_main!(benches);
