//! Ratios: the same program natively on `ref` and under gmem on `stock`, in the same emulated machine.
//!
//! A time in an emulated machine says little; the ratio of two says what gmem costs. Each pair is two boots, one after the
//! other; the result is the median of the pairs' ratios. What gmem adds to a call that it only passes on is too little to be
//! measured there: `--here` measures it with this machine's own KVM.

use std::ffi::OsString;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::selftests;
use crate::source::Release;
use crate::sys;
use crate::under::{self, Gmem, Under};
use crate::vm::{self, Machine};

/// Measure what gmem costs: ratios of times under gmem on `stock` and natively on `ref`.
///
/// Writes docs/benchmarks.md. Run it on a machine that does nothing else. Exits with 1 if a ratio is above its bound.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench\n  \
    cargo xtask bench --only conversions --pairs 9 --out /dev/stdout\n  \
    cargo xtask bench --here")]
pub(crate) struct Args {
    /// Only comparisons whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Pairs of boots
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    pairs: u8,
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
    /// In a guest: measure in one way, on the kernel that this runs on, and leave the times in this folder
    #[arg(long, hide = true, requires = "client")]
    times: Option<PathBuf>,
    #[arg(long, hide = true, default_value = "native")]
    under: Under,
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
    /// gmem's time over the native one, at most.
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

/// Runs of each program in one boot; the median counts, so that the first, with cold files, does not.
const RUNS: usize = 3;

/// The time that a run may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Where the programs are.
#[derive(Clone, Debug)]
struct Programs {
    client: PathBuf,
    /// None: without those of the kernel.
    tests: Option<PathBuf>,
}

/// What one boot measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Time {
    name: String,
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<Comparison> =
        COMPARISONS.into_iter().filter(|comparison| comparison.name.contains(&args.only)).collect();
    if let (Some(folder), Some(client)) = (&args.times, &args.client) {
        let programs = Programs { client: client.clone(), tests: args.tests.clone() };
        let times = times(&args.gmem, &chosen, args.under, &programs)?;
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

/// Pairs of boots.
fn guests(args: &Args, gmem: &Gmem, chosen: &[Comparison], client: PathBuf) -> Result<Vec<Row>> {
    let programs = Programs { client, tests: Some(selftests::build(Release::V6_12)?) };
    let mut pairs = Vec::new();
    for number in 1..=args.pairs {
        let native = side(args, gmem, &programs, Under::Native, Kernel::Ref, chosen.len())?;
        let under_gmem = side(args, gmem, &programs, Under::Gmem, Kernel::Stock, chosen.len())?;
        eprintln!("xtask: pair {number} of {}", args.pairs);
        pairs.push((native, under_gmem));
    }
    rows(chosen, &pairs)
}

/// Pairs of runs on the KVM of this machine, of what needs no private memory.
fn this_machine(args: &Args, gmem: &Gmem, chosen: &[Comparison], client: PathBuf) -> Result<Vec<Row>> {
    let chosen: Vec<Comparison> =
        chosen.iter().copied().filter(|comparison| matches!(comparison.bound, Bound::Here { .. })).collect();
    let programs = Programs { client, tests: None };
    let mut pairs = Vec::new();
    for _ in 0..args.pairs {
        let native = times(gmem, &chosen, Under::Native, &programs)?;
        pairs.push((native, times(gmem, &chosen, Under::Gmem, &programs)?));
    }
    rows(&chosen, &pairs)
}

fn side(
    args: &Args,
    gmem: &Gmem,
    programs: &Programs,
    under: Under,
    kernel: Kernel,
    count: usize,
) -> Result<Vec<Time>> {
    let folder = tempfile::tempdir()?;
    let mut arguments: Vec<OsString> = vec!["bench".into(), "--times".into(), folder.path().into()];
    arguments.extend(["--client".into(), (&programs.client).into(), "--under".into(), under.name().into()]);
    if let Some(tests) = &programs.tests {
        arguments.extend(["--tests".into(), tests.into()]);
    }
    arguments.extend(["--only".into(), (&args.only).into()]);
    arguments.extend(gmem.arguments());
    let runs = u32::try_from(count * RUNS)?;
    let mut machine = args.machine.clone();
    machine.append.insert(0, ALIKE.to_owned());
    let status = under::myself(kernel, &machine, LIMIT * (runs + 1), folder.path(), arguments)?;
    if status != 0 {
        bail!("measuring {} on {} failed with {status}", under.name(), kernel.name());
    }
    Ok(serde_json::from_str(&fs::read_to_string(folder.path().join("times"))?)?)
}

/// On the kernel that this runs on: the median time of each program.
fn times(gmem: &Gmem, chosen: &[Comparison], under: Under, programs: &Programs) -> Result<Vec<Time>> {
    let work = tempfile::tempdir()?;
    let mut times = Vec::new();
    for comparison in chosen.iter().filter(|comparison| comparison.runs(under)) {
        let mut words = gmem.prefix(under);
        words.extend(comparison.words(programs));
        let mut seconds = Vec::new();
        for _ in 0..RUNS {
            seconds.push(time(comparison.program, &words, &work.path().join("log"))?);
        }
        times.push(Time { name: comparison.name.to_owned(), seconds: median(&mut seconds) });
    }
    Ok(times)
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
    gmem: f64,
    native: Option<Native>,
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

fn rows(chosen: &[Comparison], pairs: &[(Vec<Time>, Vec<Time>)]) -> Result<Vec<Row>> {
    chosen.iter().map(|comparison| row(*comparison, pairs)).collect()
}

fn row(comparison: Comparison, pairs: &[(Vec<Time>, Vec<Time>)]) -> Result<Row> {
    let time = |times: &[Time]| times.iter().find(|time| time.name == comparison.name).map(|time| time.seconds);
    let (mut natives, mut gmems, mut ratios, mut more) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (native, gmem) in pairs {
        let gmem = time(gmem).context("no time under gmem")?;
        gmems.push(gmem);
        if let Some(native) = time(native) {
            natives.push(native);
            ratios.push(gmem / native);
            more.push(gmem - native);
        }
    }
    let native = (!natives.is_empty()).then(|| Native {
        time: median(&mut natives),
        ratio: median(&mut ratios),
        least: ratios.first().copied().unwrap_or(f64::NAN),
        most: ratios.last().copied().unwrap_or(f64::NAN),
        more: median(&mut more),
    });
    Ok(Row { name: comparison.name, bound: comparison.bound, gmem: median(&mut gmems), native })
}

impl Row {
    /// Whether it keeps to its bound; None where that cannot be said.
    fn verdict(&self, here: bool) -> Option<bool> {
        match (self.bound, self.native) {
            (Bound::Ratio(most), Some(native)) => Some(native.ratio <= most),
            (Bound::Time(most), _) => Some(self.gmem <= most),
            (Bound::Here { ratio, more }, Some(native)) if here => Some(native.ratio <= ratio && native.more <= more),
            _ => None,
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
    let mut text = String::new();
    preface(&mut text, args)?;
    text.push_str("| | native | gmem | ratio | least to most | bound | |\n|---|---|---|---|---|---|---|\n");
    for row in rows {
        let gmem = show(row.gmem);
        let (native, ratio, range) = match row.native {
            Some(n) => {
                (show(n.time), show_ratio(n.ratio), format!("{} to {}", show_ratio(n.least), show_ratio(n.most)))
            }
            None => Default::default(),
        };
        let word = match row.verdict(args.here) {
            Some(true) => "kept",
            Some(false) => "**not kept**",
            None => "",
        };
        writeln!(
            text,
            "| {} | {native} | {gmem} | {ratio} | {range} | {} | {word} |",
            row.name,
            show_bound(row.bound)
        )?;
    }
    Ok(text)
}

fn preface(text: &mut String, args: &Args) -> Result<()> {
    if args.here {
        writeln!(
            text,
            "# What gmem adds to calls that it passes on\n\nWritten by `cargo xtask bench --here`: natively and under `gmem run` on one machine's own \
             /dev/kvm, {} pairs\nthat take turns.\n",
            args.pairs
        )?;
        return Ok(());
    }
    writeln!(
        text,
        "# Benchmarks\n\nWritten by `cargo xtask bench`: natively on the reference kernel (6.12 with SW_PROTECTED_VM) and under\n\
         `gmem run` on Debian's stock 6.12, in the same emulated machine ({} processors, {}). A time is the median of {RUNS}\n\
         runs in one boot; each line shows the median of {} pairs of boots, which take turns.\n",
        args.machine.cpus.unwrap_or(vm::CPUS),
        args.machine.memory,
        args.pairs
    )?;
    text.push_str(
        "The machine is emulated in software and was not alone on its host: times are long and noisy, and only the ratios mean\n\
         something. Emulation makes gmem's own instructions dear beside a system call. What has a bound \"on hardware\" is\n\
         measured with `cargo xtask bench --here`, on a machine's own /dev/kvm (benchmarks-here.md). Both kernels have the stock\n\
         one's `init_on_alloc=1`.\n\n",
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(name: &str, times: &[(f64, f64)]) -> Vec<(Vec<Time>, Vec<Time>)> {
        let time = |seconds| vec![Time { name: name.to_owned(), seconds }];
        times.iter().map(|&(native, gmem)| (time(native), time(gmem))).collect()
    }

    #[test]
    fn the_ratio_is_taken_in_pairs() {
        let convert = COMPARISONS[2];
        let row = row(convert, &pairs(convert.name, &[(1.0, 2.0), (4.0, 4.0), (10.0, 15.0)])).unwrap();
        assert_eq!(row.gmem, 4.0);
        assert_eq!(row.native, Some(Native { time: 4.0, ratio: 1.5, least: 1.0, most: 2.0, more: 1.0 }));
        assert_eq!(row.verdict(false), Some(true));
    }

    #[test]
    fn a_narrow_bound_is_judged_on_hardware_only() {
        let version = COMPARISONS[3];
        let slow = row(version, &pairs(version.name, &[(1e-6, 1.4e-6)])).unwrap();
        assert_eq!((slow.verdict(false), slow.verdict(true)), (None, Some(false)));
        let quick = row(version, &pairs(version.name, &[(1e-6, 1.2e-6)])).unwrap();
        assert_eq!(quick.verdict(true), Some(true));
    }
}
