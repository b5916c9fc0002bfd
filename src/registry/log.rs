//! The log as the rest of the house uses it: publishing goes to the sequencer, reading to a picture of the tree that never changes.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot, watch};

use super::files::{BUNDLE, EdgeFile, KIND, LogFiles, SignedSize};
use super::index::is_of_this_log;
use super::sequencer::{Sequencer, Waiting};
use super::signer::CheckpointSigner;
use super::witness::{self, Cosigned, Witness};
use crate::store::place::{Door, System};
use crate::store::{
    Announced, Announcements, DeviceRecord, Location, PublicDatabase, Publication, PublishError, PublishedRecord,
    RegistryStatus, SledIndex, StoreError, StoreOptions, UniqueKey,
};
use crate::tlog::{
    FullTile, HashSource, LogKey, LogProof, SignedCheckpoint, TileId, TileKind, TlogError, Tree, UnsignedCheckpoint,
    bundle, prove_inclusion,
};

/// Records that may wait for the sequencer before more of them have to.
const QUEUE: usize = 1024;
/// When a caller is told that there is no answer. What it asked for may still happen.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// How long a look-up waits for an index that is being caught up, or for what becomes of a batch.
const FOUND_WITHIN: Duration = Duration::from_secs(1);

/// How a log makes its batches, and who watches it.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Most entries of a batch, 1 to 256.
    pub batch_size: usize,
    /// Longest that an entry waits for others that are on the way. Nobody waits when nobody is.
    pub batch_period: Duration,
    /// Who is asked to cosign checkpoints.
    pub witnesses: Vec<Witness>,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { batch_size: 256, batch_period: Duration::from_millis(50), witnesses: Vec::new() }
    }
}

/// The permanent public database in a directory.
///
/// Trust: whoever controls its directory can withhold records; not alter, remove or reorder one unnoticed.
pub struct TransparencyLog {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Waiting>,
    announcements: Arc<Announcements>,
    cosigned: Cosigned,
    /// The newest checkpoint that was shown to anybody: none is shown that is older.
    shown: Mutex<Option<SignedCheckpoint>>,
    key: LogKey,
}

/// What readers and the sequencer share.
pub(super) struct Shared {
    pub(super) files: LogFiles,
    pub(super) options: StoreOptions,
    head: RwLock<Arc<Head>>,
    /// The index, once it is level with the files; until then why it is not.
    pub(super) index: watch::Sender<Result<Arc<SledIndex>, String>>,
    /// Why nothing can be published, while that is so.
    pub(super) away: RwLock<Option<Away>>,
    /// Batches that were committed.
    pub(super) batches: AtomicU64,
    /// The unique values of a batch of which it is not known yet whether it gets in.
    doubted: watch::Sender<HashSet<UniqueKey>>,
}

/// Why nothing can be published.
#[derive(Debug, Clone)]
pub(super) enum Away {
    /// The disk is full.
    Full,
    /// Anything else.
    Failed(String),
}

impl Away {
    pub(super) fn of(error: &StoreError) -> Self {
        match error {
            StoreError::Full { .. } => Self::Full,
            other => Self::Failed(other.to_string()),
        }
    }
}

/// The log at one moment: a tree, the checkpoint of it, and the entries that are not in full bundles.
#[derive(Clone)]
pub(super) struct Head {
    pub(super) tree: Tree,
    pub(super) checkpoint: Option<SignedCheckpoint>,
    /// The index of the first of `recent`; everything below is in full bundles.
    pub(super) base: u64,
    pub(super) recent: Vec<Arc<Entry>>,
    /// The checkpoints that were the first to cover them.
    pub(super) signed: Vec<SignedSize>,
    /// Tiles that are full and may not be files yet.
    pub(super) filled: Vec<FullTile>,
    /// So many entries are in the index.
    pub(super) indexed: u64,
}

/// An entry in memory.
pub(super) struct Entry {
    pub(super) octets: Vec<u8>,
    pub(super) keys: Vec<UniqueKey>,
}

impl Entry {
    pub(super) fn read(octets: Vec<u8>, index: u64) -> Result<Arc<Self>, StoreError> {
        let record = DeviceRecord::from_bytes(&octets).map_err(|e| damaged(index, e))?;
        Ok(Arc::new(Self { keys: UniqueKey::of_record(&record), octets }))
    }
}

impl Head {
    fn recent(&self, index: u64) -> Option<&Arc<Entry>> {
        self.recent.get(usize::try_from(index.checked_sub(self.base)?).ok()?)
    }

    /// The newest entry with that value among those that the index may not have yet.
    pub(super) fn find_recent(&self, key: &UniqueKey) -> Option<u64> {
        let from = usize::try_from(self.indexed.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let unindexed = self.recent.iter().enumerate().skip(from);
        let found = unindexed.rev().find(|(_, entry)| entry.keys.contains(key));
        found.map(|(at, _)| self.base + at as u64)
    }
}

impl TransparencyLog {
    /// Makes the directory of an empty log. [`StoreError::Place`] where anything is already. For `sppctl init`.
    pub fn create(dir: &Path, options: &StoreOptions) -> Result<(), StoreError> {
        let files = LogFiles::create(dir, options, Arc::new(System))?;
        SledIndex::create(&files.index_dir(), options)?;
        files.finish()
    }

    /// Opens an existing log; [`StoreError::Place`] if there is none, or one of another kind, or if another process has it. Never makes
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
        door: Arc<dyn Door>,
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
        let announcements = Arc::new(Announcements::default());
        let key = signer.key().clone();
        let cosigned = witness::Cosigned::default();
        let sequencer = Sequencer {
            shared: Arc::clone(&shared),
            signer,
            batch_size: settings.batch_size.clamp(1, BUNDLE as usize),
            batch_period: settings.batch_period,
            announcements: Arc::clone(&announcements),
            edge: Some(edge),
        };
        let run = tokio::spawn(sequencer.run(waiting, index));
        let watched = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = run.await {
                tracing::error!(%error, "the sequencer of the public database has ended; restart the daemon");
                watched.set_away(Some(Away::Failed("its sequencer has ended; restart the daemon".into())));
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

    fn must_be_open(&self) -> Result<(), StoreError> {
        let away = self.shared.away.read().unwrap_or_else(PoisonError::into_inner);
        away.as_ref().map_or(Ok(()), |why| Err(self.shared.error(why)))
    }

    /// What the newest published checkpoint covers, and the tree it is of: with cosignatures if there are witnesses.
    fn published(&self) -> (Arc<Head>, Option<SignedCheckpoint>) {
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

impl super::files::Found {
    /// The picture that readers get, with nothing in the index yet, and where the next batch goes.
    pub(super) fn into_head(self) -> Result<(Head, EdgeFile), StoreError> {
        let base = self.edge.base();
        let recent = (base..).zip(self.entries).map(|(index, octets)| Entry::read(octets, index));
        let recent = recent.collect::<Result<Vec<_>, _>>()?;
        let (tree, checkpoint, signed, filled) = (self.tree, self.checkpoint, self.signed, Vec::new());
        Ok((Head { tree, checkpoint, base, recent, signed, filled, indexed: 0 }, self.edge))
    }
}

impl Shared {
    /// An error that tells why nothing can be published.
    pub(super) fn error(&self, why: &Away) -> StoreError {
        match why {
            Away::Full => self.files.full_disk(),
            Away::Failed(cause) => self.files.place().failed("publishing", cause),
        }
    }

    /// The log as it is now.
    pub(super) fn head(&self) -> Arc<Head> {
        Arc::clone(&self.head.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Shows another picture of it.
    pub(super) fn show(&self, head: Head) {
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
    pub(super) fn set_away(&self, why: Option<Away>) {
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

    /// Where the newest entries with these values are. What is just being published, or failed in a way that may have left it on the
    /// disk, is waited for: whoever gives a device up must not be told that it is not public.
    async fn find(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Found>>, StoreError> {
        let mut doubted = self.doubted.subscribe();
        let settled = doubted.wait_for(|doubted| keys.iter().all(|key| !doubted.contains(key)));
        if tokio::time::timeout(FOUND_WITHIN, settled).await.is_err() {
            let why = "it is not known yet whether it was published";
            return Err(self.files.place().failed("looking up a record", why));
        }
        self.look_up(keys).await
    }

    /// The same for the sequencer, which nobody publishes beside.
    pub(super) async fn look_up(&self, keys: Vec<UniqueKey>) -> Result<Vec<Option<Found>>, StoreError> {
        // The picture before the index is asked: what is not in it as recent is in the index. The index before the picture is
        // taken: a new one may know less than the one before it, and the picture tells.
        let index = self.index().await?;
        let head = self.head();
        let recent: Vec<_> = keys.iter().map(|key| head.find_recent(key)).collect();
        let indexed = match recent.iter().all(Option::is_some) {
            true => Vec::new(),
            false => index.find(keys).await?,
        };
        let indexed = indexed.into_iter().chain(std::iter::repeat(None));
        let newest = recent.into_iter().zip(indexed).map(|(recent, indexed)| match recent {
            Some(index) => Some(Found::Recent(index)),
            None => indexed.map(Found::Indexed),
        });
        Ok(newest.collect())
    }

    /// The octets of an entry that was found.
    pub(super) fn octets(&self, found: &Found) -> Result<Vec<u8>, StoreError> {
        let head = self.head();
        if let Some(entry) = head.recent(found.index()) {
            return Ok(entry.octets.clone());
        }
        let failed = |e: std::io::Error| self.files.failed("reading an entry", &e);
        let number = found.index() / BUNDLE;
        match found {
            Found::Indexed(at) => self.files.part(number, at.offset, at.length).map_err(failed),
            Found::Recent(index) => {
                let octets = self.files.full(TileId::full(TileKind::Entries, number)).map_err(failed)?;
                let at = usize::try_from(index % BUNDLE).unwrap_or(0);
                let entry = bundle::entries(&octets).nth(at).transpose().map_err(|e| damaged(*index, e))?;
                entry.map(<[u8]>::to_vec).ok_or_else(|| damaged(*index, "its bundle ends before it"))
            }
        }
    }

    pub(super) fn record(&self, found: &Found) -> Result<PublishedRecord, StoreError> {
        let octets = self.octets(found)?;
        PublishedRecord::from_octets(found.index(), octets).map_err(|e| damaged(found.index(), e))
    }

    /// The proof that the tree of the first checkpoint with the entry has it; against the newest one if that was not kept.
    fn receipt(&self, head: &Head, index: u64, key: &LogKey) -> Result<Option<LogProof>, StoreError> {
        let Some(newest) = head.checkpoint.as_ref().filter(|newest| index < newest.size()) else { return Ok(None) };
        let kept = match index >= head.base {
            true => head.signed.iter().find(|signed| signed.size > index).copied(),
            false => self.files.first_signed(index).map_err(|e| self.files.failed("reading a checkpoint", &e))?,
        };
        let failed = |e: TlogError| self.files.place().failed("proving an entry", e);
        let Some(kept) = kept.filter(|kept| kept.size <= head.tree.size()) else {
            return self.prove(head, index, newest).map(Some);
        };
        if kept.size == newest.size() {
            return self.prove(head, index, newest).map(Some);
        }
        let tiles = Tiles(self, head);
        let tree = Tree::read(kept.size, &tiles).map_err(failed)?;
        let unsigned = UnsignedCheckpoint::new(key.origin(), kept.size, tree.root()).map_err(failed)?;
        let first = match unsigned.signed(key, &kept.signature) {
            Ok(first) => first,
            Err(error) => {
                tracing::error!(index, %error, "the checkpoint that first covered an entry is damaged; the newest one takes its place");
                return self.prove(head, index, newest).map(Some);
            }
        };
        let hashes = prove_inclusion(&tree, index, &tiles).map_err(failed)?;
        Ok(Some(LogProof::new(index, hashes, &first)))
    }

    /// The proof that the tree of that checkpoint, which is the picture's or an older one, has the entry.
    fn prove(&self, head: &Head, index: u64, checkpoint: &SignedCheckpoint) -> Result<LogProof, StoreError> {
        let tiles = Tiles(self, head);
        let older = |size| Tree::read(size, &tiles);
        let proven = match checkpoint.size() {
            size if size == head.tree.size() => prove_inclusion(&head.tree, index, &tiles),
            size => older(size).and_then(|tree| prove_inclusion(&tree, index, &tiles)),
        };
        let hashes = proven.map_err(|e| self.files.place().failed("proving an entry", e))?;
        Ok(LogProof::new(index, hashes, checkpoint))
    }

    /// A tile as the tree of that picture has it.
    pub(super) fn tile(&self, head: &Head, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        let widest = TileId::in_tree(tile.kind(), tile.index(), head.tree.size());
        if widest.is_none_or(|widest| widest.width() < tile.width()) {
            return Ok(None);
        }
        let failed = |e: std::io::Error| self.files.failed("reading a tile", &e);
        let width = usize::from(tile.width());
        match tile.kind() {
            TileKind::Hashes(_) => {
                let mut hashes = match head.tree.partial(tile) {
                    Some(hashes) => hashes.to_vec(),
                    None => self.hashes(head, tile).map_err(failed)?,
                };
                hashes.truncate(width * 32);
                Ok(Some(hashes))
            }
            TileKind::Entries => {
                let first = tile.index() * BUNDLE;
                if first >= head.base {
                    return Ok(Some(recent_bundle(head, first, width)));
                }
                let octets = self.files.full(tile).map_err(failed)?;
                let damaged = |e| damaged(first, e);
                let length = bundle::entries(&octets).take(width).map(|entry| entry.map(|e| e.len() + bundle::HEAD));
                let length = length.sum::<Result<usize, _>>().map_err(damaged)?;
                Ok(octets.get(..length).map(<[u8]>::to_vec))
            }
        }
    }

    /// A full tile of hashes. One that was filled a moment ago may not be a file yet.
    fn hashes(&self, head: &Head, tile: TileId) -> std::io::Result<Vec<u8>> {
        match head.filled.iter().find(|filled| filled.id == tile.as_full()) {
            Some(filled) => Ok(filled.hashes.clone()),
            None => self.files.full(tile),
        }
    }
}

fn recent_bundle(head: &Head, first: u64, width: usize) -> Vec<u8> {
    let mut octets = Vec::new();
    for entry in (first..).take(width).filter_map(|index| head.recent(index)) {
        // An entry over the limit never becomes one.
        let _ = bundle::push(&mut octets, &entry.octets);
    }
    octets
}

/// An entry that was found, and how.
#[derive(Clone, Copy)]
pub(super) enum Found {
    Recent(u64),
    Indexed(Location),
}

impl Found {
    pub(super) const fn index(&self) -> u64 {
        match self {
            Self::Recent(index) => *index,
            Self::Indexed(location) => location.index,
        }
    }
}

/// The tiles of a picture.
pub(super) struct Tiles<'a>(pub(super) &'a Shared, pub(super) &'a Head);

impl HashSource for Tiles<'_> {
    fn tile(&self, tile: TileId) -> Result<Vec<u8>, String> {
        match self.0.tile(self.1, tile) {
            Ok(Some(hashes)) => Ok(hashes),
            Ok(None) => Err(format!("{tile} is not there")),
            Err(error) => Err(error.to_string()),
        }
    }
}

pub(super) fn damaged(index: u64, cause: impl ToString) -> StoreError {
    StoreError::Damaged { store: KIND.name, what: format!("entry {index}"), cause: cause.to_string() }
}

#[async_trait]
impl PublicDatabase for TransparencyLog {
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError> {
        let octets = record.to_bytes()?;
        self.must_be_open()?;
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { record: record.clone(), octets, answer };
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

    fn announce(&self) -> Announced {
        self.announcements.announce()
    }

    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError> {
        match self.shared.find(vec![*key]).await?.pop().flatten() {
            Some(found) => self.off_the_network(move |shared| shared.record(&found).map(Some)).await,
            None => Ok(None),
        }
    }

    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError> {
        match index < self.shared.head().tree.size() {
            true => self.off_the_network(move |shared| shared.record(&Found::Recent(index)).map(Some)).await,
            false => Ok(None),
        }
    }

    async fn len(&self) -> Result<u64, StoreError> {
        Ok(self.shared.head().tree.size())
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
