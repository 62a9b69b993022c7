//! The operations of a sequence. They name everything by small logical numbers (vm 0..3, file 0..8, map 0..4, host area
//! 0..5), so that a transcript can be compared between machines and an operation still means something when an earlier
//! one was left out: what does not exist is the descriptor -1.

use std::fmt;

/// A number that prints in hexadecimal.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Hex(pub(crate) u64);

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

pub(crate) const VMS: usize = 3;
pub(crate) const FILES: usize = 8;
pub(crate) const MAPS: usize = 4;
pub(crate) const SLOTS: usize = 7;

/// The memory that a VM's client gives to shared slots, one area of each kind per VM, as large as the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Area {
    /// Private anonymous memory, huge pages advised.
    Anonymous = 0,
    /// A shared mapping of a memfd.
    Memfd = 1,
    /// Shared anonymous memory.
    SharedAnonymous = 2,
    /// Anonymous memory that may only be read.
    ReadOnly = 3,
    /// An address range without any permission.
    NoAccess = 4,
}

pub(crate) const AREAS: [Area; 5] =
    [Area::Anonymous, Area::Memfd, Area::SharedAnonymous, Area::ReadOnly, Area::NoAccess];

/// A `userspace_addr`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hva {
    /// Byte offset in an area of the VM.
    In(Area, Hex),
    /// A literal address.
    Raw(Hex),
}

/// What a client passes where a descriptor is expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FdRef {
    File(usize),
    Vm(usize),
    Kvm,
    Memfd,
    None,
}

/// The type of a new VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The type under test.
    Tested,
    /// The default type.
    Default,
    /// A literal number.
    Raw(Hex),
}

/// What of a VM is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    All,
    VmFd,
    Vcpu,
}

/// Arguments of KVM_SET_USER_MEMORY_REGION and its second version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) v1: bool,
    pub(crate) slot: Hex,
    pub(crate) flags: Hex,
    pub(crate) gpa: Hex,
    pub(crate) size: Hex,
    pub(crate) hva: Hva,
    pub(crate) fd: FdRef,
    pub(crate) offset: Hex,
    pub(crate) pad: u32,
}

/// A system call on a guest_memfd descriptor, other than the ones that have an operation of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileCall {
    Fstat,
    Statx,
    Read(usize),
    Write(usize),
    Pread,
    Pwrite,
    Readv,
    Writev,
    Preadv,
    Pwritev,
    Lseek(i32),
    Ftruncate(Hex),
    Fsync,
    Fdatasync,
    Fchmod,
    Futimens,
    GetFd,
    GetFl,
    ReOpen,
    Name,
    Ioctl(Hex),
    Poll,
    SendfileFrom,
    SendfileTo,
    SpliceFrom,
    SpliceTo,
    CopyRangeFrom,
    CopyRangeTo,
    GetSeals,
    AddSeals,
}

/// How a descriptor is duplicated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DupHow {
    Dup,
    DupFd,
    DupFdCloexec,
    Dup3,
}

/// One act of the guest; `alias` uses the window's second mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Load { gpa: Hex, log2: u64, alias: bool },
    Store { gpa: Hex, log2: u64, value: Hex, alias: bool },
    Xadd { gpa: Hex, value: Hex, alias: bool },
    Fill { gpa: Hex, words: u64, value: Hex },
    Copy { from: Hex, to: Hex, words: u64 },
    Sum { gpa: Hex, words: u64 },
    Fetch { gpa: Hex },
    Hypercall { gpa: Hex, pages: Hex, attributes: Hex, answer: Option<Hex> },
}

/// What the client does about a memory fault before it runs the vCPU again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resolve {
    /// Abandon the access.
    Reset,
    /// Give the page the attribute that the access did not expect.
    Flip,
    /// Run twice more without doing anything, then as `Flip`.
    Again,
    /// Delete the slot and create it again with another file.
    Rebind(usize),
}

/// A call whose argument points nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    CreateGmem,
    Region,
    Region2,
    Attributes,
    PreFault,
}

/// How host memory is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Discard {
    DontNeed,
    Remove,
    Free,
}

/// What a forked child does with what it inherited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Child {
    Attributes,
    CreateGmem,
    Allocate,
    Punch,
    Fstat,
    Run,
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    VmCreate { vm: usize, kind: Kind, hypercalls: bool },
    VmClose { vm: usize, part: Part },
    Capability { scope: FdRef, cap: u32 },
    EnableHypercalls { vm: usize, bits: Hex },
    FileCreate { vm: usize, file: usize, size: Hex, flags: Hex, reserved: u64 },
    FileClose { file: usize },
    FileDup { from: usize, to: usize, how: DupHow },
    FileCall { file: usize, call: FileCall },
    Fallocate { file: usize, mode: Hex, offset: Hex, len: Hex },
    FileMap { map: usize, file: usize, offset: Hex, len: Hex, shared: bool, write: bool },
    FileUnmap { map: usize },
    MapRead { map: usize, offset: Hex },
    MapWrite { map: usize, offset: Hex, value: u8 },
    MapTouch { map: usize, offset: Hex },
    SlotSet { vm: usize, slot: Slot },
    SlotDelete { vm: usize, slot: Slot },
    DirtyLog { vm: usize, slot: u32 },
    Attributes { vm: usize, gpa: Hex, size: Hex, attributes: Hex, flags: Hex },
    PreFault { vm: usize, gpa: Hex, size: Hex, flags: Hex, padding: u64 },
    BadPointer { vm: usize, call: Bad },
    Guest { vm: usize, act: Act, resolve: Resolve },
    HostRead { vm: usize, area: Area, offset: Hex, len: u64 },
    HostWrite { vm: usize, area: Area, offset: Hex, len: u64, value: u8 },
    HostDiscard { vm: usize, area: Area, offset: Hex, len: Hex, how: Discard },
    Fork { vm: usize, file: usize, child: Child },
}
