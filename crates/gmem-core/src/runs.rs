//! A map from pages to values that stores one entry per run of pages whose values continue one another.

use alloc::collections::BTreeMap;

/// A value that may describe a whole run of consecutive pages.
pub trait Linear: Clone + Eq {
    /// The value of the page that lies `pages` after the page that has this value.
    ///
    /// A constant returns itself; a mapping returns an address that lies `pages` further.
    #[must_use]
    fn advance(&self, pages: u64) -> Self;
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Run<V> {
    len: u64,
    value: V,
}

/// Values of pages, keyed by raw page number. Absent pages have no value.
///
/// Memory is proportional to the number of runs, and a range operation costs what the runs that it touches cost.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RunMap<V> {
    runs: BTreeMap<u64, Run<V>>,
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new() }
    }
}

impl<V: Linear> RunMap<V> {
    /// A map without values.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no page has a value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of runs, a measure of memory.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// The value of `page`.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<V> {
        let (&start, run) = self.runs.range(..=page).next_back()?;
        let offset = page - start;
        (offset < run.len).then(|| run.value.advance(offset))
    }

    /// Gives `value` to `start` and its continuation to the `len - 1` pages after it, replacing what was there.
    ///
    /// A range that would pass the last page number is cut there; `len` 0 changes nothing.
    pub fn insert(&mut self, start: u64, len: u64, value: V) {
        let mut len = len.min(u64::MAX - start);
        if len == 0 {
            return;
        }
        self.remove(start, len);
        let (mut start, mut value) = (start, value);
        if let Some((&before, run)) = self.runs.range(..start).next_back()
            && before + run.len == start
            && run.value.advance(run.len) == value
        {
            len += run.len;
            value = run.value.clone();
            start = before;
        }
        if let Some(run) = self.runs.get(&(start + len))
            && value.advance(len) == run.value
        {
            let after = start + len;
            len += run.len;
            self.runs.remove(&after);
        }
        self.runs.insert(start, Run { len, value });
    }

    /// Takes the values of `len` pages from `start` away.
    pub fn remove(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        if start >= end {
            return;
        }
        if let Some((&before, run)) = self.runs.range_mut(..start).next_back() {
            let before_end = before + run.len;
            if before_end > start {
                let tail =
                    (before_end > end).then(|| Run { len: before_end - end, value: run.value.advance(end - before) });
                run.len = start - before;
                if let Some(tail) = tail {
                    self.runs.insert(end, tail);
                    return;
                }
            }
        }
        while let Some((&inside, _)) = self.runs.range(start..end).next() {
            if let Some(run) = self.runs.remove(&inside)
                && inside + run.len > end
            {
                let value = run.value.advance(end - inside);
                self.runs.insert(end, Run { len: inside + run.len - end, value });
            }
        }
    }

    /// The runs that have pages in `len` pages from `start`, cut to that range: `(first page, pages, value)`.
    pub fn runs(&self, start: u64, len: u64) -> impl Iterator<Item = (u64, u64, V)> {
        let end = start.saturating_add(len);
        let before = self.runs.range(..start).next_back();
        before.into_iter().chain(self.runs.range(start..end)).filter_map(move |(&first, run)| {
            let cut_start = first.max(start);
            let cut_end = (first + run.len).min(end);
            (cut_start < cut_end).then(|| (cut_start, cut_end - cut_start, run.value.advance(cut_start - first)))
        })
    }

    /// All runs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> {
        self.runs.iter().map(|(&start, run)| (start, run.len, &run.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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

    proptest! {
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

        #[test]
        fn agrees_with_one_value_per_page(ops in prop::collection::vec((0u64..64, 0u64..20, 0u8..4, any::<bool>()), 1..60)) {
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
}
