//! One VM for the whole life of a guest: what its kernel patches when the first VM comes or the last one goes is then patched
//! while nothing else runs.
//!
//! The kernel switches static keys by writing instructions that run at that moment (`preempt_notifier_key`, used in
//! `__schedule`, and `kvm_has_noapic_vcpu`). With several processors QEMU's software emulation may execute the
//! breakpoint of such a change after the kernel has forgotten it: "Oops: int3", and the guest is dead.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// Run a command while a VM with a vCPU exists; without a usable /dev/kvm, just run it.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    // The descriptors are closed in the child.
    online("0");
    let held = hold();
    online("1");
    let (program, arguments) = args.command.split_first().context("no command")?;
    let status =
        Command::new(program).args(arguments).status().with_context(|| format!("starting {}", program.display()))?;
    drop(held);
    Ok(ExitCode::from(u8::try_from(crate::under::code(status)).unwrap_or(u8::MAX)))
}

/// Switches all processors but the first, whose idle tasks run through the patched code as well. Best effort: without, the guest
/// may die and is started again.
fn online(state: &str) {
    for number in 1..=u8::MAX {
        let file = format!("/sys/devices/system/cpu/cpu{number}/online");
        if !Path::new(&file).exists() {
            break;
        }
        if let Err(error) = fs::write(&file, state) {
            eprintln!("xtask: {file}: {error}");
        }
    }
}

/// The vCPU has no local APIC, for that is what the second key counts.
fn hold() -> Option<(VmFd, VcpuFd)> {
    let vm = Kvm::new().ok()?.create_vm().ok()?;
    let vcpu = vm.create_vcpu(0).ok()?;
    Some((vm, vcpu))
}
