use alloc::vec::Vec;

use super::{Action, Operation, Parts, Reach, Step};
use crate::addr::{GfnRange, PAGE_SHIFT};
use crate::invalidate::{Begun, Filter};
use crate::vendor::Side;
use crate::vm::Vm;

/// The VMM changes its own mapping of shared memory: munmap, mremap, MADV_DONTNEED, a page that migrates. The kernel's MMU
/// notifier brackets the change.
///
/// It is about shared memory only. A private mapping of the same frames is none of its business.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ChangeUserMapping {
    start: u64,
    end: u64,
    state: State,
    zaps: Vec<GfnRange>,
    begun: Option<Begun>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Begin,
    Zap,
    Change,
    End,
    Done,
}

impl ChangeUserMapping {
    /// The VMM changes what it has at the addresses `[start, end)`.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Self {
        Self { start, end, state: State::Begin, zaps: Vec::new(), begun: None }
    }

    fn next(&mut self, state: State, action: Action) -> Step<Vec<GfnRange>> {
        self.state = state;
        Step::Do(action)
    }

    fn begin(&mut self, vm: &mut Vm) -> Step<Vec<GfnRange>> {
        self.zaps = frames_at(vm, self.start, self.end);
        vm.user_changes = vm.user_changes.saturating_add(1);
        let begun = vm.invalidation.begin();
        for gfns in &self.zaps {
            vm.invalidation.add(&begun, *gfns);
        }
        self.begun = Some(begun);
        self.zap()
    }

    fn zap(&mut self) -> Step<Vec<GfnRange>> {
        match self.zaps.pop() {
            Some(range) => self.next(State::Zap, Action::Zap { range, filter: Filter::Only(Side::Shared) }),
            None => self.next(State::Change, Action::Flush),
        }
    }

    fn end(&mut self, vm: &mut Vm) -> Step<Vec<GfnRange>> {
        if let Some(begun) = self.begun.take() {
            vm.invalidation.end(begun);
            vm.user_changes = vm.user_changes.saturating_sub(1);
        }
        self.state = State::Done;
        Step::Done(frames_at(vm, self.start, self.end))
    }
}

/// The frames whose shared memory lies at the addresses `[start, end)`.
fn frames_at(vm: &Vm, start: u64, end: u64) -> Vec<GfnRange> {
    let part = |slot: &crate::slot::Slot| {
        let base = slot.userspace_addr;
        let from = start.max(base).checked_sub(base)? >> PAGE_SHIFT;
        let to = (end.checked_sub(base)?.checked_add((1 << PAGE_SHIFT) - 1)? >> PAGE_SHIFT).min(slot.gfns.len());
        let first = slot.gfns.start().0;
        GfnRange::new(crate::addr::Gfn(first + from), crate::addr::Gfn(first + to))
    };
    let by_user = vm.slots().iter().filter(|slot| !slot.binding.is_some_and(|binding| binding.file_only));
    by_user.filter_map(part).collect()
}

impl Operation for ChangeUserMapping {
    /// The frames that show what the VMM has there now.
    type Output = Vec<GfnRange>;

    fn step(&mut self, vm: &mut Vm) -> Step<Self::Output> {
        match self.state {
            State::Begin => self.begin(vm),
            State::Zap => self.zap(),
            State::Change => self.next(State::End, Action::ChangeUserMapping),
            State::End => self.end(vm),
            State::Done => Step::Done(Vec::new()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Begin => Reach::writes(Parts::INVALIDATION).and_reads(Parts::SLOTS),
            State::Zap | State::Change | State::Done => Reach::NOTHING,
            State::End => Reach::writes(Parts::INVALIDATION).and_reads(Parts::SLOTS),
        }
    }
}
