//! A transaction's view of the database: the tree, overlaid with the writes of earlier transactions of the same batch.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::blobs::{Appends, BlobRange, Blobs};
use super::directory::{MIN_FREE_BYTES, StoreDir};
use crate::store::StoreError;

/// Writes of a batch: sled keys with new values, `None` to remove.
pub(super) type Writes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// Maximum bytes per piece of a value. A leaf of sled's tree has up to 17 entries and must stay below 128 KiB (a quarter of a
/// segment): sled moves larger leaves to blob files, which it never syncs.
const PIECE: usize = 4096;

/// Format version of stored values, the first byte of each.
const VERSION: u8 = 1;

/// All changes of a batch of transactions.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) writes: Writes,
    pub(super) blobs: Appends,
}

impl Changes {
    /// Reports whether there is nothing to make durable.
    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.blobs.is_empty()
    }
}

/// The database as one transaction sees it.
///
/// Only the committer writes, and it runs transactions one at a time, each on the results of earlier ones. A check made here
/// therefore still holds when the batch is applied.
pub(super) struct View<'a> {
    db: &'a sled::Db,
    store_dir: &'a StoreDir,
    blobs: &'a Blobs,
    store: &'static str,
    batch: Writes,
    transaction: Writes,
    appends: Appends,
    read_error: std::cell::RefCell<Option<String>>,
}

impl<'a> View<'a> {
    pub(super) fn new(db: &'a sled::Db, store_dir: &'a StoreDir, blobs: &'a Blobs, store: &'static str) -> Self {
        let (read_error, appends) = (std::cell::RefCell::default(), Appends::default());
        Self { db, store_dir, blobs, store, batch: Writes::new(), transaction: Writes::new(), appends, read_error }
    }

    /// Fails with `Full` if the free disk space is below the floor for new devices.
    pub(super) fn admit_new_device(&self) -> Result<(), StoreError> {
        self.store_dir.admit(self.store_dir.options.floor_bytes)
    }

    /// The value of a key.
    pub(super) fn get<T: DeserializeOwned>(
        &self,
        key: &[u8],
        name: impl FnOnce() -> String,
    ) -> Result<Option<T>, StoreError> {
        let Some(bytes) = self.get_bytes(key)? else { return Ok(None) };
        let read = match bytes.split_first() {
            Some((&VERSION, rest)) => postcard::take_from_bytes(rest).map_err(|e| e.to_string()),
            Some((version, _)) => Err(format!("unsupported format {version}, written by a newer version")),
            None => Err("empty value".into()),
        };
        match read {
            Ok((value, [])) => Ok(Some(value)),
            Ok(_) => Err(self.damaged(name(), "trailing bytes")),
            Err(cause) => Err(self.damaged(name(), cause)),
        }
    }

    /// Reports whether the batch changes the key, so that its value is not durable yet.
    pub(super) fn is_pending(&self, key: &[u8]) -> bool {
        let first = piece_key(key, 0);
        [&self.batch, &self.transaction].iter().any(|writes| writes.contains_key(&first))
    }

    /// Sets the value of a key.
    pub(super) fn put<T: Serialize>(&mut self, key: &[u8], value: &T) -> Result<(), StoreError> {
        let bytes = postcard::to_extend(value, vec![VERSION]).map_err(|e| StoreError::Failed {
            store: self.store,
            operation: "encoding a value",
            cause: e.to_string(),
        })?;
        self.put_bytes(key, &bytes)
    }

    /// The raw value of a key, assembled from its pieces.
    pub(super) fn get_bytes(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(first) = self.raw(&piece_key(key, 0))? else { return Ok(None) };
        let (pieces, mut bytes) = self.first_piece(key, &first)?;
        for n in 1..pieces {
            let next =
                self.raw(&piece_key(key, n))?.ok_or_else(|| self.damaged(key_text(key), "a piece is missing"))?;
            bytes.extend_from_slice(&next);
        }
        Ok(Some(bytes))
    }

    /// Sets the raw value of a key.
    pub(super) fn put_bytes(&mut self, key: &[u8], bytes: &[u8]) -> Result<(), StoreError> {
        self.remove(key)?;
        let pieces = u16::try_from(bytes.len().div_ceil(PIECE).max(1)).map_err(|_| StoreError::Failed {
            store: self.store,
            operation: "storing a value",
            cause: format!("value too large: {} bytes", bytes.len()),
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
        // All writes pass here. Below this limit even completing and aborting sessions must fail: a full disk would prevent sled
        // from ever reopening.
        self.store_dir.admit(MIN_FREE_BYTES)?;
        let Some(first) = self.raw(&piece_key(key, 0))? else { return Ok(()) };
        let (pieces, _) = self.first_piece(key, &first)?;
        for n in 0..pieces {
            self.transaction.insert(piece_key(key, n), None);
        }
        Ok(())
    }

    /// All keys with a prefix, in order.
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
        let complete = keys.into_iter().filter_map(|key| key.strip_suffix(&FIRST).map(<[u8]>::to_vec));
        Ok(complete.collect())
    }

    /// Up to `limit` keys with a prefix, after key `after`. Passing the prefix as `after` starts at the first key.
    pub(super) fn keys_after(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        // No listed key is a prefix of another, so this position is after all pieces of `after`.
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

    /// Appends a blob to a batch's file.
    pub(super) fn put_blob(&mut self, batch: u64, blob: &[u8]) -> Result<BlobRange, StoreError> {
        self.store_dir.admit(MIN_FREE_BYTES)?;
        let range = self.blobs.append(&mut self.appends, batch, blob);
        let range = range.map_err(|e| self.blob_failed("opening a batch's file", &e))?;
        // Bytes after this end are invalid: see `trim_blobs`.
        self.put(&blob_end_key(batch), &range.end())?;
        Ok(range)
    }

    /// Truncates every batch's file to its valid length. Called when the database is opened.
    pub(super) fn trim_blobs(&self) -> Result<(), StoreError> {
        let mut ends = BTreeMap::new();
        for key in self.keys(BLOB_END)? {
            let number = key.get(BLOB_END.len()..).and_then(|bytes| bytes.try_into().ok());
            let number = number.ok_or_else(|| self.damaged(key_text(&key), "batch number is not 8 bytes"))?;
            let end = self.get(&key, || key_text(&key))?.ok_or_else(|| self.damaged(key_text(&key), "missing"))?;
            ends.insert(u64::from_be_bytes(number), end);
        }
        self.blobs.trim(&ends).map_err(|e| self.blob_failed("truncating a batch's file after a crash", &e))
    }

    /// Reads a blob of a batch's file.
    pub(super) fn get_blob(&self, batch: u64, range: BlobRange) -> Result<Vec<u8>, StoreError> {
        let read = self.blobs.read(&self.appends, batch, range);
        read.map_err(|e| self.damaged(format!("a wrapped key of batch {batch}"), e))
    }

    /// Overwrites and deletes a batch's file immediately, before the commit. The batch must already be durably empty.
    pub(super) fn remove_blobs(&mut self, batch: u64) -> Result<(), StoreError> {
        self.blobs.remove(batch).map_err(|e| self.blob_failed("removing a batch's file", &e))?;
        self.remove(&blob_end_key(batch))
    }

    fn blob_failed(&self, operation: &'static str, error: &std::io::Error) -> StoreError {
        StoreError::Failed { store: self.store, operation, cause: error.to_string() }
    }

    /// Keeps the transaction's writes. Later transactions see them.
    pub(super) fn accept(&mut self) {
        self.batch.append(&mut self.transaction);
        self.appends.accept();
    }

    /// Discards the transaction's writes. Other transactions are not affected.
    pub(super) fn roll_back(&mut self) {
        self.transaction.clear();
        self.appends.roll_back();
    }

    /// The read error after which the database must be reopened, if any.
    pub(super) fn read_error(&self) -> Option<String> {
        self.read_error.borrow().clone()
    }

    /// All writes of accepted transactions.
    pub(super) fn into_changes(self) -> Changes {
        Changes { writes: self.batch, blobs: self.appends }
    }

    /// A `Damaged` error for a stored value.
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
            first.split_first_chunk().ok_or_else(|| self.damaged(key_text(key), "first piece too short"))?;
        Ok((u16::from_be_bytes(*count), bytes.to_vec()))
    }

    /// Corruption fails only this read. Any other error makes the whole handle unusable.
    fn read_failed(&self, key: &[u8], error: sled::Error) -> StoreError {
        if let sled::Error::Corruption { .. } = error {
            return self.damaged(key_text(key), error);
        }
        *self.read_error.borrow_mut() = Some(format!("reading: {error}"));
        StoreError::Failed { store: self.store, operation: "reading", cause: error.to_string() }
    }
}

/// Key suffix of a value's first piece.
const FIRST: [u8; 2] = 0_u16.to_be_bytes();

/// `e` + batch number: the valid length of the batch's file.
const BLOB_END: &[u8] = b"e";

fn blob_end_key(batch: u64) -> Vec<u8> {
    [BLOB_END, batch.to_be_bytes().as_slice()].concat()
}

/// The suffix has a fixed length, so that pieces of different keys never share a sled key.
fn piece_key(key: &[u8], n: u16) -> Vec<u8> {
    [key, &n.to_be_bytes()].concat()
}

fn key_text(key: &[u8]) -> String {
    format!("entry {}", hex::encode(key))
}
