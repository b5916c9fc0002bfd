//! What a transaction sees: the tree, and over it what earlier transactions of the same batch wrote.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::blobs::{Appends, BlobPlace, Blobs};
use super::directory::{LAST_ROOM, StoreDir};
use crate::store::StoreError;

/// What a batch changes: keys as sled has them, `None` for removed ones.
pub(super) type Writes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// Bytes of a value's piece. A leaf of sled's tree has up to 17 entries and must stay below 128 KiB (a quarter of a segment):
/// above that sled puts it into a blob file, which it never syncs.
const PIECE: usize = 4096;

/// A format of stored values, the first byte of each.
const VERSION: u8 = 1;

/// What a batch of transactions changes.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) writes: Writes,
    pub(super) blobs: Appends,
}

impl Changes {
    /// Whether there is nothing to make durable.
    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.blobs.is_empty()
    }
}

/// The database as one transaction sees it.
///
/// The committer runs transactions one after the other, each over the results of those before it, and nobody else writes:
/// a check made here still holds when the batch is applied.
pub(super) struct View<'a> {
    db: &'a sled::Db,
    place: &'a StoreDir,
    blobs: &'a Blobs,
    store: &'static str,
    batch: Writes,
    transaction: Writes,
    appends: Appends,
    broken: std::cell::RefCell<Option<String>>,
}

impl<'a> View<'a> {
    pub(super) fn new(db: &'a sled::Db, place: &'a StoreDir, blobs: &'a Blobs, store: &'static str) -> Self {
        let (broken, appends) = (std::cell::RefCell::default(), Appends::default());
        Self { db, place, blobs, store, batch: Writes::new(), transaction: Writes::new(), appends, broken }
    }

    /// Refuses a new device when the disk has less free room than the floor.
    pub(super) fn admit_new_device(&self) -> Result<(), StoreError> {
        self.place.admit(self.place.options.floor_bytes)
    }

    /// The value of a key.
    pub(super) fn get<T: DeserializeOwned>(
        &self,
        key: &[u8],
        what: impl FnOnce() -> String,
    ) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.get_bytes(key)? else { return Ok(None) };
        let read = match bytes.split_first() {
            Some((&VERSION, rest)) => postcard::take_from_bytes(rest).map_err(|e| e.to_string()),
            Some((version, _)) => Err(format!("format {version} is not known; a newer version wrote it")),
            None => Err("it is empty".into()),
        };
        match read {
            Ok((value, [])) => Ok(Some(value)),
            Ok(_) => Err(self.damaged(what(), "bytes are left over")),
            Err(cause) => Err(self.damaged(what(), cause)),
        }
    }

    /// Whether a key's value is not durable yet.
    pub(super) fn is_pending(&self, key: &[u8]) -> bool {
        let first = piece_key(key, 0);
        [&self.batch, &self.transaction].iter().any(|writes| writes.contains_key(&first))
    }

    /// Sets the value of a key.
    pub(super) fn put<T: Serialize>(&mut self, key: &[u8], value: &T) -> Result<(), StoreError> {
        let bytes = postcard::to_extend(value, vec![VERSION]).map_err(|e| StoreError::Failed {
            store: self.store,
            doing: "encoding a value",
            cause: e.to_string(),
        })?;
        self.put_bytes(key, &bytes)
    }

    /// A value as it is, put together from its pieces.
    pub(super) fn get_bytes(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(first) = self.raw(&piece_key(key, 0))? else { return Ok(None) };
        let (pieces, mut bytes) = self.first_piece(key, &first)?;
        for n in 1..pieces {
            let next = self.raw(&piece_key(key, n))?.ok_or_else(|| self.damaged(name(key), "a piece is missing"))?;
            bytes.extend_from_slice(&next);
        }
        Ok(Some(bytes))
    }

    /// Sets a value as it is.
    pub(super) fn put_bytes(&mut self, key: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
        self.remove(key)?;
        let pieces = u16::try_from(bytes.len().div_ceil(PIECE).max(1)).map_err(|_| StoreError::Failed {
            store: self.store,
            doing: "storing a value",
            cause: format!("it has {} bytes", bytes.len()),
        })?;
        let mut rest = bytes;
        for n in 0..pieces {
            let (piece, more) = rest.split_at(rest.len().min(PIECE));
            let head: &[u8] = if n == 0 { &pieces.to_be_bytes() } else { &[] };
            self.transaction.insert(piece_key(key, n), Some([head, piece].concat()));
            rest = more;
        }
        Ok(())
    }

    /// Removes a key and its value.
    pub(super) fn remove(&mut self, key: &[u8]) -> Result<(), StoreError> {
        // All writes pass here: beyond this point not even completing and aborting may fill the disk, or sled could never
        // be opened again.
        self.place.admit(LAST_ROOM)?;
        let Some(first) = self.raw(&piece_key(key, 0))? else { return Ok(()) };
        let (pieces, _) = self.first_piece(key, &first)?;
        for n in 0..pieces {
            self.transaction.insert(piece_key(key, n), None);
        }
        Ok(())
    }

    /// All keys that begin with a prefix, in order.
    pub(super) fn keys(&self, prefix: &[u8]) -> Result<Vec<Vec<u8>>, StoreError> {
        let mut keys = BTreeSet::new();
        for entry in self.db.scan_prefix(prefix).keys() {
            keys.insert(entry.map_err(|e| self.read_failed(prefix, e))?.to_vec());
        }
        for writes in [&self.batch, &self.transaction] {
            for (key, value) in writes.range(prefix.to_vec()..).take_while(|(key, _)| key.starts_with(prefix)) {
                match value {
                    Some(_) => keys.insert(key.clone()),
                    None => keys.remove(key),
                };
            }
        }
        let whole = keys.into_iter().filter_map(|key| key.strip_suffix(&FIRST).map(<[u8]>::to_vec));
        Ok(whole.collect())
    }

    /// The first keys that begin with a prefix, after one of them; from the first one on after the prefix itself.
    pub(super) fn keys_after(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        // No key that is listed begins with another one, so this is behind all pieces of that one.
        let begin = if after == prefix { prefix.to_vec() } else { piece_key(after, u16::MAX) };
        let overlay = [&self.batch, &self.transaction].into_iter().flat_map(|writes| writes.range(begin.clone()..));
        let written: BTreeMap<_, _> = overlay.filter(|(key, _)| key.starts_with(prefix)).collect();
        let mut keys: BTreeSet<Vec<u8>> =
            written.iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key.to_vec()).collect();
        let mut found = 0;
        for entry in self.db.range(begin..).keys() {
            let key = entry.map_err(|e| self.read_failed(prefix, e))?;
            if found == limit || !key.starts_with(prefix) {
                break;
            }
            if !written.contains_key(&key.to_vec()) {
                keys.insert(key.to_vec());
                found += usize::from(key.ends_with(&FIRST));
            }
        }
        Ok(keys.into_iter().filter_map(|key| key.strip_suffix(&FIRST).map(<[u8]>::to_vec)).take(limit).collect())
    }

    /// Adds a blob to a batch's file.
    pub(super) fn put_blob(&mut self, batch: u64, blob: &[u8]) -> Result<BlobPlace, StoreError> {
        self.place.admit(LAST_ROOM)?;
        let place = self.blobs.append(&mut self.appends, batch, blob);
        let place = place.map_err(|e| self.blob_failed("opening a batch's file", &e))?;
        // What is behind it in the file does not count: see `trim_blobs`.
        self.put(&blob_end_key(batch), &place.end())?;
        Ok(place)
    }

    /// Ends every batch's file where the bytes that count do. When the database is opened.
    pub(super) fn trim_blobs(&self) -> Result<(), StoreError> {
        let mut ends = BTreeMap::new();
        for key in self.keys(BLOB_END)? {
            let number = key.get(BLOB_END.len()..).and_then(|bytes| bytes.try_into().ok());
            let number = number.ok_or_else(|| self.damaged(name(&key), "it has not 8 bytes"))?;
            let end = self.get(&key, || name(&key))?.ok_or_else(|| self.damaged(name(&key), "it is not there"))?;
            ends.insert(u64::from_be_bytes(number), end);
        }
        self.blobs.trim(&ends).map_err(|e| self.blob_failed("cutting off what a crash left in a batch's file", &e))
    }

    /// A blob of a batch's file.
    pub(super) fn get_blob(&self, batch: u64, place: BlobPlace) -> Result<Vec<u8>, StoreError> {
        let read = self.blobs.read(&self.appends, batch, place);
        read.map_err(|e| self.damaged(format!("a wrapped key of batch {batch}"), e))
    }

    /// Overwrites and removes a batch's file, at once: the batch must be known to be empty by what is durable already.
    pub(super) fn remove_blobs(&mut self, batch: u64) -> Result<(), StoreError> {
        self.blobs.remove(batch).map_err(|e| self.blob_failed("removing a batch's file", &e))?;
        self.remove(&blob_end_key(batch))
    }

    fn blob_failed(&self, doing: &'static str, error: &std::io::Error) -> StoreError {
        StoreError::Failed { store: self.store, doing, cause: error.to_string() }
    }

    /// The transaction is accepted: those after it see what it wrote.
    pub(super) fn keep(&mut self) {
        self.batch.append(&mut self.transaction);
        self.appends.keep();
    }

    /// The transaction is refused: nothing of it remains, and the others are not disturbed.
    pub(super) fn forget(&mut self) {
        self.transaction.clear();
        self.appends.forget();
    }

    /// Why the database must be opened again, if reading it failed.
    pub(super) fn broken(&self) -> Option<String> {
        self.broken.borrow().clone()
    }

    /// All that the kept transactions wrote.
    pub(super) fn into_changes(self) -> Changes {
        Changes { writes: self.batch, blobs: self.appends }
    }

    /// An error about a stored value.
    pub(super) fn damaged(&self, what: String, cause: impl ToString) -> StoreError {
        StoreError::Damaged { store: self.store, what, cause: cause.to_string() }
    }

    fn raw(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(written) = self.transaction.get(key).or_else(|| self.batch.get(key)) {
            return Ok(written.clone());
        }
        let found = self.db.get(key).map_err(|e| self.read_failed(key, e))?;
        Ok(found.map(|value| value.to_vec()))
    }

    fn first_piece(&self, key: &[u8], first: &[u8]) -> Result<(u16, Vec<u8>), StoreError> {
        let (count, bytes) =
            first.split_first_chunk().ok_or_else(|| self.damaged(name(key), "its first piece is too short"))?;
        Ok((u16::from_be_bytes(*count), bytes.to_vec()))
    }

    /// Damage concerns the one who reads it; any other error concerns the whole handle.
    fn read_failed(&self, key: &[u8], error: sled::Error) -> StoreError {
        if let sled::Error::Corruption { .. } = error {
            return self.damaged(name(key), error);
        }
        *self.broken.borrow_mut() = Some(format!("reading: {error}"));
        StoreError::Failed { store: self.store, doing: "reading", cause: error.to_string() }
    }
}

/// What the key of a first piece ends with.
const FIRST: [u8; 2] = 0_u16.to_be_bytes();

/// `e` + batch: the end of its file.
const BLOB_END: &[u8] = b"e";

fn blob_end_key(batch: u64) -> Vec<u8> {
    [BLOB_END, batch.to_be_bytes().as_slice()].concat()
}

/// The suffix has a fixed length, so that no two keys share a piece.
fn piece_key(key: &[u8], n: u16) -> Vec<u8> {
    [key, &n.to_be_bytes()].concat()
}

fn name(key: &[u8]) -> String {
    format!("the entry {}", hex::encode(key))
}
