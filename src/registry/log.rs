//! The log as the rest of the house uses it: publishing goes to the sequencer, reading to a picture of the tree that never changes.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};

use super::files::{BUNDLE, LogFiles};
use super::index::is_of_this_log;
use super::read::Found;
use super::sequencer::{Sequencer, Waiting};
use super::signer::CheckpointSigner;
use super::snapshot::{Snapshot, damaged};
use super::witness::{self, Cosigned, Witness};
use crate::store::directory::{Fs, System};
use crate::store::{
    AuditCheckpoint, DeviceRecord, InFlightPublication, InFlightPublications, LogEntry, PublicDatabase, Publication,
    PublishError, PublishedRecord, RegistryStatus, SledIndex, StoreError, StoreOptions, UniqueKey,
};
use crate::tlog::{LogKey, LogProof, SignedCheckpoint, TileId};

/// Entries that may wait for the sequencer before more of them have to.
const QUEUE: usize = 1024;
/// When a caller is told that there is no answer. What it asked for may still happen.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long a look-up waits for an index that is being caught up, or for what becomes of a batch.
pub(super) const FOUND_WITHIN: Duration = Duration::from_secs(1);

/// How a log makes its batches, and who watches it.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Most entries of a batch, 1 to 256.
    pub batch_size: usize,
    /// Longest that an entry waits for others that are on the way. Nobody waits when nobody is.
    pub batch_period: Duration,
    /// How long the index may fail to be written before it is made anew from the files.
    pub index_patience: Duration,
    /// Who is asked to cosign checkpoints.
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

/// The permanent public database in a directory.
///
/// Trust: whoever controls its directory can withhold entries; not alter, remove or reorder one unnoticed.
pub struct TransparencyLog {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Waiting>,
    announcements: Arc<InFlightPublications>,
    cosigned: Cosigned,
    /// The newest checkpoint that was shown to anybody: none is shown that is older.
    shown: Mutex<Option<SignedCheckpoint>>,
    key: LogKey,
}

/// What readers and the sequencer share.
pub(super) struct Shared {
    pub(super) files: LogFiles,
    pub(super) options: StoreOptions,
    head: RwLock<Arc<Snapshot>>,
    /// The index, once it is level with the files; until then why it is not.
    pub(super) index: watch::Sender<Result<Arc<SledIndex>, String>>,
    /// Why nothing can be published, while that is so.
    pub(super) away: RwLock<Option<Unavailable>>,
    /// Batches that were committed.
    pub(super) batches: AtomicU64,
    /// The unique values of a batch of which it is not known yet whether it gets in.
    pub(super) doubted: watch::Sender<HashSet<UniqueKey>>,
}

/// Why nothing can be published.
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

impl TransparencyLog {
    /// Makes the directory of an empty log. [`StoreError::Directory`] where anything is already. For `sppctl init`.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<(), StoreError> {
        let files = LogFiles::create(dir, options, Arc::new(System))?;
        SledIndex::create(&files.index_dir(), options)?;
        files.finish()
    }

    /// Opens an existing log; [`StoreError::Directory`] if there is none, or one of another kind, or if another process has it. Never makes
    /// one. Needs a tokio runtime, on which its sequencer runs until the value is dropped.
    pub async fn open(
        dir: &Path,
        options: &StoreOptions,
        signer: Arc<dyn CheckpointSigner>,
        settings: LogSettings,
    ) -> Result<Self, StoreError> {
        Self::open_through(dir, options, signer, settings, Arc::new(System)).await
    }

    pub(super) async fn open_through(
        dir: &Path,
        options: &StoreOptions,
        signer: Arc<dyn CheckpointSigner>,
        settings: LogSettings,
        door: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let files = LogFiles::take(dir, options, door)?;
        let index = match SledIndex::open(&files.index_dir(), options) {
            Ok(index) => index.mark().await.map(|mark| (index, mark)).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let known = index.as_ref().map_or(0, |(_, mark)| mark.size);
        let found = files.recover(signer.key(), known)?;
        let index =
            index.and_then(|(index, mark)| match is_of_this_log(&mark, found.edge.base(), &found.entries, dir) {
                true => Ok((index, mark.size)),
                false => Err("it is of another log".to_owned()),
            });
        let (mut head, edge) = found.into_head()?;
        head.indexed = index.as_ref().map_or(0, |(_, size)| *size);
        let shared = Arc::new(Shared {
            files,
            options: options.clone(),
            head: RwLock::new(Arc::new(head)),
            index: watch::Sender::new(Err("it is being read".into())),
            away: RwLock::default(),
            batches: AtomicU64::new(0),
            doubted: watch::Sender::default(),
        });
        let (queue, waiting) = mpsc::channel(QUEUE);
        let announcements = Arc::new(InFlightPublications::default());
        let key = signer.key().clone();
        let cosigned = witness::Cosigned::default();
        let sequencer = Sequencer {
            shared: Arc::clone(&shared),
            signer,
            batch_size: settings.batch_size.clamp(1, BUNDLE as usize),
            batch_period: settings.batch_period,
            index_patience: settings.index_patience,
            announcements: Arc::clone(&announcements),
            edge: Some(edge),
        };
        let run = tokio::spawn(sequencer.run(waiting, index));
        let watched = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = run.await {
                tracing::error!(%error, "the sequencer of the public database has ended; restart the daemon");
                watched.set_away(Some(Unavailable::Failed("its sequencer has ended; restart the daemon".into())));
            }
        });
        if !settings.witnesses.is_empty() {
            tokio::spawn(witness::ask(Arc::downgrade(&shared), settings.witnesses, key.clone(), cosigned.clone()));
        }
        Ok(Self { shared, queue, announcements, cosigned, shown: Mutex::default(), key })
    }

    /// Work that waits for the disk, beside the threads that wait for the network.
    async fn off_the_network<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || work(&shared)).await;
        done.map_err(|e| self.shared.files.place().failed("reading the log", e))?
    }

    /// Has the sequencer append an entry, which has these bytes.
    async fn append(&self, entry: LogEntry, bytes: Vec<u8>) -> Result<Publication, PublishError> {
        self.must_be_open()?;
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { entry, bytes, answer };
        let published = async {
            self.queue.send(waiting).await.map_err(|_| "its sequencer has ended")?;
            answered.await.map_err(|_| "its sequencer has ended")
        };
        let failed = |cause: &str| PublishError::Store(self.shared.files.place().failed("publishing", cause));
        match tokio::time::timeout(ANSWER_WITHIN, published).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(cause)) => Err(failed(cause)),
            Err(_) => Err(failed("there was no answer in time")),
        }
    }

    fn must_be_open(&self) -> Result<(), StoreError> {
        let away = self.shared.away.read().unwrap_or_else(PoisonError::into_inner);
        away.as_ref().map_or(Ok(()), |why| Err(self.shared.error(why)))
    }

    /// What the newest published checkpoint covers, and the tree it is of: with cosignatures if there are witnesses.
    fn published(&self) -> (Arc<Snapshot>, Option<SignedCheckpoint>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let cosigned = self.cosigned.newest();
        let head = self.shared.head();
        let size = |checkpoint: &Option<SignedCheckpoint>| checkpoint.as_ref().map(SignedCheckpoint::size);
        let checkpoint = cosigned.or_else(|| head.checkpoint.clone());
        if size(&checkpoint) >= size(&shown) {
            *shown = checkpoint;
        }
        (head, shown.clone())
    }
}

impl Shared {
    /// An error that tells why nothing can be published.
    pub(super) fn error(&self, why: &Unavailable) -> StoreError {
        match why {
            Unavailable::Full => self.files.full_disk(),
            Unavailable::Failed(cause) => self.files.place().failed("publishing", cause),
        }
    }

    /// The log as it is now.
    pub(super) fn head(&self) -> Arc<Snapshot> {
        Arc::clone(&self.head.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Shows another picture of it.
    pub(super) fn show(&self, head: Snapshot) {
        *self.head.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(head);
    }

    /// The index, once it is level.
    pub(super) async fn index(&self) -> Result<Arc<SledIndex>, StoreError> {
        let mut index = self.index.subscribe();
        let level = tokio::time::timeout(FOUND_WITHIN, index.wait_for(Result::is_ok)).await;
        if let Ok(Ok(level)) = level
            && let Ok(index) = &*level
        {
            return Ok(Arc::clone(index));
        }
        let why = self.index.borrow().as_ref().err().cloned().unwrap_or_default();
        Err(self.files.place().failed("looking up a record", format!("the index cannot be used yet: {why}")))
    }

    /// Why nothing can be published, or that it can.
    pub(super) fn set_away(&self, why: Option<Unavailable>) {
        *self.away.write().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// From now on nobody is told that these values are not there.
    pub(super) fn doubt(&self, keys: impl IntoIterator<Item = UniqueKey>) {
        let keys = keys.into_iter().collect();
        self.doubted.send_replace(keys);
    }

    /// What became of the batch is seen.
    pub(super) fn settle(&self) {
        self.doubted.send_if_modified(|doubted| !std::mem::take(doubted).is_empty());
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
        self.announcements.reserve_slot()
    }

    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError> {
        match self.shared.find(vec![*key]).await?.pop().flatten() {
            Some(found) => self.off_the_network(move |shared| shared.record(&found)).await,
            None => Ok(None),
        }
    }

    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError> {
        match index < self.shared.head().tree.size() {
            true => self.off_the_network(move |shared| shared.record(&Found::Recent(index))).await,
            false => Ok(None),
        }
    }

    async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError> {
        let head = self.shared.head();
        self.off_the_network(move |shared| shared.newest(&head)).await
    }

    async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError> {
        let found = self.shared.find(vec![UniqueKey::of_audited_node(node)]).await?.pop().flatten();
        let Some(found) = found else { return Ok(None) };
        match self.off_the_network(move |shared| shared.entry(&found)).await? {
            (LogEntry::Audit(checkpoint), publication) => Ok(Some((publication.index, checkpoint))),
            (LogEntry::Device(_), publication) => Err(damaged(
                publication.index,
                "the index has it as an audit checkpoint; make it anew with sppctl registry reindex",
            )),
        }
    }

    async fn len(&self) -> Result<u64, StoreError> {
        Ok(self.shared.head().records)
    }

    fn status(&self) -> RegistryStatus {
        RegistryStatus {
            publishing_trouble: self.must_be_open().err().map(|e| e.to_string()),
            reading_trouble: self.shared.index.borrow().as_ref().err().cloned(),
            batches: self.shared.batches.load(Ordering::Relaxed),
            witnesses: self.cosigned.status(),
        }
    }

    async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError> {
        Ok(self.published().1)
    }

    async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        let (head, published) = self.published();
        // The published one may be a moment behind, since witnesses were asked about it.
        let covering = published.filter(|checkpoint| index < checkpoint.size()).or_else(|| head.checkpoint.clone());
        let Some(checkpoint) = covering.filter(|checkpoint| index < checkpoint.size()) else { return Ok(None) };
        self.off_the_network(move |shared| shared.prove(&head, index, &checkpoint).map(Some)).await
    }

    async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        let (head, key) = (self.shared.head(), self.key.clone());
        self.off_the_network(move |shared| shared.receipt(&head, index, &key)).await
    }

    async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        let head = self.shared.head();
        self.off_the_network(move |shared| shared.tile(&head, tile)).await
    }
}
