//! Entries of the public log: device records and audit checkpoints.

use super::{AuditCheckpoint, DeviceRecord, Publication, RecordError, UniqueKey, UniquenessConflict};
use crate::keys::sha256;

/// An entry of the public log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEntry {
    /// A device's public record.
    Device(Box<DeviceRecord>),
    /// A checkpoint of an audit log.
    Audit(AuditCheckpoint),
}

impl LogEntry {
    /// Decodes an entry. Only the deterministic encoding is accepted.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        match Self::is_audit(bytes) {
            true => AuditCheckpoint::from_bytes(bytes).map(Self::Audit),
            false => DeviceRecord::from_bytes(bytes).map(|record| Self::Device(Box::new(record))),
        }
    }

    /// Reports whether the bytes of a valid entry are an audit checkpoint. Every entry is a CBOR map whose first key is 1, the
    /// version, so the third byte identifies the type. Untrusted bytes must be decoded instead.
    pub fn is_audit(bytes: &[u8]) -> bool {
        bytes.get(1..3) == Some(&[1, 2])
    }

    /// The values that index the entry.
    pub fn keys(&self) -> Vec<UniqueKey> {
        match self {
            Self::Device(record) => UniqueKey::of_record(record),
            Self::Audit(checkpoint) => vec![
                UniqueKey::of_audit(&checkpoint.node, checkpoint.entries),
                UniqueKey::of_audited_node(&checkpoint.node),
            ],
        }
    }

    /// Compares everything but the time, because a repeated publication may carry a later one.
    pub fn eq_ignoring_time(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Device(one), Self::Device(other)) => one.eq_ignoring_time(other),
            (Self::Audit(one), Self::Audit(other)) => one.eq_ignoring_time(other),
            _ => false,
        }
    }

    /// The entry's publication, given its index and encoding.
    pub fn publication(&self, index: u64, bytes: &[u8]) -> Publication {
        let published = match self {
            Self::Device(record) => record.published,
            Self::Audit(checkpoint) => checkpoint.recorded,
        };
        Publication { index, record_hash: sha256(bytes), published }
    }

    /// The conflict to report when another entry has the same value of a unique field. `index` is this entry's.
    pub fn conflict(&self, field: &'static str, index: u64) -> UniquenessConflict {
        let session = match self {
            Self::Device(record) => Some(record.session),
            Self::Audit(_) => None,
        };
        UniquenessConflict { field, index, session }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::names::{ChipId, SessionId};

    fn record(n: u8) -> DeviceRecord {
        DeviceRecord {
            chip: ChipId::from_bytes(&[n; 16]).unwrap(),
            identity: format!("serial:SN-{n}").parse().unwrap(),
            profile: "phone".parse().unwrap(),
            certificate: vec![n; 640],
            certificate_is_cwt: false,
            serial: vec![n; 16],
            public_key: Some(vec![n; 91]),
            backup: vec![3; 900],
            master_key_version: 1,
            session: SessionId::from_bytes(&[n; 16]).unwrap(),
            published: 2000,
        }
    }

    fn any_checkpoint() -> impl Strategy<Value = AuditCheckpoint> {
        let note = vec(any::<u8>(), 1..=AuditCheckpoint::MAX_NOTE);
        ("\\PC{1,16}", any::<u64>(), note, any::<u64>()).prop_map(|(node, entries, note, recorded)| AuditCheckpoint {
            node,
            entries,
            note,
            recorded,
        })
    }

    fn largest() -> AuditCheckpoint {
        let (node, note) = ("n".repeat(AuditCheckpoint::MAX_NODE), vec![9; AuditCheckpoint::MAX_NOTE]);
        AuditCheckpoint { node, entries: u64::MAX, note, recorded: u64::MAX }
    }

    proptest! {
        #![proptest_config(spp_test_support::random::cases(200, 20_000))]

        #[test]
        fn audit_checkpoint_roundtrips_and_is_not_a_device_record(checkpoint in any_checkpoint()) {
            let bytes = checkpoint.to_bytes().unwrap();
            prop_assert!(LogEntry::is_audit(&bytes));
            prop_assert!(DeviceRecord::from_bytes(&bytes).is_err());
            prop_assert_eq!(AuditCheckpoint::from_bytes(&bytes), Ok(checkpoint.clone()));
            prop_assert_eq!(LogEntry::from_bytes(&bytes), Ok(LogEntry::Audit(checkpoint)));
        }

        #[test]
        fn non_canonical_entry_is_refused(
            checkpoint in any_checkpoint(),
            position in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            more in vec(any::<u8>(), 0..3),
        ) {
            let mut bytes = checkpoint.to_bytes().unwrap();
            *position.get_mut(&mut bytes) = byte;
            bytes.extend(more);
            match LogEntry::from_bytes(&bytes) {
                Ok(LogEntry::Audit(read)) => prop_assert_eq!(read.to_bytes().unwrap(), bytes),
                Ok(LogEntry::Device(_)) => prop_assert!(false, "a device record has other fields"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn device_record_decodes_and_is_not_an_audit_checkpoint() {
        let bytes = record(1).to_bytes().unwrap();
        assert!(!LogEntry::is_audit(&bytes));
        assert_eq!(LogEntry::from_bytes(&bytes), Ok(LogEntry::Device(Box::new(record(1)))));
        let error = AuditCheckpoint::from_bytes(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "not an audit checkpoint: unsupported version 1");
    }

    #[test]
    fn audit_checkpoint_field_lengths_are_checked() {
        let bytes = largest().to_bytes().unwrap();
        assert_eq!(AuditCheckpoint::from_bytes(&bytes), Ok(largest()));
        for (problem, wrong) in [
            ("node has 0", AuditCheckpoint { node: String::new(), ..largest() }),
            ("node has 65", AuditCheckpoint { node: "n".repeat(65), ..largest() }),
            ("note has 0", AuditCheckpoint { note: Vec::new(), ..largest() }),
            ("note has 4097", AuditCheckpoint { note: vec![9; 4097], ..largest() }),
        ] {
            let refused = wrong.to_bytes().unwrap_err().to_string();
            assert!(refused.starts_with(&format!("not an audit checkpoint: {problem} bytes")), "{refused}");
        }
    }

    #[test]
    fn wrong_field_count_is_refused() {
        let five = largest().to_bytes().unwrap();
        let mut six = five.clone();
        six[0] += 1;
        six.extend([6, 0]);
        let mut four = five.clone();
        four[0] -= 1;
        // The last field has 10 bytes: a 1-byte key, then an integer of 1 head byte and 8 value bytes.
        four.truncate(five.len() - 10);
        for bytes in [six, four] {
            assert!(AuditCheckpoint::from_bytes(&bytes).is_err());
        }
    }
}
