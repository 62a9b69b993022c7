//! `gmem probe`: what is there, what gmem adds, what would be native.

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use gmem_uapi::native::Native;
use gmem_uapi::profile::PROFILES;
use gmem_uapi::{Config, Errno};
use serde::Serialize;

use crate::types;

/// Show what this host's kernel has, what gmem adds, and what would be native.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    /// Why /dev/kvm cannot be used, if it cannot.
    kvm_error: Option<String>,
    default_profile: &'static str,
    profiles: Vec<&'static str>,
    vm_types: Vec<VmType>,
    features: Vec<Feature>,
}

#[derive(Debug, Serialize)]
struct VmType {
    number: u32,
    name: &'static str,
    host: bool,
    /// What `gmem run` does about it: "native", "emulated" or "none".
    gmem: &'static str,
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    host: bool,
    gmem: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let report = report(&Native::probe());
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&report));
    }
    Ok(ExitCode::from(u8::from(report.kvm_error.is_some())))
}

fn report(probed: &Result<Native, Errno>) -> Report {
    let nothing = Native {
        vm_types: 0,
        guest_memfd: false,
        file_flags: 0,
        attributes: 0,
        prefault: false,
        user_memory2: false,
        release: gmem_uapi::native::release(),
    };
    let native = probed.as_ref().unwrap_or(&nothing);
    let there = probed.is_ok();
    let feature = |name, host| Feature { name, host, gmem: there };
    Report {
        kernel: native.release.clone(),
        kvm_error: probed.as_ref().err().map(|error| format!("/dev/kvm: {error}")),
        default_profile: native.profile().name,
        profiles: PROFILES.iter().map(|profile| profile.name).collect(),
        vm_types: vm_types(native, there),
        features: vec![
            feature("guest_memfd", native.guest_memfd),
            feature("guest_memfd: mmap, init-shared", native.file_flags != 0),
            feature("memory attributes", native.attributes != 0),
            feature("KVM_PRE_FAULT_MEMORY", native.prefault),
            feature("KVM_SET_USER_MEMORY_REGION2", native.user_memory2),
        ],
    }
}

fn vm_types(native: &Native, there: bool) -> Vec<VmType> {
    let config = Config::for_host(native, native.profile(), Config::TYPES, false);
    let how = |number: u32, host: bool| match (there, config.emulated & 1 << number != 0, host) {
        (true, true, _) => "emulated",
        (true, false, true) => "native",
        _ => "none",
    };
    (0u32..)
        .zip(types::NAMES)
        .map(|(number, name)| {
            let host = native.vm_types & 1 << number != 0;
            VmType { number, name, host, gmem: how(number, host) }
        })
        .collect()
}

fn table(report: &Report) -> String {
    let yes = |there: bool| if there { "yes" } else { "no" };
    let mut text = format!("kernel {}, profile {}\n", report.kernel, report.default_profile);
    if let Some(error) = &report.kvm_error {
        text += &format!("{error}: gmem run cannot work here; litmus, check and measure can\n");
    }
    text += &format!("\n{:<34}{:<8}{}\n", "VM type", "host", "under gmem run");
    for vm_type in &report.vm_types {
        text += &format!("{:<34}{:<8}{}\n", vm_type.name, yes(vm_type.host), vm_type.gmem);
    }
    text += &format!("\n{:<34}{:<8}{}\n", "feature", "host", "under gmem run");
    for feature in &report.features {
        text += &format!("{:<34}{:<8}{}\n", feature.name, yes(feature.host), yes(feature.gmem));
    }
    text
}
