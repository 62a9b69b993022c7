//! A map from pages to values that stores one entry per run of pages whose values continue one another.
//!
//! The runs lie in ascending order in chunks, which are short enough to shift and to search in a few cache lines; fences
//! between the chunks say which chunk to search. A change of one page searches once and then works in place. A tree of
//! single runs, which this was, needs up to seven descents for that.

use alloc::vec::Vec;
use core::fmt;
use core::hash::{Hash, Hasher};

/// A value that may describe a whole run of consecutive pages.
pub trait Linear: Clone + Eq {
    /// The value of the page that lies `pages` after the page that has this value.
    ///
    /// A constant returns itself; a mapping returns an address that lies `pages` further.
    #[must_use]
    fn advance(&self, pages: u64) -> Self;
}

/// Most runs that a chunk has between two operations.
const FULL: usize = 64;
/// A chunk with fewer runs joins the next one if both together are at most half full.
const SMALL: usize = FULL / 8;

#[derive(Clone, PartialEq, Eq, Hash)]
struct Run<V> {
    start: u64,
    len: u64,
    value: V,
}

impl<V: Linear> Run<V> {
    const fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The value that `page`, which does not lie before the run, has or would have if the run went on.
    fn at(&self, page: u64) -> V {
        self.value.advance(page - self.start)
    }

    /// The part of the run in `[from, to)`.
    fn cut(&self, from: u64, to: u64) -> Option<Self> {
        let (start, end) = (self.start.max(from), self.end().min(to));
        (start < end).then(|| Self { start, len: end - start, value: self.at(start) })
    }
}

/// Where a run is: chunk, and place in it.
#[derive(Clone, Copy)]
struct Place {
    chunk: usize,
    run: usize,
}

/// Values of pages, keyed by raw page number. Absent pages have no value.
///
/// Memory is proportional to the number of runs, and a range operation costs what the runs that it touches cost. Maps are
/// equal, and hash alike, when every page has the same value.
#[derive(Clone)]
pub struct RunMap<V> {
    /// `fences[i]` lies above every start in `chunks[i]` and not above any in `chunks[i + 1]`.
    fences: Vec<u64>,
    /// None is empty.
    chunks: Vec<Vec<Run<V>>>,
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self { fences: Vec::new(), chunks: Vec::new() }
    }
}

impl<V: PartialEq> PartialEq for RunMap<V> {
    fn eq(&self, other: &Self) -> bool {
        self.chunks.iter().flatten().eq(other.chunks.iter().flatten())
    }
}

impl<V: Eq> Eq for RunMap<V> {}

impl<V: Hash> Hash for RunMap<V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.chunks.iter().map(Vec::len).sum());
        self.chunks.iter().flatten().for_each(|run| run.hash(state));
    }
}

impl<V: fmt::Debug> fmt::Debug for RunMap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.chunks.iter().flatten();
        f.debug_map().entries(runs.map(|run| (run.start..run.start + run.len, &run.value))).finish()
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
        self.chunks.is_empty()
    }

    /// Number of runs, a measure of memory.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.chunks.iter().map(Vec::len).sum()
    }

    /// The value of `page`.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<V> {
        let run = self.run(self.before(self.find(page, |start| start <= page))?)?;
        (page < run.end()).then(|| run.at(page))
    }

    /// Gives `value` to `start` and its continuation to the `len - 1` pages after it, replacing what was there.
    ///
    /// A range that would pass the last page number is cut there; `len` 0 changes nothing.
    pub fn insert(&mut self, start: u64, len: u64, value: V) {
        let len = len.min(u64::MAX - start);
        if len > 0 {
            self.replace(start, start + len, Some(Run { start, len, value }));
        }
    }

    /// Takes the values of `len` pages from `start` away.
    pub fn remove(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        if start < end {
            self.replace(start, end, None);
        }
    }

    /// The runs that have pages in `len` pages from `start`, cut to that range: `(first page, pages, value)`.
    pub fn runs(&self, start: u64, len: u64) -> impl Iterator<Item = (u64, u64, V)> {
        let end = start.saturating_add(len);
        let at = self.find(start, |first| first < start);
        let before = self.before(at).and_then(|place| self.run(place));
        let here = self.chunks.get(at.chunk).and_then(|chunk| chunk.get(at.run..)).unwrap_or_default();
        let later = self.chunks.iter().skip(at.chunk + 1).flatten();
        let touched = here.iter().chain(later).take_while(move |run| run.start < end);
        let cut = before.into_iter().chain(touched).filter_map(move |run| run.cut(start, end));
        cut.map(|run| (run.start, run.len, run.value))
    }

    /// All runs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> {
        self.chunks.iter().flatten().map(|run| (run.start, run.len, &run.value))
    }

    /// The first run whose start does not satisfy `earlier`, which holds for the starts below some number that is at
    /// most one above `page`.
    fn find(&self, page: u64, earlier: impl Fn(u64) -> bool) -> Place {
        let chunk = self.fences.partition_point(|fence| *fence <= page);
        let run = self.chunks.get(chunk).map_or(0, |chunk| chunk.partition_point(|run| earlier(run.start)));
        Place { chunk, run }
    }

    /// The run before a place.
    fn before(&self, at: Place) -> Option<Place> {
        if let Some(run) = at.run.checked_sub(1) {
            return Some(Place { run, ..at });
        }
        let chunk = at.chunk.checked_sub(1)?;
        Some(Place { chunk, run: self.chunks.get(chunk)?.len().checked_sub(1)? })
    }

    fn run(&self, at: Place) -> Option<&Run<V>> {
        self.chunks.get(at.chunk)?.get(at.run)
    }

    /// Replaces what `[start, end)` has by `new`, which covers exactly that, or by nothing.
    fn replace(&mut self, start: u64, end: u64, mut new: Option<Run<V>>) {
        let (mut first, mut left, mut right) = (self.find(start, |at| at < start), None, None);
        let mut taken = 0;
        if let Some((place, run)) = self.before(first).and_then(|place| Some((place, self.run(place)?)))
            && run.end() >= start
        {
            let continued = new.as_ref().is_some_and(|new| run.at(start) == new.value);
            if continued && run.end() >= end {
                return;
            }
            if continued && let Some(new) = &mut new {
                *new = Run { start: run.start, len: end - run.start, value: run.value.clone() };
            } else if run.end() > start {
                left = run.cut(0, start);
                right = run.cut(end, u64::MAX);
            }
            if continued || left.is_some() {
                (first, taken) = (place, 1);
            }
        }
        taken += self.swallow(first, taken, end, &mut new, &mut right);
        self.splice(first, taken, [left, new, right]);
    }

    /// Counts the runs from `taken` after `first` that start before `end` or continue `new`; what the last of them has
    /// beyond `end` goes to `right` or `new`.
    fn swallow(
        &self,
        first: Place,
        taken: usize,
        end: u64,
        new: &mut Option<Run<V>>,
        right: &mut Option<Run<V>>,
    ) -> usize {
        let here = self.chunks.get(first.chunk).and_then(|chunk| chunk.get(first.run + taken..)).unwrap_or_default();
        let later = self.chunks.iter().skip(first.chunk + 1).flatten();
        let mut count = 0;
        for run in here.iter().chain(later).take_while(|run| run.start <= end) {
            let rest = run.cut(end, u64::MAX);
            let continues = rest.as_ref().zip(new.as_ref()).is_some_and(|(rest, new)| new.at(end) == rest.value);
            if run.start == end && !continues {
                break;
            }
            count += 1;
            *right = rest;
        }
        if let (Some(rest), Some(new)) = (&*right, &mut *new)
            && new.at(end) == rest.value
        {
            new.len += rest.len;
            *right = None;
        }
        count
    }

    /// Puts the runs of `new` in the place of the `taken` ones from `first`.
    fn splice(&mut self, first: Place, mut taken: usize, new: [Option<Run<V>>; 3]) {
        if self.chunks.is_empty() {
            self.chunks.push(Vec::new());
        }
        let Some(chunk) = self.chunks.get_mut(first.chunk) else { return };
        let (mut at, mut last) = (first.run, None);
        for run in new.into_iter().flatten() {
            last = Some(run.start);
            match chunk.get_mut(at).filter(|_| taken > 0) {
                Some(old) => {
                    *old = run;
                    taken -= 1;
                }
                None => chunk.insert(at.min(chunk.len()), run),
            }
            at += 1;
        }
        let here = taken.min(chunk.len().saturating_sub(at));
        chunk.drain(at..at + here);
        let size = chunk.len();
        self.take_from_next(first.chunk, taken - here);
        self.raise_fence(first.chunk, last);
        self.balance(first.chunk, size);
    }

    /// Takes `count` runs away from the chunks after `chunk`.
    fn take_from_next(&mut self, chunk: usize, mut count: usize) {
        let mut whole = 0;
        for next in self.chunks.iter_mut().skip(chunk + 1) {
            if count < next.len() {
                next.drain(..count);
                break;
            }
            count -= next.len();
            whole += 1;
        }
        if whole > 0 {
            self.chunks.drain(chunk + 1..chunk + 1 + whole);
            self.fences.drain(chunk..chunk + whole);
        }
    }

    /// Keeps the fence after `chunk` above `last`, a start in it.
    fn raise_fence(&mut self, chunk: usize, last: Option<u64>) {
        if let (Some(fence), Some(last)) = (self.fences.get_mut(chunk), last)
            && *fence <= last
        {
            *fence = self.chunks.get(chunk + 1).and_then(|next| next.first()).map_or(*fence, |run| run.start);
        }
    }

    /// Splits `chunk`, which has `size` runs, or joins it with the next, or drops it.
    fn balance(&mut self, chunk: usize, size: usize) {
        if size > FULL {
            self.split(chunk);
        } else if size == 0 {
            self.chunks.remove(chunk);
            let fence = chunk.min(self.fences.len().saturating_sub(1));
            if !self.fences.is_empty() {
                self.fences.remove(fence);
            }
        } else if size < SMALL && self.chunks.get(chunk + 1).is_some_and(|next| next.len() + size <= FULL / 2) {
            let next = self.chunks.remove(chunk + 1);
            self.fences.remove(chunk);
            if let Some(runs) = self.chunks.get_mut(chunk) {
                runs.extend(next);
            }
        }
    }

    fn split(&mut self, chunk: usize) {
        // Maps are often filled in ascending order: leave the chunks full that no one comes back to.
        let keep = if chunk + 1 == self.chunks.len() { FULL } else { FULL / 2 };
        let Some(upper) = self.chunks.get_mut(chunk).map(|runs| runs.split_off(keep)) else { return };
        if let Some(first) = upper.first() {
            self.fences.insert(chunk, first.start);
            self.chunks.insert(chunk + 1, upper);
        }
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

    fn check_chunks(map: &RunMap<Value>) -> Result<(), TestCaseError> {
        prop_assert_eq!(map.fences.len() + 1, map.chunks.len().max(1));
        for (chunk, runs) in map.chunks.iter().enumerate() {
            prop_assert!(!runs.is_empty() && runs.len() <= FULL);
            let above = map.fences.get(chunk).is_none_or(|fence| runs.iter().all(|run| run.start < *fence));
            let below = chunk == 0 || runs.iter().all(|run| run.start >= map.fences[chunk - 1]);
            prop_assert!(above && below, "fences do not separate: {:?}", map);
        }
        let runs: Vec<_> = map.chunks.iter().flatten().collect();
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

        /// The other tests fit into one chunk.
        #[test]
        fn many_chunks_agree_with_one_value_per_page(
            stride in 1u64..4, ops in prop::collection::vec((0u64..2000, 0u64..600, 0u8..4, any::<bool>()), 1..40),
        ) {
            let mut map = RunMap::new();
            let mut oracle: Vec<Option<Value>> = Vec::from_iter((0..2600).map(|_| None));
            for page in (0..2000).step_by(usize::try_from(stride).unwrap()) {
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
            for page in (0..2600).rev() {
                if let Some(value) = &oracle[page] { rebuilt.insert(page as u64, 1, value.clone()) }
            }
            prop_assert_eq!(map, rebuilt);
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
