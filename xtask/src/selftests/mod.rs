//! The kernel's own KVM selftests: build them, run them natively and under gmem, compare.

mod compare;
mod run;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::kernels::{self, BUILD_TOOLS};
use crate::source::{self, Release};
use crate::sys;

/// Build the kernel's KVM selftests from Debian's source package; run them; compare native with gmem.
///
/// Without a command: builds them once and prints the folder that they are in.
#[derive(clap::Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
    cargo xtask selftests\n  \
    cargo xtask selftests --release 7.3 --out target/selftests-7.3\n  \
    cargo xtask selftests run --under native,gmem"
)]
pub(crate) struct Args {
    #[command(subcommand)]
    step: Option<Step>,
    /// The kernel release whose selftests are built
    #[arg(long, value_enum, default_value = "6.12")]
    release: Release,
    /// Copy the programs to this folder as well
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

#[derive(clap::Subcommand, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one, at start")]
enum Step {
    Run(run::Args),
    Compare(compare::Args),
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.step {
        Some(Step::Run(args)) => run::run(args),
        Some(Step::Compare(args)) => compare::run(args),
        None => {
            let folder = build(args.release)?;
            if let Some(out) = &args.out {
                copy(&folder, out)?;
            }
            println!("{}", args.out.as_ref().unwrap_or(&folder).display());
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Builds the selftests of a release, once; the folder that they are in.
pub(crate) fn build(release: Release) -> Result<PathBuf> {
    sys::cached(&format!("selftests-{}", release.name()), |folder| {
        sys::need(&BUILD_TOOLS)?;
        if release == Release::V7_3 {
            // Their library for VFIO, which those of KVM are linked with, names devices by it.
            kernels::need_headers(&[("/usr/include/uuid/uuid.h", "uuid-dev")])?;
        }
        let tree = source::tree(release)?;
        let begin = Instant::now();
        eprintln!("xtask: building the KVM selftests of {}, once", release.name());
        compile(&tree, folder)?;
        eprintln!("xtask: {} selftests; that took {} s", programs(folder)?.len(), begin.elapsed().as_secs());
        Ok(())
    })
}

fn compile(tree: &Path, folder: &Path) -> Result<()> {
    let headers = folder.join("headers");
    let log = folder.join("log");
    fs::create_dir(&headers)?;
    let build = format!("O={}", headers.display());
    source::make(tree, &[build, "headers_install".into(), format!("INSTALL_HDR_PATH={}", headers.display())], &log)?;
    let arguments = [
        format!("OUTPUT={}", folder.display()),
        format!("LINUX_HDR_PATH={}/include/", headers.display()),
        format!("KHDR_INCLUDES=-isystem {}/include", headers.display()),
    ];
    source::make(&tree.join("tools/testing/selftests/kvm"), &arguments, &log)?;
    Ok(fs::remove_dir_all(headers)?)
}

/// The test programs below a folder, by their names relative to it, sorted.
pub(crate) fn programs(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    kernels::walk(folder, &mut files)?;
    let mut names = Vec::new();
    for file in files {
        let executable = fs::metadata(&file)?.permissions().mode() & 0o111 != 0;
        if executable && file.extension().is_none_or(|extension| extension != "o") {
            let name = file.strip_prefix(folder).context("a file outside of its folder")?;
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn copy(folder: &Path, out: &Path) -> Result<()> {
    for name in programs(folder)? {
        let target = out.join(&name);
        fs::create_dir_all(target.parent().unwrap_or(out))?;
        fs::copy(folder.join(&name), &target).with_context(|| format!("writing {}", target.display()))?;
    }
    Ok(())
}
