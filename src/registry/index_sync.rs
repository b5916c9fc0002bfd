//! The sequencer keeps the index level with the files: when nobody waits or a bundle is full, at the start, and anew where it is missing
//! or damaged. It can be made from the files again and look-ups know the newest entries without it, so no device waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::files::BUNDLE;
use super::index::{Builder, make_anew};
use super::log::Unavailable;
use super::sequencer::{BACKOFF, Sequencer};
use super::snapshot::Snapshot;
use crate::store::directory::LAST_ROOM;
use crate::store::{SledIndex, StoreError};
use crate::tlog::bundle;

/// How often long work says how far it is.
const PROGRESS: Duration = Duration::from_secs(5);

impl Sequencer {
    /// Brings the index up to the head, however long it takes: what it does not know could be published twice.
    pub(super) async fn index(&self, head: &mut Snapshot) {
        let begun = Instant::now();
        let mut backoff = BACKOFF.0;
        loop {
            let index = self.shared.index.borrow().as_ref().ok().cloned();
            let added = match &index {
                Some(index) => self.catch_up(index, head).await,
                None => Err(self.shared.files.place().failed("adding to the index", "there is none")),
            };
            let Err(error) = added else {
                head.indexed = head.tree.size();
                self.shared.show(head.clone());
                self.shared.set_away(None);
                return;
            };
            tracing::warn!(%error, "the index of the public database could not be written");
            // No room is no reason for a new one, which would need more of it.
            let place = self.shared.files.place();
            let full = matches!(error, StoreError::Full { .. }) || place.admit(LAST_ROOM).is_err();
            if full && place.give_up_reserve() {
                continue;
            }
            let why = error.to_string();
            self.shared.set_away(Some(match full {
                true => Unavailable::Full,
                false => Unavailable::Failed(format!("the index cannot be written: {why}")),
            }));
            tokio::time::sleep(backoff).await;
            if !full && (index.is_none() || begun.elapsed() >= self.index_patience) {
                drop(index);
                self.make_index(head, &why).await;
            }
            backoff = BACKOFF.1.min(backoff * 2);
        }
    }

    /// The index as it was found, brought level with the files, or a new one.
    pub(super) async fn level(&mut self, found: Result<(SledIndex, u64), String>) {
        let mut head = Snapshot::clone(&self.shared.head());
        let levelled = match found {
            Ok((index, from)) => self.fill(&index, from, &head).await.map(|()| index).map_err(|e| e.to_string()),
            Err(why) => Err(why),
        };
        match levelled {
            Ok(index) => {
                head.indexed = head.indexed.max(head.base);
                drop(self.shared.index.send_replace(Ok(Arc::new(index))));
            }
            Err(why) => self.make_index(&mut head, &why).await,
        }
        self.index(&mut head).await;
    }

    /// A new index in the place of one that is missing or damaged, with all that is in full bundles. Failing that, the caller comes again.
    async fn make_index(&self, head: &mut Snapshot, why: &str) {
        tracing::warn!(why, entries = head.tree.size(), "the index of the public database is made anew from its files");
        let old = self.shared.index.send_replace(Err(format!("it is being made anew, since {why}")));
        if let Ok(mut old) = old {
            // Readers that still have it are done in a moment. It must be closed before another one is in its place.
            while let Err(shared) = Arc::try_unwrap(old) {
                old = shared;
                tokio::time::sleep(BACKOFF.0).await;
            }
        }
        let made =
            self.on_the_disk(|shared| make_anew(&shared.files, &shared.options).map_err(|e| Unavailable::of(&e))).await;
        let index = match made.and_then(|made| made) {
            Ok(index) => index,
            Err(why) => return tracing::error!(?why, "no new index can be made yet"),
        };
        match self.fill(&index, 0, head).await {
            Ok(()) => {
                // What is not in full bundles the old one knew and this one does not: readers learn it before they get it.
                head.indexed = head.base;
                self.shared.show(head.clone());
                drop(self.shared.index.send_replace(Ok(Arc::new(index))));
            }
            Err(error) => tracing::error!(%error, "the new index could not be filled"),
        }
    }

    /// Puts in what is not yet in the index. What became full bundles while it could not be written comes from them.
    async fn catch_up(&self, index: &SledIndex, head: &Snapshot) -> Result<(), StoreError> {
        self.fill(index, head.indexed, head).await?;
        add_recent(index, head).await
    }

    /// Puts in what is in full bundles and not yet in the index.
    async fn fill(&self, index: &SledIndex, from: u64, head: &Snapshot) -> Result<(), StoreError> {
        let bundles = from / BUNDLE..head.base / BUNDLE;
        if bundles.is_empty() {
            return Ok(());
        }
        let mut builder = Builder::new(index, bundles.start * BUNDLE, 0);
        let mut told = Instant::now();
        for number in bundles {
            builder.add_bundle(&self.shared.files, number).await?;
            if told.elapsed() > PROGRESS {
                told = Instant::now();
                let (done, of) = (builder.next, head.base);
                tracing::info!(done, of, "the index of the public database is being made");
                self.shared
                    .set_away(Some(Unavailable::Failed(format!("the index is being made: {done} of {of} entries"))));
            }
        }
        builder.finish().await
    }
}

async fn add_recent(index: &SledIndex, head: &Snapshot) -> Result<(), StoreError> {
    let from = head.indexed.max(head.base);
    let before = usize::try_from(from - head.base).unwrap_or(0);
    let begin = before / BUNDLE as usize * BUNDLE as usize;
    let in_bundle = head.recent.get(begin..before).unwrap_or_default();
    let offset = in_bundle.iter().map(|entry| entry.bytes.len() + bundle::HEAD).sum::<usize>();
    let mut builder = Builder::new(index, from, u32::try_from(offset).unwrap_or(u32::MAX));
    for entry in head.recent.get(before..).unwrap_or_default() {
        builder.push(&entry.keys, &entry.bytes);
    }
    builder.finish().await
}
