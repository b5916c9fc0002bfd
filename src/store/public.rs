//! The public database's trait, and the receipt that proves a publication.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::record::RecordError;
use super::{DeviceRecord, StoreError};
use crate::names::{ChipId, DeviceIdentity, SessionId};

/// Where a record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// The record's place, counted from 0.
    pub index: u64,
    /// SHA-256 of the record's octets.
    pub record_hash: [u8; 32],
    /// Seconds since the Unix epoch.
    pub published: u64,
}

/// Which of the unique values of a record is taken, by which record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// `chip ID`, `identity`, `certificate serial`, `public key` or `session`.
    pub what: &'static str,
    /// The index of the record that has it.
    pub index: u64,
    /// The session that made that record.
    pub session: SessionId,
}

/// Why a record was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A unique value is on another device already.
    #[error("the {} is already in record {}", .0.what, .0.index)]
    Taken(Taken),
    /// The record cannot be encoded or is too large.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The store failed; whether the record is in is not known, and publishing it again is safe.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The permanent public database: append-only, there is no update and no delete.
///
/// Trust: whoever controls it can withhold records.
/// Every append is on the disk, power loss included, before the call returns.
#[async_trait]
#[expect(clippy::len_without_is_empty, reason = "a database is asked how many records it has, not whether it is empty")]
pub trait PublicDatabase: Send + Sync {
    /// Appends a record whose chip ID, identity, certificate serial and public key are each new. A record of the same session
    /// that differs in nothing but its time is the same record: its first publication is the answer. With any other
    /// difference it is `Taken`: a session has one record. A new record is refused with `Full` below the disk's floor.
    async fn publish(&self, record: &DeviceRecord) -> Result<Publication, PublishError>;

    /// The newest record of a chip, its octets as stored, and where it stands.
    async fn find_by_chip(&self, chip: &ChipId) -> Result<Option<(DeviceRecord, Vec<u8>, Publication)>, StoreError>;

    /// The newest record of an identity, and where it stands.
    async fn find_by_identity(
        &self,
        identity: &DeviceIdentity,
    ) -> Result<Option<(DeviceRecord, Publication)>, StoreError>;

    /// The record of a public key (SubjectPublicKeyInfo in DER), and where it stands.
    async fn find_by_public_key(&self, spki: &[u8]) -> Result<Option<(DeviceRecord, Publication)>, StoreError>;

    /// The newest record, and where it stands.
    async fn newest(&self) -> Result<Option<(DeviceRecord, Publication)>, StoreError>;

    /// How many records there are.
    async fn len(&self) -> Result<u64, StoreError>;
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
        let found = self.0.find_by_chip(chip).await?;
        Ok(found
            .filter(|(record, ..)| record.session == session)
            .map(|(.., publication)| PublicationReceipt { session, publication }))
    }

    /// See [`PublicDatabase::find_by_chip`].
    pub async fn find_by_chip(
        &self,
        chip: &ChipId,
    ) -> Result<Option<(DeviceRecord, Vec<u8>, Publication)>, StoreError> {
        self.0.find_by_chip(chip).await
    }

    /// See [`PublicDatabase::find_by_identity`].
    pub async fn find_by_identity(
        &self,
        identity: &DeviceIdentity,
    ) -> Result<Option<(DeviceRecord, Publication)>, StoreError> {
        self.0.find_by_identity(identity).await
    }

    /// Who has a public key already, if anybody has.
    pub async fn taker_of_public_key(&self, spki: &[u8]) -> Result<Option<Taken>, StoreError> {
        let found = self.0.find_by_public_key(spki).await?;
        let taken = |(record, publication): (DeviceRecord, Publication)| Taken {
            what: "public key",
            index: publication.index,
            session: record.session,
        };
        Ok(found.map(taken))
    }

    /// The session of the newest record.
    pub async fn newest_session(&self) -> Result<Option<SessionId>, StoreError> {
        Ok(self.0.newest().await?.map(|(record, _)| record.session))
    }

    /// How many records there are.
    pub async fn count(&self) -> Result<u64, StoreError> {
        self.0.len().await
    }
}
