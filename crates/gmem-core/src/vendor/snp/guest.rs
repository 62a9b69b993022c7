//! What the hardware checks when a guest or the host touches memory, and the guest's instructions on the table.
//!
//! Sources: AMD64 APM volume 2, tables 15-39 and 15-40; Microsoft's description of `__pvalidate`; coconut-svsm
//! `kernel/src/sev/utils.rs`; Linux `arch/x86/include/asm/sev.h`.

use bitflags::bitflags;

use super::rmp::{Asid, Entry, EntryBits, Permissions, Rmp, RmpError, RmpSize};
use crate::addr::{Gfn, Level, PageNumber, Pfn, PfnRange};
use crate::runs::Span;

/// A virtual machine privilege level, 0 to 3; 0 is the most privileged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Vmpl(u8);

impl Vmpl {
    /// The most privileged level.
    pub const MOST: Self = Self(0);

    /// The level with this number, if there is one.
    #[must_use]
    pub const fn new(level: u8) -> Option<Self> {
        if level < 4 { Some(Self(level)) } else { None }
    }

    fn of(self, entry: &Entry) -> Permissions {
        entry.permissions.get(usize::from(self.0)).copied().unwrap_or(Permissions::empty())
    }
}

bitflags! {
    /// Bits that SNP adds to EXITINFO1 of a nested page fault.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    pub struct Npf: u64 {
        /// The reverse map refused the access.
        const RMP = 1 << 31;
        /// The guest's C-bit was set.
        const ENC = 1 << 34;
        /// Nested mapping, request and entry differ in size.
        const SIZEM = 1 << 35;
        /// The VMPL has no permission.
        const VMPL = 1 << 36;
    }
}

/// Error code of the #VC that a guest takes for a page it has not validated.
pub const VC_NOT_VALIDATED: u32 = 0x404;

/// Why an access or a guest instruction did not complete and EAX was not written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// The guest exits with a nested page fault.
    Nested(Npf),
    /// The guest takes #VC with [`VC_NOT_VALIDATED`].
    NotValidated,
}

/// A guest page as the nested page table translates it for one instruction.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Translation {
    /// Guest page.
    pub gfn: Gfn,
    /// Host page.
    pub pfn: Pfn,
    /// Size of the nested mapping.
    pub nested: Level,
}

/// The guest that executes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Caller {
    /// Its address space.
    pub asid: Asid,
    /// Its privilege level.
    pub vmpl: Vmpl,
}

impl Caller {
    /// A guest at VMPL0.
    #[must_use]
    pub const fn vmpl0(asid: Asid) -> Self {
        Self { asid, vmpl: Vmpl::MOST }
    }
}

/// Why PVALIDATE changed nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum GuestError {
    /// The instruction completed with this code in EAX.
    Code(RmpError),
    /// The instruction did not complete.
    Fault(Fault),
}

impl From<RmpError> for GuestError {
    fn from(code: RmpError) -> Self {
        Self::Code(code)
    }
}

impl From<Fault> for GuestError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Why VMRUN did not enter the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum VmrunError {
    /// #GP(0) in the host: the VMCB is not the host's page, or in use.
    GeneralProtection,
    /// The guest exits at once with VMEXIT_INVALID: the VMSA is not the guest's, not marked, or in use.
    Invalid,
}

/// What PVALIDATE did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Pvalidated {
    /// EAX 0, CF 0.
    Changed,
    /// EAX 0, CF 1: the page was in the wanted state already, which to a careful guest means that the host cheats.
    Unchanged,
}

/// The state that PVALIDATE gives a page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Validation {
    /// EDX 1: accept the page.
    Validate,
    /// EDX 0: give it back.
    Rescind,
}

/// Operands of RMPADJUST.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RmpAdjust {
    /// The level whose permissions change.
    pub target: Vmpl,
    /// Its new permissions.
    pub permissions: Permissions,
    /// Whether the page becomes a VMSA.
    pub vmsa: bool,
}

/// A data access or instruction fetch by a guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// The permission that the access needs.
    pub needs: Permissions,
    /// The C-bit of the guest's mapping; page walks and fetches always are encrypted accesses.
    pub encrypted: bool,
}

impl Rmp {
    /// A guest's access to memory that has a nested mapping.
    ///
    /// # Errors
    /// [`Fault::Nested`] with RMP, and SIZEM where the nested mapping and the entry differ in size; then
    /// [`Fault::NotValidated`]; then [`Fault::Nested`] with VMPL. An access without the C-bit faults only when it
    /// writes to a page that is not the host's.
    pub fn guest_access(&self, guest: Caller, at: Translation, access: Access) -> Result<(), Fault> {
        if !access.encrypted {
            return self.shared_access(at.pfn, access.needs);
        }
        let entry = owned(self.entry(at.pfn), guest, at)?;
        if !sizes_agree(at.nested, entry.size()) {
            return Err(Fault::Nested(Npf::RMP | Npf::ENC | Npf::SIZEM));
        }
        if !entry.bits.contains(EntryBits::VALIDATED) {
            return Err(Fault::NotValidated);
        }
        if guest.vmpl.of(&entry).contains(access.needs) {
            return Ok(());
        }
        Err(Fault::Nested(Npf::RMP | Npf::ENC | Npf::VMPL))
    }

    fn shared_access(&self, pfn: Pfn, needs: Permissions) -> Result<(), Fault> {
        let writes = needs.contains(Permissions::WRITE);
        if writes && !self.hypervisor_owned(PfnRange::page(pfn)) { Err(Fault::Nested(Npf::RMP)) } else { Ok(()) }
    }

    /// A host write through a mapping of `level`: every page under the mapping has to be the host's. Reads never
    /// fault.
    ///
    /// # Errors
    /// #PF with error code bit 31.
    pub fn host_write(&self, pfn: Pfn, level: Level) -> Result<(), Npf> {
        let range = PfnRange::with_len(pfn.align_down(level), level.pages()).unwrap_or_else(|| PfnRange::page(pfn));
        if self.hypervisor_owned(range) { Ok(()) } else { Err(Npf::RMP) }
    }

    /// PVALIDATE.
    ///
    /// Choice: above VMPL0 it answers [`RmpError::Permission`], as VeriSMo has it; AMD's manual speaks of a fault.
    /// Choice: rescinding takes the VMSA bit away, because the firmware knows no unvalidated VMSA.
    ///
    /// # Errors
    /// In this order: [`RmpError::Input`], [`RmpError::Permission`], [`Fault::Nested`] with RMP,
    /// [`RmpError::SizeMismatch`] for a 2 MiB request to a 4 KiB entry, [`Fault::Nested`] with SIZEM for a 4 KiB request
    /// to a 2 MiB entry or for a nested mapping of another size than the request.
    pub fn pvalidate(
        &mut self,
        guest: Caller,
        at: Translation,
        size: RmpSize,
        to: Validation,
    ) -> Result<Pvalidated, GuestError> {
        check_operands(at, size, guest.vmpl == Vmpl::MOST)?;
        let page = self.page(at.pfn, size);
        let entry = operand(&page, guest, at, size)?;
        let wanted = to == Validation::Validate;
        if entry.bits.contains(EntryBits::VALIDATED) == wanted {
            return Ok(Pvalidated::Unchanged);
        }
        let bits = match to {
            Validation::Validate => entry.bits | EntryBits::VALIDATED,
            Validation::Rescind => entry.bits - (EntryBits::VALIDATED | EntryBits::VMSA),
        };
        page.insert(Entry { bits, ..entry });
        Ok(Pvalidated::Changed)
    }

    /// RMPADJUST.
    ///
    /// Choice: only VMPL0 may make a VMSA, and of a 4 KiB page only. Setting permissions leaves the VMSA bit as
    /// the operand says.
    ///
    /// # Errors
    /// In this order: [`RmpError::Input`], [`RmpError::Permission`] when the target level is not less privileged than the caller,
    /// the faults and size errors of [`Rmp::pvalidate`], [`Fault::NotValidated`], [`RmpError::Permission`] when the
    /// caller grants what it does not have.
    pub fn rmpadjust(
        &mut self,
        guest: Caller,
        at: Translation,
        size: RmpSize,
        adjust: RmpAdjust,
    ) -> Result<(), GuestError> {
        let may = adjust.target > guest.vmpl && (!adjust.vmsa || guest.vmpl == Vmpl::MOST);
        if adjust.vmsa && size == RmpSize::Page2M {
            return Err(RmpError::Input.into());
        }
        check_operands(at, size, may)?;
        let page = self.page(at.pfn, size);
        let mut entry = operand(&page, guest, at, size)?;
        if !entry.bits.contains(EntryBits::VALIDATED) {
            return Err(Fault::NotValidated.into());
        }
        if !guest.vmpl.of(&entry).contains(adjust.permissions) {
            return Err(RmpError::Permission.into());
        }
        entry.bits.set(EntryBits::VMSA, adjust.vmsa);
        if let Some(permissions) = entry.permissions.get_mut(usize::from(adjust.target.0)) {
            *permissions = adjust.permissions;
        }
        page.insert(entry);
        Ok(())
    }

    /// RMPQUERY: the permissions that a less privileged level has.
    ///
    /// # Errors
    /// [`RmpError::Permission`] when `target` is not less privileged than the caller; the faults of a guest access.
    pub fn rmpquery(&self, guest: Caller, at: Translation, target: Vmpl) -> Result<Permissions, GuestError> {
        if target <= guest.vmpl {
            return Err(RmpError::Permission.into());
        }
        Ok(target.of(&owned(self.entry(at.pfn), guest, at)?))
    }

    /// RMPREAD, executed by the host: the architectural view of an entry.
    ///
    /// # Errors
    /// [`RmpError::Input`] outside the table.
    pub fn rmpread(&self, pfn: Pfn) -> Result<Option<Entry>, RmpError> {
        if self.covered().contains(pfn) { Ok(self.entry(pfn)) } else { Err(RmpError::Input) }
    }

    /// VMRUN of an SNP guest: the VMCB has to be the host's, the VMSA the guest's and marked, and neither in use (table 15-39).
    /// Success locks both until [`Rmp::vmexit`], so that RMPUPDATE of either answers [`RmpError::InUse`]. Choice: the VMCB is
    /// checked first, because it names the VMSA.
    ///
    /// # Errors
    /// [`VmrunError`]; nothing changes.
    pub fn vmrun(&mut self, vmcb: Pfn, asid: Asid, vmsa: Pfn) -> Result<(), VmrunError> {
        if !self.hypervisor_owned(PfnRange::page(vmcb)) || self.is_locked(vmcb) {
            return Err(VmrunError::GeneralProtection);
        }
        self.enter(asid, vmsa).map_err(|_| VmrunError::Invalid)?;
        self.lock(vmcb);
        Ok(())
    }

    /// The end of what [`Rmp::vmrun`] began.
    pub fn vmexit(&mut self, vmcb: Pfn, vmsa: Pfn) {
        self.unlock(vmcb);
        self.unlock(vmsa);
    }

    /// VMRUN's check of a VMSA: the guest's, marked, not running elsewhere. Success locks it.
    ///
    /// # Errors
    /// [`RmpError::Permission`] for VMEXIT_INVALID; [`RmpError::InUse`] when it is running.
    pub fn enter(&mut self, asid: Asid, vmsa: Pfn) -> Result<(), RmpError> {
        let usable = |entry: &Entry| entry.assigned() && entry.asid == asid && entry.bits.contains(EntryBits::VMSA);
        self.entry(vmsa).filter(usable).filter(|_| asid != Asid::HOST).ok_or(RmpError::Permission)?;
        if self.is_locked(vmsa) {
            return Err(RmpError::InUse);
        }
        self.lock(vmsa);
        Ok(())
    }
}

/// The checks of table 15-39 before Validated, in order: covered, owned by the guest, the guest's address, mutable.
fn owned(entry: Option<Entry>, guest: Caller, at: Translation) -> Result<Entry, Fault> {
    let refuse = Fault::Nested(Npf::RMP | Npf::ENC);
    let entry = entry.filter(Entry::assigned).ok_or(refuse)?;
    let owned = entry.asid == guest.asid && guest.asid != Asid::HOST;
    let matches = entry.gfn == at.gfn && !entry.bits.contains(EntryBits::IMMUTABLE);
    if owned && matches { Ok(entry) } else { Err(refuse) }
}

/// What PVALIDATE and RMPADJUST check first: the address, and whether the caller is `permitted`.
fn check_operands(at: Translation, size: RmpSize, permitted: bool) -> Result<(), RmpError> {
    match (size.aligned(at.gfn.0), permitted) {
        (false, _) => Err(RmpError::Input),
        (true, false) => Err(RmpError::Permission),
        (true, true) => Ok(()),
    }
}

/// What they check then: ownership, and size. The entry begins with the page, because guest and host address of a 2 MiB entry
/// are aligned alike.
fn operand(page: &Span<'_, Entry>, guest: Caller, at: Translation, size: RmpSize) -> Result<Entry, GuestError> {
    let entry = owned(page.first(), guest, at)?;
    match (size, entry.size()) {
        (RmpSize::Page2M, RmpSize::Page4K) => Err(RmpError::SizeMismatch.into()),
        (_, of) if of == size && sizes_agree(at.nested, of) => Ok(entry),
        _ => Err(Fault::Nested(Npf::RMP | Npf::ENC | Npf::SIZEM).into()),
    }
}

/// Table 15-40: the nested mapping and the entry have to be of one size. A nested 1 GiB mapping counts as 2 MiB, which is
/// the largest size that the table knows.
fn sizes_agree(nested: Level, entry: RmpSize) -> bool {
    (nested == Level::Page4K) == (entry == RmpSize::Page4K)
}
