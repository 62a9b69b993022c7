//! Arbitrary commands to the model: no panic, and a refused command changes nothing.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    gmem_core::vendor::bytes::tdx(bytes).expect("a refused command changed something");
});
