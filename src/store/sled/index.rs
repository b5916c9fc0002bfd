//! The index of the public database on sled. It maps lookup keys to locations in the log's files.
//!
//! The index is derived data: it can be rebuilt from the log's files at any time.
//!
//! | key | value |
//! |---|---|
//! | lookup key: field tag and SHA-256 of the value | location of the newest entry with the value |
//! | `n` | number of indexed entries, and the leaf hash of the last one |

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use spp_format::record::UniqueKey;
use spp_format::tlog::TreeHash;

use super::StoreOptions;
use super::committer::Committer;
use super::directory::{OsFs, StoreKind};
use super::engine::DatabaseKind;
use super::view::View;
use crate::store::StoreError;

/// An index of an older version is rebuilt from the log's files. Version 2: the lookup key of a public key no longer depends on the
/// key's encoding. A new lookup key type needs a new version only if existing logs have entries with it.
static KIND: DatabaseKind = DatabaseKind {
    store: StoreKind { name: "index of the public database", marker: "index", format: 2 },
    init: |view| view.put(MARK, &IndexMark::default()),
    check: |view| mark(view).map(drop),
};

/// The previous format. Its mark is read before the index is rebuilt.
static OLDER_KIND: DatabaseKind = DatabaseKind {
    store: StoreKind { name: "index of the public database", marker: "index", format: 1 },
    init: |_| Ok(()),
    check: |view| mark(view).map(drop),
};

const MARK: &[u8] = b"n";

/// High-water mark of the index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexMark {
    /// Number of indexed log entries.
    pub(crate) size: u64,
    /// Leaf hash of the last indexed entry.
    pub(crate) leaf: TreeHash,
}

/// The location of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Location {
    /// Index in the log, from 0.
    pub(crate) index: u64,
    /// Offset in its entry bundle.
    pub(crate) offset: u32,
    /// Length in bytes.
    pub(crate) length: u16,
}

/// An entry to index.
pub(crate) struct IndexEntry {
    /// Its lookup keys.
    pub(crate) keys: Vec<UniqueKey>,
    /// Its location.
    pub(crate) location: Location,
}

/// An open index.
pub(crate) struct SledIndex(Committer);

impl SledIndex {
    /// Creates an empty index. The directory must not exist.
    pub(crate) fn create(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::create(&KIND, dir, &Self::options(options), Arc::new(OsFs)).map(Self)
    }

    /// Opens an existing index.
    pub(crate) fn open(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::open(&KIND, dir, &Self::options(options), Arc::new(OsFs)).map(Self)
    }

    /// Opens an existing index. If that fails, the error comes with the number of entries of an index of the previous format:
    /// the log's files must have at least as many, whichever index counted them.
    pub(crate) async fn open_or_size(dir: &Path, options: &StoreOptions) -> Result<Self, (StoreError, u64)> {
        let error = match Self::open(dir, options) {
            Ok(index) => return Ok(index),
            Err(error) => error,
        };
        let size = match Committer::open(&OLDER_KIND, dir, &Self::options(options), Arc::new(OsFs)) {
            Ok(older) => Self(older).mark().await.map_or(0, |mark| mark.size),
            Err(_) => 0,
        };
        Err((error, size))
    }

    /// No floor and no reserve: the log enforces both, and every entry in the log must be indexed.
    fn options(log: &StoreOptions) -> StoreOptions {
        StoreOptions { floor_bytes: 0, reserve_bytes: 0, ..log.clone() }
    }

    /// The high-water mark.
    pub(crate) async fn mark(&self) -> Result<IndexMark, StoreError> {
        self.0.run("reading the index mark", |view| mark(view)).await
    }

    /// Atomically and durably adds entries. Adding an entry again has no effect.
    pub(crate) async fn add(&self, entries: Vec<IndexEntry>, after: IndexMark) -> Result<(), StoreError> {
        let add = move |view: &mut View<'_>| {
            for entry in &entries {
                for key in &entry.keys {
                    view.put(key.as_bytes(), &entry.location)?;
                }
            }
            view.put(MARK, &after)
        };
        self.0.run("adding to the index", add).await
    }

    /// The locations of the newest entries with these keys.
    pub(crate) async fn find(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Location>>, StoreError> {
        let find = move |view: &mut View<'_>| {
            keys.iter().map(|key| view.get(key.as_bytes(), || "an entry's location".into())).collect()
        };
        self.0.run("looking up a record", find).await
    }
}

fn mark(view: &View<'_>) -> Result<IndexMark, StoreError> {
    let name = || "the index mark".to_owned();
    view.get(MARK, name)?.ok_or_else(|| view.damaged(name(), "missing"))
}
