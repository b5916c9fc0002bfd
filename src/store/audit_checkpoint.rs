//! A checkpoint of a daemon's audit log: that it had so many entries, for ever where everybody can see it.

use ciborium::Value;

use super::fields::{Form, RecordError};

static FORM: Form = Form { what: "an audit checkpoint", version: 2, most: AuditCheckpoint::MAX_LEN };

/// How far an audit log was at some time (`audit-checkpoint` in `proto/data-package.cddl`). Whoever has one finds it out if the newest
/// entries of that audit log are cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditCheckpoint {
    /// Whose audit log: the name of a node.
    pub node: String,
    /// How many entries it had.
    pub entries: u64,
    /// A signed note that says so (C2SP signed-note), over the hash of the last of them. The public database does not look into it.
    pub note: Vec<u8>,
    /// When the node asked for it to be recorded, in seconds since the Unix epoch.
    pub recorded: u64,
}

impl AuditCheckpoint {
    /// Most bytes of an encoded checkpoint.
    pub const MAX_LEN: usize = 4200;
    /// Most bytes of a node's name; it has one at least.
    pub const MAX_NODE: usize = 64;
    /// Most bytes of a note; it has one at least.
    pub const MAX_NOTE: usize = 4096;

    /// Whether it says the same of the same audit log; a repetition may have another time.
    pub fn is_same_but_for_its_time(&self, other: &Self) -> bool {
        (&self.node, self.entries, &self.note) == (&other.node, other.entries, &other.note)
    }

    /// The checkpoint as deterministic CBOR (RFC 8949 §4.2.1): the bytes that are stored, hashed and served.
    pub fn to_bytes(&self) -> Result<Vec<u8>, RecordError> {
        for (what, length, most) in
            [("node", self.node.len(), Self::MAX_NODE), ("note", self.note.len(), Self::MAX_NOTE)]
        {
            if !(1..=most).contains(&length) {
                return Err(FORM.error(format!("its {what} has {length} bytes, 1 to {most} are allowed")));
            }
        }
        FORM.write(vec![
            Value::Text(self.node.clone()),
            Value::from(self.entries),
            Value::Bytes(self.note.clone()),
            Value::from(self.recorded),
        ])
    }

    /// Reads what [`Self::to_bytes`] wrote; anything else is refused, other encodings of the same values included.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut fields = FORM.read(bytes)?;
        let checkpoint = Self {
            node: fields.text(2)?,
            entries: fields.integer(3)?,
            note: fields.bytes(4)?,
            recorded: fields.integer(5)?,
        };
        FORM.must_be_written_so(&checkpoint.to_bytes()?, bytes)?;
        Ok(checkpoint)
    }
}
