//! Reports as text.

use core::fmt::Write;

use crate::program::{Program, VmType};
use crate::run::{Report, Violation};

/// The report of one type of VM.
#[must_use]
pub fn report(program: &Program, report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_report(&mut text, program, report);
    text
}

fn write_report(text: &mut String, program: &Program, report: &Report) -> core::fmt::Result {
    writeln!(
        text,
        "{}: {}, {} states, {} transitions, {} interleavings, {} KiB",
        report.vm_type.name(),
        verdict(program, report),
        report.states,
        report.transitions,
        count(report.interleavings),
        report.memory / 1024
    )?;
    for ended in &report.outcomes {
        writeln!(text, "  {:>14}  {}", count(ended.count), ended.words)?;
    }
    for violation in &report.violations {
        match violation {
            Violation::Forbidden { outcome, why } => {
                let words = report.outcomes.get(*outcome).map_or("", |ended| ended.words.as_str());
                writeln!(text, "  forbidden: {words} ({why})")?;
            }
            Violation::Missing { why } => writeln!(text, "  never seen: {why}")?,
        }
    }
    if report.stopped {
        writeln!(
            text,
            "  too large: stopped after {} states and {} transitions, with {} KiB; what was found until then is above",
            report.states,
            report.transitions,
            report.memory >> 10
        )?;
    }
    if !report.trace.is_empty() {
        writeln!(text, "  a shortest interleaving ({} steps):", report.trace.len())?;
        let width = program.threads.iter().map(|thread| thread.name.len()).max().unwrap_or(0);
        for (step, event) in report.trace.iter().enumerate() {
            let name = program.threads.get(event.thread).map_or("", |thread| thread.name.as_str());
            writeln!(text, "  {:>4}  {name:<width$}  {}", step + 1, event.what)?;
        }
    }
    Ok(())
}

fn verdict(program: &Program, report: &Report) -> &'static str {
    match (program.types.contains(&report.vm_type), report.violations.is_empty(), report.stopped) {
        (_, true, true) => "TOO LARGE",
        (false, ..) => "not judged (the program does not name it)",
        (true, true, false) => "holds",
        (true, false, _) => "FAILS",
    }
}

/// Interleavings; so many that they were not counted to the end are said to be.
fn count(interleavings: u128) -> String {
    if interleavings == u128::MAX { "over 10^38".into() } else { interleavings.to_string() }
}

/// The outcomes of several types side by side: one row for each outcome, one column for each type, the number of
/// interleavings in each cell.
#[must_use]
pub fn side_by_side(reports: &[Report]) -> String {
    let mut rows: Vec<&str> = Vec::new();
    for ended in reports.iter().flat_map(|report| &report.outcomes) {
        if !rows.contains(&ended.words.as_str()) {
            rows.push(&ended.words);
        }
    }
    let names: Vec<&str> = reports.iter().map(|report| VmType::name(report.vm_type)).collect();
    let cell = |report: &Report, words: &str| {
        let found = report.outcomes.iter().find(|ended| ended.words == words);
        found.map_or_else(|| "-".to_owned(), |ended| count(ended.count))
    };
    let mut text = String::new();
    let widths: Vec<usize> = reports
        .iter()
        .zip(&names)
        .map(|(report, name)| rows.iter().map(|row| cell(report, row).len()).max().unwrap_or(0).max(name.len()))
        .collect();
    for (name, width) in names.iter().zip(&widths) {
        let _ = write!(text, "{name:>width$}  ");
    }
    text.push_str("outcome\n");
    for row in rows {
        for (report, width) in reports.iter().zip(&widths) {
            let _ = write!(text, "{:>width$}  ", cell(report, row));
        }
        let _ = writeln!(text, "{row}");
    }
    text
}
