//! Reports as data.

use serde::Serialize;

use crate::program::Program;
use crate::run::{Report, Violation};

/// What `--json` prints for one program and one type of VM.
#[derive(Debug, Serialize)]
pub struct JsonReport<'a> {
    /// The question.
    pub question: &'a str,
    /// The type of VM.
    pub vm_type: &'static str,
    /// The broken protocol, if any.
    pub mutant: Option<&'static str>,
    /// Whether the program is about this type; on others its conditions are not judged.
    pub named: bool,
    /// Whether everything was seen and all conditions hold.
    pub holds: bool,
    /// Distinct states.
    pub states: usize,
    /// Transitions taken.
    pub transitions: u64,
    /// Interleavings, as decimal text because they can exceed what JSON numbers hold.
    pub interleavings: String,
    /// Bytes.
    pub memory: usize,
    /// Exploring stopped at a limit.
    pub stopped: bool,
    /// Every outcome.
    pub outcomes: Vec<JsonOutcome<'a>>,
    /// What is wrong.
    pub violations: Vec<JsonViolation<'a>>,
    /// A shortest interleaving to the first violation.
    pub trace: Vec<JsonEvent<'a>>,
}

/// An outcome.
#[derive(Debug, Serialize)]
pub struct JsonOutcome<'a> {
    /// In words.
    pub outcome: &'a str,
    /// Interleavings, as decimal text.
    pub count: String,
}

/// A violation.
#[derive(Debug, Serialize)]
pub struct JsonViolation<'a> {
    /// `forbidden` or `missing`.
    pub kind: &'static str,
    /// The outcome in words.
    pub outcome: Option<&'a str>,
    /// Why.
    pub why: &'a str,
}

/// A step of a trace.
#[derive(Debug, Serialize)]
pub struct JsonEvent<'a> {
    /// The thread's name.
    pub thread: &'a str,
    /// What it does.
    pub what: &'a str,
}

impl<'a> JsonReport<'a> {
    /// The data of `report`.
    #[must_use]
    pub fn new(program: &'a Program, mutant: Option<crate::Mutant>, report: &'a Report) -> Self {
        let name = |thread: usize| program.threads.get(thread).map_or("", |thread| thread.name.as_str());
        let words = |outcome: usize| report.outcomes.get(outcome).map(|ended| ended.words.as_str());
        Self {
            question: &program.question,
            vm_type: report.vm_type.name(),
            mutant: mutant.map(crate::Mutant::name),
            named: program.types.contains(&report.vm_type),
            holds: report.holds(),
            states: report.states,
            transitions: report.transitions,
            interleavings: report.interleavings.to_string(),
            memory: report.memory,
            stopped: report.stopped,
            outcomes: report
                .outcomes
                .iter()
                .map(|ended| JsonOutcome { outcome: &ended.words, count: ended.count.to_string() })
                .collect(),
            violations: report
                .violations
                .iter()
                .map(|violation| match violation {
                    Violation::Forbidden { outcome, why } => {
                        JsonViolation { kind: "forbidden", outcome: words(*outcome), why }
                    }
                    Violation::Missing { why } => JsonViolation { kind: "missing", outcome: None, why },
                })
                .collect(),
            trace: report
                .trace
                .iter()
                .map(|event| JsonEvent { thread: name(event.thread), what: &event.what })
                .collect(),
        }
    }
}
