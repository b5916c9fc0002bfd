//! Durable storage: the state store (private) and the public database (permanent, append-only).
//!
//! [`Journal`] and [`Registry`] wrap the storage engines and return proofs by value: an [`Intent`] requires a journaled
//! reservation, a [`PublicationReceipt`] requires a durable publication. Proof constructors are private to this module, so
//! code that signs or erases without the proof does not compile.

mod audit_checkpoint;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod contract_access;
#[cfg(test)]
mod contract_pairs;
#[cfg(test)]
mod contract_production;
#[cfg(test)]
pub(crate) mod contract_public;
pub(crate) mod directory;
mod entry;
mod fields;
mod journal;
mod production;
mod public;
mod record;
mod secret;
mod session;
mod sled;
mod state_store;
#[cfg(test)]
pub(crate) mod testing;
mod unique;

pub use self::sled::SledStateStore;
pub(crate) use self::sled::{IndexEntry, IndexMark, Location, SledIndex};
pub use audit_checkpoint::AuditCheckpoint;
pub use directory::StoreOptions;
pub use entry::LogEntry;
pub use fields::RecordError;
pub use journal::{Abortable, Intent, Issued, Journal, Loaded, Published, Signed};
pub use production::{ProductionCounts, ProductionSlot, SECONDS_PER_HOUR};
pub use public::{
    InFlightPublication, InFlightPublications, PublicDatabase, Publication, PublicationReceipt, PublishError,
    PublishedRecord, Registry, RegistryStatus, UniquenessConflict, WitnessStatus,
};
pub use record::DeviceRecord;
pub use secret::{
    Batch, BatchPair, BatchState, BatchStep, KeyStorage, PairAssignment, PairCounts, PairId, PairToDestroy,
    PairToReserve, PooledPair, Purpose, RewrappedPair, SecretStore,
};
pub use session::{MasterKeyVersion, Session, SessionCounts, SessionCursor, SessionSet, SessionState};
pub use state_store::{ReserveError, StateStore};
pub use unique::UniqueKey;

pub use crate::access::AccessStore;
pub use crate::certificate::CertificateToSign;
pub use crate::state_name::StateName;
pub use crate::store_error::StoreError;
