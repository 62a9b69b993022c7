//! The client's side of a sequence: what exists, and one function per operation that performs it and says what happened.

mod file;
mod guest;
mod host;
mod vm;

use std::collections::{BTreeMap, BTreeSet};

use crate::machine::{Kvm, Machine, Vcpu};
use crate::ops::{FILES, FdRef, Kind, MAPS, Op, VMS};
use crate::sys::{self, Sys};
use crate::transcript::result;

/// Everything that the operations name.
pub(crate) struct World {
    kvm: Kvm,
    tested: u64,
    vms: [Option<Vm>; VMS],
    files: [i32; FILES],
    maps: [Option<FileMapping>; MAPS],
    memfd: i32,
}

/// A VM with its vCPU and host memory; either descriptor may be closed before the other.
struct Vm {
    vcpu: Option<Vcpu>,
    machine: Machine,
    areas: Vec<host::HostArea>,
    shadow: Shadow,
}

/// What this client knows of its own successful calls. It decides which guest accesses make sense, never what is right.
#[derive(Default)]
struct Shadow {
    slots: BTreeMap<u32, SlotShadow>,
    /// Page numbers with the PRIVATE attribute.
    private: BTreeSet<u64>,
    /// Pages that were accessed while they were shared and had no slot.
    mmio: BTreeSet<u64>,
    /// Slots changed and the vCPU has not run since.
    unsettled: bool,
}

#[derive(Clone)]
struct SlotShadow {
    region: sys::Region2,
    area: Option<(usize, u64)>,
    mappable: bool,
    written: BTreeSet<u64>,
}

impl SlotShadow {
    fn has(&self, flag: u32) -> bool {
        self.region.flags & flag != 0
    }

    fn contains(&self, gpa: u64) -> bool {
        gpa >= self.region.gpa && gpa - self.region.gpa < self.region.size
    }
}

impl Shadow {
    fn slot_at(&self, gpa: u64) -> Option<(u32, &SlotShadow)> {
        self.slots.iter().find(|(id, slot)| **id < 1 << 16 && slot.contains(gpa)).map(|(id, slot)| (*id, slot))
    }

    fn is_private(&self, gpa: u64) -> bool {
        self.private.contains(&(gpa / crate::agent::PAGE))
    }
}

struct FileMapping {
    at: usize,
    len: usize,
    write: bool,
}

impl World {
    /// An empty world; `tested` is the type that [`Kind::Tested`] stands for.
    pub(crate) fn new(tested: Option<u64>) -> Sys<Self> {
        let kvm = Kvm::open()?;
        let tested = tested.unwrap_or_else(|| kvm.best_type());
        let memfd = sys::memfd(1 << 20)?;
        Ok(Self { kvm, tested, vms: Default::default(), files: [-1; FILES], maps: Default::default(), memfd })
    }

    /// Performs an operation and describes what happened.
    pub(crate) fn perform(&mut self, op: Op) -> String {
        match op {
            Op::VmCreate { vm, kind, hypercalls } => self.vm_create(vm, kind, hypercalls),
            Op::VmClose { vm, part } => self.vm_close(vm, part),
            Op::Capability { scope, cap } => {
                result(sys::ioctl_value(self.fd(scope), sys::KVM_CHECK_EXTENSION, u64::from(cap)))
            }
            Op::EnableHypercalls { vm, bits } => result(Machine::enable_hypercalls(self.vm_fd(vm), bits.0)),
            Op::FileCreate { vm, file, size, flags, reserved } => self.file_create(vm, file, size.0, flags.0, reserved),
            Op::FileClose { file } => self.file_close(file),
            Op::FileDup { from, to, how } => self.file_dup(from, to, how),
            Op::FileCall { file, call } => self.file_call(self.files[file], call),
            Op::Fallocate { file, mode, offset, len } => self.fallocate(file, mode.0, offset.0, len.0),
            Op::FileMap { map, file, offset, len, shared, write } => {
                self.file_map(map, self.files[file], (offset.0, len.0), shared, write)
            }
            Op::FileUnmap { map } => self.file_unmap(map),
            Op::MapRead { map, offset } => self.map_read(map, offset.0),
            Op::MapWrite { map, offset, value } => self.map_write(map, offset.0, value),
            Op::MapTouch { map, offset } => self.map_touch(map, offset.0),
            Op::SlotSet { vm, slot } | Op::SlotDelete { vm, slot } => self.slot_set(vm, slot),
            Op::DirtyLog { vm, slot } => self.dirty_log(vm, slot),
            Op::Attributes { vm, gpa, size, attributes, flags } => {
                result(self.attributes(vm, gpa.0, size.0, attributes.0, flags.0))
            }
            Op::PreFault { vm, gpa, size, flags, padding } => self.prefault(vm, gpa.0, size.0, flags.0, padding),
            Op::BadPointer { vm, call } => self.bad_pointer(vm, call),
            Op::Guest { vm, act, resolve } => self.guest(vm, act, resolve),
            Op::HostRead { vm, area, offset, len } => self.host_read(vm, area, offset.0, len),
            Op::HostWrite { vm, area, offset, len, value } => self.host_write(vm, area, offset.0, len, value),
            Op::HostDiscard { vm, area, offset, len, how } => self.host_discard(vm, area, offset.0, len.0, how),
            Op::Fork { vm, file, child } => self.fork(vm, file, child),
        }
    }

    fn vm_fd(&self, vm: usize) -> i32 {
        self.vms[vm].as_ref().map_or(-1, |vm| vm.machine.fd)
    }

    fn vcpu_fd(&self, vm: usize) -> i32 {
        self.vms[vm].as_ref().and_then(|vm| vm.vcpu.as_ref()).map_or(-1, |vcpu| vcpu.fd)
    }

    fn fd(&self, of: FdRef) -> i32 {
        match of {
            FdRef::File(file) => self.files[file],
            FdRef::Vm(vm) => self.vm_fd(vm),
            FdRef::Kvm => self.kvm.fd,
            FdRef::Memfd => self.memfd,
            FdRef::None => -1,
        }
    }

    fn type_of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Tested => self.tested,
            Kind::Default => sys::VM_TYPE_DEFAULT,
            Kind::Raw(number) => number.0,
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for map in 0..MAPS {
            self.file_unmap(map);
        }
        for fd in self.files.into_iter().filter(|fd| *fd != -1).chain([self.memfd]) {
            let _ = sys::close(fd);
        }
    }
}
