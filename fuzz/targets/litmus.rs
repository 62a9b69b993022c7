//! Arbitrary text to the parser, and what parses to the explorer: no panic, and an error names a place in the text.
#![no_main]

use gmem_litmus::{Limits, Options, Tracing};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let program = match gmem_litmus::parse(text) {
        Ok(program) => program,
        Err(error) => {
            let line = text.lines().nth(error.line - 1).unwrap_or_default();
            assert!(error.column <= line.chars().count() + 1, "{error}");
            return;
        }
    };
    let options = Options {
        limits: Limits { states: 200, memory: 64 << 20 },
        trace: Tracing::None,
        ..Options::default()
    };
    if let Some(&vm_type) = program.types.first() {
        let _ = gmem_litmus::run(&program, vm_type, &options);
    }
});
