//! Entering guest memory into the realm's tables, and taking it out.

use super::*;

impl Cca {
    /// Maps guest memory.
    ///
    /// A private page that cannot be delegated is taken for one that another vCPU has just mapped, as in KVM: the call
    /// succeeds and maps nothing. A larger private mapping is made of single pages and ends early at such a page.
    ///
    /// # Errors
    /// [`Cause::Busy`] before activation, [`Cause::NoDevice`] where the RMM refuses, [`Cause::NoMemory`] for a table.
    pub fn map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        self.require(RealmState::Active)?;
        match mapping.side {
            Side::Shared => self.map_shared(mapping),
            Side::Private => self.map_pages(mapping),
        }
    }

    pub(super) fn map_pages(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        let count = mapping.level.pages();
        let range = GfnRange::with_len(mapping.gfn, count).ok_or(unasked(Cause::Invalid))?;
        // Nothing is mapped unless everything can be.
        for gfn in range.pages() {
            self.check_unassigned(gfn.gpa())?;
        }
        for (gfn, page) in range.pages().zip(0..count) {
            let pfn = mapping.pfn.checked_add(page).ok_or(unasked(Cause::Invalid))?;
            if !self.map_private(gfn.gpa(), address(pfn))? {
                break;
            }
        }
        Ok(())
    }

    /// `false` if the granule was not the host's.
    pub(super) fn map_private(&mut self, ipa: u64, granule: u64) -> Result<bool, Refusal> {
        if !self.rmm.granule_delegate(granule).is_success() {
            return Ok(false);
        }
        let mapped = self.with_tables(ipa, PAGE_LEVEL, |cca| {
            done(cca.rmm.data_create_unknown(cca.rd, granule, ipa)).map_err(no_device)
        });
        if mapped.is_err() {
            self.rmm.granule_undelegate(granule);
        }
        mapped.map(|()| true)
    }

    /// Refuses what RMI_DATA_CREATE would refuse, before a table is made for it.
    pub(super) fn check_unassigned(&self, ipa: u64) -> Result<(), Refusal> {
        let rtt = self.realm().map(Realm::rtt).filter(|rtt| rtt.in_par(ipa));
        let walk = rtt.ok_or(refusal(Cause::NoDevice, RmiStatus::Input))?.walk(ipa, PAGE_LEVEL);
        match walk.entry {
            Entry::Assigned { .. } => Err(refusal(Cause::NoDevice, RmiStatus::Rtt(walk.level))),
            _ => Ok(()),
        }
    }

    pub(super) fn map_shared(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        let (ipa, level) = (self.ipa(mapping.gfn, Side::Shared), level_of(mapping.level));
        let descriptor = address(mapping.pfn) | NS_ATTRIBUTES;
        let map = |cca: &mut Self| cca.rmm.rtt_map_unprotected(cca.rd, ipa, u64::from(level), descriptor);
        self.with_tables(ipa, level, |cca| {
            let first = map(cca);
            // A mapping of the same level is replaced; a table means that smaller ones exist, which the caller zaps first.
            let replaced = first.status == RmiStatus::Rtt(level)
                && cca.rmm.rtt_unmap_unprotected(cca.rd, ipa, u64::from(level)).is_success();
            done(if replaced { map(cca) } else { first }).map_err(no_device)
        })
    }

    /// Creates the tables that an entry of `level` at `ipa` needs and does something there; if that fails the tables are
    /// folded again, which unlike destroying them leaves no trace.
    pub(super) fn with_tables(
        &mut self,
        ipa: u64,
        level: u8,
        act: impl FnOnce(&mut Self) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let before = self.realm().map_or(level, |realm| realm.rtt().walk(ipa, level).level);
        let result = self.ensure_tables(ipa, level).and_then(|()| act(self));
        if result.is_err() {
            for created in (before + 1..=level).rev() {
                let base = ipa & !((1 << shift(created - 1)) - 1);
                let folded = self.rmm.rtt_fold(self.rd, base, u64::from(created));
                if folded.is_success() {
                    self.give_back(folded.x[0]);
                }
            }
        }
        result
    }

    /// Creates the tables that an entry of `level` at `ipa` needs.
    pub(super) fn ensure_tables(&mut self, ipa: u64, level: u8) -> Result<(), Refusal> {
        while let Some(walk) = self.realm().map(|realm| realm.rtt().walk(ipa, level))
            && walk.level < level
        {
            let table = self.take_delegated().ok_or(unasked(Cause::NoMemory))?;
            let reply = self.rmm.rtt_create(self.rd, table, walk.base(), u64::from(walk.level + 1));
            if !reply.is_success() {
                self.give_back(table);
                return Err(no_device(reply.status));
            }
        }
        Ok(())
    }

    /// Takes a mapping away. Private memory is wiped and returned to the host; the realm loses it.
    pub fn unmap(&mut self, mapping: Mapping) -> Contents {
        match mapping.side {
            Side::Private => {
                let (start, end) = (mapping.gfn.gpa(), mapping.gfn.0.saturating_add(mapping.level.pages()));
                self.destroy_data(start, end.saturating_mul(PAGE_SIZE))
            }
            Side::Shared => {
                let ipa = self.ipa(mapping.gfn, Side::Shared);
                self.rmm.rtt_unmap_unprotected(self.rd, ipa, u64::from(level_of(mapping.level)));
                Contents::Kept
            }
        }
    }

    /// Destroys and takes back all memory in `[base, top)` of the protected half.
    pub(super) fn destroy_data(&mut self, base: u64, top: u64) -> Contents {
        let (mut at, mut contents) = (base, Contents::Kept);
        let top = top.min(self.realm().map_or(0, |realm| realm.rtt().par_size()));
        while at < top {
            let reply = self.rmm.data_destroy(self.rd, at);
            let [granule, next, ..] = reply.x;
            match reply.status {
                RmiStatus::Success => {
                    self.rmm.granule_undelegate(granule);
                    contents = Contents::Zeroed;
                }
                // A block has to become pages before one of them can go.
                RmiStatus::Rtt(level) if next == at => {
                    if self.ensure_tables(at, level + 1).is_err() {
                        return Contents::Undefined;
                    }
                    continue;
                }
                RmiStatus::Rtt(_) => {}
                RmiStatus::Input | RmiStatus::Realm(_) | RmiStatus::Rec => return contents,
            }
            at = next.max(at.saturating_add(GRANULE_SIZE));
        }
        contents
    }
}
