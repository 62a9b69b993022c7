//! Operations of threads.

use gmem_core::addr::PageIndex;
use gmem_core::vendor::{AccessKind, Side};

use super::token::{Kind, Line};
use super::{MAX_STMTS, Names, ParseError, Parser, condition, gfn, gfns, indices, page, range, slot_number};
use crate::program::{HostPage, MemfdOp, Op, Stmt, ThreadKind, UserChange};
use crate::value::{Seen, Value};

/// Words that begin an operation of a vCPU.
pub(crate) const GUEST: &[&str] = &["load", "store", "fetch", "accept", "request", "share"];
/// Words that begin an operation of the VMM or the host.
pub(crate) const OTHER: &[&str] = &[
    "set-attributes",
    "allocate",
    "punch",
    "prefault",
    "populate",
    "finalize",
    "create",
    "delete",
    "move",
    "munmap",
    "remap",
    "dontneed",
    "close",
    "read",
    "write",
    "convert",
    "pin",
    "unpin",
    "reclaim",
    "migrate",
    "hwpoison",
    "direct-read",
    "direct-write",
    "restore",
    "reuse",
    "split",
    "collapse",
    "seal",
    "map",
    "unmap",
    "truncate",
    "guest-write",
    "swap",
];

fn one_of(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

fn guest_words() -> String {
    format!("an operation of a vCPU: {} (others go into `vmm` or `host`)", one_of(GUEST))
}

fn other_words() -> String {
    format!("an operation of the VMM or the host: {} (others go into `vcpu`)", one_of(OTHER))
}

fn all_words() -> String {
    format!("an operation: {}, {}", one_of(GUEST), one_of(OTHER))
}

impl Parser {
    pub(super) fn stmt(&mut self, line: &mut Line<'_>, thread: Option<usize>) -> Result<(), ParseError> {
        let kind = thread.and_then(|thread| self.program.threads.get(thread)).map(|thread| thread.kind);
        let op = match kind {
            Some(ThreadKind::Vcpu { .. }) => {
                self.guest(line, guest_words)?.ok_or_else(|| line.error_before(guest_words()))?
            }
            Some(ThreadKind::Other) => {
                self.other_op(line, other_words)?.ok_or_else(|| line.error_before(other_words()))?
            }
            None => self.setup_op(line)?,
        };
        let register = if line.eat_sign("->") { Some(self.register(line, thread)?) } else { None };
        let expect = if line.eat_word("expect") { self.expect(line)? } else { Vec::new() };
        line.end()?;
        let stmt = Stmt { op, register, expect, line: line.number, text: line.stripped().to_owned() };
        let stmts = match thread.and_then(|thread| self.program.threads.get_mut(thread)) {
            Some(thread) => &mut thread.stmts,
            None => &mut self.program.setup,
        };
        if stmts.len() >= MAX_STMTS {
            return Err(line.error(format!("at most {MAX_STMTS} operations")));
        }
        stmts.push(stmt);
        Ok(())
    }

    fn setup_op(&mut self, line: &mut Line<'_>) -> Result<Op, ParseError> {
        if let Some(op) = self.guest(line, all_words)? {
            return Ok(op);
        }
        line.error_before("");
        self.other_op(line, all_words)?.ok_or_else(|| line.error_before(all_words()))
    }

    fn register(&mut self, line: &mut Line<'_>, thread: Option<usize>) -> Result<usize, ParseError> {
        let name = line.word("a register")?;
        let Some(thread) = thread.and_then(|thread| self.program.threads.get_mut(thread)) else {
            return Err(line.error_before("no register: `setup` has none"));
        };
        if thread.registers.iter().any(|known| known == name) {
            return Err(line.error_before("a register that was not used yet"));
        }
        thread.registers.push(name.to_owned());
        Ok(thread.registers.len() - 1)
    }

    fn expect(&self, line: &mut Line<'_>) -> Result<Vec<Seen>, ParseError> {
        let result = |line: &mut Line<'_>| match self.names {
            Names::Known => condition::seen(line, &self.program),
            Names::Collected => line.word("a result").map(|_| Seen::Nothing),
        };
        let mut all = vec![result(line)?];
        while line.eat_word("or") {
            all.push(result(line)?);
        }
        Ok(all)
    }

    /// Operations of a guest; `None` if the word is not one of them.
    fn guest(&mut self, line: &mut Line<'_>, expected: fn() -> String) -> Result<Option<Op>, ParseError> {
        Ok(Some(match line.word(&expected())? {
            "load" => self.access(line, AccessKind::Load)?,
            "store" => self.access(line, AccessKind::Store)?,
            "fetch" => self.access(line, AccessKind::Fetch)?,
            "accept" => Op::Accept { range: gfns(line)? },
            "share" => Op::Share { range: gfns(line)? },
            "request" => Op::Request { range: gfns(line)?, to: side(line)? },
            _ => return Ok(None),
        }))
    }

    fn access(&mut self, line: &mut Line<'_>, kind: AccessKind) -> Result<Op, ParseError> {
        let gfn = gfn(line)?;
        let claimed = if line.eat_word("private") {
            Some(Side::Private)
        } else {
            line.eat_word("shared").then_some(Side::Shared)
        };
        let mut value = Value::Zero;
        if kind == AccessKind::Store {
            line.sign("=")?;
            value = self.value(line)?;
        }
        Ok(Op::Access { gfn, kind, claimed, value })
    }

    /// Operations of the VMM and the host; `None` if the word is not one of them.
    fn other_op(&mut self, line: &mut Line<'_>, expected: fn() -> String) -> Result<Option<Op>, ParseError> {
        let word = line.word(&expected())?;
        Ok(Some(match word {
            "set-attributes" => Op::SetAttributes { range: gfns(line)?, to: side(line)? },
            "allocate" => Op::Allocate { file: self.file_name(line)?, range: indices(line)? },
            "prefault" => Op::Prefault { range: gfns(line)? },
            "populate" => self.populate(line)?,
            "finalize" => Op::Finalize,
            "create" | "delete" | "move" => self.slot_op(line, word)?,
            "munmap" => user_change(line, UserChange::Unmap)?,
            "remap" => user_change(line, UserChange::Remap)?,
            "dontneed" => user_change(line, UserChange::DontNeed)?,
            "close" if line.eat_word("vm") => Op::CloseVm,
            "close" => Op::CloseFile { file: self.file_name(line)? },
            "read" | "write" => self.host_access(line, word)?,
            "convert" => Op::Convert { file: self.file_name(line)?, range: indices(line)?, to: side(line)? },
            "pin" => Op::Pin { file: self.file_name(line)?, range: indices(line)?, pinned: true },
            "unpin" => Op::Pin { file: self.file_name(line)?, range: indices(line)?, pinned: false },
            "split" => Op::Split { gfn: gfn(line)? },
            "collapse" => Op::Collapse { gfn: gfn(line)? },
            "hwpoison" | "restore" | "reuse" | "reclaim" | "direct-read" | "direct-write" => {
                self.page_op(line, word)?
            }
            "punch" | "migrate" | "swap" | "seal" | "map" | "unmap" | "truncate" | "guest-write" => {
                self.memfd_or_file(line, word)?
            }
            _ => return Ok(None),
        }))
    }

    fn populate(&mut self, line: &mut Line<'_>) -> Result<Op, ParseError> {
        let range = gfns(line)?;
        line.sign("=")?;
        let value = self.value(line)?;
        let measured = !line.eat_word("unmeasured");
        Ok(Op::Populate { range, value, measured })
    }

    fn slot_op(&mut self, line: &mut Line<'_>, word: &str) -> Result<Op, ParseError> {
        line.keyword("slot")?;
        match word {
            "create" => self.slot(line).map(Op::CreateSlot),
            "delete" => slot_number(line).map(|number| Op::DeleteSlot { number }),
            _ => {
                let number = slot_number(line)?;
                line.keyword("to")?;
                Ok(Op::MoveSlot { number, to: gfn(line)? })
            }
        }
    }

    fn page_op(&mut self, line: &mut Line<'_>, word: &str) -> Result<Op, ParseError> {
        let file = self.file_name(line)?;
        let index = PageIndex(page(line)?);
        Ok(match word {
            "hwpoison" => Op::Poison { file, index },
            "restore" => Op::RestoreTemporarily { file, index },
            "reuse" => Op::Reuse { file, index },
            "reclaim" => Op::Reclaim { file, index },
            "direct-read" => Op::HostRead { page: HostPage::Direct { file, index } },
            _ => {
                line.sign("=")?;
                Op::HostWrite { page: HostPage::Direct { file, index }, value: self.value(line)? }
            }
        })
    }

    /// `read user N`, `read FILE N`, `read MEMFD N`, and the same with `write` and a value.
    fn host_access(&mut self, line: &mut Line<'_>, word: &str) -> Result<Op, ParseError> {
        let memfd = self.memfd_name(line);
        let target = match (memfd, line.eat_word("user")) {
            (Some(_), _) => None,
            (None, true) => Some(HostPage::User(page(line)?)),
            (None, false) => {
                let file = self.file_name(line).map_err(|mut error| {
                    error.expected = format!("`user` or {}", error.expected);
                    error
                })?;
                Some(HostPage::Mapped { file, index: PageIndex(page(line)?) })
            }
        };
        let number = if memfd.is_some() { page(line)? } else { 0 };
        let mut value = Value::Zero;
        if word == "write" {
            line.sign("=")?;
            value = self.value(line)?;
        }
        Ok(match (target, memfd, word) {
            (Some(page), _, "read") => Op::HostRead { page },
            (Some(page), ..) => Op::HostWrite { page, value },
            (None, Some(memfd), "read") => Op::Memfd { memfd, op: MemfdOp::Read(number) },
            (None, memfd, _) => Op::Memfd { memfd: memfd.unwrap_or_default(), op: MemfdOp::Write(number, value) },
        })
    }

    fn memfd_or_file(&mut self, line: &mut Line<'_>, word: &str) -> Result<Op, ParseError> {
        if let Some(memfd) = self.memfd_name(line) {
            return Ok(Op::Memfd { memfd, op: self.memfd_op(line, word)? });
        }
        match word {
            "punch" => {
                let file = self.file_name(line)?;
                let range = indices(line)?;
                Ok(Op::Punch { file, range, may_split: may_split(line) })
            }
            "migrate" => Ok(Op::Migrate { file: self.file_name(line)?, index: PageIndex(page(line)?) }),
            _ => Err(line.error("a memfd")),
        }
    }

    fn memfd_op(&mut self, line: &mut Line<'_>, word: &str) -> Result<MemfdOp, ParseError> {
        Ok(match word {
            "seal" => MemfdOp::Seal,
            "map" => MemfdOp::Map,
            "unmap" => MemfdOp::Unmap,
            "punch" => {
                let pages = range::<PageIndex>(line)?;
                MemfdOp::Punch { first: pages.start().0, end: pages.end().0, may_split: may_split(line) }
            }
            "truncate" => {
                let bytes = truncation(line)?;
                MemfdOp::Truncate { bytes_from: bytes, may_split: may_split(line) }
            }
            "migrate" => MemfdOp::Migrate(page(line)?),
            "swap" => MemfdOp::Swap(page(line)?),
            _ => {
                let page = page(line)?;
                line.sign("=")?;
                MemfdOp::GuestWrite(page, self.value(line)?)
            }
        })
    }
}

/// `N` pages, or `N bytes`.
fn truncation(line: &mut Line<'_>) -> Result<u64, ParseError> {
    let size = page(line)?;
    if line.eat_word("bytes") {
        return Ok(size);
    }
    let _ = line.eat_word("pages");
    Ok(size << 12)
}

fn may_split(line: &mut Line<'_>) -> bool {
    !line.eat_word("unsplittable")
}

fn user_change(line: &mut Line<'_>, change: UserChange) -> Result<Op, ParseError> {
    let pages = range::<PageIndex>(line)?;
    Ok(Op::ChangeUser { first: pages.start().0, end: pages.end().0, change })
}

fn side(line: &mut Line<'_>) -> Result<Side, ParseError> {
    match line.next() {
        Some(Kind::Word("private")) => Ok(Side::Private),
        Some(Kind::Word("shared")) => Ok(Side::Shared),
        Some(_) => Err(line.error_before("`private` or `shared`")),
        None => Err(line.error("`private` or `shared`")),
    }
}
