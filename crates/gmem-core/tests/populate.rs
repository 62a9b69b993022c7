//! Initial memory: a range next to an oracle that goes page by page as `kvm_gmem_populate()` does, and the order of its
//! errors.

mod common;

use std::collections::BTreeSet;

use common::{Machine, claim, file, gfns, pages, private_claim};
use gmem_core::addr::{Gfn, GfnRange, Level, PageIndex, PageRange};
use gmem_core::arch::Arch;
use gmem_core::file::{FileFlags, FileId, GetPageError};
use gmem_core::ops::{Action, Lock, MemoryFailure, Operation, Pages, Populate, PopulateError, Populated, Source, Step};
use gmem_core::vendor::{self, Cause, Mapping, PopulateKind, Side, cca};
use gmem_core::vm::{Rules, Vm};
use proptest::collection::btree_set;
use proptest::prelude::*;
use proptest::sample::select;

const FRAMES: u64 = 10;
/// Frames of the first slot and of the second, if there is one.
const SLOTS: [(u64, u64); 2] = [(1, 4), (4, 8)];

/// A page for each frame, all of them different.
static SOURCE: [[u8; 4096]; 10] = {
    let mut pages = [[1; 4096]; 10];
    let mut at = 1;
    while at < pages.len() {
        pages[at] = [pages[at - 1][0] + 1; 4096];
        at += 1;
    }
    pages
};

/// What is behind the second slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Second {
    Absent,
    WithoutFile,
    FileClosed,
    /// The pages after those of the first slot.
    SameFile,
}

#[derive(Clone, Debug)]
struct World {
    arch: Arch,
    rules: Rules,
    second: Second,
    private: BTreeSet<u64>,
    /// Frames whose pages were populated before, and those whose pages have a memory error.
    old: BTreeSet<u64>,
    poisoned: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Call {
    range: GfnRange,
    source: Source<'static>,
    kind: PopulateKind,
    /// A signal comes when so many pages are done.
    signal: Option<u64>,
}

const FILE: FileId = FileId(0);

/// The page behind a frame of either slot, if the slot has the file.
fn index_of(gfn: u64) -> u64 {
    gfn - SLOTS[0].0
}

impl World {
    fn has_file(&self, gfn: u64) -> bool {
        let end = if self.second == Second::SameFile { SLOTS[1].1 } else { SLOTS[0].1 };
        (SLOTS[0].0..end).contains(&gfn)
    }

    fn build(&self) -> (Vm, Machine) {
        let (mut vm, mut machine) = (Vm::with_frames(self.arch.clone(), Rules::NEWEST, FRAMES), Machine::default());
        let files = [file(&mut vm, 8, FileFlags::empty()), file(&mut vm, 8, FileFlags::empty())];
        assert_eq!(files[0], FILE);
        let [(gfn, end), (next, last)] = SLOTS;
        let second = match self.second {
            Second::Absent => None,
            Second::WithoutFile => Some(claim(1, next, last - next)),
            Second::FileClosed => Some(private_claim(1, next, last - next, files[1], 0)),
            Second::SameFile => Some(private_claim(1, next, last - next, FILE, end - gfn)),
        };
        for claim in [Some(private_claim(0, gfn, end - gfn, FILE, 0)), second].into_iter().flatten() {
            machine.set_region(&mut vm, claim).expect("valid");
        }
        machine.close(&mut vm, files[1]);
        machine.set_attributes(&mut vm, gfns(0, FRAMES), Side::Private);
        for &gfn in self.old.iter().filter(|gfn| self.has_file(**gfn)) {
            let mut old = Populate::new(gfns(gfn, gfn + 1), Source::Repeated(&SOURCE[0]), PopulateKind::Unmeasured);
            machine.run(&mut vm, &mut old);
        }
        for &gfn in self.poisoned.iter().filter(|gfn| self.has_file(**gfn)) {
            let index = index_of(gfn);
            vm.file_mut(FILE).expect("open").allocate(pages(index, index + 1));
            machine.run(&mut vm, &mut MemoryFailure::new(FILE, PageIndex(index)));
        }
        for gfn in (0..FRAMES).filter(|gfn| !self.private.contains(gfn)) {
            machine.set_attributes(&mut vm, gfns(gfn, gfn + 1), Side::Shared);
        }
        vm.rules = self.rules;
        machine.trace.clear();
        (vm, machine)
    }
}

/// Runs a populate alone, with a signal where the call has one.
fn run(vm: &mut Vm, machine: &mut Machine, call: Call) -> Populated {
    let mut operation = Populate::new(call.range, call.source, call.kind);
    loop {
        if call.signal == Some(operation.done()) {
            operation.interrupt();
        }
        match operation.step(vm) {
            Step::Do(action) => machine.carry_out(vm, 0, &action, &mut operation),
            Step::Done(end) => {
                machine.assert_quiet(vm);
                assert_eq!(operation.step(vm), Step::Done(end), "asked again, it says the same");
                return end;
            }
        }
    }
}

/// `kvm_gmem_populate()` and its callers, with facts about frames in place of a VM. Only the architecture is the real one.
struct Kernel<'a> {
    world: &'a World,
    call: Call,
    arch: Arch,
    contents: BTreeSet<u64>,
    done: u64,
    actions: Vec<Action>,
}

impl Kernel<'_> {
    fn launch_update(&mut self) -> Option<PopulateError> {
        self.actions.push(Action::Lock(Lock::Slots));
        let stopped = match self.arch {
            Arch::Tdx(_) => self.init_mem_region(),
            _ => self.populate(self.call.range.len()),
        };
        self.actions.push(Action::Unlock(Lock::Slots));
        stopped.err()
    }

    fn init_mem_region(&mut self) -> Result<(), PopulateError> {
        while self.done < self.call.range.len() {
            self.signal_pending()?;
            self.populate(1)?;
        }
        Ok(())
    }

    fn populate(&mut self, npages: u64) -> Result<(), PopulateError> {
        let start = self.call.range.start().0 + self.done;
        let held = |slot: &(u64, u64)| (slot.0..slot.1).contains(&start);
        let second = self.world.second;
        let end = match SLOTS.iter().position(held) {
            Some(1) if second == Second::FileClosed => return Err(PopulateError::Page(GetPageError::NoFile)),
            Some(1) if second != Second::SameFile => return Err(PopulateError::NoPrivateSlot),
            Some(slot) => SLOTS[slot].1,
            None => return Err(PopulateError::NoPrivateSlot),
        };
        let keeps = self.world.rules.populate_keeps_lock;
        self.lock(keeps);
        let result = (start..end.min(start + npages)).try_for_each(|gfn| {
            self.signal_pending()?;
            if !keeps {
                self.source()?;
            }
            self.lock(!keeps);
            let page = self.page(gfn);
            self.unlock(!keeps);
            page
        });
        self.unlock(keeps);
        result
    }

    fn page(&mut self, gfn: u64) -> Result<(), PopulateError> {
        if self.world.poisoned.contains(&gfn) {
            return Err(PopulateError::Page(GetPageError::Poisoned));
        }
        if self.world.rules.populate_once && self.contents.contains(&gfn) {
            return Err(PopulateError::Populated);
        }
        if !self.world.private.contains(&gfn) {
            return Err(PopulateError::NotPrivate);
        }
        let page = vendor::Populate { source: self.source()?, kind: self.call.kind };
        let index = PageIndex(index_of(gfn));
        self.arch.populate(Gfn(gfn), FILE.pfn(index), page).map_err(PopulateError::Refused)?;
        self.contents.insert(gfn);
        self.done += 1;
        self.actions.push(Action::CopyIn(Pages { file: FILE, range: PageRange::page(index) }));
        if matches!(self.arch, Arch::Tdx(_) | Arch::Cca(_)) {
            let (gfn, pfn) = (Gfn(gfn), FILE.pfn(index));
            self.actions.push(Action::Map(Mapping { gfn, pfn, level: Level::Page4K, side: Side::Private }));
        }
        Ok(())
    }

    fn signal_pending(&self) -> Result<(), PopulateError> {
        let pending = self.call.signal.is_some_and(|after| after <= self.done);
        if pending { Err(PopulateError::Interrupted) } else { Ok(()) }
    }

    fn source(&self) -> Result<Option<&'static [u8; 4096]>, PopulateError> {
        match self.call.source {
            Source::Null => Ok(None),
            Source::Repeated(page) => Ok(Some(page)),
            Source::Pages(pages) => {
                let at = usize::try_from(self.done).expect("few");
                if at < pages.len() { Ok(Some(&pages[at])) } else { Err(PopulateError::NoSource) }
            }
        }
    }

    fn lock(&mut self, now: bool) {
        self.actions.extend(now.then_some(Action::Lock(Lock::FileExclusive(FILE))));
    }

    fn unlock(&mut self, now: bool) {
        self.actions.extend(now.then_some(Action::Unlock(Lock::FileExclusive(FILE))));
    }
}

/// Whether a frame's page has contents, as Linux 6.12 would find out.
fn has_contents(vm: &Vm, gfn: u64) -> bool {
    let mut vm = vm.clone();
    vm.rules = Rules { populate_once: true, ..Rules::NEWEST };
    let call = Call {
        range: gfns(gfn, gfn + 1),
        source: Source::Repeated(&SOURCE[0]),
        kind: PopulateKind::Measured,
        signal: None,
    };
    run(&mut vm, &mut Machine::default(), call).stopped == Some(PopulateError::Populated)
}

fn check(world: &World, call: Call) {
    let (mut vm, mut machine) = world.build();
    let before = vm.clone();
    let contents: BTreeSet<u64> = (0..FRAMES).filter(|gfn| has_contents(&vm, *gfn)).collect();
    let mut kernel = Kernel { world, call, arch: vm.arch.clone(), contents, done: 0, actions: Vec::new() };
    let stopped = kernel.launch_update();

    let end = run(&mut vm, &mut machine, call);
    assert_eq!(end, Populated { pages: kernel.done, stopped });
    let expected = match (stopped, kernel.done) {
        (Some(error), 0) => Err(error),
        (_, done) => Ok(done),
    };
    assert_eq!(end.result(), expected);
    let actions: Vec<_> = machine.trace.into_iter().map(|(_, action)| action).collect();
    assert_eq!(actions, kernel.actions);

    assert_eq!(vm.arch, kernel.arch, "each page of the source went to its frame, and no other did");
    let contents: BTreeSet<u64> = (0..FRAMES).filter(|gfn| has_contents(&vm, *gfn)).collect();
    assert_eq!(contents, kernel.contents.into_iter().filter(|gfn| !world.poisoned.contains(gfn)).collect());
    // All that a page leaves behind that was refused is its memory.
    for index in 0..8 {
        let present = |vm: &Vm| vm.file(FILE).is_some_and(|file| file.is_present(PageIndex(index)));
        let gfn = index + SLOTS[0].0;
        let done = call.range.start().0..=call.range.start().0 + kernel.done;
        assert!(present(&vm) == present(&before) || done.contains(&gfn), "page {index}");
    }
    let same = (vm.slots(), vm.invalidation()) == (before.slots(), before.invalidation());
    assert!(same && (0..FRAMES).all(|gfn| vm.attribute(Gfn(gfn)) == before.attribute(Gfn(gfn))));
    let before_any_page = match stopped {
        Some(PopulateError::NoPrivateSlot | PopulateError::Interrupted | PopulateError::Page(_)) => true,
        Some(PopulateError::NoSource) => !world.rules.populate_keeps_lock,
        _ => false,
    };
    assert!(kernel.done > 0 || !before_any_page || vm == before, "a refused call leaves no trace");
}

fn arches() -> impl Strategy<Value = Arch> {
    let cca = Arch::cca(&cca::Config::default()).expect("valid");
    select(vec![Arch::snp(), Arch::snp(), Arch::tdx(), cca, Arch::SwProtected])
}

/// Frames, mostly none.
fn few() -> impl Strategy<Value = BTreeSet<u64>> {
    btree_set(0..FRAMES, 0..3)
}

prop_compose! {
    fn world()(
        arch in arches(),
        once in any::<bool>(),
        keeps in any::<bool>(),
        second in select(vec![Second::Absent, Second::WithoutFile, Second::FileClosed, Second::SameFile]),
        shared in few(),
        old in few(),
        poisoned in few(),
    ) -> World {
        let rules = Rules { populate_once: once, populate_keeps_lock: keeps, ..Rules::NEWEST };
        let private = (0..FRAMES).filter(|gfn| !shared.contains(gfn)).collect();
        World { arch, rules, second, private, old, poisoned }
    }
}

fn call() -> impl Strategy<Value = Call> {
    let kinds = vec![PopulateKind::Measured, PopulateKind::Unmeasured, PopulateKind::Zero];
    let range = (0..FRAMES, 1..=FRAMES);
    let source = prop_oneof![
        Just(Source::Null),
        Just(Source::Repeated(&SOURCE[3])),
        (0..=SOURCE.len()).prop_map(|len| Source::Pages(&SOURCE[..len])),
        Just(Source::Pages(&SOURCE)),
    ];
    (range, source, select(kinds), prop::option::weighted(0.2, 0..FRAMES))
        .prop_map(|((start, len), source, kind, signal)| Call { range: gfns(start, start + len), source, kind, signal })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 2000 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_range_is_what_its_pages_are(world in world(), call in call()) {
        check(&world, call);
    }
}

fn snp(second: Second, rules: Rules) -> World {
    let none = BTreeSet::new();
    World { arch: Arch::snp(), rules, second, private: (0..FRAMES).collect(), old: none.clone(), poisoned: none }
}

fn load(range: GfnRange) -> Call {
    Call { range, source: Source::Pages(&SOURCE), kind: PopulateKind::Measured, signal: None }
}

#[test]
fn a_range_is_cut_where_its_slot_ends() {
    for (arch, pages, stopped) in [
        (Arch::snp(), 2, None),
        // One call for each page.
        (Arch::tdx(), 6, Some(PopulateError::NoPrivateSlot)),
    ] {
        let world = World { arch, ..snp(Second::SameFile, Rules::NEWEST) };
        let (mut vm, mut machine) = world.build();
        let end = run(&mut vm, &mut machine, load(gfns(2, FRAMES)));
        assert_eq!((end, end.result()), (Populated { pages, stopped }, Ok(pages)));
    }
}

#[test]
fn what_was_done_stays_done_and_the_next_page_is_untouched() {
    let mut world = snp(Second::SameFile, Rules::NEWEST);
    world.private.remove(&3);
    let (mut vm, mut machine) = world.build();
    let end = run(&mut vm, &mut machine, load(gfns(1, 4)));
    assert_eq!(end, Populated { pages: 2, stopped: Some(PopulateError::NotPrivate) });
    assert_eq!([1, 2, 3].map(|gfn| has_contents(&vm, gfn)), [true, true, false]);
    let end = run(&mut vm, &mut machine, load(gfns(3, 4)));
    assert_eq!(end.result(), Err(PopulateError::NotPrivate));
    machine.set_attributes(&mut vm, gfns(3, 4), Side::Private);
    assert_eq!(run(&mut vm, &mut machine, load(gfns(3, 4))).result(), Ok(1));
}

/// What can be wrong with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrong {
    NoSlot,
    FileClosed,
    Signal,
    NoSource,
    Poison,
    Contents,
    Shared,
    /// The architecture wants a source.
    Refusal,
}

fn error(rules: Rules, wrong: &[Wrong]) -> Result<u64, PopulateError> {
    let is = |one| wrong.contains(&one);
    let frames = |one| if is(one) { BTreeSet::from([4]) } else { BTreeSet::new() };
    let second = match () {
        () if is(Wrong::NoSlot) => Second::Absent,
        () if is(Wrong::FileClosed) => Second::FileClosed,
        () => Second::SameFile,
    };
    let mut world = World { old: frames(Wrong::Contents), poisoned: frames(Wrong::Poison), ..snp(second, rules) };
    if is(Wrong::Shared) {
        world.private.remove(&4);
    }
    let source = match () {
        () if is(Wrong::NoSource) => Source::Pages(&[]),
        () if is(Wrong::Refusal) => Source::Null,
        () => Source::Pages(&SOURCE),
    };
    let call = Call { source, signal: is(Wrong::Signal).then_some(0), ..load(gfns(4, 5)) };
    check(&world, call);
    let (mut vm, mut machine) = world.build();
    run(&mut vm, &mut machine, call).result()
}

#[test]
#[cfg_attr(miri, ignore = "two VMs for each of many errors: minutes")]
fn of_many_errors_the_kernels_first_is_told() {
    use Wrong::{Contents, FileClosed, NoSlot, NoSource, Poison, Refusal, Shared, Signal};
    let old = Rules { populate_once: true, populate_keeps_lock: true, ..Rules::NEWEST };
    for (rules, order) in [
        (Rules::NEWEST, &[NoSlot, FileClosed, Signal, NoSource, Poison, Shared, Refusal][..]),
        (old, &[NoSlot, FileClosed, Signal, Poison, Contents, Shared, NoSource, Refusal][..]),
    ] {
        for (at, first) in order.iter().enumerate() {
            let told = error(rules, &order[at..]).expect_err("something is wrong");
            let is_it = match first {
                NoSlot => told == PopulateError::NoPrivateSlot,
                FileClosed => told == PopulateError::Page(GetPageError::NoFile),
                Signal => told == PopulateError::Interrupted,
                NoSource => told == PopulateError::NoSource,
                Poison => told == PopulateError::Page(GetPageError::Poisoned),
                Contents => told == PopulateError::Populated,
                Shared => told == PopulateError::NotPrivate,
                Refusal => matches!(told, PopulateError::Refused(refusal) if refusal.cause == Cause::Invalid),
            };
            assert!(is_it, "{first:?} is first of {:?}, and it says {told:?}", &order[at..]);
        }
        assert_eq!(error(rules, &[]), Ok(1));
    }
}
