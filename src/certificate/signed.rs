//! The shell of everything signed in X.509: `SEQUENCE { to be signed, algorithm, signature }` (RFC 5280 §4.1.1).

use der::asn1::BitStringRef;
use der::{AnyRef, Decode, Encode, Reader, Sequence, SliceReader};
use spki::{AlgorithmIdentifierOwned, AlgorithmIdentifierRef};
use x509_cert::certificate::TbsCertificate;

use super::{CertificateError, algorithm};
use crate::keys::{PublicKey, SignatureAlgorithm};

/// The three parts as they stand in the bytes, nothing re-encoded.
#[derive(Debug)]
pub(super) struct Signed<'a> {
    /// What the signature is over.
    pub(super) to_be_signed: &'a [u8],
    /// How it is signed.
    pub(super) algorithm: SignatureAlgorithm,
    signature: &'a [u8],
}

/// Takes the shell apart; trailing bytes are refused.
pub(super) fn split<'a>(what: &'static str, der: &'a [u8]) -> Result<Signed<'a>, CertificateError> {
    let unreadable = CertificateError::unreadable(what);
    let parts = || -> der::Result<(&'a [u8], AlgorithmIdentifierRef<'a>, BitStringRef<'a>)> {
        let mut reader = SliceReader::new(der)?;
        let parts =
            reader.sequence(|inner| Ok::<_, der::Error>((inner.tlv_bytes()?, inner.decode()?, inner.decode()?)))?;
        reader.finish()?;
        Ok(parts)
    };
    let (to_be_signed, identifier, signature) = parts().map_err(unreadable)?;
    let signature = signature.as_bytes().ok_or_else(|| CertificateError::refused("its signature has unused bits"))?;
    Ok(Signed { to_be_signed, algorithm: algorithm::from_identifier(&identifier)?, signature })
}

impl Signed<'_> {
    /// Verifies the signature. The algorithm must be one of the key's.
    pub(super) fn verify(&self, key: &PublicKey) -> Result<(), CertificateError> {
        key.verify(self.algorithm, self.to_be_signed, self.signature)
            .map_err(CertificateError::key("verifying the signature"))
    }

    /// What was signed, read as a certificate. It must name the algorithm that the shell names (RFC 5280 §4.1.1.2).
    pub(super) fn certificate(&self) -> Result<TbsCertificate, CertificateError> {
        let unreadable = || CertificateError::unreadable("certificate");
        let tbs = TbsCertificate::from_der(self.to_be_signed).map_err(unreadable())?;
        let inner = tbs.signature().to_der().map_err(unreadable())?;
        let inner = AlgorithmIdentifierRef::from_der(&inner).map_err(unreadable())?;
        if algorithm::from_identifier(&inner)? != self.algorithm {
            return Err(CertificateError::refused("it names two different signature algorithms"));
        }
        Ok(tbs)
    }
}

/// Puts the shell around exactly these bytes.
pub(super) fn join(
    to_be_signed: &[u8],
    algorithm: SignatureAlgorithm,
    signature: &[u8],
) -> Result<Vec<u8>, CertificateError> {
    let shell = Shell {
        to_be_signed: AnyRef::from_der(to_be_signed).map_err(CertificateError::unreadable("to-be-signed part"))?,
        algorithm: algorithm::identifier(algorithm)?,
        signature: BitStringRef::from_bytes(signature).map_err(CertificateError::unwritable("signature"))?,
    };
    shell.to_der().map_err(CertificateError::unwritable("signed structure"))
}

#[derive(Sequence)]
struct Shell<'a> {
    to_be_signed: AnyRef<'a>,
    algorithm: AlgorithmIdentifierOwned,
    signature: BitStringRef<'a>,
}
