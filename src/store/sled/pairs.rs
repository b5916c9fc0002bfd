//! The secret store on sled: pairs.
//!
//! | key | value |
//! |---|---|
//! | `p` + batch, 8 bytes + number, 8 bytes | public key, and where the private half of a pair that is ready is kept |
//! | `w` + session ID | batch, and where the private half of the session's pair is kept |
//! | `r` + batch + session ID | nothing: the session has a pair of the batch |
//! | `x` + batch + CKA_ID | nothing: the pair on the token is to be destroyed |
//!
//! A pair is under one of `p`, `w` and `x`, never under two: every step moves it in one transaction.

use serde::{Deserialize, Serialize};

use super::batches::{self, count, existing, name, put, wrong};
use super::blobs::BlobPlace;
use super::state;
use super::view::View;
use crate::keys::{BatchName, KeyKind, StoredKey, TokenPair, WrappedKey};
use crate::names::SessionId;
use crate::store::{
    Batch, BatchState, CondemnedPair, HeldPair, Holder, KeyStorage, MovedPair, PairId, PairToReserve, PooledPair,
    Purpose, ReserveError, Session, StoreError,
};

/// Where a private half is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Kept {
    /// In the batch's file.
    Blob(BlobPlace),
    /// On the token, under this CKA_ID.
    Id(Vec<u8>),
}

#[derive(Serialize, Deserialize)]
struct ReadyRow {
    public_key: Vec<u8>,
    kept: Kept,
}

#[derive(Serialize, Deserialize)]
struct SessionRow {
    batch: u64,
    kept: Kept,
}

pub(super) fn add(view: &mut View<'_>, number: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
    let mut batch = existing(view, number)?;
    let Purpose::Pool(kind) = batch.purpose else { return Err(wrong(&batch, "is for sessions".into())) };
    if batch.state != BatchState::Open || batch.quarantined.is_some() {
        return Err(wrong(&batch, format!("is {:?} and takes no pairs", batch.state)));
    }
    view.admit_new_device()?;
    let added = pairs.len() as u64;
    for pair in pairs {
        let kept = keep(view, &batch, pair.kept)?;
        let id = PairId { batch: number, number: batch.taken_in };
        view.put(&ready_key(id), &ReadyRow { public_key: pair.public_key, kept })?;
        batch.taken_in += 1;
        batch.ready += 1;
    }
    count(view, kind, |counts| counts.made += added)?;
    put(view, &batch)?;
    Ok(batch)
}

pub(super) fn ready(
    view: &View<'_>,
    kind: KeyKind,
    after: Option<PairId>,
    limit: usize,
) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
    let mut found = Vec::new();
    for number in view.keys(b"b")?.iter().filter_map(|key| number_at(key, 1)) {
        let batch = existing(view, number)?;
        if batch.purpose != Purpose::Pool(kind) || batch.offered() == 0 || after.is_some_and(|id| id.batch > number) {
            continue;
        }
        let begin = match after {
            Some(id) if id.batch == number => ready_key(id),
            _ => ready_prefix(number),
        };
        for key in view.keys_after(&ready_prefix(number), &begin, limit - found.len())? {
            let id = pair_id(view, &key)?;
            found.push((id, ready_pair(view, id)?.ok_or_else(|| lost(view, id))?));
        }
        if found.len() == limit {
            break;
        }
    }
    Ok(found)
}

/// The pair goes to the session, in the transaction that journals it.
pub(super) fn reserve(view: &mut View<'_>, session: &Session, pair: &PairToReserve) -> Result<(), ReserveError> {
    let (mut batch, kept) = match pair {
        PairToReserve::Made { batch, blob } => {
            let batch = batches::get(view, *batch)?.ok_or(ReserveError::PairGone)?;
            // A batch that is sealed has been looked through, or soon will be: a late pair would be missed.
            if batch.state != BatchState::Open || batch.purpose != Purpose::Sessions {
                return Err(ReserveError::PairGone);
            }
            if session.public_key.is_none() {
                return Err(wrong(&batch, "has pairs, and the session has no public key".into()).into());
            }
            let blob = view.put_blob(batch.number, blob)?;
            (Batch { taken_in: batch.taken_in + 1, ..batch }, Kept::Blob(blob))
        }
        PairToReserve::Pooled(id) => {
            let batch = batches::get(view, id.batch)?.filter(|batch| batch.offered() > 0);
            let batch = batch.ok_or(ReserveError::PairGone)?;
            let row = ready_row(view, *id)?.ok_or(ReserveError::PairGone)?;
            if session.public_key.as_ref() != Some(&row.public_key) {
                return Err(view.damaged(format!("pair {} of batch {}", id.number, id.batch), "another pair").into());
            }
            view.remove(&ready_key(*id))?;
            if let Purpose::Pool(kind) = batch.purpose {
                count(view, kind, |counts| counts.reserved += 1)?;
            }
            (Batch { ready: batch.ready.saturating_sub(1), ..batch }, row.kept)
        }
    };
    batch.reserved += 1;
    view.put(&session_key(&session.id), &SessionRow { batch: batch.number, kept })?;
    view.put_bytes(&reserved_key(batch.number, &session.id), &[])?;
    Ok(put(view, &batch)?)
}

/// Whether the session has just that pair.
pub(super) fn is_reserved_as(
    view: &View<'_>,
    id: &SessionId,
    pair: Option<&PairToReserve>,
) -> Result<bool, StoreError> {
    let row = session_row(view, id)?;
    Ok(match (row, pair) {
        (None, None) => true,
        // The session's public key, which the caller compares, says which pair it is. Its bytes can be compared, too, unless
        // it was moved since.
        (Some(SessionRow { batch, kept: Kept::Blob(place) }), Some(PairToReserve::Made { batch: first, blob })) => {
            batch != *first || view.get_blob(batch, place)? == *blob
        }
        (Some(_), Some(PairToReserve::Pooled(_))) => true,
        _ => false,
    })
}

pub(super) fn of_session(view: &View<'_>, id: &SessionId) -> Result<Option<StoredKey>, StoreError> {
    session_row(view, id)?.map(|row| kept_key(view, row.batch, &row.kept)).transpose()
}

/// The session is over: its pair is gone from here, and never becomes ready again.
pub(super) fn erase(view: &mut View<'_>, id: &SessionId, at: u64) -> Result<(), StoreError> {
    let Some(row) = session_row(view, id)? else { return Ok(()) };
    view.remove(&session_key(id))?;
    view.remove(&reserved_key(row.batch, id))?;
    let mut batch = existing(view, row.batch)?;
    batch.reserved = batch.reserved.saturating_sub(1);
    match &row.kept {
        // Until the batch's key is gone an old copy of the disk and the HSM could still yield it together.
        Kept::Blob(_) => batch.erased_since = Some(batch.erased_since.map_or(at, |since| since.min(at))),
        Kept::Id(token) => view.put_bytes(&condemned_key(row.batch, token), &[])?,
    }
    put(view, &batch)
}

pub(super) fn of_batch(view: &View<'_>, number: u64, limit: usize) -> Result<Vec<HeldPair>, StoreError> {
    let mut held = Vec::new();
    let prefix = reserved_prefix(number);
    for key in view.keys_after(&prefix, &prefix, limit)? {
        let bad = |e: crate::names::NameError| view.damaged("a session ID".into(), e);
        let id = SessionId::from_bytes(key.get(prefix.len()..).unwrap_or_default()).map_err(bad)?;
        let missing = || view.damaged(format!("the pair of session {id}"), "it is listed but not there");
        let row = session_row(view, &id)?.ok_or_else(missing)?;
        let session = state::session(view, &id)?.ok_or_else(missing)?;
        let public_key = session.public_key.ok_or_else(missing)?;
        let kept = kept_key(view, number, &row.kept)?;
        held.push(HeldPair { holder: Holder::Session(id), public_key, kept });
    }
    let prefix = ready_prefix(number);
    for key in view.keys_after(&prefix, &prefix, limit - held.len())? {
        let id = pair_id(view, &key)?;
        let PooledPair { public_key, kept } = ready_pair(view, id)?.ok_or_else(|| lost(view, id))?;
        held.push(HeldPair { holder: Holder::Ready(id), public_key, kept });
    }
    Ok(held)
}

pub(super) fn move_all(view: &mut View<'_>, from: u64, to: u64, pairs: Vec<MovedPair>) -> Result<u64, StoreError> {
    let (mut source, mut target) = (existing(view, from)?, existing(view, to)?);
    let takes = target.state == BatchState::Open && target.purpose == source.purpose && target.quarantined.is_none();
    // A pair on the token cannot be wrapped again; its row would be lost, and with it the only name of the object.
    let wrapped = source.keeping == KeyStorage::Wrapped && target.keeping == KeyStorage::Wrapped;
    if !takes || !wrapped || from == to {
        return Err(wrong(&target, format!("takes no pairs of batch {from}")));
    }
    let mut moved = 0;
    for MovedPair { holder, blob } in pairs {
        match holder {
            Holder::Ready(id) => {
                let Some(row) = ready_row(view, id)?.filter(|_| id.batch == from) else { continue };
                view.remove(&ready_key(id))?;
                let kept = Kept::Blob(view.put_blob(to, &blob)?);
                let id = PairId { batch: to, number: target.taken_in };
                view.put(&ready_key(id), &ReadyRow { kept, ..row })?;
                source.ready = source.ready.saturating_sub(1);
                target.ready += 1;
            }
            Holder::Session(id) => {
                if session_row(view, &id)?.is_none_or(|row| row.batch != from) {
                    continue;
                }
                let kept = Kept::Blob(view.put_blob(to, &blob)?);
                view.put(&session_key(&id), &SessionRow { batch: to, kept })?;
                view.remove(&reserved_key(from, &id))?;
                view.put_bytes(&reserved_key(to, &id), &[])?;
                source.reserved = source.reserved.saturating_sub(1);
                target.reserved += 1;
            }
        }
        target.taken_in += 1;
        moved += 1;
    }
    put(view, &source)?;
    put(view, &target)?;
    Ok(moved)
}

/// Gives up what is ready in a batch. Pairs on the token are destroyed there.
pub(super) fn discard(view: &mut View<'_>, mut batch: Batch) -> Result<Batch, StoreError> {
    for key in view.keys(&ready_prefix(batch.number))? {
        let id = pair_id(view, &key)?;
        if let Some(ReadyRow { kept: Kept::Id(token), .. }) = ready_row(view, id)? {
            view.put_bytes(&condemned_key(batch.number, &token), &[])?;
        }
        view.remove(&ready_key(id))?;
    }
    if let Purpose::Pool(kind) = batch.purpose {
        count(view, kind, |counts| counts.discarded += batch.ready)?;
    }
    batch.ready = 0;
    put(view, &batch)?;
    Ok(batch)
}

pub(super) fn condemned(view: &View<'_>, limit: usize) -> Result<Vec<CondemnedPair>, StoreError> {
    let mut found = Vec::new();
    for key in view.keys_after(b"x", b"x", limit)? {
        let number = number_at(&key, 1).ok_or_else(|| view.damaged("a condemned pair".into(), "too short"))?;
        let id = key.get(9..).unwrap_or_default().to_vec();
        if let Purpose::Pool(kind) = existing(view, number)?.purpose {
            found.push(CondemnedPair { kind, pair: TokenPair { label: name(view, number)?.pairs(), id } });
        }
    }
    Ok(found)
}

pub(super) fn destroyed(view: &mut View<'_>, pair: &TokenPair) -> Result<(), StoreError> {
    match BatchName::of_pairs(&pair.label) {
        Some(batch) => view.remove(&condemned_key(batch.number, &pair.id)),
        None => Ok(()),
    }
}

/// Whether pairs of a batch still wait to be destroyed on the token.
pub(super) fn has_condemned(view: &View<'_>, number: u64) -> Result<bool, StoreError> {
    let prefix = condemned_key(number, &[]);
    Ok(!view.keys_after(&prefix, &prefix, 1)?.is_empty())
}

/// Takes a private half into a batch.
fn keep(view: &mut View<'_>, batch: &Batch, kept: StoredKey) -> Result<Kept, StoreError> {
    let name = name(view, batch.number)?;
    match (kept, batch.keeping) {
        (StoredKey::Wrapped(WrappedKey { wrapping_key, blob }), KeyStorage::Wrapped) if wrapping_key == name.key() => {
            Ok(Kept::Blob(view.put_blob(batch.number, &blob)?))
        }
        (StoredKey::OnToken(TokenPair { label, id }), KeyStorage::Hsm) if label == name.pairs() => Ok(Kept::Id(id)),
        _ => Err(wrong(batch, "does not keep such a pair".into())),
    }
}

fn kept_key(view: &View<'_>, number: u64, kept: &Kept) -> Result<StoredKey, StoreError> {
    let name = name(view, number)?;
    Ok(match kept {
        Kept::Blob(place) => {
            StoredKey::Wrapped(WrappedKey { wrapping_key: name.key(), blob: view.get_blob(number, *place)? })
        }
        Kept::Id(id) => StoredKey::OnToken(TokenPair { label: name.pairs(), id: id.clone() }),
    })
}

fn ready_pair(view: &View<'_>, id: PairId) -> Result<Option<PooledPair>, StoreError> {
    let pair = |row: ReadyRow| {
        let kept = kept_key(view, id.batch, &row.kept)?;
        Ok(PooledPair { public_key: row.public_key, kept })
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
    id.ok_or_else(|| view.damaged("a pair's place".into(), "it has not 16 bytes"))
}

fn lost(view: &View<'_>, id: PairId) -> StoreError {
    view.damaged(format!("pair {} of batch {}", id.number, id.batch), "it is listed but not there")
}

fn number_at(key: &[u8], at: usize) -> Option<u64> {
    key.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes)
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

fn condemned_key(batch: u64, id: &[u8]) -> Vec<u8> {
    [b"x", batch.to_be_bytes().as_slice(), id].concat()
}
