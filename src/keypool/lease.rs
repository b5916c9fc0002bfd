//! Exclusive leases on ready key pairs. A lease prevents two calls from offering the same pair. It is held in memory only: a pair
//! belongs to a session once the journal has committed the reservation. A crash drops all leases and loses no pair.

pub(super) mod ready_queue;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::pool_state::Share;
use super::readers_barrier::ReaderGuard;
use super::{KeyPool, PoolError};

use spp_format::keys::{KeyType, PublicKey};
use spp_format::names::KeyName;

use crate::hsm::{BatchName, HsmError, StoredKey, WrappedKey};
use crate::store::{PairId, PairToReserve, PooledPair, StoreError};
use ready_queue::{QueueState, ReadyQueue};

/// Number of wrapped pairs to prefetch from the store.
const PREFETCH: usize = 128;
/// Shortest and longest retry delay for a station.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// A lease on one ready pair. Dropping it returns the pair to the queue; [`PoolLease::consume`] does not.
pub struct PoolLease {
    id: PairId,
    public: PublicKey,
    stored_key: StoredKey,
    pair: Option<PooledPair>,
    /// Whether the pair returns to the end of the queue.
    demoted: bool,
    state: Arc<Mutex<QueueState>>,
    _reader: ReaderGuard,
}

/// Permission to wrap a session's pair under the key of the session batch, until the pair is journaled.
pub struct SessionLease {
    batch: BatchName,
    _reader: ReaderGuard,
}

impl SessionLease {
    /// The wrapping key.
    pub fn key(&self) -> KeyName {
        self.batch.key()
    }

    /// The reservation to journal; `None` if the pair is wrapped under another key.
    pub fn reservation(&self, stored_key: &StoredKey) -> Option<PairToReserve> {
        match stored_key {
            StoredKey::Wrapped(WrappedKey { wrapping_key, blob }) if *wrapping_key == self.key() => {
                Some(PairToReserve::OnDemand { batch: self.batch.number, blob: blob.clone() })
            }
            _ => None,
        }
    }
}

impl PoolLease {
    /// The public key.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The stored private key.
    pub const fn stored_key(&self) -> &StoredKey {
        &self.stored_key
    }

    /// The reservation to journal.
    pub const fn reservation(&self) -> PairToReserve {
        PairToReserve::Pooled(self.id)
    }

    /// Ends the lease without returning the pair: the reservation was committed, or its outcome is unknown. If the commit failed,
    /// the pair is still ready in the store, and the next full prefetch finds it.
    pub fn consume(mut self) {
        self.pair = None;
    }

    /// Returns the pair to the end of the queue, because the HSM could not unwrap it. The next device gets another pair.
    pub fn demote(mut self) {
        self.demoted = true;
    }
}

impl Drop for PoolLease {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.release(&self.id);
        match self.pair.take() {
            Some(pair) if self.demoted => state.ready.push_back((self.id, pair)),
            Some(pair) => state.ready.push_front((self.id, pair)),
            None => {}
        }
    }
}

impl KeyPool {
    /// Leases a ready pair from the oldest batch of the least loaded HSM.
    pub async fn lease_pair(&self, kind: KeyType) -> Result<PoolLease, PoolError> {
        let pool = self.pools.get(&kind).ok_or(PoolError::NoPool(kind))?;
        self.wait_until_reconciled().await?;
        let deadline = Instant::now() + self.hsm.call_timeout();
        let (reader, taken) = loop {
            // Subscribe before looking, so that no notification is missed.
            let pairs_available = pool.pairs_available.notified();
            let shares: Vec<_> = self.in_service().iter().filter_map(|member| pool.shares.get(member)).collect();
            let are_rewrapping = || shares.iter().any(|share| share.queue.is_rewrapping());
            let reader = self.reader_guard();
            let was_rewrapping = are_rewrapping();
            let mut taken = None;
            for share in &shares {
                taken = self.lease_or_prefetch(&share.queue).await?.map(|taken| (&share.queue, taken));
                if taken.is_some() {
                    break;
                }
            }
            if taken.is_some() || !(was_rewrapping || are_rewrapping()) || Instant::now() >= deadline {
                break (reader, taken);
            }
            // Pairs exist but are leased for a rewrap, which takes one call.
            drop(reader);
            let _ = tokio::time::timeout_at(deadline.into(), pairs_available).await;
        };
        pool.wake();
        let Some((queue, (id, pair))) = taken else { return Err(self.empty_error(kind)) };
        let state = Arc::clone(&queue.state);
        let public = PublicKey::from_spki_der(&pair.public_key);
        let mut lease = match public {
            Ok(public) => PoolLease {
                id,
                public,
                stored_key: pair.private_key.clone(),
                pair: None,
                demoted: false,
                state,
                _reader: reader,
            },
            Err(e) => {
                queue.state().release(&id);
                let what = format!("pair {} of batch {}", id.number, id.batch);
                return Err(StoreError::Damaged { store: "secret store", what, cause: e.to_string() }.into());
            }
        };
        lease.pair = Some(pair);
        Ok(lease)
    }

    /// Takes the next pair of the queue, after a prefetch if the queue is empty.
    async fn lease_or_prefetch(&self, queue: &ReadyQueue) -> Result<Option<(PairId, PooledPair)>, PoolError> {
        if let Some(taken) = queue.lease_next() {
            return Ok(Some(taken));
        }
        let _prefetch_guard = queue.prefetch_lock.lock().await;
        if let Some(taken) = queue.lease_next() {
            return Ok(Some(taken));
        }
        self.prefetch(queue).await?;
        Ok(queue.lease_next())
    }

    /// Grants a lease to generate a session's pair in the least loaded HSM.
    pub async fn lease_for_session(&self) -> Result<SessionLease, PoolError> {
        let limit = self.hsm.call_timeout();
        let deadline = Instant::now() + limit;
        let (mut current, mut hsm) = (self.session_batches.subscribe(), self.hsm.clone());
        loop {
            let selected = {
                let batches = current.borrow_and_update();
                let ready_members = self.hsm.ready_members();
                let mut on_ready_members = ready_members.iter().filter_map(|member| batches.get_key_value(member));
                // If no HSM is ready, the HSM call itself waits for one.
                let any = || batches.iter().next().filter(|_| ready_members.is_empty());
                on_ready_members.next().or_else(any).map(|(member, batch)| (*member, *batch))
            };
            if let Some((member, batch)) = selected {
                let reader = self.reader_guard();
                // A replacement of this batch changes the value before it waits for readers. If the value is unchanged now, the
                // lease is valid.
                if self.session_batches.borrow().get(&member) == Some(&batch) {
                    return Ok(SessionLease { batch, _reader: reader });
                }
                continue;
            }
            // Returns the HSM's own error, immediately if only an officer can resolve it.
            self.hsm.ready(limit).await?;
            let change = async {
                tokio::select! {
                    _ = current.changed() => {}
                    () = hsm.changed() => {}
                }
            };
            if tokio::time::timeout_at(deadline.into(), change).await.is_err() {
                return Err(self.not_ready_error().await);
            }
        }
    }

    /// Prefetches the next pairs into the queue.
    async fn prefetch(&self, queue: &ReadyQueue) -> Result<(), PoolError> {
        let after = {
            let mut state = queue.state();
            state.released_during_prefetch = Some(BTreeSet::new());
            state.last_prefetched
        };
        let mut pairs = self.next_pairs(queue, after).await?;
        if pairs.is_empty() && after.is_some() {
            // Start over, to find pairs that were passed over because the outcome of their reservation was unknown.
            pairs = self.next_pairs(queue, None).await?;
        }
        let mut state = queue.state();
        state.last_prefetched = pairs.last().map(|(last, _)| *last);
        let released = state.released_during_prefetch.take().unwrap_or_default();
        // Pairs that were returned during the prefetch are already in the queue.
        let queued: BTreeSet<_> = state.ready.iter().map(|(id, _)| *id).collect();
        let is_known = |id: &PairId| state.leased.contains(id) || released.contains(id) || queued.contains(id);
        let pairs: Vec<_> = pairs.into_iter().filter(|(id, _)| !is_known(id)).collect();
        state.ready.extend(pairs);
        Ok(())
    }

    /// The next pairs after `after` that the queue's HSM owns. Skips batches of other HSMs.
    async fn next_pairs(
        &self,
        queue: &ReadyQueue,
        after: Option<PairId>,
    ) -> Result<Vec<(PairId, PooledPair)>, PoolError> {
        let owners = self.batch_owners().await?;
        let mut after = after;
        loop {
            let mut pairs = self.store.ready_pairs(queue.kind, after, PREFETCH).await?;
            let Some((last, _)) = pairs.last() else { return Ok(pairs) };
            after = Some(match owners.owner_of(last.batch) {
                Some(owner) if owner == queue.owner => *last,
                _ => PairId { number: u64::MAX, ..*last },
            });
            pairs.retain(|(id, _)| owners.owner_of(id.batch) == Some(queue.owner));
            if !pairs.is_empty() {
                return Ok(pairs);
            }
        }
    }

    fn empty_error(&self, kind: KeyType) -> PoolError {
        let Some(pool) = self.pools.get(&kind) else { return PoolError::NoPool(kind) };
        let unserved = pool.unserved.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let fill_rate = pool.fill_state().rate.per_second();
        let fills = |share: &Share| share.fill_state().paused.is_none();
        // Each waiting caller needs one pair, so this caller can be served after that many pairs.
        let retry_after = if fill_rate > 0.0 {
            Duration::try_from_secs_f64(f64::from(unserved) / fill_rate).unwrap_or(RETRY.1)
        } else {
            Duration::from_secs(1)
        };
        PoolError::Empty {
            kind,
            fill_rate,
            retry_after: retry_after.clamp(RETRY.0, RETRY.1),
            paused: !pool.shares.values().any(fills),
        }
    }

    /// Waits for the comparison of store and token, at most for the call timeout.
    pub(super) async fn wait_until_reconciled(&self) -> Result<(), PoolError> {
        if *self.reconciled.borrow() {
            return Ok(());
        }
        let limit = self.hsm.call_timeout();
        self.hsm.ready(limit).await?;
        let mut reconciled = self.reconciled.subscribe();
        let done = tokio::time::timeout(limit, reconciled.wait_for(|done| *done)).await.is_ok_and(|done| done.is_ok());
        if done { Ok(()) } else { Err(self.not_ready_error().await) }
    }

    /// The reason why no pairs are offered yet.
    pub(super) async fn not_ready_error(&self) -> PoolError {
        if let Err(error) = self.hsm.ready(Duration::ZERO).await {
            return error.into();
        }
        let why = self.last_errors();
        let why = why.unwrap_or_else(|| "the batches of key pairs are still being compared with the token".to_owned());
        PoolError::Hsm(HsmError::Unavailable { reason: why, retry_after: Duration::from_secs(1) })
    }
}
