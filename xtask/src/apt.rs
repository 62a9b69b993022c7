//! Debian packages, by way of apt: it knows the nearest mirror and checks signatures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sys::{self, Missing, Tool};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt's own user can write neither the cache nor a temporary folder; without this it warns and goes on.
const AS_CALLER: &str = "APT::Sandbox::User=root";

/// A mirror that lags has package lists past their date. They are signed all the same, and what they name is run in a machine of its
/// own: an old kernel for tests is better than none.
const OLD_LISTS_TOO: &str = "Acquire::Check-Valid-Until=false";

/// A view of Debian's archive.
#[derive(Debug)]
pub(crate) struct Apt {
    options: Vec<String>,
}

impl Apt {
    /// What this machine is configured for.
    pub(crate) fn host() -> Result<Self> {
        sys::need(&[Tool("apt-get", "apt"), Tool("dpkg-deb", "dpkg")])?;
        Ok(Self { options: vec![AS_CALLER.to_owned()] })
    }

    /// One suite alone, with lists of its own in `folder`; the machine's configuration and lists stay as they are.
    pub(crate) fn suite(suite: &str, folder: &Path) -> Result<Self> {
        sys::need(&[Tool("apt-get", "apt"), Tool("dpkg-deb", "dpkg")])?;
        if !Path::new(KEYRING).exists() {
            bail!(Missing(format!("{KEYRING} (apt-get install debian-archive-keyring)")));
        }
        let (lists, cache) = (folder.join("lists"), folder.join("cache"));
        fs::create_dir_all(lists.join("partial"))?;
        fs::create_dir_all(cache.join("archives/partial"))?;
        let sources = folder.join("sources.list");
        fs::write(&sources, format!("deb [signed-by={KEYRING}] {} {suite} main\n", mirror()?))?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", cache.display()),
            AS_CALLER.to_owned(),
            OLD_LISTS_TOO.to_owned(),
        ];
        let apt = Self { options: options.into() };
        eprintln!("xtask: reading the package lists of Debian {suite}");
        sys::run(apt.command("apt-get").args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"])).map_err(
            |error| Missing(format!("the package lists of Debian {suite}: is there a network? ({error:#})")),
        )?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The names of the packages that a regular expression matches.
    pub(crate) fn names(&self, pattern: &str) -> Result<Vec<String>> {
        let listing = sys::output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
        Ok(listing.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    }

    /// Downloads a package into `folder` and says how much that was.
    pub(crate) fn download(&self, package: &str, folder: &Path) -> Result<PathBuf> {
        let size = self.size(package).map_or_else(|_| "unknown size".to_owned(), sys::mebibytes);
        eprintln!("xtask: downloading {package} ({size}), once");
        let before = debs(folder)?;
        sys::run(self.command("apt-get").args(["-q", "download", package]).current_dir(folder))
            .map_err(|error| Missing(format!("the Debian package {package}: is there a network? ({error:#})")))?;
        let new = debs(folder)?.into_iter().find(|file| !before.contains(file));
        new.with_context(|| format!("apt-get downloaded {package} to an unexpected place"))
    }

    fn size(&self, package: &str) -> Result<u64> {
        let record = sys::output(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        let size = record.lines().find_map(|line| line.strip_prefix("Size: "));
        Ok(size.context("no size")?.trim().parse()?)
    }
}

/// The mirror that this machine uses for Debian.
fn mirror() -> Result<String> {
    let sites = sys::output(Command::new("apt-get").args(["indextargets", "--format", "$(SITE)"])).unwrap_or_default();
    let own = sites.lines().map(|site| site.trim_end_matches('/')).find(|site| site.ends_with("/debian"));
    own.map(str::to_owned).ok_or_else(|| Missing("a mirror of Debian among apt's sources".to_owned()).into())
}

fn debs(folder: &Path) -> Result<Vec<PathBuf>> {
    let files = fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(files.into_iter().map(|file| file.path()).filter(|path| path.extension().is_some_and(|e| e == "deb")).collect())
}

/// Unpacks from a package the files that any of the patterns matches, then forgets the package.
pub(crate) fn extract(package: &Path, patterns: &[String], folder: &Path) -> Result<()> {
    let mut archive =
        Command::new("dpkg-deb").arg("--fsys-tarfile").arg(package).stdout(std::process::Stdio::piped()).spawn()?;
    let stdin = archive.stdout.take().context("no pipe")?;
    // tar's status is of no use: a pattern that nothing matches counts as an error, and modules may be built in.
    Command::new("tar")
        .args(["--extract", "--wildcards", "--directory"])
        .arg(folder)
        .args(patterns)
        .stdin(stdin)
        .stderr(std::process::Stdio::null())
        .status()
        .context("starting tar")?;
    let status = archive.wait()?;
    if !status.success() {
        bail!("dpkg-deb cannot read {}: {status}", package.display());
    }
    fs::remove_file(package)?;
    Ok(())
}
