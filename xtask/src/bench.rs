//! Ratios: the same program natively on `ref` and under gmem on `stock`, in the same emulated machine.
//!
//! A time in an emulated machine says little; the ratio of two says what gmem costs. Each pair is two boots, one after the
//! other; the result is the median of the pairs' ratios.

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
use crate::vm::Machine;

/// Measure what gmem costs: ratios of times under gmem on `stock` and natively on `ref`.
///
/// Writes docs/benchmarks.md. Run it on a machine that does nothing else. Exits with 1 if a ratio is above its bound.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    cargo xtask bench\n  \
    cargo xtask bench --only conversions --pairs 9 --out /dev/stdout")]
pub(crate) struct Args {
    /// Only comparisons whose name contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Pairs of boots
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..))]
    pairs: u8,
    /// Where the table goes; docs/benchmarks.md without
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    gmem: Gmem,
    #[command(flatten)]
    machine: Machine,
    /// In a guest: measure in one way, on the kernel that this runs on, and leave the times in this folder
    #[arg(long, hide = true, requires = "tests")]
    here: Option<PathBuf>,
    #[arg(long, hide = true, default_value = "native")]
    under: Under,
    #[arg(long, hide = true)]
    tests: Option<PathBuf>,
}

/// A program whose time is compared.
#[derive(Clone, Copy, Debug)]
struct Comparison {
    name: &'static str,
    /// A program of the 6.12 selftests, and its arguments.
    selftest: &'static [&'static str],
    /// The ratio that gmem keeps to.
    bound: f64,
}

const COMPARISONS: [Comparison; 2] = [
    Comparison { name: "private_mem_conversions_test", selftest: &["x86_64/private_mem_conversions_test"], bound: 1.2 },
    Comparison {
        name: "private_mem_conversions_test -n 4 -m 4",
        selftest: &["x86_64/private_mem_conversions_test", "-n", "4", "-m", "4"],
        bound: 1.2,
    },
];

/// Runs of each program in one boot; the median counts, so that the first, with cold files, does not.
const RUNS: usize = 5;

/// The time that a run may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What one boot measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Time {
    name: String,
    seconds: f64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let chosen: Vec<Comparison> =
        COMPARISONS.into_iter().filter(|comparison| comparison.name.contains(&args.only)).collect();
    if let (Some(folder), Some(tests)) = (&args.here, &args.tests) {
        return here(args, &chosen, folder, tests);
    }
    if chosen.is_empty() {
        bail!("no comparison is called {:?}", args.only);
    }
    let tests = selftests::build(Release::V6_12)?;
    let gmem = args.gmem.ready()?;
    let mut pairs = Vec::new();
    for number in 1..=args.pairs {
        let native = side(args, &gmem, &tests, Under::Native, Kernel::Ref, chosen.len())?;
        let under_gmem = side(args, &gmem, &tests, Under::Gmem, Kernel::Stock, chosen.len())?;
        eprintln!("xtask: pair {number} of {}", args.pairs);
        pairs.push((native, under_gmem));
    }
    let rows = rows(&chosen, &pairs)?;
    let out = args.out.clone().unwrap_or_else(|| sys::repository().join("docs/benchmarks.md"));
    fs::create_dir_all(out.parent().unwrap_or(Path::new(".")))?;
    fs::write(&out, report(&rows, args)?).with_context(|| format!("writing {}", out.display()))?;
    eprintln!("xtask: wrote {}", out.display());
    Ok(ExitCode::from(u8::from(rows.iter().any(|row| row.ratio > row.bound))))
}

fn side(args: &Args, gmem: &Gmem, tests: &Path, under: Under, kernel: Kernel, count: usize) -> Result<Vec<Time>> {
    let folder = tempfile::tempdir()?;
    let mut arguments: Vec<OsString> = vec!["bench".into(), "--here".into(), folder.path().into()];
    arguments.extend(["--tests".into(), tests.into(), "--under".into(), under.name().into()]);
    arguments.extend(["--only".into(), (&args.only).into()]);
    arguments.extend(gmem.arguments());
    let runs = u32::try_from(count * RUNS)?;
    let status = under::myself(kernel, &args.machine, LIMIT * (runs + 1), folder.path(), arguments)?;
    if status != 0 {
        bail!("measuring {} on {} failed with {status}", under.name(), kernel.name());
    }
    Ok(serde_json::from_str(&fs::read_to_string(folder.path().join("times"))?)?)
}

/// In a guest: the median time of each program.
fn here(args: &Args, chosen: &[Comparison], folder: &Path, tests: &Path) -> Result<ExitCode> {
    let work = tempfile::tempdir()?;
    let mut times = Vec::new();
    for comparison in chosen {
        let mut words = args.gmem.prefix(args.under);
        let mut parts = comparison.selftest.iter();
        words.extend(parts.next().map(|program| tests.join(program).into()));
        words.extend(parts.map(OsString::from));
        let mut seconds = Vec::new();
        for _ in 0..RUNS {
            let log = File::create(work.path().join("log"))?;
            let ran = under::client(&words, LIMIT, log.try_clone()?, log)?;
            if ran.status != 0 {
                bail!("{words:?}: status {}\n{}", ran.status, fs::read_to_string(work.path().join("log"))?);
            }
            seconds.push(ran.took.as_secs_f64());
        }
        times.push(Time { name: comparison.name.to_owned(), seconds: median(&mut seconds) });
    }
    fs::write(folder.join("times"), serde_json::to_string(&times)?)?;
    Ok(ExitCode::SUCCESS)
}

/// A line of the table.
#[derive(Debug)]
struct Row {
    name: &'static str,
    native: f64,
    gmem: f64,
    /// The median of the pairs' ratios; not the ratio of the medians.
    ratio: f64,
    least: f64,
    most: f64,
    bound: f64,
}

fn rows(chosen: &[Comparison], pairs: &[(Vec<Time>, Vec<Time>)]) -> Result<Vec<Row>> {
    chosen.iter().map(|comparison| row(*comparison, pairs)).collect()
}

fn row(comparison: Comparison, pairs: &[(Vec<Time>, Vec<Time>)]) -> Result<Row> {
    let time = |times: &[Time]| times.iter().find(|time| time.name == comparison.name).map(|time| time.seconds);
    let mut both = Vec::new();
    for (native, gmem) in pairs {
        both.push((time(native).context("no native time")?, time(gmem).context("no time under gmem")?));
    }
    let of = |value: fn(&(f64, f64)) -> f64| both.iter().map(value).collect::<Vec<f64>>();
    let mut ratios = of(|(native, gmem)| gmem / native);
    let ratio = median(&mut ratios);
    Ok(Row {
        name: comparison.name,
        native: median(&mut of(|pair| pair.0)),
        gmem: median(&mut of(|pair| pair.1)),
        ratio,
        least: ratios.first().copied().unwrap_or(ratio),
        most: ratios.last().copied().unwrap_or(ratio),
        bound: comparison.bound,
    })
}

/// Sorts, and takes the middle (of two, the greater).
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(rows: &[Row], args: &Args) -> Result<String> {
    let mut text = String::from("# Benchmarks\n\nWritten by `cargo xtask bench`.\n\n");
    writeln!(
        text,
        "Each program runs natively on the reference kernel (6.12 with SW_PROTECTED_VM) and under `gmem run` on"
    )?;
    writeln!(
        text,
        "Debian's stock 6.12, in the same emulated machine ({} processors, {}).",
        args.machine.cpus, args.machine.memory
    )?;
    writeln!(
        text,
        "A time is the median of {RUNS} runs in one boot; the ratio is the median of {} pairs of boots.\n",
        args.pairs
    )?;
    text.push_str(
        "| program | native on ref | gmem on stock | ratio | least to most | bound |\n|---|---|---|---|---|---|\n",
    );
    for Row { name, native, gmem, ratio, least, most, bound } in rows {
        writeln!(text, "| {name} | {native:.3} s | {gmem:.3} s | {ratio:.2} | {least:.2} to {most:.2} | {bound} |")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_taken_in_pairs() {
        let time = |seconds| vec![Time { name: COMPARISONS[0].name.to_owned(), seconds }];
        let pairs = [(time(1.0), time(2.0)), (time(4.0), time(4.0)), (time(10.0), time(15.0))];
        let row = row(COMPARISONS[0], &pairs).unwrap();
        assert_eq!((row.native, row.gmem, row.ratio, row.least, row.most), (4.0, 4.0, 1.5, 1.0, 2.0));
    }
}
