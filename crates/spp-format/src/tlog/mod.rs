//! The data formats of a transparency log, as specified by C2SP. Pure functions without I/O.
//!
//! | item | content |
//! |---|---|
//! | [`LogKey`], [`WitnessKey`] | signing keys: a name and an Ed25519 public key (signed-note, tlog-cosignature) |
//! | [`SignedCheckpoint`] | the tree's size and root, signed by its log (tlog-checkpoint) |
//! | [`TileId`], [`bundle`] | the location and encoding of the tree's hashes and entries (tlog-tiles) |
//! | [`Tree`] | the right edge of the Merkle tree (RFC 6962 §2.1), which is sufficient for appending |
//! | [`LogProof`] | an offline-verifiable proof that an entry is in a signed tree (tlog-proof) |
//! | [`check_consistency`] | verifies that one tree is a prefix of another (RFC 6962 §2.1.2) |
//!
//! The crates `tlog_tiles` and `signed_note` implement Merkle trees and notes. Signatures are verified by the cryptographic
//! provider of the whole program.

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

/// Malformed data, or a signature or proof that does not verify.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlogError {
    /// The data is malformed.
    #[error("invalid {what}: {problem}")]
    Malformed {
        /// The format.
        what: &'static str,
        /// The problem.
        problem: String,
    },
    /// The note has no signature by the log's key.
    #[error("the checkpoint is not signed by the log key of {0}")]
    NotSigned(String),
    /// The note has a signature by the log's key that does not verify.
    #[error("the signature of {0} on the checkpoint does not verify")]
    BadSignature(String),
    /// The checkpoint belongs to another log.
    #[error("the checkpoint is of log {found}, expected {expected}")]
    OtherLog {
        /// The log in the checkpoint.
        found: String,
        /// The expected log.
        expected: String,
    },
    /// A proof does not lead to the root.
    #[error("the proof of {what} does not verify against the root hash of the checkpoint")]
    WrongProof {
        /// The start of the proof.
        what: &'static str,
    },
    /// The hashes that a proof needs cannot be read.
    #[error("cannot read the tree's hashes: {0}")]
    Unreadable(String),
}

impl TlogError {
    pub(crate) fn malformed(what: &'static str, problem: impl std::fmt::Display) -> Self {
        Self::Malformed { what, problem: problem.to_string() }
    }
}

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
