//! `gmem litmus` from outside: exit codes, and the tutorial, whose every command is run and whose every line of output is
//! compared.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn litmus(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gmem")).arg("litmus").args(args).current_dir(folder).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The bytes in use depend on the machine that the test was built for.
fn without_memory(line: &str) -> String {
    match line.rsplit_once(", ") {
        Some((rest, last)) if last.ends_with(" KiB") => rest.to_owned(),
        _ => line.trim_end().to_owned(),
    }
}

#[test]
fn the_tutorial_says_what_happens() {
    let text = include_str!("../../../docs/litmus-tutorial.md");
    let folder = folder("tutorial");
    let (mut program, mut commands) = (String::new(), 0);
    for block in text.split("\n```").skip(1).step_by(2) {
        let (kind, body) = block.split_once('\n').unwrap();
        match kind {
            "litmus" => program.push_str(&format!("{body}\n")),
            "litmus new" => program = format!("{body}\n"),
            "console" => commands += compare(&folder, &program, body),
            other => panic!("{other}"),
        }
    }
    assert!(commands >= 6);
    assert!(fs::read_to_string(folder.join("race.svg")).unwrap().starts_with("<svg"));
}

/// Runs the commands of a block; a line `…` stands for any lines.
fn compare(folder: &Path, program: &str, block: &str) -> usize {
    fs::write(folder.join("race.litmus"), program).unwrap();
    let mut commands = 0;
    let mut shown: Vec<String> = Vec::new();
    let mut skips = false;
    for line in block.lines() {
        if let Some(command) = line.strip_prefix("$ gmem litmus ") {
            assert!(shown.is_empty() || skips, "not in the tutorial: {shown:#?}");
            let output = litmus(folder, &command.split(' ').collect::<Vec<_>>());
            shown = stdout(&output).lines().map(without_memory).collect();
            (commands, skips) = (commands + 1, false);
        } else if line == "…" {
            skips = true;
        } else {
            let at = shown.iter().position(|one| *one == without_memory(line));
            let at = at.unwrap_or_else(|| panic!("the tutorial shows {line:?}, the command {shown:#?}"));
            assert!(skips || at == 0, "not in the tutorial: {:#?}", &shown[..at]);
            shown.drain(..=at);
            skips = false;
        }
    }
    assert!(shown.is_empty() || skips, "not in the tutorial: {shown:#?}");
    commands
}

#[test]
fn exit_codes_tell_how_it_ended() {
    let folder = folder("exit");
    let two = "vcpu a:\n    load 0 -> r0\nvcpu b:\n    store 0 = x\n";
    let write = |name: &str, more: &str| {
        fs::write(folder.join(name), format!("question: how\ntype: sw-protected\nslot 0: gfn 0..4\n{two}{more}\n"))
            .unwrap();
    };
    write("holds.litmus", "");
    write("fails.litmus", "forbidden: a.r0 = x");
    write("malformed.litmus", "forbidden: a.r1 = x");
    write("setup.litmus", "setup:\n    punch f 0");
    let code = |args: &[&str]| litmus(&folder, args).status.code();
    assert_eq!(code(&["holds.litmus"]), Some(0));
    assert_eq!(code(&["fails.litmus"]), Some(1));
    assert_eq!(code(&["malformed.litmus"]), Some(2));
    assert_eq!(code(&["nowhere.litmus"]), Some(2));
    assert_eq!(code(&["--max-states", "5", "holds.litmus"]), Some(3));
    assert_eq!(code(&["--max-states", "5", "fails.litmus", "malformed.litmus"]), Some(2));
    let message = litmus(&folder, &["malformed.litmus"]).stderr;
    let message = String::from_utf8_lossy(&message);
    assert!(message.starts_with("malformed.litmus:8:14: expected a register of `a`: r0, found `r1`"), "{message}");
    let large = stdout(&litmus(&folder, &["--max-states", "5", "holds.litmus"]));
    assert!(large.contains("TOO LARGE") && large.contains("stopped after 7 states"), "{large}");
}

#[test]
fn every_type_is_shown_and_only_the_named_ones_are_judged() {
    let folder = folder("types");
    let program = "question: which\ntype: tdx\nfile f: 4 pages\nslot 0: gfn 0..4, file f at 0\nprivate: 0..4\nvcpu a:\n    load 0 \
                   -> r0\nallowed: a.r0 = dead and guest = dead\n";
    fs::write(folder.join("p.litmus"), program).unwrap();
    let output = litmus(&folder, &["--type", "all", "p.litmus"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let header = "default  sw-protected  sev  sev-es  snp  tdx  cca  pkvm  outcome";
    assert!(text.lines().any(|line| line == header), "{text}");
    assert!(text.contains("snp: not judged") && text.contains("tdx: holds"), "{text}");
    let json = stdout(&litmus(&folder, &["--type", "all", "--json", "p.litmus"]));
    let reports: Vec<serde_json::Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(reports.iter().filter(|report| report["named"] == true && report["holds"] == true).count(), 1);
    assert_eq!(reports.len(), 8);
}

const HOLDS: &str =
    "question: how\ntype: sw-protected\nslot 0: gfn 0..4\nvcpu a:\n    load 0 -> r0\nvcpu b:\n    store 0 = x\n";

#[test]
fn a_wrong_command_line_is_told_from_a_failing_condition_before_anything_is_shown() {
    let folder = folder("usage");
    fs::write(folder.join("holds.litmus"), HOLDS).unwrap();
    fs::create_dir(folder.join("empty")).unwrap();
    for (args, word) in [
        (&["--type", "vax", "holds.litmus"][..], "sw-protected"),
        (&["--mutate=nothing", "holds.litmus"], "other-bindings"),
        (&["holds.litmus", "empty"], "empty: no .litmus file in it"),
    ] {
        let output = litmus(&folder, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{args:?}: {said}");
        assert!(said.contains(word), "{args:?}: {said}");
    }
}

#[test]
fn a_drawing_is_that_of_the_first_violation_and_where_there_is_none_that_is_said() {
    let folder = folder("drawing");
    fs::write(folder.join("a.litmus"), HOLDS).unwrap();
    let draw = |args: &[&str]| {
        let output = litmus(&folder, &[&["--svg", "race.svg"], args].concat());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(draw(&["a.litmus"]).starts_with("nothing to draw: "));
    assert!(draw(&["--mutate", "a.litmus"]).contains("--mutate=NAME"));
    assert!(!folder.join("race.svg").exists());
    for name in ["b.litmus", "c.litmus"] {
        fs::write(folder.join(name), format!("{HOLDS}forbidden: a.r0 = x\n")).unwrap();
    }
    assert_eq!(draw(&["a.litmus", "b.litmus", "c.litmus"]), "");
    let drawn = fs::read_to_string(folder.join("race.svg")).unwrap();
    assert!(drawn.contains("b.litmus") && !drawn.contains("c.litmus"), "{drawn}");
}

/// The library's own programs hold, so that only a broken protocol has a drawing.
#[test]
fn the_drawing_of_the_readme_is_drawn() {
    let readme = include_str!("../../../README.md");
    let command = readme.lines().find_map(|line| line.strip_prefix("    gmem litmus --mutate=")).unwrap();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = folder("readme").join("race.svg");
    let command = format!("--mutate={}", command.replace("race.svg", target.to_str().unwrap()));
    let output = litmus(&repository, &command.split_whitespace().collect::<Vec<_>>());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(fs::read_to_string(target).unwrap().starts_with("<svg"));
}

#[test]
fn help_tells_the_exit_codes() {
    assert!(stdout(&litmus(Path::new("."), &["--help"])).contains("Exits with"));
}
