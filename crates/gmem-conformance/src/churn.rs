//! `--churn N`: worlds are made, used and destroyed N times; what the process holds afterwards must be what it held after
//! the first few.

use std::fs;

use anyhow::{Context as _, bail};

use crate::generate::{Surface, sequence};
use crate::world::World;

/// Different sequences, met in turn, so that the later rounds repeat the earlier ones.
const SEEDS: u64 = 8;
const OPS: usize = 120;
/// Growth of the resident set that is put down to the allocator.
const SLACK_KIB: u64 = 1024;

/// What the process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    rss_kib: u64,
    descriptors: usize,
    mappings: usize,
}

/// Runs the loop and fails if something grew.
pub(crate) fn run(rounds: u64, surface: Surface, vm_type: Option<u64>) -> anyhow::Result<()> {
    let warm_up = SEEDS * 2;
    if rounds <= warm_up {
        bail!("--churn needs more than {warm_up} rounds, because the first ones only warm up");
    }
    (0..warm_up).try_for_each(|round| one(round, surface, vm_type))?;
    let before = held()?;
    (warm_up..rounds).try_for_each(|round| one(round, surface, vm_type))?;
    let after = held()?;
    println!("after {warm_up} rounds: {before:?}\nafter {rounds} rounds: {after:?}");
    judge(before, after)
}

fn judge(before: Held, after: Held) -> anyhow::Result<()> {
    if after.descriptors != before.descriptors {
        bail!("descriptors leak");
    }
    // The allocator may have split or merged one of its own.
    if after.mappings.abs_diff(before.mappings) > 4 {
        bail!("mappings leak");
    }
    if after.rss_kib > before.rss_kib + SLACK_KIB {
        bail!("memory leaks");
    }
    Ok(())
}

fn one(round: u64, surface: Surface, vm_type: Option<u64>) -> anyhow::Result<()> {
    let mut world = World::new(vm_type).context("cannot open /dev/kvm")?;
    for op in sequence(round % SEEDS, OPS, surface) {
        world.perform(op);
    }
    Ok(())
}

/// The resident set of this process.
pub(crate) fn resident_kib() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(rss.trim().trim_end_matches(" kB").parse()?)
}

fn held() -> anyhow::Result<Held> {
    Ok(Held {
        rss_kib: resident_kib()?,
        descriptors: fs::read_dir("/proc/self/fd")?.count(),
        mappings: fs::read_to_string("/proc/self/maps")?.lines().count(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_told_from_noise() {
        let before = Held { rss_kib: 4000, descriptors: 5, mappings: 60 };
        assert!(judge(before, before).is_ok());
        assert!(judge(before, Held { rss_kib: 4900, ..before }).is_ok());
        assert!(judge(before, Held { rss_kib: 6000, ..before }).is_err());
        assert!(judge(before, Held { descriptors: 6, ..before }).is_err());
        assert!(judge(before, Held { mappings: 70, ..before }).is_err());
    }
}
