extern crate std;

use super::branch::Attached;
use super::*;
use crate::effort::{cases, few};
use alloc::{format, vec, vec::Vec};
use proptest::prelude::*;
use proptest::sample::select;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

const LEAF: u64 = 1 << 12;
const GIB: u64 = 1 << 18;
const TIB: u64 = 1 << 28;
/// Enough for a set with several leaves.
const MANY: u64 = few(2, 1024) as u64 * GIB;

#[derive(Clone, Copy, Debug)]
struct Change {
    start: u64,
    len: u64,
    value: bool,
}

/// The oracle: what was done, in order. It looks at one page at a time and knows nothing of blocks.
#[derive(Clone, Debug)]
struct Log {
    pages: u64,
    initial: bool,
    changes: Vec<Change>,
}

impl Log {
    fn get(&self, page: u64) -> bool {
        let hit = |c: &&Change| page < self.pages && c.start <= page && page - c.start < c.len;
        self.changes.iter().rev().find(hit).map_or(self.initial, |c| c.value)
    }

    /// Values can only differ across an edge of some change, so one page between each two edges says all.
    fn runs(&self, start: u64, len: u64) -> Vec<(u64, u64, bool)> {
        let end = start.saturating_add(len);
        let mut edges = vec![start, end, self.pages];
        edges.extend(self.changes.iter().flat_map(|c| [c.start, c.start.saturating_add(c.len)]));
        edges.retain(|&edge| start <= edge && edge <= end);
        edges.sort_unstable();
        edges.dedup();
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for pair in edges.windows(2) {
            let (at, len, value) = (pair[0], pair[1] - pair[0], self.get(pair[0]));
            match runs.last_mut() {
                Some(last) if last.2 == value => last.1 += len,
                _ => runs.push((at, len, value)),
            }
        }
        runs
    }
}

fn apply(set: &PageSet, changes: &[Change]) {
    for c in changes {
        set.set(c.start, c.len, c.value);
    }
}

fn hash(set: &PageSet) -> u64 {
    let mut hasher = DefaultHasher::new();
    set.hash(&mut hasher);
    hasher.finish()
}

/// Page numbers around the edges of words, leaves, branches and the capacity.
fn page(pages: u64) -> impl Strategy<Value = u64> {
    let blocks = [0, 64, 128, 512, LEAF - 64, LEAF, 2 * LEAF, GIB, 2 * GIB, TIB, 1 << 30, 1 << 36, 1 << 50];
    let anchors: Vec<u64> = blocks.into_iter().filter(|&b| b <= pages).chain([pages]).collect();
    (select(anchors), 0u64..=4, any::<bool>())
        .prop_map(|(anchor, by, up)| if up { anchor.saturating_add(by) } else { anchor.saturating_sub(by) })
}

fn range(pages: u64) -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        3 => (page(pages), page(pages)).prop_map(|(a, b)| (a.min(b), a.abs_diff(b))),
        2 => (page(pages), 0u64..4),
        1 => (page(pages), select(vec![64, 512, LEAF, GIB, u64::MAX])),
    ]
}

fn changes(pages: u64) -> impl Strategy<Value = Vec<Change>> {
    let change = (range(pages), any::<bool>()).prop_map(|((start, len), value)| Change { start, len, value });
    prop::collection::vec(change, 0..24)
}

fn capacity() -> impl Strategy<Value = u64> {
    let around = [1, 63, 64, 65, 1000, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF + 70, GIB, GIB + 1, 40 * GIB, TIB];
    let far = [0, 1 << 24, 1 << 30, (1 << 36) + 5, 1 << 42, 1 << 48, 1 << 51, MAX_PAGES];
    // The interpreter takes long to make the wide branches, which differ from the others in nothing but their width.
    select(around.into_iter().chain(far).take(few(12, 21)).collect::<Vec<_>>())
}

fn log() -> impl Strategy<Value = Log> {
    let changes = |(pages, initial)| changes(pages).prop_map(move |changes| Log { pages, initial, changes });
    (capacity(), any::<bool>()).prop_flat_map(changes)
}

fn log_and_range() -> impl Strategy<Value = (Log, (u64, u64))> {
    log().prop_flat_map(|log| {
        let pages = log.pages;
        (Just(log), range(pages))
    })
}

fn build(log: &Log) -> PageSet {
    let set = PageSet::with_capacity(log.pages, log.initial);
    apply(&set, &log.changes);
    set
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(1000)))]

    #[test]
    fn queries_agree_with_the_log((log, (start, len)) in log_and_range()) {
        let set = build(&log);
        let runs = log.runs(start, len);
        prop_assert_eq!(set.runs(start, len).collect::<Vec<_>>(), runs.clone());
        for &(at, len, value) in &runs {
            prop_assert_eq!((set.get(at), set.get(at + len - 1)), (value, value));
        }
        let uniform = if let [(_, _, value)] = runs[..] { Some(value) } else { None };
        prop_assert_eq!(set.uniform(start, len), uniform);
        for wanted in [false, true] {
            prop_assert_eq!(set.all(start, len, wanted), runs.iter().all(|run| run.2 == wanted));
            prop_assert_eq!(set.find(start, len, wanted), runs.iter().find(|run| run.2 == wanted).map(|run| run.0));
        }
        prop_assert_eq!(set.count(start, len), runs.iter().filter(|run| run.2).map(|run| run.1).sum::<u64>());
        if let Some(first) = runs.first() {
            prop_assert_eq!(set.next_change(start, start.saturating_add(len)), start + first.1);
        }
    }

    #[test]
    fn equality_is_by_contents(log in log(), detour in changes(MANY), flip in page(MANY)) {
        let set = build(&log);
        let other = PageSet::with_capacity(log.pages, log.initial);
        apply(&other, &detour);
        for &(start, len, value) in log.runs(0, log.pages).iter().rev() {
            other.set(start, len, value);
        }
        for twin in [&other, &set.clone(), &other.clone()] {
            prop_assert_eq!(&set, twin);
            prop_assert_eq!(hash(&set), hash(twin));
            prop_assert_eq!(format!("{set:?}"), format!("{twin:?}"));
        }
        prop_assert_eq!(other.clone().heap_bytes(), set.clone().heap_bytes());
        if flip < log.pages {
            let flipped = set.clone();
            flipped.set(flip, 1, !flipped.get(flip));
            prop_assert_ne!(&set, &flipped);
            prop_assert_ne!(hash(&set), hash(&flipped));
        }
    }

    #[test]
    fn a_clone_is_independent((log, (start, len)) in log_and_range(), value: bool) {
        let set = build(&log);
        let clone = set.clone();
        clone.set(start, len, value);
        prop_assert_eq!(set.runs(0, log.pages).collect::<Vec<_>>(), log.runs(0, log.pages));
        let mut changed = log;
        changed.changes.push(Change { start, len, value });
        prop_assert_eq!(clone.runs(0, changed.pages).collect::<Vec<_>>(), changed.runs(0, changed.pages));
    }

    #[test]
    fn dense_changes_agree_with_a_bitmap(ops in prop::collection::vec((0u64..200, 0u64..70, any::<bool>()), 1..few(12, 80)), pages in 1u64..270) {
        let set = PageSet::with_capacity(pages, false);
        let mut bitmap = vec![false; 300];
        for (start, len, value) in ops {
            set.set(start, len, value);
            bitmap[..usize::try_from(pages).unwrap()].iter_mut().zip(0u64..)
                .filter(|(_, page)| (start..start + len).contains(page)).for_each(|(bit, _)| *bit = value);
            let got: Vec<bool> = (0..300).map(|page| set.get(page)).collect();
            prop_assert_eq!(&got, &bitmap);
        }
    }
}

#[test]
fn edges_of_the_page_space() {
    for pages in [1, 63, 64, 65, LEAF, LEAF + 1, 1 << 51, MAX_PAGES, u64::MAX] {
        for initial in [false, true] {
            let set = PageSet::with_capacity(pages, initial);
            let last = set.capacity() - 1;
            assert_eq!((set.get(0), set.get(last), set.get(u64::MAX)), (initial, initial, initial));
            set.set(last, u64::MAX, !initial);
            assert_eq!((set.get(last), set.get(last + 1), set.get(u64::MAX)), (!initial, initial, initial));
            assert_eq!(set.uniform(0, u64::MAX), None);
            set.set(0, set.capacity(), !initial);
            assert_eq!(set.uniform(0, last + 1), Some(!initial), "{pages} pages");
            assert_eq!(set.uniform(last + 1, 1), Some(initial));
            set.set(0, u64::MAX, initial);
            assert_eq!(set, PageSet::with_capacity(pages, initial));
        }
    }
    assert_eq!(PageSet::with_capacity(u64::MAX, false).capacity(), MAX_PAGES);
}

#[test]
fn no_pages_have_no_value() {
    let set = PageSet::with_capacity(100, true);
    assert_eq!((set.uniform(5, 0), set.all(5, 0, false), set.all(5, 0, true)), (None, true, true));
    assert_eq!((set.count(5, 0), set.find(5, 0, true), set.runs(5, 0).next()), (0, None, None));
    set.set(5, 0, false);
    assert_eq!(set, PageSet::with_capacity(100, true));
}

#[test]
fn sets_with_other_edges_are_different() {
    let set = PageSet::with_capacity(64, false);
    set.set(0, 64, true);
    assert_ne!(set, PageSet::with_capacity(64, true), "page 64 differs");
    assert_ne!(PageSet::with_capacity(64, false), PageSet::with_capacity(63, false), "page 63 can change in one only");
}

#[test]
fn small_sets_allocate_nothing() {
    let set = PageSet::with_capacity(64, false);
    set.set(3, 9, true);
    assert_eq!(set.heap_bytes(), 0);
    assert!(size_of::<PageSet>() <= 72);
}

#[test]
fn uniform_memory_costs_nothing() {
    let set = PageSet::with_capacity(MAX_PAGES, true);
    set.set(0, MAX_PAGES, true);
    assert_eq!(set.heap_bytes(), 0);
    let set = PageSet::with_capacity(TIB, false);
    set.set(0, TIB, true);
    assert_eq!(set.uniform(0, TIB), Some(true));
    assert_eq!(set.heap_bytes(), 0);
    set.set(1, TIB - 2, false);
    assert!(set.heap_bytes() < 40 * 1024, "two edges, {} bytes", set.heap_bytes());
}

#[test]
fn single_pages_make_a_block_uniform_again() {
    let pages = 2 * GIB;
    let set = PageSet::with_capacity(pages, false);
    let whole = set.clone();
    whole.set(0, pages, true);
    let singly = GIB - few(70, 4160) as u64..GIB + few(6, 64) as u64;
    set.set(0, singly.start, true);
    set.set(singly.end, pages - singly.end, true);
    for page in singly.rev() {
        assert_eq!((set.uniform(0, pages), set.all(page + 1, pages - page - 1, true)), (None, true));
        set.set(page, 1, true);
    }
    assert_eq!((set.uniform(0, pages), hash(&set)), (Some(true), hash(&whole)));
    assert!(set.heap_bytes() > 0, "spare nodes are counted");
    assert_eq!(set.clone().heap_bytes(), whole.heap_bytes(), "a clone has none");
}

#[test]
fn a_spare_node_has_no_memory_of_its_past() {
    let set = PageSet::with_capacity(2 * GIB, false);
    set.set(70, 1, true);
    set.set(0, 2 * GIB, true);
    set.set(GIB + 70, 1, false);
    set.set(5, 1, false);
    let runs: Vec<_> = set.runs(0, GIB).collect();
    assert_eq!(runs, [(0, 5, true), (5, 1, false), (6, GIB - 6, true)]);
}

/// A block that is no run costs the bitmap of its 1 GiB, however many blocks follow it. In a small set the root weighs more.
#[test]
fn at_worst_a_set_takes_the_memory_of_a_bitmap_and_a_tenth() {
    let pages = MANY;
    let set = PageSet::with_capacity(pages, false);
    let leaves = || (0..pages / GIB).map(|leaf| leaf * GIB);
    leaves().for_each(|leaf| set.set(leaf + 512, 1, true));
    let runs = set.heap_bytes() as u64;
    leaves().for_each(|leaf| set.set(leaf + 514, 1, true));
    let bitmaps = set.heap_bytes() as u64 - runs;
    assert!((pages / 8..pages / 8 + 64 * (pages / GIB)).contains(&bitmaps), "{bitmaps} bytes of bitmaps");
    assert!(runs + bitmaps < pages / 8 * few(14, 11) as u64 / 10, "{} bytes", runs + bitmaps);
    (0..GIB).step_by(few(1022, 2)).for_each(|page| set.set(page, 1, true));
    assert_eq!(set.heap_bytes() as u64, runs + bitmaps);
    assert_eq!(set.clone().heap_bytes() as u64, runs + bitmaps);
}

#[test]
fn a_bitmap_is_kept_for_later_and_not_copied_when_it_is_not_needed() {
    let set = PageSet::with_capacity(2 * GIB, false);
    set.set(1, 1, true);
    let run = set.heap_bytes();
    set.set(3, 1, true);
    let bitmap = set.heap_bytes();
    assert!(run < 40 * 1024 && bitmap > run + 32 * 1024, "{run} and {bitmap} bytes");
    let heap_after = |changes: &[(u64, u64, bool)]| {
        changes.iter().for_each(|&(start, len, value)| set.set(start, len, value));
        assert_eq!(set.heap_bytes(), bitmap);
        set.clone().heap_bytes()
    };
    assert_eq!(heap_after(&[(2, 1, true)]), run, "all blocks are runs again");
    assert_eq!(heap_after(&[(1, 3, false)]), 0, "all pages are alike again");
    assert_eq!(heap_after(&[(5, 1, true), (7, 1, true)]), bitmap);
    assert_eq!(heap_after(&[(0, GIB, true), (9, 1, false)]), run);
    assert_eq!(heap_after(&[(11, 1, false)]), bitmap);
    assert_eq!(set.runs(0, GIB).map(|(start, ..)| start).collect::<Vec<_>>(), [0, 9, 10, 11, 12]);
}

#[test]
fn debug_shows_the_contents() {
    let set = PageSet::with_capacity(0x1000, false);
    set.set(2, 3, true);
    set.set(64, 1, true);
    assert_eq!(format!("{set:?}"), "PageSet(0x1000 pages, initially false) {2..5, 64..65}");
}

/// A cycle of changes after each of which every page has a known value, whatever went before the cycle.
fn cycle(pages: u64) -> Log {
    let change = |(start, len, value)| Change { start, len, value };
    let steps = [
        (0, pages, false),
        (LEAF, LEAF, true),
        (LEAF + 9, 1, false),
        (LEAF + 9, 1, true),
        (63, 2, true),
        (0, pages, true),
        (LEAF + 9, 1, false),
        (70, 1, false),
        (GIB - 1, 2, false),
        (1, pages - 2, false),
        (LEAF + 9, 1, true),
        (0, GIB, true),
        (64, 64, false),
        (0, GIB, false),
        (69, 2, true),
        (GIB + 64, LEAF, true),
    ];
    Log { pages, initial: false, changes: steps.into_iter().map(change).collect() }
}

/// `values[step][probe]` is what the page has once the step is done.
fn values_after(cycle: &Log, probes: &[u64]) -> Vec<Vec<bool>> {
    let prefix = |n: usize| Log { changes: cycle.changes[..=n].to_vec(), ..cycle.clone() };
    (0..cycle.changes.len()).map(|n| probes.iter().map(|&page| prefix(n).get(page)).collect()).collect()
}

/// What a reader gets is the value after some step between the last one done before the call and the last one begun
/// before its end.
fn readers_agree_with(cycle: &Log, probes: &[u64]) {
    let values = values_after(cycle, probes);
    let set = PageSet::with_capacity(cycle.pages, cycle.initial);
    let (begun, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let last = cycle.changes.len() * few(2, 20_000);

    let read = |seed: usize| {
        let mut turn = seed;
        while done.load(Ordering::Acquire) < last {
            turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let probe = (turn >> 33) % probes.len();
            let before = done.load(Ordering::Acquire);
            let got = set.get(probes[probe]);
            let after = begun.load(Ordering::Acquire);
            let possible = |step: usize| values[step % values.len()][probe] == got;
            assert!(
                (before..=after).any(possible),
                "page {} was {got} in no step of {before}..={after}",
                probes[probe]
            );
        }
    };
    apply(&set, &cycle.changes[..1]);
    thread::scope(|scope| {
        scope.spawn(|| read(1));
        scope.spawn(|| read(2));
        for step in 1..=last {
            let change = cycle.changes[step % cycle.changes.len()];
            begun.store(step, Ordering::Release);
            set.set(change.start, change.len, change.value);
            done.store(step, Ordering::Release);
        }
    });
}

#[test]
fn readers_see_only_values_that_were_true_during_the_call() {
    let pages = 2 * GIB + 100;
    let probes = [0, 1, 63, 64, 69, 70, 71, LEAF, LEAF + 8, LEAF + 9, GIB - 1, GIB, GIB + 70, 2 * GIB, pages - 1];
    readers_agree_with(&cycle(pages), &probes);
}

/// Blocks that are no run, in a leaf that again and again becomes uniform. Most of its pages have one value all the time, so
/// that a reader who is held up for long still may see nothing else.
#[test]
fn readers_see_only_true_values_while_a_leaf_changes_its_form() {
    for value in [false, true] {
        let odd = |page| Change { start: page, len: 1, value: !value };
        let all = Change { start: 0, len: GIB, value };
        let cycle = Log { pages: 2 * GIB, initial: value, changes: vec![all, odd(5), odd(7), odd(600)] };
        readers_agree_with(&cycle, &[0, 4, 5, 6, 8, 599, 600, LEAF, GIB - 1, GIB]);
    }
}

/// A reader may be held up inside a node for any time, in which the writer detaches it and attaches it again, or gives all its
/// pages one value and then others. Between two loads of the tests above that is rare; this reader has passed the tag once and
/// stays inside. The pages that it looks at never change.
#[test]
fn a_reader_that_stays_inside_sees_only_true_values() {
    let whole = Span { first: 0, last: GIB - 1 };
    for (value, odd_pages) in [(false, &[5][..]), (true, &[5]), (false, &[5, 7, 600]), (true, &[5, 7, 600])] {
        let root = Pages18::uniform(value);
        let set = |span, value| assert!(root.set(span, value).is_ok());
        let round = || {
            set(whole, value);
            odd_pages.iter().for_each(|&odd| set(Span::page(odd), !value));
        };
        round();
        let attached = root.attached(0, Values::MIXED);
        let get = |page| match attached {
            Some(Attached::Plain(leaf)) if odd_pages.len() == 1 => leaf.get(page),
            Some(Attached::Dense(bitmap)) if odd_pages.len() > 1 => bitmap.get(page),
            _ => panic!("a leaf, or a bitmap for two odd pages in a block"),
        };
        thread::scope(|scope| {
            let writer = scope.spawn(|| (0..few(2, 20_000)).for_each(|_| round()));
            while !writer.is_finished() {
                for page in [0, 6, 8, 599, 601, LEAF, GIB - 1] {
                    assert_eq!(get(page), value, "page {page}");
                }
            }
        });
    }
}

/// Pages enter the set one by one, from the last to the first; who has seen a page in it also sees all later ones.
#[test]
fn changes_are_seen_in_order() {
    let pages = 3 * LEAF;
    let floor = pages - few(600, 8292) as u64;
    let set = PageSet::with_capacity(pages, false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !set.get(floor) {
                if let Some(first) = set.find(floor, pages - floor, true) {
                    assert!(set.all(first, pages - first, true), "a page after {first} is missing");
                    assert_eq!(set.runs(first, pages - first).next(), Some((first, pages - first, true)));
                }
            }
        });
        for page in (floor..pages).rev() {
            set.set(page, 1, true);
        }
    });
}

#[test]
fn a_clone_taken_while_a_writer_works_is_a_proper_set() {
    let set = PageSet::with_capacity(GIB, false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for round in 0..few(6, 20_000) as u64 {
                set.set(LEAF, LEAF - round % 2, round & 2 == 0);
            }
        });
        while !writer.is_finished() {
            let clone = set.clone();
            let rebuilt = PageSet::with_capacity(GIB, false);
            clone.runs(0, GIB).for_each(|(start, len, value)| rebuilt.set(start, len, value));
            assert_eq!(clone, rebuilt);
            assert_eq!(hash(&clone), hash(&rebuilt));
        }
    });
}
