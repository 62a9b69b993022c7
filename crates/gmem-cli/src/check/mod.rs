//! `gmem check`: replays recorded facts against the models.

mod cca;
#[cfg(test)]
mod mutation;
mod pkvm;
mod snp;
mod tdx;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// Replay recorded facts against the models.
///
/// Takes vector files (JSON, or one JSON object per line) and transcripts (a `.input.txt` of commands beside a `.txt` of what was
/// answered), of all architectures, and folders of them. Prints every mismatch with both sides; what a model cannot
/// express counts as failed, and so does a file that cannot be read. Notes in Markdown beside vectors are left out.
///
/// Exits with 0 if every fact is reproduced, 1 if one is not or nothing was checked.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Vector files, or folders of them; for a transcript, either of its two files.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Machine-readable output: `passed`, `failed`, and the `mismatches`.
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
    /// As recorded; nothing where the file as a whole is of no use.
    pub(crate) expected: Option<String>,
    /// As modelled, or why the model cannot express the row.
    pub(crate) got: String,
}

impl Case {
    /// Compares what a file records with what a model answers.
    pub(crate) fn compare(name: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        let (name, expected, got) = (name.into(), expected.into(), got.into());
        let outcome = if expected == got { Ok(()) } else { Err(Mismatch { expected: Some(expected), got }) };
        Self { name, outcome }
    }

    /// A file that cannot be read, or that no model understands.
    fn unknown(why: &str) -> Self {
        let mismatch = Mismatch { expected: None, got: why.to_owned() };
        Self { name: "file".to_owned(), outcome: Err(mismatch) }
    }
}

/// A transcript's facts, and how it was read where its own words leave that open.
#[derive(Debug)]
pub(crate) struct Transcript {
    pub(crate) cases: Vec<Case>,
    pub(crate) reading: Option<String>,
}

/// What became of a file.
struct Replayed {
    path: PathBuf,
    cases: Vec<Case>,
    reading: Option<String>,
}

impl Replayed {
    fn mismatches(&self) -> impl Iterator<Item = (&str, &Mismatch)> {
        self.cases.iter().filter_map(|case| Some((case.name.as_str(), case.outcome.as_ref().err()?)))
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let files: BTreeSet<PathBuf> = arguments.files.iter().flat_map(|path| expand(path)).collect();
    let replayed: Vec<Replayed> = files.into_iter().filter(|path| !has_extension(path, "md")).map(replay).collect();
    let failed = replayed.iter().map(|file| file.mismatches().count()).sum::<usize>();
    let passed = replayed.iter().map(|file| file.cases.len()).sum::<usize>() - failed;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if arguments.json {
        writeln!(out, "{:#}", report(&replayed, passed, failed))?;
    } else {
        print(&mut out, &replayed)?;
        writeln!(out, "{passed} passed, {failed} failed")?;
    }
    out.flush()?;
    ensure!(passed + failed > 0, "nothing was checked: notes in Markdown are left out, and there is no other file");
    Ok(ExitCode::from(u8::from(failed > 0)))
}

fn print(out: &mut impl Write, replayed: &[Replayed]) -> Result<()> {
    for file in replayed {
        let path = file.path.display();
        if let Some(reading) = &file.reading {
            writeln!(out, "{path}: {reading}")?;
        }
        for (case, Mismatch { expected, got }) in file.mismatches() {
            match expected {
                Some(expected) => writeln!(out, "{path}: {case}\n  expected {expected}\n  got      {got}")?,
                None => writeln!(out, "{path}: {got}")?,
            }
        }
    }
    Ok(())
}

fn report(replayed: &[Replayed], passed: usize, failed: usize) -> Value {
    let of = |file: &Replayed| -> Vec<Value> {
        let path = file.path.display().to_string();
        let object = |(case, Mismatch { expected, got }): (&str, &Mismatch)| json!({"file": path, "case": case, "expected": expected, "got": got});
        file.mismatches().map(object).collect()
    };
    json!({"passed": passed, "failed": failed, "mismatches": replayed.iter().flat_map(of).collect::<Vec<_>>()})
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// The files that an argument names, a transcript by its answers. A folder stands for the vectors in it.
fn expand(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else { return vec![recorded_of(path)] };
    let files: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_file()).collect();
    // A folder without vectors is named itself, and fails for being a folder.
    if files.is_empty() { vec![path.to_owned()] } else { files.iter().map(|path| recorded_of(path)).collect() }
}

/// The answers of a transcript, if the path names its commands.
fn recorded_of(path: &Path) -> PathBuf {
    let text = path.to_string_lossy();
    text.strip_suffix(".input.txt").map_or_else(|| path.to_owned(), |stem| PathBuf::from(format!("{stem}.txt")))
}

fn replay(path: PathBuf) -> Replayed {
    let transcript = replay_file(&path).unwrap_or_else(|case| Transcript { cases: vec![case], reading: None });
    Replayed { path, cases: transcript.cases, reading: transcript.reading }
}

fn replay_file(path: &Path) -> Result<Transcript, Case> {
    let recorded = read(path).map_err(|error| Case::unknown(&error.to_string()))?;
    if has_extension(path, "txt") {
        let input = path.with_extension("input.txt");
        let why = |error| format!("its commands cannot be read: {}: {error}", input.display());
        return Ok(replay_transcript(&read(&input).map_err(|error| Case::unknown(&why(error)))?, &recorded));
    }
    let file = parse(&recorded).map_err(|error| Case::unknown(&format!("not JSON: {error}")))?;
    Ok(Transcript { cases: replay_json(&file), reading: None })
}

/// The text of a file, without the mark that some editors put before it.
fn read(path: &Path) -> std::io::Result<String> {
    let text = std::fs::read_to_string(path)?;
    Ok(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned))
}

/// A JSON value, or one per line.
fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(text).or_else(|error| {
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        let values: Vec<Value> = lines.map(serde_json::from_str).collect::<Result<_, _>>().map_err(|_| error)?;
        if values.is_empty() { serde_json::from_str(text) } else { Ok(Value::from(values)) }
    })
}

fn replay_json(file: &Value) -> Vec<Case> {
    if let Value::Array(items) = file {
        return replay_items(items);
    }
    replay_known(file).unwrap_or_else(|| vec![Case::unknown("no architecture's vectors look like this")])
}

fn replay_known(file: &Value) -> Option<Vec<Case>> {
    let models = [snp::replay, tdx::replay, cca::replay, pkvm::replay];
    models.into_iter().find_map(|replay| replay(file))
}

/// A list is that of a file without the rest, or a list of files.
fn replay_items(items: &[Value]) -> Vec<Case> {
    let lists = ["vectors", "rows", "steps"].map(|name| json!({ name: items }));
    let known = lists.iter().find_map(replay_known);
    known.unwrap_or_else(|| match items {
        [] => vec![Case::unknown("an empty list")],
        items => items
            .iter()
            .flat_map(|item| if item.is_array() { vec![Case::unknown("lists in a list")] } else { replay_json(item) })
            .collect(),
    })
}

fn replay_transcript(input: &str, recorded: &str) -> Transcript {
    let models = [tdx::replay_transcript, cca::replay_transcript];
    let transcript = models.into_iter().find_map(|replay| replay(input, recorded));
    let unknown = || vec![Case::unknown("no architecture's transcripts look like this")];
    transcript.unwrap_or_else(|| Transcript { cases: unknown(), reading: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../vectors");

    #[test]
    fn every_recorded_fact_is_reproduced() {
        let mut seen = 0;
        for path in expand(Path::new(VECTORS)) {
            let file = replay(path.clone());
            if !has_extension(&path, "md") {
                assert_eq!(file.mismatches().count(), 0, "{}: {:?}", path.display(), file.mismatches().next());
                assert_eq!(file.reading, None, "{} says itself how it is read", path.display());
                seen += file.cases.len();
            }
        }
        assert!(seen > 900, "only {seen} facts");
    }

    fn failures(cases: &[Case]) -> usize {
        cases.iter().filter(|case| case.outcome.is_err()).count()
    }

    #[test]
    fn a_shape_that_no_model_knows_is_a_failure() {
        for file in [json!({"rows": []}), json!([]), json!({}), json!(7), json!([[]]), json!({"vectors": [{}]})] {
            assert_eq!(failures(&replay_json(&file)), 1, "{file}");
        }
        assert_eq!(failures(&replay_transcript("frobnicate 1", "frobnicate 1 -> ok").cases), 1);
        assert_eq!(failures(&replay_transcript("", "").cases), 1);
    }

    #[test]
    fn a_list_alone_is_that_of_a_file_or_of_files() {
        let text = std::fs::read_to_string(format!("{VECTORS}/tdx_mrtd.json")).unwrap();
        let file = parse(&text).unwrap();
        let lines = |values: &[Value]| values.iter().map(|value| format!("{value}\n")).collect::<String>();
        let vectors = file["vectors"].as_array().unwrap();
        let cases = |text: &str| {
            let cases = replay_json(&parse(text).unwrap());
            (cases.len(), failures(&cases))
        };
        assert_eq!(cases(&text), (6, 0));
        assert_eq!(cases(&lines(vectors)), (6, 0));
        assert_eq!(cases(&file["vectors"].to_string()), (6, 0));
        assert_eq!(cases(&lines(&[file.clone(), file.clone()])), (12, 0));
        assert!(parse("").is_err() && parse("\n").is_err() && parse("{\n}{").is_err());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_a_failure() {
        let folder = std::env::temp_dir().join(format!("gmem-check-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.join(name), bytes).unwrap();
            replay(recorded_of(&folder.join(name))).cases
        };
        assert_eq!(failures(&replay(expand(&folder).remove(0)).cases), 1);
        assert_eq!(failures(&replay(folder.join("missing.json")).cases), 1);
        assert_eq!(failures(&file("empty.json", b"")), 1);
        assert_eq!(failures(&file("binary.json", &[0xff, 0xfe])), 1);
        assert_eq!(failures(&file("lonely.txt", b"delegate 1 -> RMI_SUCCESS\n")), 1);
        assert_eq!(failures(&file("lonely.input.txt", b"\xef\xbb\xbfdelegate 1\r\n")), 0);
        let marked = [b"\xef\xbb\xbf", std::fs::read(format!("{VECTORS}/tdx_mrtd.json")).unwrap().as_slice()].concat();
        assert_eq!(failures(&file("marked.json", &marked)), 0);
        assert_eq!(expand(&folder).iter().collect::<BTreeSet<_>>().len(), 4);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
