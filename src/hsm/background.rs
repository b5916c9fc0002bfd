//! The handle's verbs that no device waits for: pairs made in advance, batches of them begun, moved and ended. They are done by
//! threads of their own in the worker, of the lowest priority.

use std::time::Duration;

use super::connection::BACKGROUND_LIMIT;
use super::failure::HsmError;
use super::handle::{CallOptions, Hsm, unexpected};
use super::objects::public_key;
use super::wire::{Answer, Keep, Kept, Operation, Priority};
use crate::keys::{BatchName, KeyKind, PublicKey, StoredKey, TokenPair, WrappedKey};

/// How long what takes no processor may take, behind a pair that is being made perhaps: one HSM that hangs must not stop everything.
const SHORT: Duration = Duration::from_secs(60);
/// How long the moving of some pairs may take.
const MOVE: Duration = Duration::from_secs(5 * 60);

/// How often what failed is tried again before it is said.
const ATTEMPTS: u32 = 5;

/// Where new pairs are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepIn {
    /// Wrapped under the batch's key.
    Wrapped(BatchName),
    /// As objects of the token.
    OnToken(BatchName),
}

/// What daemons made on the token.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnObjects {
    /// Batch keys.
    pub keys: Vec<BatchName>,
    /// Pairs, by their batch.
    pub pairs: Vec<(BatchName, TokenPair)>,
}

impl Hsm {
    /// Makes pairs for later: one, then as many as are made within the time, at most so many.
    pub async fn make_pairs(
        &self,
        kind: KeyKind,
        keep: KeepIn,
        at_most: u32,
        within: Duration,
    ) -> Result<Vec<(PublicKey, StoredKey)>, HsmError> {
        let within_ms = u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let order = match keep {
            KeepIn::Wrapped(batch) => Keep::Wrapped(batch.key()),
            KeepIn::OnToken(batch) => Keep::OnToken(batch.pairs()),
        };
        let operation = || Operation::MakePairs { kind, keep: order.clone(), at_most, within_ms };
        // What a lost call had put on the token stays there; the caller must know of it, to have it destroyed.
        let attempts = if matches!(order, Keep::OnToken(_)) { 1 } else { ATTEMPTS };
        let Answer::Made(made) = self.attempt(attempts, BACKGROUND_LIMIT, operation).await? else {
            return Err(unexpected());
        };
        let pair = |pair: super::wire::MadePair| {
            let kept = match (pair.kept, &order) {
                (Kept::Blob(blob), Keep::Wrapped(key)) => {
                    StoredKey::Wrapped(WrappedKey { wrapping_key: key.clone(), blob })
                }
                (Kept::Id(id), Keep::OnToken(label)) => StoredKey::OnToken(TokenPair { label: label.clone(), id }),
                _ => return Err(unexpected()),
            };
            Ok((public_key(kind, pair.public)?, kept))
        };
        made.into_iter().map(pair).collect()
    }

    /// Wraps what is wrapped under one batch's key under another's; the keys are in clear inside the HSM alone.
    pub async fn move_keys(
        &self,
        from: BatchName,
        to: BatchName,
        blobs: Vec<(KeyKind, Vec<u8>)>,
    ) -> Result<Vec<Vec<u8>>, HsmError> {
        let count = blobs.len();
        let operation = || Operation::Move { from: from.key(), to: to.key(), blobs: blobs.clone() };
        match self.attempt(ATTEMPTS, MOVE, operation).await? {
            Answer::Moved(moved) if moved.len() == count => Ok(moved),
            _ => Err(unexpected()),
        }
    }

    /// Makes a batch's key on the token; it is durable when this returns. One that is there already stays.
    pub async fn create_batch_key(&self, batch: BatchName) -> Result<(), HsmError> {
        let operation = || Operation::CreateBatchKey { key: batch.key() };
        match self.in_background(operation).await? {
            Answer::Created => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Destroys a batch's key (C_DestroyObject); when this returns it was looked for and not found, by its keepers, or by every HSM
    /// if none is on record.
    pub async fn destroy_batch_key(&self, batch: BatchName) -> Result<(), HsmError> {
        self.destroyed(Some(batch), || Operation::DestroyBatchKey { key: batch.key() }).await
    }

    /// Destroys a pair on the token; when this returns it was looked for and not found, likewise.
    pub async fn destroy_pair(&self, kind: KeyKind, pair: &TokenPair) -> Result<(), HsmError> {
        let batch = BatchName::of_pairs(&pair.label);
        self.destroyed(batch, || Operation::DestroyPair { kind, pair: pair.clone() }).await
    }

    /// What daemons made on the tokens, whichever their store.
    pub async fn own_objects(&self) -> Result<OwnObjects, HsmError> {
        let mut own = OwnObjects::default();
        for member in self.each() {
            let Answer::Own { keys, pairs } = self.at(member).in_background(|| Operation::ListOwn).await? else {
                return Err(unexpected());
            };
            own.keys.extend(keys.iter().filter_map(BatchName::of_key));
            own.pairs.extend(pairs.into_iter().filter_map(|pair| Some((BatchName::of_pairs(&pair.label)?, pair))));
        }
        Ok(own)
    }

    async fn destroyed(&self, batch: Option<BatchName>, operation: impl Fn() -> Operation) -> Result<(), HsmError> {
        let keepers = batch.filter(|_| self.only.is_none()).map(|batch| self.keepers(batch)).unwrap_or_default();
        for member in self.each().filter(|member| keepers.is_empty() || keepers.contains(member)) {
            match self.at(member).in_background(&operation).await? {
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
        let terms = CallOptions { lane: Priority::Background, limit, attempts, about: None, impatient: false };
        self.call_on(terms, operations, |mut answers, _| answers.next()).await
    }
}
