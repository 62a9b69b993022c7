//! What the guest does: TDG.MEM.PAGE.ACCEPT and plain accesses.

use super::sept::{LOCKED, SeptFlags, SeptState, Septe};
use super::status::{Operand, TdxStatus};
use super::tables::PAGE_ACCEPT;
use super::{PageInfo, PendingAccess, Tdx};
use crate::vendor::{ExitReason, GuestException, GuestOutcome};

/// Chunks of 4 KiB that accepting a 2 MiB page initialises.
const CHUNKS: u16 = 512;

/// A TD exit because of an EPT violation, as the host is told of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EptViolation {
    /// Guest address in bytes.
    pub gpa: u64,
    /// Level that the guest asked for.
    pub requested_level: u8,
    /// Level of the entry that stopped the walk.
    pub level: u8,
    /// State of that entry.
    pub state: SeptState,
    /// That entry as the module read it, with the lock bit if it had been locked.
    pub septe: u64,
}

/// How TDG.MEM.PAGE.ACCEPT ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accepted {
    /// The guest continues with this in RAX.
    Returned(TdxStatus),
    /// An interrupt ended it half-way; the guest will execute the instruction again.
    Interrupted,
    /// The host has to do something about the mapping.
    TdExit(EptViolation),
}

impl Tdx {
    /// TDG.MEM.PAGE.ACCEPT: the guest takes a pending page of 4 KiB or 2 MiB, which becomes zero.
    ///
    /// A 2 MiB page is initialised in chunks; where an interrupt stops it, the entry remembers how far it came.
    pub fn page_accept(&mut self, at: PageInfo) -> Accepted {
        match self.acceptable(at) {
            Ok(entry) => self.accept(at.level(), at.gfn(), entry),
            Err(accepted) => accepted,
        }
    }

    /// The first half of [`Tdx::page_accept`], after which the guest has the lock of the entry: the host's leaves for that entry,
    /// but for TDH.MEM.PAGE.ADD, answer TDX_OPERAND_BUSY until [`Tdx::page_accept_end`].
    ///
    /// # Errors
    /// How the instruction ended, if it did: with TDX_OPERAND_BUSY where another vCPU has the lock, or where the host was
    /// refused it and is to have it first. The module calls the latter TDX_OPERAND_BUSY_HOST_PRIORITY and hides that from the guest; that
    /// it ends the guest's run when that lasts (TDX_HOST_PRIORITY_BUSY_TIMEOUT) is not modelled, because the model has no clock.
    pub fn page_accept_begin(&mut self, at: PageInfo) -> Result<(), Accepted> {
        self.acceptable(at)?;
        self.locks.take_by_guest(at.level(), at.gfn());
        Ok(())
    }

    /// The second half of [`Tdx::page_accept`]; `None` if the first was not done.
    pub fn page_accept_end(&mut self, at: PageInfo) -> Option<Accepted> {
        let (level, gfn) = (at.level(), at.gfn());
        let held = level <= 1 && self.locks.release(level, gfn);
        held.then(|| self.accept(level, gfn, self.sept.entry(level, gfn)))
    }

    /// Every vCPU that is in the middle of an instruction is sent an interrupt: a page of 4 KiB is accepted before that is
    /// noticed, a larger one after the next chunk.
    pub(super) fn end_accepts(&mut self) {
        let interrupt = self.interrupt_in;
        while let Some((level, gfn)) = self.locks.held() {
            self.interrupt_in = Some(1);
            self.page_accept_end(PageInfo::new(gfn << 12, level));
        }
        self.interrupt_in = interrupt;
    }

    /// The entry that the guest asks for, if it can lock and accept it.
    fn acceptable(&self, at: PageInfo) -> Result<Septe, Accepted> {
        let (level, gfn) = (at.level(), at.gfn());
        let aligned = gfn & ((1 << super::sept::shift(level)) - 1) == 0;
        if at.reserved() != 0 || level > 1 || !aligned || !self.is_private_gpa(gfn << 12) {
            return Err(Accepted::Returned(TdxStatus::OPERAND_INVALID.about(Operand::Rcx)));
        }
        let (reached, entry) = self.sept.walk(self.top_level(), level, gfn);
        // A walk that stops above the entry that was asked for locks nothing.
        if reached == level && !self.locks.free_for_guest(level, gfn) {
            return Err(Accepted::Returned(TdxStatus::OPERAND_BUSY.about(Operand::Rcx)));
        }
        let Some(refusal) = refusal(level, reached, entry) else { return Ok(entry) };
        Err(match refusal {
            Refusal::Status(status) => Accepted::Returned(status.at_level(reached)),
            Refusal::Violation { lock } => Accepted::TdExit(EptViolation {
                gpa: gfn << 12,
                requested_level: level,
                level: reached,
                state: entry.state,
                septe: entry.raw(reached) | lock,
            }),
        })
    }

    fn accept(&mut self, level: u8, gfn: u64, entry: Septe) -> Accepted {
        let mut done = entry.accepted;
        while level == 1 && done + 1 < CHUNKS {
            done += 1;
            if self.interrupt_pending() {
                self.sept.set(level, gfn, entry.state, entry.with_accepted(done));
                return Accepted::Interrupted;
            }
        }
        let exported = entry.state == SeptState::PendingExportedDirty;
        let state = if exported { SeptState::ExportedDirty } else { SeptState::Mapped };
        self.sept.set(level, gfn, entry.state, entry.with(state).with_accepted(0));
        Accepted::Returned(TdxStatus::SUCCESS)
    }

    /// What a read, write or fetch of the private guest frame `gfn` leads to.
    ///
    /// States that are blocked for writing exist only during an export and are taken as accessible.
    #[must_use]
    pub fn private_access(&self, gfn: u64) -> GuestOutcome {
        let (_, entry) = self.sept.walk(self.top_level(), 0, gfn);
        let pending = entry.state.has(SeptFlags::ANY_PENDING) && !entry.state.has(SeptFlags::ANY_BLOCKED);
        match self.config.pending_access {
            _ if entry.state.has(SeptFlags::GUEST_ACCESSIBLE_LEAF) => GuestOutcome::Done,
            PendingAccess::VirtualizationException if pending => {
                GuestOutcome::Exception(GuestException::VirtualizationException)
            }
            PendingAccess::TdExit if pending => GuestOutcome::Exit(ExitReason::PendingTd),
            _ => GuestOutcome::Exit(ExitReason::NotPresent),
        }
    }
}

enum Refusal {
    Status(TdxStatus),
    Violation { lock: u64 },
}

/// Why an entry cannot be accepted. A walk that stopped above the requested level never locks the entry.
fn refusal(level: u8, reached: u8, entry: Septe) -> Option<Refusal> {
    let accessible = entry.state.has(SeptFlags::GUEST_ACCESSIBLE_LEAF);
    let table = entry.state != SeptState::Free && !entry.state.is_leaf();
    match (reached == level, PAGE_ACCEPT.allowed_from(entry.state)) {
        (false, _) if !accessible => Some(Refusal::Violation { lock: 0 }),
        (true, _) if table => Some(Refusal::Status(TdxStatus::PAGE_SIZE_MISMATCH)),
        _ if accessible => Some(Refusal::Status(TdxStatus::PAGE_ALREADY_ACCEPTED)),
        (true, Some(true)) => None,
        _ => Some(Refusal::Violation { lock: LOCKED }),
    }
}
