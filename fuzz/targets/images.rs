//! Arbitrary bytes as firmware images, whose OVMF and TDVF metadata are a stranger's claims: no panic.
#![no_main]

use gmem_core::measure::{ovmf::Ovmf, tdx::tdvf_sections};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(image) = Ovmf::parse(bytes) {
        std::hint::black_box((image.sections().len(), image.hash_table_gpa(), image.reset_eip(), image.svsm_entry()));
    }
    std::hint::black_box(tdvf_sections(bytes).is_ok());
});
