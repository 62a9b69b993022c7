//! Realm Initial Measurement of Arm CCA (RMM 1.0, DEN0137 1.0-rel0, the sections "Realm Initial Measurement").
//!
//! The RIM starts as the hash of the realm's parameters and is extended by one 256-byte descriptor per DATA granule,
//! runnable REC and RTT entry whose RIPAS is initialised. Values are kept in 64-byte fields, left aligned and padded
//! with zeros, because the descriptors contain them in that form.

use sha2::{Digest, Sha256, Sha512};

/// Bytes of a measurement field; a SHA-256 value uses the first 32.
pub const FIELD_SIZE: usize = 64;
/// Bytes of each measurement descriptor.
const DESCRIPTOR_SIZE: usize = 0x100;
/// Bytes of `RmiRealmParams` and `RmiRecParams`.
const PARAMS_SIZE: usize = 4096;

/// `RmiHashAlgorithm`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum HashAlgo {
    /// 0: SHA-256.
    #[default]
    Sha256,
    /// 1: SHA-512.
    Sha512,
}

impl HashAlgo {
    /// The algorithm that `raw` encodes in RMM 1.0; RMM 2.0 adds SHA-384 as 2.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Option<Self> {
        match raw {
            0 => Some(Self::Sha256),
            1 => Some(Self::Sha512),
            _ => None,
        }
    }

    /// The encoding in `RmiRealmParams`.
    #[must_use]
    pub const fn raw(self) -> u8 {
        match self {
            Self::Sha256 => 0,
            Self::Sha512 => 1,
        }
    }

    /// Bytes of a hash value.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    fn digest(self, parts: &[&[u8]]) -> [u8; FIELD_SIZE] {
        let mut field = [0; FIELD_SIZE];
        match self {
            Self::Sha256 => field[..32].copy_from_slice(&chain::<Sha256>(parts)),
            Self::Sha512 => field.copy_from_slice(&chain::<Sha512>(parts)),
        }
        field
    }
}

fn chain<D: Digest>(parts: &[&[u8]]) -> sha2::digest::Output<D> {
    let mut hash = D::new();
    for part in parts {
        hash.update(part);
    }
    hash.finalize()
}

/// The measured fields of `RmiRealmParams`. Everything else in that structure counts as zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RealmParams {
    /// Bit 0 LPA2, bit 1 SVE, bit 2 PMU.
    pub flags: u64,
    /// Width of the realm's IPA space in bits.
    pub s2sz: u8,
    /// SVE vector length, in the encoding of ZCR_ELx.LEN.
    pub sve_vl: u8,
    /// Number of breakpoints, minus one.
    pub num_bps: u8,
    /// Number of watchpoints, minus one.
    pub num_wps: u8,
    /// Number of PMU counters.
    pub pmu_num_ctrs: u8,
    /// The algorithm of all measurements of this realm.
    pub hash_algo: HashAlgo,
}

/// The measured fields of `RmiRecParams`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RecParams {
    /// Bit 0: the REC is runnable. A REC that is not runnable is not measured.
    pub flags: u64,
    /// Program counter at the first entry.
    pub pc: u64,
    /// X0 to X7 at the first entry.
    pub gprs: [u64; 8],
}

impl RecParams {
    /// Whether RMI_PSCI_CPU_ON is not needed before this REC may run, which is also when it is measured.
    #[must_use]
    pub const fn is_runnable(&self) -> bool {
        self.flags & 1 != 0
    }
}

/// A step that extends the RIM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step<'a> {
    /// RMI_DATA_CREATE.
    Data {
        /// Address in the realm.
        ipa: u64,
        /// Bit 0: `content` is part of the measurement.
        flags: u64,
        /// Bytes of the granule.
        content: &'a [u8; 4096],
    },
    /// RMI_REC_CREATE.
    Rec(RecParams),
    /// RMI_RTT_INIT_RIPAS of one RTT entry. A 2 MiB entry is one step, not 512.
    Ripas {
        /// First address of the entry.
        base: u64,
        /// First address after the entry.
        top: u64,
    },
}

/// A Realm Initial Measurement, or one of the four extensible ones.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Rim {
    algo: HashAlgo,
    field: [u8; FIELD_SIZE],
}

impl Rim {
    /// The RIM of a realm that was just created.
    #[must_use]
    pub fn new(params: &RealmParams) -> Self {
        let mut page = [0; PARAMS_SIZE];
        put(&mut page, 0x00, &params.flags.to_le_bytes());
        for (at, value) in [
            (0x08, params.s2sz),
            (0x10, params.sve_vl),
            (0x18, params.num_bps),
            (0x20, params.num_wps),
            (0x28, params.pmu_num_ctrs),
            (0x30, params.hash_algo.raw()),
        ] {
            put(&mut page, at, &[value]);
        }
        Self { algo: params.hash_algo, field: params.hash_algo.digest(&[&page]) }
    }

    /// A Realm Extensible Measurement of a realm that was just created: zero.
    #[must_use]
    pub const fn extensible(algo: HashAlgo) -> Self {
        Self { algo, field: [0; FIELD_SIZE] }
    }

    /// The algorithm.
    #[must_use]
    pub const fn algo(&self) -> HashAlgo {
        self.algo
    }

    /// The value, [`HashAlgo::size`] bytes.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        &self.field[..self.algo.size()]
    }

    /// The value as it is stored, padded with zeros.
    #[must_use]
    pub const fn field(&self) -> &[u8; FIELD_SIZE] {
        &self.field
    }

    /// Extends the RIM. A REC that is not runnable changes nothing.
    pub fn extend(&mut self, step: &Step<'_>) {
        match step {
            Step::Data { ipa, flags, content } => self.extend_data(*ipa, *flags, content),
            Step::Rec(params) if params.is_runnable() => self.extend_rec(params),
            Step::Rec(_) => {}
            Step::Ripas { base, top } => self.extend_ripas(*base, *top),
        }
    }

    /// RSI_MEASUREMENT_EXTEND: the hash of the old value followed by `value`, which has up to 64 bytes.
    pub fn extend_by_realm(&mut self, value: &[u8]) {
        self.field = self.algo.digest(&[self.value(), value]);
    }

    fn extend_data(&mut self, ipa: u64, flags: u64, content: &[u8; 4096]) {
        let mut descriptor = self.descriptor(0);
        put(&mut descriptor, 0x50, &ipa.to_le_bytes());
        put(&mut descriptor, 0x58, &flags.to_le_bytes());
        if flags & 1 != 0 {
            put(&mut descriptor, 0x60, &self.algo.digest(&[content]));
        }
        self.field = self.algo.digest(&[&descriptor]);
    }

    fn extend_rec(&mut self, params: &RecParams) {
        let mut page = [0; PARAMS_SIZE];
        put(&mut page, 0x00, &params.flags.to_le_bytes());
        put(&mut page, 0x200, &params.pc.to_le_bytes());
        for (at, gpr) in (0x300..).step_by(8).zip(params.gprs) {
            put(&mut page, at, &gpr.to_le_bytes());
        }
        let mut descriptor = self.descriptor(1);
        put(&mut descriptor, 0x50, &self.algo.digest(&[&page]));
        self.field = self.algo.digest(&[&descriptor]);
    }

    fn extend_ripas(&mut self, base: u64, top: u64) {
        let mut descriptor = self.descriptor(2);
        put(&mut descriptor, 0x50, &base.to_le_bytes());
        put(&mut descriptor, 0x58, &top.to_le_bytes());
        self.field = self.algo.digest(&[&descriptor]);
    }

    /// The part that all descriptors share: type, length and the RIM so far.
    fn descriptor(&self, kind: u8) -> [u8; DESCRIPTOR_SIZE] {
        let mut descriptor = [0; DESCRIPTOR_SIZE];
        put(&mut descriptor, 0x00, &[kind]);
        put(&mut descriptor, 0x08, &(DESCRIPTOR_SIZE as u64).to_le_bytes());
        put(&mut descriptor, 0x10, &self.field);
        descriptor
    }
}

/// Offsets are layout constants of this module, never input.
fn put(structure: &mut [u8], at: usize, bytes: &[u8]) {
    structure[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Measures a whole launch; `on_step` sees the RIM after each step.
pub fn measure<'a>(
    params: &RealmParams,
    steps: impl IntoIterator<Item = Step<'a>>,
    mut on_step: impl FnMut(&Step<'a>, &Rim),
) -> Rim {
    let mut rim = Rim::new(params);
    for step in steps {
        rim.extend(&step);
        on_step(&step, &rim);
    }
    rim
}

/// The RTT entries that RMI_RTT_INIT_RIPAS would measure for `[base, top)` in a realm whose tables are only as deep as
/// the range needs: the largest naturally aligned entries of 4 KiB, 2 MiB and 1 GiB, in ascending order.
///
/// Ends early at the first address that is not a multiple of 4 KiB.
pub fn ripas_entries(base: u64, top: u64) -> impl Iterator<Item = Step<'static>> {
    let mut at = base;
    core::iter::from_fn(move || {
        let left = top.checked_sub(at)?;
        let size = [30, 21, 12]
            .map(|shift| 1u64 << shift)
            .into_iter()
            .find(|size| at.is_multiple_of(*size) && *size <= left)?;
        let entry = Step::Ripas { base: at, top: at + size };
        at += size;
        Some(entry)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{format, string::String, vec::Vec};

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn params(hash_algo: HashAlgo) -> RealmParams {
        RealmParams { s2sz: 48, num_bps: 1, num_wps: 1, hash_algo, ..RealmParams::default() }
    }

    #[test]
    fn empty_realm() {
        let rim = Rim::new(&params(HashAlgo::Sha256));
        assert_eq!(hex(rim.value()), "6739dfb22b75ee1268d08dfa8369f501bc0b066243553f069f560d1fa1172973");
        assert_eq!(Rim::new(&params(HashAlgo::Sha512)).value().len(), 64);
    }

    #[test]
    fn only_a_runnable_rec_is_measured() {
        let empty = Rim::new(&params(HashAlgo::Sha256));
        let mut rim = empty;
        rim.extend(&Step::Rec(RecParams { pc: 4, ..RecParams::default() }));
        assert_eq!(rim, empty);
        rim.extend(&Step::Rec(RecParams { flags: 1, pc: 4, ..RecParams::default() }));
        assert_ne!(rim, empty);
    }

    #[test]
    fn contents_count_only_when_measured() {
        let empty = Rim::new(&params(HashAlgo::Sha512));
        let run = |flags, fill| {
            let mut rim = empty;
            rim.extend(&Step::Data { ipa: 0x1000, flags, content: &[fill; 4096] });
            rim
        };
        assert_eq!(run(0, 1), run(0, 2));
        assert_ne!(run(1, 1), run(1, 2));
        assert_ne!(run(1, 1), run(0, 1));
    }

    #[test]
    fn a_range_is_measured_entry_by_entry() {
        let sizes: Vec<u64> = ripas_entries(0x1f_f000, 0x60_1000)
            .map(|step| if let Step::Ripas { base, top } = step { top - base } else { 0 })
            .collect();
        assert_eq!(sizes, [0x1000, 0x20_0000, 0x20_0000, 0x1000]);
        assert_eq!(ripas_entries(0x1000, 0x1000).count(), 0);
        assert_eq!(ripas_entries(0x10, 0x2000).count(), 0);
    }

    #[test]
    fn the_callback_sees_every_running_value() {
        let mut seen = Vec::new();
        let end = measure(&params(HashAlgo::Sha256), ripas_entries(0, 0x3000), |_, rim| seen.push(*rim));
        assert_eq!(seen.len(), 3);
        assert_eq!(seen.last(), Some(&end));
        assert!(seen[0] != seen[1] && seen[1] != seen[2]);
    }
}
