//! The index of the public database on sled: by chip and the other unique values, where the record is in the log's files.
//!
//! It holds nothing of its own. The files are the truth, and it can be made anew from them at any time.
//!
//! | key | value |
//! |---|---|
//! | what an entry is found by, and the SHA-256 of its value | the place of the newest such entry |
//! | `n` | how many entries are in it, and the leaf hash of the last one |

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::StoreOptions;
use super::committer::Committer;
use super::directory::{StoreKind, System};
use super::engine::Kind;
use super::view::View;
use crate::store::{StoreError, UniqueKey};
use crate::tlog::TreeHash;

/// A new kind of keys needs no other format if no log had entries with them before: what is in an older index is all there is to find.
static KIND: Kind = Kind {
    store: StoreKind { name: "index of the public database", marker: "index", format: 1 },
    found: |view| view.put(MARK, &IndexMark::default()),
    check: |view| mark(view).map(drop),
};

const MARK: &[u8] = b"n";

/// How far the index goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IndexMark {
    /// Entries of the log that are in it.
    pub(crate) size: u64,
    /// The leaf hash of the last of them.
    pub(crate) leaf: TreeHash,
}

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Location {
    /// Its number in the log, from 0.
    pub(crate) index: u64,
    /// Where its bytes begin in their bundle.
    pub(crate) offset: u32,
    /// How many they are.
    pub(crate) length: u16,
}

/// What the index takes of an entry.
pub(crate) struct IndexEntry {
    /// The values by which it is found.
    pub(crate) keys: Vec<UniqueKey>,
    /// Where it is.
    pub(crate) location: Location,
}

/// The index, open.
pub(crate) struct SledIndex(Committer);

impl SledIndex {
    /// Makes an empty one where there is none.
    pub(crate) fn create(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::create(&KIND, dir, &Self::options(options), Arc::new(System)).map(Self)
    }

    /// Opens an existing one.
    pub(crate) fn open(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::open(&KIND, dir, &Self::options(options), Arc::new(System)).map(Self)
    }

    /// What is in the log must be findable: the floor for new records is the log's, and so is the reserve.
    fn options(log: &StoreOptions) -> StoreOptions {
        StoreOptions { floor_bytes: 0, reserve_bytes: 0, ..log.clone() }
    }

    /// How far it goes.
    pub(crate) async fn mark(&self) -> Result<IndexMark, StoreError> {
        self.0.run("reading how far the index goes", |view| mark(view)).await
    }

    /// Adds entries, all or none; durable when this returns. Those that come again replace themselves.
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

    /// Where the entries with these values are.
    pub(crate) async fn find(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Location>>, StoreError> {
        let find = move |view: &mut View<'_>| {
            keys.iter().map(|key| view.get(key.as_bytes(), || "an entry's place".into())).collect()
        };
        self.0.run("looking up a record", find).await
    }
}

fn mark(view: &View<'_>) -> Result<IndexMark, StoreError> {
    let what = || "how far the index goes".to_owned();
    view.get(MARK, what)?.ok_or_else(|| view.damaged(what(), "it is not there"))
}
