//! The form that all entries of the log share: a map of deterministic CBOR (RFC 8949 §4.2.1) with the keys 1, 2, 3 and so on.

use ciborium::Value;

/// The bytes are not what they should be, or the values do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not {what}: {cause}")]
pub struct RecordError {
    what: &'static str,
    cause: String,
}

/// What an entry is and how long it may be.
pub(super) struct Form {
    /// How errors call it.
    pub(super) what: &'static str,
    /// The value of key 1.
    pub(super) version: u64,
    /// Most bytes.
    pub(super) most: usize,
}

impl Form {
    pub(super) fn error(&self, cause: impl ToString) -> RecordError {
        RecordError { what: self.what, cause: cause.to_string() }
    }

    /// The values of the keys from 2 on, as a map behind the version.
    pub(super) fn write(&self, fields: Vec<Value>) -> Result<Vec<u8>, RecordError> {
        let fields = std::iter::once(Value::from(self.version)).chain(fields);
        let map = (1u64..).zip(fields).map(|(key, value)| (Value::from(key), value)).collect();
        let mut bytes = Vec::new();
        ciborium::into_writer(&Value::Map(map), &mut bytes).map_err(|e| self.error(e))?;
        match bytes.len() <= self.most {
            true => Ok(bytes),
            false => Err(self.error(format!("{} bytes, at most {} are allowed", bytes.len(), self.most))),
        }
    }

    /// The fields behind the version. Whoever reads them must still compare the bytes with what it would write.
    pub(super) fn read(&'static self, bytes: &[u8]) -> Result<Fields, RecordError> {
        let value: Value = ciborium::from_reader(bytes).map_err(|e| self.error(e))?;
        let map = value.into_map().map_err(|_| self.error("no map"))?;
        let mut fields = Fields { form: self, rest: map.into_iter() };
        match fields.integer(1)? {
            version if version == self.version => Ok(fields),
            version => Err(self.error(format!("version {version} is not known"))),
        }
    }

    /// Other encodings of the same values are refused, so that an entry has one form.
    pub(super) fn must_be_written_so(&self, written: &[u8], bytes: &[u8]) -> Result<(), RecordError> {
        if written == bytes { Ok(()) } else { Err(self.error("not in the deterministic form")) }
    }
}

/// The fields of an entry, taken one after the other.
pub(super) struct Fields {
    form: &'static Form,
    rest: std::vec::IntoIter<(Value, Value)>,
}

impl Fields {
    pub(super) fn wrong(&self, key: u64) -> RecordError {
        self.form.error(format!("field {key} is missing or of another type"))
    }

    pub(super) fn next(&mut self, key: u64) -> Result<Value, RecordError> {
        match self.rest.next() {
            Some((found, value)) if found == Value::from(key) => Ok(value),
            _ => Err(self.wrong(key)),
        }
    }

    pub(super) fn bytes(&mut self, key: u64) -> Result<Vec<u8>, RecordError> {
        self.next(key)?.into_bytes().map_err(|_| self.wrong(key))
    }

    pub(super) fn text(&mut self, key: u64) -> Result<String, RecordError> {
        self.next(key)?.into_text().map_err(|_| self.wrong(key))
    }

    pub(super) fn integer(&mut self, key: u64) -> Result<u64, RecordError> {
        self.next(key)?.into_integer().ok().and_then(|i| u64::try_from(i).ok()).ok_or_else(|| self.wrong(key))
    }
}
