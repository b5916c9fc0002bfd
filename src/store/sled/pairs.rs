//! Key pairs of the secret store on sled.
//!
//! | key | value |
//! |---|---|
//! | `p` + batch, 8 bytes + number, 8 bytes | public key and private key location of a ready pair |
//! | `w` + session ID | batch and private key location of the session's pair |
//! | `r` + batch + session ID | empty: the session has a pair of the batch |
//! | `x` + batch + CKA_ID | empty: the pair must be destroyed on the token |
//!
//! Every pair is under exactly one of `p`, `w` and `x`. Every step moves it in one transaction.

use serde::{Deserialize, Serialize};
use spp_format::keys::KeyType;
use spp_format::names::SessionId;

use super::batch_rows::{self, batch_error, batch_name, put, require, update_pair_counts};
use super::blobs::BlobRange;
use super::session_rows;
use super::view::View;
use crate::hsm::{BatchName, StoredKey, TokenPair, WrappedKey};
use crate::store::{
    Batch, BatchPair, BatchState, KeyStorage, PairAssignment, PairId, PairToDestroy, PairToReserve, PooledPair,
    Purpose, ReserveError, RewrappedPair, Session, StoreError,
};

/// The location of a private key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum KeyLocation {
    /// Wrapped, in the batch's file.
    Blob(BlobRange),
    /// On the token, with this CKA_ID.
    Id(Vec<u8>),
}

#[derive(Serialize, Deserialize)]
struct ReadyRow {
    public_key: Vec<u8>,
    location: KeyLocation,
}

#[derive(Serialize, Deserialize)]
struct SessionRow {
    batch: u64,
    location: KeyLocation,
}

pub(super) fn add(view: &mut View<'_>, number: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
    let mut batch = require(view, number)?;
    let Purpose::Pool(kind) = batch.purpose else {
        return Err(batch_error(&batch, "is for sessions and accepts no pool pairs".into()));
    };
    if batch.state != BatchState::Open || batch.quarantined.is_some() {
        return Err(batch_error(&batch, format!("is in state {:?} or quarantined and accepts no pairs", batch.state)));
    }
    view.admit_new_device()?;
    let added = pairs.len() as u64;
    for pair in pairs {
        let location = store_private_key(view, &batch, pair.private_key)?;
        let id = PairId { batch: number, number: batch.pairs_added };
        view.put(&ready_key(id), &ReadyRow { public_key: pair.public_key, location })?;
        batch.pairs_added += 1;
        batch.ready += 1;
    }
    update_pair_counts(view, kind, |counts| counts.made += added)?;
    put(view, &batch)?;
    Ok(batch)
}

pub(super) fn ready(
    view: &View<'_>,
    kind: KeyType,
    after: Option<PairId>,
    limit: usize,
) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
    let mut found = Vec::new();
    for number in view.keys(b"b")?.iter().filter_map(|key| number_at(key, 1)) {
        let batch = require(view, number)?;
        if batch.purpose != Purpose::Pool(kind) || batch.available() == 0 || after.is_some_and(|id| id.batch > number) {
            continue;
        }
        let begin = match after {
            Some(id) if id.batch == number => ready_key(id),
            _ => ready_prefix(number),
        };
        for key in view.keys_after(&ready_prefix(number), &begin, limit - found.len())? {
            let id = pair_id(view, &key)?;
            found.push((id, ready_pair(view, id)?.ok_or_else(|| missing_pair(view, id))?));
        }
        if found.len() == limit {
            break;
        }
    }
    Ok(found)
}

/// Assigns the pair to the session, in the transaction that journals the session.
pub(super) fn reserve(view: &mut View<'_>, session: &Session, pair: &PairToReserve) -> Result<(), ReserveError> {
    let (mut batch, location) = match pair {
        PairToReserve::OnDemand { batch, blob } => {
            let batch = batch_rows::get(view, *batch)?.ok_or(ReserveError::PairUnavailable)?;
            // Once a batch is sealed its pairs are listed for shredding; that listing would miss a later pair.
            if batch.state != BatchState::Open || batch.purpose != Purpose::Sessions {
                return Err(ReserveError::PairUnavailable);
            }
            if session.public_key.is_none() {
                return Err(batch_error(&batch, "cannot store a pair for a session without a public key".into()).into());
            }
            let blob = view.put_blob(batch.number, blob)?;
            (Batch { pairs_added: batch.pairs_added + 1, ..batch }, KeyLocation::Blob(blob))
        }
        PairToReserve::Pooled(id) => {
            let batch = batch_rows::get(view, id.batch)?.filter(|batch| batch.available() > 0);
            let batch = batch.ok_or(ReserveError::PairUnavailable)?;
            let row = ready_row(view, *id)?.ok_or(ReserveError::PairUnavailable)?;
            if session.public_key.as_ref() != Some(&row.public_key) {
                return Err(view
                    .damaged(
                        format!("pair {} of batch {}", id.number, id.batch),
                        "public key differs from the session's",
                    )
                    .into());
            }
            view.remove(&ready_key(*id))?;
            if let Purpose::Pool(kind) = batch.purpose {
                update_pair_counts(view, kind, |counts| counts.reserved += 1)?;
            }
            (Batch { ready: batch.ready.saturating_sub(1), ..batch }, row.location)
        }
    };
    batch.reserved += 1;
    view.put(&session_key(&session.id), &SessionRow { batch: batch.number, location })?;
    view.put_bytes(&reserved_key(batch.number, &session.id), &[])?;
    Ok(put(view, &batch)?)
}

/// Reports whether the session has exactly that pair.
pub(super) fn is_reserved_as(
    view: &View<'_>,
    id: &SessionId,
    pair: Option<&PairToReserve>,
) -> Result<bool, StoreError> {
    let row = session_row(view, id)?;
    Ok(match (row, pair) {
        (None, None) => true,
        // The caller compares the session's public key, which identifies the pair. The wrapped bytes are comparable only if the
        // pair was not moved to another batch.
        (
            Some(SessionRow { batch, location: KeyLocation::Blob(range) }),
            Some(PairToReserve::OnDemand { batch: first, blob }),
        ) => batch != *first || view.get_blob(batch, range)? == *blob,
        (Some(_), Some(PairToReserve::Pooled(_))) => true,
        _ => false,
    })
}

pub(super) fn of_session(view: &View<'_>, id: &SessionId) -> Result<Option<StoredKey>, StoreError> {
    session_row(view, id)?.map(|row| load_private_key(view, row.batch, &row.location)).transpose()
}

/// Erases the pair of a finished session permanently.
pub(super) fn erase(view: &mut View<'_>, id: &SessionId, at: u64) -> Result<(), StoreError> {
    let Some(row) = session_row(view, id)? else { return Ok(()) };
    view.remove(&session_key(id))?;
    view.remove(&reserved_key(row.batch, id))?;
    let mut batch = require(view, row.batch)?;
    batch.reserved = batch.reserved.saturating_sub(1);
    match &row.location {
        // Until the batch key is destroyed, an old copy of the disk and the HSM can still recover the key.
        KeyLocation::Blob(_) => batch.first_erased = Some(batch.first_erased.map_or(at, |since| since.min(at))),
        KeyLocation::Id(token) => view.put_bytes(&destroy_key(row.batch, token), &[])?,
    }
    put(view, &batch)
}

pub(super) fn of_batch(view: &View<'_>, number: u64, limit: usize) -> Result<Vec<BatchPair>, StoreError> {
    let mut pairs = Vec::new();
    let prefix = reserved_prefix(number);
    for key in view.keys_after(&prefix, &prefix, limit)? {
        let invalid = |e: spp_format::names::NameError| view.damaged("a session ID".into(), e);
        let id = SessionId::from_bytes(key.get(prefix.len()..).unwrap_or_default()).map_err(invalid)?;
        let missing = || view.damaged(format!("the pair of session {id}"), "listed but missing");
        let row = session_row(view, &id)?.ok_or_else(missing)?;
        let session = session_rows::session(view, &id)?.ok_or_else(missing)?;
        let public_key = session.public_key.ok_or_else(missing)?;
        let private_key = load_private_key(view, number, &row.location)?;
        pairs.push(BatchPair { assignment: PairAssignment::Session(id), public_key, private_key });
    }
    let prefix = ready_prefix(number);
    for key in view.keys_after(&prefix, &prefix, limit - pairs.len())? {
        let id = pair_id(view, &key)?;
        let PooledPair { public_key, private_key } = ready_pair(view, id)?.ok_or_else(|| missing_pair(view, id))?;
        pairs.push(BatchPair { assignment: PairAssignment::Ready(id), public_key, private_key });
    }
    Ok(pairs)
}

pub(super) fn move_all(view: &mut View<'_>, from: u64, to: u64, pairs: Vec<RewrappedPair>) -> Result<u64, StoreError> {
    let (mut source, mut target) = (require(view, from)?, require(view, to)?);
    let accepts = target.state == BatchState::Open && target.purpose == source.purpose && target.quarantined.is_none();
    // A pair on the token cannot be rewrapped. Moving it would lose its row and with it the only reference to the object.
    let wrapped = source.storage == KeyStorage::Wrapped && target.storage == KeyStorage::Wrapped;
    if !accepts || !wrapped || from == to {
        return Err(batch_error(&target, format!("cannot accept pairs of batch {from}")));
    }
    let mut moved = 0;
    for RewrappedPair { assignment, blob } in pairs {
        match assignment {
            PairAssignment::Ready(id) => {
                let Some(row) = ready_row(view, id)?.filter(|_| id.batch == from) else { continue };
                view.remove(&ready_key(id))?;
                let location = KeyLocation::Blob(view.put_blob(to, &blob)?);
                let id = PairId { batch: to, number: target.pairs_added };
                view.put(&ready_key(id), &ReadyRow { location, ..row })?;
                source.ready = source.ready.saturating_sub(1);
                target.ready += 1;
            }
            PairAssignment::Session(id) => {
                if session_row(view, &id)?.is_none_or(|row| row.batch != from) {
                    continue;
                }
                let location = KeyLocation::Blob(view.put_blob(to, &blob)?);
                view.put(&session_key(&id), &SessionRow { batch: to, location })?;
                view.remove(&reserved_key(from, &id))?;
                view.put_bytes(&reserved_key(to, &id), &[])?;
                source.reserved = source.reserved.saturating_sub(1);
                target.reserved += 1;
            }
        }
        target.pairs_added += 1;
        moved += 1;
    }
    put(view, &source)?;
    put(view, &target)?;
    Ok(moved)
}

/// Discards the ready pairs of a batch. Pairs on the token are marked for destruction.
pub(super) fn discard(view: &mut View<'_>, mut batch: Batch) -> Result<Batch, StoreError> {
    for key in view.keys(&ready_prefix(batch.number))? {
        let id = pair_id(view, &key)?;
        if let Some(ReadyRow { location: KeyLocation::Id(token), .. }) = ready_row(view, id)? {
            view.put_bytes(&destroy_key(batch.number, &token), &[])?;
        }
        view.remove(&ready_key(id))?;
    }
    if let Purpose::Pool(kind) = batch.purpose {
        update_pair_counts(view, kind, |counts| counts.discarded += batch.ready)?;
    }
    batch.ready = 0;
    put(view, &batch)?;
    Ok(batch)
}

pub(super) fn to_destroy(view: &View<'_>, limit: usize) -> Result<Vec<PairToDestroy>, StoreError> {
    let mut found = Vec::new();
    for key in view.keys_after(b"x", b"x", limit)? {
        let number = number_at(&key, 1).ok_or_else(|| view.damaged("a pair to destroy".into(), "key too short"))?;
        let id = key.get(9..).unwrap_or_default().to_vec();
        if let Purpose::Pool(kind) = require(view, number)?.purpose {
            found.push(PairToDestroy { kind, pair: TokenPair { label: batch_name(view, number)?.pairs(), id } });
        }
    }
    Ok(found)
}

pub(super) fn confirm_destroyed(view: &mut View<'_>, pair: &TokenPair) -> Result<(), StoreError> {
    match BatchName::from_pair_label(&pair.label) {
        Some(batch) => view.remove(&destroy_key(batch.number, &pair.id)),
        None => Ok(()),
    }
}

/// Reports whether pairs of a batch must still be destroyed on the token.
pub(super) fn has_pairs_to_destroy(view: &View<'_>, number: u64) -> Result<bool, StoreError> {
    let prefix = destroy_key(number, &[]);
    Ok(!view.keys_after(&prefix, &prefix, 1)?.is_empty())
}

/// Stores a private key in a batch. Fails if the key is not wrapped under the batch key, or not on the token under its label.
fn store_private_key(view: &mut View<'_>, batch: &Batch, key: StoredKey) -> Result<KeyLocation, StoreError> {
    let name = batch_name(view, batch.number)?;
    match (key, batch.storage) {
        (StoredKey::Wrapped(WrappedKey { wrapping_key, blob }), KeyStorage::Wrapped) if wrapping_key == name.key() => {
            Ok(KeyLocation::Blob(view.put_blob(batch.number, &blob)?))
        }
        (StoredKey::OnToken(TokenPair { label, id }), KeyStorage::Hsm) if label == name.pairs() => {
            Ok(KeyLocation::Id(id))
        }
        _ => Err(batch_error(batch, "does not match the pair's storage or key".into())),
    }
}

fn load_private_key(view: &View<'_>, number: u64, location: &KeyLocation) -> Result<StoredKey, StoreError> {
    let name = batch_name(view, number)?;
    Ok(match location {
        KeyLocation::Blob(range) => {
            StoredKey::Wrapped(WrappedKey { wrapping_key: name.key(), blob: view.get_blob(number, *range)? })
        }
        KeyLocation::Id(id) => StoredKey::OnToken(TokenPair { label: name.pairs(), id: id.clone() }),
    })
}

fn ready_pair(view: &View<'_>, id: PairId) -> Result<Option<PooledPair>, StoreError> {
    let pair = |row: ReadyRow| {
        let private_key = load_private_key(view, id.batch, &row.location)?;
        Ok(PooledPair { public_key: row.public_key, private_key })
    };
    ready_row(view, id)?.map(pair).transpose()
}

fn ready_row(view: &View<'_>, id: PairId) -> Result<Option<ReadyRow>, StoreError> {
    view.get(&ready_key(id), || format!("pair {} of batch {}", id.number, id.batch))
}

fn session_row(view: &View<'_>, id: &SessionId) -> Result<Option<SessionRow>, StoreError> {
    view.get(&session_key(id), || format!("the key pair of session {id}"))
}

fn pair_id(view: &View<'_>, key: &[u8]) -> Result<PairId, StoreError> {
    let id = number_at(key, 1).zip(number_at(key, 9)).map(|(batch, number)| PairId { batch, number });
    id.ok_or_else(|| view.damaged("a pair key".into(), "pair ID is not 16 bytes"))
}

fn missing_pair(view: &View<'_>, id: PairId) -> StoreError {
    view.damaged(format!("pair {} of batch {}", id.number, id.batch), "listed but missing")
}

fn number_at(key: &[u8], offset: usize) -> Option<u64> {
    key.get(offset..offset + 8)?.try_into().ok().map(u64::from_be_bytes)
}

fn ready_prefix(batch: u64) -> Vec<u8> {
    [b"p", batch.to_be_bytes().as_slice()].concat()
}

fn ready_key(id: PairId) -> Vec<u8> {
    [ready_prefix(id.batch).as_slice(), &id.number.to_be_bytes()].concat()
}

fn session_key(id: &SessionId) -> Vec<u8> {
    [b"w", id.as_bytes().as_slice()].concat()
}

fn reserved_prefix(batch: u64) -> Vec<u8> {
    [b"r", batch.to_be_bytes().as_slice()].concat()
}

fn reserved_key(batch: u64, id: &SessionId) -> Vec<u8> {
    [reserved_prefix(batch).as_slice(), id.as_bytes()].concat()
}

fn destroy_key(batch: u64, id: &[u8]) -> Vec<u8> {
    [b"x", batch.to_be_bytes().as_slice(), id].concat()
}
