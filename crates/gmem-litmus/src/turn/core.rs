//! Operations of the core: a step, and what it asks for carried out on the machine.

use std::cmp::Ordering;

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PageRange, PfnRange};
use gmem_core::arch::GiveUp;
use gmem_core::ops::{Action, Operation, Pages, Parts, Populate, Source, Step};
use gmem_core::vendor::{AccessKind, Contents, HostOutcome, PopulateKind};

use super::claims::USER_BASE;
use super::words::{describe, quiet};
use super::{Flight, Turn};
use crate::flight::{CoreOp, End};
use crate::machine::{Events, Machine};
use crate::program::{Op, Stmt, UserChange};
use crate::touch::Touch;
use crate::value::{Seen, Value};

/// What is populated. Its bytes do not matter, its measurement is counted and not compared.
static SOURCE: [u8; 4096] = [0; 4096];

impl Turn<'_> {
    pub(super) fn step(&mut self, op: &mut CoreOp) -> Step<End> {
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
    pub(super) fn changed_since(&self, before: &Vm) -> Parts {
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
    pub(super) fn step_in_place(&mut self, op: &mut CoreOp) -> Step<End> {
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

    pub(super) fn core(&mut self, stmt: &Stmt, mut op: CoreOp) -> bool {
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
                match stmt.op {
                    Op::Share { range } if seen == Seen::Ok && self.gives_up_with_conversion() => {
                        self.end_sharing(stmt, range, seen)
                    }
                    _ => self.finish(stmt, seen),
                }
            }
            Step::Done(End::Fault(_)) => false,
        }
    }

    fn gives_up_with_conversion(&self) -> bool {
        self.vm.arch.give_up() == Some(GiveUp::WithConversion)
    }

    pub(super) fn map_in(&mut self, stmt: &Stmt, mut op: CoreOp) -> bool {
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

    /// Carries an action out. `false` if it has to wait; then the whole turn is dropped.
    pub(super) fn perform(&mut self, stmt: &Stmt, action: &Action, op: &mut CoreOp) -> bool {
        if *action != Action::Continue {
            self.say(|| describe(self.context.program, action));
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
                if self.machine.was_lost(mapping) {
                    self.record(Events::REFAULTED);
                }
                self.machine.map(mapping, separate);
            }
        }
        true
    }

    /// The frames of pages of a file that may be gone already.
    pub(super) fn frames_of_any(&self, pages: Pages) -> Option<PfnRange> {
        pages.range.rebase(pages.file.pfn(pages.range.start()))
    }

    /// Memory goes back to the host, and with it what the VMM has mapped of it.
    pub(super) fn free(&mut self, pages: Pages) {
        self.machine.unmap_for_vmm(pages.file, pages.range);
        if let Some(frames) = self.frames_of_any(pages) {
            self.machine.free(frames);
        }
    }

    pub(super) fn kernel_zeroes(&mut self, frames: PfnRange) {
        for pfn in frames.pages() {
            let reached = self.machine.host_reaches(pfn);
            let outcome = self.vm.arch.host_access(pfn, AccessKind::Store);
            if !reached || outcome != HostOutcome::Plain {
                self.record(Events::HOST_OOPS);
            }
        }
        self.machine.fill(frames, Value::Zero);
    }

    pub(super) fn copy_in(&mut self, stmt: &Stmt, pages: Pages) {
        let Op::Populate { value, measured, .. } = stmt.op else { return };
        for pfn in Machine::frames_of(&self.vm, pages).into_iter().flat_map(PageRange::pages) {
            self.machine.write(pfn, value, true);
        }
        if measured {
            self.measure(pages);
        }
    }

    pub(super) fn measure(&mut self, pages: Pages) {
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

    pub(super) fn change_user(&mut self, stmt: &Stmt) {
        let Op::ChangeUser { first, end, change } = stmt.op else { return };
        for page in first..end {
            self.machine.replace_user(page, change != UserChange::Unmap);
        }
    }
}

pub(super) fn populate(range: GfnRange, measured: bool) -> CoreOp {
    let kind = if measured { PopulateKind::Measured } else { PopulateKind::Unmeasured };
    CoreOp::Populate(Populate::new(range, Source::Repeated(&SOURCE), kind), range.len())
}
