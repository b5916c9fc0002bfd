//! A picture of the log that never changes: what readers get, and what the sequencer puts the next one beside.

use std::sync::Arc;

use super::files::{KIND, PartialBundleFile};
use super::first_checkpoints::SignedSize;
use crate::store::{LogEntry, StoreError, UniqueKey};
use crate::tlog::{FullTile, SignedCheckpoint, Tree, leaf_hash};

/// The log at one moment: a tree, the checkpoint of it, and the entries that are not in full bundles.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub(super) tree: Tree,
    pub(super) checkpoint: Option<SignedCheckpoint>,
    /// The index of the first of `recent`; everything below is in full bundles.
    pub(super) base: u64,
    pub(super) recent: Vec<Arc<Entry>>,
    /// The checkpoints that were the first to cover them.
    pub(super) signed: Vec<SignedSize>,
    /// Tiles that are full and may not be files yet.
    pub(super) filled: Vec<FullTile>,
    /// So many entries are in the index.
    pub(super) indexed: u64,
    /// So many entries are device records.
    pub(super) records: u64,
}

/// An entry in memory.
pub(super) struct Entry {
    pub(super) bytes: Vec<u8>,
    pub(super) keys: Vec<UniqueKey>,
}

impl Entry {
    pub(super) fn read(bytes: Vec<u8>, index: u64) -> Result<Arc<Self>, StoreError> {
        let entry = LogEntry::from_bytes(&bytes).map_err(|e| damaged(index, e))?;
        Ok(Arc::new(Self { keys: entry.keys(), bytes }))
    }

    pub(super) fn is_record(&self) -> bool {
        !LogEntry::is_audit(&self.bytes)
    }
}

impl Snapshot {
    pub(super) fn recent(&self, index: u64) -> Option<&Arc<Entry>> {
        self.recent.get(usize::try_from(index.checked_sub(self.base)?).ok()?)
    }

    /// One more entry.
    pub(super) fn push(&mut self, entry: Arc<Entry>) {
        self.filled.extend(self.tree.push(leaf_hash(&entry.bytes)));
        self.records += u64::from(entry.is_record());
        self.recent.push(entry);
    }

    /// The newest device record that is not in a full bundle.
    pub(super) fn newest_recent(&self) -> Option<u64> {
        let at = self.recent.iter().rposition(|entry| entry.is_record())?;
        Some(self.base + at as u64)
    }

    /// The newest entry with that value among those that the index may not have yet.
    pub(super) fn find_recent(&self, key: &UniqueKey) -> Option<u64> {
        let from = usize::try_from(self.indexed.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let unindexed = self.recent.iter().enumerate().skip(from);
        let found = unindexed.rev().find(|(_, entry)| entry.keys.contains(key));
        found.map(|(at, _)| self.base + at as u64)
    }
}

impl super::files::Found {
    /// The picture that readers get, with nothing in the index yet, and where the next batch goes.
    pub(super) fn into_head(self) -> Result<(Snapshot, PartialBundleFile), StoreError> {
        let base = self.edge.base();
        let recent = (base..).zip(self.entries).map(|(index, bytes)| Entry::read(bytes, index));
        let recent = recent.collect::<Result<Vec<_>, _>>()?;
        let records = self.edge.records() + recent.iter().filter(|entry| entry.is_record()).count() as u64;
        let (tree, checkpoint, signed, filled) = (self.tree, self.checkpoint, self.signed, Vec::new());
        Ok((Snapshot { tree, checkpoint, base, recent, signed, filled, indexed: 0, records }, self.edge))
    }
}

/// An entry that is not what was written.
pub(super) fn damaged(index: u64, cause: impl ToString) -> StoreError {
    StoreError::Damaged { store: KIND.name, what: format!("entry {index}"), cause: cause.to_string() }
}
