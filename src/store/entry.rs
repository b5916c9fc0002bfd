//! The entries of the public log: records of devices, and checkpoints of audit logs among them.

use super::{AuditCheckpoint, DeviceRecord, Publication, RecordError, Taken, UniqueKey};
use crate::keys::sha256;

/// An entry of the public log, by what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogEntry {
    /// What the world may know of a device.
    Device(Box<DeviceRecord>),
    /// How far an audit log was.
    Audit(AuditCheckpoint),
}

impl LogEntry {
    /// Reads an entry; anything else than what was written is refused.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        match Self::is_audit(bytes) {
            true => AuditCheckpoint::from_bytes(bytes).map(Self::Audit),
            false => DeviceRecord::from_bytes(bytes).map(|record| Self::Device(Box::new(record))),
        }
    }

    /// Whether these bytes, if they are an entry at all, are an audit checkpoint. All entries are small maps whose first key is 1, the
    /// version, so the third byte tells them apart; whoever must be sure reads the entry.
    pub fn is_audit(bytes: &[u8]) -> bool {
        bytes.get(1..3) == Some(&[1, 2])
    }

    /// The values by which it is found.
    pub fn keys(&self) -> Vec<UniqueKey> {
        match self {
            Self::Device(record) => UniqueKey::of_record(record),
            Self::Audit(checkpoint) => vec![
                UniqueKey::of_audit(&checkpoint.node, checkpoint.entries),
                UniqueKey::of_audited_node(&checkpoint.node),
            ],
        }
    }

    /// Whether it says the same of the same thing; a repetition may have another time.
    pub fn is_same_but_for_its_time(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Device(one), Self::Device(other)) => one.is_same_but_for_its_time(other),
            (Self::Audit(one), Self::Audit(other)) => one.is_same_but_for_its_time(other),
            _ => false,
        }
    }

    /// Where it stands, if it is at that place in these bytes.
    pub(crate) fn publication(&self, index: u64, bytes: &[u8]) -> Publication {
        let published = match self {
            Self::Device(record) => record.published,
            Self::Audit(checkpoint) => checkpoint.recorded,
        };
        Publication { index, record_hash: sha256(bytes), published }
    }

    /// That it has a value which another entry wants, at that place.
    pub(crate) fn takes(&self, what: &'static str, index: u64) -> Taken {
        let session = match self {
            Self::Device(record) => Some(record.session),
            Self::Audit(_) => None,
        };
        Taken { what, index, session }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::store::contract_public::record;

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
        #![proptest_config(spp_testkit::random::cases(200, 20_000))]

        #[test]
        fn an_audit_checkpoint_is_read_as_it_was_written_and_is_no_device_record(checkpoint in any_checkpoint()) {
            let bytes = checkpoint.to_bytes().unwrap();
            prop_assert!(LogEntry::is_audit(&bytes));
            prop_assert!(DeviceRecord::from_bytes(&bytes).is_err());
            prop_assert_eq!(AuditCheckpoint::from_bytes(&bytes), Ok(checkpoint.clone()));
            prop_assert_eq!(LogEntry::from_bytes(&bytes), Ok(LogEntry::Audit(checkpoint)));
        }

        #[test]
        fn nothing_is_read_that_would_be_written_otherwise(
            checkpoint in any_checkpoint(), at in any::<prop::sample::Index>(), byte in any::<u8>(), more in vec(any::<u8>(), 0..3)
        ) {
            let mut bytes = checkpoint.to_bytes().unwrap();
            *at.get_mut(&mut bytes) = byte;
            bytes.extend(more);
            match LogEntry::from_bytes(&bytes) {
                Ok(LogEntry::Audit(read)) => prop_assert_eq!(read.to_bytes().unwrap(), bytes),
                Ok(LogEntry::Device(_)) => prop_assert!(false, "it has other fields"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_device_record_is_read_as_that_and_is_no_audit_checkpoint() {
        let bytes = record(1).to_bytes().unwrap();
        assert!(!LogEntry::is_audit(&bytes));
        assert_eq!(LogEntry::from_bytes(&bytes), Ok(LogEntry::Device(Box::new(record(1)))));
        let error = AuditCheckpoint::from_bytes(&bytes).unwrap_err();
        assert_eq!(error.to_string(), "not an audit checkpoint: version 1 is not known");
    }

    #[test]
    fn an_audit_checkpoint_has_limits() {
        let bytes = largest().to_bytes().unwrap();
        assert_eq!(AuditCheckpoint::from_bytes(&bytes), Ok(largest()));
        for (what, wrong) in [
            ("node has 0", AuditCheckpoint { node: String::new(), ..largest() }),
            ("node has 65", AuditCheckpoint { node: "n".repeat(65), ..largest() }),
            ("note has 0", AuditCheckpoint { note: Vec::new(), ..largest() }),
            ("note has 4097", AuditCheckpoint { note: vec![9; 4097], ..largest() }),
        ] {
            let refused = wrong.to_bytes().unwrap_err().to_string();
            assert!(refused.starts_with(&format!("not an audit checkpoint: its {what} bytes")), "{refused}");
        }
    }

    #[test]
    fn another_number_of_fields_is_refused() {
        let five = largest().to_bytes().unwrap();
        let mut six = five.clone();
        six[0] += 1;
        six.extend([6, 0]);
        let mut four = five.clone();
        four[0] -= 1;
        // The last field is 10 bytes: its key, and a number of 8 behind its head.
        four.truncate(five.len() - 10);
        for bytes in [six, four] {
            assert!(AuditCheckpoint::from_bytes(&bytes).is_err());
        }
    }
}
