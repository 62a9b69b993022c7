//! The table: what each selftest gives natively and under gmem.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::run::{Outcome, Verdict};
use crate::under::Under;

/// Print results as a Markdown table, native beside gmem.
///
/// Exits with 1 if a test gives less under gmem than natively: that is, if it passes natively and not under gmem, or fails only
/// under gmem.
#[derive(clap::Args, Debug)]
#[command(after_help = "Example:\n  cargo xtask selftests compare target/selftests.json > docs/selftests.md")]
pub(crate) struct Args {
    /// Files that `selftests run --json` wrote
    #[arg(required = true)]
    results: Vec<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    for file in &args.results {
        let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        outcomes.extend(
            serde_json::from_str::<Vec<Outcome>>(&text).with_context(|| format!("reading {}", file.display()))?,
        );
    }
    let (table, worse) = table(&outcomes)?;
    print!("{PREFACE}{table}");
    Ok(ExitCode::from(u8::from(worse)))
}

const PREFACE: &str = "\
# The kernel's KVM selftests, natively and under gmem

Written by `cargo xtask selftests run --under native,gmem --hugepages 512 --json FILE` and `cargo xtask selftests compare FILE`.
Each test runs in both ways, one after the other, in an emulated machine. A test that takes long without an emulator runs into
its time limit there in both ways, and one that is judged by the clock may do so in one of them.

";

/// What a test gave natively and under gmem.
type Pair<'a> = (Option<&'a Outcome>, Option<&'a Outcome>);

fn table(outcomes: &[Outcome]) -> Result<(String, bool)> {
    let mut rows: BTreeMap<&str, Pair<'_>> = BTreeMap::new();
    for outcome in outcomes {
        let row = rows.entry(&outcome.test).or_default();
        match outcome.under {
            Under::Native => row.0 = Some(outcome),
            Under::Gmem => row.1 = Some(outcome),
        }
    }
    let mut text = String::from("| test | native | gmem | |\n|---|---|---|---|\n");
    for (test, (native, gmem)) in &rows {
        writeln!(text, "| {test} | {} | {} | {} |", cell(*native), cell(*gmem), word(*native, *gmem))?;
    }
    Ok((text, rows.values().any(|(native, gmem)| is_worse(*native, *gmem))))
}

fn cell(outcome: Option<&Outcome>) -> String {
    outcome.map_or_else(String::new, |o| format!("{} on {}, {:.1} s", o.verdict.name(), o.kernel, o.seconds))
}

fn word(native: Option<&Outcome>, gmem: Option<&Outcome>) -> &'static str {
    match (native, gmem) {
        (Some(a), Some(b)) if a.verdict == b.verdict => "same",
        (Some(a), Some(b)) if a.verdict == Verdict::Skip && b.verdict == Verdict::Pass => "gained",
        (Some(_), Some(_)) if is_worse(native, gmem) => "**worse**",
        (Some(_), Some(_)) => "differs",
        _ => "",
    }
}

fn is_worse(native: Option<&Outcome>, gmem: Option<&Outcome>) -> bool {
    let rank = |verdict| match verdict {
        Verdict::Pass => 2,
        Verdict::Skip => 1,
        Verdict::Fail | Verdict::Timeout => 0,
    };
    matches!((native, gmem), (Some(a), Some(b)) if rank(b.verdict) < rank(a.verdict))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(test: &str, under: Under, verdict: Verdict) -> Outcome {
        let kernel = "stock".to_owned();
        Outcome { test: test.to_owned(), kernel, under, verdict, status: 0, seconds: 1.0, last_line: String::new() }
    }

    #[test]
    fn a_test_that_is_only_lost_under_gmem_is_worse() {
        let lost = [outcome("t", Under::Native, Verdict::Skip), outcome("t", Under::Gmem, Verdict::Fail)];
        let (text, worse) = table(&lost).unwrap();
        assert!(worse && text.contains("| t | SKIP on stock, 1.0 s | FAIL on stock, 1.0 s | **worse** |"), "{text}");
        let gained = [outcome("t", Under::Native, Verdict::Skip), outcome("t", Under::Gmem, Verdict::Pass)];
        let (text, worse) = table(&gained).unwrap();
        assert!(!worse && text.contains("gained"), "{text}");
    }
}
