//! Reading the log while it grows: entries by what is unique of them, proofs, tiles.

use super::files::BUNDLE;
use super::log::{FOUND_WITHIN, Shared};
use super::snapshot::{Snapshot, damaged};
use crate::store::{Location, LogEntry, Publication, PublishedRecord, StoreError, UniqueKey};
use crate::tlog::{
    HashSource, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, TlogError, Tree, UnsignedCheckpoint, bundle,
    prove_inclusion,
};

impl Shared {
    /// Where the newest entries with these values are. What is just being published, or failed in a way that may have left it on the
    /// disk, is waited for: whoever gives a device up must not be told that it is not public.
    pub(super) async fn find(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Found>>, StoreError> {
        let mut doubted = self.doubted.subscribe();
        let settled = doubted.wait_for(|doubted| keys.iter().all(|key| !doubted.contains(key)));
        if tokio::time::timeout(FOUND_WITHIN, settled).await.is_err() {
            let why = "it is not known yet whether it was published";
            return Err(self.files.place().failed("looking up a record", why));
        }
        self.look_up(keys).await
    }

    /// The same for the sequencer, which nobody publishes beside.
    pub(super) async fn look_up(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Found>>, StoreError> {
        // The picture before the index is asked: what is not in it as recent is in the index. The index before the picture is
        // taken: a new one may know less than the one before it, and the picture tells.
        let index = self.index().await?;
        let head = self.head();
        let recent: Vec<_> = keys.iter().map(|key| head.find_recent(key)).collect();
        let indexed = match recent.iter().all(Option::is_some) {
            true => Vec::new(),
            false => index.find(keys).await?,
        };
        let indexed = indexed.into_iter().chain(std::iter::repeat(None));
        let newest = recent.into_iter().zip(indexed).map(|(recent, indexed)| match recent {
            Some(index) => Some(Found::Recent(index)),
            None => indexed.map(Found::Indexed),
        });
        Ok(newest.collect())
    }

    /// The bytes of an entry that was found.
    pub(super) fn bytes(&self, found: &Found) -> Result<Vec<u8>, StoreError> {
        let head = self.head();
        if let Some(entry) = head.recent(found.index()) {
            return Ok(entry.bytes.clone());
        }
        let failed = |e: std::io::Error| self.files.failed("reading an entry", &e);
        let number = found.index() / BUNDLE;
        match found {
            Found::Indexed(at) => self.files.part(number, at.offset, at.length).map_err(failed),
            Found::Recent(index) => {
                let bytes = self.files.full(TileId::full(TileKind::Entries, number)).map_err(failed)?;
                let at = usize::try_from(index % BUNDLE).unwrap_or(0);
                let entry = bundle::entries(&bytes).nth(at).transpose().map_err(|e| damaged(*index, e))?;
                entry.map(<[u8]>::to_vec).ok_or_else(|| damaged(*index, "its bundle ends before it"))
            }
        }
    }

    /// An entry that was found, and where it stands.
    pub(super) fn entry(&self, found: &Found) -> Result<(LogEntry, Publication), StoreError> {
        let bytes = self.bytes(found)?;
        let entry = LogEntry::from_bytes(&bytes).map_err(|e| damaged(found.index(), e))?;
        let publication = entry.publication(found.index(), &bytes);
        Ok((entry, publication))
    }

    /// The device record that was found; none if the entry is something else.
    pub(super) fn record(&self, found: &Found) -> Result<Option<PublishedRecord>, StoreError> {
        let bytes = self.bytes(found)?;
        if LogEntry::is_audit(&bytes) {
            return Ok(None);
        }
        PublishedRecord::from_bytes(found.index(), bytes).map(Some).map_err(|e| damaged(found.index(), e))
    }

    /// The newest device record of that picture.
    pub(super) fn newest(&self, head: &Snapshot) -> Result<Option<PublishedRecord>, StoreError> {
        if let Some(index) = head.newest_recent() {
            return self.record(&Found::Recent(index));
        }
        // Bundle by bundle, since a daemon that provisions nothing for long still appends audit checkpoints.
        for number in (0..head.base / BUNDLE).rev() {
            let bytes = self.files.full(TileId::full(TileKind::Entries, number));
            let bytes = bytes.map_err(|e| self.files.failed("reading an entry bundle", &e))?;
            let entries = bundle::exactly(&bytes, BUNDLE as usize).map_err(|e| damaged(number * BUNDLE, e))?;
            if let Some(at) = entries.iter().rposition(|entry| !LogEntry::is_audit(entry)) {
                return self.record(&Found::Recent(number * BUNDLE + at as u64));
            }
        }
        Ok(None)
    }

    /// The proof that the tree of the first checkpoint with the entry has it; against the newest one if that was not kept.
    pub(super) fn receipt(&self, head: &Snapshot, index: u64, key: &LogKey) -> Result<Option<LogProof>, StoreError> {
        let Some(newest) = head.checkpoint.as_ref().filter(|newest| index < newest.size()) else { return Ok(None) };
        let kept = match index >= head.base {
            true => head.signed.iter().find(|signed| signed.size > index).copied(),
            false => self.files.first_signed(index).map_err(|e| self.files.failed("reading a checkpoint", &e))?,
        };
        let failed = |e: TlogError| self.files.place().failed("proving an entry", e);
        let Some(kept) = kept.filter(|kept| kept.size <= head.tree.size()) else {
            return self.prove(head, index, newest).map(Some);
        };
        if kept.size == newest.size() {
            return self.prove(head, index, newest).map(Some);
        }
        let tiles = Tiles(self, head);
        let tree = Tree::read(kept.size, &tiles).map_err(failed)?;
        let unsigned = UnsignedCheckpoint::new(key.origin(), kept.size, tree.root()).map_err(failed)?;
        let first = match unsigned.signed(key, &kept.signature) {
            Ok(first) => first,
            Err(error) => {
                tracing::error!(index, %error, "the checkpoint that first covered an entry is damaged; the newest one takes its place");
                return self.prove(head, index, newest).map(Some);
            }
        };
        let hashes = prove_inclusion(&tree, index, &tiles).map_err(failed)?;
        Ok(Some(LogProof::new(index, hashes, &first)))
    }

    /// The proof that the tree of that checkpoint, which is the picture's or an older one, has the entry.
    pub(super) fn prove(
        &self,
        head: &Snapshot,
        index: u64,
        checkpoint: &SignedCheckpoint,
    ) -> Result<LogProof, StoreError> {
        let tiles = Tiles(self, head);
        let older = |size| Tree::read(size, &tiles);
        let proven = match checkpoint.size() {
            size if size == head.tree.size() => prove_inclusion(&head.tree, index, &tiles),
            size => older(size).and_then(|tree| prove_inclusion(&tree, index, &tiles)),
        };
        let hashes = proven.map_err(|e| self.files.place().failed("proving an entry", e))?;
        Ok(LogProof::new(index, hashes, checkpoint))
    }

    /// A tile as the tree of that picture has it.
    pub(super) fn tile(&self, head: &Snapshot, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        let widest = TileId::in_tree(tile.kind(), tile.index(), head.tree.size());
        if widest.is_none_or(|widest| widest.width() < tile.width()) {
            return Ok(None);
        }
        let failed = |e: std::io::Error| self.files.failed("reading a tile", &e);
        let width = usize::from(tile.width());
        match tile.kind() {
            TileKind::Hashes(_) => {
                let mut hashes = match head.tree.partial(tile) {
                    Some(hashes) => hashes.to_vec(),
                    None => self.hashes(head, tile).map_err(failed)?,
                };
                hashes.truncate(width * 32);
                Ok(Some(hashes))
            }
            TileKind::Entries => {
                let first = tile.index() * BUNDLE;
                if first >= head.base {
                    return Ok(Some(recent_bundle(head, first, width)));
                }
                let bytes = self.files.full(tile).map_err(failed)?;
                let damaged = |e| damaged(first, e);
                let length = bundle::entries(&bytes).take(width).map(|entry| entry.map(|e| e.len() + bundle::HEAD));
                let length = length.sum::<Result<usize, _>>().map_err(damaged)?;
                Ok(bytes.get(..length).map(<[u8]>::to_vec))
            }
        }
    }

    /// A full tile of hashes. One that was filled a moment ago may not be a file yet.
    fn hashes(&self, head: &Snapshot, tile: TileId) -> std::io::Result<Vec<u8>> {
        match head.filled.iter().find(|filled| filled.id == tile.as_full()) {
            Some(filled) => Ok(filled.hashes.clone()),
            None => self.files.full(tile),
        }
    }
}

fn recent_bundle(head: &Snapshot, first: u64, width: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in (first..).take(width).filter_map(|index| head.recent(index)) {
        // An entry over the limit never becomes one.
        let _ = bundle::push(&mut bytes, &entry.bytes);
    }
    bytes
}

/// An entry that was found, and how.
#[derive(Clone, Copy)]
pub(super) enum Found {
    Recent(u64),
    Indexed(Location),
}

impl Found {
    pub(super) const fn index(&self) -> u64 {
        match self {
            Self::Recent(index) => *index,
            Self::Indexed(location) => location.index,
        }
    }
}

/// The tiles of a picture.
pub(super) struct Tiles<'a>(pub(super) &'a Shared, pub(super) &'a Snapshot);

impl HashSource for Tiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        match self.0.tile(self.1, tile) {
            Ok(Some(hashes)) => Ok(hashes),
            Ok(None) => Err(format!("{tile} is not there")),
            Err(error) => Err(error.to_string()),
        }
    }
}
