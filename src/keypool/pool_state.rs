//! Tracks the ready pairs and the fill state of each pool, and of each HSM's share of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::lease::ready_queue::ReadyQueue;
use super::rate::FillRate;
use super::rules::Marks;
use crate::hsm::HsmId;
use crate::store::{Batch, KeyStorage};

/// The pool of one key type.
pub(super) struct Pool {
    pub(super) marks: Marks,
    pub(super) shares: BTreeMap<HsmId, Share>,
    /// Notified when pairs become available.
    pub(super) pairs_available: Arc<Notify>,
    /// Callers refused since the last pair was added.
    pub(super) unserved: AtomicU32,
    pub(super) fill_state: Mutex<FillState>,
}

/// One HSM's share of a pool.
pub(super) struct Share {
    pub(super) queue: ReadyQueue,
    pub(super) fill_state: Mutex<ShareFillState>,
    pub(super) wake: Notify,
}

/// The fill state of one pool.
#[derive(Default)]
pub(super) struct FillState {
    pub(super) rate: FillRate,
    /// The number of ready pairs that an officer ordered.
    pub(super) ordered: Option<u64>,
}

/// The fill state of one HSM's share of a pool.
#[derive(Default)]
pub(super) struct ShareFillState {
    pub(super) running: bool,
    /// Whether the share fell below its low mark and has not reached its high mark yet.
    refilling: bool,
    /// Why filling is paused although pairs are missing.
    pub(super) paused: Option<String>,
    /// On-token batches that may contain pairs which the store does not know.
    pub(super) suspects: BTreeSet<u64>,
}

impl Share {
    pub(super) fn fill_state(&self) -> MutexGuard<'_, ShareFillState> {
        self.fill_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records that pairs may have been made for the batch without a row. A wrapped pair exists only in its row; an
    /// on-token pair without a row would stay on the token.
    pub(super) fn mark_suspect(&self, batch: &Batch) {
        if batch.storage == KeyStorage::Hsm {
            self.fill_state().suspects.insert(batch.number);
        }
    }
}

impl Pool {
    pub(super) fn fill_state(&self) -> MutexGuard<'_, FillState> {
        self.fill_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the fill tasks of all shares.
    pub(super) fn wake(&self) {
        self.shares.values().for_each(|share| share.wake.notify_one());
    }

    /// Notifies waiting callers of new pairs and resets the retry estimate.
    pub(super) fn notify_pairs_added(&self) {
        self.unserved.store(0, Ordering::Relaxed);
        self.pairs_available.notify_waiters();
    }

    /// The number of pairs that an HSM must make now, if any. `ready` has the ready pairs of each HSM in service. Each HSM has
    /// its share of the marks, so that pairs remain when one HSM fails.
    pub(super) fn missing(&self, member: HsmId, ready: &BTreeMap<HsmId, u64>) -> Option<u64> {
        let (share, index) = (self.shares.get(&member)?, ready.keys().position(|other| *other == member)? as u64);
        let (mine, count) = (ready.get(&member).copied()?, ready.len() as u64);
        let share_of = |all: u64| all / count + u64::from(index < all % count);
        let ordered = {
            let mut filling = self.fill_state();
            filling.ordered = filling.ordered.filter(|ordered| ready.values().sum::<u64>() < *ordered);
            filling.ordered
        };
        let mut filling = share.fill_state();
        // A refill that began below the low mark continues to the high mark; an order continues to the ordered number.
        filling.refilling = mine < share_of(self.marks.low) || (filling.refilling && mine < share_of(self.marks.high));
        let refill_target = filling.refilling.then_some(self.marks.high);
        let missing =
            refill_target.into_iter().chain(ordered).max().map(share_of).and_then(|target| target.checked_sub(mine));
        let missing = missing.filter(|missing| *missing > 0);
        filling.running = missing.is_some();
        missing
    }
}
