//! One transition: a thread takes one step, and what the step asks for is carried out.

use std::cmp::Ordering;

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PageIndex, PageNumber, PageRange, Pfn};
use gmem_core::file::FileId;
use gmem_core::invalidate::Filter;
use gmem_core::ops::{
    Access, Action, ChangeUserMapping, Claim, CloseFile, ConvertInPlace, Fault, FaultEnd, FileClaim, Lock,
    MemoryFailure, Operation, Origin, Pages, Parts, PopulatePage, Prefault, PunchHole, Reach, RestoreTemporarily,
    SetAttributes, SetRegion, Step, UserFault,
};
use gmem_core::seal::{Memfd, MemfdRead, ReadStep, SealError, Split};
use gmem_core::slot::SlotFlags;
use gmem_core::vendor::{AccessKind, Contents, ExitReason, GuestOutcome, HostOutcome, Mapping, PopulateKind, Side};
use gmem_core::vm::{Tracking, View};

use crate::flight::{CoreOp, End, of_page, of_refusal};
use crate::machine::{Entry, Events, Machine};
use crate::mutant::{Mutant, Saved};
use crate::program::{HostPage, MemfdOp, Op, Program, SlotDecl, Stmt, ThreadKind, UserChange};
use crate::touch::Touch;
use crate::value::{Errno, Seen, Value};

/// Pages below the VMM's first one; a multiple of 1 GiB, so that frames and addresses can be congruent.
const USER_BASE: u64 = 1 << 26;
/// How often a VMM converts and re-enters before it gives up, and how often a guest may take the same fault in vain.
const PATIENCE: u8 = 3;
/// What is populated. Its bytes do not matter, its measurement is counted and not compared.
static SOURCE: [u8; 4096] = [0; 4096];

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
    Populating {
        next: Gfn,
        op: CoreOp,
    },
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
    pub(crate) fn into_note(self) -> String {
        self.note.unwrap_or_default()
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
            Flight::Populating { next, op } => self.populate(stmt, next, op),
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
        match stmt.op {
            Op::Access { gfn, .. } => self.walk(stmt, Walk { gfn, answered: 0, vain: 0 }),
            Op::Accept { range } => self.walk(stmt, Walk { gfn: range.start(), answered: 0, vain: 0 }),
            _ => match self.operation(stmt) {
                Some(op) => self.core(stmt, op),
                None => self.immediately(stmt),
            },
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
            Op::Punch { file, range, may_split } => {
                let punch = PunchHole::new(self.file(file), range);
                CoreOp::Punch(if may_split { punch } else { punch.without_split() })
            }
            Op::Prefault { range } => CoreOp::Prefault(Prefault::new(range), range.len()),
            Op::CreateSlot(slot) => CoreOp::Region(SetRegion::new(claim(slot))),
            Op::DeleteSlot { number } => CoreOp::Region(SetRegion::new(deletion(number))),
            Op::MoveSlot { number, to } => CoreOp::Region(SetRegion::new(self.movement(number, to))),
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

    fn movement(&self, number: u16, to: Gfn) -> Claim {
        let slots = self.vm.slots();
        let slot = slots.iter().find(|slot| slot.id.number == number && slot.id.space == 0);
        let (size, user, flags) =
            slot.map_or((0x1000, 0, 0), |slot| (slot.gfns.len() << 12, slot.userspace_addr, slot.flags.bits()));
        Claim {
            slot: u32::from(number),
            flags,
            guest_phys_addr: to.gpa(),
            memory_size: size,
            userspace_addr: user,
            file: FileClaim::BadDescriptor,
            guest_memfd_offset: 0,
        }
    }

    /// With in-place conversion a frame's side is its file page's.
    fn convert_behind(&self, range: GfnRange, to: Side) -> Option<CoreOp> {
        let slot = self.vm.slots().at(0, range.start())?;
        let pages = range.intersect(slot.gfns)?.rebase(slot.index_of(range.start())?)?;
        Some(CoreOp::Convert(ConvertInPlace::new(slot.binding?.file?, pages, to)))
    }

    // Guests.

    fn walk(&mut self, stmt: &Stmt, walk: Walk) -> bool {
        self.touch.add(Touch::WALK);
        if self.vm.arch.is_dead() || self.machine.vm_closed {
            return self.finish(stmt, Seen::Dead);
        }
        let ThreadKind::Vcpu { number: vcpu, .. } = self.kind else { return self.finish(stmt, Seen::Nothing) };
        let claimed = match stmt.op {
            Op::Access { claimed: Some(side), .. } => side,
            Op::Accept { .. } => Side::Private,
            _ => self.vm.attribute(walk.gfn),
        };
        let attribute = self.vm.attribute(walk.gfn);
        let side = self.vm.arch.access_side(claimed, attribute);
        let key = self.vm.arch.has_separate_tables().then_some(side);
        if let Some(entry) = self.machine.cached(vcpu, walk.gfn, key) {
            let entry = entry.clone();
            return self.touch(stmt, walk, &entry, side);
        }
        if let Some(entry) = self.machine.in_table(walk.gfn, key) {
            let entry = entry.clone();
            self.say(|| format!("walks the table: {:?} is {:?}", walk.gfn, entry.frame(walk.gfn).0));
            self.machine.cache(vcpu, entry);
            self.thread.flight = Flight::Guest(walk);
            return true;
        }
        self.start_fault(stmt, walk, claimed)
    }

    fn start_fault(&mut self, stmt: &Stmt, walk: Walk, claimed: Side) -> bool {
        self.say(|| format!("faults at {:?}, {}", walk.gfn, word(claimed)));
        let fault = Fault::new(Access { gfn: walk.gfn, claimed }, Origin::Guest);
        self.fault(stmt, walk, fault)
    }

    fn touch(&mut self, stmt: &Stmt, walk: Walk, entry: &Entry, side: Side) -> bool {
        self.touch.add(Touch::MEMORY);
        let (pfn, gone) = entry.frame(walk.gfn);
        let mapping = Mapping { gfn: walk.gfn, pfn, level: entry.mapping.level, side };
        let outcome = match stmt.op {
            Op::Access { kind, .. } => self.vm.arch.guest_access(mapping, kind),
            _ => match self.vm.arch.guest_accept(mapping) {
                Ok(contents) => {
                    self.machine.becomes(PageRange::page(pfn), contents);
                    GuestOutcome::Done
                }
                Err(outcome) => outcome,
            },
        };
        if gone || self.is_absent(pfn) {
            self.record(Events::USE_AFTER_FREE);
        }
        match outcome {
            GuestOutcome::Done => self.touched(stmt, walk, pfn, side),
            GuestOutcome::Exit(ExitReason::NotPresent | ExitReason::Rmp { .. }) => self.in_vain(stmt, walk, side),
            GuestOutcome::Exit(ExitReason::PendingTd) => self.harmed(stmt, Seen::Dead),
            GuestOutcome::Exit(ExitReason::RealmAbort | ExitReason::RipasChange) => self.harmed(stmt, Seen::Abort),
            GuestOutcome::Exit(ExitReason::Poisoned) => self.harmed(stmt, Seen::Errno(Errno::EFAULT)),
            GuestOutcome::Exception(_) => self.harmed(stmt, Seen::Exception),
        }
    }

    /// A shared access of the guest to its own private page is no better than one of the host.
    fn host_sees_cipher(&mut self, pfn: Pfn) -> bool {
        self.vm.arch.host_access(pfn, AccessKind::Load) == HostOutcome::Ciphertext
    }

    /// Whether `pfn` would be a file's page, and no file has it.
    fn is_absent(&self, pfn: Pfn) -> bool {
        pfn >= FileId(0).pfn(PageIndex(0)) && !self.vm.files().any(|file| file.present_has(pfn))
    }

    fn harmed(&mut self, stmt: &Stmt, seen: Seen) -> bool {
        self.record(Events::GUEST_DEAD);
        self.finish(stmt, seen)
    }

    /// There is a translation, and hardware refuses to use it: KVM's fault path runs, and the guest tries again.
    fn in_vain(&mut self, stmt: &Stmt, walk: Walk, side: Side) -> bool {
        if walk.vain >= PATIENCE {
            return self.harmed(stmt, Seen::Stuck);
        }
        if let ThreadKind::Vcpu { number, .. } = self.kind {
            self.machine.drop_cached(number, walk.gfn);
        }
        self.start_fault(stmt, Walk { vain: walk.vain + 1, ..walk }, side)
    }

    fn touched(&mut self, stmt: &Stmt, walk: Walk, pfn: Pfn, side: Side) -> bool {
        match stmt.op {
            Op::Access { kind: AccessKind::Store, value, .. } => {
                self.say(|| format!("writes {pfn:?}"));
                self.machine.write(pfn, value, side == Side::Private);
                self.finish(stmt, Seen::Ok)
            }
            Op::Access { .. } => {
                self.say(|| format!("reads {pfn:?}"));
                let bytes = self.machine.bytes(pfn);
                let cipher = bytes.secret && side == Side::Shared && self.host_sees_cipher(pfn);
                let value = if cipher { Value::Scrambled } else { bytes.value };
                if value == Value::Foreign {
                    self.record(Events::SAW_FOREIGN);
                }
                self.finish(stmt, Seen::Value(value))
            }
            Op::Accept { range } => match walk.gfn.checked_add(1).filter(|next| range.contains(*next)) {
                Some(gfn) => {
                    self.thread.flight = Flight::Guest(Walk { gfn, answered: 0, vain: 0 });
                    true
                }
                None => self.finish(stmt, Seen::Ok),
            },
            _ => self.finish(stmt, Seen::Ok),
        }
    }

    fn fault(&mut self, stmt: &Stmt, walk: Walk, fault: Fault) -> bool {
        let mut op = CoreOp::Fault(fault);
        let step = self.step(&mut op);
        let CoreOp::Fault(fault) = &op else { return false };
        let reading = fault.is_reading_slots();
        self.set_reading(reading);
        match step {
            Step::Do(action) => {
                let taken = self.perform(stmt, &action, &mut op);
                if let CoreOp::Fault(fault) = op {
                    self.thread.flight = Flight::Faulting(walk, fault);
                }
                taken
            }
            Step::Done(End::Fault(end)) => self.fault_ended(stmt, walk, end),
            Step::Done(End::Seen(_)) => false,
        }
    }

    fn fault_ended(&mut self, stmt: &Stmt, walk: Walk, end: FaultEnd) -> bool {
        self.set_reading(false);
        self.thread.saved = Saved::default();
        let seen = match end {
            FaultEnd::Mapped(_) | FaultEnd::Retry => {
                self.say(|| if end == FaultEnd::Retry { "fault is stale: again" } else { "back to the guest" }.into());
                self.thread.flight = Flight::Guest(walk);
                return true;
            }
            FaultEnd::MemoryFault(fault) => return self.exit(stmt, walk, fault.side),
            FaultEnd::Emulate => Seen::Mmio,
            FaultEnd::PageError(_, error) => Seen::Errno(of_page(error)),
            FaultEnd::Refused(_, refusal) => Seen::Errno(of_refusal(refusal)),
            FaultEnd::NoUserPage => Seen::Errno(Errno::EFAULT),
            FaultEnd::DyingSlot => Seen::Errno(Errno::EAGAIN),
        };
        self.finish(stmt, seen)
    }

    fn exit(&mut self, stmt: &Stmt, walk: Walk, side: Side) -> bool {
        self.touch.add(Touch::TRUTH);
        self.say(|| format!("exit: memory fault, {}", word(side)));
        if self.is_spurious(walk.gfn, side) {
            self.record(Events::SPURIOUS_EXIT);
        }
        let ThreadKind::Vcpu { converts: true, .. } = self.kind else { return self.finish(stmt, Seen::Exit(side)) };
        if walk.answered >= PATIENCE {
            return self.finish(stmt, Seen::Exit(side));
        }
        let walk = Walk { answered: walk.answered + 1, ..walk };
        let range = GfnRange::page(walk.gfn);
        let op = match self.vm.rules.tracking {
            Tracking::InPlace => self.convert_behind(range, side),
            Tracking::Attributes => Some(CoreOp::Attributes(SetAttributes::new(range, side))),
        };
        match op {
            Some(op) => {
                self.thread.flight = Flight::Answering(walk, op);
                true
            }
            None => self.finish(stmt, Seen::Exit(side)),
        }
    }

    /// Whether nothing is wrong with the access by now: the attribute is as the exit says and something backs the page, or
    /// the access had no side of its own that could contradict the attribute.
    fn is_spurious(&self, gfn: Gfn, side: Side) -> bool {
        let attribute = self.vm.attribute(gfn);
        let follows = self.vm.arch.access_side(side, side.other()) != side;
        let backed = !matches!(self.vm.view(gfn), View::Unbacked(_));
        backed && (attribute == side || follows)
    }

    fn answer(&mut self, walk: Walk, mut op: CoreOp) -> bool {
        let Some(stmt) = self.stmts.get(usize::from(self.thread.pc)) else { return false };
        match self.step(&mut op) {
            Step::Do(action) => {
                let taken = self.perform(stmt, &action, &mut op);
                self.thread.flight = Flight::Answering(walk, op);
                taken
            }
            Step::Done(_) => {
                self.say(|| "the VMM runs the vCPU again".into());
                self.thread.saved = Saved::default();
                self.thread.flight = Flight::Guest(walk);
                true
            }
        }
    }

    // Operations of the core.

    fn step(&mut self, op: &mut CoreOp) -> Step<End> {
        let (reach, before) = (op.reach(), self.vm.invalidation().in_progress());
        let step = match self.context.mutant {
            None => {
                self.touch.add(Touch::of_reach(reach));
                let before = cfg!(debug_assertions).then(|| self.vm.clone());
                let step = op.step(&mut self.vm);
                let changed = before.map_or(Parts::empty(), |before| self.changed_since(&before));
                debug_assert!(reach.writes.contains(changed), "{op:?} changed {changed:?} and declares {reach:?}");
                step
            }
            Some(mutant) => {
                self.touch = Touch::ALL;
                mutant.step(op, &mut self.thread.saved, &mut self.vm)
            }
        };
        match self.vm.invalidation().in_progress().cmp(&before) {
            Ordering::Greater => self.say(|| "begins an invalidation".into()),
            Ordering::Less => self.say(|| "ends the invalidation, the sequence moves on".into()),
            Ordering::Equal if step == Step::Do(Action::Continue) => self.say(|| quiet(reach).into()),
            Ordering::Equal => {}
        }
        step
    }

    /// Which parts of the VM are different. The reduction rests on what steps declare, so debug builds check them.
    fn changed_since(&self, before: &Vm) -> Parts {
        let all = GfnRange::with_len(Gfn(0), self.context.program.frames());
        let attributes = |vm: &Vm| all.map(|all| vm.attribute_runs(all).collect::<Vec<_>>());
        let mut changed = Parts::empty();
        changed.set(Parts::SLOTS, self.vm.slots() != before.slots());
        changed.set(Parts::ATTRIBUTES, attributes(&self.vm) != attributes(before));
        changed.set(Parts::INVALIDATION, self.vm.invalidation() != before.invalidation());
        changed.set(Parts::FILES, !self.vm.files().eq(before.files()));
        changed.set(Parts::ARCH, self.vm.arch != before.arch);
        changed
    }

    /// A step after which the host owns pages that it did not own before leaves it nothing of what the guest wrote.
    fn step_in_place(&mut self, op: &mut CoreOp) -> Step<End> {
        let mut before = self.vm.arch.clone();
        let step = self.step(op);
        for pfn in self.machine.secret_frames() {
            let was = before.host_access(pfn, AccessKind::Load);
            if was != HostOutcome::Plain && self.vm.arch.host_access(pfn, AccessKind::Load) == HostOutcome::Plain {
                self.machine.becomes(PageRange::page(pfn), Contents::Undefined);
                self.touch = Touch::ALL;
            }
        }
        step
    }

    fn core(&mut self, stmt: &Stmt, mut op: CoreOp) -> bool {
        let converts = matches!(op, CoreOp::Convert(_)) && !self.vm.arch.is_stateless();
        let step = if converts { self.step_in_place(&mut op) } else { self.step(&mut op) };
        match step {
            Step::Do(action) => {
                let taken = self.perform(stmt, &action, &mut op);
                self.set_reading(op.is_reading_slots());
                self.thread.flight = Flight::Core(op);
                taken
            }
            Step::Done(End::Seen(seen)) => {
                if matches!(op, CoreOp::Close(_)) {
                    self.destroy_if_unused();
                }
                self.finish(stmt, seen)
            }
            Step::Done(End::Fault(_)) => false,
        }
    }

    fn map_in(&mut self, stmt: &Stmt, mut op: CoreOp) -> bool {
        match self.step(&mut op) {
            Step::Do(action) => {
                let taken = self.perform(stmt, &action, &mut op);
                self.thread.flight = Flight::MappingIn(op);
                taken
            }
            Step::Done(End::Seen(Seen::Ok)) => self.touch_mapped(stmt),
            Step::Done(End::Seen(seen)) => self.finish(stmt, seen),
            Step::Done(End::Fault(_)) => false,
        }
    }

    fn populate(&mut self, stmt: &Stmt, next: Gfn, mut op: CoreOp) -> bool {
        let Op::Populate { range, measured, .. } = stmt.op else { return false };
        match self.step(&mut op) {
            Step::Do(action) => {
                let taken = self.perform(stmt, &action, &mut op);
                self.thread.flight = Flight::Populating { next, op };
                taken
            }
            Step::Done(End::Seen(Seen::Ok)) => match next.checked_add(1).filter(|next| range.contains(*next)) {
                Some(next) => {
                    self.thread.flight = Flight::Populating { next, op: populate(next, measured) };
                    true
                }
                None => self.finish(stmt, Seen::Ok),
            },
            Step::Done(End::Seen(seen)) => {
                let done = u8::try_from(next.0 - range.start().0).unwrap_or(u8::MAX);
                self.finish(stmt, if done > 0 { Seen::Partly(done) } else { seen })
            }
            Step::Done(End::Fault(_)) => false,
        }
    }

    /// Carries an action out. `false` if it has to wait; then the whole turn is dropped.
    fn perform(&mut self, stmt: &Stmt, action: &Action, op: &mut CoreOp) -> bool {
        if *action != Action::Continue {
            self.say(|| describe(action));
        }
        self.touch.add(Touch::of_action(action));
        let frames = |vm: &Vm, pages| Machine::frames_of(vm, pages);
        match *action {
            Action::Continue | Action::Refill(_) => {}
            Action::Lock(lock) if !self.machine.can_lock(lock) => return false,
            Action::Lock(lock) => self.machine.lock(self.number, lock),
            Action::Unlock(lock) => self.machine.unlock(self.number, lock),
            Action::Zap { range, filter } => self.machine.zap(&mut self.vm, range, filter),
            Action::Flush => self.machine.flush(),
            Action::Synchronize => self.machine.start_waiting(self.number),
            Action::Zero(pages) => frames(&self.vm, pages).into_iter().for_each(|frames| self.kernel_zeroes(frames)),
            Action::CopyIn(pages) => self.copy_in(stmt, pages),
            Action::Free(pages) => self.free(pages),
            Action::DirectMap(pages, change) => {
                self.frames_of_any(pages).into_iter().for_each(|frames| self.machine.change_direct_map(frames, change));
            }
            Action::FlushDirectMap => self.machine.flush_host(),
            Action::DropUserMappings(pages) => self.machine.unmap_for_vmm(pages.file, pages.range),
            Action::MapUser(pages) => self.machine.map_for_vmm(pages),
            Action::GetUserPage { slot, gfn } => {
                let hva = self.vm.slots().get(slot).map(|slot| slot.hva_of(gfn));
                let page = hva.and_then(|hva| (hva >> 12).checked_sub(USER_BASE));
                op.user_page(page.and_then(|page| self.machine.user_frame(page)));
            }
            Action::ChangeUserMapping => self.change_user(stmt),
            Action::UseDirectMap(pages) => {
                self.frames_of_any(pages).into_iter().for_each(|frames| {
                    self.machine.host_reaches(frames.start());
                });
            }
            Action::Map(mapping) => {
                let separate = self.vm.arch.has_separate_tables();
                self.machine.map(mapping, separate);
            }
        }
        true
    }

    /// The frames of pages of a file that may be gone already.
    fn frames_of_any(&self, pages: Pages) -> Option<gmem_core::addr::PfnRange> {
        pages.range.rebase(pages.file.pfn(pages.range.start()))
    }

    /// Memory goes back to the host, and with it what the VMM has mapped of it.
    fn free(&mut self, pages: Pages) {
        self.machine.unmap_for_vmm(pages.file, pages.range);
        if let Some(frames) = self.frames_of_any(pages) {
            self.machine.free(frames);
        }
    }

    fn kernel_zeroes(&mut self, frames: gmem_core::addr::PfnRange) {
        for pfn in frames.pages() {
            let reached = self.machine.host_reaches(pfn);
            let outcome = self.vm.arch.host_access(pfn, AccessKind::Store);
            if !reached || outcome != HostOutcome::Plain {
                self.record(Events::HOST_OOPS);
            }
        }
        self.machine.fill(frames, Value::Zero);
    }

    fn copy_in(&mut self, stmt: &Stmt, pages: Pages) {
        let Op::Populate { value, measured, .. } = stmt.op else { return };
        for pfn in Machine::frames_of(&self.vm, pages).into_iter().flat_map(PageRange::pages) {
            self.machine.write(pfn, value, true);
        }
        if measured {
            self.measure(pages);
        }
    }

    fn measure(&mut self, pages: Pages) {
        let slots: Vec<_> =
            self.vm.file(pages.file).into_iter().flat_map(|file| file.bound_slots(pages.range)).collect();
        let gfns = slots.into_iter().filter_map(|id| self.vm.slots().get(id)?.gfns_of(pages.range));
        for gfn in gfns.flat_map(PageRange::pages).collect::<Vec<_>>() {
            match self.machine.measured.iter_mut().find(|(of, _)| *of == gfn) {
                Some((_, times)) => *times += 1,
                None => self.machine.measured.push((gfn, 1)),
            }
        }
        self.machine.measured.sort_unstable();
    }

    fn change_user(&mut self, stmt: &Stmt) {
        let Op::ChangeUser { first, end, change } = stmt.op else { return };
        for page in first..end {
            self.machine.replace_user(page, change != UserChange::Unmap);
        }
    }

    // What takes one step.

    fn immediately(&mut self, stmt: &Stmt) -> bool {
        self.touch = Touch::ALL;
        let seen = match stmt.op {
            Op::Populate { range, measured, .. } => {
                let op = populate(range.start(), measured);
                return self.populate(stmt, range.start(), op);
            }
            Op::HostRead { page: HostPage::Mapped { file, index } }
            | Op::HostWrite { page: HostPage::Mapped { file, index }, .. } => {
                return self.begin_mapped(stmt, file, index);
            }
            Op::Memfd { memfd, op } => return self.memfd(stmt, memfd, op),
            Op::Allocate { file, range } => match self.allocate(file, range) {
                Some(seen) => seen,
                None => return false,
            },
            Op::Finalize => self.vm.finalize().map_or_else(|no| Seen::Errno(of_refusal(no)), |()| Seen::Ok),
            Op::CloseVm => {
                self.machine.vm_closed = true;
                self.destroy_if_unused();
                Seen::Ok
            }
            Op::HostRead { page } => self.host_read(page),
            Op::HostWrite { page, value } => self.host_write(page, value),
            Op::Pin { file, range, pinned } => {
                let id = self.file(file);
                match self.vm.file_mut(id) {
                    Some(file) if !pinned || file.side(range.start()) == Side::Shared => {
                        file.set_referenced(range, pinned);
                        Seen::Ok
                    }
                    _ => Seen::Errno(Errno::EFAULT),
                }
            }
            Op::Reclaim { file, index } => self.relocate(file, index, Seen::Busy),
            Op::Migrate { file, index } => self.relocate(file, index, Seen::Errno(Errno::EOPNOTSUPP)),
            Op::Reuse { file, index } => self.reuse(file, index),
            Op::Split { gfn } => self.machine.split_mapping(gfn).map_or(Seen::Nothing, |_| Seen::Ok),
            Op::Collapse { gfn } => {
                let block = GfnRange::page(gfn).align_out(gmem_core::addr::Level::Page2M);
                // Only shared memory is ever collapsed: for a private mapping the zap would not be harmless.
                self.machine.zap(&mut self.vm, block, Filter::Only(Side::Shared));
                self.machine.flush();
                Seen::Ok
            }
            Op::Request { .. } => Seen::Errno(Errno::EINVAL),
            _ => Seen::Nothing,
        };
        self.finish(stmt, seen)
    }

    fn allocate(&mut self, file: usize, range: gmem_core::addr::IndexRange) -> Option<Seen> {
        let id = self.file(file);
        if !self.machine.can_lock(Lock::FileShared(id)) {
            return None;
        }
        let inside = self.vm.file(id).and_then(|file| file.all_pages()).is_some_and(|all| all.covers(range));
        Some(match self.vm.file_mut(id) {
            Some(file) if inside => {
                file.allocate(range);
                Seen::Ok
            }
            Some(_) => Seen::Errno(Errno::EINVAL),
            None => Seen::Errno(Errno::EBADF),
        })
    }

    /// A VM lives until its descriptor and its last file are closed.
    fn destroy_if_unused(&mut self) {
        self.touch = Touch::ALL;
        if self.machine.vm_closed && self.vm.files().next().is_none() {
            self.vm.arch.destroy();
        }
    }

    fn relocate(&self, file: usize, index: PageIndex, refused: Seen) -> Seen {
        let file = self.vm.file(self.file(file));
        if file.is_some_and(|file| file.relocate(index).is_err()) { refused } else { Seen::Ok }
    }

    /// The host gives memory that it got back to someone else, who uses it through the direct map.
    fn reuse(&mut self, file: usize, index: PageIndex) -> Seen {
        let page = self.page(file, index);
        if self.vm.file(page.file).is_some_and(|file| file.is_present(index)) {
            return Seen::Busy;
        }
        let Some(frames) = self.frames_of_any(page) else { return Seen::Nothing };
        let pfn = frames.start();
        if self.machine.is_hidden(pfn) {
            self.record(Events::HIDDEN_AFTER_FREE);
            return Seen::HostFault;
        }
        match self.vm.arch.host_access(pfn, AccessKind::Store) {
            HostOutcome::Plain => Seen::Ok,
            _ => Seen::HostFault,
        }
    }

    fn host_read(&mut self, page: HostPage) -> Seen {
        match page {
            HostPage::User(page) => {
                self.machine.user_frame(page).map_or(Seen::HostFault, |pfn| Seen::Value(self.machine.bytes(pfn).value))
            }
            HostPage::Direct { file, index } | HostPage::Mapped { file, index } => {
                let Some(frames) = self.frames_of_any(self.page(file, index)) else { return Seen::Nothing };
                let pfn = frames.start();
                if matches!(page, HostPage::Direct { .. }) && !self.machine.host_reaches(pfn) {
                    return Seen::HostFault;
                }
                self.look(pfn)
            }
        }
    }

    fn look(&mut self, pfn: Pfn) -> Seen {
        match self.vm.arch.host_access(pfn, AccessKind::Load) {
            HostOutcome::Plain => {
                let bytes = self.machine.bytes(pfn);
                if bytes.secret {
                    self.record(Events::HOST_SAW_SECRET);
                }
                Seen::Value(bytes.value)
            }
            HostOutcome::Ciphertext | HostOutcome::Corrupted => Seen::Cipher,
            HostOutcome::Fault | HostOutcome::MachineCheck => Seen::HostFault,
        }
    }

    fn host_write(&mut self, page: HostPage, value: Value) -> Seen {
        let pfn = match page {
            HostPage::User(page) => self.machine.user_frame(page),
            HostPage::Direct { file, index } | HostPage::Mapped { file, index } => {
                self.frames_of_any(self.page(file, index)).map(PageRange::start)
            }
        };
        let Some(pfn) = pfn else { return Seen::HostFault };
        if matches!(page, HostPage::Direct { .. }) && !self.machine.host_reaches(pfn) {
            return Seen::HostFault;
        }
        match self.vm.arch.host_access(pfn, AccessKind::Store) {
            HostOutcome::Plain => {
                self.machine.write(pfn, value, false);
                Seen::Ok
            }
            HostOutcome::Ciphertext | HostOutcome::Corrupted | HostOutcome::MachineCheck => {
                self.machine.becomes(PageRange::page(pfn), Contents::Undefined);
                Seen::Ok
            }
            HostOutcome::Fault => Seen::HostFault,
        }
    }

    fn begin_mapped(&mut self, stmt: &Stmt, file: usize, index: PageIndex) -> bool {
        let id = self.file(file);
        if self.machine.is_mapped_for_vmm(id, index) {
            return self.touch_mapped(stmt);
        }
        self.map_in(stmt, CoreOp::UserFault(UserFault::new(id, index)))
    }

    /// The VMM's instruction runs again after its fault; the entry may have gone meanwhile.
    fn touch_mapped(&mut self, stmt: &Stmt) -> bool {
        self.touch = Touch::ALL;
        let (page, value) = match stmt.op {
            Op::HostRead { page } => (page, None),
            Op::HostWrite { page, value } => (page, Some(value)),
            _ => return false,
        };
        let HostPage::Mapped { file, index } = page else { return false };
        let id = self.file(file);
        if !self.machine.is_mapped_for_vmm(id, index) {
            self.thread.flight = Flight::MappingIn(CoreOp::UserFault(UserFault::new(id, index)));
            return true;
        }
        let seen = match value {
            None => self.host_read(page),
            Some(value) => self.host_write(page, value),
        };
        self.finish(stmt, seen)
    }

    // Memfds of the first form.

    fn memfd(&mut self, stmt: &Stmt, number: usize, op: MemfdOp) -> bool {
        let Some(memfd) = self.memfds.get_mut(number) else { return false };
        let frame = |page: u64| Pfn((1 << 42) + ((number as u64) << 32) + page);
        let split = |may_split: bool| if may_split { Split::Works } else { Split::Fails };
        let result = match op {
            MemfdOp::Read(page) => return self.read_memfd(stmt, MemfdRead::new(page)),
            MemfdOp::Seal => memfd.seal(),
            MemfdOp::Map => memfd.map(),
            MemfdOp::Unmap => {
                memfd.unmap();
                Ok(())
            }
            MemfdOp::Write(page, value) => memfd.write(page).map(|()| self.machine.write(frame(page), value, false)),
            MemfdOp::GuestWrite(page, value) => {
                memfd.touch(page).map(|()| self.machine.write(frame(page), value, true))
            }
            MemfdOp::Punch { first, end, may_split } => memfd.punch(first, end, split(may_split)).map(|gone| {
                gone.into_iter().for_each(|page| self.machine.free(PageRange::page(frame(page))));
            }),
            MemfdOp::Truncate { bytes_from, may_split } => memfd.truncate(bytes_from, split(may_split)).map(|gone| {
                gone.into_iter().for_each(|page| self.machine.free(PageRange::page(frame(page))));
            }),
            MemfdOp::Migrate(_) | MemfdOp::Swap(_) => memfd.relocate(),
        };
        self.finish(stmt, result.map_or_else(of_seal, |()| Seen::Ok))
    }

    fn read_memfd(&mut self, stmt: &Stmt, mut read: MemfdRead) -> bool {
        self.touch = Touch::ALL;
        let Op::Memfd { memfd: number, op: MemfdOp::Read(page) } = stmt.op else { return false };
        let Some(memfd) = self.memfds.get(number) else { return false };
        match read.step(memfd) {
            Ok(ReadStep::Continue) => {
                self.say(|| "is permitted".into());
                self.thread.flight = Flight::Reading(read);
                true
            }
            Ok(ReadStep::Copy) if !memfd.is_present(page) => self.finish(stmt, Seen::Value(Value::Zero)),
            Ok(ReadStep::Copy) => {
                let seen = self.look(Pfn((1 << 42) + ((number as u64) << 32) + page));
                self.finish(stmt, seen)
            }
            Err(error) => self.finish(stmt, of_seal(error)),
        }
    }
}

fn of_seal(error: SealError) -> Seen {
    Seen::Errno(match error {
        SealError::InUse | SealError::SplitFailed => Errno::EBUSY,
        SealError::Sealed => Errno::EPERM,
        SealError::Partial => Errno::EINVAL,
        SealError::BeyondEnd => Errno::EFAULT,
    })
}

fn populate(gfn: Gfn, measured: bool) -> CoreOp {
    let kind = if measured { PopulateKind::Measured } else { PopulateKind::Unmeasured };
    CoreOp::Populate(PopulatePage::new(gfn, Some(&SOURCE), kind))
}

/// The claim that creates `slot`.
pub(crate) fn claim(slot: SlotDecl) -> Claim {
    let file = slot.file.map(|(file, _)| FileClaim::File(FileId(u32::try_from(file).unwrap_or(u32::MAX))));
    Claim {
        slot: u32::from(slot.number),
        flags: if file.is_some() { SlotFlags::GUEST_MEMFD.bits() } else { 0 },
        guest_phys_addr: slot.gfns.start().gpa(),
        memory_size: slot.gfns.len() << 12,
        userspace_addr: (USER_BASE + slot.user) << 12,
        file: file.unwrap_or(FileClaim::BadDescriptor),
        guest_memfd_offset: slot.file.map_or(0, |(_, first)| first.0 << 12),
    }
}

fn deletion(number: u16) -> Claim {
    Claim {
        slot: u32::from(number),
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 0,
        userspace_addr: 0,
        file: FileClaim::BadDescriptor,
        guest_memfd_offset: 0,
    }
}

pub(crate) fn word(side: Side) -> &'static str {
    match side {
        Side::Shared => "shared",
        Side::Private => "private",
    }
}

/// The VMM's page behind an address.
pub(crate) fn user_page_of(hva: u64) -> Option<u64> {
    (hva >> 12).checked_sub(USER_BASE)
}

/// What a step that asks for nothing is about.
fn quiet(reach: Reach) -> &'static str {
    match (reach.reads, reach.writes) {
        (reads, writes) if reads == Parts::INVALIDATION && writes.is_empty() => "notes the sequence",
        (reads, writes) if reads.contains(Parts::ATTRIBUTES) && writes.is_empty() => {
            "looks at attribute, slot and file"
        }
        (_, writes) if writes == Parts::ARCH => "prepares the page",
        (_, writes) if writes == Parts::FILES => "looks at the page",
        (_, writes) if writes.contains(Parts::SLOTS) => "changes the slots",
        _ => "goes on",
    }
}

fn describe(action: &Action) -> String {
    let file = |file: &FileId| format!("file {}", file.0);
    let pages =
        |pages: &Pages| format!("{} pages {}..{}", file(&pages.file), pages.range.start().0, pages.range.end().0);
    let lock = |lock: &Lock| match lock {
        Lock::Slots => "slots_lock".to_owned(),
        Lock::FileExclusive(id) => format!("invalidate lock of {} (exclusive)", file(id)),
        Lock::FileShared(id) => format!("invalidate lock of {} (shared)", file(id)),
        Lock::Folios(which) => format!("folio lock of {}", pages(which)),
    };
    let gfns = |range: &GfnRange| format!("gfn {}..{}", range.start().0, range.end().0);
    match action {
        Action::Continue => "goes on".into(),
        Action::Lock(which) => format!("takes {}", lock(which)),
        Action::Unlock(which) => format!("releases {}", lock(which)),
        Action::Zap { range, filter } => match filter {
            Filter::Both => format!("zaps {}", gfns(range)),
            Filter::Only(side) => format!("zaps {} ({} only)", gfns(range), word(*side)),
        },
        Action::Flush => "flushes TLBs".into(),
        Action::Synchronize => "waits for faults that read the old slots".into(),
        Action::Zero(which) => format!("zeroes {}", pages(which)),
        Action::CopyIn(which) => format!("copies into {}", pages(which)),
        Action::Free(which) => format!("frees {}", pages(which)),
        Action::DirectMap(which, gmem_core::ops::DirectMap::Remove) => format!("hides {} from the host", pages(which)),
        Action::DirectMap(which, gmem_core::ops::DirectMap::Restore) => format!("shows {} to the host", pages(which)),
        Action::FlushDirectMap => "flushes the host's TLBs".into(),
        Action::DropUserMappings(which) => format!("unmaps {} from the VMM", pages(which)),
        Action::MapUser(which) => format!("maps {} for the VMM", pages(which)),
        Action::GetUserPage { gfn, .. } => format!("looks up the VMM's page of gfn {}", gfn.0),
        Action::ChangeUserMapping => "changes the VMM's memory".into(),
        Action::UseDirectMap(which) => format!("uses {} through the direct map", pages(which)),
        Action::Map(mapping) => {
            let size = mapping.level.pages();
            format!(
                "maps gfn {} ({} page{}, {})",
                mapping.gfn.0,
                size,
                if size == 1 { "" } else { "s" },
                word(mapping.side)
            )
        }
        Action::Refill(range) => format!("{} may be mapped again", gfns(range)),
    }
}
