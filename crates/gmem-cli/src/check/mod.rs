//! `gmem check`: replays recorded facts against the models.

mod cca;
mod pkvm;
mod snp;
mod tdx;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::Value;

/// Replay recorded facts against the models.
///
/// Takes vector files (JSON) and transcripts (a `.input.txt` of commands beside a `.txt` of what was answered), of all
/// architectures. Prints every mismatch with both sides; what a model cannot express counts as failed.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Vector files; for a transcript, either of its two files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

/// One fact of a vector file and what became of it.
#[derive(Debug)]
pub(crate) struct Case {
    /// Where in the file: a name, a row or a line.
    pub(crate) name: String,
    /// Both sides of a mismatch.
    pub(crate) outcome: Result<(), Mismatch>,
}

/// What a file says and what the model says.
#[derive(Debug)]
pub(crate) struct Mismatch {
    /// As recorded.
    pub(crate) expected: String,
    /// As modelled, or why the model cannot express the row.
    pub(crate) got: String,
}

impl Case {
    /// Compares what a file records with what a model answers.
    pub(crate) fn compare(name: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        let (name, expected, got) = (name.into(), expected.into(), got.into());
        let outcome = if expected == got { Ok(()) } else { Err(Mismatch { expected, got }) };
        Self { name, outcome }
    }

    /// A file that no model understands.
    fn unknown(why: &str) -> Self {
        let mismatch = Mismatch { expected: "a known shape".to_owned(), got: why.to_owned() };
        Self { name: "file".to_owned(), outcome: Err(mismatch) }
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let files: BTreeSet<PathBuf> = arguments.files.iter().map(|path| recorded_of(path)).collect();
    let mut results = Vec::new();
    for path in files {
        let cases = replay(&path)?;
        results.push((path, cases));
    }
    let (passed, failed) = if arguments.json { print_json(&results)? } else { print_text(&results) };
    if !arguments.json {
        println!("{passed} passed, {failed} failed");
    }
    Ok(ExitCode::from(u8::from(failed > 0)))
}

type Results = [(PathBuf, Vec<Case>)];

fn count(results: &Results) -> (usize, usize) {
    let cases = results.iter().flat_map(|(_, cases)| cases);
    let passed = cases.clone().filter(|case| case.outcome.is_ok()).count();
    (passed, cases.count() - passed)
}

fn print_text(results: &Results) -> (usize, usize) {
    for (path, cases) in results {
        for case in cases {
            if let Err(mismatch) = &case.outcome {
                println!("{}: {}", path.display(), case.name);
                println!("  expected {}\n  got      {}", mismatch.expected, mismatch.got);
            }
        }
    }
    count(results)
}

fn print_json(results: &Results) -> Result<(usize, usize)> {
    let (passed, failed) = count(results);
    let mismatches: Vec<Value> = results
        .iter()
        .flat_map(|(path, cases)| {
            cases.iter().filter_map(move |case| {
                let mismatch = case.outcome.as_ref().err()?;
                let file = path.display().to_string();
                Some(serde_json::json!({
                    "file": file, "case": case.name, "expected": mismatch.expected, "got": mismatch.got,
                }))
            })
        })
        .collect();
    let report = serde_json::json!({ "passed": passed, "failed": failed, "mismatches": mismatches });
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok((passed, failed))
}

/// The answers of a transcript, if the path names its commands.
fn recorded_of(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    text.strip_suffix(".input.txt").map_or_else(|| path.to_owned(), |stem| PathBuf::from(format!("{stem}.txt")))
}

fn replay(path: &Path) -> Result<Vec<Case>> {
    let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let recorded = read(path)?;
    if path.extension().is_some_and(|extension| extension == "txt") {
        let input = read(&path.with_extension("input.txt"))?;
        return Ok(replay_transcript(&input, &recorded));
    }
    Ok(match serde_json::from_str(&recorded) {
        Ok(file) => replay_json(&file),
        Err(error) => vec![Case::unknown(&error.to_string())],
    })
}

fn replay_json(file: &Value) -> Vec<Case> {
    let models = [snp::replay, tdx::replay, cca::replay, pkvm::replay];
    let cases = models.into_iter().find_map(|replay| replay(file));
    cases.unwrap_or_else(|| vec![Case::unknown("no architecture's vectors look like this")])
}

fn replay_transcript(input: &str, recorded: &str) -> Vec<Case> {
    let models = [tdx::replay_transcript, cca::replay_transcript];
    let cases = models.into_iter().find_map(|replay| replay(input, recorded));
    cases.unwrap_or_else(|| vec![Case::unknown("no architecture's transcripts look like this")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recorded_fact_is_reproduced() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../vectors"));
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = recorded_of(&entry.unwrap().path());
            if path.extension().is_none_or(|extension| extension == "md") {
                continue;
            }
            for case in replay(&path).unwrap() {
                assert!(case.outcome.is_ok(), "{}: {}: {:?}", path.display(), case.name, case.outcome);
                seen += 1;
            }
        }
        assert!(seen > 500, "only {seen} facts");
    }

    #[test]
    fn a_shape_that_no_model_knows_is_a_failure() {
        assert!(replay_json(&serde_json::json!({ "rows": [] })).iter().any(|case| case.outcome.is_err()));
        assert!(replay_transcript("frobnicate 1", "frobnicate 1 -> ok").iter().any(|case| case.outcome.is_err()));
    }
}
