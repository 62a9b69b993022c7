//! `gmem check` from outside: what is checked and what is not.

use std::path::Path;
use std::process::Command;

/// The exit code, standard output and standard error of a check in the repository.
fn check(file: &str) -> (Option<i32>, String, String) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_gmem"));
    let output = command.args(["check", file]).current_dir(repository).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_check_of_nothing_is_no_success() {
    let (code, said, complaint) = check("README.md");
    assert_eq!((code, said.as_str()), (Some(1), "0 passed, 0 failed\n"));
    assert!(complaint.starts_with("gmem: nothing was checked"), "{complaint}");
}

#[test]
fn a_file_that_cannot_be_read_is_one_line_and_fails() {
    let (code, said, _) = check("nope");
    assert_eq!((code, said.as_str()), (Some(1), "nope: No such file or directory (os error 2)\n0 passed, 1 failed\n"));
    assert_eq!(check("vectors/tdx_mrtd.json").0, Some(0));
}
