//! Launch measurements: what a verifier must expect for a given initial memory, computed from the same steps that
//! populate it.

pub mod cca;
pub mod igvm;
pub mod launch;
pub mod ovmf;
pub mod sev;
pub mod snp;
pub mod tdx;
pub mod vmsa;

#[cfg(test)]
mod tests;
