//! KeyStorage the index level with the files: catching up after a crash, and making it anew.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use super::files::{BUNDLE, FullTiles, KIND, LogFiles};
use super::snapshot::damaged;
use crate::store::directory::System;
use crate::store::{IndexEntry, IndexMark, Location, LogEntry, SledIndex, StoreError, StoreOptions, UniqueKey};
use crate::tlog::{LogKey, TileId, TileKind, bundle, leaf_hash};

/// Entries that are put in with one sync while the index is being made: many, since sorted keys go in faster.
const CHUNK: usize = 50_000;

/// What making the index anew did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reindexed {
    /// Entries that are in it.
    pub entries: u64,
    /// Entries that the old index knew and that are gone.
    pub lost: u64,
}

/// Makes the index of a log anew from its files, with nobody else using it. Tells now and again how many entries of how many are in.
///
/// The old index, if it can be read, knows how many entries there must be: [`StoreError::Damaged`] if there are fewer, unless the loss
/// is accepted.
pub async fn reindex(
    dir: &Path,
    options: &StoreOptions,
    key: &LogKey,
    accept_loss: bool,
    mut progress: impl FnMut(u64, u64),
) -> Result<Reindexed, StoreError> {
    let files = LogFiles::take(dir, options, Arc::new(System))?;
    let known = match SledIndex::open(&files.index_dir(), options) {
        Ok(index) => index.mark().await.map_or(0, |mark| mark.size),
        Err(_) => 0,
    };
    let found = files.recover(key, if accept_loss { 0 } else { known })?;
    let index = make_anew(&files, options)?;
    let (entries, base) = (found.tree.size(), found.edge.base());
    let mut builder = Builder::new(&index, 0, 0);
    for number in 0..base / BUNDLE {
        builder.add_bundle(&files, number).await?;
        progress(builder.next, entries);
    }
    builder.add_all(&found.entries).await?;
    builder.finish().await?;
    progress(entries, entries);
    Ok(Reindexed { entries, lost: known.saturating_sub(entries) })
}

/// An empty index in the place of whatever is there.
pub(super) fn make_anew(files: &LogFiles, options: &StoreOptions) -> Result<SledIndex, StoreError> {
    let dir = files.index_dir();
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(files.failed("removing the old index", &error))
        }
        _ => SledIndex::create(&dir, options),
    }
}

/// Puts entries in, in their order, many with one sync.
pub(super) struct Builder<'a> {
    index: &'a SledIndex,
    /// The index of the next entry.
    pub(super) next: u64,
    /// Where it begins in its bundle.
    offset: u32,
    waiting: Vec<IndexEntry>,
    leaf: [u8; 32],
}

impl<'a> Builder<'a> {
    /// Goes on with that entry, which begins there in its bundle.
    pub(super) const fn new(index: &'a SledIndex, next: u64, offset: u32) -> Self {
        Self { index, next, offset, waiting: Vec::new(), leaf: [0; 32] }
    }

    /// Takes a full bundle.
    pub(super) async fn add_bundle(&mut self, files: &LogFiles, number: u64) -> Result<(), StoreError> {
        let id = TileId::full(TileKind::Entries, number);
        let bytes = files.full(id).map_err(|e| files.failed("reading an entry bundle", &e))?;
        let damaged = |cause: String| StoreError::Damaged { store: KIND.name, what: id.to_string(), cause };
        let entries = bundle::exactly(&bytes, BUNDLE as usize).map_err(|e| damaged(e.to_string()))?;
        self.add_all(&entries).await
    }

    /// Takes entries.
    pub(super) async fn add_all(&mut self, entries: &[impl AsRef<[u8]>]) -> Result<(), StoreError> {
        for entry in entries {
            let bytes = entry.as_ref();
            let known = LogEntry::from_bytes(bytes).map_err(|e| damaged(self.next, e))?;
            self.push(&known.keys(), bytes);
        }
        if self.waiting.len() >= CHUNK { self.flush().await } else { Ok(()) }
    }

    /// Takes an entry whose keys are known.
    pub(super) fn push(&mut self, keys: &[UniqueKey], bytes: &[u8]) {
        if self.next.is_multiple_of(BUNDLE) {
            self.offset = 0;
        }
        let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        let head = bundle::HEAD as u32;
        let location = Location { index: self.next, offset: self.offset + head, length };
        self.waiting.push(IndexEntry { keys: keys.to_vec(), location });
        self.leaf = leaf_hash(bytes);
        self.offset += head + u32::from(length);
        self.next += 1;
    }

    async fn flush(&mut self) -> Result<(), StoreError> {
        let entries = std::mem::take(&mut self.waiting);
        if entries.is_empty() {
            return Ok(());
        }
        self.index.add(entries, IndexMark { size: self.next, leaf: self.leaf }).await
    }

    /// Everything is in when this returns.
    pub(super) async fn finish(mut self) -> Result<(), StoreError> {
        self.flush().await
    }
}

/// Whether the index is of this log: the last entry that it knows is the one at that place.
pub(super) fn is_of_this_log(mark: &IndexMark, base: u64, entries: &[Vec<u8>], dir: &Path) -> bool {
    let Some(last) = mark.size.checked_sub(1) else { return true };
    if let Some(entry) = last.checked_sub(base).and_then(|at| entries.get(usize::try_from(at).ok()?)) {
        return leaf_hash(entry) == mark.leaf;
    }
    let tile = FullTiles(dir).read(TileId::full(TileKind::Hashes(0), last / BUNDLE));
    let at = usize::try_from(last % BUNDLE).unwrap_or(0) * 32;
    tile.is_ok_and(|hashes| hashes.get(at..at + 32) == Some(mark.leaf.as_slice()))
}
