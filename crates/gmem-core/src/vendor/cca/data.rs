//! The commands on translation tables and on the memory behind them.

use super::rmi::{GRANULE_SIZE, GranuleState, Hipas, MIN_BLOCK_LEVEL, PAGE_LEVEL, RealmState, Reply, Ripas, RmiStatus};
use super::rmm::{Realm, Rmm};
use super::rtt::{ChangeDestroyed, Entry, NS_ATTR_MASK, Rtt, Walk, is_aligned, shift};
use crate::measure::cca::Step;

/// Attribute value that is reserved with FEAT_S2FWB.
const MEMATTR_RESERVED: u64 = 0x10;
const MEMATTR_MASK: u64 = 0x1c;
/// Addresses are 48 bits wide without LPA2.
const ADDRESS_MASK: u64 = (1 << 48) - 1;

/// A level that the caller named, accepted by one of the constructors.
fn level_within(level: u64, lowest: u8) -> Option<u8> {
    u8::try_from(level).ok().filter(|level| (lowest..=PAGE_LEVEL).contains(level))
}

/// The address of a leaf entry that a command names: within the realm and aligned to the level.
fn is_entry(rtt: &Rtt, ipa: u64, level: u8) -> bool {
    ipa < rtt.ipa_size() && is_aligned(ipa, level)
}

/// The level of a table that a command creates, folds or destroys; never that of the root.
fn table_level(rtt: &Rtt, ipa: u64, level: u64) -> Option<u8> {
    let level = level_within(level, rtt.start_level() + 1)?;
    is_entry(rtt, ipa, level - 1).then_some(level)
}

/// What the host wants behind an unprotected address: frame and attributes, or `None` for a bad descriptor.
fn host_mapping(descriptor: u64, level: u8) -> Option<Entry> {
    let address = descriptor & ADDRESS_MASK & !((1 << shift(level)) - 1);
    let attr = descriptor & NS_ATTR_MASK;
    let valid = address | attr == descriptor && attr & MEMATTR_MASK != MEMATTR_RESERVED;
    valid.then_some(Entry::AssignedNs { frame: address >> shift(level), attr: u8::try_from(attr).ok()? })
}

/// Contents of a granule that RMI_DATA_CREATE copies from the host.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Address of the host's granule.
    pub address: u64,
    /// What it holds.
    pub content: &'a [u8; 4096],
    /// 1: the content is measured. 0: only the address is. Others are refused.
    pub flags: u64,
}

impl Rmm {
    /// RMI_RTT_CREATE: puts a table at `rtt` below the entry of `level - 1` at `ipa`; a leaf that is there is unfolded
    /// into 512 entries that mean the same.
    pub fn rtt_create(&mut self, rd: u64, rtt: u64, ipa: u64, level: u64) -> Reply {
        if rtt == rd || !self.is_in(rtt, GranuleState::Delegated) || rtt > ADDRESS_MASK {
            return RmiStatus::Input.into();
        }
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(level) = table_level(&realm.rtt, ipa, level) else { return RmiStatus::Input.into() };
        let parent = realm.rtt.walk(ipa, level - 1);
        if parent.level != level - 1 || !realm.rtt.unfold(&parent, rtt / GRANULE_SIZE) {
            return RmiStatus::Rtt(parent.level).into();
        }
        self.set_granule(rtt, GranuleState::Rtt);
        RmiStatus::Success.into()
    }

    /// RMI_RTT_DESTROY: output 1 is the table's address, output 2 the end of the non-live region.
    ///
    /// The protected addresses that the table described become UNASSIGNED/DESTROYED, whatever they were. A table of
    /// unprotected addresses may still map memory of the host.
    pub fn rtt_destroy(&mut self, rd: u64, ipa: u64, level: u64) -> Reply {
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(level) = table_level(&realm.rtt, ipa, level) else { return RmiStatus::Input.into() };
        let parent = realm.rtt.walk(ipa, level - 1);
        let Entry::Table(table) = parent.entry else {
            let top = realm.rtt.skip_non_live(ipa, &parent);
            return Reply::new(RmiStatus::Rtt(parent.level), [0, top]);
        };
        if realm.rtt.is_referenced(level, Rtt::child_first(&parent)) {
            return Reply::new(RmiStatus::Rtt(level), [0, ipa]);
        }
        let leaf = if realm.rtt.in_par(ipa) { Entry::Unassigned(Ripas::Destroyed) } else { Entry::UnassignedNs };
        realm.rtt.drop_table(&parent, leaf);
        let top = realm.rtt.skip_non_live(ipa, &Walk { entry: leaf, ..parent });
        Reply::new(RmiStatus::Success, [self.release_table(table), top])
    }

    /// RMI_RTT_FOLD: replaces a homogeneous table by one entry; output is the table's address.
    pub fn rtt_fold(&mut self, rd: u64, ipa: u64, level: u64) -> Reply {
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(level) = table_level(&realm.rtt, ipa, level) else { return RmiStatus::Input.into() };
        let parent = realm.rtt.walk(ipa, level - 1);
        let Entry::Table(table) = parent.entry else { return RmiStatus::Rtt(parent.level).into() };
        match fold_target(&realm.rtt, &parent) {
            Err(failed) => RmiStatus::Rtt(failed).into(),
            Ok(leaf) => {
                realm.rtt.drop_table(&parent, leaf);
                Reply::new(RmiStatus::Success, [self.release_table(table)])
            }
        }
    }

    fn release_table(&mut self, granule: u64) -> u64 {
        let address = granule * GRANULE_SIZE;
        self.set_granule(address, GranuleState::Delegated);
        address
    }

    /// RMI_RTT_READ_ENTRY: outputs are the level reached, HIPAS, descriptor and RIPAS.
    ///
    /// The descriptor of a destroyed page reads as zero although the page is still there.
    #[must_use]
    pub fn rtt_read_entry(&self, rd: u64, ipa: u64, level: u64) -> Reply {
        let Some(realm) = self.realms.get(&rd) else { return RmiStatus::Input.into() };
        let valid = level_within(level, realm.rtt.start_level()).filter(|level| is_entry(&realm.rtt, ipa, *level));
        let Some(level) = valid else { return RmiStatus::Input.into() };
        let Walk { level, entry, .. } = realm.rtt.walk(ipa, level);
        let descriptor = match entry {
            Entry::Assigned { ripas: Ripas::Destroyed, .. } => 0,
            Entry::AssignedNs { attr, .. } => Rtt::address(&entry, level).unwrap_or(0) | u64::from(attr),
            entry => Rtt::address(&entry, level).unwrap_or(0),
        };
        let ripas = entry.ripas().unwrap_or_default();
        let x = [u64::from(level), u64::from(entry.hipas().raw()), descriptor, u64::from(ripas.raw())];
        Reply::new(RmiStatus::Success, x)
    }

    /// RMI_RTT_MAP_UNPROTECTED: maps memory of the host. Any physical address is accepted; the granule protection check
    /// is what stops an abuse.
    pub fn rtt_map_unprotected(&mut self, rd: u64, ipa: u64, level: u64, descriptor: u64) -> Reply {
        let Some(level) = level_within(level, MIN_BLOCK_LEVEL) else { return RmiStatus::Input.into() };
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(entry) = host_mapping(descriptor, level) else { return RmiStatus::Input.into() };
        let Some(walk) = unprotected(&realm.rtt, ipa, level) else { return RmiStatus::Input.into() };
        if walk.level != level || walk.entry != Entry::UnassignedNs {
            return RmiStatus::Rtt(walk.level).into();
        }
        realm.rtt.set(&walk, entry);
        RmiStatus::Success.into()
    }

    /// RMI_RTT_UNMAP_UNPROTECTED: output is the end of the non-live region.
    pub fn rtt_unmap_unprotected(&mut self, rd: u64, ipa: u64, level: u64) -> Reply {
        let Some(level) = level_within(level, MIN_BLOCK_LEVEL) else { return RmiStatus::Input.into() };
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(mut walk) = unprotected(&realm.rtt, ipa, level) else { return RmiStatus::Input.into() };
        let mapped = walk.level == level && matches!(walk.entry, Entry::AssignedNs { .. });
        if mapped {
            walk.entry = Entry::UnassignedNs;
            realm.rtt.set(&walk, walk.entry);
        }
        let status = if mapped { RmiStatus::Success } else { RmiStatus::Rtt(walk.level) };
        Reply::new(status, [realm.rtt.skip_non_live(ipa, &walk)])
    }

    /// RMI_DATA_CREATE: copies a page of the host into the granule `data` and maps it as RAM. Only before activation.
    pub fn data_create(&mut self, rd: u64, data: u64, ipa: u64, source: Source<'_>) -> Reply {
        if source.flags > 1 || !self.is_in(source.address, GranuleState::Ns) {
            return RmiStatus::Input.into();
        }
        let (Source { content, flags, .. }, ram) = (source, |_| Ripas::Ram);
        let status = self.assign(rd, data, ipa, Launch::Required, ram);
        if status == RmiStatus::Success
            && let Some(realm) = self.realms.get_mut(&rd)
        {
            realm.rim.extend(&Step::Data { ipa, flags, content });
        }
        status.into()
    }

    /// RMI_DATA_CREATE_UNKNOWN: maps the granule `data`, which holds zeros, and leaves the RIPAS as it is.
    pub fn data_create_unknown(&mut self, rd: u64, data: u64, ipa: u64) -> Reply {
        self.assign(rd, data, ipa, Launch::Any, |ripas| ripas).into()
    }

    fn assign(&mut self, rd: u64, data: u64, ipa: u64, launch: Launch, to: impl Fn(Ripas) -> Ripas) -> RmiStatus {
        if data == rd || !self.is_in(data, GranuleState::Delegated) || data > ADDRESS_MASK {
            return RmiStatus::Input;
        }
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input };
        if launch == Launch::Required && realm.state != RealmState::New {
            return RmiStatus::Realm(0);
        }
        let Some(walk) = protected_page(realm, ipa) else { return RmiStatus::Input };
        let (PAGE_LEVEL, Entry::Unassigned(ripas)) = (walk.level, walk.entry) else {
            return RmiStatus::Rtt(walk.level);
        };
        realm.rtt.set(&walk, Entry::Assigned { ripas: to(ripas), frame: data / GRANULE_SIZE });
        self.set_granule(data, GranuleState::Data);
        RmiStatus::Success
    }

    /// RMI_DATA_DESTROY: output 1 is the granule, wiped and delegated, output 2 the end of the non-live region.
    ///
    /// What was RAM becomes DESTROYED: the realm cannot use the address again unless it agrees to.
    pub fn data_destroy(&mut self, rd: u64, ipa: u64) -> Reply {
        let Some(realm) = self.realms.get_mut(&rd) else { return RmiStatus::Input.into() };
        let Some(mut walk) = protected_page(realm, ipa) else { return RmiStatus::Input.into() };
        let (PAGE_LEVEL, Entry::Assigned { ripas, frame }) = (walk.level, walk.entry) else {
            return Reply::new(RmiStatus::Rtt(walk.level), [0, realm.rtt.skip_non_live(ipa, &walk)]);
        };
        let left = if ripas == Ripas::Empty { Ripas::Empty } else { Ripas::Destroyed };
        walk.entry = Entry::Unassigned(left);
        realm.rtt.set(&walk, walk.entry);
        let top = realm.rtt.skip_non_live(ipa, &walk);
        let address = frame * GRANULE_SIZE;
        self.set_granule(address, GranuleState::Delegated);
        Reply::new(RmiStatus::Success, [address, top])
    }

    /// RMI_RTT_INIT_RIPAS: UNASSIGNED addresses become RAM, measured entry by entry; output is the end of what was done,
    /// which may be less than what was asked for.
    pub fn rtt_init_ripas(&mut self, rd: u64, base: u64, top: u64) -> Reply {
        let Some(realm) = self.realms.get_mut(&rd).filter(|_| base < top) else { return RmiStatus::Input.into() };
        let valid = is_entry(&realm.rtt, base, PAGE_LEVEL) && is_entry(&realm.rtt, top, PAGE_LEVEL);
        if !valid || !realm.rtt.in_par(base) || !realm.rtt.in_par(top - 1) {
            return RmiStatus::Input.into();
        }
        if realm.state != RealmState::New {
            return RmiStatus::Realm(0).into();
        }
        let walk = realm.rtt.walk(base, PAGE_LEVEL);
        let done = if walk.base() == base { init_entries(realm, &walk, top) } else { base };
        range_reply(done, base, walk.level)
    }

    /// RMI_RTT_SET_RIPAS: carries out the RIPAS change that the REC waits for, as far as one table and the entries
    /// allow; output is the end of what was done.
    pub fn rtt_set_ripas(&mut self, rd: u64, rec: u64, base: u64, top: u64) -> Reply {
        let (Some(realm), Some(vcpu)) = (self.realms.get_mut(&rd).filter(|_| base < top), self.recs.get_mut(&rec))
        else {
            return RmiStatus::Input.into();
        };
        if vcpu.is_running() || vcpu.rd != rd {
            return RmiStatus::Rec.into();
        }
        let change = vcpu.ripas_change;
        if base != change.addr || top > change.top {
            return RmiStatus::Input.into();
        }
        let walk = realm.rtt.walk(base, PAGE_LEVEL);
        let aligned = walk.base() == base;
        let done = if aligned { set_entries(&mut realm.rtt, &walk, top, change.ripas, change.destroyed) } else { base };
        vcpu.ripas_change.addr = done;
        range_reply(done, base, walk.level)
    }
}

/// Whether a command needs a realm that is still being built.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Launch {
    Required,
    Any,
}

fn range_reply(done: u64, base: u64, level: u8) -> Reply {
    if done > base { Reply::new(RmiStatus::Success, [done]) } else { RmiStatus::Rtt(level).into() }
}

fn protected_page(realm: &Realm, ipa: u64) -> Option<Walk> {
    (realm.rtt.in_par(ipa) && is_aligned(ipa, PAGE_LEVEL)).then(|| realm.rtt.walk(ipa, PAGE_LEVEL))
}

fn unprotected(rtt: &Rtt, ipa: u64, level: u8) -> Option<Walk> {
    (is_entry(rtt, ipa, level) && !rtt.in_par(ipa)).then(|| rtt.walk(ipa, level))
}

/// The leaf that the table below `parent` folds into, or the level that the refusal reports.
///
/// A table whose entries map memory, or of which all 512 are tables, is refused with the parent's level when the leaf
/// would be a block larger than 1 GiB; everything else that is not homogeneous is refused with the table's level.
fn fold_target(rtt: &Rtt, parent: &Walk) -> Result<Entry, u8> {
    let level = parent.level + 1;
    let leaf = rtt.foldable(parent);
    let maps = leaf.is_some_and(|leaf| leaf.hipas() == Hipas::Assigned);
    let full = rtt.refcount(level, Rtt::child_first(parent)) == 512;
    if level <= MIN_BLOCK_LEVEL && (maps || full) {
        return Err(parent.level);
    }
    leaf.ok_or(level)
}

/// Makes UNASSIGNED entries from `walk` up to `top` RAM; answers the address after the last one.
fn init_entries(realm: &mut Realm, walk: &Walk, top: u64) -> u64 {
    let (level, end) = (walk.level, Rtt::range_end(walk, top));
    let mut index = walk.index;
    while let Some((len, Entry::Unassigned(Ripas::Empty | Ripas::Ram))) = realm.rtt.run(level, index, end) {
        realm.rtt.fill(level, index, len, Entry::Unassigned(Ripas::Ram));
        for entry in index..index + len {
            let (base, top) = (entry << shift(level), (entry + 1) << shift(level));
            realm.rim.extend(&Step::Ripas { base, top });
        }
        index += len;
    }
    index << shift(level)
}

/// Gives entries from `walk` up to `top` another RIPAS; answers the address after the last one that took it.
fn set_entries(rtt: &mut Rtt, walk: &Walk, top: u64, to: Ripas, destroyed: ChangeDestroyed) -> u64 {
    let (level, end) = (walk.level, Rtt::range_end(walk, top));
    let mut index = walk.index;
    while let Some((len, entry)) = rtt.run(level, index, end) {
        let Some(changed) = entry.with_ripas(to, destroyed) else { break };
        if changed != entry {
            rtt.fill(level, index, len, changed);
        }
        index += len;
    }
    index << shift(level)
}
