//! Signs checkpoints with the log's key.

use async_trait::async_trait;
use spp_format::keys::SignatureAlgorithm;
use spp_format::names::KeyName;
use spp_format::tlog::{LogKey, UnsignedCheckpoint};

use crate::hsm::Hsm;

/// A signer with a log's private key.
#[async_trait]
pub trait CheckpointSigner: Send + Sync {
    /// The log's name and public key.
    fn key(&self) -> &LogKey;

    /// Signs the checkpoint's text with Ed25519. The error is the reason of the failure.
    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String>;
}

/// Signs with a dedicated key in the HSM.
pub struct HsmSigner {
    hsm: Hsm,
    name: KeyName,
    key: LogKey,
}

impl HsmSigner {
    /// Uses the HSM key `name`. Its public key `key` is known from the key ceremony.
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
