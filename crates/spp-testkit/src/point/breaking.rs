//! The stores' doors, which fail when told to: before the engine was asked, or after it has done what it was asked.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use spp::keys::{KeyKind, StoreId, StoredKey, TokenPair};
use spp::names::{ChipId, DeviceIdentity, SessionId};
use spp::store::{
    AuditCheckpoint, Batch, BatchStep, CondemnedPair, DeviceRecord, HeldPair, InFlightPublication, KeyStorage, Listed,
    MovedPair, PairCounts, PairId, PairToReserve, PooledPair, ProductionCounts, ProductionSlot, PublicDatabase,
    Publication, PublishError, PublishedRecord, Purpose, RegistryStatus, ReserveError, SecretStore, Session,
    SessionCounts, SessionPlace, SessionState, StateName, StateStore, StoreError, UniqueKey,
};
use spp::tlog::{LogProof, SignedCheckpoint, TileId};

/// A write of either store, by what it does for the story.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Reserve,
    Issue,
    Publish,
    NotePublished,
    Erase,
    Abort,
}

/// How a write breaks. The caller cannot tell one from the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Break {
    Failed,
    FailedButPersisted,
}

/// What breaks next, and what was written. Shared by both stores.
#[derive(Default)]
pub struct Faults(Mutex<Plan>);

#[derive(Default)]
struct Plan {
    /// The disk has no room for new devices and new pairs.
    full: bool,
    written: Vec<Write>,
    /// For each write to come: how it breaks, if it does. What is beyond the end goes well.
    next: VecDeque<Option<Break>>,
    after: Option<(Write, Box<dyn FnOnce() + Send>)>,
}

impl Faults {
    /// The n-th write from now breaks, counted from 0.
    pub fn break_nth(&self, n: usize, how: Break) {
        let next = std::iter::repeat_n(None, n).chain([Some(how)]).collect();
        self.0.lock().unwrap().next = next;
    }

    /// Nothing breaks any more; whether something was still to break.
    pub fn disarm(&self) -> bool {
        std::mem::take(&mut self.0.lock().unwrap().next).iter().any(Option::is_some)
    }

    /// There is room on the disk, or none for anything new.
    pub fn set_full(&self, full: bool) {
        self.0.lock().unwrap().full = full;
    }

    /// Something is done right after the next such write, before its caller goes on.
    pub fn after(&self, write: Write, then: impl FnOnce() + Send + 'static) {
        self.0.lock().unwrap().after = Some((write, Box::new(then)));
    }

    /// The writes that were asked for since the last look.
    pub fn take_written(&self) -> Vec<Write> {
        std::mem::take(&mut self.0.lock().unwrap().written)
    }

    async fn write<T, E: From<StoreError>>(
        &self,
        write: Write,
        engine: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let broken = {
            let mut plan = self.0.lock().unwrap();
            plan.written.push(write);
            plan.next.pop_front().flatten()
        };
        let failed = || StoreError::Failed { store: "test", doing: "writing", cause: format!("{write:?} {broken:?}") };
        if broken == Some(Break::Failed) {
            return Err(failed().into());
        }
        let done = engine.await?;
        let then = self.0.lock().unwrap().after.take_if(|(after, _)| *after == write);
        if let Some((_, then)) = then {
            then();
        }
        if broken.is_some() { Err(failed().into()) } else { Ok(done) }
    }
}

/// A store behind such a door.
pub struct Breaking<S> {
    pub engine: Arc<S>,
    pub faults: Arc<Faults>,
}

#[async_trait]
impl<S: StateStore> StateStore for Breaking<S> {
    async fn reserve(&self, session: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError> {
        self.faults.write(Write::Reserve, self.engine.reserve(session, pair)).await
    }

    async fn advance(&self, session: &SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError> {
        let write = match &to {
            SessionState::Reserved => panic!("a session is never advanced to Reserved"),
            SessionState::Issued { .. } => Write::Issue,
            SessionState::Published { .. } => Write::NotePublished,
            SessionState::Erased { .. } => Write::Erase,
            SessionState::Aborted { .. } => Write::Abort,
        };
        self.faults.write(write, self.engine.advance(session, from, to)).await
    }

    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        self.engine.session(id).await
    }

    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_chip(chip).await
    }

    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_identity(identity).await
    }

    async fn kept_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError> {
        self.engine.kept_key(session).await
    }

    async fn unfinished(&self) -> Result<Vec<Session>, StoreError> {
        self.engine.unfinished().await
    }

    async fn sessions(
        &self,
        which: Listed,
        after: Option<SessionPlace>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError> {
        self.engine.sessions(which, after, limit).await
    }

    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError> {
        self.engine.sessions_of_chip(chip, limit).await
    }

    async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.engine.counts().await
    }

    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
        self.engine.production(hours, after, limit).await
    }

    fn room(&self) -> Result<(u64, u64), StoreError> {
        let (free, floor) = self.engine.room()?;
        Ok(if self.faults.0.lock().unwrap().full { (floor - 1, floor) } else { (free, floor) })
    }
}

#[async_trait]
impl<S: PublicDatabase> PublicDatabase for Breaking<S> {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        self.faults.write(Write::Publish, self.engine.publish(record)).await
    }

    async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError> {
        self.engine.append_audit(checkpoint).await
    }

    fn reserve_slot(&self) -> InFlightPublication {
        self.engine.reserve_slot()
    }

    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError> {
        self.engine.find(key).await
    }

    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError> {
        self.engine.record(index).await
    }

    async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError> {
        self.engine.newest().await
    }

    async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError> {
        self.engine.newest_audit(node).await
    }

    async fn len(&self) -> Result<u64, StoreError> {
        self.engine.len().await
    }

    fn status(&self) -> RegistryStatus {
        self.engine.status()
    }

    async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError> {
        self.engine.checkpoint().await
    }

    async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        self.engine.prove(index).await
    }

    async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        self.engine.receipt(index).await
    }

    async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        self.engine.tile(tile).await
    }
}

/// The pool's own writes break by a plan of their own: they come whenever the pool finds something to do.
pub struct BreakingPool<S> {
    pub engine: Arc<S>,
    pub faults: Arc<PoolFaults>,
}

/// A write of the secret store that the pool asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolWrite {
    Plan,
    Open,
    Seal,
    Empty,
    Quarantine,
    Discard,
    Forget,
    Add,
    Move,
    Destroyed,
}

/// Which of the pool's writes breaks next.
#[derive(Default)]
pub struct PoolFaults(Mutex<Option<(PoolWrite, Break)>>);

impl PoolFaults {
    /// The next write of that name breaks, once.
    pub fn break_next(&self, write: PoolWrite, how: Break) {
        *self.0.lock().unwrap() = Some((write, how));
    }

    /// Whether it broke.
    pub fn have_struck(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }

    async fn write<T>(
        &self,
        write: PoolWrite,
        engine: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let broken = self.0.lock().unwrap().take_if(|(wanted, _)| *wanted == write).map(|(_, how)| how);
        let failed = || StoreError::Failed { store: "test", doing: "writing", cause: format!("{write:?} {broken:?}") };
        if broken == Some(Break::Failed) {
            return Err(failed());
        }
        let done = engine.await?;
        if broken.is_some() { Err(failed()) } else { Ok(done) }
    }
}

#[async_trait]
impl<S: SecretStore> SecretStore for BreakingPool<S> {
    async fn origin(&self) -> Result<(StoreId, u64), StoreError> {
        self.engine.origin().await
    }

    async fn batches(&self) -> Result<Vec<Batch>, StoreError> {
        self.engine.batches().await
    }

    async fn plan_batch(
        &self,
        purpose: Purpose,
        keeping: KeyStorage,
        at: u64,
        above: u64,
    ) -> Result<Batch, StoreError> {
        self.faults.write(PoolWrite::Plan, self.engine.plan_batch(purpose, keeping, at, above)).await
    }

    async fn step_batch(&self, number: u64, step: BatchStep) -> Result<Batch, StoreError> {
        let write = match &step {
            BatchStep::Open => PoolWrite::Open,
            BatchStep::Seal => PoolWrite::Seal,
            BatchStep::Empty => PoolWrite::Empty,
            BatchStep::Quarantine(_) => PoolWrite::Quarantine,
            BatchStep::Discard => PoolWrite::Discard,
        };
        self.faults.write(write, self.engine.step_batch(number, step)).await
    }

    async fn forget_batch(&self, number: u64) -> Result<(), StoreError> {
        self.faults.write(PoolWrite::Forget, self.engine.forget_batch(number)).await
    }

    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
        self.faults.write(PoolWrite::Add, self.engine.add_pairs(batch, pairs)).await
    }

    async fn ready_pairs(
        &self,
        kind: KeyKind,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
        self.engine.ready_pairs(kind, after, limit).await
    }

    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<HeldPair>, StoreError> {
        self.engine.pairs_of_batch(batch, limit).await
    }

    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<MovedPair>) -> Result<u64, StoreError> {
        self.faults.write(PoolWrite::Move, self.engine.move_pairs(from, to, pairs)).await
    }

    async fn condemned(&self, limit: usize) -> Result<Vec<CondemnedPair>, StoreError> {
        self.engine.condemned(limit).await
    }

    async fn destroyed(&self, pair: &TokenPair) -> Result<(), StoreError> {
        self.faults.write(PoolWrite::Destroyed, self.engine.destroyed(pair)).await
    }

    async fn pair_counts(&self, kind: KeyKind) -> Result<PairCounts, StoreError> {
        self.engine.pair_counts(kind).await
    }
}
