//! What an entry of the public log is found by.

use super::DeviceRecord;
use crate::keys::sha256;
use crate::names::{ChipId, DeviceIdentity};

/// A value by which an entry is found: what it is, and the SHA-256 of it, so that all take the same room and none can be found by its
/// beginning. No two entries have the same, but for the node of audit checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UniqueKey([u8; 33]);

impl UniqueKey {
    fn of(kind: Unique, value: &[u8]) -> Self {
        let mut key = [kind as u8; 33];
        key[1..].copy_from_slice(&sha256(value));
        Self(key)
    }

    /// The key of a chip's record.
    pub fn of_chip(chip: &ChipId) -> Self {
        Self::of(Unique::Chip, chip.as_bytes())
    }

    /// The key of an identity's record.
    pub fn of_identity(identity: &DeviceIdentity) -> Self {
        Self::of(Unique::Identity, identity.to_string().as_bytes())
    }

    /// The key of the record of a public key, SubjectPublicKeyInfo in DER.
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self::of(Unique::PublicKey, spki)
    }

    /// All keys of a record.
    pub fn of_record(record: &DeviceRecord) -> Vec<Self> {
        let mut keys = vec![
            Self::of_chip(&record.chip),
            Self::of_identity(&record.identity),
            Self::of(Unique::Serial, &record.serial),
            Self::of(Unique::Session, record.session.as_bytes()),
        ];
        keys.extend(record.public_key.as_deref().map(Self::of_public_key));
        keys
    }

    /// The key of the audit checkpoint of a node's first so many audit entries.
    pub(crate) fn of_audit(node: &str, entries: u64) -> Self {
        Self::of(Unique::Audit, &[entries.to_be_bytes().as_slice(), node.as_bytes()].concat())
    }

    /// The key of the newest audit checkpoint of a node.
    pub(crate) fn of_audited_node(node: &str) -> Self {
        Self::of(Unique::AuditedNode, node.as_bytes())
    }

    /// Whether no two entries may have it. Else the newest one is found by it.
    pub(crate) const fn is_unique(&self) -> bool {
        self.0[0] != Unique::AuditedNode as u8
    }

    /// What of an entry it is.
    pub const fn what(&self) -> &'static str {
        match self.0[0] {
            b'c' => "chip ID",
            b'i' => "identity",
            b't' => "certificate serial",
            b'e' => "session",
            b'a' => "number of audit entries",
            b'o' => "audited node",
            _ => "public key",
        }
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 33] {
        &self.0
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum Unique {
    Chip = b'c',
    Identity = b'i',
    Serial = b't',
    Session = b'e',
    PublicKey = b'k',
    Audit = b'a',
    AuditedNode = b'o',
}
