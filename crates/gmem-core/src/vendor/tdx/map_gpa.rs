//! TDG.VP.VMCALL with MapGPA: how a TD asks the host to change the side of pages.
//!
//! KVM hands the request to userspace in pieces of at most 2 MiB as KVM_HC_MAP_GPA_RANGE; between two of them the guest is
//! resumed if something waits for it, and asks again for the rest. Follows `tdx_map_gpa()` and its completion in Linux
//! `arch/x86/kvm/vmx/tdx.c`, 7.2.

use super::GpaWidth;
use crate::addr::{Gfn, GfnRange, Level, PAGE_SIZE};
use crate::vendor::Side;
use crate::vendor::snp::psc::{HypercallExits, InvalidReturn, MapGpaRange};

/// Most bytes of one exit.
const PIECE: u64 = 2 << 20;

/// R10 of the answer (GHCI, status codes of TDG.VP.VMCALL).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MapGpaStatus {
    /// The whole range has changed.
    Success,
    /// The part before R11 has; the guest asks again from there.
    Retry,
    /// The range is empty, wraps, is too wide or crosses the shared bit; or the VMM refused.
    InvalidOperand,
    /// Address or size is no multiple of 4 KiB.
    AlignError,
    /// The VMM has not asked for such exits.
    Unsupported,
}

impl MapGpaStatus {
    /// The value that the guest reads.
    #[must_use]
    pub const fn raw(self) -> u64 {
        match self {
            Self::Success => 0,
            Self::Retry => 1,
            Self::InvalidOperand => 1 << 63,
            Self::AlignError => 1 << 63 | 2,
            Self::Unsupported => 1 << 63 | 3,
        }
    }
}

/// What a VMM wrote into `hypercall.ret`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MapGpaReturn {
    /// 0.
    Done,
    /// EAGAIN (11).
    Again,
    /// EINVAL (22).
    Failed,
}

impl TryFrom<u64> for MapGpaReturn {
    type Error = InvalidReturn;

    /// # Errors
    /// Any other value makes KVM_RUN fail with EINVAL.
    fn try_from(ret: u64) -> Result<Self, InvalidReturn> {
        match ret {
            0 => Ok(Self::Done),
            11 => Ok(Self::Again),
            22 => Ok(Self::Failed),
            other => Err(InvalidReturn(other)),
        }
    }
}

/// What the caller has to do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MapGpaStep {
    /// Exit to the VMM, then call [`MapGpa::complete`].
    Exit(MapGpaRange),
    /// Resume the guest with this status, and with this address in R11 unless all is done.
    Finish(MapGpaStatus, Option<u64>),
}

/// A request in progress.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MapGpa {
    /// Next address to ask the VMM about, shared bit included.
    next: u64,
    end: u64,
    shared: u64,
}

impl MapGpa {
    /// Checks a request (R12 the address, R13 the size, both in bytes) in KVM's order.
    ///
    /// # Errors
    /// The status of the answer, whose R11 is the address.
    pub fn new(gpa: u64, size: u64, width: GpaWidth, exits: HypercallExits) -> Result<Self, MapGpaStatus> {
        if exits == HypercallExits::Disabled {
            return Err(MapGpaStatus::Unsupported);
        }
        let shared = 1 << width.shared_bit();
        let end = gpa.checked_add(size).filter(|_| size > 0).ok_or(MapGpaStatus::InvalidOperand)?;
        // The shared bit is the highest of the width.
        let legal = end <= shared << 1;
        if !legal || gpa & shared != (end - 1) & shared {
            return Err(MapGpaStatus::InvalidOperand);
        }
        if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
            return Err(MapGpaStatus::AlignError);
        }
        Ok(Self { next: gpa, end, shared })
    }

    /// The piece to ask the VMM about.
    #[must_use]
    pub fn request(&self) -> MapGpaStep {
        let len = self.end.saturating_sub(self.next).min(PIECE);
        let side = if self.next & self.shared == 0 { Side::Private } else { Side::Shared };
        match GfnRange::with_len(Gfn::of_gpa(self.next & !self.shared), len / PAGE_SIZE) {
            Some(range) => MapGpaStep::Exit(MapGpaRange { range, side, level: Level::Page4K }),
            None => MapGpaStep::Finish(MapGpaStatus::Success, None),
        }
    }

    /// Takes the VMM's answer to a piece. `pending`: an event waits for the guest, which is then resumed first.
    pub fn complete(&mut self, ret: MapGpaReturn, pending: bool) -> MapGpaStep {
        match ret {
            MapGpaReturn::Again => return MapGpaStep::Finish(MapGpaStatus::Retry, Some(self.next)),
            MapGpaReturn::Failed => return MapGpaStep::Finish(MapGpaStatus::InvalidOperand, Some(self.next)),
            MapGpaReturn::Done => self.next = self.next.saturating_add(PIECE),
        }
        match self.next {
            next if next >= self.end => MapGpaStep::Finish(MapGpaStatus::Success, None),
            next if pending => MapGpaStep::Finish(MapGpaStatus::Retry, Some(next)),
            _ => self.request(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: u64 = 1 << 47;

    fn new(gpa: u64, size: u64) -> Result<MapGpa, MapGpaStatus> {
        MapGpa::new(gpa, size, GpaWidth::Bits48, HypercallExits::Enabled)
    }

    #[test]
    fn what_is_wrong_is_found_in_kvms_order() {
        use MapGpaStatus::{AlignError, InvalidOperand, Unsupported};
        assert_eq!(MapGpa::new(1, 0, GpaWidth::Bits48, HypercallExits::Disabled), Err(Unsupported));
        let wrong = [
            (1, 0, InvalidOperand),
            (u64::MAX - 0xfff, 0x1000, InvalidOperand),
            (0, SHARED + 1, InvalidOperand),
            (1 << 48, 0x1000, InvalidOperand),
            (SHARED, SHARED + 0x1000, InvalidOperand),
            (1, 0x1000, AlignError),
            (0x1000, 1, AlignError),
        ];
        for (gpa, size, status) in wrong {
            assert_eq!(new(gpa, size), Err(status), "{gpa:#x} {size:#x}");
        }
        assert!(new(0, SHARED).is_ok() && new(SHARED, SHARED).is_ok());
        assert!(MapGpa::new(SHARED, 1 << 48, GpaWidth::Bits52, HypercallExits::Enabled).is_ok());
    }

    #[test]
    fn long_ranges_are_asked_about_in_pieces_and_can_be_resumed() {
        let exit = |gfn, pages| {
            let range = GfnRange::with_len(Gfn(gfn), pages).unwrap();
            MapGpaStep::Exit(MapGpaRange { range, side: Side::Shared, level: Level::Page4K })
        };
        let mut call = new(SHARED + 0x1000, 2 * PIECE + 0x1000).unwrap();
        assert_eq!(call.request(), exit(1, 512));
        assert_eq!(call.complete(MapGpaReturn::Done, false), exit(513, 512));
        let rest = SHARED + 0x1000 + 2 * PIECE;
        let mut resumed = call;
        assert_eq!(resumed.complete(MapGpaReturn::Done, true), MapGpaStep::Finish(MapGpaStatus::Retry, Some(rest)));
        let mut refused = call;
        let here = rest - PIECE;
        assert_eq!(refused.complete(MapGpaReturn::Again, false), MapGpaStep::Finish(MapGpaStatus::Retry, Some(here)));
        let failed = MapGpaStep::Finish(MapGpaStatus::InvalidOperand, Some(here));
        assert_eq!(refused.complete(MapGpaReturn::Failed, false), failed);
        assert_eq!(call.complete(MapGpaReturn::Done, false), exit(1025, 1));
        // After the last piece nothing is left to resume.
        assert_eq!(call.complete(MapGpaReturn::Done, true), MapGpaStep::Finish(MapGpaStatus::Success, None));
    }

    /// KVM takes no other value (`kvm_is_valid_map_gpa_range_ret()`).
    #[test]
    fn answers_and_codes_have_their_numbers() {
        let answer = |ret| MapGpaReturn::try_from(ret);
        assert_eq!([0, 11, 22].map(|ret| answer(ret).is_ok()), [true; 3]);
        assert_eq!(answer(1), Err(InvalidReturn(1)));
        assert_eq!(MapGpaStatus::AlignError.raw(), 0x8000_0000_0000_0002);
        assert_eq!(MapGpaStatus::Unsupported.raw(), 0x8000_0000_0000_0003);
    }
}
