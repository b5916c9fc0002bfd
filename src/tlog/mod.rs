//! The formats of a transparency log, as C2SP specifies them; pure.
//!
//! | here | is |
//! |---|---|
//! | [`LogKey`], [`WitnessKey`] | who signs: a name and an Ed25519 key (signed-note, tlog-cosignature) |
//! | [`SignedCheckpoint`] | the tree's size and root, signed by its log (tlog-checkpoint) |
//! | [`TileId`], [`bundle`] | where the tree's hashes and entries are (tlog-tiles) |
//! | [`Tree`] | the right edge of the Merkle tree (RFC 6962 §2.1), which is all that appending needs |
//! | [`LogProof`] | that an entry is in a signed tree, offline-verifiable (tlog-proof) |
//! | [`check_consistency`] | that one tree is a prefix of another (RFC 6962 §2.1.2) |
//!
//! Merkle arithmetic and notes are the crates `tlog_tiles` and `signed_note`; signatures are verified by the provider that all
//! of this program uses.

pub mod bundle;
mod checkpoint;
mod key;
mod proof;
mod text;
mod tile;
mod tree;

pub use checkpoint::{SignedCheckpoint, UnsignedCheckpoint};
pub use key::{LogKey, Origin, WitnessKey};
pub use proof::{LogProof, ProofStep, VerifiedProof};
pub use text::{UnsignedText, verify_text};
pub use tile::{FULL_WIDTH, TileId, TileKind};
pub use tree::{FullTile, HashSource, Tree, check_consistency, prove_consistency, prove_inclusion};

/// A hash of the tree: SHA-256 (RFC 6962 §2.1).
pub type TreeHash = [u8; 32];

/// The hash of an entry as a leaf of the tree: SHA-256(0x00 ‖ entry).
pub fn leaf_hash(entry: &[u8]) -> TreeHash {
    tlog_tiles::tlog::record_hash(entry).0
}

/// Something is not what the format or a signature says it must be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlogError {
    /// The bytes are not of the format.
    #[error("not a {what}: {problem}")]
    Malformed {
        /// Which format.
        what: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// The note is not signed by the key.
    #[error("the checkpoint is not signed by the log key of {0}")]
    NotSigned(String),
    /// A signature of the key is there, and it is wrong.
    #[error("the signature of {0} on the checkpoint does not verify")]
    BadSignature(String),
    /// The checkpoint is another log's.
    #[error("the checkpoint is of the log {found}, not of {expected}")]
    OtherLog {
        /// Whose it is.
        found: String,
        /// Whose it should be.
        expected: String,
    },
    /// A proof does not lead to the root.
    #[error("the proof does not lead from {what} to the root of the checkpoint")]
    WrongProof {
        /// Where it begins.
        what: &'static str,
    },
    /// The hashes that a proof needs could not be had.
    #[error("the tree's hashes cannot be read: {0}")]
    Unreadable(String),
}

impl TlogError {
    pub(crate) fn malformed(what: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Malformed { what, problem: problem.to_string() }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
