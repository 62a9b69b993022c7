//! The node of 1 GiB in its plain form: a run for each 2 MiB block.

use super::arc::{Arc, BLOCK_SHIFT};
use super::bitmap::Bitmap;
use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Release},
};

/// Blocks of a leaf.
const BLOCKS: usize = 512;

/// What takes the place of a leaf with a block whose pages are not one run.
type Dense = Bitmap<4096>;

/// 512 blocks of 2 MiB, in each of which the pages in the set are one run.
///
/// The blocks' states take 4 bytes each: those of 1 TiB, 2 MiB, fit the caches of most machines, and a query does not wait
/// for memory. A block whose pages are no run makes a bitmap of the whole leaf.
pub(super) struct Leaf {
    blocks: [AtomicU32; BLOCKS],
    /// Of the blocks.
    census: Census,
}

/// The parts of a span, block by block.
fn parts(span: Span) -> impl Iterator<Item = (u64, Span)> {
    let (first, last) = span.children(BLOCK_SHIFT);
    (first..=last).map(move |block| (block, span.part(block, BLOCK_SHIFT)))
}

impl Leaf {
    #[inline]
    fn block(&self, block: u64) -> Arc {
        // Acquire: see `put`.
        Arc::from_bits(self.blocks[index(block, BLOCKS)].load(Acquire))
    }

    fn put(&self, block: u64, old: Arc, new: Arc) {
        if new != old {
            // Release, for `block`: whoever sees this change also sees the changes that the writer made before it.
            self.blocks[index(block, BLOCKS)].store(new.bits(), Release);
            self.census.replace(old.whole(), new.whole());
        }
    }

    /// Gives a part of a block `value`, if the block then still is a run.
    #[inline]
    fn set_part(&self, block: u64, part: Span, value: bool) -> Result<(), Box<Dense>> {
        let old = self.block(block);
        let new = old.set(part, value).ok_or_else(|| self.to_dense())?;
        self.put(block, old, new);
        Ok(())
    }

    #[cold]
    fn to_dense(&self) -> Box<Dense> {
        let bitmap = Dense::boxed(false);
        (0..BLOCKS as u64).for_each(|block| bitmap.put_block(block, self.block(block)));
        bitmap
    }
}

impl Node for Leaf {
    const SHIFT: u32 = BLOCK_SHIFT + BLOCKS.trailing_zeros();
    type Dense = Dense;

    fn uniform(value: bool) -> Self {
        Self {
            blocks: core::array::from_fn(|_| AtomicU32::new(Arc::uniform(value).bits())),
            census: Census::of(BLOCKS as u64, Values::only(value)),
        }
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            self.blocks.iter().for_each(|block| block.store(Arc::uniform(value).bits(), Release));
            self.census.set(BLOCKS as u64, Values::only(value));
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.census.values()
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        self.block(page >> BLOCK_SHIFT).get(page)
    }

    fn set(&self, span: Span, value: bool) -> Result<(), Box<Dense>> {
        parts(span).try_for_each(|(block, part)| self.set_part(block, part, value))
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> Result<bool, Box<Dense>> {
        self.set_part(page >> BLOCK_SHIFT, Span::page(page & ((1 << BLOCK_SHIFT) - 1)), value)?;
        Ok(self.whole() != Values::MIXED)
    }

    fn values(&self, span: Span) -> Values {
        let mut values = Values::NONE;
        for (block, part) in parts(span) {
            values = values.with(self.block(block).values(part));
            if values == Values::MIXED {
                break;
            }
        }
        values
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        parts(span).find_map(|(block, part)| {
            let page = self.block(block).find(part, value)?;
            Some((block << BLOCK_SHIFT) + page)
        })
    }

    fn count(&self, span: Span) -> u64 {
        parts(span).map(|(block, part)| self.block(block).count(part)).sum()
    }

    fn heap_bytes(&self) -> usize {
        0
    }
}
