//! What is kept beside each full bundle because the tiles do not say it: the checkpoints that were the first to cover its entries, and
//! how many device records there are up to its end.
//!
//! ```text
//! signed/<N> = checkpoints ‖ number of device records in the bundles 0 to N, 8 bytes, if other entries are among them
//! checkpoint = size of the tree, 8 bytes ‖ signature, 64 bytes
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::files::{BUNDLE, FullTiles, write_new, write_once};
use crate::store::LogEntry;
use crate::tlog::{LogKey, SignedCheckpoint, TileId, TileKind, bundle};

const SIGNED: &str = "signed";

/// A checkpoint, as much of it as cannot be computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SignedSize {
    pub(super) size: u64,
    pub(super) signature: [u8; 64],
}

impl SignedSize {
    const LEN: usize = 8 + 64;

    pub(super) fn of(checkpoint: &SignedCheckpoint, key: &LogKey) -> Option<Self> {
        Some(Self { size: checkpoint.size(), signature: checkpoint.signature(key)? })
    }

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(&self.size.to_be_bytes());
        bytes[8..].copy_from_slice(&self.signature);
        bytes
    }

    fn from_bytes(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (size, signature) = bytes.split_first_chunk::<8>()?;
        Some(Self { size: u64::from_be_bytes(*size), signature: signature.try_into().ok()? })
    }
}

/// Writes what belongs to a bundle that became full, with so many device records up to its end.
pub(super) fn keep(dir: &Path, bundle: u64, signed: &[SignedSize], records: u64) -> io::Result<()> {
    let (from, to) = (bundle * BUNDLE, (bundle + 1) * BUNDLE);
    let last = signed.iter().position(|signed| signed.size >= to).unwrap_or(signed.len());
    let of_bundle = signed.iter().take(last + 1).filter(|signed| signed.size > from);
    let checkpoints: Vec<u8> = of_bundle.flat_map(|signed| signed.to_bytes()).collect();
    write_once(&path(dir, bundle), &[checkpoints, count_of(to, records)].concat())
}

/// Nothing where there are only records: so these files were before there was anything else, and they are never changed.
fn count_of(entries: u64, records: u64) -> Vec<u8> {
    if records == entries { Vec::new() } else { records.to_be_bytes().to_vec() }
}

/// The checkpoint that was the first to cover an entry of a full bundle, if it was kept.
pub(super) fn first_to_cover(dir: &Path, index: u64) -> io::Result<Option<SignedSize>> {
    let Some(bytes) = read(dir, index / BUNDLE)? else { return Ok(None) };
    let mut all = bytes.as_chunks::<{ SignedSize::LEN }>().0.iter().filter_map(SignedSize::from_bytes);
    Ok(all.find(|signed| signed.size > index))
}

/// How many of the entries below that one, the first of a bundle, are device records. A log that was put together from a mirror has not
/// kept it: then they are counted, once.
pub(super) fn records_below(dir: &Path, base: u64) -> io::Result<u64> {
    let Some(last) = (base / BUNDLE).checked_sub(1) else { return Ok(0) };
    let kept = read(dir, last)?;
    if let Some(bytes) = &kept {
        match bytes.as_chunks::<{ SignedSize::LEN }>().1 {
            [] => return Ok(base),
            count => match count.try_into().map(u64::from_be_bytes) {
                Ok(records) if records < base => return Ok(records),
                _ => tracing::warn!(file = %path(dir, last).display(), "the number of device records in it is damaged"),
            },
        }
    }
    tracing::info!(entries = base, "the device records of the public database are counted");
    let records = (0..=last).map(|number| records_of(dir, number)).sum::<io::Result<u64>>()?;
    if kept.is_none()
        && let Err(error) = write_new(&path(dir, last), &count_of(base, records))
    {
        tracing::warn!(%error, "the number of device records could not be written; it is counted again at the next start");
    }
    Ok(records)
}

fn records_of(dir: &Path, number: u64) -> io::Result<u64> {
    let id = TileId::full(TileKind::Entries, number);
    let failed = |cause: String| {
        let problem = format!("{id}: {cause}; put the same file of a mirror in its place");
        io::Error::other(problem)
    };
    let bytes = FullTiles(dir).read(id).map_err(|e| failed(e.to_string()))?;
    let entries = bundle::exactly(&bytes, BUNDLE as usize).map_err(|e| failed(e.to_string()))?;
    Ok(entries.iter().filter(|entry| !LogEntry::is_audit(entry)).count() as u64)
}

fn read(dir: &Path, bundle: u64) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path(dir, bundle)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn path(dir: &Path, bundle: u64) -> PathBuf {
    let place = TileId::full(TileKind::Entries, bundle).to_string();
    dir.join(SIGNED).join(place.trim_start_matches("tile/entries/"))
}
