//! Offline-verifiable inclusion proofs (C2SP tlog-proof). A device's receipt is such a proof.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use tlog_tiles::tlog::{Hash, check_record, node_hash};

use super::{LogKey, SignedCheckpoint, TlogError, TreeHash, leaf_hash};

/// The first line of a proof.
const HEADER: &str = "c2sp.org/tlog-proof@v1";
/// Maximum size of a proof in bytes: 64 hashes and a checkpoint.
const MAX_LEN: usize = 128 * 1024;
/// Maximum number of hashes in a proof: that of a tree of 2^64 entries.
const MAX_HASHES: usize = 64;

/// An entry's index, the hashes on the path from the entry to the root, and the checkpoint with that root. Not trusted before
/// [`LogProof::verify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogProof {
    index: u64,
    hashes: Vec<TreeHash>,
    /// The signed note, unparsed.
    checkpoint: Vec<u8>,
}

/// A verified proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedProof {
    /// The entry's index, from 0.
    pub index: u64,
    /// SHA-256(0x00 ‖ entry).
    pub leaf: TreeHash,
    /// The steps from the leaf to the root.
    pub steps: Vec<ProofStep>,
    /// The checkpoint of the tree that contains the entry.
    pub checkpoint: SignedCheckpoint,
}

/// One step: SHA-256(0x01 ‖ left ‖ right).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProofStep {
    /// The sibling's hash.
    pub sibling: TreeHash,
    /// Whether the sibling is on the left.
    pub sibling_is_left: bool,
    /// The resulting hash.
    pub hash: TreeHash,
}

impl LogProof {
    /// Assembles a proof.
    pub fn new(index: u64, hashes: Vec<TreeHash>, checkpoint: &SignedCheckpoint) -> Self {
        Self { index, hashes, checkpoint: checkpoint.note().to_vec() }
    }

    /// The entry's index as stated in the proof; not verified.
    pub const fn index(&self) -> u64 {
        self.index
    }

    /// Encodes the text form (file extension `.tlog-proof`).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut text = format!("{HEADER}\nindex {}\n", self.index);
        for hash in &self.hashes {
            text.push_str(&BASE64_STANDARD.encode(hash));
            text.push('\n');
        }
        text.push('\n');
        [text.as_bytes(), &self.checkpoint].concat()
    }

    /// Parses the text form. Ignores extra data, which is not authenticated.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TlogError> {
        let wrong = |problem: &str| TlogError::malformed("log proof", problem);
        if bytes.len() > MAX_LEN {
            return Err(wrong("longer than 128 KiB"));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| wrong("invalid UTF-8"))?;
        let (head, checkpoint) = text.split_once("\n\n").ok_or_else(|| wrong("no empty line after the hashes"))?;
        let mut lines = head.split('\n').peekable();
        if lines.next() != Some(HEADER) {
            return Err(wrong(&format!("the first line is not {HEADER}")));
        }
        lines.next_if(|line| line.starts_with("extra "));
        let index = lines.next().and_then(|line| line.strip_prefix("index "));
        let index = index.and_then(|digits| digits.parse::<u64>().ok().filter(|index| index.to_string() == *digits));
        let index = index.ok_or_else(|| wrong("the index is missing or not a number"))?;
        let hash = |line: &str| {
            let bytes = BASE64_STANDARD.decode(line).ok().and_then(|bytes| bytes.try_into().ok());
            bytes.ok_or_else(|| wrong("a line is not the base64 of 32 bytes"))
        };
        let hashes = lines.map(hash).collect::<Result<Vec<_>, _>>()?;
        if hashes.len() > MAX_HASHES {
            return Err(wrong("more than 64 hashes"));
        }
        Ok(Self { index, hashes, checkpoint: checkpoint.as_bytes().to_vec() })
    }

    /// Verifies that the log has signed a tree that contains the entry.
    pub fn verify(&self, entry: &[u8], key: &LogKey) -> Result<VerifiedProof, TlogError> {
        let checkpoint = SignedCheckpoint::verify(&self.checkpoint, key)?;
        let leaf = leaf_hash(entry);
        let hashes = self.hashes.iter().map(|hash| Hash(*hash)).collect();
        check_record(&hashes, checkpoint.size(), Hash(checkpoint.root()), self.index, Hash(leaf))
            .map_err(|_| TlogError::WrongProof { what: "the entry" })?;
        let steps = self.steps(leaf, checkpoint.size());
        Ok(VerifiedProof { index: self.index, leaf, steps, checkpoint })
    }

    /// The steps to the root, for display. The caller has verified the proof.
    fn steps(&self, leaf: TreeHash, size: u64) -> Vec<ProofStep> {
        let (mut hash, mut position, mut last) = (leaf, self.index, size.saturating_sub(1));
        let mut steps = Vec::with_capacity(self.hashes.len());
        for sibling in &self.hashes {
            // The last node of a level without a right sibling moves up unchanged.
            while position == last && position.is_multiple_of(2) && last > 0 {
                (position, last) = (position / 2, last / 2);
            }
            let sibling_is_left = !position.is_multiple_of(2);
            let (left, right) = if sibling_is_left { (*sibling, hash) } else { (hash, *sibling) };
            hash = node_hash(Hash(left), Hash(right)).0;
            steps.push(ProofStep { sibling: *sibling, sibling_is_left, hash });
            (position, last) = (position / 2, last / 2);
        }
        steps
    }
}
