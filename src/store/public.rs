//! The public database's trait, and the receipt that proves a publication.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{AuditCheckpoint, DeviceRecord, RecordError, StoreError, UniqueKey};
use crate::keys::sha256;
use crate::names::{ChipId, DeviceIdentity, SessionId};
use crate::tlog::{LogProof, SignedCheckpoint, TileId};

/// Where an entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Its place among all entries, counted from 0.
    pub index: u64,
    /// SHA-256 of its bytes.
    pub record_hash: [u8; 32],
    /// Seconds since the Unix epoch.
    pub published: u64,
}

/// A record as it is in the public database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedRecord {
    /// What it says.
    pub record: DeviceRecord,
    /// Its bytes, as they are stored and hashed.
    pub bytes: Vec<u8>,
    /// Where it stands.
    pub publication: Publication,
}

impl PublishedRecord {
    /// The record in these bytes, at that place.
    pub fn from_bytes(index: u64, bytes: Vec<u8>) -> Result<Self, RecordError> {
        let record = DeviceRecord::from_bytes(&bytes)?;
        let publication = Publication { index, record_hash: sha256(&bytes), published: record.published };
        Ok(Self { record, bytes, publication })
    }
}

/// Which of the unique values of an entry is taken, by which entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// `chip ID`, `identity`, `certificate serial`, `public key` or `session`; `number of audit entries` for an audit checkpoint.
    pub what: &'static str,
    /// The index of the entry that has it.
    pub index: u64,
    /// The session that made it, if it is a device's record.
    pub session: Option<SessionId>,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.session {
            Some(session) => write!(f, "the {} is already in record {} of session {session}", self.what, self.index),
            None => write!(f, "the {} of this node is already in entry {}, with another note", self.what, self.index),
        }
    }
}

/// Why an entry was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A unique value is in another entry already.
    #[error("{0}")]
    Taken(Taken),
    /// The entry cannot be encoded or is too large.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The checkpoint could not be signed; nothing was written.
    #[error("the log's checkpoint could not be signed: {0}")]
    Unsigned(String),
    /// The store failed; whether the entry is in is not known, and publishing it again is safe.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Somebody is about to publish. Records share a checkpoint, so a log waits a moment for those that are on the way, and for nobody
/// else.
#[derive(Debug, Default)]
pub struct InFlightPublications {
    count: AtomicUsize,
    fewer: Notify,
}

impl InFlightPublications {
    /// One more is on the way, until the value is dropped.
    pub fn reserve_slot(self: &Arc<Self>) -> InFlightPublication {
        self.count.fetch_add(1, Ordering::SeqCst);
        InFlightPublication(Arc::clone(self))
    }

    /// How many are on the way.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Resolves when there are fewer than before.
    pub async fn fewer(&self) {
        self.fewer.notified().await;
    }
}

/// A place among those on the way.
#[derive(Debug)]
pub struct InFlightPublication(Arc<InFlightPublications>);

impl Drop for InFlightPublication {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
        self.0.fewer.notify_one();
    }
}

/// The permanent public database: append-only, there is no update and no delete. It is a transparency log, so that nobody need
/// believe it: each record is an entry, and a signed checkpoint covers it before its publication is acknowledged. Checkpoints of the
/// daemon's audit log are entries, too: what cannot be taken back here tells how long that one must be.
///
/// Trust: whoever controls it can withhold entries; not alter, remove or reorder one unnoticed.
/// Every append is on the disk, power loss included, before the call returns.
#[async_trait]
#[expect(clippy::len_without_is_empty, reason = "a database is asked how many records it has, not whether it is empty")]
pub trait PublicDatabase: Send + Sync {
    /// Appends a record whose chip ID, identity, certificate serial and public key are each new. A record of the same session
    /// that differs in nothing but its time is the same record: its first publication is the answer. With any other
    /// difference it is `Taken`: a session has one record. A new record is refused with `Full` below the disk's floor.
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError>;

    /// Appends a checkpoint of an audit log. One of the same node, number of entries and note is the same checkpoint: its first
    /// publication is the answer. With another note it is `Taken`. Refused with `Full` below the disk's floor, as a record is.
    async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError>;

    /// Tells that a record is on the way; for as long as the value lives.
    fn reserve_slot(&self) -> InFlightPublication;

    /// The newest record with that value.
    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError>;

    /// The record at that place; `None` if there is no entry, or one that is no record.
    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError>;

    /// The record that was published last.
    async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError>;

    /// The audit checkpoint of that node that was appended last, and its place.
    async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError>;

    /// How many records there are. The tree has more entries if there are audit checkpoints among them.
    async fn len(&self) -> Result<u64, StoreError>;

    /// How it is.
    fn status(&self) -> RegistryStatus;

    /// The newest checkpoint that is published: it covers every acknowledged entry, unless witnesses are asked, whose cosignatures it
    /// waits for a moment. Never an older one than before. `None` before the first one could be signed.
    async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError>;

    /// The proof that the entry at that place, whatever it is, is in the tree of the newest checkpoint; `None` if there is none.
    async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError>;

    /// The proof that the entry at that place is in the tree of the first checkpoint that covered it: the same whenever it is asked
    /// for. `None` if there is no such entry.
    async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError>;

    /// A tile or an entry bundle of the log; `None` if there are not so many hashes or entries.
    async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError>;
}

/// How the public database is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryStatus {
    /// Why nothing can be published, if so.
    pub publishing_trouble: Option<String>,
    /// Why no record can be looked up, if so.
    pub reading_trouble: Option<String>,
    /// Checkpoints that were signed since the start; entries that came together share one.
    pub batches: u64,
    /// The witnesses that are asked to cosign.
    pub witnesses: Vec<WitnessStatus>,
}

/// How a witness is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessStatus {
    /// Its name.
    pub name: String,
    /// The size of the largest tree that it has cosigned.
    pub size: u64,
    /// Why it did not cosign the last one, if so.
    pub trouble: Option<String>,
}

/// The public database as the stories see it.
#[derive(Clone)]
pub struct Registry(Arc<dyn PublicDatabase>);

/// Proof that a session's record is durably public: the one thing that allows its key pair to be erased.
#[derive(Debug)]
pub struct PublicationReceipt {
    session: SessionId,
    publication: Publication,
}

impl PublicationReceipt {
    /// Whose.
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// Where.
    pub const fn publication(&self) -> Publication {
        self.publication
    }
}

impl Registry {
    /// Stands before an engine.
    pub fn new(engine: Arc<dyn PublicDatabase>) -> Self {
        Self(engine)
    }

    /// Publishes a record. Repeating it is safe and gives the same receipt.
    pub async fn publish(&self, record: &DeviceRecord) -> Result<PublicationReceipt, PublishError> {
        let publication = self.0.publish(record).await?;
        Ok(PublicationReceipt { session: record.session, publication })
    }

    /// The receipt of a session whose record is public already: what a crash between publication and journal left.
    pub async fn receipt_of(
        &self,
        chip: &ChipId,
        session: SessionId,
    ) -> Result<Option<PublicationReceipt>, StoreError> {
        let found = self.find_by_chip(chip).await?.filter(|found| found.record.session == session);
        Ok(found.map(|found| PublicationReceipt { session, publication: found.publication }))
    }

    /// See [`PublicDatabase::reserve_slot`].
    pub fn reserve_slot(&self) -> InFlightPublication {
        self.0.reserve_slot()
    }

    /// The newest record of a chip.
    pub async fn find_by_chip(&self, chip: &ChipId) -> Result<Option<PublishedRecord>, StoreError> {
        self.0.find(&UniqueKey::of_chip(chip)).await
    }

    /// The newest record of an identity.
    pub async fn find_by_identity(&self, identity: &DeviceIdentity) -> Result<Option<PublishedRecord>, StoreError> {
        self.0.find(&UniqueKey::of_identity(identity)).await
    }

    /// Who has a public key already, if anybody has.
    pub async fn taker_of_public_key(&self, spki: &[u8]) -> Result<Option<Taken>, StoreError> {
        let found = self.0.find(&UniqueKey::of_public_key(spki)).await?;
        Ok(found.map(|PublishedRecord { record, publication, .. }| Taken {
            what: "public key",
            index: publication.index,
            session: Some(record.session),
        }))
    }

    /// The session of the newest record.
    pub async fn newest_session(&self) -> Result<Option<SessionId>, StoreError> {
        Ok(self.newest().await?.map(|found| found.record.session))
    }

    /// See [`PublicDatabase::newest`].
    pub async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError> {
        self.0.newest().await
    }

    /// See [`PublicDatabase::append_audit`]. Repeating it is safe and gives the same answer.
    pub async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError> {
        self.0.append_audit(checkpoint).await
    }

    /// See [`PublicDatabase::newest_audit`].
    pub async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError> {
        self.0.newest_audit(node).await
    }

    /// How many records there are.
    pub async fn count(&self) -> Result<u64, StoreError> {
        self.0.len().await
    }

    /// See [`PublicDatabase::status`].
    pub fn status(&self) -> RegistryStatus {
        self.0.status()
    }

    /// See [`PublicDatabase::record`].
    pub async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError> {
        self.0.record(index).await
    }

    /// See [`PublicDatabase::checkpoint`].
    pub async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError> {
        self.0.checkpoint().await
    }

    /// See [`PublicDatabase::prove`].
    pub async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        self.0.prove(index).await
    }

    /// See [`PublicDatabase::receipt`].
    pub async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError> {
        self.0.receipt(index).await
    }

    /// See [`PublicDatabase::tile`].
    pub async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError> {
        self.0.tile(tile).await
    }
}
