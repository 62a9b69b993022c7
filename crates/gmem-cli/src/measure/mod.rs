//! `gmem measure`: expected launch measurements, without any hardware.

mod amd;
pub(crate) mod cca;
mod tdx;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// An SEV-SNP guest.
    Snp(amd::SnpArgs),
    /// The firmware of an SEV-SNP guest alone, for --snp-ovmf-hash.
    #[command(alias = "snp:ovmf-hash")]
    SnpOvmfHash(amd::OvmfHashArgs),
    /// An SEV-SNP guest with an SVSM, under QEMU.
    #[command(alias = "snp:svsm")]
    SnpSvsm(amd::SvsmArgs),
    /// An SEV guest.
    Sev(amd::SevArgs),
    /// An SEV-ES guest.
    #[command(alias = "seves")]
    SevEs(amd::SevEsArgs),
    /// A TDX guest: the MRTD.
    Tdx(tdx::TdxArgs),
    /// An Arm CCA realm: the initial measurement.
    Cca(cca::Args),
}

/// Measures and prints.
pub(crate) fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Snp(args) => amd::run_snp(args),
        Command::SnpOvmfHash(args) => amd::run_snp_ovmf_hash(args),
        Command::SnpSvsm(args) => amd::run_snp_svsm(args),
        Command::Sev(args) => amd::run_sev(args),
        Command::SevEs(args) => amd::run_sev_es(args),
        Command::Tdx(args) => tdx::run(args),
        Command::Cca(args) => cca::run(args),
    }
}
