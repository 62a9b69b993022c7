//! Runs a program and judges it.

use crate::explore::{Explorer, Found, Limits, Reduction};
use crate::machine::Events;
use crate::mutant::Mutant;
use crate::outcome::Outcome;
use crate::program::{ConditionKind, Program, VmType};
use crate::scenario::{self, StartError};
use crate::turn::Context;

/// How to explore.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bounds.
    pub limits: Limits,
    /// Whether to leave out interleavings that cannot differ.
    pub reduction: Reduction,
    /// A protocol to break.
    pub mutant: Option<Mutant>,
    /// Whether to look for a shortest interleaving to the first violation.
    pub trace: Tracing,
}

/// Whether an interleaving is looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tracing {
    /// It is; that explores again, without the reduction.
    Shortest,
    /// It is not.
    None,
}

impl Default for Options {
    fn default() -> Self {
        Self { limits: Limits::default(), reduction: Reduction::On, mutant: None, trace: Tracing::Shortest }
    }
}

/// What is wrong with the outcomes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Violation {
    /// An outcome that must not be.
    Forbidden {
        /// Which outcome, as a place in [`Report::outcomes`].
        outcome: usize,
        /// Why: the condition's text, or the words of what must never happen.
        why: String,
    },
    /// No outcome is as this condition requires.
    Missing {
        /// The condition's text.
        why: String,
    },
}

/// An outcome with what is known of it.
#[derive(Clone, Debug)]
pub struct Ended {
    /// The outcome.
    pub outcome: Outcome,
    /// Interleavings that end like this.
    pub count: u128,
    /// In words.
    pub words: String,
}

/// One thread's step in an interleaving.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    /// The thread, by its place in the program.
    pub thread: usize,
    /// What it does.
    pub what: String,
}

/// What exploring one program on one type of VM showed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The type.
    pub vm_type: VmType,
    /// Every outcome.
    pub outcomes: Vec<Ended>,
    /// What is wrong.
    pub violations: Vec<Violation>,
    /// A shortest interleaving to the first violation that has one.
    pub trace: Vec<Event>,
    /// Distinct states.
    pub states: usize,
    /// Transitions taken.
    pub transitions: u64,
    /// Interleavings, loops not counted.
    pub interleavings: u128,
    /// Bytes.
    pub memory: usize,
    /// Exploring stopped at a limit.
    pub stopped: bool,
}

impl Report {
    /// Whether everything was seen and all conditions hold.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.violations.is_empty() && !self.stopped
    }
}

/// Explores `program` on `vm_type`.
///
/// # Errors
/// When the program cannot start.
pub fn run(program: &Program, vm_type: VmType, options: &Options) -> Result<Report, StartError> {
    let context = Context { program, mutant: options.mutant };
    let start = scenario::start(&context, vm_type)?;
    let mut explorer = Explorer::new(&context, &start, options.reduction);
    let found = explorer.run(options.limits, |_| false);
    let violations = judge(program, vm_type, &found);
    let wanted = violations.iter().find_map(|violation| match violation {
        Violation::Forbidden { outcome, .. } => found.outcomes.get(*outcome),
        Violation::Missing { .. } => None,
    });
    let trace = wanted.filter(|_| options.trace == Tracing::Shortest).map(|(outcome, _, first)| {
        let unreduced =
            (options.reduction == Reduction::On).then(|| shortest(&context, &start, outcome, options.limits)).flatten();
        unreduced.unwrap_or_else(|| events(explorer.trace(*first)))
    });
    Ok(Report {
        vm_type,
        outcomes: found
            .outcomes
            .iter()
            .map(|(outcome, count, _)| Ended { outcome: outcome.clone(), count: *count, words: outcome.words(program) })
            .collect(),
        violations,
        trace: trace.unwrap_or_default(),
        states: found.states,
        transitions: found.transitions,
        interleavings: found.interleavings,
        memory: found.memory,
        stopped: found.stopped,
    })
}

fn events(trace: Vec<(usize, String)>) -> Vec<Event> {
    trace.into_iter().map(|(thread, what)| Event { thread, what }).collect()
}

/// A shortest interleaving among all of them: the reduction keeps every outcome, but not always its shortest way.
fn shortest(context: &Context<'_>, start: &scenario::Start, wanted: &Outcome, limits: Limits) -> Option<Vec<Event>> {
    if wanted.events.contains(Events::LIVELOCK) {
        return None;
    }
    let mut explorer = Explorer::new(context, start, Reduction::Off);
    let limits = Limits { states: limits.states.min(2_000_000), ..limits };
    let found = explorer.run(limits, |outcome| outcome == wanted);
    let (_, _, first) = found.outcomes.iter().find(|(outcome, ..)| outcome == wanted)?;
    Some(events(explorer.trace(*first)))
}

/// Conditions in the order of the program; what must never happen first.
fn judge(program: &Program, vm_type: VmType, found: &Found) -> Vec<Violation> {
    let mut violations = Vec::new();
    let tolerated = tolerated(program, vm_type);
    for (at, (outcome, ..)) in found.outcomes.iter().enumerate() {
        let never = outcome.events & (Events::NEVER - tolerated);
        if !never.is_empty() {
            let why = never.words().collect::<Vec<_>>().join(", ");
            violations.push(Violation::Forbidden { outcome: at, why });
        }
    }
    let conditions = || program.conditions.iter().filter(|one| one.types.is_empty() || one.types.contains(&vm_type));
    for condition in conditions() {
        let mut holding = found.outcomes.iter().enumerate().filter(|(_, (one, ..))| one.satisfies(&condition.expr));
        let why = || format!("line {}: {}", condition.line, condition.text);
        match condition.kind {
            ConditionKind::Forbidden => {
                violations.extend(holding.map(|(outcome, _)| Violation::Forbidden { outcome, why: why() }));
            }
            // What was not seen before exploring stopped may still come.
            ConditionKind::Required if !found.stopped && holding.next().is_none() => {
                violations.push(Violation::Missing { why: why() });
            }
            ConditionKind::Required | ConditionKind::Allowed => {}
        }
    }
    violations.extend(outside(program, vm_type, found));
    violations
}

/// Outcomes that none of the conditions allows, where some do.
fn outside(program: &Program, vm_type: VmType, found: &Found) -> Vec<Violation> {
    let applies = |one: &&crate::program::Condition| one.types.is_empty() || one.types.contains(&vm_type);
    let conditions: Vec<_> =
        program.conditions.iter().filter(applies).filter(|one| one.kind != ConditionKind::Forbidden).collect();
    if !conditions.iter().any(|one| one.kind == ConditionKind::Allowed) {
        return Vec::new();
    }
    let unlisted = |(_, (outcome, ..)): &(usize, &(Outcome, u128, usize))| {
        !conditions.iter().any(|one| outcome.satisfies(&one.expr))
    };
    let all = found.outcomes.iter().enumerate().filter(unlisted);
    all.map(|(outcome, _)| Violation::Forbidden { outcome, why: "no condition allows it".into() }).collect()
}

/// What must never happen may happen where a condition that requires or allows it names it.
fn tolerated(program: &Program, vm_type: VmType) -> Events {
    let conditions = program.conditions.iter().filter(|one| one.kind != ConditionKind::Forbidden);
    let for_type = conditions.filter(|one| one.types.is_empty() || one.types.contains(&vm_type));
    for_type.fold(Events::empty(), |all, one| all | one.expr.names())
}
