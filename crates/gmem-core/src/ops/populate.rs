use super::{Action, Lock, Operation, Pages, Parts, Reach, Step};
use crate::addr::{Gfn, GfnRange, Level, PageRange};
use crate::file::{FileId, GetPageError};
use crate::slot::SlotId;
use crate::vendor::{self, Mapping, PopulateKind, Refusal, Side};
use crate::vm::Vm;

/// Why a page could not be populated.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PopulateError {
    /// No slot, or a slot without a file. EINVAL.
    NoPrivateSlot,
    /// A signal is pending. EINTR.
    Interrupted,
    /// The VMM has no page where the source should be. EFAULT.
    NoSource,
    /// The page could not be had.
    Page(GetPageError),
    /// The page has contents already (6.12, 6.18). EEXIST.
    Populated,
    /// The frame's attribute is shared. EINVAL.
    NotPrivate,
    /// The architecture refused.
    Refused(Refusal),
}

/// Where the bytes of initial pages come from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Source<'a> {
    /// A null pointer: the architecture provides them, or refuses to.
    Null,
    /// A page for each frame, in order. Where they end, so does the VMM's memory.
    Pages(&'a [[u8; 4096]]),
    /// One page that the VMM has mapped for every frame.
    Repeated(&'a [u8; 4096]),
}

/// How a [`Populate`] ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Populated {
    /// Pages done, from the first on. They stay done.
    pub pages: u64,
    /// Why the next page was not; `None` if the range ended, or the slot before it.
    pub stopped: Option<PopulateError>,
}

impl Populated {
    /// What `kvm_gmem_populate()` returns: the error only if nothing was done.
    ///
    /// `KVM_TDX_INIT_MEM_REGION` fails with [`Populated::stopped`] all the same, and its structure says how far it came.
    ///
    /// # Errors
    /// What stopped it at the first page.
    pub fn result(self) -> Result<u64, PopulateError> {
        match self.stopped {
            Some(error) if self.pages == 0 => Err(error),
            _ => Ok(self.pages),
        }
    }
}

/// `kvm_gmem_populate()` over a validated range, with the slots_lock of its callers: initial contents, each page measured
/// once.
///
/// slots_lock is held from the first page to the last, so that neither attributes nor slots change in between. The file's
/// lock is taken for each page, after the source's page was looked up; a hole, or a conversion in place, may come between
/// two pages. Before 7.0 it was held over all of them ([`populate_keeps_lock`](crate::vm::Rules::populate_keeps_lock)).
///
/// A range that passes the end of the slot is cut there. `KVM_TDX_INIT_MEM_REGION` calls the function for each page anew, and
/// goes on in the next slot.
///
/// The folio's lock, which the kernel has while it looks a page up, would only wait for faults, and where Linux populates there
/// are none before the launch ends.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Populate<'a> {
    range: GfnRange,
    source: Source<'a>,
    kind: PopulateKind,
    next: Gfn,
    interrupted: bool,
    stopped: Option<PopulateError>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum State {
    LockSlots,
    Find,
    LockFile(Call),
    Page(Call),
    Map(Call, Mapping),
    UnlockFile(Call),
    UnlockSlots,
    Done,
}

/// One call of `kvm_gmem_populate()`: what it found first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Call {
    slot: SlotId,
    file: FileId,
    /// Where the range ends, or the slot.
    end: Gfn,
}

impl<'a> Populate<'a> {
    /// Loads `source` into `range`.
    #[must_use]
    pub fn new(range: GfnRange, source: Source<'a>, kind: PopulateKind) -> Self {
        let next = range.start();
        Self { range, source, kind, next, interrupted: false, stopped: None, state: State::LockSlots }
    }

    /// A signal is pending: no further page is begun.
    pub fn interrupt(&mut self) {
        self.interrupted = true;
    }

    /// Pages done so far. [`Action::CopyIn`] is about the last of them.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.next.0.saturating_sub(self.range.start().0)
    }

    fn advance(&mut self, state: State, action: Action) -> Step<Populated> {
        self.state = state;
        Step::Do(action)
    }

    fn find(&mut self, vm: &Vm) -> Step<Populated> {
        match self.try_find(vm) {
            Ok(call) => self.lock_file(vm, call),
            Err(error) => self.stop(error),
        }
    }

    fn try_find(&self, vm: &Vm) -> Result<Call, PopulateError> {
        let by_page = vm.arch.populates_by_page();
        if by_page {
            self.check_signal()?;
        }
        let slot = vm.slots.at(0, self.next).ok_or(PopulateError::NoPrivateSlot)?;
        let binding = slot.binding.ok_or(PopulateError::NoPrivateSlot)?;
        let file = binding.file.ok_or(PopulateError::Page(GetPageError::NoFile))?;
        let end = if by_page { PageRange::page(self.next).end() } else { self.range.end() };
        Ok(Call { slot: slot.id, file, end: end.min(slot.gfns.end()) })
    }

    fn lock_file(&mut self, vm: &Vm, call: Call) -> Step<Populated> {
        let ready = match vm.rules.populate_keeps_lock {
            true => Ok(()),
            false => self.check_signal().and_then(|()| self.source_page().map(drop)),
        };
        match ready {
            Ok(()) => self.advance(State::Page(call), Action::Lock(Lock::FileExclusive(call.file))),
            Err(error) => self.stop(error),
        }
    }

    fn check_signal(&self) -> Result<(), PopulateError> {
        if self.interrupted { Err(PopulateError::Interrupted) } else { Ok(()) }
    }

    fn source_page(&self) -> Result<Option<&'a [u8; 4096]>, PopulateError> {
        match self.source {
            Source::Null => Ok(None),
            Source::Repeated(page) => Ok(Some(page)),
            Source::Pages(pages) => {
                let page = usize::try_from(self.done()).ok().and_then(|at| pages.get(at));
                page.map(Some).ok_or(PopulateError::NoSource)
            }
        }
    }

    fn page(&mut self, vm: &mut Vm, call: Call) -> Step<Populated> {
        match self.try_page(vm, call.slot) {
            Ok((pages, mapping)) => {
                self.next = PageRange::page(self.next).end();
                let maps = vm.arch.populates_tables();
                let state = if maps { State::Map(call, mapping) } else { self.after_page(vm, call) };
                self.advance(state, Action::CopyIn(pages))
            }
            Err(error) => {
                self.stopped = Some(error);
                self.advance(State::UnlockSlots, Action::Unlock(Lock::FileExclusive(call.file)))
            }
        }
    }

    fn after_page(&self, vm: &Vm, call: Call) -> State {
        let stays = vm.rules.populate_keeps_lock && self.next < call.end;
        if stays { State::Page(call) } else { State::UnlockFile(call) }
    }

    /// A page that is refused may have got its memory, which is all that is left of the attempt.
    fn try_page(&self, vm: &mut Vm, slot: SlotId) -> Result<(Pages, Mapping), PopulateError> {
        if vm.rules.populate_keeps_lock {
            self.check_signal()?;
        }
        let (id, index, _) = vm.take_page(slot, self.next).map_err(PopulateError::Page)?;
        let file = vm.files.get(&id).ok_or(PopulateError::Page(GetPageError::NoFile))?;
        if vm.rules.populate_once && file.is_up_to_date(index) {
            return Err(PopulateError::Populated);
        }
        if vm.attribute(self.next) != Side::Private {
            return Err(PopulateError::NotPrivate);
        }
        let pfn = file.pfn(index);
        let page = vendor::Populate { source: self.source_page()?, kind: self.kind };
        vm.arch.populate(self.next, pfn, page).map_err(PopulateError::Refused)?;
        let range = PageRange::page(index);
        if let Some(file) = vm.files.get_mut(&id) {
            file.mark_up_to_date(range);
        }
        let mapping = Mapping { gfn: self.next, pfn, level: Level::Page4K, side: Side::Private };
        Ok((Pages { file: id, range }, mapping))
    }

    fn unlock_file(&mut self, vm: &Vm, call: Call) -> Step<Populated> {
        let calls_again = vm.arch.populates_by_page() && self.next < self.range.end();
        let state = match self.next < call.end {
            true => State::LockFile(call),
            false if calls_again => State::Find,
            false => State::UnlockSlots,
        };
        self.advance(state, Action::Unlock(Lock::FileExclusive(call.file)))
    }

    /// Ends while the file is not locked.
    fn stop(&mut self, error: PopulateError) -> Step<Populated> {
        self.stopped = Some(error);
        self.unlock_slots()
    }

    fn unlock_slots(&mut self) -> Step<Populated> {
        self.advance(State::Done, Action::Unlock(Lock::Slots))
    }
}

impl Operation for Populate<'_> {
    type Output = Populated;

    fn step(&mut self, vm: &mut Vm) -> Step<Populated> {
        match self.state {
            State::LockSlots => self.advance(State::Find, Action::Lock(Lock::Slots)),
            State::Find => self.find(vm),
            State::LockFile(call) => self.lock_file(vm, call),
            State::Page(call) => self.page(vm, call),
            State::Map(call, mapping) => self.advance(self.after_page(vm, call), Action::Map(mapping)),
            State::UnlockFile(call) => self.unlock_file(vm, call),
            State::UnlockSlots => self.unlock_slots(),
            State::Done => Step::Done(Populated { pages: self.done(), stopped: self.stopped }),
        }
    }

    fn reach(&self) -> Reach {
        match self.state {
            State::LockSlots
            | State::LockFile(_)
            | State::Map(..)
            | State::UnlockFile(_)
            | State::UnlockSlots
            | State::Done => Reach::NOTHING,
            State::Find => Reach::reads(Parts::SLOTS),
            State::Page(_) => Reach::writes(Parts::FILES | Parts::ARCH).and_reads(Parts::SLOTS | Parts::ATTRIBUTES),
        }
    }
}
