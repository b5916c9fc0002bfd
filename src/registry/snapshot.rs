//! An immutable snapshot of the log. Readers use the current one; the sequencer replaces it with the next one.

use std::sync::Arc;

use spp_format::record::{LogEntry, UniqueKey};
use spp_format::tlog::{FullTile, SignedCheckpoint, Tree, leaf_hash};

use super::files::{KIND, PartialBundleFile};
use super::first_checkpoints::CompactCheckpoint;
use crate::store::StoreError;

/// The log at one moment: its tree, the tree's checkpoint, and the entries that are not in full bundles.
#[derive(Clone)]
pub(super) struct Snapshot {
    pub(super) tree: Tree,
    pub(super) checkpoint: Option<SignedCheckpoint>,
    /// The index of the first entry of `recent`. All entries below it are in full bundles.
    pub(super) base: u64,
    pub(super) recent: Vec<Arc<IndexedEntry>>,
    /// The first checkpoints that covered the `recent` entries.
    pub(super) first_checkpoints: Vec<CompactCheckpoint>,
    /// Full tiles that may not be written to files yet.
    pub(super) unwritten_tiles: Vec<FullTile>,
    /// Number of entries in the index.
    pub(super) indexed: u64,
    /// Number of device records in the log.
    pub(super) records: u64,
}

/// An encoded entry and its index keys.
pub(super) struct IndexedEntry {
    pub(super) bytes: Vec<u8>,
    pub(super) keys: Vec<UniqueKey>,
}

impl IndexedEntry {
    pub(super) fn decode(bytes: Vec<u8>, index: u64) -> Result<Arc<Self>, StoreError> {
        let entry = LogEntry::from_bytes(&bytes).map_err(|e| damaged(index, e))?;
        Ok(Arc::new(Self { keys: entry.keys(), bytes }))
    }

    pub(super) fn is_record(&self) -> bool {
        !LogEntry::is_audit(&self.bytes)
    }
}

impl Snapshot {
    pub(super) fn recent(&self, index: u64) -> Option<&Arc<IndexedEntry>> {
        self.recent.get(usize::try_from(index.checked_sub(self.base)?).ok()?)
    }

    /// Appends an entry.
    pub(super) fn push(&mut self, entry: Arc<IndexedEntry>) {
        self.unwritten_tiles.extend(self.tree.push(leaf_hash(&entry.bytes)));
        self.records += u64::from(entry.is_record());
        self.recent.push(entry);
    }

    /// The newest device record that is not in a full bundle.
    pub(super) fn newest_recent(&self) -> Option<u64> {
        let position = self.recent.iter().rposition(|entry| entry.is_record())?;
        Some(self.base + position as u64)
    }

    /// The newest entry with this key among the entries that may not be indexed yet.
    pub(super) fn find_recent(&self, key: &UniqueKey) -> Option<u64> {
        let first_unindexed = usize::try_from(self.indexed.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let unindexed = self.recent.iter().enumerate().skip(first_unindexed);
        let found = unindexed.rev().find(|(_, entry)| entry.keys.contains(key));
        found.map(|(position, _)| self.base + position as u64)
    }
}

impl super::files::RecoveredLog {
    /// Converts the recovered log into a snapshot with no indexed entries, and the file for the next batch.
    pub(super) fn into_snapshot(self) -> Result<(Snapshot, PartialBundleFile), StoreError> {
        let base = self.partial_bundle.base();
        let recent = (base..).zip(self.entries).map(|(index, bytes)| IndexedEntry::decode(bytes, index));
        let recent = recent.collect::<Result<Vec<_>, _>>()?;
        let records = self.partial_bundle.records() + recent.iter().filter(|entry| entry.is_record()).count() as u64;
        let (tree, checkpoint, first_checkpoints, unwritten_tiles) =
            (self.tree, self.checkpoint, self.first_checkpoints, Vec::new());
        Ok((
            Snapshot { tree, checkpoint, base, recent, first_checkpoints, unwritten_tiles, indexed: 0, records },
            self.partial_bundle,
        ))
    }
}

/// The error for an entry that differs from what was written.
pub(super) fn damaged(index: u64, cause: impl ToString) -> StoreError {
    StoreError::Damaged { store: KIND.name, what: format!("entry {index}"), cause: cause.to_string() }
}
