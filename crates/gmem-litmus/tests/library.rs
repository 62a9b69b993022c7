//! Every program of the library holds on the production core, and every mutant is caught by some.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

use gmem_litmus::{Mutant, Options, Tracing, run};

#[test]
fn every_program_says_what_it_asks_and_holds() {
    let library = common::library();
    assert!(library.len() >= 60);
    let mut failed = Vec::new();
    for (name, program) in &library {
        assert!(
            !program.question.is_empty() && !program.asked.is_empty(),
            "{name} does not say what was asked, or where"
        );
        for &vm_type in &program.types {
            let report = run(program, vm_type, &Options::default()).unwrap_or_else(|error| panic!("{name}: {error}"));
            if !report.holds() {
                failed.push(format!("{name} on {}: {:?}", vm_type.name(), report.violations));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

/// For each mutant the programs that catch it, with the types on which they do.
fn matrix() -> BTreeMap<Mutant, BTreeMap<String, Vec<&'static str>>> {
    let library = common::library();
    let mut matrix: BTreeMap<Mutant, BTreeMap<String, Vec<&'static str>>> = BTreeMap::new();
    for &mutant in Mutant::ALL {
        let caught = matrix.entry(mutant).or_default();
        for (name, program) in &library {
            for &vm_type in &program.types {
                let options = Options { mutant: Some(mutant), trace: Tracing::None, ..Options::default() };
                if run(program, vm_type, &options).is_ok_and(|report| !report.violations.is_empty()) {
                    caught.entry(name.clone()).or_default().push(vm_type.name());
                }
            }
        }
    }
    matrix
}

#[test]
fn every_mutant_is_caught_and_the_matrix_is_documented() {
    let matrix = matrix();
    let missed: Vec<_> =
        matrix.iter().filter(|(_, caught)| caught.is_empty()).map(|(mutant, _)| mutant.name()).collect();
    assert!(missed.is_empty(), "no program catches {missed:?}");
    let path = common::root().join("docs/litmus-mutants.md");
    let text = document(&matrix);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "docs/litmus-mutants.md is out of date: run this test with UPDATE_DOCS=1");
}

fn document(matrix: &BTreeMap<Mutant, BTreeMap<String, Vec<&'static str>>>) -> String {
    let mut text = String::from(
        "# Which program catches which broken protocol\n\nWritten by a test of `gmem-litmus`; `UPDATE_DOCS=1 cargo test -p \
         gmem-litmus --test library` writes it anew.\n\n| mutant | what is broken | programs that catch it |\n|---|---|---|\n",
    );
    for (mutant, caught) in matrix {
        let _ = writeln!(text, "| `{}` | {} | {} |", mutant.name(), mutant.about().trim(), caught.len());
    }
    for (mutant, caught) in matrix {
        let _ = writeln!(text, "\n## {}\n", mutant.name());
        for (program, types) in caught {
            let _ = writeln!(text, "- `{program}` on {}", types.join(", "));
        }
    }
    text
}
