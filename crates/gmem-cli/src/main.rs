//! `gmem`.
fn main() {}
