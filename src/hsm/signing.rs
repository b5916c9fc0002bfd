//! Signing capabilities: each signs documents of one kind with one key.
//!
//! Signing arbitrary bytes is private to the module `hsm`. The daemon can sign linted device certificates, checkpoints
//! and access certificates. A ceremony can sign CA certificates, certificate requests, access certificates and transcripts.

use spp_format::certificate::{CertificateToSign, UnsignedDocument};
use spp_format::keys::{KeyType, SignatureAlgorithm};
use spp_format::names::KeyName;
use spp_format::tlog::{LogKey, UnsignedCheckpoint, UnsignedText};

use super::{Ceremony, CheckpointKey, Hsm, HsmError, SigningKey};

/// Signs device certificates with one of the manufacturer's keys.
#[derive(Clone)]
pub(crate) struct CertificateSigner {
    hsm: Hsm,
    key: KeyName,
}

/// Signs checkpoints of the public database and of the audit log with the log's key.
#[derive(Clone)]
pub(crate) struct CheckpointSigner {
    hsm: Hsm,
    key: CheckpointKey,
}

/// Signs access certificates with the key of the access CA.
#[derive(Clone)]
pub(crate) struct AccessSigner {
    hsm: Hsm,
    key: KeyName,
}

impl Hsm {
    /// The capability to sign device certificates with `key`.
    pub(crate) fn certificate_signer(&self, key: KeyName) -> CertificateSigner {
        CertificateSigner { hsm: self.clone(), key }
    }

    /// The capability to sign with the log's key.
    pub(crate) fn checkpoint_signer(&self, key: CheckpointKey) -> CheckpointSigner {
        CheckpointSigner { hsm: self.clone(), key }
    }

    /// The capability to sign access certificates with `key`.
    pub(crate) fn access_signer(&self, key: KeyName) -> AccessSigner {
        AccessSigner { hsm: self.clone(), key }
    }
}

impl CertificateSigner {
    /// Signs the certificate; ECDSA signatures are DER. Refuses a certificate of another issuer.
    pub(crate) async fn sign(&self, certificate: &CertificateToSign) -> Result<Vec<u8>, HsmError> {
        if *certificate.issuer() != self.key {
            let issuer = certificate.issuer();
            return Err(HsmError::Refused(format!("the certificate is to be signed by {issuer}, not by {}", self.key)));
        }
        self.hsm.sign(&self.key, certificate.algorithm(), certificate.to_be_signed()).await
    }
}

impl CheckpointSigner {
    /// The log's name and public key.
    pub(crate) const fn key(&self) -> &LogKey {
        &self.key.key
    }

    /// Signs a checkpoint of the public database.
    pub(crate) async fn sign_checkpoint(&self, checkpoint: &UnsignedCheckpoint) -> Result<Vec<u8>, HsmError> {
        self.sign(checkpoint.to_be_signed()).await
    }

    /// Signs a text that is no checkpoint of the public database.
    pub(crate) async fn sign_text(&self, text: &UnsignedText) -> Result<Vec<u8>, HsmError> {
        self.sign(text.to_be_signed()).await
    }

    async fn sign(&self, note: &[u8]) -> Result<Vec<u8>, HsmError> {
        self.hsm.sign(&self.key.name, SignatureAlgorithm::Ed25519, note).await
    }
}

impl AccessSigner {
    /// Signs an access certificate; ECDSA signatures are DER.
    pub(crate) async fn sign(&self, document: &UnsignedDocument) -> Result<Vec<u8>, HsmError> {
        self.hsm.sign(&self.key, document.algorithm(), document.to_be_signed()).await
    }
}

impl Ceremony {
    /// Signs a CA certificate, an access certificate or a certificate request; ECDSA signatures are DER.
    pub fn sign_document(&self, key: &SigningKey, document: &UnsignedDocument) -> Result<Vec<u8>, HsmError> {
        let kind = key.public_key.kind();
        self.sign(&key.name, &key.id, kind, document.algorithm(), document.to_be_signed())
    }

    /// Signs a text with the log's key.
    pub fn sign_text(&self, key: &CheckpointKey, text: &UnsignedText) -> Result<Vec<u8>, HsmError> {
        self.sign(&key.name, &key.id, KeyType::Ed25519, SignatureAlgorithm::Ed25519, text.to_be_signed())
    }
}
