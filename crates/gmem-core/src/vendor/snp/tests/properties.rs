//! Random commands against the invariants of the specification, and against a table of pages.

use super::*;
use crate::effort::{cases, few};
use alloc::collections::BTreeSet;

/// What the specification states about every reachable table.
fn check_invariants(machine: &Machine) {
    let mut pages = 0;
    for (range, entry) in machine.rmp.all_runs() {
        pages += range.len();
        assert!(machine.rmp.covered().covers(range), "an entry outside the table");
        let large = entry.size() == RmpSize::Page2M;
        let whole = range.start().0 % 512 == 0 && range.len() % 512 == 0 && entry.gfn.0 % 512 == 0;
        assert!(!large || (whole && entry.assigned()), "a torn 2 MiB entry: {range:?} {entry:?}");
        let validated = entry.bits.contains(EntryBits::VALIDATED);
        assert!(!validated || (entry.assigned() && entry.asid != Asid::HOST), "validated without an owner");
        let context = entry.state() == PageState::Context;
        let known = |pfn| machine.guest(pfn).is_some();
        assert!(!context || range.pages().all(known), "a context page without a guest");
        assert!(entry.assigned() || entry.state() == PageState::HvFixed, "an entry of a host page");
    }
    assert!(pages <= machine.rmp.covered().len(), "a page has two entries");
    let mut asids: Vec<_> = machine.guests().filter_map(|(_, guest)| guest.asid).collect();
    let active = asids.len();
    asids.sort();
    asids.dedup();
    assert_eq!(asids.len(), active, "two guests share an ASID");
    for (page, _) in machine.guests() {
        assert_eq!(machine.rmp.state(page), Some(PageState::Context));
    }
}

/// An independent table: one entry per page, 2 MiB kept as a flag on each page, every rule written per page.
#[derive(Clone, PartialEq, Debug)]
struct Naive(Vec<Option<NaiveEntry>>);

/// Guest page, owner, large, immutable, validated.
type NaiveEntry = (u64, u16, bool, bool, bool);

impl Naive {
    fn of(rmp: &Rmp) -> Self {
        let page = |pfn| {
            let entry = rmp.entry(Pfn(pfn))?;
            let bit = |bit| entry.bits.contains(bit);
            Some((
                entry.gfn.0,
                entry.asid.0,
                bit(EntryBits::LARGE),
                bit(EntryBits::IMMUTABLE),
                bit(EntryBits::VALIDATED),
            ))
        };
        Self((0..2048).map(page).collect())
    }

    /// RMPUPDATE of pages that are assigned or free, without locks and fixed pages.
    fn rmpupdate(&mut self, pfn: u64, update: RmpUpdate) -> Result<(), RmpError> {
        let large = update.size == RmpSize::Page2M;
        let count = if large { 512 } else { 1 };
        let bad = !pfn.is_multiple_of(count)
            || pfn + count > 2048
            || (!update.assigned && (update.immutable || update.asid.0 != 0))
            || (update.assigned && !update.gfn.0.is_multiple_of(count));
        if bad {
            return Err(RmpError::Input);
        }
        let pages = usize::try_from(pfn).unwrap()..usize::try_from(pfn + count).unwrap();
        if self.0[pages.start].is_some_and(|page| page.3) {
            return Err(RmpError::Permission);
        }
        if self.0[pages.clone()].iter().flatten().any(|page| page.2 != large) {
            return Err(RmpError::Overlap);
        }
        for (offset, page) in self.0[pages].iter_mut().enumerate() {
            let step = if update.asid.0 == 0 { 0 } else { offset as u64 };
            let gfn = update.gfn.0 + step;
            let kept = page.is_some_and(|old| (old.0, old.1) == (gfn, update.asid.0) && old.4);
            *page = update.assigned.then_some((gfn, update.asid.0, large, update.immutable, kept));
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(256)))]

    #[test]
    fn random_commands_keep_the_invariants(stream in prop::collection::vec(any::<[u8; 8]>(), 1..few(20, 200))) {
        let mut machine = launching();
        for bytes in stream {
            let command = Command::decode(bytes);
            let before = machine.clone();
            let result = command.apply(&mut machine);
            prop_assert!(result.is_ok() || machine == before, "{:?} was refused and changed the machine", command);
            check_invariants(&machine);
        }
    }

    #[test]
    fn rmpupdate_agrees_with_a_table_of_pages(stream in prop::collection::vec(any::<[u8; 8]>(), 1..few(4, 60))) {
        let mut machine = machine();
        for mut bytes in stream {
            bytes[0] %= 12;
            match Command::decode(bytes) {
                Command::RmpUpdate(pfn, update) => {
                    let mut naive = Naive::of(&machine.rmp);
                    prop_assert_eq!(machine.rmp.rmpupdate(pfn, update), naive.rmpupdate(pfn.0, update));
                    prop_assert_eq!(Naive::of(&machine.rmp), naive);
                }
                command @ (Command::Pvalidate(..) | Command::Psmash(_)) => { let _ = command.apply(&mut machine); }
                _ => {}
            }
        }
    }

    #[test]
    fn releasing_a_range_is_releasing_each_of_its_entries(
        stream in prop::collection::vec(any::<[u8; 8]>(), 1..few(16, 80)), start in 0u64..2047, len in 1u64..1600,
    ) {
        let mut machine = machine();
        for bytes in stream {
            let _ = Command::decode(bytes).apply(&mut machine);
        }
        let range = PfnRange::new(Pfn(start), Pfn((start + len).min(2048))).unwrap();
        let mut each = machine.rmp.clone();
        for edge in [range.start(), range.end()] {
            let head = edge.align_down(Level::Page2M);
            if head != edge && each.entry(edge).is_some_and(|entry| entry.size() == RmpSize::Page2M) {
                let _ = each.psmash(head);
            }
        }
        let mut pfn = range.start();
        while pfn < range.end() {
            let size = each.entry(pfn).map_or(RmpSize::Page4K, |entry| entry.size());
            let _ = each.rmpupdate(pfn, RmpUpdate::shared(size));
            pfn = Pfn((pfn.0 & !(size.pages() - 1)) + size.pages());
        }
        machine.rmp.release(range);
        prop_assert_eq!(machine.rmp, each);
    }
}

#[test]
fn a_byte_stream_reaches_every_kind_of_state() {
    let mut machine = machine();
    let mut seen = BTreeSet::new();
    let mut state = 0u64;
    let mut random = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb).to_le_bytes()
    };
    let count = few(100, 40_000);
    let bytes: Vec<u8> = (0..count).flat_map(|_| random()).collect();
    let done = run_bytes(&mut machine, &bytes, |machine| {
        seen.extend(machine.rmp.all_runs().map(|(_, entry)| entry.state()));
    });
    assert!(done > count / 10, "only {done} commands were legal");
    if !cfg!(miri) {
        let unreachable = [PageState::Hypervisor, PageState::Metadata];
        let all: BTreeSet<_> = ALL_STATES.into_iter().filter(|state| !unreachable.contains(state)).collect();
        assert!(seen.is_superset(&all), "not reached: {:?}", all.difference(&seen).collect::<Vec<_>>());
    }
}
