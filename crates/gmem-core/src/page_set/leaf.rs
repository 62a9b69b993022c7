//! The node of single pages: states of 2 MiB blocks, and bitmaps of those blocks that need one.

use super::arc::Arc;
use super::node::{Census, Node, Span, Values, Word, index};
use alloc::boxed::Box;
use core::hash::{Hash, Hasher};
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};
use once_cell::race::OnceBox;

/// Base-2 logarithm of the pages in a block.
const BLOCK_SHIFT: u32 = 9;
/// Blocks whose bitmaps are allocated together.
const GROUP: usize = 8;

/// The pages of one block. A cache line.
#[repr(align(64))]
struct Bitmap([Word; 8]);

impl Bitmap {
    const fn empty() -> Self {
        Self([const { Word::new(0) }; 8])
    }

    fn words(&self) -> [u64; 8] {
        self.0.each_ref().map(Word::load)
    }

    fn word(&self, page: u64) -> &Word {
        &self.0[index(page >> Word::SHIFT, 8)]
    }

    /// Shows what `arc` says.
    fn fill(&self, arc: Arc) {
        (0..).zip(&self.0).for_each(|(at, word)| word.store(arc.word(at)));
    }

    /// The words of a span and the part of it that each has.
    fn parts(&self, span: Span) -> impl Iterator<Item = (u64, &Word, Span)> {
        let (first, last) = span.children(Word::SHIFT);
        (first..=last).map(move |at| (at, &self.0[index(at, 8)], span.part(at, Word::SHIFT)))
    }

    fn is_uniform(&self) -> Option<bool> {
        let words = self.words();
        let value = words[0] != 0;
        words.iter().all(|&word| word == if value { u64::MAX } else { 0 }).then_some(value)
    }
}

/// What is known of a block by one load.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Block {
    Run(Arc),
    /// Both values occur, and the bitmap says where.
    Bitmap,
}

impl Block {
    const BITMAP: u32 = u32::MAX;

    #[inline]
    fn from_bits(bits: u32) -> Self {
        if bits == Self::BITMAP { Self::Bitmap } else { Self::Run(Arc::from_bits(bits)) }
    }

    fn bits(self) -> u32 {
        match self {
            Self::Run(arc) => arc.bits(),
            Self::Bitmap => Self::BITMAP,
        }
    }

    #[inline]
    fn whole(self) -> Values {
        match self {
            Self::Run(arc) => arc.whole(),
            Self::Bitmap => Values::MIXED,
        }
    }
}

/// `BLOCKS` blocks of 2 MiB, and `GROUPS` groups of them.
///
/// The states lie next to each other, 4 bytes per block, so that those of 1 TiB, 2 MiB, fit the caches of most
/// machines: a query that a state answers does not wait for memory. A bitmap of a block whose state is a run is
/// *detached*: what it holds means nothing.
pub(super) struct Leaf<const BLOCKS: usize, const GROUPS: usize> {
    blocks: [AtomicU32; BLOCKS],
    census: Census,
    bitmaps: [OnceBox<[Bitmap; GROUP]>; GROUPS],
}

impl<const BLOCKS: usize, const GROUPS: usize> Leaf<BLOCKS, GROUPS> {
    fn place(block: u64) -> usize {
        index(block, BLOCKS)
    }

    #[inline]
    fn block(&self, block: u64) -> Block {
        // Acquire: see `put`.
        Block::from_bits(self.blocks[Self::place(block)].load(Acquire))
    }

    fn put(&self, block: u64, old: Block, new: Block) {
        if new != old {
            // Release, for `block`: a reader that sees a bitmap attached sees what it was filled with.
            self.blocks[Self::place(block)].store(new.bits(), Release);
            self.census.replace(old.whole(), new.whole());
        }
    }

    #[inline]
    fn bitmap(&self, block: u64) -> Option<&Bitmap> {
        let block = Self::place(block);
        self.bitmaps[block / GROUP].get().map(|group| &group[block % GROUP])
    }

    /// Attaches the bitmap of a block that is `arc`.
    fn attach(&self, block: u64, arc: Arc) -> &Bitmap {
        let place = Self::place(block);
        let group = self.bitmaps[place / GROUP].get_or_init(|| Box::new([const { Bitmap::empty() }; GROUP]));
        let bitmap = &group[place % GROUP];
        bitmap.fill(arc);
        self.put(block, Block::Run(arc), Block::Bitmap);
        bitmap
    }

    fn set_part(&self, block: u64, part: Span, value: bool) {
        match self.block(block) {
            Block::Run(arc) => match arc.set(part, value) {
                Some(new) => self.put(block, Block::Run(arc), Block::Run(new)),
                None => self.attach(block, arc).parts(part).for_each(|(_, word, part)| word.set(part, value)),
            },
            old if part.is_whole(BLOCK_SHIFT) => self.put(block, old, Block::Run(Arc::uniform(value))),
            Block::Bitmap => {
                let Some(bitmap) = self.bitmap(block) else { return };
                bitmap.parts(part).for_each(|(_, word, part)| word.set(part, value));
                self.detach_uniform(block, bitmap);
            }
        }
    }

    /// Detaches the bitmap of a block if its last page of one value has gone. A run that remains stays a bitmap, which
    /// will often be needed again.
    fn detach_uniform(&self, block: u64, bitmap: &Bitmap) {
        if let Some(value) = bitmap.is_uniform() {
            self.put(block, Block::Bitmap, Block::Run(Arc::uniform(value)));
        }
    }

    /// The parts of a span, block by block.
    fn parts(span: Span) -> impl Iterator<Item = (u64, Span)> {
        let (first, last) = span.children(BLOCK_SHIFT);
        (first..=last).map(move |block| (block, span.part(block, BLOCK_SHIFT)))
    }

    fn values_in_part(&self, block: u64, part: Span) -> Values {
        match self.block(block) {
            Block::Run(arc) => arc.values(part),
            Block::Bitmap if part.is_whole(BLOCK_SHIFT) => Values::MIXED,
            Block::Bitmap => self.bitmap(block).map_or(Values::NONE, |bitmap| {
                bitmap.parts(part).fold(Values::NONE, |found, (_, word, part)| found.with(word.values(part)))
            }),
        }
    }

    /// The block in the only form that its pages have: a run if they are one.
    fn canonical(&self, block: u64) -> Result<Arc, [u64; 8]> {
        match self.block(block) {
            Block::Run(arc) => Ok(arc),
            Block::Bitmap => {
                let words = self.bitmap(block).map_or([0; 8], Bitmap::words);
                Arc::of_words(words).ok_or(words)
            }
        }
    }

    fn all_canonical(&self) -> impl Iterator<Item = Result<Arc, [u64; 8]>> {
        (0..BLOCKS as u64).map(|block| self.canonical(block))
    }
}

impl<const BLOCKS: usize, const GROUPS: usize> Node for Leaf<BLOCKS, GROUPS> {
    const SHIFT: u32 = BLOCK_SHIFT + BLOCKS.trailing_zeros();

    fn uniform(value: bool) -> Self {
        let bits = Block::Run(Arc::uniform(value)).bits();
        Self {
            blocks: core::array::from_fn(|_| AtomicU32::new(bits)),
            census: Census::of(BLOCKS as u64, Values::only(value)),
            bitmaps: [const { OnceBox::new() }; GROUPS],
        }
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            let bits = Block::Run(Arc::uniform(value)).bits();
            self.blocks.iter().for_each(|block| block.store(bits, Release));
            self.census.set(BLOCKS as u64, Values::only(value));
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.census.values()
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        let block = page >> BLOCK_SHIFT;
        match self.block(block) {
            Block::Run(arc) => arc.get(page),
            Block::Bitmap => self.bitmap(block).is_some_and(|bitmap| bitmap.word(page).get(page)),
        }
    }

    fn set(&self, span: Span, value: bool) {
        Self::parts(span).for_each(|(block, part)| self.set_part(block, part, value));
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> bool {
        let block = page >> BLOCK_SHIFT;
        if self.blocks[Self::place(block)].load(Relaxed) != Block::BITMAP {
            self.set_part(block, Span::page(page & ((1 << BLOCK_SHIFT) - 1)), value);
        } else if let Some(bitmap) = self.bitmap(block)
            && bitmap.word(page).set_page(page, value)
        {
            self.detach_uniform(block, bitmap);
        }
        self.whole() != Values::MIXED
    }

    fn values(&self, span: Span) -> Values {
        let mut values = Values::NONE;
        for (block, part) in Self::parts(span) {
            values = values.with(self.values_in_part(block, part));
            if values == Values::MIXED {
                break;
            }
        }
        values
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        Self::parts(span).find_map(|(block, part)| {
            let page = match self.block(block) {
                Block::Run(arc) => arc.find(part, value),
                Block::Bitmap => self
                    .bitmap(block)?
                    .parts(part)
                    .find_map(|(index, word, part)| Some(index << Word::SHIFT | word.find(part, value)?)),
            };
            Some((block << BLOCK_SHIFT) + page?)
        })
    }

    fn count(&self, span: Span) -> u64 {
        let in_part = |(block, part)| match self.block(block) {
            Block::Run(arc) => arc.count(part),
            Block::Bitmap => {
                self.bitmap(block).map_or(0, |bitmap| bitmap.parts(part).map(|(_, word, part)| word.count(part)).sum())
            }
        };
        Self::parts(span).map(in_part).sum()
    }

    fn heap_bytes(&self) -> usize {
        self.bitmaps.iter().filter(|group| group.get().is_some()).count() * size_of::<[Bitmap; GROUP]>()
    }
}

impl<const BLOCKS: usize, const GROUPS: usize> Clone for Leaf<BLOCKS, GROUPS> {
    /// Copies what the pages are, in their only form. While a writer is at work a bitmap may have become a run.
    fn clone(&self) -> Self {
        let copy = Self {
            blocks: [const { AtomicU32::new(0) }; BLOCKS],
            census: Census::of(BLOCKS as u64, Values::only(false)),
            bitmaps: [const { OnceBox::new() }; GROUPS],
        };
        for (block, state) in (0..).zip(self.all_canonical()) {
            let before = Block::Run(Arc::uniform(false));
            match state {
                Ok(arc) => copy.put(block, before, Block::Run(arc)),
                Err(words) => {
                    let bitmap = copy.attach(block, Arc::uniform(false));
                    bitmap.0.iter().zip(words).for_each(|(word, bits)| word.store(bits));
                }
            }
        }
        copy
    }
}

impl<const BLOCKS: usize, const GROUPS: usize> PartialEq for Leaf<BLOCKS, GROUPS> {
    fn eq(&self, other: &Self) -> bool {
        self.all_canonical().eq(other.all_canonical())
    }
}

impl<const BLOCKS: usize, const GROUPS: usize> Eq for Leaf<BLOCKS, GROUPS> {}

impl<const BLOCKS: usize, const GROUPS: usize> Hash for Leaf<BLOCKS, GROUPS> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        for block in self.all_canonical() {
            match block {
                Ok(arc) => state.write_u32(arc.bits()),
                Err(words) => words.hash(state),
            }
        }
    }
}
