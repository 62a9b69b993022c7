//! What a map of runs costs when it has 100,000 of them.
#![allow(missing_docs, reason = "criterion's macros")]

use criterion::{Criterion, criterion_group, criterion_main};
use gmem_core::runs::{Linear, RunMap};
use std::{hint::black_box, time::Duration};

const RUNS: u64 = 100_000;
/// Pages from the start of a run to the start of the next; a run has half of them.
const STEP: u64 = 16;

/// Where a page is mapped to.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapped(u64);

impl Linear for Mapped {
    fn advance(&self, pages: u64) -> Self {
        Self(self.0.wrapping_add(pages))
    }
}

fn map() -> RunMap<Mapped> {
    let mut map = RunMap::new();
    (0..RUNS).for_each(|run| map.insert(run * STEP, STEP / 2, Mapped(run << 32)));
    map
}

/// Page numbers in an order that jumps.
fn pages() -> impl FnMut() -> u64 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) % (RUNS * STEP)
    }
}

fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("RunMap, 100,000 runs");
    let mut next = pages();
    let mut map = map();
    group.bench_function("get", |b| b.iter(|| map.get(next())));
    group.bench_function("first run of 2 MiB", |b| b.iter(|| map.runs(next(), 512).next()));
    group.bench_function("all runs of 2 MiB", |b| b.iter(|| map.runs(next(), 512).count()));
    group.bench_function("replace a page within a run, and heal it", |b| {
        b.iter(|| {
            let run = next() / STEP;
            map.insert(run * STEP + 3, 1, Mapped(7));
            map.insert(run * STEP + 3, 1, Mapped(run << 32).advance(3));
        });
    });
    group.bench_function("extend a run by a page, and cut it", |b| {
        b.iter(|| {
            let run = next() / STEP;
            map.insert(run * STEP + STEP / 2, 1, Mapped(run << 32).advance(STEP / 2));
            map.remove(run * STEP + STEP / 2, 1);
        });
    });
    assert_eq!(black_box(&map).run_count() as u64, RUNS);
}

fn config() -> Criterion {
    let short = Duration::from_millis(300);
    Criterion::default().warm_up_time(short).measurement_time(2 * short).sample_size(30)
}

criterion_group! { name = benches; config = config(); targets = runs }
criterion_main!(benches);
