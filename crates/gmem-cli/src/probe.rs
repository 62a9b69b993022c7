//! `gmem probe`: what is there, what gmem adds, what would be native.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use gmem_uapi::Config;
use gmem_uapi::native::Native;
use gmem_uapi::profile::PROFILES;
use serde::Serialize;

use crate::{run, types};

/// Show what this host's kernel has, what gmem adds, and what would be native.
///
/// Exits with 1 if /dev/kvm cannot be used, and says why.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Machine-readable output.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    /// Why /dev/kvm cannot be used, and what to do about it, if it cannot.
    kvm_error: Option<String>,
    default_profile: &'static str,
    profiles: Vec<Described>,
    vm_types: Vec<VmType>,
    features: Vec<Feature>,
}

/// A profile, as `gmem run --profile` takes it.
#[derive(Debug, Serialize)]
struct Described {
    name: &'static str,
    about: &'static str,
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
    let report = report(&run::native());
    let mut out = std::io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", table(&report))?;
    }
    Ok(ExitCode::from(u8::from(report.kvm_error.is_some())))
}

fn report(probed: &Result<Native>) -> Report {
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
    let profile = native.profile();
    let config = Config::for_host(native, profile, Config::TYPES, false);
    // A host that has every type by itself is all that a program finds there.
    let feature = |name, host, provided| {
        let provided = if config.emulated == 0 { host } else { provided };
        Feature { name, host, gmem: there && provided }
    };
    Report {
        kernel: native.release.clone(),
        kvm_error: probed.as_ref().err().map(|error| format!("{error:#}")),
        default_profile: profile.name,
        profiles: PROFILES.iter().map(|profile| Described { name: profile.name, about: profile.about }).collect(),
        vm_types: vm_types(native, &config, there),
        features: vec![
            feature("guest_memfd", native.guest_memfd, true),
            feature("guest_memfd: mmap, init-shared", native.file_flags != 0, !profile.file_flags.is_empty()),
            feature("memory attributes", native.attributes != 0, true),
            feature("KVM_PRE_FAULT_MEMORY", native.prefault, true),
            feature("KVM_SET_USER_MEMORY_REGION2", native.user_memory2, true),
        ],
    }
}

fn vm_types(native: &Native, config: &Config, there: bool) -> Vec<VmType> {
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
        text += &format!("{error}\n");
        text += "gmem run cannot work here; demo, litmus, check, measure and vendors work without it\n";
    }
    text += &format!("\n{:<34}{:<8}{}\n", "VM type", "host", "under gmem run");
    for vm_type in &report.vm_types {
        text += &format!("{:<34}{:<8}{}\n", vm_type.name, yes(vm_type.host), vm_type.gmem);
    }
    text += &format!("\n{:<34}{:<8}{}\n", "feature", "host", "under gmem run");
    for feature in &report.features {
        text += &format!("{:<34}{:<8}{}\n", feature.name, yes(feature.host), yes(feature.gmem));
    }
    text += &format!("\n{:<34}{}\n", "profile", "whose behaviour it is");
    for profile in &report.profiles {
        text += &format!("{:<34}{}\n", profile.name, profile.about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(release: &str, vm_types: u32, file_flags: u32) -> Native {
        Native {
            vm_types,
            guest_memfd: true,
            file_flags,
            attributes: 8,
            prefault: true,
            user_memory2: true,
            release: release.to_owned(),
        }
    }

    fn mappable(host: Native) -> (bool, bool) {
        let report = report(&Ok(host));
        let feature = report.features.iter().find(|feature| feature.name.contains("mmap"));
        feature.map(|feature| (feature.host, feature.gmem)).unwrap()
    }

    #[test]
    fn files_are_mappable_where_the_default_profile_has_that() {
        assert_eq!(
            mappable(host("6.12.1", 1, 0)),
            (false, false),
            "6.12 has no such flag, and is what gmem behaves like"
        );
        assert_eq!(mappable(host("7.3.1", 1, 3)), (true, true));
        assert_eq!(mappable(host("7.3.1", 1, 0)), (false, true));
        assert_eq!(mappable(host("7.3.1", 3, 0)), (false, false), "all is left to the host, which has none");
    }

    #[test]
    fn without_kvm_there_is_advice_and_what_works_all_the_same() {
        let text = table(&report(&Err(anyhow::anyhow!("load kvm_amd"))));
        assert!(
            text.contains("load kvm_amd\ngmem run cannot work here; demo, litmus, check, measure and vendors"),
            "{text}"
        );
        assert!(!text.contains("emulated") && !text.contains("yes"), "{text}");
    }

    #[test]
    fn every_profile_is_described() {
        let text = table(&report(&Ok(host("6.12.1", 1, 0))));
        assert!(PROFILES.iter().all(|profile| text.contains(profile.about)), "{text}");
    }
}
