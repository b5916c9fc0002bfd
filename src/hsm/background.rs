//! Background operations of the handle: pregenerates pairs, and creates, rewraps and destroys batches. Separate worker threads
//! with the lowest priority perform them, so that no device waits for them.

use std::time::Duration;

use spp_format::keys::{KeyType, PublicKey};

use super::connection::BACKGROUND_LIMIT;
use super::failure::HsmError;
use super::handle::{CallOptions, Hsm, unexpected};
use super::objects::public_key;
use super::wire::{Answer, Operation, Priority, StorageTarget, StoredForm};
use super::{BatchName, StoredKey, TokenPair, WrappedKey};

/// Deadline of a short operation, which may wait for a pair being generated. A hung HSM must not block the other HSMs.
const SHORT: Duration = Duration::from_secs(60);
/// Deadline of rewrapping a group of pairs.
const MOVE: Duration = Duration::from_secs(5 * 60);

/// Maximum number of attempts before an error is returned.
const ATTEMPTS: u32 = 5;

/// Where new pairs are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairStorage {
    /// In the secret store, wrapped under the batch key.
    Wrapped(BatchName),
    /// As token objects.
    OnToken(BatchName),
}

/// Token objects that daemons have generated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DaemonObjects {
    /// Batch keys.
    pub keys: Vec<BatchName>,
    /// Pairs, each with its batch.
    pub pairs: Vec<(BatchName, TokenPair)>,
}

impl Hsm {
    /// Pregenerates pairs: at least one, then more until `within` has elapsed, up to `at_most`.
    pub async fn make_pairs(
        &self,
        kind: KeyType,
        target: PairStorage,
        at_most: u32,
        within: Duration,
    ) -> Result<Vec<(PublicKey, StoredKey)>, HsmError> {
        let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let target = match target {
            PairStorage::Wrapped(batch) => StorageTarget::Wrapped(batch.key()),
            PairStorage::OnToken(batch) => StorageTarget::OnToken(batch.pairs()),
        };
        let operation = || Operation::MakePairs { kind, target: target.clone(), at_most, within_ms };
        // A lost call leaves its pairs on the token. The caller must see the error, to have them destroyed.
        let attempts = if matches!(target, StorageTarget::OnToken(_)) { 1 } else { ATTEMPTS };
        let Answer::Made(made) = self.attempt(attempts, BACKGROUND_LIMIT, operation).await? else {
            return Err(unexpected());
        };
        let pair = |pair: super::wire::MadePair| {
            let stored = match (pair.stored, &target) {
                (StoredForm::Blob(blob), StorageTarget::Wrapped(key)) => {
                    StoredKey::Wrapped(WrappedKey { wrapping_key: key.clone(), blob })
                }
                (StoredForm::Id(id), StorageTarget::OnToken(label)) => {
                    StoredKey::OnToken(TokenPair { label: label.clone(), id })
                }
                _ => return Err(unexpected()),
            };
            Ok((public_key(kind, pair.public)?, stored))
        };
        made.into_iter().map(pair).collect()
    }

    /// Rewraps keys from one batch key to another. The keys are in clear only inside the HSM.
    pub async fn move_keys(
        &self,
        from: BatchName,
        to: BatchName,
        blobs: Vec<(KeyType, Vec<u8>)>,
    ) -> Result<Vec<Vec<u8>>, HsmError> {
        let count = blobs.len();
        let operation = || Operation::Move { from: from.key(), to: to.key(), blobs: blobs.clone() };
        match self.attempt(ATTEMPTS, MOVE, operation).await? {
            Answer::Moved(moved) if moved.len() == count => Ok(moved),
            _ => Err(unexpected()),
        }
    }

    /// Generates a batch key on the token unless it exists. The key is durable when this returns.
    pub async fn create_batch_key(&self, batch: BatchName) -> Result<(), HsmError> {
        let operation = || Operation::CreateBatchKey { key: batch.key() };
        match self.in_background(operation).await? {
            Answer::Created => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Destroys a batch key (C_DestroyObject) on its owners, or on every HSM if no owner is recorded. When this returns, a lookup
    /// has confirmed that the key no longer exists.
    pub async fn destroy_batch_key(&self, batch: BatchName) -> Result<(), HsmError> {
        self.destroyed(Some(batch), || Operation::DestroyBatchKey { key: batch.key() }).await
    }

    /// Destroys a pair on the token of its owners, or on every HSM if no owner is recorded. When this returns, a lookup has
    /// confirmed that the pair no longer exists.
    pub async fn destroy_pair(&self, kind: KeyType, pair: &TokenPair) -> Result<(), HsmError> {
        let batch = BatchName::from_pair_label(&pair.label);
        self.destroyed(batch, || Operation::DestroyPair { kind, pair: pair.clone() }).await
    }

    /// Lists the objects that daemons have generated on the tokens, for any store.
    pub async fn daemon_objects(&self) -> Result<DaemonObjects, HsmError> {
        let mut objects = DaemonObjects::default();
        for member in self.members() {
            let Answer::Own { keys, pairs } = self.pinned_to(member).in_background(|| Operation::ListOwn).await? else {
                return Err(unexpected());
            };
            objects.keys.extend(keys.iter().filter_map(BatchName::from_key_name));
            objects
                .pairs
                .extend(pairs.into_iter().filter_map(|pair| Some((BatchName::from_pair_label(&pair.label)?, pair))));
        }
        Ok(objects)
    }

    async fn destroyed(&self, batch: Option<BatchName>, operation: impl Fn() -> Operation) -> Result<(), HsmError> {
        let batch_owners =
            batch.filter(|_| self.only.is_none()).map(|batch| self.batch_owners(batch)).unwrap_or_default();
        for member in self.members().filter(|member| batch_owners.is_empty() || batch_owners.contains(member)) {
            match self.pinned_to(member).in_background(&operation).await? {
                Answer::Destroyed => {}
                _ => return Err(unexpected()),
            }
        }
        Ok(())
    }

    async fn in_background(&self, operation: impl Fn() -> Operation) -> Result<Answer, HsmError> {
        self.attempt(ATTEMPTS, SHORT, operation).await
    }

    async fn attempt(
        &self,
        attempts: u32,
        limit: Duration,
        operation: impl Fn() -> Operation,
    ) -> Result<Answer, HsmError> {
        let operations = || vec![operation()];
        let options = CallOptions { priority: Priority::Background, limit, attempts, batch: None, fail_fast: false };
        self.call_on(options, operations, |mut answers, _| answers.next()).await
    }
}
