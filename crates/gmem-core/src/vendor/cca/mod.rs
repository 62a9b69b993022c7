//! Arm CCA: the Realm Management Monitor, version 1.0 (DEN0137 1.0-rel0), and KVM's use of it.
//!
//! [`Rmm`] is the monitor: every granule of memory has one state, every realm has translation tables whose entries say
//! independently what the host put behind an address (HIPAS) and what the realm expects of it (RIPAS), and every command
//! answers with the specification's status and outputs. Where the specification leaves an order of checks open, the order
//! is that of TF-RMM at tag `rmm-spec-v1.0-rel0`, against which the recorded vectors were made. [`Cca`] is one virtual
//! machine on top: the verbs of [`crate::vendor`], built from nothing but the commands.
//!
//! What matters for a hypervisor:
//!
//! - A granule in use cannot be taken back: UNDELEGATE wants DELEGATED. Memory that is destroyed under RAM leaves
//!   DESTROYED behind, at which a realm stops for ever unless it agrees to lose the content.
//! - Who sees a fault depends on RIPAS alone: EMPTY is an external abort in the realm, everything else exits to the host.
//! - The RIM depends on the level of the tables when RIPAS was initialised.
//! - A change to EMPTY that the host rejects is reported to the realm as accepted.
//!
//! Not modelled: RMM 2.0 (refused by [`RmmVersion::require_modelled`]), LPA2 (REALM_CREATE refuses the flag), RSI host
//! calls and attestation tokens ([`StepError::NotModelled`]), contents of memory other than what is measured, interrupt
//! controller and timer state, failures of the EL3 firmware to move a granule.

mod data;
mod kvm;
mod rec;
mod rmi;
mod rmm;
mod rtt;
#[cfg(test)]
mod tests;

pub use data::Source;
pub use kvm::{Cca, Config, CreateError};
pub use rec::{
    ENTER_EMUL_MMIO, ENTER_INJECT_SEA, ENTER_RIPAS_REJECT, ExitKind, RealmOutcome, RealmStep, Rec, RecEntry, RecExit,
    RipasChange, StepError, rsi,
};
pub use rmi::{
    ABI_VERSION, GRANULE_SIZE, GranuleState, Hipas, MIN_BLOCK_LEVEL, PAGE_LEVEL, Platform, RealmParams, RealmState,
    RecParams, Reply, Ripas, RmiStatus, RmmVersion, UnsupportedVersion,
};
pub use rmm::{Realm, Rmm, root_tables};
pub use rtt::{ChangeDestroyed, Entry, NS_ATTR_MASK, Rtt, Walk};
