//! Synchronizes the index with the files: at startup, when the queue is empty, and before full bundles are sealed. Rebuilds an
//! index that is missing or damaged. Devices never wait for the index: it is derived from the files, and the snapshot has the
//! newest entries.

use std::sync::Arc;
use std::time::{Duration, Instant};

use spp_format::tlog::bundle;
use spp_log::registry::full_tiles::BUNDLE;

use super::index::{IndexBuilder, create_empty_index};
use super::sequencer::{BACKOFF, Sequencer};
use super::shared::Unavailable;
use super::snapshot::Snapshot;
use crate::store::directory::MIN_FREE_BYTES;
use crate::store::{SledIndex, StoreError};

/// Interval of progress reports during long work.
const PROGRESS: Duration = Duration::from_secs(5);

impl Sequencer {
    /// Adds all entries of the snapshot to the index and retries until this succeeds: an entry that is not indexed could be
    /// published twice.
    pub(super) async fn sync_index(&self, snapshot: &mut Snapshot) {
        let started = Instant::now();
        let mut backoff = BACKOFF.0;
        loop {
            let index = self.shared.index.borrow().as_ref().ok().cloned();
            let added = match &index {
                Some(index) => self.catch_up(index, snapshot).await,
                None => Err(self.shared.files.store_dir().failed("adding to the index", "no index is open")),
            };
            let Err(error) = added else {
                snapshot.indexed = snapshot.tree.size();
                self.shared.publish_snapshot(snapshot.clone());
                self.shared.set_unavailable(None);
                return;
            };
            tracing::warn!(%error, "write to the index of the public database failed");
            // A full disk is no reason to rebuild the index: a new one needs even more space.
            let store_dir = self.shared.files.store_dir();
            let full = matches!(error, StoreError::Full { .. }) || store_dir.admit(MIN_FREE_BYTES).is_err();
            if full && store_dir.release_reserve() {
                continue;
            }
            let why = error.to_string();
            self.shared.set_unavailable(Some(match full {
                true => Unavailable::Full,
                false => Unavailable::Failed(format!("index write failed: {why}")),
            }));
            tokio::time::sleep(backoff).await;
            if !full && (index.is_none() || started.elapsed() >= self.index_patience) {
                drop(index);
                self.rebuild_index(snapshot, &why).await;
            }
            backoff = BACKOFF.1.min(backoff * 2);
        }
    }

    /// Synchronizes the opened index with the files, or builds a new one.
    pub(super) async fn initialize_index(&mut self, opened: Result<(SledIndex, u64), String>) {
        let mut snapshot = Snapshot::clone(&self.shared.snapshot());
        let synced = match opened {
            Ok((index, from)) => {
                self.index_full_bundles(&index, from, &snapshot).await.map(|()| index).map_err(|e| e.to_string())
            }
            Err(why) => Err(why),
        };
        match synced {
            Ok(index) => {
                snapshot.indexed = snapshot.indexed.max(snapshot.base);
                drop(self.shared.index.send_replace(Ok(Arc::new(index))));
            }
            Err(why) => self.rebuild_index(&mut snapshot, &why).await,
        }
        self.sync_index(&mut snapshot).await;
    }

    /// Replaces a missing or damaged index by a new one with the entries of all full bundles. On failure the caller retries.
    async fn rebuild_index(&self, snapshot: &mut Snapshot, why: &str) {
        tracing::warn!(
            why,
            entries = snapshot.tree.size(),
            "rebuilding the index of the public database from its files"
        );
        let old = self.shared.index.send_replace(Err(format!("index being rebuilt: {why}")));
        if let Ok(mut old) = old {
            // Readers release the old index within a moment. It must be closed before a new one is created in its directory.
            while let Err(shared) = Arc::try_unwrap(old) {
                old = shared;
                tokio::time::sleep(BACKOFF.0).await;
            }
        }
        let created = self
            .run_blocking(|shared| create_empty_index(&shared.files, &shared.options).map_err(|e| Unavailable::of(&e)))
            .await;
        let index = match created.and_then(|created| created) {
            Ok(index) => index,
            Err(why) => return tracing::error!(?why, "cannot create a new index"),
        };
        match self.index_full_bundles(&index, 0, snapshot).await {
            Ok(()) => {
                // Unlike the old index, the new one lacks the entries that are not in full bundles. Readers must see this
                // snapshot first.
                snapshot.indexed = snapshot.base;
                self.shared.publish_snapshot(snapshot.clone());
                drop(self.shared.index.send_replace(Ok(Arc::new(index))));
            }
            Err(error) => tracing::error!(%error, "cannot fill the new index"),
        }
    }

    /// Indexes all entries of the snapshot. Entries of bundles that were sealed while the index was not writable come from these
    /// bundles.
    async fn catch_up(&self, index: &SledIndex, snapshot: &Snapshot) -> Result<(), StoreError> {
        self.index_full_bundles(index, snapshot.indexed, snapshot).await?;
        index_recent(index, snapshot).await
    }

    /// Indexes the entries of full bundles, starting at entry `from`.
    async fn index_full_bundles(&self, index: &SledIndex, from: u64, snapshot: &Snapshot) -> Result<(), StoreError> {
        let bundles = from / BUNDLE..snapshot.base / BUNDLE;
        if bundles.is_empty() {
            return Ok(());
        }
        let mut builder = IndexBuilder::new(index, bundles.start * BUNDLE, 0);
        let mut last_report = Instant::now();
        for number in bundles {
            builder.add_bundle(&self.shared.files, number).await?;
            if last_report.elapsed() > PROGRESS {
                last_report = Instant::now();
                let (done, total) = (builder.next, snapshot.base);
                tracing::info!(done, total, "indexing the public database");
                self.shared.set_unavailable(Some(Unavailable::Failed(format!(
                    "index being built: {done} of {total} entries"
                ))));
            }
        }
        builder.finish().await
    }
}

async fn index_recent(index: &SledIndex, snapshot: &Snapshot) -> Result<(), StoreError> {
    let from = snapshot.indexed.max(snapshot.base);
    let indexed_recent = usize::try_from(from - snapshot.base).unwrap_or(0);
    let bundle_start = indexed_recent / BUNDLE as usize * BUNDLE as usize;
    let in_bundle = snapshot.recent.get(bundle_start..indexed_recent).unwrap_or_default();
    let offset = in_bundle.iter().map(|entry| entry.bytes.len() + bundle::LENGTH_SIZE).sum::<usize>();
    let mut builder = IndexBuilder::new(index, from, u32::try_from(offset).unwrap_or(u32::MAX));
    for entry in snapshot.recent.get(indexed_recent..).unwrap_or_default() {
        builder.push(&entry.keys, &entry.bytes);
    }
    builder.finish().await
}
