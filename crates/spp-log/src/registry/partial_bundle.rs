//! The partial bundle: entries that do not fill a bundle yet, in a file of batches, each with the checkpoint that covers it.
//!
//! ```text
//! batch = "SPP1" ‖ length of the rest, 4 bytes ‖ index of its first entry, 8 bytes ‖ length of the note, 4 bytes ‖ note ‖ entries
//! ```
//!
//! Numbers are big-endian, entries are encoded as in an entry bundle. A batch needs no checksum: its note is signed, and the root
//! in the note covers its entries.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use spp_format::tlog::{LogKey, SignedCheckpoint, TlogError, Tree, bundle, leaf_hash};

const MAGIC: &[u8; 4] = b"SPP1";
const HEADER_LEN: usize = MAGIC.len() + 4;
/// Bytes of a batch without its header, note and entries.
const FIXED_LEN: usize = 12;

/// Entries that became durable together, and the checkpoint of the tree that includes them. A batch may consist of a checkpoint
/// alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppendedBatch {
    /// The index of the first entry.
    pub first: u64,
    /// The signed note, unparsed.
    pub note: Vec<u8>,
    /// The entries.
    pub entries: Vec<Vec<u8>>,
}

/// The content of a file of batches.
#[derive(Debug, Default)]
pub struct PartialBundle {
    /// The verified batches and their checkpoints.
    pub batches: Vec<(AppendedBatch, SignedCheckpoint)>,
    /// Length in bytes up to the end of the last batch. Bytes after it were never acknowledged.
    pub length: usize,
}

impl AppendedBatch {
    /// Encodes the batch for appending.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let mut entries = Vec::new();
        for entry in &self.entries {
            bundle::push(&mut entries, entry).map_err(|e| e.to_string())?;
        }
        let number = |bytes: usize| u32::try_from(bytes).map(u32::to_be_bytes).map_err(|e| e.to_string());
        let rest = number(FIXED_LEN + self.note.len() + entries.len())?;
        let note = number(self.note.len())?;
        Ok([MAGIC.as_slice(), &rest, &self.first.to_be_bytes(), &note, &self.note, &entries].concat())
    }

    /// Parses the batch at the beginning of `bytes`; returns it and its length.
    fn parse(bytes: &[u8]) -> Option<(Self, usize)> {
        let (header, after) = bytes.split_at_checked(HEADER_LEN)?;
        let length = header.strip_prefix(MAGIC.as_slice())?.try_into().ok().map(u32::from_be_bytes)? as usize;
        let body = after.get(..length)?;
        let (first, rest) = body.split_first_chunk::<8>()?;
        let (note, rest) = rest.split_first_chunk::<4>()?;
        let (note, entries) = rest.split_at_checked(u32::from_be_bytes(*note) as usize)?;
        let entries = bundle::entries(entries).map(|entry| entry.map(<[u8]>::to_vec).ok()).collect::<Option<_>>()?;
        let first = u64::from_be_bytes(*first);
        Some((Self { first, note: note.to_vec(), entries }, HEADER_LEN + length))
    }

    /// Returns the tree with the batch's entries, and the batch's checkpoint, if they match and the log's key has signed the
    /// checkpoint. A checkpoint signed by another key is an error: a crash cannot produce one.
    fn verify_after(&self, tree: &Tree, key: &LogKey) -> Result<Option<(Tree, SignedCheckpoint)>, String> {
        let checkpoint = match SignedCheckpoint::verify(&self.note, key) {
            Ok(checkpoint) => checkpoint,
            Err(error @ (TlogError::OtherLog { .. } | TlogError::NotSigned(_))) => {
                return Err(format!(
                    "{error}; check that the configured log key is the one that the log was created with"
                ));
            }
            Err(_) => return Ok(None),
        };
        let mut grown = tree.clone();
        for entry in &self.entries {
            grown.push(leaf_hash(entry));
        }
        let matches =
            self.first == tree.size() && checkpoint.size() == grown.size() && checkpoint.root() == grown.root();
        Ok(matches.then_some((grown, checkpoint)))
    }
}

/// Reads a file of batches that continues the tree `below`. A last batch that a crash truncated is ignored; a damaged batch that
/// is followed by valid ones is an error, because these may have been acknowledged.
pub fn read(bytes: &[u8], below: &Tree, key: &LogKey) -> Result<PartialBundle, String> {
    let mut content = PartialBundle::default();
    let mut tree = below.clone();
    loop {
        let rest = bytes.get(content.length..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(content);
        }
        let parsed = AppendedBatch::parse(rest);
        let verified = parsed.as_ref().map(|(batch, _)| batch.verify_after(&tree, key)).transpose()?.flatten();
        match parsed.zip(verified) {
            Some(((batch, length), (grown, checkpoint))) => {
                content.batches.push((batch, checkpoint));
                content.length += length;
                tree = grown;
            }
            None if has_signed_batch(rest, tree.size(), key) => {
                return Err(format!("the batch at byte {} is damaged, and valid batches follow it", content.length));
            }
            None => return Ok(content),
        }
    }
}

/// Whether a batch that the log has signed for a larger tree begins anywhere after the first byte. The content of an entry cannot
/// forge such a signature.
fn has_signed_batch(bytes: &[u8], size: u64, key: &LogKey) -> bool {
    let finder = memchr::memmem::Finder::new(MAGIC);
    let mut candidates = finder.find_iter(bytes.get(1..).unwrap_or_default());
    candidates.any(|position| {
        let batch = bytes.get(position + 1..).and_then(AppendedBatch::parse);
        let checkpoint = batch.and_then(|(batch, _)| SignedCheckpoint::verify(&batch.note, key).ok());
        checkpoint.is_some_and(|checkpoint| checkpoint.size() > size)
    })
}

/// The directory of the partial bundle in a log's directory (historic name).
pub const PARTIAL_BUNDLE_DIR: &str = "edge";

/// The newest partial bundle in a log's directory, and the index of its first entry.
pub fn newest_partial_bundle(dir: &Path) -> io::Result<(u64, PathBuf)> {
    let mut newest = None;
    for entry in fs::read_dir(dir.join(PARTIAL_BUNDLE_DIR))? {
        let name = entry?.file_name();
        // A file that is still being written has a longer name.
        let base = name.to_str().filter(|name| name.len() == 20).and_then(|name| name.parse::<u64>().ok());
        newest = newest.max(base);
    }
    let base = newest.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no file in edge/"))?;
    Ok((base, partial_bundle_path(dir, base)))
}

/// The path of the partial bundle that begins with entry `base`.
pub fn partial_bundle_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(PARTIAL_BUNDLE_DIR).join(format!("{base:020}"))
}
