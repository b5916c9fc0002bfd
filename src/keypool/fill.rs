//! Fills pools between their low and high marks, in the background.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spp_format::keys::{KeyType, PublicKey};
use tokio::task::JoinSet;

use super::pool_state::{Pool, Share};
use super::rules::MAX_POOL_PAIRS;
use super::{KeyPool, PoolError};
use crate::hsm::{HsmError, HsmId, PairStorage, StoredKey};
use crate::store::{Batch, BatchStep, KeyStorage, PooledPair, Purpose};

/// Concurrent HSM calls per key type, so that the HSM's threads have work while pairs are being stored.
const CONCURRENT_CALLS: usize = 4;
/// Maximum number of pairs per call, and time limit of a call that makes more than one pair.
const PAIRS_PER_CALL: u64 = 256;
const CALL_LIMIT: Duration = Duration::from_millis(200);

impl KeyPool {
    /// Orders a fill to `to` pairs, or to the high mark. Returns the target.
    pub fn order_fill(&self, kind: KeyType, to: Option<u64>) -> Result<u64, PoolError> {
        let pool = self.pools.get(&kind).ok_or(PoolError::NoPool(kind))?;
        let to = to.unwrap_or(pool.marks.high);
        // With on-token pairs, the marks are checked against the token's capacity.
        let limit = if self.rules.storage == KeyStorage::Hsm { pool.marks.high } else { MAX_POOL_PAIRS };
        if to > limit {
            return Err(PoolError::TooMany { kind, limit });
        }
        {
            // An earlier, larger order remains in force.
            let mut filling = pool.fill_state();
            filling.ordered = filling.ordered.max(Some(to));
        }
        pool.wake();
        Ok(to)
    }

    /// Whether an order is still pending. The number of ready pairs does not show this, because devices consume pairs.
    pub fn is_ordered(&self, kind: KeyType) -> bool {
        self.pools.get(&kind).is_some_and(|pool| pool.fill_state().ordered.is_some())
    }

    /// Keeps one HSM's share filled, independent of the other HSMs.
    pub(super) async fn fill_loop(self: Arc<Self>, kind: KeyType, member: HsmId) {
        let Some(pool) = self.pools.get(&kind) else { return };
        let Some(share) = pool.shares.get(&member) else { return };
        // `self` owns the sender, so the wait cannot fail.
        let _ = self.reconciled.subscribe().wait_for(|done| *done).await;
        loop {
            let filled = self.fill(kind, pool, member, share).await;
            let paused = filled.err().map(|error| error.to_string());
            let is_new = {
                let mut filling = share.fill_state();
                let is_new = filling.paused != paused;
                filling.paused.clone_from(&paused);
                is_new
            };
            if let Some(reason) = paused.as_ref().filter(|_| is_new) {
                tracing::warn!(%kind, %reason, "pool filling paused, resuming automatically");
            }
            let pacing = self.rules.pacing;
            let delay = if paused.is_some() { pacing.pause } else { pacing.poll_interval };
            tokio::select! {
                () = share.wake.notified(), if paused.is_none() => {}
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// Fills the share if it is below its low mark or an order is pending. Returns when nothing is left to do.
    async fn fill(&self, kind: KeyType, pool: &Pool, member: HsmId, share: &Share) -> Result<(), PoolError> {
        let mut is_begun = false;
        loop {
            let ready = self.ready_pairs_by_member(kind).await?;
            if !ready.contains_key(&member) {
                share.fill_state().running = false;
                return Ok(());
            }
            let suspects = share.fill_state().suspects.clone();
            for batch in suspects {
                // Only this task makes pairs for the batch.
                self.destroy_strays(batch, member).await?;
                share.fill_state().suspects.remove(&batch);
            }
            // Other HSMs take over the share of an HSM whose filling is paused.
            let is_filling = |other: &HsmId| {
                pool.shares.get(other).is_some_and(|share| *other == member || share.fill_state().paused.is_none())
            };
            let ready: BTreeMap<_, _> = ready.into_iter().filter(|(other, _)| is_filling(other)).collect();
            let Some(missing) = pool.missing(member, &ready) else { return Ok(()) };
            self.check_disk_space()?;
            let batch = self.open_batch(Purpose::Pool(kind), member).await?;
            if !std::mem::replace(&mut is_begun, true) {
                pool.fill_state().rate.begin(Instant::now());
            }
            let batch = self.fill_batch(kind, pool, (member, share), batch, missing).await?;
            if batch.pairs_added >= self.rules.batch_size {
                self.store.step_batch(batch.number, BatchStep::Seal).await?;
            }
        }
    }

    /// Adds up to `wanted` pairs to a batch, limited by the batch size.
    async fn fill_batch(
        &self,
        kind: KeyType,
        pool: &Pool,
        (member, share): (HsmId, &Share),
        mut batch: Batch,
        wanted: u64,
    ) -> Result<Batch, PoolError> {
        let name = self.name(batch.number).await?;
        let keep = match batch.storage {
            KeyStorage::Wrapped => PairStorage::Wrapped(name),
            KeyStorage::Hsm => PairStorage::OnToken(name),
        };
        let mut left = wanted.min(self.rules.batch_size.saturating_sub(batch.pairs_added)).max(1);
        let slots = &self.tasks_of(member)?.making_slots;
        let mut calls = JoinSet::new();
        let mut failed = None;
        loop {
            while calls.len() < CONCURRENT_CALLS && left > 0 && failed.is_none() {
                let (hsm, count) = (self.hsm.pinned_to(member), left.min(PAIRS_PER_CALL));
                left -= count;
                let at_most = u32::try_from(count).unwrap_or(u32::MAX);
                let slots = Arc::clone(slots);
                calls.spawn(async move {
                    // The semaphore is never closed.
                    let _slot = slots.acquire_owned().await;
                    (count, hsm.make_pairs(kind, keep, at_most, CALL_LIMIT).await)
                });
            }
            let Some(done) = calls.join_next().await else { break };
            let (count, made) = done.map_err(|e| HsmError::InvalidAnswer(e.to_string()))?;
            let added = match made {
                // If the call's time limit ended it early, the remaining pairs are requested again.
                Ok(made) => {
                    left += count.saturating_sub(made.len() as u64);
                    self.store_pairs(share, &batch, made).await
                }
                Err(error) => {
                    share.mark_suspect(&batch);
                    Err(error.into())
                }
            };
            match added {
                Ok((updated, added)) => {
                    batch = updated;
                    pool.fill_state().rate.note(Instant::now(), added);
                    pool.notify_pairs_added();
                }
                // Wait for the other calls, so that their pairs are stored.
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(batch), Err)
    }

    async fn store_pairs(
        &self,
        share: &Share,
        batch: &Batch,
        made: Vec<(PublicKey, StoredKey)>,
    ) -> Result<(Batch, u64), PoolError> {
        let pair = |(public, private_key): (PublicKey, StoredKey)| PooledPair {
            public_key: public.spki_der().to_vec(),
            private_key,
        };
        let pairs: Vec<_> = made.into_iter().map(pair).collect();
        let count = pairs.len() as u64;
        let added = self.store.add_pairs(batch.number, pairs).await;
        if added.is_err() {
            share.mark_suspect(batch);
        }
        Ok((added?, count))
    }

    /// Ready pairs of a key type per HSM in service.
    async fn ready_pairs_by_member(&self, kind: KeyType) -> Result<BTreeMap<HsmId, u64>, PoolError> {
        let batches = self.store.batches().await?;
        let owners = self.batch_owners().await?;
        let of_kind = || batches.iter().filter(|batch| batch.purpose == Purpose::Pool(kind));
        let ready_on = |member| {
            of_kind().filter(|batch| owners.owner_of(batch.number) == Some(member)).map(Batch::available).sum()
        };
        Ok(self.in_service().into_iter().map(|member| (member, ready_on(member))).collect())
    }

    /// Refuses to make pairs that could not be stored.
    fn check_disk_space(&self) -> Result<(), PoolError> {
        let (free, floor) = self.journal.disk_space()?;
        if free < floor { Err(PoolError::DiskFull { free, floor }) } else { Ok(()) }
    }
}
