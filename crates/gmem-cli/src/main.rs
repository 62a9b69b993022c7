//! `gmem`: guest private memory for unmodified KVM programs, and tools to study it.

mod check;
mod demo;
mod elf;
mod litmus;
mod measure;
mod probe;
mod program;
mod run;
mod sigpipe;
mod types;
mod vendors;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Guest private memory for virtual machines, without the hardware.
///
/// gmem gives an unmodified VMM or KVM test a KVM that has guest_memfd, memory attributes and protected VM types, on any
/// kernel and without privileges beyond access to /dev/kvm.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// Each is described where its arguments are.
#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Arguments),
    Run(run::Arguments),
    Probe(probe::Arguments),
    Litmus(litmus::Arguments),
    Check(check::Arguments),
    /// Compute the launch measurement that a verifier must expect, without the hardware.
    #[command(subcommand)]
    Measure(measure::Command),
    Vendors(vendors::Arguments),
}

fn main() -> ExitCode {
    sigpipe::end_by_it();
    let command = run::Arguments::alone().map_or_else(|| Arguments::parse().command, Command::Run);
    let result = match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Probe(arguments) => probe::run(&arguments),
        Command::Litmus(arguments) => litmus::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Measure(command) => measure::run(&command).map(|()| ExitCode::SUCCESS),
        Command::Vendors(arguments) => vendors::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // A standard error that takes nothing must not change the exit code.
            let _ = writeln!(std::io::stderr(), "gmem: {error:#}");
            ExitCode::from(error.downcast_ref::<run::Refused>().map_or(1, run::Refused::exit_code))
        }
    }
}
