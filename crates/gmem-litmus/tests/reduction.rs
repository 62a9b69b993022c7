//! The reduction loses no outcome.

mod common;

use std::collections::BTreeSet;

use gmem_litmus::{Limits, Options, Outcome, Program, Reduction, VmType, run};
use proptest::prelude::*;

fn outcomes(program: &Program, vm_type: VmType, reduction: Reduction) -> Option<(BTreeSet<Outcome>, usize)> {
    let limits = Limits { states: 200_000, ..Limits::default() };
    let report = run(program, vm_type, &Options { reduction, limits, ..Options::default() }).ok()?;
    let all = report.outcomes.into_iter().map(|ended| ended.outcome).collect();
    (!report.stopped).then_some((all, report.states))
}

#[test]
fn the_library_has_the_same_outcomes_with_and_without() {
    let (mut compared, mut reduced, mut full) = (0, 0, 0);
    for (name, program) in common::library() {
        for &vm_type in &program.types {
            let off = outcomes(&program, vm_type, Reduction::Off);
            let on = outcomes(&program, vm_type, Reduction::On);
            let (Some((off, all)), Some((on, some))) = (off, on) else { continue };
            assert_eq!(on, off, "{name} on {}", vm_type.name());
            (compared, reduced, full) = (compared + 1, reduced + some, full + all);
        }
    }
    assert!(compared > 100, "only {compared} comparisons were small enough");
    assert!(reduced < full, "nothing was left out: {reduced} of {full} states");
}

/// Operations that a random thread may hold; every one of them is legal on its own.
const GUEST: &[&str] =
    &["load 0", "load 1 shared", "store 0 = x", "store 1 private = y", "request 0..2 shared", "accept 0"];
const OTHER: &[&str] = &[
    "set-attributes 0..1 shared",
    "set-attributes 0..2 private",
    "punch f 0",
    "punch f 0..2",
    "allocate f 0..2",
    "prefault 0..2",
    "dontneed 0..1",
    "munmap 1..2",
    "hwpoison f 1",
    "direct-read f 0",
    "close f",
    "delete slot 0",
    "create slot 1: gfn 2..4, file f at 2",
    "convert f 0..1 shared",
    "convert f 0..2 private",
    "restore f 0",
    "reuse f 0",
];
const RULES: &[&str] = &["", "rules: in-place\n", "rules: no-direct-map-flush\n"];
const FILES: &[&str] = &["file f: 4 pages", "file f: 4 pages, no-direct-map", "file f: 512 pages, folios 2M"];
const TYPES: &[&str] = &["default", "sw-protected", "snp", "tdx", "cca", "pkvm"];

fn program() -> impl Strategy<Value = String> {
    let ops = |from: &'static [&'static str], most| prop::collection::vec(prop::sample::select(from), 1..=most);
    let setting = (prop::sample::select(RULES), prop::sample::select(FILES), prop::sample::select(TYPES));
    (setting, ops(GUEST, 2), ops(OTHER, 2), ops(OTHER, 1)).prop_map(|((rules, file, vm_type), guest, one, two)| {
        let block = |ops: &[&str], prefix: &str| -> String {
            ops.iter().enumerate().map(|(at, op)| format!("    {op} -> {prefix}{at}\n")).collect()
        };
        format!(
            "question: random\ntype: {vm_type}\n{rules}{file}\nslot 0: gfn 0..2, file f at 0\nprivate: 0..1\nvcpu a:\n{}vmm \
             one:\n{}vmm two:\n{}",
            block(&guest, "a"),
            block(&one, "b"),
            block(&two, "c")
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_programs_have_the_same_outcomes_with_and_without(text in program()) {
        let program = gmem_litmus::parse(&text).unwrap();
        let vm_type = program.types[0];
        let off = outcomes(&program, vm_type, Reduction::Off);
        let on = outcomes(&program, vm_type, Reduction::On);
        if let (Some((off, _)), Some((on, _))) = (off, on) {
            prop_assert_eq!(on, off, "{}", text);
        }
    }
}
