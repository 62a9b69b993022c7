//! A vCPU in the guest, in a fault, and waiting for the VMM's answer to an exit.

use gmem_core::addr::{Gfn, GfnRange, Level, PageIndex, PageNumber, PageRange, Pfn};
use gmem_core::file::FileId;
use gmem_core::ops::{Access, Fault, FaultEnd, Origin, SetAttributes, Step};
use gmem_core::vendor::{AccessKind, ExitReason, GuestOutcome, HostOutcome, Mapping, Side};
use gmem_core::vm::{Tracking, View};

use super::words::{frame, word};
use super::{Flight, PATIENCE, Turn, Walk};
use crate::flight::{CoreOp, End, of_page, of_refusal};
use crate::machine::{Entry, Events};
use crate::mutant::Saved;
use crate::program::{Op, Stmt, ThreadKind};
use crate::touch::Touch;
use crate::value::{Errno, Seen, Value};

impl Turn<'_> {
    pub(super) fn walk(&mut self, stmt: &Stmt, walk: Walk) -> bool {
        self.touch.add(Touch::WALK);
        if let Some(seen) = self.cannot_run() {
            return self.finish(stmt, seen);
        }
        let ThreadKind::Vcpu { number: vcpu, .. } = self.kind else { return self.finish(stmt, Seen::Nothing) };
        let claimed = match stmt.op {
            Op::Access { claimed: Some(side), .. } => side,
            Op::Accept { .. } | Op::Share { .. } => Side::Private,
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
            self.say(|| {
                let frame = frame(self.context.program, entry.frame(walk.gfn).0);
                format!("walks the table: gfn {} is {frame}", walk.gfn.0)
            });
            self.machine.cache(vcpu, entry);
            self.thread.flight = Flight::Guest(walk);
            return true;
        }
        self.start_fault(stmt, walk, claimed)
    }

    /// What KVM_RUN ends with before there is a guest to run.
    fn cannot_run(&self) -> Option<Seen> {
        if self.vm.arch.is_dead() || self.machine.vm_closed {
            return Some(Seen::Dead);
        }
        // KVM_RUN is refused on the same condition: before SNP_LAUNCH_FINISH, KVM_TDX_FINALIZE_VM, realm activation.
        (!self.vm.arch.prefault_allowed()).then_some(Seen::Errno(Errno::EINVAL))
    }

    pub(super) fn start_fault(&mut self, stmt: &Stmt, walk: Walk, claimed: Side) -> bool {
        self.say(|| format!("faults at gfn {}, {}", walk.gfn.0, word(claimed)));
        let fault = Fault::new(Access { gfn: walk.gfn, claimed }, Origin::Guest);
        self.fault(stmt, walk, fault)
    }

    pub(super) fn touch(&mut self, stmt: &Stmt, walk: Walk, entry: &Entry, side: Side) -> bool {
        self.touch.add(Touch::MEMORY);
        let (pfn, gone) = entry.frame(walk.gfn);
        let mapping = Mapping { gfn: walk.gfn, pfn, level: entry.mapping.level, side };
        let outcome = match stmt.op {
            Op::Access { kind, .. } => self.vm.arch.guest_access(mapping, kind),
            what => self.own(mapping, &what),
        };
        if gone || self.is_absent(pfn) {
            self.record(Events::USE_AFTER_FREE);
        }
        match outcome {
            GuestOutcome::Done => self.touched(stmt, walk, pfn, side),
            GuestOutcome::Exit(ExitReason::NotPresent | ExitReason::Rmp { .. }) => self.in_vain(stmt, walk, side),
            GuestOutcome::Exit(ExitReason::PendingTd) => self.harmed(stmt, Seen::Dead),
            GuestOutcome::Exit(ExitReason::RealmAbort) => self.harmed(stmt, Seen::Abort),
            GuestOutcome::Exit(ExitReason::RipasChange) => self.exit(stmt, walk, side),
            GuestOutcome::Exit(ExitReason::Poisoned) => self.harmed(stmt, Seen::Errno(Errno::EFAULT)),
            GuestOutcome::Exception(_) => self.harmed(stmt, Seen::Exception),
        }
    }

    /// The guest accepts a page or gives it up.
    fn own(&mut self, mapping: Mapping, what: &Op) -> GuestOutcome {
        let attribute = self.vm.attribute(mapping.gfn);
        let result = match what {
            Op::Share { .. } => self.vm.arch.guest_give_up(mapping, attribute),
            _ => self.vm.arch.guest_accept(mapping, attribute),
        };
        match result {
            Ok(contents) => {
                self.machine.becomes(PageRange::page(mapping.pfn), contents);
                GuestOutcome::Done
            }
            Err(outcome) => outcome,
        }
    }

    /// What the guest shares on purpose and the host can read is no secret any more.
    pub(super) fn publish(&mut self, range: GfnRange) {
        self.touch.add(Touch::TRUTH);
        self.touch.add(Touch::MEMORY);
        for gfn in range.pages() {
            let View::FilePage { file, index, .. } = self.vm.view(gfn) else { continue };
            let pfn = file.pfn(index);
            if self.machine.bytes(pfn).secret && self.vm.arch.host_access(pfn, AccessKind::Load) == HostOutcome::Plain {
                self.machine.publish(pfn);
            }
        }
    }

    /// A shared access of the guest to its own private page is no better than one of the host.
    pub(super) fn host_sees_cipher(&mut self, pfn: Pfn) -> bool {
        self.vm.arch.host_access(pfn, AccessKind::Load) == HostOutcome::Ciphertext
    }

    /// Whether `pfn` would be a file's page, and no file has it.
    pub(super) fn is_absent(&self, pfn: Pfn) -> bool {
        pfn >= FileId(0).pfn(PageIndex(0)) && !self.vm.files().any(|file| file.present_has(pfn))
    }

    pub(super) fn harmed(&mut self, stmt: &Stmt, seen: Seen) -> bool {
        self.record(Events::GUEST_DEAD);
        self.finish(stmt, seen)
    }

    /// There is a translation, and hardware refuses to use it: KVM's fault path runs, and the guest tries again.
    pub(super) fn in_vain(&mut self, stmt: &Stmt, walk: Walk, side: Side) -> bool {
        if walk.vain >= PATIENCE {
            return self.harmed(stmt, Seen::Stuck);
        }
        if let ThreadKind::Vcpu { number, .. } = self.kind {
            self.machine.drop_cached(number, walk.gfn);
        }
        self.start_fault(stmt, Walk { vain: walk.vain + 1, ..walk }, side)
    }

    pub(super) fn touched(&mut self, stmt: &Stmt, walk: Walk, pfn: Pfn, side: Side) -> bool {
        match stmt.op {
            Op::Access { kind: AccessKind::Store, value, .. } => {
                self.say(|| format!("writes {}", frame(self.context.program, pfn)));
                self.machine.write(pfn, value, side == Side::Private);
                self.finish(stmt, Seen::Ok)
            }
            Op::Access { .. } => {
                self.say(|| format!("reads {}", frame(self.context.program, pfn)));
                let bytes = self.machine.bytes(pfn);
                let cipher = bytes.secret && side == Side::Shared && self.host_sees_cipher(pfn);
                let value = if cipher { Value::Scrambled } else { bytes.value };
                if value == Value::Foreign {
                    self.record(Events::SAW_FOREIGN);
                }
                self.finish(stmt, Seen::Value(value))
            }
            Op::Accept { range } | Op::Share { range } => {
                match walk.gfn.checked_add(1).filter(|next| range.contains(*next)) {
                    Some(gfn) => {
                        self.thread.flight = Flight::Guest(Walk { gfn, answered: 0, vain: 0 });
                        true
                    }
                    None => self.all_touched(stmt),
                }
            }
            _ => self.finish(stmt, Seen::Ok),
        }
    }

    /// Every page was accepted or given up; for those that were given up the VMM's part begins.
    fn all_touched(&mut self, stmt: &Stmt) -> bool {
        match stmt.op {
            Op::Share { range } => self.begin_sharing(stmt, range),
            _ => self.finish(stmt, Seen::Ok),
        }
    }

    /// The guest asks with an exit, and gives nothing up before that.
    pub(super) fn ask_to_share(&mut self, stmt: &Stmt, range: GfnRange) -> bool {
        self.touch.add(Touch::WALK);
        match self.cannot_run() {
            Some(seen) => self.finish(stmt, seen),
            None => self.begin_sharing(stmt, range),
        }
    }

    /// The VMM has converted what a realm gives up, and runs it again: only now does the realm lose it. Whatever was converted
    /// back meanwhile the VMM is asked for once more.
    pub(super) fn end_sharing(&mut self, stmt: &Stmt, range: GfnRange, seen: Seen) -> bool {
        self.touch.add(Touch::TRUTH);
        self.touch.add(Touch::WALK);
        self.touch.add(Touch::MEMORY);
        for gfn in range.pages() {
            let pfn = self.machine.in_table(gfn, Some(Side::Private)).map(|entry| entry.frame(gfn).0);
            let page = Mapping { gfn, pfn: pfn.unwrap_or(Pfn(0)), level: Level::Page4K, side: Side::Private };
            match self.vm.arch.guest_give_up(page, self.vm.attribute(gfn)) {
                Ok(contents) => pfn.into_iter().for_each(|pfn| self.machine.becomes(PageRange::page(pfn), contents)),
                Err(GuestOutcome::Exit(ExitReason::RipasChange)) => return self.begin_sharing(stmt, range),
                Err(_) => return self.harmed(stmt, Seen::Exception),
            }
        }
        self.finish(stmt, seen)
    }

    pub(super) fn begin_sharing(&mut self, stmt: &Stmt, range: GfnRange) -> bool {
        self.publish(range);
        match self.operation(stmt) {
            Some(op) => {
                self.thread.flight = Flight::Core(op);
                true
            }
            None => self.finish(stmt, Seen::Errno(Errno::EINVAL)),
        }
    }

    pub(super) fn fault(&mut self, stmt: &Stmt, walk: Walk, fault: Fault) -> bool {
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

    pub(super) fn fault_ended(&mut self, stmt: &Stmt, walk: Walk, end: FaultEnd) -> bool {
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

    pub(super) fn exit(&mut self, stmt: &Stmt, walk: Walk, side: Side) -> bool {
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
    pub(super) fn is_spurious(&self, gfn: Gfn, side: Side) -> bool {
        let attribute = self.vm.attribute(gfn);
        let follows = self.vm.arch.access_side(side, side.other()) != side;
        let backed = !matches!(self.vm.view(gfn), View::Unbacked(_));
        backed && (attribute == side || follows)
    }

    pub(super) fn answer(&mut self, walk: Walk, mut op: CoreOp) -> bool {
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
}
