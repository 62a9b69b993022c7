//! The states as numbers, and how they hang together.

use std::hash::BuildHasher;

use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;

/// Every state that was reached: a row of numbers each, where it was reached from, and where it leads.
pub(super) struct Graph {
    width: usize,
    words: Vec<u32>,
    /// States with a part of their hashes, so that neither a look-up of something else nor growing reads `words`.
    table: HashTable<(u32, u32)>,
    parents: Vec<u32>,
    /// For each state the end of its successors in `edges`.
    ends: Vec<u64>,
    edges: Vec<u32>,
}

impl Graph {
    /// States have `width` numbers.
    pub(super) fn new(width: usize) -> Self {
        Self {
            width,
            words: Vec::new(),
            table: HashTable::new(),
            parents: Vec::new(),
            ends: Vec::new(),
            edges: Vec::new(),
        }
    }

    /// How many states there are.
    pub(super) fn len(&self) -> usize {
        self.parents.len()
    }

    /// How many of them are closed: all their successors are known.
    pub(super) fn closed(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn state(&self, at: usize) -> &[u32] {
        let start = at * self.width;
        self.words.get(start..start + self.width).unwrap_or_default()
    }

    pub(super) fn parent(&self, at: usize) -> Option<usize> {
        self.parents.get(at).filter(|parent| **parent != u32::MAX).map(|parent| *parent as usize)
    }

    /// The number of `state`, which is new if it was not reached before.
    pub(super) fn insert(&mut self, state: &[u32], parent: u32) -> u32 {
        let part = part(FxBuildHasher.hash_one(state));
        let (words, width) = (&self.words, self.width);
        let is_same = |(other, at): &(u32, u32)| {
            let start = *at as usize * width;
            *other == part && words.get(start..start + width) == Some(state)
        };
        if let Some((_, at)) = self.table.find(spread(part), is_same) {
            return *at;
        }
        let at = u32::try_from(self.parents.len()).unwrap_or(u32::MAX);
        self.table.insert_unique(spread(part), (part, at), |(part, _)| spread(*part));
        self.words.extend_from_slice(state);
        self.parents.push(parent);
        at
    }

    pub(super) fn edge(&mut self, to: u32) {
        self.edges.push(to);
    }

    /// The successors of the first state that is not closed are complete.
    pub(super) fn close(&mut self) {
        self.ends.push(self.edges.len() as u64);
    }

    pub(super) fn successors(&self, at: usize) -> &[u32] {
        let start = at.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
        let end = self.ends.get(at).copied().unwrap_or(start);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        self.edges.get(index(start)..index(end)).unwrap_or_default()
    }

    pub(super) fn bytes(&self) -> usize {
        self.words.capacity() * 4
            + self.table.allocation_size()
            + self.parents.capacity() * 4
            + self.ends.capacity() * 8
            + self.edges.capacity() * 4
    }
}

fn part(hash: u64) -> u32 {
    u32::try_from(hash >> 32).unwrap_or_default()
}

/// A table looks at the highest and the lowest bits of a hash.
fn spread(part: u32) -> u64 {
    u64::from(part).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
