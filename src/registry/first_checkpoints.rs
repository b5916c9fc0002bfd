//! Stores data of each full bundle that cannot be derived from the tiles: the first checkpoints that covered its entries, and the
//! number of device records up to its end.
//!
//! ```text
//! signed/<N> = checkpoints ‖ number of device records in bundles 0 to N, 8 bytes; omitted if all entries are device records
//! checkpoint = tree size, 8 bytes ‖ signature, 64 bytes
//! ```

use std::path::{Path, PathBuf};
use std::{fs, io};

use spp_format::record::LogEntry;
use spp_format::tlog::{LogKey, SignedCheckpoint, TileId, TileKind, bundle};
use spp_log::registry::atomic_write::{write_new, write_once};
use spp_log::registry::full_tiles::{BUNDLE, FullTiles};

const DIRECTORY: &str = "signed";

/// The parts of a checkpoint that cannot be computed from the tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CompactCheckpoint {
    pub(super) size: u64,
    pub(super) signature: [u8; 64],
}

impl CompactCheckpoint {
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

/// Writes the first checkpoints of a full bundle, and the number of device records up to its end.
pub(super) fn write(dir: &Path, bundle: u64, checkpoints: &[CompactCheckpoint], records: u64) -> io::Result<()> {
    let (from, to) = (bundle * BUNDLE, (bundle + 1) * BUNDLE);
    let last = checkpoints.iter().position(|checkpoint| checkpoint.size >= to).unwrap_or(checkpoints.len());
    let of_bundle = checkpoints.iter().take(last + 1).filter(|checkpoint| checkpoint.size > from);
    let encoded: Vec<u8> = of_bundle.flat_map(|checkpoint| checkpoint.to_bytes()).collect();
    write_once(&path(dir, bundle), &[encoded, encode_count(to, records)].concat())
}

/// Empty if all entries are device records. The files of older logs, which had no other entries, are like this and are never
/// changed.
fn encode_count(entries: u64, records: u64) -> Vec<u8> {
    if records == entries { Vec::new() } else { records.to_be_bytes().to_vec() }
}

/// The first checkpoint that covered an entry of a full bundle, if it is stored.
pub(super) fn first_covering(dir: &Path, index: u64) -> io::Result<Option<CompactCheckpoint>> {
    let Some(bytes) = read(dir, index / BUNDLE)? else { return Ok(None) };
    let mut all = bytes.as_chunks::<{ CompactCheckpoint::LEN }>().0.iter().filter_map(CompactCheckpoint::from_bytes);
    Ok(all.find(|checkpoint| checkpoint.size > index))
}

/// Number of device records among the entries below `base`, the first entry of a bundle. A log that was restored from a mirror
/// does not have the number stored: then the records are counted, once.
pub(super) fn records_below(dir: &Path, base: u64) -> io::Result<u64> {
    let Some(last) = (base / BUNDLE).checked_sub(1) else { return Ok(0) };
    let stored = read(dir, last)?;
    if let Some(bytes) = &stored {
        match bytes.as_chunks::<{ CompactCheckpoint::LEN }>().1 {
            [] => return Ok(base),
            count => match count.try_into().map(u64::from_be_bytes) {
                Ok(records) if records < base => return Ok(records),
                _ => tracing::warn!(file = %path(dir, last).display(), "stored number of device records is damaged"),
            },
        }
    }
    tracing::info!(entries = base, "counting device records of the public database");
    let records = (0..=last).map(|number| count_records(dir, number)).sum::<io::Result<u64>>()?;
    if stored.is_none()
        && let Err(error) = write_new(&path(dir, last), &encode_count(base, records))
    {
        tracing::warn!(%error, "cannot store the number of device records; counting again at the next start");
    }
    Ok(records)
}

fn count_records(dir: &Path, number: u64) -> io::Result<u64> {
    let id = TileId::full(TileKind::Entries, number);
    let failed = |cause: String| {
        let problem = format!("{id}: {cause}; replace the file by the same file of a mirror");
        io::Error::other(problem)
    };
    let bytes = FullTiles(dir).read(id).map_err(|e| failed(e.to_string()))?;
    let entries = bundle::decode_exactly(&bytes, BUNDLE as usize).map_err(|e| failed(e.to_string()))?;
    Ok(entries.iter().filter(|entry| !LogEntry::is_audit(entry)).count() as u64)
}

fn read(dir: &Path, bundle: u64) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path(dir, bundle)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

fn path(dir: &Path, bundle: u64) -> PathBuf {
    let tile = TileId::full(TileKind::Entries, bundle).to_string();
    dir.join(DIRECTORY).join(tile.trim_start_matches("tile/entries/"))
}
