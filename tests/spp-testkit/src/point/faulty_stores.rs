//! Stores that inject faults: a write fails before or after the underlying store has performed it.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use spp::hsm::{StoreId, StoredKey, TokenPair};
use spp::store::{
    Batch, BatchPair, BatchStep, InFlightPublication, KeyStorage, LogReader, PairCounts, PairId, PairToDestroy,
    PairToReserve, PooledPair, ProductionCounts, ProductionSlot, PublicDatabase, PublishError, Purpose, RegistryStatus,
    ReserveError, RewrappedPair, SecretStore, Session, SessionCounts, SessionCursor, SessionReader, SessionSet,
    SessionState, StateName, StateStore, StoreError,
};
use spp_format::certificate::IssuedSubject;
use spp_format::keys::KeyType;
use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};
use spp_format::record::{AuditCheckpoint, DeviceRecord, Publication, PublishedRecord, UniqueKey};
use spp_format::tlog::{LogProof, SignedCheckpoint, TileId};

/// The provisioning writes of both stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Write {
    Reserve,
    Issue,
    Publish,
    NotePublished,
    Erase,
    Abort,
}

/// How a write fails. The caller cannot distinguish the modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultMode {
    Failed,
    FailedButPersisted,
}

/// Scheduled faults, and the writes so far. Shared by both stores.
#[derive(Default)]
pub struct Faults(Mutex<Plan>);

#[derive(Default)]
struct Plan {
    /// The disk is full for new devices and new pairs.
    full: bool,
    written: Vec<Write>,
    /// Fault of each upcoming write, if any. Writes beyond the end succeed.
    next: VecDeque<Option<FaultMode>>,
    after: Option<(Write, Box<dyn FnOnce() + Send>)>,
}

impl Faults {
    /// Makes the n-th write from now fail, counted from 0.
    pub fn fail_nth(&self, n: usize, mode: FaultMode) {
        let next = std::iter::repeat_n(None, n).chain([Some(mode)]).collect();
        self.0.lock().unwrap().next = next;
    }

    /// Cancels scheduled faults. Returns whether any were left.
    pub fn disarm(&self) -> bool {
        std::mem::take(&mut self.0.lock().unwrap().next).iter().any(Option::is_some)
    }

    /// Sets whether the disk is full for new devices and pairs.
    pub fn set_full(&self, full: bool) {
        self.0.lock().unwrap().full = full;
    }

    /// Runs an action right after the next such write, before its caller continues.
    pub fn after(&self, write: Write, then: impl FnOnce() + Send + 'static) {
        self.0.lock().unwrap().after = Some((write, Box::new(then)));
    }

    /// Takes the writes requested since the last call.
    pub fn take_written(&self) -> Vec<Write> {
        std::mem::take(&mut self.0.lock().unwrap().written)
    }

    async fn write<T, E: From<StoreError>>(
        &self,
        write: Write,
        engine: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let fault = {
            let mut plan = self.0.lock().unwrap();
            plan.written.push(write);
            plan.next.pop_front().flatten()
        };
        let failed =
            || StoreError::Failed { store: "test", operation: "writing", cause: format!("{write:?} {fault:?}") };
        if fault == Some(FaultMode::Failed) {
            return Err(failed().into());
        }
        let result = engine.await?;
        let then = self.0.lock().unwrap().after.take_if(|(after, _)| *after == write);
        if let Some((_, then)) = then {
            then();
        }
        if fault.is_some() { Err(failed().into()) } else { Ok(result) }
    }
}

/// A store that injects faults.
pub struct FaultyStore<S> {
    pub engine: Arc<S>,
    pub faults: Arc<Faults>,
}

#[async_trait]
impl<S: StateStore> StateStore for FaultyStore<S> {
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
}

#[async_trait]
impl<S: StateStore> SessionReader for FaultyStore<S> {
    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        self.engine.session(id).await
    }

    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_chip(chip).await
    }

    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_identity(identity).await
    }

    async fn session_of_subject(&self, subject: &IssuedSubject) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_subject(subject).await
    }

    async fn session_of_public_key(&self, spki: &[u8]) -> Result<Option<Session>, StoreError> {
        self.engine.session_of_public_key(spki).await
    }

    async fn stored_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError> {
        self.engine.stored_key(session).await
    }

    async fn unfinished(&self) -> Result<Vec<Session>, StoreError> {
        self.engine.unfinished().await
    }

    async fn sessions(
        &self,
        set: SessionSet,
        after: Option<SessionCursor>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError> {
        self.engine.sessions(set, after, limit).await
    }

    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError> {
        self.engine.sessions_of_chip(chip, limit).await
    }

    async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.engine.counts().await
    }

    async fn open_sessions(&self, station: &StationName) -> Result<u64, StoreError> {
        self.engine.open_sessions(station).await
    }

    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
        self.engine.production(hours, after, limit).await
    }

    fn disk_space(&self) -> Result<(u64, u64), StoreError> {
        let (free, floor) = self.engine.disk_space()?;
        Ok(if self.faults.0.lock().unwrap().full { (floor - 1, floor) } else { (free, floor) })
    }
}

#[async_trait]
impl<S: PublicDatabase> PublicDatabase for FaultyStore<S> {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        self.faults.write(Write::Publish, self.engine.publish(record)).await
    }

    async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError> {
        self.engine.append_audit(checkpoint).await
    }

    fn reserve_slot(&self) -> InFlightPublication {
        self.engine.reserve_slot()
    }
}

#[async_trait]
impl<S: PublicDatabase> LogReader for FaultyStore<S> {
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

/// A secret store that injects faults into the pool's writes. The pool writes in the background, so its faults are selected by
/// the kind of write.
pub struct FaultySecretStore<S> {
    pub engine: Arc<S>,
    pub faults: Arc<PoolFaults>,
}

/// The writes of the pool to the secret store.
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

/// The scheduled fault of a pool write.
#[derive(Default)]
pub struct PoolFaults(Mutex<Option<(PoolWrite, FaultMode)>>);

impl PoolFaults {
    /// Makes the next write of this kind fail, once.
    pub fn fail_next(&self, write: PoolWrite, mode: FaultMode) {
        *self.0.lock().unwrap() = Some((write, mode));
    }

    /// Whether the scheduled fault has occurred.
    pub fn has_fired(&self) -> bool {
        self.0.lock().unwrap().is_none()
    }

    async fn write<T>(
        &self,
        write: PoolWrite,
        engine: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let fault = self.0.lock().unwrap().take_if(|(wanted, _)| *wanted == write).map(|(_, mode)| mode);
        let failed =
            || StoreError::Failed { store: "test", operation: "writing", cause: format!("{write:?} {fault:?}") };
        if fault == Some(FaultMode::Failed) {
            return Err(failed());
        }
        let result = engine.await?;
        if fault.is_some() { Err(failed()) } else { Ok(result) }
    }
}

#[async_trait]
impl<S: SecretStore> SecretStore for FaultySecretStore<S> {
    async fn origin(&self) -> Result<(StoreId, u64), StoreError> {
        self.engine.origin().await
    }

    async fn batches(&self) -> Result<Vec<Batch>, StoreError> {
        self.engine.batches().await
    }

    async fn plan_batch(
        &self,
        purpose: Purpose,
        storage: KeyStorage,
        at: u64,
        above: u64,
    ) -> Result<Batch, StoreError> {
        self.faults.write(PoolWrite::Plan, self.engine.plan_batch(purpose, storage, at, above)).await
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

    async fn delete_batch(&self, number: u64) -> Result<(), StoreError> {
        self.faults.write(PoolWrite::Forget, self.engine.delete_batch(number)).await
    }

    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
        self.faults.write(PoolWrite::Add, self.engine.add_pairs(batch, pairs)).await
    }

    async fn ready_pairs(
        &self,
        kind: KeyType,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
        self.engine.ready_pairs(kind, after, limit).await
    }

    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<BatchPair>, StoreError> {
        self.engine.pairs_of_batch(batch, limit).await
    }

    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<RewrappedPair>) -> Result<u64, StoreError> {
        self.faults.write(PoolWrite::Move, self.engine.move_pairs(from, to, pairs)).await
    }

    async fn pairs_to_destroy(&self, limit: usize) -> Result<Vec<PairToDestroy>, StoreError> {
        self.engine.pairs_to_destroy(limit).await
    }

    async fn confirm_destroyed(&self, pair: &TokenPair) -> Result<(), StoreError> {
        self.faults.write(PoolWrite::Destroyed, self.engine.confirm_destroyed(pair)).await
    }

    async fn pair_counts(&self, kind: KeyType) -> Result<PairCounts, StoreError> {
        self.engine.pair_counts(kind).await
    }
}
