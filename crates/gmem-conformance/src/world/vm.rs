//! VMs, memslots, attributes, prefault: the ioctls.

use super::host::HostArea;
use super::{Shadow, SlotShadow, Vm, World};
use crate::agent::{self, PAGE, Stub, WINDOW, WINDOW_LEN};
use crate::machine::{Machine, Vcpu};
use crate::ops::{AREAS, Bad, Hva, Kind, Part, Slot};
use crate::sys::{self, DirtyLog, PreFault, Region2, Sys};
use crate::transcript::result;

/// An address at which nothing is ever mapped.
const NOWHERE: u64 = 8;

impl World {
    pub(super) fn vm_create(&mut self, vm: usize, kind: Kind, hypercalls: bool) -> String {
        self.vms[vm] = None;
        match self.vm_new(self.type_of(kind)) {
            Err(errno) => errno.to_string(),
            Ok(new) => {
                let fd = new.machine.fd;
                self.vms[vm] = Some(new);
                let enabled = hypercalls.then(|| result(Machine::enable_hypercalls(fd, 1 << 12)));
                format!("ok{}", enabled.map_or(String::new(), |r| format!(" hypercalls {r}")))
            }
        }
    }

    fn vm_new(&self, kind: u64) -> Sys<Vm> {
        let machine = Machine::new(&self.kvm, kind)?;
        let vcpu = Some(Vcpu::new(&self.kvm, machine.fd, 0)?);
        let areas = AREAS.into_iter().map(HostArea::new).collect::<Sys<_>>()?;
        Ok(Vm { machine, vcpu, areas, shadow: Shadow::default() })
    }

    pub(super) fn vm_close(&mut self, vm: usize, part: Part) -> String {
        let Some(open) = &mut self.vms[vm] else { return "absent".into() };
        match part {
            Part::All => {
                self.vms[vm] = None;
                "ok".into()
            }
            Part::VmFd => result(open.machine.close_fd()),
            Part::Vcpu => open.vcpu.take().map_or("absent".into(), |_| "ok".into()),
        }
    }

    pub(super) fn slot_set(&mut self, vm: usize, slot: Slot) -> String {
        result(self.set_region(vm, self.region(vm, slot), slot))
    }

    fn region(&self, vm: usize, slot: Slot) -> Region2 {
        Region2 {
            slot: low(slot.slot.0),
            flags: low(slot.flags.0),
            gpa: slot.gpa.0,
            size: slot.size.0,
            hva: self.hva(vm, slot.hva),
            gmem_offset: slot.offset.0,
            gmem_fd: self.fd(slot.fd).cast_unsigned(),
            pad1: slot.pad,
            pad2: [u64::from(slot.pad); 14],
        }
    }

    fn hva(&self, vm: usize, hva: Hva) -> u64 {
        match (hva, &self.vms[vm]) {
            (Hva::Raw(address), _) => address.0,
            (Hva::In(area, offset), Some(vm)) => vm.areas[area as usize].map.at as u64 + offset.0,
            (Hva::In(_, offset), None) => offset.0,
        }
    }

    fn set_region(&mut self, vm: usize, mut region: Region2, slot: Slot) -> Sys<i64> {
        let nr = if slot.v1 { sys::KVM_SET_USER_MEMORY_REGION } else { sys::KVM_SET_USER_MEMORY_REGION2 };
        let done = sys::ioctl(self.vm_fd(vm), nr, &mut region)?;
        let mappable = super::file::is_mappable(self.fd(slot.fd));
        let Some(vm) = &mut self.vms[vm] else { return Ok(done) };
        vm.shadow.unsettled = true;
        if region.size == 0 {
            vm.shadow.slots.remove(&region.slot);
        } else {
            let area = match slot.hva {
                Hva::In(area, offset) => Some((area as usize, offset.0)),
                Hva::Raw(_) => None,
            };
            let mappable = mappable && region.flags & sys::KVM_MEM_GUEST_MEMFD != 0;
            vm.shadow.slots.insert(region.slot, SlotShadow { region, area, mappable, written: Default::default() });
        }
        Ok(done)
    }

    /// Deletes the slot around a page, if there is one, and creates it again with a file: what happened, and whether there
    /// is a slot now.
    pub(super) fn rebind(&mut self, vm: usize, gpa: u64, file: usize) -> (String, bool) {
        let found = self.vms[vm].as_ref().and_then(|vm| vm.shadow.slot_at(gpa)).map(|(id, slot)| (id, slot.clone()));
        let mut steps = String::from("rebind");
        let fd = self.files[file].cast_unsigned();
        let (id, mut slot) = found.clone().unwrap_or_else(|| self.fresh_slot(vm, gpa));
        if found.is_some() {
            let mut gone = Region2 { size: 0, ..slot.region };
            let deleted = sys::ioctl(self.vm_fd(vm), sys::KVM_SET_USER_MEMORY_REGION2, &mut gone);
            steps += &format!(" delete {}", result(deleted));
        }
        slot.region = Region2 { flags: sys::KVM_MEM_GUEST_MEMFD, gmem_fd: fd, gmem_offset: 0, ..slot.region };
        let created = sys::ioctl(self.vm_fd(vm), sys::KVM_SET_USER_MEMORY_REGION2, &mut slot.region);
        slot.mappable = super::file::is_mappable(self.files[file]);
        if let Some(vm) = &mut self.vms[vm] {
            vm.shadow.unsettled = true;
            vm.shadow.slots.remove(&id);
            if created.is_ok() {
                vm.shadow.slots.insert(id, slot);
            }
        }
        steps += &format!(" create {}", result(created));
        (steps, created.is_ok())
    }

    fn fresh_slot(&self, vm: usize, gpa: u64) -> (u32, SlotShadow) {
        let gpa = gpa & !(PAGE - 1);
        let offset = gpa.saturating_sub(WINDOW);
        let hva = self.vms[vm].as_ref().map_or(0, |vm| vm.areas[0].map.at as u64 + offset);
        let region = Region2 { slot: 30, gpa, size: PAGE, hva, ..Default::default() };
        (30, SlotShadow { region, area: Some((0, offset)), mappable: false, written: Default::default() })
    }

    /// Checks that the log has what the guest wrote; the kernel may log more, and what more depends on the host's page
    /// tables, so the bits themselves are not shown.
    pub(super) fn dirty_log(&mut self, vm: usize, slot: u32) -> String {
        let mut bitmap = vec![0_u64; 1 << 14];
        let mut log = DirtyLog { slot, padding: 0, bitmap: bitmap.as_mut_ptr() as u64 };
        let known = self.vms[vm].as_ref().and_then(|vm| vm.shadow.slots.get(&slot));
        if known.is_some_and(|slot| slot.region.size / PAGE > 1 << 20) {
            return "too large for this client".into();
        }
        let outcome = sys::ioctl(self.vm_fd(vm), sys::KVM_GET_DIRTY_LOG, &mut log);
        let Some(shadow) = self.vms[vm].as_mut().and_then(|vm| vm.shadow.slots.get_mut(&slot)) else {
            return result(outcome);
        };
        if outcome.is_err() {
            return result(outcome);
        }
        let logged = |page: &u64| bitmap.get(low(page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0);
        let (written, missing) = (shadow.written.len(), shadow.written.iter().filter(|page| !logged(page)).count());
        shadow.written.clear();
        format!("{} written {written} missing {missing}", result(outcome))
    }

    pub(super) fn attributes(&mut self, vm: usize, gpa: u64, size: u64, attributes: u64, flags: u64) -> Sys<i64> {
        let mut claim = sys::Attributes { address: gpa, size, attributes, flags };
        let done = sys::ioctl(self.vm_fd(vm), sys::KVM_SET_MEMORY_ATTRIBUTES, &mut claim)?;
        if let Some(vm) = &mut self.vms[vm] {
            let (start, end) = (gpa.max(WINDOW), gpa.saturating_add(size).min(WINDOW + WINDOW_LEN));
            for gfn in start / PAGE..end / PAGE {
                if attributes & sys::KVM_MEMORY_ATTRIBUTE_PRIVATE != 0 {
                    vm.shadow.private.insert(gfn);
                } else {
                    vm.shadow.private.remove(&gfn);
                }
            }
        }
        Ok(done)
    }

    /// Lets the vCPU run once after a change of slots. A delete on a default VM makes KVM's page-table roots obsolete, and
    /// Linux 6.12 does not load new ones in KVM_PRE_FAULT_MEMORY: it would retry in the kernel until a signal comes.
    fn settle(&mut self, vm: usize) {
        let Some(vm) = &mut self.vms[vm] else { return };
        if let Some(vcpu) = vm.vcpu.as_ref().filter(|_| vm.shadow.unsettled) {
            let _ = vcpu.set_regs(&agent::entry(Stub::Load, 0));
            vcpu.run();
            vm.shadow.unsettled = false;
        }
    }

    pub(super) fn prefault(&mut self, vm: usize, gpa: u64, size: u64, flags: u64, padding: u64) -> String {
        self.settle(vm);
        let mut claim = PreFault { gpa, size, flags, padding: [padding; 5] };
        let outcome = sys::ioctl(self.vcpu_fd(vm), sys::KVM_PRE_FAULT_MEMORY, &mut claim);
        // Where it stopped for want of a slot it has left an entry for MMIO.
        self.note_mmio(vm, super::guest::pages(claim.gpa & !(PAGE - 1), 1), false);
        format!("{} left {:#x}+{:#x}", result(outcome), claim.gpa, claim.size)
    }

    pub(super) fn bad_pointer(&self, vm: usize, call: Bad) -> String {
        let (fd, nr) = match call {
            Bad::CreateGmem => (self.vm_fd(vm), sys::KVM_CREATE_GUEST_MEMFD),
            Bad::Region => (self.vm_fd(vm), sys::KVM_SET_USER_MEMORY_REGION),
            Bad::Region2 => (self.vm_fd(vm), sys::KVM_SET_USER_MEMORY_REGION2),
            Bad::Attributes => (self.vm_fd(vm), sys::KVM_SET_MEMORY_ATTRIBUTES),
            Bad::PreFault => (self.vcpu_fd(vm), sys::KVM_PRE_FAULT_MEMORY),
        };
        result(sys::ioctl_value(fd, nr, NOWHERE))
    }
}

/// The field of 32 bits that an operation's number goes into.
#[allow(
    clippy::cast_possible_truncation,
    reason = "an operation's number is any 64 bits; the field takes the low ones"
)]
fn low(number: u64) -> u32 {
    number as u32
}
