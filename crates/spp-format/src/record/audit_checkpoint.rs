//! Checkpoints of a daemon's audit log, published so that anyone can detect truncation of the log.

use ciborium::Value;

use super::fields::{EntryFormat, RecordError};

static FORMAT: EntryFormat = EntryFormat { name: "an audit checkpoint", version: 2, max_len: AuditCheckpoint::MAX_LEN };

/// The size of an audit log at some time (`audit-checkpoint` in `proto/data-package.cddl`). A checkpoint reveals whether newer
/// entries were removed from that audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditCheckpoint {
    /// Name of the node that writes the audit log.
    pub node: String,
    /// Number of entries.
    pub entries: u64,
    /// A signed note (C2SP signed-note) over the entry count and the last entry's hash. The public database does not parse it.
    pub note: Vec<u8>,
    /// When the node requested the publication, seconds since the Unix epoch.
    pub recorded: u64,
}

impl AuditCheckpoint {
    /// Maximum bytes of an encoded checkpoint.
    pub const MAX_LEN: usize = 4200;
    /// Maximum bytes of a node name. The minimum is 1.
    pub const MAX_NODE: usize = 64;
    /// Maximum bytes of a note. The minimum is 1.
    pub const MAX_NOTE: usize = 4096;

    /// Compares everything but the time, because a repeated publication may carry a later one.
    pub fn eq_ignoring_time(&self, other: &Self) -> bool {
        (&self.node, self.entries, &self.note) == (&other.node, other.entries, &other.note)
    }

    /// Encodes the checkpoint as deterministic CBOR (RFC 8949 §4.2.1). These bytes are stored, hashed and served.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        for (field, length, max) in
            [("node", self.node.len(), Self::MAX_NODE), ("note", self.note.len(), Self::MAX_NOTE)]
        {
            if !(1..=max).contains(&length) {
                return Err(FORMAT.error(format!("{field} has {length} bytes; 1 to {max} are allowed")));
            }
        }
        FORMAT.write(vec![
            Value::Text(self.node.clone()),
            Value::from(self.entries),
            Value::Bytes(self.note.clone()),
            Value::from(self.recorded),
        ])
    }

    /// Decodes the output of [`Self::to_bytes`]. Other encodings of the same values are refused.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut fields = FORMAT.read(bytes)?;
        let checkpoint = Self {
            node: fields.text(2)?,
            entries: fields.integer(3)?,
            note: fields.bytes(4)?,
            recorded: fields.integer(5)?,
        };
        FORMAT.check_canonical(&checkpoint.to_bytes()?, bytes)?;
        Ok(checkpoint)
    }
}
