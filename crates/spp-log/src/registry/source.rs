//! Reads a log without the daemon: from a daemon's directory, a mirror's directory, or a web server that serves either.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use spp_format::names::ChipId;
use spp_format::tlog::{FullTile, LogKey, TileId, TileKind, Tree, bundle, leaf_hash};

use super::chip_files::{CHIPS, chip_files};
use super::fetch::Fetcher;
use super::full_tiles::{BUNDLE, FullTiles};
use super::partial_bundle;
use super::partial_bundle::newest_partial_bundle;

/// Maximum size of an entry bundle in bytes: 256 entries of maximum size.
const MAX_BUNDLE: u64 = 256 * 65_537;
/// Maximum size of a checkpoint, a record or a proof in bytes.
const MAX_FILE: u64 = 128 * 1024;

/// Why a part of a log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The part does not exist.
    #[error("{0} not found")]
    Missing(String),
    /// The part cannot be read.
    #[error("{what}: {cause}")]
    Failed {
        /// The part.
        what: String,
        /// Why it cannot be read.
        cause: String,
    },
    /// The server is unreachable, which says nothing about the log.
    #[error("cannot reach {what}: {cause}")]
    Unreachable {
        /// The URL.
        what: String,
        /// Why it is unreachable.
        cause: String,
    },
}

impl SourceError {
    fn from_io(what: &str, error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing(what.to_owned()),
            _ => Self::Failed { what: what.to_owned(), cause: error.to_string() },
        }
    }
}

/// A log that is read from outside. Its content is not trusted: callers verify it.
pub trait LogSource: Send {
    /// The log's name in messages.
    fn name(&self) -> String;
    /// Reads a file of a mirror by its path; fails if it has more than `max_bytes` bytes.
    fn file(&self, path: &str, max_bytes: u64) -> Result<Vec<u8>, SourceError>;
    /// Whether the log is local and has a record and a proof for each chip. `verify` reads these files, too.
    fn has_chips(&self) -> bool {
        false
    }
    /// The newest checkpoint, a signed note.
    fn checkpoint(&mut self) -> Result<Vec<u8>, SourceError> {
        self.file("checkpoint", MAX_FILE)
    }
    /// A tile or an entry bundle. If a partial one is missing, reads the full one: a mirror may have removed the partial one.
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, SourceError> {
        match self.file(&tile.to_string(), MAX_BUNDLE) {
            Err(SourceError::Missing(_)) if !tile.is_full() => {
                truncate_tile(tile, self.file(&tile.as_full().to_string(), MAX_BUNDLE)?)
            }
            found => found,
        }
    }
}

/// Opens a log at a path (a daemon's directory or a mirror) or URL. `authority` is a PEM file with the CA of the web server; the
/// system's CAs if `None`.
pub fn open_source(place: &str, key: &LogKey, authority: Option<&Path>) -> Result<Box<dyn LogSource>, SourceError> {
    if place.contains("://") {
        return Ok(Box::new(HttpSource::new(place, authority)?));
    }
    let dir = Path::new(place);
    if is_store(dir) {
        return Ok(Box::new(StoreDirectory::new(dir, key)));
    }
    Ok(Box::new(Mirror::new(dir)))
}

/// Whether the directory is a daemon's store.
pub(super) fn is_store(dir: &Path) -> bool {
    dir.join("store.toml").exists()
}

/// A mirror: a directory in the layout of C2SP tlog-tiles.
pub struct Mirror(PathBuf);

impl Mirror {
    /// The mirror in a directory.
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

    fn file(&self, path: &str, max_bytes: u64) -> Result<Vec<u8>, SourceError> {
        let length = fs::metadata(self.0.join(path)).map_err(|e| SourceError::from_io(path, &e))?.len();
        if length > max_bytes {
            let cause = format!("{length} bytes exceed the limit of {max_bytes} bytes");
            return Err(SourceError::Failed { what: path.to_owned(), cause });
        }
        fs::read(self.0.join(path)).map_err(|e| SourceError::from_io(path, &e))
    }
}

/// A web server that serves a log: another daemon's public listener, or a mirror.
pub struct HttpSource {
    prefix: String,
    fetcher: Fetcher,
}

impl HttpSource {
    /// The log below the URL `prefix`.
    pub fn new(prefix: &str, authority: Option<&Path>) -> Result<Self, SourceError> {
        let prefix = prefix.trim_end_matches('/').to_owned();
        let fetcher = Fetcher::for_mirrors(authority);
        let fetcher = fetcher.map_err(|cause| SourceError::Failed { what: prefix.clone(), cause })?;
        Ok(Self { prefix, fetcher })
    }
}

impl LogSource for HttpSource {
    fn name(&self) -> String {
        self.prefix.clone()
    }

    fn file(&self, path: &str, max_bytes: u64) -> Result<Vec<u8>, SourceError> {
        let what = format!("{}/{path}", self.prefix);
        match self.fetcher.get(&what, max_bytes) {
            Ok(answer) if answer.status == 200 => Ok(answer.body),
            Ok(answer) if answer.status == 404 => Err(SourceError::Missing(what)),
            Ok(answer) => Err(SourceError::Unreachable { what, cause: format!("status {}", answer.status) }),
            Err(cause) => Err(SourceError::Unreachable { what, cause }),
        }
    }
}

/// The directory of a daemon, which may be running.
pub struct StoreDirectory {
    dir: PathBuf,
    key: LogKey,
    partial_bundle: Option<PartialBundleSnapshot>,
}

/// The partial bundle at the time when the checkpoint was read.
struct PartialBundleSnapshot {
    base: u64,
    entries: Vec<Vec<u8>>,
    tree: Tree,
    /// Full tiles that are not files yet: between a commit and the sealing of full bundles.
    unwritten_tiles: Vec<FullTile>,
}

impl StoreDirectory {
    /// The log in a directory. The key distinguishes valid batches from those that a crash truncated.
    pub fn new(dir: &Path, key: &LogKey) -> Self {
        Self { dir: dir.to_owned(), key: key.clone(), partial_bundle: None }
    }

    fn read_partial_bundle(&self) -> Result<(PartialBundleSnapshot, Option<Vec<u8>>), SourceError> {
        let (base, path) = newest_partial_bundle(&self.dir).map_err(|e| SourceError::from_io("edge", &e))?;
        let what = format!("edge/{base:020}");
        // Sync before use: a power loss could remove a batch that the daemon has written but not synced.
        let read = fs::File::open(&path).and_then(|file| {
            let mut bytes = Vec::new();
            (&file).read_to_end(&mut bytes)?;
            file.sync_data().map(|()| bytes)
        });
        let bytes = read.map_err(|e| SourceError::from_io(&what, &e))?;
        let damaged = |cause: String| SourceError::Failed { what: what.clone(), cause };
        let mut tree = Tree::read(base, &FullTiles(&self.dir)).map_err(|e| damaged(e.to_string()))?;
        let partial_bundle = partial_bundle::read(&bytes, &tree, &self.key).map_err(damaged)?;
        let (mut entries, mut unwritten_tiles, mut note) = (Vec::new(), Vec::new(), None);
        for (batch, checkpoint) in partial_bundle.batches {
            unwritten_tiles.extend(batch.entries.iter().flat_map(|entry| tree.push(leaf_hash(entry))));
            entries.extend(batch.entries);
            note = Some(checkpoint.note().to_vec());
        }
        Ok((PartialBundleSnapshot { base, entries, tree, unwritten_tiles }, note))
    }
}

impl LogSource for StoreDirectory {
    fn name(&self) -> String {
        self.dir.display().to_string()
    }

    fn checkpoint(&mut self) -> Result<Vec<u8>, SourceError> {
        // The daemon may replace the partial bundle after it was located: then locate it again.
        let mut attempts = 3;
        let (partial_bundle, note) = loop {
            attempts -= 1;
            match self.read_partial_bundle() {
                Err(SourceError::Missing(_)) if attempts > 0 => {}
                read => break read?,
            }
        };
        self.partial_bundle = Some(partial_bundle);
        note.ok_or_else(|| SourceError::Missing("checkpoint".to_owned()))
    }

    fn tile(&self, tile: TileId) -> Result<Vec<u8>, SourceError> {
        let what = tile.to_string();
        if let Some(partial_bundle) = &self.partial_bundle {
            let first = tile.index() * BUNDLE;
            if tile.kind() == TileKind::Entries && first >= partial_bundle.base {
                let from = usize::try_from(first - partial_bundle.base).unwrap_or(usize::MAX);
                let mut bytes = Vec::new();
                for entry in partial_bundle.entries.iter().skip(from).take(tile.width().into()) {
                    let cause = |e: spp_format::tlog::TlogError| SourceError::Failed {
                        what: what.clone(),
                        cause: e.to_string(),
                    };
                    bundle::push(&mut bytes, entry).map_err(cause)?;
                }
                return Ok(bytes);
            }
            if let Some(hashes) = partial_bundle.tree.partial(tile).filter(|_| !tile.is_full()) {
                return Ok(hashes.get(..usize::from(tile.width()) * 32).unwrap_or(hashes).to_vec());
            }
            if let Some(full) = partial_bundle.unwritten_tiles.iter().find(|full| full.id == tile.as_full()) {
                return truncate_tile(tile, full.hashes.clone());
            }
        }
        let full =
            FullTiles(&self.dir).read(tile).map_err(|e| SourceError::from_io(&tile.as_full().to_string(), &e))?;
        truncate_tile(tile, full)
    }

    fn file(&self, path: &str, _: u64) -> Result<Vec<u8>, SourceError> {
        Err(SourceError::Missing(path.to_owned()))
    }
}

/// Cuts a partial tile from the beginning of the full one.
fn truncate_tile(tile: TileId, full: Vec<u8>) -> Result<Vec<u8>, SourceError> {
    let length = match tile.kind() {
        TileKind::Hashes(_) => usize::from(tile.width()) * 32,
        TileKind::Entries => {
            let entries = bundle::entries(&full).take(tile.width().into());
            let length =
                entries.map(|entry| entry.map(|entry| entry.len() + bundle::LENGTH_SIZE)).sum::<Result<usize, _>>();
            length.map_err(|e| SourceError::Failed { what: tile.to_string(), cause: e.to_string() })?
        }
    };
    let mut bytes = full;
    bytes.truncate(length);
    Ok(bytes)
}

/// Reads a chip's record and proof from a mirror (a directory or a URL). Neither is verified.
pub fn read_chip(place: &str, chip: &ChipId, authority: Option<&Path>) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
    let source: Box<dyn LogSource> = match place.contains("://") {
        true => Box::new(HttpSource::new(place, authority)?),
        false if is_store(Path::new(place)) => {
            let cause =
                "not a mirror but a daemon's public database; create a mirror with sppctl registry export".to_owned();
            return Err(SourceError::Failed { what: place.to_owned(), cause });
        }
        false => Box::new(Mirror::new(Path::new(place))),
    };
    read_chip_files(&*source, chip)
}

/// The same for an open log.
pub(super) fn read_chip_files(source: &dyn LogSource, chip: &ChipId) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
    let (record, proof) = chip_files(chip);
    Ok((source.file(&record, MAX_FILE)?, source.file(&proof, MAX_FILE)?))
}
