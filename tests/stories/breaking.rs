//! The stores' doors, which fail when told to: before the engine was asked, or after it has done what it was asked.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use spp::keys::WrappedKey;
use spp::names::{ChipId, DeviceIdentity, SessionId};
use spp::store::{
    DeviceRecord, PublicDatabase, Publication, PublishError, ReserveError, Session, SessionCounts, SessionState,
    StateName, StateStore, StoreError,
};

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
    async fn reserve(&self, session: &Session, key: Option<&WrappedKey>) -> Result<(), ReserveError> {
        self.faults.write(Write::Reserve, self.engine.reserve(session, key)).await
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

    async fn wrapped_key(&self, session: &SessionId) -> Result<Option<WrappedKey>, StoreError> {
        self.engine.wrapped_key(session).await
    }

    async fn unfinished(&self) -> Result<Vec<Session>, StoreError> {
        self.engine.unfinished().await
    }

    async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.engine.counts().await
    }

    fn room(&self) -> Result<(u64, u64), StoreError> {
        self.engine.room()
    }
}

#[async_trait]
impl<S: PublicDatabase> PublicDatabase for Breaking<S> {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        self.faults.write(Write::Publish, self.engine.publish(record)).await
    }

    async fn find_by_chip(&self, chip: &ChipId) -> Result<Option<(DeviceRecord, Vec<u8>, Publication)>, StoreError> {
        self.engine.find_by_chip(chip).await
    }

    async fn find_by_identity(
        &self,
        identity: &DeviceIdentity,
    ) -> Result<Option<(DeviceRecord, Publication)>, StoreError> {
        self.engine.find_by_identity(identity).await
    }

    async fn len(&self) -> Result<u64, StoreError> {
        self.engine.len().await
    }
}
