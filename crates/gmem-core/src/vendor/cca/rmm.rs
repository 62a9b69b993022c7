//! The RMM: granules, realms and RECs, and the commands that create and destroy them.

use super::rec::Rec;
use super::rmi::{
    ABI_VERSION, GRANULE_SIZE, GranuleState, PAGE_LEVEL, Platform, RealmParams, RealmState, RecParams, Reply,
    RmiStatus, RmmVersion, UnsupportedVersion,
};
use super::rtt::{Rtt, is_aligned};
use crate::addr::{Pfn, PfnRange};
use crate::measure::cca::{Rim, Step};
use crate::runs::RunMap;
use alloc::collections::BTreeMap;

/// Number of extensible measurements of a realm.
const REMS: usize = 4;

/// A realm, found by the address of its Realm Descriptor.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Realm {
    pub(super) state: RealmState,
    pub(super) rtt: Rtt,
    pub(super) rtt_base: u64,
    pub(super) rtt_num_start: u64,
    pub(super) vmid: u64,
    /// RECs that were ever created, which is the index of the next; destroying one does not lower it.
    pub(super) next_rec: u64,
    pub(super) rim: Rim,
    pub(super) rem: [Rim; REMS],
}

impl Realm {
    /// State.
    #[must_use]
    pub fn state(&self) -> RealmState {
        self.state
    }

    /// Translation tables.
    #[must_use]
    pub fn rtt(&self) -> &Rtt {
        &self.rtt
    }

    /// Realm Initial Measurement.
    #[must_use]
    pub fn rim(&self) -> &Rim {
        &self.rim
    }

    /// Realm Extensible Measurement `index`, 0 to 3.
    #[must_use]
    pub fn rem(&self, index: usize) -> Option<&Rim> {
        self.rem.get(index)
    }
}

/// A Realm Management Monitor of version 1.0 and the memory it tracks.
///
/// Addresses are physical addresses in bytes, as in the commands; one that is not a multiple of 4 KiB or lies outside
/// the platform's memory is an argument error, as is a granule in another state than the command asks for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Rmm {
    pub(super) platform: Platform,
    /// Granules that are not [`GranuleState::Ns`].
    granules: RunMap<GranuleState>,
    pub(super) realms: BTreeMap<u64, Realm>,
    pub(super) recs: BTreeMap<u64, Rec>,
}

impl Rmm {
    /// An RMM to which nothing was delegated.
    ///
    /// # Errors
    /// [`UnsupportedVersion`] for everything but 1.0.
    pub fn new(version: RmmVersion, platform: Platform) -> Result<Self, UnsupportedVersion> {
        version.require_modelled()?;
        Ok(Self { platform, granules: RunMap::new(), realms: BTreeMap::new(), recs: BTreeMap::new() })
    }

    /// The realm whose descriptor is at `rd`.
    #[must_use]
    pub fn realm(&self, rd: u64) -> Option<&Realm> {
        self.realms.get(&rd)
    }

    /// The REC at `rec`.
    #[must_use]
    pub fn rec(&self, rec: u64) -> Option<&Rec> {
        self.recs.get(&rec)
    }

    /// Addresses of the Realm Descriptors.
    pub fn realms(&self) -> impl Iterator<Item = (u64, &Realm)> {
        self.realms.iter().map(|(&rd, realm)| (rd, realm))
    }

    /// Runs of granules in `pages` that are not the host's: `(first granule number, granules, state)`.
    pub fn granules_in(&self, pages: PfnRange) -> impl Iterator<Item = (u64, u64, GranuleState)> {
        self.granules.runs(pages.start().0, pages.len())
    }

    /// State of the granule at `address`, or `None` if the RMM has no such granule.
    #[must_use]
    pub fn granule(&self, address: u64) -> Option<GranuleState> {
        let granule = self.granule_number(address)?;
        Some(self.granules.get(granule).unwrap_or_default())
    }

    /// Reference count of the granule at `address` as TF-RMM keeps it: RECs of a realm, entries of a table that the
    /// host may not drop, 1 for a REC that runs.
    #[must_use]
    pub fn refcount(&self, address: u64) -> Option<u64> {
        Some(match self.granule(address)? {
            GranuleState::Rd => self.recs_of(address),
            GranuleState::Rec => self.recs.get(&address).map_or(0, |rec| u64::from(rec.is_running())),
            GranuleState::Rtt => self.table_refcount(address),
            GranuleState::Ns | GranuleState::Delegated | GranuleState::RecAux | GranuleState::Data => 0,
        })
    }

    fn table_refcount(&self, address: u64) -> u64 {
        let granule = address / GRANULE_SIZE;
        let mut tables = self.realms.values().filter_map(|realm| {
            let root = granule.wrapping_sub(realm.rtt_base / GRANULE_SIZE);
            let (level, first) = if root < realm.rtt_num_start {
                (realm.rtt.start_level(), root << 9)
            } else {
                realm.rtt.find_table(granule)?
            };
            Some(realm.rtt.refcount(level, first))
        });
        tables.next().unwrap_or(0)
    }

    fn granule_number(&self, address: u64) -> Option<u64> {
        let granule = address / GRANULE_SIZE;
        (is_aligned(address, PAGE_LEVEL) && self.platform.memory.contains(Pfn(granule))).then_some(granule)
    }

    pub(super) fn is_in(&self, address: u64, state: GranuleState) -> bool {
        self.granule(address) == Some(state)
    }

    /// Only called with an address that [`Rmm::is_in`] has accepted.
    pub(super) fn set_granule(&mut self, address: u64, state: GranuleState) {
        let granule = address / GRANULE_SIZE;
        match state {
            GranuleState::Ns => self.granules.remove(granule, 1),
            state => self.granules.insert(granule, 1, state),
        }
    }

    fn recs_of(&self, rd: u64) -> u64 {
        self.recs.values().filter(|rec| rec.rd == rd).map(|_| 1).sum()
    }

    /// RMI_VERSION: outputs are the lowest and the highest version that the RMM speaks.
    #[must_use]
    pub fn version(&self, requested: u64) -> Reply {
        let status = if requested == ABI_VERSION { RmiStatus::Success } else { RmiStatus::Input };
        Reply::new(status, [ABI_VERSION, ABI_VERSION])
    }

    /// RMI_FEATURES: output is the feature register; registers other than 0 read as zero.
    #[must_use]
    pub fn features(&self, index: u64) -> Reply {
        let register = if index == 0 { self.platform.feature_register_0() } else { 0 };
        Reply::new(RmiStatus::Success, [register])
    }

    /// RMI_GRANULE_DELEGATE: the host gives a granule to the RMM, which scrubs it.
    pub fn granule_delegate(&mut self, address: u64) -> Reply {
        self.move_granule(address, GranuleState::Ns, GranuleState::Delegated)
    }

    /// RMI_GRANULE_UNDELEGATE: the host takes back a granule that is not in use.
    pub fn granule_undelegate(&mut self, address: u64) -> Reply {
        self.move_granule(address, GranuleState::Delegated, GranuleState::Ns)
    }

    fn move_granule(&mut self, address: u64, from: GranuleState, to: GranuleState) -> Reply {
        if !self.is_in(address, from) {
            return RmiStatus::Input.into();
        }
        self.set_granule(address, to);
        RmiStatus::Success.into()
    }

    /// RMI_REALM_CREATE with the parameters that the granule at `params_at` holds.
    pub fn realm_create(&mut self, rd: u64, params_at: u64, params: &RealmParams) -> Reply {
        let Some(realm) = self.new_realm(rd, params_at, params) else { return RmiStatus::Input.into() };
        for table in 0..params.rtt_num_start {
            self.set_granule(params.rtt_base + table * GRANULE_SIZE, GranuleState::Rtt);
        }
        self.set_granule(rd, GranuleState::Rd);
        self.realms.insert(rd, realm);
        RmiStatus::Success.into()
    }

    fn new_realm(&self, rd: u64, params_at: u64, params: &RealmParams) -> Option<Realm> {
        let measured = params.measured()?;
        let tables = params.rtt_num_start.checked_mul(GRANULE_SIZE)?;
        let tables_end = params.rtt_base.checked_add(tables)?;
        let valid = self.is_in(params_at, GranuleState::Ns)
            && self.accepts(params)
            && !(params.rtt_base..tables_end).contains(&rd)
            && self.is_in(rd, GranuleState::Delegated)
            && (0..params.rtt_num_start)
                .all(|table| self.is_in(params.rtt_base + table * GRANULE_SIZE, GranuleState::Delegated));
        let start = u8::try_from(params.rtt_level_start).ok()?;
        valid.then(|| Realm {
            state: RealmState::New,
            rtt: Rtt::new(measured.s2sz, start),
            rtt_base: params.rtt_base,
            rtt_num_start: params.rtt_num_start,
            vmid: params.vmid,
            next_rec: 0,
            rim: Rim::new(&measured),
            rem: [Rim::extensible(measured.hash_algo); REMS],
        })
    }

    /// Whether this machine can run a realm with these parameters.
    fn accepts(&self, params: &RealmParams) -> bool {
        let platform = &self.platform;
        let (lpa2, sve, pmu) = (params.flags & 1 != 0, params.flags & 2 != 0, params.flags & 4 != 0);
        !lpa2
            && (32..=u64::from(platform.s2sz.min(48))).contains(&params.s2sz)
            && (1..=platform.num_bps).contains(&params.num_bps)
            && (1..=platform.num_wps).contains(&params.num_wps)
            && (!sve || platform.sve_vl.is_some_and(|most| params.sve_vl <= most))
            && (!pmu || (1..=platform.pmu_num_ctrs).contains(&params.pmu_num_ctrs))
            && root_tables(params.s2sz, params.rtt_level_start) == Some(params.rtt_num_start)
            && params.vmid < u64::from(platform.vmids)
            && self.realms.values().all(|realm| realm.vmid != params.vmid)
    }

    /// RMI_REALM_ACTIVATE: ends the measured launch.
    pub fn realm_activate(&mut self, rd: u64) -> Reply {
        match self.realms.get_mut(&rd) {
            None => RmiStatus::Input.into(),
            Some(realm) if realm.state != RealmState::New => RmiStatus::Realm(0).into(),
            Some(realm) => {
                realm.state = RealmState::Active;
                RmiStatus::Success.into()
            }
        }
    }

    /// RMI_REALM_DESTROY. Refused while the realm has a REC or a table or memory of its own.
    pub fn realm_destroy(&mut self, rd: u64) -> Reply {
        let Some(realm) = self.realms.get(&rd) else { return RmiStatus::Input.into() };
        if self.recs_of(rd) != 0 || realm.rtt.root_is_referenced() {
            return RmiStatus::Realm(0).into();
        }
        let (base, tables) = (realm.rtt_base, realm.rtt_num_start);
        for table in 0..tables {
            self.set_granule(base + table * GRANULE_SIZE, GranuleState::Delegated);
        }
        self.set_granule(rd, GranuleState::Delegated);
        self.realms.remove(&rd);
        RmiStatus::Success.into()
    }

    /// RMI_REC_AUX_COUNT: output is the number of auxiliary granules that a REC of the realm needs.
    #[must_use]
    pub fn rec_aux_count(&self, rd: u64) -> Reply {
        if !self.realms.contains_key(&rd) {
            return RmiStatus::Input.into();
        }
        Reply::new(RmiStatus::Success, [u64::from(self.platform.rec_aux)])
    }

    /// RMI_REC_CREATE with the parameters that the granule at `params_at` holds.
    pub fn rec_create(&mut self, rd: u64, rec: u64, params_at: u64, params: &RecParams) -> Reply {
        let status = self.check_rec(rd, rec, params_at, params);
        if status != RmiStatus::Success {
            return status.into();
        }
        if let Some(realm) = self.realms.get_mut(&rd) {
            let index = realm.next_rec;
            realm.next_rec += 1;
            realm.rim.extend(&Step::Rec(params.boot));
            self.recs.insert(rec, Rec::new(rd, index, params));
        }
        for &aux in &params.aux {
            self.set_granule(aux, GranuleState::RecAux);
        }
        self.set_granule(rec, GranuleState::Rec);
        RmiStatus::Success.into()
    }

    /// The checks of RMI_REC_CREATE in TF-RMM's order: granules before the realm's state before the identity.
    fn check_rec(&self, rd: u64, rec: u64, params_at: u64, params: &RecParams) -> RmiStatus {
        let delegated = |address: &u64| self.is_in(*address, GranuleState::Delegated);
        let distinct = |(at, aux): (usize, &u64)| *aux != rec && !params.aux.iter().take(at).any(|other| other == aux);
        if !self.is_in(params_at, GranuleState::Ns)
            || params.aux.len() > usize::from(Platform::MAX_REC_AUX)
            || !params.aux.iter().all(delegated)
            || !params.aux.iter().enumerate().all(distinct)
            || !delegated(&rec)
        {
            return RmiStatus::Input;
        }
        match self.realms.get(&rd) {
            None => RmiStatus::Input,
            Some(realm) if realm.state != RealmState::New => RmiStatus::Realm(0),
            Some(realm) if rec_index(params.mpidr) != Some(realm.next_rec) => RmiStatus::Input,
            Some(_) if params.aux.len() != usize::from(self.platform.rec_aux) => RmiStatus::Input,
            Some(_) => RmiStatus::Success,
        }
    }

    /// RMI_REC_DESTROY. Refused while the REC runs.
    pub fn rec_destroy(&mut self, rec: u64) -> Reply {
        match self.recs.get(&rec) {
            None => return RmiStatus::Input.into(),
            Some(found) if found.is_running() => return RmiStatus::Rec.into(),
            Some(_) => {}
        }
        if let Some(gone) = self.recs.remove(&rec) {
            for aux in gone.aux {
                self.set_granule(aux, GranuleState::Delegated);
            }
        }
        self.set_granule(rec, GranuleState::Delegated);
        RmiStatus::Success.into()
    }
}

/// Number of concatenated root tables for an IPA space of `ipa_bits` (32 to 48) walked from `start`, or `None` if the
/// two do not fit: the root must resolve at least one bit, and at most four more than one table does (none at level 0).
#[must_use]
pub fn root_tables(ipa_bits: u64, start: i64) -> Option<u64> {
    let start = u64::try_from(start).ok().filter(|start| *start <= u64::from(PAGE_LEVEL))?;
    let one_table = 12 + 9 * (u64::from(PAGE_LEVEL) - start) + 9;
    let concatenated = if start == 0 { 0 } else { 4 };
    let fits = (one_table - 8..=one_table + concatenated).contains(&ipa_bits);
    fits.then(|| 1 << ipa_bits.saturating_sub(one_table))
}

/// The REC index that an `RmiRecMpidr` encodes: Aff0 in bits 3:0, Aff1 to Aff3 in bits 31:8. `None` if other bits are
/// set.
fn rec_index(mpidr: u64) -> Option<u64> {
    (mpidr & !0xffff_ff0f == 0).then_some(mpidr & 0xf | mpidr >> 4 & 0xfff_fff0)
}

/// The REC index that an `MPIDR_EL1` encodes, in which Aff3 is in bits 39:32.
pub(super) fn rec_index_of_mpidr(mpidr: u64) -> u64 {
    mpidr & 0xf | mpidr >> 4 & 0xf_fff0 | mpidr >> 12 & 0xff0_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn concatenation_follows_the_architecture() {
        for (bits, start, tables) in [
            (48, 0, Some(1)),
            (40, 0, Some(1)),
            (39, 0, None),
            (39, 1, Some(1)),
            (40, 1, Some(2)),
            (43, 1, Some(16)),
            (44, 1, None),
            (32, 2, Some(4)),
            (32, 3, None),
            (48, -1, None),
            (48, 4, None),
        ] {
            assert_eq!(root_tables(bits, start), tables, "{bits} bits from level {start}");
        }
    }

    #[test]
    fn rec_identities() {
        assert_eq!(rec_index(0x10f), Some(0x1f));
        assert_eq!(rec_index(0x10), None);
        assert_eq!(rec_index_of_mpidr(0x1_0000_0203), 0x10_0023);
    }
}
