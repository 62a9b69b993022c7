//! The library of programs.

use std::fs;
use std::path::PathBuf;

use gmem_litmus::Program;

pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn paths() -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(root().join("litmus")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "litmus"));
    paths.sort();
    paths
}

/// The texts of `litmus/`.
#[allow(dead_code, reason = "not every test file uses it")]
pub(crate) fn library_texts() -> Vec<String> {
    paths().iter().map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// Names and programs of `litmus/`.
#[allow(dead_code, reason = "not every test file uses it")]
pub(crate) fn library() -> Vec<(String, Program)> {
    let read = |path: &PathBuf| {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(path).unwrap();
        let program = gmem_litmus::parse(&text).unwrap_or_else(|error| panic!("{name}:{error}"));
        (name, program)
    };
    paths().iter().map(read).collect()
}
