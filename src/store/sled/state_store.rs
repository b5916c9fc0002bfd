//! The embedded state store on sled: one database, which is created, opened and checked here.
//!
//! It holds the session journal (`session_rows.rs`), the secret store (`batch_rows.rs`, `pairs.rs`), access control data
//! (`access.rs`) and production statistics (`production.rs`).

use std::path::Path;
use std::sync::Arc;

use super::committer::Committer;
use super::directory::{Fs, OsFs, StoreKind};
use super::engine::DatabaseKind;
use super::session_rows::{COUNTS, UNFINISHED, counts, listed_session};
use super::view::View;
use super::{StoreOptions, batch_rows};
use crate::hsm::StoreId;
use crate::store::{SessionCounts, StoreError};

static KIND: DatabaseKind =
    DatabaseKind { store: StoreKind { name: "state store", marker: "state", format: 2 }, init, check };

/// The embedded state store.
///
/// Trust: an attacker who controls its directory can withhold or roll back sessions, but cannot read keys without the HSM.
pub struct SledStateStore(pub(super) Committer);

impl SledStateStore {
    /// Creates an empty store and opens it, for `sppctl init`. Fails with [`StoreError::Directory`] if the path exists.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Committer::create(&KIND, dir, options, Arc::new(OsFs)).map(Self)
    }

    /// Opens an existing store and never creates one. Fails with [`StoreError::Directory`] if it is missing, of another kind, or
    /// still locked by another process after some seconds. Calls need a tokio runtime with a timer.
    pub fn open(dir: &Path, options: &StoreOptions) -> Result<Self, StoreError> {
        Self::open_through(dir, options, Arc::new(OsFs))
    }

    pub(super) fn open_through(dir: &Path, options: &StoreOptions, fs: Arc<dyn Fs>) -> Result<Self, StoreError> {
        Committer::open(&KIND, dir, options, fs).map(Self)
    }
}

fn init(view: &mut View<'_>) -> Result<(), StoreError> {
    view.put(COUNTS, &SessionCounts::default())?;
    let mut bytes = [0; 8];
    let random = aws_lc_rs::rand::fill(&mut bytes);
    random.map_err(|e| view.damaged("the system's random bytes".into(), e))?;
    batch_rows::init(view, StoreId::from_random(bytes))
}

fn check(view: &View<'_>) -> Result<(), StoreError> {
    counts(view)?;
    batch_rows::check(view)?;
    // A restart resumes the unfinished sessions. Reading the oldest one is a sample check.
    match view.keys(UNFINISHED)?.first() {
        Some(key) => listed_session(view, key).map(drop),
        None => Ok(()),
    }
}
