//! Key pairs that are made in advance, and their end. RSA takes an HSM long; a line cannot wait.
//!
//! A **batch** is what shares a key in the HSM: the batch key, which wraps the private halves and does nothing else. Pairs made
//! on the spot for a session are in batches as well, since they must be erased, too. A pair is in one place at any time:
//!
//! ```text
//!             filled                claimed and journaled               Complete, abort, expiry
//!  HSM ──────────────► ready pair ───────────────────────► of a session ──────────────────────► erased
//!                          │                                    │                                 │
//!                          └──────────── rewrapped ─────────────┘                                 ▼
//!                                inside the HSM, to the next batch              the old batch's key destroyed, its file
//!                                                                               overwritten: no copy of it can be opened
//! ```
//!
//! For each HSM one task looks after what it keeps, and one for each pool fills its share: [`KeyPool::run`]. What a crash left is put
//! right by the same steps.

mod batch_owners;
mod batches;
mod error;
mod fill;
mod lease;
mod rate;
mod readers_barrier;
mod reconcile;
mod shred;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;

pub use error::PoolError;
pub use lease::{PoolLease, SessionLease};
pub use shred::{ShredOrder, Shredded};
pub use status::{KindStatus, PoolStatus};

use crate::clock::Clock;
use crate::hsm::{Hsm, HsmError, HsmId};
use crate::keys::{BatchName, KeyKind};
use crate::store::{Journal, KeyStorage, Registry, SecretStore};
use fill::{Filling, ShareFilling};
use lease::ReadyQueue;
use readers_barrier::{ReaderGuard, ReadersBarrier};

/// More pairs than any line uses before its pool is filled again; no pool may have more.
pub const MOST_PAIRS: u64 = 10_000_000;

/// What is kept in advance, and for how long what was erased may still be readable with an old copy of the disk.
#[derive(Debug, Clone)]
pub struct PoolRules {
    /// How pairs are kept.
    pub keeping: KeyStorage,
    /// The longest time from an erasure to the end of the key that could open the pair.
    pub shred_after: Duration,
    /// Pairs of a batch.
    pub batch_size: u64,
    /// The pools, by kind.
    pub pools: BTreeMap<KeyKind, Marks>,
    /// How long the pool's tasks wait between their own steps.
    pub pacing: PoolPacing,
}

/// How long the pool's tasks wait between their own steps. The default is for production; tests have shorter ones.
#[derive(Debug, Clone, Copy)]
pub struct PoolPacing {
    /// The interval between two checks for batches to shred and pools to fill, when nothing wakes the task before.
    pub poll_interval: Duration,
    /// The pause after a filling that failed.
    pub pause: Duration,
}

impl Default for PoolPacing {
    fn default() -> Self {
        Self { poll_interval: Duration::from_secs(1), pause: Duration::from_secs(2) }
    }
}

/// Between which marks a pool is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Below this many ready pairs it is filled …
    pub low: u64,
    /// … up to this many.
    pub high: u64,
}

impl Default for PoolRules {
    fn default() -> Self {
        Self {
            keeping: KeyStorage::Wrapped,
            shred_after: Duration::from_secs(3600),
            batch_size: 1000,
            pools: BTreeMap::new(),
            pacing: PoolPacing::default(),
        }
    }
}

/// The pools and their batches.
pub struct KeyPool {
    hsm: Hsm,
    store: Arc<dyn SecretStore>,
    journal: Journal,
    registry: Registry,
    rules: PoolRules,
    clock: Clock,
    pools: BTreeMap<KeyKind, Pool>,
    /// Who uses a batch's key or has a pair in hand.
    users: ReadersBarrier,
    /// The batch of each HSM that takes the pairs of new sessions.
    for_sessions: watch::Sender<BTreeMap<HsmId, BatchName>>,
    /// Whether what the store and a token say of each other has been looked at.
    reconciled: watch::Sender<bool>,
    /// Batches that take nothing more, since they are being emptied.
    closing: Mutex<BTreeSet<u64>>,
    /// Between a plan and its keeper's being on record nobody looks for plans that came to nothing.
    plans: tokio::sync::Mutex<()>,
    /// What is done with one HSM at a time. One that hangs stops nothing of the others.
    benches: BTreeMap<HsmId, Bench>,
    /// Whoever waits for the users of batches does so alone.
    letting_finish: tokio::sync::Mutex<()>,
    /// What the tokens say is judged one after the other.
    comparing: tokio::sync::Mutex<()>,
    notes: Mutex<Notes>,
}

/// One HSM's batches, as they are worked on.
struct Bench {
    /// So many calls that make pairs may be with it at once, of all kinds together: what else is done in the background waits behind
    /// them.
    making: Arc<Semaphore>,
    /// One batch is planned at a time.
    planning: tokio::sync::Mutex<()>,
    /// One batch is shredded at a time.
    shredding: tokio::sync::Mutex<()>,
    /// What could not be done at the last look.
    trouble: Mutex<Option<String>>,
    wake: Notify,
}

/// One kind's pool.
struct Pool {
    marks: Marks,
    shares: BTreeMap<HsmId, Share>,
    /// Told when pairs have come.
    more: Arc<Notify>,
    /// Callers who found nothing since the last pair came.
    turned_away: AtomicU32,
    filling: Mutex<Filling>,
}

/// One HSM's share of a pool.
struct Share {
    shelf: ReadyQueue,
    filling: Mutex<ShareFilling>,
    wake: Notify,
}

/// What is told in the status.
#[derive(Default)]
struct Notes {
    /// Why the store counts as an old copy.
    rolled_back: Option<String>,
    /// The highest number of a batch that a token knows.
    highest_on_token: u64,
    /// The HSMs whose token has been compared with the store.
    compared: BTreeSet<HsmId>,
}

impl KeyPool {
    /// A pool; nothing happens before [`Self::run`].
    pub fn new(
        hsm: Hsm,
        store: Arc<dyn SecretStore>,
        journal: Journal,
        registry: Registry,
        rules: PoolRules,
        clock: Clock,
    ) -> Arc<Self> {
        let pool = |(kind, marks): (&KeyKind, &Marks)| {
            let more = Arc::new(Notify::new());
            let share = |member| {
                let shelf = ReadyQueue::new(*kind, member, Arc::clone(&more));
                let (filling, wake) = (Mutex::default(), Notify::new());
                (member, Share { shelf, filling, wake })
            };
            let shares = hsm.each().map(share).collect();
            let (turned_away, filling) = (AtomicU32::new(0), Mutex::default());
            (*kind, Pool { marks: *marks, shares, more, turned_away, filling })
        };
        let pools = rules.pools.iter().map(pool).collect();
        // Two for each thread, so that one has work while another's pairs are being stored.
        let bench = |member| Bench {
            making: Arc::new(Semaphore::new(2 * hsm.background_threads(member))),
            planning: tokio::sync::Mutex::default(),
            shredding: tokio::sync::Mutex::default(),
            trouble: Mutex::default(),
            wake: Notify::new(),
        };
        let benches = hsm.each().map(|member| (member, bench(member))).collect();
        Arc::new(Self {
            hsm,
            store,
            journal,
            registry,
            rules,
            clock,
            pools,
            users: ReadersBarrier::default(),
            for_sessions: watch::channel(BTreeMap::new()).0,
            reconciled: watch::channel(false).0,
            closing: Mutex::default(),
            plans: tokio::sync::Mutex::default(),
            benches,
            letting_finish: tokio::sync::Mutex::default(),
            comparing: tokio::sync::Mutex::default(),
            notes: Mutex::default(),
        })
    }

    /// Reconciles, fills, shreds, destroys, for as long as this future lives. Dropping it at any point is a crash like any
    /// other: the next start takes up what it left.
    pub async fn run(self: Arc<Self>) {
        let mut tasks = JoinSet::new();
        for kind in self.pools.keys().copied() {
            for member in self.hsm.each() {
                tasks.spawn(Arc::clone(&self).keep_filled(kind, member));
            }
        }
        for member in self.hsm.each() {
            tasks.spawn(Arc::clone(&self).look_after(member));
        }
        while tasks.join_next().await.is_some() {}
    }

    /// Looks after what one HSM keeps.
    async fn look_after(self: Arc<Self>, member: HsmId) {
        let Some(bench) = self.benches.get(&member) else { return };
        let mut hsm = self.hsm.clone();
        loop {
            let looked = self.look(member).await;
            let trouble = looked.err().map(|error| error.to_string());
            let news = {
                let mut told = bench.trouble.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *told, trouble.clone()) != trouble
            };
            if let Some(trouble) = trouble.filter(|_| news) {
                tracing::warn!(%trouble, "the batches of key pairs could not be looked after; it is tried again");
            }
            tokio::select! {
                () = bench.wake.notified() => {}
                () = hsm.changed() => {}
                () = tokio::time::sleep(self.rules.pacing.poll_interval) => {}
            }
        }
    }

    /// Everything that may be due; what fails does not keep the rest from being done.
    async fn look(&self, member: HsmId) -> Result<(), PoolError> {
        self.reconcile(member).await?;
        if !self.in_service().contains(&member) {
            return Ok(());
        }
        let planned = self.forget_plans(member).await;
        let sessions = self.keep_a_batch_for_sessions(member).await;
        let condemned = self.destroy_condemned(member).await;
        let due = self.shred_what_is_due(member).await;
        planned.and(sessions).and(condemned).and(due)
    }

    /// What could not be done at the last look.
    fn trouble(&self) -> Option<String> {
        let told = |bench: &Bench| bench.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let all: BTreeSet<_> = self.benches.values().filter_map(told).collect();
        (!all.is_empty()).then(|| all.into_iter().collect::<Vec<_>>().join("; "))
    }

    /// The bench of one of the handle's HSMs.
    fn bench(&self, member: HsmId) -> Result<&Bench, PoolError> {
        let none = || HsmError::Refused("an HSM that is none of this pool".to_owned());
        self.benches.get(&member).ok_or_else(|| none().into())
    }

    /// Waits until everybody has finished who is in the middle of something with a batch.
    async fn let_users_finish(&self) {
        let _alone = self.letting_finish.lock().await;
        self.users.let_finish().await;
    }

    /// The kinds that have a pool.
    pub fn kinds(&self) -> impl Iterator<Item = KeyKind> {
        self.pools.keys().copied()
    }

    /// A pair was erased: something may be due.
    pub fn erased(&self) {
        self.benches.values().for_each(|bench| bench.wake.notify_one());
    }

    /// Whoever reads a pair from the store and opens it in the HSM holds this in between, so that its batch's key is not
    /// destroyed meanwhile.
    pub fn hold(&self) -> ReaderGuard {
        self.users.join()
    }

    fn notes(&self) -> std::sync::MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closing(&self) -> std::sync::MutexGuard<'_, BTreeSet<u64>> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
