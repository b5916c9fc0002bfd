//! Published records: their position and hash, and the values that are unique among them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DeviceRecord, RecordError};
use crate::keys::sha256;
use crate::names::SessionId;

/// The position and hash of a published entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publication {
    /// Index in the log, from 0.
    pub index: u64,
    /// SHA-256 of the encoded entry.
    pub record_hash: [u8; 32],
    /// Seconds since the Unix epoch.
    pub published: u64,
}

/// A record of the public database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedRecord {
    /// The decoded record.
    pub record: DeviceRecord,
    /// The encoded record, as stored and hashed.
    pub bytes: Vec<u8>,
    /// Its position and hash.
    pub publication: Publication,
}

impl PublishedRecord {
    /// Decodes the record at an index.
    pub fn from_bytes(index: u64, bytes: Vec<u8>) -> Result<Self, RecordError> {
        let record = DeviceRecord::from_bytes(&bytes)?;
        let publication = Publication { index, record_hash: sha256(&bytes), published: record.published };
        Ok(Self { record, bytes, publication })
    }
}

/// A unique value that another entry already has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UniquenessConflict {
    /// `chip ID`, `identity`, `certificate serial`, `certificate subject`, `public key` or `session`; `number of audit entries` for an audit checkpoint.
    pub field: &'static str,
    /// Index of the entry that has it.
    pub index: u64,
    /// The session of that entry, if it is a device record.
    pub session: Option<SessionId>,
}

impl fmt::Display for UniquenessConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.session {
            Some(session) => write!(f, "the {} is already in record {} of session {session}", self.field, self.index),
            None => write!(f, "the {} of this node is already in entry {}, with another note", self.field, self.index),
        }
    }
}
