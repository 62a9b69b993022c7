//! Everything automated: real kernels, the kernel's selftests, differential tests, benchmarks and the gate.
//!
//! One module per command; `cargo xtask help` is the manual. A command whose capability is missing (a tool, the network, a
//! kernel) says which and exits with [`sys::EXIT_MISSING`].

mod apt;
mod bench;
mod ci;
mod conform;
mod hold;
mod kernels;
mod selftests;
mod source;
mod sys;
mod under;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Everything automated in this repository.
///
/// What is downloaded or built is kept in $XDG_CACHE_HOME/gmem (~/.cache/gmem): delete it at any time.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Vm(vm::Args),
    Selftests(selftests::Args),
    Conform(conform::Args),
    Bench(bench::Args),
    Ci(ci::Args),
    #[command(hide = true)]
    HoldVm(hold::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Vm(args) => vm::run(&args),
        Task::Selftests(args) => selftests::run(&args),
        Task::Conform(args) => conform::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Ci(args) => ci::run(&args),
        Task::HoldVm(args) => hold::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::from(if error.is::<sys::Missing>() { sys::EXIT_MISSING } else { sys::EXIT_ERROR })
    })
}
