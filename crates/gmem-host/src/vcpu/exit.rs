//! Exits of a KVM that emulated the access, and taking them back.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use super::kvm::Vcpu;
use super::layout::{Events, Fpu, Regs, Sregs};
use super::state::Source;
use super::{Access, AccessKind};

const KVM_EXIT_MMIO: u32 = 6;
const KVM_EXIT_INTERNAL_ERROR: u32 = 17;
const KVM_EXIT_MEMORY_FAULT: u32 = 39;
const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;
const KVM_INTERNAL_ERROR_EMULATION: u32 = 1;

/// Offsets in `struct kvm_run`.
mod offset {
    pub(super) const IMMEDIATE_EXIT: usize = 1;
    pub(super) const EXIT_REASON: usize = 8;
    pub(super) const MMIO_ADDRESS: usize = 32;
    pub(super) const INTERNAL_SUBERROR: usize = 32;
    pub(super) const FAULT_FLAGS: usize = 32;
    pub(super) const FAULT_GPA: usize = 40;
    pub(super) const FAULT_SIZE: usize = 48;
    pub(super) const MMIO_DATA: usize = 40;
    pub(super) const MMIO_LEN: usize = 48;
    pub(super) const MMIO_IS_WRITE: usize = 52;
    pub(super) const VALID_REGS: usize = 288;
    pub(super) const DIRTY_REGS: usize = 296;
}

/// Exits that one instruction can cause before this module gives up on it: a 64-byte operand over two pages makes 9,
/// and no emulated instruction has more than a few operands.
const MOST_EXITS: usize = 64;

/// The `kvm_run` mapping of a vCPU. The client and the kernel write it too, so it is only ever accessed field by field.
#[derive(Clone, Copy, Debug)]
pub struct RunArea(NonNull<u8>);

// SAFETY: the pointer is only dereferenced by reads and writes of single fields; who may call those when is the
// contract of `RunArea::new`, which binds all copies on any thread.
unsafe impl Send for RunArea {}

/// An integer of `struct kvm_run`. Atomic, because the kernel and the client write it too; and a thread may be cancelled in an atomic
/// access, in which nothing is checked.
trait Field: Copy {
    /// # Safety
    /// `at` must be aligned for an atomic of this size, and live.
    unsafe fn load(at: NonNull<u8>) -> Self;

    /// # Safety
    /// As [`Field::load`].
    unsafe fn store(self, at: NonNull<u8>);
}

macro_rules! fields {
    ($($field:ty: $atomic:ty),*) => {
        $(
            impl Field for $field {
                #[inline]
                unsafe fn load(at: NonNull<u8>) -> Self {
                    // SAFETY: of the caller.
                    unsafe { <$atomic>::from_ptr(at.cast().as_ptr()) }.load(Ordering::Relaxed)
                }

                #[inline]
                unsafe fn store(self, at: NonNull<u8>) {
                    // SAFETY: of the caller.
                    unsafe { <$atomic>::from_ptr(at.cast().as_ptr()) }.store(self, Ordering::Relaxed);
                }
            }
        )*
    };
}

fields!(u8: AtomicU8, u32: AtomicU32, u64: AtomicU64);

impl RunArea {
    /// Names the mapping at `run`.
    ///
    /// # Safety
    /// `run` is the start of a readable and writable `mmap` of the vCPU descriptor with which the value will be used,
    /// of at least `KVM_GET_VCPU_MMAP_SIZE` bytes, and stays mapped as long as the value or a copy is used. Methods are
    /// only called while no other thread is in `KVM_RUN` on the vCPU or calls them.
    #[must_use]
    pub unsafe fn new(run: NonNull<u8>) -> Self {
        Self(run)
    }

    fn get<T: Field>(self, offset: usize) -> T {
        // SAFETY: the mapping is page aligned, live and at least a page long (contract of `new`); each offset above is
        // that of a naturally aligned integer field within the first 304 bytes.
        unsafe { T::load(self.0.add(offset)) }
    }

    fn set<T: Field>(self, offset: usize, value: T) {
        // SAFETY: as in `get`.
        unsafe { value.store(self.0.add(offset)) }
    }

    /// The exit's address, data and direction if it is `KVM_EXIT_MMIO`; only meaningful after `KVM_RUN` returned 0.
    #[must_use]
    pub fn mmio(&self) -> Option<Mmio> {
        (self.get::<u32>(offset::EXIT_REASON) == KVM_EXIT_MMIO).then(|| Mmio {
            gpa: self.get(offset::MMIO_ADDRESS),
            data: self.get::<u64>(offset::MMIO_DATA).to_ne_bytes(),
            len: self.get::<u32>(offset::MMIO_LEN).min(8),
            is_write: self.get::<u8>(offset::MMIO_IS_WRITE) != 0,
        })
    }

    /// Makes the exit `KVM_EXIT_MMIO` for a write of at most 8 bytes.
    pub fn set_mmio_write(&self, gpa: u64, bytes: &[u8]) {
        let mut data = [0u8; 8];
        let len = bytes.len().min(8);
        if let (Some(to), Some(from)) = (data.get_mut(..len), bytes.get(..len)) {
            to.copy_from_slice(from);
        }
        self.set(offset::EXIT_REASON, KVM_EXIT_MMIO);
        self.set(offset::MMIO_ADDRESS, gpa);
        self.set(offset::MMIO_DATA, u64::from_ne_bytes(data));
        self.set(offset::MMIO_LEN, u32::try_from(len).unwrap_or(8));
        self.set(offset::MMIO_IS_WRITE, 1u8);
    }

    /// Makes the exit `KVM_EXIT_MEMORY_FAULT`. Sizes and addresses in bytes.
    pub fn set_memory_fault(&self, gpa: u64, size: u64, private: bool) {
        self.set(offset::EXIT_REASON, KVM_EXIT_MEMORY_FAULT);
        self.set(offset::FAULT_FLAGS, if private { KVM_MEMORY_EXIT_FLAG_PRIVATE } else { 0 });
        self.set(offset::FAULT_GPA, gpa);
        self.set(offset::FAULT_SIZE, size);
    }

    /// Whether the exit says that KVM could not emulate the instruction at RIP, as when it could not fetch it. Only
    /// meaningful after `KVM_RUN` returned 0.
    #[must_use]
    pub fn is_emulation_failure(&self) -> bool {
        self.get::<u32>(offset::EXIT_REASON) == KVM_EXIT_INTERNAL_ERROR
            && self.get::<u32>(offset::INTERNAL_SUBERROR) == KVM_INTERNAL_ERROR_EMULATION
    }
}

/// What a `KVM_EXIT_MMIO` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mmio {
    /// Guest physical address.
    pub gpa: u64,
    /// The bytes written; of a read, meaningless.
    pub data: [u8; 8],
    /// Bytes accessed, at most 8.
    pub len: u32,
    /// Whether it is a write.
    pub is_write: bool,
}

impl Mmio {
    /// The same as an access.
    #[must_use]
    pub fn access(&self) -> Access {
        let kind = if self.is_write { AccessKind::Store } else { AccessKind::Load };
        Access { gpa: self.gpa, size: self.len, kind }
    }
}

/// While it lives, `KVM_RUN` completes the instruction in progress and executes nothing; dropping it gives the fields
/// that this needs back to the client.
struct Completion {
    run: RunArea,
    immediate_exit: u8,
    valid_regs: u64,
    dirty_regs: u64,
}

impl Completion {
    fn begin(run: RunArea) -> Self {
        let saved = Self {
            run,
            immediate_exit: run.get(offset::IMMEDIATE_EXIT),
            valid_regs: run.get(offset::VALID_REGS),
            dirty_regs: run.get(offset::DIRTY_REGS),
        };
        run.set(offset::IMMEDIATE_EXIT, 1u8);
        // The shared register area keeps what the client knows: neither filled nor taken over in between.
        run.set(offset::VALID_REGS, 0u64);
        run.set(offset::DIRTY_REGS, 0u64);
        saved
    }

    /// Lets the instruction go on. True if it wants another access from userspace, false if it is complete.
    fn step(&self, vcpu: Vcpu<'_>) -> Result<bool, Errno> {
        vcpu.run()
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.run.set(offset::IMMEDIATE_EXIT, self.immediate_exit);
        self.run.set(offset::VALID_REGS, self.valid_regs);
        self.run.set(offset::DIRTY_REGS, self.dirty_regs);
    }
}

/// Everything of a vCPU that one instruction with a memory operand can change.
struct Checkpoint {
    regs: Regs,
    sregs: Sregs,
    events: Events,
    floats: Floats,
}

enum Floats {
    Xsave(Vec<u64>),
    /// A host whose KVM has no XSAVE calls.
    Fpu(Box<Fpu>),
}

impl Checkpoint {
    fn take(vcpu: Vcpu<'_>) -> Result<Self, Errno> {
        let floats = match vcpu.xsave() {
            Ok(image) => Floats::Xsave(image),
            Err(_) => Floats::Fpu(Box::new(vcpu.fpu()?)),
        };
        Ok(Self { regs: vcpu.regs()?, sregs: vcpu.sregs()?, events: vcpu.events()?, floats })
    }

    fn restore(mut self, vcpu: Vcpu<'_>) -> Result<(), Errno> {
        // Setting the system registers has side effects on the MMU and the interrupt controller, so only if need be.
        if vcpu.sregs()? != self.sregs {
            vcpu.set_sregs(self.sregs)?;
        }
        match &mut self.floats {
            Floats::Xsave(image) => vcpu.set_xsave(image)?,
            Floats::Fpu(fpu) => vcpu.set_fpu(**fpu)?,
        }
        vcpu.set_regs(self.regs)?;
        // Last, because setting registers drops a pending exception, and an exception that the meaningless data raised
        // must go while one from before must stay.
        vcpu.set_events(self.events)
    }
}

/// Undoes the read of the current `KVM_EXIT_MMIO`: the instruction is as if it had not begun, and executes again at the
/// next `KVM_RUN`.
///
/// KVM cannot abandon an instruction, so it is completed with zeros for the data, and the registers are restored. What a
/// memory-to-memory instruction wrote elsewhere meanwhile stays until the instruction writes it again: another vCPU can
/// see zeros for as long as the fault takes.
///
/// # Errors
/// What the vCPU's `KVM_GET_*` calls return, in which case nothing has been changed, or its `KVM_SET_*` calls, in which
/// case the vCPU is lost.
pub fn put_back_read(vcpu: BorrowedFd<'_>, run: RunArea) -> Result<(), Errno> {
    let vcpu = Vcpu(vcpu);
    let before = Checkpoint::take(vcpu)?;
    let completion = Completion::begin(run);
    for _ in 0..MOST_EXITS {
        run.set(offset::MMIO_DATA, 0u64);
        // Whatever ends the instruction, an error included, the registers go back.
        if !matches!(completion.step(vcpu), Ok(true)) {
            break;
        }
    }
    drop(completion);
    before.restore(vcpu)
}

/// One contiguous piece of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fragment {
    /// Guest physical address.
    pub gpa: u64,
    len: u8,
    data: [u8; 8],
}

impl Fragment {
    fn of(mmio: &Mmio) -> Self {
        Self { gpa: mmio.gpa, len: u8::try_from(mmio.len.min(8)).unwrap_or(8), data: mmio.data }
    }

    /// The bytes to be written.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        self.data.get(..usize::from(self.len)).unwrap_or(&self.data)
    }
}

/// A write that the guest has made, as far as its registers go, and that is not in memory yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PendingWrite {
    /// Never empty: it goes away with its last fragment.
    fragments: Vec<Fragment>,
}

impl PendingWrite {
    /// The access to report: the first piece that is not written yet.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        let first = self.fragments.first()?;
        Some(Access { gpa: first.gpa, size: u32::from(first.len), kind: AccessKind::Store })
    }

    /// The pieces that are not written yet, in order. A write of more than 8 bytes or over a page boundary has several,
    /// and a later one may lie in memory that was never forbidden.
    #[must_use]
    pub fn fragments(&self) -> &[Fragment] {
        &self.fragments
    }

    /// Takes the first piece that is not written yet out: someone else writes it.
    pub fn take_first(&mut self) -> Option<Fragment> {
        (!self.fragments.is_empty()).then(|| self.fragments.remove(0))
    }

    /// Carries out what is left: `write` stores one piece, or returns false if its page is still not resolved.
    ///
    /// `None` when all is written; otherwise the access to report again. What was written is not written twice.
    pub fn carry_out(&mut self, mut write: impl FnMut(u64, &[u8]) -> bool) -> Option<Access> {
        let done = self.fragments.iter().take_while(|fragment| write(fragment.gpa, fragment.data())).count();
        self.fragments.drain(..done);
        self.access()
    }
}

/// Takes the write of the current `KVM_EXIT_MMIO` out of KVM's hands, with all pieces that follow from the same operand.
///
/// RIP has moved on and stays there: the vCPU must not run before the write has been carried out. An instruction that
/// makes several separate writes (far calls, PUSHA, interrupts in real mode) has lost all but the last in KVM itself.
///
/// # Errors
/// [`Errno::INVAL`] if the exit is no such write; EIO if the instruction asks for something else in between; otherwise
/// what `KVM_RUN` returns.
pub fn collect_write(vcpu: BorrowedFd<'_>, run: RunArea) -> Result<PendingWrite, Errno> {
    let write = |mmio: Mmio| mmio.is_write.then(|| Fragment::of(&mmio));
    let first = run.mmio().and_then(write).ok_or(Errno::INVAL)?;
    let mut fragments = vec![first];
    let completion = Completion::begin(run);
    while completion.step(Vcpu(vcpu))? {
        match run.mmio().and_then(write) {
            Some(fragment) if fragments.len() < MOST_EXITS => fragments.push(fragment),
            _ => return Err(Errno::IO),
        }
    }
    Ok(PendingWrite { fragments })
}
