//! The machine that xtask runs on: its tools, its cache, the repository's folders.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process_group};

/// The exit status of a command that could not run for lack of something; test runners of the automake kind read it as a skip.
pub(crate) const EXIT_MISSING: u8 = 77;
/// The exit status of a command that failed by itself, as opposed to the command that it was asked to run.
pub(crate) const EXIT_ERROR: u8 = 125;

/// Something that this machine lacks. The text says what it is and how to get it.
#[derive(Debug)]
pub(crate) struct Missing(pub(crate) String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "missing: {}", self.0)
    }
}

impl std::error::Error for Missing {}

/// A program and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool(pub(crate) &'static str, pub(crate) &'static str);

/// Checks that every tool is there; the error names all that are not.
pub(crate) fn need(tools: &[Tool]) -> Result<()> {
    let absent: Vec<Tool> = tools.iter().copied().filter(|tool| which(tool.0).is_none()).collect();
    if absent.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = absent.iter().map(|tool| tool.0).collect();
    let mut packages: Vec<&str> = absent.iter().map(|tool| tool.1).collect();
    packages.dedup();
    bail!(Missing(format!("{} (apt-get install {})", names.join(", "), packages.join(" "))))
}

/// The path of a program, as the shell would find it; the folders of system administration count for every user.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Runs a command to its end and takes any status but zero as an error. What it prints goes to standard error: standard
/// output is for what xtask was asked for.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.stdout(std::io::stderr()).status().with_context(|| format!("starting {}", name(command)))?;
    if !status.success() {
        bail!("{} failed ({status}): {command:?}", name(command));
    }
    Ok(())
}

/// [`run`], but not for longer than `limit`: then the command is killed with all that it started, and that is an error.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    command.stdout(std::io::stderr()).process_group(0);
    let mut child = command.spawn().with_context(|| format!("starting {}", name(command)))?;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            kill_process_group(Pid::from_child(&child), Signal::KILL).context("killing what takes too long")?;
            child.wait()?;
            bail!("{} had not ended after {} s and was killed: {command:?}", name(command), limit.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    };
    if !status.success() {
        bail!("{} failed ({status}): {command:?}", name(command));
    }
    Ok(())
}

/// Runs a command and returns what it wrote to its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {}", name(command)))?;
    if !output.status.success() {
        bail!("{} failed ({}): {}", name(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Where downloads and builds are kept.
pub(crate) fn cache() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    let folder = base.context("neither XDG_CACHE_HOME nor HOME is set: no place for the cache")?.join("gmem");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder)
}

/// Makes a cached folder once: `fill` works on an empty folder beside it, which gets its final name when `fill` succeeds.
/// Others who want the same folder meanwhile wait for the first.
pub(crate) fn cached(name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let folder = cache()?.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    let lock = File::create(beside(&folder, "lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if !folder.is_dir() {
        let part = beside(&folder, "part");
        if part.exists() {
            fs::remove_dir_all(&part)?;
        }
        fs::create_dir_all(&part)?;
        fill(&part)?;
        fs::rename(&part, &folder)?;
    }
    Ok(folder)
}

fn beside(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// The repository's folder.
pub(crate) fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// `cargo`, as the one that runs this, in the repository.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(repository());
    command
}

/// Builds programs of the workspace in release form; their folder.
pub(crate) fn build_release(packages: &[&str]) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--quiet", "--release"]);
    for package in packages {
        command.args(["--package", package]);
    }
    run(&mut command)?;
    let metadata = output(cargo().args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&metadata)?;
    let target = metadata["target_directory"].as_str().context("cargo metadata has no target_directory")?;
    Ok(Path::new(target).join("release"))
}

/// The number of processors, for `make -j`.
pub(crate) fn processors() -> usize {
    thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A size for people.
#[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
pub(crate) fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// One word for the shell, byte for byte.
pub(crate) fn quote(word: &OsStr) -> OsString {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(br"'\''"),
            byte => quoted.push(*byte),
        }
    }
    quoted.push(b'\'');
    OsString::from_vec(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_reads_a_quoted_word_as_it_was() {
        for word in ["", "a b", "it's", "$HOME `x` \"y\" \\ *", "'", "a\nb"] {
            let mut script = OsString::from("printf %s ");
            script.push(quote(OsStr::new(word)));
            assert_eq!(output(Command::new("sh").arg("-c").arg(script)).unwrap(), word);
        }
    }

    #[test]
    fn every_missing_tool_is_named_with_its_package() {
        let error = need(&[Tool("sh", "dash"), Tool("no-such-tool", "some-package")]).unwrap_err();
        assert!(error.is::<Missing>());
        assert_eq!(error.to_string(), "missing: no-such-tool (apt-get install some-package)");
    }

    #[test]
    fn what_takes_too_long_is_killed_with_all_that_it_started() {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new("sh");
        // The pipe stays open for as long as the grandchild lives.
        command.args(["-c", "sleep 600 & wait"]).stderr(writer);
        let error = run_within(&mut command, Duration::from_millis(300)).unwrap_err().to_string();
        drop(command);
        assert!(error.contains("was killed"), "{error}");
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        assert!(run_within(&mut Command::new("true"), Duration::from_secs(60)).is_ok());
        assert!(run_within(&mut Command::new("false"), Duration::from_secs(60)).is_err());
    }
}
