//! The envelope of X.509 certificates and requests: `SEQUENCE { to be signed, algorithm, signature }` (RFC 5280 §4.1.1).

use der::asn1::BitStringRef;
use der::{AnyRef, Decode, Encode, Reader, Sequence, SliceReader};
use spki::{AlgorithmIdentifierOwned, AlgorithmIdentifierRef};
use x509_cert::certificate::TbsCertificate;

use super::{CertificateError, algorithm};
use crate::keys::{PublicKey, SignatureAlgorithm};

/// The three parts as borrowed bytes; nothing is re-encoded.
#[derive(Debug)]
pub(super) struct SignedParts<'a> {
    /// The signed bytes.
    pub(super) to_be_signed: &'a [u8],
    /// The signature algorithm.
    pub(super) algorithm: SignatureAlgorithm,
    signature: &'a [u8],
}

/// Splits the envelope; trailing bytes are rejected.
pub(super) fn split<'a>(what: &'static str, der: &'a [u8]) -> Result<SignedParts<'a>, CertificateError> {
    let unreadable = CertificateError::unreadable(what);
    let parts = || -> der::Result<(&'a [u8], AlgorithmIdentifierRef<'a>, BitStringRef<'a>)> {
        let mut reader = SliceReader::new(der)?;
        let parts =
            reader.sequence(|inner| Ok::<_, der::Error>((inner.tlv_bytes()?, inner.decode()?, inner.decode()?)))?;
        reader.finish()?;
        Ok(parts)
    };
    let (to_be_signed, identifier, signature) = parts().map_err(unreadable)?;
    let signature = signature.as_bytes().ok_or_else(|| CertificateError::refused("the signature has unused bits"))?;
    Ok(SignedParts { to_be_signed, algorithm: algorithm::from_identifier(&identifier)?, signature })
}

impl SignedParts<'_> {
    /// Verifies the signature. The algorithm must match the key type.
    pub(super) fn verify(&self, key: &PublicKey) -> Result<(), CertificateError> {
        key.verify(self.algorithm, self.to_be_signed, self.signature)
            .map_err(CertificateError::key("verifying the signature"))
    }

    /// Parses the signed bytes as a certificate. Its inner and outer algorithms must be equal (RFC 5280 §4.1.1.2).
    pub(super) fn certificate(&self) -> Result<TbsCertificate, CertificateError> {
        let unreadable = || CertificateError::unreadable("certificate");
        let tbs = TbsCertificate::from_der(self.to_be_signed).map_err(unreadable())?;
        let inner = tbs.signature().to_der().map_err(unreadable())?;
        let inner = AlgorithmIdentifierRef::from_der(&inner).map_err(unreadable())?;
        if algorithm::from_identifier(&inner)? != self.algorithm {
            return Err(CertificateError::refused("inner and outer signature algorithms differ"));
        }
        Ok(tbs)
    }
}

/// Encodes the envelope around exactly these bytes.
pub(super) fn join(
    to_be_signed: &[u8],
    algorithm: SignatureAlgorithm,
    signature: &[u8],
) -> Result<Vec<u8>, CertificateError> {
    let envelope = Envelope {
        to_be_signed: AnyRef::from_der(to_be_signed).map_err(CertificateError::unreadable("to-be-signed part"))?,
        algorithm: algorithm::identifier(algorithm)?,
        signature: BitStringRef::from_bytes(signature).map_err(CertificateError::unwritable("signature"))?,
    };
    envelope.to_der().map_err(CertificateError::unwritable("signed structure"))
}

#[derive(Sequence)]
struct Envelope<'a> {
    to_be_signed: AnyRef<'a>,
    algorithm: AlgorithmIdentifierOwned,
    signature: BitStringRef<'a>,
}
