//! Exports a mirror of the log as files that any web server or object store can serve.
//!
//! | in the mirror | content |
//! |---|---|
//! | `checkpoint`, `tile/…` | the log in the layout of C2SP tlog-tiles, with the checkpoint's partial tiles |
//! | `log.vkey` | the log's public key |
//! | `chip/<shard>/<chip ID>.cbor` | the newest record of a chip |
//! | `chip/<shard>/<chip ID>.tlog-proof` | the proof that this record is in the log |
//!
//! The shard is the beginning of the SHA-256 of the chip ID. It limits the size of each directory.

use std::path::{Path, PathBuf};
use std::{fs, io};

use rustix::fs::FlockOperation;
use spp_format::keys::sha256;
use spp_format::record::LogEntry;
use spp_format::tlog::{
    FULL_WIDTH, FullTile, HashSource, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, TlogError, Tree, TreeHash,
    bundle, leaf_hash, prove_inclusion,
};

use super::atomic_write::write_new;
use super::chip_files::chip_files;
use super::full_tiles::{BUNDLE, FullTiles};
use super::source::{LogSource, SourceError, is_store};

const CHECKPOINT: &str = "checkpoint";
const VKEY: &str = "log.vkey";

/// Result of [`export`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportReport {
    /// Entries in the mirror before the export.
    pub entries_before: u64,
    /// Entries in the mirror after the export.
    pub entries: u64,
}

/// Why an export failed. The mirror still has its previous checkpoint and everything that it covers.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The log cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A checkpoint or a tree is invalid.
    #[error("{what}: {cause}")]
    Invalid {
        /// The checkpoint or tree.
        what: String,
        /// Why it is invalid.
        cause: TlogError,
    },
    /// The log is not an extension of the mirror.
    #[error("the log is inconsistent with the mirror: {0}; keep the mirror as evidence")]
    Forked(String),
    /// A part of the log does not match its tree.
    #[error("{what} of the log is damaged: {problem}")]
    Damaged {
        /// The damaged part.
        what: String,
        /// The problem.
        problem: String,
    },
    /// The destination is a daemon's directory.
    #[error("{} is a daemon's public database; export to a separate directory", .0.display())]
    Store(PathBuf),
    /// The tiles of the mirror do not match its checkpoint.
    #[error("tiles of the mirror in {} are damaged, the log is intact; export to an empty directory", .0.display())]
    Mirror(PathBuf),
    /// A file operation in the mirror's directory failed.
    #[error("{doing} {}: {cause}", .path.display())]
    File {
        /// The operation.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
}

fn file_error<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ExportError + 'a {
    move |cause| ExportError::File { doing, path: path.to_owned(), cause }
}

/// Creates or updates a mirror. Concurrent readers see the old log or the new one: the checkpoint is replaced last, after
/// everything that it covers is on disk. Running the export again after an interruption completes it.
pub fn export(
    source: &mut dyn LogSource,
    key: &LogKey,
    dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ExportReport, ExportError> {
    if is_store(dir) {
        return Err(ExportError::Store(dir.to_owned()));
    }
    // 1. Read the mirror's checkpoint and the log's.
    let note = source.checkpoint()?;
    let new = SignedCheckpoint::verify(&note, key)
        .map_err(|cause| ExportError::Invalid { what: format!("checkpoint of {}", source.name()), cause })?;
    fs::create_dir_all(dir).map_err(file_error("creating", dir))?;
    let lock = fs::File::open(dir).map_err(file_error("opening", dir))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|e| file_error("another export is running in", dir)(e.into()))?;
    let old = read_checkpoint(dir, key)?;
    let before = old.as_ref().map_or(0, SignedCheckpoint::size);
    if new.size() < before {
        let problem = format!("the mirror has {before} entries, the log only {}", new.size());
        return Err(ExportError::Forked(problem));
    }
    // 2. Verify that the log's leaf hashes extend the mirror's tree to the signed root, before anything is copied.
    let base = before / BUNDLE * BUNDLE;
    let leaves = LeafHashes::verify(&*source, dir, base, old.as_ref(), &new)?;
    // 3. Copy entries and tiles, each verified against these hashes.
    let mut tree = read_tree(dir, base)?;
    for number in base / BUNDLE..new.size().div_ceil(BUNDLE) {
        copy_bundle(&*source, dir, &leaves, number, new.size(), &mut tree)?;
        progress(tree.size().max(before) - before, (new.size() - before) * 2);
    }
    write_partial_tiles(dir, &tree)?;
    // 4. Write the files of the chips that have new records.
    write_chip_files(dir, &tree, before, &new, progress)?;
    // 5. Sync all files before replacing the checkpoint that covers them.
    write_new(&dir.join(VKEY), format!("{key}\n").as_bytes()).map_err(file_error("writing", &dir.join(VKEY)))?;
    rustix::fs::syncfs(&lock).map_err(|e| file_error("syncing", dir)(e.into()))?;
    remove_superseded(dir, base, new.size());
    let path = dir.join(CHECKPOINT);
    write_new(&path, new.note()).map_err(file_error("writing", &path))?;
    Ok(ExportReport { entries_before: before, entries: new.size() })
}

/// The mirror's current checkpoint.
fn read_checkpoint(dir: &Path, key: &LogKey) -> Result<Option<SignedCheckpoint>, ExportError> {
    let path = dir.join(CHECKPOINT);
    match fs::read(&path) {
        Ok(note) => SignedCheckpoint::verify(&note, key)
            .map(Some)
            .map_err(|cause| ExportError::Invalid { what: path.display().to_string(), cause }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("reading", &path)(error)),
    }
}

fn read_tree(dir: &Path, size: u64) -> Result<Tree, ExportError> {
    let what = || format!("mirror in {}", dir.display());
    Tree::read(size, &FullTiles(dir)).map_err(|cause| ExportError::Invalid { what: what(), cause })
}

/// The hashes of the new leaves by tile, verified against the signed root.
struct LeafHashes {
    first: u64,
    /// The hash of each full tile's content, which needs less memory than the leaf hashes.
    full: Vec<TreeHash>,
    last: Vec<u8>,
}

impl LeafHashes {
    fn verify(
        source: &dyn LogSource,
        dir: &Path,
        base: u64,
        old: Option<&SignedCheckpoint>,
        new: &SignedCheckpoint,
    ) -> Result<Self, ExportError> {
        let mut tree = read_tree(dir, base)?;
        let mut leaves = Self { first: base / BUNDLE, full: Vec::new(), last: Vec::new() };
        let is_inconsistent =
            |tree: &Tree| old.is_some_and(|old| old.size() == tree.size() && old.root() != tree.root());
        let mut consistent = !is_inconsistent(&tree);
        for number in leaves.first..new.size().div_ceil(BUNDLE) {
            let hashes = leaf_tile(source, number, new.size())?;
            for leaf in hashes.as_chunks::<32>().0 {
                let full = tree.push(*leaf);
                leaves.full.extend(full.first().map(|tile| sha256(&tile.hashes)));
                consistent &= !is_inconsistent(&tree);
            }
            leaves.last = hashes;
        }
        match consistent && tree.root() == new.root() {
            true => Ok(leaves),
            false => Err(diagnose_mismatch(source, dir, old, new)?),
        }
    }

    fn matches(&self, number: u64, hashes: &[u8]) -> bool {
        let position = usize::try_from(number - self.first).unwrap_or(usize::MAX);
        self.full.get(position).map_or(hashes == self.last, |digest| sha256(hashes) == *digest)
    }
}

/// Reads the whole log to find out why its hashes do not extend the mirror's tree to the signed root: damaged log, fork, or
/// damaged mirror.
fn diagnose_mismatch(
    source: &dyn LogSource,
    dir: &Path,
    old: Option<&SignedCheckpoint>,
    new: &SignedCheckpoint,
) -> Result<ExportError, ExportError> {
    let (mut tree, mut before) = (Tree::default(), Tree::default().root());
    for number in 0..new.size().div_ceil(BUNDLE) {
        for leaf in leaf_tile(source, number, new.size())?.as_chunks::<32>().0 {
            tree.push(*leaf);
            if old.is_some_and(|old| old.size() == tree.size()) {
                before = tree.root();
            }
        }
    }
    if tree.root() != new.root() {
        let problem = "the hashes do not match the root of the checkpoint".to_owned();
        return Ok(ExportError::Damaged { what: format!("tree of {} entries", new.size()), problem });
    }
    Ok(match old.filter(|old| old.root() != before) {
        Some(old) => ExportError::Forked(format!(
            "its first {} entries differ from those of the mirror; they were rewritten, or two logs use the same name",
            old.size()
        )),
        None => ExportError::Mirror(dir.to_owned()),
    })
}

fn leaf_tile(source: &dyn LogSource, number: u64, size: u64) -> Result<Vec<u8>, ExportError> {
    let tile = TileId::in_tree(TileKind::Hashes(0), number, size);
    let tile = tile.unwrap_or(TileId::full(TileKind::Hashes(0), number));
    let hashes = source.tile(tile)?;
    match hashes.len() == usize::from(tile.width()) * 32 {
        true => Ok(hashes),
        false => {
            let problem = format!("unexpected length {} bytes", hashes.len());
            Err(ExportError::Damaged { what: tile.to_string(), problem })
        }
    }
}

fn copy_bundle(
    source: &dyn LogSource,
    dir: &Path,
    leaves: &LeafHashes,
    number: u64,
    size: u64,
    tree: &mut Tree,
) -> Result<(), ExportError> {
    let hashes = leaf_tile(source, number, size)?;
    let id = TileId::in_tree(TileKind::Entries, number, size).unwrap_or(TileId::full(TileKind::Entries, number));
    let damaged = |problem: String| ExportError::Damaged { what: id.to_string(), problem };
    if !leaves.matches(number, &hashes) {
        return Err(damaged("the hashes changed during the export".to_owned()));
    }
    let bytes = source.tile(id)?;
    let entries = bundle::decode_exactly(&bytes, id.width().into()).map_err(|e| damaged(e.to_string()))?;
    for (entry, hash) in entries.iter().zip(hashes.as_chunks::<32>().0) {
        if leaf_hash(entry) != *hash {
            return Err(damaged(format!("entry {} does not match the tree", tree.size())));
        }
        for FullTile { id, hashes } in tree.push(*hash) {
            let path = dir.join(id.to_string());
            write_unsynced(&path, &hashes).map_err(file_error("writing", &path))?;
        }
    }
    let path = dir.join(id.to_string());
    write_unsynced(&path, &bytes).map_err(file_error("writing", &path))
}

/// Removes partial tiles of earlier checkpoints whose full tile is on disk. Readers of a removed partial tile read the full tile
/// instead.
fn remove_superseded(dir: &Path, base: u64, size: u64) {
    let levels = (0..8).map(|level| (TileKind::Hashes(level), 8 * (u32::from(level) + 1)));
    for (kind, shift) in levels.chain([(TileKind::Entries, 8)]) {
        for number in base.checked_shr(shift).unwrap_or(0)..size.checked_shr(shift).unwrap_or(0) {
            let _ = fs::remove_dir_all(dir.join(format!("{}.p", TileId::full(kind, number))));
        }
    }
}

/// Writes the partial tiles of the tree's right edge.
fn write_partial_tiles(dir: &Path, tree: &Tree) -> Result<(), ExportError> {
    for level in 0..64 {
        let of_level = tree.size().checked_shr(8 * u32::from(level)).unwrap_or(0);
        if of_level == 0 {
            break;
        }
        let index = of_level / u64::from(FULL_WIDTH);
        let Some(tile) = TileId::in_tree(TileKind::Hashes(level), index, tree.size()) else { continue };
        if let Some(hashes) = tree.partial(tile) {
            let path = dir.join(tile.to_string());
            write_unsynced(&path, hashes).map_err(file_error("writing", &path))?;
        }
    }
    Ok(())
}

/// The tiles of a mirror during an export: full tiles from files, partial tiles from the tree.
struct MirrorTiles<'a>(&'a Path, &'a Tree);

impl HashSource for MirrorTiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        match self.1.partial(tile) {
            Some(hashes) => Ok(hashes.to_vec()),
            None => FullTiles(self.0).tile(tile),
        }
    }
}

fn write_chip_files(
    dir: &Path,
    tree: &Tree,
    before: u64,
    checkpoint: &SignedCheckpoint,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ExportError> {
    let size = tree.size();
    for number in before / BUNDLE..size.div_ceil(BUNDLE) {
        let id = TileId::in_tree(TileKind::Entries, number, size).unwrap_or(TileId::full(TileKind::Entries, number));
        let path = dir.join(id.to_string());
        let bytes = fs::read(&path).map_err(file_error("reading", &path))?;
        let damaged = |problem: String| ExportError::Damaged { what: id.to_string(), problem };
        let entries = bundle::decode_exactly(&bytes, id.width().into()).map_err(|e| damaged(e.to_string()))?;
        for (index, entry) in (number * BUNDLE..).zip(entries).skip_while(|(index, _)| *index < before) {
            let decoded = LogEntry::from_bytes(entry).map_err(|e| damaged(format!("entry {index}: {e}")))?;
            let LogEntry::Device(record) = decoded else { continue };
            let hashes = prove_inclusion(tree, index, &MirrorTiles(dir, tree));
            let hashes = hashes.map_err(|e| damaged(format!("entry {index}: {e}")))?;
            let proof = LogProof::new(index, hashes, checkpoint).to_bytes();
            let (record_file, proof_file) = chip_files(&record.chip);
            for (name, bytes) in [(proof_file, &proof[..]), (record_file, entry)] {
                let path = dir.join(name);
                replace_unsynced(&path, bytes).map_err(file_error("writing", &path))?;
            }
        }
        let done = (number * BUNDLE + BUNDLE).min(size).max(before) - before;
        progress(size - before + done, (size - before) * 2);
    }
    Ok(())
}

/// Writes a file that never changes, without a sync: one sync follows for all files.
fn write_unsynced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::read(path) {
        Ok(found) if found == bytes => Ok(()),
        // The existing file was left by a crash, or belongs to a checkpoint that was never published.
        _ => replace_unsynced(path, bytes),
    }
}

fn replace_unsynced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    fs::write(&staged, bytes)?;
    fs::rename(staged, path)
}
