//! The rows of the session journal on sled.
//!
//! | key | value |
//! |---|---|
//! | `s` + session ID | session |
//! | `w` + session ID | private key location, until the pair is erased |
//! | `c` + chip ID | ID of the chip's newest session |
//! | `i` + identity | ID of the session that holds it |
//! | `u` + created, 8 bytes + session ID | empty: the session is not final |
//! | `q` + session ID | ID of the chip's previous session, if any |
//! | `n` | number of sessions per state |

use spp_format::names::{ChipId, DeviceIdentity, SessionId};

use super::view::View;
use crate::store::{Session, SessionCounts, SessionCursor, StoreError};

pub(super) fn session(view: &View<'_>, id: &SessionId) -> Result<Option<Session>, StoreError> {
    view.get(&session_key(id), || format!("session {id}"))
}

/// The session whose ID is stored under an index key.
pub(super) fn session_by_index(view: &View<'_>, key: &[u8]) -> Result<Option<Session>, StoreError> {
    view.get_bytes(key)?.map(|id| require_session(view, &id)).transpose()
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

pub(super) fn unfinished_key(cursor: &SessionCursor) -> Vec<u8> {
    [UNFINISHED, cursor.created.to_be_bytes().as_slice(), cursor.id.as_bytes()].concat()
}
