//! Shreds batches: rewraps the remaining pairs under the next batch key, then destroys the old batch key in the HSM. From then on
//! no copy of the disk can yield the erased pairs, not even with the HSM.

use std::time::Duration;

use spp_format::keys::{KeyType, PublicKey};

use super::batch_owners::BatchOwners;
use super::{KeyPool, PoolError};
use crate::hsm::{BatchName, HsmError, HsmId, StoredKey};
use crate::store::{
    Batch, BatchPair, BatchState, BatchStep, KeyStorage, PairAssignment, PairId, PairToDestroy, Purpose, RewrappedPair,
    StoreError,
};

/// Number of pairs to rewrap per call and transaction.
const CHUNK: usize = 128;
/// Maximum number of on-token pairs to destroy per run, and number of rows to search for pairs whose HSM is ready.
const MAX_DESTROYED: usize = 256;
const MAX_DESTROY_SCANNED: usize = 10_000;

/// An officer's order to shred batches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShredOrder {
    /// Restricts the order to pools of this key type.
    pub kind: Option<KeyType>,
    /// Includes quarantined batches: their ready pairs are discarded.
    pub quarantined: bool,
}

/// The result of shredding batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShredReport {
    /// Number of batches whose keys were destroyed.
    pub batches: u64,
    /// Number of pairs rewrapped under another batch key.
    pub moved: u64,
    /// Number of pairs discarded.
    pub discarded: u64,
}

impl KeyPool {
    /// Shreds the selected batches: those with erased pairs, finished ones, and quarantined ones if the order says so. Calls
    /// `progress` after each batch with the number of finished and of all batches.
    pub async fn shred(
        &self,
        order: &ShredOrder,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<ShredReport, PoolError> {
        self.wait_until_reconciled().await?;
        let is_selected = |batch: &Batch| {
            let kind = order.kind.is_none_or(|kind| batch.purpose == Purpose::Pool(kind));
            let erased = batch.first_erased.is_some() && batch.quarantined.is_none();
            kind && (erased || self.is_finished(batch) || (order.quarantined && batch.quarantined.is_some()))
        };
        let all = self.store.batches().await?;
        if let Some(kind) = order.kind
            && !self.pools.contains_key(&kind)
            && all.iter().all(|batch| batch.purpose != Purpose::Pool(kind))
        {
            return Err(PoolError::NoPool(kind));
        }
        let batches: Vec<_> = all.into_iter().filter(is_selected).collect();
        let mut shredded = ShredReport::default();
        progress(0, batches.len());
        let mut failed = None;
        for (n, batch) in batches.iter().enumerate() {
            let owners = self.batch_owners().await?;
            let done = match owners.is_available(batch.number) {
                true => self.shred_batch(batch.number, &mut shredded).await,
                false => Err(self.owner_error(&owners, batch.number).await),
            };
            // Continue with the other batches.
            if let Err(error) = done {
                failed.get_or_insert(error);
            }
            progress(n + 1, batches.len());
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if order.quarantined && self.store.batches().await?.iter().all(|batch| batch.quarantined.is_none()) {
            // The officer has decided that this store is the valid one.
            self.reconcile_state().rolled_back = None;
        }
        Ok(shredded)
    }

    /// The error of the HSM that owns the batch.
    async fn owner_error(&self, owners: &BatchOwners<'_>, number: u64) -> PoolError {
        let of_batch = self.hsm.batch_owners(owners.name(number));
        for member in self.hsm.members().filter(|member| of_batch.is_empty() || of_batch.contains(member)) {
            if let Err(error) = self.hsm.pinned_to(member).ready(Duration::ZERO).await {
                return error.into();
            }
        }
        let (why, retry_after) = ("the HSM was unavailable a moment ago".to_owned(), Duration::from_secs(1));
        PoolError::Hsm(HsmError::Unavailable { reason: why, retry_after })
    }

    /// Shreds full batches without remaining pairs, and batches whose first erasure is older than the limit. Quarantined batches
    /// wait for an officer: if the right store is restored, it needs the same keys.
    pub(super) async fn shred_due_batches(&self, member: HsmId) -> Result<(), PoolError> {
        let mut failed = None;
        let owners = self.batch_owners().await?;
        for batch in self.store.batches().await?.into_iter().filter(|batch| batch.quarantined.is_none()) {
            // Batches of an unavailable HSM wait for it.
            if !owners.is_maintained_by(member, batch.number) || !owners.is_available(batch.number) {
                continue;
            }
            if self.is_finished(&batch) || self.is_due(&batch) {
                // Continue with the other batches.
                if let Err(error) = self.shred_batch(batch.number, &mut ShredReport::default()).await {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether a batch is due. An erasure in the future was recorded with a wrong clock, so the batch is due.
    fn is_due(&self, batch: &Batch) -> bool {
        let now = self.clock.now();
        batch.first_erased.is_some_and(|since| since > now) || self.shred_at(batch).is_some_and(|at| at <= now)
    }

    /// Whether the batch has no pairs and accepts no new ones, so that only its key remains.
    fn is_finished(&self, batch: &Batch) -> bool {
        let accepts_pairs = match batch.purpose {
            Purpose::Sessions => true,
            Purpose::Pool(kind) => self.pools.contains_key(&kind) && batch.storage == self.rules.storage,
        };
        match batch.state {
            BatchState::Emptied => true,
            BatchState::Sealed => batch.has_no_pairs() && batch.quarantined.is_none(),
            BatchState::Open => batch.has_no_pairs() && batch.quarantined.is_none() && !accepts_pairs,
            BatchState::Planned => false,
        }
    }

    /// Latest time of shredding, in seconds since the Unix epoch.
    pub(super) fn shred_at(&self, batch: &Batch) -> Option<u64> {
        batch.first_erased.map(|since| since.saturating_add(self.rules.shred_after.as_secs()))
    }

    /// Each step is durable before the next one. After an interruption at any step, the next run resumes with the remaining
    /// steps.
    async fn shred_batch(&self, number: u64, shredded: &mut ShredReport) -> Result<(), PoolError> {
        let first = || self.hsm.members().next().ok_or_else(|| PoolError::Hsm(HsmError::Refused("no HSM".to_owned())));
        let member = self.batch_owners().await?.owner_of(number).map_or_else(first, Ok)?;
        let _guard = self.tasks_of(member)?.shredding.lock().await;
        let Some(batch) = self.store.batches().await?.into_iter().find(|batch| batch.number == number) else {
            return Ok(());
        };
        self.closing().insert(number);
        let done = self.shred_steps(&batch, member, shredded).await;
        self.closing().remove(&number);
        done
    }

    async fn shred_steps(&self, batch: &Batch, member: HsmId, shredded: &mut ShredReport) -> Result<(), PoolError> {
        let name = self.name(batch.number).await?;
        if batch.state != BatchState::Emptied {
            // 1. Another batch replaces it: from now on this batch receives no new pairs.
            let next = self.replacement_batch(batch).await?;
            // 2. Wait for sessions that hold a lease to add a pair to it.
            self.wait_for_readers().await;
            if batch.state == BatchState::Open {
                self.store.step_batch(batch.number, BatchStep::Seal).await?;
            }
            // 3. Rewrap the remaining pairs, or discard quarantined ones. Pairs can be leased during this. A crash leaves some
            // pairs in each batch, each under the key of its batch.
            if batch.quarantined.is_some() {
                self.store.step_batch(batch.number, BatchStep::Discard).await?;
                shredded.discarded += batch.ready;
            }
            if let Some(next) = next {
                shredded.moved += self.rewrap_remaining(batch, name, next.number).await?;
            }
            if batch.storage == KeyStorage::Hsm {
                self.destroy_pending_pairs(member).await?;
            }
            // 4. Wait for readers that read a pair before it was rewrapped.
            self.wait_for_readers().await;
            // 5. Mark the batch as empty: after a crash from here on only the key remains to be destroyed.
            self.store.step_batch(batch.number, BatchStep::Empty).await?;
        }
        // 6. C_DestroyObject, then a search verifies that the key is gone. The destruction must survive a power loss.
        if batch.storage == KeyStorage::Wrapped {
            self.hsm.destroy_batch_key(name).await?;
        }
        // 7. Overwrite the file, then forget the batch.
        self.store.delete_batch(batch.number).await?;
        self.hsm.forget_batch_owners(name);
        shredded.batches += 1;
        tracing::info!(batch = batch.number, purpose = ?batch.purpose, "batch of key pairs shredded, its key is destroyed");
        Ok(())
    }

    /// The batch that receives the remaining pairs; `None` if no pairs remain.
    async fn replacement_batch(&self, batch: &Batch) -> Result<Option<Batch>, PoolError> {
        let of_sessions = |(member, current): (&HsmId, &BatchName)| (current.number == batch.number).then_some(*member);
        let current = self.session_batches.borrow().iter().find_map(of_sessions);
        // A pair that arrives in an empty batch now prevents the Empty step, and is rewrapped in the next run.
        if (current.is_none() && batch.has_no_pairs()) || batch.storage == KeyStorage::Hsm {
            return Ok(None);
        }
        // Only the HSM that has the batch key can rewrap. A batch without an owner is quarantined, and its pairs are not
        // rewrapped.
        let Some(owner) = self.batch_owners().await?.owner_of(batch.number) else { return Ok(None) };
        let next = self.open_batch_beside(batch, owner).await?;
        if current.is_some() {
            self.set_session_batch(&next, owner).await?;
        }
        Ok(Some(next))
    }

    async fn rewrap_remaining(&self, batch: &Batch, name: BatchName, to: u64) -> Result<u64, PoolError> {
        let target = BatchName { number: to, ..name };
        let owner = self.batch_owners().await?.owner_of(batch.number);
        let queue = match batch.purpose {
            Purpose::Pool(kind) => self.pools.get(&kind).and_then(|pool| Some(&pool.shares.get(&owner?)?.queue)),
            Purpose::Sessions => None,
        };
        let mut count = 0;
        loop {
            let pairs = self.store.pairs_of_batch(batch.number, CHUNK).await?;
            if pairs.is_empty() {
                return Ok(count);
            }
            // Lease the ready pairs that no call has leased. A leased pair is rewrapped later, as a pair of its session.
            let leased = queue.map(|queue| queue.lease_for_rewrap(pairs.iter().filter_map(ready_id)));
            let is_leased = |pair: &BatchPair| match (ready_id(pair), &leased) {
                (Some(id), Some(leased)) => leased.contains(&id),
                _ => true,
            };
            let pairs: Vec<_> = pairs.into_iter().filter(is_leased).collect();
            if pairs.is_empty() {
                self.wait_for_readers().await;
                continue;
            }
            let blobs = pairs.iter().map(blob_of).collect::<Result<Vec<_>, _>>()?;
            let hsm = owner.map_or_else(|| self.hsm.clone(), |owner| self.hsm.pinned_to(owner));
            let moved = hsm.move_keys(name, target, blobs).await?;
            let rewrap = |(pair, blob): (&BatchPair, Vec<u8>)| RewrappedPair { assignment: pair.assignment, blob };
            let rewrapped = pairs.iter().zip(moved).map(rewrap).collect();
            // Pairs whose session has just ended are erased and not counted; the next iteration does not find them.
            count += self.store.move_pairs(batch.number, to, rewrapped).await?;
        }
    }

    /// Destroys on-token pairs that are erased from the store.
    pub(super) async fn destroy_pending_pairs(&self, member: HsmId) -> Result<(), PoolError> {
        let mut failed = None;
        let owners = self.batch_owners().await?;
        let is_destroyable = |pending: &PairToDestroy| {
            let batch = BatchName::from_pair_label(&pending.pair.label);
            let is_own =
                |batch: BatchName| owners.is_maintained_by(member, batch.number) && owners.is_available(batch.number);
            batch.is_none_or(is_own)
        };
        for pending in self
            .store
            .pairs_to_destroy(MAX_DESTROY_SCANNED)
            .await?
            .into_iter()
            .filter(is_destroyable)
            .take(MAX_DESTROYED)
        {
            let destroyed = self.hsm.destroy_pair(pending.kind, &pending.pair).await.map_err(PoolError::from);
            // If a crash occurs before this update, the next run destroys the missing pair again, which is no error.
            let result = match destroyed {
                Ok(()) => self.store.confirm_destroyed(&pending.pair).await.map_err(PoolError::from),
                Err(error) => Err(error),
            };
            // Continue with the other pairs.
            if let Err(error) = result {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

const fn ready_id(pair: &BatchPair) -> Option<PairId> {
    match pair.assignment {
        PairAssignment::Ready(id) => Some(id),
        PairAssignment::Session(_) => None,
    }
}

fn blob_of(pair: &BatchPair) -> Result<(KeyType, Vec<u8>), PoolError> {
    let damaged = |cause: String| {
        let what = format!("the pair of {:?}", pair.assignment);
        PoolError::Store(StoreError::Damaged { store: "secret store", what, cause })
    };
    let public = PublicKey::from_spki_der(&pair.public_key).map_err(|e| damaged(e.to_string()))?;
    match &pair.private_key {
        StoredKey::Wrapped(wrapped) => Ok((public.kind(), wrapped.blob.clone())),
        StoredKey::OnToken(_) => Err(damaged("an on-token pair cannot be rewrapped".to_owned())),
    }
}
