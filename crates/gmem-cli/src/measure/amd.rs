//! `gmem measure snp`, `snp-ovmf-hash`, `snp-svsm`, `sev` and `sev-es`.
//!
//! Options have the names and the meaning that PyPI's `sev-snp-measure` gives them; its `--mode` is the subcommand here.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine as _;
use clap::{Args, ValueEnum};
use gmem_core::measure::launch::{
    LaunchError, Part, SevGuest, SevStep, SnpGuest, SnpStep, SvsmGuest, firmware_digest, svsm_end,
};
use gmem_core::measure::ovmf::{BootHashes, Ovmf, OvmfError, SectionKind};
use gmem_core::measure::vmsa::{VCPU_TYPES, VcpuReset, Vmm, reset_pages, signature, svsm_page};
use serde_json::{Value, json};

/// How to print a measurement.
#[derive(Args, Debug)]
pub(crate) struct OutputArgs {
    /// Form of the measurement.
    #[arg(long, value_enum, default_value_t)]
    output_format: Format,
    /// Print a sentence around the measurement.
    #[arg(short, long)]
    verbose: bool,
    /// Print an object; with --explain it has the steps.
    #[arg(long)]
    json: bool,
    /// Print every page or load with the digest after it, then the measurement.
    #[arg(long)]
    explain: bool,
}

/// Encodings of a measurement.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Format {
    #[default]
    Hex,
    Base64,
}

/// The firmware and what it boots directly.
#[derive(Args, Debug)]
pub(crate) struct ImageArgs {
    /// OVMF image.
    #[arg(long, value_name = "PATH")]
    ovmf: PathBuf,
    /// Kernel for direct boot.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "CMDLINE", requires = "kernel")]
    append: Option<String>,
}

/// The vCPUs.
#[derive(Args, Debug)]
pub(crate) struct VcpuArgs {
    /// Number of vCPUs.
    #[arg(long, value_name = "N")]
    vcpus: u32,
    /// QEMU's name of the vCPU model.
    #[arg(long, value_name = "CPUTYPE", value_parser = VCPU_TYPES.map(|(name, _)| name))]
    vcpu_type: Option<String>,
    /// CPUID signature of the vCPU; goes before --vcpu-type.
    #[arg(long, value_name = "VALUE", value_parser = parse_number)]
    vcpu_sig: Option<u64>,
    /// Family of the vCPU; goes before --vcpu-sig, and needs model and stepping.
    #[arg(long, value_name = "FAMILY", requires_all = ["vcpu_model", "vcpu_stepping"])]
    vcpu_family: Option<u32>,
    /// Model of the vCPU.
    #[arg(long, value_name = "MODEL")]
    vcpu_model: Option<u32>,
    /// Stepping of the vCPU.
    #[arg(long, value_name = "STEPPING")]
    vcpu_stepping: Option<u32>,
    /// Write the measured save areas to `vmsa0.bin`, `vmsa1.bin` and so on.
    #[arg(long)]
    dump_vmsa: bool,
}

/// VMMs that reset vCPUs differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum VmmType {
    #[default]
    #[value(name = "QEMU", alias = "qemu")]
    Qemu,
    #[value(name = "ec2", alias = "EC2")]
    Ec2,
    #[value(name = "gce", alias = "GCE")]
    Gce,
}

impl From<VmmType> for Vmm {
    fn from(vmm: VmmType) -> Self {
        match vmm {
            VmmType::Qemu => Self::Qemu,
            VmmType::Ec2 => Self::Ec2,
            VmmType::Gce => Self::Gce,
        }
    }
}

/// `gmem measure snp`.
#[derive(Args, Debug)]
pub(crate) struct SnpArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    vcpu: VcpuArgs,
    /// Who runs the guest.
    #[arg(long, value_enum, default_value_t)]
    vmm_type: VmmType,
    /// SEV_FEATURES of the vCPUs.
    #[arg(long, value_name = "VALUE", default_value = "0x1", value_parser = parse_number)]
    guest_features: u64,
    /// Digest of the OVMF image from `snp-ovmf-hash`, used instead of its bytes.
    #[arg(long, value_name = "HASH", value_parser = parse_digest)]
    snp_ovmf_hash: Option<[u8; 48]>,
    #[command(flatten)]
    output: OutputArgs,
}

/// `gmem measure snp-ovmf-hash`.
#[derive(Args, Debug)]
pub(crate) struct OvmfHashArgs {
    /// OVMF image.
    #[arg(long, value_name = "PATH")]
    ovmf: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// `gmem measure snp-svsm`.
#[derive(Args, Debug)]
pub(crate) struct SvsmArgs {
    /// OVMF image.
    #[arg(long, value_name = "PATH")]
    ovmf: PathBuf,
    /// SVSM image.
    #[arg(long, value_name = "PATH")]
    svsm: PathBuf,
    /// Bytes of the firmware's variables, above the SVSM.
    #[arg(long, value_name = "SIZE", conflicts_with = "vars_file", required_unless_present = "vars_file")]
    vars_size: Option<u64>,
    /// The firmware's variables, for their size.
    #[arg(long, value_name = "PATH")]
    vars_file: Option<PathBuf>,
    #[command(flatten)]
    vcpu: VcpuArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `gmem measure sev`.
#[derive(Args, Debug)]
pub(crate) struct SevArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// `gmem measure sev-es`.
#[derive(Args, Debug)]
pub(crate) struct SevEsArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    vcpu: VcpuArgs,
    /// Who runs the guest.
    #[arg(long, value_enum, default_value_t)]
    vmm_type: VmmType,
    #[command(flatten)]
    output: OutputArgs,
}

/// Measures an SNP guest.
pub(crate) fn run_snp(args: &SnpArgs) -> Result<()> {
    let data = read(&args.image.ovmf)?;
    let ovmf = parse(&data)?;
    let vcpu = args.vcpu.reset(args.vmm_type, args.guest_features)?;
    let boot = args.image.boot()?;
    let guest = SnpGuest { ovmf: &ovmf, firmware_digest: args.snp_ovmf_hash, boot, vcpus: args.vcpu.vcpus, vcpu };
    let mut report = Report::new("SEV_SNP", &args.output);
    let digest = guest.measure(|step| report.snp(step)).map_err(explain_error)?;
    args.vcpu.dump(&reset_pages(vcpu, &ovmf).map_err(|error| explain_error(error.into()))?)?;
    report.finish(&digest.digest());
    Ok(())
}

/// Measures a firmware image alone.
pub(crate) fn run_snp_ovmf_hash(args: &OvmfHashArgs) -> Result<()> {
    let data = read(&args.ovmf)?;
    let mut report = Report::new("SEV_SNP OVMF", &args.output);
    let digest = firmware_digest(&parse(&data)?, |step| report.snp(step)).map_err(explain_error)?;
    report.finish(&digest.digest());
    Ok(())
}

/// Measures an SNP guest with an SVSM, under QEMU.
pub(crate) fn run_snp_svsm(args: &SvsmArgs) -> Result<()> {
    let (data, svsm) = (read(&args.ovmf)?, read(&args.svsm)?);
    let ovmf = parse(&data)?;
    let vars = match (&args.vars_file, args.vars_size) {
        (Some(path), _) => std::fs::metadata(path).with_context(|| path.display().to_string())?.len(),
        (None, size) => size.unwrap_or(0),
    };
    let svsm = svsm_end(&ovmf, vars).and_then(|end| Ovmf::parse_at(&svsm, end));
    let svsm = svsm.map_err(|error| explain_error(error.into())).context("SVSM image")?;
    let signature = args.vcpu.signature(VmmType::Qemu)?;
    let guest = SvsmGuest { ovmf: &ovmf, svsm: &svsm, vcpus: args.vcpu.vcpus, signature };
    let mut report = Report::new("SEV_SNP_SVSM", &args.output);
    let digest = guest.measure(|step| report.snp(step)).map_err(explain_error)?;
    let page = svsm_page(signature, svsm.svsm_entry().map_err(|error| explain_error(error.into()))?);
    args.vcpu.dump(&[page, page])?;
    report.finish(&digest.digest());
    Ok(())
}

/// Measures an SEV guest.
pub(crate) fn run_sev(args: &SevArgs) -> Result<()> {
    let data = read(&args.image.ovmf)?;
    let guest = SevGuest { ovmf: &parse(&data)?, boot: args.image.boot()?, vcpus: None };
    let mut report = Report::new("SEV", &args.output);
    let digest = guest.measure(|step| report.sev(step)).map_err(explain_error)?;
    report.finish(&digest);
    Ok(())
}

/// Measures an SEV-ES guest.
pub(crate) fn run_sev_es(args: &SevEsArgs) -> Result<()> {
    let data = read(&args.image.ovmf)?;
    let ovmf = parse(&data)?;
    let vcpu = args.vcpu.reset(args.vmm_type, 0)?;
    let guest = SevGuest { ovmf: &ovmf, boot: args.image.boot()?, vcpus: Some((args.vcpu.vcpus, vcpu)) };
    let mut report = Report::new("SEV_ES", &args.output);
    let digest = guest.measure(|step| report.sev(step)).map_err(explain_error)?;
    args.vcpu.dump(&reset_pages(vcpu, &ovmf).map_err(|error| explain_error(error.into()))?)?;
    report.finish(&digest);
    Ok(())
}

impl ImageArgs {
    fn boot(&self) -> Result<Option<BootHashes>> {
        let Some(kernel) = &self.kernel else { return Ok(None) };
        let initrd = self.initrd.as_deref().map_or_else(|| Ok(Vec::new()), read)?;
        let cmdline = self.append.as_deref().unwrap_or_default();
        Ok(Some(BootHashes::new(&read(kernel)?, &initrd, cmdline.as_bytes())))
    }
}

impl VcpuArgs {
    fn reset(&self, vmm: VmmType, features: u64) -> Result<VcpuReset> {
        Ok(VcpuReset { signature: self.signature(vmm)?, features, vmm: vmm.into() })
    }

    /// Only QEMU leaves the signature in a measured register.
    fn signature(&self, vmm: VmmType) -> Result<u64> {
        let named = || self.vcpu_type.as_ref().and_then(|name| VCPU_TYPES.iter().find(|(of, _)| of == name));
        if let (Some(family), Some(model), Some(stepping)) = (self.vcpu_family, self.vcpu_model, self.vcpu_stepping) {
            return Ok(signature(family, model, stepping).into());
        }
        match self.vcpu_sig.or_else(|| named().map(|(_, signature)| u64::from(*signature))) {
            Some(signature) => Ok(signature),
            None if vmm == VmmType::Qemu => bail!("QEMU's vCPUs need --vcpu-type, --vcpu-sig or --vcpu-family"),
            None => Ok(0),
        }
    }

    fn dump(&self, [first, others]: &[[u8; 4096]; 2]) -> Result<()> {
        for vcpu in (0..self.vcpus).filter(|_| self.dump_vmsa) {
            let name = format!("vmsa{vcpu}.bin");
            std::fs::write(&name, if vcpu == 0 { first } else { others }).context(name)?;
        }
        Ok(())
    }
}

/// Prints steps as they come, or keeps them for the object.
struct Report<'a> {
    mode: &'static str,
    output: &'a OutputArgs,
    steps: Vec<Value>,
}

impl<'a> Report<'a> {
    const fn new(mode: &'static str, output: &'a OutputArgs) -> Self {
        Self { mode, output, steps: Vec::new() }
    }

    fn snp(&mut self, step: SnpStep) {
        let (gpa, kind) = (step.page.gpa, step.page.kind.name());
        let digest = step.digest.digest();
        match (self.output.explain, self.output.json) {
            (false, _) => {}
            (true, false) => println!("{gpa:#014x} {kind:<10} {:<17} {}", part(step.part), hex(&digest)),
            (true, true) => self.steps.push(json!({
                "part": part(step.part), "type": kind, "gpa": format!("{gpa:#x}"), "digest_after": hex(&digest),
            })),
        }
    }

    fn sev(&mut self, step: SevStep) {
        match (self.output.explain, self.output.json) {
            (false, _) => {}
            (true, false) => println!("{:>10} bytes {:<17} {}", step.len, part(step.part), hex(&step.digest)),
            (true, true) => self.steps.push(json!({
                "part": part(step.part), "bytes": step.len, "digest_after": hex(&step.digest),
            })),
        }
    }

    fn finish(self, digest: &[u8]) {
        let measurement = match self.output.output_format {
            Format::Hex => hex(digest),
            Format::Base64 => base64::engine::general_purpose::STANDARD.encode(digest),
        };
        if self.output.json {
            let mut object = json!({"mode": self.mode, "measurement": measurement});
            if self.output.explain {
                object["steps"] = self.steps.into();
            }
            println!("{object:#}");
        } else if self.output.verbose {
            println!("Calculated {} guest measurement: {measurement}", self.mode);
        } else {
            println!("{measurement}");
        }
    }
}

fn part(part: Part) -> String {
    match part {
        Part::Firmware => "firmware".to_owned(),
        Part::Svsm => "svsm".to_owned(),
        Part::Section(kind) => section(kind).to_owned(),
        Part::KernelHashes => "kernel hashes".to_owned(),
        Part::Vmsa(vcpu) => format!("vcpu {vcpu}"),
    }
}

const fn section(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::SecMem => "sec memory",
        SectionKind::Secrets => "secrets",
        SectionKind::Cpuid => "cpuid",
        SectionKind::SvsmCaa => "svsm calling area",
        SectionKind::KernelHashes => "no kernel hashes",
        SectionKind::Unknown(_) => "unknown",
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

fn parse(data: &[u8]) -> Result<Ovmf<'_>> {
    Ovmf::parse(data).map_err(|error| explain_error(error.into())).context("OVMF image")
}

fn explain_error(error: LaunchError) -> anyhow::Error {
    let text = match error {
        LaunchError::Ovmf(OvmfError::Size) => "the image is too short, or too long for its place",
        LaunchError::Ovmf(OvmfError::EntrySize) => "an entry of the image's table is shorter than its header",
        LaunchError::Ovmf(OvmfError::NoMetadata) => "the image's SEV metadata are not where its table says",
        LaunchError::Ovmf(OvmfError::MetadataVersion(version)) => {
            return anyhow::anyhow!("the image's SEV metadata have version {version}, not 1");
        }
        LaunchError::Ovmf(OvmfError::MetadataTruncated) => "the image's SEV metadata are cut short",
        LaunchError::Ovmf(OvmfError::NoResetBlock) => "the image names no reset address (SEV_ES_RESET_BLOCK)",
        LaunchError::Ovmf(OvmfError::NoSvsmInfo) => "the image has no SVSM_INFO",
        LaunchError::Unaligned => "the image or one of its sections is not a number of 4 KiB pages",
        LaunchError::UnknownSection(kind) => {
            return anyhow::anyhow!("the image has a section of unknown kind {kind:#x}");
        }
        LaunchError::NoHashTable => "a kernel is given, but the image has no place for its hashes",
        LaunchError::HashTableSize => "the kernel's hashes do not fit into the image's page for them",
    };
    anyhow::anyhow!(text)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A number in the notation of C or Python: decimal, 0x, 0o or 0b.
fn parse_number(text: &str) -> Result<u64> {
    let lower = text.to_lowercase().replace('_', "");
    let (digits, radix) = match lower.as_bytes() {
        [b'0', b'x', ..] => (&lower[2..], 16),
        [b'0', b'o', ..] => (&lower[2..], 8),
        [b'0', b'b', ..] => (&lower[2..], 2),
        _ => (lower.as_str(), 10),
    };
    u64::from_str_radix(digits, radix).with_context(|| format!("not a number: {text}"))
}

fn parse_digest(text: &str) -> Result<[u8; 48]> {
    ensure!(text.len() == 96 && text.is_ascii(), "a SHA-384 digest has 96 hexadecimal digits");
    let mut digest = [0; 48];
    for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair)?, 16)?;
    }
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_pythons_notations() {
        let ok = |text| parse_number(text).ok();
        assert_eq!(ok("0x1F"), Some(31));
        assert_eq!((ok("21"), ok("0b11"), ok("0o17"), ok("1_0")), (Some(21), Some(3), Some(15), Some(10)));
        assert_eq!((ok("x"), ok("-1"), ok("0x")), (None, None, None));
    }

    #[test]
    fn digests_are_48_bytes() {
        assert_eq!(parse_digest(&"ab".repeat(48)).ok(), Some([0xab; 48]));
        assert!(parse_digest("ab").is_err());
        assert!(parse_digest(&"xy".repeat(48)).is_err());
    }
}
