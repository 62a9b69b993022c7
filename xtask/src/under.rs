//! Running a KVM client natively or under gmem, inside of a guest or on this machine.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::sys::{self, Missing, Tool};
use crate::vm::{Boot, Machine};

/// How a client gets guest private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Under {
    /// From the kernel that it runs on, or not at all.
    Native,
    /// From `gmem run`.
    Gmem,
}

impl Under {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Gmem => "gmem",
        }
    }
}

/// The gmem that clients run under.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Gmem {
    /// The profile that `gmem run` gets
    #[arg(long, value_name = "PROFILE")]
    pub(crate) profile: Option<String>,
    /// The VM types that `gmem run` offers
    #[arg(long, value_name = "TYPES")]
    pub(crate) types: Option<String>,
    /// Let `gmem run` provide VM types that the kernel has itself
    #[arg(long)]
    pub(crate) emulate: bool,
    /// A gmem binary; this checkout's, in release form, without
    #[arg(long, value_name = "FILE")]
    pub(crate) gmem: Option<PathBuf>,
}

impl Gmem {
    /// The same with a binary that exists and has `run`: the one that was named, or one built now.
    pub(crate) fn ready(&self) -> Result<Self> {
        let path = match &self.gmem {
            Some(path) => fs::canonicalize(path).with_context(|| format!("the binary {}", path.display()))?,
            None => sys::build_release(&["gmem-cli"])?.join("gmem"),
        };
        // A binary without commands prints nothing and succeeds: look at what the help says, not at its status.
        let help = sys::output(Command::new(&path).args(["run", "--help"])).unwrap_or_default();
        if !help.contains("--profile") {
            bail!(Missing(format!("`gmem run` in {}", path.display())));
        }
        Ok(Self { gmem: Some(path), ..self.clone() })
    }

    /// The options that say the same to another xtask.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments = self.options();
        if let Some(gmem) = &self.gmem {
            arguments.extend(["--gmem".into(), gmem.into()]);
        }
        arguments
    }

    /// The options of `gmem run`, which xtask's have the names of.
    fn options(&self) -> Vec<OsString> {
        let options = [("--profile", &self.profile), ("--types", &self.types)];
        let given = options.into_iter().filter_map(|(name, value)| Some([name.into(), value.as_ref()?.into()]));
        given.flatten().chain(self.emulate.then(|| "--emulate".into())).collect()
    }

    /// The words that go in front of a client's.
    pub(crate) fn prefix(&self, under: Under) -> Vec<OsString> {
        if under == Under::Native {
            return Vec::new();
        }
        let mut prefix = vec![self.gmem.clone().unwrap_or_else(|| "gmem".into()).into(), "run".into()];
        prefix.extend(self.options());
        prefix.push("--".into());
        prefix
    }
}

/// What became of a client.
#[derive(Debug)]
pub(crate) struct Ran {
    /// The exit status, as the shell counts: 128 and the signal for one that was killed.
    pub(crate) status: i32,
    pub(crate) took: Duration,
}

/// The exit status of a client that was ended for taking too long.
pub(crate) const TIMED_OUT: i32 = 124;

/// Runs a client to its end, or for `limit` at most.
pub(crate) fn client(words: &[OsString], limit: Duration, output: File, errors: File) -> Result<Ran> {
    sys::need(&[Tool("timeout", "coreutils")])?;
    let mut command = Command::new("timeout");
    command.arg("--kill-after=5").arg(limit.as_secs().to_string()).args(words);
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let begin = Instant::now();
    let status = command.status().context("starting timeout")?;
    let took = begin.elapsed();
    // Where timeout(1) has to use force it reports the kill: that is a time that ran out too.
    let status = if took >= limit { TIMED_OUT } else { code(status) };
    Ok(Ran { status, took })
}

/// An exit status as the shell counts.
pub(crate) fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Boots a guest that runs this program with other arguments and may write one folder: it is there, as the guest sees this
/// machine's files. Its exit status.
pub(crate) fn myself(
    kernel: Kernel,
    machine: &Machine,
    timeout: Duration,
    folder: &Path,
    arguments: Vec<OsString>,
) -> Result<u8> {
    let me = env::current_exe().context("the path of xtask")?.into_os_string();
    let command: Vec<OsString> = std::iter::once(me).chain(arguments).collect();
    Boot { kernel, machine, timeout, write: &[folder.to_path_buf()], user: None, command: &command }.run()
}
