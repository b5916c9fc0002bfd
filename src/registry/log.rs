//! The transparency log behind [`PublicDatabase`]: the sequencer publishes entries, reads use an immutable snapshot of the log.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use spp_format::record::{AuditCheckpoint, DeviceRecord, LogEntry, Publication, PublishedRecord, UniqueKey};
use spp_format::tlog::{LogKey, LogProof, SignedCheckpoint, TileId};
use spp_log::registry::full_tiles::BUNDLE;
use tokio::sync::{mpsc, oneshot};

use super::files::LogFiles;
use super::index::belongs_to_log;
use super::read::EntryLocation;
use super::sequencer::{PublishRequest, Sequencer};
use super::shared::{Shared, Unavailable};
use super::signer::LogSigner;
use super::snapshot::{Snapshot, damaged};
use super::witness::{self, CosigningState, Witness};
use crate::store::directory::{Fs, OsFs};
use crate::store::{
    InFlightPublication, InFlightPublications, LogReader, PublicDatabase, PublishError, RegistryStatus, SledIndex,
    StoreError, StoreOptions,
};

/// Capacity of the sequencer's queue. Callers wait while it is full.
const QUEUE_CAPACITY: usize = 1024;
/// How long a caller waits for the sequencer. After a timeout the entry may still be published.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(30);
/// Batching and witness settings of a log.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Maximum number of entries in a batch, 1 to 256.
    pub batch_size: usize,
    /// Maximum time that an entry waits for other publications in flight. Without any, it does not wait.
    pub batch_period: Duration,
    /// How long index writes may fail before the index is rebuilt from the files.
    pub index_patience: Duration,
    /// Witnesses that cosign checkpoints.
    pub witnesses: Vec<Witness>,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            batch_size: 256,
            batch_period: Duration::from_millis(50),
            index_patience: Duration::from_secs(10),
            witnesses: Vec::new(),
        }
    }
}

/// The permanent public database: a transparency log in a directory.
///
/// Trust: an attacker who controls the directory can withhold entries, but cannot alter, remove or reorder one unnoticed.
pub struct TransparencyLog {
    shared: Arc<Shared>,
    queue: mpsc::Sender<PublishRequest>,
    in_flight: Arc<InFlightPublications>,
    cosigning: CosigningState,
    /// The newest checkpoint that was published. An older one is never published after it.
    newest_published: Mutex<Option<SignedCheckpoint>>,
    key: LogKey,
}

impl TransparencyLog {
    /// Creates the directory of an empty log, for `sppctl init`. [`StoreError::Directory`] if the path exists.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<(), StoreError> {
        let files = LogFiles::create(dir, options, Arc::new(OsFs))?;
        SledIndex::create(&files.index_dir(), options)?;
        files.finish()
    }

    /// Opens an existing log; never creates one. [`StoreError::Directory`] if there is none, or another kind of store, or if
    /// another process has it open. Needs a tokio runtime, on which the sequencer runs until the value is dropped.
    pub async fn open(
        dir: &Path,
        options: &StoreOptions,
        signer: Arc<dyn LogSigner>,
        settings: LogSettings,
    ) -> Result<Self, StoreError> {
        Self::open_through(dir, options, signer, settings, Arc::new(OsFs)).await
    }

    pub(super) async fn open_through(
        dir: &Path,
        options: &StoreOptions,
        signer: Arc<dyn LogSigner>,
        settings: LogSettings,
        fs: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let files = LogFiles::open(dir, options, fs)?;
        let (index, known) = match SledIndex::open_or_size(&files.index_dir(), options).await {
            Ok(index) => match index.mark().await {
                Ok(mark) => (Ok((index, mark)), mark.size),
                Err(error) => (Err(error.to_string()), 0),
            },
            Err((error, known)) => (Err(error.to_string()), known),
        };
        let recovered = files.recover(signer.key(), known)?;
        let index = index.and_then(|(index, mark)| {
            match belongs_to_log(&mark, recovered.partial_bundle.base(), &recovered.entries, dir) {
                true => Ok((index, mark.size)),
                false => Err("it belongs to another log".to_owned()),
            }
        });
        let (mut snapshot, partial_bundle) = recovered.into_snapshot()?;
        snapshot.indexed = index.as_ref().map_or(0, |(_, size)| *size);
        let shared = Arc::new(Shared::new(files, options.clone(), snapshot));
        let (queue, requests) = mpsc::channel(QUEUE_CAPACITY);
        let in_flight = Arc::new(InFlightPublications::default());
        let key = signer.key().clone();
        let cosigning = witness::CosigningState::default();
        let sequencer = Sequencer {
            shared: Arc::clone(&shared),
            signer,
            batch_size: settings.batch_size.clamp(1, BUNDLE as usize),
            batch_period: settings.batch_period,
            index_patience: settings.index_patience,
            in_flight: Arc::clone(&in_flight),
            partial_bundle: Some(partial_bundle),
        };
        let task = tokio::spawn(sequencer.run(requests, index));
        let shared_by_monitor = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = task.await {
                tracing::error!(%error, "sequencer of the public database stopped; restart the daemon");
                shared_by_monitor
                    .set_unavailable(Some(Unavailable::Failed("sequencer stopped; restart the daemon".into())));
            }
        });
        if !settings.witnesses.is_empty() {
            tokio::spawn(witness::run(Arc::downgrade(&shared), settings.witnesses, key.clone(), cosigning.clone()));
        }
        Ok(Self { shared, queue, in_flight, cosigning, newest_published: Mutex::default(), key })
    }

    /// Runs blocking disk work outside of the async worker threads.
    async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        done.map_err(|e| self.shared.files.store_dir().failed("reading the log", e))?
    }

    /// Passes an entry and its encoding to the sequencer and waits for the result.
    async fn append(&self, entry: LogEntry, bytes: Vec<u8>) -> Result<Publication, PublishError> {
        self.check_available()?;
        let (responder, response) = oneshot::channel();
        let request = PublishRequest { entry, bytes, responder };
        let published = async {
            self.queue.send(request).await.map_err(|_| "sequencer stopped")?;
            response.await.map_err(|_| "sequencer stopped")
        };
        let failed = |cause: &str| PublishError::Store(self.shared.files.store_dir().failed("publishing", cause));
        match tokio::time::timeout(PUBLISH_TIMEOUT, published).await {
            Ok(Ok(result)) => result,
            Ok(Err(cause)) => Err(failed(cause)),
            Err(_) => Err(failed("timeout waiting for the sequencer; the entry may still be published")),
        }
    }

    fn check_available(&self) -> Result<(), StoreError> {
        let unavailable = self.shared.unavailable.read().unwrap_or_else(PoisonError::into_inner);
        unavailable.as_ref().map_or(Ok(()), |why| Err(self.shared.error(why)))
    }

    /// The newest snapshot, and the newest published checkpoint: with cosignatures if there are witnesses.
    fn published(&self) -> (Arc<Snapshot>, Option<SignedCheckpoint>) {
        let mut newest_published = self.newest_published.lock().unwrap_or_else(PoisonError::into_inner);
        let cosigned = self.cosigning.newest();
        let snapshot = self.shared.snapshot();
        let size = |checkpoint: &Option<SignedCheckpoint>| checkpoint.as_ref().map(SignedCheckpoint::size);
        let checkpoint = cosigned.or_else(|| snapshot.checkpoint.clone());
        if size(&checkpoint) >= size(&newest_published) {
            *newest_published = checkpoint;
        }
        (snapshot, newest_published.clone())
    }
}

#[async_trait]
impl PublicDatabase for TransparencyLog {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        self.append(LogEntry::Device(Box::new(record.clone())), record.to_bytes()?).await
    }

    async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError> {
        self.append(LogEntry::Audit(checkpoint.clone()), checkpoint.to_bytes()?).await
    }

    fn reserve_slot(&self) -> InFlightPublication {
        self.in_flight.reserve_slot()
    }
}

#[async_trait]
impl LogReader for TransparencyLog {
    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError> {
        match self.shared.find(vec![*key]).await?.pop().flatten() {
            Some(found) => self.run_blocking(move |shared| shared.record(&found)).await,
            None => Ok(None),
        }
    }

    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError> {
        match index < self.shared.snapshot().tree.size() {
            true => self.run_blocking(move |shared| shared.record(&EntryLocation::Recent(index))).await,
            false => Ok(None),
        }
    }

    async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError> {
        let snapshot = self.shared.snapshot();
        self.run_blocking(move |shared| shared.newest(&snapshot)).await
    }

    async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError> {
        let found = self.shared.find(vec![UniqueKey::of_audited_node(node)]).await?.pop().flatten();
        let Some(found) = found else { return Ok(None) };
        match self.run_blocking(move |shared| shared.entry(&found)).await? {
            (LogEntry::Audit(checkpoint), publication) => Ok(Some((publication.index, checkpoint))),
            (LogEntry::Device(_), publication) => Err(damaged(
                publication.index,
                "indexed as an audit checkpoint, but it is a device record; rebuild the index with sppctl registry reindex",
            )),
        }
    }

    async fn len(&self) -> Result<u64, StoreError> {
        Ok(self.shared.snapshot().records)
    }

    fn status(&self) -> RegistryStatus {
        RegistryStatus {
            publish_error: self.check_available().err().map(|e| e.to_string()),
            read_error: self.shared.index.borrow().as_ref().err().cloned(),
            checkpoints: self.shared.checkpoints.load(Ordering::Relaxed),
            witnesses: self.cosigning.status(),
        }
    }

    async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError> {
        Ok(self.published().1)
    }

    async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        let (snapshot, published) = self.published();
        // The published checkpoint may be older than the snapshot while witnesses are being asked.
        let covering = published.filter(|checkpoint| index < checkpoint.size()).or_else(|| snapshot.checkpoint.clone());
        let Some(checkpoint) = covering.filter(|checkpoint| index < checkpoint.size()) else { return Ok(None) };
        self.run_blocking(move |shared| shared.prove(&snapshot, index, &checkpoint).map(Some)).await
    }

    async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        let (snapshot, key) = (self.shared.snapshot(), self.key.clone());
        self.run_blocking(move |shared| shared.receipt(&snapshot, index, &key)).await
    }

    async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        let snapshot = self.shared.snapshot();
        self.run_blocking(move |shared| shared.tile(&snapshot, tile)).await
    }
}
