//! The gate: everything that must hold before a change is merged.

use std::env;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, bail};

use crate::kernels::{self, Kernel};
use crate::selftests;
use crate::source::Release;
use crate::sys::{self, Missing, Tool};

/// Run the gate: formatting, lints, documentation, licences, and all tests, also those under real kernels.
///
/// A step that this machine cannot take says what is missing and is left out; with CI set in the environment that is a failure.
/// The tests come last, so that their summary ends the output. The first run downloads and builds kernels: on two
/// processors the reference kernel takes 5 to 15 minutes, and the whole run up to an hour.
#[derive(clap::Args, Debug)]
pub(crate) struct Args {
    /// Leave out everything that needs a real kernel
    #[arg(long)]
    no_vm: bool,
}

/// A step's name and what it does.
type Step = (&'static str, fn() -> Result<()>);

const CHECKS: [Step; 6] =
    [("format", format), ("clippy", clippy), ("doc", doc), ("deny", deny), ("programs", programs), ("miri", miri)];

/// What the tests under real kernels need: made here, in the open, and not in the middle of a test.
const KERNELS: [Step; 5] = [
    ("kernel stock", stock),
    ("kernel ref", reference),
    ("kernel 7.3", newer),
    ("selftests 6.12", selftests_6_12),
    ("selftests 7.3", selftests_7_3),
];

/// The steps that may be left out even where CI is set: cargo-deny takes long to install, and Miri is part of a compiler that
/// is not the one that gmem is built with.
const OPTIONAL: [&str; 2] = ["deny", "miri"];

/// The toolchain whose Miri runs the core's tests: Miri is not part of a stable one.
const MIRI_TOOLCHAIN: &str = "nightly-2026-05-20";

/// The variable that lets the tests under real kernels run: they download and build, which nobody expects of `cargo test`.
const VM_TESTS: &str = "GMEM_VM_TESTS";

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let kernels: &[Step] = if args.no_vm { &[] } else { &KERNELS };
    let strict = env::var_os("CI").is_some();
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for (name, step) in CHECKS.iter().chain(kernels) {
        eprintln!("xtask: == {name}");
        let begin = Instant::now();
        let result = step();
        if result.as_ref().is_err_and(|error| !error.is::<Missing>() || (strict && !OPTIONAL.contains(name))) {
            failed.push(*name);
        }
        lines.push(line(name, begin.elapsed(), &result));
    }
    eprintln!("\n{}\n\nxtask: == tests", lines.join("\n"));
    if let Err(error) = tests(!args.no_vm) {
        eprintln!("xtask: {error:#}");
        failed.push("tests");
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

fn line(name: &str, took: Duration, result: &Result<()>) -> String {
    let word = match result {
        Ok(()) => "ok".to_owned(),
        // The rest of an error may be a page of output that is above already.
        Err(error) => first_line(error),
    };
    format!("{name:16} {:7.1} s  {word}", took.as_secs_f64())
}

fn first_line(error: &Error) -> String {
    let text = format!("{error:#}");
    let word = if error.is::<Missing>() { "left out, " } else { "FAILED: " };
    format!("{word}{}", text.lines().next().unwrap_or_default())
}

fn format() -> Result<()> {
    sys::run(sys::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy() -> Result<()> {
    sys::run(sys::cargo().args([
        "clippy",
        "--quiet",
        "--locked",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))
}

fn doc() -> Result<()> {
    let mut command = sys::cargo();
    sys::run(
        command.args(["doc", "--quiet", "--locked", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"),
    )
}

/// What gmem is made of. Advisories are left out: they need the network, and a new one is not the fault of the change at hand.
fn deny() -> Result<()> {
    if !has("deny") {
        bail!(Missing("cargo-deny (cargo install --locked cargo-deny)".to_owned()));
    }
    sys::run(sys::cargo().args(["deny", "--workspace", "check", "bans", "licenses", "sources"]))
}

/// What each part of the Miri step may take. All of them together take about ten minutes on two processors. A test
/// that makes it longer is to be cut as `gmem-core/src/effort.rs` says.
const MIRI_LIMIT: Duration = Duration::from_secs(1800);

/// Miri uses one processor, whatever the tests' threads: so several of them run, the core's each with a third of its tests' time.
const MIRI_PARTS: [&[&str]; 4] = [
    &["gmem-core", "--lib", "--", "vendor::"],
    &["gmem-core", "--lib", "--", "--skip", "vendor::"],
    &["gmem-core", "--test", "*", "--"],
    &["gmem-host", "--lib", "--", "table::"],
];

/// The core has no unsafe code whose references could break a rule of aliasing, and the table only pointers of `Arc`. To keep
/// track of them is what costs most, and with a node of thousands of atomics it costs minutes.
const MIRI_FLAGS: &str = "-Zmiri-disable-isolation -Zmiri-disable-stacked-borrows";

/// Miri has the processor's instructions for SHA-256, and runs them five times faster than what replaces them.
const MIRI_FEATURES: &str = if cfg!(target_arch = "x86_64") { "-Ctarget-feature=+sha,+sse4.1,+ssse3" } else { "" };

/// The tests of the core and of the table of descriptors under Miri, which finds undefined behaviour and races in what they do,
/// weak memory included. They have less to do than elsewhere, and one that would take too long all the same is ignored by
/// name. A nightly of another day will do where the pinned one is not installed.
fn miri() -> Result<()> {
    let run = |toolchain: &str, args: &[&str]| {
        let mut command = Command::new("cargo");
        // Not the toolchain of the cargo that runs this.
        command.env_remove("RUSTUP_TOOLCHAIN").env("RUSTUP_AUTO_INSTALL", "0");
        command.env("MIRIFLAGS", MIRI_FLAGS).env("RUSTFLAGS", MIRI_FEATURES);
        command.arg(format!("+{toolchain}")).arg("miri").args(args);
        command
    };
    let works = |toolchain: &&str| run(toolchain, &["--version"]).output().is_ok_and(|output| output.status.success());
    let Some(toolchain) = [MIRI_TOOLCHAIN, "nightly"].into_iter().find(works) else {
        let install = "rustup toolchain install MIRI --profile minimal --component miri,rust-src";
        bail!(Missing(format!("Miri ({})", install.replace("MIRI", MIRI_TOOLCHAIN))));
    };
    let tests = ["test", "--quiet", "--locked", "--package"];
    sys::run(run(toolchain, &tests).args(["gmem-core", "--tests", "--package", "gmem-host", "--no-run"]))?;
    let part = |which: &[&str]| sys::run_within(run(toolchain, &tests).args(which), MIRI_LIMIT);
    thread::scope(|scope| {
        let parts = MIRI_PARTS.map(|which| scope.spawn(move || part(which)));
        parts.into_iter().try_for_each(|part| part.join().unwrap_or_else(|_| bail!("a part of the Miri step panicked")))
    })
}

fn programs() -> Result<()> {
    sys::build_release(&["gmem-cli", "gmem-conformance"])?;
    Ok(())
}

fn stock() -> Result<()> {
    sys::need(&[Tool("qemu-system-x86_64", "qemu-system-x86")])?;
    kernels::obtain(Kernel::Stock, None)?;
    Ok(())
}

fn reference() -> Result<()> {
    kernels::obtain(Kernel::Ref, env::var_os("GMEM_REF_KERNEL").as_ref().map(AsRef::as_ref))?;
    Ok(())
}

fn newer() -> Result<()> {
    kernels::obtain(Kernel::V7_3, None)?;
    Ok(())
}

fn selftests_6_12() -> Result<()> {
    selftests::build(Release::V6_12).map(|_| ())
}

fn selftests_7_3() -> Result<()> {
    selftests::build(Release::V7_3).map(|_| ())
}

/// All tests of the workspace, by nextest where it is installed.
fn tests(vm: bool) -> Result<()> {
    let mut command = sys::cargo();
    if vm {
        command.env(VM_TESTS, "1");
    } else {
        command.env_remove(VM_TESTS);
    }
    if has("nextest") {
        return sys::run(command.args(["nextest", "run", "--locked", "--workspace", "--no-fail-fast"]));
    }
    eprintln!("xtask: without cargo-nextest (cargo install --locked cargo-nextest), with cargo test instead");
    sys::run(command.args(["test", "--locked", "--workspace", "--no-fail-fast"]))
}

/// Whether cargo has a subcommand.
fn has(subcommand: &str) -> bool {
    let version = Command::new(format!("cargo-{subcommand}")).args([subcommand, "--version"]).output();
    version.is_ok_and(|output| output.status.success())
}
