//! Filling a pool between its marks, in the background.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::rate::FillRate;
use super::{KeyPool, MOST_PAIRS, Pool, PoolError, Share};
use crate::hsm::{HsmError, HsmId, KeepIn};
use crate::keys::{KeyKind, PublicKey, StoredKey};
use crate::store::{Batch, BatchStep, KeyStorage, PooledPair, Purpose};

/// Calls to the HSM at once for one kind, so that its threads have work while pairs are being stored.
const AT_ONCE: usize = 4;
/// Pairs of one call, and how long a call that makes more than one may take.
const PER_CALL: u64 = 256;
const CALL: Duration = Duration::from_millis(200);

/// How the filling of one pool stands.
#[derive(Default)]
pub(super) struct Filling {
    pub(super) rate: FillRate,
    /// What an officer ordered.
    ordered: Option<u64>,
}

/// How one HSM fills its share of a pool.
#[derive(Default)]
pub(super) struct ShareFilling {
    pub(super) running: bool,
    /// Whether it was below its low mark and is not yet at its high one.
    refilling: bool,
    /// Why it is not going on though it should.
    pub(super) paused: Option<String>,
    /// Batches on the token that may have pairs there of which the store does not know.
    suspects: BTreeSet<u64>,
}

impl Share {
    pub(super) fn filling(&self) -> MutexGuard<'_, ShareFilling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pairs were made for the batch that nobody may know of. Wrapped ones are nothing without their row; those on the token
    /// would stay there.
    fn suspect(&self, batch: &Batch) {
        if batch.keeping == KeyStorage::Hsm {
            self.filling().suspects.insert(batch.number);
        }
    }
}

impl Pool {
    pub(super) fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something may be to be filled.
    pub(super) fn wake(&self) {
        self.shares.values().for_each(|share| share.wake.notify_one());
    }

    /// Pairs have come: those who were turned away may come again.
    fn more_came(&self) {
        self.turned_away.store(0, Ordering::Relaxed);
        self.more.notify_waiters();
    }

    /// How many pairs an HSM lacks, if it is to be filled now. `ready` are those of each HSM in service: each has its share of the
    /// marks, so that there are pairs left when one is lost.
    fn lacks(&self, member: HsmId, ready: &BTreeMap<HsmId, u64>) -> Option<u64> {
        let (share, place) = (self.shares.get(&member)?, ready.keys().position(|other| *other == member)? as u64);
        let (mine, count) = (ready.get(&member).copied()?, ready.len() as u64);
        let of = |all: u64| all / count + u64::from(place < all % count);
        let ordered = {
            let mut filling = self.filling();
            filling.ordered = filling.ordered.filter(|ordered| ready.values().sum::<u64>() < *ordered);
            filling.ordered
        };
        let mut filling = share.filling();
        // What was begun below the low mark goes on up to the high one; an order goes as far as it says.
        filling.refilling = mine < of(self.marks.low) || (filling.refilling && mine < of(self.marks.high));
        let marked = filling.refilling.then_some(self.marks.high);
        let lacks = marked.into_iter().chain(ordered).max().map(of).and_then(|target| target.checked_sub(mine));
        let lacks = lacks.filter(|lacks| *lacks > 0);
        filling.running = lacks.is_some();
        lacks
    }
}

impl KeyPool {
    /// Orders a filling: up to so many pairs, or up to the high mark. Answers up to how many.
    pub fn order_fill(&self, kind: KeyKind, to: Option<u64>) -> Result<u64, PoolError> {
        let pool = self.pools.get(&kind).ok_or(PoolError::NoPool(kind))?;
        let to = to.unwrap_or(pool.marks.high);
        // A token is good for what the marks were checked against.
        let most = if self.rules.keeping == KeyStorage::Hsm { pool.marks.high } else { MOST_PAIRS };
        if to > most {
            return Err(PoolError::TooMany { kind, most });
        }
        {
            // Whoever ordered more before still waits for it.
            let mut filling = pool.filling();
            filling.ordered = filling.ordered.max(Some(to));
        }
        pool.wake();
        Ok(to)
    }

    /// Whether an order is still to be carried out. The number of ready pairs does not tell: devices take some at once.
    pub fn is_ordered(&self, kind: KeyKind) -> bool {
        self.pools.get(&kind).is_some_and(|pool| pool.filling().ordered.is_some())
    }

    /// One HSM keeps its share filled, whatever the others do.
    pub(super) async fn keep_filled(self: Arc<Self>, kind: KeyKind, member: HsmId) {
        let Some(pool) = self.pools.get(&kind) else { return };
        let Some(share) = pool.shares.get(&member) else { return };
        // The sender lives as long as this value.
        let _ = self.reconciled.subscribe().wait_for(|done| *done).await;
        loop {
            let filled = self.fill(kind, pool, member, share).await;
            let paused = filled.err().map(|error| error.to_string());
            let news = {
                let mut filling = share.filling();
                let news = filling.paused != paused;
                filling.paused.clone_from(&paused);
                news
            };
            if let Some(why) = paused.as_ref().filter(|_| news) {
                tracing::warn!(%kind, %why, "the filling of a pool is paused; it goes on by itself");
            }
            let pacing = self.rules.pacing;
            let rest = if paused.is_some() { pacing.pause } else { pacing.poll_interval };
            tokio::select! {
                () = share.wake.notified(), if paused.is_none() => {}
                () = tokio::time::sleep(rest) => {}
            }
        }
    }

    /// Fills the share if it is below its low mark or ordered to be filled; returns when nothing is left to do.
    async fn fill(&self, kind: KeyKind, pool: &Pool, member: HsmId, share: &Share) -> Result<(), PoolError> {
        let mut begun = false;
        loop {
            let ready = self.offered(kind).await?;
            if !ready.contains_key(&member) {
                share.filling().running = false;
                return Ok(());
            }
            let suspects = share.filling().suspects.clone();
            for batch in suspects {
                // Nobody but this task makes pairs for it.
                self.destroy_strays(batch, member).await?;
                share.filling().suspects.remove(&batch);
            }
            // Whoever cannot fill its share leaves it to the others.
            let can = |other: &HsmId| {
                pool.shares.get(other).is_some_and(|share| *other == member || share.filling().paused.is_none())
            };
            let ready: BTreeMap<_, _> = ready.into_iter().filter(|(other, _)| can(other)).collect();
            let Some(lacks) = pool.lacks(member, &ready) else { return Ok(()) };
            self.admit()?;
            let batch = self.open_batch(Purpose::Pool(kind), member).await?;
            if !std::mem::replace(&mut begun, true) {
                pool.filling().rate.begin(Instant::now());
            }
            let batch = self.fill_batch(kind, pool, (member, share), batch, lacks).await?;
            if batch.taken_in >= self.rules.batch_size {
                self.store.step_batch(batch.number, BatchStep::Seal).await?;
            }
        }
    }

    /// Puts so many pairs into a batch, or as many as it takes.
    async fn fill_batch(
        &self,
        kind: KeyKind,
        pool: &Pool,
        (member, share): (HsmId, &Share),
        mut batch: Batch,
        wanted: u64,
    ) -> Result<Batch, PoolError> {
        let name = self.name(batch.number).await?;
        let keep = match batch.keeping {
            KeyStorage::Wrapped => KeepIn::Wrapped(name),
            KeyStorage::Hsm => KeepIn::OnToken(name),
        };
        let mut left = wanted.min(self.rules.batch_size.saturating_sub(batch.taken_in)).max(1);
        let making = &self.bench(member)?.making;
        let mut calls = JoinSet::new();
        let mut failed = None;
        loop {
            while calls.len() < AT_ONCE && left > 0 && failed.is_none() {
                let (hsm, count) = (self.hsm.at(member), left.min(PER_CALL));
                left -= count;
                let at_most = u32::try_from(count).unwrap_or(u32::MAX);
                let making = Arc::clone(making);
                calls.spawn(async move {
                    // It is never closed.
                    let _place = making.acquire_owned().await;
                    (count, hsm.make_pairs(kind, keep, at_most, CALL).await)
                });
            }
            let Some(done) = calls.join_next().await else { break };
            let (count, made) = done.map_err(|e| HsmError::Wrong(e.to_string()))?;
            let added = match made {
                // Where a call's time was over before all were made, the rest is asked for again.
                Ok(made) => {
                    left += count.saturating_sub(made.len() as u64);
                    self.take_in(share, &batch, made).await
                }
                Err(error) => {
                    share.suspect(&batch);
                    Err(error.into())
                }
            };
            match added {
                Ok((grown, added)) => {
                    batch = grown;
                    pool.filling().rate.note(Instant::now(), added);
                    pool.more_came();
                }
                // The other calls are waited for: what they made is not thrown away.
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(batch), Err)
    }

    async fn take_in(
        &self,
        share: &Share,
        batch: &Batch,
        made: Vec<(PublicKey, StoredKey)>,
    ) -> Result<(Batch, u64), PoolError> {
        let pair = |(public, kept): (PublicKey, StoredKey)| PooledPair { public_key: public.spki_der().to_vec(), kept };
        let pairs: Vec<_> = made.into_iter().map(pair).collect();
        let count = pairs.len() as u64;
        let added = self.store.add_pairs(batch.number, pairs).await;
        if added.is_err() {
            share.suspect(batch);
        }
        Ok((added?, count))
    }

    /// Ready pairs of a kind that may be offered now, of each HSM in service.
    async fn offered(&self, kind: KeyKind) -> Result<BTreeMap<HsmId, u64>, PoolError> {
        let batches = self.store.batches().await?;
        let keepers = self.keepers().await?;
        let of_kind = || batches.iter().filter(|batch| batch.purpose == Purpose::Pool(kind));
        let of = |member| of_kind().filter(|batch| keepers.of(batch.number) == Some(member)).map(Batch::offered).sum();
        Ok(self.in_service().into_iter().map(|member| (member, of(member))).collect())
    }

    /// No pair is made that could not be stored.
    fn admit(&self) -> Result<(), PoolError> {
        let (free, floor) = self.journal.room()?;
        if free < floor { Err(PoolError::NoRoom { free, floor }) } else { Ok(()) }
    }
}
