//! The end of a batch: what is left is rewrapped under the next batch's key, then the old key is destroyed in the HSM. From
//! then on no copy of the disk can yield what was erased, not even with the HSM.

use std::time::Duration;

use super::batch_owners::BatchOwners;
use super::{KeyPool, PoolError};
use crate::hsm::{HsmError, HsmId};
use crate::keys::{BatchName, KeyKind, PublicKey, StoredKey};
use crate::store::{
    Batch, BatchState, BatchStep, CondemnedPair, HeldPair, Holder, KeyStorage, MovedPair, PairId, Purpose, StoreError,
};

/// Pairs that are moved in one call and one transaction.
const CHUNK: usize = 128;
/// Pairs on the tokens that are destroyed at one look, and among how many those are looked for whose HSM is there.
const CONDEMNED: usize = 256;
const CONDEMNED_OF_ALL: usize = 10_000;

/// Which batches an officer wants shredded now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShredOrder {
    /// Of this kind alone; all if none.
    pub kind: Option<KeyKind>,
    /// Quarantined batches, too: their ready pairs are given up.
    pub quarantined: bool,
}

/// What a shredding did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shredded {
    /// Batches whose keys are destroyed.
    pub batches: u64,
    /// Pairs that live on under another key.
    pub moved: u64,
    /// Pairs that were given up.
    pub discarded: u64,
}

impl KeyPool {
    /// Shreds now what was erased since the last time. `progress` is told after each batch: done, of how many.
    pub async fn shred(
        &self,
        order: &ShredOrder,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Shredded, PoolError> {
        self.begun().await?;
        let meant = |batch: &Batch| {
            let kind = order.kind.is_none_or(|kind| batch.purpose == Purpose::Pool(kind));
            let erased = batch.erased_since.is_some() && batch.quarantined.is_none();
            kind && (erased || self.is_over(batch) || (order.quarantined && batch.quarantined.is_some()))
        };
        let all = self.store.batches().await?;
        if let Some(kind) = order.kind
            && !self.pools.contains_key(&kind)
            && all.iter().all(|batch| batch.purpose != Purpose::Pool(kind))
        {
            return Err(PoolError::NoPool(kind));
        }
        let batches: Vec<_> = all.into_iter().filter(meant).collect();
        let mut shredded = Shredded::default();
        progress(0, batches.len());
        let mut failed = None;
        for (n, batch) in batches.iter().enumerate() {
            let keepers = self.keepers().await?;
            let done = match keepers.are_at_hand(batch.number) {
                true => self.shred_batch(batch.number, &mut shredded).await,
                false => Err(self.keeper_away(&keepers, batch.number).await),
            };
            // One batch that cannot be shredded must not keep the others.
            if let Err(error) = done {
                failed.get_or_insert(error);
            }
            progress(n + 1, batches.len());
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if order.quarantined && self.store.batches().await?.iter().all(|batch| batch.quarantined.is_none()) {
            // The officer has decided: this is the store that counts.
            self.notes().rolled_back = None;
        }
        Ok(shredded)
    }

    /// Why a batch must wait for the HSM that keeps it.
    async fn keeper_away(&self, keepers: &BatchOwners<'_>, number: u64) -> PoolError {
        let of_batch = self.hsm.keepers(keepers.name(number));
        for member in self.hsm.each().filter(|member| of_batch.is_empty() || of_batch.contains(member)) {
            if let Err(error) = self.hsm.at(member).ready(Duration::ZERO).await {
                return error.into();
            }
        }
        let (why, retry_after) = ("it was away a moment ago".to_owned(), Duration::from_secs(1));
        PoolError::Hsm(HsmError::Unavailable { why, retry_after })
    }

    /// Shreds the full batches that are used up, and those whose first erasure was so long ago. What is in quarantine waits for
    /// an officer: the right store, should it be put back, needs the same keys.
    pub(super) async fn shred_what_is_due(&self, member: HsmId) -> Result<(), PoolError> {
        let mut failed = None;
        let keepers = self.keepers().await?;
        for batch in self.store.batches().await?.into_iter().filter(|batch| batch.quarantined.is_none()) {
            // What an HSM keeps that is away waits for it.
            if !keepers.looks_after(member, batch.number) || !keepers.are_at_hand(batch.number) {
                continue;
            }
            if self.is_over(&batch) || self.is_due(&batch) {
                // One batch that cannot be shredded must not keep the others.
                if let Err(error) = self.shred_batch(batch.number, &mut Shredded::default()).await {
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Whether a batch's time is over; an erasure in the future is one of a clock that was wrong.
    fn is_due(&self, batch: &Batch) -> bool {
        let now = self.clock.now();
        batch.erased_since.is_some_and(|since| since > now) || self.shred_at(batch).is_some_and(|at| at <= now)
    }

    /// Whether nothing is left of a batch but its key, and nothing will come.
    fn is_over(&self, batch: &Batch) -> bool {
        let takes_more = match batch.purpose {
            Purpose::Sessions => true,
            Purpose::Pool(kind) => self.pools.contains_key(&kind) && batch.keeping == self.rules.keeping,
        };
        match batch.state {
            BatchState::Emptied => true,
            BatchState::Sealed => batch.is_used_up() && batch.quarantined.is_none(),
            BatchState::Open => batch.is_used_up() && batch.quarantined.is_none() && !takes_more,
            BatchState::Planned => false,
        }
    }

    /// When a batch is shredded at the latest; seconds since the Unix epoch.
    pub(super) fn shred_at(&self, batch: &Batch) -> Option<u64> {
        batch.erased_since.map(|since| since.saturating_add(self.rules.shred_after.as_secs()))
    }

    /// Each step is durable before the next one, and each may be the last: the next start, or the next look, goes on with
    /// whatever is left of the batch.
    async fn shred_batch(&self, number: u64, shredded: &mut Shredded) -> Result<(), PoolError> {
        let first = || self.hsm.each().next().ok_or_else(|| PoolError::Hsm(HsmError::Refused("no HSM".to_owned())));
        let member = self.keepers().await?.of(number).map_or_else(first, Ok)?;
        let _alone = self.bench(member)?.shredding.lock().await;
        let Some(batch) = self.store.batches().await?.into_iter().find(|batch| batch.number == number) else {
            return Ok(());
        };
        self.closing().insert(number);
        let done = self.shred_steps(&batch, member, shredded).await;
        self.closing().remove(&number);
        done
    }

    async fn shred_steps(&self, batch: &Batch, member: HsmId, shredded: &mut Shredded) -> Result<(), PoolError> {
        let name = self.name(batch.number).await?;
        if batch.state != BatchState::Emptied {
            // 1. Another batch takes its place: from now on nothing new comes in.
            let next = self.next_batch(batch).await?;
            // 2. Sessions that have leave to put a pair into it have done so.
            self.let_users_finish().await;
            if batch.state == BatchState::Open {
                self.store.step_batch(batch.number, BatchStep::Seal).await?;
            }
            // 3. What is left is moved, or given up if nobody may have it; meanwhile its pairs may still be claimed. A crash
            //    leaves some in one batch and some in the other, each under the key of the one it is in.
            if batch.quarantined.is_some() {
                self.store.step_batch(batch.number, BatchStep::Discard).await?;
                shredded.discarded += batch.ready;
            }
            if let Some(next) = next {
                shredded.moved += self.move_what_is_left(batch, name, next.number).await?;
            }
            if batch.keeping == KeyStorage::Hsm {
                self.destroy_condemned(member).await?;
            }
            // 4. Whoever read a pair before it was moved has opened it.
            self.let_users_finish().await;
            // 5. Durably empty: a crash from here on only has the key left to destroy.
            self.store.step_batch(batch.number, BatchStep::Empty).await?;
        }
        // 6. C_DestroyObject; the key is looked for and not found, and stays away after a power loss.
        if batch.keeping == KeyStorage::Wrapped {
            self.hsm.destroy_batch_key(name).await?;
        }
        // 7. The file is overwritten, then the batch is forgotten.
        self.store.forget_batch(batch.number).await?;
        self.hsm.forget_keepers(name);
        shredded.batches += 1;
        tracing::info!(batch = batch.number, purpose = ?batch.purpose, "a batch of key pairs is shredded: its key is gone");
        Ok(())
    }

    /// Where the rest goes; none if there is no rest.
    async fn next_batch(&self, batch: &Batch) -> Result<Option<Batch>, PoolError> {
        let of_sessions = |(member, current): (&HsmId, &BatchName)| (current.number == batch.number).then_some(*member);
        let current = self.for_sessions.borrow().iter().find_map(of_sessions);
        // What comes into a batch that was used up a moment ago is found when it cannot be emptied, and moved at the next look.
        if (current.is_none() && batch.is_used_up()) || batch.keeping == KeyStorage::Hsm {
            return Ok(None);
        }
        // Only the HSM that has its key can move it. One that none of them has is in quarantine, and nothing of it is moved.
        let Some(keeper) = self.keepers().await?.of(batch.number) else { return Ok(None) };
        let next = self.open_batch_beside(batch, keeper).await?;
        if current.is_some() {
            self.use_for_sessions(&next, keeper).await?;
        }
        Ok(Some(next))
    }

    async fn move_what_is_left(&self, batch: &Batch, name: BatchName, to: u64) -> Result<u64, PoolError> {
        let target = BatchName { number: to, ..name };
        let keeper = self.keepers().await?.of(batch.number);
        let shelf = match batch.purpose {
            Purpose::Pool(kind) => self.pools.get(&kind).and_then(|pool| Some(&pool.shares.get(&keeper?)?.shelf)),
            Purpose::Sessions => None,
        };
        let mut all = 0;
        loop {
            let held = self.store.pairs_of_batch(batch.number, CHUNK).await?;
            if held.is_empty() {
                return Ok(all);
            }
            // What is in nobody's hand is in ours until it is moved; what a device is about to get is moved as its session's.
            let in_hand = shelf.map(|shelf| shelf.take_to_move(held.iter().filter_map(ready_id)));
            let mine = |held: &HeldPair| match (ready_id(held), &in_hand) {
                (Some(id), Some(in_hand)) => in_hand.has(&id),
                _ => true,
            };
            let held: Vec<_> = held.into_iter().filter(mine).collect();
            if held.is_empty() {
                self.let_users_finish().await;
                continue;
            }
            let blobs = held.iter().map(blob_of).collect::<Result<Vec<_>, _>>()?;
            let hsm = keeper.map_or_else(|| self.hsm.clone(), |keeper| self.hsm.at(keeper));
            let moved = hsm.move_keys(name, target, blobs).await?;
            let pair = |(held, blob): (&HeldPair, Vec<u8>)| MovedPair { holder: held.holder, blob };
            let pairs = held.iter().zip(moved).map(pair).collect();
            // Those whose session has ended since are erased by now and not moved: the next look does not find them.
            all += self.store.move_pairs(batch.number, to, pairs).await?;
        }
    }

    /// Pairs on the token that are erased here.
    pub(super) async fn destroy_condemned(&self, member: HsmId) -> Result<(), PoolError> {
        let mut failed = None;
        let keepers = self.keepers().await?;
        let ready_members = |condemned: &CondemnedPair| {
            let batch = BatchName::of_pairs(&condemned.pair.label);
            let mine =
                |batch: BatchName| keepers.looks_after(member, batch.number) && keepers.are_at_hand(batch.number);
            batch.is_none_or(mine)
        };
        for condemned in self.store.condemned(CONDEMNED_OF_ALL).await?.into_iter().filter(ready_members).take(CONDEMNED)
        {
            let destroyed = self.hsm.destroy_pair(condemned.kind, &condemned.pair).await.map_err(PoolError::from);
            // A crash before this finds it condemned still, and not on the token: that is no error.
            let noted = match destroyed {
                Ok(()) => self.store.destroyed(&condemned.pair).await.map_err(PoolError::from),
                Err(error) => Err(error),
            };
            // One that cannot be destroyed must not keep the others.
            if let Err(error) = noted {
                failed.get_or_insert(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

const fn ready_id(held: &HeldPair) -> Option<PairId> {
    match held.holder {
        Holder::Ready(id) => Some(id),
        Holder::Session(_) => None,
    }
}

fn blob_of(held: &HeldPair) -> Result<(KeyKind, Vec<u8>), PoolError> {
    let damaged = |cause: String| {
        let what = format!("the pair of {:?}", held.holder);
        PoolError::Store(StoreError::Damaged { store: "secret store", what, cause })
    };
    let public = PublicKey::from_spki_der(&held.public_key).map_err(|e| damaged(e.to_string()))?;
    match &held.kept {
        StoredKey::Wrapped(wrapped) => Ok((public.kind(), wrapped.blob.clone())),
        StoredKey::OnToken(_) => Err(damaged("it is on the token and cannot be moved".to_owned())),
    }
}
