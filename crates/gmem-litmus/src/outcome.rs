//! How a program can end, and what the author says of it.

use gmem_core::Vm;
use gmem_core::addr::{Gfn, PageNumber, Pfn};
use gmem_core::vendor::{AccessKind, HostOutcome};
use gmem_core::vm::View;

use crate::machine::{Entry, Events, Machine};
use crate::program::{Atom, Expr, Program};
use crate::turn::{ThreadState, user_page_of};
use crate::value::Seen;

/// One way in which a program ends.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Outcome {
    /// By thread, by register.
    pub registers: Vec<Vec<Seen>>,
    /// What happened on the way.
    pub events: Events,
    /// Pages that were given back and that the host still cannot use.
    pub leaked: u64,
    /// Frames that were measured, and how often.
    pub measured: Vec<(u64, u64)>,
}

impl Outcome {
    pub(crate) fn of(program: &Program, threads: &[&ThreadState], vm: &Vm, machine: &Machine) -> Self {
        let mut events = machine.events;
        let finished = |at: usize, state: &ThreadState| {
            let stmts = program.threads.get(at).map_or(0, |thread| thread.stmts.len());
            usize::from(state.pc) >= stmts
        };
        if !threads.iter().enumerate().all(|(at, state)| finished(at, state)) {
            events |= Events::DEADLOCK;
        }
        if !vm.audit().is_empty() {
            events |= Events::INCONSISTENT;
        }
        if !vm.arch.is_dead() && machine.entries().iter().any(|entry| is_stale(vm, machine, entry)) {
            events |= Events::STALE_MAPPING;
        }
        Self {
            registers: threads.iter().map(|thread| thread.seen.clone()).collect(),
            events,
            leaked: leaked(vm, machine),
            measured: machine.measured.iter().map(|(gfn, times)| (gfn.0, u64::from(*times))).collect(),
        }
    }

    /// Whether the predicate holds.
    pub(crate) fn satisfies(&self, expr: &Expr) -> bool {
        match expr {
            Expr::Not(inner) => !self.satisfies(inner),
            Expr::And(left, right) => self.satisfies(left) && self.satisfies(right),
            Expr::Or(left, right) => self.satisfies(left) || self.satisfies(right),
            Expr::Atom(atom) => self.satisfies_atom(*atom),
        }
    }

    fn satisfies_atom(&self, atom: Atom) -> bool {
        match atom {
            Atom::Register { thread, register, is } => {
                self.registers.get(thread).and_then(|registers| registers.get(register)) == Some(&is)
            }
            Atom::Event(event) => self.events.contains(event),
            Atom::GuestDead => self.events.contains(Events::GUEST_DEAD),
            Atom::Leaked(pages) => self.leaked == pages,
            Atom::Measured { gfn: None, times } => self.measured.iter().map(|(_, times)| times).sum::<u64>() == times,
            Atom::Measured { gfn: Some(Gfn(gfn)), times } => {
                self.measured.iter().find(|(of, _)| *of == gfn).map_or(0, |(_, times)| *times) == times
            }
        }
    }

    /// In words: `a.r0=secret guest=alive`.
    #[must_use]
    pub fn words(&self, program: &Program) -> String {
        let mut words = Vec::new();
        for (thread, registers) in program.threads.iter().zip(&self.registers) {
            for (name, seen) in thread.registers.iter().zip(registers) {
                words.push(format!("{}.{name}={}", thread.name, seen.word(&program.values)));
            }
        }
        words.extend(self.events.words().map(str::to_owned));
        if self.leaked > 0 {
            words.push(format!("leaked={}", self.leaked));
        }
        words.extend(self.measured.iter().map(|(gfn, times)| format!("measured[{gfn}]={times}")));
        if words.is_empty() { "ok".into() } else { words.join(" ") }
    }
}

/// Whether a mapping is not what its frames are backed by. Pages in its middle differ only if its edges do, or by a change
/// of one page, so all are looked at.
fn is_stale(vm: &Vm, machine: &Machine, entry: &Entry) -> bool {
    (0..entry.mapping.level.pages()).filter_map(|page| entry.mapping.gfn.checked_add(page)).any(|gfn| {
        let (pfn, gone) = entry.frame(gfn);
        gone || !backs(vm, machine, gfn, pfn, entry)
    })
}

fn backs(vm: &Vm, machine: &Machine, gfn: Gfn, pfn: Pfn, entry: &Entry) -> bool {
    match vm.view(gfn) {
        View::FilePage { file, index, side } => {
            let present = vm.file(file).is_some_and(|file| file.is_present(index));
            present && file.pfn(index) == pfn && side == entry.mapping.side
        }
        View::UserMemory { hva } => user_page_of(hva).is_some_and(|page| machine.is_user_frame(page, pfn)),
        View::NoSlot | View::Unbacked(_) => false,
    }
}

fn leaked(vm: &Vm, machine: &Machine) -> u64 {
    let mut arch = vm.arch.clone();
    let freed = machine.freed().filter(|pfn| !vm.files().any(|file| file.present_has(*pfn)));
    freed.filter(|pfn| arch.host_access(*pfn, AccessKind::Store) != HostOutcome::Plain).count() as u64
}
