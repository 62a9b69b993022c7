//! `gmem measure snp`, `snp-ovmf-hash`, `snp-svsm`, `sev` and `sev-es`.
//!
//! Options have the names and the meaning that PyPI's `sev-snp-measure` gives them; its `--mode` is the subcommand here. What
//! it does not have is `--igvm`, whose `--native-zero` is that of coconut-svsm's `igvmmeasure`.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use gmem_core::measure::igvm::{Igvm, ZeroPages};
use gmem_core::measure::launch::{
    LaunchError, Part, SevGuest, SevStep, SnpGuest, SnpStep, SvsmGuest, firmware_digest, svsm_end,
};
use gmem_core::measure::ovmf::{BootHashes, Ovmf, SectionKind};
use gmem_core::measure::vmsa::{VCPU_TYPES, VcpuReset, Vmm, reset_pages, signature, svsm_page};
use serde_json::json;

use super::read_image;
use super::report::{OutputArgs, Report, hex, stdout};

/// What a guest starts from.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
struct Source {
    /// OVMF image.
    #[arg(long, value_name = "PATH")]
    ovmf: Option<PathBuf>,
    /// IGVM file, which says by itself what is loaded, vCPUs included.
    #[arg(long, value_name = "PATH", conflicts_with_all = [
        "kernel", "vcpus", "vcpu_type", "vcpu_sig", "vcpu_family", "dump_vmsa", "snp_ovmf_hash",
    ])]
    igvm: Option<PathBuf>,
}

/// What is loaded, besides the vCPUs.
#[derive(Args, Debug)]
pub(crate) struct ImageArgs {
    #[command(flatten)]
    source: Source,
    /// Load pages of the IGVM file that have no bytes as SNP's type ZERO, as QEMU does, not as NORMAL pages of zeros, as the
    /// format says.
    #[arg(long, requires = "igvm")]
    native_zero: bool,
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

/// The vCPUs, which SEV-ES and SNP measure.
#[derive(Args, Debug)]
pub(crate) struct VcpuArgs {
    /// Number of vCPUs; needed with an OVMF image.
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
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

/// `gmem measure snp`, `sev` and `sev-es`.
#[derive(Args, Debug)]
pub(crate) struct GuestArgs {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    vcpu: VcpuArgs,
    /// Who runs the guest.
    #[arg(long, value_enum, default_value_t)]
    vmm_type: VmmType,
    /// SEV_FEATURES of the vCPUs; measured by SNP only.
    #[arg(long, value_name = "VALUE", default_value = "0x1", value_parser = parse_number)]
    guest_features: u64,
    /// Digest of the OVMF image from `snp-ovmf-hash`, used instead of its bytes; for SNP only.
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

/// Measures an SNP guest.
pub(crate) fn run_snp(args: &GuestArgs) -> Result<()> {
    let mut report = Report::new("SEV_SNP", &args.output, stdout());
    if let Some(path) = &args.image.source.igvm {
        return run_snp_igvm(path, args.image.native_zero, report);
    }
    let path = args.image.ovmf()?;
    let data = read_image(path)?;
    let named = || path.display().to_string();
    let ovmf = Ovmf::parse(&data).with_context(named)?;
    let vcpu = args.vcpu.reset(args.vmm_type, args.guest_features)?;
    let boot = args.image.boot()?;
    let guest = SnpGuest { ovmf: &ovmf, firmware_digest: args.snp_ovmf_hash, boot, vcpus: args.vcpu.count()?, vcpu };
    let digest = guest.measure(|step| snp_step(&mut report, step)).with_context(named)?;
    args.vcpu.dump(&reset_pages(vcpu, &ovmf)?)?;
    report.finish(&digest.digest())
}

fn run_snp_igvm(path: &Path, native_zero: bool, mut report: Report<'_, impl Write>) -> Result<()> {
    let data = read_image(path)?;
    let named = || path.display().to_string();
    let igvm = Igvm::parse(&data).with_context(named)?;
    let zero = if native_zero { ZeroPages::Native } else { ZeroPages::Data };
    let digest = igvm.measure_snp(zero, |step| snp_step(&mut report, step)).with_context(named)?.digest();
    report.finish(&digest)?;
    match igvm.id_block_digest() {
        Some(promised) if promised != digest => {
            bail!(
                "the ID block of the file promises another digest, so the firmware would refuse it: {}",
                hex(&promised)
            )
        }
        _ => Ok(()),
    }
}

/// Measures a firmware image alone.
pub(crate) fn run_snp_ovmf_hash(args: &OvmfHashArgs) -> Result<()> {
    let data = read_image(&args.ovmf)?;
    let mut report = Report::new("SEV_SNP OVMF", &args.output, stdout());
    let digest = Ovmf::parse(&data)
        .map_err(LaunchError::from)
        .and_then(|ovmf| firmware_digest(&ovmf, |step| snp_step(&mut report, step)))
        .with_context(|| args.ovmf.display().to_string())?;
    report.finish(&digest.digest())
}

/// Measures an SNP guest with an SVSM, under QEMU.
pub(crate) fn run_snp_svsm(args: &SvsmArgs) -> Result<()> {
    let (data, svsm) = (read_image(&args.ovmf)?, read_image(&args.svsm)?);
    let ovmf = Ovmf::parse(&data).with_context(|| args.ovmf.display().to_string())?;
    let vars = match (&args.vars_file, args.vars_size) {
        (Some(path), _) => std::fs::metadata(path).with_context(|| path.display().to_string())?.len(),
        (None, size) => size.unwrap_or(0),
    };
    let svsm = svsm_end(&ovmf, vars)
        .and_then(|end| Ovmf::parse_at(&svsm, end))
        .with_context(|| args.svsm.display().to_string())?;
    let signature = args.vcpu.signature(VmmType::Qemu)?;
    let guest = SvsmGuest { ovmf: &ovmf, svsm: &svsm, vcpus: args.vcpu.count()?, signature };
    let mut report = Report::new("SEV_SNP_SVSM", &args.output, stdout());
    let digest = guest.measure(|step| snp_step(&mut report, step)).with_context(|| args.svsm.display().to_string())?;
    let page = svsm_page(signature, svsm.svsm_entry()?);
    args.vcpu.dump(&[page, page])?;
    report.finish(&digest.digest())
}

/// Measures an SEV guest, or an SEV-ES guest, which has its vCPUs measured.
pub(crate) fn run_sev(args: &GuestArgs, es: bool) -> Result<()> {
    ensure!(args.snp_ovmf_hash.is_none(), "--snp-ovmf-hash is for SNP: SEV hashes the image as one stream");
    ensure!(!args.image.native_zero, "--native-zero is for SNP: SEV has no pages of the type ZERO");
    ensure!(es || !args.vcpu.dump_vmsa, "--dump-vmsa: SEV has no save areas");
    let mut report = Report::new(if es { "SEV_ES" } else { "SEV" }, &args.output, stdout());
    if let Some(path) = &args.image.source.igvm {
        let digest =
            Igvm::parse(&read_image(path)?).and_then(|igvm| igvm.measure_sev(es, |step| sev_step(&mut report, step)));
        return report.finish(&digest.with_context(|| path.display().to_string())?);
    }
    let path = args.image.ovmf()?;
    let data = read_image(path)?;
    let named = || path.display().to_string();
    let ovmf = Ovmf::parse(&data).with_context(named)?;
    let vcpu = es.then(|| args.vcpu.reset(args.vmm_type, 0)).transpose()?;
    let vcpus = vcpu.map(|vcpu| Ok::<_, anyhow::Error>((args.vcpu.count()?, vcpu))).transpose()?;
    let guest = SevGuest { ovmf: &ovmf, boot: args.image.boot()?, vcpus };
    let digest = guest.measure(|step| sev_step(&mut report, step)).with_context(named)?;
    if let Some(vcpu) = vcpu {
        args.vcpu.dump(&reset_pages(vcpu, &ovmf)?)?;
    }
    report.finish(&digest)
}

impl ImageArgs {
    fn ovmf(&self) -> Result<&Path> {
        self.source.ovmf.as_deref().context("--ovmf or --igvm is needed")
    }

    fn boot(&self) -> Result<Option<BootHashes>> {
        let Some(kernel) = &self.kernel else { return Ok(None) };
        let initrd = self.initrd.as_deref().map_or_else(|| Ok(Vec::new()), read)?;
        let cmdline = self.append.as_deref().unwrap_or_default();
        Ok(Some(BootHashes::new(&read(kernel)?, &initrd, cmdline.as_bytes())))
    }
}

impl VcpuArgs {
    fn count(&self) -> Result<u32> {
        self.vcpus.context("--vcpus N is needed: each vCPU is measured")
    }

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
        for vcpu in (0..self.vcpus.unwrap_or(0)).filter(|_| self.dump_vmsa) {
            let name = format!("vmsa{vcpu}.bin");
            std::fs::write(&name, if vcpu == 0 { first } else { others }).context(name)?;
        }
        Ok(())
    }
}

fn snp_step(report: &mut Report<'_, impl Write>, step: SnpStep) {
    let (gpa, kind, part) = (step.page.gpa, step.page.kind.name(), || part(step.part));
    let words = || format!("{gpa:#014x} {kind:<10} {:<17}", part());
    let fields = || json!({"part": part(), "type": kind, "gpa": format!("{gpa:#x}")});
    report.step(&step.digest.digest(), words, fields);
}

fn sev_step(report: &mut Report<'_, impl Write>, step: SevStep) {
    let part = || part(step.part);
    let words = || format!("{:>10} bytes {:<17}", step.len, part());
    report.step(&step.digest, words, || json!({"part": part(), "bytes": step.len}));
}

fn part(part: Part) -> String {
    match part {
        Part::Firmware => "firmware".to_owned(),
        Part::Svsm => "svsm".to_owned(),
        Part::Section(kind) => section(kind).to_owned(),
        Part::KernelHashes => "kernel hashes".to_owned(),
        Part::Vmsa(vcpu) => format!("vcpu {vcpu}"),
        Part::Directive => "page data".to_owned(),
        Part::Parameters => "parameters".to_owned(),
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
