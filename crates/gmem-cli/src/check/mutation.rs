//! Every recorded fact is looked at: a vector file with one value changed fails.

use serde_json::Value;

use super::{replay_json, replay_transcript};

const VECTORS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../vectors");

/// Parts of the files that say where facts come from, and names of cases.
const ABOUT: [&str; 10] =
    ["description", "provenance", "spec", "agree", "notes", "note", "source", "caution", "name", "ops_note"];

/// A step from a value to a part of it.
#[derive(Clone, Debug)]
enum Step {
    Key(String),
    Index(usize),
}

/// Paths to the strings, numbers and booleans of a file.
fn leaves(value: &Value, path: &[Step], found: &mut Vec<Vec<Step>>) {
    let mut descend = |step: Step, value: &Value| leaves(value, &[path, &[step]].concat(), found);
    match value {
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(key, _)| !ABOUT.contains(&key.as_str()));
            fields.for_each(|(key, value)| descend(Step::Key(key.clone()), value));
        }
        Value::Array(items) => items.iter().enumerate().for_each(|(at, item)| descend(Step::Index(at), item)),
        Value::Null => {}
        _ => found.push(path.to_vec()),
    }
}

fn at<'a>(value: &'a mut Value, path: &[Step]) -> &'a mut Value {
    path.iter().fold(value, |value, step| match step {
        Step::Key(key) => &mut value[key.as_str()],
        Step::Index(at) => &mut value[*at],
    })
}

/// Another value of the same kind: the last digit or letter of a text changes.
fn changed(value: &Value) -> Value {
    match value {
        Value::Bool(value) => Value::Bool(!value),
        Value::Number(number) => Value::from(number.as_i64().unwrap_or(0) + 1),
        Value::String(text) => {
            let last = text.chars().last().unwrap_or('x');
            let other = match last {
                '0'..='8' => char::from(last as u8 + 1),
                '9' | 'b'..='f' => 'a',
                'a' => 'b',
                _ => '?',
            };
            Value::from(format!("{}{other}", &text[..text.len() - last.len_utf8()]))
        }
        other => other.clone(),
    }
}

fn fails(file: &Value) -> bool {
    replay_json(file).iter().any(|case| case.outcome.is_err())
}

/// Inputs that a right answer need not depend on, as the names that lead to them.
///
/// Contents that are not measured; MPIDR, which the RIM does not cover; what a realm asks for where every request fails; how many
/// pages are asked for where one is refused; and the title of a row whose commands are in `output`.
const IMMATERIAL: [&str; 7] = [
    "vectors.pages.fill_byte",
    "vectors.ops.fill_byte",
    "vectors.ops.mpidr",
    "vectors.ops.content",
    "rows.command",
    "rows.output",
    "steps.args",
];

fn names(path: &[Step]) -> String {
    let names = path.iter().filter_map(|step| if let Step::Key(name) = step { Some(name.as_str()) } else { None });
    names.collect::<Vec<_>>().join(".")
}

/// Files with one row each, where rows do not depend on those before them.
fn split(file: &Value) -> Vec<Value> {
    let Some(list) = ["rows", "vectors"].into_iter().find(|key| file.get(key).is_some()) else {
        return vec![file.clone()];
    };
    let alone = |row: &Value| {
        let mut one = file.clone();
        one[list] = Value::from(vec![row.clone()]);
        one
    };
    file[list].as_array().into_iter().flatten().map(alone).collect()
}

/// How many values were changed, and which changes went unnoticed.
fn unnoticed(mut file: Value) -> (usize, Vec<String>) {
    let (mut paths, mut unnoticed) = (Vec::new(), Vec::new());
    leaves(&file, &[], &mut paths);
    for path in &paths {
        let place = at(&mut file, path);
        let old = place.clone();
        let new = changed(&old);
        place.clone_from(&new);
        // A command is an input; an answer behind the arrow is not.
        let is_input = IMMATERIAL.contains(&names(path).as_str()) && !old.to_string().contains("->");
        if !is_input && !fails(&file) {
            unnoticed.push(format!("{path:?}: {old} as {new}"));
        }
        *at(&mut file, path) = old;
    }
    (paths.len(), unnoticed)
}

#[test]
fn one_wrong_value_in_a_vector_file_fails() {
    let mut changes = 0;
    for entry in std::fs::read_dir(VECTORS).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let file = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            for row in split(&file) {
                assert!(!fails(&row), "{}: fails as it is: {row}", path.display());
                let (count, unnoticed) = unnoticed(row);
                assert!(unnoticed.is_empty(), "{}: unnoticed:\n{}", path.display(), unnoticed.join("\n"));
                changes += count;
            }
        }
    }
    assert!(changes > 4000, "only {changes} changes");
}

#[test]
fn one_wrong_line_in_a_transcript_fails() {
    for name in ["cca_rmm1_0_transcript_lifecycle", "tdx_1_5_transcript_aug_accept_demote_promote"] {
        let read = |end: &str| std::fs::read_to_string(format!("{VECTORS}/{name}{end}")).unwrap();
        let (input, recorded) = (read(".input.txt"), read(".txt"));
        let lines: Vec<&str> = recorded.lines().collect();
        let first = input.lines().find(|line| !line.trim().is_empty() && !line.starts_with('#')).unwrap();
        let start = lines.iter().position(|line| line.starts_with(first)).unwrap();
        for at in (start..lines.len()).filter(|at| !lines[*at].starts_with('#') && !lines[*at].is_empty()) {
            let other = changed(&Value::from(lines[at]));
            let mut wrong = lines.clone();
            wrong[at] = other.as_str().unwrap();
            let missing: Vec<&str> = [&lines[..at], &lines[at + 1..]].concat();
            for recorded in [wrong, missing] {
                let cases = replay_transcript(&input, &recorded.join("\n")).cases;
                assert!(cases.iter().any(|case| case.outcome.is_err()), "{name} line {}: {}", at + 1, lines[at]);
            }
        }
    }
}
