//! The rooms of the workspace: dependencies point one way only, and the core is for any machine.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Each crate and those of the workspace that it may depend on, when it is built or run: all that lie below it, not only the
/// next one. Tests of a crate may use others.
const ROOMS: [(&str, &[&str]); 8] = [
    ("gmem-core", &[]),
    ("gmem-litmus", &["gmem-core"]),
    ("gmem-host", &["gmem-core"]),
    ("gmem-uapi", &["gmem-core", "gmem-host"]),
    ("gmem-preload", &["gmem-core", "gmem-host", "gmem-uapi"]),
    ("gmem-cli", &["gmem-core", "gmem-host", "gmem-litmus", "gmem-preload", "gmem-uapi"]),
    // A client that knows gmem could not say what a client that does not would see.
    ("gmem-conformance", &[]),
    ("xtask", &[]),
];

/// Crates that ask an operating system for something. The core performs no I/O, and neither does what it is made of.
const SYSTEM: [&str; 9] =
    ["getrandom", "kvm-bindings", "kvm-ioctls", "libc", "linux-raw-sys", "mio", "nix", "rustix", "tokio"];

/// What cargo knows of the workspace.
fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["metadata", "--format-version", "1", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu"];
    let output = Command::new(cargo).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The edges that a build follows, not those of tests alone: package id to package ids.
fn edges(metadata: &Value) -> BTreeMap<&str, Vec<&str>> {
    let mut edges = BTreeMap::new();
    for node in metadata["resolve"]["nodes"].as_array().unwrap() {
        let built = |dep: &&Value| dep["dep_kinds"].as_array().unwrap().iter().any(|kind| kind["kind"] != "dev");
        let deps = node["deps"].as_array().unwrap().iter().filter(built).map(|dep| dep["pkg"].as_str().unwrap());
        edges.insert(node["id"].as_str().unwrap(), deps.collect());
    }
    edges
}

/// Package names by id.
fn names(metadata: &Value) -> BTreeMap<&str, &str> {
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages.map(|package| (package["id"].as_str().unwrap(), package["name"].as_str().unwrap())).collect()
}

fn members(metadata: &Value) -> BTreeSet<&str> {
    metadata["workspace_members"].as_array().unwrap().iter().map(|id| id.as_str().unwrap()).collect()
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata();
    let (edges, names, members) = (edges(&metadata), names(&metadata), members(&metadata));
    let known: BTreeSet<&str> = ROOMS.iter().map(|room| room.0).collect();
    let all: BTreeSet<&str> = members.iter().map(|id| names[id]).collect();
    assert_eq!(all, known, "a crate without a room, or a room without a crate");
    for member in &members {
        let (room, allowed) = ROOMS.iter().find(|room| room.0 == names[member]).unwrap();
        for dependency in edges[member].iter().filter(|id| members.contains(*id)) {
            assert!(allowed.contains(&names[dependency]), "{room} must not depend on {}", names[dependency]);
        }
    }
}

#[test]
fn the_core_asks_no_system_for_anything() {
    let metadata = metadata();
    let (edges, names) = (edges(&metadata), names(&metadata));
    let mut open: Vec<&str> = names.iter().filter(|(_, name)| **name == "gmem-core").map(|(id, _)| *id).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            assert!(!SYSTEM.contains(&names[id]), "gmem-core must not depend on {}", names[id]);
            open.extend(&edges[id]);
        }
    }
    assert!(seen.len() > 1, "the core was not found");
}

#[test]
fn the_core_has_neither_unsafe_code_nor_std() {
    let source = |name: &str| {
        let path = format!("{}/../crates/{name}/src/lib.rs", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).unwrap()
    };
    for attribute in ["#![no_std]", "#![forbid(unsafe_code)]"] {
        assert!(source("gmem-core").lines().any(|line| line == attribute), "gmem-core has no {attribute}");
    }
}
