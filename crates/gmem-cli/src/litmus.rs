//! `gmem litmus`: every interleaving of small programs.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gmem_litmus::json::JsonReport;
use gmem_litmus::{Limits, Mutant, Options, Program, Reduction, Report, Tracing, VmType, svg, text};

use crate::run::refuse;

/// Explore every interleaving of litmus programs on gmem's own code.
///
/// Exits with 0 if all conditions hold, 1 if one does not or a folder of programs misses a broken protocol (or what was found
/// cannot be written), 2 if the command line is wrong or a file is malformed or cannot start, 3 if a program is too large.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Programs, or folders of programs (`*.litmus`).
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Only this type of VM, or `all`. On types that the program does not name its conditions are shown and not judged.
    #[arg(long = "type", value_name = "TYPE", value_parser = one_or_all(VmType::ALL, VmType::name))]
    vm_type: Option<OneOrAll<VmType>>,
    /// Run on broken protocols too: all of them, or the one named. Says which are caught.
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "all",
        value_parser = one_or_all(Mutant::ALL, Mutant::name), hide_possible_values = true)]
    mutate: Option<OneOrAll<Mutant>>,
    /// Draw the interleaving that leads to the first violation, also one that --mutate=NAME brings.
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

/// What an option names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OneOrAll<T> {
    One(T),
    All,
}

/// A name of one of `all`, or the word `all`. What is neither is a wrong command line, before anything is explored.
fn one_or_all<T: Copy + Send + Sync>(
    all: &'static [T],
    name: fn(T) -> &'static str,
) -> impl TypedValueParser<Value = OneOrAll<T>> {
    let names = all.iter().map(|one| name(*one));
    PossibleValuesParser::new(names.chain(["all"])).map(move |given| {
        let one = all.iter().find(|one| name(**one) == given);
        one.copied().map_or(OneOrAll::All, OneOrAll::One)
    })
}

impl Arguments {
    fn mutants(&self) -> Vec<Mutant> {
        match self.mutate {
            None => Vec::new(),
            Some(OneOrAll::All) => Mutant::ALL.to_vec(),
            Some(OneOrAll::One(mutant)) => vec![mutant],
        }
    }

    /// The mutant that was asked for by name.
    fn mutant(&self) -> Option<Mutant> {
        match self.mutate {
            Some(OneOrAll::One(mutant)) => Some(mutant),
            _ => None,
        }
    }

    fn types(&self, program: &Program) -> Vec<VmType> {
        match self.vm_type {
            None => program.types.clone(),
            Some(OneOrAll::All) => VmType::ALL.to_vec(),
            Some(OneOrAll::One(vm_type)) => vec![vm_type],
        }
    }

    fn options(&self, mutant: Option<Mutant>) -> Options {
        Options {
            limits: Limits { states: self.max_states, memory: self.max_memory.saturating_mul(1 << 20) },
            reduction: if self.no_reduction { Reduction::Off } else { Reduction::On },
            mutant,
            trace: Tracing::Shortest,
        }
    }
}

/// A broken protocol and the programs that catch it.
struct Hunted {
    mutant: Mutant,
    by: Vec<String>,
}

/// The command under way.
struct Run<'a, W> {
    args: &'a Arguments,
    out: W,
    hunted: Vec<Hunted>,
    drawn: bool,
}

/// Runs the command.
pub(crate) fn run(args: &Arguments) -> Result<ExitCode> {
    let mut files = Vec::new();
    for path in &args.paths {
        let before = files.len();
        collect(path, &mut files).or_else(|error| refuse(Verdict::Malformed as u8, format!("{error:#}")))?;
        if files.len() == before {
            return refuse(Verdict::Malformed as u8, format!("{}: no .litmus file in it", path.display()));
        }
    }
    let hunted = args.mutants().into_iter().map(|mutant| Hunted { mutant, by: Vec::new() }).collect();
    let mut run = Run { args, out: std::io::stdout().lock(), hunted, drawn: false };
    let mut verdict = Verdict::Holds;
    for file in &files {
        verdict = verdict.and(run.one(file)?);
    }
    if files.len() > 1 {
        verdict = verdict.and(run.summary(files.len())?);
    }
    if args.svg.is_some() && !run.drawn {
        eprintln!("{}", nothing_to_draw(args));
    }
    Ok(ExitCode::from(verdict as u8))
}

fn nothing_to_draw(args: &Arguments) -> &'static str {
    if args.mutate == Some(OneOrAll::All) {
        "nothing to draw: no interleaving violates anything; of broken protocols only one that is named is drawn (--mutate=NAME)"
    } else {
        "nothing to draw: no interleaving violates anything"
    }
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

/// The program of a file; says what is wrong with it.
fn read_program(file: &Path) -> Option<Program> {
    let path = file.display();
    let source = fs::read(file).map_err(|error| eprintln!("{path}: {error}")).ok()?;
    gmem_litmus::parse(&String::from_utf8_lossy(&source)).map_err(|error| eprintln!("{path}:{error}")).ok()
}

impl<W: Write> Run<'_, W> {
    fn one(&mut self, file: &Path) -> Result<Verdict> {
        let Some(program) = read_program(file) else { return Ok(Verdict::Malformed) };
        if !self.args.json {
            writeln!(self.out, "{}: {}", file.display(), program.question)?;
        }
        let types = self.args.types(&program);
        let (reports, verdict) = self.explore_all(file, &program, &types)?;
        if reports.len() > 1 && !self.args.json {
            write!(self.out, "{}", text::side_by_side(&reports))?;
        }
        self.draw(file, &program, &reports)?;
        for at in 0..self.hunted.len() {
            if self.catches(&program, &types, self.hunted[at].mutant)? {
                let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                self.hunted[at].by.push(name);
            }
        }
        Ok(verdict)
    }

    /// Types that the program does not name are shown, and judged by nobody: `--type all` asks what happens there.
    fn explore_all(&mut self, file: &Path, program: &Program, types: &[VmType]) -> Result<(Vec<Report>, Verdict)> {
        let (mut reports, mut verdict) = (Vec::new(), Verdict::Holds);
        for &vm_type in types {
            let named = program.types.contains(&vm_type);
            match gmem_litmus::run(program, vm_type, &self.args.options(None)) {
                Ok(report) => {
                    self.print_report(program, None, &report)?;
                    if named {
                        verdict = verdict.and(Verdict::of(&report));
                    }
                    reports.push(report);
                }
                Err(error) if named => {
                    eprintln!("{} ({}): {error}", file.display(), vm_type.name());
                    verdict = Verdict::Malformed;
                }
                Err(error) if !self.args.json => writeln!(self.out, "{}: cannot start: {error}", vm_type.name())?,
                Err(_) => {}
            }
        }
        Ok((reports, verdict))
    }

    fn print_report(&mut self, program: &Program, mutant: Option<Mutant>, report: &Report) -> Result<()> {
        if self.args.json {
            writeln!(self.out, "{}", serde_json::to_string(&JsonReport::new(program, mutant, report))?)?;
        } else {
            write!(self.out, "{}", text::report(program, report))?;
        }
        Ok(())
    }

    /// Whether some condition fails under the mutant; prints what was found. A mutant that was asked for by name shows how.
    fn catches(&mut self, program: &Program, types: &[VmType], mutant: Mutant) -> Result<bool> {
        let is_named = self.args.mutant().is_some();
        let mut by = Vec::new();
        let mut shown = String::new();
        for &vm_type in types.iter().filter(|vm_type| program.types.contains(vm_type)) {
            let trace = if is_named && by.is_empty() { Tracing::Shortest } else { Tracing::None };
            let options = Options { trace, ..self.args.options(Some(mutant)) };
            let Ok(report) = gmem_litmus::run(program, vm_type, &options) else { continue };
            if self.args.json {
                self.print_report(program, Some(mutant), &report)?;
            }
            if !report.violations.is_empty() {
                if is_named && by.is_empty() {
                    shown = text::report(program, &report);
                }
                by.push(vm_type.name());
            }
        }
        if !self.args.json {
            let found = if by.is_empty() { "not caught".to_owned() } else { format!("caught on {}", by.join(", ")) };
            write!(self.out, "  mutant {}: {found}\n{shown}", mutant.name())?;
        }
        Ok(!by.is_empty())
    }

    /// Draws the first violation of all programs, and none after it.
    fn draw(&mut self, file: &Path, program: &Program, reports: &[Report]) -> Result<()> {
        let Some(target) = self.args.svg.as_ref().filter(|_| !self.drawn) else { return Ok(()) };
        let broken = || self.args.mutant().and_then(|mutant| traced(program, &self.args.options(Some(mutant))));
        let found = reports.iter().find(|report| !report.trace.is_empty()).cloned().or_else(broken);
        let Some(report) = found else { return Ok(()) };
        let title = format!("{} on {}", file.display(), report.vm_type.name());
        fs::write(target, svg::diagram(program, &title, &report.trace))
            .with_context(|| format!("cannot write {}", target.display()))?;
        self.drawn = true;
        Ok(())
    }

    /// The matrix of broken protocols and programs. A folder is a library, which has to catch all of them.
    fn summary(&mut self, programs: usize) -> Result<Verdict> {
        for Hunted { mutant, by } in self.hunted.iter().filter(|_| !self.args.json) {
            let (name, count, by_whom) = (mutant.name(), by.len(), by.join(", "));
            writeln!(self.out, "{name}: caught by {count} of {programs} programs: {by_whom}")?;
        }
        let missed = self.hunted.iter().any(|one| one.by.is_empty());
        let is_library = self.args.paths.iter().any(|path| path.is_dir());
        Ok(if missed && is_library { Verdict::Fails } else { Verdict::Holds })
    }
}

/// A violation on some type that the program names.
fn traced(program: &Program, options: &Options) -> Option<Report> {
    let on = |vm_type: &VmType| gmem_litmus::run(program, *vm_type, options).ok();
    program.types.iter().filter_map(on).find(|report| !report.trace.is_empty())
}
