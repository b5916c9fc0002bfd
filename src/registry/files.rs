//! The log's directory: what is written when, and what a crash leaves of it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Advice;

use super::first_checkpoints::{self, SignedSize};
use super::partial_bundle::{self, Batch};
use crate::store::directory::{Fs, LAST_ROOM, StoreDir, StoreKind, sync_dir};
use crate::store::{LogEntry, StoreError, StoreOptions};
use crate::tlog::{
    FULL_WIDTH, FullTile, HashSource, LogKey, SignedCheckpoint, TileId, TileKind, Tree, TreeHash, bundle, leaf_hash,
};

pub(super) static KIND: StoreKind = StoreKind { name: "public database", marker: "public", format: 2 };

const EDGE: &str = "edge";
const TILE: &str = "tile";
const INDEX: &str = "index";
/// Entries of a full bundle.
pub(super) const BUNDLE: u64 = FULL_WIDTH as u64;

/// The files of a log. What is full may be read by anybody at any time; only the sequencer writes.
pub(super) struct LogFiles {
    place: StoreDir,
}

/// The file that batches are appended to.
pub(super) struct PartialBundleFile {
    file: File,
    /// Bytes of whole batches.
    length: u64,
    /// The index of its first entry; a multiple of 256.
    base: u64,
    /// So many entries below that are device records.
    records: u64,
}

/// What the files hold.
pub(super) struct Found {
    /// The tree with every entry.
    pub(super) tree: Tree,
    /// The checkpoint of that tree; none before the first one was signed.
    pub(super) checkpoint: Option<SignedCheckpoint>,
    /// The entries that are not in full bundles.
    pub(super) entries: Vec<Vec<u8>>,
    /// The checkpoints that covered them first.
    pub(super) signed: Vec<SignedSize>,
    /// Where the next batch goes.
    pub(super) edge: PartialBundleFile,
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
    fn of(error: io::Error) -> Self {
        if is_full(&error) { Self::Full(error) } else { Self::Failed(error) }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl LogFiles {
    /// Makes the directory of an empty log, without its index.
    pub(super) fn create(dir: &Path, options: &StoreOptions, door: Arc<dyn Fs>) -> Result<Self, StoreError> {
        let files = Self { place: StoreDir::make(&KIND, dir, options, door)? };
        let make = || {
            for directory in [TILE, EDGE] {
                fs::create_dir(dir.join(directory))?;
            }
            write_new(&edge_path(dir, 0), &[])?;
            sync_dir(dir)
        };
        make().map_err(|e| files.place.failed("making the log", e))?;
        Ok(files)
    }

    /// The last step of making it: from now on it counts.
    pub(super) fn finish(&self) -> Result<(), StoreError> {
        self.place.finish()
    }

    /// Takes over the directory of an existing log.
    pub(super) fn take(dir: &Path, options: &StoreOptions, door: Arc<dyn Fs>) -> Result<Self, StoreError> {
        Ok(Self { place: StoreDir::take(&KIND, dir, options, door)? })
    }

    pub(super) const fn place(&self) -> &StoreDir {
        &self.place
    }

    pub(super) fn index_dir(&self) -> PathBuf {
        self.place.dir.join(INDEX)
    }

    /// Reads what is there and finishes what a crash left: a batch that was cut off goes, bundles that became full are written.
    /// So many entries were acknowledged: with fewer nothing is touched.
    pub(super) fn recover(&self, key: &LogKey, acknowledged: u64) -> Result<Found, StoreError> {
        let mut found = self.find(key, acknowledged)?;
        let mut finish =
            || self.turn_over(found.checkpoint.as_ref(), &mut found.entries, &found.signed, &mut found.edge);
        let finished = match finish() {
            Err(error) if is_full(&error) && self.place.give_up_reserve() => finish(),
            finished => finished,
        };
        match finished {
            // The edge has all of it. It is tried again with each batch, and no new ones come while there is no room.
            Err(error) if is_full(&error) => tracing::warn!(%error, "there is no room for full bundles"),
            finished => finished.map_err(|e| self.failed("finishing what was begun", &e))?,
        }
        found.signed.retain(|signed| signed.size > found.edge.base);
        self.place.keep_reserve();
        Ok(found)
    }

    fn find(&self, key: &LogKey, acknowledged: u64) -> Result<Found, StoreError> {
        let dir = &self.place.dir;
        let failed = |e: io::Error| self.failed("reading the log", &e);
        let (base, path) = newest_edge(dir).map_err(failed)?;
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        // A batch that was written and not synced when a process died is in the cache alone: what is believed below is on the disk by
        // then. After a failed sync the cache may hold what never reached it and counts as clean: it is read anew.
        file.sync_all().and_then(|()| sync_dir(&dir.join(EDGE))).map_err(failed)?;
        rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).map_err(|e| failed(e.into()))?;
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).map_err(failed)?;
        let what = || path.display().to_string();
        let damaged = |cause: String| StoreError::Damaged { store: KIND.name, what: what(), cause };
        let mut tree = Tree::read(base, &FullTiles(dir)).map_err(|e| damaged(e.to_string()))?;
        let edge = partial_bundle::read(&bytes, &tree, key).map_err(damaged)?;
        if edge.batches.is_empty() && base > 0 {
            return Err(damaged(
                "it has no checkpoint that the log key has signed; was another key configured, or is the file damaged?"
                    .into(),
            ));
        }
        let (mut entries, mut signed, mut checkpoint) = (Vec::new(), Vec::new(), None);
        for (batch, of_batch) in edge.batches {
            batch.entries.iter().for_each(|entry| drop(tree.push(leaf_hash(entry))));
            entries.extend(batch.entries);
            signed.extend(SignedSize::of(&of_batch, key));
            checkpoint = Some(of_batch);
        }
        if tree.size() < acknowledged {
            return Err(damaged(format!(
                "it ends with entry {}, and {acknowledged} are known: the files are damaged or an old copy; put the newest copy \
                 of {} in its place, or accept the loss with sppctl registry reindex --accept-loss",
                tree.size(),
                dir.display()
            )));
        }
        let length = edge.length as u64;
        let cut = bytes.len() as u64 - length;
        if cut > 0 {
            // Nobody was told of it: an answer follows the sync of the whole batch.
            tracing::warn!(file = %what(), bytes = cut, "a batch that a crash cut off is removed");
            file.set_len(length).and_then(|()| file.sync_all()).map_err(failed)?;
        }
        remove_older_edges(dir, base).map_err(failed)?;
        let records =
            first_checkpoints::records_below(dir, base).map_err(|e| self.failed("counting the device records", &e))?;
        Ok(Found { tree, checkpoint, entries, signed, edge: PartialBundleFile { file, length, base, records } })
    }

    /// Appends a batch and makes it durable: the commit of its entries and its checkpoint, both or neither.
    pub(super) fn append(&self, edge: &mut PartialBundleFile, batch: &Batch) -> Result<(), AppendError> {
        let bytes = batch.to_bytes().map_err(|e| AppendError::Failed(io::Error::other(e)))?;
        self.place.door.before_apply().map_err(AppendError::of)?;
        // A crash up to the sync leaves nothing, all, or a part that is no batch and is removed at the next start. Nobody was told
        // anything, and the checkpoint's signature has not left this process.
        edge.file.write_all_at(&bytes, edge.length).map_err(AppendError::of)?;
        // Never tried again on this file: after a failed sync the kernel calls the lost pages clean.
        self.place.door.sync(&edge.file).map_err(AppendError::of)?;
        edge.length += bytes.len() as u64;
        Ok(())
    }

    /// Writes the bundles that became full, with the tiles above them, and begins a new edge with the rest. Whatever stops it, the
    /// old edge still has all of it, and the next start does it again.
    pub(super) fn turn_over(
        &self,
        checkpoint: Option<&SignedCheckpoint>,
        entries: &mut Vec<Vec<u8>>,
        signed: &[SignedSize],
        edge: &mut PartialBundleFile,
    ) -> io::Result<()> {
        let dir = &self.place.dir;
        let Some(checkpoint) = checkpoint.filter(|_| entries.len() as u64 >= BUNDLE) else { return Ok(()) };
        let mut growing = Tree::read(edge.base, &FullTiles(dir)).map_err(io::Error::other)?;
        let full = entries.len() / BUNDLE as usize * BUNDLE as usize;
        let (mut bytes, mut records) = (Vec::new(), edge.records);
        for entry in entries.get(..full).unwrap_or_default() {
            bundle::push(&mut bytes, entry).map_err(io::Error::other)?;
            records += u64::from(!LogEntry::is_audit(entry));
            let tiles = growing.push(leaf_hash(entry));
            if tiles.is_empty() {
                continue;
            }
            let index = growing.size() / BUNDLE - 1;
            first_checkpoints::keep(dir, index, signed, records)?;
            write_once(&dir.join(TileId::full(TileKind::Entries, index).to_string()), &bytes)?;
            for FullTile { id, hashes } in tiles {
                write_once(&dir.join(id.to_string()), &hashes)?;
            }
            bytes.clear();
        }
        let base = growing.size();
        let rest = entries.split_off(full);
        let batch = Batch { first: base, note: checkpoint.note().to_vec(), entries: rest };
        if checkpoint.size() != base + batch.entries.len() as u64 {
            return Err(io::Error::other("the checkpoint does not cover exactly the entries to be written"));
        }
        let bytes = batch.to_bytes().map_err(io::Error::other)?;
        write_new(&edge_path(dir, base), &bytes)?;
        let file = OpenOptions::new().read(true).write(true).open(edge_path(dir, base))?;
        let old = std::mem::replace(edge, PartialBundleFile { file, length: bytes.len() as u64, base, records });
        *entries = batch.entries;
        // From here on the new edge counts, since it is the newest one: the old one is only in the way.
        fs::remove_file(edge_path(dir, old.base))?;
        self.place.keep_reserve();
        sync_dir(&dir.join(EDGE))
    }

    /// A full tile or bundle.
    pub(super) fn full(&self, tile: TileId) -> io::Result<Vec<u8>> {
        FullTiles(&self.place.dir).read(tile)
    }

    /// The checkpoint that was the first to cover an entry of a full bundle, if it was kept: a log that was put together from a mirror
    /// has none.
    pub(super) fn first_signed(&self, index: u64) -> io::Result<Option<SignedSize>> {
        first_checkpoints::first_to_cover(&self.place.dir, index)
    }

    /// Some bytes of a full bundle.
    pub(super) fn part(&self, bundle: u64, offset: u32, length: u16) -> io::Result<Vec<u8>> {
        let path = self.place.dir.join(TileId::full(TileKind::Entries, bundle).to_string());
        let mut bytes = vec![0; length.into()];
        File::open(path)?.read_exact_at(&mut bytes, offset.into())?;
        Ok(bytes)
    }

    /// An error that names the log; a full disk is told as that.
    pub(super) fn failed(&self, doing: &'static str, error: &io::Error) -> StoreError {
        if is_full(error) { self.full_disk() } else { self.place.failed(doing, error) }
    }

    pub(super) fn full_disk(&self) -> StoreError {
        let free = self.place.door.free(&self.place.dir).unwrap_or(0);
        StoreError::Full { store: KIND.name, free, floor: LAST_ROOM.max(free + 1) }
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

/// The full tiles of a directory.
pub(super) struct FullTiles<'a>(pub(super) &'a Path);

impl FullTiles<'_> {
    pub(super) fn read(&self, tile: TileId) -> io::Result<Vec<u8>> {
        fs::read(self.0.join(tile.as_full().to_string()))
    }
}

impl HashSource for FullTiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        let bytes = self.read(tile).map_err(|e| format!("{}: {e}", tile.as_full()))?;
        match bytes.len() == usize::from(FULL_WIDTH) * size_of::<TreeHash>() {
            true => Ok(bytes),
            false => Err(format!("{}: it has {} bytes", tile.as_full(), bytes.len())),
        }
    }
}

/// The newest edge of a log's directory, and the index of its first entry.
pub(super) fn newest_edge(dir: &Path) -> io::Result<(u64, PathBuf)> {
    let mut newest = None;
    for entry in fs::read_dir(dir.join(EDGE))? {
        let name = entry?.file_name();
        // A file that is being written has another name.
        let base = name.to_str().filter(|name| name.len() == 20).and_then(|name| name.parse::<u64>().ok());
        newest = newest.max(base);
    }
    let base = newest.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no file in edge/"))?;
    Ok((base, edge_path(dir, base)))
}

/// What a crash left while the new edge was there already.
fn remove_older_edges(dir: &Path, newest: u64) -> io::Result<()> {
    for entry in fs::read_dir(dir.join(EDGE))? {
        let path = entry?.path();
        if path != edge_path(dir, newest) {
            fs::remove_file(path)?;
        }
    }
    sync_dir(&dir.join(EDGE))
}

fn edge_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(EDGE).join(format!("{base:020}"))
}

/// Writes a file that is never changed again. The same once more, after a crash, is no change.
pub(super) fn write_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::read(path) {
        // Whoever wrote it may have been killed before it was synced.
        Ok(found) if found == bytes => {
            File::open(path)?.sync_all()?;
            sync_dir(path.parent().unwrap_or(Path::new(".")))
        }
        Ok(_) => {
            let problem = format!("{} is there already and is different; it is never changed", path.display());
            Err(io::Error::new(io::ErrorKind::AlreadyExists, problem))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => write_new(path, bytes),
        Err(error) => Err(error),
    }
}

/// Writes a file under another name, syncs it, gives it its name and syncs the directory: after a crash it is there whole or not at all.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    make_directories(directory)?;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let staged = PathBuf::from(name);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&staged)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    sync_dir(directory)
}

fn make_directories(directory: &Path) -> io::Result<()> {
    if directory.as_os_str().is_empty() || directory.is_dir() {
        return Ok(());
    }
    let parent = directory.parent().unwrap_or(Path::new("."));
    make_directories(parent)?;
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}
