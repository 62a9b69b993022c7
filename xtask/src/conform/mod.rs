//! The same sequences of operations natively and under gmem: their transcripts must be equal.
//!
//! Each side boots once for a whole range of seeds. A mismatch is shrunk: first to the shortest prefix of its operations that
//! still differs, then by leaving operations out.

mod left;
mod stress;

use std::ffi::OsString;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::sys::{self, Missing};
use crate::under::{self, Gmem, Under};
use crate::vm::Machine;
use stress::Stress;

/// Compare long random sequences of operations, natively on one kernel and under gmem on another.
///
/// Runs gmem-conformance with each seed on both sides and compares what it prints. The first mismatch is shrunk and printed.
/// Exits with 1 if there was one.
///
/// With --race or --churn: runs that mode of the client under gmem instead, and checks that no process, file, memfd, VM or huge
/// page is left when it has ended, and when it was killed in the middle.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask conform --seeds 0..200\n  \
    cargo xtask conform --seeds 17..18 --ops 100\n  \
    cargo xtask conform --seeds 0..50 --surface file\n  \
    cargo xtask conform --race 120\n  \
    cargo xtask conform --race 120 --here")]
pub(crate) struct Args {
    /// Seeds, from the first to the one before the last
    #[arg(long, value_name = "A..B", value_parser = seeds, default_value = "0..10")]
    seeds: Range<u64>,
    /// Operations in each sequence
    #[arg(long, value_name = "N", default_value_t = 500)]
    ops: u32,
    /// The operations to choose from: all, or those on files and memslots of default VMs
    #[arg(long, value_enum, default_value = "all")]
    surface: Surface,
    /// The kernel that is right; ref without, and 7.3 for `--surface file`
    #[arg(long, value_enum)]
    reference: Option<Kernel>,
    /// The kernel that gmem runs on
    #[arg(long, value_enum, default_value = "stock")]
    kernel: Kernel,
    #[command(flatten)]
    gmem: Gmem,
    /// A conformance client; this checkout's gmem-conformance, in release form, without
    #[arg(long, value_name = "FILE")]
    client: Option<PathBuf>,
    /// The time that each sequence may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    limit: u64,
    /// Let vCPUs race with conversions, punches, slots and closes under gmem instead
    #[arg(long, value_name = "SECONDS", conflicts_with = "churn")]
    race: Option<u64>,
    /// Create, use and destroy VMs and files so many times under gmem instead
    #[arg(long, value_name = "ROUNDS")]
    churn: Option<u64>,
    /// With --race: on this machine's own /dev/kvm, under `gmem run --emulate`; what is left is not looked at
    #[arg(long, requires = "race", conflicts_with = "churn")]
    here: bool,
    /// Do not shrink a mismatch
    #[arg(long)]
    no_shrink: bool,
    #[command(flatten)]
    machine: Machine,
    /// In a guest: run the cases of this folder in one way, on the kernel that this runs on
    #[arg(long, hide = true, requires = "client")]
    cases: Option<PathBuf>,
    #[arg(long, hide = true, default_value = "gmem")]
    under: Under,
}

/// What the operations are about, as gmem-conformance names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Surface {
    All,
    File,
}

impl Surface {
    fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::File => "file",
        }
    }

    fn reference(self) -> Kernel {
        match self {
            Self::All => Kernel::Ref,
            Self::File => Kernel::V7_3,
        }
    }

    /// Options of `gmem run` where none are given: Debian's 7.3 has the default VM type only.
    fn options(self, gmem: &Gmem) -> Gmem {
        let [profile, types] = match self {
            Self::All => [None, None],
            Self::File => [Some("linux-7.3".to_owned()), Some("default".to_owned())],
        };
        Gmem { profile: gmem.profile.clone().or(profile), types: gmem.types.clone().or(types), ..gmem.clone() }
    }
}

fn seeds(text: &str) -> Result<Range<u64>> {
    let (first, end) = text.split_once("..").ok_or_else(|| anyhow!("a range is written A..B"))?;
    let range = first.parse()?..end.parse()?;
    if range.is_empty() {
        bail!("{text} has no seed in it");
    }
    Ok(range)
}

/// One sequence of operations.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Case {
    seed: u64,
    ops: u32,
    /// Operations that are generated and not carried out.
    skip: Vec<u32>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let (Some(folder), Some(client)) = (&args.cases, &args.client) {
        return match Stress::of(args) {
            Some(stress) => stress::here(args, stress, folder, client),
            None => here(args, folder, client),
        };
    }
    let (client, gmem) = (client(args.client.as_deref())?, args.surface.options(&args.gmem).ready()?);
    if let Some(stress) = Stress::of(args) {
        let run = if args.here { stress::this_machine } else { stress::run };
        return run(args, stress, &client, &gmem);
    }
    // A sequence has one thread: one processor is enough, and the emulation of one has fewer surprises.
    let both = Both { args, client, gmem, machine: args.machine.with_cpus(1) };
    let cases: Vec<Case> = args.seeds.clone().map(|seed| Case { seed, ops: args.ops, skip: Vec::new() }).collect();
    let pairs = both.transcripts(&cases)?;
    let wrong: Vec<usize> = (0..cases.len()).filter(|&number| !pairs[number].same()).collect();
    println!("{} of {} transcripts are equal", cases.len() - wrong.len(), cases.len());
    let Some(&first) = wrong.first() else { return Ok(ExitCode::SUCCESS) };
    let list: Vec<String> = wrong.iter().map(|&number| cases[number].seed.to_string()).collect();
    println!("different: seed {}", list.join(", "));
    let (case, pair) =
        if args.no_shrink { (cases[first].clone(), pairs[first].clone()) } else { both.shrink(&cases[first])? };
    print!("{}", pair.difference(&case, args.surface));
    Ok(ExitCode::FAILURE)
}

/// The client that runs on both sides: one that was named, or this checkout's.
fn client(named: Option<&Path>) -> Result<PathBuf> {
    let client = match named {
        Some(path) => fs::canonicalize(path).with_context(|| format!("the program {}", path.display()))?,
        None => sys::build_release(&["gmem-conformance"])?.join("gmem-conformance"),
    };
    // A program without options prints nothing and succeeds: look at what the help says, not at its status.
    if !sys::output(Command::new(&client).arg("--help")).unwrap_or_default().contains("--seed") {
        bail!(Missing(format!("`--seed` in {}", client.display())));
    }
    Ok(client)
}

/// What the two sides printed for one case.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    native: String,
    gmem: String,
}

impl Pair {
    fn same(&self) -> bool {
        self.native == self.gmem
    }

    /// The first lines that differ, with those before them.
    fn difference(&self, case: &Case, surface: Surface) -> String {
        let (native, gmem): (Vec<&str>, Vec<&str>) = (self.native.lines().collect(), self.gmem.lines().collect());
        let at = native.iter().zip(&gmem).take_while(|(a, b)| a == b).count();
        let mut text = format!("\n{}\n", case.command(Path::new("gmem-conformance"), surface).join(" "));
        for line in &native[at.saturating_sub(8)..at] {
            text.push_str(&format!("           {line}\n"));
        }
        for (side, lines) in [("native", &native), ("gmem", &gmem)] {
            for line in lines.iter().skip(at).take(4) {
                text.push_str(&format!("  {side:6} > {line}\n"));
            }
        }
        text
    }
}

impl Case {
    fn command(&self, client: &Path, surface: Surface) -> Vec<String> {
        let mut words = vec![client.display().to_string()];
        words.extend(["--seed".to_owned(), self.seed.to_string(), "--ops".to_owned(), self.ops.to_string()]);
        if !self.skip.is_empty() {
            let list: Vec<String> = self.skip.iter().map(u32::to_string).collect();
            words.extend(["--skip".to_owned(), list.join(",")]);
        }
        words.extend(["--surface".to_owned(), surface.name().to_owned()]);
        words
    }
}

/// Both sides of the comparison.
#[derive(Debug)]
struct Both<'a> {
    args: &'a Args,
    client: PathBuf,
    gmem: Gmem,
    machine: Machine,
}

impl Both<'_> {
    /// Runs all cases on both sides, which boot at the same time.
    fn transcripts(&self, cases: &[Case]) -> Result<Vec<Pair>> {
        let (native, gmem) = thread::scope(|scope| {
            let native = scope.spawn(|| {
                self.side(Under::Native, self.args.reference.unwrap_or(self.args.surface.reference()), cases)
            });
            let gmem = self.side(Under::Gmem, self.args.kernel, cases);
            (native.join(), gmem)
        });
        let native = native.map_err(|_| anyhow!("the native side panicked"))??;
        Ok(native.into_iter().zip(gmem?).map(|(native, gmem)| Pair { native, gmem }).collect())
    }

    fn side(&self, under: Under, kernel: Kernel, cases: &[Case]) -> Result<Vec<String>> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("cases"), serde_json::to_string(cases)?)?;
        let mut arguments: Vec<OsString> = vec!["conform".into(), "--cases".into(), folder.path().into()];
        arguments.extend(["--client".into(), (&self.client).into(), "--under".into(), under.name().into()]);
        arguments.extend(["--limit".into(), self.args.limit.to_string().into()]);
        arguments.extend(["--surface".into(), self.args.surface.name().into()]);
        arguments.extend(self.gmem.arguments());
        let timeout = Duration::from_secs(60) + Duration::from_secs(self.args.limit) * u32::try_from(cases.len())?;
        let status = under::myself(kernel, &self.machine, timeout, folder.path(), arguments)?;
        let read = |number| fs::read(folder.path().join(format!("{number}")));
        let transcripts: std::io::Result<Vec<Vec<u8>>> = (0..cases.len()).map(read).collect();
        let transcripts =
            transcripts.with_context(|| format!("the {} side ended with {status} too early", under.name()))?;
        Ok(transcripts.into_iter().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect())
    }

    fn shrink(&self, case: &Case) -> Result<(Case, Pair)> {
        let case = shrink(case, &mut |cases| {
            println!("shrinking: {} smaller sequences", cases.len());
            Ok(self.transcripts(cases)?.iter().map(|pair| !pair.same()).collect())
        })?;
        let pair = self.transcripts(std::slice::from_ref(&case))?.pop().context("no transcript")?;
        Ok((case, pair))
    }
}

impl Case {
    fn kept(&self) -> Vec<u32> {
        (0..self.ops).filter(|op| !self.skip.contains(op)).collect()
    }

    fn without(&self, ops: &[u32]) -> Self {
        let mut case = self.clone();
        case.skip.extend(ops);
        case.skip.sort_unstable();
        case
    }
}

/// How many sequences one boot tries.
const BATCH: u32 = 32;

/// Makes a case smaller that differs, as long as it still does. `differ` tries many cases at once, for a boot costs more than a
/// sequence.
fn shrink(case: &Case, differ: &mut dyn FnMut(&[Case]) -> Result<Vec<bool>>) -> Result<Case> {
    let mut case = shortest_prefix(case, differ)?;
    let mut chunk = case.kept().len().div_ceil(4);
    while chunk > 0 {
        case = leave_out(&case, chunk, differ)?;
        chunk = if chunk > 1 { chunk.div_ceil(4) } else { 0 };
    }
    Ok(case)
}

/// The shortest prefix that differs. A difference stays in all longer prefixes, so the search narrows an interval.
fn shortest_prefix(case: &Case, differ: &mut dyn FnMut(&[Case]) -> Result<Vec<bool>>) -> Result<Case> {
    let (mut same, mut different) = (0, case.ops);
    while different - same > 1 {
        let step = (different - same).div_ceil(BATCH);
        let lengths: Vec<u32> = (same + step..different).step_by(step as usize).collect();
        let cases: Vec<Case> = lengths.iter().map(|&ops| Case { ops, ..case.clone() }).collect();
        match differ(&cases)?.iter().position(|differs| *differs) {
            Some(first) => (same, different) = (lengths[first] - step, lengths[first]),
            None => same = lengths.last().copied().unwrap_or(different - 1),
        }
    }
    Ok(Case { ops: different, ..case.clone() })
}

/// Leaves out chunks of the operations: first each alone, then as many together as still differ.
fn leave_out(case: &Case, chunk: usize, differ: &mut dyn FnMut(&[Case]) -> Result<Vec<bool>>) -> Result<Case> {
    let kept = case.kept();
    let chunks: Vec<&[u32]> = kept.chunks(chunk).rev().take(BATCH as usize).collect();
    let alone: Vec<Case> = chunks.iter().map(|ops| case.without(ops)).collect();
    let differs = differ(&alone)?;
    let useless: Vec<&[u32]> =
        chunks.into_iter().zip(differs).filter(|(_, differs)| *differs).map(|(ops, _)| ops).collect();
    if useless.is_empty() {
        return Ok(case.clone());
    }
    let together: Vec<Case> = (1..=useless.len()).map(|count| case.without(&useless[..count].concat())).collect();
    let differs = differ(&together)?;
    Ok(together
        .into_iter()
        .zip(differs)
        .rev()
        .find(|(_, differs)| *differs)
        .map_or_else(|| case.clone(), |(smaller, _)| smaller))
}

/// A message says how far it is after so many sequences.
const PROGRESS: usize = 25;

/// In a guest: runs all cases of a folder, and leaves a transcript for each beside them.
fn here(args: &Args, folder: &Path, client: &Path) -> Result<ExitCode> {
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(folder.join("cases"))?)?;
    let work = tempfile::tempdir()?;
    let (output, errors) = (work.path().join("output"), work.path().join("errors"));
    for (number, case) in cases.iter().enumerate() {
        if number > 0 && number.is_multiple_of(PROGRESS) {
            eprintln!("xtask: {}: {number} of {}", args.under.name(), cases.len());
        }
        let mut words = args.gmem.prefix(args.under);
        words.extend(case.command(client, args.surface).into_iter().map(OsString::from));
        let ran =
            under::client(&words, Duration::from_secs(args.limit), File::create(&output)?, File::create(&errors)?)?;
        let mut transcript = fs::read(&output)?;
        transcript.extend(format!("exit status {}\n", ran.status).bytes());
        if ran.status != 0 {
            let errors = fs::read(&errors)?;
            println!(
                "{}, seed {}, status {}: {}",
                args.under.name(),
                case.seed,
                ran.status,
                String::from_utf8_lossy(&errors).trim()
            );
        }
        fs::write(folder.join(number.to_string()), transcript)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A difference that shows at operation `last`, if all `needed` were carried out before.
    fn found(needed: &[u32], last: u32, ops: u32) -> (Case, usize) {
        let mut boots = 0;
        let start = Case { seed: 1, ops, skip: Vec::new() };
        let case = shrink(&start, &mut |cases| {
            boots += 1;
            let done = |case: &Case, op: &u32| *op < case.ops && !case.skip.contains(op);
            Ok(cases.iter().map(|case| done(case, &last) && needed.iter().all(|op| done(case, op))).collect())
        });
        (case.unwrap(), boots)
    }

    #[test]
    fn what_remains_is_what_the_difference_needs() {
        for (needed, last, ops) in [(vec![], 0, 1), (vec![], 499, 500), (vec![3, 77], 140, 500), (vec![0, 1, 2], 3, 4)]
        {
            let (case, boots) = found(&needed, last, ops);
            let mut wanted = needed.clone();
            wanted.push(last);
            assert_eq!(case.ops, last + 1);
            assert_eq!(case.kept(), wanted);
            assert!(boots <= 12, "{boots} boots for {needed:?}");
        }
    }

    #[test]
    fn the_first_lines_that_differ_are_shown() {
        let pair = Pair { native: "a\nb\nc\n".into(), gmem: "a\nx\nc\n".into() };
        assert!(!pair.same());
        let case = Case { seed: 7, ops: 3, skip: vec![1, 2] };
        let text = pair.difference(&case, Surface::File);
        let wanted =
            "\ngmem-conformance --seed 7 --ops 3 --skip 1,2 --surface file\n           a\n  native > b\n  native > c\n";
        assert_eq!(text, format!("{wanted}  gmem   > x\n  gmem   > c\n"));
    }

    #[test]
    fn a_range_of_seeds_has_two_ends() {
        assert_eq!(seeds("3..5").unwrap(), 3..5);
        assert!(seeds("5..5").is_err() && seeds("5").is_err() && seeds("a..b").is_err());
    }
}
