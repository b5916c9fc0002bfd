//! The secret store: batches of key pairs, and the trait that storage engines implement.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use spp_format::keys::KeyType;
use spp_format::names::SessionId;

use super::StoreError;
use crate::hsm::{BatchName, StoreId, StoredKey, TokenPair};

/// What the pairs of a batch are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Generated on demand, one per session.
    Sessions,
    /// Generated in advance, all of one kind.
    Pool(KeyType),
}

/// Where the private keys of a batch are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyStorage {
    /// In this store, wrapped under the batch key in the HSM.
    Wrapped,
    /// On the token, as PKCS#11 objects.
    Hsm,
}

/// The state of a batch: `Planned → Open → Sealed → Emptied`, then deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BatchState {
    /// The batch key is being generated on the token; nothing is wrapped under it.
    Planned,
    /// Accepts new pairs.
    Open,
    /// Accepts no new pairs; its pairs may be used.
    Sealed,
    /// Has no pairs and accepts none: the batch key may be destroyed.
    Emptied,
}

/// Key pairs that share one batch key in the HSM. Destroying that key shreds all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Batch number, from 1, never reused.
    pub number: u64,
    /// What its pairs are used for.
    pub purpose: Purpose,
    /// Where its private keys are stored.
    pub storage: KeyStorage,
    /// Its state.
    pub state: BatchState,
    /// Why its pairs are not offered, if the batch is quarantined.
    pub quarantined: Option<String>,
    /// When it was planned, seconds since the Unix epoch.
    pub created: u64,
    /// Pairs ever added, including moved ones.
    pub pairs_added: u64,
    /// Pairs not yet assigned to a session.
    pub ready: u64,
    /// Pairs of sessions that are not final.
    pub reserved: u64,
    /// When the first wrapped pair was erased, seconds since the Unix epoch. The batch key can still unwrap old copies of it.
    pub first_erased: Option<u64>,
}

impl Batch {
    /// Reports whether no pair is left in it.
    pub const fn has_no_pairs(&self) -> bool {
        self.ready == 0 && self.reserved == 0
    }

    /// Number of pairs that may be assigned to sessions.
    pub const fn available(&self) -> u64 {
        match (&self.quarantined, self.state) {
            (None, BatchState::Open | BatchState::Sealed) => self.ready,
            _ => 0,
        }
    }
}

/// A state change of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchStep {
    /// The batch key is on the token: `Planned → Open`.
    Open,
    /// `Open → Sealed`.
    Seal,
    /// `Open | Sealed → Emptied`. Requires that no pair is left, here or on the token.
    Empty,
    /// Stops offering its pairs. The first reason is retained.
    Quarantine(String),
    /// Discards its ready pairs. Pairs of sessions stay.
    Discard,
}

/// Identifies a ready pair. Pairs are offered in this order, so that the oldest batch is used first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PairId {
    /// Its batch.
    pub batch: u64,
    /// Its number in the batch, from 0.
    pub number: u64,
}

/// A ready pair of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PooledPair {
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// The private key, wrapped or on the token.
    pub private_key: StoredKey,
}

/// The pair to assign to a new session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairToReserve {
    /// Generated for the session and wrapped under the key of a batch for sessions.
    OnDemand {
        /// The batch number.
        batch: u64,
        /// The wrapped private key.
        blob: Vec<u8>,
    },
    /// Taken from a pool.
    Pooled(PairId),
}

/// A pair of a batch, ready or assigned to a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPair {
    /// Ready, or assigned to a session.
    pub assignment: PairAssignment,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// The private key, wrapped or on the token.
    pub private_key: StoredKey,
}

/// Whether a pair is ready or assigned to a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PairAssignment {
    /// Not assigned.
    Ready(PairId),
    /// Assigned to a session that is not final.
    Session(SessionId),
}

/// A pair rewrapped under the key of another batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RewrappedPair {
    /// Its assignment when it was rewrapped.
    pub assignment: PairAssignment,
    /// The private key, wrapped under the new batch key.
    pub blob: Vec<u8>,
}

/// A pair that is erased from this store but must still be destroyed on the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairToDestroy {
    /// Its key type.
    pub kind: KeyType,
    /// Its token objects.
    pub pair: TokenPair,
}

/// Number of pairs of one kind since the store was created.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairCounts {
    /// Added to pools.
    pub made: u64,
    /// Assigned to sessions.
    pub reserved: u64,
    /// Discarded unused by an officer, from quarantined batches.
    pub discarded: u64,
}

/// The part of the state store that holds key pairs. Every private key is wrapped by the HSM or stored in it.
///
/// Trust: an attacker who controls it can withhold pairs or restore old ones, but cannot read them without the HSM.
/// Every write survives power loss once the call returns.
#[async_trait]
pub trait SecretStore: Send + Sync {
    /// The store's permanent identifier on tokens, and the highest batch number so far.
    async fn origin(&self) -> Result<(StoreId, u64), StoreError>;

    /// All batches, oldest first. A store has at most a few hundred.
    async fn batches(&self) -> Result<Vec<Batch>, StoreError>;

    /// Creates a batch in state `Planned`. Its number is higher than all earlier ones and higher than `above`, the highest
    /// number on the tokens, which exceeds the store's own after an old copy of the store was restored.
    async fn plan_batch(&self, purpose: Purpose, storage: KeyStorage, at: u64, above: u64)
    -> Result<Batch, StoreError>;

    /// Changes the state of a batch. Repeating a step is a no-op. Fails with `WrongBatch` if the state does not allow the step.
    async fn step_batch(&self, number: u64, step: BatchStep) -> Result<Batch, StoreError>;

    /// Deletes a batch in state `Planned` or `Emptied` and all bytes wrapped under its key, overwriting them if the engine
    /// can. Deleting a missing batch is a no-op.
    async fn delete_batch(&self, number: u64) -> Result<(), StoreError>;

    /// Adds pairs to an open batch of a pool. Fails with `Full` below the disk space floor.
    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError>;

    /// Up to `limit` available pairs of a kind, in order, after pair `after`.
    async fn ready_pairs(
        &self,
        kind: KeyType,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError>;

    /// Up to `limit` pairs of a batch: pairs of sessions first, then ready ones.
    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<BatchPair>, StoreError>;

    /// Moves pairs to an open batch of the same purpose and returns how many it moved. Pairs whose assignment has changed since
    /// they were rewrapped stay.
    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<RewrappedPair>) -> Result<u64, StoreError>;

    /// Up to `limit` pairs that must be destroyed on the token.
    async fn pairs_to_destroy(&self, limit: usize) -> Result<Vec<PairToDestroy>, StoreError>;

    /// Records that a pair was destroyed on the token.
    async fn confirm_destroyed(&self, pair: &TokenPair) -> Result<(), StoreError>;

    /// Pair counts of a kind since the store was created.
    async fn pair_counts(&self, kind: KeyType) -> Result<PairCounts, StoreError>;
}

/// The name of a batch on tokens.
pub(super) const fn name_of(store: StoreId, number: u64) -> BatchName {
    BatchName { store, number }
}
