//! A client process: which of its descriptors are gmem's, and the dispatch of its calls.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use gmem_core::file::FileFlags;
use gmem_core::ops::{Claim, FileClaim};
use gmem_core::slot::SlotFlags;
use gmem_host::client::{Carried, ClientMemory};
use gmem_host::kvm::RunMapping;
use gmem_host::maps::FileId;
use gmem_host::sys::{Argument, SignalsBlocked};
use gmem_host::table::{self, Held, Pin, Table};
use gmem_host::{address_space, fds, kvm};
use rustix::fd::{AsFd, RawFd};
use rustix::io::Errno;

use crate::abi::{self, CreateGuestMemfd, EnableCap, MemoryAttributes, MemoryRegion, MemoryRegion2, cap};
use crate::capability;
use crate::memfd::{FileCall, FileObject, Map};
use crate::native::Native;
use crate::profile::Profile;
use crate::vcpu::{Next, VcpuObject};
use crate::vm::{self, HeldVm, Kind, VmObject, lock};

/// Which kernel to be, and for which VM types.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The kernel whose behaviour the client sees.
    pub profile: &'static Profile,
    /// Bit mask of the VM types that gmem provides. All others are the host's.
    pub emulated: u32,
}

impl Config {
    /// The VM types that gmem can provide.
    pub const TYPES: u32 = 0b11;

    /// Provides the types of `wanted` that the host has not, or all of them if `always`.
    #[must_use]
    pub fn for_host(native: &Native, profile: &'static Profile, wanted: u32, always: bool) -> Self {
        let missing = |vm_type: &u32| always || !native.has_type(*vm_type, profile);
        let types = (0..32).filter(|vm_type| wanted & Self::TYPES & 1 << vm_type != 0);
        Self { profile, emulated: types.filter(missing).map(|vm_type| 1 << vm_type).sum() }
    }
}

/// Advice of `madvise` that gmem looks at (`include/uapi/asm-generic/mman-common.h`).
mod advice {
    pub(super) const FREE: i32 = 8;
    pub(super) const REMOVE: i32 = 9;
    pub(super) const COLLAPSE: i32 = 25;
}

/// What becomes of a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer<T> {
    /// None of gmem's business: the real call is to be made.
    Pass,
    /// This is the result; no real call.
    Done(Result<T, Errno>),
}

/// What one of gmem's descriptors is.
#[derive(Debug)]
pub struct Entry(Object);

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "each is in an Arc of its own, and every exit of a vCPU looks at that")]
enum Object {
    Vm(Arc<VmObject>),
    Vcpu(VcpuObject),
    File(Arc<FileObject>),
}

impl Entry {
    fn vcpu(&self) -> Option<&VcpuObject> {
        if let Object::Vcpu(vcpu) = &self.0 { Some(vcpu) } else { None }
    }
}

/// How `KVM_RUN` goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Run {
    /// The real call is to be made on [`Running::number`], and its result is [`Process::after_run`]'s.
    Enter(Running),
    /// This becomes of the client's call.
    End(Answer<i32>),
}

/// A vCPU that is about to enter its guest or is in it; it is pinned meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Running {
    held: Held,
    /// The descriptor's when the call was begun: it moves away from where a client puts one of its own.
    number: RawFd,
    retries: u32,
}

impl Running {
    /// `KVM_RUN` on `fd`, up to the real one. If that does not return, nothing has to be undone. `None`, before anything has
    /// happened: only [`Process::before_run`] knows.
    #[inline]
    #[must_use]
    pub fn enter(pin: &Pin<'_, Entry>, fd: RawFd) -> Option<Self> {
        let begin = |entry: &Entry| entry.vcpu().filter(|vcpu| vcpu.is_ready()).map(VcpuObject::number);
        let (held, number) = pin.hold(fd, begin)?;
        Some(Self { held, number, retries: 0 })
    }

    /// The descriptor for the real `KVM_RUN`, to be used at once.
    #[inline]
    #[must_use]
    pub fn number(self) -> RawFd {
        self.number
    }

    /// The real `KVM_RUN` has returned without an error. Whether that is the client's as it is and all is done; else
    /// [`Process::after_run`] goes on.
    #[inline]
    #[must_use]
    pub fn leave(self, pin: &Pin<'_, Entry>) -> bool {
        let end = pin.look(self.held, |entry| {
            let is_done = !pin.table().has_retired() && entry.vcpu().is_some_and(VcpuObject::has_left);
            if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        matches!(end, Some(ControlFlow::Break(())))
    }
}

/// Mappings of files by the client, by address: they keep the file open as the kernel's do.
type Mappings = BTreeMap<usize, (usize, Arc<FileObject>)>;

/// A client process.
///
/// Lock order: `vms` and `mappings` are only held for a lookup or a change, never while a VM's state is.
#[derive(Debug)]
pub struct Process {
    config: Config,
    native: Native,
    fds: Table<Entry>,
    /// How many entries of `fds` are files.
    file_count: AtomicUsize,
    vms: Mutex<Vec<Weak<VmObject>>>,
    vm_count: AtomicUsize,
    client: Arc<Mutex<ClientMemory>>,
    mappings: Mutex<Mappings>,
    mapping_count: AtomicUsize,
}

/// Locks held over a fork.
#[derive(Debug)]
pub struct ForkGuard<'a> {
    _mappings: MutexGuard<'a, Mappings>,
    _vms: MutexGuard<'a, Vec<Weak<VmObject>>>,
    _fds: table::Changes<'a, Entry>,
    _client: MutexGuard<'a, ClientMemory>,
    _hidden: fds::Changes,
    /// A child may go on to use its parent's files.
    _states: Vec<HeldVm>,
    /// The last to go: a signal handler must not find the others.
    _signals: SignalsBlocked,
}

impl Process {
    /// A process that has no descriptors of gmem's yet.
    #[must_use]
    pub fn new(config: Config, native: Native) -> Self {
        address_space::enter();
        Self {
            config,
            native,
            fds: Table::default(),
            file_count: AtomicUsize::new(0),
            vms: Mutex::default(),
            vm_count: AtomicUsize::new(0),
            client: Arc::default(),
            mappings: Mutex::default(),
            mapping_count: AtomicUsize::new(0),
        }
    }

    fn entry(&self, fd: i32) -> Option<Arc<Entry>> {
        let entry = self.fds.get(fd);
        self.give_up_retired();
        entry
    }

    fn give_up_retired(&self) {
        if self.fds.has_retired() {
            let _signals = SignalsBlocked::new();
            drop(self.fds.take_retired());
        }
    }

    /// The file of `fd`. A descriptor may have been closed unseen, by an instruction of the client's own, and its number may be
    /// another file's.
    fn file(&self, fd: i32) -> Option<Arc<FileObject>> {
        let entry = self.entry(fd)?;
        let Object::File(file) = &entry.0 else { return None };
        if kvm::with_client_fd(fd, |fd| FileId::of(fd)).is_ok_and(|found| file.placeholder == Some(found)) {
            return Some(Arc::clone(file));
        }
        // A child of vfork has descriptors of its own.
        if address_space::is_own() {
            let _signals = SignalsBlocked::new();
            let gone = self.fds.remove(fd, &entry, |_| {
                self.file_count.fetch_sub(1, Ordering::Relaxed);
            });
            drop(gone);
        }
        None
    }

    fn replace(&self, fd: i32, entry: Option<Arc<Entry>>) {
        let _signals = SignalsBlocked::new();
        let files = |entry: Option<&Entry>| usize::from(matches!(entry, Some(Entry(Object::File(_)))));
        self.file_count.fetch_add(files(entry.as_deref()), Ordering::Relaxed);
        let gone = self.fds.replace(fd, entry, |old| {
            self.file_count.fetch_sub(files(old), Ordering::Relaxed);
        });
        // May close a file.
        drop(gone);
    }

    /// `ioctl`.
    pub fn ioctl(&self, fd: i32, request: u32, arg: Argument) -> Answer<i32> {
        if Self::is_run(request, arg.value()) { self.run(fd) } else { self.ioctl_but_run(fd, request, arg) }
    }

    /// Whether an `ioctl` is `KVM_RUN`, which may also be carried out in steps.
    #[must_use]
    pub fn is_run(request: u32, arg: usize) -> bool {
        request == abi::RUN && arg == 0
    }

    /// Whether an `ioctl` changes which mappings a userfaultfd has a part in.
    #[must_use]
    pub fn is_registration(request: u32) -> bool {
        abi::is_registration(request)
    }

    /// Whether gmem may have something to say to an `ioctl`; most pass at the cost of this.
    #[must_use]
    pub fn may_concern(&self, fd: i32, request: u32) -> bool {
        if abi::is_kvm(request) { abi::may_concern_kvm(request) } else { self.knows(fd) }
    }

    /// `KVM_RUN`, whole.
    pub fn run(&self, fd: i32) -> Answer<i32> {
        let Some(entry) = self.entry(fd) else { return Answer::Pass };
        match entry.vcpu() {
            Some(vcpu) => Answer::Done(vcpu.run()),
            None => self.ioctl_but_run(fd, abi::RUN, Argument::from(0)),
        }
    }

    /// A place for the vCPUs that a thread will run. To be called with signals blocked.
    #[must_use]
    pub fn pin(&self) -> Pin<'_, Entry> {
        self.fds.pin()
    }

    /// Whether `fd` is one of gmem's.
    #[must_use]
    pub fn knows(&self, fd: i32) -> bool {
        self.fds.contains(fd)
    }

    /// `KVM_RUN` up to the real one, whatever it is about.
    pub fn before_run(&self, pin: &Pin<'_, Entry>, fd: i32) -> Run {
        let begun = pin.hold(fd, |entry| entry.vcpu().map(|vcpu| (vcpu.before_run(), vcpu.number())));
        match begun {
            Some((held, (None, number))) => Run::Enter(Running { held, number, retries: 0 }),
            Some((held, (Some(result), _))) => self.end_run(pin, held, result),
            // What is no vCPU; and a handler that came amid another call of its thread.
            None => Run::End(self.run(fd)),
        }
    }

    /// The real `KVM_RUN` had this result, whatever it is.
    pub fn after_run(&self, pin: &Pin<'_, Entry>, running: Running, result: Result<i32, Errno>) -> Run {
        let Running { held, number, retries } = running;
        let next = pin.look(held, |entry| {
            let next = entry.vcpu().map(|vcpu| (vcpu.after_run(number, result, retries), vcpu.number()));
            ControlFlow::<(), _>::Continue(next)
        });
        match next.and_then(ControlFlow::continue_value).flatten() {
            Some((Next::RunOn, number)) => Run::Enter(Running { held, number, retries: retries + 1 }),
            Some((Next::Return(result), _)) => self.end_run(pin, held, result),
            // A handler that interrupted this call ran a vCPU itself.
            None => Run::End(Answer::Done(result)),
        }
    }

    fn end_run(&self, pin: &Pin<'_, Entry>, held: Held, result: Result<i32, Errno>) -> Run {
        let _ = pin.look(held, |_| ControlFlow::<_, ()>::Break(()));
        self.give_up_retired();
        Run::End(Answer::Done(result))
    }

    fn ioctl_but_run(&self, fd: i32, request: u32, arg: Argument) -> Answer<i32> {
        if !abi::is_kvm(request) {
            // What the VFS answers for every file it answers for the one that stands for a guest_memfd.
            let sizes = self.config.profile.answers_size_ioctls && abi::SIZE_IOCTLS.contains(&request);
            let refused = !sizes && !abi::VFS_IOCTLS.contains(&request) && self.file(fd).is_some();
            return if refused { Answer::Done(Err(Errno::NOTTY)) } else { Answer::Pass };
        }
        match self.entry(fd).as_deref().map(|entry| &entry.0) {
            Some(Object::Vcpu(vcpu)) => vcpu_ioctl(vcpu, request, arg),
            Some(Object::Vm(vm)) => {
                let _signals = SignalsBlocked::new();
                self.vm_ioctl(vm, request, arg)
            }
            Some(Object::File(_)) if self.file(fd).is_some() => Answer::Done(Err(Errno::NOTTY)),
            Some(Object::File(_)) | None => self.system_ioctl(fd, request, arg),
        }
    }

    fn system_ioctl(&self, fd: i32, request: u32, arg: Argument) -> Answer<i32> {
        if self.config.emulated == 0 || !matches!(request, abi::CREATE_VM | abi::CHECK_EXTENSION) {
            return Answer::Pass;
        }
        let device = kvm::with_client_fd(fd, |fd| Ok(kvm::is_kvm_device(fd)));
        match (device, request) {
            (Ok(true), abi::CREATE_VM) => self.create_vm(fd, arg.value()),
            (Ok(true), _) => {
                let capability = u32::try_from(arg.value()).unwrap_or(u32::MAX);
                let answer = capability::of_system(self.config.profile, self.vm_types(), capability);
                answer.map_or(Answer::Pass, |value| Answer::Done(Ok(value)))
            }
            // A VM that is left to the host: it, too, says which types there are.
            (Ok(false), abi::CHECK_EXTENSION) if arg.value() == cap::VM_TYPES as usize => {
                let native = kvm::with_client_fd(fd, |fd| kvm::try_check_extension(fd, cap::VM_TYPES));
                native.map_or(Answer::Pass, |_| Answer::Done(Ok(i32::try_from(self.vm_types()).unwrap_or(i32::MAX))))
            }
            _ => Answer::Pass,
        }
    }

    fn vm_types(&self) -> u32 {
        self.native.vm_types | self.config.emulated
    }

    fn create_vm(&self, kvm: i32, vm_type: usize) -> Answer<i32> {
        match u32::try_from(vm_type) {
            Ok(vm_type) if vm_type < 32 && self.config.emulated & 1 << vm_type != 0 => {
                Answer::Done(self.create_emulated_vm(kvm, vm_type))
            }
            _ => Answer::Pass,
        }
    }

    fn create_emulated_vm(&self, kvm: i32, vm_type: u32) -> Result<i32, Errno> {
        let run_len = kvm::with_client_fd(kvm, RunMapping::len_of)?;
        let fd = kvm::with_client_fd(kvm, |kvm| kvm::create_vm(kvm, 0))?;
        let kind = Kind { vm_type, profile: self.config.profile, run_len };
        let vm = Arc::new(VmObject::new(fd.as_fd(), kind, Arc::clone(&self.client))?);
        let _signals = SignalsBlocked::new();
        let mut vms = lock(&self.vms);
        vms.retain(|vm| vm.strong_count() > 0);
        vms.push(Arc::downgrade(&vm));
        self.vm_count.store(vms.len(), Ordering::Relaxed);
        drop(vms);
        let fd = kvm::into_client(fd);
        self.replace(fd, Some(Arc::new(Entry(Object::Vm(vm)))));
        Ok(fd)
    }

    fn vm_ioctl(&self, vm: &Arc<VmObject>, request: u32, arg: Argument) -> Answer<i32> {
        if let Err(error) = vm.check_owner() {
            return Answer::Done(Err(error));
        }
        match request {
            abi::CHECK_EXTENSION => {
                let capability = u32::try_from(arg.value()).unwrap_or(u32::MAX);
                let answer = capability::of_vm(vm.profile, &vm.read().core, self.vm_types(), capability);
                answer.map_or(Answer::Pass, |value| Answer::Done(Ok(value)))
            }
            abi::ENABLE_CAP => enable_cap(vm, arg),
            abi::CREATE_VCPU => Answer::Done(self.create_vcpu(vm, arg.value())),
            abi::CREATE_GUEST_MEMFD => Answer::Done(self.create_file(vm, arg)),
            abi::SET_USER_MEMORY_REGION => Answer::Done(set_region_v1(vm, arg)),
            abi::SET_USER_MEMORY_REGION2 => Answer::Done(self.set_region(vm, arg)),
            abi::SET_MEMORY_ATTRIBUTES => Answer::Done(set_attributes(vm, arg)),
            _ => Answer::Pass,
        }
    }

    fn create_vcpu(&self, vm: &Arc<VmObject>, id: usize) -> Result<i32, Errno> {
        vm.expect_vcpu();
        // All that can run out first: a vCPU that exists cannot be taken back.
        let mut copy = fds::hidden_copy(vm.fd())?;
        let fd = kvm::create_vcpu(vm.fd().as_fd(), id)?;
        copy.become_copy_of(fd.as_fd())?;
        let vcpu = VcpuObject::new(copy, Arc::clone(vm), self.native.prefault)?;
        let fd = kvm::into_client(fd);
        self.replace(fd, Some(Arc::new(Entry(Object::Vcpu(vcpu)))));
        Ok(fd)
    }

    fn create_file(&self, vm: &Arc<VmObject>, arg: Argument) -> Result<i32, Errno> {
        let claim: CreateGuestMemfd = abi::read(arg)?;
        let id = vm.create_file(claim.size, claim.flags)?;
        let flags = FileFlags::from_bits_truncate(claim.flags);
        let mut file = FileObject { vm: Arc::clone(vm), id, size: claim.size, flags, placeholder: None };
        let fd = fds::placeholder(claim.size)?;
        file.placeholder = Some(FileId::of(&fd)?);
        let fd = kvm::into_client(fd);
        self.replace(fd, Some(Arc::new(Entry(Object::File(Arc::new(file))))));
        Ok(fd)
    }

    fn set_region(&self, vm: &Arc<VmObject>, arg: Argument) -> Result<i32, Errno> {
        let claim: MemoryRegion2 = abi::read(arg)?;
        let private = claim.region.flags & SlotFlags::GUEST_MEMFD.bits() != 0;
        let file = if private { self.claimed_file(vm, claim.guest_memfd) } else { FileClaim::BadDescriptor };
        vm.set_region(region_claim(&claim.region, file, claim.guest_memfd_offset))
    }

    fn claimed_file(&self, vm: &Arc<VmObject>, fd: u32) -> FileClaim {
        let Ok(fd) = i32::try_from(fd) else { return FileClaim::BadDescriptor };
        match self.file(fd) {
            Some(file) if Arc::ptr_eq(&file.vm, vm) => FileClaim::File(file.id),
            Some(_) => FileClaim::OtherVm,
            None if kvm::is_open(fd) => FileClaim::NotGuestMemfd,
            None => FileClaim::BadDescriptor,
        }
    }

    /// Whether any descriptor is a guest_memfd of gmem's. Takes no lock.
    #[must_use]
    pub fn has_files(&self) -> bool {
        self.file_count.load(Ordering::Relaxed) > 0
    }

    /// Whether `fd` is a guest_memfd of gmem's; its size in bytes.
    #[must_use]
    pub fn file_size(&self, fd: i32) -> Option<u64> {
        self.file(fd).map(|file| file.size)
    }

    /// What `/proc/self/fd` says of a guest_memfd.
    #[must_use]
    pub fn file_name(&self) -> &'static str {
        self.config.profile.file_name
    }

    /// A system call on a descriptor that may be a guest_memfd.
    pub fn file_call(&self, fd: i32, call: FileCall) -> Answer<i64> {
        let Some(file) = self.file(fd) else { return Answer::Pass };
        let signals = SignalsBlocked::new();
        let result = file.call(call, &signals);
        if let (Ok(_), FileCall::Fallocate { .. }) = (result, call) {
            kvm::touch(fd);
        }
        Answer::Done(result)
    }

    /// `mmap` of a descriptor that may be a guest_memfd.
    pub fn mmap(&self, address: usize, len: usize, prot: u32, flags: u32, fd: i32, offset: u64) -> Answer<usize> {
        let Some(file) = self.file(fd) else { return Answer::Pass };
        let _signals = SignalsBlocked::new();
        let base = file.map(Map { address, len, prot, flags, offset });
        if let Ok(base) = base {
            let len = len.next_multiple_of(4096);
            self.mapping_changed(base, len);
            self.maps(base, len, file);
        }
        Answer::Done(base)
    }

    fn maps(&self, base: usize, len: usize, file: Arc<FileObject>) {
        let mut mappings = lock(&self.mappings);
        mappings.insert(base, (base.saturating_add(len), file));
        self.mapping_count.store(mappings.len(), Ordering::Relaxed);
    }

    /// The client closed `fd`. To be called before the number can be used again.
    pub fn closed(&self, fd: i32) {
        // A child of vfork closes descriptors of its own.
        if self.fds.contains(fd) && address_space::is_own() {
            self.replace(fd, None);
        }
    }

    /// Takes every lock of the process, so that a fork finds none of them held by a thread that the child does not have.
    #[must_use]
    pub fn before_fork(&self) -> ForkGuard<'_> {
        let signals = SignalsBlocked::new();
        let vms = lock(&self.vms);
        ForkGuard {
            _signals: signals,
            _mappings: lock(&self.mappings),
            _states: vms.iter().filter_map(Weak::upgrade).map(vm::hold).collect(),
            _vms: vms,
            _fds: self.fds.changes(),
            _client: lock(&self.client),
            // Those who hold the others may need it.
            _hidden: fds::changes(),
        }
    }

    /// The process is a child of fork now, with descriptors and memory of its own, and one thread, whose pin this is.
    pub fn is_child(&self, pin: Option<&Pin<'_, Entry>>) {
        let _signals = SignalsBlocked::new();
        address_space::enter();
        self.fds.is_child(pin);
        fds::is_child();
        lock(&self.client).make_private();
        // No VM is the child's.
        lock(&self.vms).clear();
        self.vm_count.store(0, Ordering::Relaxed);
    }

    /// The client closed the descriptors `first..=last`.
    pub fn closed_range(&self, first: i32, last: i32) {
        self.fds.numbers(first, last).for_each(|fd| self.closed(fd));
    }

    /// The client made `copy` a duplicate of `fd`.
    pub fn duplicated(&self, fd: i32, copy: i32) {
        let entry = self.entry(fd);
        let concerns_gmem = entry.is_some() || self.fds.contains(copy);
        // A child of vfork has descriptors of its own.
        if concerns_gmem && address_space::is_own() {
            self.replace(copy, entry);
        }
    }

    fn has_vms(&self) -> bool {
        self.vm_count.load(Ordering::Relaxed) > 0
    }

    fn has_mappings(&self) -> bool {
        self.mapping_count.load(Ordering::Relaxed) > 0
    }

    /// The client changed what it has mapped at `[start, start + len)`.
    pub fn mapping_changed(&self, start: usize, len: usize) {
        let end = start.saturating_add(len);
        if self.has_mappings() {
            let _signals = SignalsBlocked::new();
            let gone = cut(&mut lock(&self.mappings), start, end);
            drop(gone);
        }
        if self.has_vms() {
            let _signals = SignalsBlocked::new();
            lock(&self.client).forget(start, end);
            self.show_anew(start, end);
        }
    }

    /// The client may now do something else with what it has mapped at `[start, start + len)`.
    pub fn protection_changed(&self, start: usize, len: usize) {
        if self.has_vms() {
            let _signals = SignalsBlocked::new();
            self.show_anew(start, start.saturating_add(len));
        }
    }

    fn show_anew(&self, start: usize, end: usize) {
        let vms: Vec<_> = lock(&self.vms).iter().filter_map(Weak::upgrade).collect();
        for vm in vms {
            // A client that unmaps guest memory cannot be told of an error; the frames show nothing then.
            let _ = vm.user_mapping_changed(start, end);
        }
    }

    /// The client moved, grew or shrank the mapping at `start`; with `keeps` the old one is still there.
    pub fn mapping_moved(&self, (start, old): (usize, usize), (base, new): (usize, usize), keeps: bool) {
        let (has_mappings, has_vms) = (self.has_mappings(), self.has_vms());
        if !has_mappings && !has_vms {
            return;
        }
        let _signals = SignalsBlocked::new();
        let file = if has_mappings { self.mapped_at(start) } else { None };
        let ram =
            if has_vms { lock(&self.client).pick_up((start, old), (base, new), keeps) } else { Carried::default() };
        // Of private memory only the address is kept.
        if !keeps || old > 0 && !ram.is_empty() {
            self.mapping_changed(start, old);
        }
        self.mapping_changed(base, new);
        if !ram.is_empty() {
            lock(&self.client).put_down(ram);
        }
        if let Some(file) = file {
            self.maps(base, new.next_multiple_of(4096), file);
        }
    }

    /// The file that is mapped at `address`.
    fn mapped_at(&self, address: usize) -> Option<Arc<FileObject>> {
        let mappings = lock(&self.mappings);
        let (_, (end, file)) = mappings.range(..=address).next_back()?;
        (address < *end).then(|| Arc::clone(file))
    }

    /// `madvise`, as far as the host would answer it otherwise than the client expects.
    pub fn advice(&self, start: usize, len: usize, advice: i32) -> Answer<i32> {
        // Clients' allocators give advice often, and mostly such as is not looked at.
        let concerns_gmem = match advice {
            advice::COLLAPSE => self.has_mappings(),
            advice::FREE | advice::REMOVE => self.has_vms(),
            _ => false,
        };
        if !concerns_gmem {
            return Answer::Pass;
        }
        let end = start.saturating_add(len);
        let _signals = SignalsBlocked::new();
        match advice {
            // Folios of a guest_memfd are not collapsed for a mapping (mm/khugepaged.c, `file_thp_enabled`).
            advice::COLLAPSE if self.maps_file(start, end) => Answer::Done(Err(Errno::INVAL)),
            advice::FREE => {
                let freed = lock(&self.client).advise_free(start, len);
                freed.map_or(Answer::Pass, |done| Answer::Done(done.map(|()| 0)))
            }
            advice::REMOVE => {
                let refused = lock(&self.client).refuses_removal(start, len);
                refused.map_or(Answer::Pass, |error| Answer::Done(Err(error)))
            }
            _ => Answer::Pass,
        }
    }

    /// The client changed what the kernel keeps about a mapping beside its protection.
    pub fn flags_changed(&self) {
        if self.has_vms() {
            let _signals = SignalsBlocked::new();
            lock(&self.client).flags_changed();
        }
    }

    fn maps_file(&self, start: usize, end: usize) -> bool {
        let mappings = lock(&self.mappings);
        mappings.range(..end).next_back().is_some_and(|(_, (until, _))| *until > start)
    }

    /// `MADV_DONTNEED` by the client, after the host's: gmem gives the zeros that it expects.
    pub fn advise_dontneed(&self, start: usize, len: usize) -> Result<(), Errno> {
        if !self.has_vms() {
            return Ok(());
        }
        let _signals = SignalsBlocked::new();
        lock(&self.client).advise_dontneed(start, len)
    }
}

/// Takes `[start, end)` out of the mappings; what is returned may hold the last reference of a file.
fn cut(mappings: &mut Mappings, start: usize, end: usize) -> Vec<Arc<FileObject>> {
    let touched: Vec<usize> = {
        let before = mappings.range(..start).next_back();
        let all = before.into_iter().chain(mappings.range(start..end));
        all.filter(|(_, (until, _))| *until > start).map(|(&base, _)| base).collect()
    };
    let mut gone = Vec::new();
    for base in touched {
        let Some((until, file)) = mappings.remove(&base) else { continue };
        if base < start {
            mappings.insert(base, (start, Arc::clone(&file)));
        }
        if until > end {
            mappings.insert(end, (until, Arc::clone(&file)));
        }
        gone.push(file);
    }
    gone
}

fn vcpu_ioctl(vcpu: &VcpuObject, request: u32, arg: Argument) -> Answer<i32> {
    match request {
        // New registers mean that the access is not wanted any more.
        abi::SET_REGS | abi::SET_SREGS | abi::SET_SREGS2 => {
            vcpu.forget_pending();
            Answer::Pass
        }
        abi::PRE_FAULT_MEMORY => Answer::Done(vcpu.pre_fault(arg)),
        _ => Answer::Pass,
    }
}

/// A client that disables quirks sets the whole mask; the one that gmem disables stays among them.
fn enable_cap(vm: &VmObject, arg: Argument) -> Answer<i32> {
    let Ok(claim) = abi::read::<EnableCap>(arg) else { return Answer::Pass };
    let quirks = claim.cap == cap::DISABLE_QUIRKS || claim.cap == cap::DISABLE_QUIRKS2;
    if claim.flags != 0 || !quirks {
        return Answer::Pass;
    }
    // The older form ignores what it does not know.
    let known =
        if claim.cap == cap::DISABLE_QUIRKS { kvm::check_extension(vm.fd().as_fd(), cap::DISABLE_QUIRKS2) } else { -1 };
    let quirks = claim.args[0] & u64::from_ne_bytes(i64::from(known).to_ne_bytes());
    Answer::Done(kvm::disable_quirks(vm.fd().as_fd(), quirks).map(|()| 0))
}

fn region_claim(region: &MemoryRegion, file: FileClaim, guest_memfd_offset: u64) -> Claim {
    Claim {
        slot: region.slot,
        flags: region.flags,
        guest_phys_addr: region.guest_phys_addr,
        memory_size: region.memory_size,
        userspace_addr: region.userspace_addr,
        file,
        guest_memfd_offset,
    }
}

/// The older call knows the older flags only.
fn set_region_v1(vm: &VmObject, arg: Argument) -> Result<i32, Errno> {
    let region: MemoryRegion = abi::read(arg)?;
    let known = SlotFlags::LOG_DIRTY_PAGES | SlotFlags::READONLY;
    if region.flags & !known.bits() != 0 {
        return Err(Errno::INVAL);
    }
    vm.set_region(region_claim(&region, FileClaim::BadDescriptor, 0))
}

fn set_attributes(vm: &VmObject, arg: Argument) -> Result<i32, Errno> {
    let claim: MemoryAttributes = abi::read(arg)?;
    vm.set_attributes(&claim)
}
