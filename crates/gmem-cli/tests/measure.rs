//! `gmem measure` against PyPI's `sev-snp-measure` on Debian's OVMF images.
//!
//! Needs `python3` with `venv`, the Python package index, and the package `ovmf`; without one of them the test says which
//! and passes. The tool is installed once per target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

const VERSION: &str = "sev-snp-measure==0.0.13";
const IMAGE_FOLDERS: [&str; 2] = ["/usr/share/ovmf", "/usr/share/OVMF"];
/// Images for SEV come first: they are the ones that measure what they boot directly.
const IMAGES: [&str; 4] = ["OVMF.amdsev.fd", "OVMF_CODE_4M.fd", "OVMF.fd", "OVMF_CODE.fd"];
/// Enough to be sure, and few enough for a minute of starting Python.
const MOST_IMAGES: usize = 2;

/// The tool's name of a mode, gmem's name of it, and options other than the image.
type Case = (&'static str, &'static str, Vec<String>);

fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("measure")
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// The installed tool, or what is missing.
fn tool() -> Result<PathBuf, &'static str> {
    let venv = scratch().join("venv");
    let tool = venv.join("bin/sev-snp-measure");
    if tool.exists() {
        return Ok(tool);
    }
    if !succeeds(Command::new("python3").args(["-m", "venv"]).arg(&venv)) {
        return Err("python3-venv");
    }
    let pip = venv.join("bin/pip");
    if !succeeds(Command::new(pip).args(["install", "--quiet", "--disable-pip-version-check", VERSION])) {
        return Err("the Python package index");
    }
    Ok(tool)
}

fn images() -> Vec<PathBuf> {
    let paths = IMAGES.iter().flat_map(|name| IMAGE_FOLDERS.iter().map(move |folder| Path::new(folder).join(name)));
    paths.filter(|path| path.is_file()).take(MOST_IMAGES).collect()
}

/// Files to boot directly, of sizes around a page.
fn boot_files() -> (String, String) {
    let (kernel, initrd) = (scratch().join("kernel"), scratch().join("initrd"));
    fs::write(&kernel, [0x5a; 4097]).unwrap();
    fs::write(&initrd, [0xa5; 4095]).unwrap();
    (kernel.display().to_string(), initrd.display().to_string())
}

fn cases() -> Vec<Case> {
    let (kernel, initrd) = boot_files();
    let boots = [
        format!("--kernel {kernel}"),
        format!("--kernel {kernel} --initrd {initrd}"),
        format!("--kernel {kernel} --append console=ttyS0"),
        format!("--kernel {kernel} --initrd {initrd} --append root=/dev/vda"),
    ];
    let snp = [
        "--vcpus 1 --vcpu-type EPYC-v4",
        "--vcpus 2 --vcpu-type EPYC-Milan",
        "--vcpus 17 --vcpu-type EPYC-Genoa",
        "--vcpus 2 --vcpu-type EPYC-Turin --guest-features 0x21",
        "--vcpus 3 --vcpu-sig 0x800f12",
        "--vcpus 2 --vcpu-family 25 --vcpu-model 1 --vcpu-stepping 1",
        "--vcpus 2 --vcpu-type EPYC-v4 --vmm-type ec2",
        "--vcpus 2 --vcpu-type EPYC-v4 --vmm-type gce",
    ];
    let es = ["--vcpus 1 --vcpu-type EPYC-v4", "--vcpus 5 --vcpu-type EPYC-Rome"];
    let words = |line: &str| line.split(' ').map(String::from).collect::<Vec<_>>();
    let mut cases = vec![("snp:ovmf-hash", "snp-ovmf-hash", Vec::new()), ("sev", "sev", Vec::new())];
    cases.extend(snp.map(|line| ("snp", "snp", words(line))));
    cases.extend(es.map(|line| ("seves", "sev-es", words(line))));
    for boot in &boots {
        cases.push(("snp", "snp", words(&format!("{} {boot}", snp[1]))));
        cases.push(("seves", "sev-es", words(&format!("{} {boot}", es[0]))));
        cases.push(("sev", "sev", words(boot)));
    }
    cases
}

/// What was measured; `None` for a refusal, whose words are each tool's own.
fn measured(output: &Output) -> Option<String> {
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether both tools measured the case (or both refused it), or what each of them said.
fn compare(tool: &Path, image: &Path, (mode, subcommand, options): &Case) -> Result<bool, String> {
    let run = |command: &mut Command| command.arg("--ovmf").arg(image).args(options).output().unwrap();
    let expected = run(Command::new(tool).args(["--mode", mode]));
    let got = run(Command::new(env!("CARGO_BIN_EXE_gmem")).args(["measure", subcommand]));
    if measured(&expected) == measured(&got) {
        return Ok(expected.status.success());
    }
    let image = image.display();
    Err(format!("{mode} {image} {options:?}\n  sev-snp-measure: {expected:?}\n  gmem: {got:?}"))
}

/// How many cases were measured, and the differences.
fn compare_all(tool: &Path, jobs: &[(&PathBuf, &Case)]) -> (usize, Vec<String>) {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut values, mut failures) = (0, Vec::new());
        while let Some((image, case)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            match compare(tool, image, case) {
                Ok(measured) => values += usize::from(measured),
                Err(failure) => failures.push(failure),
            }
        }
        (values, failures)
    };
    std::thread::scope(|scope| {
        let workers = [(); 2].map(|()| scope.spawn(work)).map(|worker| worker.join().unwrap());
        (
            workers.iter().map(|(values, _)| values).sum(),
            workers.into_iter().flat_map(|(_, failures)| failures).collect(),
        )
    })
}

#[test]
fn measurements_equal_those_of_sev_snp_measure() {
    fs::create_dir_all(scratch()).unwrap();
    let images = images();
    if images.is_empty() {
        return eprintln!("skipped: no OVMF image (Debian package ovmf)");
    }
    let tool = match tool() {
        Ok(tool) => tool,
        Err(missing) => return eprintln!("skipped: sev-snp-measure cannot be installed without {missing}"),
    };
    let cases = cases();
    let jobs: Vec<_> = images.iter().flat_map(|image| cases.iter().map(move |case| (image, case))).collect();
    let (values, failures) = compare_all(&tool, &jobs);
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // Images that are not built for SEV refuse direct boot in both tools; everything else is a value.
    eprintln!("{values} of {} cases measured and equal, the others refused by both", jobs.len());
    assert!(values * 3 > jobs.len());
}
