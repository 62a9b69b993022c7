use alloc::vec::Vec;

use super::punch::free_pages;
use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::GfnRange;
use crate::file::{FileFlags, FileId};
use crate::invalidate::{Begun, Filter};
use crate::vm::Vm;

/// The last descriptor of a file is closed (`kvm_gmem_release()`).
///
/// Every slot forgets the file; the slots stay, and private faults in them fail until they are deleted. The memory is freed
/// after that, with the inode.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct CloseFile {
    file: FileId,
    state: State,
    zaps: Vec<GfnRange>,
    filter: Filter,
    begun: Option<Begun>,
    frees: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    LockSlots,
    LockFile,
    Begin,
    Zap,
    End,
    UnlockSlots,
    LockFolios,
    RestoreDirectMap,
    Free,
    UnlockFolios(Pages),
    Done,
}

impl CloseFile {
    /// Closes `file`.
    #[must_use]
    pub fn new(file: FileId) -> Self {
        Self { file, state: State::LockSlots, zaps: Vec::new(), filter: Filter::Both, begun: None, frees: false }
    }

    fn next(&mut self, state: State, action: Action) -> Step<()> {
        self.state = state;
        Step::Do(action)
    }

    fn begin(&mut self, vm: &mut Vm) -> Step<()> {
        // Only the first of two closes frees; there is nothing left for another one to lock.
        let open = vm.files.get(&self.file).filter(|file| file.is_open());
        let Some((file, all)) = open.and_then(|file| Some((file, file.all_pages()?))) else {
            return self.next(State::End, Action::Continue);
        };
        self.frees = true;
        self.zaps = vm.frames_of(file, all);
        self.filter = vm.file_filter(file);
        self.forget(vm);
        let begun = vm.invalidation.begin();
        for gfns in &self.zaps {
            vm.invalidation.add(&begun, *gfns);
            vm.arch.invalidate(*gfns);
        }
        self.begun = Some(begun);
        self.zap()
    }

    fn forget(&self, vm: &mut Vm) {
        for slot in vm.slots.iter_mut() {
            if let Some(binding) = &mut slot.binding
                && binding.file == Some(self.file)
            {
                binding.file = None;
            }
        }
        if let Some(file) = vm.files.get_mut(&self.file) {
            file.close();
        }
    }

    fn zap(&mut self) -> Step<()> {
        match self.zaps.pop() {
            Some(range) => self.next(State::Zap, Action::Zap { range, filter: self.filter }),
            None => self.next(State::End, Action::Flush),
        }
    }

    fn end(&mut self, vm: &mut Vm) -> Step<()> {
        if let Some(begun) = self.begun.take() {
            vm.invalidation.end(begun);
        }
        self.next(State::UnlockSlots, Action::Unlock(Lock::FileExclusive(self.file)))
    }

    fn pages(&self, vm: &Vm) -> Option<Pages> {
        let all = vm.file(self.file).filter(|_| self.frees)?.all_pages()?;
        Some(Pages { file: self.file, range: all })
    }

    fn restore_direct_map(&mut self, vm: &mut Vm) -> Step<()> {
        let pages = self.pages(vm);
        if let (Some(pages), Some(file)) = (pages, vm.files.get_mut(&self.file))
            && file.flags().contains(FileFlags::NO_DIRECT_MAP)
        {
            file.set_direct_map(pages.range, true);
            return self.next(State::Free, Action::DirectMap(pages, DirectMap::Restore));
        }
        self.next(State::Free, Action::Continue)
    }

    fn free(&mut self, vm: &mut Vm) -> Step<()> {
        let Some(pages) = self.pages(vm) else { return self.next(State::Done, Action::Continue) };
        free_pages(vm, pages);
        vm.files.remove(&self.file);
        self.next(State::UnlockFolios(pages), Action::Free(pages))
    }
}

impl Operation for CloseFile {
    type Output = ();

    fn step(&mut self, vm: &mut Vm) -> Step<()> {
        match self.state {
            State::LockSlots => self.next(State::LockFile, Action::Lock(Lock::Slots)),
            State::LockFile => self.next(State::Begin, Action::Lock(Lock::FileExclusive(self.file))),
            State::Begin => self.begin(vm),
            State::Zap => self.zap(),
            State::End => self.end(vm),
            State::UnlockSlots => self.next(State::LockFolios, Action::Unlock(Lock::Slots)),
            State::LockFolios => {
                let lock = self.pages(vm).map_or(Action::Continue, |pages| Action::Lock(Lock::Folios(pages)));
                self.next(State::RestoreDirectMap, lock)
            }
            State::UnlockFolios(pages) => self.next(State::Done, Action::Unlock(Lock::Folios(pages))),
            State::RestoreDirectMap => self.restore_direct_map(vm),
            State::Free => self.free(vm),
            State::Done => Step::Done(()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::LockSlots
            | State::LockFile
            | State::Zap
            | State::UnlockSlots
            | State::UnlockFolios(_)
            | State::Done => Reach::NOTHING,
            State::LockFolios => Reach::reads(Parts::FILES),
            State::Begin => Reach::writes(Parts::all()),
            State::End => Reach::writes(Parts::INVALIDATION),
            State::RestoreDirectMap => Reach::writes(Parts::FILES),
            State::Free => Reach::writes(Parts::FILES | Parts::ARCH),
        }
    }
}
