//! How much the tests do. Miri interprets them, hundreds of times slower: a hash of one page takes it a second.

/// `full`, and `small` under Miri.
pub(crate) const fn few(small: usize, full: usize) -> usize {
    if cfg!(miri) { small } else { full }
}

/// Random cases: `full`, and one under Miri.
pub(crate) const fn cases(full: u32) -> u32 {
    if cfg!(miri) { 1 } else { full }
}

/// All of them, and under Miri the first of each `step`.
pub(crate) fn some<I: IntoIterator>(all: I, step: usize) -> impl Iterator<Item = I::Item> {
    all.into_iter().step_by(few(step, 1))
}
