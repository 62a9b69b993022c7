//! Every interleaving of a program.
//!
//! A state is a few numbers: one for the core's [`Vm`], one for the machine around it, one for each thread. What the numbers
//! stand for is stored once. A transition of a thread depends on three of them and changes at most these three, so each
//! distinct one is computed once, on the production code, and looked up afterwards; that is what makes millions of
//! transitions a second possible without a model that is simpler than the code.
//!
//! The search is breadth first, so the first state that shows something is reached by a shortest interleaving.

use std::hash::BuildHasher;

use gmem_core::Vm;
use gmem_core::seal::Memfd;
use hashbrown::HashTable;
use indexmap::IndexSet;
use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::machine::{Events, Machine};
use crate::outcome::Outcome;
use crate::program::{Op, Program, Stmt, ThreadKind};
use crate::scenario::Start;
use crate::touch::{Objects, Touch};
use crate::turn::{Context, ThreadState, Turn};

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

#[derive(Clone, Copy)]
struct Next {
    /// `u32::MAX` when the thread cannot move.
    thread: u32,
    vm: u32,
    machine: u32,
    touch: Touch,
}

pub(crate) type Around = (Machine, Vec<Memfd>);

pub(crate) struct Explorer<'p> {
    context: &'p Context<'p>,
    threads: Vec<(u8, ThreadKind, &'p [Stmt])>,
    vms: Set<Vm>,
    machines: Set<Around>,
    locals: Vec<Set<ThreadState>>,
    memo: FxHashMap<[u32; 4], Next>,
    /// The same for transitions that do not look at the machine: those have a key without it. `None` says that this one
    /// does look.
    alone: FxHashMap<[u32; 3], Option<Next>>,
    /// For each thread the program counters of `locals`.
    counters: Vec<Vec<u16>>,
    /// For each thread and statement: what it and all after it may reach into.
    futures: Vec<Vec<Touch>>,
    constant: Objects,
    reduction: Reduction,
    graph: Graph,
}

/// The states as numbers, and how they hang together.
struct Graph {
    width: usize,
    words: Vec<u32>,
    table: HashTable<u32>,
    parents: Vec<u32>,
    /// For each state the end of its successors in `edges`.
    ends: Vec<u64>,
    edges: Vec<u32>,
}

impl Graph {
    fn new(width: usize) -> Self {
        Self {
            width,
            words: Vec::new(),
            table: HashTable::new(),
            parents: Vec::new(),
            ends: Vec::new(),
            edges: Vec::new(),
        }
    }

    fn len(&self) -> usize {
        self.parents.len()
    }

    fn state(&self, at: usize) -> &[u32] {
        let start = at * self.width;
        self.words.get(start..start + self.width).unwrap_or_default()
    }

    fn insert(&mut self, state: &[u32], parent: u32) -> u32 {
        let hash = hash(state);
        let (words, width) = (&self.words, self.width);
        let of = |at: u32| {
            let start = at as usize * width;
            words.get(start..start + width).unwrap_or_default()
        };
        if let Some(at) = self.table.find(hash, |at| of(*at) == state) {
            return *at;
        }
        let at = u32::try_from(self.parents.len()).unwrap_or(u32::MAX);
        self.table.insert_unique(hash, at, |at| FxBuildHasher.hash_one(of(*at)));
        self.words.extend_from_slice(state);
        self.parents.push(parent);
        at
    }

    fn successors(&self, at: usize) -> &[u32] {
        let start = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        let end = self.ends.get(at).copied().unwrap_or(start);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        self.edges.get(index(start)..index(end)).unwrap_or_default()
    }

    fn bytes(&self) -> usize {
        self.words.capacity() * 4
            + self.table.capacity() * 5
            + self.parents.capacity() * 4
            + self.ends.capacity() * 8
            + self.edges.capacity() * 4
    }
}

fn hash(state: &[u32]) -> u64 {
    FxBuildHasher.hash_one(state)
}

impl<'p> Explorer<'p> {
    pub(crate) fn new(context: &'p Context<'p>, start: &Start, reduction: Reduction) -> Self {
        let program = context.program;
        let threads: Vec<_> = program
            .threads
            .iter()
            .zip(0u8..)
            .map(|(thread, number)| (number, thread.kind, thread.stmts.as_slice()))
            .collect();
        let mut locals: Vec<Set<ThreadState>> = threads.iter().map(|_| Set::default()).collect();
        for (local, thread) in locals.iter_mut().zip(&program.threads) {
            local.insert(ThreadState::new(thread.registers.len()));
        }
        let constant = constants(program, &start.vm);
        let counters = threads.iter().map(|_| vec![0]).collect();
        let mut explorer = Self {
            context,
            futures: futures(program, &start.vm, constant),
            graph: Graph::new(2 + threads.len()),
            threads,
            vms: Set::default(),
            machines: Set::default(),
            locals,
            memo: FxHashMap::default(),
            alone: FxHashMap::default(),
            counters,
            constant,
            reduction,
        };
        explorer.vms.insert(start.vm.clone());
        explorer.machines.insert((start.machine.clone(), start.memfds.clone()));
        let first = vec![0; explorer.graph.width];
        explorer.graph.insert(&first, u32::MAX);
        explorer
    }

    fn turn(&self, thread: usize, key: [u32; 4]) -> Option<Turn<'p>> {
        let local = self.locals.get(thread)?.get_index(key[1] as usize)?.clone();
        let vm = self.vms.get_index(key[2] as usize)?.clone();
        let (machine, memfds) = self.machines.get_index(key[3] as usize)?.clone();
        Some(Turn::new(self.context, *self.threads.get(thread)?, local, (vm, machine, memfds)))
    }

    fn next(&mut self, thread: usize, state: &[u32]) -> Next {
        let (local, vm, machine) = (state[2 + thread], state[0], state[1]);
        let looks = match self.alone.get(&[number(thread), local, vm]) {
            Some(Some(next)) => return Next { machine, ..*next },
            Some(None) => true,
            None => false,
        };
        let key = [number(thread), local, vm, machine];
        if looks && let Some(next) = self.memo.get(&key) {
            return *next;
        }
        self.compute(thread, key)
    }

    fn compute(&mut self, thread: usize, key: [u32; 4]) -> Next {
        let mut next = Next { thread: u32::MAX, vm: key[2], machine: key[3], touch: Touch::default() };
        let Some(mut turn) = self.turn(thread, key) else { return next };
        let taken = turn.take();
        let touch = turn.touch;
        next.touch = touch.without(self.constant);
        if taken {
            let Turn { thread: local, vm, machine, memfds, .. } = turn;
            let (counter, changed) = (local.pc, touch.reaches_machine());
            next.vm = number(self.vms.insert_full(vm).0);
            if changed {
                next.machine = number(self.machines.insert_full((machine, memfds)).0);
            }
            let (at, new) = self.locals[thread].insert_full(local);
            if new {
                self.counters[thread].push(counter);
            }
            next.thread = number(at);
        }
        let alone = [key[0], key[1], key[2]];
        if touch.reaches_machine() {
            self.alone.insert(alone, None);
            self.memo.insert(key, next);
        } else {
            self.alone.insert(alone, Some(next));
        }
        next
    }

    /// Explores until nothing is left, a limit is reached, or `stop` says that a state at its end is enough.
    pub(crate) fn run(&mut self, limits: Limits, mut stop: impl FnMut(&Outcome) -> bool) -> Found {
        let mut found = Found::default();
        let mut terminal: Vec<(usize, usize)> = Vec::new();
        let mut outcomes: IndexSet<Outcome, FxBuildHasher> = IndexSet::default();
        let mut state = vec![0; self.graph.width];
        let mut nexts = Vec::with_capacity(self.threads.len());
        let mut at = 0;
        while at < self.graph.len() {
            if self.graph.len() > limits.states || (at & 0xfff == 0 && self.bytes() > limits.memory) {
                found.stopped = true;
                break;
            }
            state.copy_from_slice(self.graph.state(at));
            nexts.clear();
            for thread in 0..self.threads.len() {
                let next = self.next(thread, &state);
                nexts.push(next);
            }
            let chosen = self.choose(&state, &nexts);
            for (thread, next) in nexts.iter().enumerate() {
                if next.thread == u32::MAX || chosen & (1 << thread) == 0 {
                    continue;
                }
                let old = (state[0], state[1], state[2 + thread]);
                (state[0], state[1], state[2 + thread]) = (next.vm, next.machine, next.thread);
                let to = self.graph.insert(&state, number(at));
                self.graph.edges.push(to);
                found.transitions += 1;
                (state[0], state[1], state[2 + thread]) = old;
            }
            self.graph.ends.push(self.graph.edges.len() as u64);
            if nexts.iter().all(|next| next.thread == u32::MAX) {
                let outcome = self.outcome(&state);
                let done = stop(&outcome);
                terminal.push((at, outcomes.insert_full(outcome).0));
                if done {
                    break;
                }
            }
            at += 1;
        }
        found.states = self.graph.len();
        self.count(&mut found, outcomes, &terminal);
        found.memory = self.bytes();
        found
    }

    fn outcome(&self, state: &[u32]) -> Outcome {
        let locals: Vec<&ThreadState> =
            self.locals.iter().zip(&state[2..]).filter_map(|(set, at)| set.get_index(*at as usize)).collect();
        let vm = self.vms.get_index(state[0] as usize);
        let machine = self.machines.get_index(state[1] as usize);
        match (vm, machine) {
            (Some(vm), Some((machine, _))) => Outcome::of(self.context.program, &locals, vm, machine),
            _ => Outcome { registers: Vec::new(), events: Events::empty(), leaked: 0, measured: Vec::new() },
        }
    }

    /// A set of threads such that nothing the others may ever do can matter to what these do next, as a mask.
    ///
    /// It is a persistent set: a thread is taken in when some transition it may take from here on conflicts with the next
    /// transition of a thread that is in already. Every end that can be reached is reached through such a set too.
    fn choose(&self, state: &[u32], nexts: &[Next]) -> u32 {
        let all = (1u32 << nexts.len()) - 1;
        if self.reduction == Reduction::Off {
            return all;
        }
        let mut best = all;
        for (first, next) in nexts.iter().enumerate() {
            if next.thread == u32::MAX {
                continue;
            }
            let set = self.closure(state, nexts, 1 << first);
            if set.count_ones() < best.count_ones() {
                best = set;
            }
            if best.count_ones() == 1 {
                break;
            }
        }
        best
    }

    fn closure(&self, state: &[u32], nexts: &[Next], start: u32) -> u32 {
        let mut set = start;
        let mut touch = Touch::default();
        let mut added = start;
        while added != 0 {
            for (thread, next) in nexts.iter().enumerate() {
                if added & (1 << thread) != 0 {
                    touch.add(next.touch);
                }
            }
            added = 0;
            for thread in 0..nexts.len() {
                if set & (1 << thread) == 0 && self.future(state, thread).conflicts(touch) {
                    added |= 1 << thread;
                }
            }
            set |= added;
        }
        set
    }

    fn future(&self, state: &[u32], thread: usize) -> Touch {
        let pc = self.counters[thread].get(state[2 + thread] as usize).copied().unwrap_or(u16::MAX);
        self.futures[thread].get(usize::from(pc)).copied().unwrap_or_default()
    }

    /// Counts paths to each end, and finds out whether some state leads to none.
    fn count(&self, found: &mut Found, outcomes: IndexSet<Outcome, FxBuildHasher>, terminal: &[(usize, usize)]) {
        let order = self.topological();
        let mut paths = vec![0u128; self.graph.len()];
        let mut place = vec![0u32; self.graph.len()];
        for (place_of, at) in order.iter().enumerate() {
            place[*at as usize] = number(place_of);
        }
        if let Some(first) = paths.first_mut() {
            *first = 1;
        }
        for &at in &order {
            let (here, at) = (paths[at as usize], at as usize);
            for &to in self.graph.successors(at) {
                if place[to as usize] > place[at] {
                    paths[to as usize] = paths[to as usize].saturating_add(here);
                }
            }
        }
        found.outcomes = outcomes.into_iter().map(|outcome| (outcome, 0, usize::MAX)).collect();
        for &(at, which) in terminal {
            let (_, count, first) = &mut found.outcomes[which];
            *count = count.saturating_add(paths[at]);
            *first = (*first).min(at);
            found.interleavings = found.interleavings.saturating_add(paths[at]);
        }
        if let Some(at) = self.without_end(terminal).filter(|_| !found.stopped) {
            let mut outcome = self.outcome(self.graph.state(at));
            outcome.events = (outcome.events | Events::LIVELOCK) - Events::NEVER_AT_END;
            found.outcomes.push((outcome, 1, at));
        }
    }

    /// The first state from which no end can be reached.
    fn without_end(&self, terminal: &[(usize, usize)]) -> Option<usize> {
        let mut ends = vec![false; self.graph.len()];
        for &(at, _) in terminal {
            ends[at] = true;
        }
        let mut changed = true;
        while changed {
            changed = false;
            for at in (0..self.graph.ends.len()).rev() {
                if !ends[at] && self.graph.successors(at).iter().any(|to| ends[*to as usize]) {
                    ends[at] = true;
                    changed = true;
                }
            }
        }
        (0..self.graph.ends.len()).find(|at| !ends[*at])
    }

    /// The states, each before its successors but for edges that close a loop.
    fn topological(&self) -> Vec<u32> {
        let mut order = Vec::with_capacity(self.graph.len());
        let mut visited = vec![false; self.graph.len()];
        let mut stack: Vec<(u32, usize)> = Vec::new();
        if let Some(first) = visited.first_mut() {
            *first = true;
            stack.push((0, 0));
        }
        while let Some((at, child)) = stack.last_mut() {
            match self.graph.successors(*at as usize).get(*child) {
                Some(&to) => {
                    *child += 1;
                    if !std::mem::replace(&mut visited[to as usize], true) {
                        stack.push((to, 0));
                    }
                }
                None => {
                    order.push(*at);
                    stack.pop();
                }
            }
        }
        order.reverse();
        order
    }

    /// The threads that moved on the way to a state, each with what it did.
    pub(crate) fn trace(&self, to: usize) -> Vec<(usize, String)> {
        let mut path = vec![to];
        while let Some(&parent) = path.last().and_then(|at| self.graph.parents.get(*at)) {
            if parent == u32::MAX {
                break;
            }
            path.push(parent as usize);
        }
        path.reverse();
        path.windows(2).filter_map(|pair| self.moved(pair[0], pair[1])).collect()
    }

    fn moved(&self, from: usize, to: usize) -> Option<(usize, String)> {
        let (from, to) = (self.graph.state(from), self.graph.state(to));
        (0..self.threads.len()).find_map(|thread| {
            let key = [number(thread), from[2 + thread], from[0], from[1]];
            let alone = self.alone.get(&[key[0], key[1], key[2]]).copied().flatten();
            let alone = alone.map(|next| Next { machine: key[3], ..next });
            let next = alone.or_else(|| self.memo.get(&key).copied())?;
            let same = |at: usize, number: u32| to.get(at) == Some(&number);
            let others = (0..self.threads.len()).all(|other| other == thread || from[2 + other] == to[2 + other]);
            let this = next.thread != u32::MAX
                && others
                && same(0, next.vm)
                && same(1, next.machine)
                && same(2 + thread, next.thread);
            this.then(|| {
                let mut turn = self.turn(thread, key)?.with_notes();
                turn.take();
                Some((thread, turn.into_note()))
            })?
        })
    }

    /// Bytes in use; what the stored parts own on the heap is estimated.
    fn bytes(&self) -> usize {
        let heap = 512;
        let locals: usize = self.locals.iter().map(|set| set.len() * (size_of::<ThreadState>() + 64)).sum();
        self.graph.bytes()
            + self.memo.capacity() * (size_of::<([u32; 4], Next)>() + 1)
            + self.alone.capacity() * (size_of::<([u32; 3], Option<Next>)>() + 1)
            + self.vms.len() * (size_of::<Vm>() + heap)
            + self.machines.len() * (size_of::<Around>() + heap)
            + locals
    }
}

fn number(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
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

fn futures(program: &Program, vm: &Vm, constant: Objects) -> Vec<Vec<Touch>> {
    let in_place = vm.rules.tracking == gmem_core::vm::Tracking::InPlace;
    let of_thread = |thread: &crate::program::Thread| {
        let mut rest = Touch::default();
        let mut futures: Vec<Touch> = thread
            .stmts
            .iter()
            .rev()
            .map(|stmt| {
                rest.add(Touch::of_op(&stmt.op, thread.kind, in_place).without(constant));
                rest
            })
            .collect();
        futures.reverse();
        futures
    };
    program.threads.iter().map(of_thread).collect()
}
