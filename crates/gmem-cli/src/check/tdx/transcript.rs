//! Transcripts: one command per line, and what the module answered.
//!
//! The recorded line says which of the answer's parts its driver printed; their values are the model's. Each line is a
//! case and has to come out exactly as recorded.
//!
//! What a line means has to be known beyond the command itself in two places: how numbers without a prefix are read, and
//! whether an interrupt counter counts the poll that finds the interrupt, once or again and again. Numbers are decimal
//! unless one of them has a letter, and an interrupt comes once, at the poll that the counter names. Only where a transcript's
//! own words leave it open, that is, where it has numbers that differ between the bases, or interrupts, the other ways to read it
//! are tried too; the one that reproduces most lines is taken for all of them, and the report names it.

use std::collections::BTreeMap;

use super::super::Transcript;
use super::{Case, TDR, large_page, recorded_td, small_page, td_exit};
use gmem_core::vendor::tdx::sept::SeptState;
use gmem_core::vendor::tdx::status::TdxStatus;
use gmem_core::vendor::tdx::tables::OpState;
use gmem_core::vendor::tdx::{Accepted, Answer, Command, Lifecycle, Measurement, NULL_PA, PageInfo, Tdx};

/// One case per line, or `None` if these are not lines of TDX commands.
pub(crate) fn replay_transcript(input: &str, recorded: &str) -> Option<Transcript> {
    let lines: Vec<_> = input.lines().map(str::trim_end).filter(|line| is_command(line)).collect();
    lines.iter().find(|line| leaf_name(line.split_whitespace().next().unwrap_or_default()).is_some())?;
    let failures = |cases: &[Case]| cases.iter().filter(|case| case.outcome.is_err()).count();
    let replay = |(number, reading)| (number, reading, Replay::new(reading).run(&lines, recorded));
    let readings = Reading::of(&lines).enumerate().map(replay);
    let (number, reading, cases) = readings.min_by_key(|(_, _, cases)| failures(cases))?;
    Some(Transcript { cases, reading: (number > 0).then(|| reading.name()) })
}

fn is_command(line: &str) -> bool {
    !line.trim_start().is_empty() && !line.trim_start().starts_with('#')
}

/// When a counted interrupt is pending again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Once,
    EveryTime,
    FromThenOn,
}

/// How the parts of a transcript that explain themselves least are read.
#[derive(Clone, Copy)]
struct Reading {
    radix: u32,
    extra_polls: u32,
    repeat: Repeat,
}

impl Reading {
    /// The ways in which lines can be read, the usual one first; there is one if they leave nothing open.
    fn of(lines: &[&str]) -> impl Iterator<Item = Self> {
        let words = || lines.iter().flat_map(|line| line.split_whitespace().skip(1));
        let is_hexadecimal = |word: &str| u64::from_str_radix(word, 16).is_ok();
        let has_letters = words().any(|word| is_hexadecimal(word) && word.parse::<u64>().is_err() && !is_page(word));
        let is_open = words().any(|word| word.len() > 1 && word.parse::<u64>().is_ok());
        let radices: &[u32] = match (has_letters, is_open) {
            (true, _) => &[16, 10],
            (false, true) => &[10, 16],
            (false, false) => &[10],
        };
        let interrupts = lines.iter().any(|line| is_interrupt(line.split_whitespace().next().unwrap_or_default()));
        let all = [Repeat::Once, Repeat::EveryTime, Repeat::FromThenOn];
        let repeats = if interrupts { &all[..] } else { &all[..1] };
        let extra_polls = if interrupts { 0..=1 } else { 0..=0 };
        let reading = |radix, repeat| move |extra_polls| Self { radix, extra_polls, repeat };
        let mut readings = Vec::new();
        for radix in radices {
            readings.extend(repeats.iter().flat_map(|repeat| extra_polls.clone().map(reading(*radix, *repeat))));
        }
        readings.into_iter()
    }

    fn name(self) -> String {
        let repeat = match self.repeat {
            Repeat::Once => "once",
            Repeat::EveryTime => "in every command",
            Repeat::FromThenOn => "from then on",
        };
        let (radix, polls) = (self.radix, self.extra_polls);
        format!(
            "numbers have base {radix}, an interrupt comes {repeat} and {polls} polls after the one that its counter names"
        )
    }

    /// A number: hexadecimal with a prefix or letters, else as this reading says.
    fn number(self, text: &str) -> Option<u64> {
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => u64::from_str_radix(text, self.radix).or_else(|_| u64::from_str_radix(text, 16)).ok(),
        }
    }

    /// An HPA: `p3`, `b0`, `tdr`, a number, or one of these and an offset.
    fn hpa(self, text: &str) -> Option<u64> {
        if let Some((base, offset)) = text.split_once('+') {
            return self.hpa(base)?.checked_add(self.number(offset)?);
        }
        match text.to_ascii_lowercase().as_str() {
            "tdr" => return Some(TDR),
            "null" | "null_pa" | "none" | "-" | "-1" => return Some(NULL_PA),
            _ => {}
        }
        let decimal = |digits: &str| digits.parse().ok();
        match text.strip_prefix('p').and_then(decimal) {
            Some(n) => Some(small_page(n)),
            None => text.strip_prefix('b').and_then(decimal).map(large_page).or_else(|| self.number(text)),
        }
    }
}

/// Whether a word names a page of the driver and is no number: `b0`.
fn is_page(word: &str) -> bool {
    word.strip_prefix(['p', 'b']).is_some_and(|number| number.parse::<u64>().is_ok())
}

fn is_interrupt(word: &str) -> bool {
    matches!(word.to_lowercase().as_str(), "intr" | "interrupt" | "irq" | "interrupt_after" | "intr_after")
}

/// The leaf that a word names, with or without its family's prefix.
fn leaf_name(word: &str) -> Option<&'static str> {
    const NAMES: [&str; 20] = [
        "SEPT.ADD",
        "SEPT.REMOVE",
        "SEPT.RD",
        "PAGE.ADD",
        "PAGE.AUG",
        "PAGE.REMOVE",
        "PAGE.PROMOTE",
        "PAGE.DEMOTE",
        "PAGE.RELOCATE",
        "RANGE.BLOCK",
        "RANGE.UNBLOCK",
        "TRACK",
        "MR.EXTEND",
        "MR.FINALIZE",
        "PAGE.ACCEPT",
        "ACCEPT",
        "PAGE.RECLAIM",
        "RECLAIM",
        "MNG.VPFLUSHDONE",
        "MNG.KEY.FREEID",
    ];
    let word = word.to_uppercase().replace('_', ".");
    let word = ["TDH.", "TDG.", "MEM.", "PHYMEM."]
        .iter()
        .fold(word.as_str(), |word, family| word.strip_prefix(family).unwrap_or(word));
    NAMES.into_iter().find(|name| *name == word || name.strip_prefix("MNG.") == Some(word))
}

/// What a line left behind: words that may be printed as they are, and values by name.
#[derive(Default)]
struct Facts {
    required: Vec<String>,
    words: Vec<String>,
    values: Vec<(&'static str, String)>,
}

impl Facts {
    fn of(answer: Answer) -> Self {
        let name = answer.status.name().unwrap_or("?").to_owned();
        let registers = [("rcx", answer.rcx), ("rdx", answer.rdx), ("r8", answer.r8)];
        Self {
            required: vec![format!("{:016x}", answer.status.0), name],
            words: Vec::new(),
            values: registers.map(|(name, value)| (name, format!("{value:x}"))).into(),
        }
    }

    /// The line `input` continued as `recorded` is, with this line's own words and values.
    fn render(&self, input: &str, recorded: &str) -> String {
        let tail = recorded.strip_prefix(input).unwrap_or_default();
        let tokens: Vec<_> = tail.split_whitespace().map(|token| self.token(token)).collect();
        let missing = self.required.iter().filter(|word| !tokens.contains(word));
        let line: Vec<_> = std::iter::once(input.to_owned()).chain(tokens.iter().cloned()).collect();
        line.into_iter().chain(missing.cloned()).collect::<Vec<_>>().join(" ")
    }

    fn token(&self, token: &str) -> String {
        let known = self.required.iter().chain(&self.words).any(|word| word == token);
        if token == "->" || known {
            return token.to_owned();
        }
        match token.split_once('=') {
            Some((key, _)) => {
                let value = self.values.iter().find(|(name, _)| *name == key);
                format!("{key}={}", value.map_or("?", |(_, value)| value))
            }
            None => "?".to_owned(),
        }
    }
}

struct Replay {
    reading: Reading,
    td: Tdx,
    interrupt: Option<u32>,
    /// The byte that fills a 4 KiB page; the driver's memory is zero at first.
    contents: BTreeMap<u64, u8>,
}

impl Replay {
    fn new(reading: Reading) -> Self {
        Self { reading, td: recorded_td(), interrupt: None, contents: BTreeMap::new() }
    }

    fn run(mut self, lines: &[&str], recorded: &str) -> Vec<Case> {
        let mut rest = recorded.lines().map(str::trim_end);
        let mut cases = Vec::new();
        for line in lines {
            let found = rest.clone().position(|r| r == *line || r.starts_with(&format!("{line} ")));
            let wanted = found.and_then(|at| rest.nth(at)).unwrap_or("not in the recording");
            let words: Vec<_> = line.split_whitespace().collect();
            let got = self.line(&words).map(|facts| facts.render(line, wanted));
            cases.push(Case::compare(*line, wanted, got.unwrap_or_else(|| format!("{line}: not expressible"))));
        }
        cases
    }

    fn line(&mut self, words: &[&str]) -> Option<Facts> {
        let (first, arguments) = words.split_first()?;
        self.arm_interrupt();
        match leaf_name(first) {
            Some("ACCEPT" | "PAGE.ACCEPT") => self.accept(arguments),
            Some(leaf) => {
                let command = self.command(leaf, arguments)?;
                let answer = self.td.execute(command).ok()?;
                self.move_contents(command, answer);
                Some(Facts::of(answer))
            }
            None => self.driver(&first.to_lowercase(), arguments),
        }
    }

    /// PAGE.ADD and PAGE.RELOCATE copy; no other leaf of the host touches contents, PAGE.REMOVE included.
    fn move_contents(&mut self, command: Command<'_>, answer: Answer) {
        let (from, to) = match command {
            _ if answer.status != TdxStatus::SUCCESS => return,
            Command::PageAdd { page, source, .. } => (source, page),
            Command::PageRelocate { page, .. } => (answer.rcx, page),
            _ => return,
        };
        let byte = self.contents.get(&(from >> 12)).copied().unwrap_or(0);
        self.contents.insert(to >> 12, byte);
    }

    fn peek(&self, page: &str) -> Option<Facts> {
        let byte = self.contents.get(&(self.reading.hpa(page)? >> 12)).copied().unwrap_or(0);
        let words = [1, 4, 8, 16].map(|count| format!("{byte:02x}").repeat(count));
        let words = words.into_iter().flat_map(|digits| [format!("0x{digits}"), digits]).collect();
        Some(Facts { words, ..Facts::default() })
    }

    fn arm_interrupt(&mut self) {
        match self.reading.repeat {
            Repeat::EveryTime => self.td.set_interrupt(self.interrupt),
            Repeat::Once | Repeat::FromThenOn => {}
        }
    }

    fn accept(&mut self, arguments: &[&str]) -> Option<Facts> {
        let at = self.page_info(arguments)?;
        let gfn = at.0 >> 12;
        let (level, pending) = self.td.sept().walk(3, (at.0 & 7) as u8, gfn);
        let accepted = self.td.page_accept(at);
        if !matches!(accepted, Accepted::TdExit(_)) && pending.state == SeptState::Pending {
            let done = match self.td.sept().entry(level, gfn) {
                entry if entry.state == SeptState::Pending => u64::from(entry.accepted),
                _ => 1 << (9 * level),
            };
            let first = pending.pfn(level);
            self.contents.extend((first..first + done).map(|pfn| (pfn, 0)));
        }
        match accepted {
            Accepted::Returned(status) => Some(Facts::of(Answer { status, ..Answer::default() })),
            Accepted::Interrupted => Some(self.interrupted()),
            exit @ Accepted::TdExit(_) => {
                let required = td_exit(exit)?.split(' ').map(str::to_owned).collect();
                Some(Facts { required, ..Facts::default() })
            }
        }
    }

    /// The module reports success of the handler and does not advance the guest; drivers print that in various ways.
    fn interrupted(&mut self) -> Facts {
        if self.reading.repeat == Repeat::FromThenOn {
            self.td.set_interrupt(Some(1));
        }
        let success = Facts::of(Answer::default());
        let mut words = success.required;
        words.extend(["INTERRUPTED", "interrupted", "(interrupted)", "(INTERRUPTED)"].map(str::to_owned));
        let mut values = success.values;
        values.extend(["interrupted", "interrupt", "interrupt_occurred", "intr"].map(|key| (key, "1".to_owned())));
        Facts { required: Vec::new(), words, values }
    }

    fn page_info(&self, arguments: &[&str]) -> Option<PageInfo> {
        let gpa = self.reading.number(arguments.first()?)?;
        let level = arguments.get(1).map_or(Some(0), |level| self.reading.number(level))?;
        // The driver joins the two; a level that does not fit shows up as reserved bits.
        Some(PageInfo(gpa | level))
    }

    fn command(&self, leaf: &str, arguments: &[&str]) -> Option<Command<'static>> {
        let at = || self.page_info(arguments);
        let hpa = |i: usize| arguments.get(i).and_then(|text| self.reading.hpa(text));
        let version = |i: usize| match arguments.get(i) {
            Some(text) => text.trim_start_matches('v').parse().ok(),
            None => Some(0),
        };
        Some(match leaf {
            "SEPT.ADD" => Command::SeptAdd { at: at()?, page: hpa(2)?, version: version(3)? },
            "SEPT.REMOVE" => Command::SeptRemove { at: at()?, version: version(2)? },
            "SEPT.RD" => Command::SeptRead { at: at()? },
            "PAGE.ADD" => self.page_add(arguments)?,
            "PAGE.AUG" => Command::PageAug { at: at()?, page: hpa(2)? },
            "PAGE.REMOVE" => Command::PageRemove { at: at()? },
            "PAGE.PROMOTE" => Command::PagePromote { at: at()?, version: version(2)? },
            "PAGE.DEMOTE" => Command::PageDemote { at: at()?, page: hpa(2)? },
            "PAGE.RELOCATE" => self.page_relocate(arguments)?,
            "RANGE.BLOCK" => Command::RangeBlock { at: at()? },
            "RANGE.UNBLOCK" => Command::RangeUnblock { at: at()? },
            "TRACK" => Command::Track,
            "MR.EXTEND" => Command::MrExtend { gpa: self.reading.number(arguments.first()?)?, chunk: &[0; 256] },
            "MR.FINALIZE" => Command::MrFinalize,
            "PAGE.RECLAIM" | "RECLAIM" => Command::PageReclaim { page: hpa(0)? },
            "MNG.VPFLUSHDONE" => Command::VpFlushDone,
            "MNG.KEY.FREEID" => Command::KeyFreeId,
            _ => return None,
        })
    }

    /// Whether the second argument is a level; leaves that know one level may be written without.
    fn has_level(&self, arguments: &[&str]) -> bool {
        arguments.get(1).and_then(|level| self.reading.number(level)).is_some_and(|level| level < 8)
    }

    fn page_add(&self, arguments: &[&str]) -> Option<Command<'static>> {
        let levels = usize::from(self.has_level(arguments));
        let at = self.page_info(arguments.get(..=levels)?)?;
        let page = self.reading.hpa(arguments.get(1 + levels)?)?;
        let source = arguments.get(2 + levels).map_or(Some(small_page(0)), |source| self.reading.hpa(source))?;
        Some(Command::PageAdd { at, page, source })
    }

    fn page_relocate(&self, arguments: &[&str]) -> Option<Command<'static>> {
        let levels = usize::from(self.has_level(arguments));
        let at = self.page_info(arguments.get(..=levels)?)?;
        Some(Command::PageRelocate { at, page: self.reading.hpa(arguments.get(1 + levels)?)? })
    }

    /// Commands of the driver itself.
    fn driver(&mut self, name: &str, arguments: &[&str]) -> Option<Facts> {
        let argument = arguments.first().copied();
        let number = || self.reading.number(argument?);
        let small = || number().and_then(|n| u16::try_from(n).ok());
        match name {
            "op_state" => {
                let by_number = number().and_then(|n| OpState::ALL.get(usize::try_from(n).ok()?));
                let by_name = || OpState::ALL.iter().find(|(name, _)| Some(*name) == argument);
                self.td.set_op_state(by_number.or_else(by_name)?.1);
            }
            "lifecycle" => self.td.set_lifecycle(*Lifecycle::ALL.get(usize::from(small()?))?),
            "fatal" => self.td.set_fatal(argument.is_none_or(|fatal| fatal != "0")),
            "vcpus" | "num_vcpus" => self.td.set_vcpus(small()?),
            "enter" => self.td.vcpu_enter(small().unwrap_or(0)).ok()?,
            "exit" => self.td.vcpu_exit(small().unwrap_or(0)).ok()?,
            name if is_interrupt(name) => self.set_interrupt(argument)?,
            "fill" => {
                let byte = u8::try_from(self.reading.number(arguments.get(1)?)?).ok()?;
                self.contents.insert(self.reading.hpa(argument?)? >> 12, byte);
            }
            "peek" | "byte" | "read" | "content" | "mem" => return self.peek(argument?),
            "pamt" => return self.pamt(argument?),
            "info" => return Some(self.info()),
            "mrtd" => return Some(self.mrtd()),
            _ => return None,
        }
        Some(Facts::default())
    }

    fn set_interrupt(&mut self, polls: Option<&str>) -> Option<()> {
        let polls = match polls {
            None | Some("-1" | "off") => None,
            Some(polls) => Some(u32::try_from(self.reading.number(polls)?).ok()?),
        };
        self.interrupt = polls.map(|polls| polls.saturating_add(self.reading.extra_polls)).filter(|polls| *polls > 0);
        self.td.set_interrupt(self.interrupt);
        Some(())
    }

    fn pamt(&self, page: &str) -> Option<Facts> {
        let pfn = self.reading.hpa(page)? >> 12;
        let types = [0, 1, 2].map(|size| (self.td.pamt().entry(size, pfn).page_type as u8).to_string());
        let entry = self.td.pamt().entry(0, pfn);
        let [small, large, huge] = types;
        let values = vec![
            ("4k.pt", small),
            ("2m.pt", large),
            ("1g.pt", huge),
            ("owner", format!("{:x}", entry.owner)),
            ("bepoch", entry.bepoch.to_string()),
        ];
        Some(Facts { values, ..Facts::default() })
    }

    fn info(&self) -> Facts {
        let [even, odd] = self.td.tracking().references();
        let values = vec![
            ("op_state", (self.td.op_state() as u8).to_string()),
            ("lifecycle", (self.td.lifecycle() as u8).to_string()),
            ("chldcnt", self.td.child_pages().to_string()),
            ("epoch", self.td.tracking().epoch().to_string()),
            ("ref", format!("{even},{odd}")),
        ];
        Facts { values, ..Facts::default() }
    }

    fn mrtd(&self) -> Facts {
        let digest = match self.td.measurement() {
            Measurement::Open(mrtd) => mrtd.digest(),
            Measurement::Final(digest) => *digest,
        };
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Facts { words: vec![digest.clone()], values: vec![("mrtd", digest)], ..Facts::default() }
    }
}
