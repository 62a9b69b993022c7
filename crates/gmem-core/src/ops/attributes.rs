use super::{Action, Lock, Operation, Parts, Reach, Step};
use crate::addr::{GfnRange, Level, PageRange};
use crate::invalidate::{Begun, Filter};
use crate::vendor::Side;
use crate::vm::Vm;

/// `KVM_SET_MEMORY_ATTRIBUTES` over a validated range (`kvm_vm_set_mem_attributes()`).
///
/// It needs no slot and cannot stop half way. Where slots have frames in the range, mappings of the old side go before the
/// attribute changes, and no fault that looked before can map afterwards.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SetAttributes {
    range: GfnRange,
    side: Side,
    state: State,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum State {
    Start,
    Compare,
    Begin,
    Flush(Option<Begun>),
    Store(Option<Begun>),
    End(Option<Begun>),
    Unlock,
    Done,
}

impl SetAttributes {
    /// Puts every frame of `range` on `side`.
    #[must_use]
    pub fn new(range: GfnRange, side: Side) -> Self {
        Self { range, side, state: State::Start }
    }

    /// The frames whose mappings must not be made while the attribute changes: the slots' part of the range, widened to
    /// whole huge pages, because a huge page that covers the range's edge would be mixed afterwards.
    fn covered(&self, vm: &Vm) -> Option<GfnRange> {
        let parts = vm.slots().overlapping(self.range).filter_map(|slot| {
            let part = slot.gfns.intersect(self.range)?;
            slot.gfns.intersect(part.align_out(Level::Page1G))
        });
        parts.reduce(PageRange::hull)
    }

    fn begin(&mut self, vm: &mut Vm) -> Step<()> {
        let Some(covered) = self.covered(vm) else {
            self.state = State::End(None);
            self.store(vm);
            return Step::Do(Action::Refill(self.range));
        };
        let begun = vm.invalidation.begin();
        vm.invalidation.add(&begun, covered);
        self.state = State::Flush(Some(begun));
        Step::Do(Action::Zap { range: self.range, filter: Filter::Only(self.side.other()) })
    }

    fn store(&self, vm: &mut Vm) {
        vm.private.set(self.range.start().0, self.range.len(), self.side == Side::Private);
    }
}

impl Operation for SetAttributes {
    type Output = ();

    fn step(&mut self, vm: &mut Vm) -> Step<()> {
        match core::mem::replace(&mut self.state, State::Done) {
            State::Start => {
                self.state = State::Compare;
                Step::Do(Action::Lock(Lock::Slots))
            }
            State::Compare => {
                let equal = vm.uniform_attribute(self.range) == Some(self.side);
                self.state = if equal { State::Unlock } else { State::Begin };
                self.step(vm)
            }
            State::Begin => self.begin(vm),
            State::Flush(begun) => {
                self.state = State::Store(begun);
                Step::Do(Action::Flush)
            }
            State::Store(begun) => {
                self.store(vm);
                self.state = State::End(begun);
                Step::Do(Action::Refill(self.range))
            }
            State::End(begun) => {
                if let Some(begun) = begun {
                    vm.invalidation.end(begun);
                }
                Step::Do(Action::Unlock(Lock::Slots))
            }
            State::Unlock => Step::Do(Action::Unlock(Lock::Slots)),
            State::Done => Step::Done(()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Start | State::Flush(_) | State::Unlock | State::Done => Reach::NOTHING,
            State::Compare | State::Begin => {
                Reach::writes(Parts::INVALIDATION | Parts::ATTRIBUTES).and_reads(Parts::SLOTS | Parts::FILES)
            }
            State::Store(_) => Reach::writes(Parts::ATTRIBUTES),
            State::End(_) => Reach::writes(Parts::INVALIDATION),
        }
    }
}
