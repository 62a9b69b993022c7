//! `gmem measure` against other tools: PyPI's `sev-snp-measure` for SEV, SEV-ES and SEV-SNP, a reading of the TDVF design guide
//! in Python for TDX, and recorded digests for IGVM files.
//!
//! Comparing needs `python3` with `venv`, the Python package index, apt, and Debian's archive, whose unstable suite has the OVMF
//! images for SEV and TDX; without one of them a test says which and passes. Downloads are kept per target directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const VERSION: &str = "sev-snp-measure==0.0.13";
/// OVMF without SEV's place for the hashes of a kernel: Debian 12's own package, which most machines can install.
const PLAIN_IMAGES: [&str; 2] = ["/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Options as the tool's `--mode`, gmem's subcommand, and everything that both understand.
struct Case {
    mode: &'static str,
    subcommand: &'static str,
    options: Vec<String>,
}

fn scratch() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("measure");
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn succeeds(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

/// Held while something is fetched: tests may run in processes of their own.
fn lock() -> fs::File {
    let file = fs::File::create(scratch().join("lock")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    file
}

/// The installed tool, or what is missing.
fn tool() -> Result<PathBuf, &'static str> {
    let _lock = lock();
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

/// An image of a package of Debian unstable, downloaded once, or what is missing. The machine's own apt is left alone.
fn image(package: &str, path: &str) -> Result<PathBuf, String> {
    static LISTS: OnceLock<Result<Vec<String>, String>> = OnceLock::new();
    let _lock = lock();
    let folder = scratch().join(package);
    let image = folder.join(path);
    if image.exists() {
        return Ok(image);
    }
    let options = LISTS.get_or_init(lists).as_ref().map_err(Clone::clone)?;
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    let mut download = Command::new("apt-get");
    download.args(options).args(["-q", "download", package]).current_dir(&folder);
    let deb = || fs::read_dir(&folder).ok()?.filter_map(Result::ok).map(|entry| entry.path()).next();
    let deb = succeeds(&mut download).then(deb).flatten().ok_or(format!("Debian's package {package}"))?;
    if !succeeds(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&folder)) {
        return Err("dpkg-deb".to_owned());
    }
    image.exists().then_some(image).ok_or(format!("{path} in Debian's package {package}"))
}

/// Options that make apt see Debian unstable alone.
fn lists() -> Result<Vec<String>, String> {
    let sites = Command::new("apt-get").args(["indextargets", "--format", "$(SITE)"]).output().map(|done| done.stdout);
    let sites = String::from_utf8_lossy(&sites.unwrap_or_default()).into_owned();
    let mirror = sites.lines().map(|site| site.trim_end_matches('/')).find(|site| site.ends_with("/debian"));
    let mirror = mirror.ok_or("a mirror of Debian among apt's sources")?;
    let folder = scratch().join("apt");
    fs::create_dir_all(folder.join("lists/partial")).unwrap();
    fs::create_dir_all(folder.join("cache/archives/partial")).unwrap();
    let sources = folder.join("sources.list");
    fs::write(&sources, format!("deb [signed-by={KEYRING}] {mirror} sid main\n")).unwrap();
    let options: Vec<String> = [
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={}", folder.join("lists").display()),
        format!("Dir::Cache={}", folder.join("cache").display()),
        "APT::Sandbox::User=root".to_owned(),
        "APT::Update::Error-Mode=any".to_owned(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .collect();
    match succeeds(Command::new("apt-get").args(&options).args(["-qq", "update"])) {
        true => Ok(options),
        false => Err(format!("apt with Debian's package lists (a network, {KEYRING})")),
    }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

/// Kernels and initial RAM disks: sizes around a page, nothing at all, a program of some megabytes, and what the machine itself boots.
fn boot_files() -> Vec<String> {
    let made = [("empty", 0), ("short", 4095), ("long", 4097)].map(|(name, size)| {
        let path = scratch().join(name);
        let bytes: Vec<u8> = (0..size).map(|at: u32| (at % 251).to_le_bytes()[0]).collect();
        let _lock = lock();
        if !path.exists() {
            fs::write(&path, bytes).unwrap();
        }
        path.display().to_string()
    });
    let kernels = fs::read_dir("/boot").into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let kernels = kernels.filter(|path| path.display().to_string().contains("vmlinuz") && fs::File::open(path).is_ok());
    made.into_iter()
        .chain(["/usr/bin/python3".to_owned()])
        .chain(kernels.map(|path| path.display().to_string()))
        .collect()
}

/// A generator of choices; the same ones on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        usize::try_from(self.0 >> 33).unwrap() % bound
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn maybe(&mut self, options: &mut Vec<String>, choices: &[&str]) {
        if self.below(2) == 0 {
            options.extend(words(self.pick(choices)));
        }
    }
}

const CPUS: [&str; 12] = [
    "--vcpu-type EPYC-v4",
    "--vcpu-type EPYC",
    "--vcpu-type EPYC-IBPB",
    "--vcpu-type EPYC-Rome",
    "--vcpu-type EPYC-Milan-v2",
    "--vcpu-type EPYC-Genoa",
    "--vcpu-type EPYC-Turin",
    "--vcpu-sig 0x800f12",
    "--vcpu-sig 10489617",
    "--vcpu-family 25 --vcpu-model 1 --vcpu-stepping 1",
    "--vcpu-family 15 --vcpu-model 107 --vcpu-stepping 2 --vcpu-type EPYC",
    "--vcpu-family 26 --vcpu-model 80 --vcpu-stepping 0 --vcpu-sig 0x1",
];
const LINES: [&str; 4] = ["console=ttyS0", "root=/dev/vda ro quiet", "\u{e4}\u{f6}", ""];

fn case(random: &mut Random, boot_files: &[String], ovmf_hash: &str) -> Case {
    let (mode, subcommand) = random.pick(&[("snp", "snp"), ("snp", "snp"), ("seves", "sev-es"), ("sev", "sev")]);
    let mut options = Vec::new();
    if mode != "sev" {
        options.extend(words(&format!("--vcpus {}", random.pick(&[0, 1, 2, 3, 17, 64]))));
        options.extend(words(random.pick(&CPUS)));
        random.maybe(&mut options, &["--vmm-type QEMU", "--vmm-type ec2", "--vmm-type gce"]);
    }
    if mode == "snp" {
        random.maybe(&mut options, &["--guest-features 0x21", "--guest-features 1", "--guest-features 0x3f"]);
        random.maybe(&mut options, &[&format!("--snp-ovmf-hash {ovmf_hash}")]);
    }
    if random.below(3) != 0 {
        options.extend(["--kernel".to_owned(), boot_files[random.below(boot_files.len())].clone()]);
        if random.below(2) == 0 {
            options.extend(["--initrd".to_owned(), boot_files[random.below(boot_files.len())].clone()]);
        }
        if random.below(2) == 0 {
            options.extend(["--append".to_owned(), random.pick(&LINES).to_owned()]);
        }
    }
    random.maybe(&mut options, &["--output-format base64", "--output-format hex", "--verbose"]);
    Case { mode, subcommand, options }
}

/// What was measured; `None` for a refusal, whose words are each tool's own.
fn measured(output: &Output) -> Option<String> {
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn gmem() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gmem"));
    command.arg("measure");
    command
}

/// Whether both tools measured the case (or both refused it), or what each of them said.
fn compare(tool: &Path, image: &Path, case: &Case) -> Result<bool, String> {
    let run = |command: &mut Command| command.arg("--ovmf").arg(image).args(&case.options).output().unwrap();
    let expected = run(Command::new(tool).args(["--mode", case.mode]));
    let got = run(gmem().arg(case.subcommand));
    if measured(&expected) == measured(&got) {
        return Ok(expected.status.success());
    }
    let (image, mode, options) = (image.display(), case.mode, case.options.join(" "));
    Err(format!("{mode} --ovmf {image} {options}\n  sev-snp-measure: {expected:?}\n  gmem: {got:?}"))
}

/// How many cases were measured; panics with all differences.
fn compare_all(tool: &Path, image: &Path, cases: &[Case]) -> usize {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut values, mut failures) = (0, Vec::new());
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            match compare(tool, image, case) {
                Ok(measured) => values += usize::from(measured),
                Err(failure) => failures.push(failure),
            }
        }
        (values, failures)
    };
    let parts = std::thread::scope(|scope| [(); 2].map(|()| scope.spawn(work)).map(|worker| worker.join().unwrap()));
    let failures: Vec<String> = parts.iter().flat_map(|(_, failures)| failures.clone()).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    parts.iter().map(|(values, _)| values).sum()
}

fn ovmf_hash(image: &Path) -> String {
    let output = gmem().arg("snp-ovmf-hash").arg("--ovmf").arg(image).output().unwrap();
    measured(&output).unwrap_or_else(|| panic!("{output:?}"))
}

fn random_cases(image: &Path, seed: u64, count: usize) -> Vec<Case> {
    let (files, hash) = (boot_files(), ovmf_hash(image));
    let mut random = Random(seed);
    let hash_case = Case { mode: "snp:ovmf-hash", subcommand: "snp-ovmf-hash", options: Vec::new() };
    [hash_case].into_iter().chain((0..count).map(|_| case(&mut random, &files, &hash))).collect()
}

#[test]
fn an_image_with_a_place_for_kernel_hashes_measures_as_sev_snp_measure_says() {
    let tool = match tool() {
        Ok(tool) => tool,
        Err(missing) => return eprintln!("skipped: sev-snp-measure cannot be installed without {missing}"),
    };
    let image = match image("ovmf-amdsev", "usr/share/ovmf/OVMF.amdsev.fd") {
        Ok(image) => image,
        Err(missing) => return eprintln!("skipped: no OVMF image that measures kernels without {missing}"),
    };
    let cases = random_cases(&image, 1, 90);
    let values = compare_all(&tool, &image, &cases);
    eprintln!("{values} of {} cases measured and equal, the others refused by both", cases.len());
    assert_eq!(values, cases.len());
}

#[test]
fn an_image_without_one_measures_or_is_refused_as_sev_snp_measure_does() {
    let Some(image) = PLAIN_IMAGES.iter().map(Path::new).find(|path| path.is_file()) else {
        return eprintln!("skipped: no OVMF image (Debian package ovmf)");
    };
    let tool = match tool() {
        Ok(tool) => tool,
        Err(missing) => return eprintln!("skipped: sev-snp-measure cannot be installed without {missing}"),
    };
    let cases = random_cases(image, 2, 30);
    let values = compare_all(&tool, image, &cases);
    eprintln!("{values} of {} cases measured and equal, the others refused by both", cases.len());
    assert!(values > 5 && values < cases.len());
}

#[test]
fn dumped_save_areas_are_those_of_sev_snp_measure() {
    let Some(image) = PLAIN_IMAGES.iter().map(Path::new).find(|path| path.is_file()) else {
        return eprintln!("skipped: no OVMF image (Debian package ovmf)");
    };
    let tool = match tool() {
        Ok(tool) => tool,
        Err(missing) => return eprintln!("skipped: sev-snp-measure cannot be installed without {missing}"),
    };
    for (mode, subcommand, vmm) in [("snp", "snp", "QEMU"), ("snp", "snp", "ec2"), ("seves", "sev-es", "gce")] {
        let dump = |command: &mut Command, name: &str| {
            let folder = scratch().join(format!("{name}-{mode}-{vmm}"));
            fs::create_dir_all(&folder).unwrap();
            let options = words(&format!("--dump-vmsa --vcpus 2 --vcpu-type EPYC-v4 --vmm-type {vmm}"));
            let output = command.arg("--ovmf").arg(image).args(options).current_dir(&folder).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            ["vmsa0.bin", "vmsa1.bin"].map(|file| fs::read(folder.join(file)).unwrap())
        };
        let expected = dump(Command::new(&tool).args(["--mode", mode]), "expected");
        assert_eq!(dump(gmem().arg(subcommand), "got"), expected, "{mode} {vmm}");
    }
}

/// MRTD as the TDVF design guide (section 11) and the TDX module's base specification (MRTD) describe it, in other words
/// than gmem's. It agrees with tinfoilsh/tdx-measure at 33a85260 on the images of Debian's OVMF 2025.02 and 2026.08.
const MRTD_IN_PYTHON: &str = r#"
import hashlib, struct, sys, uuid
image = open(sys.argv[1], "rb").read()
at = len(image) - 48
assert image[at:at + 16] == uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
at -= 2
while True:
    size, name = struct.unpack("<H16s", image[at - 18:at])
    if name == uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le:
        break
    at -= size
start = len(image) - struct.unpack("<I", image[at - 22:at - 18])[0]
magic, _, version, count = struct.unpack("<4sIII", image[start:start + 16])
assert (magic, version) == (b"TDVF", 1)
digest = hashlib.sha384()
for number in range(count):
    entry = struct.unpack("<IIQQII", image[start + 16 + 32 * number:][:32])
    offset, raw_size, address, size, _, flags = entry
    data = image[offset:offset + raw_size].ljust(size, b"\0")
    for page in range(0, 0 if flags & 2 else size, 4096):
        digest.update(struct.pack("<16sQ104x", b"MEM.PAGE.ADD", address + page))
        for chunk in range(page, page + 4096 if flags & 1 else page, 256):
            digest.update(struct.pack("<16sQ104x", b"MR.EXTEND", address + chunk) + data[chunk:chunk + 256])
print(digest.hexdigest())
"#;

#[test]
fn images_for_tdx_measure_as_a_second_implementation_says() {
    if !succeeds(Command::new("python3").args(["-c", ""])) {
        return eprintln!("skipped: no python3");
    }
    let found = [
        image("ovmf-inteltdx", "usr/share/ovmf/OVMF.inteltdx.ms.fd"),
        image("ovmf-amdsev", "usr/share/ovmf/OVMF.amdsev.fd"),
    ];
    for image in found {
        let image = match image {
            Ok(image) => image,
            Err(missing) => return eprintln!("skipped: no OVMF image for TDX without {missing}"),
        };
        let expected = Command::new("python3").args(["-c", MRTD_IN_PYTHON]).arg(&image).output().unwrap();
        let got = gmem().arg("tdx").arg("--tdvf").arg(&image).output().unwrap();
        assert!(expected.status.success(), "{expected:?}");
        assert_eq!(measured(&got), measured(&expected), "{}: {got:?}", image.display());
    }
}

#[test]
fn igvm_files_measure_as_other_tools_recorded() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/igvm");
    let digests = fs::read_to_string(folder.join("digests.txt")).unwrap();
    let lines = digests.lines().filter(|line| !line.starts_with('#'));
    let mut count = 0;
    for line in lines {
        let words = words(line);
        let [file, arguments @ .., digest] = words.as_slice() else { panic!("{line}") };
        let output = gmem().args(arguments).arg("--igvm").arg(folder.join(file)).output().unwrap();
        assert_eq!(measured(&output).as_ref(), Some(digest), "{line}: {output:?}");
        count += 1;
    }
    assert_eq!(count, 13);
}
