//! The secret store: pairs that wait for a device, in batches, and the trait of its engines.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::keys::{BatchName, KeyKind, StoreId, StoredKey, TokenPair};
use crate::names::SessionId;

/// What a batch's pairs are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Purpose {
    /// Made on the spot for one session each.
    Sessions,
    /// Made in advance, of one kind.
    Pool(KeyKind),
}

/// How a batch keeps its pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyStorage {
    /// Here, wrapped under the batch's key in the HSM.
    Wrapped,
    /// As objects of the token.
    Hsm,
}

/// How far a batch is: `Planned → Open → Sealed → Emptied`, then forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BatchState {
    /// Its key is being made on the token; nothing is wrapped under it.
    Planned,
    /// It takes pairs.
    Open,
    /// It takes no more pairs; those in it may be used.
    Sealed,
    /// It has no pair and will have none: its key may be destroyed.
    Emptied,
}

/// A batch: pairs that share a key in the HSM, and with it their end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// Counted from 1, never used twice.
    pub number: u64,
    /// What its pairs are for.
    pub purpose: Purpose,
    /// How they are kept.
    pub keeping: KeyStorage,
    /// How far it is.
    pub state: BatchState,
    /// Why none of its pairs is offered, if so.
    pub quarantined: Option<String>,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Pairs that were ever put in.
    pub taken_in: u64,
    /// Pairs that wait for a device.
    pub ready: u64,
    /// Pairs of sessions that are not final.
    pub reserved: u64,
    /// When the first pair was erased of those that the batch's key can still open; seconds since the Unix epoch.
    pub erased_since: Option<u64>,
}

impl Batch {
    /// Whether no pair is left in it.
    pub const fn is_used_up(&self) -> bool {
        self.ready == 0 && self.reserved == 0
    }

    /// Pairs that may be offered.
    pub const fn offered(&self) -> u64 {
        match (&self.quarantined, self.state) {
            (None, BatchState::Open | BatchState::Sealed) => self.ready,
            _ => 0,
        }
    }
}

/// What happens to a batch as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BatchStep {
    /// Its key is on the token: `Planned → Open`.
    Open,
    /// `Open → Sealed`.
    Seal,
    /// `Open | Sealed → Emptied`, of a batch without any pair, here or on the token.
    Empty,
    /// None of its pairs is offered any more. The first reason stays.
    Quarantine(String),
    /// Its ready pairs are given up, those of sessions are not.
    Discard,
}

/// A pair's place in the secret store. Pairs are offered in this order: the oldest batch is used up first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PairId {
    /// Its batch.
    pub batch: u64,
    /// Its number in the batch, counted from 0.
    pub number: u64,
}

/// A pair that waits for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PooledPair {
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// Its private half.
    pub kept: StoredKey,
}

/// The pair that a new session takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PairToReserve {
    /// Made for it and wrapped under the key of a batch for sessions.
    Made {
        /// Which batch.
        batch: u64,
        /// The wrapped bytes.
        blob: Vec<u8>,
    },
    /// Made in advance.
    Pooled(PairId),
}

/// A pair of a batch, whoever has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldPair {
    /// Who has it.
    pub holder: Holder,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// Its private half.
    pub kept: StoredKey,
}

/// Who has a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Holder {
    /// It waits for a device.
    Ready(PairId),
    /// A session that is not final.
    Session(SessionId),
}

/// A pair that is wrapped under the key of another batch now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedPair {
    /// Who had it when it was wrapped.
    pub holder: Holder,
    /// The new wrapped bytes.
    pub blob: Vec<u8>,
}

/// A pair on the token that is erased here and must be destroyed there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CondemnedPair {
    /// Its kind.
    pub kind: KeyKind,
    /// Which.
    pub pair: TokenPair,
}

/// Pairs of one kind since the store was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairCounts {
    /// Put into pools.
    pub made: u64,
    /// Reserved for a session.
    pub reserved: u64,
    /// Given up by an officer, unused: those of quarantined batches.
    pub discarded: u64,
}

/// The secret store: the part of the state store that holds key pairs, every private half wrapped by the HSM or inside it.
///
/// Trust: whoever controls it can withhold pairs or put old ones back, and read none without the HSM.
/// Every write is on the disk, power loss included, before the call returns.
#[async_trait]
pub trait SecretStore: Send + Sync {
    /// The store's name on tokens, made with the store and the same for ever; and the highest number of a batch so far.
    async fn origin(&self) -> Result<(StoreId, u64), StoreError>;

    /// All batches, oldest first; a few hundred at most.
    async fn batches(&self) -> Result<Vec<Batch>, StoreError>;

    /// A new batch in state `Planned`. Its number is higher than that of any batch before, and higher than `above`: what a
    /// token knows of a later life of this store.
    async fn plan_batch(&self, purpose: Purpose, keeping: KeyStorage, at: u64, above: u64)
    -> Result<Batch, StoreError>;

    /// Takes a batch a step further. A step that was taken already is answered as it was; one that the batch's state does not
    /// allow is `WrongBatch`.
    async fn step_batch(&self, number: u64, step: BatchStep) -> Result<Batch, StoreError>;

    /// Forgets a batch that is `Planned` or `Emptied`, and every byte that was wrapped under its key: they are overwritten
    /// where the engine can do that. A batch that is not there is forgotten already.
    async fn forget_batch(&self, number: u64) -> Result<(), StoreError>;

    /// Puts pairs into an open batch for a pool. Refused with `Full` below the disk's floor.
    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError>;

    /// Pairs of a kind that may be offered, in their order, after that one.
    async fn ready_pairs(
        &self,
        kind: KeyKind,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError>;

    /// Pairs of a batch, at most so many: those of sessions first, then those that are ready.
    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<HeldPair>, StoreError>;

    /// Moves pairs to an open batch of the same purpose. Those whose holder has changed meanwhile are left where they are.
    /// Answers how many were moved.
    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<MovedPair>) -> Result<u64, StoreError>;

    /// Pairs on the token that are to be destroyed there, at most so many.
    async fn condemned(&self, limit: usize) -> Result<Vec<CondemnedPair>, StoreError>;

    /// A condemned pair is gone from the token.
    async fn destroyed(&self, pair: &TokenPair) -> Result<(), StoreError>;

    /// Pairs of a kind since the store was made.
    async fn pair_counts(&self, kind: KeyKind) -> Result<PairCounts, StoreError>;
}

/// A batch of that store by its number.
pub(super) const fn name_of(store: StoreId, number: u64) -> BatchName {
    BatchName { store, number }
}
