//! gmem-conformance
mod agent;
mod churn;
mod generate;
mod machine;
mod ops;
mod race;
mod sys;
mod transcript;
mod world;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use generate::Surface;
use world::World;

/// A KVM client that exercises guest private memory and prints what happened.
#[derive(Parser, Debug)]
#[command(version)]
struct Args {
    /// The sequence.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Its length.
    #[arg(long, default_value_t = 500)]
    ops: usize,
    /// Which operations it is made of.
    #[arg(long, value_enum, default_value = "all")]
    surface: Surface,
    /// Indexes that are generated but not performed.
    #[arg(long, value_delimiter = ',')]
    skip: Vec<usize>,
    /// The VM type under test instead of the best one that the host offers.
    #[arg(long)]
    vm_type: Option<u64>,
    /// Print the operations without performing them.
    #[arg(long, conflicts_with_all = ["race", "churn"])]
    list: bool,
    /// Let vCPUs race with conversions, punches, slots and closes for so many seconds instead.
    #[arg(long, value_name = "SECONDS", conflicts_with = "churn")]
    race: Option<u64>,
    /// Create, use and destroy so many worlds instead, and fail if the process grows.
    #[arg(long, value_name = "ROUNDS")]
    churn: Option<u64>,
}

fn main() -> ExitCode {
    // A child that dies of SIGBUS on purpose must not leave a core file.
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one structure, read only.
    unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) };
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gmem-conformance: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    let tested = args.vm_type.or((args.surface == Surface::File).then_some(sys::VM_TYPE_DEFAULT));
    match (args.race, args.churn) {
        (Some(seconds), _) => race::run(seconds, args.seed),
        (None, Some(rounds)) => churn::run(rounds, args.surface, tested),
        (None, None) if args.list => list(args),
        (None, None) => perform(args, tested),
    }
}

fn list(args: &Args) -> anyhow::Result<()> {
    let mut out = std::io::LineWriter::new(std::io::stdout().lock());
    for (index, op) in generate::sequence(args.seed, args.ops, args.surface).into_iter().enumerate() {
        writeln!(out, "{index:05} {op:?}")?;
    }
    Ok(())
}

/// The transcript; each line is written before the next operation, so that a crash shows where it was.
fn perform(args: &Args, tested: Option<u64>) -> anyhow::Result<()> {
    let mut out = std::io::LineWriter::new(std::io::stdout().lock());
    let mut world = World::new(tested).context("cannot open /dev/kvm")?;
    for (index, op) in generate::sequence(args.seed, args.ops, args.surface).into_iter().enumerate() {
        if !args.skip.contains(&index) {
            writeln!(out, "{index:05} {op:?} => {}", world.perform(op))?;
        }
    }
    Ok(())
}
