//! `gmem run`: a program becomes one that has guest private memory, by exec.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::{Args, FromArgMatches};
use gmem_uapi::native::Native;
use gmem_uapi::profile::{self, Profile};
use gmem_uapi::{Config, Errno};
use rustix::fs::MemfdFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{program, sigpipe, types};

/// The library that goes in front of libc.
static LIBRARY: &[u8] = include_bytes!(env!("GMEM_PRELOAD_LIBRARY"));

/// Run a program with guest private memory.
///
/// The program is exec'ed: same process, same standard streams, its own exit status and signals. Its children inherit gmem, but
/// for static programs among them, which it cannot reach. A VM type that the host's KVM has by itself, with the behaviour of
/// the profile, is left to it, unless --emulate is given.
///
/// Exits with the program's status, or with 2 if the command line is wrong, 125 if there is no KVM or gmem itself fails, 126 if
/// the program cannot be executed under gmem, 127 if it is not found.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  gmem run -- ./private_mem_conversions_test
  gmem run --profile linux-7.3 -- ./guest_memfd_test
  gmem run -v --types sw-protected -- ./my-vmm --config vm.json")]
pub(crate) struct Arguments {
    /// The kernel to behave like: linux-6.12, linux-6.18, linux-7.3 [default: the one nearest to the host's].
    #[arg(long, value_name = "PROFILE")]
    profile: Option<String>,
    /// VM types to provide, separated by commas.
    #[arg(long, value_name = "TYPES", default_value = "default,sw-protected")]
    types: String,
    /// Provide them even where the host has them.
    #[arg(long)]
    emulate: bool,
    /// Say on standard error what is provided before the program starts.
    #[arg(short, long)]
    verbose: bool,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

impl Arguments {
    /// Those of this process, if it is a complete `gmem run`.
    ///
    /// A program that starts programs does not first describe all its other commands to itself. What is wrong, or asks for help,
    /// is left to the parser that knows them.
    pub(crate) fn alone() -> Option<Self> {
        let mut all = std::env::args_os().skip(1);
        all.next().filter(|command| command == "run")?;
        let parser = Self::augment_args(clap::Command::new("run").no_binary_name(true));
        Self::from_arg_matches(&parser.try_get_matches_from(all).ok()?).ok()
    }
}

/// A program that cannot be run, with the exit code that a shell would give.
#[derive(Debug)]
pub(crate) struct Refused {
    why: String,
    code: u8,
}

impl Refused {
    pub(crate) fn exit_code(&self) -> u8 {
        self.code
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

impl std::error::Error for Refused {}

pub(crate) fn refuse<T>(code: u8, why: impl Into<String>) -> Result<T> {
    Err(Refused { why: why.into(), code }.into())
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn bad_usage(error: anyhow::Error) -> anyhow::Error {
    Refused { why: format!("{error:#}"), code: BAD_USAGE }.into()
}

const BAD_USAGE: u8 = 2;
/// gmem's own failure: as env(1) and timeout(1) have it, so that it is none of the program's.
const FAILED: u8 = 125;
pub(crate) const CANNOT_EXECUTE: u8 = 126;
pub(crate) const NOT_FOUND: u8 = 127;

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let [program, rest @ ..] = arguments.program.as_slice() else { return refuse(BAD_USAGE, "no program given") };
    let wanted = types::parse_mask(&arguments.types).map_err(bad_usage)?;
    let path = program::find(program)?;
    program::check(&path)?;
    let native = native()?;
    let profile = profile(arguments.profile.as_deref(), &native).map_err(bad_usage)?;
    let config = Config::for_host(&native, profile, wanted, arguments.emulate);
    if arguments.verbose {
        eprintln!("{}", describe(&native, &config, wanted));
    }
    let mut command = Command::new(&path);
    command.arg0(program).args(rest);
    exec(command, &config).or_else(|error| match error.downcast::<Refused>() {
        Ok(refused) => Err(refused.into()),
        Err(error) => refuse(CANNOT_EXECUTE, format!("{}: {error:#}", path.display())),
    })
}

/// Becomes `command`, with the library in front of it if there is anything to provide. Returns only if that fails.
pub(crate) fn exec(mut command: Command, config: &Config) -> Result<ExitCode> {
    let library = if config.emulated == 0 { None } else { Some(interpose(&mut command, config)?) };
    sigpipe::inherit(&mut command);
    let error = command.exec();
    drop(library);
    Err(error.into())
}

fn describe(native: &Native, config: &Config, wanted: u32) -> String {
    let list = |mask: u32| match types::names(mask).join(", ") {
        names if names.is_empty() => "none".to_owned(),
        names => names,
    };
    format!(
        "gmem: as {}, on {}; provided: {}; left to the host: {}",
        config.profile.name,
        native.release,
        list(config.emulated),
        list(wanted & !config.emulated),
    )
}

/// The host's KVM, or what to do to have one.
pub(crate) fn native() -> Result<Native> {
    let advice = |error: Errno| match error {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            "there is no /dev/kvm: load kvm_intel or kvm_amd, or pass the device into the container or VM"
        }
        Errno::ACCESS | Errno::PERM => "you may not open /dev/kvm: join the group that owns it (usually kvm)",
        Errno::NOTTY | Errno::ISDIR => {
            "/dev/kvm is something else than KVM's device: pass the real one into the container or VM"
        }
        _ => "/dev/kvm cannot be opened",
    };
    Native::probe().or_else(|error| refuse(FAILED, format!("{} ({error})", advice(error))))
}

fn profile(name: Option<&str>, native: &Native) -> Result<&'static Profile> {
    let Some(name) = name else { return Ok(native.profile()) };
    let known = profile::PROFILES.iter().map(|profile| profile.name).collect::<Vec<_>>().join(", ");
    profile::by_name(name).with_context(|| format!("no profile {name:?}; there are {known}"))
}

/// Puts the library in front. It lives in a memfd, so nothing is left on any file system; the descriptor stays open over exec
/// and is inherited, because children load the library through it too.
fn interpose(command: &mut Command, config: &Config) -> Result<OwnedFd> {
    let library = library().or_else(|error| match error {
        Errno::FBIG => {
            refuse(FAILED, "the process's file size limit is too small for gmem's library: raise it (ulimit -f)")
        }
        error => refuse(FAILED, format!("cannot make a memfd for gmem's library ({error})")),
    })?;
    let number = library.as_raw_fd();
    // With room for any other: the library's descriptor makes way for one of the client's.
    let path = format!("/proc/self/fd/{number:/>5}");
    // The program's dynamic linker would go on without the library.
    if let Err(error) = std::fs::File::open(&path) {
        let why = format!("the program could not load gmem's library, {path} ({error}): is /proc mounted?");
        return refuse(FAILED, why);
    }
    let mut preload = OsString::from(path);
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    command.env("LD_PRELOAD", preload);
    command.env("GMEM_PROFILE", config.profile.name);
    command.env("GMEM_EMULATED_TYPES", config.emulated.to_string());
    command.env("GMEM_LIBRARY_FD", format!("{number:05}"));
    Ok(library)
}

/// Writes to a file that belongs to nobody else. A write beyond the process's limit would end it by a signal.
fn write_all(file: &OwnedFd, mut left: &[u8]) -> Result<(), Errno> {
    let limit = getrlimit(Resource::Fsize);
    setrlimit(Resource::Fsize, Rlimit { current: limit.maximum, ..limit })?;
    if limit.maximum.is_some_and(|most| most < left.len() as u64) {
        return Err(Errno::FBIG);
    }
    while !left.is_empty() {
        let written = rustix::io::write(file, left)?;
        left = &left[written..];
    }
    setrlimit(Resource::Fsize, limit)
}

fn library() -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create("gmem", MemfdFlags::CLOEXEC)?;
    write_all(&file, LIBRARY)?;
    // Out of the way of the client's numbering, and not close-on-exec.
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(1024).min(1024);
    let high = i32::try_from(limit).unwrap_or(1024) - 1;
    let file = rustix::io::fcntl_dupfd_cloexec(&file, high).or(Ok::<_, Errno>(file))?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
    Ok(file)
}
