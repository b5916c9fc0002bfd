//! Entry bundles: up to 256 entries, each after its length in two bytes (C2SP tlog-tiles, Log entries).

use super::TlogError;

/// Most bytes of an entry: its length has two bytes.
pub const MAX_ENTRY: usize = u16::MAX as usize;

/// Bytes before each entry.
pub const HEAD: usize = 2;

/// Adds an entry; one over the limit is refused and nothing is added.
pub fn push(bundle: &mut Vec<u8>, entry: &[u8]) -> Result<(), TlogError> {
    let length = u16::try_from(entry.len());
    let length = length.map_err(|_| TlogError::malformed("log entry", format!("it has {} bytes", entry.len())))?;
    bundle.extend_from_slice(&length.to_be_bytes());
    bundle.extend_from_slice(entry);
    Ok(())
}

/// The entries in their order. What is cut off is an error.
pub fn entries(bundle: &[u8]) -> impl Iterator<Item = Result<&[u8], TlogError>> {
    let mut rest = Some(bundle);
    std::iter::from_fn(move || {
        let bytes = rest.take().filter(|bytes| !bytes.is_empty())?;
        let split = bytes
            .split_first_chunk::<HEAD>()
            .and_then(|(length, after)| after.split_at_checked(usize::from(u16::from_be_bytes(*length))));
        match split {
            Some((entry, after)) => {
                rest = Some(after);
                Some(Ok(entry))
            }
            None => Some(Err(TlogError::malformed("entry bundle", "its last entry is cut off"))),
        }
    })
}

/// The entries, exactly so many.
pub fn exactly(bundle: &[u8], count: usize) -> Result<Vec<&[u8]>, TlogError> {
    let found = entries(bundle).collect::<Result<Vec<_>, _>>()?;
    if found.len() == count {
        return Ok(found);
    }
    Err(TlogError::malformed("entry bundle", format!("it has {} entries and should have {count}", found.len())))
}
