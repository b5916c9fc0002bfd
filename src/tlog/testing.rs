//! Keys for tests, in memory.

use async_trait::async_trait;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};

use super::{LogKey, SignedCheckpoint, Tree, UnsignedCheckpoint};
use crate::keys::PublicKey;
use crate::registry::CheckpointSigner;

/// A log's key.
pub(crate) struct LocalSigner {
    pair: Ed25519KeyPair,
    key: LogKey,
}

impl LocalSigner {
    pub(crate) fn new(origin: &str) -> Self {
        Self::of_pair(origin, Ed25519KeyPair::generate().unwrap())
    }

    /// The same key in each process that has the same seed.
    pub(crate) fn from_seed(origin: &str, seed: &[u8; 32]) -> Self {
        Self::of_pair(origin, Ed25519KeyPair::from_seed_unchecked(seed).unwrap())
    }

    fn of_pair(origin: &str, pair: Ed25519KeyPair) -> Self {
        let public = PublicKey::from_ed25519(pair.public_key().as_ref()).unwrap();
        Self { key: LogKey::new(origin.parse().unwrap(), public).unwrap(), pair }
    }

    pub(crate) fn sign_now(&self, checkpoint: &UnsignedCheckpoint) -> Vec<u8> {
        self.pair.sign(checkpoint.to_be_signed()).as_ref().to_vec()
    }

    /// The signed checkpoint of a tree.
    pub(crate) fn checkpoint(&self, tree: &Tree) -> SignedCheckpoint {
        let unsigned = UnsignedCheckpoint::new(self.key.origin(), tree.size(), tree.root()).unwrap();
        let signature = self.sign_now(&unsigned);
        unsigned.signed(&self.key, &signature).unwrap()
    }
}

#[async_trait]
impl CheckpointSigner for LocalSigner {
    fn key(&self) -> &LogKey {
        &self.key
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        Ok(self.sign_now(checkpoint))
    }
}
