//! What is known of transitions.
//!
//! The next step of a thread depends on three numbers: the thread's own state, the VM's, the machine's. Many steps do not look
//! at the machine and are known under two.

use rustc_hash::FxHashMap;

/// A transition of a thread, by numbers.
#[derive(Clone, Copy)]
pub(super) struct Next {
    /// [`Next::NONE`] when the thread cannot move.
    pub(super) thread: u32,
    pub(super) vm: u32,
    pub(super) machine: u32,
    /// What it reaches into, by its place among all that were met.
    pub(super) touch: u32,
}

impl Next {
    pub(super) const NONE: u32 = u32::MAX;

    pub(super) fn moves(&self) -> bool {
        self.thread != Self::NONE
    }
}

/// Which of the tables have something about a thread's state.
#[derive(Clone, Copy, Default)]
struct Hint {
    alone: bool,
    whole: bool,
}

/// The known transitions of one thread.
#[derive(Default)]
pub(super) struct Memo {
    /// By the thread's and the VM's state: steps that do not look at the machine.
    alone: FxHashMap<[u32; 2], Next>,
    /// By all three.
    whole: FxHashMap<[u32; 3], Next>,
    hints: Vec<Hint>,
}

impl Memo {
    pub(super) fn get(&self, [local, vm, machine]: [u32; 3]) -> Option<Next> {
        let hint = self.hints.get(local as usize)?;
        if hint.whole
            && let Some(next) = self.whole.get(&[local, vm, machine])
        {
            return Some(*next);
        }
        let next = self.alone.get(&[local, vm]).filter(|_| hint.alone)?;
        Some(Next { machine, ..*next })
    }

    pub(super) fn insert(&mut self, key: [u32; 3], next: Next, looks_at_machine: bool) {
        let [local, vm, _] = key;
        let at = local as usize;
        if self.hints.len() <= at {
            self.hints.resize(at + 1, Hint::default());
        }
        if let Some(hint) = self.hints.get_mut(at) {
            hint.alone |= !looks_at_machine;
            hint.whole |= looks_at_machine;
        }
        if looks_at_machine {
            self.whole.insert(key, next);
        } else {
            self.alone.insert([local, vm], next);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        table::<([u32; 2], Next)>(self.alone.capacity())
            + table::<([u32; 3], Next)>(self.whole.capacity())
            + self.hints.capacity() * size_of::<Hint>()
    }
}

/// Bytes of a hash table with room for so many: one of eight places stays empty, and each has a byte of its hash.
pub(super) fn table<T>(capacity: usize) -> usize {
    if capacity == 0 { 0 } else { (capacity * 8 / 7).next_power_of_two() * (size_of::<T>() + 1) }
}
