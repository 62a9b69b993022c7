//! Races and churn under gmem, and that nothing is left behind by a client that ended or was killed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Args;
use super::left::Held;
use crate::sys::Missing;
use crate::under::{self, Gmem};
use crate::vm::Mode;

/// Huge pages of a guest in which clients must not lose any.
const HUGEPAGES: u32 = 64;

/// What the client is asked for instead of a transcript.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stress {
    /// Seconds.
    Race(u64),
    /// Rounds.
    Churn(u64),
}

impl Stress {
    pub(super) fn of(args: &Args) -> Option<Self> {
        args.race.map(Self::Race).or(args.churn.map(Self::Churn))
    }

    fn words(self) -> [OsString; 2] {
        match self {
            Self::Race(seconds) => ["--race".into(), seconds.to_string().into()],
            Self::Churn(rounds) => ["--churn".into(), rounds.to_string().into()],
        }
    }

    /// The same for so long that a client can be killed in the middle, however the machine's speed changes.
    fn at_length(self) -> Self {
        match self {
            Self::Race(seconds) => Self::Race(20 * seconds),
            Self::Churn(rounds) => Self::Churn(20 * rounds),
        }
    }

    /// A time that is long enough on a slow machine.
    fn limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Race(seconds) => 120 + 2 * seconds,
            Self::Churn(rounds) => 120 + 5 * rounds,
        })
    }
}

/// Boots the kernel that gmem runs on.
pub(super) fn run(args: &Args, stress: Stress, client: &Path, gmem: &Gmem) -> Result<ExitCode> {
    let folder = tempfile::tempdir()?;
    let mut arguments: Vec<OsString> = vec!["conform".into(), "--cases".into(), folder.path().into()];
    arguments.extend(stress.words());
    arguments.extend(["--seeds".into(), format!("{}..{}", args.seeds.start, args.seeds.end).into()]);
    arguments.extend(["--client".into(), client.into(), "--under".into(), args.under.name().into()]);
    arguments.extend(["--surface".into(), args.surface.name().into()]);
    arguments.extend(gmem.arguments());
    // In turns, races are rare.
    let mut machine = args.machine.in_mode(Mode::Parallel);
    machine.hugepages = machine.hugepages.max(HUGEPAGES);
    let timeout = Duration::from_secs(120) + 2 * stress.limit();
    Ok(ExitCode::from(under::myself(args.kernel, &machine, timeout, folder.path(), arguments)?))
}

/// On this machine's own KVM, whose vCPUs really run at the same time. What is left behind is not looked at: the machine has
/// other users.
pub(super) fn this_machine(args: &Args, stress: Stress, client: &Path, gmem: &Gmem) -> Result<ExitCode> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        bail!(Missing("/dev/kvm, to be read and written".to_owned()));
    }
    let folder = tempfile::tempdir()?;
    let gmem = Gmem { emulate: true, ..gmem.clone() };
    to_its_end(&words(args, stress, client, &gmem), stress, folder.path())?;
    Ok(ExitCode::SUCCESS)
}

/// In a guest: one client that ends by itself, and one that is killed in the middle.
pub(super) fn here(args: &Args, stress: Stress, folder: &Path, client: &Path) -> Result<ExitCode> {
    let before = Held::now()?;
    let took = to_its_end(&words(args, stress, client, &args.gmem), stress, folder)?;
    before.regained().context("after the client's own end")?;
    killed(&words(args, stress.at_length(), client, &args.gmem), took / 2)?;
    before.regained().context("after SIGKILL")?;
    println!("nothing left behind: neither after the end of the client nor after SIGKILL");
    Ok(ExitCode::SUCCESS)
}

fn words(args: &Args, stress: Stress, client: &Path, gmem: &Gmem) -> Vec<OsString> {
    let mut words = gmem.prefix(args.under);
    words.push(client.into());
    words.extend(stress.words());
    words.extend(["--seed".into(), args.seeds.start.to_string().into()]);
    words.extend(["--surface".into(), args.surface.name().into()]);
    words
}

/// Runs a client, prints what it said, and returns how long it took.
fn to_its_end(words: &[OsString], stress: Stress, folder: &Path) -> Result<Duration> {
    let log = folder.join("log");
    let file = File::create(&log)?;
    let ran = under::client(words, stress.limit(), file.try_clone()?, file)?;
    println!("{}", fs::read_to_string(&log)?.trim_end());
    if ran.status != 0 {
        bail!("{words:?} ended with {}", ran.status);
    }
    Ok(ran.took)
}

/// Starts a client and kills it after a while.
fn killed(words: &[OsString], after: Duration) -> Result<()> {
    let (program, arguments) = words.split_first().context("no client")?;
    let begin = Instant::now();
    let mut child = Command::new(program).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
    while begin.elapsed() < after {
        if let Some(status) = child.try_wait()? {
            bail!("the client ended too early to be killed: {status}");
        }
        thread::sleep(Duration::from_millis(10));
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}
