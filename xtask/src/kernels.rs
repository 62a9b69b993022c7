//! The real kernels: two as Debian ships them, one built as the reference for private memory.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::apt::{self, Apt};
use crate::source::{self, Release};
use crate::sys::{self, Missing, Tool};

/// A kernel that a command can run under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Debian's 6.12 as it is shipped, without SW_PROTECTED_VM: what most users have.
    Stock,
    /// The same 6.12 with SW_PROTECTED_VM, built once from Debian's source: the truth about private memory.
    Ref,
    /// Debian experimental's 7.3: the truth about the newer file and memslot behaviour.
    #[value(name = "7.3")]
    V7_3,
}

impl Kernel {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Ref => "ref",
            Self::V7_3 => "7.3",
        }
    }

    /// The release whose selftests belong to it.
    pub(crate) fn release(self) -> Release {
        match self {
            Self::Stock | Self::Ref => Release::V6_12,
            Self::V7_3 => Release::V7_3,
        }
    }
}

/// What QEMU boots.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) vmlinuz: PathBuf,
    /// Uncompressed modules in load order; none where they are built in.
    pub(crate) modules: Vec<PathBuf>,
}

/// Modules for the host's files and for KVM, each after those that it needs.
const MODULES: [&str; 8] = ["netfs", "9pnet", "9pnet_virtio", "9p", "irqbypass", "ccp", "kvm", "kvm-amd"];

/// The options of the reference kernel, on top of `make tinyconfig`.
const REF_CONFIG: &str = "xtask/kernels/ref.config";

/// Finds a kernel in the cache, or downloads or builds it. `prebuilt` stands in for the reference kernel.
pub(crate) fn obtain(kernel: Kernel, prebuilt: Option<&Path>) -> Result<Image> {
    match (kernel, prebuilt) {
        (Kernel::Ref, Some(path)) if !path.is_file() => bail!(Missing(format!("the kernel image {}", path.display()))),
        (Kernel::Ref, Some(path)) => Ok(Image { vmlinuz: path.to_path_buf(), modules: Vec::new() }),
        (Kernel::Ref, None) => image(&build_ref()?),
        (Kernel::Stock | Kernel::V7_3, _) => {
            image(&sys::cached(&format!("kernel-{}", kernel.name()), |f| download(kernel, f))?)
        }
    }
}

/// A cached kernel folder: `vmlinuz`, and modules whose names sort in load order.
fn image(folder: &Path) -> Result<Image> {
    let mut modules = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "ko") {
            modules.push(path);
        }
    }
    modules.sort();
    Ok(Image { vmlinuz: folder.join("vmlinuz"), modules })
}

fn download(kernel: Kernel, folder: &Path) -> Result<()> {
    sys::need(&[Tool("tar", "tar"), Tool("xz", "xz-utils")])?;
    let lists = tempfile::tempdir()?;
    let apt = if kernel == Kernel::Stock { Apt::host()? } else { Apt::suite(kernel.release().suite(), lists.path())? };
    let (apt, packages) = match (packages(kernel, &apt)?, kernel) {
        (none, Kernel::Stock) if none.is_empty() => {
            let apt = Apt::suite(kernel.release().suite(), lists.path())?;
            let packages = packages(kernel, &apt)?;
            (apt, packages)
        }
        (packages, _) => (apt, packages),
    };
    if packages.is_empty() {
        bail!(Missing(format!(
            "a Debian package of the {} kernel in the package lists (apt-get update?)",
            kernel.name()
        )));
    }
    let unpacked = folder.join("unpacked");
    fs::create_dir(&unpacked)?;
    let mut patterns: Vec<String> = MODULES.iter().map(|module| format!("*/{module}.ko*")).collect();
    patterns.push("*/vmlinuz*".to_owned());
    for package in &packages {
        apt::extract(&apt.download(package, folder)?, &patterns, &unpacked)?;
    }
    fs::write(folder.join("packages"), packages.join("\n"))?;
    keep(&unpacked, folder)?;
    Ok(fs::remove_dir_all(unpacked)?)
}

fn packages(kernel: Kernel, apt: &Apt) -> Result<Vec<String>> {
    match kernel {
        Kernel::V7_3 => apt.names("^linux-(binary|modules)-7\\.3-amd64$"),
        Kernel::Stock | Kernel::Ref => {
            let names = apt.names(r"^linux-image-6\.12\.[0-9]+.*[0-9]-amd64$")?;
            let newest = names.into_iter().max_by_key(|name| numbers(name));
            Ok(newest.into_iter().collect())
        }
    }
}

/// The numbers in a name, in order: what versions are compared by.
fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Takes the kernel and its modules out of unpacked packages.
fn keep(unpacked: &Path, folder: &Path) -> Result<()> {
    let mut files = Vec::new();
    walk(unpacked, &mut files)?;
    let find = |stem: &str| {
        let prefix = format!("{stem}.ko");
        files.iter().find(|file| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
    };
    let is_kernel =
        |file: &&PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"));
    let kernel = files.iter().find(is_kernel).context("the package has no vmlinuz")?;
    fs::copy(kernel, folder.join("vmlinuz"))?;
    for (order, module) in MODULES.iter().enumerate() {
        if let Some(file) = find(module) {
            let bytes = decompressed(file)?;
            fs::write(folder.join(format!("{order}-{module}.ko")), bytes)?;
        }
    }
    Ok(())
}

fn decompressed(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).with_context(|| format!("reading {}", file.display())),
    };
    let output = Command::new(program).arg("-dc").arg(file).output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot read {}: {}", file.display(), output.status);
    }
    Ok(output.stdout)
}

/// All regular files below a folder.
pub(crate) fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            walk(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Builds the reference kernel; its folder. A change of the configuration makes another kernel.
fn build_ref() -> Result<PathBuf> {
    let config =
        fs::read_to_string(sys::repository().join(REF_CONFIG)).with_context(|| format!("reading {REF_CONFIG}"))?;
    let name = format!("kernel-ref-{:08x}", fnv1a(config.as_bytes()));
    sys::cached(&name, |folder| {
        sys::need(&BUILD_TOOLS)?;
        need_headers(&[("/usr/include/libelf.h", "libelf-dev"), ("/usr/include/openssl/ssl.h", "libssl-dev")])?;
        let tree = source::tree(Release::V6_12)?;
        let build = folder.join("build");
        fs::create_dir(&build)?;
        compile_ref(&tree, &build, &config)?;
        fs::copy(build.join("arch/x86/boot/bzImage"), folder.join("vmlinuz"))?;
        fs::copy(build.join(".config"), folder.join("config"))?;
        Ok(fs::remove_dir_all(build)?)
    })
}

/// What building a kernel or its selftests takes.
pub(crate) const BUILD_TOOLS: [Tool; 7] = [
    Tool("gcc", "gcc"),
    Tool("make", "make"),
    Tool("flex", "flex"),
    Tool("bison", "bison"),
    Tool("bc", "bc"),
    Tool("perl", "perl"),
    Tool("rsync", "rsync"),
];

/// That these files, each with the package that has it, are there.
pub(crate) fn need_headers(headers: &[(&str, &str)]) -> Result<()> {
    let absent: Vec<&str> =
        headers.iter().filter(|(file, _)| !Path::new(file).exists()).map(|(_, package)| *package).collect();
    if !absent.is_empty() {
        bail!(Missing(format!("headers to build with (apt-get install {})", absent.join(" "))));
    }
    Ok(())
}

fn compile_ref(tree: &Path, build: &Path, config: &str) -> Result<()> {
    let begin = Instant::now();
    let log = build.join("log");
    let make = |goal: &str| source::make(tree, &[format!("O={}", build.display()), goal.to_owned()], &log);
    make("tinyconfig")?;
    let mut merged = fs::read_to_string(build.join(".config"))?;
    merged.push_str(config);
    fs::write(build.join(".config"), merged)?;
    make("olddefconfig")?;
    accepted(config, &fs::read_to_string(build.join(".config"))?)?;
    eprintln!("xtask: building the reference kernel, once: about 1,950 steps, 5 to 15 minutes on two processors");
    let progress = Progress::watch(&log, 1950);
    let result = make("bzImage");
    progress.stop();
    result?;
    eprintln!("xtask: the reference kernel is built; that took {} s", begin.elapsed().as_secs());
    Ok(())
}

/// Checks that the kernel's configuration kept every option of the fragment.
fn accepted(fragment: &str, config: &str) -> Result<()> {
    let refused: Vec<&str> = fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !config.lines().any(|other| other == *line))
        .collect();
    if !refused.is_empty() {
        bail!("the kernel's configuration does not accept {}: {REF_CONFIG} is not for this source", refused.join(", "));
    }
    Ok(())
}

/// Says from time to time how far a build is, by the lines of its log.
struct Progress {
    done: std::sync::mpsc::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl Progress {
    fn watch(log: &Path, steps: usize) -> Self {
        let (done, finished) = std::sync::mpsc::channel();
        let log = log.to_path_buf();
        let thread = std::thread::spawn(move || {
            while finished
                .recv_timeout(std::time::Duration::from_secs(30))
                .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
            {
                eprintln!("xtask: {} of about {steps} steps", lines(&log).unwrap_or(0));
            }
        });
        Self { done, thread }
    }

    fn stop(self) {
        drop(self.done);
        // The thread only prints; were it to fail, the build is still what counts.
        let _ = self.thread.join();
    }
}

fn lines(log: &Path) -> Result<usize> {
    let mut text = Vec::new();
    fs::File::open(log)?.read_to_end(&mut text)?;
    Ok(text.iter().filter(|byte| **byte == b'\n').count())
}

/// FNV-1a: tells two configurations apart; no attacker is about.
fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_number() {
        let newest = ["linux-image-6.12.9+deb13-amd64", "linux-image-6.12.117+deb13-amd64"]
            .into_iter()
            .max_by_key(|n| numbers(n));
        assert_eq!(newest, Some("linux-image-6.12.117+deb13-amd64"));
    }

    #[test]
    fn an_option_that_the_kernel_drops_is_named() {
        let error = accepted("CONFIG_A=y\n# why\nCONFIG_B=y\n", "CONFIG_A=y\n").unwrap_err().to_string();
        assert!(error.contains("CONFIG_B=y") && !error.contains("CONFIG_A"), "{error}");
    }
}
