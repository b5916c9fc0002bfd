//! Deterministic CBOR (RFC 8949 §4.2.1) for bytes that contain keys.
//!
//! A general-purpose library decodes into values and encodes through internal buffers that are not wiped. Here the writer owns
//! one buffer that never grows (so a reallocation cannot leave a copy behind) and that is wiped, and the reader borrows. The
//! decoded structures have a fixed shape: nothing recurses, and no allocation depends on an unchecked length. The code is small
//! enough to port to a microcontroller.

use crate::secret::SecretBytes;

const UNSIGNED: u8 = 0;
const NEGATIVE: u8 = 1;
const BYTES: u8 = 2;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;
const TAG: u8 = 6;

/// An encoding error. The caller adds the location.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CborError {
    /// The bytes end inside an item.
    #[error("unexpected end of data")]
    Truncated,
    /// Another encoding than the deterministic one (RFC 8949 §4.2.1).
    #[error("a number or length is not in its shortest form, or a length is indefinite")]
    NotDeterministic,
    /// An item of another type; the type that was expected.
    #[error("unexpected type, expected {0}")]
    OtherType(&'static str),
    /// A number that its field cannot hold.
    #[error("number out of range")]
    OutOfRange,
    /// A text string that is not UTF-8.
    #[error("text is not UTF-8")]
    NotText,
    /// A map key that is unknown, repeated or out of order.
    #[error("key {0} is unknown, repeated or out of order")]
    UnexpectedKey(i64),
    /// A map key that is missing.
    #[error("key {0} is missing, or a key before it is unknown")]
    MissingKey(i64),
    /// Bytes after the value; their number.
    #[error("{0} trailing bytes after the value")]
    Trailing(usize),
}

/// Encodes items into one buffer of fixed size.
pub struct Writer {
    out: SecretBytes,
    limit: usize,
    overflow: bool,
}

impl Writer {
    /// Creates a writer with a capacity of `limit` bytes.
    pub fn with_limit(limit: usize) -> Self {
        Self { out: SecretBytes::new(Vec::with_capacity(limit)), limit, overflow: false }
    }

    /// Writes an integer.
    pub fn int(&mut self, value: i64) -> &mut Self {
        let magnitude = if value < 0 { !value } else { value };
        self.head(if value < 0 { NEGATIVE } else { UNSIGNED }, magnitude.unsigned_abs())
    }

    /// Writes a byte string.
    pub fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.head(BYTES, value.len() as u64).put(value)
    }

    /// Writes a text string.
    pub fn text(&mut self, value: &str) -> &mut Self {
        self.head(TEXT, value.len() as u64).put(value.as_bytes())
    }

    /// Writes the head of an array; its items must follow.
    pub fn array(&mut self, items: usize) -> &mut Self {
        self.head(ARRAY, items as u64)
    }

    /// Writes the head of a map; its keys and values must follow, in the order of their encodings.
    pub fn map(&mut self, entries: usize) -> &mut Self {
        self.head(MAP, entries as u64)
    }

    /// Writes a byte string of `size` bytes: zeros, then the value. The value must not be longer than `size`.
    pub(crate) fn padded_bytes(&mut self, value: &[u8], size: usize) -> &mut Self {
        self.head(BYTES, size as u64);
        for _ in value.len()..size {
            self.put(&[0]);
        }
        self.put(value)
    }

    /// The encoded bytes; `None` if they exceed the limit.
    pub fn finish(self) -> Option<SecretBytes> {
        (!self.overflow).then_some(self.out)
    }

    /// The encoded bytes if they contain no secret; `None` if they exceed the limit.
    pub fn finish_public(mut self) -> Option<Vec<u8>> {
        // Exposed and not wiped: the caller wrote no secret.
        (!self.overflow).then(|| std::mem::take(self.out.expose_mut()))
    }

    fn head(&mut self, major: u8, value: u64) -> &mut Self {
        let major = major << 5;
        let be = value.to_be_bytes();
        match value {
            0..=23 => self.put(&[major | be[7]]),
            24..=0xff => self.put(&[major | 24, be[7]]),
            0x100..=0xffff => self.put(&[major | 25]).put(&be[6..]),
            0x1_0000..=0xffff_ffff => self.put(&[major | 26]).put(&be[4..]),
            _ => self.put(&[major | 27]).put(&be),
        }
    }

    fn put(&mut self, bytes: &[u8]) -> &mut Self {
        // Exposed to append; within its capacity, so it is never reallocated.
        let out = self.out.expose_mut();
        if self.overflow || bytes.len() > self.limit - out.len() {
            self.overflow = true;
        } else {
            out.extend_from_slice(bytes);
        }
        self
    }
}

/// Decodes items; accepts the deterministic encoding only.
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Creates a reader of these bytes.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Reads an integer.
    pub fn int(&mut self) -> Result<i64, CborError> {
        let (major, value) = self.head()?;
        let value = i64::try_from(value).map_err(|_| CborError::OutOfRange)?;
        match major {
            UNSIGNED => Ok(value),
            NEGATIVE => Ok(!value),
            _ => Err(CborError::OtherType("an integer")),
        }
    }

    /// Reads a byte string.
    pub fn bytes(&mut self) -> Result<&'a [u8], CborError> {
        let length = self.head_of(BYTES, "a byte string")?;
        self.take(length)
    }

    /// Reads a text string.
    pub fn text(&mut self) -> Result<&'a str, CborError> {
        let length = self.head_of(TEXT, "a text string")?;
        std::str::from_utf8(self.take(length)?).map_err(|_| CborError::NotText)
    }

    /// Reads an array header and returns the number of items.
    pub(crate) fn array(&mut self) -> Result<u64, CborError> {
        self.head_of(ARRAY, "an array")
    }

    /// Whether the next item is an array.
    pub(crate) fn next_is_array(&self) -> bool {
        self.rest.first().is_some_and(|first| first >> 5 == ARRAY)
    }

    /// Reads the head of a map.
    pub fn map(&mut self) -> Result<MapReader<'_, 'a>, CborError> {
        let remaining = self.head_of(MAP, "a map")?;
        Ok(MapReader { reader: self, remaining, pending_key: None })
    }

    /// Fails if bytes remain.
    pub const fn end(&self) -> Result<(), CborError> {
        if self.rest.is_empty() { Ok(()) } else { Err(CborError::Trailing(self.rest.len())) }
    }

    /// The bytes that have not been read.
    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Skips one item of any type. Iterative: nesting uses no stack.
    pub(crate) fn skip(&mut self) -> Result<(), CborError> {
        let mut items = 1u64;
        while items > 0 {
            let (major, value) = self.head()?;
            let inner = match major {
                BYTES | TEXT => self.take(value).map(|_| 0)?,
                ARRAY => value,
                MAP => value.checked_mul(2).ok_or(CborError::OutOfRange)?,
                TAG => 1,
                _ => 0,
            };
            items = (items - 1).checked_add(inner).ok_or(CborError::OutOfRange)?;
        }
        Ok(())
    }

    fn head_of(&mut self, expected: u8, name: &'static str) -> Result<u64, CborError> {
        match self.head()? {
            (major, value) if major == expected => Ok(value),
            _ => Err(CborError::OtherType(name)),
        }
    }

    fn head(&mut self) -> Result<(u8, u64), CborError> {
        let first = self.take(1)?[0];
        let (value, min) = match first & 0x1f {
            short @ 0..=23 => (u64::from(short), 0),
            24 => (self.argument(1)?, 24),
            25 => (self.argument(2)?, 0x100),
            26 => (self.argument(4)?, 0x1_0000),
            27 => (self.argument(8)?, 0x1_0000_0000),
            _ => return Err(CborError::NotDeterministic),
        };
        if value < min { Err(CborError::NotDeterministic) } else { Ok((first >> 5, value)) }
    }

    fn argument(&mut self, bytes: u64) -> Result<u64, CborError> {
        Ok(self.take(bytes)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], CborError> {
        let length = usize::try_from(length).map_err(|_| CborError::Truncated)?;
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(CborError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Reads a map with integer keys in order, each at most once.
pub struct MapReader<'r, 'a> {
    /// Positioned at the value after [`Self::key`] returned `true`.
    pub reader: &'r mut Reader<'a>,
    remaining: u64,
    /// A key that was read but not consumed.
    pending_key: Option<i64>,
}

impl<'a> MapReader<'_, 'a> {
    /// Whether the next entry has this key; if so, the value must be read next. Query keys in the order of the encoding.
    pub fn key(&mut self, expected: i64) -> Result<bool, CborError> {
        if self.remaining == 0 {
            return Ok(false);
        }
        let found = match self.pending_key {
            Some(found) => found,
            None => *self.pending_key.insert(self.reader.int()?),
        };
        if found != expected {
            return Ok(false);
        }
        self.pending_key = None;
        self.remaining -= 1;
        Ok(true)
    }

    /// Reads the integer with this key, which must be next.
    pub fn required_int(&mut self, key: i64) -> Result<i64, CborError> {
        if self.key(key)? { self.reader.int() } else { Err(CborError::MissingKey(key)) }
    }

    /// Reads the bytes with this key, which must be next.
    pub fn required_bytes(&mut self, key: i64) -> Result<&'a [u8], CborError> {
        if self.key(key)? { self.reader.bytes() } else { Err(CborError::MissingKey(key)) }
    }

    /// Fails if entries remain.
    pub fn end(mut self) -> Result<(), CborError> {
        match (self.remaining, self.pending_key.take()) {
            (0, _) => Ok(()),
            (_, Some(key)) => Err(CborError::UnexpectedKey(key)),
            (_, None) => Err(CborError::UnexpectedKey(self.reader.int()?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ciborium::Value;
    use proptest::prelude::*;

    fn encode(write: impl FnOnce(&mut Writer)) -> Vec<u8> {
        let mut writer = Writer::with_limit(4096);
        write(&mut writer);
        writer.finish_public().unwrap()
    }

    fn ciborium_encode(value: &Value) -> Vec<u8> {
        let mut out = Vec::new();
        ciborium::into_writer(value, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn writer_matches_ciborium_and_reader_decodes(number: i64, bytes: Vec<u8>, text: String) {
            let ours = encode(|w| {
                w.array(3).int(number).bytes(&bytes).text(&text);
            });
            let value = Value::Array(vec![number.into(), bytes.clone().into(), text.clone().into()]);
            prop_assert_eq!(&ours, &ciborium_encode(&value));

            let mut reader = Reader::new(&ours);
            prop_assert_eq!(reader.array(), Ok(3));
            prop_assert_eq!(reader.int(), Ok(number));
            prop_assert_eq!(reader.bytes(), Ok(bytes.as_slice()));
            prop_assert_eq!(reader.text(), Ok(text.as_str()));
            prop_assert_eq!(reader.end(), Ok(()));
        }

        #[test]
        fn skip_never_panics_and_consumes_one_item(bytes: Vec<u8>) {
            let _ = Reader::new(&bytes).skip();
            let item = encode(|w| { w.map(1).int(-1).array(2).bytes(&bytes).text(""); });
            let mut reader = Reader::new(&item);
            prop_assert_eq!(reader.skip(), Ok(()));
            prop_assert_eq!(reader.end(), Ok(()));
        }
    }

    #[test]
    fn non_deterministic_integers_and_lengths_rejected() {
        for long in [&[0x18, 23][..], &[0x19, 0, 255], &[0x1a, 0, 0, 255, 255], &[0x1b, 0, 0, 0, 0, 255, 255, 255, 255]]
        {
            assert_eq!(Reader::new(long).int(), Err(CborError::NotDeterministic), "{long:02x?}");
        }
        assert_eq!(Reader::new(&[0x5f, 0x41, 0, 0xff]).bytes(), Err(CborError::NotDeterministic));
        assert_eq!(Reader::new(&[0x5b, 0xff, 255, 255, 255, 255, 255, 255, 255]).bytes(), Err(CborError::Truncated));
        assert_eq!(Reader::new(&[0x9b, 0xff, 255, 255, 255, 255, 255, 255, 255]).skip(), Err(CborError::Truncated));
    }

    #[test]
    fn map_with_unordered_or_unknown_keys_rejected() {
        let read = |bytes: &[u8]| {
            let mut reader = Reader::new(bytes);
            let mut map = reader.map()?;
            let found = (map.key(1)? && map.reader.int()? == 0, map.key(2)? && map.reader.int()? == 0);
            map.end().map(|()| found)
        };
        assert_eq!(read(&[0xa2, 1, 0, 2, 0]), Ok((true, true)));
        assert_eq!(read(&[0xa1, 2, 0]), Ok((false, true)));
        assert_eq!(read(&[0xa2, 2, 0, 1, 0]), Err(CborError::UnexpectedKey(1)));
        assert_eq!(read(&[0xa2, 1, 0, 1, 0]), Err(CborError::UnexpectedKey(1)));
        assert_eq!(read(&[0xa1, 3, 0]), Err(CborError::UnexpectedKey(3)));
    }

    #[test]
    fn writer_over_limit_fails() {
        let mut writer = Writer::with_limit(3);
        writer.bytes(&[1, 2, 3]).int(1);
        assert!(writer.finish().is_none());
    }
}
