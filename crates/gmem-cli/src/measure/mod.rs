//! `gmem measure`: expected launch measurements, without any hardware.

mod amd;
pub(crate) mod cca;
pub(crate) mod report;
mod tdx;

use std::io::Read;
use std::path::Path;

use anyhow::{Context, ensure};
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// An SEV-SNP guest: its launch digest.
    ///
    /// Give either an OVMF image, the vCPUs and what is booted directly, as the VMM is told them, or an IGVM file. Options mean
    /// what they mean to sev-snp-measure.
    #[command(after_help = "Examples:
  gmem measure snp --ovmf OVMF.amdsev.fd --vcpus 2 --vcpu-type EPYC-v4 --kernel vmlinuz --append console=ttyS0
  gmem measure snp --ovmf OVMF.fd --vcpus 1 --vcpu-type EPYC-Milan --explain    every page, with the digest after it
  gmem measure snp --igvm coconut-qemu.igvm --native-zero                       as QEMU loads it")]
    Snp(amd::GuestArgs),
    /// The firmware of an SEV-SNP guest alone, for --snp-ovmf-hash.
    #[command(alias = "snp:ovmf-hash")]
    SnpOvmfHash(amd::OvmfHashArgs),
    /// An SEV-SNP guest with an SVSM, under QEMU.
    #[command(alias = "snp:svsm")]
    SnpSvsm(amd::SvsmArgs),
    /// An SEV guest: its launch digest, of what is loaded. Options about vCPUs change nothing.
    Sev(amd::GuestArgs),
    /// An SEV-ES guest: its launch digest, of what is loaded and of the vCPUs.
    #[command(alias = "seves")]
    SevEs(amd::GuestArgs),
    /// A TDX guest: its MRTD.
    ///
    /// Pages are added and extended one after the other, in the order of the image's sections, as KVM does.
    #[command(after_help = "Examples:
  gmem measure tdx --tdvf OVMF.inteltdx.fd --json
  cat OVMF_VARS_4M.fd OVMF_CODE_4M.fd > OVMF.fd    an image in two halves is joined first
  echo '[{\"gpa\": \"0x1000\", \"measure\": true, \"content\": \"all 0x01\"}]' > pages.json
  gmem measure tdx --pages pages.json --explain")]
    Tdx(tdx::TdxArgs),
    /// An Arm CCA realm: its initial measurement (RIM) by RMM 1.0.
    #[command(after_help = "Example, a realm with a measured granule and memory:
  cat > steps.json <<END
  [{\"op\": \"realm_create\", \"hash_algo\": 0, \"s2sz\": 48, \"num_bps\": 1, \"num_wps\": 1},
   {\"op\": \"data\", \"ipa\": \"0x0\", \"flags\": 1, \"file\": \"kernel.bin\"},
   {\"op\": \"ripas\", \"base\": \"0x200000\", \"top\": \"0x400000\"},
   {\"op\": \"rec\", \"flags\": 1, \"pc\": \"0x0\", \"gprs\": [0]}]
  END
  gmem measure cca steps.json --explain")]
    Cca(cca::Args),
}

/// Measures and prints.
pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Snp(args) => amd::run_snp(args),
        Command::SnpOvmfHash(args) => amd::run_snp_ovmf_hash(args),
        Command::SnpSvsm(args) => amd::run_snp_svsm(args),
        Command::Sev(args) => amd::run_sev(args, false),
        Command::SevEs(args) => amd::run_sev(args, true),
        Command::Tdx(args) => tdx::run(args),
        Command::Cca(args) => cca::run(args),
    }
}

/// The most bytes that an image may have. No firmware comes near; devices that never end stop here.
const LARGEST_IMAGE: u64 = 1 << 30;

/// The bytes of a firmware image.
fn read_image(path: &Path) -> anyhow::Result<Vec<u8>> {
    let named = || path.display().to_string();
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).with_context(named)?;
    let read = file.take(LARGEST_IMAGE + 1).read_to_end(&mut bytes).with_context(named)? as u64;
    ensure!(read <= LARGEST_IMAGE, "{}: more than 1 GiB is no firmware image", path.display());
    Ok(bytes)
}
