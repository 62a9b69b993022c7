//! A set of page numbers that readers query without a lock: the private attribute of guest frames, the pages that a
//! file has, has prepared or shares.
//!
//! # Shape
//!
//! A tree of *branches*, whose children have a byte each that says whether their pages are all alike, over *leaves* of 1 GiB. A
//! leaf has one word of state for each 2 MiB block as long as that word can say what the block's pages are: those in the set
//! are one run (one odd page, the edge of a range, all, none). Otherwise a bitmap takes its place, for as long as the set
//! lives. So the size of the set costs nothing, a range operation costs what its two edges cost and a byte for each 1 GiB between
//! them (32 KiB where there is a mixed bitmap), and the state of a set with some odd pages in every block of 1 TiB still
//! fits into a processor's caches. Where it does not, a query waits for memory once.
//!
//! | node | memory covered | bytes |
//! |---|---|---|
//! | leaf of 512 blocks | 1 GiB | 2052 |
//! | leaf as a bitmap | 1 GiB | 32776 |
//! | branch of 64 leaves, for sets of up to 64 GiB | 64 GiB | 1112 |
//! | branch of 2048 leaves, for larger sets | 2 TiB | 34840 |
//! | branch of 2048 branches | 4 PiB | 34840 |
//!
//! The depth follows from the capacity, and nodes are allocated where a set becomes mixed. Up to 64 pages the set is one
//! word, and up to 16 MiB it is a bitmap. At worst, one mixed page in each 1 GiB, a set without bitmaps takes 1/500,000 of the
//! memory described; with a bitmap in each leaf, 1/30,000 (34 MiB for 1 TiB).
//!
//! # Memory that is kept
//!
//! A node that becomes uniform again is found uniform at once, but stays allocated until the set is dropped: a reader
//! may be inside, and a guest that converts a page back and forth should not allocate each time. A clone has no such spare
//! nodes, and bitmaps only where a block is no run. [`PageSet::heap_bytes`] counts them.
//!
//! # Readers and the writer
//!
//! Any number of threads may read while one changes the set. Changes must be serialised by the caller, as the kernel
//! serialises them with `slots_lock` (attributes) and the inode's `invalidate_lock` (files). Concurrent changes would
//! lose updates and could leave a mixed block tagged uniform; they could not break memory safety, which rests on safe
//! code alone.
//!
//! **Every page that a read sees has a value that was true at some moment during the call.** A range operation changes
//! each page once, not all pages at one moment, and never passes through a third state: pages outside of the range
//! keep their value all the time. The truth at a moment is what a descent would find if nothing moved meanwhile. The
//! argument, for a reader that descends from the root:
//!
//! 1. A node's tag for a child (uniform with a value, or mixed) is read by one load, and so are the state of a block and a page
//!    in a bitmap. While the node is attached, that is reachable by tags that name it only, what this load sees is true at that
//!    moment. A bitmap is attached whatever its own tag says, and is complete when it is first seen.
//! 2. A node that the reader is in may be detached by the writer: an ancestor's tag becomes uniform, or a bitmap takes a
//!    leaf's place. Until it is attached again, a leaf in the second case for ever, it keeps the contents that it had at that
//!    moment, which lies after the reader passed the tag and thus during the call. So what the reader sees there was true
//!    then.
//! 3. Before a detached node is attached again it is reset to what the tag above it says, each word by one store. A reader
//!    that is still inside sees the old contents (2), or the new ones, which are what the tag says and hence true. Only then
//!    is it attached, and only then does a page change.
//! 4. A tag that is not mixed is true: it becomes so after the last page has changed, and is mixed before the first one does. A
//!    range that covers a leaf whole needs only the tag: that store is the moment of change.
//!
//! In terms of the memory model: every store of a tag, state or word is a Release and every load by a reader an Acquire, so
//! that having seen one change implies seeing all that the writer did before it (in 3: the reset before the mixed
//! tag; for the caller: nothing that was ordered before a change can be missed after having seen it). The pointers to
//! children are published likewise by `OnceBox`. Loads by the writer itself may be relaxed. On x86 all of them are
//! plain moves.
//!
//! A query about several pages ([`PageSet::uniform`], [`PageSet::runs`], [`PageSet::count`]) is not a snapshot: the
//! pages may have had the reported values at different moments of the call. Whoever needs a snapshot excludes the
//! writer or, as the fault path does, checks a sequence count afterwards.

mod arc;
mod bitmap;
mod branch;
mod lazy;
mod leaf;
mod node;
#[cfg(test)]
mod tests;

use bitmap::Bitmap;
use branch::Branch;
use core::fmt;
use core::hash::{Hash, Hasher};
use lazy::Lazy;
use leaf::Leaf;
use node::{Node, Span, Values};

/// The largest capacity: all pages of a byte address space of 64 bits.
pub const MAX_PAGES: u64 = 1 << 52;

type Pages12 = Bitmap<64>;
/// A branch for the sake of the leaf's two forms.
type Pages18 = Branch<Leaf, 1>;
type Pages24 = Branch<Leaf, 64>;
type Pages29 = Branch<Leaf, 2048>;
type Pages40 = Branch<Pages29, 2048>;
type Pages52 = Branch<Pages40, 4096>;

/// The depth is part of the type, so that a descent is straight code without a loop. Named by the base-2 logarithm of
/// the pages below.
enum Root {
    Pages6(Bitmap<1>),
    Pages12(Lazy<Pages12>),
    Pages18(Lazy<Pages18>),
    Pages24(Lazy<Pages24>),
    /// [`PageSet::large`].
    Pages29,
    Pages40(Lazy<Pages40>),
    Pages52(Lazy<Pages52>),
}

/// Evaluates the same expression for the root of a set, whatever depth it has.
macro_rules! at_root {
    ($set:expr, $node:ident => $body:expr) => {
        match &$set.root {
            Root::Pages6($node) => $body,
            Root::Pages12($node) => $body,
            Root::Pages18($node) => $body,
            Root::Pages24($node) => $body,
            Root::Pages29 => {
                let $node = &$set.large;
                $body
            }
            Root::Pages40($node) => $body,
            Root::Pages52($node) => $body,
        }
    };
}

impl Root {
    fn new(pages: u64, initial: bool) -> Self {
        match pages.next_power_of_two().trailing_zeros() {
            0..=6 => Self::Pages6(Node::uniform(initial)),
            7..=12 => Self::Pages12(Node::uniform(initial)),
            13..=18 => Self::Pages18(Node::uniform(initial)),
            19..=24 => Self::Pages24(Node::uniform(initial)),
            25..=29 => Self::Pages29,
            30..=40 => Self::Pages40(Node::uniform(initial)),
            _ => Self::Pages52(Node::uniform(initial)),
        }
    }
}

/// The last page of a tree.
fn last_of<N: Node>(_: &N) -> u64 {
    (1 << N::SHIFT) - 1
}

/// A set of pages, keyed by raw page number, each either in the set (`true`) or not (`false`).
///
/// All methods take `&self`; see the [module](self) for what may run concurrently. Ranges are a first page and a
/// number of pages, and are cut at page `u64::MAX`, which no range holds.
///
/// Pages at and beyond the capacity have the initial value for ever: changing them does nothing.
///
/// Two sets are equal, and have equal hashes, if they have the same capacity, the same initial value and the same
/// pages, whatever led there. Comparing, hashing and cloning cost two descents for each run of pages. Done while a writer
/// is at work they are as good as any other query about several pages; the clone is a proper set in any case.
pub struct PageSet {
    pages: u64,
    initial: bool,
    root: Root,
    /// The root of a set of more than 64 GiB and up to 2 TiB. It lies here and not in [`Root`], so that one test says both that
    /// there is such a root and that it has a node.
    large: Lazy<Pages29>,
}

impl PageSet {
    /// A set of pages below `pages`, which all have the value `initial`. Allocates nothing.
    ///
    /// A capacity beyond [`MAX_PAGES`] means [`MAX_PAGES`].
    #[must_use]
    pub fn with_capacity(pages: u64, initial: bool) -> Self {
        let pages = pages.min(MAX_PAGES);
        Self { pages, initial, root: Root::new(pages, initial), large: Node::uniform(initial) }
    }

    /// Number of pages that can be changed, those from 0.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.pages
    }

    /// Whether `page` is in the set.
    #[must_use]
    #[inline(always)]
    pub fn get(&self, page: u64) -> bool {
        if page >= self.pages {
            return self.initial;
        }
        // The depths of large memory without a call and a jump, and the most frequent one with a single branch: while many
        // look-ups wait for memory, an instruction less in each is room to begin another one.
        match (self.large.node(), &self.root) {
            (Some(node), _) => node.get(page),
            (None, Root::Pages40(node)) => node.get(page),
            _ => self.get_elsewhere(page),
        }
    }

    #[inline(never)]
    fn get_elsewhere(&self, page: u64) -> bool {
        at_root!(self, node => node.get(page))
    }

    /// Puts `len` pages from `start` into the set (`value` true) or takes them out of it.
    ///
    /// Calls must not overlap in time with one another. A call allocates when a block becomes mixed for the first time.
    pub fn set(&self, start: u64, len: u64, value: bool) {
        if len == 1 && start < self.pages.saturating_sub(1) {
            // Above the root there is no tag to correct.
            at_root!(self, node => drop(node.set_page(start, value)));
            return;
        }
        let Some(Span { first, last }) = self.inside(start, len) else { return };
        // The pages of the tree beyond the capacity always are as the last page is, so that a set that is uniform below its
        // capacity is uniform as a tree.
        let end = |last_of_tree| if last + 1 == self.pages { last_of_tree } else { last };
        // A root can say everything.
        at_root!(self, node => drop(node.set(Span { first, last: end(last_of(node)) }, value)));
    }

    /// The value that all of `len` pages from `start` have; `None` if they differ or `len` is 0.
    ///
    /// Costs two descents at most, whatever the length.
    #[must_use]
    pub fn uniform(&self, start: u64, len: u64) -> Option<bool> {
        self.values(start, len).uniform()
    }

    /// Whether all of `len` pages from `start` have `value`, as no pages do.
    #[must_use]
    pub fn all(&self, start: u64, len: u64, value: bool) -> bool {
        let values = self.values(start, len);
        values == Values::only(value) || values == Values::NONE
    }

    /// The first of `len` pages from `start` that has `value`.
    #[must_use]
    pub fn find(&self, start: u64, len: u64, value: bool) -> Option<u64> {
        let inside = self.inside(start, len);
        inside.and_then(|span| at_root!(self, node => node.find(span, value))).or_else(|| {
            let outside = self.outside(start, len)?;
            (value == self.initial).then_some(outside.first)
        })
    }

    /// The first page after `page` and below `limit` whose value is not that of `page`, or else `limit`.
    #[must_use]
    pub fn next_change(&self, page: u64, limit: u64) -> u64 {
        self.end_of_run(page, limit, self.get(page))
    }

    /// The longest runs of pages with one value in `len` pages from `start`: `(first page, pages, value)`, ascending
    /// and without gaps.
    pub fn runs(&self, start: u64, len: u64) -> impl Iterator<Item = (u64, u64, bool)> {
        let end = start.saturating_add(len);
        let mut at = start;
        core::iter::from_fn(move || {
            let first = (at < end).then_some(at)?;
            let value = self.get(first);
            at = self.end_of_run(first, end, value);
            Some((first, at - first, value))
        })
    }

    /// How many of `len` pages from `start` are in the set.
    ///
    /// Unlike the other queries this one visits all that is mixed.
    #[must_use]
    pub fn count(&self, start: u64, len: u64) -> u64 {
        let inside = self.inside(start, len).map_or(0, |span| at_root!(self, node => node.count(span)));
        match self.outside(start, len) {
            Some(span) if self.initial => inside + (span.last - span.first + 1),
            _ => inside,
        }
    }

    /// Bytes that the set has allocated, as requested from the allocator, spare nodes included.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        at_root!(self, node => node.heap_bytes())
    }

    /// Where the run of `value` ends that `page` belongs to. Does not look at `page` again: it may have changed.
    fn end_of_run(&self, page: u64, limit: u64, value: bool) -> u64 {
        let next = page.saturating_add(1);
        self.find(next, limit.saturating_sub(next), !value).unwrap_or(limit)
    }

    fn values(&self, start: u64, len: u64) -> Values {
        if len == 1 && start < self.pages {
            return Values::only(self.get(start));
        }
        let inside = self.inside(start, len).map_or(Values::NONE, |span| at_root!(self, node => node.values(span)));
        match self.outside(start, len) {
            Some(_) => inside.with(Values::only(self.initial)),
            None => inside,
        }
    }

    /// The part of a range that lies below the capacity.
    fn inside(&self, start: u64, len: u64) -> Option<Span> {
        let end = start.saturating_add(len).min(self.pages);
        (start < end).then(|| Span { first: start, last: end - 1 })
    }

    /// The part of a range that lies beyond the capacity.
    fn outside(&self, start: u64, len: u64) -> Option<Span> {
        let (start, end) = (start.max(self.pages), start.saturating_add(len));
        (start < end).then(|| Span { first: start, last: end - 1 })
    }
}

impl PageSet {
    /// A set of one word, as small models have in great number: that is quicker to compare and to copy than runs are.
    fn word(&self) -> Option<u64> {
        match &self.root {
            Root::Pages6(bitmap) => Some(bitmap.first_word()),
            _ => None,
        }
    }

    fn all_runs(&self) -> impl Iterator<Item = (u64, u64, bool)> {
        self.runs(0, self.pages)
    }
}

impl Clone for PageSet {
    fn clone(&self) -> Self {
        if let Some(word) = self.word() {
            return Self { root: Root::Pages6(Bitmap::of_word(word)), large: Node::uniform(false), ..*self };
        }
        let copy = Self::with_capacity(self.pages, self.initial);
        self.all_runs().filter(|run| run.2 != self.initial).for_each(|(start, len, value)| copy.set(start, len, value));
        copy
    }
}

impl PartialEq for PageSet {
    fn eq(&self, other: &Self) -> bool {
        let same_pages = || match (self.word(), other.word()) {
            (Some(one), Some(other)) => one == other,
            _ => self.all_runs().eq(other.all_runs()),
        };
        (self.pages, self.initial) == (other.pages, other.initial) && same_pages()
    }
}

impl Eq for PageSet {}

impl Hash for PageSet {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.pages, self.initial).hash(state);
        match self.word() {
            Some(word) => state.write_u64(word),
            None => self.all_runs().filter(|run| run.2).for_each(|run| run.hash(state)),
        }
    }
}

impl fmt::Debug for PageSet {
    /// The pages below the capacity that are in the set, as ranges.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.all_runs().filter(|&(_, _, value)| value);
        write!(f, "PageSet({:#x} pages, initially {}) ", self.pages, self.initial)?;
        f.debug_set().entries(runs.map(|(start, len, _)| start..start + len)).finish()
    }
}
