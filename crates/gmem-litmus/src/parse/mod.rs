//! From text to [`Program`].
//!
//! Programs are read line by line. Every error names the line, the column and what would have been right there.

mod condition;
pub(crate) mod op;
mod token;

use core::fmt;

use gmem_core::addr::{Gfn, GfnRange, IndexRange, Level, PageIndex, PageNumber, PageRange};
use gmem_core::file::FileFlags;
use gmem_core::vm::{DirectMapFlush, FileFilter, Rules, Tracking};

use crate::program::{Condition, ConditionKind, FileDecl, MemfdDecl, Program, SlotDecl, Thread, ThreadKind, VmType};
use crate::value::Value;
use token::{Kind, Line};

/// The largest page number that a program may name, so that models stay small.
const MAX_PAGE: u64 = 1 << 20;
const MAX_THREADS: usize = 8;
const MAX_STMTS: usize = 256;
const MAX_VALUES: usize = 200;

/// Words that begin a line in the first column.
pub(crate) const HEADER: &[&str] = &[
    "question",
    "asked",
    "type",
    "rules",
    "launch",
    "file",
    "memfd",
    "slot",
    "private",
    "setup",
    "vcpu",
    "vmm",
    "host",
    "forbidden",
    "required",
    "allowed",
];
/// Behaviour of kernels that a program can choose.
pub(crate) const RULES: &[&str] =
    &["in-place", "no-direct-map-flush", "populate-once", "populate-keeps-lock", "private-filter", "prefault-waits"];
/// Words within lines.
pub(crate) const WITHIN: &[&str] = &[
    "all",
    "manual",
    "pages",
    "bytes",
    "mmap",
    "init-shared",
    "no-direct-map",
    "folios",
    "2M",
    "1G",
    "gfn",
    "file",
    "at",
    "user",
    "converts",
    "private",
    "shared",
    "expect",
    "or",
    "and",
    "not",
    "for",
    "unsplittable",
    "unmeasured",
    "to",
    "slot",
    "vm",
    "guest",
    "alive",
    "dead",
    "leaked",
    "measured",
];

/// Where a text is not a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What would have been right.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: expected {}, found {}", self.line, self.column, self.expected, self.found)
    }
}

impl std::error::Error for ParseError {}

/// Reads a program.
///
/// # Errors
/// The first place where the text is not one.
pub fn parse(text: &str) -> Result<Program, ParseError> {
    // Results may name values, and conditions threads, that come further down; so values are collected first, and conditions
    // are read last.
    let values = read(text, Vec::new(), Names::Collected)?.values;
    read(text, values, Names::Known)
}

/// Whether every value that the program names is known yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Collected,
    Known,
}

fn read(text: &str, values: Vec<String>, names: Names) -> Result<Program, ParseError> {
    let mut parser = Parser::new(values, names);
    let mut conditions = Vec::new();
    let mut last = 1;
    for (at, text) in text.lines().enumerate() {
        let mut line = Line::new(at + 1, text);
        last = at + 1;
        if line.is_blank() {
            continue;
        }
        match condition_kind(&line) {
            Some(kind) => {
                parser.block = Block::Header;
                line.next();
                conditions.push((line, kind));
            }
            None => parser.line(&mut line)?,
        }
    }
    if names == Names::Known {
        conditions.iter_mut().try_for_each(|(line, kind)| parser.condition(line, *kind))?;
    }
    parser.finish(last)
}

fn condition_kind(line: &Line<'_>) -> Option<ConditionKind> {
    match line.peek() {
        _ if line.is_indented() => None,
        Some(Kind::Word("forbidden")) => Some(ConditionKind::Forbidden),
        Some(Kind::Word("required")) => Some(ConditionKind::Required),
        Some(Kind::Word("allowed")) => Some(ConditionKind::Allowed),
        _ => None,
    }
}

/// Which block the lines belong to.
#[derive(Clone, Copy)]
enum Block {
    Header,
    Setup,
    Thread(usize),
}

struct Parser {
    program: Program,
    block: Block,
    names: Names,
    /// Header lines that may stand once.
    seen: Vec<String>,
}

impl Parser {
    fn new(values: Vec<String>, names: Names) -> Self {
        let program = Program {
            question: String::new(),
            asked: String::new(),
            types: VmType::ALL.to_vec(),
            values,
            rules: Rules { max_slots: 64, ..Rules::default() },
            manual_launch: false,
            files: Vec::new(),
            memfds: Vec::new(),
            slots: Vec::new(),
            private: Vec::new(),
            setup: Vec::new(),
            threads: Vec::new(),
            conditions: Vec::new(),
        };
        Self { program, block: Block::Header, names, seen: Vec::new() }
    }

    fn line(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        match (line.is_indented(), self.block) {
            (true, Block::Setup) => self.stmt(line, None),
            (true, Block::Thread(thread)) => self.stmt(line, Some(thread)),
            (true, Block::Header) => Err(line.error("a header line, which begins in the first column")),
            (false, _) => self.header(line),
        }
    }

    fn header(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        let expected = || {
            let words: Vec<_> = HEADER.iter().map(|word| format!("`{word}`")).collect();
            format!("one of {}", words.join(", "))
        };
        let word = line.word(&expected())?;
        self.block = Block::Header;
        self.once(line, word)?;
        match word {
            "question" => {
                line.sign(":")?;
                self.program.question = line.rest().to_owned();
                return Ok(());
            }
            "asked" => {
                line.sign(":")?;
                self.program.asked = line.rest().to_owned();
                return Ok(());
            }
            "type" => self.types(line)?,
            "rules" => self.rules(line)?,
            "launch" => {
                line.sign(":")?;
                line.keyword("manual")?;
                self.program.manual_launch = true;
            }
            "file" => self.file(line)?,
            "memfd" => self.memfd(line)?,
            "slot" => self.declared_slot(line)?,
            "private" => {
                line.sign(":")?;
                let ranges = list(line, gfns)?;
                self.program.private.extend(ranges);
            }
            "setup" => {
                line.sign(":")?;
                self.block = Block::Setup;
            }
            "vcpu" => self.vcpu(line)?,
            "vmm" | "host" => self.other(line, word)?,
            _ => return Err(line.error_before(expected())),
        }
        line.end()
    }

    /// A second line of these would silently replace the first.
    fn once(&mut self, line: &mut Line<'_>, word: &str) -> Result<(), ParseError> {
        if !["question", "asked", "type", "launch", "setup"].contains(&word) {
            return Ok(());
        }
        if self.seen.iter().any(|seen| seen == word) {
            return Err(line.error_before(format!("no second line `{word}`")));
        }
        self.seen.push(word.to_owned());
        Ok(())
    }

    fn types(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        line.sign(":")?;
        if line.eat_word("all") {
            return Ok(());
        }
        self.program.types.clear();
        list(line, |line| {
            let one = vm_type(line)?;
            if self.program.types.contains(&one) {
                return Err(line.error_before("a type that was not named yet"));
            }
            self.program.types.push(one);
            Ok(())
        })?;
        Ok(())
    }

    fn rules(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        line.sign(":")?;
        let names = list(line, |line| {
            let expected =
                || format!("a rule: {}", RULES.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "));
            let name = line.word(&expected())?;
            if RULES.contains(&name) { Ok(name.to_owned()) } else { Err(line.error_before(expected())) }
        })?;
        let rules = &mut self.program.rules;
        for name in names {
            match name.as_str() {
                "in-place" => rules.tracking = Tracking::InPlace,
                "no-direct-map-flush" => rules.direct_map_flush = DirectMapFlush::NoFlush,
                "populate-once" => rules.populate_once = true,
                "populate-keeps-lock" => rules.populate_keeps_lock = true,
                "private-filter" => rules.file_filter = FileFilter::Private,
                _ => rules.prefault_reports_dying_slot = false,
            }
        }
        Ok(())
    }

    fn file(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        let name = self.new_name(line)?;
        line.sign(":")?;
        let pages = pages(line)?;
        let mut file = FileDecl { name, pages, flags: FileFlags::empty(), folios: Level::Page4K };
        while line.eat_sign(",") {
            const FLAGS: &str = "`mmap`, `init-shared`, `no-direct-map`, `folios 2M` or `folios 1G`";
            match line.word(FLAGS)? {
                "mmap" => file.flags |= FileFlags::MMAP,
                "init-shared" => file.flags |= FileFlags::INIT_SHARED,
                "no-direct-map" => file.flags |= FileFlags::NO_DIRECT_MAP,
                "folios" => file.folios = level(line)?,
                _ => return Err(line.error_before(FLAGS)),
            }
        }
        self.program.files.push(file);
        Ok(())
    }

    fn memfd(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        let name = self.new_name(line)?;
        line.sign(":")?;
        let pages = pages(line)?;
        let mut folio = 1;
        if line.eat_sign(",") {
            line.keyword("folios")?;
            folio = level(line)?.pages();
        }
        self.program.memfds.push(MemfdDecl { name, pages, folio });
        Ok(())
    }

    fn new_name(&self, line: &mut Line<'_>) -> Result<String, ParseError> {
        let name = line.word("a name for the file")?;
        let files = self.program.files.iter().map(|file| &file.name);
        if files.chain(self.program.memfds.iter().map(|memfd| &memfd.name)).any(|other| other == name) {
            return Err(line.error_before("a name that no other file has"));
        }
        if name == "user" {
            return Err(line.error_before("a name other than `user`, which is the VMM's own memory"));
        }
        Ok(name.to_owned())
    }

    /// The slots of the header are there together, so they must not be in each other's way.
    fn declared_slot(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        let start = line.position();
        let slot = self.slot(line)?;
        let slots = &self.program.slots;
        let problem = if slots.iter().any(|other| other.number == slot.number) {
            Some("the number of a slot that is not declared yet")
        } else if slots.iter().any(|other| other.gfns.intersect(slot.gfns).is_some()) {
            Some("frames that no other slot has")
        } else if slots.iter().any(|other| other.shares_pages_with(&slot)) {
            Some("pages of the file that no other slot is bound to")
        } else if slot.file.is_some_and(|(file, _)| !slot.fits(self.program.files.get(file))) {
            Some("pages that lie within the file")
        } else {
            None
        };
        if let Some(expected) = problem {
            line.rewind(start);
            return Err(line.error(expected));
        }
        self.program.slots.push(slot);
        Ok(())
    }

    /// `N: gfn A..B[, file F at I][, user at U]`
    fn slot(&self, line: &mut Line<'_>) -> Result<SlotDecl, ParseError> {
        let number = slot_number(line)?;
        line.sign(":")?;
        line.keyword("gfn")?;
        let gfns = gfns(line)?;
        let mut slot = SlotDecl { number, gfns, file: None, user: gfns.start().0 };
        while line.eat_sign(",") {
            match line.word("`file` or `user`")? {
                "file" => {
                    let file = self.file_name(line)?;
                    line.keyword("at")?;
                    slot.file = Some((file, PageIndex(page(line)?)));
                }
                "user" => {
                    line.keyword("at")?;
                    slot.user = page(line)?;
                }
                _ => return Err(line.error_before("`file` or `user`")),
            }
        }
        Ok(slot)
    }

    fn file_name(&self, line: &mut Line<'_>) -> Result<usize, ParseError> {
        let names = || {
            let names: Vec<_> = self.program.files.iter().map(|file| format!("`{}`", file.name)).collect();
            if names.is_empty() {
                "a file, but none is declared".into()
            } else {
                format!("a file: {}", names.join(", "))
            }
        };
        let Some(Kind::Word(name)) = line.peek() else { return Err(line.error(names())) };
        let found = self.program.files.iter().position(|file| file.name == name);
        let file = found.ok_or_else(|| line.error(names()))?;
        line.next();
        Ok(file)
    }

    fn memfd_name(&self, line: &mut Line<'_>) -> Option<usize> {
        let Some(Kind::Word(name)) = line.peek() else { return None };
        let found = self.program.memfds.iter().position(|memfd| memfd.name == name)?;
        line.next();
        Some(found)
    }

    fn vcpu(&mut self, line: &mut Line<'_>) -> Result<(), ParseError> {
        let name = line.word("a name for the vCPU")?.to_owned();
        let mut converts = false;
        if line.eat_sign(",") {
            line.keyword("converts")?;
            converts = true;
        }
        let number = self.program.vcpus();
        self.thread(line, name, ThreadKind::Vcpu { number, converts })
    }

    fn other(&mut self, line: &mut Line<'_>, role: &str) -> Result<(), ParseError> {
        let name = match line.peek() {
            Some(Kind::Word(name)) => {
                line.next();
                name.to_owned()
            }
            _ => role.to_owned(),
        };
        self.thread(line, name, ThreadKind::Other)
    }

    fn thread(&mut self, line: &mut Line<'_>, name: String, kind: ThreadKind) -> Result<(), ParseError> {
        if self.program.threads.iter().any(|thread| thread.name == name) {
            return Err(line.error_before("a name that no other thread has"));
        }
        if condition::is_reserved(&name) {
            return Err(line.error_before("a name that is no word of conditions"));
        }
        line.sign(":")?;
        if self.program.threads.len() >= MAX_THREADS {
            return Err(line.error_before(format!("at most {MAX_THREADS} threads")));
        }
        self.block = Block::Thread(self.program.threads.len());
        self.program.threads.push(Thread { name, kind, stmts: Vec::new(), registers: Vec::new() });
        Ok(())
    }

    fn condition(&mut self, line: &mut Line<'_>, kind: ConditionKind) -> Result<(), ParseError> {
        let types = if line.eat_word("for") { list(line, vm_type)? } else { Vec::new() };
        line.sign(":")?;
        let text = line.stripped().to_owned();
        let expr = condition::expr(line, &self.program)?;
        self.program.conditions.push(Condition { kind, types, expr, line: line.number, text });
        Ok(())
    }

    /// The value with this name, which is new if it has not been named yet.
    fn value(&mut self, line: &mut Line<'_>) -> Result<Value, ParseError> {
        const EXPECTED: &str = "`zero` or a name for the value";
        let name = line.word(EXPECTED)?;
        if name == "zero" {
            return Ok(Value::Zero);
        }
        if crate::value::Seen::of_word(name).is_some() || name == "or" {
            return Err(line.error_before(format!("{EXPECTED} that is not the word of a result")));
        }
        let known = self.program.values.iter().position(|value| value == name);
        if known.is_none() && self.program.values.len() >= MAX_VALUES {
            return Err(line.error_before(format!("at most {MAX_VALUES} values")));
        }
        let at = known.unwrap_or_else(|| {
            self.program.values.push(name.to_owned());
            self.program.values.len() - 1
        });
        Ok(Value::Named(u8::try_from(at).unwrap_or(u8::MAX)))
    }

    fn finish(self, last: usize) -> Result<Program, ParseError> {
        let missing = |expected: &str| ParseError {
            line: last,
            column: 1,
            expected: expected.into(),
            found: "the end of the file".into(),
        };
        if self.program.question.is_empty() {
            return Err(missing("a line `question: …`"));
        }
        if self.program.threads.iter().all(|thread| thread.stmts.is_empty()) && self.program.setup.is_empty() {
            return Err(missing("a thread with an operation"));
        }
        Ok(self.program)
    }
}

fn list<'s, T>(
    line: &mut Line<'s>,
    mut item: impl FnMut(&mut Line<'s>) -> Result<T, ParseError>,
) -> Result<Vec<T>, ParseError> {
    let mut items = vec![item(line)?];
    while line.eat_sign(",") {
        items.push(item(line)?);
    }
    Ok(items)
}

fn vm_type(line: &mut Line<'_>) -> Result<VmType, ParseError> {
    let names = || {
        let names: Vec<_> = VmType::ALL.iter().map(|vm_type| format!("`{}`", vm_type.name())).collect();
        format!("a type of VM: {}", names.join(", "))
    };
    let name = line.word(&names())?;
    VmType::of_name(name).ok_or_else(|| line.error_before(names()))
}

fn page(line: &mut Line<'_>) -> Result<u64, ParseError> {
    let page = line.number("a page number")?;
    if page < MAX_PAGE { Ok(page) } else { Err(line.error_before(format!("a page number below {MAX_PAGE}"))) }
}

fn pages(line: &mut Line<'_>) -> Result<u64, ParseError> {
    let pages = line.number("a number of pages")?;
    if pages == 0 || pages > MAX_PAGE {
        return Err(line.error_before(format!("a number of pages from 1 to {MAX_PAGE}")));
    }
    if !line.eat_word("pages") {
        line.keyword("page").map_err(|_| line.error("`pages`"))?;
    }
    Ok(pages)
}

/// `A..B`, half open, or `A` for a single page.
fn range<P: PageNumber>(line: &mut Line<'_>) -> Result<PageRange<P>, ParseError> {
    let start = page(line)?;
    let end = if line.eat_sign("..") { page(line)? } else { start + 1 };
    PageRange::new(P::from_raw(start), P::from_raw(end))
        .ok_or_else(|| line.error_before("the first page after a range that is not empty"))
}

fn gfns(line: &mut Line<'_>) -> Result<GfnRange, ParseError> {
    range(line)
}

fn indices(line: &mut Line<'_>) -> Result<IndexRange, ParseError> {
    range(line)
}

fn gfn(line: &mut Line<'_>) -> Result<Gfn, ParseError> {
    page(line).map(Gfn)
}

fn slot_number(line: &mut Line<'_>) -> Result<u16, ParseError> {
    let number = line.number("the number of a slot")?;
    u16::try_from(number)
        .ok()
        .filter(|number| *number < 64)
        .ok_or_else(|| line.error_before("the number of a slot, below 64"))
}

fn level(line: &mut Line<'_>) -> Result<Level, ParseError> {
    match line.word("`4K`, `2M` or `1G`")? {
        "4K" => Ok(Level::Page4K),
        "2M" => Ok(Level::Page2M),
        "1G" => Ok(Level::Page1G),
        _ => Err(line.error_before("`4K`, `2M` or `1G`")),
    }
}
