//! The attributes of a range as they were.

use gmem_core::Vm;
use gmem_core::addr::{Gfn, GfnRange};
use gmem_core::vendor::Side;
use rustix::io::Errno;

/// In four bytes for each run: a conversion that goes back from every other page of a guest is what frees mappings, and must not
/// fail for want of them because this took too much.
#[derive(Debug)]
pub(crate) struct Snapshot {
    start: Gfn,
    /// Pages on the private side and on the shared one, in turn.
    lengths: Vec<u32>,
}

impl Snapshot {
    /// # Errors
    /// ENOMEM. At the limit of mappings malloc may have nothing left, too, and a client must not be ended for it.
    pub(crate) fn of(core: &Vm, range: GfnRange) -> Result<Self, Errno> {
        let mut all = Self { start: range.start(), lengths: Vec::new() };
        for (run, side) in core.attribute_runs(range) {
            all.add(run.len(), side)?;
        }
        Ok(all)
    }

    fn next_side(&self) -> Side {
        if self.lengths.len().is_multiple_of(2) { Side::Private } else { Side::Shared }
    }

    fn add(&mut self, len: u64, side: Side) -> Result<(), Errno> {
        if self.next_side() != side {
            self.push(0)?;
        }
        let mut left = len;
        while let Err(_) | Ok(u32::MAX) = u32::try_from(left) {
            self.push(u32::MAX)?;
            self.push(0)?;
            left -= u64::from(u32::MAX);
        }
        self.push(u32::try_from(left).unwrap_or(u32::MAX))
    }

    fn push(&mut self, len: u32) -> Result<(), Errno> {
        self.lengths.try_reserve(1).map_err(|_| Errno::NOMEM)?;
        self.lengths.push(len);
        Ok(())
    }

    /// The runs, in ascending order.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (GfnRange, Side)> {
        let sides = [Side::Private, Side::Shared].into_iter().cycle();
        let mut next = self.start;
        self.lengths.iter().zip(sides).filter_map(move |(&len, side)| {
            let start = next;
            next = Gfn(start.0 + u64::from(len));
            GfnRange::new(start, next).map(|run| (run, side))
        })
    }
}

#[cfg(test)]
mod tests {
    use gmem_core::arch::Arch;
    use gmem_core::ops::{self, SetAttributes};
    use gmem_core::vm::Rules;

    use super::*;

    #[test]
    fn a_range_becomes_again_what_it_was() {
        const LONG: u64 = 1 << 33;
        for private in
            [[(0, 1), (2, 1), (7, 3)], [(1, 1), (3, LONG), (LONG + 9, 1)], [(5, 5), (20, LONG), (LONG + 20, 1)]]
        {
            let mut core = Vm::new(Arch::SwProtected, Rules::default());
            let set = |core: &mut Vm, range, side| ops::run(&mut SetAttributes::new(range, side), core, |_, _, _| {});
            for (start, len) in private {
                set(&mut core, GfnRange::with_len(Gfn(start), len).unwrap(), Side::Private);
            }
            let whole = GfnRange::new(Gfn(0), Gfn(LONG * 4)).unwrap();
            let runs = |core: &Vm| core.attribute_runs(whole).collect::<Vec<_>>();
            let before = runs(&core);
            let snapshot = Snapshot::of(&core, whole).unwrap();
            set(&mut core, whole, Side::Private);
            snapshot.runs().for_each(|(range, side)| set(&mut core, range, side));
            assert_eq!(runs(&core), before);
        }
    }
}
