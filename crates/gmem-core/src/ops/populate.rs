use super::{Action, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{Gfn, PageRange};
use crate::file::{FileId, GetPageError};
use crate::vendor::{Populate, PopulateKind, Refusal, Side};
use crate::vm::Vm;

/// Why a page could not be populated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PopulateError {
    /// No slot, or a slot without a file. EINVAL.
    NoPrivateSlot,
    /// The page could not be had.
    Page(GetPageError),
    /// The frame's attribute is shared. EINVAL.
    NotPrivate,
    /// The page has contents already (6.12, 6.18). EEXIST.
    Populated,
    /// The architecture refused.
    Refused(Refusal),
}

/// One page of `kvm_gmem_populate()`: initial contents, measured once.
///
/// The caller loops over pages; what was done stays done, and a count above zero is success.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct PopulatePage<'a> {
    gfn: Gfn,
    source: Option<&'a [u8; 4096]>,
    kind: PopulateKind,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    LockSlots,
    LockFile,
    Populate(FileId),
    UnlockFile(FileId, Result<(), PopulateError>),
    UnlockSlots(Result<(), PopulateError>),
    Done(Result<(), PopulateError>),
}

type Output = Result<(), PopulateError>;

impl<'a> PopulatePage<'a> {
    /// Loads `source` into `gfn`.
    #[must_use]
    pub fn new(gfn: Gfn, source: Option<&'a [u8; 4096]>, kind: PopulateKind) -> Self {
        Self { gfn, source, kind, state: State::LockSlots }
    }

    fn next(&mut self, state: State, action: Action) -> Step<Output> {
        self.state = state;
        Step::Do(action)
    }

    fn lock_file(&mut self, vm: &Vm) -> Step<Output> {
        let binding = vm.slots.at(0, self.gfn).and_then(|slot| slot.binding);
        match binding {
            None => self.unlock_slots(Err(PopulateError::NoPrivateSlot)),
            Some(binding) => match binding.file {
                None => self.unlock_slots(Err(PopulateError::Page(GetPageError::NoFile))),
                Some(file) => self.next(State::Populate(file), Action::Lock(Lock::FileExclusive(file))),
            },
        }
    }

    fn populate(&mut self, vm: &mut Vm, file: FileId) -> Step<Output> {
        match self.try_populate(vm) {
            Ok(pages) => self.next(State::UnlockFile(file, Ok(())), Action::CopyIn(pages)),
            Err(error) => self.next(State::UnlockSlots(Err(error)), Action::Unlock(Lock::FileExclusive(file))),
        }
    }

    fn try_populate(&mut self, vm: &mut Vm) -> Result<Pages, PopulateError> {
        let slot = vm.slots.at(0, self.gfn).map(|slot| slot.id).ok_or(PopulateError::NoPrivateSlot)?;
        let (id, index, _) = vm.take_page(slot, self.gfn).map_err(PopulateError::Page)?;
        let file = vm.files.get(&id).ok_or(PopulateError::Page(GetPageError::NoFile))?;
        if vm.rules.populate_once && file.is_up_to_date(index) {
            return Err(PopulateError::Populated);
        }
        if vm.attribute(self.gfn) != Side::Private {
            return Err(PopulateError::NotPrivate);
        }
        let pfn = file.pfn(index);
        let source = Populate { source: self.source, kind: self.kind };
        vm.arch.populate(self.gfn, pfn, source).map_err(PopulateError::Refused)?;
        let range = PageRange::page(index);
        if let Some(file) = vm.files.get_mut(&id) {
            file.mark_up_to_date(range);
        }
        Ok(Pages { file: id, range })
    }

    fn unlock_slots(&mut self, result: Output) -> Step<Output> {
        self.next(State::Done(result), Action::Unlock(Lock::Slots))
    }
}

impl Operation for PopulatePage<'_> {
    type Output = Output;

    fn step(&mut self, vm: &mut Vm) -> Step<Output> {
        match self.state {
            State::LockSlots => self.next(State::LockFile, Action::Lock(Lock::Slots)),
            State::LockFile => self.lock_file(vm),
            State::Populate(file) => self.populate(vm, file),
            State::UnlockFile(file, result) => {
                self.next(State::UnlockSlots(result), Action::Unlock(Lock::FileExclusive(file)))
            }
            State::UnlockSlots(result) => self.unlock_slots(result),
            State::Done(result) => Step::Done(result),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::LockSlots | State::UnlockFile(..) | State::UnlockSlots(_) | State::Done(_) => Reach::NOTHING,
            State::LockFile => Reach::reads(Parts::SLOTS),
            State::Populate(_) => Reach::writes(Parts::FILES | Parts::ARCH).and_reads(Parts::SLOTS | Parts::ATTRIBUTES),
        }
    }
}
