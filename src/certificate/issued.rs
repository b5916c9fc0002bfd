//! A signature made elsewhere becomes a certificate, if it is the right one.

use super::{CertificateError, IssuerCertificate, cwt, signed};
use crate::store::CertificateToSign;

/// A signed device certificate. Its signature has been verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuedCertificate {
    bytes: Vec<u8>,
    is_cwt: bool,
}

impl IssuedCertificate {
    /// Puts the certificate together around exactly the bytes that were signed, and verifies it with the issuer's public
    /// key as a device would. The signature is as X.509 has it: ECDSA in DER.
    pub fn assemble(
        to_sign: &CertificateToSign,
        issuer: &IssuerCertificate,
        signature: &[u8],
    ) -> Result<Self, CertificateError> {
        let CertificateToSign { algorithm, to_be_signed, is_cwt, .. } = to_sign;
        let key = issuer.public_key();
        let (bytes, signed) = if *is_cwt {
            let bytes = cwt::assemble(to_be_signed, *algorithm, signature, key)?;
            let (signed, _) = cwt::verify(&bytes, key)?;
            (bytes, signed)
        } else {
            let bytes = signed::join(to_be_signed, *algorithm, signature)?;
            let shell = signed::split("issued certificate", &bytes)?;
            shell.verify(key)?;
            shell.certificate()?;
            let signed = shell.to_be_signed.to_vec();
            (bytes, signed)
        };
        if signed != *to_be_signed {
            return Err(CertificateError::refused("what it contains is not what was signed"));
        }
        Ok(Self { bytes, is_cwt: *is_cwt })
    }

    /// X.509 in DER, or a COSE_Sign1 with tag 18.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether it is a CWT.
    pub const fn is_cwt(&self) -> bool {
        self.is_cwt
    }

    /// The bytes alone.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}
