//! The reduction loses no outcome.

mod common;

use std::collections::BTreeSet;

use gmem_litmus::{Limits, Options, Outcome, Program, Reduction, VmType, run};
use proptest::prelude::*;

fn outcomes(program: &Program, vm_type: VmType, reduction: Reduction) -> Option<(BTreeSet<Outcome>, usize)> {
    let limits = Limits { states: 100_000, ..Limits::default() };
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

/// Operations that a random thread may hold; every one of them is legal on its own. Together they are every operation of the
/// language (the last test sees to that).
const GUEST: &[&str] = &[
    "load 0",
    "load 1 shared",
    "fetch 0 private",
    "store 0 = x",
    "store 1 private = y",
    "request 0..2 shared",
    "request 0..1 private",
    "share 0",
    "accept 0",
];
const OTHER: &[&str] = &[
    "set-attributes 0..1 shared",
    "set-attributes 0..2 private",
    "punch f 0",
    "punch f 0..2",
    "punch f 0 unsplittable",
    "allocate f 0..2",
    "prefault 0..2",
    "populate 0 = image",
    "populate 0..2 = image",
    "finalize",
    "dontneed 0..1",
    "munmap 1..2",
    "remap 0..2",
    "read user 0",
    "write user 1 = z",
    "read f 0",
    "write f 1 = z",
    "hwpoison f 1",
    "direct-read f 0",
    "direct-write f 0 = z",
    "close f",
    "close vm",
    "delete slot 0",
    "create slot 1: gfn 2..4, file f at 2",
    "move slot 2 to 8",
    "convert f 0..1 shared",
    "convert f 0..2 private",
    "pin f 1",
    "unpin f 1",
    "reclaim f 0",
    "migrate f 0",
    "restore f 0",
    "reuse f 0",
    "split 0",
    "collapse 0",
    "seal m",
    "map m",
    "unmap m",
    "read m 0",
    "write m 0 = z",
    "guest-write m 0 = x",
    "truncate m 0",
    "punch m 0",
    "swap m 0",
];
const RULES: &[&str] = &[
    "",
    "rules: in-place\n",
    "rules: no-direct-map-flush\n",
    "rules: private-filter, populate-once, populate-keeps-lock, prefault-waits\n",
];
const FILES: &[&str] = &[
    "4 pages",
    "4 pages, mmap",
    "4 pages, no-direct-map",
    "512 pages, folios 2M",
    "512 pages, no-direct-map, folios 2M",
];
const TYPES: &[&str] = &["default", "sw-protected", "sev", "sev-es", "snp", "tdx", "cca", "pkvm"];
const LAUNCH: &[&str] = &["", "launch: manual\n"];
const VCPU: &[&str] = &["vcpu a", "vcpu a, converts"];

fn program() -> impl Strategy<Value = String> {
    let ops = |from: &'static [&'static str], most| prop::collection::vec(prop::sample::select(from), 1..=most);
    let pick = prop::sample::select::<&'static str>;
    let setting = (pick(RULES), pick(FILES), pick(TYPES), pick(LAUNCH), pick(VCPU));
    (setting, ops(GUEST, 2), ops(OTHER, 2), ops(OTHER, 1)).prop_map(|((rules, file, vm_type, launch, vcpu), guest, one, two)| {
        let block = |ops: &[&str], prefix: &str| -> String {
            ops.iter().enumerate().map(|(at, op)| format!("    {op} -> {prefix}{at}\n")).collect()
        };
        format!(
            "question: random\ntype: {vm_type}\n{rules}{launch}file f: {file}\nmemfd m: 2 pages\nslot 0: gfn 0..2, file f at 0\n\
             slot 2: gfn 4..6\nprivate: 0..1\n{vcpu}:\n{}vmm one:\n{}vmm two:\n{}allowed: refaulted or not refaulted\n",
            block(&guest, "a"),
            block(&one, "b"),
            block(&two, "c")
        )
    })
}

#[test]
fn the_random_programs_hold_every_operation() {
    let missing: Vec<_> = gmem_litmus::words::operations()
        .filter(|word| !GUEST.iter().chain(OTHER).any(|op| op.split(' ').next() == Some(word)))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

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
