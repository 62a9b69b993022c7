//! Partial-order reduction: of transitions whose order cannot matter, one order is taken.

use gmem_core::Vm;
use gmem_core::vm::Tracking;

use crate::program::{Op, Program, Thread};
use crate::touch::{Objects, Touch};

/// What threads may still do.
pub(super) struct Futures {
    /// For each thread and statement: what it and all after it may reach into.
    by_statement: Vec<Vec<Touch>>,
    /// Parts that no transition of the program changes.
    pub(super) constant: Objects,
}

impl Futures {
    pub(super) fn new(program: &Program, vm: &Vm) -> Self {
        let constant = constants(program, vm);
        let in_place = vm.rules.tracking == Tracking::InPlace;
        let by_statement = program.threads.iter().map(|thread| of_thread(thread, in_place, constant)).collect();
        Self { by_statement, constant }
    }

    fn of(&self, thread: usize, counter: u16) -> Touch {
        let futures = self.by_statement.get(thread);
        futures.and_then(|futures| futures.get(usize::from(counter))).copied().unwrap_or_default()
    }

    /// A set of threads such that nothing the others may ever do can matter to what these do next, as a mask.
    ///
    /// It is a persistent set: a thread is taken in when some transition it may take from here on conflicts with the next
    /// transition of a thread that is in already. Every end that can be reached is reached through such a set too.
    pub(super) fn choose(&self, threads: &[Ready]) -> u32 {
        let mut best = (1u32 << threads.len()) - 1;
        for (first, _) in threads.iter().enumerate().filter(|(_, ready)| ready.moves) {
            let set = self.closure(threads, 1 << first);
            if set.count_ones() < best.count_ones() {
                best = set;
            }
            if best.count_ones() == 1 {
                break;
            }
        }
        best
    }

    fn closure(&self, threads: &[Ready], start: u32) -> u32 {
        let mut set = start;
        let mut touch = Touch::default();
        let mut added = start;
        while added != 0 {
            for (thread, ready) in threads.iter().enumerate() {
                if added & (1 << thread) != 0 {
                    touch.add(ready.touch);
                }
            }
            added = 0;
            for (thread, ready) in threads.iter().enumerate() {
                if set & (1 << thread) == 0 && self.of(thread, ready.counter).conflicts(touch) {
                    added |= 1 << thread;
                }
            }
            set |= added;
        }
        set
    }
}

/// What a thread does next.
#[derive(Clone, Copy)]
pub(super) struct Ready {
    pub(super) moves: bool,
    pub(super) touch: Touch,
    /// The statement that it is at.
    pub(super) counter: u16,
}

fn of_thread(thread: &Thread, in_place: bool, constant: Objects) -> Vec<Touch> {
    let mut rest = Touch::default();
    let futures = thread.stmts.iter().rev().map(|stmt| {
        rest.add(Touch::of_op(&stmt.op, thread.kind, in_place).without(constant));
        rest
    });
    let mut futures: Vec<Touch> = futures.collect();
    futures.reverse();
    futures
}

/// Parts that no transition changes, or that nobody can tell apart.
fn constants(program: &Program, vm: &Vm) -> Objects {
    let stmts = || program.threads.iter().flat_map(|thread| &thread.stmts);
    let mut constant = Objects::empty();
    if vm.arch.is_stateless() {
        constant |= Objects::ARCH;
    }
    if !stmts().any(|stmt| matches!(stmt.op, Op::CreateSlot(_) | Op::DeleteSlot { .. } | Op::MoveSlot { .. })) {
        constant |= Objects::READERS;
    }
    if !stmts().any(|stmt| matches!(stmt.op, Op::CloseVm)) {
        constant |= Objects::LIFE;
    }
    constant
}
