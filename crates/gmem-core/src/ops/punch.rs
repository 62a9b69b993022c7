use alloc::vec::Vec;

use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{GfnRange, IndexRange};
use crate::file::{FileFlags, FileId};
use crate::invalidate::{Begun, Filter};
use crate::vm::Vm;

/// Why a hole cannot be punched.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PunchError {
    /// The hole cuts a large folio that cannot be split. Nothing was changed.
    SplitFailed,
}

/// `FALLOC_FL_PUNCH_HOLE` over a validated range (`kvm_gmem_punch_hole()`).
///
/// begin, zap, flush, lock folios, restore the direct map, free, end: a page is given back only after no vCPU can reach it, and no fault
/// that found it before can map it afterwards.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PunchHole {
    pages: Pages,
    may_split: bool,
    state: State,
    zaps: Vec<GfnRange>,
    filter: Filter,
    begun: Option<Begun>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Start,
    Split,
    Begin,
    Zap,
    LockFolios,
    RestoreDirectMap,
    Free,
    UnlockFolios,
    End,
    Done(Result<(), PunchError>),
}

impl PunchHole {
    /// Takes the memory of `range` of `file` away.
    #[must_use]
    pub fn new(file: FileId, range: IndexRange) -> Self {
        Self {
            pages: Pages { file, range },
            may_split: true,
            state: State::Start,
            zaps: Vec::new(),
            filter: Filter::Both,
            begun: None,
        }
    }

    /// The same on a host that cannot split a large folio (someone holds a reference to it).
    #[must_use]
    pub fn without_split(self) -> Self {
        Self { may_split: false, ..self }
    }

    fn split(&mut self, vm: &mut Vm) -> Step<Result<(), PunchError>> {
        let Pages { file, range } = self.pages;
        let cuts = vm.file(file).is_some_and(|file| file.cuts_folio(range));
        if cuts && !self.may_split {
            return self.unlock(Err(PunchError::SplitFailed));
        }
        self.state = State::Begin;
        Step::Do(Action::Continue)
    }

    /// Without a bound slot the MMU is not touched at all. What goes is the hole; what faults must not take for granted
    /// meanwhile are the folios that it touches.
    fn begin(&mut self, vm: &mut Vm) -> Step<Result<(), PunchError>> {
        let Pages { file, range } = self.pages;
        let mut covered = Vec::new();
        if let Some(file) = vm.files.get(&file) {
            self.zaps = vm.frames_of(file, range);
            self.filter = vm.file_filter(file);
            covered = vm.frames_of(file, file.whole_folios(range));
        }
        if covered.is_empty() {
            self.state = State::LockFolios;
            return Step::Do(Action::Continue);
        }
        let begun = vm.invalidation.begin();
        for gfns in covered {
            vm.invalidation.add(&begun, gfns);
        }
        for gfns in &self.zaps {
            vm.invalidation.add(&begun, vm.could_be_mapped_with(file, *gfns));
            vm.arch.invalidate(*gfns);
        }
        self.begun = Some(begun);
        self.zap()
    }

    fn zap(&mut self) -> Step<Result<(), PunchError>> {
        self.state = State::Zap;
        match self.zaps.pop() {
            Some(range) => Step::Do(Action::Zap { range, filter: self.filter }),
            None => {
                self.state = State::LockFolios;
                Step::Do(Action::Flush)
            }
        }
    }

    /// Before the page is reclaimed, for every page that left; whoever gets it next uses it through the direct map.
    fn restore_direct_map(&mut self, vm: &mut Vm) -> Step<Result<(), PunchError>> {
        self.state = State::Free;
        let Some(file) = vm.files.get_mut(&self.pages.file) else { return Step::Do(Action::Continue) };
        if !file.flags().contains(FileFlags::NO_DIRECT_MAP) {
            return Step::Do(Action::Continue);
        }
        file.set_direct_map(self.pages.range, true);
        Step::Do(Action::DirectMap(self.pages, DirectMap::Restore))
    }

    fn free(&mut self, vm: &mut Vm) -> Step<Result<(), PunchError>> {
        free_pages(vm, self.pages);
        self.state = State::UnlockFolios;
        Step::Do(Action::Free(self.pages))
    }

    fn end(&mut self, vm: &mut Vm) -> Step<Result<(), PunchError>> {
        if let Some(begun) = self.begun.take() {
            vm.invalidation.end(begun);
        }
        self.unlock(Ok(()))
    }

    fn unlock(&mut self, result: Result<(), PunchError>) -> Step<Result<(), PunchError>> {
        self.state = State::Done(result);
        Step::Do(Action::Unlock(Lock::FileExclusive(self.pages.file)))
    }
}

/// Takes pages out of the file and out of the guest (`kvm_gmem_free_folio()`).
pub(super) fn free_pages(vm: &mut Vm, pages: Pages) {
    let Some(file) = vm.files.get_mut(&pages.file) else { return };
    let present: Vec<IndexRange> = file.present_runs(pages.range).collect();
    for run in present {
        if let Some(pfns) = run.rebase(file.pfn(run.start())) {
            let _ = vm.arch.reclaim(pfns);
        }
    }
    file.free(pages.range);
}

impl Operation for PunchHole {
    type Output = Result<(), PunchError>;

    fn step(&mut self, vm: &mut Vm) -> Step<Self::Output> {
        match self.state {
            State::Start => {
                self.state = State::Split;
                Step::Do(Action::Lock(Lock::FileExclusive(self.pages.file)))
            }
            State::Split => self.split(vm),
            State::Begin => self.begin(vm),
            State::Zap => self.zap(),
            State::LockFolios => {
                self.state = State::RestoreDirectMap;
                Step::Do(Action::Lock(Lock::Folios(self.pages)))
            }
            State::RestoreDirectMap => self.restore_direct_map(vm),
            State::Free => self.free(vm),
            State::UnlockFolios => {
                self.state = State::End;
                Step::Do(Action::Unlock(Lock::Folios(self.pages)))
            }
            State::End => self.end(vm),
            State::Done(result) => Step::Done(result),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Start | State::Zap | State::LockFolios | State::UnlockFolios | State::Done(_) => Reach::NOTHING,
            State::Split => Reach::reads(Parts::FILES),
            State::Begin => Reach::writes(Parts::INVALIDATION | Parts::ARCH).and_reads(Parts::SLOTS | Parts::FILES),
            State::RestoreDirectMap => Reach::writes(Parts::FILES),
            State::Free => Reach::writes(Parts::FILES | Parts::ARCH),
            State::End => Reach::writes(Parts::INVALIDATION),
        }
    }
}
