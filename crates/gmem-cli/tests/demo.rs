//! The tour as a user takes it: through the core, and through KVM where this machine has one.

use std::fs::OpenOptions;
use std::process::{Command, Output};

use serde_json::Value;

fn demo(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gmem")).arg("demo").args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let report: Value = serde_json::from_str(&text(&demo(arguments))).unwrap();
    assert_eq!(report["ok"], true, "{report:#}");
    report
}

fn each<'r>(report: &'r Value, field: &str) -> Vec<&'r Value> {
    report["steps"].as_array().unwrap().iter().map(|step| &step[field]).collect()
}

/// Whether /dev/kvm can be opened; if not, says that it is missing.
fn kvm_is_usable() -> bool {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            eprintln!("skipped: /dev/kvm cannot be opened: {error}");
            false
        }
    }
}

#[test]
fn the_core_tour_says_what_it_is_and_passes() {
    let text = text(&demo(&["--core"]));
    assert!(text.contains("gmem's model alone, without KVM, because --core was given"), "{text}");
    assert!(text.contains(": all ok\n") && !text.contains("FAILED") && !text.contains("skipped"), "{text}");
    assert!(!text.contains('\x1b'), "colours although the output is no terminal");
}

#[test]
fn the_tour_through_kvm_passes_and_draws_the_maps_of_the_core() {
    if !kvm_is_usable() {
        return;
    }
    let (kvm, core) = (report(&["--json"]), report(&["--core", "--json"]));
    let provider = kvm["provider"].as_str().unwrap();
    assert!(provider.contains("the KVM of Linux"), "{provider}");
    for field in ["title", "before", "after"] {
        assert_eq!(each(&kvm, field), each(&core, field), "{field}");
    }
}

/// The client would prove nothing if it knew who provides its memory, or if it went past libc, where gmem stands.
#[test]
fn the_client_uses_libc_and_nothing_of_gmem() {
    let client = include_str!("../src/demo/kvm.rs");
    assert!(client.contains("use kvm_ioctls::") && client.contains("libc::"));
    for forbidden in ["gmem_", "rustix", "crate::", "asm!"] {
        assert!(!client.contains(forbidden), "{forbidden}");
    }
}
