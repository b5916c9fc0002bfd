//! A mirror of the log as files that any web server or object store can carry.
//!
//! | in the mirror | is |
//! |---|---|
//! | `checkpoint`, `tile/…` | the log, as C2SP tlog-tiles says, partial tiles of the checkpoint included |
//! | `log.vkey` | the log's public key |
//! | `chip/<shard>/<chip ID>.cbor` | the newest record of a chip |
//! | `chip/<shard>/<chip ID>.tlog-proof` | the proof that it is in the log |
//!
//! The shard is the beginning of the SHA-256 of the chip ID, so that no directory gets too large.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::files::{BUNDLE, FullTiles, write_new};
use super::source::{LogSource, SourceError, is_store};
use crate::keys::sha256;
use crate::names::ChipId;
use crate::store::LogEntry;
use crate::tlog::{
    FULL_WIDTH, FullTile, HashSource, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, TlogError, Tree, TreeHash,
    bundle, leaf_hash, prove_inclusion,
};

const CHECKPOINT: &str = "checkpoint";
const VKEY: &str = "log.vkey";

/// The directory of a mirror in which the files of a chip are.
pub fn shard(chip: &ChipId) -> String {
    let mut shard = hex::encode(sha256(chip.as_bytes()));
    shard.truncate(3);
    shard
}

/// Where a mirror has the files of each chip.
pub(super) const CHIPS: &str = "chip";

/// Where a chip's record is in a mirror, and its proof.
pub(super) fn chip_files(chip: &ChipId) -> (String, String) {
    let of = shard(chip);
    (format!("{CHIPS}/{of}/{chip}.cbor"), format!("{CHIPS}/{of}/{chip}.tlog-proof"))
}

/// What an export did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Entries that the mirror had before.
    pub before: u64,
    /// Entries that it has now.
    pub now: u64,
}

/// Why a mirror was not brought up to date. What it had it still has.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The log cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A checkpoint or a tree is not what it must be.
    #[error("{what}: {cause}")]
    Wrong {
        /// Where.
        what: String,
        /// What is wrong.
        cause: TlogError,
    },
    /// The log does not continue what the mirror has.
    #[error("the log does not continue the mirror: {0}; keep the mirror, it is evidence")]
    Forked(String),
    /// A part of the log is not what its tree says.
    #[error("{what} of the log is damaged: {problem}")]
    Damaged {
        /// Which part.
        what: String,
        /// What is wrong.
        problem: String,
    },
    /// A daemon's directory.
    #[error("{} is a daemon's public database; make the mirror in a directory of its own", .0.display())]
    Store(PathBuf),
    /// The tiles of the mirror are not those of its checkpoint.
    #[error("tiles of the mirror in {} are damaged, and the log is not; make it anew in an empty directory", .0.display())]
    Mirror(PathBuf),
    /// The mirror's directory.
    #[error("{doing} {}: {cause}", .path.display())]
    File {
        /// What was done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
}

fn file<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> ExportError + 'a {
    move |cause| ExportError::File { doing, path: path.to_owned(), cause }
}

/// Brings a mirror up to date, or makes one. Whoever reads it meanwhile sees the old log or the new one: the checkpoint is replaced
/// last, and everything that it covers is on the disk by then. Interrupted, it goes on where it was.
pub fn export(
    source: &mut dyn LogSource,
    key: &LogKey,
    dir: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Exported, ExportError> {
    if is_store(dir) {
        return Err(ExportError::Store(dir.to_owned()));
    }
    // 1. What there is, and what will be.
    let note = source.checkpoint()?;
    let new = SignedCheckpoint::verify(&note, key)
        .map_err(|cause| ExportError::Wrong { what: format!("the checkpoint of {}", source.name()), cause })?;
    fs::create_dir_all(dir).map_err(file("making", dir))?;
    let lock = fs::File::open(dir).map_err(file("opening", dir))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|e| file("another export works in", dir)(e.into()))?;
    let old = mirrored(dir, key)?;
    let before = old.as_ref().map_or(0, SignedCheckpoint::size);
    if new.size() < before {
        let problem = format!("the mirror has {before} entries and the log only {}", new.size());
        return Err(ExportError::Forked(problem));
    }
    // 2. The log's hashes lead from the mirror's tree to the signed root; only then is anything believed.
    let base = before / BUNDLE * BUNDLE;
    let leaves = Leaves::of(&*source, dir, base, old.as_ref(), &new)?;
    // 3. Entries and tiles, each checked against those hashes.
    let mut tree = read_tree(dir, base)?;
    for number in base / BUNDLE..new.size().div_ceil(BUNDLE) {
        copy_bundle(&*source, dir, &leaves, number, new.size(), &mut tree)?;
        progress(tree.size().max(before) - before, (new.size() - before) * 2);
    }
    partial_tiles(dir, &tree)?;
    // 4. The files of the chips whose records are new.
    chips(dir, &tree, before, &new, progress)?;
    // 5. All of it is on the disk before the checkpoint says that it is there.
    write_new(&dir.join(VKEY), format!("{key}\n").as_bytes()).map_err(file("writing", &dir.join(VKEY)))?;
    rustix::fs::syncfs(&lock).map_err(|e| file("syncing", dir)(e.into()))?;
    remove_outgrown(dir, base, new.size());
    let path = dir.join(CHECKPOINT);
    write_new(&path, new.note()).map_err(file("writing", &path))?;
    Ok(Exported { before, now: new.size() })
}

/// The checkpoint of the mirror as it is.
fn mirrored(dir: &Path, key: &LogKey) -> Result<Option<SignedCheckpoint>, ExportError> {
    let path = dir.join(CHECKPOINT);
    match fs::read(&path) {
        Ok(note) => SignedCheckpoint::verify(&note, key)
            .map(Some)
            .map_err(|cause| ExportError::Wrong { what: path.display().to_string(), cause }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file("reading", &path)(error)),
    }
}

fn read_tree(dir: &Path, size: u64) -> Result<Tree, ExportError> {
    let what = || format!("the mirror in {}", dir.display());
    Tree::read(size, &FullTiles(dir)).map_err(|cause| ExportError::Wrong { what: what(), cause })
}

/// The hashes of the leaves that are new, by tile: known to lead to the signed root.
struct Leaves {
    first: u64,
    /// Of each full tile the hash of all of it; kept instead of the hashes, of which there are many.
    full: Vec<TreeHash>,
    last: Vec<u8>,
}

impl Leaves {
    fn of(
        source: &dyn LogSource,
        dir: &Path,
        base: u64,
        old: Option<&SignedCheckpoint>,
        new: &SignedCheckpoint,
    ) -> Result<Self, ExportError> {
        let mut tree = read_tree(dir, base)?;
        let mut leaves = Self { first: base / BUNDLE, full: Vec::new(), last: Vec::new() };
        let differs = |tree: &Tree| old.is_some_and(|old| old.size() == tree.size() && old.root() != tree.root());
        let mut continues = !differs(&tree);
        for number in leaves.first..new.size().div_ceil(BUNDLE) {
            let hashes = leaf_tile(source, number, new.size())?;
            for leaf in hashes.as_chunks::<32>().0 {
                let full = tree.push(*leaf);
                leaves.full.extend(full.first().map(|tile| sha256(&tile.hashes)));
                continues &= !differs(&tree);
            }
            leaves.last = hashes;
        }
        match continues && tree.root() == new.root() {
            true => Ok(leaves),
            false => Err(why_not(source, dir, old, new)?),
        }
    }

    fn are(&self, number: u64, hashes: &[u8]) -> bool {
        let at = usize::try_from(number - self.first).unwrap_or(usize::MAX);
        self.full.get(at).map_or(hashes == self.last, |known| sha256(hashes) == *known)
    }
}

/// Whose fault it is that the log's hashes do not lead from the mirror's tree to the signed root: the whole log tells.
fn why_not(
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
        let problem = "its hashes do not lead to the root of the checkpoint".to_owned();
        return Ok(ExportError::Damaged { what: format!("the tree of {} entries", new.size()), problem });
    }
    Ok(match old.filter(|old| old.root() != before) {
        Some(old) => ExportError::Forked(format!(
            "its first {} entries are not those that the mirror has; somebody rewrote them, or there are two logs of one name",
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
            let problem = format!("it has {} bytes", hashes.len());
            Err(ExportError::Damaged { what: tile.to_string(), problem })
        }
    }
}

fn copy_bundle(
    source: &dyn LogSource,
    dir: &Path,
    leaves: &Leaves,
    number: u64,
    size: u64,
    tree: &mut Tree,
) -> Result<(), ExportError> {
    let hashes = leaf_tile(source, number, size)?;
    let id = TileId::in_tree(TileKind::Entries, number, size).unwrap_or(TileId::full(TileKind::Entries, number));
    let damaged = |problem: String| ExportError::Damaged { what: id.to_string(), problem };
    if !leaves.are(number, &hashes) {
        return Err(damaged("its hashes changed while it was read".to_owned()));
    }
    let bytes = source.tile(id)?;
    let entries = bundle::exactly(&bytes, id.width().into()).map_err(|e| damaged(e.to_string()))?;
    for (entry, hash) in entries.iter().zip(hashes.as_chunks::<32>().0) {
        if leaf_hash(entry) != *hash {
            return Err(damaged(format!("entry {} is not the one of the tree", tree.size())));
        }
        for FullTile { id, hashes } in tree.push(*hash) {
            let path = dir.join(id.to_string());
            write_unsynced(&path, &hashes).map_err(file("writing", &path))?;
        }
    }
    let path = dir.join(id.to_string());
    write_unsynced(&path, &bytes).map_err(file("writing", &path))
}

/// Removes partial ones of earlier checkpoints whose full one is on the disk: whoever still wants one reads the full one instead.
fn remove_outgrown(dir: &Path, base: u64, size: u64) {
    let levels = (0..8).map(|level| (TileKind::Hashes(level), 8 * (u32::from(level) + 1)));
    for (kind, shift) in levels.chain([(TileKind::Entries, 8)]) {
        for number in base.checked_shr(shift).unwrap_or(0)..size.checked_shr(shift).unwrap_or(0) {
            let _ = fs::remove_dir_all(dir.join(format!("{}.p", TileId::full(kind, number))));
        }
    }
}

/// The tiles of the right edge, as the specification wants them.
fn partial_tiles(dir: &Path, tree: &Tree) -> Result<(), ExportError> {
    for level in 0..64 {
        let of_level = tree.size().checked_shr(8 * u32::from(level)).unwrap_or(0);
        if of_level == 0 {
            break;
        }
        let index = of_level / u64::from(FULL_WIDTH);
        let Some(tile) = TileId::in_tree(TileKind::Hashes(level), index, tree.size()) else { continue };
        if let Some(hashes) = tree.partial(tile) {
            let path = dir.join(tile.to_string());
            write_unsynced(&path, hashes).map_err(file("writing", &path))?;
        }
    }
    Ok(())
}

/// The tiles of a mirror that is being made: the full ones are files, the rest is in the tree.
struct Mirrored<'a>(&'a Path, &'a Tree);

impl HashSource for Mirrored<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        match self.1.partial(tile) {
            Some(hashes) => Ok(hashes.to_vec()),
            None => FullTiles(self.0).tile(tile),
        }
    }
}

fn chips(
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
        let bytes = fs::read(&path).map_err(file("reading", &path))?;
        let damaged = |problem: String| ExportError::Damaged { what: id.to_string(), problem };
        let entries = bundle::exactly(&bytes, id.width().into()).map_err(|e| damaged(e.to_string()))?;
        for (index, entry) in (number * BUNDLE..).zip(entries).skip_while(|(index, _)| *index < before) {
            let known = LogEntry::from_bytes(entry).map_err(|e| damaged(format!("entry {index}: {e}")))?;
            let LogEntry::Device(record) = known else { continue };
            let hashes = prove_inclusion(tree, index, &Mirrored(dir, tree));
            let hashes = hashes.map_err(|e| damaged(format!("entry {index}: {e}")))?;
            let proof = LogProof::new(index, hashes, checkpoint).to_bytes();
            let (record_file, proof_file) = chip_files(&record.chip);
            for (name, bytes) in [(proof_file, &proof[..]), (record_file, entry)] {
                let path = dir.join(name);
                replace_unsynced(&path, bytes).map_err(file("writing", &path))?;
            }
        }
        let done = (number * BUNDLE + BUNDLE).min(size).max(before) - before;
        progress(size - before + done, (size - before) * 2);
    }
    Ok(())
}

/// Writes what is never changed; the sync comes for all files at once.
fn write_unsynced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::read(path) {
        Ok(found) if found == bytes => Ok(()),
        // Left half-written by a crash, or by a checkpoint that was never published.
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
