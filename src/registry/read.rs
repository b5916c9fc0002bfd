//! Reads the log while it grows: entries by their unique values, proofs, tiles.

use spp_format::record::{LogEntry, Publication, PublishedRecord, UniqueKey};
use spp_format::tlog::{
    HashSource, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, TlogError, Tree, UnsignedCheckpoint, bundle,
    prove_inclusion,
};
use spp_log::registry::full_tiles::BUNDLE;

use super::shared::{LOOKUP_TIMEOUT, Shared};
use super::snapshot::{Snapshot, damaged};
use crate::store::{Location, StoreError};

impl Shared {
    /// Locates the newest entries with these values. Waits for pending batches, including a failed one that may have reached the
    /// disk: a caller that aborts a session must not see its record as unpublished.
    pub(super) async fn find(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<EntryLocation>>, StoreError> {
        let mut pending = self.pending.subscribe();
        let resolved = pending.wait_for(|pending| keys.iter().all(|key| !pending.contains(key)));
        if tokio::time::timeout(LOOKUP_TIMEOUT, resolved).await.is_err() {
            let why = "publication pending: it is not known yet whether the entry was published; retry later";
            return Err(self.files.store_dir().failed("looking up a record", why));
        }
        self.look_up(keys).await
    }

    /// The same without waiting for pending batches: for the sequencer, the only writer.
    pub(super) async fn look_up(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<EntryLocation>>, StoreError> {
        // Take the snapshot before the look-up: an entry that is not recent in the snapshot is in the index. Take the index
        // before the snapshot: a rebuilt index may lack entries of the old one, and the snapshot shows which.
        let index = self.index().await?;
        let snapshot = self.snapshot();
        let recent: Vec<_> = keys.iter().map(|key| snapshot.find_recent(key)).collect();
        let indexed = match recent.iter().all(Option::is_some) {
            true => Vec::new(),
            false => index.find(keys).await?,
        };
        let indexed = indexed.into_iter().chain(std::iter::repeat(None));
        let newest = recent.into_iter().zip(indexed).map(|(recent, indexed)| match recent {
            Some(index) => Some(EntryLocation::Recent(index)),
            None => indexed.map(EntryLocation::Indexed),
        });
        Ok(newest.collect())
    }

    /// The encoding of a located entry.
    pub(super) fn bytes(&self, location: &EntryLocation) -> Result<Vec<u8>, StoreError> {
        let snapshot = self.snapshot();
        if let Some(entry) = snapshot.recent(location.index()) {
            return Ok(entry.bytes.clone());
        }
        let failed = |e: std::io::Error| self.files.failed("reading an entry", &e);
        let number = location.index() / BUNDLE;
        match location {
            EntryLocation::Indexed(indexed) => {
                self.files.read_range(number, indexed.offset, indexed.length).map_err(failed)
            }
            EntryLocation::Recent(index) => {
                let bytes = self.files.read_full(TileId::full(TileKind::Entries, number)).map_err(failed)?;
                let position = usize::try_from(index % BUNDLE).unwrap_or(0);
                let entry = bundle::entries(&bytes).nth(position).transpose().map_err(|e| damaged(*index, e))?;
                entry.map(<[u8]>::to_vec).ok_or_else(|| damaged(*index, "the bundle has too few entries"))
            }
        }
    }

    /// A located entry and its publication.
    pub(super) fn entry(&self, location: &EntryLocation) -> Result<(LogEntry, Publication), StoreError> {
        let bytes = self.bytes(location)?;
        let entry = LogEntry::from_bytes(&bytes).map_err(|e| damaged(location.index(), e))?;
        let publication = entry.publication(location.index(), &bytes);
        Ok((entry, publication))
    }

    /// A located device record; `None` if the entry is not a device record.
    pub(super) fn record(&self, location: &EntryLocation) -> Result<Option<PublishedRecord>, StoreError> {
        let bytes = self.bytes(location)?;
        if LogEntry::is_audit(&bytes) {
            return Ok(None);
        }
        PublishedRecord::from_bytes(location.index(), bytes).map(Some).map_err(|e| damaged(location.index(), e))
    }

    /// The newest device record of a snapshot.
    pub(super) fn newest(&self, snapshot: &Snapshot) -> Result<Option<PublishedRecord>, StoreError> {
        if let Some(index) = snapshot.newest_recent() {
            return self.record(&EntryLocation::Recent(index));
        }
        // Search bundle by bundle: an idle daemon appends audit checkpoints only, so several bundles may have no device record.
        for number in (0..snapshot.base / BUNDLE).rev() {
            let bytes = self.files.read_full(TileId::full(TileKind::Entries, number));
            let bytes = bytes.map_err(|e| self.files.failed("reading an entry bundle", &e))?;
            let entries = bundle::decode_exactly(&bytes, BUNDLE as usize).map_err(|e| damaged(number * BUNDLE, e))?;
            if let Some(position) = entries.iter().rposition(|entry| !LogEntry::is_audit(entry)) {
                return self.record(&EntryLocation::Recent(number * BUNDLE + position as u64));
            }
        }
        Ok(None)
    }

    /// The inclusion proof for the first checkpoint that covered the entry; for the newest checkpoint if the first one is not
    /// stored.
    pub(super) fn receipt(
        &self,
        snapshot: &Snapshot,
        index: u64,
        key: &LogKey,
    ) -> Result<Option<LogProof>, StoreError> {
        let Some(newest) = snapshot.checkpoint.as_ref().filter(|newest| index < newest.size()) else { return Ok(None) };
        let first = match index >= snapshot.base {
            true => snapshot.first_checkpoints.iter().find(|first| first.size > index).copied(),
            false => self.files.first_checkpoint(index).map_err(|e| self.files.failed("reading a checkpoint", &e))?,
        };
        let failed = |e: TlogError| self.files.store_dir().failed("proving an entry", e);
        let Some(first) = first.filter(|first| first.size <= snapshot.tree.size()) else {
            return self.prove(snapshot, index, newest).map(Some);
        };
        if first.size == newest.size() {
            return self.prove(snapshot, index, newest).map(Some);
        }
        let tiles = Tiles(self, snapshot);
        let tree = Tree::read(first.size, &tiles).map_err(failed)?;
        let unsigned = UnsignedCheckpoint::new(key.origin(), first.size, tree.root()).map_err(failed)?;
        let checkpoint = match unsigned.signed(key, &first.signature) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                tracing::error!(index, %error, "first checkpoint of an entry is damaged; using the newest checkpoint");
                return self.prove(snapshot, index, newest).map(Some);
            }
        };
        let hashes = prove_inclusion(&tree, index, &tiles).map_err(failed)?;
        Ok(Some(LogProof::new(index, hashes, &checkpoint)))
    }

    /// The inclusion proof for `checkpoint`, which is the snapshot's or an older one.
    pub(super) fn prove(
        &self,
        snapshot: &Snapshot,
        index: u64,
        checkpoint: &SignedCheckpoint,
    ) -> Result<LogProof, StoreError> {
        let tiles = Tiles(self, snapshot);
        let proven = match checkpoint.size() {
            size if size == snapshot.tree.size() => prove_inclusion(&snapshot.tree, index, &tiles),
            size => Tree::read(size, &tiles).and_then(|tree| prove_inclusion(&tree, index, &tiles)),
        };
        let hashes = proven.map_err(|e| self.files.store_dir().failed("proving an entry", e))?;
        Ok(LogProof::new(index, hashes, checkpoint))
    }

    /// A tile of the snapshot's tree.
    pub(super) fn tile(&self, snapshot: &Snapshot, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        let widest = TileId::in_tree(tile.kind(), tile.index(), snapshot.tree.size());
        if widest.is_none_or(|widest| widest.width() < tile.width()) {
            return Ok(None);
        }
        let failed = |e: std::io::Error| self.files.failed("reading a tile", &e);
        let width = usize::from(tile.width());
        match tile.kind() {
            TileKind::Hashes(_) => {
                let mut hashes = match snapshot.tree.partial(tile) {
                    Some(hashes) => hashes.to_vec(),
                    None => self.hashes(snapshot, tile).map_err(failed)?,
                };
                hashes.truncate(width * 32);
                Ok(Some(hashes))
            }
            TileKind::Entries => {
                let first = tile.index() * BUNDLE;
                if first >= snapshot.base {
                    return Ok(Some(recent_bundle(snapshot, first, width)));
                }
                let bytes = self.files.read_full(tile).map_err(failed)?;
                let damaged = |e| damaged(first, e);
                let length =
                    bundle::entries(&bytes).take(width).map(|entry| entry.map(|e| e.len() + bundle::LENGTH_SIZE));
                let length = length.sum::<Result<usize, _>>().map_err(damaged)?;
                Ok(bytes.get(..length).map(<[u8]>::to_vec))
            }
        }
    }

    /// A full tile of hashes. A tile that has just become full may not be written to a file yet.
    fn hashes(&self, snapshot: &Snapshot, tile: TileId) -> std::io::Result<Vec<u8>> {
        match snapshot.unwritten_tiles.iter().find(|full| full.id == tile.as_full()) {
            Some(full) => Ok(full.hashes.clone()),
            None => self.files.read_full(tile),
        }
    }
}

fn recent_bundle(snapshot: &Snapshot, first: u64, width: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in (first..).take(width).filter_map(|index| snapshot.recent(index)) {
        // Cannot fail: publication rejects entries over the size limit.
        let _ = bundle::push(&mut bytes, &entry.bytes);
    }
    bytes
}

/// Where a look-up located an entry.
#[derive(Clone, Copy)]
pub(super) enum EntryLocation {
    Recent(u64),
    Indexed(Location),
}

impl EntryLocation {
    pub(super) const fn index(&self) -> u64 {
        match self {
            Self::Recent(index) => *index,
            Self::Indexed(location) => location.index,
        }
    }
}

/// The tiles of a snapshot.
pub(super) struct Tiles<'a>(pub(super) &'a Shared, pub(super) &'a Snapshot);

impl HashSource for Tiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        match self.0.tile(self.1, tile) {
            Ok(Some(hashes)) => Ok(hashes),
            Ok(None) => Err(format!("{tile} not found")),
            Err(error) => Err(error.to_string()),
        }
    }
}
