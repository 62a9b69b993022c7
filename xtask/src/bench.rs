//! Ratios: the same program natively and under gmem.
//!
//! What private memory costs is measured in an emulated machine that counts instructions instead of time (`Mode::Counted`), so
//! that the numbers do not depend on the machine below it: natively and under gmem on `ref`, in one boot, which is the
//! cost of gmem; and under gmem on `stock`, where the same system calls take more instructions than on the small reference
//! kernel. What gmem adds to a call that it only passes on is measured in time, on this machine's own KVM (`--here`).

use std::ffi::OsString;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::selftests;
use crate::source::Release;
use crate::sys;
use crate::under::{self, Gmem, Under};
use crate::vm::{Machine, Mode};

/// Measure what gmem costs: the same programs natively and under gmem.
///
/// Without --here: in emulated machines that count instructions, where it does not matter what else this machine does. Writes
/// docs/benchmarks.md, or docs/benchmarks-here.md. Exits with 1 if a ratio is above its bound.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench\n  \
    cargo xtask bench --only conversions --out /dev/stdout\n  \
    cargo xtask bench --here --runs 9")]
pub(crate) struct Args {
    /// Only comparisons whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Runs of each program in each way, which take turns; the median counts
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    runs: u8,
    /// Where the table goes; docs/benchmarks.md, or docs/benchmarks-here.md, without
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    gmem: Gmem,
    #[command(flatten)]
    machine: Machine,
    /// On this machine's own /dev/kvm: what gmem only passes on
    #[arg(long)]
    here: bool,
    /// A conformance client; this checkout's gmem-conformance, in release form, without
    #[arg(long, value_name = "FILE")]
    client: Option<PathBuf>,
    /// In a guest: measure in these ways, on the kernel that this runs on, and leave the times in this folder
    #[arg(long, hide = true, requires = "client")]
    times: Option<PathBuf>,
    #[arg(long, hide = true, value_delimiter = ',')]
    under: Vec<Under>,
    #[arg(long, hide = true)]
    tests: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
enum Program {
    /// The whole of a program of the 6.12 selftests, with its arguments.
    Selftest(&'static [&'static str]),
    /// One operation, by gmem-conformance's `--bench`.
    Operation(&'static str),
}

/// What gmem keeps to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    /// gmem's time over the native one on the same kernel, at most.
    Ratio(f64),
    /// gmem's time in seconds, at most; natively it is not measured.
    Time(f64),
    /// Bounded in seconds or so narrowly that an emulated machine cannot tell: `--here` is the measurement that counts.
    Here { ratio: f64, more: f64 },
}

/// A program or an operation whose time is compared.
#[derive(Clone, Copy, Debug)]
struct Comparison {
    name: &'static str,
    program: Program,
    bound: Bound,
}

/// What makes the two kernels alike where their configurations differ: Debian's zeroes pages when they are allocated, too, which
/// is a part of the cost of every first touch.
const ALIKE: &str = "init_on_alloc=1";

const COMPARISONS: [Comparison; 8] = [
    Comparison {
        name: "mark 16 GiB private, no slot",
        program: Program::Operation("mark16g"),
        bound: Bound::Ratio(0.001),
    },
    Comparison {
        name: "mark 1 TiB private, no slot, in under 1 MiB",
        program: Program::Operation("mark1t"),
        bound: Bound::Time(0.001),
    },
    Comparison {
        name: "convert 4 KiB of a bound slot, and the vCPU's next store to it",
        program: Program::Operation("convert"),
        bound: Bound::Ratio(2.0),
    },
    Comparison {
        name: "KVM_GET_API_VERSION, passed on",
        program: Program::Operation("version"),
        bound: Bound::Here { ratio: f64::INFINITY, more: 0.3e-6 },
    },
    Comparison {
        name: "KVM_GET_REGS, passed on",
        program: Program::Operation("registers"),
        bound: Bound::Here { ratio: f64::INFINITY, more: 0.3e-6 },
    },
    Comparison {
        name: "KVM_RUN to a port output",
        program: Program::Operation("exit"),
        bound: Bound::Here { ratio: 1.03, more: f64::INFINITY },
    },
    Comparison {
        name: "private_mem_conversions_test",
        program: Program::Selftest(&["x86_64/private_mem_conversions_test"]),
        bound: Bound::Ratio(1.2),
    },
    Comparison {
        name: "private_mem_conversions_test -n 4 -m 4",
        program: Program::Selftest(&["x86_64/private_mem_conversions_test", "-n", "4", "-m", "4"]),
        bound: Bound::Ratio(1.2),
    },
];

impl Comparison {
    /// Whether it is measured in this way: natively a bounded time would take minutes and gigabytes.
    fn runs(&self, under: Under) -> bool {
        under == Under::Gmem || !matches!(self.bound, Bound::Time(_))
    }

    fn words(&self, programs: &Programs) -> Vec<OsString> {
        match self.program {
            Program::Operation(name) => vec![programs.client.clone().into(), "--bench".into(), name.into()],
            Program::Selftest(words) => {
                let (program, arguments) = words.split_first().unwrap_or((&"", &[]));
                let program = programs.tests.as_deref().unwrap_or(Path::new("")).join(program).into();
                std::iter::once(program).chain(arguments.iter().map(OsString::from)).collect()
            }
        }
    }
}

/// The time that a run may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Where the programs are.
#[derive(Clone, Debug)]
struct Programs {
    client: PathBuf,
    /// None: without those of the kernel.
    tests: Option<PathBuf>,
}

/// What one comparison took on one kernel, run by run, in seconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Times {
    name: String,
    native: Vec<f64>,
    gmem: Vec<f64>,
}

impl Times {
    fn of(&mut self, under: Under) -> &mut Vec<f64> {
        match under {
            Under::Native => &mut self.native,
            Under::Gmem => &mut self.gmem,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<Comparison> =
        COMPARISONS.into_iter().filter(|comparison| comparison.name.contains(&args.only)).collect();
    if let (Some(folder), Some(client)) = (&args.times, &args.client) {
        let programs = Programs { client: client.clone(), tests: args.tests.clone() };
        let times = times(&args.gmem, &chosen, &args.under, &programs, args.runs)?;
        fs::write(folder.join("times"), serde_json::to_string(&times)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if chosen.is_empty() {
        bail!("no comparison is called {:?}", args.only);
    }
    let client = match &args.client {
        Some(client) => fs::canonicalize(client).with_context(|| format!("the program {}", client.display()))?,
        None => sys::build_release(&["gmem-conformance"])?.join("gmem-conformance"),
    };
    let gmem = args.gmem.ready()?;
    let rows =
        if args.here { this_machine(args, &gmem, &chosen, client)? } else { guests(args, &gmem, &chosen, client)? };
    let table = report(&rows, args)?;
    let file = if args.here { "docs/benchmarks-here.md" } else { "docs/benchmarks.md" };
    let out = args.out.clone().unwrap_or_else(|| sys::repository().join(file));
    fs::create_dir_all(out.parent().unwrap_or(Path::new(".")))?;
    fs::write(&out, table).with_context(|| format!("writing {}", out.display()))?;
    eprintln!("xtask: wrote {}", out.display());
    Ok(ExitCode::from(u8::from(rows.iter().any(|row| row.verdict(args.here) == Some(false)))))
}

/// In two guests at the same time: they do not notice each other.
fn guests(args: &Args, gmem: &Gmem, chosen: &[Comparison], client: PathBuf) -> Result<Vec<Row>> {
    let programs = &Programs { client, tests: Some(selftests::build(Release::V6_12)?) };
    let always = &Gmem { emulate: true, ..gmem.clone() };
    let boot = |kernel, gmem, under| move || guest(args, gmem, programs, under, kernel, chosen.len());
    let (same, stock) = thread::scope(|scope| {
        let same = scope.spawn(boot(Kernel::Ref, always, "native,gmem"));
        let stock = boot(Kernel::Stock, gmem, "gmem")();
        (same.join(), stock)
    });
    let Ok(same) = same else { bail!("measuring on ref failed") };
    rows(chosen, &same?, &stock?)
}

/// On the KVM of this machine, what needs no private memory.
fn this_machine(args: &Args, gmem: &Gmem, chosen: &[Comparison], client: PathBuf) -> Result<Vec<Row>> {
    let chosen: Vec<Comparison> =
        chosen.iter().copied().filter(|comparison| matches!(comparison.bound, Bound::Here { .. })).collect();
    let programs = Programs { client, tests: None };
    rows(&chosen, &times(gmem, &chosen, &[Under::Native, Under::Gmem], &programs, args.runs)?, &[])
}

fn guest(
    args: &Args,
    gmem: &Gmem,
    programs: &Programs,
    under: &str,
    kernel: Kernel,
    count: usize,
) -> Result<Vec<Times>> {
    let folder = tempfile::tempdir()?;
    let mut arguments: Vec<OsString> = vec!["bench".into(), "--times".into(), folder.path().into()];
    arguments.extend(["--client".into(), (&programs.client).into(), "--under".into(), under.into()]);
    arguments.extend(["--runs".into(), args.runs.to_string().into()]);
    if let Some(tests) = &programs.tests {
        arguments.extend(["--tests".into(), tests.into()]);
    }
    arguments.extend(["--only".into(), (&args.only).into()]);
    arguments.extend(gmem.arguments());
    let runs = u32::try_from(2 * count * usize::from(args.runs))?;
    let mut machine = args.machine.in_mode(Mode::Counted).with_cpus(1);
    machine.append.insert(0, ALIKE.to_owned());
    let status = under::myself(kernel, &machine, LIMIT * (runs + 1), folder.path(), arguments)?;
    if status != 0 {
        bail!("measuring on {} failed with {status}", kernel.name());
    }
    Ok(serde_json::from_str(&fs::read_to_string(folder.path().join("times"))?)?)
}

/// On the kernel that this runs on. The ways take turns, so that what changes meanwhile changes for all.
fn times(gmem: &Gmem, chosen: &[Comparison], ways: &[Under], programs: &Programs, runs: u8) -> Result<Vec<Times>> {
    let work = tempfile::tempdir()?;
    let (gmem, programs) = nearby(gmem, programs, work.path())?;
    let mut all = Vec::new();
    for comparison in chosen {
        let mut times = Times { name: comparison.name.to_owned(), ..Times::default() };
        for _ in 0..runs {
            for &under in ways.iter().filter(|&&under| comparison.runs(under)) {
                let mut words = gmem.prefix(under);
                words.extend(comparison.words(&programs));
                times.of(under).push(time(comparison.program, &words, &work.path().join("log"))?);
            }
        }
        all.push(times);
    }
    Ok(all)
}

/// Copies of the programs in a folder of the guest's own memory: this machine's files take their time.
fn nearby(gmem: &Gmem, programs: &Programs, folder: &Path) -> Result<(Gmem, Programs)> {
    let copy = |from: &Path, name: &str| -> Result<PathBuf> {
        let to = folder.join(name);
        fs::create_dir_all(to.parent().unwrap_or(folder))?;
        fs::copy(from, &to).with_context(|| format!("copying {}", from.display()))?;
        Ok(to)
    };
    let client = copy(&programs.client, "client")?;
    let binary = gmem.gmem.as_deref().map(|binary| copy(binary, "gmem")).transpose()?;
    let Some(tests) = &programs.tests else {
        return Ok((Gmem { gmem: binary, ..gmem.clone() }, Programs { client, tests: None }));
    };
    for comparison in COMPARISONS {
        if let Program::Selftest([name, ..]) = comparison.program {
            copy(&tests.join(name), name)?;
        }
    }
    Ok((Gmem { gmem: binary, ..gmem.clone() }, Programs { client, tests: Some(folder.to_owned()) }))
}

/// The seconds of one run: of the program, or of the operation that it measured.
fn time(program: Program, words: &[OsString], log: &Path) -> Result<f64> {
    let file = File::create(log)?;
    let ran = under::client(words, LIMIT, file.try_clone()?, file)?;
    let text = fs::read_to_string(log)?;
    if ran.status != 0 {
        bail!("{words:?}: status {}\n{text}", ran.status);
    }
    let Program::Operation(name) = program else { return Ok(ran.took.as_secs_f64()) };
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let nanoseconds: f64 = line.with_context(|| format!("no {name} in {text:?}"))?.trim().parse()?;
    Ok(nanoseconds / 1e9)
}

/// A line of the table. Times are in seconds.
#[derive(Debug)]
struct Row {
    name: &'static str,
    bound: Bound,
    /// On one kernel.
    gmem: f64,
    native: Option<Native>,
    /// gmem's time on the other kernel.
    stock: Option<f64>,
}

/// The other half of a line.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Native {
    time: f64,
    /// The median of the pairs' ratios; not the ratio of the medians.
    ratio: f64,
    least: f64,
    most: f64,
    /// The median of the pairs' differences.
    more: f64,
}

fn rows(chosen: &[Comparison], same: &[Times], stock: &[Times]) -> Result<Vec<Row>> {
    chosen.iter().map(|comparison| row(*comparison, same, stock)).collect()
}

fn row(comparison: Comparison, same: &[Times], stock: &[Times]) -> Result<Row> {
    let of = |all: &[Times]| all.iter().find(|times| times.name == comparison.name).cloned();
    let Times { mut native, mut gmem, .. } = of(same).context("no times")?;
    let pairs = || native.iter().zip(&gmem);
    let mut ratios: Vec<f64> = pairs().map(|(native, gmem)| gmem / native).collect();
    let mut more: Vec<f64> = pairs().map(|(native, gmem)| gmem - native).collect();
    let native = (!native.is_empty()).then(|| Native {
        time: median(&mut native),
        ratio: median(&mut ratios),
        least: ratios.first().copied().unwrap_or(f64::NAN),
        most: ratios.last().copied().unwrap_or(f64::NAN),
        more: median(&mut more),
    });
    let stock = of(stock).map(|mut times| median(&mut times.gmem));
    Ok(Row { name: comparison.name, bound: comparison.bound, gmem: median(&mut gmem), native, stock })
}

impl Row {
    /// Whether it keeps to its bound; None where that cannot be said.
    fn verdict(&self, here: bool) -> Option<bool> {
        match (self.bound, self.native) {
            (Bound::Ratio(most), Some(native)) => Some(native.ratio <= most),
            (Bound::Time(most), _) => Some(self.gmem.max(self.stock.unwrap_or(0.0)) <= most),
            (Bound::Here { ratio, more }, Some(native)) if here => Some(native.ratio <= ratio && native.more <= more),
            _ => None,
        }
    }

    /// gmem's time on `stock` over the native one on `ref`.
    fn across(&self) -> Option<f64> {
        Some(self.stock? / self.native?.time)
    }

    fn word(&self, here: bool) -> &'static str {
        match (self.verdict(here), self.bound, self.across()) {
            (Some(true), Bound::Ratio(most), Some(across)) if across > most => "kept on one kernel",
            (Some(true), ..) => "kept",
            (Some(false), ..) => "**not kept**",
            (None, ..) => "",
        }
    }
}

/// Sorts, and takes the middle (of two, the greater).
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A time with the unit that suits it.
fn show(seconds: f64) -> String {
    match seconds {
        s if s < 1e-6 => format!("{:.0} ns", s * 1e9),
        s if s < 1e-3 => format!("{:.2} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

fn show_ratio(ratio: f64) -> String {
    if ratio < 0.01 { format!("1 : {:.0}", 1.0 / ratio) } else { format!("{ratio:.2}") }
}

fn show_bound(bound: Bound) -> String {
    match bound {
        Bound::Ratio(most) => show_ratio(most),
        Bound::Time(most) => show(most),
        Bound::Here { ratio, .. } if ratio.is_finite() => format!("{ratio}, on hardware"),
        Bound::Here { more, .. } => format!("{} more, on hardware", show(more)),
    }
}

fn report(rows: &[Row], args: &Args) -> Result<String> {
    let mut text = preface(args);
    text.push_str(match args.here {
        true => "| | native | gmem | ratio | least to most | bound | |\n|---|---|---|---|---|---|---|\n",
        false => {
            "| | native on ref | gmem on ref | ratio | gmem on stock | to native on ref | bound | |\n\
             |---|---|---|---|---|---|---|---|\n"
        }
    });
    for row in rows {
        let (native, ratio, range) = match row.native {
            Some(n) => {
                (show(n.time), show_ratio(n.ratio), format!("{} to {}", show_ratio(n.least), show_ratio(n.most)))
            }
            None => Default::default(),
        };
        let stock = row.stock.map(show).unwrap_or_default();
        let across = row.across().map(show_ratio).unwrap_or_default();
        let more = if args.here { range } else { format!("{stock} | {across}") };
        let (name, gmem, bound) = (row.name, show(row.gmem), show_bound(row.bound));
        writeln!(text, "| {name} | {native} | {gmem} | {ratio} | {more} | {bound} | {} |", row.word(args.here))?;
    }
    Ok(text)
}

fn preface(args: &Args) -> String {
    let runs = args.runs;
    match args.here {
        true => format!(
            "# What gmem adds to calls that it passes on\n\nWritten by `cargo xtask bench --here`: natively and under `gmem run` on \
             one machine's own /dev/kvm, the medians of\n{runs} runs of each that take turns. A run's time is that of its quickest 64 calls.\n\n",
        ),
        false => format!(
            "# Benchmarks\n\nWritten by `cargo xtask bench`, in emulated machines of one processor and {} that count instructions instead \
             of time: an\ninstruction takes a nanosecond, whatever it is, and the numbers are the same on every machine and in every \
             run, to about one\npercent. Medians of {runs} runs, which take turns.\n\n\
             - *ref* is 6.12 with SW_PROTECTED_VM. The same programs natively and under `gmem run --emulate`, in one boot: the ratio is what \
             gmem costs.\n\
             - *stock* is Debian's 6.12, whose own KVM has no private memory. Its system calls take more instructions than those of the \
             small\n  reference kernel do (security modules, memory control groups), so that a ratio across the two holds that, too.\n\n\
             What has a bound \"on hardware\" is measured in time by `cargo xtask bench --here` (benchmarks-here.md). Both kernels have \
             the stock\none's `init_on_alloc=1`.\n\n",
            args.machine.memory,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(name: &str, pairs: &[(f64, f64)]) -> Vec<Times> {
        let (native, gmem) = pairs.iter().copied().unzip();
        vec![Times { name: name.to_owned(), native, gmem }]
    }

    #[test]
    fn the_ratio_is_taken_in_pairs() {
        let convert = COMPARISONS[2];
        let same = times(convert.name, &[(1.0, 2.0), (4.0, 4.0), (10.0, 15.0)]);
        let stock = [Times { name: convert.name.to_owned(), native: Vec::new(), gmem: vec![9.0, 12.0, 10.0] }];
        let row = row(convert, &same, &stock).unwrap();
        assert_eq!((row.gmem, row.stock), (4.0, Some(10.0)));
        assert_eq!(row.native, Some(Native { time: 4.0, ratio: 1.5, least: 1.0, most: 2.0, more: 1.0 }));
        assert_eq!((row.verdict(false), row.across(), row.word(false)), (Some(true), Some(2.5), "kept on one kernel"));
    }

    #[test]
    fn a_narrow_bound_is_judged_on_hardware_only() {
        let version = COMPARISONS[3];
        let slow = row(version, &times(version.name, &[(1e-6, 1.4e-6)]), &[]).unwrap();
        assert_eq!((slow.verdict(false), slow.verdict(true)), (None, Some(false)));
        let quick = row(version, &times(version.name, &[(1e-6, 1.2e-6)]), &[]).unwrap();
        assert_eq!(quick.verdict(true), Some(true));
    }
}
