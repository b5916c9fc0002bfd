//! The state store on sled.
//!
//! | key | value |
//! |---|---|
//! | `s` + session ID | session |
//! | `w` + session ID | where its key pair is kept, while it is |
//! | `c` + chip ID | ID of its newest session |
//! | `i` + identity | ID of the session that holds it |
//! | `u` + created, 8 bytes + session ID | nothing: the session is not final |
//! | `q` + session ID | ID of the chip's session before it, if it had one |
//! | `n` | sessions per state |
//!
//! The secret store is in the same database: see `batches.rs` and `pairs.rs`; and so is what officers have agreed on: see `access.rs`;
//! and what was produced: see `production.rs`.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::StoreOptions;
use super::access;
use super::batches;
use super::committer::Committer;
use super::directory::{Fs, StoreKind, System};
use super::engine::Kind;
use super::pairs;
use super::production;
use super::view::View;
use crate::keys::{StoreId, StoredKey};
use crate::names::{ChipId, DeviceIdentity, SessionId};
use crate::store::{
    Listed, PairToReserve, ProductionCounts, ProductionSlot, ReserveError, Session, SessionCounts, SessionPlace,
    SessionState, StateName, StateStore, StoreError,
};

static KIND: Kind = Kind { store: StoreKind { name: "state store", marker: "state", format: 2 }, found, check };

/// The private store, embedded.
///
/// Trust: whoever controls its directory can withhold or roll back sessions, and read no key without the HSM.
pub struct SledStateStore(pub(super) Committer);

impl SledStateStore {
    /// Makes a new, empty store and opens it. [`StoreError::Directory`] where anything is already. For
    /// `sppctl init`.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::create(&KIND, dir, options, Arc::new(System)).map(Self)
    }

    /// Opens an existing store; [`StoreError::Directory`] if there is none, or one of another kind, or if another process has it (a
    /// killed predecessor's lock is awaited for some seconds). Never makes one. Calls need a tokio runtime with a timer.
    pub fn open(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Self::open_through(dir, options, Arc::new(System))
    }

    pub(super) fn open_through(dir: &Path, options: &StoreOptions, door: Arc<dyn Fs>) -> Result<Self, StoreError> {
        Committer::open(&KIND, dir, options, door).map(Self)
    }
}

fn found(view: &mut View<'_>) -> Result<(), StoreError> {
    view.put(COUNTS, &SessionCounts::default())?;
    let mut bytes = [0; 8];
    let random = aws_lc_rs::rand::fill(&mut bytes);
    random.map_err(|e| view.damaged("the system's random numbers".into(), e))?;
    batches::found(view, StoreId::from_random(bytes))
}

fn check(view: &View<'_>) -> Result<(), StoreError> {
    counts(view)?;
    batches::check(view)?;
    // The unfinished sessions are what a restart takes up; the oldest one stands for the others.
    match view.keys(UNFINISHED)?.first() {
        Some(key) => listed_session(view, key).map(drop),
        None => Ok(()),
    }
}

#[async_trait]
impl StateStore for SledStateStore {
    async fn reserve(&self, session: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError> {
        let (session, pair) = (session.clone(), pair.cloned());
        self.0.run("reserving", move |view| reserve(view, &session, pair.as_ref())).await
    }

    async fn advance(&self, session: &SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError> {
        let id = *session;
        self.0.run("advancing a session", move |view| advance(view, id, from, to)).await
    }

    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        let id = *id;
        self.0.run("reading a session", move |view| session(view, &id)).await
    }

    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError> {
        let key = chip_key(chip);
        self.0.run("reading a chip's session", move |view| named_session(view, &key)).await
    }

    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError> {
        let key = identity_key(identity);
        self.0.run("reading an identity's session", move |view| named_session(view, &key)).await
    }

    async fn kept_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError> {
        let id = *session;
        self.0.run("reading a session's key pair", move |view| pairs::of_session(view, &id)).await
    }

    async fn unfinished(&self) -> Result<Vec<Session>, StoreError> {
        let list = |view: &mut View<'_>| view.keys(UNFINISHED)?.iter().map(|key| listed_session(view, key)).collect();
        self.0.run("listing unfinished sessions", list).await
    }

    async fn sessions(
        &self,
        which: Listed,
        after: Option<SessionPlace>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError> {
        self.0.run("listing sessions", move |view| list(view, which, after, limit)).await
    }

    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError> {
        let key = chip_key(chip);
        self.0.run("reading a chip's sessions", move |view| with_those_before(view, &key, limit)).await
    }

    async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.0.run("reading the counts", |view| counts(view)).await
    }

    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
        let after = after.cloned();
        let list = move |view: &mut View<'_>| production::list(view, &hours, after.as_ref(), limit);
        self.0.run("reading what was produced", list).await
    }

    fn room(&self) -> Result<(u64, u64), StoreError> {
        self.0.room()
    }
}

fn reserve(view: &mut View<'_>, new: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError> {
    if let Some(known) = session(view, &new.id)? {
        // The same reservation again: its first answer was lost, and it stands.
        if known == *new && pairs::is_reserved_as(view, &new.id, pair)? {
            return Ok(());
        }
        return Err(other_state(&known, StateName::Reserved).into());
    }
    if new.state != SessionState::Reserved {
        return Err(other_state(new, StateName::Reserved).into());
    }
    let before = named_session(view, &chip_key(&new.chip))?;
    if let Some(holder) = before.as_ref().filter(|holder| holder.state.name() != StateName::Aborted) {
        return Err(ReserveError::ChipTaken(Box::new(holder.clone())));
    }
    if let Some(holder) = named_session(view, &identity_key(&new.identity))? {
        return Err(ReserveError::IdentityTaken(Box::new(holder)));
    }
    view.admit_new_device()?;
    access::count_device(view, new)?;
    view.put(&session_key(&new.id), new)?;
    if let Some(pair) = pair {
        pairs::reserve(view, new, pair)?;
    }
    if let Some(before) = before {
        view.put_bytes(&before_key(&new.id), before.id.as_bytes())?;
    }
    view.put_bytes(&chip_key(&new.chip), new.id.as_bytes())?;
    view.put_bytes(&identity_key(&new.identity), new.id.as_bytes())?;
    view.put_bytes(&unfinished_key(&new.place()), &[])?;
    production::count(view, new)?;
    let mut counts = counts(view)?;
    *counts.of_mut(StateName::Reserved) += 1;
    Ok(view.put(COUNTS, &counts)?)
}

fn advance(view: &mut View<'_>, id: SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError> {
    let absent =
        || view.damaged(format!("session {id}"), "it is not there; an older copy of the store may have been put back");
    let mut session = session(view, &id)?.ok_or_else(absent)?;
    // The same step again: its first answer was lost. Equal to the last byte, so nobody is told that another certificate,
    // place or reason than his own stands.
    if session.state == to {
        return Ok(session);
    }
    let (found, target) = (session.state.name(), to.name());
    if !from.leads_to(target) {
        return Err(other_state(&session, target.comes_from()));
    }
    if found != from {
        return Err(other_state(&session, from));
    }
    session.state = to;
    if session.state.is_final() {
        // In one batch with the new state: no crash leaves a final session with a key, or takes the key of one that is not.
        let at = match &session.state {
            SessionState::Aborted { at, .. } => *at,
            SessionState::Erased { publication } => publication.published,
            _ => session.created,
        };
        pairs::erase(view, &id, at)?;
        view.remove(&unfinished_key(&session.place()))?;
    }
    if target == StateName::Aborted {
        // The chip keeps pointing here until somebody reserves it again: its newest session can still be looked up.
        view.remove(&identity_key(&session.identity))?;
    }
    view.put(&session_key(&id), &session)?;
    production::count(view, &session)?;
    let mut counts = counts(view)?;
    let left = counts.of_mut(found);
    *left = left.checked_sub(1).ok_or_else(|| view.damaged("the counts".into(), format!("none is {found:?}")))?;
    *counts.of_mut(target) += 1;
    view.put(COUNTS, &counts)?;
    Ok(session)
}

pub(super) fn session(view: &View<'_>, id: &SessionId) -> Result<Option<Session>, StoreError> {
    view.get(&session_key(id), || format!("session {id}"))
}

/// The session whose ID a key holds.
pub(super) fn named_session(view: &View<'_>, key: &[u8]) -> Result<Option<Session>, StoreError> {
    view.get_bytes(key)?.map(|id| session_that_must_be(view, &id)).transpose()
}

fn list(view: &View<'_>, which: Listed, after: Option<SessionPlace>, limit: usize) -> Result<Vec<Session>, StoreError> {
    match which {
        Listed::Unfinished => {
            let begin = after.map_or_else(|| UNFINISHED.to_vec(), |after| unfinished_key(&after));
            let keys = view.keys_after(UNFINISHED, &begin, limit)?;
            keys.iter().map(|key| listed_session(view, key)).collect()
        }
        Listed::All => {
            let begin = after.map_or_else(|| SESSION.to_vec(), |after| session_key(&after.id));
            let keys = view.keys_after(SESSION, &begin, limit)?;
            keys.iter().map(|key| session_that_must_be(view, key.get(SESSION.len()..).unwrap_or_default())).collect()
        }
    }
}

/// The session whose ID a key holds, and the chip's sessions before it.
fn with_those_before(view: &View<'_>, key: &[u8], limit: usize) -> Result<Vec<Session>, StoreError> {
    let (mut found, mut next) = (Vec::new(), named_session(view, key)?);
    while let Some(session) = next.filter(|_| found.len() < limit) {
        next = named_session(view, &before_key(&session.id))?;
        found.push(session);
    }
    Ok(found)
}

/// The session that an entry of the list of unfinished ones names.
fn listed_session(view: &View<'_>, key: &[u8]) -> Result<Session, StoreError> {
    session_that_must_be(view, key.get(1 + size_of::<u64>()..).unwrap_or_default())
}

fn session_that_must_be(view: &View<'_>, id: &[u8]) -> Result<Session, StoreError> {
    let id = SessionId::from_bytes(id).map_err(|e| view.damaged("a session ID".into(), e))?;
    session(view, &id)?.ok_or_else(|| view.damaged(format!("session {id}"), "it is named but not there"))
}

fn counts(view: &View<'_>) -> Result<SessionCounts, StoreError> {
    view.get(COUNTS, || "the counts".into())?.ok_or_else(|| view.damaged("the counts".into(), "they are not there"))
}

fn other_state(session: &Session, needed: StateName) -> StoreError {
    StoreError::OtherState { session: session.id, found: session.state.name(), needed }
}

const COUNTS: &[u8] = b"n";
const SESSION: &[u8] = b"s";
const UNFINISHED: &[u8] = b"u";

fn session_key(id: &SessionId) -> Vec<u8> {
    [SESSION, id.as_bytes().as_slice()].concat()
}

fn before_key(id: &SessionId) -> Vec<u8> {
    [b"q", id.as_bytes().as_slice()].concat()
}

fn chip_key(chip: &ChipId) -> Vec<u8> {
    [b"c", chip.as_bytes()].concat()
}

pub(super) fn identity_key(identity: &DeviceIdentity) -> Vec<u8> {
    [b"i", identity.to_string().as_bytes()].concat()
}

fn unfinished_key(place: &SessionPlace) -> Vec<u8> {
    [UNFINISHED, place.created.to_be_bytes().as_slice(), place.id.as_bytes()].concat()
}
