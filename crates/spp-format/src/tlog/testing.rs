//! In-memory log keys for tests.
#![allow(clippy::unwrap_used, reason = "test support fails by a panic")]

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};

use super::{LogKey, SignedCheckpoint, Tree, UnsignedCheckpoint};
use crate::keys::PublicKey;

/// A log's private key in memory.
pub struct LocalSigner {
    pair: Ed25519KeyPair,
    key: LogKey,
}

impl LocalSigner {
    /// A new key.
    pub fn new(origin: &str) -> Self {
        Self::from_pair(origin, Ed25519KeyPair::generate().unwrap())
    }

    /// A deterministic key, so that several processes can have the same one.
    pub fn from_seed(origin: &str, seed: &[u8; 32]) -> Self {
        Self::from_pair(origin, Ed25519KeyPair::from_seed_unchecked(seed).unwrap())
    }

    fn from_pair(origin: &str, pair: Ed25519KeyPair) -> Self {
        let public = PublicKey::from_ed25519(pair.public_key().as_ref()).unwrap();
        Self { key: LogKey::new(origin.parse().unwrap(), public).unwrap(), pair }
    }

    /// The log's name and public key.
    pub const fn key(&self) -> &LogKey {
        &self.key
    }

    /// The signature over a checkpoint.
    pub fn sign_sync(&self, checkpoint: &UnsignedCheckpoint) -> Vec<u8> {
        self.pair.sign(checkpoint.to_be_signed()).as_ref().to_vec()
    }

    /// The signed checkpoint of a tree.
    pub fn checkpoint(&self, tree: &Tree) -> SignedCheckpoint {
        let unsigned = UnsignedCheckpoint::new(self.key.origin(), tree.size(), tree.root()).unwrap();
        let signature = self.sign_sync(&unsigned);
        unsigned.signed(&self.key, &signature).unwrap()
    }
}
