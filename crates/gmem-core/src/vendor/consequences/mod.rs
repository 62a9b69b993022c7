//! What happens to a guest's memory, asked of every architecture.
//!
//! A [`scenario`] builds a VM, lets its guest use one page, and then does to that page what the [`Event`] says. The VM is the
//! core's own [`Vm`](crate::vm::Vm): every change is one of the [operations](crate::ops) that also serve clients and the
//! explorer, and every answer is that of an architecture's model behind [`Arch`]. The [`Consequence`] is what came of it;
//! nothing in it is looked up. The questions are those under which guest_memfd was designed: whether a hole that is punched
//! under a guest costs it the bytes or its life, and whether a mere change of the VMM's mappings may do so.
//!
//! What stands around the core is in `machine`: a stage-2 table of one page and a vCPU. The guest is a careful one: it
//! accepts a page before it first touches it, and it does not accept a page again by itself, because a page that has to be
//! accepted twice has lost what the guest wrote.

mod machine;
#[cfg(test)]
mod tests;

use self::machine::{Machine, Seen};
use super::sev::SevKind;
use super::{
    AccessKind, Cause, ExitReason, GuestException, GuestOutcome, HostOutcome, PopulateKind, Refusal, Side, Status, cca,
};
use crate::addr::Level;
use crate::arch::Arch;

/// The columns of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Architecture {
    /// An ordinary VM.
    Default,
    /// SW_PROTECTED_VM.
    SwProtected,
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX, with Linux's choice of TD exits.
    Tdx,
    /// Arm CCA.
    Cca,
    /// Protected KVM.
    Pkvm,
}

impl Architecture {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 8] =
        [Self::Default, Self::SwProtected, Self::Sev, Self::SevEs, Self::Snp, Self::Tdx, Self::Cca, Self::Pkvm];

    /// The name that commands use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::SwProtected => "sw-protected",
            Self::Sev => "sev",
            Self::SevEs => "sev-es",
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Cca => "cca",
            Self::Pkvm => "pkvm",
        }
    }

    /// A VM of this architecture before its launch ends.
    fn arch(self) -> Option<Arch> {
        Some(match self {
            Self::Default => Arch::Default,
            Self::SwProtected => Arch::SwProtected,
            Self::Sev => Arch::sev(SevKind::Sev),
            Self::SevEs => Arch::sev(SevKind::SevEs),
            Self::Snp => Arch::snp(),
            Self::Tdx => Arch::tdx(),
            Self::Cca => Arch::cca(&cca::Config::default()).ok()?,
            Self::Pkvm => Arch::pkvm(),
        })
    }
}

/// The rows of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Event {
    /// A hole is punched where the guest has a page in use; then the guest reads it.
    Punch,
    /// The VMM's own mapping of the same range changes; then the guest reads its page.
    UserMappingChange,
    /// The guest writes with a private address to a page that is shared.
    PrivateAccess,
    /// The guest writes with a shared address to a page that is private.
    SharedAccess,
    /// The mapping of a page in use is zapped and the page stays in its file: the slot is deleted and created again. Then
    /// the guest reads it.
    Refault,
    /// A page of initial memory is populated a second time.
    PopulateTwice,
    /// One 4 KiB page of a 2 MiB page in use is punched; then the guest reads another.
    Split,
    /// The VM's and its vCPUs' descriptors are closed while its file stays open; then the host writes to the page.
    Destroy,
    /// The host writes to a page in use; then the guest reads it.
    HostWrite,
    /// A page is prefaulted before the launch has ended; then it ends and the guest reads the page.
    EarlyPrefault,
}

impl Event {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 10] = [
        Self::Punch,
        Self::UserMappingChange,
        Self::PrivateAccess,
        Self::SharedAccess,
        Self::Refault,
        Self::PopulateTwice,
        Self::Split,
        Self::Destroy,
        Self::HostWrite,
        Self::EarlyPrefault,
    ];

    /// What happens, in a few words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Punch => "punch of a page in use",
            Self::UserMappingChange => "VMA change over the same range",
            Self::PrivateAccess => "private access to a shared page",
            Self::SharedAccess => "shared access to a private page",
            Self::Refault => "zap and refault",
            Self::PopulateTwice => "populate twice",
            Self::Split => "2 MiB page split",
            Self::Destroy => "VM destroyed, file still open",
            Self::HostWrite => "host write to a page in use",
            Self::EarlyPrefault => "prefault before finalize",
        }
    }
}

/// How the guest goes on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Guest {
    /// As if nothing had happened.
    Runs,
    /// The access waits until the VMM has converted the page, and then succeeds.
    WaitsForConversion,
    /// The vCPU takes an exception; the access succeeds once the guest has accepted the page again.
    AcceptsAgain,
    /// The vCPU exits over and over without seeing anything; only another vCPU could accept the page again.
    StuckUntilAccepted,
    /// The access can never succeed.
    Stuck,
    /// The VM is dead.
    Dead,
}

/// Who learns of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Told {
    /// Nobody.
    Nobody,
    /// The guest.
    Guest(GuestException),
    /// KVM, which does not tell the VMM.
    Kvm(ExitReason),
    /// The VMM, with an errno.
    Vmm(Refusal),
    /// Whoever of the host touched the page.
    Host(HostOutcome),
}

/// One cell of the table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Consequence {
    /// Whether what the guest wrote, or what was loaded for it, is gone.
    pub lost: bool,
    /// How the guest goes on.
    pub guest: Guest,
    /// Who learns of it.
    pub told: Told,
    /// What a host read of the page finds afterwards.
    pub host: HostOutcome,
}

/// Plays `event` on a VM of `architecture`. `None` where it cannot come about: [`Event::Split`] needs 2 MiB mappings.
#[must_use]
pub fn scenario(architecture: Architecture, event: Event) -> Option<Consequence> {
    let level = if event == Event::Split { Level::Page2M } else { Level::Page4K };
    let vm = Machine::new(architecture.arch()?, level)?;
    match event {
        Event::PopulateTwice => Some(populate_twice(vm)),
        Event::EarlyPrefault => Some(early_prefault(vm)),
        Event::Split => split(vm),
        Event::PrivateAccess => Some(after(vm.launched().used().given_up(), Side::Private, AccessKind::Store)),
        Event::SharedAccess => Some(after(vm.launched().used(), Side::Shared, AccessKind::Store)),
        Event::Punch => Some(read_after(vm.launched().used(), |vm| vm.punch(0))),
        Event::UserMappingChange => Some(read_after(vm.launched().used(), Machine::change_user_mapping)),
        Event::Refault => Some(read_after(vm.launched().used(), Machine::recreate_slot)),
        Event::Destroy => Some(destroy(&vm.launched().used())),
        Event::HostWrite => Some(host_write(vm.launched().used())),
    }
}

fn read_after(mut vm: Machine, what: impl FnOnce(&mut Machine)) -> Consequence {
    what(&mut vm);
    after(vm, Side::Private, AccessKind::Load)
}

fn populate_twice(mut vm: Machine) -> Consequence {
    vm.make_private();
    let measured = vm.populate(PopulateKind::Measured);
    let kind = if measured.is_ok() { PopulateKind::Measured } else { PopulateKind::Unmeasured };
    let loaded = measured.or_else(|_| vm.populate(kind));
    let again = loaded.and_then(|()| vm.populate(kind));
    vm.launch();
    // A page that was not loaded has to be accepted like any other.
    if loaded.is_err() {
        vm.accept();
    }
    reported(vm, again)
}

fn early_prefault(mut vm: Machine) -> Consequence {
    vm.make_private();
    let prefaulted = vm.prefault();
    vm.launch();
    vm.accept();
    reported(vm, prefaulted)
}

fn split(mut vm: Machine) -> Option<Consequence> {
    vm.prepare_large();
    let vm = vm.launched().used();
    vm.has_large_mapping().then(|| read_after(vm, |vm| vm.punch(1)))
}

/// The file holds a reference on the VM (`kvm_get_kvm()`), so that nothing is torn down before it is closed, too; but nobody
/// can run the guest any more.
fn destroy(vm: &Machine) -> Consequence {
    let write = vm.clone().host_access(AccessKind::Store);
    Consequence { lost: vm.lost, guest: Guest::Dead, told: told_host(write), host: vm.host_reads() }
}

fn host_write(mut vm: Machine) -> Consequence {
    let write = vm.host_access(AccessKind::Store);
    vm.lost |= matches!(write, HostOutcome::Corrupted | HostOutcome::MachineCheck);
    let after = after(vm, Side::Private, AccessKind::Load);
    if after.told == Told::Nobody { Consequence { told: told_host(write), ..after } } else { after }
}

/// The consequence of a request of the VMM's that was answered with `answer`, and of a read by the guest after it.
fn reported(vm: Machine, answer: Result<(), Refusal>) -> Consequence {
    let after = after(vm, Side::Private, AccessKind::Load);
    answer.map_or_else(|refusal| Consequence { told: Told::Vmm(refusal), ..after }, |()| after)
}

/// The consequence of what was done before, as the guest's next access shows it.
fn after(mut vm: Machine, side: Side, kind: AccessKind) -> Consequence {
    let seen = vm.access(side, kind);
    Consequence { lost: vm.lost, guest: fate(&vm, seen, side, kind), told: told(seen), host: vm.host_reads() }
}

/// What helps: each remedy is tried on a VM of its own.
fn fate(vm: &Machine, seen: Seen, side: Side, kind: AccessKind) -> Guest {
    let then = match seen {
        _ if vm.is_dead() => return Guest::Dead,
        Seen::Done => return Guest::Runs,
        Seen::Refused(_) => return Guest::Stuck,
        Seen::MemoryFault => Guest::WaitsForConversion,
        Seen::Exception(_) => Guest::AcceptsAgain,
        Seen::Exit(_) => Guest::StuckUntilAccepted,
    };
    let mut other = vm.clone();
    other.set_attribute(side);
    if side == Side::Private {
        other.accept();
    }
    if other.access(side, kind) == Seen::Done { then } else { Guest::Stuck }
}

fn told(seen: Seen) -> Told {
    match seen {
        Seen::Done => Told::Nobody,
        Seen::Exception(exception) => Told::Guest(exception),
        // A memory-fault exit is -1 with EFAULT, and so is what KVM makes of a page that was taken by force.
        Seen::MemoryFault | Seen::Exit(ExitReason::Poisoned) => Told::Vmm(refused(Cause::Fault)),
        Seen::Exit(ExitReason::PendingTd) => Told::Vmm(refused(Cause::VmDead)),
        Seen::Exit(reason) => Told::Kvm(reason),
        Seen::Refused(refusal) => Told::Vmm(refusal),
    }
}

fn told_host(write: HostOutcome) -> Told {
    match write {
        HostOutcome::Fault | HostOutcome::MachineCheck => Told::Host(write),
        HostOutcome::Plain | HostOutcome::Ciphertext | HostOutcome::Corrupted => Told::Nobody,
    }
}

/// Refused by KVM, without the architecture.
const fn refused(cause: Cause) -> Refusal {
    Refusal { cause, status: Status::None }
}
