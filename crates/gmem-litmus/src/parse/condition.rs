//! Conditions: predicates over outcomes.

use gmem_core::addr::Gfn;

use super::token::{Kind, Line};
use super::{ParseError, page};
use crate::machine::Events;
use crate::program::{Atom, Expr, Program};
use crate::value::{Seen, Value};

/// How deep parentheses and `not` may nest.
const MAX_DEPTH: u32 = 32;

pub(super) fn expr(line: &mut Line<'_>, program: &Program) -> Result<Expr, ParseError> {
    or(line, program, 0)
}

fn or(line: &mut Line<'_>, program: &Program, depth: u32) -> Result<Expr, ParseError> {
    let mut left = and(line, program, depth)?;
    while line.eat_word("or") {
        left = Expr::Or(Box::new(left), Box::new(and(line, program, depth)?));
    }
    Ok(left)
}

fn and(line: &mut Line<'_>, program: &Program, depth: u32) -> Result<Expr, ParseError> {
    let mut left = not(line, program, depth)?;
    while line.eat_word("and") {
        left = Expr::And(Box::new(left), Box::new(not(line, program, depth)?));
    }
    Ok(left)
}

fn not(line: &mut Line<'_>, program: &Program, depth: u32) -> Result<Expr, ParseError> {
    if depth > MAX_DEPTH {
        return Err(line.error("fewer parentheses and `not`s"));
    }
    if line.eat_word("not") {
        return Ok(Expr::Not(Box::new(not(line, program, depth + 1)?)));
    }
    if line.eat_sign("(") {
        let inner = or(line, program, depth + 1)?;
        line.sign(")")?;
        return Ok(inner);
    }
    atom(line, program)
}

/// Whether a thread with this name could not be told from another word of a condition.
pub(super) fn is_reserved(name: &str) -> bool {
    ["guest", "leaked", "measured", "not", "and", "or"].contains(&name) || Events::of_word(name).is_some()
}

fn expected(program: &Program) -> String {
    let events: Vec<_> = Events::all_words().map(|word| format!("`{word}`")).collect();
    let threads = program.threads.iter().filter(|thread| !thread.registers.is_empty());
    let threads = threads.map(|thread| format!("`{}`", thread.name)).collect::<Vec<_>>().join(", ");
    let threads = if threads.is_empty() { "none has registers".to_owned() } else { threads };
    format!(
        "`THREAD.REGISTER = RESULT` (threads: {threads}), `guest = alive|dead`, `leaked = N`, `measured [GFN] = N`, {}",
        events.join(", ")
    )
}

fn atom(line: &mut Line<'_>, program: &Program) -> Result<Expr, ParseError> {
    let word = line.word(&expected(program))?;
    let atom = match word {
        "guest" => return guest(line),
        "leaked" => {
            line.sign("=")?;
            Atom::Leaked(line.number("a number of pages")?)
        }
        "measured" => {
            let gfn = matches!(line.peek(), Some(Kind::Number(_))).then(|| page(line).map(Gfn)).transpose()?;
            line.sign("=")?;
            Atom::Measured { gfn, times: line.number("how often")? }
        }
        _ => match Events::of_word(word) {
            Some(event) => Atom::Event(event),
            None => return register(line, program, word),
        },
    };
    Ok(Expr::Atom(atom))
}

fn guest(line: &mut Line<'_>) -> Result<Expr, ParseError> {
    line.sign("=")?;
    match line.word("`alive` or `dead`")? {
        "dead" => Ok(Expr::Atom(Atom::GuestDead)),
        "alive" => Ok(Expr::Not(Box::new(Expr::Atom(Atom::GuestDead)))),
        _ => Err(line.error_before("`alive` or `dead`")),
    }
}

fn register(line: &mut Line<'_>, program: &Program, name: &str) -> Result<Expr, ParseError> {
    let thread = program.threads.iter().position(|thread| thread.name == name);
    let Some(thread) = thread else { return Err(line.error_before(expected(program))) };
    line.sign(".")?;
    let registers = program.threads.get(thread).map(|thread| thread.registers.as_slice()).unwrap_or_default();
    let names = || format!("a register of `{name}`: {}", registers.join(", "));
    let register = line.word(&names())?;
    let Some(register) = registers.iter().position(|known| known == register) else {
        return Err(line.error_before(names()));
    };
    line.sign("=")?;
    let is = seen(line, program)?;
    Ok(Expr::Atom(Atom::Register { thread, register, is }))
}

/// The word of a result.
pub(super) fn seen(line: &mut Line<'_>, program: &Program) -> Result<Seen, ParseError> {
    let expected = || {
        let values = program.values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", ");
        let values = if values.is_empty() { "none".to_owned() } else { values };
        format!("a result: {}; or a value that the program writes: {values}", Seen::words())
    };
    let word = line.word(&expected())?;
    let value = || {
        let at = program.values.iter().position(|value| value == word)?;
        Some(Seen::Value(Value::Named(u8::try_from(at).ok()?)))
    };
    Seen::of_word(word).or_else(value).ok_or_else(|| line.error_before(expected()))
}
