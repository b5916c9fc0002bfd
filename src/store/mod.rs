//! Durable storage: the state store (private) and the public database (permanent, append-only).
//!
//! [`Journal`] and [`Registry`] wrap the storage engines and return proofs by value: an [`Intent`] requires a journaled
//! reservation, a [`PublicationReceipt`] requires a durable publication. Proof constructors are private to this module, so
//! code that signs or erases without the proof does not compile.

pub(crate) mod access;
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
#[cfg(test)]
pub(crate) mod testing;
mod unique;

pub use self::access::AccessStore;
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
pub use session::{
    CertificateToSign, MasterKeyVersion, ReserveError, Session, SessionCounts, SessionCursor, SessionSet, SessionState,
    StateName, StateStore,
};
pub use unique::UniqueKey;

/// Why a store operation failed. Earlier acknowledged writes remain durable.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Free disk space is below the limit for the operation; nothing was written. New devices require the configured floor,
    /// all other writes a small fixed minimum.
    #[error("{store}: disk full: {free} bytes free, {floor} bytes required; free disk space")]
    Full {
        /// Which store.
        store: &'static str,
        /// Free bytes now.
        free: u64,
        /// Required free bytes.
        floor: u64,
    },
    /// The engine failed or is being reopened. The outcome of a write in progress is unknown.
    #[error("{store}: {operation} failed: {cause}")]
    Failed {
        /// Which store.
        store: &'static str,
        /// The failed operation.
        operation: &'static str,
        /// The engine's error message.
        cause: String,
    },
    /// A stored value cannot be decoded: it is corrupt, or a newer version wrote it.
    #[error("{store}: cannot read {what}: {cause}")]
    Damaged {
        /// Which store.
        store: &'static str,
        /// The value.
        what: String,
        /// Why it cannot be read.
        cause: String,
    },
    /// The store directory is missing (the daemon never creates one), or exists already (`sppctl init` never overwrites one).
    #[error("{0}")]
    Directory(String),
    /// The batch's state does not allow the step, usually because a concurrent step came first.
    #[error("batch {batch} {problem}")]
    WrongBatch {
        /// The batch.
        batch: u64,
        /// Why the step is not allowed.
        problem: String,
    },
    /// The session's state does not allow the step, usually because a concurrent call came first.
    #[error("session {session} is in state {found:?}; the step requires {needed:?}")]
    WrongState {
        /// The session.
        session: crate::names::SessionId,
        /// Its current state.
        found: StateName,
        /// The required state.
        needed: StateName,
    },
}
