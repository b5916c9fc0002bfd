//! The files of a log: appending batches, sealing full bundles, and recovery after a crash.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Advice;
use spp_format::record::LogEntry;
use spp_format::tlog::{FullTile, LogKey, SignedCheckpoint, TileId, TileKind, Tree, bundle, leaf_hash};
use spp_log::registry::atomic_write::{write_new, write_once};
use spp_log::registry::full_tiles::{BUNDLE, FullTiles};
use spp_log::registry::partial_bundle::{
    self, AppendedBatch, PARTIAL_BUNDLE_DIR, newest_partial_bundle, partial_bundle_path,
};

use super::first_checkpoints::{self, CompactCheckpoint};
use crate::store::directory::{Fs, MIN_FREE_BYTES, StoreDir, StoreKind, sync_dir};
use crate::store::{StoreError, StoreOptions};

pub(super) static KIND: StoreKind = StoreKind { name: "public database", marker: "public", format: 2 };

const TILE_DIR: &str = "tile";
const INDEX_DIR: &str = "index";

/// The files of a log. Full tiles and bundles can be read at any time; only the sequencer writes.
pub(super) struct LogFiles {
    store_dir: StoreDir,
}

/// The file that batches are appended to.
pub(super) struct PartialBundleFile {
    file: File,
    /// Length of the complete batches in bytes.
    length: u64,
    /// The index of the first entry; a multiple of 256.
    base: u64,
    /// Number of device records among the entries below `base`.
    records: u64,
}

/// The state of a log as read from its files.
pub(super) struct RecoveredLog {
    /// The tree of all entries.
    pub(super) tree: Tree,
    /// The checkpoint of that tree; `None` before the first one is signed.
    pub(super) checkpoint: Option<SignedCheckpoint>,
    /// The entries that are not in full bundles.
    pub(super) entries: Vec<Vec<u8>>,
    /// The first checkpoints that covered `entries`.
    pub(super) first_checkpoints: Vec<CompactCheckpoint>,
    /// The file for the next batch.
    pub(super) partial_bundle: PartialBundleFile,
}

/// Why a batch was not written.
#[derive(Debug)]
pub(super) enum AppendError {
    /// The disk is full.
    Full(io::Error),
    /// Anything else.
    Failed(io::Error),
}

impl AppendError {
    fn from_io(error: io::Error) -> Self {
        if is_full(&error) { Self::Full(error) } else { Self::Failed(error) }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl LogFiles {
    /// Creates the directory of an empty log, without its index.
    pub(super) fn create(dir: &Path, options: &StoreOptions, fs: Arc<dyn Fs>) -> Result<Self, StoreError> {
        let files = Self { store_dir: StoreDir::create(&KIND, dir, options, fs)? };
        let create = || {
            for directory in [TILE_DIR, PARTIAL_BUNDLE_DIR] {
                fs::create_dir(dir.join(directory))?;
            }
            write_new(&partial_bundle_path(dir, 0), &[])?;
            sync_dir(dir)
        };
        create().map_err(|e| files.store_dir.failed("creating the log", e))?;
        Ok(files)
    }

    /// Completes the creation: from now on the directory is a valid log.
    pub(super) fn finish(&self) -> Result<(), StoreError> {
        self.store_dir.write_marker()
    }

    /// Opens and locks the directory of an existing log.
    pub(super) fn open(dir: &Path, options: &StoreOptions, fs: Arc<dyn Fs>) -> Result<Self, StoreError> {
        Ok(Self { store_dir: StoreDir::open(&KIND, dir, options, fs)? })
    }

    pub(super) const fn store_dir(&self) -> &StoreDir {
        &self.store_dir
    }

    pub(super) fn index_dir(&self) -> PathBuf {
        self.store_dir.dir.join(INDEX_DIR)
    }

    /// Reads the files and completes what a crash interrupted: removes a truncated batch and seals full bundles. Changes nothing
    /// and fails if the files have fewer than `acknowledged` entries.
    pub(super) fn recover(&self, key: &LogKey, acknowledged: u64) -> Result<RecoveredLog, StoreError> {
        let mut recovered = self.read_files(key, acknowledged)?;
        let mut seal = || {
            self.seal_full_bundles(
                recovered.checkpoint.as_ref(),
                &mut recovered.entries,
                &recovered.first_checkpoints,
                &mut recovered.partial_bundle,
            )
        };
        let sealed = match seal() {
            Err(error) if is_full(&error) && self.store_dir.release_reserve() => seal(),
            sealed => sealed,
        };
        match sealed {
            // The partial bundle has all entries. Sealing is retried with each batch, and none is accepted while the disk is
            // full.
            Err(error) if is_full(&error) => tracing::warn!(%error, "disk full: full bundles not written"),
            sealed => sealed.map_err(|e| self.failed("sealing full bundles", &e))?,
        }
        recovered.first_checkpoints.retain(|checkpoint| checkpoint.size > recovered.partial_bundle.base);
        self.store_dir.ensure_reserve();
        Ok(recovered)
    }

    fn read_files(&self, key: &LogKey, acknowledged: u64) -> Result<RecoveredLog, StoreError> {
        let dir = &self.store_dir.dir;
        let failed = |e: io::Error| self.failed("reading the log", &e);
        let (base, path) = newest_partial_bundle(dir).map_err(failed)?;
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        // A batch that was written but not synced when a process died is in the page cache only: the sync puts it on disk before
        // it is accepted below. After a failed sync, the cache may hold lost pages that the kernel marked clean: drop the cache
        // and read the disk.
        file.sync_all().and_then(|()| sync_dir(&dir.join(PARTIAL_BUNDLE_DIR))).map_err(failed)?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).map_err(|e| failed(e.into()))?;
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).map_err(failed)?;
        let file_name = || path.display().to_string();
        let damaged = |cause: String| StoreError::Damaged { store: KIND.name, what: file_name(), cause };
        let mut tree = Tree::read(base, &FullTiles(dir)).map_err(|e| damaged(e.to_string()))?;
        let partial_bundle = partial_bundle::read(&bytes, &tree, key).map_err(damaged)?;
        if partial_bundle.batches.is_empty() && base > 0 {
            return Err(damaged(
                "no checkpoint signed by the log key; check that the configured key is the log's, or restore the file from a copy"
                    .into(),
            ));
        }
        let (mut entries, mut first_checkpoints, mut checkpoint) = (Vec::new(), Vec::new(), None);
        for (batch, batch_checkpoint) in partial_bundle.batches {
            batch.entries.iter().for_each(|entry| drop(tree.push(leaf_hash(entry))));
            entries.extend(batch.entries);
            first_checkpoints.extend(CompactCheckpoint::of(&batch_checkpoint, key));
            checkpoint = Some(batch_checkpoint);
        }
        if tree.size() < acknowledged {
            return Err(damaged(format!(
                "{} entries found, {acknowledged} expected: the files are damaged or an old copy; restore the newest copy \
                 of {}, or accept the loss with sppctl registry reindex --accept-loss",
                tree.size(),
                dir.display()
            )));
        }
        let length = partial_bundle.length as u64;
        let truncated = bytes.len() as u64 - length;
        if truncated > 0 {
            // The batch was not acknowledged: answers follow the sync of the whole batch.
            tracing::warn!(file = %file_name(), bytes = truncated, "removing a batch truncated by a crash");
            file.set_len(length).and_then(|()| file.sync_all()).map_err(failed)?;
        }
        remove_older_partial_bundles(dir, base).map_err(failed)?;
        let records =
            first_checkpoints::records_below(dir, base).map_err(|e| self.failed("counting the device records", &e))?;
        Ok(RecoveredLog {
            tree,
            checkpoint,
            entries,
            first_checkpoints,
            partial_bundle: PartialBundleFile { file, length, base, records },
        })
    }

    /// Appends a batch durably: its entries and its checkpoint, both or neither.
    pub(super) fn append(
        &self,
        partial_bundle: &mut PartialBundleFile,
        batch: &AppendedBatch,
    ) -> Result<(), AppendError> {
        let bytes = batch.to_bytes().map_err(|e| AppendError::Failed(io::Error::other(e)))?;
        self.store_dir.fs.before_apply().map_err(AppendError::from_io)?;
        // A crash before the sync leaves nothing, the whole batch, or a part that the next start removes. No caller has an answer
        // yet, and the checkpoint's signature has not left this process.
        partial_bundle.file.write_all_at(&bytes, partial_bundle.length).map_err(AppendError::from_io)?;
        // Do not retry on this file: after a failed sync the kernel marks the lost pages clean.
        self.store_dir.fs.sync(&partial_bundle.file).map_err(AppendError::from_io)?;
        partial_bundle.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes full bundles and the tiles above them, and begins a new partial bundle with the remaining entries. If this is
    /// interrupted, the old partial bundle still has all entries, and the next start repeats it.
    pub(super) fn seal_full_bundles(
        &self,
        checkpoint: Option<&SignedCheckpoint>,
        entries: &mut Vec<Vec<u8>>,
        first_checkpoints: &[CompactCheckpoint],
        partial_bundle: &mut PartialBundleFile,
    ) -> io::Result<()> {
        let dir = &self.store_dir.dir;
        let Some(checkpoint) = checkpoint.filter(|_| entries.len() as u64 >= BUNDLE) else { return Ok(()) };
        let mut growing = Tree::read(partial_bundle.base, &FullTiles(dir)).map_err(io::Error::other)?;
        let full = entries.len() / BUNDLE as usize * BUNDLE as usize;
        let (mut bytes, mut records) = (Vec::new(), partial_bundle.records);
        for entry in entries.get(..full).unwrap_or_default() {
            bundle::push(&mut bytes, entry).map_err(io::Error::other)?;
            records += u64::from(!LogEntry::is_audit(entry));
            let tiles = growing.push(leaf_hash(entry));
            if tiles.is_empty() {
                continue;
            }
            let index = growing.size() / BUNDLE - 1;
            first_checkpoints::write(dir, index, first_checkpoints, records)?;
            write_once(&dir.join(TileId::full(TileKind::Entries, index).to_string()), &bytes)?;
            for FullTile { id, hashes } in tiles {
                write_once(&dir.join(id.to_string()), &hashes)?;
            }
            bytes.clear();
        }
        let base = growing.size();
        let rest = entries.split_off(full);
        let batch = AppendedBatch { first: base, note: checkpoint.note().to_vec(), entries: rest };
        if checkpoint.size() != base + batch.entries.len() as u64 {
            return Err(io::Error::other("checkpoint size does not match the entries to be written"));
        }
        let bytes = batch.to_bytes().map_err(io::Error::other)?;
        write_new(&partial_bundle_path(dir, base), &bytes)?;
        let file = OpenOptions::new().read(true).write(true).open(partial_bundle_path(dir, base))?;
        let old =
            std::mem::replace(partial_bundle, PartialBundleFile { file, length: bytes.len() as u64, base, records });
        *entries = batch.entries;
        // From here on the new file is the partial bundle, because it is the newest one. The old one is obsolete.
        fs::remove_file(partial_bundle_path(dir, old.base))?;
        self.store_dir.ensure_reserve();
        sync_dir(&dir.join(PARTIAL_BUNDLE_DIR))
    }

    /// Reads a full tile or bundle.
    pub(super) fn read_full(&self, tile: TileId) -> io::Result<Vec<u8>> {
        FullTiles(&self.store_dir.dir).read(tile)
    }

    /// The first checkpoint that covered an entry of a full bundle, if it is stored: a log that was restored from a mirror has
    /// none.
    pub(super) fn first_checkpoint(&self, index: u64) -> io::Result<Option<CompactCheckpoint>> {
        first_checkpoints::first_covering(&self.store_dir.dir, index)
    }

    /// Reads a range of bytes of a full bundle.
    pub(super) fn read_range(&self, bundle: u64, offset: u32, length: u16) -> io::Result<Vec<u8>> {
        let path = self.store_dir.dir.join(TileId::full(TileKind::Entries, bundle).to_string());
        let mut bytes = vec![0; length.into()];
        File::open(path)?.read_exact_at(&mut bytes, offset.into())?;
        Ok(bytes)
    }

    /// The error of an operation on the log; [`StoreError::Full`] if the disk is full.
    pub(super) fn failed(&self, doing: &'static str, error: &io::Error) -> StoreError {
        if is_full(error) { self.full_disk() } else { self.store_dir.failed(doing, error) }
    }

    pub(super) fn full_disk(&self) -> StoreError {
        let free = self.store_dir.fs.free(&self.store_dir.dir).unwrap_or(0);
        StoreError::Full { store: KIND.name, free, floor: MIN_FREE_BYTES.max(free + 1) }
    }
}

impl PartialBundleFile {
    pub(super) const fn base(&self) -> u64 {
        self.base
    }

    pub(super) const fn records(&self) -> u64 {
        self.records
    }
}

/// Removes older partial bundles, which a crash can leave behind.
fn remove_older_partial_bundles(dir: &Path, newest: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir.join(PARTIAL_BUNDLE_DIR))? {
        let path = entry?.path();
        if path != partial_bundle_path(dir, newest) {
            fs::remove_file(path)?;
        }
    }
    sync_dir(&dir.join(PARTIAL_BUNDLE_DIR))
}
