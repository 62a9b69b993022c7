//! The node of single pages, up to 1 GiB of them: a run per 2 MiB block, or a bitmap.

use super::arc::{Arc, BLOCK_SHIFT};
use super::bitmap::Bitmap;
use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicBool, AtomicU32,
    Ordering::{Acquire, Release},
};
use once_cell::race::OnceBox;

/// `BLOCKS` blocks of 2 MiB, which are the pages of `WORDS` words.
///
/// As long as the pages in the set are one run in each block, the blocks' states say what the pages are. They take 4 bytes
/// per block: those of 1 TiB, 2 MiB, fit the caches of most machines, and a query does not wait for memory.
///
/// A block that cannot be said so makes the bitmap say it for all blocks. Then queries wait for memory, and the fewer
/// instructions each takes, the more of them wait at the same time: the blocks are not even looked at. The bitmap stays
/// until all pages are given one value at once; it is not given up as soon as all blocks are runs, which will often
/// not be for long.
///
/// The form that is not in use is *detached*, and what it holds means nothing.
pub(super) struct Leaf<const BLOCKS: usize, const WORDS: usize> {
    blocks: [AtomicU32; BLOCKS],
    /// Of the blocks.
    census: Census,
    has_bitmap: AtomicBool,
    bitmap: OnceBox<Bitmap<WORDS>>,
}

/// The parts of a span, block by block.
fn parts(span: Span) -> impl Iterator<Item = (u64, Span)> {
    let (first, last) = span.children(BLOCK_SHIFT);
    (first..=last).map(move |block| (block, span.part(block, BLOCK_SHIFT)))
}

impl<const BLOCKS: usize, const WORDS: usize> Leaf<BLOCKS, WORDS> {
    /// The bitmap if it is attached.
    #[inline]
    pub(super) fn bitmap(&self) -> Option<&Bitmap<WORDS>> {
        // Acquire: see `attach` and `reset`.
        if self.has_bitmap.load(Acquire) { self.bitmap.get() } else { None }
    }

    /// Attaches the bitmap.
    #[cold]
    fn attach(&self) -> &Bitmap<WORDS> {
        let bitmap = self.bitmap.get_or_init(|| {
            let bitmap = Box::new(Bitmap::blank());
            bitmap.reset(false);
            bitmap
        });
        // Each word at once, not by way of an empty bitmap: readers may be inside.
        (0..BLOCKS as u64).for_each(|block| bitmap.put_block(block, self.block(block)));
        // Release, for `bitmap`: a reader that sees a bitmap attached sees what it was filled with.
        self.has_bitmap.store(true, Release);
        bitmap
    }

    #[inline]
    pub(super) fn block(&self, block: u64) -> Arc {
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
    fn set_part(&self, block: u64, part: Span, value: bool) -> Option<()> {
        let old = self.block(block);
        old.set(part, value).map(|new| self.put(block, old, new))
    }

    /// A block in the only form that its pages have: a run if they are one.
    fn canonical(&self, block: u64) -> Result<Arc, [u64; 8]> {
        match self.bitmap() {
            Some(bitmap) => {
                let words = bitmap.block(block);
                Arc::of_words(words).ok_or(words)
            }
            None => Ok(self.block(block)),
        }
    }

    fn all_canonical(&self) -> impl Iterator<Item = Result<Arc, [u64; 8]>> {
        (0..BLOCKS as u64).map(|block| self.canonical(block))
    }
}

impl<const BLOCKS: usize, const WORDS: usize> Node for Leaf<BLOCKS, WORDS> {
    const SHIFT: u32 = BLOCK_SHIFT + BLOCKS.trailing_zeros();

    fn uniform(value: bool) -> Self {
        Self {
            blocks: core::array::from_fn(|_| AtomicU32::new(Arc::uniform(value).bits())),
            census: Census::of(BLOCKS as u64, Values::only(value)),
            has_bitmap: AtomicBool::new(false),
            bitmap: OnceBox::new(),
        }
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            self.blocks.iter().for_each(|block| block.store(Arc::uniform(value).bits(), Release));
            self.census.set(BLOCKS as u64, Values::only(value));
            // Release, for `bitmap`: a reader that sees it detached sees what the blocks are.
            self.has_bitmap.store(false, Release);
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.bitmap().map_or_else(|| self.census.values(), Bitmap::whole)
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        match self.bitmap() {
            Some(bitmap) => bitmap.get(page),
            None => self.block(page >> BLOCK_SHIFT).get(page),
        }
    }

    fn set(&self, span: Span, value: bool) {
        let has_runs = || parts(span).try_for_each(|(block, part)| self.set_part(block, part, value));
        match self.bitmap() {
            Some(bitmap) => bitmap.set(span, value),
            None => has_runs().unwrap_or_else(|| self.attach().set(span, value)),
        }
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> bool {
        if let Some(bitmap) = self.bitmap() {
            return bitmap.set_page(page, value);
        }
        match self.set_part(page >> BLOCK_SHIFT, Span::page(page & ((1 << BLOCK_SHIFT) - 1)), value) {
            Some(()) => self.whole() != Values::MIXED,
            None => self.attach().set_page(page, value),
        }
    }

    fn values(&self, span: Span) -> Values {
        if let Some(bitmap) = self.bitmap() {
            return bitmap.values(span);
        }
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
        match self.bitmap() {
            Some(bitmap) => bitmap.find(span, value),
            None => parts(span).find_map(|(block, part)| {
                let page = self.block(block).find(part, value)?;
                Some((block << BLOCK_SHIFT) + page)
            }),
        }
    }

    fn count(&self, span: Span) -> u64 {
        match self.bitmap() {
            Some(bitmap) => bitmap.count(span),
            None => parts(span).map(|(block, part)| self.block(block).count(part)).sum(),
        }
    }

    fn heap_bytes(&self) -> usize {
        self.bitmap.get().map_or(0, size_of_val)
    }
}

impl<const BLOCKS: usize, const WORDS: usize> Clone for Leaf<BLOCKS, WORDS> {
    /// Copies what the pages are, with a bitmap only if some block is no run.
    fn clone(&self) -> Self {
        let copy = Self::uniform(false);
        // While a writer is at work, a bitmap keeps what it shows only if it is a copy.
        let bitmap = self.bitmap().cloned();
        let run = |block| match &bitmap {
            Some(bitmap) => Arc::of_words(bitmap.block(block)),
            None => Some(self.block(block)),
        };
        let has_runs = (0..BLOCKS as u64).try_for_each(|block| {
            copy.put(block, Arc::uniform(false), run(block)?);
            Some(())
        });
        if let (None, Some(bitmap)) = (has_runs, bitmap) {
            copy.has_bitmap.store(copy.bitmap.set(Box::new(bitmap)).is_ok(), Release);
        }
        copy
    }
}

impl<const BLOCKS: usize, const WORDS: usize> PartialEq for Leaf<BLOCKS, WORDS> {
    fn eq(&self, other: &Self) -> bool {
        self.all_canonical().eq(other.all_canonical())
    }
}

impl<const BLOCKS: usize, const WORDS: usize> Eq for Leaf<BLOCKS, WORDS> {}

impl<const BLOCKS: usize, const WORDS: usize> Hash for Leaf<BLOCKS, WORDS> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for block in self.all_canonical() {
            match block {
                Ok(arc) => state.write_u32(arc.bits()),
                Err(words) => words.hash(state),
            }
        }
    }
}
