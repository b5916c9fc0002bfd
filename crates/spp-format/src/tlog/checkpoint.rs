//! Checkpoints: the signed size and root of a tree (C2SP tlog-checkpoint) in a signed note.

use signed_note::{Note, NoteError, Signature, Verifier as _, VerifierList};
use tlog_tiles::checkpoint::Checkpoint;
use tlog_tiles::tlog::Hash;

use super::{LogKey, Origin, TlogError, TreeHash, WitnessKey};

/// Maximum size of a signed checkpoint in bytes.
const MAX_NOTE: usize = 64 * 1024;

/// A checkpoint before it is signed.
#[derive(Debug)]
pub struct UnsignedCheckpoint {
    text: Vec<u8>,
}

impl UnsignedCheckpoint {
    /// The checkpoint of a tree with this size and root.
    pub fn new(origin: &Origin, size: u64, root: TreeHash) -> Result<Self, TlogError> {
        let checkpoint = Checkpoint::new(origin.as_str(), size, Hash(root), "");
        Ok(Self { text: checkpoint.map_err(|e| TlogError::malformed("checkpoint", e))?.to_bytes() })
    }

    /// The bytes to be signed: the note's text with its final newline.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.text
    }

    /// Adds the log's signature. Fails if the signature does not verify.
    pub fn signed(self, key: &LogKey, signature: &[u8]) -> Result<SignedCheckpoint, TlogError> {
        let broken = |e: NoteError| TlogError::malformed("checkpoint", e);
        let line = Signature::new(key.origin().to_string(), key.verifier().key_id(), signature.to_vec());
        let note = Note::new(&self.text, &[line.map_err(broken)?]).map_err(broken)?;
        SignedCheckpoint::verify(&note.to_bytes(), key)
    }
}

/// A tree's size and root with the log's signature and optional cosignatures. The log's signature is always verified.
#[derive(Clone, PartialEq, Eq)]
pub struct SignedCheckpoint {
    note: Vec<u8>,
    size: u64,
    root: TreeHash,
}

impl SignedCheckpoint {
    /// Parses a signed note and verifies that it is a checkpoint of the log. Ignores signatures of unknown keys.
    pub fn verify(note: &[u8], key: &LogKey) -> Result<Self, TlogError> {
        if note.len() > MAX_NOTE {
            let problem = format!("{} bytes exceed the limit of {MAX_NOTE}", note.len());
            return Err(TlogError::malformed("checkpoint", problem));
        }
        let parsed = Note::from_bytes(note).map_err(|e| TlogError::malformed("checkpoint", e))?;
        let checkpoint = Checkpoint::from_bytes(parsed.text()).map_err(|e| TlogError::malformed("checkpoint", e))?;
        if checkpoint.origin() != key.origin().as_str() {
            let (found, expected) = (checkpoint.origin().to_owned(), key.origin().to_string());
            return Err(TlogError::OtherLog { found, expected });
        }
        let known = VerifierList::new(vec![Box::new(key.verifier().clone())]);
        parsed.verify(&known).map_err(|e| match e {
            NoteError::InvalidSignature { .. } => TlogError::BadSignature(key.origin().to_string()),
            NoteError::UnverifiedNote => TlogError::NotSigned(key.origin().to_string()),
            other => TlogError::malformed("checkpoint", other),
        })?;
        Ok(Self { note: note.to_vec(), size: checkpoint.size(), root: checkpoint.hash().0 })
    }

    /// The signed note as published.
    pub fn note(&self) -> &[u8] {
        &self.note
    }

    /// Number of entries in the tree.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The tree's root.
    pub const fn root(&self) -> TreeHash {
        self.root
    }

    /// The log's own signature.
    pub fn signature(&self, key: &LogKey) -> Option<[u8; 64]> {
        let known = VerifierList::new(vec![Box::new(key.verifier().clone())]);
        let (own, _) = Note::from_bytes(&self.note).ok()?.verify(&known).ok()?;
        own.first()?.signature().try_into().ok()
    }

    /// Whether both checkpoints have the same tree.
    pub fn is_same_tree(&self, other: &Self) -> bool {
        (self.size, self.root) == (other.size, other.root)
    }

    /// Adds those cosignature lines that are valid and from these witnesses. Drops all other lines, because they come from an
    /// untrusted source.
    #[must_use]
    pub fn cosigned(&self, lines: &[u8], witnesses: &[&WitnessKey]) -> Self {
        let mut cosigned = self.clone();
        let lines = lines.split_inclusive(|byte| *byte == b'\n').take(witnesses.len() * 4);
        for line in lines.filter(|line| line.ends_with(b"\n")) {
            let with = Self { note: [&cosigned.note, line].concat(), ..*self };
            if with.cosigners(witnesses).len() > cosigned.cosigners(witnesses).len() {
                cosigned = with;
            }
        }
        cosigned
    }

    /// The names of those witnesses that have a valid cosignature on the checkpoint.
    pub fn cosigners<'a>(&self, witnesses: &[&'a WitnessKey]) -> Vec<&'a str> {
        let Ok(note) = Note::from_bytes(&self.note) else { return Vec::new() };
        let has_signed = |witness: &&&WitnessKey| {
            let known = VerifierList::new(vec![Box::new(witness.verifier().clone())]);
            note.verify(&known).is_ok()
        };
        witnesses.iter().filter(has_signed).map(|witness| witness.name()).collect()
    }
}

impl std::fmt::Debug for SignedCheckpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SignedCheckpoint({}, {})", self.size, hex::encode(self.root))
    }
}
