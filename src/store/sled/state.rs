//! The session journal on sled: its rows are described in `session_rows.rs`.

use std::ops::Range;

use async_trait::async_trait;
use spp_format::certificate::IssuedSubject;
use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};

use super::session_rows::{
    COUNTS, SESSION, UNFINISHED, chip_key, counts, holding_session, identity_key, listed_session, open_sessions,
    open_sessions_key, previous_key, public_key_key, public_key_key_of, require_session, session, session_by_index,
    session_key, subject_key, subject_key_of, unfinished_key,
};
use super::state_store::SledStateStore;
use super::view::View;
use super::{access, pairs, production};
use crate::hsm::StoredKey;
use crate::store::{
    PairToReserve, ProductionCounts, ProductionSlot, ReserveError, Session, SessionCounts, SessionCursor,
    SessionReader, SessionSet, SessionState, StateName, StateStore, StoreError,
};

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
}

#[async_trait]
impl SessionReader for SledStateStore {
    async fn session(&self, id: &SessionId) -> Result<Option<Session>, StoreError> {
        let id = *id;
        self.0.run("reading a session", move |view| session(view, &id)).await
    }

    async fn session_of_chip(&self, chip: &ChipId) -> Result<Option<Session>, StoreError> {
        let key = chip_key(chip);
        self.0.run("reading a chip's session", move |view| session_by_index(view, &key)).await
    }

    async fn session_of_identity(&self, identity: &DeviceIdentity) -> Result<Option<Session>, StoreError> {
        let key = identity_key(identity);
        self.0.run("reading an identity's session", move |view| session_by_index(view, &key)).await
    }

    async fn session_of_subject(&self, subject: &IssuedSubject) -> Result<Option<Session>, StoreError> {
        let key = subject_key(subject);
        self.0.run("reading a subject's session", move |view| holding_session(view, &key)).await
    }

    async fn session_of_public_key(&self, spki: &[u8]) -> Result<Option<Session>, StoreError> {
        let key = public_key_key(spki);
        self.0.run("reading a public key's session", move |view| holding_session(view, &key)).await
    }

    async fn stored_key(&self, session: &SessionId) -> Result<Option<StoredKey>, StoreError> {
        let id = *session;
        self.0.run("reading a session's key pair", move |view| pairs::of_session(view, &id)).await
    }

    async fn unfinished(&self) -> Result<Vec<Session>, StoreError> {
        let list = |view: &mut View<'_>| view.keys(UNFINISHED)?.iter().map(|key| listed_session(view, key)).collect();
        self.0.run("listing unfinished sessions", list).await
    }

    async fn sessions(
        &self,
        set: SessionSet,
        after: Option<SessionCursor>,
        limit: usize,
    ) -> Result<Vec<Session>, StoreError> {
        self.0.run("listing sessions", move |view| list(view, set, after, limit)).await
    }

    async fn sessions_of_chip(&self, chip: &ChipId, limit: usize) -> Result<Vec<Session>, StoreError> {
        let key = chip_key(chip);
        self.0.run("reading a chip's sessions", move |view| chip_sessions(view, &key, limit)).await
    }

    async fn counts(&self) -> Result<SessionCounts, StoreError> {
        self.0.run("reading session counts", |view| counts(view)).await
    }

    async fn open_sessions(&self, station: &StationName) -> Result<u64, StoreError> {
        let station = station.clone();
        self.0.run("counting open sessions", move |view| open_sessions(view, &station)).await
    }

    async fn production(
        &self,
        hours: Range<u64>,
        after: Option<&ProductionSlot>,
        limit: usize,
    ) -> Result<Vec<(ProductionSlot, ProductionCounts)>, StoreError> {
        let after = after.cloned();
        let list = move |view: &mut View<'_>| production::list(view, &hours, after.as_ref(), limit);
        self.0.run("reading production statistics", list).await
    }

    fn disk_space(&self) -> Result<(u64, u64), StoreError> {
        self.0.disk_space()
    }
}

fn reserve(view: &mut View<'_>, new: &Session, pair: Option<&PairToReserve>) -> Result<(), ReserveError> {
    if let Some(known) = session(view, &new.id)? {
        // A retry of the same reservation, whose first answer was lost.
        if known == *new && pairs::is_reserved_as(view, &new.id, pair)? {
            return Ok(());
        }
        return Err(wrong_state(&known, StateName::Reserved).into());
    }
    if new.state != SessionState::Reserved {
        return Err(wrong_state(new, StateName::Reserved).into());
    }
    let previous = session_by_index(view, &chip_key(&new.chip))?;
    if let Some(holder) = previous.as_ref().filter(|holder| holder.state.name() != StateName::Aborted) {
        return Err(ReserveError::ChipTaken(Box::new(holder.clone())));
    }
    if let Some(holder) = session_by_index(view, &identity_key(&new.identity))? {
        return Err(ReserveError::IdentityTaken(Box::new(holder)));
    }
    let subject = subject_key_of(new);
    if let Some(key) = &subject
        && let Some(holder) = holding_session(view, key)?
    {
        return Err(ReserveError::SubjectTaken { identity: new.identity.clone(), holder: Box::new(holder) });
    }
    // Only a device chooses a key that another one has: a pair that was generated here is new, or was leased from a pool.
    let key_holder = public_key_key_of(new).map(|key| holding_session(view, &key)).transpose()?.flatten();
    if new.own_key_pair
        && let Some(holder) = &key_holder
    {
        return Err(ReserveError::PublicKeyTaken(Box::new(holder.clone())));
    }
    view.admit_new_device()?;
    access::count_device(view, new)?;
    let open = open_sessions(view, &new.station)?;
    view.put(&open_sessions_key(&new.station), &(open + 1))?;
    view.put(&session_key(&new.id), new)?;
    if let Some(pair) = pair {
        pairs::reserve(view, new, pair)?;
    }
    if let Some(previous) = previous {
        view.put_bytes(&previous_key(&new.id), previous.id.as_bytes())?;
    }
    view.put_bytes(&chip_key(&new.chip), new.id.as_bytes())?;
    view.put_bytes(&identity_key(&new.identity), new.id.as_bytes())?;
    if let Some(key) = subject {
        view.put_bytes(&key, new.id.as_bytes())?;
    }
    if key_holder.is_none()
        && let Some(key) = public_key_key_of(new)
    {
        view.put_bytes(&key, new.id.as_bytes())?;
    }
    view.put_bytes(&unfinished_key(&new.cursor()), &[])?;
    production::count(view, new)?;
    let mut counts = counts(view)?;
    *counts.count_mut(StateName::Reserved) += 1;
    Ok(view.put(COUNTS, &counts)?)
}

fn advance(view: &mut View<'_>, id: SessionId, from: StateName, to: SessionState) -> Result<Session, StoreError> {
    let absent = || view.damaged(format!("session {id}"), "missing; an older copy of the store may have been restored");
    let mut session = session(view, &id)?.ok_or_else(absent)?;
    // A retry of the same step, whose first answer was lost. The data must be equal too, so that no caller mistakes another
    // certificate, publication or reason for their own.
    if session.state == to {
        return Ok(session);
    }
    let (found, target) = (session.state.name(), to.name());
    if !from.can_advance_to(target) {
        return Err(wrong_state(&session, target.predecessor()));
    }
    if found != from {
        return Err(wrong_state(&session, from));
    }
    session.state = to;
    if session.state.is_final() {
        // In one transaction with the new state: a crash cannot leave a final session with a key, or an unfinished one without.
        let at = match &session.state {
            SessionState::Aborted { at, .. } => *at,
            SessionState::Erased { publication } => publication.published,
            _ => session.created,
        };
        pairs::erase(view, &id, at)?;
        // A count that an earlier version of the daemon left too low must not keep a session from ending.
        let open = open_sessions(view, &session.station)?.saturating_sub(1);
        view.put(&open_sessions_key(&session.station), &open)?;
        view.remove(&unfinished_key(&session.cursor()))?;
    }
    if target == StateName::Aborted {
        // The chip's entry stays until its next reservation, so that its newest session can still be looked up.
        view.remove(&identity_key(&session.identity))?;
        // Sessions of an earlier version have no such rows: what is there may be another session's.
        for key in [subject_key_of(&session), public_key_key_of(&session)].into_iter().flatten() {
            if view.get_bytes(&key)?.as_deref() == Some(id.as_bytes().as_slice()) {
                view.remove(&key)?;
            }
        }
    }
    view.put(&session_key(&id), &session)?;
    production::count(view, &session)?;
    let mut counts = counts(view)?;
    let remaining = counts.count_mut(found);
    let underflow = || view.damaged("the session counts".into(), format!("the count of {found:?} is already 0"));
    *remaining = remaining.checked_sub(1).ok_or_else(underflow)?;
    *counts.count_mut(target) += 1;
    view.put(COUNTS, &counts)?;
    Ok(session)
}

fn list(
    view: &View<'_>,
    set: SessionSet,
    after: Option<SessionCursor>,
    limit: usize,
) -> Result<Vec<Session>, StoreError> {
    match set {
        SessionSet::Unfinished => {
            let begin = after.map_or_else(|| UNFINISHED.to_vec(), |after| unfinished_key(&after));
            let keys = view.keys_after(UNFINISHED, &begin, limit)?;
            keys.iter().map(|key| listed_session(view, key)).collect()
        }
        SessionSet::All => {
            let begin = after.map_or_else(|| SESSION.to_vec(), |after| session_key(&after.id));
            let keys = view.keys_after(SESSION, &begin, limit)?;
            keys.iter().map(|key| require_session(view, key.get(SESSION.len()..).unwrap_or_default())).collect()
        }
    }
}

/// The session whose ID is stored under a chip's index key, followed by the chip's earlier sessions.
fn chip_sessions(view: &View<'_>, key: &[u8], limit: usize) -> Result<Vec<Session>, StoreError> {
    let (mut found, mut next) = (Vec::new(), session_by_index(view, key)?);
    while let Some(session) = next.filter(|_| found.len() < limit) {
        next = session_by_index(view, &previous_key(&session.id))?;
        found.push(session);
    }
    Ok(found)
}

fn wrong_state(session: &Session, needed: StateName) -> StoreError {
    StoreError::WrongState { session: session.id, found: session.state.name(), needed }
}
