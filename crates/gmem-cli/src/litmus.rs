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
/// Exits with 0 if all conditions hold, 1 if one does not or a program is too large, 2 if a file is malformed.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Programs, or folders of programs (`*.litmus`).
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only this type of VM; `all` for every type, whatever the program says.
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
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    Holds = 0,
    Fails = 1,
    Malformed = 2,
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
    let mut caught: Vec<(Mutant, usize)> = mutants(args)?.into_iter().map(|mutant| (mutant, 0)).collect();
    for file in &files {
        verdict = verdict.max(one(args, file, &mut caught)?);
    }
    if !args.json && files.len() > 1 {
        for (mutant, by) in &caught {
            println!("{}: caught by {by} of {} programs", mutant.name(), files.len());
        }
    }
    Ok(ExitCode::from(verdict as u8))
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

fn one(args: &Arguments, file: &Path, caught: &mut [(Mutant, usize)]) -> Result<Verdict> {
    let source = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
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
    let Some(reports) = explore_all(args, file, &program, &types) else { return Ok(Verdict::Malformed) };
    if reports.len() > 1 && !args.json {
        print!("{}", text::side_by_side(&reports));
    }
    draw(args, file, &program, &reports)?;
    for (mutant, by) in caught {
        *by += usize::from(catches(args, &program, &types, *mutant));
    }
    let holds = reports.iter().all(Report::holds);
    Ok(if holds { Verdict::Holds } else { Verdict::Fails })
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

fn explore_all(args: &Arguments, file: &Path, program: &Program, types: &[VmType]) -> Option<Vec<Report>> {
    let mut reports = Vec::new();
    for &vm_type in types {
        match gmem_litmus::run(program, vm_type, &options(args, None)) {
            Ok(report) => {
                print_report(args, program, None, &report);
                reports.push(report);
            }
            Err(error) => {
                eprintln!("{} ({}): {error}", file.display(), vm_type.name());
                return None;
            }
        }
    }
    Some(reports)
}

fn print_report(args: &Arguments, program: &Program, mutant: Option<Mutant>, report: &Report) {
    if args.json {
        let json = serde_json::to_string(&JsonReport::new(program, mutant, report));
        println!("{}", json.unwrap_or_default());
    } else {
        print!("{}", text::report(program, report));
    }
}

/// Whether some condition fails under the mutant; prints what was found.
fn catches(args: &Arguments, program: &Program, types: &[VmType], mutant: Mutant) -> bool {
    let mut by = Vec::new();
    for &vm_type in types {
        if let Ok(report) =
            gmem_litmus::run(program, vm_type, &Options { trace: Tracing::None, ..options(args, Some(mutant)) })
        {
            if args.json {
                print_report(args, program, Some(mutant), &report);
            }
            if !report.violations.is_empty() {
                by.push(vm_type.name());
            }
        }
    }
    if !args.json {
        let found = if by.is_empty() { "not caught".to_owned() } else { format!("caught on {}", by.join(", ")) };
        println!("  mutant {}: {found}", mutant.name());
    }
    !by.is_empty()
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
