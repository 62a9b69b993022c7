//! Operations that take turns.

use super::{AskUserPage, Machine};
use gmem_core::addr::{GfnRange, Pfn};
use gmem_core::ops::{
    Action, ChangeUserMapping, CloseFile, ConvertError, ConvertInPlace, Fault, FaultEnd, MemoryFailure, Operation,
    PunchError, PunchHole, RegionError, SetAttributes, SetRegion, Step,
};
use gmem_core::vm::Vm;

/// One operation under way.
#[derive(Clone, Debug)]
pub(crate) enum Actor {
    Attributes(SetAttributes),
    Region(SetRegion),
    Punch(PunchHole),
    Close(CloseFile),
    Poison(MemoryFailure),
    Convert(ConvertInPlace),
    User(ChangeUserMapping),
    Fault(Fault),
}

/// How an [`Actor`] ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    Done,
    Region(Result<(), RegionError>),
    Punch(Result<(), PunchError>),
    Convert(Result<(), ConvertError>),
    User(Vec<GfnRange>),
    Fault(FaultEnd),
}

fn outcome<T>(step: Step<T>, wrap: impl FnOnce(T) -> Outcome) -> Step<Outcome> {
    match step {
        Step::Do(action) => Step::Do(action),
        Step::Done(output) => Step::Done(wrap(output)),
    }
}

impl Actor {
    fn step(&mut self, vm: &mut Vm) -> Step<Outcome> {
        match self {
            Self::Attributes(op) => outcome(op.step(vm), |()| Outcome::Done),
            Self::Region(op) => outcome(op.step(vm), Outcome::Region),
            Self::Punch(op) => outcome(op.step(vm), Outcome::Punch),
            Self::Close(op) => outcome(op.step(vm), |()| Outcome::Done),
            Self::Poison(op) => outcome(op.step(vm), |()| Outcome::Done),
            Self::Convert(op) => outcome(op.step(vm), Outcome::Convert),
            Self::User(op) => outcome(op.step(vm), Outcome::User),
            Self::Fault(op) => outcome(op.step(vm), Outcome::Fault),
        }
    }

    fn reads_slots(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.is_reading_slots())
    }
}

impl AskUserPage for Actor {
    fn answer(&mut self, pfn: Option<Pfn>) {
        if let Self::Fault(fault) = self {
            fault.user_page(pfn);
        }
    }
}

/// Where an actor stands.
#[derive(Clone, Debug)]
enum Turn {
    Ready,
    /// Has asked for a lock.
    Wants(Action),
    /// Waits for these faults to end.
    Waits(Vec<usize>),
    Ended(Outcome),
}

/// Lets `actors` take turns as `schedule` says, and in turn when that is used up, until all have ended.
///
/// # Panics
/// When they wait for one another, or as [`Machine`] does.
pub(crate) fn interleave(machine: &mut Machine, vm: &mut Vm, actors: &mut [Actor], schedule: &[u8]) -> Vec<Outcome> {
    let mut turns = vec![Turn::Ready; actors.len()];
    let mut schedule = schedule.iter();
    // More steps than any schedule needs: an operation that never ends is a defect, too.
    for turn in 0..10_000 {
        if turns.iter().all(|turn| matches!(turn, Turn::Ended(_))) {
            break;
        }
        let ready: Vec<usize> = (0..actors.len()).filter(|&at| is_ready(machine, actors, &turns[at])).collect();
        assert!(!ready.is_empty(), "they wait for one another: {turns:?} after {:?}", machine.trace);
        let at = ready[schedule.next().map_or(turn, |choice| usize::from(*choice)) % ready.len()];
        turns[at] = take_turn(machine, vm, actors, at, turns[at].clone());
    }
    let ended = |turn| match turn {
        Turn::Ended(outcome) => outcome,
        turn => panic!("never ends: {turn:?}"),
    };
    let outcomes = turns.into_iter().map(ended).collect();
    machine.assert_quiet(vm);
    outcomes
}

fn is_ready(machine: &Machine, actors: &[Actor], turn: &Turn) -> bool {
    match turn {
        Turn::Ready => true,
        Turn::Wants(action) => !machine.blocks(action),
        Turn::Waits(faults) => !faults.iter().any(|&at| actors[at].reads_slots()),
        Turn::Ended(_) => false,
    }
}

fn take_turn(machine: &mut Machine, vm: &mut Vm, actors: &mut [Actor], at: usize, turn: Turn) -> Turn {
    if let Turn::Wants(action) = turn {
        machine.carry_out(vm, at, &action, &mut actors[at]);
        return Turn::Ready;
    }
    match actors[at].step(vm) {
        Step::Do(action @ Action::Lock(_)) => Turn::Wants(action),
        Step::Do(Action::Synchronize) => {
            machine.trace.push((at, Action::Synchronize));
            Turn::Waits((0..actors.len()).filter(|&other| actors[other].reads_slots()).collect())
        }
        Step::Do(action) => {
            machine.carry_out(vm, at, &action, &mut actors[at]);
            Turn::Ready
        }
        Step::Done(outcome) => Turn::Ended(outcome),
    }
}
