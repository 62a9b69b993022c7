//! Broken protocols.
//!
//! A mutant stands between the explorer and one of the core's operations. It sees every step and what it asks for, and drops,
//! reorders or alters some of it. The core knows nothing of mutants; what a mutant needs to remember it keeps itself.

use gmem_core::Vm;
use gmem_core::addr::{GfnRange, Level, PageRange};
use gmem_core::invalidate::{Filter, Invalidation};
use gmem_core::ops::{Action, DirectMap, Lock, Operation, Pages, Step};

use crate::flight::{CoreOp, End};
use crate::value::Seen;

macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal),* $(,)?) => {
        /// A broken protocol.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Mutant { $($(#[doc = $doc])+ $variant),* }

        impl Mutant {
            /// Every mutant.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Its word.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// What is broken.
            #[must_use]
            pub fn about(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+)),* }
            }
        }
    };
}

mutants! {
    /// A fault maps without comparing the sequence that it saw.
    NoSequenceCheck = "no-sequence-check",
    /// A fault reads the sequence only after the attribute.
    SequenceAfterAttribute = "sequence-after-attribute",
    /// A change bumps the sequence when it begins and not when it ends.
    BumpAtBegin = "bump-at-begin",
    /// A change does not say which pages it covers.
    RangeForgotten = "range-forgotten",
    /// A change of one side takes the mappings of both.
    FilterIgnored = "filter-ignored",
    /// A change of the VMM's own memory takes private mappings too.
    HvaZapsPrivate = "hva-zaps-private",
    /// A hole, a close or a memory failure of a private file takes shared mappings too.
    PunchZapsShared = "punch-zaps-shared",
    /// A change takes the mappings of whole 2 MiB blocks.
    ApproximateRange = "approximate-range",
    /// A hole does not keep bindings stable, and ends only what is bound at its end.
    OtherBindings = "other-bindings",
    /// Pages are freed while vCPUs may still have their translations cached.
    NoFlush = "no-flush",
    /// Translations are flushed before the mappings go, and not after.
    FlushBeforeZap = "flush-before-zap",
    /// Pages are handed out with what was in them.
    NoZero = "no-zero",
    /// A page is populated a second time.
    PopulateTwice = "populate-twice",
    /// A populate lets go of the slots lock between its pages.
    PopulateUnlocks = "populate-unlocks",
    /// A change of attributes does not cover the huge page around its edges.
    MissesHugePage = "misses-huge-page",
    /// Pages come back to the direct map only after they were freed.
    RestoreAfterFree = "restore-after-free",
    /// Only the first page of a folio leaves the direct map.
    HidesFirstPage = "hides-first-page",
    /// A change of slots does not wait for faults that saw the old ones.
    NoSynchronize = "no-synchronize",
    /// A conversion leaves the VMM's mappings of the pages in place.
    KeepsUserMappings = "keeps-user-mappings",
    /// A memory failure leaves the mappings of the page in place.
    NoZapOnPoison = "no-zap-on-poison",
    /// Whoever finds or frees a page does not lock its folio.
    NoFolioLock = "no-folio-lock",
    /// Changes of attributes and of slots do not exclude one another.
    NoSlotsLock = "no-slots-lock",
}

/// What a mutant remembers between the steps of one operation.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Saved {
    steps: u8,
    old: Option<Box<Vm>>,
    fresh: Option<Box<CoreOp>>,
    held_back: Option<Action>,
    due: bool,
    pages: Option<Pages>,
}

impl Mutant {
    /// The mutant with this word.
    #[must_use]
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|mutant| mutant.name() == name)
    }

    /// Takes a step of `op`, broken.
    pub(crate) fn step(self, op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
        let step = match self {
            Self::NoSequenceCheck => map_stale(op, saved, vm),
            Self::SequenceAfterAttribute => snapshot_late(op, saved, vm),
            Self::BumpAtBegin => with_invalidation(op, vm, bump_at_begin),
            Self::RangeForgotten => with_invalidation(op, vm, forget_range),
            Self::MissesHugePage if matches!(op, CoreOp::Attributes(_)) => with_invalidation(op, vm, only_the_range),
            Self::OtherBindings if matches!(op, CoreOp::Punch(_)) => unstable_bindings(op, saved, vm),
            Self::PopulateTwice if matches!(op, CoreOp::Populate(..)) => again(op, saved, vm),
            Self::PopulateUnlocks if matches!(op, CoreOp::Populate(..)) => let_go_between(op, saved, vm),
            Self::RestoreAfterFree => restore_late(op, saved, vm),
            Self::FlushBeforeZap => flush_early(op, saved, vm),
            _ => self.alter(op, vm),
        };
        saved.steps = saved.steps.saturating_add(1);
        step
    }

    /// Mutants that change what a step asks for and nothing else.
    fn alter(self, op: &mut CoreOp, vm: &mut Vm) -> Step<End> {
        let about = About::of(op);
        match op.step(vm) {
            Step::Do(action) => Step::Do(self.altered(about, action)),
            done @ Step::Done(_) => done,
        }
    }

    /// What is asked for instead of `action`.
    fn altered(self, about: About, action: Action) -> Action {
        match (self, action) {
            (Self::FilterIgnored, Action::Zap { range, .. }) => Action::Zap { range, filter: Filter::Both },
            (Self::HvaZapsPrivate, Action::Zap { range, .. }) if about == About::UserMemory => {
                Action::Zap { range, filter: Filter::Both }
            }
            (Self::PunchZapsShared, Action::Zap { range, .. }) if about.is_of_a_file() => {
                Action::Zap { range, filter: Filter::Both }
            }
            (Self::ApproximateRange, Action::Zap { range, filter }) => {
                Action::Zap { range: range.align_out(Level::Page2M), filter }
            }
            (Self::NoFlush, Action::Flush) if about == About::Freeing => Action::Continue,
            (Self::NoZero, Action::Zero(_)) | (Self::NoSynchronize, Action::Synchronize) => Action::Continue,
            (Self::KeepsUserMappings, Action::DropUserMappings(_)) => Action::Continue,
            (Self::NoZapOnPoison, Action::Zap { .. }) if about == About::Poison => Action::Continue,
            (Self::HidesFirstPage, Action::DirectMap(Pages { file, range }, DirectMap::Remove)) => {
                Action::DirectMap(Pages { file, range: PageRange::page(range.start()) }, DirectMap::Remove)
            }
            (Self::NoFolioLock, Action::Lock(Lock::Folios(_)) | Action::Unlock(Lock::Folios(_)))
            | (Self::NoSlotsLock, Action::Lock(Lock::Slots) | Action::Unlock(Lock::Slots)) => Action::Continue,
            (_, action) => action,
        }
    }
}

/// What an operation is about, as far as mutants tell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// Pages of a file are given back.
    Freeing,
    Poison,
    UserMemory,
    Other,
}

impl About {
    fn of(op: &CoreOp) -> Self {
        match op {
            CoreOp::Punch(_) | CoreOp::Close(_) => Self::Freeing,
            CoreOp::Poison(_) => Self::Poison,
            CoreOp::User(_) => Self::UserMemory,
            _ => Self::Other,
        }
    }

    fn is_of_a_file(self) -> bool {
        matches!(self, Self::Freeing | Self::Poison)
    }
}

/// Where the fault finds itself stale because of the sequence alone, it maps what it would have mapped when it looked.
fn map_stale(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    let CoreOp::Fault(fault) = op else { return op.step(vm) };
    let gfn = fault.gfn();
    if saved.steps == 1 {
        let mut old = Box::new(vm.clone());
        // Same sequence, and nothing under way: the range is compared with that of now.
        *old.invalidation_mut() = rebuilt(vm.invalidation(), 0, None);
        saved.old = Some(old);
    }
    let covered = vm.invalidation().is_stale(vm.invalidation().snapshot(), gfn);
    let mut probe = op.clone();
    let probed = saved.old.clone().map(|mut old| probe.step(&mut old));
    match (op.step(vm), probed) {
        (step @ Step::Do(Action::Map(_)), _) => step,
        (_, Some(Step::Do(Action::Map(mapping)))) if !covered && vm.arch.map(mapping).is_ok() => {
            *op = probe;
            Step::Do(Action::Map(mapping))
        }
        (step, _) => step,
    }
}

/// The decision is made on what was true before the snapshot.
fn snapshot_late(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    if !matches!(op, CoreOp::Fault(_)) {
        return op.step(vm);
    }
    match (saved.steps, saved.old.take()) {
        (1, _) => {
            saved.old = Some(Box::new(vm.clone()));
            Step::Do(Action::Continue)
        }
        (2, Some(mut old)) => match op.step(vm) {
            Step::Do(_) => op.step(&mut old),
            done @ Step::Done(_) => done,
        },
        _ => op.step(vm),
    }
}

/// Takes the step and lets `change` replace the state of the invalidation protocol: it is given the one before, the one
/// after and what the step zaps.
fn with_invalidation(
    op: &mut CoreOp,
    vm: &mut Vm,
    change: impl FnOnce(&Invalidation, &Invalidation, Option<GfnRange>) -> Option<Invalidation>,
) -> Step<End> {
    let before = vm.invalidation().clone();
    let step = op.step(vm);
    let zapped = match &step {
        Step::Do(Action::Zap { range, .. }) => Some(*range),
        _ => None,
    };
    if let Some(changed) = change(&before, vm.invalidation(), zapped) {
        *vm.invalidation_mut() = changed;
    }
    step
}

fn bump_at_begin(before: &Invalidation, after: &Invalidation, _: Option<GfnRange>) -> Option<Invalidation> {
    if after.in_progress() > before.in_progress() {
        let mut bumped = after.clone();
        let begun = bumped.begin();
        bumped.end(begun);
        return Some(bumped);
    }
    let ended = after.in_progress() < before.in_progress();
    ended.then(|| rebuilt(before, after.in_progress(), after.covered()))
}

fn forget_range(before: &Invalidation, after: &Invalidation, _: Option<GfnRange>) -> Option<Invalidation> {
    let begun = after.in_progress() > before.in_progress();
    begun.then(|| rebuilt(before, after.in_progress(), before.covered()))
}

fn only_the_range(before: &Invalidation, after: &Invalidation, zapped: Option<GfnRange>) -> Option<Invalidation> {
    let begun = after.in_progress() > before.in_progress();
    let range = before.covered().into_iter().chain(zapped).reduce(PageRange::hull);
    begun.then(|| rebuilt(before, after.in_progress(), range))
}

/// The sequence of `like` with so many changes of `range` under way, made with nothing but the protocol's own steps.
fn rebuilt(like: &Invalidation, in_progress: u32, range: Option<GfnRange>) -> Invalidation {
    let mut new = Invalidation::default();
    while new.snapshot() != like.snapshot() {
        let begun = new.begin();
        new.end(begun);
    }
    for _ in 0..in_progress {
        let begun = new.begin();
        if let Some(range) = range {
            new.add(&begun, range);
        }
    }
    new
}

/// No lock keeps others from binding and unbinding, and the end looks for bindings anew.
fn unstable_bindings(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    let before = vm.invalidation().clone();
    let step = op.step(vm);
    if let Step::Do(Action::Free(pages)) = &step {
        saved.pages = Some(*pages);
    }
    let ended = vm.invalidation().in_progress() < before.in_progress();
    let bound = |pages: Pages| vm.file(pages.file).is_some_and(|file| file.is_bound(pages.range));
    if ended && saved.pages.is_some_and(|pages| !bound(pages)) {
        *vm.invalidation_mut() = before;
    }
    match step {
        Step::Do(Action::Lock(Lock::FileExclusive(_)) | Action::Unlock(Lock::FileExclusive(_))) => {
            Step::Do(Action::Continue)
        }
        other => other,
    }
}

/// What succeeded is done once more.
fn again(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    if saved.steps == 0 {
        saved.fresh = Some(Box::new(op.clone()));
    }
    match op.step(vm) {
        Step::Done(End::Seen(Seen::Ok)) if saved.fresh.is_some() => {
            if let Some(fresh) = saved.fresh.take() {
                *op = *fresh;
            }
            Step::Do(Action::Continue)
        }
        other => other,
    }
}

/// Whenever the file is unlocked, slots_lock is let go and taken again.
fn let_go_between(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    if let Some(action) = saved.held_back.take() {
        saved.held_back = (action == Action::Unlock(Lock::Slots)).then_some(Action::Lock(Lock::Slots));
        return Step::Do(action);
    }
    let step = op.step(vm);
    if matches!(step, Step::Do(Action::Unlock(Lock::FileExclusive(_)))) {
        saved.held_back = Some(Action::Unlock(Lock::Slots));
    }
    step
}

/// The direct map is restored one step after the memory was given back.
fn restore_late(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    if std::mem::take(&mut saved.due)
        && let Some(action) = saved.held_back.take()
    {
        return Step::Do(action);
    }
    match op.step(vm) {
        Step::Do(action @ Action::DirectMap(_, DirectMap::Restore)) if !matches!(op, CoreOp::Restore(_)) => {
            saved.held_back = Some(action);
            Step::Do(Action::Continue)
        }
        Step::Do(action @ Action::Free(_)) => {
            saved.due = true;
            Step::Do(action)
        }
        other => other,
    }
}

/// Each zap is put off until the next one, or until the flush that should follow it; the flush comes where the first zap was.
fn flush_early(op: &mut CoreOp, saved: &mut Saved, vm: &mut Vm) -> Step<End> {
    match op.step(vm) {
        Step::Do(zap @ Action::Zap { .. }) => Step::Do(saved.held_back.replace(zap).unwrap_or(Action::Flush)),
        Step::Do(Action::Flush) => Step::Do(saved.held_back.take().unwrap_or(Action::Flush)),
        other => other,
    }
}
