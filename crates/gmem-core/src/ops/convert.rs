use alloc::vec::Vec;

use super::{Action, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{GfnRange, IndexRange, PageIndex};
use crate::file::{File, FileId};
use crate::invalidate::{Begun, Filter};
use crate::vendor::Side;
use crate::vm::{Tracking, Vm};

/// Why pages could not be converted. Nothing was changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ConvertError {
    /// Attributes are kept per VM: the descriptor has no such call. ENOTTY.
    NotInPlace,
    /// The VM has no private memory: its files keep the side that they were created with. EINVAL.
    NoPrivateMemory,
    /// The file ends before the range does. EINVAL.
    BeyondEnd,
    /// This page, the first such one, has references that only its owner can drop. EAGAIN.
    Referenced(PageIndex),
}

/// `KVM_SET_MEMORY_ATTRIBUTES2` on a file: pages change sides where they are.
///
/// Refused before anything is done, in this order: not in place, a VM without private memory, a range that the file has not
/// (`kvm_gmem_ioctl()`, `kvm_gmem_set_attributes()`).
///
/// Lock, compare, drop the VMM's mappings and check references (to private only), begin, zap the old side, tell the
/// architecture, store, end. The guest is the only user of a private page, so the way to shared checks no references.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ConvertInPlace {
    pages: Pages,
    to: Side,
    state: State,
    zaps: Vec<GfnRange>,
    refills: Vec<GfnRange>,
    begun: Option<Begun>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Check,
    References,
    Begin,
    Zap,
    Store,
    Refill,
    End,
    Done(Result<(), ConvertError>),
}

type Output = Result<(), ConvertError>;

impl ConvertInPlace {
    /// Puts `range` of `file` on side `to`.
    #[must_use]
    pub fn new(file: FileId, range: IndexRange, to: Side) -> Self {
        Self {
            pages: Pages { file, range },
            to,
            state: State::Lock,
            zaps: Vec::new(),
            refills: Vec::new(),
            begun: None,
        }
    }

    fn next(&mut self, state: State, action: Action) -> Step<Output> {
        self.state = state;
        Step::Do(action)
    }

    fn unlock(&mut self, result: Output) -> Step<Output> {
        self.next(State::Done(result), Action::Unlock(Lock::FileExclusive(self.pages.file)))
    }

    fn start(&mut self, vm: &Vm) -> Step<Output> {
        match self.validate(vm) {
            Ok(()) => self.next(State::Check, Action::Lock(Lock::FileExclusive(self.pages.file))),
            Err(error) => {
                self.state = State::Done(Err(error));
                Step::Done(Err(error))
            }
        }
    }

    fn validate(&self, vm: &Vm) -> Output {
        let beyond = |file: &File| self.pages.range.end().0 > file.pages();
        match vm.rules.tracking {
            Tracking::Attributes => Err(ConvertError::NotInPlace),
            Tracking::InPlace if !vm.has_private_memory() => Err(ConvertError::NoPrivateMemory),
            Tracking::InPlace if vm.file(self.pages.file).is_some_and(beyond) => Err(ConvertError::BeyondEnd),
            Tracking::InPlace => Ok(()),
        }
    }

    fn check(&mut self, vm: &Vm) -> Step<Output> {
        let changes = vm.file(self.pages.file).is_some_and(|file| file.has_other_side(self.pages.range, self.to));
        match (changes, self.to) {
            (false, _) => self.unlock(Ok(())),
            (true, Side::Private) => self.next(State::References, Action::DropUserMappings(self.pages)),
            (true, Side::Shared) => self.next(State::Begin, Action::Continue),
        }
    }

    fn references(&mut self, vm: &Vm) -> Step<Output> {
        let referenced = vm.file(self.pages.file).and_then(|file| file.first_referenced(self.pages.range));
        match referenced {
            Some(index) => self.unlock(Err(ConvertError::Referenced(index))),
            None => self.next(State::Begin, Action::Continue),
        }
    }

    fn begin(&mut self, vm: &mut Vm) -> Step<Output> {
        self.zaps = vm.file(self.pages.file).map(|file| vm.frames_of(file, self.pages.range)).unwrap_or_default();
        let begun = vm.invalidation.begin();
        for gfns in &self.zaps {
            vm.invalidation.add(&begun, *gfns);
            vm.arch.invalidate(*gfns);
        }
        self.begun = Some(begun);
        self.zap()
    }

    fn zap(&mut self) -> Step<Output> {
        match self.zaps.pop() {
            Some(range) => self.next(State::Zap, Action::Zap { range, filter: Filter::Only(self.to.other()) }),
            None => self.next(State::Store, Action::Flush),
        }
    }

    fn store(&mut self, vm: &mut Vm) -> Step<Output> {
        self.change_side(vm);
        self.refills = vm.file(self.pages.file).map(|file| vm.frames_of(file, self.pages.range)).unwrap_or_default();
        self.refill()
    }

    fn refill(&mut self) -> Step<Output> {
        match self.refills.pop() {
            Some(range) => self.next(State::Refill, Action::Refill(range)),
            None => self.next(State::End, Action::Continue),
        }
    }

    fn change_side(&self, vm: &mut Vm) {
        let Pages { file, range } = self.pages;
        if self.to == Side::Shared {
            reclaim_present(vm, file, range);
        }
        let Some(file) = vm.files.get_mut(&file) else { return };
        file.split(range);
        file.set_side(range, self.to);
    }

    fn end(&mut self, vm: &mut Vm) -> Step<Output> {
        if let Some(begun) = self.begun.take() {
            vm.invalidation.end(begun);
        }
        self.unlock(Ok(()))
    }
}

/// Pages that become shared leave the guest, as freed ones do.
fn reclaim_present(vm: &mut Vm, file: FileId, range: IndexRange) {
    let Some(file) = vm.files.get(&file) else { return };
    for run in file.present_runs(range) {
        if let Some(pfns) = run.rebase(file.pfn(run.start())) {
            let _ = vm.arch.reclaim(pfns);
        }
    }
}

impl Operation for ConvertInPlace {
    type Output = Output;

    fn step(&mut self, vm: &mut Vm) -> Step<Output> {
        match self.state {
            State::Lock => self.start(vm),
            State::Check => self.check(vm),
            State::References => self.references(vm),
            State::Begin => self.begin(vm),
            State::Zap => self.zap(),
            State::Store => self.store(vm),
            State::Refill => self.refill(),
            State::End => self.end(vm),
            State::Done(result) => Step::Done(result),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Zap | State::Refill | State::Done(_) => Reach::NOTHING,
            State::Lock | State::Check | State::References => Reach::reads(Parts::FILES),
            State::Begin => Reach::writes(Parts::INVALIDATION | Parts::ARCH).and_reads(Parts::SLOTS | Parts::FILES),
            State::Store => Reach::writes(Parts::FILES | Parts::ARCH).and_reads(Parts::SLOTS),
            State::End => Reach::writes(Parts::INVALIDATION),
        }
    }
}
