//! Encodes and decodes entry bundles: up to 256 entries, each prefixed with its length in two bytes (C2SP tlog-tiles, Log
//! entries).

use super::TlogError;

/// Maximum size of an entry in bytes, as the length prefix has two bytes.
pub const MAX_ENTRY: usize = u16::MAX as usize;

/// Size of the length prefix of an entry in bytes.
pub const LENGTH_SIZE: usize = 2;

/// Appends an entry. Fails without a change if the entry exceeds [`MAX_ENTRY`].
pub fn push(bundle: &mut Vec<u8>, entry: &[u8]) -> Result<(), TlogError> {
    let length = u16::try_from(entry.len());
    let length = length.map_err(|_| {
        TlogError::malformed("log entry", format!("{} bytes exceed the limit of {MAX_ENTRY}", entry.len()))
    })?;
    bundle.extend_from_slice(&length.to_be_bytes());
    bundle.extend_from_slice(entry);
    Ok(())
}

/// The entries in order. A truncated last entry is an error.
pub fn entries(bundle: &[u8]) -> impl Iterator<Item = Result<&[u8], TlogError>> {
    let mut rest = Some(bundle);
    std::iter::from_fn(move || {
        let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
        let split = bytes
            .split_first_chunk::<LENGTH_SIZE>()
            .and_then(|(length, after)| after.split_at_checked(usize::from(u16::from_be_bytes(*length))));
        match split {
            Some((entry, after)) => {
                rest = Some(after);
                Some(Ok(entry))
            }
            None => Some(Err(TlogError::malformed("entry bundle", "last entry truncated"))),
        }
    })
}

/// Decodes a bundle of exactly `count` entries.
pub fn decode_exactly(bundle: &[u8], count: usize) -> Result<Vec<&[u8]>, TlogError> {
    let found = entries(bundle).collect::<Result<Vec<_>, _>>()?;
    if found.len() == count {
        return Ok(found);
    }
    Err(TlogError::malformed("entry bundle", format!("{} entries found, {count} expected", found.len())))
}
