use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::vm::{DirectMapFlush, Vm};

/// The kernel needs to look into a page that is not on the direct map (a paravirtual clock page, an instruction to emulate):
/// put it back, use it, take it out again. The folio stays locked meanwhile: a page that is freed in between would be
/// taken from its next owner.
///
/// Without a flush afterwards the translation of the host stays until it is evicted, and the page can still be read
/// through it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RestoreTemporarily {
    pages: Pages,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Restore,
    Use,
    Remove,
    Flush,
    Unlock,
    Done,
}

impl RestoreTemporarily {
    /// Uses `pages` through the direct map.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self { pages, state: State::Lock }
    }

    fn next(&mut self, state: State, action: Action) -> Step<()> {
        self.state = state;
        Step::Do(action)
    }

    fn set(&self, vm: &mut Vm, present: bool) -> bool {
        let file = vm.files.get_mut(&self.pages.file);
        let changed = file.as_ref().is_some_and(|file| file.on_direct_map(self.pages.range.start()) != present);
        if let Some(file) = file.filter(|_| changed) {
            file.set_direct_map(self.pages.range, present);
        }
        changed
    }
}

impl Operation for RestoreTemporarily {
    type Output = ();

    fn step(&mut self, vm: &mut Vm) -> Step<()> {
        match self.state {
            State::Lock => self.next(State::Restore, Action::Lock(Lock::Folios(self.pages))),
            State::Restore => {
                let hidden = self.set(vm, true);
                let after = if hidden { State::Use } else { State::Unlock };
                let action = if hidden {
                    Action::DirectMap(self.pages, DirectMap::Restore)
                } else {
                    Action::UseDirectMap(self.pages)
                };
                self.next(after, action)
            }
            State::Use => self.next(State::Remove, Action::UseDirectMap(self.pages)),
            State::Remove => {
                // A page that was freed meanwhile is back for good.
                let still_ours = vm.file(self.pages.file).is_some_and(|file| file.is_present(self.pages.range.start()));
                if !still_ours || !self.set(vm, false) {
                    return self.next(State::Unlock, Action::Continue);
                }
                self.next(State::Flush, Action::DirectMap(self.pages, DirectMap::Remove))
            }
            State::Flush if vm.rules.direct_map_flush == DirectMapFlush::Flush => {
                self.next(State::Unlock, Action::FlushDirectMap)
            }
            State::Flush | State::Unlock => self.next(State::Done, Action::Unlock(Lock::Folios(self.pages))),
            State::Done => Step::Done(()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Restore | State::Remove => Reach::writes(Parts::FILES),
            State::Lock | State::Use | State::Flush | State::Unlock | State::Done => Reach::NOTHING,
        }
    }
}
