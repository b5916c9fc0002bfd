//! Assembles a device certificate from its linted bytes and the HSM's signature.

use super::to_sign::CertificateToSign;
use super::{CertificateError, IssuerCertificate, cwt, signed};

/// A signed device certificate whose signature has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    bytes: Vec<u8>,
    is_cwt: bool,
}

impl IssuedCertificate {
    /// Assembles the certificate from exactly the signed bytes and verifies it with the issuer's public key, as a device would.
    /// The signature is in X.509 form: ECDSA in DER.
    pub fn assemble(
        to_sign: &CertificateToSign,
        issuer: &IssuerCertificate,
        signature: &[u8],
    ) -> Result<Self, CertificateError> {
        let (algorithm, to_be_signed, is_cwt) = (to_sign.algorithm(), to_sign.to_be_signed(), to_sign.is_cwt());
        let key = issuer.public_key();
        let (bytes, signed) = if is_cwt {
            let bytes = cwt::assemble(to_be_signed, algorithm, signature, key)?;
            let (signed, _) = cwt::verify(&bytes, key)?;
            (bytes, signed)
        } else {
            let bytes = signed::join(to_be_signed, algorithm, signature)?;
            let envelope = signed::split("issued certificate", &bytes)?;
            envelope.verify(key)?;
            envelope.certificate()?;
            let signed = envelope.to_be_signed.to_vec();
            (bytes, signed)
        };
        if signed != to_be_signed {
            return Err(CertificateError::refused("the certificate does not contain the bytes that were signed"));
        }
        Ok(Self { bytes, is_cwt })
    }

    /// X.509 in DER, or a COSE_Sign1 with tag 18.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether the certificate is a CWT.
    pub const fn is_cwt(&self) -> bool {
        self.is_cwt
    }

    /// The certificate's bytes.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}
