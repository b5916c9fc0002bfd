//! The sequencer: commits queued entries in batches with one sync and one signature each, publishes them, then answers the
//! callers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use spp_format::record::{LogEntry, Publication, UniqueKey};
use spp_format::tlog::{SignedCheckpoint, UnsignedCheckpoint};
use spp_log::registry::full_tiles::BUNDLE;
use spp_log::registry::partial_bundle::AppendedBatch;
use tokio::sync::{mpsc, oneshot};

use super::files::{AppendError, PartialBundleFile};
use super::first_checkpoints::CompactCheckpoint;
use super::read::EntryLocation;
use super::shared::{Shared, Unavailable};
use super::signer::LogSigner;
use super::snapshot::{IndexedEntry, Snapshot};
use crate::store::{InFlightPublications, PublishError, SledIndex};

/// Minimum and maximum delay before a retry.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Interval of attempts to sign the first checkpoint while the queue is empty.
const FIRST_CHECKPOINT: Duration = Duration::from_secs(1);

type Responder = oneshot::Sender<Result<Publication, PublishError>>;

/// A queued request to publish an entry.
pub(super) struct PublishRequest {
    pub(super) entry: LogEntry,
    pub(super) bytes: Vec<u8>,
    pub(super) responder: Responder,
}

/// An entry that is not in the log yet, and the callers that wait for it.
struct NewEntry {
    log_entry: LogEntry,
    entry: Arc<IndexedEntry>,
    responders: Vec<Responder>,
    /// Later requests in the batch that share a unique value with this entry, and the name of that value. They are rejected if
    /// this entry is committed.
    conflicting: Vec<(Responder, &'static str)>,
}

/// The only writer of the log.
pub(super) struct Sequencer {
    pub(super) shared: Arc<Shared>,
    pub(super) signer: Arc<dyn LogSigner>,
    pub(super) batch_size: usize,
    pub(super) batch_period: Duration,
    pub(super) index_patience: Duration,
    pub(super) in_flight: Arc<InFlightPublications>,
    /// `None` while the state of the disk is unknown.
    pub(super) partial_bundle: Option<PartialBundleFile>,
}

impl Sequencer {
    /// Processes requests until all senders are dropped.
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<PublishRequest>,
        index: Result<(SledIndex, u64), String>,
    ) {
        self.initialize_index(index).await;
        while let Some(batch) = self.collect(&mut queue).await {
            if let Err(why) = self.sequence(batch).await {
                self.recover(why, &mut queue).await;
            }
            self.shared.clear_pending();
        }
    }

    /// Collects a batch: until it is full, or all publications in flight are in it, or its first request has waited for the batch
    /// period.
    async fn collect(&mut self, queue: &mut mpsc::Receiver<PublishRequest>) -> Option<Vec<PublishRequest>> {
        let snapshot = self.shared.snapshot();
        if queue.is_empty() && snapshot.indexed < snapshot.tree.size() {
            self.sync_index(&mut Snapshot::clone(&snapshot)).await;
        }
        let first = loop {
            if self.shared.snapshot().checkpoint.is_some() {
                break queue.recv().await?;
            }
            if let Ok(first) = tokio::time::timeout(FIRST_CHECKPOINT, queue.recv()).await {
                break first?;
            }
            // An empty log needs a checkpoint, too. If the HSM is not available, retry later: no caller waits for it.
            if let Err(why) = self.sequence(Vec::new()).await {
                self.recover(why, queue).await;
            }
        };
        let deadline = tokio::time::Instant::now() + self.batch_period;
        let mut batch = vec![first];
        loop {
            while batch.len() < self.batch_size
                && let Ok(next) = queue.try_recv()
            {
                batch.push(next);
            }
            if batch.len() >= self.batch_size || self.in_flight.count() <= batch.len() {
                return Some(batch);
            }
            tokio::select! {
                next = queue.recv() => match next {
                    Some(next) => batch.push(next),
                    None => return Some(batch),
                },
                () = self.in_flight.wait_for_decrease() => {}
                () = tokio::time::sleep_until(deadline) => return Some(batch),
            }
        }
    }

    /// Publishes a batch and answers its callers. After an error the state of the disk is unknown, and the files must be read
    /// again.
    async fn sequence(&mut self, requests: Vec<PublishRequest>) -> Result<(), Unavailable> {
        // 1. Answer requests for published entries and reject conflicting ones, without a signature.
        let new = self.dedupe(requests).await;
        let snapshot = self.shared.snapshot();
        if new.is_empty() && snapshot.checkpoint.is_some() {
            return Ok(());
        }
        // 2. Add the new entries to the tree in memory.
        let mut grown = Snapshot::clone(&snapshot);
        for new in &new {
            grown.push(Arc::clone(&new.entry));
        }
        // 3. Sign the checkpoint: one HSM signature per batch. The signature does not leave this process before the commit.
        let checkpoint = match self.sign(&grown).await {
            Ok(checkpoint) => checkpoint,
            Err(why) => {
                respond(new, |_, _| Err(PublishError::Unsigned(why.clone())));
                return Ok(());
            }
        };
        // 4. Commit: entries and checkpoint are on disk, both or neither. From here on the batch survives a power loss.
        if let Err(why) = self.append(&snapshot, &checkpoint, &new).await {
            respond(new, |_, _| Err(PublishError::Store(self.shared.error(&why))));
            return Err(why);
        }
        self.shared.checkpoints.fetch_add(1, Ordering::Relaxed);
        // 5. Publish the new tree to readers.
        grown.first_checkpoints.extend(CompactCheckpoint::of(&checkpoint, self.signer.key()));
        grown.checkpoint = Some(checkpoint);
        self.shared.publish_snapshot(grown.clone());
        self.shared.clear_pending();
        // 6. Answer the callers.
        let first = snapshot.tree.size();
        respond(new, |position, new| Ok(new.log_entry.publication(first + position as u64, &new.entry.bytes)));
        // 7. Seal full bundles.
        match grown.recent.len() < BUNDLE as usize {
            true => Ok(()),
            false => self.seal_full_bundles(grown).await,
        }
    }

    /// Returns the entries that are new to the log and answers all other requests.
    async fn dedupe(&self, mut requests: Vec<PublishRequest>) -> Vec<NewEntry> {
        // A caller that timed out may look the record up. Mark the values as pending before dropping the requests of such
        // callers, so that no look-up reports "not published" for a request that is still in the batch.
        self.shared.set_pending(requests.iter().flat_map(|request| request.entry.keys()));
        requests.retain(|request| !request.responder.is_closed());
        let unique = |request: &PublishRequest| request.entry.keys().into_iter().filter(UniqueKey::is_unique).collect();
        let keys: Vec<Vec<_>> = requests.iter().map(unique).collect();
        let known = match self.shared.look_up(keys.concat()).await {
            Ok(known) => known,
            Err(error) => {
                let why = Unavailable::of(&error);
                requests
                    .into_iter()
                    .for_each(|request| drop(request.responder.send(Err(self.shared.error(&why).into()))));
                return Vec::new();
            }
        };
        let mut known = known.into_iter();
        let mut new: Vec<NewEntry> = Vec::new();
        let mut in_batch: HashMap<UniqueKey, usize> = HashMap::new();
        for (PublishRequest { entry: log_entry, bytes, responder }, keys) in requests.into_iter().zip(keys) {
            let known: Vec<_> = known.by_ref().take(keys.len()).collect();
            let existing = keys.iter().zip(known).find_map(|(key, found)| Some((key, found?)));
            if let Some((key, found)) = existing {
                let _ = responder.send(self.answer_existing(key, &found, &log_entry));
                continue;
            }
            if let Some((key, position)) = keys.iter().find_map(|key| Some((key, *in_batch.get(key)?))) {
                match new.get_mut(position) {
                    Some(same) if same.log_entry.eq_ignoring_time(&log_entry) => same.responders.push(responder),
                    Some(other) => other.conflicting.push((responder, key.field())),
                    None => {}
                }
                continue;
            }
            if let Err(full) = self.shared.files.store_dir().admit(self.shared.options.floor_bytes) {
                let _ = responder.send(Err(full.into()));
                continue;
            }
            in_batch.extend(keys.iter().map(|key| (*key, new.len())));
            let entry = Arc::new(IndexedEntry { keys: log_entry.keys(), bytes });
            new.push(NewEntry { log_entry, entry, responders: vec![responder], conflicting: Vec::new() });
        }
        new
    }

    /// The answer to a request for an entry with a unique value that is already in the log.
    fn answer_existing(
        &self,
        key: &UniqueKey,
        found: &EntryLocation,
        log_entry: &LogEntry,
    ) -> Result<Publication, PublishError> {
        let (known, publication) = self.shared.entry(found)?;
        match known.eq_ignoring_time(log_entry) {
            true => Ok(publication),
            false => Err(PublishError::Conflict(known.conflict(key.field(), publication.index))),
        }
    }

    async fn sign(&self, grown: &Snapshot) -> Result<SignedCheckpoint, String> {
        let key = self.signer.key();
        let unsigned = UnsignedCheckpoint::new(key.origin(), grown.tree.size(), grown.tree.root());
        let unsigned = unsigned.map_err(|e| e.to_string())?;
        let signature = self.signer.sign(&unsigned).await?;
        unsigned.signed(key, &signature).map_err(|e| e.to_string())
    }

    async fn append(
        &mut self,
        snapshot: &Snapshot,
        checkpoint: &SignedCheckpoint,
        new: &[NewEntry],
    ) -> Result<(), Unavailable> {
        let entries = new.iter().map(|new| new.entry.bytes.clone()).collect();
        let batch = AppendedBatch { first: snapshot.tree.size(), note: checkpoint.note().to_vec(), entries };
        let Some(mut partial_bundle) = self.partial_bundle.take() else {
            return Err(Unavailable::Failed("partial bundle not open".into()));
        };
        let appended = self
            .run_blocking(move |shared| shared.files.append(&mut partial_bundle, &batch).map(|()| partial_bundle))
            .await?;
        match appended {
            Ok(partial_bundle) => {
                self.partial_bundle = Some(partial_bundle);
                Ok(())
            }
            Err(AppendError::Full(error)) => {
                tracing::warn!(%error, "disk full: batch not written");
                Err(Unavailable::Full)
            }
            Err(AppendError::Failed(error)) => Err(Unavailable::Failed(error.to_string())),
        }
    }

    async fn seal_full_bundles(&mut self, mut snapshot: Snapshot) -> Result<(), Unavailable> {
        // Entries that leave the snapshot are found by the index only.
        self.sync_index(&mut snapshot).await;
        let Some(mut partial_bundle) = self.partial_bundle.take() else {
            return Err(Unavailable::Failed("partial bundle not open".into()));
        };
        let mut entries: Vec<_> = snapshot.recent.iter().map(|entry| entry.bytes.clone()).collect();
        let (checkpoint, first_checkpoints) = (snapshot.checkpoint.clone(), snapshot.first_checkpoints.clone());
        let sealed = self.run_blocking(move |shared| {
            let sealed = shared.files.seal_full_bundles(
                checkpoint.as_ref(),
                &mut entries,
                &first_checkpoints,
                &mut partial_bundle,
            );
            sealed.map(|()| partial_bundle).map_err(|e| Unavailable::of(&shared.files.failed("writing full tiles", &e)))
        });
        let partial_bundle = sealed.await??;
        let sealed_count = usize::try_from(partial_bundle.base() - snapshot.base).unwrap_or(snapshot.recent.len());
        snapshot.recent.drain(..sealed_count);
        snapshot.base = partial_bundle.base();
        snapshot.unwritten_tiles.clear();
        snapshot.first_checkpoints.retain(|checkpoint| checkpoint.size > partial_bundle.base());
        self.partial_bundle = Some(partial_bundle);
        self.shared.publish_snapshot(snapshot);
        Ok(())
    }

    /// Reads the files again and retries until this succeeds, because their state is unknown. Answers queued requests with an
    /// error until then.
    async fn recover(&mut self, why: Unavailable, queue: &mut mpsc::Receiver<PublishRequest>) {
        tracing::error!(?why, "public database failed; reading its files again");
        self.shared.set_unavailable(Some(why.clone()));
        let mut backoff = BACKOFF.0;
        let mut why = why;
        loop {
            while let Ok(request) = queue.try_recv() {
                let _ = request.responder.send(Err(self.shared.error(&why).into()));
            }
            if queue.is_closed() {
                return;
            }
            tokio::time::sleep(backoff).await;
            backoff = BACKOFF.1.min(backoff * 2);
            let (key, snapshot) = (self.signer.key().clone(), self.shared.snapshot());
            self.partial_bundle = None;
            let size = snapshot.tree.size();
            let found = self
                .run_blocking(move |shared| shared.files.recover(&key, size).map_err(|e| Unavailable::of(&e)))
                .await;
            let recovered = found.and_then(|found| found).and_then(|found| {
                let (snapshot, partial_bundle) = found.into_snapshot().map_err(|e| Unavailable::of(&e))?;
                self.partial_bundle = Some(partial_bundle);
                Ok(snapshot)
            });
            match recovered {
                Ok(mut found) => {
                    found.indexed = snapshot.indexed;
                    // Entries of bundles that recovery has sealed are found by the index only. Publish this snapshot after they
                    // are indexed.
                    self.sync_index(&mut found).await;
                    self.shared.clear_pending();
                    tracing::info!(entries = found.tree.size(), "public database recovered");
                    return;
                }
                Err(cause) => {
                    tracing::warn!(?cause, "public database not recovered; retrying");
                    self.shared.set_unavailable(Some(cause.clone()));
                    why = cause;
                }
            }
        }
    }

    /// Runs blocking disk work outside of the async worker threads.
    pub(super) async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|e| Unavailable::Failed(e.to_string()))
    }
}

fn respond(new: Vec<NewEntry>, result: impl Fn(usize, &NewEntry) -> Result<Publication, PublishError>) {
    for (position, mut new) in new.into_iter().enumerate() {
        for responder in std::mem::take(&mut new.responders) {
            // The caller may have stopped waiting; it retries.
            let _ = responder.send(result(position, &new));
        }
        for (responder, field) in std::mem::take(&mut new.conflicting) {
            let response = result(position, &new).and_then(|Publication { index, .. }| {
                Err(PublishError::Conflict(new.log_entry.conflict(field, index)))
            });
            let _ = responder.send(response);
        }
    }
}
