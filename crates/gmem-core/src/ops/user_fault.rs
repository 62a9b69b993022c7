use super::direct_map::hide_folio;
use super::fault::zero_next;
use super::{Action, DirectMap, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::PageIndex;
use crate::addr::PageRange;
use crate::file::{FileFlags, FileId};
use crate::vendor::Side;
use crate::vm::{DirectMapFlush, Vm};

/// Why the VMM's access to its mapping of a file fails. All of them are SIGBUS.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UserFaultError {
    /// The file cannot be mapped, is gone, or ends before the page.
    NoPage,
    /// The page is private.
    Private,
    /// The page has a memory error.
    Poisoned,
}

/// The VMM touches a page of a file that it has mapped, and has no page-table entry for it
/// (`kvm_gmem_fault_user_mapping()`).
///
/// The lock is shared: conversions and holes exclude it, other faults do not. The folio is locked until it is mapped, so that
/// of several faults none maps it before it is zeroed and, where its file wants that, gone from the direct map.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct UserFault {
    file: FileId,
    index: PageIndex,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    Lock,
    Take,
    Zero(Pages),
    LeaveDirectMap(Pages),
    FlushDirectMap(Pages),
    Map(Pages),
    UnlockFolio(Pages),
    Unlock(Output),
    Done(Output),
}

type Output = Result<(), UserFaultError>;

impl UserFault {
    /// The VMM touches page `index` of `file`.
    #[must_use]
    pub fn new(file: FileId, index: PageIndex) -> Self {
        Self { file, index, state: State::Lock }
    }

    fn next(&mut self, state: State, action: Action) -> Step<Output> {
        self.state = state;
        Step::Do(action)
    }

    fn take(&mut self, vm: &mut Vm) -> Step<Output> {
        match self.try_take(vm) {
            Ok(folio) => self.next(State::Zero(folio), Action::Lock(Lock::Folios(folio))),
            Err(error) => self.next(State::Done(Err(error)), Action::Unlock(Lock::FileShared(self.file))),
        }
    }

    fn try_take(&self, vm: &mut Vm) -> Result<Pages, UserFaultError> {
        let file = vm.files.get_mut(&self.file).ok_or(UserFaultError::NoPage)?;
        if !file.flags().contains(FileFlags::MMAP) || self.index.0 >= file.pages() {
            return Err(UserFaultError::NoPage);
        }
        if file.side(self.index) == Side::Private {
            return Err(UserFaultError::Private);
        }
        let range = file.folio_at(self.index);
        if file.is_poisoned(self.index) {
            return Err(UserFaultError::Poisoned);
        }
        Ok(Pages { file: self.file, range })
    }

    /// Every page of the folio that is not clean is zeroed, run by run.
    fn zero(&mut self, vm: &mut Vm, folio: Pages) -> Step<Output> {
        match zero_next(vm, self.file, folio.range) {
            Some((pages, true)) => self.next(State::Zero(folio), Action::Zero(pages)),
            Some((pages, false)) => self.next(State::LeaveDirectMap(folio), Action::Zero(pages)),
            None => self.leave_direct_map(vm, folio),
        }
    }

    /// After zeroing, which needs the direct map.
    fn leave_direct_map(&mut self, vm: &mut Vm, folio: Pages) -> Step<Output> {
        match hide_folio(vm, folio) {
            Some(pages) => {
                let next = match vm.rules.direct_map_flush {
                    DirectMapFlush::Flush => State::FlushDirectMap(folio),
                    DirectMapFlush::NoFlush => State::Map(folio),
                };
                self.next(next, Action::DirectMap(pages, DirectMap::Remove))
            }
            None => self.map(folio),
        }
    }

    fn map(&mut self, folio: Pages) -> Step<Output> {
        let page = Pages { file: self.file, range: PageRange::page(self.index) };
        self.next(State::UnlockFolio(folio), Action::MapUser(page))
    }
}

impl Operation for UserFault {
    type Output = Output;

    fn step(&mut self, vm: &mut Vm) -> Step<Output> {
        match self.state {
            State::Lock => self.next(State::Take, Action::Lock(Lock::FileShared(self.file))),
            State::Take => self.take(vm),
            State::Zero(folio) => self.zero(vm, folio),
            State::LeaveDirectMap(folio) => self.leave_direct_map(vm, folio),
            State::FlushDirectMap(folio) => self.next(State::Map(folio), Action::FlushDirectMap),
            State::Map(folio) => self.map(folio),
            State::UnlockFolio(folio) => self.next(State::Unlock(Ok(())), Action::Unlock(Lock::Folios(folio))),
            State::Unlock(result) => self.next(State::Done(result), Action::Unlock(Lock::FileShared(self.file))),
            State::Done(result) => Step::Done(result),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::Take | State::Zero(_) | State::LeaveDirectMap(_) => Reach::writes(Parts::FILES),
            State::Lock | State::FlushDirectMap(_) | State::Map(_) => Reach::NOTHING,
            State::UnlockFolio(_) | State::Unlock(_) | State::Done(_) => Reach::NOTHING,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::ops::run;
    use crate::vm::{Rules, Tracking};

    #[test]
    fn private_pages_and_unmappable_files_are_refused() {
        let in_place = Rules { tracking: Tracking::InPlace, ..Rules::default() };
        let mut vm = Vm::with_frames(Arch::SwProtected, in_place, 64);
        let mut file = |flags| vm.create_file(0x2000, flags, FileFlags::all()).unwrap();
        let (shared, private, unmappable) = (file(3), file(1), file(0));
        let mut touch = |file, index| run(&mut UserFault::new(file, PageIndex(index)), &mut vm, |_, _, _| {});
        assert_eq!(touch(shared, 1), Ok(()));
        assert_eq!(touch(shared, 2), Err(UserFaultError::NoPage));
        assert_eq!(touch(private, 0), Err(UserFaultError::Private));
        assert_eq!(touch(unmappable, 0), Err(UserFaultError::NoPage));
    }
}
