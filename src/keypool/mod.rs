//! Pools of key pairs generated in advance, and the shredding of erased ones. HSMs generate RSA keys too slowly for an assembly
//! line to wait.
//!
//! A **batch** is a set of pairs that share a key in the HSM: the batch key, which wraps their private keys and has no other use.
//! Pairs generated for a session are in batches as well, because they must be erased, too. A pair is in exactly one state at any
//! time:
//!
//! ```text
//!             filled                leased and journaled                Complete, abort, expiry
//!  HSM ──────────────► ready pair ───────────────────────► of a session ──────────────────────► erased
//!                          │                                    │                                 │
//!                          └──────────── rewrapped ─────────────┘                                 ▼
//!                                inside the HSM, to the next batch              the old batch's key destroyed, its file
//!                                                                               overwritten: no copy of it can be opened
//! ```
//!
//! [`KeyPool::run`] runs one maintenance task per HSM, and one fill task per pool and HSM. The same steps recover from a crash.

mod batch_owners;
mod batches;
mod error;
mod fill;
mod lease;
mod pool_state;
mod rate;
mod readers_barrier;
mod reconcile;
mod rules;
mod shred;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};

use spp_format::keys::KeyType;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

pub use error::PoolError;
pub use lease::{PoolLease, SessionLease};
pub use rules::{MAX_POOL_PAIRS, Marks, PoolPacing, PoolRules};
pub use shred::{ShredOrder, ShredReport};
pub use status::{KindStatus, PoolStatus};

use crate::clock::Clock;
use crate::hsm::{BatchName, Hsm, HsmError, HsmId};
use crate::store::{Journal, Registry, SecretStore};
use lease::ready_queue::ReadyQueue;
use pool_state::{Pool, Share};
use readers_barrier::{ReaderGuard, ReadersBarrier};

/// The pools and their batches.
pub struct KeyPool {
    hsm: Hsm,
    store: Arc<dyn SecretStore>,
    journal: Journal,
    registry: Registry,
    rules: PoolRules,
    clock: Clock,
    pools: BTreeMap<KeyType, Pool>,
    /// Callers that use a batch key or hold a lease.
    readers: ReadersBarrier,
    /// The batch per HSM that receives the pairs of new sessions.
    session_batches: watch::Sender<BTreeMap<HsmId, BatchName>>,
    /// Whether the store has been compared with at least one token.
    reconciled: watch::Sender<bool>,
    /// Batches that are being emptied and accept no new pairs.
    closing: Mutex<BTreeSet<u64>>,
    /// Held from planning a batch until its owner is recorded, so that cleanup does not remove the plan.
    plan_lock: tokio::sync::Mutex<()>,
    /// Per-HSM task state. An HSM that hangs does not block tasks of other HSMs.
    hsm_tasks: BTreeMap<HsmId, HsmTasks>,
    /// Serialises waits for readers.
    readers_wait_lock: tokio::sync::Mutex<()>,
    /// Serialises the evaluation of tokens.
    compare_lock: tokio::sync::Mutex<()>,
    reconcile_state: Mutex<ReconcileState>,
}

/// Task state of one HSM.
struct HsmTasks {
    /// Limits concurrent generation calls on this HSM across all key types: other background work queues behind them.
    making_slots: Arc<Semaphore>,
    /// Serialises batch planning.
    planning: tokio::sync::Mutex<()>,
    /// Serialises shredding.
    shredding: tokio::sync::Mutex<()>,
    /// The error of the last maintenance run, if it failed.
    last_error: Mutex<Option<String>>,
    wake: Notify,
}

/// Results of comparing the store with the tokens.
#[derive(Default)]
struct ReconcileState {
    /// Why the store is considered an old copy, if it is.
    rolled_back: Option<String>,
    /// The highest batch number found on a token.
    highest_on_token: u64,
    /// HSMs whose token has been compared with the store.
    compared_members: BTreeSet<HsmId>,
}

impl KeyPool {
    /// Creates the pools. Background work starts with [`Self::run`].
    pub fn new(
        hsm: Hsm,
        store: Arc<dyn SecretStore>,
        journal: Journal,
        registry: Registry,
        rules: PoolRules,
        clock: Clock,
    ) -> Arc<Self> {
        let pool = |(kind, marks): (&KeyType, &Marks)| {
            let pairs_available = Arc::new(Notify::new());
            let share = |member| {
                let queue = ReadyQueue::new(*kind, member, Arc::clone(&pairs_available));
                let (fill_state, wake) = (Mutex::default(), Notify::new());
                (member, Share { queue, fill_state, wake })
            };
            let shares = hsm.members().map(share).collect();
            let (unserved, fill_state) = (AtomicU32::new(0), Mutex::default());
            (*kind, Pool { marks: *marks, shares, pairs_available, unserved, fill_state })
        };
        let pools = rules.pools.iter().map(pool).collect();
        // Two calls per thread, so that a thread has work while another call's pairs are being stored.
        let tasks_of = |member| HsmTasks {
            making_slots: Arc::new(Semaphore::new(2 * hsm.background_threads(member))),
            planning: tokio::sync::Mutex::default(),
            shredding: tokio::sync::Mutex::default(),
            last_error: Mutex::default(),
            wake: Notify::new(),
        };
        let hsm_tasks = hsm.members().map(|member| (member, tasks_of(member))).collect();
        Arc::new(Self {
            hsm,
            store,
            journal,
            registry,
            rules,
            clock,
            pools,
            readers: ReadersBarrier::default(),
            session_batches: watch::channel(BTreeMap::new()).0,
            reconciled: watch::channel(false).0,
            closing: Mutex::default(),
            plan_lock: tokio::sync::Mutex::default(),
            hsm_tasks,
            readers_wait_lock: tokio::sync::Mutex::default(),
            compare_lock: tokio::sync::Mutex::default(),
            reconcile_state: Mutex::default(),
        })
    }

    /// Reconciles, fills, shreds and destroys until the future is dropped. Dropping it at any point is equivalent to a crash: the
    /// next start resumes.
    pub async fn run(self: Arc<Self>) {
        let mut tasks = JoinSet::new();
        for kind in self.pools.keys().copied() {
            for member in self.hsm.members() {
                tasks.spawn(Arc::clone(&self).fill_loop(kind, member));
            }
        }
        for member in self.hsm.members() {
            tasks.spawn(Arc::clone(&self).maintenance_loop(member));
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Maintains the batches of one HSM.
    async fn maintenance_loop(self: Arc<Self>, member: HsmId) {
        let Some(own) = self.hsm_tasks.get(&member) else { return };
        let mut hsm = self.hsm.clone();
        loop {
            let result = self.run_maintenance(member).await;
            let error_text = result.err().map(|error| error.to_string());
            let is_new = {
                let mut last_error = own.last_error.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *last_error, error_text.clone()) != error_text
            };
            if let Some(error) = error_text.filter(|_| is_new) {
                tracing::warn!(%error, "key pool maintenance failed, retrying");
            }
            tokio::select! {
                () = own.wake.notified() => {}
                () = hsm.changed() => {}
                () = tokio::time::sleep(self.rules.pacing.poll_interval) => {}
            }
        }
    }

    /// Runs all maintenance steps. A failed step does not prevent the others.
    async fn run_maintenance(&self, member: HsmId) -> Result<(), PoolError> {
        self.reconcile(member).await?;
        if !self.in_service().contains(&member) {
            return Ok(());
        }
        let planned = self.forget_abandoned_plans(member).await;
        let sessions = self.ensure_session_batch(member).await;
        let pairs_to_destroy = self.destroy_pending_pairs(member).await;
        let due = self.shred_due_batches(member).await;
        planned.and(sessions).and(pairs_to_destroy).and(due)
    }

    /// The errors of the last maintenance runs.
    fn last_errors(&self) -> Option<String> {
        let last_error = |tasks: &HsmTasks| tasks.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all: BTreeSet<_> = self.hsm_tasks.values().filter_map(last_error).collect();
        (!all.is_empty()).then(|| all.into_iter().collect::<Vec<_>>().join("; "))
    }

    /// The task state of an HSM.
    fn tasks_of(&self, member: HsmId) -> Result<&HsmTasks, PoolError> {
        let unknown = || HsmError::Refused("this HSM is not configured for the key pool".to_owned());
        self.hsm_tasks.get(&member).ok_or_else(|| unknown().into())
    }

    /// Waits until all current readers have finished.
    async fn wait_for_readers(&self) {
        let _guard = self.readers_wait_lock.lock().await;
        self.readers.wait_for_current().await;
    }

    /// The key types that have a pool.
    pub fn kinds(&self) -> impl Iterator<Item = KeyType> {
        self.pools.keys().copied()
    }

    /// Wakes the maintenance tasks after an erasure.
    pub fn erased(&self) {
        self.hsm_tasks.values().for_each(|tasks| tasks.wake.notify_one());
    }

    /// Returns a guard to hold between reading a pair from the store and unwrapping it in the HSM, so that its batch key is not
    /// destroyed in between.
    pub fn reader_guard(&self) -> ReaderGuard {
        self.readers.enter()
    }

    fn reconcile_state(&self) -> std::sync::MutexGuard<'_, ReconcileState> {
        self.reconcile_state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closing(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
