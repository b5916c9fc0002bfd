//! Taking a pair: each is in one hand at a time, and only the journal's transaction makes it a session's.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::readers_barrier::ReaderGuard;
use super::{KeyPool, PoolError, Share};
use crate::hsm::{HsmError, HsmId};
use crate::keys::{BatchName, KeyKind, PublicKey, StoredKey, WrappedKey};
use crate::names::KeyName;
use crate::store::{PairId, PairToReserve, PooledPair, StoreError};

/// Pairs that are read from the store at once; they wait on the shelf, wrapped.
const SHELF: usize = 128;
/// The longest and the shortest time after which a station is asked to come again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

/// Ready pairs of one kind and one HSM, the next ones to be given out; the others stay in the store.
pub(super) struct ReadyQueue {
    kind: KeyKind,
    keeper: HsmId,
    content: Arc<Mutex<QueueState>>,
    /// One caller fetches more at a time.
    fetching: tokio::sync::Mutex<()>,
    /// Told when pairs that were being moved are so no more. All shelves of a kind have the same.
    moved: Arc<Notify>,
}

#[derive(Default)]
struct QueueState {
    waiting: VecDeque<(PairId, PooledPair)>,
    in_hand: BTreeSet<PairId>,
    /// While the store is being read: pairs that left a hand since. What was read of them may be from before they were taken.
    left_meanwhile: Option<BTreeSet<PairId>>,
    /// The last pair that was fetched: those after it are in the store alone.
    fetched: Option<PairId>,
    /// Pairs in the hand of the shredder.
    being_moved: usize,
}

/// A pair in the hand of one call. Dropped, it goes back; [`PoolLease::spent`] when it is a session's.
pub struct PoolLease {
    id: PairId,
    public: PublicKey,
    kept: StoredKey,
    pair: Option<PooledPair>,
    /// Whether it goes behind the others.
    last: bool,
    content: Arc<Mutex<QueueState>>,
    _user: ReaderGuard,
}

/// Leave to wrap a session's pair under the key of the batch for sessions, until it is journaled.
pub struct SessionLease {
    batch: BatchName,
    _user: ReaderGuard,
}

impl SessionLease {
    /// The key to wrap under.
    pub fn key(&self) -> KeyName {
        self.batch.key()
    }

    /// What the journal is told.
    pub fn reserve(&self, kept: &StoredKey) -> Option<PairToReserve> {
        match kept {
            StoredKey::Wrapped(WrappedKey { wrapping_key, blob }) if *wrapping_key == self.key() => {
                Some(PairToReserve::Made { batch: self.batch.number, blob: blob.clone() })
            }
            _ => None,
        }
    }
}

impl PoolLease {
    /// The public half.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// How its private half is kept.
    pub const fn kept(&self) -> &StoredKey {
        &self.kept
    }

    /// What the journal is told.
    pub const fn reserve(&self) -> PairToReserve {
        PairToReserve::Pooled(self.id)
    }

    /// It is a session's, or it may be: the store's answer was lost. It does not go back. If it is still ready it is found
    /// again when the shelf is filled from the beginning.
    pub fn spent(mut self) {
        self.pair = None;
    }

    /// It could not be opened: the next device gets another one.
    pub fn set_aside(mut self) {
        self.last = true;
    }
}

impl Drop for PoolLease {
    fn drop(&mut self) {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        content.leave_hand(&self.id);
        match self.pair.take() {
            Some(pair) if self.last => content.waiting.push_back((self.id, pair)),
            Some(pair) => content.waiting.push_front((self.id, pair)),
            None => {}
        }
    }
}

impl QueueState {
    fn leave_hand(&mut self, id: &PairId) {
        self.in_hand.remove(id);
        if let Some(left) = &mut self.left_meanwhile {
            left.insert(*id);
        }
    }
}

/// Pairs in the hand of the shredder.
pub(super) struct RewrapGuard {
    ids: BTreeSet<PairId>,
    content: Arc<Mutex<QueueState>>,
    moved: Arc<Notify>,
}

impl RewrapGuard {
    pub(super) fn has(&self, id: &PairId) -> bool {
        self.ids.contains(id)
    }
}

impl Drop for RewrapGuard {
    /// Those that could not be moved are still in the store, and found when the shelf is filled from the beginning.
    fn drop(&mut self) {
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        self.ids.iter().for_each(|id| content.leave_hand(id));
        content.being_moved -= self.ids.len();
        drop(content);
        self.moved.notify_waiters();
    }
}

impl ReadyQueue {
    pub(super) fn new(kind: KeyKind, keeper: HsmId, moved: Arc<Notify>) -> Self {
        Self { kind, keeper, moved, content: Arc::default(), fetching: tokio::sync::Mutex::default() }
    }

    /// Takes those of the pairs that are in nobody's hand, until they are moved: their places are others then.
    pub(super) fn take_to_move(&self, pairs: impl Iterator<Item = PairId>) -> RewrapGuard {
        let mut content = self.content();
        let ids: BTreeSet<_> = pairs.filter(|id| content.in_hand.insert(*id)).collect();
        content.waiting.retain(|(id, _)| !ids.contains(id));
        content.being_moved += ids.len();
        RewrapGuard { ids, content: Arc::clone(&self.content), moved: Arc::clone(&self.moved) }
    }

    /// Begins again with the oldest pair of the store.
    pub(super) fn begin_again(&self) {
        let mut content = self.content();
        content.waiting.clear();
        content.fetched = None;
    }

    fn is_being_moved(&self) -> bool {
        self.content().being_moved > 0
    }

    fn take(&self) -> Option<(PairId, PooledPair)> {
        let mut content = self.content();
        let next = content.waiting.pop_front()?;
        content.in_hand.insert(next.0);
        Some(next)
    }

    fn content(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyPool {
    /// A ready pair, of the HSM that has least to do and of its oldest batch. It is nobody else's until it is dropped.
    pub async fn claim(&self, kind: KeyKind) -> Result<PoolLease, PoolError> {
        let pool = self.pools.get(&kind).ok_or(PoolError::NoPool(kind))?;
        self.begun().await?;
        let until = Instant::now() + self.hsm.call_timeout();
        let (user, taken) = loop {
            // More came, or what was being moved is there again.
            let more = pool.more.notified();
            let shelves: Vec<_> = self.in_service().iter().filter_map(|member| pool.shares.get(member)).collect();
            let are_being_moved = || shelves.iter().any(|share| share.shelf.is_being_moved());
            let user = self.hold();
            let before = are_being_moved();
            let mut taken = None;
            for share in &shelves {
                taken = self.take(&share.shelf).await?.map(|taken| (&share.shelf, taken));
                if taken.is_some() {
                    break;
                }
            }
            if taken.is_some() || !(before || are_being_moved()) || Instant::now() >= until {
                break (user, taken);
            }
            // They are there, but in the hand of the shredder for the moment of one call.
            drop(user);
            let _ = tokio::time::timeout_at(until.into(), more).await;
        };
        pool.wake();
        let Some((shelf, (id, pair))) = taken else { return Err(self.empty(kind)) };
        let content = Arc::clone(&shelf.content);
        let public = PublicKey::from_spki_der(&pair.public_key);
        let mut claim = match public {
            Ok(public) => {
                PoolLease { id, public, kept: pair.kept.clone(), pair: None, last: false, content, _user: user }
            }
            Err(e) => {
                shelf.content().leave_hand(&id);
                let what = format!("pair {} of batch {}", id.number, id.batch);
                return Err(StoreError::Damaged { store: "secret store", what, cause: e.to_string() }.into());
            }
        };
        claim.pair = Some(pair);
        Ok(claim)
    }

    /// The next pair of the shelf, which is filled if it has none.
    async fn take(&self, shelf: &ReadyQueue) -> Result<Option<(PairId, PooledPair)>, PoolError> {
        if let Some(taken) = shelf.take() {
            return Ok(Some(taken));
        }
        let _alone = shelf.fetching.lock().await;
        if let Some(taken) = shelf.take() {
            return Ok(Some(taken));
        }
        self.fetch(shelf).await?;
        Ok(shelf.take())
    }

    /// Leave to make a pair for a session, in the HSM that has least to do.
    pub async fn lease_for_session(&self) -> Result<SessionLease, PoolError> {
        let limit = self.hsm.call_timeout();
        let until = Instant::now() + limit;
        let (mut current, mut hsm) = (self.for_sessions.subscribe(), self.hsm.clone());
        loop {
            let found = {
                let batches = current.borrow_and_update();
                let ready_members = self.hsm.ready_members();
                let mut of_one = ready_members.iter().filter_map(|member| batches.get_key_value(member));
                // Where none is there, the call itself waits for one.
                let any = || batches.iter().next().filter(|_| ready_members.is_empty());
                of_one.next().or_else(any).map(|(member, batch)| (*member, *batch))
            };
            if let Some((member, batch)) = found {
                let user = self.hold();
                // Whoever takes this batch's place has changed the value before waiting for us: looked at again, it holds.
                if self.for_sessions.borrow().get(&member) == Some(&batch) {
                    return Ok(SessionLease { batch, _user: user });
                }
                continue;
            }
            // The HSM's own trouble says it best, and at once if only an officer helps.
            self.hsm.ready(limit).await?;
            let change = async {
                tokio::select! {
                    _ = current.changed() => {}
                    () = hsm.changed() => {}
                }
            };
            if tokio::time::timeout_at(until.into(), change).await.is_err() {
                return Err(self.not_begun().await);
            }
        }
    }

    /// Puts the next pairs on the shelf.
    async fn fetch(&self, shelf: &ReadyQueue) -> Result<(), PoolError> {
        let after = {
            let mut content = shelf.content();
            content.left_meanwhile = Some(BTreeSet::new());
            content.fetched
        };
        let mut found = self.next_pairs(shelf, after).await?;
        if found.is_empty() && after.is_some() {
            // What was left behind, a pair whose reservation nobody knew the outcome of, is found by beginning again.
            found = self.next_pairs(shelf, None).await?;
        }
        let mut content = shelf.content();
        content.fetched = found.last().map(|(last, _)| *last);
        let left = content.left_meanwhile.take().unwrap_or_default();
        // One that has just come back from a hand is here already.
        let here: BTreeSet<_> = content.waiting.iter().map(|(id, _)| *id).collect();
        let taken = |id: &PairId| content.in_hand.contains(id) || left.contains(id) || here.contains(id);
        let found: Vec<_> = found.into_iter().filter(|(id, _)| !taken(id)).collect();
        content.waiting.extend(found);
        Ok(())
    }

    /// The pairs after this one that the shelf's HSM keeps. Batches of others are passed over.
    async fn next_pairs(
        &self,
        shelf: &ReadyQueue,
        after: Option<PairId>,
    ) -> Result<Vec<(PairId, PooledPair)>, PoolError> {
        let keepers = self.keepers().await?;
        let mut after = after;
        loop {
            let mut found = self.store.ready_pairs(shelf.kind, after, SHELF).await?;
            let Some((last, _)) = found.last() else { return Ok(found) };
            after = Some(match keepers.of(last.batch) {
                Some(keeper) if keeper == shelf.keeper => *last,
                _ => PairId { number: u64::MAX, ..*last },
            });
            found.retain(|(id, _)| keepers.of(id.batch) == Some(shelf.keeper));
            if !found.is_empty() {
                return Ok(found);
            }
        }
    }

    fn empty(&self, kind: KeyKind) -> PoolError {
        let Some(pool) = self.pools.get(&kind) else { return PoolError::NoPool(kind) };
        let turned_away = pool.turned_away.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let fill_rate = pool.filling().rate.per_second();
        let fills = |share: &Share| share.filling().paused.is_none();
        // Each of those who wait needs one: the last of them comes when that many were made.
        let retry_after = if fill_rate > 0.0 {
            Duration::try_from_secs_f64(f64::from(turned_away) / fill_rate).unwrap_or(RETRY.1)
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

    /// Waits until store and token have been compared, as long as a call may take.
    pub(super) async fn begun(&self) -> Result<(), PoolError> {
        if *self.reconciled.borrow() {
            return Ok(());
        }
        let limit = self.hsm.call_timeout();
        self.hsm.ready(limit).await?;
        let mut reconciled = self.reconciled.subscribe();
        let done = tokio::time::timeout(limit, reconciled.wait_for(|done| *done)).await.is_ok_and(|done| done.is_ok());
        if done { Ok(()) } else { Err(self.not_begun().await) }
    }

    /// Why nothing is given out yet.
    pub(super) async fn not_begun(&self) -> PoolError {
        if let Err(error) = self.hsm.ready(Duration::ZERO).await {
            return error.into();
        }
        let why = self.trouble();
        let why = why.unwrap_or_else(|| "the batches of key pairs are still being looked at".to_owned());
        PoolError::Hsm(HsmError::Unavailable { why, retry_after: Duration::from_secs(1) })
    }
}
