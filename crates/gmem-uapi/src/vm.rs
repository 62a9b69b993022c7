//! One emulated VM: the core's state, the windows that show it, and the ioctls of the VM descriptor.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange, PAGE_SIZE};
use gmem_core::arch::Arch;
use gmem_core::file::FileId;
use gmem_core::ops::{
    self, Action, ChangeUserMapping, Claim, CloseFile, FileClaim, Operation, Pages, PunchHole, SetAttributes, SetRegion,
};
use gmem_core::page_set::PageSet;
use gmem_core::slot::{Slot, SlotFlags, SlotId};
use gmem_core::vendor::Side;
use gmem_core::vm::{self, Rules, View};
use gmem_host::address_space::AddressSpace;
use gmem_host::backing::Backing;
use gmem_host::client::ClientMemory;
use gmem_host::fds::{self, Held, Hidden};
use gmem_host::kvm;
use gmem_host::maps::{self, Maps};
use gmem_host::sys::SignalsBlocked;
use gmem_host::window::{Backings, Shows, Window};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

use crate::abi::{self, MemoryAttributes, MemoryRegion};
use crate::errno;
use crate::guard::Guards;
use crate::profile::Profile;
use crate::snapshot::Snapshot;

/// A VM that gmem emulates on an ordinary KVM VM.
///
/// Lock order: `state`, then the process's client memory.
#[derive(Debug)]
pub(crate) struct VmObject {
    /// The real VM, through a descriptor of our own: files keep it alive after the client closed its last one.
    fd: Hidden,
    pub(crate) profile: &'static Profile,
    /// Bytes of a vCPU's shared pages.
    pub(crate) run_len: usize,
    /// Where it was made; ioctls from anywhere else are EIO.
    owner: AddressSpace,
    client: Arc<Mutex<ClientMemory>>,
    /// Frames that may be something else than a device's: those with a slot, and those that are private or were. Changed with
    /// `state` held, read without a lock.
    memory: PageSet,
    state: RwLock<State>,
}

type Written<'a> = RwLockWriteGuard<'a, State>;

self_cell::self_cell!(
    /// A VM whose state nobody else reads or writes.
    pub(crate) struct HeldVm {
        owner: Arc<VmObject>,
        #[covariant]
        dependent: Written,
    }

    impl {Debug}
);

/// Waits until nobody is in the state of the VM, and keeps everybody out.
pub(crate) fn hold(vm: Arc<VmObject>) -> HeldVm {
    HeldVm::new(vm, |vm| vm.write())
}

/// What a new VM is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) vm_type: u32,
    pub(crate) profile: &'static Profile,
    pub(crate) run_len: usize,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) core: Vm,
    mmu: Mmu,
    guards: Guards,
    /// Guards are of use once someone can run.
    has_vcpus: bool,
}

/// The stage-2 side of the state: what is shown where.
#[derive(Debug, Default)]
struct Mmu {
    windows: BTreeMap<SlotId, Window>,
    backings: Backings,
    /// First thing that went wrong while actions were carried out.
    error: Option<Errno>,
}

/// A panic while a lock was held cannot have left the state torn in a way that more panics would repair.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mmu {
    fn carry_out(&mut self, core: &Vm, action: &Action) {
        let done = match action {
            Action::Zap { range, .. } | Action::Refill(range) => self.show_views(core, *range, Window::show),
            Action::Free(pages) => self.free(core, *pages),
            // One operation runs at a time, the kernel flushes with every change of a mapping, and backing pages are zeroed
            // by the kernel when they are first touched.
            _ => Ok(()),
        };
        self.error = self.error.or(done.err());
    }

    /// Brings the windows over `range` in line with what the core says.
    fn show_views(&mut self, core: &Vm, range: GfnRange, show: Show) -> Result<(), Errno> {
        for slot in core.slots().overlapping(range) {
            let Some(window) = self.windows.get_mut(&slot.id) else { continue };
            for (run, view) in core.views(slot, range) {
                show(window, run, shows(view), &self.backings)?;
            }
        }
        Ok(())
    }

    /// The client's mappings are not what they were.
    fn learn_client(&mut self, core: &Vm, client: &ClientMemory) -> Result<(), Errno> {
        let maps = Maps::now()?;
        for (id, window) in &mut self.windows {
            let Some(slot) = core.slots().get(*id) else { continue };
            let len = usize::try_from(slot.gfns.len() * PAGE_SIZE).map_err(|_| Errno::NOMEM)?;
            let start = usize::try_from(slot.userspace_addr).map_err(|_| Errno::NOMEM)?;
            window.learn_client(client.sources(&maps, start, len)?);
        }
        Ok(())
    }

    fn free(&mut self, core: &Vm, pages: Pages) -> Result<(), Errno> {
        if core.file(pages.file).is_none() {
            self.backings.remove(&pages.file.0);
            return Ok(());
        }
        let (offset, len) = (pages.range.start().0 * PAGE_SIZE, pages.range.len() * PAGE_SIZE);
        self.backings.get(&pages.file.0).map_or(Ok(()), |backing| backing.punch(offset, len))
    }
}

type Show = fn(&mut Window, GfnRange, Shows, &Backings) -> Result<(), Errno>;

fn shows(view: View) -> Shows {
    match view {
        View::NoSlot | View::Unbacked(_) => Shows::Nothing,
        View::UserMemory { hva } => usize::try_from(hva).map_or(Shows::Nothing, Shows::Client),
        View::FilePage { file, index, .. } => Shows::Backing(file.0, index.0 * PAGE_SIZE),
    }
}

impl State {
    /// Runs an operation to its end and carries its actions out.
    fn run<O: Operation>(&mut self, operation: &mut O) -> (O::Output, Result<(), Errno>) {
        let mmu = &mut self.mmu;
        let output = ops::run(operation, &mut self.core, |_, core, action| mmu.carry_out(core, &action));
        (output, mmu.error.take().map_or(Ok(()), Err))
    }

    /// Puts frames on a side. What they showed is replaced in one step, which takes KVM's translations away as well.
    fn convert(&mut self, range: GfnRange, side: Side) -> Result<(), Errno> {
        let mmu = &mut self.mmu;
        ops::run(&mut SetAttributes::new(range, side), &mut self.core, |_, core, action| match action {
            Action::Zap { .. } => {}
            action => mmu.carry_out(core, &action),
        });
        mmu.error.take().map_or(Ok(()), Err)
    }

    /// What is shown to the guest at `gfn`, and where that is in this process. A slot without a window is the client's memory.
    pub(crate) fn window_at(&self, gfn: Gfn) -> Option<(usize, Shows)> {
        let slot = self.core.slots().at(0, gfn)?;
        match self.mmu.windows.get(&slot.id) {
            Some(window) => window.at(gfn),
            None => usize::try_from(slot.hva_of(gfn)).ok().map(|address| (address, Shows::Client(address))),
        }
    }

    /// Whether the client has memory behind `gfn` that can be read, or written.
    pub(crate) fn client_allows(&self, gfn: Gfn, write: bool) -> bool {
        let Some(slot) = self.core.slots().at(0, gfn) else { return false };
        let Ok(address) = usize::try_from(slot.hva_of(gfn)) else { return false };
        match self.mmu.windows.get(&slot.id) {
            Some(window) => window.client_allows(address, write),
            None => maps::areas(address, address + 1)
                .is_ok_and(|areas| areas.first().is_some_and(|area| area.allows(write))),
        }
    }

    /// Where the client's mapping behind `gfn` ends, in pages from there, if it has one that can be read.
    fn client_pages(&self, gfn: Gfn) -> Option<u64> {
        let slot = self.core.slots().at(0, gfn)?;
        let address = usize::try_from(slot.hva_of(gfn)).ok()?;
        let end = match self.mmu.windows.get(&slot.id) {
            Some(window) => window.client_end(address),
            None => {
                maps::areas(address, address + 1).ok()?.first().filter(|area| area.allows(false)).map(|area| area.end)
            }
        };
        Some((end?.checked_sub(address)? as u64).div_ceil(PAGE_SIZE))
    }

    /// Whether the real slot at `gfn` has the client's own memory: what the host does there is what it has always done.
    pub(crate) fn is_the_hosts(&self, gfn: Gfn) -> bool {
        self.core.slots().at(0, gfn).is_none_or(|slot| !self.mmu.windows.contains_key(&slot.id))
    }

    pub(crate) fn backing(&self, file: FileId) -> Option<&Backing> {
        self.mmu.backings.get(&file.0)
    }
}

impl VmObject {
    pub(crate) fn new(
        fd: BorrowedFd<'_>,
        Kind { vm_type, profile, run_len }: Kind,
        client: Arc<Mutex<ClientMemory>>,
    ) -> Result<Self, Errno> {
        let rules = Rules { user_end: maps::user_address_end(), ..profile.rules };
        let arch = if vm_type == 0 { Arch::Default } else { Arch::SwProtected };
        kvm::disable_quirks(fd, 0)?;
        Ok(Self {
            fd: fds::hidden_copy(fd)?,
            profile,
            run_len,
            owner: AddressSpace::current()?,
            client,
            memory: PageSet::with_capacity(vm::MAX_FRAMES, false),
            state: RwLock::new(State {
                core: Vm::new(arch, rules),
                mmu: Mmu::default(),
                guards: Guards::default(),
                has_vcpus: false,
            }),
        })
    }

    /// To be used now.
    pub(crate) fn fd(&self) -> Held<'_> {
        self.fd.hold()
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an access to `gfn` may be something else than a device's. Takes no lock.
    pub(crate) fn may_be_memory(&self, gfn: Gfn) -> bool {
        self.memory.get(gfn.0)
    }

    /// To be called before the guest can see the change: what it then leaves to be emulated may be no device's.
    fn becomes_memory(&self, gfns: GfnRange) {
        self.memory.set(gfns.start().0, gfns.len(), true);
    }

    /// The slot `id` has the frames `gfns` no longer, but those of `kept`.
    fn loses_slot(&self, core: &Vm, id: SlotId, gfns: GfnRange, kept: Option<GfnRange>) {
        let (before, after) = match kept {
            Some(kept) => (
                GfnRange::new(gfns.start(), gfns.end().min(kept.start())),
                GfnRange::new(gfns.start().max(kept.end()), gfns.end()),
            ),
            None => (Some(gfns), None),
        };
        let parts = before.into_iter().chain(after).filter(|_| id.space == 0);
        for (gfns, _) in parts.flat_map(|gfns| core.attribute_runs(gfns)).filter(|(_, side)| *side == Side::Shared) {
            self.memory.set(gfns.start().0, gfns.len(), false);
        }
    }

    /// The kernel's first check of every VM and vCPU ioctl.
    pub(crate) fn check_owner(&self) -> Result<(), Errno> {
        if AddressSpace::current()? == self.owner { Ok(()) } else { Err(Errno::IO) }
    }

    /// A vCPU is about to exist.
    pub(crate) fn expect_vcpu(&self) {
        let mut state = self.write();
        if !std::mem::replace(&mut state.has_vcpus, true)
            && let Some(all) = GfnRange::new(Gfn(0), Gfn(vm::MAX_FRAMES))
        {
            self.update_guards(&mut state, all);
        }
    }

    fn update_guards(&self, state: &mut State, range: GfnRange) {
        if state.has_vcpus && state.core.has_private_memory() {
            state.guards.update(self.fd().as_fd(), &state.core, range);
        }
    }

    /// `KVM_CREATE_GUEST_MEMFD` without the descriptor: size and flags checked, backing made.
    pub(crate) fn create_file(&self, size: u64, flags: u64) -> Result<FileId, Errno> {
        let mut state = self.write();
        let id = state.core.create_file(size, flags, self.profile.file_flags).map_err(errno::create)?;
        match Backing::new(size) {
            Ok(backing) => {
                state.mmu.backings.insert(id.0, backing);
                Ok(id)
            }
            Err(error) => {
                let _ = state.run(&mut CloseFile::new(id));
                Err(error)
            }
        }
    }

    /// The last descriptor and mapping of a file are gone.
    pub(crate) fn close_file(&self, id: FileId) {
        let _ = self.write().run(&mut CloseFile::new(id));
    }

    /// `fallocate` that allocates: in pieces, between which a signal ends it and a vCPU's fault is served.
    pub(crate) fn allocate(&self, id: FileId, offset: u64, len: u64, signals: &SignalsBlocked) -> Result<(), Errno> {
        const PIECE: u64 = 16 << 20;
        self.read().core.file(id).ok_or(Errno::BADF)?.check_allocate(offset, len).map_err(errno::allocate)?;
        let mut done = 0;
        while done < len {
            if signals.is_interrupted() {
                return Err(Errno::INTR);
            }
            let piece = PIECE.min(len - done);
            self.allocate_piece(id, offset + done, piece)?;
            done += piece;
        }
        Ok(())
    }

    fn allocate_piece(&self, id: FileId, offset: u64, len: u64) -> Result<(), Errno> {
        let mut state = self.write();
        let State { core, mmu, .. } = &mut *state;
        let file = core.file_mut(id).ok_or(Errno::BADF)?;
        let range = file.check_allocate(offset, len).map_err(errno::allocate)?;
        let made = mmu.backings.get(&id.0).ok_or(Errno::BADF)?.allocate(offset, len);
        // A memfd says so when memory may not be promised any more.
        made.map_err(|error| if error == Errno::NOSPC { Errno::NOMEM } else { error })?;
        file.allocate(range);
        Ok(())
    }

    /// `fallocate` that punches a hole.
    pub(crate) fn punch(&self, id: FileId, offset: u64, len: u64) -> Result<(), Errno> {
        let mut state = self.write();
        let file = state.core.file(id).ok_or(Errno::BADF)?;
        match file.check_punch(offset, len).map_err(errno::allocate)? {
            Some(range) => state.run(&mut PunchHole::new(id, range)).1,
            None => Ok(()),
        }
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub(crate) fn set_attributes(&self, claim: &MemoryAttributes) -> Result<i32, Errno> {
        let mut state = self.write();
        let supported = if state.core.has_private_memory() { abi::ATTRIBUTE_PRIVATE } else { 0 };
        if claim.flags != 0 || claim.attributes & !supported != 0 {
            return Err(Errno::INVAL);
        }
        let range = GfnRange::from_bytes(claim.address, claim.size).map_err(|_| Errno::INVAL)?;
        let side = if claim.attributes == 0 { Side::Shared } else { Side::Private };
        let before = match state.core.slots().overlapping(range).next() {
            Some(_) => Some(Snapshot::of(&state.core, range)?),
            None => None,
        };
        if side == Side::Private {
            self.becomes_memory(range);
        }
        match state.convert(range, side) {
            Ok(()) => {
                self.update_guards(&mut state, range);
                Ok(0)
            }
            Err(error) => {
                // Too many mappings (vm.max_map_count): back to what was, which needs no more than there were.
                for (range, side) in before.iter().flat_map(Snapshot::runs) {
                    let _ = state.convert(range, side);
                }
                if error == Errno::NOMEM {
                    say_what_to_raise();
                }
                Err(error)
            }
        }
    }

    /// `KVM_SET_USER_MEMORY_REGION2`, and its predecessor as a claim without a file.
    pub(crate) fn set_region(&self, claim: Claim) -> Result<i32, Errno> {
        let mut state = self.write();
        ops::check_claim(&state.core, &claim).map_err(|error| errno::region(self.profile, error))?;
        let id = SlotId::from_raw(claim.slot);
        if claim.memory_size == 0 {
            return self.delete_slot(&mut state, claim, id);
        }
        match state.core.slots().get(id).cloned() {
            None => self.create_slot(&mut state, claim, id),
            Some(old) => self.change_slot(&mut state, claim, &old),
        }
    }

    fn create_slot(&self, state: &mut State, claim: Claim, id: SlotId) -> Result<i32, Errno> {
        let userspace_addr = self.prepare_window(state, &claim, id)?;
        let range = GfnRange::from_bytes(claim.guest_phys_addr, claim.memory_size).map_err(|_| Errno::INVAL)?;
        let uncovered = self.make_room(state, id, range);
        let (result, shown) = state.run(&mut SetRegion::new(claim));
        let result = result.map_err(|error| errno::region(self.profile, error)).and(shown);
        self.becomes_memory(range);
        let real = result.and_then(|()| kvm::set_region(self.fd().as_fd(), &real_region(&claim, userspace_addr)));
        if let Err(error) = real {
            let _ = state.run(&mut SetRegion::new(Claim { memory_size: 0, ..claim }));
            state.mmu.windows.remove(&id);
            self.loses_slot(&state.core, id, range, None);
            self.update_guards(state, uncovered);
            return Err(error);
        }
        self.update_guards(state, uncovered);
        Ok(0)
    }

    /// Takes guards out of the way of a slot; returns what is to be guarded anew once the slot is there.
    fn make_room(&self, state: &mut State, id: SlotId, range: GfnRange) -> GfnRange {
        let named = if id.space == 0 { state.guards.release_number(self.fd().as_fd(), id.number) } else { None };
        let cleared = if id.space == 0 { state.guards.clear(self.fd().as_fd(), range) } else { range };
        named.map_or(cleared, |named| cleared.hull(named))
    }

    /// A window where the slot may ever show anything but the client's memory. Returns the real slot's address.
    fn prepare_window(&self, state: &mut State, claim: &Claim, id: SlotId) -> Result<u64, Errno> {
        let file_only = match claim.file {
            FileClaim::File(file) if claim.flags & SlotFlags::GUEST_MEMFD.bits() != 0 => {
                state.core.file(file).is_some_and(|file| state.core.serves_every_fault(file.flags()))
            }
            _ => false,
        };
        if !state.core.has_private_memory() && !file_only {
            return Ok(claim.userspace_addr);
        }
        let gfns = GfnRange::from_bytes(claim.guest_phys_addr, claim.memory_size).map_err(|_| Errno::INVAL)?;
        let mut window = Window::reserve(gfns)?;
        if let (false, Ok(start), Ok(len)) =
            (file_only, usize::try_from(claim.userspace_addr), usize::try_from(claim.memory_size))
        {
            let mut client = lock(&self.client);
            client.make_shareable(start, len).inspect_err(|error| {
                if *error == Errno::OPNOTSUPP {
                    say_what_is_refused();
                }
            })?;
            window.learn_client(client.sources(&Maps::now()?, start, len)?);
        }
        let base = window.base() as u64;
        state.mmu.windows.insert(id, window);
        Ok(base)
    }

    fn delete_slot(&self, state: &mut State, claim: Claim, id: SlotId) -> Result<i32, Errno> {
        let gfns = state.core.slots().get(id).map(|slot| slot.gfns);
        kvm::set_region(self.fd().as_fd(), &real_region(&claim, 0))?;
        let (result, _) = state.run(&mut SetRegion::new(claim));
        state.mmu.windows.remove(&id);
        if let Some(gfns) = gfns {
            self.loses_slot(&state.core, id, gfns, None);
            self.update_guards(state, gfns);
        }
        result.map_err(|error| errno::region(self.profile, error)).map(|()| 0)
    }

    /// Frames move or flags change; the memory stays where it is.
    fn change_slot(&self, state: &mut State, claim: Claim, old: &Slot) -> Result<i32, Errno> {
        let address = state.mmu.windows.get(&old.id).map_or(claim.userspace_addr, |window| window.base() as u64);
        let range = GfnRange::from_bytes(claim.guest_phys_addr, claim.memory_size).map_err(|_| Errno::INVAL)?;
        let uncovered = self.make_room(state, old.id, range).hull(old.gfns);
        self.becomes_memory(range);
        let changed = kvm::set_region(self.fd().as_fd(), &real_region(&claim, address));
        if let Err(error) = changed {
            self.loses_slot(&state.core, old.id, range, Some(old.gfns));
            self.update_guards(state, uncovered);
            return Err(error);
        }
        if let Some(window) = state.mmu.windows.get_mut(&old.id) {
            window.move_to(Gfn::of_gpa(claim.guest_phys_addr))?;
        }
        let (result, shown) = state.run(&mut SetRegion::new(claim));
        self.loses_slot(&state.core, old.id, old.gfns, Some(range));
        self.update_guards(state, uncovered);
        result.map_err(|error| errno::region(self.profile, error)).and(shown).map(|()| 0)
    }

    /// The client changed what it has mapped at `[start, end)`: windows that show it show what is there now.
    pub(crate) fn user_mapping_changed(&self, start: usize, end: usize) -> Result<(), Errno> {
        // A child of fork has other mappings, and windows that are not its own.
        self.check_owner()?;
        let mut state = self.write();
        let (frames, _) = state.run(&mut ChangeUserMapping::new(start as u64, end as u64));
        if frames.is_empty() || state.mmu.windows.is_empty() {
            return Ok(());
        }
        let mut client = lock(&self.client);
        client.make_shareable(start, end - start)?;
        let State { core, mmu, .. } = &mut *state;
        mmu.learn_client(core, &client)?;
        drop(client);
        frames.into_iter().try_for_each(|range| mmu.show_views(core, range, Window::replace))
    }
}

/// Says once why calls fail that would succeed on a kernel with private memory: their author cannot know.
fn say(said: &Once, words: &str) {
    said.call_once(|| {
        let _ = kvm::with_client_fd(2, |errors| rustix::io::write(errors, words.as_bytes()));
    });
}

fn say_what_to_raise() {
    static SAID: Once = Once::new();
    say(&SAID, "gmem: a conversion needs more mappings than a process may have: raise the sysctl vm.max_map_count\n");
}

fn say_what_is_refused() {
    static SAID: Once = Once::new();
    say(&SAID, "gmem: guest memory that is registered with a userfaultfd cannot be that of a VM with private memory\n");
}

fn real_region(claim: &Claim, userspace_addr: u64) -> MemoryRegion {
    MemoryRegion {
        slot: claim.slot,
        flags: claim.flags & !SlotFlags::GUEST_MEMFD.bits(),
        guest_phys_addr: claim.guest_phys_addr,
        memory_size: claim.memory_size,
        userspace_addr,
    }
}

/// Faults and prefaults, from the vCPUs' side.
impl VmObject {
    /// Runs a fault through the core; what it maps is shown.
    pub(crate) fn fault(&self, fault: &mut ops::Fault) -> ops::FaultEnd {
        let mut state = self.write();
        let State { core, mmu, .. } = &mut *state;
        ops::run(fault, core, |fault, core, action| match action {
            // The caller knows that the client has the page; its number means nothing here.
            Action::GetUserPage { .. } => fault.user_page(Some(gmem_core::addr::Pfn(0))),
            Action::Map(mapping) => {
                let range = gmem_core::addr::PageRange::with_len(mapping.gfn, mapping.level.pages());
                if let Some(range) = range {
                    let shown = mmu.show_views(core, range, Window::show);
                    mmu.error = mmu.error.or(shown.err());
                }
            }
            action => mmu.carry_out(core, &action),
        })
    }

    /// The pages from the start of `range` on that can all be prefaulted: those of one slot that something backs.
    pub(crate) fn pre_fault_run(&self, range: GfnRange) -> Result<GfnRange, Errno> {
        let pages = match self.client_memory(range.start()) {
            Some(pages) => pages?,
            None => range.len(),
        };
        let access = ops::Access { gfn: range.start(), claimed: Side::Shared };
        errno::prefault(self.fault(&mut ops::Fault::new(access, ops::Origin::Prefault)))?;
        let state = self.read();
        let slot = state.core.slots().at(0, range.start()).ok_or(Errno::NOENT)?;
        let run = state.core.views(slot, range).next().map(|(run, _)| run);
        run.and_then(|run| GfnRange::with_len(run.start(), run.len().min(pages))).ok_or(Errno::NOENT)
    }

    /// If `gfn` is the client's memory: how many pages from there on can be read, or EFAULT.
    fn client_memory(&self, gfn: Gfn) -> Option<Result<u64, Errno>> {
        let state = self.read();
        let is_clients = matches!(state.core.view(gfn), View::UserMemory { .. });
        is_clients.then(|| state.client_pages(gfn).ok_or(Errno::FAULT))
    }
}
