//! Random commands against what they mean for each page, and against the use of each granule.

use super::*;
use crate::effort::{cases, few};

#[derive(Clone, Debug)]
enum Op {
    Delegate(u64),
    Undelegate(u64),
    Create {
        granule: u64,
        page: u64,
    },
    Unknown {
        granule: u64,
        page: u64,
    },
    /// Delegates and maps the 512 granules from `skew` of the data area at a 2 MiB block.
    Block {
        block: u64,
        skew: u64,
    },
    Destroy(u64),
    Table {
        granule: u64,
        block: u64,
        level: u64,
    },
    Fold {
        block: u64,
        level: u64,
    },
    DropTable {
        block: u64,
        level: u64,
    },
    Init {
        page: u64,
        pages: u64,
    },
    Set {
        page: u64,
        pages: u64,
        ripas: u64,
        destroyed: u64,
    },
    Unprotected {
        page: u64,
        granule: u64,
    },
    Activate,
    RealmDestroy,
    RecDestroy,
}

/// Pages of the area that the property looks at: two 2 MiB blocks.
const AREA: u64 = 1024;

fn op() -> impl Strategy<Value = Op> {
    let granule = || prop_oneof![3 => 20u64..30, 1 => Just(1u64), 1 => Just(5u64), 1 => 1024u64..1028];
    let page = || prop_oneof![3 => 0u64..6, 1 => 508u64..516];
    let level = || prop_oneof![4 => Just(3u64), 1 => Just(2), 1 => Just(1), 1 => Just(4)];
    prop_oneof![
        granule().prop_map(Op::Delegate),
        granule().prop_map(Op::Undelegate),
        (granule(), page()).prop_map(|(granule, page)| Op::Create { granule, page }),
        (granule(), page()).prop_map(|(granule, page)| Op::Unknown { granule, page }),
        (0u64..2, 0u64..2).prop_map(|(block, skew)| Op::Block { block, skew }),
        page().prop_map(Op::Destroy),
        (granule(), 0u64..2, level()).prop_map(|(granule, block, level)| Op::Table { granule, block, level }),
        (0u64..2, level()).prop_map(|(block, level)| Op::Fold { block, level }),
        (0u64..2, level()).prop_map(|(block, level)| Op::DropTable { block, level }),
        (page(), 0u64..520).prop_map(|(page, pages)| Op::Init { page, pages }),
        (page(), 0u64..520, 0u64..2, 0u64..2).prop_map(|(page, pages, ripas, destroyed)| Op::Set {
            page,
            pages,
            ripas,
            destroyed
        }),
        (page(), granule()).prop_map(|(page, granule)| Op::Unprotected { page, granule }),
        Just(Op::Activate),
        Just(Op::RealmDestroy),
        Just(Op::RecDestroy),
    ]
}

/// What a page of the area is, by the meaning of the commands alone: no tables, no levels.
type Flat = Vec<(Option<u64>, Ripas)>;

fn apply(rmm: &mut Rmm, flat: &mut Flat, op: &Op) -> Reply {
    let rd = at(1);
    let index = |page: u64| usize::try_from(page).unwrap();
    let pages = |from: u64, to: u64| (from / PAGE..(to / PAGE).min(AREA)).map(|page| usize::try_from(page).unwrap());
    match *op {
        Op::Delegate(granule) => rmm.granule_delegate(at(granule)),
        Op::Undelegate(granule) => rmm.granule_undelegate(at(granule)),
        Op::Create { granule, page } => {
            let reply = rmm.data_create(rd, at(granule), page * PAGE, source(&[1; 4096]));
            if reply.is_success() {
                flat[index(page)] = (Some(at(granule)), Ripas::Ram);
            }
            reply
        }
        Op::Unknown { granule, page } => {
            let reply = rmm.data_create_unknown(rd, at(granule), page * PAGE);
            if reply.is_success() {
                flat[index(page)].0 = Some(at(granule));
            }
            reply
        }
        Op::Block { block, skew } => {
            for page in 0..512 {
                let granule = 2048 + block * 1024 + skew + page;
                rmm.granule_delegate(at(granule));
                apply(rmm, flat, &Op::Unknown { granule, page: block * 512 + page });
            }
            RmiStatus::Success.into()
        }
        Op::Destroy(page) => {
            let reply = rmm.data_destroy(rd, page * PAGE);
            if reply.is_success() {
                let (was, ripas) = flat[index(page)];
                assert_eq!(was, Some(reply.x[0]));
                flat[index(page)] = (None, if ripas == Ripas::Empty { ripas } else { Ripas::Destroyed });
            }
            reply
        }
        Op::Table { granule, block, level } => rmm.rtt_create(rd, at(granule), block * BLOCK, level),
        Op::Fold { block, level } => rmm.rtt_fold(rd, block * BLOCK, level),
        Op::DropTable { block, level } => {
            let base = if level == 2 { 0 } else { block * BLOCK };
            let reply = rmm.rtt_destroy(rd, base, level);
            if reply.is_success() {
                let size = if level == 2 { 512 * BLOCK } else { BLOCK };
                pages(base, base + size).for_each(|page| flat[page] = (None, Ripas::Destroyed));
            }
            reply
        }
        Op::Init { page, pages: count } => {
            let reply = rmm.rtt_init_ripas(rd, page * PAGE, (page + count) * PAGE);
            if reply.is_success() {
                pages(page * PAGE, reply.x[0]).for_each(|page| flat[page].1 = Ripas::Ram);
            }
            reply
        }
        Op::Set { page, pages: count, ripas, destroyed } => {
            let (base, top) = (page * PAGE, (page + count) * PAGE);
            if rmm.rec_enter(at(30), at(100), RecEntry::default()).is_success() {
                let mut regs = [0; 11];
                regs[..5].copy_from_slice(&[rsi::IPA_STATE_SET, base, top, ripas, destroyed]);
                let _ = rmm.realm_step(at(30), RealmStep::Smc(regs));
                let _ = rmm.realm_step(at(30), RealmStep::Fiq);
            }
            let reply = rmm.rtt_set_ripas(rd, at(30), base, top);
            if reply.is_success() {
                let to = if ripas == 1 { Ripas::Ram } else { Ripas::Empty };
                pages(base, reply.x[0]).for_each(|page| flat[page].1 = to);
            }
            reply
        }
        Op::Unprotected { page, granule } => {
            rmm.rtt_map_unprotected(rd, (1 << 38) + page * PAGE, 3, at(granule) | 0xd8)
        }
        Op::Activate => rmm.realm_activate(rd),
        Op::RealmDestroy => rmm.realm_destroy(rd),
        Op::RecDestroy => rmm.rec_destroy(at(30)),
    }
}

/// Every granule has the one use that its state says, and every use has its granule.
fn assert_granules_match(rmm: &Rmm) {
    let mut used: BTreeMap<u64, GranuleState> = BTreeMap::new();
    let mut take = |granule: u64, state| assert_eq!(used.insert(granule, state), None, "granule {granule} twice");
    for (rd, realm) in rmm.realms() {
        take(rd / PAGE, GranuleState::Rd);
        (0..realm.rtt_num_start).for_each(|table| take(realm.rtt_base / PAGE + table, GranuleState::Rtt));
        for level in 0..=PAGE_LEVEL {
            for (_, len, entry) in realm.rtt().entries(level) {
                let pages = 1u64 << (9 * (PAGE_LEVEL - level));
                match *entry {
                    Entry::Table(first) => (first..first + len).for_each(|table| take(table, GranuleState::Rtt)),
                    Entry::Assigned { frame, .. } => {
                        (frame * pages..(frame + len) * pages).for_each(|page| take(page, GranuleState::Data));
                    }
                    Entry::Unassigned(_) | Entry::UnassignedNs | Entry::AssignedNs { .. } => {}
                }
            }
        }
    }
    for (&rec, vcpu) in &rmm.recs {
        take(rec / PAGE, GranuleState::Rec);
        vcpu.aux.iter().for_each(|aux| take(aux / PAGE, GranuleState::RecAux));
    }
    for granule in some(0..8192, 61) {
        let state = rmm.granule(at(granule)).unwrap();
        let free = matches!(state, GranuleState::Ns | GranuleState::Delegated);
        let want = used.get(&granule).copied();
        assert_eq!(want, (!free).then_some(state), "granule {granule}");
    }
}

/// A table of level L has its 512 entries exactly where level L-1 says that there is a table.
fn assert_tables_are_whole(rtt: &Rtt) {
    for level in rtt.start_level()..PAGE_LEVEL {
        let below: u64 = rtt.entries(level + 1).map(|(_, len, _)| len).sum();
        let tables: u64 =
            rtt.entries(level).filter(|(_, _, entry)| matches!(entry, Entry::Table(_))).map(|(_, len, _)| len).sum();
        assert_eq!(below, tables * 512, "level {level}");
    }
}

fn assert_flat(rmm: &Rmm, flat: &Flat) {
    let Some(realm) = rmm.realm(at(1)) else { return };
    for (page, want) in some((0..).zip(flat), 37) {
        let walk = realm.rtt().walk(page * PAGE, PAGE_LEVEL);
        let offset = page * PAGE - walk.base();
        let address = match walk.entry {
            Entry::Assigned { .. } => Rtt::address(&walk.entry, walk.level).map(|address| address + offset),
            _ => None,
        };
        assert_eq!((address, walk.entry.ripas().unwrap()), *want, "page {page}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(40)))]
    #[test]
    fn random_commands_keep_the_invariants(ops in prop::collection::vec(op(), 1..few(6, 50))) {
        let mut rmm = new_realm();
        ok(add_rec(&mut rmm, 30, 40, 0, RUNNABLE));
        let mut flat: Flat = vec![(None, Ripas::Empty); usize::try_from(AREA).unwrap()];
        for op in &ops {
            let before = rmm.clone();
            let reply = apply(&mut rmm, &mut flat, op);
            // A refused SET_RIPAS follows a request of the realm, which is a change of its own.
            if !reply.is_success() && !matches!(op, Op::Set { .. }) {
                prop_assert_eq!(&rmm, &before, "{:?} was refused", op);
            }
            if let Some(realm) = rmm.realm(at(1)) {
                assert_tables_are_whole(realm.rtt());
            }
            assert_flat(&rmm, &flat);
        }
        assert_granules_match(&rmm);
        tear_down(&mut rmm);
        assert_granules_match(&rmm);
        prop_assert_eq!(rmm.realms().count(), 0);
        let all = PfnRange::new(Pfn(0), Pfn(8192)).unwrap();
        prop_assert!(rmm.granules_in(all).all(|(_, _, state)| state == GranuleState::Delegated));
    }
}

/// Destroys everything with the commands that a host would use, which must always be possible.
fn tear_down(rmm: &mut Rmm) {
    rmm.rec_destroy(at(30));
    for block in 0..AREA / 512 {
        if rmm.rtt_read_entry(at(1), block * BLOCK, 3).x[..2] == [2, 1] {
            ok(rmm.granule_delegate(at(8000)));
            ok(rmm.rtt_create(at(1), at(8000), block * BLOCK, 3));
            for page in 0..512 {
                ok(rmm.data_destroy(at(1), block * BLOCK + page * PAGE));
            }
            ok(rmm.rtt_destroy(at(1), block * BLOCK, 3));
            ok(rmm.granule_undelegate(at(8000)));
        }
    }
    for page in 0..AREA {
        rmm.data_destroy(at(1), page * PAGE);
    }
    for level in [3, 2] {
        for base in [0, BLOCK, 1 << 38] {
            rmm.rtt_destroy(at(1), base, level);
        }
    }
    rmm.realm_destroy(at(1));
}
