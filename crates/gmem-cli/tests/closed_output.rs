//! A reader that goes away (`gmem … | head`) ends every command as it ends other tools: by SIGPIPE, without a word. A disk that
//! is full is an error like any other.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

/// Runs gmem with a standard output that nobody reads; the status and what it says on standard error.
fn into_closed_pipe(arguments: &[&str]) -> (ExitStatus, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    into(writer, arguments)
}

fn into(stdout: impl Into<Stdio>, arguments: &[&str]) -> (ExitStatus, String) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_gmem"));
    let output = command.args(arguments).current_dir(repository).stdin(Stdio::null()).stdout(stdout).output().unwrap();
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn every_command_that_prints_ends_by_the_signal() {
    for arguments in [
        &["vendors"][..],
        &["vendors", "--json"],
        &["check", "no-such-file"],
        &["check", "--json", "no-such-file"],
        &["litmus", "litmus/attribute-decides.litmus"],
        &["litmus", "--json", "litmus/attribute-decides.litmus"],
        &["probe"],
        &["probe", "--json"],
        &["--help"],
    ] {
        let (status, said) = into_closed_pipe(arguments);
        assert_eq!((status.signal(), said.as_str()), (Some(libc::SIGPIPE), ""), "{arguments:?}: {status}");
    }
}

/// Without a KVM the demonstration says so and prints nothing; with one it ends like the others.
#[test]
fn the_demonstration_does_not_panic() {
    let (status, said) = into_closed_pipe(&["demo"]);
    assert!(!status.success() && !said.contains("panicked"), "{status}: {said}");
}

#[test]
fn a_full_disk_is_an_error_of_every_command() {
    let steps = Path::new(env!("CARGO_TARGET_TMPDIR")).join("full-disk.json");
    std::fs::write(&steps, r#"[{"op": "realm_create", "hash_algo": 0}]"#).unwrap();
    for arguments in [
        &["vendors"][..],
        &["vendors", "--json"],
        &["check", "vectors/tdx_mrtd.json"],
        &["check", "--json", "vectors/tdx_mrtd.json"],
        &["litmus", "litmus/attribute-decides.litmus"],
        &["litmus", "--json", "litmus/attribute-decides.litmus"],
        &["litmus", "--mutate", "--type=all", "litmus/attribute-decides.litmus"],
        &["probe"],
        &["probe", "--json"],
        &["demo", "--core"],
        &["demo", "--core", "--json"],
        &["measure", "cca", steps.to_str().unwrap()],
        &["measure", "cca", "--json", steps.to_str().unwrap()],
    ] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (status, said) = into(full, arguments);
        assert_eq!(status.code(), Some(1), "{arguments:?}: {said}");
        assert!(said.contains("gmem: No space left on device"), "{arguments:?}: {said}");
    }
}
