//! The trait of the public database, and the receipt that proves a publication.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use spp_format::names::{ChipId, DeviceIdentity, SessionId};
use spp_format::record::{
    AuditCheckpoint, DeviceRecord, Publication, PublishedRecord, RecordError, UniqueKey, UniquenessConflict,
};
use spp_format::tlog::{LogProof, SignedCheckpoint, TileId};
use tokio::sync::Notify;

use super::StoreError;

/// Why an entry was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Another entry already has a unique value of this entry.
    #[error("{0}")]
    Conflict(UniquenessConflict),
    /// The entry cannot be encoded or is too large.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The checkpoint could not be signed; nothing was written.
    #[error("cannot sign the log's checkpoint: {0}")]
    Unsigned(String),
    /// The store failed. Whether the entry was published is unknown; publishing it again is safe.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Counts publications in flight. Records share a checkpoint, so the log waits briefly for these before it signs one.
#[derive(Debug, Default)]
pub struct InFlightPublications {
    count: AtomicUsize,
    decreased: Notify,
}

impl InFlightPublications {
    /// Counts one more publication until the returned value is dropped.
    pub fn reserve_slot(self: &Arc<Self>) -> InFlightPublication {
        self.count.fetch_add(1, Ordering::SeqCst);
        InFlightPublication(Arc::clone(self))
    }

    /// Number of publications in flight.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// Resolves when the number decreases.
    pub async fn wait_for_decrease(&self) {
        self.decreased.notified().await;
    }
}

/// One publication in flight.
#[derive(Debug)]
pub struct InFlightPublication(Arc<InFlightPublications>);

impl Drop for InFlightPublication {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
        self.0.decreased.notify_one();
    }
}

/// Reads of the public database.
#[async_trait]
#[expect(clippy::len_without_is_empty, reason = "callers need the number of records, not whether it is zero")]
pub trait LogReader: Send + Sync {
    /// The newest record with a key.
    async fn find(&self, key: &UniqueKey) -> Result<Option<PublishedRecord>, StoreError>;

    /// The record at an index; `None` if the entry is missing or is not a record.
    async fn record(&self, index: u64) -> Result<Option<PublishedRecord>, StoreError>;

    /// The newest record.
    async fn newest(&self) -> Result<Option<PublishedRecord>, StoreError>;

    /// The index and content of a node's newest audit checkpoint.
    async fn newest_audit(&self, node: &str) -> Result<Option<(u64, AuditCheckpoint)>, StoreError>;

    /// Number of records. The log has more entries if it contains audit checkpoints.
    async fn len(&self) -> Result<u64, StoreError>;

    /// Current status.
    fn status(&self) -> RegistryStatus;

    /// The newest published checkpoint, never older than a previous answer. It covers every acknowledged entry, except while new
    /// entries briefly wait for witness cosignatures. `None` until the first checkpoint is signed.
    async fn checkpoint(&self) -> Result<Option<SignedCheckpoint>, StoreError>;

    /// The inclusion proof of the entry at an index in the tree of the newest checkpoint; `None` if there is no such entry.
    async fn prove(&self, index: u64) -> Result<Option<LogProof>, StoreError>;

    /// The inclusion proof of the entry at an index in the tree of the first checkpoint that covered it; it never changes.
    /// `None` if there is no such entry.
    async fn receipt(&self, index: u64) -> Result<Option<LogProof>, StoreError>;

    /// A tile or entry bundle of the log; `None` if the log is too small.
    async fn tile(&self, tile: TileId) -> Result<Option<Vec<u8>>, StoreError>;
}

/// The permanent, append-only public database. It is a transparency log that requires no trust: each record is an entry, and a
/// signed checkpoint covers the entry before its publication is acknowledged. Checkpoints of the daemon's audit log are entries
/// too, which makes truncation of the audit log detectable.
///
/// Trust: an attacker who controls it can withhold entries, but cannot alter, remove or reorder them undetected.
/// Every append survives power loss once the call returns.
#[async_trait]
pub trait PublicDatabase: LogReader {
    /// Appends a record whose chip ID, identity, certificate serial, certificate subject and public key are each new. Publishing a record of the same
    /// session that differs only in its time returns the first publication. Any other difference is a `Conflict`, because a
    /// session has one record. Fails with `Full` below the disk space floor.
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError>;

    /// Appends a checkpoint of an audit log. Appending a checkpoint with the same node, entry count and note returns the first
    /// publication; another note is a `Conflict`. Fails with `Full` below the disk space floor.
    async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError>;

    /// Announces a publication in flight, until the returned value is dropped.
    fn reserve_slot(&self) -> InFlightPublication;
}

/// Status of the public database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryStatus {
    /// Why publishing is unavailable.
    pub publish_error: Option<String>,
    /// Why lookups are unavailable.
    pub read_error: Option<String>,
    /// Checkpoints signed since the start. Concurrent entries share one.
    pub checkpoints: u64,
    /// The configured witnesses.
    pub witnesses: Vec<WitnessStatus>,
}

/// Status of a witness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WitnessStatus {
    /// Its name.
    pub name: String,
    /// Size of the largest tree it has cosigned.
    pub size: u64,
    /// Why its last cosignature failed.
    pub error: Option<String>,
}

/// The public database as the request flows use it: publishing returns a proof. Reads are those of [`LogReader`].
#[derive(Clone)]
pub struct Registry(Arc<dyn PublicDatabase>);

/// Proof that a session's record is durably public. Erasing the session's key pair requires it.
#[derive(Debug)]
pub struct PublicationReceipt {
    session: SessionId,
    publication: Publication,
}

impl PublicationReceipt {
    /// The session.
    pub const fn session(&self) -> SessionId {
        self.session
    }

    /// The publication.
    pub const fn publication(&self) -> Publication {
        self.publication
    }
}

impl Deref for Registry {
    type Target = dyn LogReader;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl Registry {
    /// Wraps a storage engine.
    pub fn new(engine: Arc<dyn PublicDatabase>) -> Self {
        Self(engine)
    }

    /// Publishes a record. Repeating the call is safe and returns the same receipt.
    pub async fn publish(&self, record: &DeviceRecord) -> Result<PublicationReceipt, PublishError> {
        let publication = self.0.publish(record).await?;
        Ok(PublicationReceipt { session: record.session, publication })
    }

    /// The receipt of a session whose record is already public, for recovery from a crash between publication and journaling.
    pub async fn find_receipt(
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

    /// The record that already has a unique value, if any.
    pub async fn conflict(&self, key: &UniqueKey) -> Result<Option<UniquenessConflict>, StoreError> {
        let found = self.0.find(key).await?;
        Ok(found.map(|PublishedRecord { record, publication, .. }| UniquenessConflict {
            field: key.field(),
            index: publication.index,
            session: Some(record.session),
        }))
    }

    /// The session of the newest record.
    pub async fn newest_session(&self) -> Result<Option<SessionId>, StoreError> {
        Ok(self.newest().await?.map(|found| found.record.session))
    }

    /// See [`PublicDatabase::append_audit`]. Repeating the call is safe and returns the same publication.
    pub async fn append_audit(&self, checkpoint: &AuditCheckpoint) -> Result<Publication, PublishError> {
        self.0.append_audit(checkpoint).await
    }
}
