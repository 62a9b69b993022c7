use super::{Action, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{PageIndex, PageRange};
use crate::file::FileId;
use crate::invalidate::Begun;
use crate::vm::Vm;

/// A page has a memory error: the guest's mappings of it go (`kvm_gmem_error_folio()`) and the VMM's (`memory_failure()`,
/// `unmap_poisoned_folio()`). The page stays, and every later use of it fails until it is punched out.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct MemoryFailure {
    file: FileId,
    index: PageIndex,
    state: State,
    begun: Option<Begun>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Begin,
    Flush,
    DropUserMappings,
    End,
    Done,
}

impl MemoryFailure {
    /// Page `index` of `file` fails.
    #[must_use]
    pub fn new(file: FileId, index: PageIndex) -> Self {
        Self { file, index, state: State::Lock, begun: None }
    }

    fn next(&mut self, state: State, action: Action) -> Step<()> {
        self.state = state;
        Step::Do(action)
    }

    fn begin(&mut self, vm: &mut Vm) -> Step<()> {
        let page = PageRange::page(self.index);
        // Memory fails, and an absent page has none.
        let file = vm.files.get(&self.file).filter(|file| file.is_present(self.index));
        let Some(file) = file else { return self.next(State::End, Action::Continue) };
        let (gfns, filter) = (vm.frames_of(file, page), vm.file_filter(file));
        let covered = vm.frames_of(file, file.whole_folios(page));
        if let Some(file) = vm.files.get_mut(&self.file) {
            // The other pages of a large folio stay usable, which they are only as folios of their own.
            file.split(page);
            file.poison(self.index);
        }
        if covered.is_empty() {
            return self.next(State::DropUserMappings, Action::Continue);
        }
        let begun = vm.invalidation.begin();
        for range in covered {
            vm.invalidation.add(&begun, range);
        }
        for &range in &gfns {
            vm.arch.invalidate(range);
        }
        self.begun = Some(begun);
        let zap = gfns.first().map(|&range| Action::Zap { range, filter });
        self.next(State::Flush, zap.unwrap_or(Action::Continue))
    }

    fn end(&mut self, vm: &mut Vm) -> Step<()> {
        if let Some(begun) = self.begun.take() {
            vm.invalidation.end(begun);
        }
        self.next(State::Done, Action::Unlock(Lock::FileShared(self.file)))
    }
}

impl Operation for MemoryFailure {
    type Output = ();

    fn step(&mut self, vm: &mut Vm) -> Step<()> {
        match self.state {
            // Shared is enough: bindings change only under the exclusive lock, so begin and end see the same ones.
            State::Lock => self.next(State::Begin, Action::Lock(Lock::FileShared(self.file))),
            State::Begin => self.begin(vm),
            State::Flush => self.next(State::DropUserMappings, Action::Flush),
            State::DropUserMappings => {
                let pages = Pages { file: self.file, range: PageRange::page(self.index) };
                self.next(State::End, Action::DropUserMappings(pages))
            }
            State::End => self.end(vm),
            State::Done => Step::Done(()),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Lock | State::Flush | State::DropUserMappings | State::Done => Reach::NOTHING,
            State::Begin => Reach::writes(Parts::INVALIDATION | Parts::FILES | Parts::ARCH).and_reads(Parts::SLOTS),
            State::End => Reach::writes(Parts::INVALIDATION),
        }
    }
}
