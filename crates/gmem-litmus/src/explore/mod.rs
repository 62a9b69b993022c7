//! Every interleaving of a program.
//!
//! A state is a few numbers: one for the core's [`Vm`], one for the machine around it, one for each thread. What the numbers
//! stand for is stored once. A transition of a thread depends on three of them and changes at most these three, so each
//! distinct one is computed once, on the production code, and looked up afterwards ([`memo`]); that is what makes
//! millions of transitions a second possible without a model that is simpler than the code. [`reduce`] says which threads
//! have to be followed from a state.
//!
//! The search is breadth first, so the first state that shows something is reached by a shortest interleaving.

mod count;
mod graph;
mod memo;
mod reduce;

use gmem_core::Vm;
use gmem_core::seal::Memfd;
use indexmap::IndexSet;
use rustc_hash::FxBuildHasher;

use crate::machine::{Events, Machine};
use crate::outcome::Outcome;
use crate::program::{Stmt, ThreadKind};
use crate::scenario::Start;
use crate::touch::Touch;
use crate::turn::{Context, ThreadState, Turn};
use graph::Graph;
use memo::{Memo, Next};
use reduce::{Futures, Ready};

type Set<T> = IndexSet<T, FxBuildHasher>;

/// A bound at which exploring stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// States.
    pub states: usize,
    /// Bytes.
    pub memory: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { states: 20_000_000, memory: 4 << 30 }
    }
}

/// Whether interleavings that cannot differ are left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reduction {
    /// Of transitions whose order cannot matter only one order is taken.
    On,
    /// Every order is taken.
    Off,
}

/// What exploring found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Distinct states.
    pub states: usize,
    /// Transitions taken.
    pub transitions: u64,
    /// Paths from the start to an end, loops not counted; saturates.
    pub interleavings: u128,
    /// Outcomes, each with the number of interleavings that lead to it and the first state that has it.
    pub outcomes: Vec<(Outcome, u128, usize)>,
    /// Bytes in use at the end.
    pub memory: usize,
    /// Exploring stopped at a limit: there are more states.
    pub stopped: bool,
}

pub(crate) type Around = (Machine, Vec<Memfd>);

pub(crate) struct Explorer<'p> {
    context: &'p Context<'p>,
    vms: Set<Vm>,
    machines: Set<Around>,
    threads: Vec<Explored<'p>>,
    /// What transitions reach into, each combination once.
    touches: Set<Touch>,
    futures: Futures,
    reduction: Reduction,
    graph: Graph,
}

/// One thread and what is known of it.
struct Explored<'p> {
    number: u8,
    kind: ThreadKind,
    stmts: &'p [Stmt],
    locals: Set<ThreadState>,
    /// For each of `locals` the statement that it is at.
    counters: Vec<u16>,
    memo: Memo,
}

impl Explored<'_> {
    fn counter(&self, local: u32) -> u16 {
        self.counters.get(local as usize).copied().unwrap_or(u16::MAX)
    }

    fn has_finished(&self, local: u32) -> bool {
        usize::from(self.counter(local)) >= self.stmts.len()
    }

    fn intern(&mut self, local: ThreadState) -> u32 {
        let counter = local.pc;
        let (at, new) = self.locals.insert_full(local);
        if new {
            self.counters.push(counter);
        }
        number(at)
    }

    fn bytes(&self) -> usize {
        set_bytes(&self.locals, LOCAL_HEAP) + self.counters.capacity() * size_of::<u16>() + self.memo.bytes()
    }
}

impl<'p> Explorer<'p> {
    pub(crate) fn new(context: &'p Context<'p>, start: &Start, reduction: Reduction) -> Self {
        let explored = |(thread, number): (&'p crate::program::Thread, u8)| {
            let mut explored = Explored {
                number,
                kind: thread.kind,
                stmts: thread.stmts.as_slice(),
                locals: Set::default(),
                counters: Vec::new(),
                memo: Memo::default(),
            };
            explored.intern(ThreadState::new(thread.registers.len()));
            explored
        };
        let threads: Vec<_> = context.program.threads.iter().zip(0u8..).map(explored).collect();
        let mut explorer = Self {
            context,
            vms: Set::default(),
            machines: Set::default(),
            touches: Set::default(),
            futures: Futures::new(context.program, &start.vm),
            reduction,
            graph: Graph::new(2 + threads.len()),
            threads,
        };
        explorer.vms.insert(start.vm.clone());
        explorer.machines.insert((start.machine.clone(), start.memfds.clone()));
        // A thread that cannot move touches nothing.
        explorer.touches.insert(Touch::default());
        let first = vec![0; 2 + explorer.threads.len()];
        explorer.graph.insert(&first, u32::MAX);
        explorer
    }

    fn turn(&self, thread: usize, [local, vm, machine]: [u32; 3]) -> Option<Turn<'p>> {
        let explored = self.threads.get(thread)?;
        let local = explored.locals.get_index(local as usize)?.clone();
        let vm = self.vms.get_index(vm as usize)?.clone();
        let (machine, memfds) = self.machines.get_index(machine as usize)?.clone();
        Some(Turn::new(self.context, (explored.number, explored.kind, explored.stmts), local, (vm, machine, memfds)))
    }

    fn next(&mut self, thread: usize, key: [u32; 3]) -> Next {
        let none = Next { thread: Next::NONE, vm: key[1], machine: key[2], touch: 0 };
        let Some(explored) = self.threads.get(thread).filter(|thread| !thread.has_finished(key[0])) else {
            return none;
        };
        explored.memo.get(key).unwrap_or_else(|| self.compute(thread, key, none))
    }

    #[inline(never)]
    fn compute(&mut self, thread: usize, key: [u32; 3], none: Next) -> Next {
        let Some(mut turn) = self.turn(thread, key) else { return none };
        let taken = turn.take();
        let looks_at_machine = turn.touch.reaches_machine();
        let mut next = none;
        next.touch = number(self.touches.insert_full(turn.touch.without(self.futures.constant)).0);
        if taken {
            let Turn { thread: local, vm, machine, memfds, .. } = turn;
            next.vm = number(self.vms.insert_full(vm).0);
            if looks_at_machine {
                next.machine = number(self.machines.insert_full((machine, memfds)).0);
            }
            next.thread = self.threads[thread].intern(local);
        }
        self.threads[thread].memo.insert(key, next, looks_at_machine);
        next
    }

    /// Explores until nothing is left, a limit is reached, or `stop` says that a state at its end is enough.
    pub(crate) fn run(&mut self, limits: Limits, mut stop: impl FnMut(&Outcome) -> bool) -> Found {
        let mut found = Found::default();
        let mut ends = Ends::default();
        let mut state = vec![0; 2 + self.threads.len()];
        let mut nexts = Vec::with_capacity(self.threads.len());
        let mut at = 0;
        while at < self.graph.len() {
            if self.graph.len() > limits.states || (at & 0x3ff == 0 && self.bytes() > limits.memory) {
                found.stopped = true;
                break;
            }
            state.copy_from_slice(self.graph.state(at));
            nexts.clear();
            for thread in 0..self.threads.len() {
                nexts.push(self.next(thread, [state[2 + thread], state[0], state[1]]));
            }
            found.transitions += self.follow(at, &mut state, &nexts);
            if !nexts.iter().any(Next::moves) {
                let outcome = self.outcome(&state);
                let done = stop(&outcome);
                ends.states.push((at, ends.outcomes.insert_full(outcome).0));
                if done {
                    break;
                }
            }
            at += 1;
        }
        found.states = self.graph.len();
        found.memory = self.bytes();
        self.count(&mut found, ends);
        found
    }

    /// Enters the successors of a state, and says how many.
    fn follow(&mut self, at: usize, state: &mut [u32], nexts: &[Next]) -> u64 {
        let chosen = self.choose(state, nexts);
        let mut taken = 0;
        for (thread, next) in nexts.iter().enumerate() {
            if !next.moves() || chosen & (1 << thread) == 0 {
                continue;
            }
            let old = (state[0], state[1], state[2 + thread]);
            (state[0], state[1], state[2 + thread]) = (next.vm, next.machine, next.thread);
            let to = self.graph.insert(state, number(at));
            self.graph.edge(to);
            taken += 1;
            (state[0], state[1], state[2 + thread]) = old;
        }
        self.graph.close();
        taken
    }

    fn choose(&self, state: &[u32], nexts: &[Next]) -> u32 {
        let mut ready = [Ready { moves: false, touch: Touch::default(), counter: u16::MAX }; u32::BITS as usize];
        let Some(ready) = ready.get_mut(..nexts.len()).filter(|_| self.reduction == Reduction::On) else {
            return u32::MAX;
        };
        for (thread, (ready, next)) in ready.iter_mut().zip(nexts).enumerate() {
            let touch = self.touches.get_index(next.touch as usize).copied().unwrap_or(Touch::ALL);
            *ready = Ready { moves: next.moves(), touch, counter: self.threads[thread].counter(state[2 + thread]) };
        }
        self.futures.choose(ready)
    }

    fn outcome(&self, state: &[u32]) -> Outcome {
        let locals = self.threads.iter().zip(state.get(2..).unwrap_or_default());
        let locals: Vec<&ThreadState> =
            locals.filter_map(|(thread, at)| thread.locals.get_index(*at as usize)).collect();
        let vm = state.first().and_then(|at| self.vms.get_index(*at as usize));
        let machine = state.get(1).and_then(|at| self.machines.get_index(*at as usize));
        match (vm, machine) {
            (Some(vm), Some((machine, _))) => Outcome::of(self.context.program, &locals, vm, machine),
            _ => Outcome { registers: Vec::new(), events: Events::empty(), leaked: 0, measured: Vec::new() },
        }
    }

    /// Counts paths to each end, and finds out whether some state leads to none.
    fn count(&self, found: &mut Found, ends: Ends) {
        let paths = count::paths(&self.graph);
        found.outcomes = ends.outcomes.into_iter().map(|outcome| (outcome, 0, usize::MAX)).collect();
        for &(at, which) in &ends.states {
            let (_, count, first) = &mut found.outcomes[which];
            *count = count.saturating_add(paths[at]);
            *first = (*first).min(at);
            found.interleavings = found.interleavings.saturating_add(paths[at]);
        }
        drop(paths);
        if found.stopped {
            return;
        }
        if let Some(at) = count::without_end(&self.graph, ends.states.iter().map(|(at, _)| *at)) {
            let mut outcome = self.outcome(self.graph.state(at));
            outcome.events = (outcome.events | Events::LIVELOCK) - Events::NEVER_AT_END;
            found.outcomes.push((outcome, 1, at));
        }
    }

    /// The threads that moved on the way to a state, each with what it did.
    pub(crate) fn trace(&self, to: usize) -> Vec<(usize, String)> {
        let mut path: Vec<usize> = std::iter::successors(Some(to), |at| self.graph.parent(*at)).collect();
        path.reverse();
        path.windows(2).filter_map(|pair| self.moved(self.graph.state(pair[0]), self.graph.state(pair[1]))).collect()
    }

    fn moved(&self, from: &[u32], to: &[u32]) -> Option<(usize, String)> {
        (0..self.threads.len()).find_map(|thread| {
            let key = [from[2 + thread], from[0], from[1]];
            let next = self.threads[thread].memo.get(key)?;
            let others = (0..self.threads.len()).all(|other| other == thread || from[2 + other] == to[2 + other]);
            let this = others && [next.vm, next.machine, next.thread] == [to[0], to[1], to[2 + thread]];
            let mut turn = self.turn(thread, key).filter(|_| this)?.with_notes();
            turn.take();
            Some((thread, turn.note()))
        })
    }

    /// Bytes in use, with what counting will need at the end. What the stored parts own on the heap is estimated, on the large
    /// side.
    fn bytes(&self) -> usize {
        self.graph.bytes()
            + self.graph.len() * count::BYTES
            + set_bytes(&self.vms, VM_HEAP)
            + set_bytes(&self.machines, MACHINE_HEAP)
            + self.threads.iter().map(Explored::bytes).sum::<usize>()
    }
}

/// The states in which no thread can move, and how they look.
#[derive(Default)]
struct Ends {
    states: Vec<(usize, usize)>,
    outcomes: IndexSet<Outcome, FxBuildHasher>,
}

/// Bytes that a [`Vm`], a [`Machine`] and a thread own on the heap, about.
const VM_HEAP: usize = 2048;
const MACHINE_HEAP: usize = 1024;
const LOCAL_HEAP: usize = 128;

fn set_bytes<T>(set: &Set<T>, heap: usize) -> usize {
    let entry = size_of::<T>() + size_of::<u64>();
    set.capacity() * entry + memo::table::<usize>(set.capacity()) + set.len() * heap
}

fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}
