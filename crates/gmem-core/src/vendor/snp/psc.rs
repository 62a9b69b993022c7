//! Page state change requests: how a guest asks the host to change the side of pages.
//!
//! Two forms exist (GHCB specification 56421): one page in the GHCB MSR, or a buffer of up to 253 entries, which KVM hands
//! to userspace in batches as KVM_HC_MAP_GPA_RANGE. Both follow `snp_begin_psc_msr()`, `snp_begin_psc()` and their
//! completions in Linux `arch/x86/kvm/svm/sev.c`.
//!
//! The buffer is guest memory and so a claim: nothing in it is used before it was checked, and the guest may find it
//! partly done.

use alloc::vec::Vec;

use crate::addr::{Gfn, GfnRange, Level};
use crate::vendor::Side;

/// Entries that a buffer has room for.
pub const MAX_ENTRIES: u16 = 253;
/// Bytes of the header and of an entry.
const ENTRY_LEN: u64 = 8;
/// `GHCBInfo` of a request in the MSR.
const MSR_REQUEST: u64 = 0x014;
/// `GHCBInfo` of the answer.
const MSR_RESPONSE: u64 = 0x015;
/// The answer to a request that failed for any reason.
const MSR_ERROR: u64 = 1 << 63 | MSR_RESPONSE;
/// A guest page number has 40 bits.
const GFN_MASK: u64 = (1 << 40) - 1;

/// SW_EXITINFO2 of the answer to a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PscCode {
    /// Every entry was processed.
    Done,
    /// The host could not or would not do it.
    Generic,
    /// The header names entries that the buffer does not have.
    InvalidHeader,
    /// An entry is partly done beyond its size, or misaligned.
    InvalidEntry,
}

impl PscCode {
    /// The value that the guest reads.
    #[must_use]
    pub const fn exit_info_2(self) -> u64 {
        match self {
            Self::Done => 0,
            Self::Generic => 0x100 << 32,
            Self::InvalidHeader => 1 << 32 | 1,
            Self::InvalidEntry => 1 << 32 | 2,
        }
    }
}

/// A request that the VMM has to carry out: KVM_EXIT_HYPERCALL with KVM_HC_MAP_GPA_RANGE.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MapGpaRange {
    /// Pages to change.
    pub range: GfnRange,
    /// Side that they are to have.
    pub side: Side,
    /// Page size in the hypercall's attributes: 4 KiB or 2 MiB.
    pub level: Level,
}

/// What a VMM wrote into `hypercall.ret`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HypercallReturn {
    /// 0.
    Done,
    /// EINVAL (22) or EAGAIN (11); SNP guests cannot tell them apart.
    Failed,
}

/// A value of `hypercall.ret` that makes KVM_RUN fail with EINVAL (Linux 7.2 and 7.3).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct InvalidReturn(pub u64);

impl TryFrom<u64> for HypercallReturn {
    type Error = InvalidReturn;

    fn try_from(ret: u64) -> Result<Self, InvalidReturn> {
        match ret {
            0 => Ok(Self::Done),
            11 | 22 => Ok(Self::Failed),
            other => Err(InvalidReturn(other)),
        }
    }
}

/// Whether the VMM has asked for KVM_HC_MAP_GPA_RANGE exits (KVM_CAP_EXIT_HYPERCALL).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HypercallExits {
    /// It has.
    Enabled,
    /// It has not, so no page can change sides.
    Disabled,
}

/// What becomes of a request in the MSR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MsrStep {
    /// Write this value into the MSR and resume the guest.
    Respond(u64),
    /// Exit to the VMM, then answer with [`msr_response`].
    Exit(MapGpaRange),
}

/// Starts a request in the GHCB MSR. `None` if the value is not a page state change.
#[must_use]
pub fn begin_msr(msr: u64, exits: HypercallExits) -> Option<MsrStep> {
    if msr & 0xfff != MSR_REQUEST {
        return None;
    }
    let range = GfnRange::page(Gfn(msr >> 12 & GFN_MASK));
    let step = match (Operation::from_raw(msr >> 52 & 0xf), exits) {
        (Some(operation), HypercallExits::Enabled) => {
            MsrStep::Exit(MapGpaRange { range, side: operation.side(), level: Level::Page4K })
        }
        _ => MsrStep::Respond(MSR_ERROR),
    };
    Some(step)
}

/// The MSR value that tells the guest what the VMM answered.
#[must_use]
pub const fn msr_response(ret: HypercallReturn) -> u64 {
    match ret {
        HypercallReturn::Done => MSR_RESPONSE,
        HypercallReturn::Failed => MSR_ERROR,
    }
}

/// The operations that a host has to carry out. PSMASH (3) and UNSMASH (4) are hints, which KVM counts as done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Private,
    Shared,
}

impl Operation {
    const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            1 => Some(Self::Private),
            2 => Some(Self::Shared),
            _ => None,
        }
    }

    const fn side(self) -> Side {
        match self {
            Self::Private => Side::Private,
            Self::Shared => Side::Shared,
        }
    }
}

/// One entry of the buffer, as the guest wrote it: pages done in bits 11:0, guest page in 51:12, operation in 55:52,
/// 2 MiB in bit 56.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct PscEntry(pub u64);

impl PscEntry {
    /// An entry that asks for a side.
    #[must_use]
    pub const fn new(gfn: Gfn, side: Side, level: Level) -> Self {
        let operation: u64 = match side {
            Side::Private => 1,
            Side::Shared => 2,
        };
        let large = !matches!(level, Level::Page4K) as u64;
        Self((gfn.0 & GFN_MASK) << 12 | operation << 52 | large << 56)
    }

    /// Base pages that are done.
    #[must_use]
    pub const fn done(self) -> u64 {
        self.0 & 0xfff
    }

    /// First guest page.
    #[must_use]
    pub const fn gfn(self) -> Gfn {
        Gfn(self.0 >> 12 & GFN_MASK)
    }

    const fn raw_operation(self) -> u64 {
        self.0 >> 52 & 0xf
    }

    const fn large(self) -> bool {
        self.0 >> 56 & 1 != 0
    }

    const fn pages(self) -> u64 {
        if self.large() { 512 } else { 1 }
    }

    /// Whether the entry claims more done than it has, or is misaligned.
    const fn invalid(self) -> bool {
        self.done() > self.pages() || self.gfn().0 & (self.pages() - 1) != 0
    }

    fn finish(&mut self) {
        self.0 = self.0 & !0xfff | self.pages();
    }
}

/// The buffer: header and entries.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct PscBuffer {
    /// First entry that is not done.
    pub cur_entry: u16,
    /// Last entry, inclusive.
    pub end_entry: u16,
    /// The entries that the scratch area has room for.
    pub entries: Vec<PscEntry>,
}

/// What the caller has to do next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PscStep {
    /// Exit to the VMM, then call [`Psc::complete`].
    Exit(MapGpaRange),
    /// Answer the guest with SW_EXITINFO1 = 0 and this in SW_EXITINFO2.
    Finish(PscCode),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Batch {
    first: u16,
    entries: u16,
    large: bool,
    start: Gfn,
    pages: u64,
    operation: u64,
}

/// A request in progress: which entries the VMM was asked about.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Psc {
    scratch_entries: u64,
    exits: HypercallExits,
    inflight: Option<Batch>,
}

impl Psc {
    /// A request whose buffer lies in a scratch area of `scratch_len` bytes.
    #[must_use]
    pub const fn new(scratch_len: u64, exits: HypercallExits) -> Self {
        let entries = scratch_len.saturating_sub(ENTRY_LEN) / ENTRY_LEN;
        let max = MAX_ENTRIES as u64;
        Self { scratch_entries: if entries < max { entries } else { max }, exits, inflight: None }
    }

    /// The next batch that the VMM has to carry out, or the answer to the guest.
    ///
    /// A batch that is still in flight is answered with [`PscCode::Generic`], as the kernel does.
    pub fn next(&mut self, buffer: &mut PscBuffer) -> PscStep {
        if self.exits == HypercallExits::Disabled || self.inflight.is_some() {
            return PscStep::Finish(PscCode::Generic);
        }
        if u64::from(buffer.end_entry) >= self.scratch_entries {
            return PscStep::Finish(PscCode::InvalidHeader);
        }
        loop {
            let batch = match next_batch(buffer) {
                Ok(batch) => batch,
                Err(code) => return PscStep::Finish(code),
            };
            if let Some(exit) = batch.request() {
                self.inflight = Some(batch);
                return PscStep::Exit(exit);
            }
            batch.finish(buffer);
        }
    }

    /// Takes the VMM's answer to the batch in flight; on failure the guest is told at once.
    ///
    /// Without a batch in flight, nothing happens.
    pub fn complete(&mut self, buffer: &mut PscBuffer, ret: HypercallReturn) -> PscStep {
        let Some(batch) = self.inflight.take() else { return self.next(buffer) };
        match ret {
            HypercallReturn::Failed => PscStep::Finish(PscCode::Generic),
            HypercallReturn::Done => {
                batch.finish(buffer);
                self.next(buffer)
            }
        }
    }
}

/// The first entries that are not done and can be one request; moves `cur_entry` over those that are done.
fn next_batch(buffer: &mut PscBuffer) -> Result<Batch, PscCode> {
    while buffer.cur_entry <= buffer.end_entry {
        let entry = *buffer.entries.get(usize::from(buffer.cur_entry)).ok_or(PscCode::InvalidHeader)?;
        if entry.invalid() {
            return Err(PscCode::InvalidEntry);
        }
        if entry.done() < entry.pages() {
            return Ok(Batch::starting(entry, buffer));
        }
        buffer.cur_entry += 1;
    }
    Err(PscCode::Done)
}

impl Batch {
    /// An entry that is partly done is finished in 4 KiB pages.
    fn starting(entry: PscEntry, buffer: &PscBuffer) -> Self {
        let done = entry.done();
        let mut batch = Self {
            first: buffer.cur_entry,
            entries: 1,
            large: entry.large() && done == 0,
            start: Gfn(entry.gfn().0 + done),
            pages: entry.pages() - done,
            operation: entry.raw_operation(),
        };
        let rest = usize::from(buffer.cur_entry) + 1..=usize::from(buffer.end_entry);
        for next in buffer.entries.get(rest).unwrap_or_default() {
            if !batch.continued_by(*next) {
                break;
            }
            batch.entries += 1;
            batch.pages += next.pages();
        }
        batch
    }

    const fn continued_by(&self, next: PscEntry) -> bool {
        next.raw_operation() == self.operation
            && next.gfn().0 == self.start.0 + self.pages
            && next.done() == 0
            && next.large() == self.large
    }

    fn request(&self) -> Option<MapGpaRange> {
        let side = Operation::from_raw(self.operation)?.side();
        let level = if self.large { Level::Page2M } else { Level::Page4K };
        Some(MapGpaRange { range: GfnRange::with_len(self.start, self.pages)?, side, level })
    }

    /// Marks the entries done, as far as the guest has left the buffer in place.
    fn finish(&self, buffer: &mut PscBuffer) {
        let end = self.first.saturating_add(self.entries);
        for entry in buffer.entries.get_mut(usize::from(self.first)..usize::from(end)).unwrap_or_default() {
            entry.finish();
        }
        buffer.cur_entry = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn buffer(entries: Vec<PscEntry>) -> PscBuffer {
        let end_entry = u16::try_from(entries.len().max(1) - 1).unwrap();
        PscBuffer { cur_entry: 0, end_entry, entries }
    }

    fn private(gfn: u64) -> PscEntry {
        PscEntry::new(Gfn(gfn), Side::Private, Level::Page4K)
    }

    fn exit(start: u64, pages: u64, side: Side, level: Level) -> PscStep {
        PscStep::Exit(MapGpaRange { range: GfnRange::with_len(Gfn(start), pages).unwrap(), side, level })
    }

    fn request() -> Psc {
        Psc::new(2032, HypercallExits::Enabled)
    }

    #[test]
    fn msr_requests() {
        let ask = |op: u64| begin_msr(op << 52 | 7 << 12 | 0x014, HypercallExits::Enabled);
        let page = |side| MapGpaRange { range: GfnRange::page(Gfn(7)), side, level: Level::Page4K };
        assert_eq!(ask(1), Some(MsrStep::Exit(page(Side::Private))));
        assert_eq!(ask(2), Some(MsrStep::Exit(page(Side::Shared))));
        assert_eq!(ask(3), Some(MsrStep::Respond(0x8000_0000_0000_0015)));
        assert_eq!(begin_msr(1 << 52 | 0x014, HypercallExits::Disabled), Some(MsrStep::Respond(1 << 63 | 0x15)));
        assert_eq!(begin_msr(0x012, HypercallExits::Enabled), None);
        assert_eq!(msr_response(HypercallReturn::Done), 0x15);
    }

    #[test]
    fn contiguous_entries_are_one_exit_and_the_buffer_shows_progress() {
        let mut buffer = buffer(vec![private(5), private(6), private(8)]);
        let mut psc = request();
        assert_eq!(psc.next(&mut buffer), exit(5, 2, Side::Private, Level::Page4K));
        assert_eq!(buffer.cur_entry, 0);
        assert_eq!(psc.complete(&mut buffer, HypercallReturn::Done), exit(8, 1, Side::Private, Level::Page4K));
        assert_eq!((buffer.cur_entry, buffer.entries[1].done()), (2, 1));
        assert_eq!(psc.complete(&mut buffer, HypercallReturn::Done), PscStep::Finish(PscCode::Done));
        assert_eq!(buffer.cur_entry, 3);
    }

    #[test]
    fn a_partly_done_large_entry_is_finished_in_small_pages_on_its_own() {
        let large = |gfn, done| PscEntry(PscEntry::new(Gfn(gfn), Side::Shared, Level::Page2M).0 | done);
        let mut buffer = buffer(vec![large(512, 100), large(1024, 0), large(1536, 0)]);
        let mut psc = request();
        assert_eq!(psc.next(&mut buffer), exit(612, 412, Side::Shared, Level::Page4K));
        assert_eq!(psc.complete(&mut buffer, HypercallReturn::Done), exit(1024, 1024, Side::Shared, Level::Page2M));
        assert_eq!(psc.complete(&mut buffer, HypercallReturn::Failed), PscStep::Finish(PscCode::Generic));
        assert_eq!(buffer.cur_entry, 1, "a failed batch stays undone");
    }

    #[test]
    fn limits_and_malformed_requests() {
        let finish = |psc: &mut Psc, mut buffer: PscBuffer| match psc.next(&mut buffer) {
            PscStep::Finish(code) => code.exit_info_2(),
            PscStep::Exit(exit) => panic!("{exit:?}"),
        };
        let with_end = |end_entry| PscBuffer { end_entry, ..buffer(vec![private(1)]) };
        assert_eq!(finish(&mut request(), with_end(253)), 0x1_0000_0001);
        assert_eq!(finish(&mut Psc::new(16, HypercallExits::Enabled), with_end(1)), 0x1_0000_0001);
        assert_eq!(finish(&mut Psc::new(4, HypercallExits::Enabled), with_end(0)), 0x1_0000_0001);
        assert_eq!(finish(&mut Psc::new(2032, HypercallExits::Disabled), with_end(0)), 0x100 << 32);
        assert_eq!(finish(&mut request(), buffer(vec![PscEntry(private(1).0 | 2)])), 0x1_0000_0002);
        let misaligned = PscEntry::new(Gfn(1), Side::Private, Level::Page2M);
        assert_eq!(finish(&mut request(), buffer(vec![misaligned])), 0x1_0000_0002);
        let hint = PscEntry(1 << 12 | 3 << 52);
        assert_eq!(finish(&mut request(), buffer(vec![hint])), 0);
    }

    #[test]
    fn only_three_returns_are_valid() {
        assert_eq!(HypercallReturn::try_from(0), Ok(HypercallReturn::Done));
        assert_eq!(HypercallReturn::try_from(11), Ok(HypercallReturn::Failed));
        assert_eq!(HypercallReturn::try_from(22), Ok(HypercallReturn::Failed));
        assert_eq!(HypercallReturn::try_from(1), Err(InvalidReturn(1)));
    }
}
