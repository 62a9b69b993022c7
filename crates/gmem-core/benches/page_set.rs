//! What queries and changes of page state cost, next to a flat bitmap and to a tree of runs.
//!
//! *Clean* means that all pages are alike; *fragmented* that one random page of each 2 MiB differs. Pages are drawn
//! from the whole size unless said otherwise, by a generator that takes part of the time (`generator`).
#![allow(missing_docs, reason = "criterion's macros")]

use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use gmem_core::{
    page_set::PageSet,
    runs::{Linear, RunMap},
};
use std::{
    hint::black_box,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

const PAGES_2M: u64 = 1 << 9;
const PAGES_16M: u64 = 1 << 12;
const PAGES_1G: u64 = 1 << 18;
const SIZES: [(&str, u64); 2] = [("16 GiB", 1 << 22), ("1 TiB", 1 << 28)];

/// xorshift64*, bounded by a multiplication.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let high = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        (high * limit) >> 32
    }
}

fn random() -> Random {
    Random(0x9e37_79b9_7f4a_7c15)
}

/// The flat bitmap to compare with: nothing is faster for one page, and nothing is slower for a range.
struct Bitmap(Vec<AtomicU64>);

impl Bitmap {
    fn new(pages: u64) -> Self {
        Self((0..pages / 64).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        &self.0[usize::try_from(page / 64).expect("64 bits")]
    }

    fn get(&self, page: u64) -> bool {
        (self.word(page).load(Ordering::Acquire) >> (page % 64)) & 1 != 0
    }

    fn set(&self, page: u64, value: bool) {
        let old = self.word(page).load(Ordering::Relaxed);
        let bit = 1 << (page % 64);
        self.word(page).store(if value { old | bit } else { old & !bit }, Ordering::Release);
    }

    fn is_clear(&self, page: u64, len: u64) -> bool {
        (page..page + len).step_by(64).all(|page| self.word(page).load(Ordering::Acquire) == 0)
    }

    fn fill(&self) {
        self.0.iter().for_each(|word| word.store(!0, Ordering::Release));
    }
}

/// Pages in the set, as runs in a `BTreeMap`.
#[derive(Clone, PartialEq, Eq)]
struct Present;

impl Linear for Present {
    fn advance(&self, _pages: u64) -> Self {
        Self
    }
}

fn fragments(pages: u64) -> impl Iterator<Item = u64> {
    let mut random = random();
    (0..pages).step_by(512).map(move |block| block + random.below(PAGES_2M))
}

fn page_set(pages: u64, fragmented: bool) -> PageSet {
    let set = PageSet::with_capacity(pages, false);
    if fragmented {
        fragments(pages).for_each(|page| set.set(page, 1, true));
    }
    set
}

fn get(c: &mut Criterion) {
    let mut group = c.benchmark_group("get");
    let mut at = random();
    group.bench_function("generator", |b| b.iter(|| at.below(1 << 28)));
    for (size, pages) in SIZES {
        for (state, fragmented) in [("clean", false), ("fragmented", true)] {
            let set = page_set(pages, fragmented);
            println!("{size} {state}: {} bytes", set.heap_bytes());
            group.bench_function(format!("PageSet {size} {state}"), |b| b.iter(|| set.get(at.below(pages))));
            let near = |page: u64| (page & (PAGES_1G - 1)) + 3 * PAGES_1G;
            group.bench_function(format!("PageSet {size} {state}, within 1 GiB"), |b| {
                b.iter(|| set.get(near(at.below(pages))));
            });
            let mut page = 0;
            group.bench_function(format!("PageSet {size} {state}, each page found by the one before"), |b| {
                b.iter(|| page = at.below(pages) ^ u64::from(set.get(page)));
            });
        }
        let bitmap = Bitmap::new(pages);
        fragments(pages).for_each(|page| bitmap.set(page, true));
        group.bench_function(format!("bitmap {size}"), |b| b.iter(|| bitmap.get(at.below(pages))));
        let mut page = 0;
        group.bench_function(format!("bitmap {size}, each page found by the one before"), |b| {
            b.iter(|| page = at.below(pages) ^ u64::from(bitmap.get(page)));
        });
        let mut runs = RunMap::new();
        fragments(pages).for_each(|page| runs.insert(page, 1, Present));
        group.bench_function(format!("BTreeMap {size} fragmented"), |b| b.iter(|| runs.get(at.below(pages)).is_some()));
    }
}

fn set_page(c: &mut Criterion) {
    let mut group = c.benchmark_group("set one page");
    let mut at = random();
    for (size, pages) in SIZES {
        let set = page_set(pages, true);
        group.bench_function(format!("PageSet {size} fragmented"), |b| {
            b.iter(|| {
                let draw = at.below(2 * pages);
                set.set(draw >> 1, 1, draw & 1 != 0);
            });
        });
        group.bench_function(format!("PageSet {size} fragmented, to what it is not"), |b| {
            b.iter(|| flip(&set, at.below(pages)));
        });
        let bitmap = Bitmap::new(pages);
        bitmap.fill();
        group.bench_function(format!("bitmap {size}"), |b| {
            b.iter(|| {
                let page = at.below(pages);
                bitmap.set(page, !bitmap.get(page));
            });
        });
        let mut runs = RunMap::new();
        fragments(pages).for_each(|page| runs.insert(page, 1, Present));
        group.bench_function(format!("BTreeMap {size} fragmented"), |b| {
            b.iter(|| {
                let page = at.below(pages);
                if runs.get(page).is_some() { runs.remove(page, 1) } else { runs.insert(page, 1, Present) }
            });
        });
        set_clean_page(&mut group, size, pages);
    }
}

fn flip(set: &PageSet, page: u64) {
    set.set(page, 1, !set.get(page));
}

fn set_clean_page(group: &mut BenchmarkGroup<'_, WallTime>, size: &str, pages: u64) {
    let set = page_set(pages, false);
    group.bench_function(format!("PageSet {size} clean, there and back"), |b| {
        let mut value = false;
        b.iter(|| {
            value = !value;
            set.set(black_box(pages / 2 + 77), 1, value);
        });
    });
    let (mut page, mut value) = (0, true);
    group.bench_function(format!("PageSet {size} clean, pages of 1 GiB in order, there and back"), |b| {
        b.iter(|| {
            set.set(page, 1, value);
            page = (page + 1) % PAGES_1G;
            value ^= page == 0;
        });
    });
    let blocks = pages / PAGES_16M;
    group.bench_function(format!("PageSet {size} clean, allocating"), |b| {
        b.iter_custom(|sets| allocate(sets, blocks));
    });
}

/// The time of `sets` single-page changes, each to another 16 MiB of a new set.
fn allocate(sets: u64, blocks: u64) -> Duration {
    let mut time = Duration::ZERO;
    for first in (0..sets).step_by(usize::try_from(blocks).expect("64 bits")) {
        let set = PageSet::with_capacity(blocks * PAGES_16M, false);
        let start = Instant::now();
        (0..blocks.min(sets - first)).for_each(|block| set.set(block * PAGES_16M + 5, 1, true));
        time += start.elapsed();
    }
    time
}

fn uniform(c: &mut Criterion) {
    let mut group = c.benchmark_group("uniform");
    let mut at = random();
    for (size, pages) in SIZES {
        for (state, fragmented) in [("clean", false), ("fragmented", true)] {
            let set = page_set(pages, fragmented);
            for (block, len) in [("2 MiB", PAGES_2M), ("1 GiB", PAGES_1G)] {
                group.bench_function(format!("PageSet {size} {state}, {block}"), |b| {
                    b.iter(|| set.uniform(at.below(pages) & !(len - 1), len));
                });
            }
            group.bench_function(format!("PageSet {size} {state}, 4 GiB off alignment"), |b| {
                b.iter(|| set.uniform(at.below(pages - 4 * PAGES_1G), 4 * PAGES_1G));
            });
        }
        let alike = page_set(pages, false);
        (0..pages).step_by(4096).for_each(|page| alike.set(page, 1, true));
        group.bench_function(format!("PageSet {size}, alike 2 MiB in mixed 16 MiB"), |b| {
            b.iter(|| alike.uniform((at.below(pages) & !(PAGES_2M - 1)) | (3 * PAGES_2M), PAGES_2M));
        });
        let bitmap = Bitmap::new(pages);
        for (block, len) in [("2 MiB", PAGES_2M), ("1 GiB", PAGES_1G)] {
            group.bench_function(format!("bitmap {size} clean, {block}"), |b| {
                b.iter(|| bitmap.is_clear(at.below(pages) & !(len - 1), len));
            });
        }
    }
}

fn set_range(c: &mut Criterion) {
    let mut group = c.benchmark_group("set range");
    let pages = 1 << 28;
    for (state, fragmented) in [("clean", false), ("once fragmented", true)] {
        let set = page_set(pages, fragmented);
        let mut value = false;
        group.bench_function(format!("PageSet 1 TiB {state}, whole"), |b| {
            b.iter(|| {
                value = !value;
                set.set(0, black_box(pages), value);
            });
        });
        group.bench_function(format!("PageSet 1 TiB {state}, all but the first and the last page"), |b| {
            b.iter(|| {
                value = !value;
                set.set(1, black_box(pages) - 2, value);
            });
        });
    }
    group.bench_function("PageSet 1 TiB created, whole, dropped", |b| {
        b.iter(|| {
            let set = PageSet::with_capacity(black_box(pages), false);
            set.set(0, pages, true);
            set
        });
    });
    let bitmap = Bitmap::new(pages);
    group.sample_size(10).bench_function("bitmap 1 TiB, whole", |b| b.iter(|| bitmap.fill()));
}

fn whole_set(c: &mut Criterion) {
    let mut group = c.benchmark_group("whole set");
    let set = page_set(1 << 28, true);
    group.sample_size(10);
    group.bench_function("count 1 TiB fragmented", |b| b.iter(|| set.count(0, 1 << 28)));
    group.bench_function("runs 1 TiB fragmented", |b| b.iter(|| set.runs(0, 1 << 28).count()));
    let small = PageSet::with_capacity(64, false);
    small.set(3, 9, true);
    group
        .sample_size(50)
        .bench_function("clone and compare 64 pages", |b| b.iter(|| black_box(&small).clone() == small));
}

fn config() -> Criterion {
    let short = Duration::from_millis(300);
    Criterion::default().warm_up_time(short).measurement_time(2 * short).sample_size(30)
}

criterion_group! { name = benches; config = config(); targets = get, set_page, uniform, set_range, whole_set }
criterion_main!(benches);
