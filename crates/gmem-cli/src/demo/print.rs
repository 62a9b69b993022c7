//! A tour as text and as JSON.

use std::fmt::Write;

use serde::Serialize;

use super::map::{Paint, legend};
use super::tour::{Observation, Outcome, STEPS, Step};

const GREEN: &str = "32";
const RED: &str = "1;31";
const YELLOW: &str = "33";
const BOLD: &str = "1";
const DIM: &str = "2";

/// What comes before the first step.
pub(super) fn opening(provider: &str, paint: Paint) -> String {
    let title = paint.paint(BOLD, &format!("gmem demo: guest private memory in {STEPS} steps"));
    format!("{title}\nProvided by: {provider}\nMaps have one character per page:{}\n", legend(paint))
}

/// One step.
pub(super) fn step(step: &Step, paint: Paint) -> String {
    let title = paint.paint(BOLD, &format!("{:>2}  {}", step.number, step.title));
    let mut text = format!("\n{title}\n{}", wrapped(step.story));
    for (index, asked) in step.asked.iter().enumerate() {
        let label = if index == 0 { paint.paint(DIM, "asked   ") } else { "        ".to_owned() };
        let _ = writeln!(text, "    {label}{asked}");
    }
    let (before, after) = (step.before.draw(paint), step.after.draw(paint));
    let _ = writeln!(text, "    {}{before}  ->  {after}", paint.paint(DIM, "memory  "));
    for observation in &step.observations {
        let _ = writeln!(text, "    {}", seen(observation, paint));
    }
    text
}

/// `text` in lines that fit a terminal.
fn wrapped(text: &str) -> String {
    const WIDTH: usize = 92;
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() < WIDTH => *line += &format!(" {word}"),
            _ => lines.push(format!(" {word}")),
        }
    }
    lines.iter().fold(String::new(), |text, line| text + "   " + line + "\n")
}

fn seen(observation: &Observation, paint: Paint) -> String {
    let text = &observation.text;
    match &observation.outcome {
        Outcome::Ok => format!("{}{text}", paint.paint(GREEN, "ok      ")),
        Outcome::Failed(seen) => format!("{}{text}; seen: {seen}", paint.paint(RED, "FAILED  ")),
        Outcome::Skipped(missing) => format!("{}{text}; missing: {missing}", paint.paint(YELLOW, "skipped ")),
    }
}

/// What comes after the last step.
pub(super) fn closing(steps: &[Step], paint: Paint) -> String {
    let observations: usize = steps.iter().map(|step| step.observations.len()).sum();
    let verdict = match steps.iter().map(Step::failures).sum::<usize>() {
        0 => paint.paint(GREEN, &format!("{} steps, {observations} observations: all ok", steps.len())),
        failed => paint.paint(RED, &format!("{failed} FAILED, at step {} of {STEPS}", steps.len())),
    };
    format!("\n{verdict}\nThe same for a program of yours: gmem run -- PROGRAM\n")
}

/// A tour for machines.
#[derive(Debug, Serialize)]
struct Report<'t> {
    provider: &'t str,
    ok: bool,
    steps: Vec<StepReport<'t>>,
}

#[derive(Debug, Serialize)]
struct StepReport<'t> {
    number: usize,
    title: &'t str,
    story: &'t str,
    asked: &'t [String],
    before: String,
    after: String,
    ok: bool,
    observations: Vec<ObservationReport<'t>>,
}

#[derive(Debug, Serialize)]
struct ObservationReport<'t> {
    text: &'t str,
    outcome: &'t Outcome,
}

/// The whole tour as JSON.
pub(super) fn json(provider: &str, steps: &[Step]) -> serde_json::Result<String> {
    let ok = steps.iter().all(|step| step.failures() == 0);
    serde_json::to_string_pretty(&Report { provider, ok, steps: steps.iter().map(step_report).collect() })
}

fn step_report(step: &Step) -> StepReport<'_> {
    let observations = step.observations.iter();
    StepReport {
        number: step.number,
        title: step.title,
        story: step.story,
        asked: &step.asked,
        before: step.before.draw(Paint::Plain),
        after: step.after.draw(Paint::Plain),
        ok: step.failures() == 0,
        observations: observations.map(|seen| ObservationReport { text: &seen.text, outcome: &seen.outcome }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::map::Map;

    fn failed() -> Step {
        let observation = Observation { text: "it rains".into(), outcome: Outcome::Failed("sunshine".into()) };
        Step {
            number: 1,
            title: "Weather",
            story: "Look.",
            asked: vec!["the sky".into()],
            before: Map::default(),
            after: Map::default(),
            observations: vec![observation],
        }
    }

    #[test]
    fn a_failure_is_said_with_what_was_seen() {
        assert!(step(&failed(), Paint::Plain).contains("FAILED  it rains; seen: sunshine\n"));
        assert!(closing(&[failed()], Paint::Plain).contains("1 FAILED, at step 1"));
        let json = json("nobody", &[failed()]).unwrap();
        assert!(json.contains("\"ok\": false") && json.contains("\"failed\": \"sunshine\""), "{json}");
    }

    #[test]
    fn long_sentences_are_wrapped_between_words() {
        let text = ["word"; 60].join(" ");
        let lines = wrapped(&text);
        assert!(lines.lines().all(|line| line.len() < 100 && line.starts_with("    word")), "{lines}");
        assert_eq!(lines.split_whitespace().count(), 60);
    }

    #[test]
    fn what_cannot_be_tried_is_no_failure_and_names_what_is_missing() {
        let mut skipped = failed();
        skipped.observations[0].outcome = Outcome::Skipped("KVM_CAP_RAIN");
        assert_eq!(skipped.failures(), 0);
        assert!(step(&skipped, Paint::Plain).contains("skipped it rains; missing: KVM_CAP_RAIN\n"));
    }

    #[test]
    fn plain_text_has_no_escapes() {
        assert!(!step(&failed(), Paint::Plain).contains('\x1b') && !opening("x", Paint::Plain).contains('\x1b'));
        assert!(step(&failed(), Paint::Colour).contains("\x1b[1;31mFAILED"));
    }
}
