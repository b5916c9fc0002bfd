//! Signs checkpoints with the log's key.

use async_trait::async_trait;
use spp_format::tlog::{LogKey, UnsignedCheckpoint};

use crate::hsm::{CheckpointKey, CheckpointSigner, Hsm};

/// A signer with a log's private key.
#[async_trait]
pub trait LogSigner: Send + Sync {
    /// The log's name and public key.
    fn key(&self) -> &LogKey;

    /// Signs the checkpoint's text with Ed25519. The error is the reason of the failure.
    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String>;
}

/// Signs with a dedicated key in the HSM.
pub struct HsmSigner(CheckpointSigner);

impl HsmSigner {
    /// Uses this key of the HSM.
    pub fn new(hsm: &Hsm, key: CheckpointKey) -> Self {
        Self(hsm.checkpoint_signer(key))
    }
}

#[async_trait]
impl LogSigner for HsmSigner {
    fn key(&self) -> &LogKey {
        self.0.key()
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        self.0.sign_checkpoint(checkpoint).await.map_err(|e| e.to_string())
    }
}
