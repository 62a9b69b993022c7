//! Finding the program to run, and refusing what the library cannot be put in front of, before anything starts.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::elf::{self, Kind};
use crate::run::{CANNOT_EXECUTE, NOT_FOUND, refuse};

/// Times that the kernel follows an interpreter of a script (`exec_binprm`).
const INTERPRETERS: u32 = 5;

/// Where a program is, as a shell finds it.
pub(crate) fn find(program: &OsStr) -> Result<PathBuf> {
    let path = Path::new(program);
    if path.components().count() > 1 || path.is_absolute() {
        return Ok(path.to_owned());
    }
    match in_path(program) {
        Some(path) => Ok(path),
        None => refuse(NOT_FOUND, format!("{}: not found in PATH", path.display())),
    }
}

fn in_path(program: &OsStr) -> Option<PathBuf> {
    let places = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&places).map(|place| place.join(program)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// Refuses a program that the library cannot be put in front of, and one that cannot be executed at all.
///
/// What a program starts later is not known here: a static program among it runs without gmem.
pub(crate) fn check(path: &Path) -> Result<()> {
    let mut path = path.to_owned();
    for _ in 0..=INTERPRETERS {
        check_file(&path)?;
        let kind = match elf::kind(&path) {
            Ok(kind) => kind,
            Err(error) => {
                let why = "gmem reads a program to see how it is linked";
                return refuse(CANNOT_EXECUTE, format!("{}: cannot be read ({error}): {why}", path.display()));
            }
        };
        let Kind::Script { interpreter, argument } = kind else { return check_kind(&path, &kind) };
        if !interpreter.exists() {
            let (script, name) = (path.display(), interpreter.display());
            return refuse(CANNOT_EXECUTE, format!("{script}: its interpreter {name} does not exist"));
        }
        // env(1) becomes the program that it is told to find.
        let started = if interpreter.ends_with("env") { env_starts(&argument) } else { None };
        if let Some(program) = started {
            check_file(&interpreter)?;
            path = program;
        } else {
            path = interpreter;
        }
    }
    refuse(CANNOT_EXECUTE, format!("{}: too many scripts that interpret scripts", path.display()))
}

/// The program that `env ARGUMENT` runs.
fn env_starts(argument: &str) -> Option<PathBuf> {
    let words = argument.split_whitespace();
    let name = words.into_iter().find(|word| !word.starts_with('-') && !word.contains('='))?;
    if name.contains('/') { Some(name.into()) } else { in_path(name.as_ref()) }
}

fn check_file(path: &Path) -> Result<()> {
    let shown = path.display();
    let data = match path.metadata() {
        Ok(data) => data,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return refuse(NOT_FOUND, format!("{shown}: no such file"));
        }
        Err(error) => return refuse(CANNOT_EXECUTE, format!("{shown}: {error}")),
    };
    if data.is_dir() {
        return refuse(CANNOT_EXECUTE, format!("{shown}: is a directory"));
    }
    if !is_executable(path) {
        return refuse(CANNOT_EXECUTE, format!("{shown}: is not executable (chmod +x makes it so)"));
    }
    Ok(())
}

fn check_kind(path: &Path, kind: &Kind) -> Result<()> {
    let shown = path.display();
    let why = match kind {
        Kind::Dynamic(linker) if linker.to_string_lossy().contains("musl") => {
            "is linked with musl; gmem needs a program that uses glibc".to_owned()
        }
        Kind::Dynamic(linker) if !linker.exists() => {
            return refuse(NOT_FOUND, format!("{shown}: its dynamic linker {} does not exist", linker.display()));
        }
        Kind::Dynamic(_) | Kind::Script { .. } => return check_privileges(path),
        Kind::Static => "is statically linked, so no library can be put in front of it; build it dynamically \
             (for Rust: a -gnu target and no +crt-static)"
            .to_owned(),
        Kind::Foreign => "is not a program for x86-64 Linux, nor a script that starts with #!".to_owned(),
    };
    refuse(CANNOT_EXECUTE, format!("{shown}: {why}"))
}

/// The dynamic linker ignores LD_PRELOAD in a program that gains privileges when it is executed.
fn check_privileges(path: &Path) -> Result<()> {
    const SET_UID: u32 = 0o4000;
    /// Without the permission to execute, the set-group-ID bit means something else.
    const SET_GID: u32 = 0o2010;
    let Ok(data) = path.metadata() else { return Ok(()) };
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let has_capabilities = || rustix::fs::getxattr(path, "security.capability", &mut [0; 64]).is_ok();
    let gains = if data.mode() & SET_UID != 0 && data.uid() != user {
        "is set-user-ID"
    } else if data.mode() & SET_GID == SET_GID && data.gid() != group {
        "is set-group-ID"
    } else if user != 0 && has_capabilities() {
        "has file capabilities"
    } else {
        return Ok(());
    };
    let why = "so no library can be put in front of it: run a copy without that";
    refuse(CANNOT_EXECUTE, format!("{}: {gains}, {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn env_starts_the_first_word_that_is_neither_option_nor_variable() {
        assert_eq!(env_starts("-S A=1 ./static --option"), Some("./static".into()));
        assert_eq!(env_starts("-i"), None);
        assert!(env_starts("sh").is_some_and(|path| path.ends_with("sh")));
    }
}
