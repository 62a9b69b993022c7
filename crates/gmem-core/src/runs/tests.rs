use super::*;
use crate::effort::{cases, few};
use alloc::vec::Vec;
use proptest::prelude::*;

#[derive(Clone, PartialEq, Eq, Debug)]
enum Value {
    Constant(u8),
    Moving(u64),
}

impl Linear for Value {
    fn advance(&self, pages: u64) -> Self {
        match self {
            Self::Constant(c) => Self::Constant(*c),
            Self::Moving(base) => Self::Moving(base + pages),
        }
    }
}

fn check_chunks(map: &RunMap<Value>) -> Result<(), TestCaseError> {
    prop_assert_eq!(map.fences.len() + 1, map.chunks.len().max(1));
    for (chunk, runs) in map.chunks.iter().enumerate() {
        prop_assert!(runs.len() > 0 && runs.len() <= FULL);
        let above = map.fences.get(chunk).is_none_or(|fence| runs.0.iter().all(|run| run.start < *fence));
        let below = chunk == 0 || runs.0.iter().all(|run| run.start >= map.fences[chunk - 1]);
        prop_assert!(above && below, "fences do not separate: {:?}", map);
    }
    let runs: Vec<_> = map.all().collect();
    for pair in runs.windows(2) {
        prop_assert!(
            pair[0].end() < pair[1].start
                || pair[0].end() == pair[1].start && pair[0].at(pair[1].start) != pair[1].value
        );
    }
    Ok(())
}

#[test]
fn continuing_runs_become_one() {
    let mut map = RunMap::new();
    map.insert(10, 5, Value::Moving(100));
    map.insert(20, 5, Value::Moving(110));
    map.insert(15, 5, Value::Moving(105));
    assert_eq!(map.iter().collect::<Vec<_>>(), [(10, 15, &Value::Moving(100))]);
}

#[test]
fn replacing_the_middle_of_a_run_keeps_its_sides() {
    let mut map = RunMap::new();
    map.insert(0, 10, Value::Moving(100));
    map.insert(4, 2, Value::Constant(1));
    let runs: Vec<_> = map.runs(3, 5).collect();
    assert_eq!(runs, [(3, 1, Value::Moving(103)), (4, 2, Value::Constant(1)), (6, 2, Value::Moving(106))]);
    map.insert(4, 2, Value::Moving(104));
    assert_eq!(map.run_count(), 1);
}

#[test]
fn ranges_end_with_the_page_numbers() {
    let mut map = RunMap::new();
    map.insert(u64::MAX - 2, 9, Value::Constant(1));
    assert_eq!(map.iter().collect::<Vec<_>>(), [(u64::MAX - 2, 2, &Value::Constant(1))]);
    assert_eq!((map.get(u64::MAX - 1), map.get(u64::MAX)), (Some(Value::Constant(1)), None));
    map.insert(u64::MAX, 1, Value::Constant(2));
    map.insert(0, u64::MAX, Value::Constant(1));
    assert_eq!(map.runs(5, u64::MAX).collect::<Vec<_>>(), [(5, u64::MAX - 5, Value::Constant(1))]);
    map.remove(1, u64::MAX);
    assert_eq!(map.iter().collect::<Vec<_>>(), [(0, 1, &Value::Constant(1))]);
}

#[test]
fn no_pages_change_nothing() {
    let mut map = RunMap::new();
    map.insert(7, 0, Value::Constant(1));
    assert!(map.is_empty());
    map.insert(7, 3, Value::Constant(1));
    map.insert(8, 0, Value::Constant(2));
    map.remove(8, 0);
    assert_eq!((map.run_count(), map.runs(8, 0).count()), (1, 0));
}

/// Every number of fences that takes up to two steps to search, and every place among them.
#[test]
fn rank_counts_the_fences_up_to_a_page() {
    let fences: Vec<u64> = (1..=few(40, 600) as u64).map(|fence| fence * 2).collect();
    for fences in (0..=fences.len()).filter_map(|count| fences.get(..count)) {
        for page in 0..=fences.len() as u64 * 2 + 3 {
            assert_eq!(
                rank(fences, page),
                fences.partition_point(|fence| *fence <= page),
                "{page} among {}",
                fences.len()
            );
        }
    }
}

/// Enough for many chunks.
const PAGES: u64 = few(300, 2000) as u64;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]

    #[test]
    fn queried_runs_are_cut_to_the_range(
        inserts in prop::collection::vec((0u64..64, 1u64..12, 0u8..3), 0..20), start in 0u64..80, len in 0u64..40,
    ) {
        let mut map = RunMap::new();
        let mut oracle: [Option<u8>; 128] = [None; 128];
        for (at, n, value) in inserts {
            map.insert(at, n, Value::Constant(value));
            (at..at + n).for_each(|page| oracle[usize::try_from(page).unwrap()] = Some(value));
        }
        let got: Vec<(u64, Value)> =
            map.runs(start, len).flat_map(|(at, n, value)| (at..at + n).map(move |page| (page, value.clone()))).collect();
        let valued = |page| Some((page, Value::Constant(oracle[usize::try_from(page).unwrap()]?)));
        prop_assert_eq!(got, (start..start + len).filter_map(valued).collect::<Vec<_>>());
    }

    #[test]
    fn equal_contents_are_equal_maps(ops in prop::collection::vec((0u64..64, 1u64..12, 0u8..4), 0..30)) {
        let mut map = RunMap::new();
        for (at, n, kind) in ops {
            if kind == 0 { map.remove(at, n) } else { map.insert(at, n, Value::Constant(kind)) }
        }
        let mut page_by_page = RunMap::new();
        for page in (0..96).rev() {
            if let Some(value) = map.get(page) { page_by_page.insert(page, 1, value) }
        }
        prop_assert_eq!(map, page_by_page);
    }

    /// The other tests fit into one chunk.
    #[test]
    fn many_chunks_agree_with_one_value_per_page(
        stride in 1u64..4, ops in prop::collection::vec((0u64..PAGES, 0u64..600, 0u8..4, any::<bool>()), 1..few(4, 40)),
    ) {
        let mut map = RunMap::new();
        let mut oracle: Vec<Option<Value>> = Vec::from_iter((0..PAGES + 600).map(|_| None));
        for page in (0..PAGES).step_by(usize::try_from(stride).unwrap()) {
            let value = Value::Moving(page * 7 % 1001);
            map.insert(page, 1, value.clone());
            oracle[usize::try_from(page).unwrap()] = Some(value);
        }
        for (start, len, kind, insert) in ops {
            let len = if kind < 3 { len % 4 } else { len };
            let value = if kind == 0 { Value::Moving(start + 7) } else { Value::Constant(kind) };
            if insert { map.insert(start, len, value.clone()) } else { map.remove(start, len) }
            for page in start..start + len {
                oracle[usize::try_from(page).unwrap()] = insert.then(|| value.advance(page - start));
            }
            check_chunks(&map)?;
        }
        for (page, want) in oracle.iter().enumerate() {
            prop_assert_eq!(&map.get(page as u64), want);
        }
        let mut rebuilt = RunMap::new();
        for page in (0..PAGES + 600).rev() {
            if let Some(value) = &oracle[usize::try_from(page).unwrap()] { rebuilt.insert(page, 1, value.clone()) }
        }
        prop_assert_eq!(map, rebuilt);
    }

    #[test]
    fn agrees_with_one_value_per_page(ops in prop::collection::vec((0u64..64, 0u64..20, 0u8..4, any::<bool>()), 1..few(12, 60))) {
        let mut map = RunMap::new();
        let mut oracle: [Option<Value>; 96] = [const { None }; 96];
        for (start, len, kind, insert) in ops {
            let value = if kind == 0 { Value::Moving(start + 7) } else { Value::Constant(kind) };
            if insert { map.insert(start, len, value.clone()) } else { map.remove(start, len) }
            for page in start..start + len {
                oracle[usize::try_from(page).unwrap()] = insert.then(|| value.advance(page - start));
            }
            for (page, want) in oracle.iter().enumerate() {
                prop_assert_eq!(&map.get(page as u64), want);
            }
            let mut covered = 0;
            let mut previous: Option<(u64, Value)> = None;
            for (at, n, v) in map.runs(0, 96) {
                covered += n;
                if let Some((end, next)) = previous { prop_assert!(end != at || next != v, "runs not merged"); }
                previous = Some((at + n, v.advance(n)));
            }
            prop_assert_eq!(covered, oracle.iter().flatten().count() as u64);
        }
    }
}
