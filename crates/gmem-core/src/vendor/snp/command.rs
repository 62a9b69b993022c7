//! Every command of the model as a value, so that random tests, fuzzers and replays can apply sequences of them.

use super::firmware::{FwError, IdBlock, LaunchStart, LaunchUpdate, Loaded, Machine, POLICY_RESERVED_ONE};
use super::guest::{Access, Caller, Fault, GuestError, RmpAdjust, Translation, Validation, Vmpl};
use super::rmp::{Asid, Permissions, RmpError, RmpSize, RmpUpdate};
use crate::addr::{Gfn, Level, Pfn, PfnRange};

/// One command of a host, a guest or the firmware.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Command {
    /// [`super::rmp::Rmp::rmpupdate`].
    RmpUpdate(Pfn, RmpUpdate),
    /// [`super::rmp::Rmp::psmash`].
    Psmash(Pfn),
    /// [`super::rmp::Rmp::release`].
    Release(PfnRange),
    /// [`super::rmp::Rmp::lock`].
    Lock(Pfn),
    /// [`super::rmp::Rmp::unlock`].
    Unlock(Pfn),
    /// [`super::rmp::Rmp::enter`].
    Enter(Asid, Pfn),
    /// [`super::rmp::Rmp::pvalidate`].
    Pvalidate(Caller, Translation, RmpSize, Validation),
    /// [`super::rmp::Rmp::rmpadjust`].
    RmpAdjust(Caller, Translation, RmpSize, RmpAdjust),
    /// [`super::rmp::Rmp::guest_access`].
    GuestAccess(Caller, Translation, Access),
    /// [`super::rmp::Rmp::host_write`].
    HostWrite(Pfn, Level),
    /// [`Machine::gctx_create`].
    GctxCreate(Pfn),
    /// [`Machine::activate`].
    Activate(Pfn, Asid),
    /// [`Machine::df_flush`].
    DfFlush,
    /// [`Machine::launch_start`].
    LaunchStart(Pfn, LaunchStart),
    /// [`Machine::launch_update`] of a page of zeros.
    LaunchUpdate(Pfn, Pfn, RmpSize, u8),
    /// [`Machine::launch_finish`].
    LaunchFinish(Pfn, Option<IdBlock>),
    /// [`Machine::page_reclaim`].
    PageReclaim(Pfn, RmpSize),
    /// [`Machine::page_unsmash`].
    PageUnsmash(Pfn),
    /// [`Machine::decommission`].
    Decommission(Pfn),
    /// [`Machine::shutdown`], then [`Machine::init`] with this page fixed.
    Restart(Pfn),
}

/// Why a command was refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CommandError {
    /// An instruction answered with a code.
    Rmp(RmpError),
    /// An access or an instruction faulted.
    Fault(Fault),
    /// The host's write faulted.
    HostFault,
    /// The firmware answered with a code.
    Firmware(FwError),
}

impl From<RmpError> for CommandError {
    fn from(error: RmpError) -> Self {
        Self::Rmp(error)
    }
}

impl From<FwError> for CommandError {
    fn from(error: FwError) -> Self {
        Self::Firmware(error)
    }
}

impl From<GuestError> for CommandError {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Code(code) => Self::Rmp(code),
            GuestError::Fault(fault) => Self::Fault(fault),
        }
    }
}

impl Command {
    /// Applies the command.
    ///
    /// # Errors
    /// Whatever the command answers; a refused command has changed nothing.
    pub fn apply(self, machine: &mut Machine) -> Result<(), CommandError> {
        match self {
            Self::RmpUpdate(pfn, update) => Ok(machine.rmp.rmpupdate(pfn, update)?),
            Self::Psmash(pfn) => Ok(machine.rmp.psmash(pfn)?),
            Self::Release(range) => {
                machine.rmp.release(range);
                Ok(())
            }
            Self::Lock(pfn) => {
                machine.rmp.lock(pfn);
                Ok(())
            }
            Self::Unlock(pfn) => {
                machine.rmp.unlock(pfn);
                Ok(())
            }
            Self::Enter(asid, pfn) => Ok(machine.rmp.enter(asid, pfn)?),
            Self::Pvalidate(guest, at, size, to) => Ok(machine.rmp.pvalidate(guest, at, size, to).map(|_| ())?),
            Self::RmpAdjust(guest, at, size, adjust) => Ok(machine.rmp.rmpadjust(guest, at, size, adjust)?),
            Self::GuestAccess(guest, at, access) => {
                machine.rmp.guest_access(guest, at, access).map_err(CommandError::Fault)
            }
            Self::HostWrite(pfn, level) => machine.rmp.host_write(pfn, level).map_err(|_| CommandError::HostFault),
            firmware => Ok(firmware.apply_firmware(machine)?),
        }
    }

    fn apply_firmware(self, machine: &mut Machine) -> Result<(), FwError> {
        match self {
            Self::GctxCreate(page) => machine.gctx_create(page),
            Self::Activate(gctx, asid) => machine.activate(gctx, asid),
            Self::LaunchStart(gctx, start) => machine.launch_start(gctx, start),
            Self::LaunchUpdate(gctx, pfn, size, kind) => {
                let contents = Loaded::Bytes(&[]);
                machine.launch_update(gctx, LaunchUpdate { pfn, size, kind, imi: false, vmpl: [0; 3], contents })
            }
            Self::LaunchFinish(gctx, block) => machine.launch_finish(gctx, block),
            Self::PageReclaim(page, size) => machine.page_reclaim(page, size),
            Self::PageUnsmash(page) => machine.page_unsmash(page),
            Self::Decommission(gctx) => machine.decommission(gctx),
            Self::Restart(fixed) => {
                machine.shutdown()?;
                machine.init(&[PfnRange::page(fixed)])
            }
            _ => machine.df_flush(),
        }
    }

    /// Decodes eight bytes to a command on a small machine: 2048 pages, two guests, so that commands meet.
    ///
    /// Every input is a command; legal and illegal ones are about as likely.
    #[must_use]
    pub fn decode(bytes: [u8; 8]) -> Self {
        Raw(bytes).command()
    }
}

/// Applies a stream of commands, eight bytes each, and returns how many succeeded. The entry for a fuzzer.
pub fn run_bytes(machine: &mut Machine, bytes: &[u8], mut after: impl FnMut(&Machine)) -> usize {
    let mut done = 0;
    for chunk in bytes.chunks_exact(8) {
        let Ok(chunk) = <[u8; 8]>::try_from(chunk) else { break };
        done += usize::from(Command::decode(chunk).apply(machine).is_ok());
        after(machine);
    }
    done
}

/// Eight arbitrary bytes: command, flags, host page, guest page (two bytes each), owner and a spare.
struct Raw([u8; 8]);

impl Raw {
    const fn flag(&self, bit: u32) -> bool {
        self.0[1] >> bit & 1 != 0
    }

    const fn size(&self) -> RmpSize {
        if self.flag(0) { RmpSize::Page2M } else { RmpSize::Page4K }
    }

    /// Page numbers fall on 2 MiB boundaries, next to them, or one past the table.
    fn page(low: u8, high: u8) -> u64 {
        u64::from(high & 7) % 5 * 512 + u64::from(low % 4) * u64::from(low >> 2 & 1)
    }

    fn range(&self) -> PfnRange {
        PfnRange::page(self.pfn()).hull(PfnRange::page(Pfn(Self::page(self.0[4], self.0[5]))))
    }

    fn pfn(&self) -> Pfn {
        Pfn(Self::page(self.0[2], self.0[3]))
    }

    /// Often the number of the host page, so that a guest's address matches its entry.
    fn gfn(&self) -> Gfn {
        if self.flag(5) && self.flag(4) { Gfn(Self::page(self.0[4], self.0[5])) } else { Gfn(self.pfn().0) }
    }

    /// Mostly one guest, sometimes a second or the host.
    const fn asid(&self) -> Asid {
        match self.0[6] & 7 {
            0 => Asid::HOST,
            1 => Asid(2),
            _ => Asid(1),
        }
    }

    fn caller(&self) -> Caller {
        let vmpl = Vmpl::new(self.0[6] >> 3 & 3).filter(|_| self.flag(7) && self.flag(3)).unwrap_or_default();
        Caller { asid: self.asid(), vmpl }
    }

    fn at(&self) -> Translation {
        let nested = if self.flag(0) != (self.flag(6) && self.flag(2)) { Level::Page2M } else { Level::Page4K };
        Translation { gfn: self.gfn(), pfn: self.pfn(), nested }
    }

    /// Guest contexts live in the last pages, so that few numbers name them.
    fn gctx(&self) -> Pfn {
        Pfn(2044 + u64::from(self.0[7] & 3))
    }

    fn update(&self) -> RmpUpdate {
        RmpUpdate {
            gfn: self.gfn(),
            assigned: self.flag(1) || self.flag(2),
            immutable: self.flag(3) && self.flag(4),
            size: self.size(),
            asid: self.asid(),
        }
    }

    fn adjust(&self) -> RmpAdjust {
        let target = Vmpl::new(self.0[7] & 3).unwrap_or_default();
        RmpAdjust { target, permissions: Permissions::from_bits_truncate(self.0[7] >> 2), vmsa: self.flag(4) }
    }

    fn access(&self) -> Access {
        Access { needs: Permissions::from_bits_truncate(self.0[7]), encrypted: self.flag(4) }
    }

    fn validation(&self) -> Validation {
        if self.flag(1) { Validation::Validate } else { Validation::Rescind }
    }

    fn command(&self) -> Command {
        let pfn = self.pfn();
        match self.0[0] % 24 {
            0..5 => Command::RmpUpdate(pfn, self.update()),
            5 => Command::Psmash(pfn),
            6 => Command::Release(self.range()),
            7 if self.0[7] < 16 => Command::Lock(pfn),
            7 => Command::Unlock(pfn),
            8 => Command::Enter(self.asid(), pfn),
            9..12 => Command::Pvalidate(self.caller(), self.at(), self.size(), self.validation()),
            12 => Command::RmpAdjust(self.caller(), self.at(), self.size(), self.adjust()),
            13 => Command::GuestAccess(self.caller(), self.at(), self.access()),
            14 => Command::HostWrite(pfn, if self.flag(1) { Level::Page2M } else { Level::Page4K }),
            15 if self.flag(1) => Command::RmpUpdate(self.gctx(), RmpUpdate::firmware()),
            15 => Command::GctxCreate(self.gctx()),
            16 => Command::Activate(self.gctx(), self.asid()),
            17 => Command::LaunchStart(self.gctx(), self.start()),
            18 => Command::LaunchUpdate(self.gctx(), pfn, self.size(), self.0[7] >> 2 & 7),
            19 if self.flag(7) => Command::LaunchFinish(self.gctx(), None),
            19..21 => Command::PageReclaim(pfn, self.size()),
            21 if self.flag(2) => Command::PageUnsmash(pfn),
            21 => Command::PageReclaim(pfn, self.size()),
            22 if self.flag(7) => Command::Decommission(self.gctx()),
            23 if self.0[7] < 8 => Command::Restart(pfn),
            _ => Command::DfFlush,
        }
    }

    fn start(&self) -> LaunchStart {
        LaunchStart { policy: if self.flag(1) { 0 } else { POLICY_RESERVED_ONE }, imi_enabled: self.flag(2) }
    }
}
