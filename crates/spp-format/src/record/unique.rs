//! Lookup keys of the public log's entries.

use super::DeviceRecord;
use crate::certificate::IssuedSubject;
use crate::keys::{PublicKey, sha256};
use crate::names::{ChipId, DeviceIdentity};

/// A lookup key of an entry: a field tag and the SHA-256 of the field's value. Hashing gives all keys one length and prevents
/// prefix matches. Every key is unique, except the node of audit checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UniqueKey([u8; 33]);

impl UniqueKey {
    fn of(field: UniqueField, value: &[u8]) -> Self {
        let mut key = [field as u8; 33];
        key[1..].copy_from_slice(&sha256(value));
        Self(key)
    }

    /// The key of a chip's record.
    pub fn of_chip(chip: &ChipId) -> Self {
        Self::of(UniqueField::Chip, chip.as_bytes())
    }

    /// The key of a device identity's record.
    pub fn of_identity(identity: &DeviceIdentity) -> Self {
        Self::of(UniqueField::Identity, identity.to_string().as_bytes())
    }

    /// The key of the record of a public key, SubjectPublicKeyInfo in DER. It depends on the key, not on its encoding.
    pub fn of_public_key(spki: &[u8]) -> Self {
        Self::of(UniqueField::PublicKey, &PublicKey::unique_part(spki))
    }

    /// The key of the record of an issuer and a subject.
    pub fn of_subject(subject: &IssuedSubject) -> Self {
        Self::of(UniqueField::Subject, subject.as_bytes())
    }

    /// All keys of a record.
    pub fn of_record(record: &DeviceRecord) -> Vec<Self> {
        let mut keys = vec![
            Self::of_chip(&record.chip),
            Self::of_identity(&record.identity),
            Self::of(UniqueField::Serial, &record.serial),
            Self::of(UniqueField::Session, record.session.as_bytes()),
        ];
        keys.extend(record.public_key.as_deref().map(Self::of_public_key));
        if !record.certificate_is_cwt {
            keys.extend(IssuedSubject::of_certificate(&record.certificate).as_ref().map(Self::of_subject));
        }
        keys
    }

    /// The key of the audit checkpoint that covers a node's first `entries` audit entries.
    pub(crate) fn of_audit(node: &str, entries: u64) -> Self {
        Self::of(UniqueField::Audit, &[entries.to_be_bytes().as_slice(), node.as_bytes()].concat())
    }

    /// The key of the newest audit checkpoint of a node.
    pub fn of_audited_node(node: &str) -> Self {
        Self::of(UniqueField::AuditedNode, node.as_bytes())
    }

    /// Reports whether at most one entry may have the key. If not, a lookup returns the newest entry.
    pub const fn is_unique(&self) -> bool {
        self.0[0] != UniqueField::AuditedNode as u8
    }

    /// The name of the field, for messages.
    pub const fn field(&self) -> &'static str {
        match self.0[0] {
            b'c' => "chip ID",
            b'i' => "identity",
            b't' => "certificate serial",
            b's' => "certificate subject",
            b'e' => "session",
            b'a' => "number of audit entries",
            b'o' => "audited node",
            _ => "public key",
        }
    }

    /// The field tag followed by the hash.
    pub const fn as_bytes(&self) -> &[u8; 33] {
        &self.0
    }
}

#[derive(Clone, Copy)]
#[repr(u8)]
enum UniqueField {
    Chip = b'c',
    Identity = b'i',
    Serial = b't',
    Session = b'e',
    PublicKey = b'k',
    Subject = b's',
    Audit = b'a',
    AuditedNode = b'o',
}
