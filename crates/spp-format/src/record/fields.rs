//! The encoding that all log entries share: a deterministic CBOR map (RFC 8949 §4.2.1) with the keys 1, 2, 3 and so on.

use ciborium::Value;

/// An entry cannot be decoded, or its values exceed a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not {name}: {cause}")]
pub struct RecordError {
    name: &'static str,
    cause: String,
}

/// The type and size limit of an entry.
pub(super) struct EntryFormat {
    /// Name in error messages.
    pub(super) name: &'static str,
    /// The value of key 1.
    pub(super) version: u64,
    /// Maximum encoded length in bytes.
    pub(super) max_len: usize,
}

impl EntryFormat {
    pub(super) fn error(&self, cause: impl ToString) -> RecordError {
        RecordError { name: self.name, cause: cause.to_string() }
    }

    /// Encodes the version as key 1 and `fields` as the keys from 2 on.
    pub(super) fn write(&self, fields: Vec<Value>) -> Result<Vec<u8>, RecordError> {
        let fields = std::iter::once(Value::from(self.version)).chain(fields);
        let map = (1u64..).zip(fields).map(|(key, value)| (Value::from(key), value)).collect();
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(map), &mut bytes).map_err(|e| self.error(e))?;
        match bytes.len() <= self.max_len {
            true => Ok(bytes),
            false => Err(self.error(format!("{} bytes; at most {} are allowed", bytes.len(), self.max_len))),
        }
    }

    /// Decodes the map and checks the version. The caller must check the encoding with [`Self::check_canonical`].
    pub(super) fn read(&'static self, bytes: &[u8]) -> Result<Fields, RecordError> {
        let value: Value = ciborium::from_reader(bytes).map_err(|e| self.error(e))?;
        let map = value.into_map().map_err(|_| self.error("not a map"))?;
        let mut fields = Fields { format: self, rest: map.into_iter() };
        match fields.integer(1)? {
            version if version == self.version => Ok(fields),
            version => Err(self.error(format!("unsupported version {version}"))),
        }
    }

    /// Compares `bytes` with the deterministic encoding of the decoded values, so that every entry has exactly one encoding.
    pub(super) fn check_canonical(&self, canonical: &[u8], bytes: &[u8]) -> Result<(), RecordError> {
        if canonical == bytes { Ok(()) } else { Err(self.error("not in deterministic encoding")) }
    }
}

/// The fields of an entry, read in key order.
pub(super) struct Fields {
    format: &'static EntryFormat,
    rest: std::vec::IntoIter<(Value, Value)>,
}

impl Fields {
    pub(super) fn invalid(&self, key: u64) -> RecordError {
        self.format.error(format!("field {key} is missing or has the wrong type"))
    }

    pub(super) fn next(&mut self, key: u64) -> Result<Value, RecordError> {
        match self.rest.next() {
            Some((found, value)) if found == Value::from(key) => Ok(value),
            _ => Err(self.invalid(key)),
        }
    }

    pub(super) fn bytes(&mut self, key: u64) -> Result<Vec<u8>, RecordError> {
        self.next(key)?.into_bytes().map_err(|_| self.invalid(key))
    }

    pub(super) fn text(&mut self, key: u64) -> Result<String, RecordError> {
        self.next(key)?.into_text().map_err(|_| self.invalid(key))
    }

    pub(super) fn integer(&mut self, key: u64) -> Result<u64, RecordError> {
        self.next(key)?.into_integer().ok().and_then(|i| u64::try_from(i).ok()).ok_or_else(|| self.invalid(key))
    }
}
