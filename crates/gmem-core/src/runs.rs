//! A map from pages to values that stores one entry per run of pages whose values continue one another.
//!
//! The runs lie in ascending order in chunks, which are short enough to shift and to search in a few cache lines; fences
//! between the chunks say which chunk to search. A change of one page searches once, also where it depends on what the page
//! has ([`RunMap::span`]), and then works in place. A tree of single runs, which this was, needs up to seven descents for that.

#[cfg(test)]
mod tests;

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
const FULL: usize = 32;
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

/// Some neighbouring runs.
#[derive(Clone)]
struct Chunk<V>(Vec<Run<V>>);

impl<V> Chunk<V> {
    fn len(&self) -> usize {
        self.0.len()
    }

    /// Runs that start before `page`.
    ///
    /// Counting all of them is as fast as halving where they are cached. Where they are not, halving waits for memory at
    /// each step, and counting once.
    #[inline]
    fn before(&self, page: u64) -> usize {
        self.0.iter().map(|run| usize::from(run.start < page)).sum()
    }

    fn insert(&mut self, at: usize, run: Run<V>) {
        self.0.insert(at.min(self.0.len()), run);
    }

    fn put(&mut self, at: usize, run: Run<V>) {
        if let Some(old) = self.0.get_mut(at) {
            *old = run;
        }
    }

    /// Takes `count` runs from `at` out.
    fn remove(&mut self, at: usize, count: usize) {
        if count == 1 && at < self.0.len() {
            self.0.remove(at);
        } else if count > 0 {
            let end = (at + count).min(self.0.len());
            self.0.drain(at.min(end)..end);
        }
    }
}

/// Parts that one step of [`rank`] tells apart.
const WAYS: usize = 6;

/// How many of the fences, which ascend, are not above `page`.
///
/// Each step looks at five fences, which the processor loads at the same time: halving would take more than twice the steps,
/// each of which waits for the one before.
#[inline]
fn rank(mut fences: &[u64], page: u64) -> usize {
    let mut below = 0;
    while fences.len() > 2 * WAYS {
        let part = fences.len() / WAYS;
        let passed = (1..WAYS).map(|parts| usize::from(fences[parts * part - 1] <= page)).sum::<usize>() * part;
        below += passed;
        // One part and what the division left over.
        fences = &fences[passed..][..fences.len() - (WAYS - 1) * part];
    }
    below + fences.iter().map(|fence| usize::from(*fence <= page)).sum::<usize>()
}

/// What lies beyond the ends of a chunk.
#[derive(Clone, Copy)]
struct Neighbours {
    before: bool,
    after: bool,
}

/// Where a run is: chunk, and place in it.
#[derive(Clone, Copy, Debug)]
struct Place {
    chunk: usize,
    run: usize,
}

impl<V: Linear> Chunk<V> {
    /// Replaces what `[start, end)` has by `new`, if no run is concerned but the one before `at`, the first that starts at
    /// `start` or after, and that one. Returns whether the number of runs changed; `None` if more runs may be concerned,
    /// and then nothing has changed.
    ///
    /// Between one run before and two after, nothing of other chunks is concerned, nor a fence.
    fn edit(&mut self, at: usize, start: u64, end: u64, new: Option<&Run<V>>, others: Neighbours) -> Option<bool> {
        if (at == 0 && others.before) || (at + 2 > self.len() && others.after) {
            return None;
        }
        let (before, here) = (at.checked_sub(1).and_then(|before| self.0.get(before)), self.0.get(at));
        if before.is_some_and(|before| before.end() > start) {
            // Within the run before, or up to its end.
            return before.is_some_and(|run| run.end() >= end).then(|| self.edit_within(at, start, end, new));
        }
        let exact = here.is_some_and(|here| here.start == start && here.end() == end);
        if let Some(here) = here.filter(|here| here.start < end && !exact) {
            return if here.start == start && here.end() > end { self.edit_head(at, end, new) } else { None };
        }
        let removed = usize::from(exact);
        let Some(new) = new else {
            self.remove(at, removed);
            return Some(exact);
        };
        let joins_before = before.is_some_and(|before| before.end() == start && before.at(start) == new.value);
        // What follows the range, once the run that it may replace is gone.
        let after = self.0.get(at + removed).filter(|after| after.start == end && new.at(end) == after.value);
        match (joins_before, after.map(|after| after.len)) {
            (false, None) if exact => self.put(at, new.clone()),
            (false, None) => self.insert(at, new.clone()),
            (true, None) => {
                self.grow(at - 1, end - start);
                self.remove(at, removed);
            }
            (false, Some(more)) => {
                self.put(at + removed, Run { len: new.len + more, ..new.clone() });
                self.remove(at, removed);
            }
            (true, Some(more)) => {
                self.grow(at - 1, end - start + more);
                self.remove(at, removed + 1);
            }
        }
        Some(true)
    }

    /// The same if the range is the first part of the run at `at`.
    fn edit_head(&mut self, at: usize, end: u64, new: Option<&Run<V>>) -> Option<bool> {
        let rest = self.0.get(at)?.cut(end, u64::MAX)?;
        let Some(new) = new else {
            self.put(at, rest);
            return Some(false);
        };
        if new.at(end) == rest.value {
            return None;
        }
        let before = at.checked_sub(1).and_then(|before| self.0.get(before));
        let joins_before = before.is_some_and(|run| run.end() == new.start && run.at(new.start) == new.value);
        self.put(at, rest);
        if joins_before {
            self.grow(at - 1, new.len);
        } else {
            self.insert(at, new.clone());
        }
        Some(!joins_before)
    }

    /// The same if the run before `at` has all of `[start, end)`.
    fn edit_within(&mut self, at: usize, start: u64, end: u64, new: Option<&Run<V>>) -> bool {
        let Some(whole) = at.checked_sub(1).and_then(|before| self.0.get_mut(before)) else { return false };
        if new.is_some_and(|new| whole.at(start) == new.value) {
            return false;
        }
        let right = whole.cut(end, u64::MAX);
        whole.len = start - whole.start;
        let after = if right.is_none() { self.0.get(at) } else { None };
        if let (Some(new), Some(after)) = (new, after)
            && after.start == end
            && new.at(end) == after.value
        {
            let joined = Run { len: new.len + after.len, ..new.clone() };
            self.put(at, joined);
            return false;
        }
        let changed = new.is_some() || right.is_some();
        right.into_iter().for_each(|right| self.insert(at, right));
        new.into_iter().for_each(|new| self.insert(at, new.clone()));
        changed
    }

    fn grow(&mut self, at: usize, pages: u64) {
        if let Some(run) = self.0.get_mut(at) {
            run.len += pages;
        }
    }
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
    chunks: Vec<Chunk<V>>,
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self { fences: Vec::new(), chunks: Vec::new() }
    }
}

impl<V> RunMap<V> {
    fn all(&self) -> impl Iterator<Item = &Run<V>> {
        self.chunks.iter().flat_map(|chunk| &chunk.0)
    }
}

impl<V: PartialEq> PartialEq for RunMap<V> {
    fn eq(&self, other: &Self) -> bool {
        self.all().eq(other.all())
    }
}

impl<V: Eq> Eq for RunMap<V> {}

impl<V: Hash> Hash for RunMap<V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.chunks.iter().map(Chunk::len).sum());
        self.all().for_each(|run| run.hash(state));
    }
}

impl<V: fmt::Debug> fmt::Debug for RunMap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.all().map(|run| (run.start..run.start + run.len, &run.value))).finish()
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
        self.chunks.iter().map(Chunk::len).sum()
    }

    /// The value of `page`.
    #[must_use]
    pub fn get(&self, page: u64) -> Option<V> {
        self.value_at(self.find(page), page)
    }

    /// The value of `page`; the first run that starts there or after is at `at`.
    fn value_at(&self, at: Place, page: u64) -> Option<V> {
        let here = self.run(at).filter(|run| run.start == page);
        let run = here.or_else(|| self.run(self.before(at)?))?;
        (page < run.end()).then(|| run.at(page))
    }

    /// Looks up `len` pages from `start`, to see what they have and then to change it, with one search.
    ///
    /// A range that would pass the last page number is cut there.
    pub fn span(&mut self, start: u64, len: u64) -> Span<'_, V> {
        let (first, end) = (self.find(start), start.saturating_add(len));
        Span { map: self, start, end, first }
    }

    /// Gives `value` to `start` and its continuation to the `len - 1` pages after it, replacing what was there.
    ///
    /// A range that would pass the last page number is cut there; `len` 0 changes nothing.
    pub fn insert(&mut self, start: u64, len: u64, value: V) {
        self.span(start, len).insert(value);
    }

    /// Takes the values of `len` pages from `start` away.
    pub fn remove(&mut self, start: u64, len: u64) {
        self.span(start, len).remove();
    }

    /// The runs that have pages in `len` pages from `start`, cut to that range: `(first page, pages, value)`.
    pub fn runs(&self, start: u64, len: u64) -> impl Iterator<Item = (u64, u64, V)> {
        self.runs_at(self.find(start), start, start.saturating_add(len))
    }

    fn runs_at(&self, at: Place, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, V)> {
        let before = self.before(at).and_then(|place| self.run(place));
        let touched = self.runs_from(at).take_while(move |run| run.start < end);
        let cut = before.into_iter().chain(touched).filter_map(move |run| run.cut(start, end));
        cut.map(|run| (run.start, run.len, run.value))
    }

    /// All runs in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &V)> {
        self.all().map(|run| (run.start, run.len, &run.value))
    }

    /// The chunk in which a run that starts at `page` is or would be.
    #[inline]
    fn chunk_of(&self, page: u64) -> usize {
        rank(&self.fences, page)
    }

    /// The first run that starts at `page` or after.
    fn find(&self, page: u64) -> Place {
        let chunk = self.chunk_of(page);
        Place { chunk, run: self.chunks.get(chunk).map_or(0, |chunk| chunk.before(page)) }
    }

    fn runs_from(&self, at: Place) -> impl Iterator<Item = &Run<V>> {
        let here = self.chunks.get(at.chunk).and_then(|chunk| chunk.0.get(at.run..)).unwrap_or_default();
        here.iter().chain(self.chunks.iter().skip(at.chunk + 1).flat_map(|chunk| &chunk.0))
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
        self.chunks.get(at.chunk)?.0.get(at.run)
    }

    /// Replaces what `[start, end)` has by `new`, which covers exactly that, or by nothing. `first` is the first run from
    /// `start`.
    fn replace(&mut self, first: Place, start: u64, end: u64, new: Option<Run<V>>) {
        let others = Neighbours { before: first.chunk > 0, after: first.chunk < self.fences.len() };
        let chunk = self.chunks.get_mut(first.chunk);
        let edit = chunk.and_then(|chunk| chunk.edit(first.run, start, end, new.as_ref(), others));
        match edit {
            Some(true) => self.balance(first.chunk),
            Some(false) => {}
            None => self.replace_any(first, start, end, new),
        }
    }

    /// The same for any number of runs in any chunks. `first` is the first run from `start`.
    fn replace_any(&mut self, mut first: Place, start: u64, end: u64, mut new: Option<Run<V>>) {
        let (mut left, mut right) = (None, None);
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
        let mut count = 0;
        for run in self.runs_from(Place { run: first.run + taken, ..first }).take_while(|run| run.start <= end) {
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
            self.chunks.push(Chunk(Vec::new()));
        }
        let Some(chunk) = self.chunks.get_mut(first.chunk) else { return };
        let (mut at, mut last) = (first.run, None);
        for run in new.into_iter().flatten() {
            last = Some(run.start);
            if taken > 0 && at < chunk.len() {
                chunk.put(at, run);
                taken -= 1;
            } else {
                chunk.insert(at, run);
            }
            at += 1;
        }
        let here = taken.min(chunk.len().saturating_sub(at));
        chunk.remove(at, here);
        self.take_from_next(first.chunk, taken - here);
        self.raise_fence(first.chunk, last);
        self.balance(first.chunk);
    }

    /// Takes `count` runs away from the chunks after `chunk`.
    fn take_from_next(&mut self, chunk: usize, mut count: usize) {
        let mut whole = 0;
        for next in self.chunks.iter_mut().skip(chunk + 1) {
            if count < next.len() {
                next.remove(0, count);
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
            *fence = self.chunks.get(chunk + 1).and_then(|next| next.0.first()).map_or(*fence, |run| run.start);
        }
    }

    /// Splits `chunk`, or joins it with the next, or drops it.
    fn balance(&mut self, chunk: usize) {
        let size = self.chunks.get(chunk).map_or(0, Chunk::len);
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
                runs.0.extend(next.0);
            }
        }
    }

    fn split(&mut self, chunk: usize) {
        // Maps are often filled in ascending order: leave the chunks full that no one comes back to.
        let keep = if chunk + 1 == self.chunks.len() { FULL } else { FULL / 2 };
        let Some(runs) = self.chunks.get_mut(chunk) else { return };
        // Room for all that it will ever have, and no more.
        let mut upper = Vec::with_capacity(FULL + 1);
        upper.extend(runs.0.drain(keep.min(runs.len())..));
        if let Some(first) = upper.first() {
            self.fences.insert(chunk, first.start);
            self.chunks.insert(chunk + 1, Chunk(upper));
        }
    }
}

/// A range of pages of a map that was looked up: see [`RunMap::span`].
#[derive(Debug)]
pub struct Span<'a, V> {
    map: &'a mut RunMap<V>,
    start: u64,
    end: u64,
    /// The first run that starts in the range or after it.
    first: Place,
}

impl<V: Linear> Span<'_, V> {
    /// The value of the first page.
    #[must_use]
    pub fn first(&self) -> Option<V> {
        self.map.value_at(self.first, self.start)
    }

    /// The runs that have pages in the range, cut to it: `(first page, pages, value)`.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, V)> {
        self.map.runs_at(self.first, self.start, self.end)
    }

    /// Gives `value` to the first page and its continuation to those after it, replacing what was there.
    pub fn insert(self, value: V) {
        if self.start < self.end {
            let new = Run { start: self.start, len: self.end - self.start, value };
            self.map.replace(self.first, self.start, self.end, Some(new));
        }
    }

    /// Takes the values of the range away.
    pub fn remove(self) {
        if self.start < self.end {
            self.map.replace(self.first, self.start, self.end, None);
        }
    }
}
