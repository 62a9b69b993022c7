//! One transition: a thread takes one step, and what the step asks for is carried out.

mod claims;
mod core;
mod guest;
mod host;
mod memfd;
mod words;

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PageIndex, PageRange};
use gmem_core::arch::GiveUp;
use gmem_core::file::FileId;
use gmem_core::ops::{
    ChangeUserMapping, CloseFile, ConvertInPlace, Fault, MemoryFailure, Pages, Prefault, PunchHole, RestoreTemporarily,
    SetAttributes, SetRegion,
};
use gmem_core::seal::{Memfd, MemfdRead};
use gmem_core::vendor::Side;
use gmem_core::vm::Tracking;

use crate::flight::CoreOp;
use crate::machine::{Events, Machine};
use crate::mutant::{Mutant, Saved};
use crate::program::{Op, Program, Stmt, ThreadKind};
use crate::touch::Touch;
use crate::value::{Errno, Seen};

use self::core::populate;
use claims::{USER_BASE, deletion, movement};
pub(crate) use claims::{claim, user_page_of};

/// How often a VMM converts and re-enters before it gives up, and how often a guest may take the same fault in vain.
const PATIENCE: u8 = 3;

/// A thread's part of a state.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct ThreadState {
    pub(crate) pc: u16,
    flight: Flight,
    pub(crate) seen: Vec<Seen>,
    /// The first statement whose result is not the pinned one.
    pub(crate) unexpected: Option<u16>,
    saved: Saved,
}

impl ThreadState {
    pub(crate) fn new(registers: usize) -> Self {
        Self {
            pc: 0,
            flight: Flight::Idle,
            seen: vec![Seen::Nothing; registers],
            unexpected: None,
            saved: Saved::default(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Flight {
    Idle,
    /// A vCPU is in the guest.
    Guest(Walk),
    /// It left because of a fault.
    Faulting(Walk, Fault),
    /// Its memory-fault exit is being answered.
    Answering(Walk, CoreOp),
    Core(CoreOp),
    /// The VMM faults its mapping of a file in, to touch it afterwards.
    MappingIn(CoreOp),
    Reading(MemfdRead),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Walk {
    gfn: Gfn,
    answered: u8,
    vain: u8,
}

/// What one program is run on.
#[derive(Debug)]
pub(crate) struct Context<'p> {
    pub(crate) program: &'p Program,
    pub(crate) mutant: Option<Mutant>,
}

/// A transition being taken. The parts are copies; they are kept if [`Turn::take`] says so.
pub(crate) struct Turn<'a> {
    context: &'a Context<'a>,
    stmts: &'a [Stmt],
    kind: ThreadKind,
    number: u8,
    pub(crate) thread: ThreadState,
    pub(crate) vm: Vm,
    pub(crate) machine: Machine,
    pub(crate) memfds: Vec<Memfd>,
    note: Option<String>,
    /// What the turn reached into.
    pub(crate) touch: Touch,
}

impl<'a> Turn<'a> {
    pub(crate) fn new(
        context: &'a Context<'a>,
        (number, kind, stmts): (u8, ThreadKind, &'a [Stmt]),
        thread: ThreadState,
        (vm, machine, memfds): (Vm, Machine, Vec<Memfd>),
    ) -> Self {
        Self { context, stmts, kind, number, thread, vm, machine, memfds, note: None, touch: Touch::default() }
    }

    /// Takes notes of what happens, for a trace.
    pub(crate) fn with_notes(mut self) -> Self {
        self.note = Some(String::new());
        self
    }

    /// What happened, in words.
    pub(crate) fn note(&self) -> String {
        self.note.clone().unwrap_or_default()
    }

    fn say(&mut self, text: impl FnOnce() -> String) {
        if let Some(note) = &mut self.note {
            if !note.is_empty() {
                note.push_str("; ");
            }
            note.push_str(&text());
        }
    }

    /// Takes the step. `false` if the thread cannot now: it has finished or waits; nothing is to be kept then.
    pub(crate) fn take(&mut self) -> bool {
        if self.machine.is_waiting(self.number) {
            self.touch = Touch::READERS;
            if self.machine.still_waits(self.number) {
                return false;
            }
        }
        let Some(stmt) = self.stmts.get(usize::from(self.thread.pc)) else { return false };
        let was_dead = self.vm.arch.is_dead();
        let taken = match std::mem::replace(&mut self.thread.flight, Flight::Idle) {
            Flight::Idle => self.begin(stmt),
            Flight::Guest(walk) => self.walk(stmt, walk),
            Flight::Faulting(walk, fault) => self.fault(stmt, walk, fault),
            Flight::Answering(walk, op) => self.answer(walk, op),
            Flight::Core(op) => self.core(stmt, op),
            Flight::MappingIn(op) => self.map_in(stmt, op),
            Flight::Reading(read) => self.read_memfd(stmt, read),
        };
        if !was_dead && self.vm.arch.is_dead() && !self.machine.vm_closed {
            self.record(Events::GUEST_DEAD);
        }
        taken
    }

    fn record(&mut self, event: Events) {
        self.touch.add(Touch::EVENT);
        self.machine.events |= event;
    }

    fn set_reading(&mut self, reading: bool) {
        if self.machine.set_reading(self.number, reading) {
            self.touch.add(Touch::READERS);
        }
    }

    fn finish(&mut self, stmt: &Stmt, seen: Seen) -> bool {
        self.say(|| format!("ends: {}", seen.word(&self.context.program.values)));
        if let Some(slot) = stmt.register.and_then(|register| self.thread.seen.get_mut(register)) {
            *slot = seen;
        }
        if !stmt.expect.is_empty() && !stmt.expect.contains(&seen) {
            self.thread.unexpected = self.thread.unexpected.or(Some(self.thread.pc));
            self.record(Events::UNEXPECTED);
        }
        self.thread.flight = Flight::Idle;
        self.thread.saved = Saved::default();
        self.set_reading(false);
        let stops = matches!(self.kind, ThreadKind::Vcpu { .. }) && !seen.guest_goes_on();
        self.thread.pc = if stops { u16::MAX } else { self.thread.pc + 1 };
        true
    }

    fn begin(&mut self, stmt: &Stmt) -> bool {
        self.say(|| stmt.text.clone());
        if let Some(errno) = self.refused_at_entry(&stmt.op) {
            return self.finish(stmt, Seen::Errno(errno));
        }
        match stmt.op {
            Op::Access { gfn, .. } => self.walk(stmt, Walk { gfn, answered: 0, vain: 0 }),
            Op::Share { range } if self.vm.arch.give_up() == Some(GiveUp::BeforeConversion) => {
                self.walk(stmt, Walk { gfn: range.start(), answered: 0, vain: 0 })
            }
            Op::Share { range } => self.ask_to_share(stmt, range),
            Op::Accept { range } => self.walk(stmt, Walk { gfn: range.start(), answered: 0, vain: 0 }),
            _ => match self.operation(stmt) {
                Some(op) => self.core(stmt, op),
                None => self.immediately(stmt),
            },
        }
    }

    /// What a system call is refused for before the core is asked: a descriptor that was closed, and what a VM of this type does
    /// not have at all.
    fn refused_at_entry(&mut self, op: &Op) -> Option<Errno> {
        match *op {
            Op::Access { .. } | Op::Accept { .. } => None,
            Op::SetAttributes { .. }
            | Op::CreateSlot(_)
            | Op::DeleteSlot { .. }
            | Op::MoveSlot { .. }
            | Op::Populate { .. }
            | Op::Finalize
            | Op::CloseVm
                if self.machine.vm_closed =>
            {
                self.touch.add(Touch::LIFE);
                Some(Errno::EBADF)
            }
            Op::SetAttributes { .. } | Op::Request { .. } | Op::Share { .. } | Op::Convert { .. }
                if !self.vm.has_private_memory() =>
            {
                Some(Errno::EINVAL)
            }
            Op::Allocate { file, .. } | Op::Punch { file, .. } | Op::CloseFile { file } | Op::Convert { file, .. } => {
                self.touch.add(Touch::FILES);
                self.vm.file(self.file(file)).is_none().then_some(Errno::EBADF)
            }
            _ => None,
        }
    }

    fn file(&self, file: usize) -> FileId {
        FileId(u32::try_from(file).unwrap_or(u32::MAX))
    }

    fn operation(&self, stmt: &Stmt) -> Option<CoreOp> {
        let in_place = self.vm.rules.tracking == Tracking::InPlace;
        Some(match stmt.op {
            Op::SetAttributes { range, to } => CoreOp::Attributes(SetAttributes::new(range, to)),
            Op::Request { range, to } if in_place => self.convert_behind(range, to)?,
            Op::Request { range, to } => CoreOp::Attributes(SetAttributes::new(range, to)),
            Op::Share { range } if in_place => self.convert_behind(range, Side::Shared)?,
            Op::Share { range } => CoreOp::Attributes(SetAttributes::new(range, Side::Shared)),
            Op::Punch { file, range, may_split } => {
                let punch = PunchHole::new(self.file(file), range);
                CoreOp::Punch(if may_split { punch } else { punch.without_split() })
            }
            Op::Prefault { range } => CoreOp::Prefault(Prefault::new(range), range.len()),
            Op::Populate { range, measured, .. } => populate(range, measured),
            Op::CreateSlot(slot) => CoreOp::Region(SetRegion::new(claim(slot))),
            Op::DeleteSlot { number } => CoreOp::Region(SetRegion::new(deletion(number))),
            Op::MoveSlot { number, to } => CoreOp::Region(SetRegion::new(movement(&self.vm, number, to))),
            Op::ChangeUser { first, end, .. } => {
                CoreOp::User(ChangeUserMapping::new((USER_BASE + first) << 12, (USER_BASE + end) << 12))
            }
            Op::CloseFile { file } => CoreOp::Close(CloseFile::new(self.file(file))),
            Op::Convert { file, range, to } => CoreOp::Convert(ConvertInPlace::new(self.file(file), range, to)),
            Op::Poison { file, index } => CoreOp::Poison(MemoryFailure::new(self.file(file), index)),
            Op::RestoreTemporarily { file, index } => CoreOp::Restore(RestoreTemporarily::new(self.page(file, index))),
            _ => return None,
        })
    }

    fn page(&self, file: usize, index: PageIndex) -> Pages {
        Pages { file: self.file(file), range: PageRange::page(index) }
    }

    /// With in-place conversion a frame's side is its file page's.
    fn convert_behind(&self, range: GfnRange, to: Side) -> Option<CoreOp> {
        let slot = self.vm.slots().at(0, range.start())?;
        let pages = range.intersect(slot.gfns)?.rebase(slot.index_of(range.start())?)?;
        Some(CoreOp::Convert(ConvertInPlace::new(slot.binding?.file?, pages, to)))
    }
}
