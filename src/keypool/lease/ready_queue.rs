//! Queues the prefetched ready pairs of one key type and HSM, and records which pairs are leased.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use spp_format::keys::KeyType;
use tokio::sync::Notify;

use crate::hsm::HsmId;
use crate::store::{PairId, PooledPair};

/// Prefetched ready pairs of one key type that one HSM owns. The remaining ready pairs stay in the store.
pub(in crate::keypool) struct ReadyQueue {
    pub(super) kind: KeyType,
    pub(super) owner: HsmId,
    pub(super) state: Arc<Mutex<QueueState>>,
    /// Serialises prefetches.
    pub(super) prefetch_lock: tokio::sync::Mutex<()>,
    /// Notified when a rewrap ends. All queues of a key type share it.
    pairs_available: Arc<Notify>,
}

#[derive(Default)]
pub(super) struct QueueState {
    pub(super) ready: VecDeque<(PairId, PooledPair)>,
    pub(super) leased: BTreeSet<PairId>,
    /// Leases that ended while a prefetch was running. The prefetch may have read these pairs before they were leased, so it must
    /// not enqueue them.
    pub(super) released_during_prefetch: Option<BTreeSet<PairId>>,
    /// The last prefetched pair. Pairs after it are only in the store.
    pub(super) last_prefetched: Option<PairId>,
    /// Number of pairs leased for rewrapping under another batch key.
    rewrapping: usize,
}

impl QueueState {
    pub(super) fn release(&mut self, id: &PairId) {
        self.leased.remove(id);
        if let Some(released) = &mut self.released_during_prefetch {
            released.insert(*id);
        }
    }
}

/// Pairs that are leased for rewrapping under another batch key.
pub(in crate::keypool) struct RewrapGuard {
    ids: BTreeSet<PairId>,
    state: Arc<Mutex<QueueState>>,
    pairs_available: Arc<Notify>,
}

impl RewrapGuard {
    pub(in crate::keypool) fn contains(&self, id: &PairId) -> bool {
        self.ids.contains(id)
    }
}

impl Drop for RewrapGuard {
    /// Pairs that were not rewrapped are still in the store, and the next full prefetch finds them.
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.ids.iter().for_each(|id| state.release(id));
        state.rewrapping -= self.ids.len();
        drop(state);
        self.pairs_available.notify_waiters();
    }
}

impl ReadyQueue {
    pub(in crate::keypool) fn new(kind: KeyType, owner: HsmId, pairs_available: Arc<Notify>) -> Self {
        Self { kind, owner, pairs_available, state: Arc::default(), prefetch_lock: tokio::sync::Mutex::default() }
    }

    /// Leases those of `pairs` that nobody has leased, until they are rewrapped. Rewrapping changes where a pair is stored.
    pub(in crate::keypool) fn lease_for_rewrap(&self, pairs: impl Iterator<Item = PairId>) -> RewrapGuard {
        let mut state = self.state();
        let ids: BTreeSet<_> = pairs.filter(|id| state.leased.insert(*id)).collect();
        state.ready.retain(|(id, _)| !ids.contains(id));
        state.rewrapping += ids.len();
        RewrapGuard { ids, state: Arc::clone(&self.state), pairs_available: Arc::clone(&self.pairs_available) }
    }

    /// Clears the queue and restarts the prefetch at the oldest pair of the store.
    pub(in crate::keypool) fn restart_prefetch(&self) {
        let mut state = self.state();
        state.ready.clear();
        state.last_prefetched = None;
    }

    pub(in crate::keypool) fn is_rewrapping(&self) -> bool {
        self.state().rewrapping > 0
    }

    pub(super) fn lease_next(&self) -> Option<(PairId, PooledPair)> {
        let mut state = self.state();
        let next = state.ready.pop_front()?;
        state.leased.insert(next.0);
        Some(next)
    }

    pub(super) fn state(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
