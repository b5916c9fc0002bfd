//! An in-memory log key, so that benchmarks exclude the HSM.

use async_trait::async_trait;
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use spp::registry::LogSigner;
use spp_format::keys::PublicKey;
use spp_format::tlog::{LogKey, UnsignedCheckpoint};

/// Signs the checkpoints of `log.example/bench`.
pub(crate) struct Signer {
    pair: Ed25519KeyPair,
    key: LogKey,
}

impl Signer {
    pub(crate) fn new() -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let pair = Ed25519KeyPair::generate()?;
        let public = PublicKey::from_ed25519(pair.public_key().as_ref())?;
        Ok(Self { key: LogKey::new("log.example/bench".parse()?, public)?, pair })
    }
}

#[async_trait]
impl LogSigner for Signer {
    fn key(&self) -> &LogKey {
        &self.key
    }

    async fn sign(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, String> {
        Ok(self.pair.sign(checkpoint.to_be_signed()).as_ref().to_vec())
    }
}
