//! A linted certificate that is not signed yet, in the form that the journal stores.

use serde::{Deserialize, Serialize};

use crate::keys::SignatureAlgorithm;
use crate::names::KeyName;

/// A linted certificate that is not signed yet. It is made by [`LintedCertificate::into_to_sign`](super::LintedCertificate),
/// or read from a journal that got it from there; it cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateToSign {
    issuer: KeyName,
    algorithm: SignatureAlgorithm,
    is_cwt: bool,
    serial: Vec<u8>,
    to_be_signed: Vec<u8>,
}

impl CertificateToSign {
    pub(super) const fn new(
        issuer: KeyName,
        algorithm: SignatureAlgorithm,
        is_cwt: bool,
        serial: Vec<u8>,
        to_be_signed: Vec<u8>,
    ) -> Self {
        Self { issuer, algorithm, is_cwt, serial, to_be_signed }
    }

    /// An X.509 certificate of these bytes, for tests of stores.
    #[cfg(any(test, feature = "testing"))]
    pub const fn of_bytes(issuer: KeyName, serial: Vec<u8>, to_be_signed: Vec<u8>) -> Self {
        Self::new(issuer, SignatureAlgorithm::EcdsaP256Sha256, false, serial, to_be_signed)
    }

    /// The issuer's signing key.
    pub const fn issuer(&self) -> &KeyName {
        &self.issuer
    }

    /// The signature algorithm.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// Whether the bytes are a COSE Sig_structure of a CWT (RFC 9052 §4.4) rather than an X.509 TBSCertificate.
    pub const fn is_cwt(&self) -> bool {
        self.is_cwt
    }

    /// The certificate's serial number (or `cti`), unique among published records.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// The bytes to be signed.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.to_be_signed
    }
}
