//! Shared objects by descriptor number, looked up without a lock.
//!
//! Nearly every call of a client is about a descriptor that is not gmem's, and any may come from a signal handler that
//! interrupted its thread anywhere. So a look-up waits for nobody, and nobody waits for one that was interrupted: what a change
//! takes out of the table is given up once no look-up is under way and no thread has it pinned ([`Pin`]).

use core::array;
use core::ptr::{self, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use once_cell::race::OnceBox;

mod pin;

use self::pin::Hazard;
pub use self::pin::{Held, Pin};

/// Base-2 logarithm of the numbers in a leaf, and of the leaves in a branch.
const SHIFT: u32 = 10;
const FAN_OUT: usize = 1 << SHIFT;
/// Descriptors are below 2^31.
const BRANCHES: usize = 1 << (31 - 2 * SHIFT);
/// How often a change looks whether look-ups are still under way: longer than they take, if they are not interrupted.
const PATIENCE: u32 = 1000;

/// What is looked for by SeqCst is taken back by Release. Only Miri lets a SeqCst load pass over the last SeqCst store and find an older
/// Release store, which the memory model forbids.
const RELEASE: Ordering = if cfg!(miri) { Ordering::SeqCst } else { Ordering::Release };

type Leaf<T> = [AtomicPtr<T>; FAN_OUT];
type Branch<T> = [OnceBox<Leaf<T>>; FAN_OUT];

/// An `Arc` for each number, or none.
#[derive(Debug)]
pub struct Table<T> {
    branches: Box<[OnceBox<Branch<T>>]>,
    /// Look-ups under way, those of this process at [`Table::generation`].
    readers: [AtomicUsize; 2],
    generation: AtomicUsize,
    /// The first of what threads have pinned; the others are linked from it.
    hazards: OnceBox<Hazard<T>>,
    /// What was taken out while look-ups were under way, or was pinned.
    retired: Mutex<Vec<Arc<T>>>,
    has_retired: AtomicBool,
}

/// Keeps changes of a table from beginning.
#[derive(Debug)]
pub struct Changes<'a, T>(MutexGuard<'a, Vec<Arc<T>>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            branches: (0..BRANCHES).map(|_| OnceBox::new()).collect(),
            readers: Default::default(),
            generation: AtomicUsize::new(0),
            hazards: OnceBox::new(),
            retired: Mutex::default(),
            has_retired: AtomicBool::new(false),
        }
    }
}

/// Where the entry for a number is: its branch, leaf and place.
fn path(fd: i32) -> Option<(usize, usize, usize)> {
    let fd = usize::try_from(fd).ok()?;
    Some((fd >> (2 * SHIFT), fd >> SHIFT & (FAN_OUT - 1), fd & (FAN_OUT - 1)))
}

impl<T> Table<T> {
    fn place(&self, fd: i32) -> Option<&AtomicPtr<T>> {
        let (branch, leaf, place) = path(fd)?;
        self.branches.get(branch)?.get()?.get(leaf)?.get()?.get(place)
    }

    fn place_or_new(&self, fd: i32) -> Option<&AtomicPtr<T>> {
        let (branch, leaf, place) = path(fd)?;
        let branch = self.branches.get(branch)?.get_or_init(|| Box::new(array::from_fn(|_| OnceBox::new())));
        branch.get(leaf)?.get_or_init(|| Box::new(array::from_fn(|_| AtomicPtr::new(null_mut())))).get(place)
    }

    /// Whether there is an entry for `fd`.
    #[must_use]
    pub fn contains(&self, fd: i32) -> bool {
        self.place(fd).is_some_and(|place| !place.load(Ordering::Acquire).is_null())
    }

    /// The entry for `fd`.
    #[must_use]
    pub fn get(&self, fd: i32) -> Option<Arc<T>> {
        let place = self.place(fd)?;
        if place.load(Ordering::Relaxed).is_null() {
            return None;
        }
        let readers = self.readers();
        // SeqCst here and for the entry, as in `swap`: either this look-up sees the entry that a change has put in, or the
        // change sees this look-up.
        readers.fetch_add(1, Ordering::SeqCst);
        let entry = place.load(Ordering::SeqCst).cast_const();
        let entry = (!entry.is_null()).then(|| {
            // SAFETY: the pointer comes from `Arc::into_raw` in `swap`. Whoever takes it out of the table keeps its
            // reference until `readers` was seen to be 0 after that, hence until this one is counted.
            unsafe {
                Arc::increment_strong_count(entry);
                Arc::from_raw(entry)
            }
        });
        // Release: who sees no readers also sees what they counted.
        readers.fetch_sub(1, RELEASE);
        entry
    }

    /// Sets the entry for `fd`, and shows the old one to `look`. Returns what is in the table no longer, the old entry mostly
    /// among it, which may be much work to drop. To be called with signals blocked.
    #[must_use]
    pub fn replace(&self, fd: i32, entry: Option<Arc<T>>, look: impl FnOnce(Option<&T>)) -> Vec<Arc<T>> {
        let changes = self.changes();
        let place = if entry.is_some() { self.place_or_new(fd) } else { self.place(fd) };
        place.map_or_else(Vec::new, |place| self.swap(changes, place, entry, look))
    }

    /// Takes the entry for `fd` out, as [`replace`](Self::replace) does, if it is still `entry`.
    #[must_use]
    pub fn remove(&self, fd: i32, entry: &Arc<T>, look: impl FnOnce(Option<&T>)) -> Vec<Arc<T>> {
        let changes = self.changes();
        let same = |place: &&AtomicPtr<T>| ptr::eq(place.load(Ordering::Relaxed), Arc::as_ptr(entry));
        let place = self.place(fd).filter(same);
        place.map_or_else(Vec::new, |place| self.swap(changes, place, None, look))
    }

    fn swap(
        &self,
        mut changes: Changes<'_, T>,
        place: &AtomicPtr<T>,
        entry: Option<Arc<T>>,
        look: impl FnOnce(Option<&T>),
    ) -> Vec<Arc<T>> {
        let new = entry.map_or(null_mut(), |entry| Arc::into_raw(entry).cast_mut());
        let old = place.swap(new, Ordering::SeqCst);
        // SAFETY: the pointer comes from `Arc::into_raw` a few lines above, and only one change takes it out.
        let old = (!old.is_null()).then(|| unsafe { Arc::from_raw(old) });
        look(old.as_deref());
        changes.0.extend(old);
        self.collect(changes, PATIENCE)
    }

    /// Whether something was taken out of the table that [`take_retired`](Self::take_retired) may return by now.
    #[must_use]
    pub fn has_retired(&self) -> bool {
        self.has_retired.load(Ordering::Relaxed)
    }

    /// What was taken out of the table while look-ups were under way, unless others are, and is not pinned. To be called with
    /// signals blocked.
    #[must_use]
    pub fn take_retired(&self) -> Vec<Arc<T>> {
        self.collect(self.changes(), 1)
    }

    fn collect(&self, mut changes: Changes<'_, T>, patience: u32) -> Vec<Arc<T>> {
        let readers = self.readers();
        let unused = (0..patience).any(|_| {
            core::hint::spin_loop();
            readers.load(Ordering::SeqCst) == 0
        });
        let unpinned = |entry: &mut Arc<T>| unused && !self.is_pinned(entry);
        let retired = changes.0.extract_if(.., unpinned).collect();
        self.has_retired.store(!changes.0.is_empty(), Ordering::Relaxed);
        retired
    }

    /// Waits until no change is under way, and keeps others from beginning. To be called with signals blocked.
    #[must_use]
    pub fn changes(&self) -> Changes<'_, T> {
        Changes(self.retired.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The process is a child of fork: look-ups of threads that it does not have will never end. Of pins only `own` is left.
    pub fn is_child(&self, own: Option<&Pin<'_, T>>) {
        self.give_up_pins_but(own);
        let next = self.generation.load(Ordering::Relaxed) + 1;
        self.readers[next % 2].store(0, Ordering::Relaxed);
        self.generation.store(next, Ordering::Relaxed);
    }

    fn readers(&self) -> &AtomicUsize {
        &self.readers[self.generation.load(Ordering::Relaxed) % 2]
    }

    /// The numbers from `first` to `last` that have entries.
    pub fn numbers(&self, first: i32, last: i32) -> impl Iterator<Item = i32> {
        let mut next = Some(first.max(0));
        core::iter::from_fn(move || {
            while let Some(fd) = next.filter(|fd| *fd <= last) {
                let (branch, leaf, _) = path(fd)?;
                let branch = self.branches.get(branch)?.get();
                let skipped = match branch.map(|branch| branch[leaf].get().is_some()) {
                    Some(true) => 0,
                    Some(false) => SHIFT,
                    None => 2 * SHIFT,
                };
                next = (fd >> skipped).checked_add(1).and_then(|next| next.checked_mul(1 << skipped));
                if self.contains(fd) {
                    return Some(fd);
                }
            }
            None
        })
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        for fd in self.numbers(0, i32::MAX).collect::<Vec<_>>() {
            drop(self.replace(fd, None, |_| ()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn set<T>(table: &Table<T>, fd: i32, entry: Option<Arc<T>>) -> Vec<Arc<T>> {
        let old = table.contains(fd);
        table.replace(fd, entry, |seen| assert_eq!(seen.is_some(), old))
    }

    #[test]
    fn entries_are_told_from_their_neighbours() {
        let table = Table::default();
        let all: &[i32] = if cfg!(miri) { &[0, 63, 1 << 20] } else { &[0, 63, 1023, 1024, 1 << 20, i32::MAX] };
        for &fd in all {
            assert!(!table.contains(fd) && table.get(fd).is_none());
            assert!(set(&table, fd, Some(Arc::new(fd))).is_empty());
            assert_eq!(table.get(fd).as_deref(), Some(&fd));
            assert!(table.contains(fd) && !table.contains(fd ^ 1));
        }
        assert!(set(&table, -1, Some(Arc::new(-1))).is_empty() && table.get(-1).is_none());
        for (first, last) in [(0, i32::MAX), (-1, 63), (1, 1023), (64, 1 << 20), (1025, i32::MAX - 1)] {
            let within = all.iter().copied().filter(|fd| (first..=last).contains(fd));
            assert!(table.numbers(first, last).eq(within), "from {first} to {last}");
        }
        assert_eq!(set(&table, 63, None), [Arc::new(63)]);
        assert!(!table.contains(63));
        let (old, new) = (table.get(0).unwrap(), Arc::new(0));
        drop(set(&table, 0, Some(Arc::clone(&new))));
        assert!(table.remove(0, &old, |_| ()).is_empty() && table.contains(0));
        assert_eq!(table.remove(0, &new, |seen| assert_eq!(seen, Some(&0))), [Arc::new(0)]);
        assert!(!table.contains(0));
    }

    #[test]
    fn a_table_gives_up_what_it_has() {
        let (table, entry) = (Table::default(), Arc::new(()));
        drop(set(&table, 7, Some(Arc::clone(&entry))));
        drop(set(&table, 8, Some(Arc::clone(&entry))));
        drop(set(&table, 7, None));
        assert_eq!(Arc::strong_count(&entry), 2);
        drop(table);
        assert_eq!(Arc::strong_count(&entry), 1);
    }

    #[test]
    fn what_an_interrupted_look_up_may_have_seen_is_kept_until_it_ends() {
        let (table, entry) = (Table::default(), Arc::new(()));
        drop(set(&table, 7, Some(Arc::clone(&entry))));
        table.readers().fetch_add(1, Ordering::SeqCst);
        assert!(set(&table, 7, None).is_empty() && !table.contains(7));
        assert!(table.has_retired() && table.take_retired().is_empty());
        assert_eq!(Arc::strong_count(&entry), 2);
        table.readers().fetch_sub(1, Ordering::SeqCst);
        assert_eq!(table.take_retired().len(), 1);
        assert!(!table.has_retired());
        assert_eq!(Arc::strong_count(&entry), 1);
    }

    #[test]
    fn a_child_does_not_wait_for_threads_that_it_does_not_have() {
        let table = Table::default();
        drop(set(&table, 7, Some(Arc::new(()))));
        let interrupted = table.readers();
        interrupted.fetch_add(1, Ordering::SeqCst);
        table.is_child(None);
        assert_eq!(set(&table, 7, None).len(), 1);
        interrupted.fetch_sub(1, Ordering::SeqCst);
        assert_eq!(table.readers().load(Ordering::SeqCst), 0);
    }

    #[test]
    fn a_look_up_sees_what_was_there_while_it_ran() {
        let rounds = if cfg!(miri) { 50 } else { 20_000 };
        let table = Table::default();
        drop(set(&table, 3, Some(Arc::new(0))));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    while last < rounds {
                        let seen = *table.get(3).expect("there always is one");
                        assert!(seen >= last, "{seen} after {last}");
                        last = seen;
                    }
                });
            }
            (1..=rounds).for_each(|round| drop(set(&table, 3, Some(Arc::new(round)))));
        });
        drop(table.take_retired());
        assert!(!table.has_retired());
        assert_eq!(table.get(3).map(|last| *last), Some(rounds));
    }
}
