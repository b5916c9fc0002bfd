//! Where a log can be read: the daemon's own directory, a mirror's directory, or a web server with either.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use super::export::{CHIPS, chip_files};
use super::fetch::Fetcher;
use super::files::{BUNDLE, FullTiles, newest_edge};
use super::partial_bundle;
use crate::names::ChipId;
use crate::tlog::{FullTile, LogKey, TileId, TileKind, Tree, bundle, leaf_hash};

/// Most bytes of an entry bundle: 256 entries of the largest kind.
const MAX_BUNDLE: u64 = 256 * 65_537;
/// Most bytes of a checkpoint, a record or a proof.
const MAX_FILE: u64 = 128 * 1024;

/// A part of a log could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It is not there.
    #[error("{0} is not there")]
    Missing(String),
    /// It cannot be read.
    #[error("{what}: {cause}")]
    Failed {
        /// What was read.
        what: String,
        /// Why it could not be.
        cause: String,
    },
    /// Whoever has it cannot be asked now, which says nothing about it.
    #[error("{what} cannot be reached: {cause}")]
    Unreachable {
        /// What was asked for.
        what: String,
        /// Why it could not be.
        cause: String,
    },
}

impl SourceError {
    fn of(what: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing(what.to_owned()),
            _ => Self::Failed { what: what.to_owned(), cause: error.to_string() },
        }
    }
}

/// A log that is read from outside. Nothing that it gives is believed.
pub trait LogSource: Send {
    /// How messages call it.
    fn name(&self) -> String;
    /// A file of a mirror, by its path; at most so many bytes.
    fn file(&self, path: &str, most: u64) -> Result<Vec<u8>, SourceError>;
    /// Whether it is at hand and has a record and a proof for each chip, which are read with the log then.
    fn has_chips(&self) -> bool {
        false
    }
    /// The newest checkpoint, a signed note.
    fn checkpoint(&mut self) -> Result<Vec<u8>, SourceError> {
        self.file("checkpoint", MAX_FILE)
    }
    /// A tile or an entry bundle. A mirror may have removed a partial one once the full one is there.
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, SourceError> {
        match self.file(&tile.to_string(), MAX_BUNDLE) {
            Err(SourceError::Missing(_)) if !tile.is_full() => {
                beginning_of(tile, self.file(&tile.as_full().to_string(), MAX_BUNDLE)?)
            }
            found => found,
        }
    }
}

/// Opens a directory, the daemon's or a mirror's, or a web address. `authority` is the CA of a web server that the system does not know.
pub fn open_source(place: &str, key: &LogKey, authority: Option<&Path>) -> Result<Box<dyn LogSource>, SourceError> {
    if place.contains("://") {
        return Ok(Box::new(Website::new(place, authority)?));
    }
    let dir = Path::new(place);
    if is_store(dir) {
        return Ok(Box::new(StoreDirectory::new(dir, key)));
    }
    Ok(Box::new(Mirror::new(dir)))
}

/// Whether a daemon made that directory.
pub(super) fn is_store(dir: &Path) -> bool {
    dir.join("store.toml").exists()
}

/// A directory with the files that C2SP tlog-tiles names.
pub struct Mirror(PathBuf);

impl Mirror {
    /// The mirror in that directory.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }
}

impl LogSource for Mirror {
    fn name(&self) -> String {
        self.0.display().to_string()
    }

    fn has_chips(&self) -> bool {
        self.0.join(CHIPS).is_dir()
    }

    fn file(&self, path: &str, most: u64) -> Result<Vec<u8>, SourceError> {
        let length = fs::metadata(self.0.join(path)).map_err(|e| SourceError::of(path, &e))?.len();
        if length > most {
            let cause = format!("it has {length} bytes, at most {most} are read");
            return Err(SourceError::Failed { what: path.to_owned(), cause });
        }
        fs::read(self.0.join(path)).map_err(|e| SourceError::of(path, &e))
    }
}

/// A web server with such files: another daemon's public listener, or a mirror.
pub struct Website {
    prefix: String,
    fetcher: Fetcher,
}

impl Website {
    /// The log below that address.
    pub fn new(prefix: &str, authority: Option<&Path>) -> Result<Self, SourceError> {
        let prefix = prefix.trim_end_matches('/').to_owned();
        let fetcher = Fetcher::of_mirrors(authority);
        let fetcher = fetcher.map_err(|cause| SourceError::Failed { what: prefix.clone(), cause })?;
        Ok(Self { prefix, fetcher })
    }
}

impl LogSource for Website {
    fn name(&self) -> String {
        self.prefix.clone()
    }

    fn file(&self, path: &str, most: u64) -> Result<Vec<u8>, SourceError> {
        let what = format!("{}/{path}", self.prefix);
        match self.fetcher.get(&what, most) {
            Ok(answer) if answer.status == 200 => Ok(answer.body),
            Ok(answer) if answer.status == 404 => Err(SourceError::Missing(what)),
            Ok(answer) => {
                Err(SourceError::Unreachable { what, cause: format!("the server answers {}", answer.status) })
            }
            Err(cause) => Err(SourceError::Unreachable { what, cause }),
        }
    }
}

/// The directory of a daemon, which may be running meanwhile.
pub struct StoreDirectory {
    dir: PathBuf,
    key: LogKey,
    edge: Option<ReadPartialBundle>,
}

/// The edge as it was when the checkpoint was read.
struct ReadPartialBundle {
    base: u64,
    entries: Vec<Vec<u8>>,
    tree: Tree,
    /// Tiles that its entries fill: between a commit and the turn-over after it they are no files.
    filled: Vec<FullTile>,
}

impl StoreDirectory {
    /// The log in that directory; its batches are told from what a crash left by the key.
    pub fn new(dir: &Path, key: &LogKey) -> Self {
        Self { dir: dir.to_owned(), key: key.clone(), edge: None }
    }

    fn read_edge(&self) -> Result<(ReadPartialBundle, Option<Vec<u8>>), SourceError> {
        let (base, path) = newest_edge(&self.dir).map_err(|e| SourceError::of("edge", &e))?;
        let what = format!("edge/{base:020}");
        // A batch that the daemon has written and not synced yet is nobody's to show: a power cut could take it back.
        let read = fs::File::open(&path).and_then(|file| {
            let mut bytes = Vec::new();
            (&file).read_to_end(&mut bytes)?;
            file.sync_data().map(|()| bytes)
        });
        let bytes = read.map_err(|e| SourceError::of(&what, &e))?;
        let damaged = |cause: String| SourceError::Failed { what: what.clone(), cause };
        let mut tree = Tree::read(base, &FullTiles(&self.dir)).map_err(|e| damaged(e.to_string()))?;
        let edge = partial_bundle::read(&bytes, &tree, &self.key).map_err(damaged)?;
        let (mut entries, mut filled, mut note) = (Vec::new(), Vec::new(), None);
        for (batch, checkpoint) in edge.batches {
            filled.extend(batch.entries.iter().flat_map(|entry| tree.push(leaf_hash(entry))));
            entries.extend(batch.entries);
            note = Some(checkpoint.note().to_vec());
        }
        Ok((ReadPartialBundle { base, entries, tree, filled }, note))
    }
}

impl LogSource for StoreDirectory {
    fn name(&self) -> String {
        self.dir.display().to_string()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, SourceError> {
        // The daemon may put a new edge in the place of the one that was just found: then it is looked for again.
        let mut tries = 3;
        let (edge, note) = loop {
            tries -= 1;
            match self.read_edge() {
                Err(SourceError::Missing(_)) if tries > 0 => {}
                read => break read?,
            }
        };
        self.edge = Some(edge);
        note.ok_or_else(|| SourceError::Missing("a checkpoint".to_owned()))
    }

    fn tile(&self, tile: TileId) -> Result<Vec<u8>, SourceError> {
        let what = tile.to_string();
        if let Some(edge) = &self.edge {
            let first = tile.index() * BUNDLE;
            if tile.kind() == TileKind::Entries && first >= edge.base {
                let from = usize::try_from(first - edge.base).unwrap_or(usize::MAX);
                let mut bytes = Vec::new();
                for entry in edge.entries.iter().skip(from).take(tile.width().into()) {
                    let cause =
                        |e: crate::tlog::TlogError| SourceError::Failed { what: what.clone(), cause: e.to_string() };
                    bundle::push(&mut bytes, entry).map_err(cause)?;
                }
                return Ok(bytes);
            }
            if let Some(hashes) = edge.tree.partial(tile).filter(|_| !tile.is_full()) {
                return Ok(hashes.get(..usize::from(tile.width()) * 32).unwrap_or(hashes).to_vec());
            }
            if let Some(filled) = edge.filled.iter().find(|filled| filled.id == tile.as_full()) {
                return beginning_of(tile, filled.hashes.clone());
            }
        }
        let full = FullTiles(&self.dir).read(tile).map_err(|e| SourceError::of(&tile.as_full().to_string(), &e))?;
        beginning_of(tile, full)
    }

    fn file(&self, path: &str, _: u64) -> Result<Vec<u8>, SourceError> {
        Err(SourceError::Missing(path.to_owned()))
    }
}

/// A partial tile, which is the beginning of the full one.
fn beginning_of(tile: TileId, full: Vec<u8>) -> Result<Vec<u8>, SourceError> {
    let length = match tile.kind() {
        TileKind::Hashes(_) => usize::from(tile.width()) * 32,
        TileKind::Entries => {
            let entries = bundle::entries(&full).take(tile.width().into());
            let length = entries.map(|entry| entry.map(|entry| entry.len() + bundle::HEAD)).sum::<Result<usize, _>>();
            length.map_err(|e| SourceError::Failed { what: tile.to_string(), cause: e.to_string() })?
        }
    };
    let mut bytes = full;
    bytes.truncate(length);
    Ok(bytes)
}

/// A chip's record and its proof from a mirror: a directory or a web address. Neither is believed.
pub fn read_chip(place: &str, chip: &ChipId, authority: Option<&Path>) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
    let source: Box<dyn LogSource> = match place.contains("://") {
        true => Box::new(Website::new(place, authority)?),
        false if is_store(Path::new(place)) => {
            let cause = "it is a daemon's public database; make a mirror of it with sppctl registry export".to_owned();
            return Err(SourceError::Failed { what: place.to_owned(), cause });
        }
        false => Box::new(Mirror::new(Path::new(place))),
    };
    chip_of(&*source, chip)
}

/// The same of a log that is open.
pub(super) fn chip_of(source: &dyn LogSource, chip: &ChipId) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
    let (record, proof) = chip_files(chip);
    Ok((source.file(&record, MAX_FILE)?, source.file(&proof, MAX_FILE)?))
}
