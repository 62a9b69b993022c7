//! Launch measurements: what a verifier must expect for a given initial memory.

pub mod launch;
pub mod ovmf;
pub mod sev;
pub mod snp;
pub mod vmsa;

#[cfg(test)]
mod tests;
//! Launch measurements, computed from the same steps that populate memory.

pub mod tdx;
