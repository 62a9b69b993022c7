use alloc::vec::Vec;

use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::IndexRange;
use crate::file::FileFlags;
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
    /// What was put back and has to be taken out again. Of a range some pages may be off the direct map and others on it,
    /// where it was never used; those stay as they are.
    restored: Vec<IndexRange>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Restore,
    Remove,
    Flush,
    Unlock,
    Done,
}

impl RestoreTemporarily {
    /// Uses `pages` through the direct map.
    #[must_use]
    pub fn new(pages: Pages) -> Self {
        Self { pages, restored: Vec::new(), state: State::Lock }
    }

    fn next(&mut self, state: State, action: Action) -> Step<()> {
        self.state = state;
        Step::Do(action)
    }

    fn change(&self, vm: &mut Vm, range: IndexRange, change: DirectMap) -> Action {
        if let Some(file) = vm.files.get_mut(&self.pages.file) {
            file.set_direct_map(range, change == DirectMap::Restore);
        }
        Action::DirectMap(Pages { file: self.pages.file, range }, change)
    }

    /// One run of hidden pages after the other, then the use of all.
    fn restore(&mut self, vm: &mut Vm) -> Step<()> {
        let hidden = vm.file(self.pages.file).and_then(|file| file.first_off_direct_map(self.pages.range));
        match hidden {
            Some(run) => {
                self.restored.push(run);
                let action = self.change(vm, run, DirectMap::Restore);
                self.next(State::Restore, action)
            }
            None => {
                let next = if self.restored.is_empty() { State::Unlock } else { State::Remove };
                self.next(next, Action::UseDirectMap(self.pages))
            }
        }
    }

    fn remove(&mut self, vm: &mut Vm) -> Step<()> {
        let Some(run) = self.restored.pop() else { return self.unlock() };
        let after = if self.restored.is_empty() { State::Flush } else { State::Remove };
        // Pages that were freed meanwhile, with their file, are back for good.
        if vm.file(self.pages.file).is_none_or(|file| !file.is_present(run.start())) {
            return self.next(after, Action::Continue);
        }
        let action = self.change(vm, run, DirectMap::Remove);
        self.next(after, action)
    }

    fn unlock(&mut self) -> Step<()> {
        self.next(State::Done, Action::Unlock(Lock::Folios(self.pages)))
    }
}

/// Notes that a folio leaves the direct map, if its file wants that and it is still there. Under the folio's lock: whoever has
/// it next finds the folio hidden and must not map it before the flush.
pub(super) fn hide_folio(vm: &mut Vm, folio: Pages) -> Option<Pages> {
    let file = vm.files.get_mut(&folio.file)?;
    let leaves = file.flags().contains(FileFlags::NO_DIRECT_MAP) && file.on_direct_map(folio.range.start());
    leaves.then(|| file.set_direct_map(folio.range, false))?;
    Some(folio)
}

impl Operation for RestoreTemporarily {
    type Output = ();

    fn step(&mut self, vm: &mut Vm) -> Step<()> {
        match self.state {
            State::Lock => self.next(State::Restore, Action::Lock(Lock::Folios(self.pages))),
            State::Restore => self.restore(vm),
            State::Remove => self.remove(vm),
            State::Flush if vm.rules.direct_map_flush == DirectMapFlush::Flush => {
                self.next(State::Unlock, Action::FlushDirectMap)
            }
            State::Flush | State::Unlock => self.unlock(),
            State::Done => Step::Done(()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Restore | State::Remove => Reach::writes(Parts::FILES),
            State::Lock | State::Flush | State::Unlock | State::Done => Reach::NOTHING,
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;
    use crate::addr::{PageIndex, PageRange};
    use crate::arch::Arch;
    use crate::file::FileFlags;
    use crate::ops::run;
    use crate::vm::Rules;

    fn range(start: u64, end: u64) -> IndexRange {
        PageRange::new(PageIndex(start), PageIndex(end)).unwrap()
    }

    #[test]
    fn of_a_range_only_the_hidden_pages_come_and_go() {
        let mut vm = Vm::with_frames(Arch::SwProtected, Rules::default(), 64);
        let id = vm.create_file(0x8000, FileFlags::NO_DIRECT_MAP.bits(), FileFlags::all()).unwrap();
        let file = vm.file_mut(id).unwrap();
        file.allocate(range(0, 8));
        file.set_direct_map(range(2, 3), false);
        file.set_direct_map(range(5, 7), false);
        let before = file.clone();
        let mut changes = Vec::new();
        let mut hidden_in_use = None;
        run(
            &mut RestoreTemporarily::new(Pages { file: id, range: range(1, 8) }),
            &mut vm,
            |_, vm, action| match action {
                Action::DirectMap(pages, change) => changes.push((pages.range, change)),
                Action::UseDirectMap(_) => hidden_in_use = vm.file(id).unwrap().first_off_direct_map(range(0, 8)),
                _ => {}
            },
        );
        let (low, high) = (range(2, 3), range(5, 7));
        let (restore, remove) = (DirectMap::Restore, DirectMap::Remove);
        assert_eq!(changes, [(low, restore), (high, restore), (high, remove), (low, remove)]);
        assert_eq!((hidden_in_use, vm.file(id)), (None, Some(&before)));
    }
}
