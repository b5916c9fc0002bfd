//! Durable storage: the state store (private) on sled, and the trait of the public database (permanent, append-only), which
//! `registry` implements. The records of the public database are in [`spp_format::record`].
//!
//! [`Journal`] and [`Registry`] wrap the storage engines and return proofs by value: an [`Intent`] requires a journaled
//! reservation, a [`PublicationReceipt`] requires a durable publication. Proof constructors are private to this module, so
//! code that signs or erases without the proof does not compile.

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
mod journal;
mod production;
mod public;
mod secret;
mod session;
mod sled;
mod state_store;
#[cfg(test)]
pub(crate) mod testing;

pub use self::sled::SledStateStore;
pub(crate) use self::sled::{IndexEntry, IndexMark, Location, SledIndex};
pub use directory::StoreOptions;
pub use journal::{Abortable, Intent, Issued, Journal, Loaded, Published, Signed};
pub use production::{ProductionCounts, ProductionSlot, SECONDS_PER_HOUR};
pub use public::{
    InFlightPublication, InFlightPublications, LogReader, PublicDatabase, PublicationReceipt, PublishError, Registry,
    RegistryStatus, WitnessStatus,
};
pub use secret::{
    Batch, BatchPair, BatchState, BatchStep, KeyStorage, PairAssignment, PairCounts, PairId, PairToDestroy,
    PairToReserve, PooledPair, Purpose, RewrappedPair, SecretStore,
};
pub use session::{MasterKeyVersion, Session, SessionCounts, SessionCursor, SessionSet, SessionState};
pub use state_store::{ReserveError, SessionReader, StateStore};

pub use crate::access::AccessStore;
pub use crate::state_name::StateName;
pub use crate::store_error::StoreError;
