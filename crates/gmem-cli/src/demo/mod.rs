//! `gmem demo`: the two-minute tour.
//!
//! The tour ([`mod@tour`]) is written once, for a [`machine::Machine`]. [`kvm`] is one through KVM, an ordinary client that runs
//! under `gmem run` like any other; [`core`] is one made of the core alone, for hosts without KVM.

mod core;
mod kvm;
mod machine;
mod map;
mod print;
mod tour;

use std::io::{IsTerminal, Write};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;
use gmem_uapi::Config;

use crate::{program, run, types};
use machine::Machine;
use map::Paint;

/// Show in two minutes what guest private memory is, on this machine's KVM.
///
/// A small KVM client, which knows nothing of gmem, makes a protected VM under gmem and shows what its guest, the host and
/// KVM see of its memory. Every observation is checked: the exit status is 1 if one is not what it must be. Without
/// /dev/kvm the same tour is taken through gmem's model.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Take the tour through gmem's model, without KVM.
    #[arg(long)]
    core: bool,
    /// No colours; NO_COLOR in the environment does the same.
    #[arg(long)]
    plain: bool,
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
    /// Be the client, on whatever provides KVM; the value says who does.
    #[arg(long, hide = true, value_name = "PROVIDER")]
    client: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(provider) = &arguments.client {
        return tour(arguments, provider, &mut kvm::Client::new()?);
    }
    if arguments.core {
        return core_tour(arguments, "--core was given");
    }
    match run::native() {
        Ok(native) => become_client(arguments, &native),
        Err(error) => core_tour(arguments, &format!("{error:#}")),
    }
}

fn core_tour(arguments: &Arguments, why: &str) -> Result<ExitCode> {
    let provider = format!("gmem's model alone, without KVM, because {why}");
    tour(arguments, &provider, &mut core::Model::new())
}

/// Starts this program again as a client, the way `gmem run` starts any program.
fn become_client(arguments: &Arguments, native: &gmem_uapi::native::Native) -> Result<ExitCode> {
    let config = Config::for_host(native, native.profile(), types::parse_mask("default,sw-protected")?, false);
    let path = std::env::current_exe().context("cannot find this program")?;
    program::check(&path)?;
    let mut command = Command::new(&path);
    command.args(["demo", "--client", &provider(native, &config)]);
    command.args(arguments.plain.then_some("--plain")).args(arguments.json.then_some("--json"));
    run::exec(command, &config).with_context(|| format!("cannot execute {}", path.display()))
}

fn provider(native: &gmem_uapi::native::Native, config: &Config) -> String {
    let protected = types::NAMES.iter().position(|name| *name == "sw-protected").unwrap_or_default();
    if config.emulated & 1 << protected == 0 {
        format!("the KVM of Linux {} itself, which has protected VMs", native.release)
    } else {
        format!("gmem, as {}, in front of the KVM of Linux {}", config.profile.name, native.release)
    }
}

fn tour(arguments: &Arguments, provider: &str, machine: &mut dyn Machine) -> Result<ExitCode> {
    let paint = paint(arguments);
    let mut out = std::io::stdout().lock();
    if !arguments.json {
        write!(out, "{}", print::opening(provider, paint))?;
    }
    let steps = tour::take(machine, |step| {
        if !arguments.json {
            write!(out, "{}", print::step(step, paint))?;
            out.flush()?;
        }
        Ok(())
    })?;
    match arguments.json {
        true => writeln!(out, "{}", print::json(provider, &steps)?)?,
        false => write!(out, "{}", print::closing(&steps, paint))?,
    }
    Ok(ExitCode::from(u8::from(steps.iter().any(|step| step.failures() > 0))))
}

fn paint(arguments: &Arguments) -> Paint {
    let refused = arguments.plain || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let able = std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb");
    if able && !refused { Paint::Colour } else { Paint::Plain }
}
