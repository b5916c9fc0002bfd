//! Who signs checkpoints.

use async_trait::async_trait;

use crate::hsm::Hsm;
use crate::keys::SignatureAlgorithm;
use crate::names::KeyName;
use crate::tlog::{LogKey, UnsignedCheckpoint};

/// Holds a log's private key.
#[async_trait]
pub trait CheckpointSigner: Send + Sync {
    /// The public half.
    fn key(&self) -> &LogKey;

    /// An Ed25519 signature over the checkpoint's text, or why there is none now.
    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String>;
}

/// A key of its own in the HSM.
pub struct HsmSigner {
    hsm: Hsm,
    name: KeyName,
    key: LogKey,
}

impl HsmSigner {
    /// The key of that name, whose public half is known from its ceremony.
    pub const fn new(hsm: Hsm, name: KeyName, key: LogKey) -> Self {
        Self { hsm, name, key }
    }
}

#[async_trait]
impl CheckpointSigner for HsmSigner {
    fn key(&self) -> &LogKey {
        &self.key
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        let signed = self.hsm.sign(&self.name, SignatureAlgorithm::Ed25519, checkpoint.to_be_signed()).await;
        signed.map_err(|e| e.to_string())
    }
}
