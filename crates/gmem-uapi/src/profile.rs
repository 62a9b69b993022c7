//! What differs between kernels, as data.
//!
//! A behaviour that is not the same everywhere is a field here and never an `if` on a name in the code.

use gmem_core::file::FileFlags;
use gmem_core::vm::{FileFilter, Rules};
use rustix::io::Errno;

/// A kernel's behaviour.
#[derive(Debug)]
pub struct Profile {
    /// As given to `--profile`.
    pub name: &'static str,
    /// Whose behaviour it is.
    pub about: &'static str,
    /// The oldest release, as (major, minor), that behaves like this.
    pub since: (u32, u32),
    /// What `/proc/self/fd` says of a guest_memfd.
    pub file_name: &'static str,
    /// Whether a guest_memfd answers FIONREAD and FIOQSIZE, as regular files do.
    pub answers_size_ioctls: bool,
    /// Whether guest_memfds are on a mount that nothing can be executed from.
    pub noexec: bool,
    /// Flags of `KVM_CREATE_GUEST_MEMFD`.
    pub file_flags: FileFlags,
    /// Whether `KVM_CAP_GUEST_MEMFD_FLAGS` exists.
    pub reports_file_flags: bool,
    /// Errno when file pages are bound already.
    pub pages_bound: Errno,
    /// What differs inside the subsystem.
    pub rules: Rules,
}

/// All profiles, oldest first.
pub static PROFILES: [Profile; 3] = [
    Profile {
        name: "linux-6.12",
        about: "Linux 6.12 with its stable fixes, as in Debian 13",
        since: (0, 0),
        file_name: "anon_inode:[kvm-gmem]",
        answers_size_ioctls: true,
        noexec: false,
        file_flags: FileFlags::empty(),
        reports_file_flags: false,
        pages_bound: Errno::INVAL,
        rules: Rules {
            file_filter: FileFilter::Private,
            populate_once: true,
            populate_keeps_lock: true,
            prefault_reports_dying_slot: false,
            files_without_private_memory: false,
            binds_last: false,
            ..Rules::NEWEST
        },
    },
    Profile {
        name: "linux-6.18",
        about: "Linux 6.18: mappable files, files on every VM",
        since: (6, 18),
        file_name: "anon_inode:[kvm-gmem]",
        answers_size_ioctls: false,
        noexec: true,
        file_flags: FileFlags::MMAP.union(FileFlags::INIT_SHARED),
        reports_file_flags: true,
        pages_bound: Errno::INVAL,
        rules: Rules {
            populate_once: true,
            populate_keeps_lock: true,
            signed_offsets: true,
            binds_last: false,
            ..Rules::NEWEST
        },
    },
    Profile {
        name: "linux-7.3",
        about: "Linux 7.0 and later: as 6.18, with EEXIST for file pages that are bound already",
        since: (7, 0),
        file_name: "/[kvm-gmem] (deleted)",
        answers_size_ioctls: false,
        noexec: true,
        file_flags: FileFlags::MMAP.union(FileFlags::INIT_SHARED),
        reports_file_flags: true,
        pages_bound: Errno::EXIST,
        rules: Rules::NEWEST,
    },
];

/// The profile with this name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static Profile> {
    PROFILES.iter().find(|profile| profile.name == name)
}

/// The profile that comes nearest to a kernel release such as `6.12.117+deb13-amd64`.
#[must_use]
pub fn of_release(release: &str) -> &'static Profile {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    PROFILES.iter().rev().find(|profile| profile.since <= version).unwrap_or(&PROFILES[0])
}

#[cfg(test)]
mod tests {
    use gmem_core::addr::PAGE_SIZE;
    use gmem_core::arch::Arch;
    use gmem_core::ops::{self, Action, Claim, FileClaim, SetRegion, check_claim};
    use gmem_core::vm::Vm;

    use super::*;
    use crate::errno;

    #[test]
    fn a_release_gets_the_newest_profile_that_is_not_newer() {
        for (release, name) in [
            ("6.1.0-44-amd64", "linux-6.12"),
            ("6.12.117+deb13-amd64", "linux-6.12"),
            ("6.18.44", "linux-6.18"),
            ("7.3.4-1", "linux-7.3"),
            ("nonsense", "linux-6.12"),
        ] {
            assert_eq!(of_release(release).name, name, "{release}");
        }
    }

    const SLOT: Claim = Claim {
        slot: 1,
        flags: 1 << 2,
        guest_phys_addr: 1 << 30,
        memory_size: PAGE_SIZE,
        userspace_addr: 0,
        file: FileClaim::BadDescriptor,
        guest_memfd_offset: 0,
    };

    /// What `KVM_SET_USER_MEMORY_REGION2` returns in a VM with a file of two pages, of which slot 0 has the first.
    fn region(profile: &Profile, spoil: impl Fn(&mut Claim)) -> Result<(), Errno> {
        let mut vm = Vm::new(Arch::SwProtected, Rules { frames_end: 1 << 34, ..profile.rules });
        let id = vm.create_file(2 * PAGE_SIZE, 0, profile.file_flags).expect("two pages");
        let good = Claim { file: FileClaim::File(id), ..SLOT };
        let first = Claim { slot: 0, guest_phys_addr: 0, ..good };
        ops::run(&mut SetRegion::new(first), &mut vm, |_, _, _: Action| {}).expect("valid");
        let mut claim = Claim { guest_memfd_offset: PAGE_SIZE, ..good };
        spoil(&mut claim);
        check_claim(&vm, &claim).map_err(|error| errno::region(profile, error))
    }

    /// The order of the profiles is that of the columns: `kvm_gmem_bind()` of 6.12.117 and 6.18, and what 7.3 made of it.
    #[test]
    fn offsets_and_bound_pages_by_profile() {
        const BEYOND: u64 = 1 << 46;
        const LAST: u64 = (1 << 63) - PAGE_SIZE;
        let (inval, exist) = (Err(Errno::INVAL), Err(Errno::EXIST));
        let of_all = |spoil: fn(&mut Claim)| [0, 1, 2].map(|at| region(&PROFILES[at], spoil));
        assert_eq!(of_all(|_| ()), [Ok(()); 3]);
        assert_eq!(of_all(|claim| claim.guest_memfd_offset = 2 * PAGE_SIZE), [inval; 3], "past the end");
        assert_eq!(of_all(|claim| claim.guest_memfd_offset = LAST), [inval, Ok(()), inval], "wraps in 64 signed bits");
        assert_eq!(
            of_all(|claim| claim.guest_memfd_offset = LAST - PAGE_SIZE),
            [inval; 3],
            "the largest that does not"
        );
        assert_eq!(of_all(|claim| claim.guest_memfd_offset = 1 << 63), [inval; 3], "a negative offset");
        assert_eq!(
            of_all(|claim| claim.guest_memfd_offset = u64::MAX - 0xfff),
            [inval; 3],
            "wraps in 64 unsigned bits"
        );
        assert_eq!(of_all(|claim| claim.guest_memfd_offset = 0), [inval, inval, exist], "bound already");
        assert_eq!(of_all(|claim| claim.guest_phys_addr = BEYOND), [inval; 3]);
        let both = of_all(|claim| (claim.guest_memfd_offset, claim.guest_phys_addr) = (0, BEYOND));
        assert_eq!(both, [inval; 3], "7.3 looks at the bindings last");
    }
}
