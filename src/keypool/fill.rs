//! Filling a pool between its marks, in the background.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::rate::FillRate;
use super::{KeyPool, LOOK, MOST_PAIRS, Pool, PoolError};
use crate::hsm::{HsmError, HsmMember, KeepIn};
use crate::keys::{KeptKey, KeyKind, PublicKey};
use crate::store::{Batch, BatchStep, Keeping, PooledPair, Purpose};

/// Calls to the HSM at once for one kind, so that its threads have work while pairs are being stored.
const AT_ONCE: usize = 4;
/// Pairs of one call, and how long a call that makes more than one may take.
const PER_CALL: u64 = 256;
const CALL: Duration = Duration::from_millis(200);
/// After a failure, before the next attempt.
const PAUSE: Duration = Duration::from_secs(2);

/// How the filling of one pool stands.
#[derive(Default)]
pub(super) struct Filling {
    pub(super) running: bool,
    /// Whether it was below its low mark and is not yet at its high one.
    refilling: bool,
    pub(super) rate: FillRate,
    /// Why it is not going on though it should.
    pub(super) paused: Option<String>,
    /// What an officer ordered.
    ordered: Option<u64>,
    /// Batches on a token that may have pairs there of which the store does not know.
    suspects: BTreeSet<u64>,
}

/// What one HSM does of a filling.
struct Part {
    member: HsmMember,
    batch: Batch,
    keep: KeepIn,
    /// Pairs that are still to be asked for.
    left: u64,
    /// Calls that are with the HSM.
    calls: usize,
}

impl Pool {
    pub(super) fn filling(&self) -> MutexGuard<'_, Filling> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pairs were made for the batch that nobody may know of. Wrapped ones are nothing without their row; those on the token
    /// would stay there.
    fn suspect(&self, batch: &Batch) {
        if batch.keeping == Keeping::Hsm {
            self.filling().suspects.insert(batch.number);
        }
    }

    /// Pairs have come: those who were turned away may come again.
    fn more_came(&self) {
        self.turned_away.store(0, Ordering::Relaxed);
    }

    /// Up to how many pairs it is to be filled now, if it is. `ready` are those of each HSM in service: each has its share of the
    /// marks, so that there are pairs left when one is lost.
    fn target(&self, ready: &[u64]) -> Option<u64> {
        let below = |mark| ready.iter().zip(shares(mark, ready.len())).any(|(ready, share)| *ready < share);
        let mut filling = self.filling();
        let ordered = filling.ordered.filter(|ordered| ready.iter().sum::<u64>() < *ordered);
        filling.ordered = ordered;
        // What was begun below the low mark goes on up to the high one; an order goes as far as it says.
        filling.refilling = below(self.marks.low) || (filling.refilling && below(self.marks.high));
        let marked = filling.refilling.then_some(self.marks.high);
        let target = marked.into_iter().chain(ordered).max();
        filling.running = target.is_some();
        target
    }
}

/// What each of so many has of it.
fn shares(all: u64, count: usize) -> impl Iterator<Item = u64> {
    let count = count as u64;
    (0..count).map(move |place| all / count + u64::from(place < all % count))
}

impl KeyPool {
    /// Orders a filling: up to so many pairs, or up to the high mark. Answers up to how many.
    pub fn order_fill(&self, kind: KeyKind, to: Option<u64>) -> Result<u64, PoolError> {
        let pool = self.pools.get(&kind).ok_or(PoolError::NoPool(kind))?;
        let to = to.unwrap_or(pool.marks.high);
        // A token is good for what the marks were checked against.
        let most = if self.rules.keeping == Keeping::Hsm { pool.marks.high } else { MOST_PAIRS };
        if to > most {
            return Err(PoolError::TooMany { kind, most });
        }
        {
            // Whoever ordered more before still waits for it.
            let mut filling = pool.filling();
            filling.ordered = filling.ordered.max(Some(to));
        }
        pool.wake.notify_one();
        Ok(to)
    }

    /// Whether an order is still to be carried out. The number of ready pairs does not tell: devices take some at once.
    pub fn is_ordered(&self, kind: KeyKind) -> bool {
        self.pools.get(&kind).is_some_and(|pool| pool.filling().ordered.is_some())
    }

    pub(super) async fn keep_filled(self: Arc<Self>, kind: KeyKind) {
        let Some(pool) = self.pools.get(&kind) else { return };
        // The sender lives as long as this value.
        let _ = self.reconciled.subscribe().wait_for(|done| *done).await;
        loop {
            let filled = self.fill(kind, pool).await;
            let paused = filled.err().map(|error| error.to_string());
            let news = {
                let mut filling = pool.filling();
                let news = filling.paused != paused;
                filling.paused.clone_from(&paused);
                news
            };
            if let Some(why) = paused.as_ref().filter(|_| news) {
                tracing::warn!(%kind, %why, "the filling of a pool is paused; it goes on by itself");
            }
            let rest = if paused.is_some() { PAUSE } else { LOOK };
            tokio::select! {
                () = pool.wake.notified(), if paused.is_none() => {}
                () = tokio::time::sleep(rest) => {}
            }
        }
    }

    /// Fills the pool if it is below its low mark or ordered to be filled; returns when nothing is left to do.
    async fn fill(&self, kind: KeyKind, pool: &Pool) -> Result<(), PoolError> {
        let mut begun = false;
        loop {
            self.clear_suspects(pool).await?;
            let mut ready = self.offered(kind).await?;
            if ready.is_empty() {
                return Err(self.not_begun().await);
            }
            // In the same order at each look, whoever has how much to do.
            ready.sort_unstable_by_key(|(member, _)| *member);
            let counts: Vec<_> = ready.iter().map(|(_, count)| *count).collect();
            let Some(target) = pool.target(&counts) else { return Ok(()) };
            self.admit()?;
            let parts = self.parts(kind, target, &ready).await?;
            if !std::mem::replace(&mut begun, true) {
                pool.filling().rate.begin(Instant::now());
            }
            for part in self.fill_batches(kind, pool, parts).await? {
                if part.batch.taken_in >= self.rules.batch_size {
                    self.store.step_batch(part.batch.number, BatchStep::Seal).await?;
                }
            }
        }
    }

    /// Destroys what is on a token and in no row, as far as it can be reached; nothing is put there before.
    async fn clear_suspects(&self, pool: &Pool) -> Result<(), PoolError> {
        let suspects = pool.filling().suspects.clone();
        let keepers = self.keepers().await?;
        for batch in suspects.into_iter().filter(|batch| keepers.are_at_hand(*batch)) {
            if let Some(keeper) = keepers.of(batch) {
                // Nobody but this task makes pairs for it.
                self.destroy_strays(batch, keeper).await?;
            }
            pool.filling().suspects.remove(&batch);
        }
        Ok(())
    }

    /// What each HSM in service lacks of its share.
    async fn parts(&self, kind: KeyKind, target: u64, ready: &[(HsmMember, u64)]) -> Result<Vec<Part>, PoolError> {
        let mut parts = Vec::new();
        for ((member, ready), share) in ready.iter().copied().zip(shares(target, ready.len())) {
            if share <= ready {
                continue;
            }
            let batch = self.open_batch(Purpose::Pool(kind), member).await?;
            let name = self.name(batch.number).await?;
            let keep = match batch.keeping {
                Keeping::Wrapped => KeepIn::Wrapped(name),
                Keeping::Hsm => KeepIn::OnToken(name),
            };
            let left = (share - ready).min(self.rules.batch_size.saturating_sub(batch.taken_in)).max(1);
            parts.push(Part { member, batch, keep, left, calls: 0 });
        }
        Ok(parts)
    }

    /// Puts so many pairs into the batches, or as many as they take.
    async fn fill_batches(&self, kind: KeyKind, pool: &Pool, mut parts: Vec<Part>) -> Result<Vec<Part>, PoolError> {
        let mut calls = JoinSet::new();
        let mut failed = None;
        loop {
            for (at, part) in parts.iter_mut().enumerate() {
                while part.calls < AT_ONCE && part.left > 0 && failed.is_none() {
                    let (hsm, keep, count) = (self.hsm.at(part.member), part.keep, part.left.min(PER_CALL));
                    part.left -= count;
                    part.calls += 1;
                    let at_most = u32::try_from(count).unwrap_or(u32::MAX);
                    let making = self.making.get(&part.member).cloned();
                    calls.spawn(async move {
                        let _place = match making {
                            // It is never closed.
                            Some(making) => making.acquire_owned().await.ok(),
                            None => None,
                        };
                        (at, count, hsm.make_pairs(kind, keep, at_most, CALL).await)
                    });
                }
            }
            let Some(done) = calls.join_next().await else { break };
            let (at, count, made) = done.map_err(|e| HsmError::Wrong(e.to_string()))?;
            let Some(part) = parts.get_mut(at) else { continue };
            part.calls -= 1;
            let added = match made {
                // Where a call's time was over before all were made, the rest is asked for again.
                Ok(made) => {
                    part.left += count.saturating_sub(made.len() as u64);
                    self.take_in(pool, &part.batch, made).await
                }
                Err(error) => {
                    pool.suspect(&part.batch);
                    Err(error.into())
                }
            };
            match added {
                Ok((grown, added)) => {
                    part.batch = grown;
                    pool.filling().rate.note(Instant::now(), added);
                    pool.more_came();
                }
                // The other calls are waited for: what they made is not thrown away.
                Err(error) => {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(parts), Err)
    }

    async fn take_in(
        &self,
        pool: &Pool,
        batch: &Batch,
        made: Vec<(PublicKey, KeptKey)>,
    ) -> Result<(Batch, u64), PoolError> {
        let pair = |(public, kept): (PublicKey, KeptKey)| PooledPair { public_key: public.spki_der().to_vec(), kept };
        let pairs: Vec<_> = made.into_iter().map(pair).collect();
        let count = pairs.len() as u64;
        let added = self.store.add_pairs(batch.number, pairs).await;
        if added.is_err() {
            pool.suspect(batch);
        }
        Ok((added?, count))
    }

    /// Ready pairs of a kind that may be offered now, of each HSM in service.
    async fn offered(&self, kind: KeyKind) -> Result<Vec<(HsmMember, u64)>, PoolError> {
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
