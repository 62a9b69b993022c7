//! Builds the preload library, which travels inside the `gmem` binary: installing is one file.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let target = out.join("preload");
    // Its profiles.
    println!("cargo::rerun-if-changed=../../Cargo.toml");
    for room in ["gmem-core", "gmem-host", "gmem-uapi", "gmem-preload"] {
        println!("cargo::rerun-if-changed=../{room}/src");
        println!("cargo::rerun-if-changed=../{room}/Cargo.toml");
    }
    let release = env::var("PROFILE").is_ok_and(|profile| profile == "release");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--package", "gmem-preload", "--target-dir"]).arg(&target);
    if release {
        // It is copied into memory at every `gmem run`: without symbols it is an eighth of the size.
        cargo.arg("--release").env("CARGO_PROFILE_RELEASE_DEBUG", "0").env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
        cargo.env("CARGO_PROFILE_RELEASE_LTO", "fat").env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    }
    // Linters and the like wrap the compiler of the outer build only.
    for variable in ["RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(variable);
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        outcome => panic!("the preload library could not be built: {outcome:?}"),
    }
    let library = target.join(if release { "release" } else { "debug" }).join("libgmem_preload.so");
    println!("cargo::rustc-env=GMEM_PRELOAD_LIBRARY={}", library.display());
}
