//! Runs the selftests, all in one boot.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::source::Release;
use crate::under::{self, Gmem, Under};
use crate::vm::Machine;

/// Run the selftests natively, under gmem, or both, in one boot of a kernel.
///
/// Exits with 1 if a test failed or took too long.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask selftests run --under native,gmem --hugepages 512 --json target/selftests.json\n  \
    cargo xtask selftests run --kernel ref --under native --filter private_mem\n  \
    cargo xtask selftests run --release 7.3 --under gmem --profile linux-7.3 --filter guest_memfd_test,private_mem\n  \
    cargo xtask selftests run --here --under gmem --filter guest_memfd_test")]
pub(crate) struct Args {
    /// How the tests get private memory
    #[arg(long, value_enum, value_delimiter = ',', default_value = "native")]
    under: Vec<Under>,
    /// The kernel
    #[arg(long, value_enum, default_value = "stock")]
    kernel: Kernel,
    /// Use this machine's own kernel and /dev/kvm instead
    #[arg(long)]
    here: bool,
    #[command(flatten)]
    gmem: Gmem,
    /// Only tests whose command line contains one of these texts
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    filter: Vec<String>,
    /// Fail unless so many results are PASS
    #[arg(long, value_name = "N")]
    passes: Option<usize>,
    /// The time that each test may take
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    limit: u64,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The release whose tests are run; the kernel's without
    #[arg(long, value_enum)]
    release: Option<Release>,
    /// A folder of built tests instead
    #[arg(long, value_name = "FOLDER", conflicts_with = "release")]
    tests: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
}

/// What a test came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Verdict {
    Pass,
    Skip,
    Fail,
    Timeout,
}

/// One run of one test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Outcome {
    pub(super) test: String,
    pub(super) kernel: String,
    pub(super) under: Under,
    pub(super) verdict: Verdict,
    pub(super) status: i32,
    pub(super) seconds: f64,
    pub(super) last_line: String,
}

impl Verdict {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Pass => "PASS",
            Self::Skip => "SKIP",
            Self::Fail => "FAIL",
            Self::Timeout => "TIMEOUT",
        }
    }

    /// The selftests' own convention: 0 passes, 4 skips.
    fn of(status: i32) -> Self {
        match status {
            0 => Self::Pass,
            4 => Self::Skip,
            under::TIMED_OUT => Self::Timeout,
            _ => Self::Fail,
        }
    }
}

/// Tests with arguments, beside each test without: guest private memory with more vCPUs and slots, and with every source of
/// shared memory.
const WITH_ARGUMENTS: [&str; 6] = [
    "private_mem_conversions_test -n 4 -m 4",
    "private_mem_conversions_test -s anonymous_thp",
    "private_mem_conversions_test -s anonymous_hugetlb_2mb",
    "private_mem_conversions_test -s shmem",
    "private_mem_conversions_test -s shared_hugetlb",
    "private_mem_conversions_test -s anonymous",
];

pub(super) fn run(args: &Args) -> Result<ExitCode> {
    let outcomes = if args.here { here(args)? } else { guest(args)? };
    if let Some(file) = &args.json {
        save(file, &outcomes)?;
    }
    if args.here && args.json.is_some() {
        return Ok(ExitCode::SUCCESS);
    }
    judge(args, &outcomes)
}

fn save(file: &Path, outcomes: &[Outcome]) -> Result<()> {
    let text = serde_json::to_string_pretty(outcomes)?;
    fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))
}

fn judge(args: &Args, outcomes: &[Outcome]) -> Result<ExitCode> {
    let count = |verdict| outcomes.iter().filter(|outcome| outcome.verdict == verdict).count();
    let (pass, skip) = (count(Verdict::Pass), count(Verdict::Skip));
    let bad = outcomes.len() - pass - skip;
    println!("{} runs: {pass} passed, {skip} skipped, {bad} failed or took too long", outcomes.len());
    if outcomes.is_empty() {
        bail!("no test matches {:?}", args.filter);
    }
    let enough = args.passes.is_none_or(|wanted| pass == wanted);
    Ok(ExitCode::from(u8::from(bad > 0 || !enough)))
}

/// Boots a guest that runs the tests, and reads its results.
fn guest(args: &Args) -> Result<Vec<Outcome>> {
    let tests = match &args.tests {
        Some(folder) => fs::canonicalize(folder).with_context(|| format!("the folder {}", folder.display()))?,
        None => super::build(args.release.unwrap_or(args.kernel.release()))?,
    };
    let gmem = if args.under.contains(&Under::Gmem) { args.gmem.ready()? } else { args.gmem.clone() };
    let folder = tempfile::tempdir()?;
    let json = folder.path().join("results");
    let mut arguments: Vec<OsString> = vec!["selftests".into(), "run".into(), "--here".into()];
    arguments.extend(["--kernel".into(), args.kernel.name().into(), "--tests".into(), (&tests).into()]);
    arguments.extend(["--json".into(), (&json).into(), "--limit".into(), args.limit.to_string().into()]);
    for under in &args.under {
        arguments.extend(["--under".into(), under.name().into()]);
    }
    for text in &args.filter {
        arguments.extend(["--filter".into(), text.into()]);
    }
    arguments.extend(gmem.arguments());
    let runs = cases(&tests, &args.filter)?.len() * args.under.len();
    let timeout = Duration::from_secs(60) + Duration::from_secs(args.limit) * u32::try_from(runs)?;
    let status = under::myself(args.kernel, &args.machine, timeout, folder.path(), arguments)?;
    let text =
        fs::read_to_string(&json).with_context(|| format!("the guest ended with {status} and left no results"))?;
    let outcomes: Vec<Outcome> = serde_json::from_str(&text)?;
    if outcomes.len() < runs {
        if let Some(file) = &args.json {
            save(file, &outcomes)?;
        }
        bail!("the guest ended with {status} after {} of {runs} runs", outcomes.len());
    }
    Ok(outcomes)
}

/// Runs the tests on the kernel that this runs on.
fn here(args: &Args) -> Result<Vec<Outcome>> {
    let tests = match &args.tests {
        Some(folder) => folder.clone(),
        None => super::build(args.release.unwrap_or(args.kernel.release()))?,
    };
    let inside = args.tests.is_some();
    let gmem = if args.under.contains(&Under::Gmem) && !inside { args.gmem.ready()? } else { args.gmem.clone() };
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("log");
    let mut outcomes = Vec::new();
    for case in cases(&tests, &args.filter)? {
        for under in &args.under {
            let words = words(&gmem, *under, &tests, &case);
            let file = File::create(&log)?;
            let ran = under::client(&words, Duration::from_secs(args.limit), file.try_clone()?, file)?;
            let output = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
            let outcome = Outcome {
                test: case.clone(),
                kernel: if inside { args.kernel.name().to_owned() } else { "here".to_owned() },
                under: *under,
                verdict: Verdict::of(ran.status),
                status: ran.status,
                seconds: ran.took.as_secs_f64(),
                last_line: output.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("").to_owned(),
            };
            report(&outcome, &output);
            outcomes.push(outcome);
            // After each: a guest that dies leaves what it had.
            if let Some(file) = &args.json {
                save(file, &outcomes)?;
            }
        }
    }
    Ok(outcomes)
}

/// The command lines to run: each program without arguments, and those that need some.
fn cases(tests: &Path, filter: &[String]) -> Result<Vec<String>> {
    let mut cases = Vec::new();
    for program in super::programs(tests)? {
        let name = program.rsplit('/').next().unwrap_or(&program);
        let more: Vec<String> = WITH_ARGUMENTS
            .iter()
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
            .map(|arguments| format!("{program} {arguments}"))
            .collect();
        cases.push(program.clone());
        cases.extend(more);
    }
    cases.retain(|case| filter.is_empty() || filter.iter().any(|text| case.contains(text.as_str())));
    Ok(cases)
}

fn words(gmem: &Gmem, under: Under, tests: &Path, case: &str) -> Vec<OsString> {
    let mut words = gmem.prefix(under);
    let mut parts = case.split(' ');
    words.push(tests.join(parts.next().unwrap_or(case)).into());
    words.extend(parts.map(OsString::from));
    words
}

/// A line for each run, and the end of the output of one that failed.
fn report(outcome: &Outcome, output: &str) {
    let Outcome { test, under, verdict, seconds, last_line, .. } = outcome;
    println!("{:7} {:6} {seconds:6.1} s  {test}", verdict.name(), under.name());
    match verdict {
        Verdict::Pass => {}
        Verdict::Skip => println!("        {last_line}"),
        Verdict::Fail | Verdict::Timeout => {
            let lines: Vec<&str> = output.lines().collect();
            for line in &lines[lines.len().saturating_sub(12)..] {
                // Some tests show their progress on one line of many thousand characters.
                println!("        {}", line.chars().take(160).collect::<String>());
            }
        }
    }
}
