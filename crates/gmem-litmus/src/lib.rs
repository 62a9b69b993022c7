//! Every interleaving of a small program, on the production code of gmem.
//!
//! A program ([`parse`]) names threads, operations and conditions; `docs/litmus-reference.md` describes the language.
//! [`run`] explores it on one architecture. The layers, from the bottom: `turn` lets one thread take one step of the core's
//! operations and carries out what the step asks for on `machine`, the little that lies around the core; `explore` takes
//! every order of turns, leaving those out that `touch` shows to be the same; `outcome` says what an end is; `mutant`
//! breaks operations from the outside.
#![forbid(unsafe_code)]

mod explore;
mod flight;
pub mod json;
mod machine;
mod mutant;
mod outcome;
mod parse;
mod program;
mod run;
mod scenario;
pub mod svg;
pub mod text;
mod touch;
mod turn;
mod value;

pub use explore::{Found, Limits, Reduction};
pub use machine::Events;
pub use mutant::Mutant;
pub use outcome::Outcome;
pub use parse::{ParseError, parse};
pub use program::{Program, VmType};
pub use run::{Ended, Event, Options, Report, Tracing, Violation, run};
pub use scenario::StartError;
pub use value::{Errno, Seen, Value};

/// The words of the language, for whoever documents or tests it.
pub mod words {
    use crate::machine::Events;
    use crate::parse;
    use crate::value::Seen;

    /// Words that begin an operation.
    pub fn operations() -> impl Iterator<Item = &'static str> {
        parse::op::GUEST.iter().chain(parse::op::OTHER).copied()
    }

    /// All words but operations: of the header, of conditions, of results, of events.
    pub fn others() -> impl Iterator<Item = &'static str> {
        let fixed = parse::HEADER.iter().chain(parse::RULES).chain(parse::WITHIN).copied();
        fixed.chain(Seen::all_words()).chain(Events::all_words())
    }
}
