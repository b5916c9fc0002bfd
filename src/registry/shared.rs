//! Holds the state that the parts of an open log share: its files, snapshot and index, and whether publication is available.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use spp_format::record::UniqueKey;
use tokio::sync::watch;

use super::files::LogFiles;
use super::snapshot::Snapshot;
use crate::store::{SledIndex, StoreError, StoreOptions};

/// How long a look-up waits for an index that is being synchronized, or for the outcome of a pending batch.
pub(super) const LOOKUP_TIMEOUT: Duration = Duration::from_secs(1);

/// State shared by readers and the sequencer.
pub(super) struct Shared {
    pub(super) files: LogFiles,
    pub(super) options: StoreOptions,
    snapshot: RwLock<Arc<Snapshot>>,
    /// The index, once it is in sync with the files; until then the reason why it is not available.
    pub(super) index: watch::Sender<Result<Arc<SledIndex>, String>>,
    /// Why publication is unavailable; `None` while it is available.
    pub(super) unavailable: RwLock<Option<Unavailable>>,
    /// Number of committed checkpoints.
    pub(super) checkpoints: AtomicU64,
    /// The unique values of a batch whose outcome is not known yet.
    pub(super) pending: watch::Sender<HashSet<UniqueKey>>,
}

/// Why publication is unavailable.
#[derive(Debug, Clone)]
pub(super) enum Unavailable {
    /// The disk is full.
    Full,
    /// Anything else.
    Failed(String),
}

impl Unavailable {
    pub(super) fn of(error: &StoreError) -> Self {
        match error {
            StoreError::Full { .. } => Self::Full,
            other => Self::Failed(other.to_string()),
        }
    }
}

impl Shared {
    /// The state of a log that was opened with this snapshot. Its index is not loaded yet.
    pub(super) fn new(files: LogFiles, options: StoreOptions, snapshot: Snapshot) -> Self {
        Self {
            files,
            options,
            snapshot: RwLock::new(Arc::new(snapshot)),
            index: watch::Sender::new(Err("index loading".into())),
            unavailable: RwLock::default(),
            checkpoints: AtomicU64::new(0),
            pending: watch::Sender::default(),
        }
    }

    /// The error for callers while publication is unavailable.
    pub(super) fn error(&self, why: &Unavailable) -> StoreError {
        match why {
            Unavailable::Full => self.files.full_disk(),
            Unavailable::Failed(cause) => self.files.store_dir().failed("publishing", cause),
        }
    }

    /// The current snapshot.
    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Publishes a new snapshot to readers.
    pub(super) fn publish_snapshot(&self, snapshot: Snapshot) {
        *self.snapshot.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(snapshot);
    }

    /// The index, as soon as it is in sync with the files.
    pub(super) async fn index(&self) -> Result<Arc<SledIndex>, StoreError> {
        let mut index = self.index.subscribe();
        let synced = tokio::time::timeout(LOOKUP_TIMEOUT, index.wait_for(Result::is_ok)).await;
        if let Ok(Ok(synced)) = synced
            && let Ok(index) = &*synced
        {
            return Ok(Arc::clone(index));
        }
        let why = self.index.borrow().as_ref().err().cloned().unwrap_or_default();
        Err(self.files.store_dir().failed("looking up a record", format!("index not available: {why}")))
    }

    /// Sets why publication is unavailable, or `None` if it is available.
    pub(super) fn set_unavailable(&self, why: Option<Unavailable>) {
        *self.unavailable.write().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Marks values as pending: look-ups of them wait for the outcome of the batch.
    pub(super) fn set_pending(&self, keys: impl IntoIterator<Item = UniqueKey>) {
        let keys = keys.into_iter().collect();
        self.pending.send_replace(keys);
    }

    /// Ends the pending state: the snapshot shows the outcome of the batch.
    pub(super) fn clear_pending(&self) {
        self.pending.send_if_modified(|pending| !std::mem::take(pending).is_empty());
    }
}
