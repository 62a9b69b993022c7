//! Entries in use over a call that may last and from which the thread may not come back.

use core::cell::Cell;
use core::marker::PhantomData;
use core::ops::ControlFlow;
use core::ptr::{self, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU64, Ordering, compiler_fence};

use once_cell::race::OnceBox;

use super::{RELEASE, Table};

/// What a thread says that it uses, for those who would give it up. In a cache line of its own, and the one that is fetched with it.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Hazard<T> {
    entry: AtomicPtr<T>,
    is_taken: AtomicBool,
    next: OnceBox<Self>,
}

impl<T> Hazard<T> {
    fn taken() -> Self {
        Self { entry: AtomicPtr::new(null_mut()), is_taken: AtomicBool::new(true), next: OnceBox::new() }
    }

    fn unpin(&self) {
        // Release: who finds nothing here is after all that was done with it.
        self.entry.store(null_mut(), RELEASE);
    }

    fn give_up(&self) {
        self.unpin();
        self.is_taken.store(false, Ordering::Release);
    }
}

/// A thread's place for one entry at a time, which stays as it is after it was taken out of the table.
///
/// In contrast to an `Arc` there is nothing to drop if the thread is ended or leaves by a jump, and one locked instruction
/// instead of four. A signal handler may use the pin of the thread that it interrupts: while that looks at its entry the handler
/// gets none, else the thread finds that it has lost it.
#[derive(Debug)]
pub struct Pin<'a, T> {
    table: &'a Table<T>,
    hazard: &'a Hazard<T>,
    state: AtomicU8,
    /// How often something was pinned.
    count: AtomicU64,
    /// Of one thread: the two are atomic for its handlers.
    thread: PhantomData<Cell<()>>,
}

const FREE: u8 = 0;
/// Someone looks at an entry, or changes which one is pinned.
const BUSY: u8 = 1;
const ENDED: u8 = 2;

/// An entry that was pinned, unless something else has been since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held(u64);

impl<T> Table<T> {
    /// A place to pin entries in, for the thread that asks. To be called with signals blocked.
    #[must_use]
    pub fn pin(&self) -> Pin<'_, T> {
        // No change takes an entry out meanwhile without seeing what is pinned here afterwards.
        let _changes = self.changes();
        let mut end = &self.hazards;
        let hazard = loop {
            match end.get() {
                None => break end.get_or_init(|| Box::new(Hazard::taken())),
                Some(hazard) if !hazard.is_taken.load(Ordering::Acquire) => {
                    hazard.is_taken.store(true, Ordering::Relaxed);
                    break hazard;
                }
                Some(hazard) => end = &hazard.next,
            }
        };
        Pin { table: self, hazard, state: AtomicU8::new(FREE), count: AtomicU64::new(0), thread: PhantomData }
    }

    fn hazards(&self) -> impl Iterator<Item = &Hazard<T>> {
        core::iter::successors(self.hazards.get(), |hazard| hazard.next.get())
    }

    /// Whether an entry that is in the table no longer, which was seen before, is still pinned.
    pub(super) fn is_pinned(&self, entry: &T) -> bool {
        // SeqCst, as in `Pin::pin`: either this sees the pin, or that has seen the entry gone.
        self.hazards().any(|hazard| ptr::eq(hazard.entry.load(Ordering::SeqCst), entry))
    }

    /// For a process that has no other threads.
    pub(super) fn give_up_pins_but(&self, own: Option<&Pin<'_, T>>) {
        let others = self.hazards().filter(|hazard| own.is_none_or(|own| !ptr::eq(*hazard, own.hazard)));
        others.for_each(Hazard::give_up);
    }
}

impl<T> Pin<'_, T> {
    /// Pins the entry for `fd` and shows it to `look`; if that returns nothing, it is not pinned. `None` also in a handler that came
    /// while the thread looked at an entry.
    #[inline]
    pub fn hold<R>(&self, fd: i32, look: impl FnOnce(&T) -> Option<R>) -> Option<(Held, R)> {
        self.exclusively(|| {
            let count = self.count.load(Ordering::Relaxed).wrapping_add(1);
            self.count.store(count, Ordering::Relaxed);
            let found = self.pin(fd).and_then(look);
            if found.is_none() {
                self.hazard.unpin();
            }
            found.map(|found| (Held(count), found))
        })
    }

    /// Shows the entry again, which stays pinned if `look` says to continue. `None` if it is not pinned any more.
    #[inline]
    pub fn look<B, C>(&self, held: Held, look: impl FnOnce(&T) -> ControlFlow<B, C>) -> Option<ControlFlow<B, C>> {
        self.exclusively(|| {
            let entry = self.hazard.entry.load(Ordering::Relaxed);
            if entry.is_null() || Held(self.count.load(Ordering::Relaxed)) != held {
                return None;
            }
            // SAFETY: pinned by this thread in `pin`, and not unpinned since; `exclusively` keeps handlers from that.
            let next = look(unsafe { &*entry });
            if next.is_break() {
                self.hazard.unpin();
            }
            Some(next)
        })
    }

    /// Where the entries are.
    #[must_use]
    pub fn table(&self) -> &Table<T> {
        self.table
    }

    /// The thread ends: nothing is pinned, nor will it be.
    ///
    /// # Safety
    /// No call of [`hold`](Self::hold) or [`look`](Self::look) on this pin goes on after this: the thread is outside of them, or
    /// their frames are gone.
    pub unsafe fn end(&self) {
        if self.state.swap(ENDED, Ordering::Relaxed) != ENDED {
            compiler_fence(Ordering::SeqCst);
            self.hazard.give_up();
        }
    }

    /// Does `work` while no handler can do this, unless this is a handler that came in such work.
    #[inline]
    fn exclusively<R>(&self, work: impl FnOnce() -> Option<R>) -> Option<R> {
        if self.state.load(Ordering::Relaxed) != FREE {
            return None;
        }
        // A handler that comes before this is done before this.
        self.state.store(BUSY, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        let result = work();
        compiler_fence(Ordering::SeqCst);
        self.state.store(FREE, Ordering::Relaxed);
        result
    }

    /// The entry for `fd`, which this is the only pin of the thread for from now on.
    fn pin(&self, fd: i32) -> Option<&T> {
        let place = self.table.place(fd)?;
        let mut entry = place.load(Ordering::Relaxed);
        loop {
            if entry.is_null() {
                return None;
            }
            // SeqCst here and for the entry, as in `swap` and `is_pinned`: either this sees what a change has put in, or the
            // change sees what is pinned.
            self.hazard.entry.store(entry, Ordering::SeqCst);
            let now = place.load(Ordering::SeqCst);
            if now == entry {
                // SAFETY: the pointer comes from `Arc::into_raw` in `swap`. It was in the table after it was pinned, so that
                // whoever takes it out sees that it is and keeps its reference until it is not.
                return Some(unsafe { &*entry });
            }
            entry = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    fn table(entry: &Arc<u32>) -> Table<u32> {
        let table = Table::default();
        set(&table, 7, Some(Arc::clone(entry)));
        table
    }

    fn set(table: &Table<u32>, fd: i32, entry: Option<Arc<u32>>) {
        drop(table.replace(fd, entry, |_| ()));
    }

    fn hold(pin: &Pin<'_, u32>, fd: i32) -> Option<Held> {
        pin.hold(fd, |entry| Some(*entry)).map(|(held, _)| held)
    }

    fn read(pin: &Pin<'_, u32>, held: Held) -> Option<u32> {
        pin.look(held, |entry| ControlFlow::<(), _>::Continue(*entry)).and_then(ControlFlow::continue_value)
    }

    fn release(pin: &Pin<'_, u32>, held: Held) -> Option<ControlFlow<()>> {
        pin.look(held, |_| ControlFlow::Break(()))
    }

    #[test]
    fn what_is_pinned_is_kept_until_it_is_not() {
        let entry = Arc::new(5);
        let table = table(&entry);
        let pin = table.pin();
        assert_eq!(hold(&pin, 8), None);
        assert_eq!(pin.hold(7, |_| None::<()>), None);
        set(&table, 7, None);
        assert_eq!(Arc::strong_count(&entry), 1, "nothing was pinned");
        set(&table, 7, Some(Arc::clone(&entry)));
        let held = hold(&pin, 7).unwrap();
        set(&table, 7, None);
        set(&table, 8, Some(Arc::new(6)));
        set(&table, 8, None);
        assert!(table.take_retired().is_empty() && table.has_retired());
        assert_eq!(read(&pin, held), Some(5));
        assert_eq!(Arc::strong_count(&entry), 2);
        assert_eq!(release(&pin, held), Some(ControlFlow::Break(())));
        assert_eq!((read(&pin, held), hold(&pin, 7)), (None, None));
        assert_eq!(table.take_retired(), [Arc::clone(&entry)]);
        assert!(!table.has_retired());
    }

    #[test]
    fn a_handler_that_pins_something_itself_leaves_nothing_to_whom_it_interrupted() {
        let entry = Arc::new(5);
        let table = table(&entry);
        set(&table, 8, Some(Arc::new(6)));
        let pin = table.pin();
        let interrupted = hold(&pin, 7).unwrap();
        let handlers = hold(&pin, 8).unwrap();
        assert_eq!((read(&pin, interrupted), read(&pin, handlers)), (None, Some(6)));
        assert_eq!(release(&pin, handlers), Some(ControlFlow::Break(())));
        assert_eq!(read(&pin, interrupted), None);
        set(&table, 7, None);
        assert_eq!(Arc::strong_count(&entry), 1);
    }

    #[test]
    fn a_handler_gets_nothing_while_the_thread_looks_at_an_entry() {
        let entry = Arc::new(5);
        let table = table(&entry);
        let pin = table.pin();
        let (held, ()) = pin.hold(7, |_| hold(&pin, 7).is_none().then_some(())).unwrap();
        let next = pin.look(held, |entry| {
            assert_eq!((hold(&pin, 7), read(&pin, held)), (None, None));
            set(&table, 7, None);
            ControlFlow::<(), _>::Continue(*entry)
        });
        assert_eq!(next, Some(ControlFlow::Continue(5)));
        assert_eq!(read(&pin, held), Some(5));
    }

    #[test]
    fn the_place_of_a_thread_that_has_ended_is_the_next_ones() {
        let entry = Arc::new(5);
        let table = table(&entry);
        let first = table.pin();
        let second = table.pin();
        assert!(!ptr::eq(first.hazard, second.hazard));
        let held = hold(&first, 7).unwrap();
        set(&table, 7, None);
        // SAFETY: neither looks at an entry.
        unsafe { first.end() };
        assert_eq!((read(&first, held), hold(&first, 7)), (None, None));
        assert_eq!(table.take_retired().len(), 1);
        let third = table.pin();
        assert!(ptr::eq(first.hazard, third.hazard));
        // SAFETY: as above.
        unsafe { first.end() };
        assert!(!ptr::eq(table.pin().hazard, third.hazard), "it was not given up twice");
    }

    #[test]
    fn a_child_has_its_own_threads_pin_only() {
        let entry = Arc::new(5);
        let table = table(&entry);
        let (own, other) = (table.pin(), table.pin());
        let held = hold(&own, 7).unwrap();
        hold(&other, 7).unwrap();
        set(&table, 7, None);
        table.is_child(Some(&own));
        assert_eq!(read(&own, held), Some(5));
        assert!(table.take_retired().is_empty());
        release(&own, held);
        assert_eq!(table.take_retired().len(), 1);
        assert!(ptr::eq(table.pin().hazard, other.hazard));
    }

    #[test]
    fn what_is_pinned_is_what_is_there_while_others_change_it() {
        const ROUNDS: u32 = if cfg!(miri) { 100 } else { 20_000 };
        let table = table(&Arc::new(0));
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let pin = table.pin();
                    let mut last = 0;
                    while last < ROUNDS {
                        let (held, seen) = pin.hold(7, |entry| Some(*entry)).expect("there always is one");
                        assert!(seen >= last, "{seen} after {last}");
                        assert_eq!(read(&pin, held), Some(seen));
                        release(&pin, held);
                        last = seen;
                    }
                });
            }
            (1..=ROUNDS).for_each(|round| set(&table, 7, Some(Arc::new(round))));
        });
        drop(table.take_retired());
        assert!(!table.has_retired());
    }
}
