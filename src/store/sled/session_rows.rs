//! The rows of the session journal on sled.
//!
//! | key | value |
//! |---|---|
//! | `s` + session ID | session |
//! | `w` + session ID | private key location, until the pair is erased |
//! | `c` + chip ID | ID of the chip's newest session |
//! | `i` + identity | ID of the session that holds it |
//! | `d` + lookup key of a public key | ID of the session whose device has it |
//! | `j` + lookup key of a certificate's issuer and subject | ID of the session whose certificate has it |
//! | `u` + created, 8 bytes + session ID | empty: the session is not final |
//! | `t` + station | number of the station's sessions that are not final |
//! | `q` + session ID | ID of the chip's previous session, if any |
//! | `n` | number of sessions per state |

use spp_format::certificate::IssuedSubject;
use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};
use spp_format::record::UniqueKey;

use super::view::View;
use crate::store::{Session, SessionCounts, SessionCursor, StateName, StoreError};

pub(super) fn session(view: &View<'_>, id: &SessionId) -> Result<Option<Session>, StoreError> {
    view.get(&session_key(id), || format!("session {id}"))
}

/// The session whose ID is stored under an index key.
pub(super) fn session_by_index(view: &View<'_>, key: &[u8]) -> Result<Option<Session>, StoreError> {
    view.get_bytes(key)?.map(|id| require_session(view, &id)).transpose()
}

/// The session whose ID is stored under the key of a subject or a public key. An aborted one holds nothing: an earlier version of
/// the daemon aborts sessions without removing these rows.
pub(super) fn holding_session(view: &View<'_>, key: &[u8]) -> Result<Option<Session>, StoreError> {
    Ok(session_by_index(view, key)?.filter(|session| session.state.name() != StateName::Aborted))
}

/// The session of a key of the list of unfinished sessions.
pub(super) fn listed_session(view: &View<'_>, key: &[u8]) -> Result<Session, StoreError> {
    require_session(view, key.get(1 + size_of::<u64>()..).unwrap_or_default())
}

pub(super) fn require_session(view: &View<'_>, id: &[u8]) -> Result<Session, StoreError> {
    let id = SessionId::from_bytes(id).map_err(|e| view.damaged("a session ID".into(), e))?;
    session(view, &id)?.ok_or_else(|| view.damaged(format!("session {id}"), "referenced but missing"))
}

pub(super) fn counts(view: &View<'_>) -> Result<SessionCounts, StoreError> {
    let name = || "the session counts".to_owned();
    view.get(COUNTS, name)?.ok_or_else(|| view.damaged(name(), "missing"))
}

/// Number of the station's sessions that are not final. A store of an earlier version has no such row until the station's next
/// session begins or ends; until then they are counted.
pub(super) fn open_sessions(view: &View<'_>, station: &StationName) -> Result<u64, StoreError> {
    let name = || format!("the number of open sessions of station {station}");
    if let Some(count) = view.get(&open_sessions_key(station), name)? {
        return Ok(count);
    }
    let mut count = 0;
    for key in view.keys(UNFINISHED)? {
        count += u64::from(listed_session(view, &key)?.station == *station);
    }
    Ok(count)
}

pub(super) const COUNTS: &[u8] = b"n";
pub(super) const SESSION: &[u8] = b"s";
pub(super) const UNFINISHED: &[u8] = b"u";

pub(super) fn session_key(id: &SessionId) -> Vec<u8> {
    [SESSION, id.as_bytes().as_slice()].concat()
}

pub(super) fn previous_key(id: &SessionId) -> Vec<u8> {
    [b"q", id.as_bytes().as_slice()].concat()
}

pub(super) fn chip_key(chip: &ChipId) -> Vec<u8> {
    [b"c", chip.as_bytes()].concat()
}

pub(super) fn identity_key(identity: &DeviceIdentity) -> Vec<u8> {
    [b"i", identity.to_string().as_bytes()].concat()
}

pub(super) fn public_key_key(spki: &[u8]) -> Vec<u8> {
    [b"d", UniqueKey::of_public_key(spki).as_bytes().as_slice()].concat()
}

/// The key of the row of a session's public key; `None` if the profile has no key pair.
pub(super) fn public_key_key_of(session: &Session) -> Option<Vec<u8>> {
    session.public_key.as_deref().map(public_key_key)
}

pub(super) fn subject_key(subject: &IssuedSubject) -> Vec<u8> {
    [b"j", UniqueKey::of_subject(subject).as_bytes().as_slice()].concat()
}

/// The key of the row of the subject of a session's certificate; `None` for a CWT.
pub(super) fn subject_key_of(session: &Session) -> Option<Vec<u8>> {
    IssuedSubject::of_to_be_signed(session.certificate.to_be_signed()).as_ref().map(subject_key)
}

pub(super) fn open_sessions_key(station: &StationName) -> Vec<u8> {
    [b"t", station.as_str().as_bytes()].concat()
}

pub(super) fn unfinished_key(cursor: &SessionCursor) -> Vec<u8> {
    [UNFINISHED, cursor.created.to_be_bytes().as_slice(), cursor.id.as_bytes()].concat()
}
