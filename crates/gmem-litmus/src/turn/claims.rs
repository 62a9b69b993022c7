//! What `KVM_SET_USER_MEMORY_REGION2` is asked for.

use gmem_core::Vm;
use gmem_core::addr::Gfn;
use gmem_core::file::FileId;
use gmem_core::ops::{Claim, FileClaim};
use gmem_core::slot::SlotFlags;

use crate::program::SlotDecl;

/// Pages below the VMM's first one; a multiple of 1 GiB, so that frames and addresses can be congruent.
pub(super) const USER_BASE: u64 = 1 << 26;

/// The claim that creates `slot`.
pub(crate) fn claim(slot: SlotDecl) -> Claim {
    let file = slot.file.map(|(file, _)| FileClaim::File(FileId(u32::try_from(file).unwrap_or(u32::MAX))));
    Claim {
        slot: u32::from(slot.number),
        flags: if file.is_some() { SlotFlags::GUEST_MEMFD.bits() } else { 0 },
        guest_phys_addr: slot.gfns.start().gpa(),
        memory_size: slot.gfns.len() << 12,
        userspace_addr: (USER_BASE + slot.user) << 12,
        file: file.unwrap_or(FileClaim::BadDescriptor),
        guest_memfd_offset: slot.file.map_or(0, |(_, first)| first.0 << 12),
    }
}

pub(super) fn deletion(number: u16) -> Claim {
    Claim {
        slot: u32::from(number),
        flags: 0,
        guest_phys_addr: 0,
        memory_size: 0,
        userspace_addr: 0,
        file: FileClaim::BadDescriptor,
        guest_memfd_offset: 0,
    }
}

/// The claim that moves a slot as it is now.
pub(super) fn movement(vm: &Vm, number: u16, to: Gfn) -> Claim {
    let slot = vm.slots().iter().find(|slot| slot.id.number == number && slot.id.space == 0);
    let (size, user, flags) =
        slot.map_or((0x1000, 0, 0), |slot| (slot.gfns.len() << 12, slot.userspace_addr, slot.flags.bits()));
    Claim {
        slot: u32::from(number),
        flags,
        guest_phys_addr: to.gpa(),
        memory_size: size,
        userspace_addr: user,
        file: FileClaim::BadDescriptor,
        guest_memfd_offset: 0,
    }
}

/// The VMM's page behind an address.
pub(crate) fn user_page_of(hva: u64) -> Option<u64> {
    (hva >> 12).checked_sub(USER_BASE)
}
