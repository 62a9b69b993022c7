//! The kernel's source, from Debian's source packages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt::{self, Apt};
use crate::sys::{self, Tool};

/// A kernel release whose source is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Release {
    /// Debian's stable kernel; what `stock` and `ref` run.
    #[value(name = "6.12")]
    V6_12,
    /// Debian experimental's kernel.
    #[value(name = "7.3")]
    V7_3,
}

impl Release {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V7_3 => "7.3",
        }
    }

    /// The suite that has it where the machine's own configuration has not.
    pub(crate) fn suite(self) -> &'static str {
        match self {
            Self::V6_12 => "trixie",
            Self::V7_3 => "experimental",
        }
    }
}

/// The unpacked source tree, which stays clean: builds go elsewhere. About 1.7 GiB.
pub(crate) fn tree(release: Release) -> Result<PathBuf> {
    sys::need(&[Tool("tar", "tar"), Tool("xz", "xz-utils")])?;
    sys::cached(&format!("linux-{}", release.name()), |folder| {
        let archive = archive(release, folder)?;
        eprintln!("xtask: unpacking {} into {}", archive.display(), folder.display());
        sys::run(Command::new("tar").args(["--strip-components=1", "-xf"]).arg(&archive).arg("-C").arg(folder))?;
        if archive.starts_with(folder) {
            fs::remove_dir_all(folder.join("usr/src"))?;
        }
        Ok(())
    })
}

/// The package's archive: the installed one, or a download.
fn archive(release: Release, folder: &Path) -> Result<PathBuf> {
    let package = format!("linux-source-{}", release.name());
    let file = format!("usr/src/{package}.tar.xz");
    let installed = Path::new("/").join(&file);
    if installed.exists() {
        return Ok(installed);
    }
    let host = Apt::host()?;
    let lists = tempfile::tempdir()?;
    let known = host.names(&format!("^{}$", package.replace('.', r"\.")))?;
    let apt = if known.is_empty() { Apt::suite(release.suite(), lists.path())? } else { host };
    let deb = apt.download(&package, folder)?;
    apt::extract(&deb, &[format!("./{file}")], folder)?;
    let unpacked = folder.join(&file);
    if !unpacked.exists() {
        bail!("{package} has no {file}");
    }
    Ok(unpacked)
}

/// `make` in a source tree with its output elsewhere; its own messages go to `log`, whose end is shown when it fails.
pub(crate) fn make(tree: &Path, arguments: &[String], log: &Path) -> Result<()> {
    let output = fs::File::options().create(true).append(true).open(log).context("opening the build log")?;
    let mut command = Command::new("make");
    command.arg("-C").arg(tree).arg(format!("-j{}", sys::processors())).args(arguments);
    let status = command.stdout(output.try_clone()?).stderr(output).status().context("starting make")?;
    if !status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines.len().saturating_sub(20);
        bail!("make {} failed; the end of {}:\n{}", arguments.join(" "), log.display(), lines[end..].join("\n"));
    }
    Ok(())
}
