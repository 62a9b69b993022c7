//! `KVM_CHECK_EXTENSION`, system and VM scope.

use gmem_core::Vm;
use gmem_core::file::FileFlags;

use crate::abi::{ATTRIBUTE_PRIVATE, cap};
use crate::profile::Profile;

fn number(bits: u64) -> i32 {
    i32::try_from(bits).unwrap_or(i32::MAX)
}

fn file_flags(profile: &Profile, flags: FileFlags) -> i32 {
    if profile.reports_file_flags { number(flags.bits()) } else { 0 }
}

/// What the system descriptor answers, or `None` where the host's answer stands. `types` is the mask of all VM types.
pub(crate) fn of_system(profile: &Profile, types: u32, capability: u32) -> Option<i32> {
    Some(match capability {
        cap::VM_TYPES => number(u64::from(types)),
        cap::MEMORY_ATTRIBUTES => number(ATTRIBUTE_PRIVATE),
        cap::GUEST_MEMFD_FLAGS => file_flags(profile, profile.file_flags),
        cap::GUEST_MEMFD | cap::PRE_FAULT_MEMORY | cap::USER_MEMORY2 | cap::MEMORY_FAULT_INFO => 1,
        _ => return None,
    })
}

/// What the descriptor of an emulated VM answers.
pub(crate) fn of_vm(profile: &Profile, vm: &Vm, types: u32, capability: u32) -> Option<i32> {
    let private = vm.has_private_memory();
    Some(match capability {
        cap::MEMORY_ATTRIBUTES if !private => 0,
        cap::GUEST_MEMFD => i32::from(private || vm.rules.files_without_private_memory),
        cap::GUEST_MEMFD_FLAGS => file_flags(profile, vm.file_flags(profile.file_flags)),
        cap::MULTI_ADDRESS_SPACE if private => i32::from(vm.address_spaces()),
        _ => return of_system(profile, types, capability),
    })
}
