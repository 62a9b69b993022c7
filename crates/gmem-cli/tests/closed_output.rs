//! A reader that goes away (`gmem … | head`) ends every command as it ends other tools: by SIGPIPE, without a word.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs gmem with a standard output that nobody reads; the status and what it says on standard error.
fn into_closed_pipe(arguments: &[&str]) -> (std::process::ExitStatus, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_gmem"));
    let output = command.args(arguments).current_dir(repository).stdin(Stdio::null()).stdout(writer).output().unwrap();
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
