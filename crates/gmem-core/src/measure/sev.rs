//! The launch digest of SEV and SEV-ES: SHA-256 over everything that is loaded, in its order.

use sha2::{Digest, Sha256};

/// A launch digest that bytes are added to. Two are equal if they have seen equal bytes.
#[derive(Clone, Default)]
pub struct SevDigest(Sha256);

impl SevDigest {
    /// The digest of a guest into which nothing was loaded.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what LAUNCH_UPDATE_DATA or LAUNCH_UPDATE_VMSA loads.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest so far.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.0.clone().finalize().into()
    }
}

impl PartialEq for SevDigest {
    fn eq(&self, other: &Self) -> bool {
        self.digest() == other.digest()
    }
}

impl Eq for SevDigest {}

impl core::hash::Hash for SevDigest {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.digest().hash(state);
    }
}

impl core::fmt::Debug for SevDigest {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.digest().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
