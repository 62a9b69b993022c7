//! Launch measurements: what a verifier must expect for a given initial memory.

pub mod snp;
