//! Builds the index from the files: after a crash, and for `sppctl registry reindex`.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use spp_format::record::{LogEntry, UniqueKey};
use spp_format::tlog::{LogKey, TileId, TileKind, bundle, leaf_hash};
use spp_log::registry::full_tiles::{BUNDLE, FullTiles};

use super::files::{KIND, LogFiles};
use super::snapshot::damaged;
use crate::store::directory::OsFs;
use crate::store::{IndexEntry, IndexMark, Location, SledIndex, StoreError, StoreOptions};

/// Entries per sync while the index is being built. A large number is faster, because the keys of a sync are inserted in order.
const ENTRIES_PER_SYNC: usize = 50_000;

/// Result of [`reindex`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReindexReport {
    /// Entries in the new index.
    pub entries: u64,
    /// Entries that the old index had and the files lack.
    pub lost: u64,
}

/// Rebuilds the index of a log from its files, with exclusive access. Calls `progress` with the numbers of indexed and of all
/// entries.
///
/// The old index, if readable, contains the expected number of entries: [`StoreError::Damaged`] if the files have fewer, unless
/// `accept_loss` is set.
pub async fn reindex(
    dir: &Path,
    options: &StoreOptions,
    key: &LogKey,
    accept_loss: bool,
    mut progress: impl FnMut(u64, u64),
) -> Result<ReindexReport, StoreError> {
    let files = LogFiles::open(dir, options, Arc::new(OsFs))?;
    let known = match SledIndex::open_or_size(&files.index_dir(), options).await {
        Ok(index) => index.mark().await.map_or(0, |mark| mark.size),
        Err((_, known)) => known,
    };
    let recovered = files.recover(key, if accept_loss { 0 } else { known })?;
    let index = create_empty_index(&files, options)?;
    let (entries, base) = (recovered.tree.size(), recovered.partial_bundle.base());
    let mut builder = IndexBuilder::new(&index, 0, 0);
    for number in 0..base / BUNDLE {
        builder.add_bundle(&files, number).await?;
        progress(builder.next, entries);
    }
    builder.add_all(&recovered.entries).await?;
    builder.finish().await?;
    progress(entries, entries);
    Ok(ReindexReport { entries, lost: known.saturating_sub(entries) })
}

/// Creates an empty index; removes an existing one.
pub(super) fn create_empty_index(files: &LogFiles, options: &StoreOptions) -> Result<SledIndex, StoreError> {
    let dir = files.index_dir();
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(files.failed("removing the old index", &error))
        }
        _ => SledIndex::create(&dir, options),
    }
}

/// Adds entries to the index in their order, many with one sync.
pub(super) struct IndexBuilder<'a> {
    index: &'a SledIndex,
    /// The index of the next entry.
    pub(super) next: u64,
    /// The offset of the next entry in its bundle.
    offset: u32,
    buffered: Vec<IndexEntry>,
    last_leaf: [u8; 32],
}

impl<'a> IndexBuilder<'a> {
    /// Starts at entry `next`, which begins at `offset` in its bundle.
    pub(super) const fn new(index: &'a SledIndex, next: u64, offset: u32) -> Self {
        Self { index, next, offset, buffered: Vec::new(), last_leaf: [0; 32] }
    }

    /// Adds the entries of a full bundle.
    pub(super) async fn add_bundle(&mut self, files: &LogFiles, number: u64) -> Result<(), StoreError> {
        let id = TileId::full(TileKind::Entries, number);
        let bytes = files.read_full(id).map_err(|e| files.failed("reading an entry bundle", &e))?;
        let damaged = |cause: String| StoreError::Damaged { store: KIND.name, what: id.to_string(), cause };
        let entries = bundle::decode_exactly(&bytes, BUNDLE as usize).map_err(|e| damaged(e.to_string()))?;
        self.add_all(&entries).await
    }

    /// Adds encoded entries.
    pub(super) async fn add_all(&mut self, entries: &[impl AsRef<[u8]>]) -> Result<(), StoreError> {
        for entry in entries {
            let bytes = entry.as_ref();
            let decoded = LogEntry::from_bytes(bytes).map_err(|e| damaged(self.next, e))?;
            self.push(&decoded.keys(), bytes);
        }
        if self.buffered.len() >= ENTRIES_PER_SYNC { self.flush().await } else { Ok(()) }
    }

    /// Adds an entry with known keys.
    pub(super) fn push(&mut self, keys: &[UniqueKey], bytes: &[u8]) {
        if self.next.is_multiple_of(BUNDLE) {
            self.offset = 0;
        }
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let prefix = bundle::LENGTH_SIZE as u32;
        let location = Location { index: self.next, offset: self.offset + prefix, length };
        self.buffered.push(IndexEntry { keys: keys.to_vec(), location });
        self.last_leaf = leaf_hash(bytes);
        self.offset += prefix + u32::from(length);
        self.next += 1;
    }

    async fn flush(&mut self) -> Result<(), StoreError> {
        let entries = std::mem::take(&mut self.buffered);
        if entries.is_empty() {
            return Ok(());
        }
        self.index.add(entries, IndexMark { size: self.next, leaf: self.last_leaf }).await
    }

    /// Writes the remaining entries.
    pub(super) async fn finish(mut self) -> Result<(), StoreError> {
        self.flush().await
    }
}

/// Whether the index belongs to this log: its last entry is the log's entry at the same position.
pub(super) fn belongs_to_log(mark: &IndexMark, base: u64, entries: &[Vec<u8>], dir: &Path) -> bool {
    let Some(last) = mark.size.checked_sub(1) else { return true };
    if let Some(entry) = last.checked_sub(base).and_then(|position| entries.get(usize::try_from(position).ok()?)) {
        return leaf_hash(entry) == mark.leaf;
    }
    let tile = FullTiles(dir).read(TileId::full(TileKind::Hashes(0), last / BUNDLE));
    let offset = usize::try_from(last % BUNDLE).unwrap_or(0) * 32;
    tile.is_ok_and(|hashes| hashes.get(offset..offset + 32) == Some(mark.leaf.as_slice()))
}
