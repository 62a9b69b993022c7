//! Arbitrary bytes as firmware images and IGVM files, whose metadata are a stranger's claims: no panic.
#![no_main]

use gmem_core::measure::igvm::{Igvm, IgvmError, Platform, ZeroPages};
use gmem_core::measure::launch::{SevGuest, SnpGuest};
use gmem_core::measure::ovmf::{BootHashes, Ovmf};
use gmem_core::measure::tdx::{measure_tdvf, tdvf_sections};
use gmem_core::measure::vmsa::VcpuReset;
use std::hint::black_box;

/// More memory takes too long to measure over and over.
const MOST: u64 = 1 << 20;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ovmf(bytes);
    let sections = tdvf_sections(bytes).unwrap_or_default();
    if sections.iter().fold(0u64, |sum, section| sum.saturating_add(section.memory_size)) < MOST {
        let _ = black_box(measure_tdvf(bytes, &mut |_| {}));
    }
    igvm(bytes);
});

fn ovmf(bytes: &[u8]) {
    let Ok(ovmf) = Ovmf::parse(bytes) else { return };
    black_box((ovmf.hash_table_gpa(), ovmf.reset_eip().is_ok(), ovmf.svsm_entry().is_ok()));
    let boot = Some(BootHashes::new(b"kernel", b"", b""));
    let vcpu = VcpuReset { signature: 0, features: 1, vmm: Default::default() };
    let _ = black_box(SevGuest { ovmf: &ovmf, boot, vcpus: Some((1, vcpu)) }.measure(|_| {}));
    if ovmf.sections().iter().map(|section| u64::from(section.size)).sum::<u64>() < MOST {
        let guest = SnpGuest { ovmf: &ovmf, firmware_digest: None, boot, vcpus: 2, vcpu };
        let _ = black_box(guest.measure(|_| {}));
    }
}

/// A wrong checksum is mended: no input finds a right one by chance.
fn igvm(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if let Err(IgvmError::Checksum(_, computed)) = Igvm::parse(&bytes) {
        bytes[20..24].copy_from_slice(&computed.to_le_bytes());
    }
    let Ok(igvm) = Igvm::parse(&bytes) else { return };
    // One header can ask for 4 GiB of zeros.
    let is_small = |platform| igvm.memory(platform).is_ok_and(|memory| memory < MOST);
    if is_small(Platform::SevSnp) {
        let _ = black_box(igvm.measure_snp(ZeroPages::Native, |_| {}));
    }
    if is_small(Platform::Tdx) {
        let _ = black_box(igvm.measure_tdx(&mut |_| {}));
    }
    if is_small(Platform::SevEs) {
        let _ = black_box(igvm.measure_sev(true, |_| {}));
    }
    black_box(igvm.id_block_digest());
}
