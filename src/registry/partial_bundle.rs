//! The edge of the log: what does not fill a bundle yet. A file of batches, each with the checkpoint that covers it.
//!
//! ```text
//! batch = "SPP1" ‖ length of the rest, 4 bytes ‖ index of its first entry, 8 bytes ‖ length of the note, 4 bytes ‖ note ‖ entries
//! ```
//!
//! Numbers are big-endian, entries are as in an entry bundle. A batch needs no checksum: its note is signed and its root is that of
//! the tree with its entries.

use crate::tlog::{LogKey, SignedCheckpoint, TlogError, Tree, bundle, leaf_hash};

const MAGIC: &[u8; 4] = b"SPP1";
const HEAD: usize = MAGIC.len() + 4;
/// Bytes of a batch besides its note and its entries.
const FIXED: usize = 12;

/// Entries that became durable together, and the checkpoint of the tree with them. Without entries it is the checkpoint alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Batch {
    /// The index of the first entry.
    pub(super) first: u64,
    /// The signed note, as it is.
    pub(super) note: Vec<u8>,
    /// The entries.
    pub(super) entries: Vec<Vec<u8>>,
}

/// What a file of batches holds.
#[derive(Debug, Default)]
pub(super) struct PartialBundle {
    /// The batches, each of them right.
    pub(super) batches: Vec<(Batch, SignedCheckpoint)>,
    /// Bytes of the file up to the end of the last one. What follows was never acknowledged.
    pub(super) length: usize,
}

impl Batch {
    /// The bytes that are appended.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, String> {
        let mut entries = Vec::new();
        for entry in &self.entries {
            bundle::push(&mut entries, entry).map_err(|e| e.to_string())?;
        }
        let number = |bytes: usize| u32::try_from(bytes).map(u32::to_be_bytes).map_err(|e| e.to_string());
        let rest = number(FIXED + self.note.len() + entries.len())?;
        let note = number(self.note.len())?;
        Ok([MAGIC.as_slice(), &rest, &self.first.to_be_bytes(), &note, &self.note, &entries].concat())
    }

    /// The batch at the beginning of the bytes, and how many it takes.
    fn split(bytes: &[u8]) -> Option<(Self, usize)> {
        let (head, after) = bytes.split_at_checked(HEAD)?;
        let length = head.strip_prefix(MAGIC.as_slice())?.try_into().ok().map(u32::from_be_bytes)? as usize;
        let body = after.get(..length)?;
        let (first, rest) = body.split_first_chunk::<8>()?;
        let (note, rest) = rest.split_first_chunk::<4>()?;
        let (note, entries) = rest.split_at_checked(u32::from_be_bytes(*note) as usize)?;
        let entries = bundle::entries(entries).map(|entry| entry.map(<[u8]>::to_vec).ok()).collect::<Option<_>>()?;
        let first = u64::from_be_bytes(*first);
        Some((Self { first, note: note.to_vec(), entries }, HEAD + length))
    }

    /// The tree with the batch's entries and the batch's checkpoint, if they say the same and the log has signed it. A checkpoint that
    /// somebody else has signed is an error: no crash makes one.
    fn follows(&self, tree: &Tree, key: &LogKey) -> Result<Option<(Tree, SignedCheckpoint)>, String> {
        let checkpoint = match SignedCheckpoint::verify(&self.note, key) {
            Ok(checkpoint) => checkpoint,
            Err(error @ (TlogError::OtherLog { .. } | TlogError::NotSigned(_))) => {
                return Err(format!("{error}; is another log key configured than the one that it was begun with?"));
            }
            Err(_) => return Ok(None),
        };
        let mut grown = tree.clone();
        for entry in &self.entries {
            grown.push(leaf_hash(entry));
        }
        let same = self.first == tree.size() && checkpoint.size() == grown.size() && checkpoint.root() == grown.root();
        Ok(same.then_some((grown, checkpoint)))
    }
}

/// Reads a file of batches that begins with the tree below it. A batch that a crash cut off is left out; a damaged one with whole ones
/// behind it is an error, since those may have been acknowledged.
pub(super) fn read(bytes: &[u8], below: &Tree, key: &LogKey) -> Result<PartialBundle, String> {
    let mut edge = PartialBundle::default();
    let mut tree = below.clone();
    loop {
        let rest = bytes.get(edge.length..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(edge);
        }
        let split = Batch::split(rest);
        let follows = split.as_ref().map(|(batch, _)| batch.follows(&tree, key)).transpose()?.flatten();
        match split.zip(follows) {
            Some(((batch, length), (grown, checkpoint))) => {
                edge.batches.push((batch, checkpoint));
                edge.length += length;
                tree = grown;
            }
            None if has_signed_batch(rest, tree.size(), key) => {
                return Err(format!("the batch at byte {} is damaged, and others follow it", edge.length));
            }
            None => return Ok(edge),
        }
    }
}

/// Whether anywhere behind the first byte a batch begins that the log has signed for a larger tree. Its signature cannot be made up
/// by what somebody puts into an entry.
fn has_signed_batch(bytes: &[u8], size: u64, key: &LogKey) -> bool {
    let finder = memchr::memmem::Finder::new(MAGIC);
    let mut found = finder.find_iter(bytes.get(1..).unwrap_or_default());
    found.any(|at| {
        let batch = bytes.get(at + 1..).and_then(Batch::split);
        let checkpoint = batch.and_then(|(batch, _)| SignedCheckpoint::verify(&batch.note, key).ok());
        checkpoint.is_some_and(|checkpoint| checkpoint.size() > size)
    })
}
