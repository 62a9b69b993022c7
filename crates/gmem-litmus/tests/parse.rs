//! Malformed programs: where, and what was expected there.

mod common;

use gmem_litmus::{Limits, Options, parse, run};
use proptest::prelude::*;

/// A program whose last line is wrong, with the column of the fault and what the message must name.
const WRONG: &[(&str, usize, &str)] = &[
    ("frobnicate", 1, "`question`"),
    ("    load 0", 5, "header line"),
    ("type: sw-protected, sve", 21, "`snp`"),
    ("rules: fast", 8, "`in-place`"),
    ("file f 4 pages", 8, "`:`"),
    ("file f: 0 pages", 9, "number of pages"),
    ("file f: 4 bytes", 11, "`pages`"),
    ("file f: 4 pages, huge", 18, "`mmap`"),
    ("slot 0: gfn 4..4", 16, "not empty"),
    ("slot 0: gfn 0..4, file nosuch at 0", 24, "none is declared"),
    ("slot 99: gfn 0..4", 6, "below 64"),
    ("private: 0..9999999", 13, "below 1048576"),
    ("vcpu a, coverts:", 9, "`converts`"),
    ("vcpu:", 5, "name for the vCPU"),
    ("launch: automatic", 9, "`manual`"),
    ("vcpu a:\n    lode 0", 5, "`load`"),
    ("vcpu a:\n    load zero", 10, "page number"),
    ("vcpu a:\n    load 0 -> 7", 15, "register"),
    ("vcpu a:\n    load 0 -> r\n    load 1 -> r", 15, "not used yet"),
    ("vcpu a:\n    store 0", 12, "`=`"),
    ("vcpu a:\n    store 0 = ok", 15, "not the word of a result"),
    ("vcpu a:\n    load 0 expect great", 19, "errno"),
    ("vcpu a:\n    load 0 loudly", 12, "end of the line"),
    ("vcpu a:\nvcpu a:", 6, "no other thread"),
    ("vmm:\n    punch g 0", 11, "none is declared"),
    ("vmm:\n    set-attributes 0..1 open", 25, "`private` or `shared`"),
    ("setup:\n    accept 0 -> r", 17, "has none"),
    ("vcpu a:\n    load 0\nforbidden: b.r0 = ok", 12, "THREAD.REGISTER"),
    ("vcpu a:\n    load 0 -> r0\nforbidden: a.r1 = ok", 14, "r0"),
    ("vcpu a:\n    load 0 -> r0\nforbidden: a.r0 = fine", 19, "result"),
    ("vcpu a:\n    load 0\nforbidden: guest = well", 20, "`alive` or `dead`"),
    ("vcpu a:\n    load 0\nforbidden: (deadlock", 21, "`)`"),
    ("vcpu a:\n    load 0\nforbidden for vax: deadlock", 15, "type of VM"),
    ("question: again", 1, "no second line"),
    ("type: snp\ntype: tdx", 1, "no second line"),
    ("type: snp, snp", 12, "not named yet"),
    ("slot 0: gfn 0..4\nslot 0: gfn 4..8", 6, "not declared yet"),
    ("slot 0: gfn 0..4\nslot 1: gfn 3..8", 6, "no other slot has"),
    ("file f: 4 pages\nslot 0: gfn 0..8, file f at 0", 6, "within the file"),
    ("file f: 4 pages\nslot 0: gfn 0..2, file f at 0\nslot 1: gfn 8..10, file f at 1", 6, "no other slot is bound"),
    ("file user: 4 pages", 6, "other than `user`"),
    ("vcpu leaked:", 6, "no word of conditions"),
    ("vcpu a:\n    punch f 0", 5, "go into `vmm`"),
    ("vmm:\n    load 0", 5, "go into `vcpu`"),
    ("vcpu a:\n    store 0 = y\n    load 1 expect x", 19, "`y`"),
];

#[test]
fn errors_name_the_place_and_what_was_expected() {
    for (text, column, expected) in WRONG {
        let text = format!("question: wrong\n{text}");
        let error = parse(&text).expect_err(&text);
        let line = text.lines().count();
        assert_eq!((error.line, error.column), (line, *column), "{text}\n{error}");
        assert!(error.expected.contains(expected), "{text}\n{error}");
    }
}

#[test]
fn a_program_needs_a_question_and_an_operation() {
    assert!(parse("vcpu a:\n    load 0\n").unwrap_err().expected.contains("question"));
    assert!(parse("question: nothing\n").unwrap_err().expected.contains("operation"));
    assert!(parse("").is_err());
}

#[test]
fn conditions_and_results_may_name_what_comes_later() {
    let text = "required: b.r0 = x\nquestion: order\nslot 0: gfn 0..4\nvcpu b:\n    load 0 -> r0 expect x or zero\nvcpu a:\n    \
                store 0 = x\n";
    let program = parse(text).unwrap();
    assert!(run(&program, program.types[0], &Options::default()).unwrap().holds());
}

#[test]
fn the_reference_has_every_word_of_the_language() {
    let reference = include_str!("../../../docs/litmus-reference.md");
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let known: Vec<&str> = reference.split(|c| !is_word(c)).collect();
    let words = gmem_litmus::words::operations().chain(gmem_litmus::words::others());
    let missing: Vec<_> = words.filter(|word| !known.contains(word)).collect();
    assert!(missing.is_empty(), "docs/litmus-reference.md lacks {missing:?}");
}

#[test]
fn a_program_that_is_too_large_says_how_far_it_came() {
    let (_, program) = common::library().into_iter().find(|(name, _)| name == "freed-memory-is-foreign").unwrap();
    let limits = Limits { states: 50, ..Limits::default() };
    let report = run(&program, program.types[0], &Options { limits, ..Options::default() }).unwrap();
    assert!(report.stopped && !report.holds() && report.states >= 50 && report.memory > 0);
}

#[test]
fn memory_is_bounded_and_reported() {
    let program = parse(include_str!("../benches/large.litmus")).unwrap();
    let limits = Limits { memory: 4 << 20, ..Limits::default() };
    let report = run(&program, program.types[0], &Options { limits, ..Options::default() }).unwrap();
    // A table that grows does so by its own size, so the bound is passed by less than itself.
    assert!(report.stopped && report.memory > 4 << 20 && report.memory < 8 << 20, "{}", report.memory);
    assert!(report.violations.is_empty(), "what was not seen yet is no violation");
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn no_lines_of_words_make_it_panic(
        words in prop::collection::vec(prop::sample::select(vec![
            "question:", "type:", "all", "file", "f", ":", "4", "pages", ",", "slot", "gfn", "0..4", "..", "at", "vcpu", "a",
            "    ", "load", "store", "=", "->", "r", "expect", "ok", "or", "vmm:", "punch", "munmap", "forbidden:", "not", "(",
            ")", ".", "\n", "\n    ", "18446744073709551615", "0x", "#", "memfd", "m", "truncate", "populate", "zero",
        ]), 0..60)
    ) {
        let _ = parse(&words.join(" "));
    }

    /// Damaged programs that still parse are explored too: nothing in them may panic.
    #[test]
    fn damaged_programs_do_not_panic(which in 0usize..1000, at in 0usize..2000, len in 0usize..30, with in "[ a-z0-9.:=\n]{0,8}") {
        let library = common::library_texts();
        let mut text = library[which % library.len()].clone();
        let start = text.char_indices().map(|(at, _)| at).nth(at % text.chars().count()).unwrap();
        let end = text.char_indices().map(|(at, _)| at).find(|end| *end >= start + len).unwrap_or(text.len());
        text.replace_range(start..end, &with);
        if let Ok(program) = parse(&text) {
            let limits = Limits { states: 2000, ..Limits::default() };
            for &vm_type in &program.types {
                let _ = run(&program, vm_type, &Options { limits, ..Options::default() });
            }
        }
    }
}
