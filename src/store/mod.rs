//! What must outlive the process: the state store (private) and the public database (permanent, append-only).
//!
//! The engines know no proofs. [`Journal`] and [`Registry`] stand before them and hand out the proofs by value:
//! no [`Intent`] without a journaled reservation, no [`PublicationReceipt`] without a durable publication. Their
//! constructors are private to this room, so a signature or an erasure without its proof does not compile.

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
pub use production::{HOUR, ProductionCounts, ProductionSlot};
pub use public::{
    InFlightPublication, InFlightPublications, PublicDatabase, Publication, PublicationReceipt, PublishError,
    PublishedRecord, Registry, RegistryStatus, Taken, WitnessStatus,
};
pub use record::DeviceRecord;
pub use secret::{
    Batch, BatchState, BatchStep, CondemnedPair, HeldPair, Holder, KeyStorage, MovedPair, PairCounts, PairId,
    PairToReserve, PooledPair, Purpose, SecretStore,
};
pub use session::{
    CertificateToSign, Listed, MasterKeyUse, ReserveError, Session, SessionCounts, SessionPlace, SessionState,
    StateName, StateStore,
};
pub use unique::UniqueKey;

/// A store could not do what was asked. What was acknowledged before still stands.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk has less room than the configured floor (new devices), or hardly any (all else); nothing was written.
    #[error("{store}: only {free} bytes are free and this needs {floor}; make room on the disk")]
    Full {
        /// Which store.
        store: &'static str,
        /// Free bytes now.
        free: u64,
        /// The floor that applies.
        floor: u64,
    },
    /// The engine failed, or is away and being reopened; whether a write in flight was kept is not known.
    #[error("{store}: {doing} failed: {cause}")]
    Failed {
        /// Which store.
        store: &'static str,
        /// What was being done.
        doing: &'static str,
        /// The engine's words.
        cause: String,
    },
    /// A stored value cannot be read: damage, or a newer version wrote it.
    #[error("{store}: {what} cannot be read: {cause}")]
    Damaged {
        /// Which store.
        store: &'static str,
        /// What was read.
        what: String,
        /// Why not.
        cause: String,
    },
    /// The store is not there (the daemon never creates one), or it already is (`sppctl init` never overwrites one).
    #[error("{0}")]
    Directory(String),
    /// The batch is not in a state that allows the step: a concurrent one was faster.
    #[error("batch {batch} {problem}")]
    WrongBatch {
        /// The batch.
        batch: u64,
        /// What it is.
        problem: String,
    },
    /// The session is in another state than the step needs: a concurrent call was faster.
    #[error("session {session} is {found:?}, this step needs {needed:?}")]
    OtherState {
        /// The session.
        session: crate::names::SessionId,
        /// The state it has.
        found: StateName,
        /// The state it should have.
        needed: StateName,
    },
}
