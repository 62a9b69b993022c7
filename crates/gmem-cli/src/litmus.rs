//! `gmem litmus`: every interleaving of small programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use gmem_litmus::json::JsonReport;
use gmem_litmus::{Limits, Mutant, Options, Program, Reduction, Report, Tracing, VmType, svg, text};

/// Explore every interleaving of litmus programs on gmem's own code.
///
/// Exits with 0 if all conditions hold, 1 if one does not or a folder of programs misses a broken protocol, 2 if a file is
/// malformed or cannot start, 3 if a program is too large.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Programs, or folders of programs (`*.litmus`).
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only this type of VM, or `all`. On types that the program does not name its conditions are shown and not judged.
    #[arg(long = "type", value_name = "TYPE")]
    vm_type: Option<String>,
    /// Run on broken protocols too: all of them, or the one named. Says which are caught.
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    mutate: Option<String>,
    /// Draw the interleaving that leads to the first violation.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
    /// Take every order of steps, also where it cannot matter.
    #[arg(long)]
    no_reduction: bool,
    /// Stop at this many states.
    #[arg(long, value_name = "N", default_value_t = Limits::default().states)]
    max_states: usize,
    /// Stop at this much memory.
    #[arg(long, value_name = "MIB", default_value_t = Limits::default().memory >> 20)]
    max_memory: usize,
}

/// How the command ended; the numbers are exit codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    Holds = 0,
    TooLarge = 3,
    Fails = 1,
    Malformed = 2,
}

impl Verdict {
    /// What weighs more: a program that is malformed, one that fails, one that is too large.
    fn weight(self) -> u8 {
        match self {
            Self::Holds => 0,
            Self::TooLarge => 1,
            Self::Fails => 2,
            Self::Malformed => 3,
        }
    }

    fn and(self, other: Self) -> Self {
        if other.weight() > self.weight() { other } else { self }
    }

    fn of(report: &Report) -> Self {
        match (report.violations.is_empty(), report.stopped) {
            (false, _) => Self::Fails,
            (true, true) => Self::TooLarge,
            (true, false) => Self::Holds,
        }
    }
}

/// A broken protocol and the programs that catch it.
struct Hunted {
    mutant: Mutant,
    by: Vec<String>,
}

/// Runs the command.
pub(crate) fn run(args: &Arguments) -> Result<ExitCode> {
    let mut files = Vec::new();
    for path in &args.paths {
        collect(path, &mut files)?;
    }
    if files.is_empty() {
        bail!("no .litmus file found");
    }
    let mut verdict = Verdict::Holds;
    let mut hunted: Vec<Hunted> = mutants(args)?.into_iter().map(|mutant| Hunted { mutant, by: Vec::new() }).collect();
    for file in &files {
        verdict = verdict.and(one(args, file, &mut hunted)?);
    }
    if files.len() > 1 {
        verdict = verdict.and(summary(args, files.len(), &hunted));
    }
    Ok(ExitCode::from(verdict as u8))
}

/// The matrix of broken protocols and programs. A folder is a library, which has to catch all of them.
fn summary(args: &Arguments, programs: usize, hunted: &[Hunted]) -> Verdict {
    if !args.json {
        for Hunted { mutant, by } in hunted {
            println!("{}: caught by {} of {programs} programs: {}", mutant.name(), by.len(), by.join(", "));
        }
    }
    let missed = hunted.iter().any(|one| one.by.is_empty());
    if missed && args.paths.iter().any(|path| path.is_dir()) { Verdict::Fails } else { Verdict::Holds }
}

fn collect(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let read = || format!("cannot read {}", path.display());
    let entries: std::io::Result<Vec<_>> = fs::read_dir(path).with_context(read)?.collect();
    let mut inside: Vec<PathBuf> = entries.with_context(read)?.into_iter().map(|entry| entry.path()).collect();
    inside.sort();
    for path in inside {
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "litmus") {
            files.push(path);
        }
    }
    Ok(())
}

fn mutants(args: &Arguments) -> Result<Vec<Mutant>> {
    match args.mutate.as_deref() {
        None => Ok(Vec::new()),
        Some("all") => Ok(Mutant::ALL.to_vec()),
        Some(name) => {
            let names = || Mutant::ALL.iter().map(|mutant| mutant.name()).collect::<Vec<_>>().join(", ");
            let mutant = Mutant::of_name(name);
            Ok(vec![mutant.with_context(|| format!("no mutant {name}; there are {}", names()))?])
        }
    }
}

fn types(args: &Arguments, program: &Program) -> Result<Vec<VmType>> {
    match args.vm_type.as_deref() {
        None => Ok(program.types.clone()),
        Some("all") => Ok(VmType::ALL.to_vec()),
        Some(name) => {
            let names = || VmType::ALL.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ");
            let vm_type = VmType::of_name(name);
            Ok(vec![vm_type.with_context(|| format!("no type {name}; there are {}", names()))?])
        }
    }
}

fn one(args: &Arguments, file: &Path, hunted: &mut [Hunted]) -> Result<Verdict> {
    let source = match fs::read(file) {
        Ok(source) => source,
        Err(error) => {
            eprintln!("{}: {error}", file.display());
            return Ok(Verdict::Malformed);
        }
    };
    let program = match gmem_litmus::parse(&String::from_utf8_lossy(&source)) {
        Ok(program) => program,
        Err(error) => {
            eprintln!("{}:{error}", file.display());
            return Ok(Verdict::Malformed);
        }
    };
    if !args.json {
        println!("{}: {}", file.display(), program.question);
    }
    let types = types(args, &program)?;
    let (reports, verdict) = explore_all(args, file, &program, &types);
    if reports.len() > 1 && !args.json {
        print!("{}", text::side_by_side(&reports));
    }
    draw(args, file, &program, &reports)?;
    for Hunted { mutant, by } in hunted {
        if catches(args, &program, &types, *mutant) {
            by.push(file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    Ok(verdict)
}

fn options(args: &Arguments, mutant: Option<Mutant>) -> Options {
    let limits = Limits { states: args.max_states, memory: args.max_memory.saturating_mul(1 << 20) };
    Options {
        limits,
        reduction: if args.no_reduction { Reduction::Off } else { Reduction::On },
        mutant,
        trace: Tracing::Shortest,
    }
}

/// Types that the program does not name are shown, and judged by nobody: `--type all` asks what happens there.
fn explore_all(args: &Arguments, file: &Path, program: &Program, types: &[VmType]) -> (Vec<Report>, Verdict) {
    let (mut reports, mut verdict) = (Vec::new(), Verdict::Holds);
    for &vm_type in types {
        let named = program.types.contains(&vm_type);
        match gmem_litmus::run(program, vm_type, &options(args, None)) {
            Ok(report) => {
                print_report(args, program, None, &report);
                if named {
                    verdict = verdict.and(Verdict::of(&report));
                }
                reports.push(report);
            }
            Err(error) if named => {
                eprintln!("{} ({}): {error}", file.display(), vm_type.name());
                verdict = Verdict::Malformed;
            }
            Err(error) if !args.json => println!("{}: cannot start: {error}", vm_type.name()),
            Err(_) => {}
        }
    }
    (reports, verdict)
}

fn print_report(args: &Arguments, program: &Program, mutant: Option<Mutant>, report: &Report) {
    if args.json {
        let json = serde_json::to_string(&JsonReport::new(program, mutant, report));
        println!("{}", json.unwrap_or_default());
    } else {
        print!("{}", text::report(program, report));
    }
}

/// Whether some condition fails under the mutant; prints what was found. A mutant that was asked for by name shows how.
fn catches(args: &Arguments, program: &Program, types: &[VmType], mutant: Mutant) -> bool {
    let mut by = Vec::new();
    let mut shown = String::new();
    for &vm_type in types.iter().filter(|vm_type| program.types.contains(vm_type)) {
        let trace = if is_named(args) && by.is_empty() { Tracing::Shortest } else { Tracing::None };
        let options = Options { trace, ..options(args, Some(mutant)) };
        let Ok(report) = gmem_litmus::run(program, vm_type, &options) else { continue };
        if args.json {
            print_report(args, program, Some(mutant), &report);
        }
        if !report.violations.is_empty() {
            if is_named(args) && by.is_empty() {
                shown = text::report(program, &report);
            }
            by.push(vm_type.name());
        }
    }
    if !args.json {
        let found = if by.is_empty() { "not caught".to_owned() } else { format!("caught on {}", by.join(", ")) };
        println!("  mutant {}: {found}", mutant.name());
        print!("{shown}");
    }
    !by.is_empty()
}

fn is_named(args: &Arguments) -> bool {
    args.mutate.as_deref().is_some_and(|name| name != "all")
}

fn draw(args: &Arguments, file: &Path, program: &Program, reports: &[Report]) -> Result<()> {
    let Some(target) = &args.svg else { return Ok(()) };
    let mutant = match args.mutate.as_deref() {
        Some(name) if name != "all" => Mutant::of_name(name),
        _ => None,
    };
    let broken = mutant.and_then(|_| {
        let mut all = program.types.iter();
        all.find_map(|one| gmem_litmus::run(program, *one, &options(args, mutant)).ok().filter(|r| !r.trace.is_empty()))
    });
    let found = reports.iter().find(|report| !report.trace.is_empty()).or(broken.as_ref());
    let Some(report) = found else { return Ok(()) };
    let title = format!("{} on {}", file.display(), report.vm_type.name());
    fs::write(target, svg::diagram(program, &title, &report.trace))
        .with_context(|| format!("cannot write {}", target.display()))
}
