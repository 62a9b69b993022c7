//! The node that has a bit for each page.

use super::arc::Arc;
use super::node::{Census, Node, Span, Values, index};
use alloc::boxed::Box;
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

/// Base-2 logarithm of the pages in a word.
const WORD_SHIFT: u32 = 6;
/// Words of a 2 MiB block.
const WORDS_OF_BLOCK: u64 = 8;

/// `64 * WORDS` pages.
pub(super) struct Bitmap<const WORDS: usize> {
    words: [AtomicU64; WORDS],
    /// Of the words.
    census: Census,
}

fn filled(value: bool) -> u64 {
    if value { u64::MAX } else { 0 }
}

/// Which values occur in a word.
fn values_of(word: u64) -> Values {
    Values::of(word != u64::MAX, word != 0)
}

/// The bits for the pages of `span` in the word with number `at`.
#[inline]
fn mask(span: Span, at: u64) -> u64 {
    let lower = if at == span.first >> WORD_SHIFT { u64::MAX << (span.first & 63) } else { u64::MAX };
    let upper = if at == span.last >> WORD_SHIFT { u64::MAX >> (63 - (span.last & 63)) } else { u64::MAX };
    lower & upper
}

impl<const WORDS: usize> Bitmap<WORDS> {
    /// A bitmap that has to be reset before it is used. Being nothing but zeros, it comes into being where it will be, and
    /// its 32 KiB never lie on the stack of the caller, who may be a client's thread.
    const fn blank() -> Self {
        Self { words: [const { AtomicU64::new(0) }; WORDS], census: Census::blank() }
    }

    /// The word of the first 64 pages.
    pub(super) fn first_word(&self) -> u64 {
        self.word(0).load(Acquire)
    }

    #[inline]
    fn word(&self, at: u64) -> &AtomicU64 {
        &self.words[index(at, WORDS)]
    }

    /// The words with pages of a span: their numbers, contents, and the bits for these pages.
    fn parts(&self, span: Span) -> impl Iterator<Item = (u64, u64, u64)> {
        let (first, last) = span.children(WORD_SHIFT);
        // Acquire: see `put`.
        (first..=last).map(move |at| (at, self.word(at).load(Acquire), mask(span, at)))
    }

    /// Returns whether the bitmap may have become uniform.
    #[inline]
    fn put(&self, at: u64, old: u64, new: u64) -> bool {
        // Release, for whoever reads: who sees this change also sees the changes that the writer made before it.
        self.word(at).store(new, Release);
        let is_mixed = |word: u64| word.wrapping_add(1) > 1;
        if is_mixed(old) && is_mixed(new) {
            return false;
        }
        self.census.replace(values_of(old), values_of(new));
        true
    }

    /// Makes a 2 MiB block what `arc` says.
    pub(super) fn put_block(&self, block: u64, arc: Arc) {
        for at in 0..WORDS_OF_BLOCK {
            let place = block * WORDS_OF_BLOCK + at;
            self.put(place, self.word(place).load(Relaxed), arc.word(at));
        }
    }
}

impl Bitmap<1> {
    pub(super) fn of_word(word: u64) -> Self {
        Self { words: [AtomicU64::new(word)], census: Census::of(1, values_of(word)) }
    }
}

impl<const WORDS: usize> Node for Bitmap<WORDS> {
    const SHIFT: u32 = WORD_SHIFT + WORDS.trailing_zeros();
    type Dense = Self;

    fn uniform(value: bool) -> Self {
        let new = Self::blank();
        new.reset(value);
        new
    }

    fn boxed(value: bool) -> Box<Self> {
        let new = Box::new(const { Self::blank() });
        new.reset(value);
        new
    }

    fn reset(&self, value: bool) {
        if self.whole() != Values::only(value) {
            self.words.iter().for_each(|word| word.store(filled(value), Release));
            self.census.set(WORDS as u64, Values::only(value));
        }
    }

    #[inline]
    fn whole(&self) -> Values {
        self.census.values()
    }

    #[inline]
    fn get(&self, page: u64) -> bool {
        (self.word(page >> WORD_SHIFT).load(Acquire) >> (page & 63)) & 1 != 0
    }

    fn set(&self, span: Span, value: bool) -> Result<(), Box<Self>> {
        for (at, old, mask) in self.parts(span) {
            self.put(at, old, if value { old | mask } else { old & !mask });
        }
        Ok(())
    }

    #[inline]
    fn set_page(&self, page: u64, value: bool) -> Result<bool, Box<Self>> {
        let (at, bit) = (page >> WORD_SHIFT, page & 63);
        let old = self.word(at).load(Relaxed);
        // Without a branch on the value: who sets pages to what they were not makes it depend on memory that is on its way,
        // and a wrong guess then throws away all that the processor has begun meanwhile.
        Ok(self.put(at, old, (old & !(1 << bit)) | u64::from(value) << bit) && self.whole() != Values::MIXED)
    }

    fn values(&self, span: Span) -> Values {
        let mut values = Values::NONE;
        for (_, word, mask) in self.parts(span) {
            values = values.with(Values::of(!word & mask != 0, word & mask != 0));
            if values == Values::MIXED {
                break;
            }
        }
        values
    }

    fn find(&self, span: Span, value: bool) -> Option<u64> {
        self.parts(span).find_map(|(at, word, mask)| {
            let found = if value { word } else { !word } & mask;
            (found != 0).then(|| (at << WORD_SHIFT) + u64::from(found.trailing_zeros()))
        })
    }

    fn count(&self, span: Span) -> u64 {
        self.parts(span).map(|(_, word, mask)| u64::from((word & mask).count_ones())).sum()
    }

    fn heap_bytes(&self) -> usize {
        0
    }
}
