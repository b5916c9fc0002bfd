//! ★ The sequencer: takes what waits to be published, makes it durable and public with one sync and one signature, then answers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::files::{AppendError, BUNDLE, PartialBundleFile};
use super::first_checkpoints::SignedSize;
use super::log::{Shared, Unavailable};
use super::partial_bundle::Batch;
use super::read::Found;
use super::signer::CheckpointSigner;
use super::snapshot::{Entry, Snapshot};
use crate::store::{InFlightPublications, LogEntry, Publication, PublishError, SledIndex, UniqueKey};
use crate::tlog::{SignedCheckpoint, UnsignedCheckpoint};

/// How long to wait before something that failed is tried again.
pub(super) const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// How often the first checkpoint is tried while nothing is published.
const FIRST_CHECKPOINT: Duration = Duration::from_secs(1);

type Answer = oneshot::Sender<Result<Publication, PublishError>>;

/// An entry that waits to be published.
pub(super) struct Waiting {
    pub(super) entry: LogEntry,
    pub(super) bytes: Vec<u8>,
    pub(super) answer: Answer,
}

/// An entry that is new to the log, and everybody who waits for it.
struct New {
    says: LogEntry,
    entry: Arc<Entry>,
    answers: Vec<Answer>,
    /// Those that came later with another record of the same chip, say, and what of it is taken: if this one gets in, not before.
    rivals: Vec<(Answer, &'static str)>,
}

/// The only one who writes.
pub(super) struct Sequencer {
    pub(super) shared: Arc<Shared>,
    pub(super) signer: Arc<dyn CheckpointSigner>,
    pub(super) batch_size: usize,
    pub(super) batch_period: Duration,
    pub(super) index_patience: Duration,
    pub(super) announcements: Arc<InFlightPublications>,
    /// Unavailable while it is not known what the disk holds.
    pub(super) edge: Option<PartialBundleFile>,
}

impl Sequencer {
    /// Serves until nobody can ask any more.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Waiting>, index: Result<(SledIndex, u64), String>) {
        self.level(index).await;
        while let Some(batch) = self.collect(&mut queue).await {
            if let Err(why) = self.sequence(batch).await {
                self.heal(why, &mut queue).await;
            }
            self.shared.settle();
        }
    }

    /// A batch: full, or everybody who is on the way is in it, or its first has waited long enough.
    async fn collect(&mut self, queue: &mut mpsc::Receiver<Waiting>) -> Option<Vec<Waiting>> {
        let head = self.shared.head();
        if queue.is_empty() && head.indexed < head.tree.size() {
            self.index(&mut Snapshot::clone(&head)).await;
        }
        let first = loop {
            if self.shared.head().checkpoint.is_some() {
                break queue.recv().await?;
            }
            if let Ok(first) = tokio::time::timeout(FIRST_CHECKPOINT, queue.recv()).await {
                break first?;
            }
            // Readers want a checkpoint of an empty log, too. Without the HSM there is none, and nobody waits for it.
            if let Err(why) = self.sequence(Vec::new()).await {
                self.heal(why, queue).await;
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
            if batch.len() >= self.batch_size || self.announcements.count() <= batch.len() {
                return Some(batch);
            }
            tokio::select! {
                next = queue.recv() => match next {
                    Some(next) => batch.push(next),
                    None => return Some(batch),
                },
                () = self.announcements.fewer() => {}
                () = tokio::time::sleep_until(deadline) => return Some(batch),
            }
        }
    }

    /// Publishes a batch. An error means that it is not known what the disk holds: everybody was told, and it must be looked at.
    async fn sequence(&mut self, waiting: Vec<Waiting>) -> Result<(), Unavailable> {
        // 1. What is public already has its answer, what is taken is refused; nothing is signed for either.
        let new = self.dedupe(waiting).await;
        let head = self.shared.head();
        if new.is_empty() && head.checkpoint.is_some() {
            return Ok(());
        }
        // 2. The tree with the new entries, in memory.
        let mut grown = Snapshot::clone(&head);
        for new in &new {
            grown.push(Arc::clone(&new.entry));
        }
        // 3. One signature of the HSM for all of them. It leaves this process with the answers, never before.
        let checkpoint = match self.sign(&grown).await {
            Ok(checkpoint) => checkpoint,
            Err(why) => {
                answer(new, |_, _| Err(PublishError::Unsigned(why.clone())));
                return Ok(());
            }
        };
        // 4. The commit: entries and checkpoint are on the disk, or nothing is. From here on a power cut finds the batch.
        if let Err(why) = self.append(&head, &checkpoint, &new).await {
            answer(new, |_, _| Err(PublishError::Store(self.shared.error(&why))));
            return Err(why);
        }
        self.shared.batches.fetch_add(1, Ordering::Relaxed);
        // 5. Readers see the new tree.
        grown.signed.extend(SignedSize::of(&checkpoint, self.signer.key()));
        grown.checkpoint = Some(checkpoint);
        self.shared.show(grown.clone());
        self.shared.settle();
        // 6. Those who waited are told.
        let first = head.tree.size();
        answer(new, |at, new| Ok(new.says.publication(first + at as u64, &new.entry.bytes)));
        // 7. Bundles that are full become files of their own.
        match grown.recent.len() < BUNDLE as usize {
            true => Ok(()),
            false => self.turn_over(grown).await,
        }
    }

    /// The new ones among those that wait; everybody else is answered.
    async fn dedupe(&self, mut waiting: Vec<Waiting>) -> Vec<New> {
        // Whoever stopped waiting may have been told that nothing was published: doubted before it is seen that they went, so that
        // nobody is told so afterwards.
        self.shared.doubt(waiting.iter().flat_map(|waiting| waiting.entry.keys()));
        waiting.retain(|waiting| !waiting.answer.is_closed());
        let unique = |waiting: &Waiting| waiting.entry.keys().into_iter().filter(UniqueKey::is_unique).collect();
        let keys: Vec<Vec<_>> = waiting.iter().map(unique).collect();
        let known = match self.shared.look_up(keys.concat()).await {
            Ok(known) => known,
            Err(error) => {
                let why = Unavailable::of(&error);
                waiting.into_iter().for_each(|one| drop(one.answer.send(Err(self.shared.error(&why).into()))));
                return Vec::new();
            }
        };
        let mut known = known.into_iter();
        let mut new: Vec<New> = Vec::new();
        let mut in_batch: HashMap<UniqueKey, usize> = HashMap::new();
        for (Waiting { entry: says, bytes, answer }, keys) in waiting.into_iter().zip(keys) {
            let known: Vec<_> = known.by_ref().take(keys.len()).collect();
            let taken = keys.iter().zip(known).find_map(|(key, found)| Some((key, found?)));
            if let Some((key, found)) = taken {
                let _ = answer.send(self.known(key, &found, &says));
                continue;
            }
            if let Some((key, at)) = keys.iter().find_map(|key| Some((key, *in_batch.get(key)?))) {
                match new.get_mut(at) {
                    Some(same) if same.says.is_same_but_for_its_time(&says) => same.answers.push(answer),
                    Some(other) => other.rivals.push((answer, key.what())),
                    None => {}
                }
                continue;
            }
            if let Err(full) = self.shared.files.place().admit(self.shared.options.floor_bytes) {
                let _ = answer.send(Err(full.into()));
                continue;
            }
            in_batch.extend(keys.iter().map(|key| (*key, new.len())));
            let entry = Arc::new(Entry { keys: says.keys(), bytes });
            new.push(New { says, entry, answers: vec![answer], rivals: Vec::new() });
        }
        new
    }

    /// The answer to an entry of which a unique value is in the log.
    fn known(&self, key: &UniqueKey, found: &Found, says: &LogEntry) -> Result<Publication, PublishError> {
        let (known, publication) = self.shared.entry(found)?;
        match known.is_same_but_for_its_time(says) {
            true => Ok(publication),
            false => Err(PublishError::Taken(known.takes(key.what(), publication.index))),
        }
    }

    async fn sign(&self, grown: &Snapshot) -> Result<SignedCheckpoint, String> {
        let key = self.signer.key();
        let unsigned = UnsignedCheckpoint::new(key.origin(), grown.tree.size(), grown.tree.root());
        let unsigned = unsigned.map_err(|e| e.to_string())?;
        let signature = self.signer.sign(&unsigned).await?;
        unsigned.signed(key, &signature).map_err(|e| e.to_string())
    }

    async fn append(&mut self, head: &Snapshot, checkpoint: &SignedCheckpoint, new: &[New]) -> Result<(), Unavailable> {
        let entries = new.iter().map(|new| new.entry.bytes.clone()).collect();
        let batch = Batch { first: head.tree.size(), note: checkpoint.note().to_vec(), entries };
        let Some(mut edge) = self.edge.take() else { return Err(Unavailable::Failed("the edge is not open".into())) };
        let appended = self.on_the_disk(move |shared| shared.files.append(&mut edge, &batch).map(|()| edge)).await?;
        match appended {
            Ok(edge) => {
                self.edge = Some(edge);
                Ok(())
            }
            Err(AppendError::Full(error)) => {
                tracing::warn!(%error, "there is no room for a batch");
                Err(Unavailable::Full)
            }
            Err(AppendError::Failed(error)) => Err(Unavailable::Failed(error.to_string())),
        }
    }

    async fn turn_over(&mut self, mut head: Snapshot) -> Result<(), Unavailable> {
        // What leaves the picture is found by the index alone.
        self.index(&mut head).await;
        let Some(mut edge) = self.edge.take() else { return Err(Unavailable::Failed("the edge is not open".into())) };
        let mut entries: Vec<_> = head.recent.iter().map(|entry| entry.bytes.clone()).collect();
        let (checkpoint, signed) = (head.checkpoint.clone(), head.signed.clone());
        let turned = self.on_the_disk(move |shared| {
            let turned = shared.files.turn_over(checkpoint.as_ref(), &mut entries, &signed, &mut edge);
            turned.map(|()| edge).map_err(|e| Unavailable::of(&shared.files.failed("writing full tiles", &e)))
        });
        let edge = turned.await??;
        let gone = usize::try_from(edge.base() - head.base).unwrap_or(head.recent.len());
        head.recent.drain(..gone);
        head.base = edge.base();
        head.filled.clear();
        head.signed.retain(|signed| signed.size > edge.base());
        self.edge = Some(edge);
        self.shared.show(head);
        Ok(())
    }

    /// Reads the files again, however long it takes, since it is not known what they hold. Whoever waits is told meanwhile.
    async fn heal(&mut self, why: Unavailable, queue: &mut mpsc::Receiver<Waiting>) {
        tracing::error!(?why, "the public database failed; its files are read again");
        self.shared.set_away(Some(why.clone()));
        let mut backoff = BACKOFF.0;
        let mut why = why;
        loop {
            while let Ok(waiting) = queue.try_recv() {
                let _ = waiting.answer.send(Err(self.shared.error(&why).into()));
            }
            if queue.is_closed() {
                return;
            }
            tokio::time::sleep(backoff).await;
            backoff = BACKOFF.1.min(backoff * 2);
            let (key, head) = (self.signer.key().clone(), self.shared.head());
            self.edge = None;
            let size = head.tree.size();
            let found =
                self.on_the_disk(move |shared| shared.files.recover(&key, size).map_err(|e| Unavailable::of(&e))).await;
            let taken = found.and_then(|found| found).and_then(|found| {
                let (head, edge) = found.into_head().map_err(|e| Unavailable::of(&e))?;
                self.edge = Some(edge);
                Ok(head)
            });
            match taken {
                Ok(mut found) => {
                    found.indexed = head.indexed;
                    // Bundles that became full meanwhile are found by the index alone: nobody sees this picture before it has them.
                    self.index(&mut found).await;
                    self.shared.settle();
                    tracing::info!(entries = found.tree.size(), "the public database is open again");
                    return;
                }
                Err(still) => {
                    tracing::warn!(?still, "the public database cannot be opened yet");
                    self.shared.set_away(Some(still.clone()));
                    why = still;
                }
            }
        }
    }

    /// Work that waits for the disk, beside the threads that wait for the network.
    pub(super) async fn on_the_disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, Unavailable> {
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|e| Unavailable::Failed(e.to_string()))
    }
}

fn answer(new: Vec<New>, answer: impl Fn(usize, &New) -> Result<Publication, PublishError>) {
    for (at, mut new) in new.into_iter().enumerate() {
        for waiting in std::mem::take(&mut new.answers) {
            // Whoever has gone will ask again.
            let _ = waiting.send(answer(at, &new));
        }
        for (rival, what) in std::mem::take(&mut new.rivals) {
            let told = answer(at, &new)
                .and_then(|Publication { index, .. }| Err(PublishError::Taken(new.says.takes(what, index))));
            let _ = rival.send(told);
        }
    }
}
