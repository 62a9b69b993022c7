//! One-page commands on a table of a million pages: one run, and the worst case of a million runs.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use gmem_core::addr::{Gfn, Level, Pfn, PfnRange};
use gmem_core::vendor::snp::guest::{Caller, Translation, Validation};
use gmem_core::vendor::snp::rmp::{Asid, Rmp, RmpSize, RmpUpdate};

const PAGES: u64 = 1 << 20;

fn covered() -> PfnRange {
    PfnRange::with_len(Pfn(0), PAGES).expect("not empty")
}

/// The guest page behind a host page: the same, or with neighbours swapped so that no two pages are one run.
type Layout = fn(u64) -> u64;

fn give(rmp: &mut Rmp, layout: Layout, pfn: u64) {
    let update = RmpUpdate::private(Gfn(layout(pfn)), RmpSize::Page4K, Asid(1), false);
    rmp.rmpupdate(Pfn(pfn), update).expect("legal");
}

fn take(rmp: &mut Rmp, pfn: u64) {
    rmp.rmpupdate(Pfn(pfn), RmpUpdate::shared(RmpSize::Page4K)).expect("legal");
}

fn validate(rmp: &mut Rmp, layout: Layout, pfn: u64, to: Validation) {
    let at = Translation { gfn: Gfn(layout(pfn)), pfn: Pfn(pfn), nested: Level::Page4K };
    rmp.pvalidate(Caller::vmpl0(Asid(1)), at, RmpSize::Page4K, to).expect("legal");
}

/// Every iteration is two commands, so that the table is the same afterwards.
fn pairs(criterion: &mut Criterion, name: &str, layout: Layout, step: u64) {
    let mut rmp = Rmp::new(covered());
    (0..PAGES).for_each(|pfn| give(&mut rmp, layout, pfn));
    let mut pfn = 0;
    criterion.bench_function(&format!("snp/two rmpupdates/{name}"), |bench| {
        bench.iter(|| {
            pfn = (pfn + step) % PAGES;
            take(&mut rmp, pfn);
            give(&mut rmp, layout, pfn);
        });
    });
    criterion.bench_function(&format!("snp/two pvalidates/{name}"), |bench| {
        bench.iter(|| {
            pfn = (pfn + step) % PAGES;
            validate(&mut rmp, layout, pfn, Validation::Validate);
            validate(&mut rmp, layout, pfn, Validation::Rescind);
        });
    });
}

/// A guest that accepts its memory page by page, over and over.
fn sweep(criterion: &mut Criterion) {
    let mut rmp = Rmp::new(covered());
    (0..PAGES).for_each(|pfn| give(&mut rmp, |pfn| pfn, pfn));
    let (mut pfn, mut to) = (0, Validation::Validate);
    criterion.bench_function("snp/one pvalidate/in order", |bench| {
        bench.iter(|| {
            validate(&mut rmp, |pfn| pfn, pfn, to);
            pfn += 1;
            if pfn == PAGES {
                pfn = 0;
                to = if to == Validation::Validate { Validation::Rescind } else { Validation::Validate };
            }
        });
    });
}

fn commands(criterion: &mut Criterion) {
    sweep(criterion);
    pairs(criterion, "one run, in order", |pfn| pfn, 1);
    pairs(criterion, "one run, scattered", |pfn| pfn, 389_399);
    pairs(criterion, "a million runs, in order", |pfn| pfn ^ 1, 1);
    pairs(criterion, "a million runs, scattered", |pfn| pfn ^ 1, 389_399);
    let mut whole = Rmp::new(covered());
    (0..PAGES).for_each(|pfn| give(&mut whole, |pfn| pfn, pfn));
    criterion.bench_function("snp/release/a million pages of one run", |bench| {
        bench.iter(|| black_box(whole.clone().release(covered())));
    });
}

criterion_group!(benches, commands);
criterion_main!(benches);
