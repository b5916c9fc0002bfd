//! Verification of a device's PKCS#10 certificate request (RFC 2986).

use der::{Decode, Encode};
use x509_cert::request::CertReqInfo;

use super::{CertificateError, signed};
use crate::keys::{KeyError, PublicKey};

/// Maximum length of a request in bytes.
pub const MAX_CSR_LEN: usize = 4096;

/// Why a certificate request was rejected.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// The request is too long.
    #[error("certificate request too long: {0} bytes, at most {MAX_CSR_LEN} are allowed")]
    TooLong(usize),
    /// Not PKCS#10, or an unsupported signature algorithm.
    #[error("invalid certificate request: {0}")]
    Unreadable(#[source] CertificateError),
    /// A weak or unsupported key.
    #[error("certificate request: unacceptable key: {0}")]
    Key(#[source] KeyError),
    /// Not signed by its own key: the sender may not have the private key.
    #[error("certificate request not signed by its own key: {0}")]
    Signature(#[source] CertificateError),
}

/// Verifies a PKCS#10 request in DER and returns its public key in canonical encoding. Everything else in the request is ignored:
/// the profile decides.
pub fn verify_csr(der: &[u8]) -> Result<PublicKey, CsrError> {
    if der.len() > MAX_CSR_LEN {
        return Err(CsrError::TooLong(der.len()));
    }
    let unreadable = |cause| CsrError::Unreadable(CertificateError::unreadable("PKCS#10 structure")(cause));
    let envelope = signed::split("PKCS#10 structure", der).map_err(CsrError::Unreadable)?;
    let info = CertReqInfo::from_der(envelope.to_be_signed).map_err(unreadable)?;
    let spki = info.public_key.to_der().map_err(unreadable)?;
    let key = PublicKey::from_spki_der(&spki).map_err(CsrError::Key)?;
    envelope.verify(&key).map_err(CsrError::Signature)?;
    key.to_canonical().map_err(CsrError::Key)
}

/// Verifies a PKCS#10 request in PEM (RFC 7468 §7).
pub fn verify_csr_pem(pem: &[u8]) -> Result<PublicKey, CsrError> {
    if pem.len() > 2 * MAX_CSR_LEN {
        return Err(CsrError::TooLong(pem.len()));
    }
    let unreadable =
        |cause: der::Error| CsrError::Unreadable(CertificateError::unreadable("PKCS#10 request in PEM")(cause));
    let (label, der) = der::pem::decode_vec(pem).map_err(|e| unreadable(e.into()))?;
    match label {
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => verify_csr(&der),
        other => Err(CsrError::Unreadable(CertificateError::refused(format!(
            "PEM label {other}: expected CERTIFICATE REQUEST"
        )))),
    }
}

#[cfg(test)]
mod tests {
    use spki::SubjectPublicKeyInfoOwned;

    use super::*;
    use crate::certificate::testing::{ALGORITHMS, SoftwareKey, request_of};
    use crate::keys::compressed;

    #[test]
    fn csr_signed_by_its_key_returns_key() {
        for algorithm in ALGORITHMS {
            let key = SoftwareKey::new(algorithm);
            assert_eq!(verify_csr(&request_of(&key)).unwrap(), *key.public());
        }
    }

    #[test]
    fn csr_signed_by_other_key_rejected() {
        let (one, other) = (SoftwareKey::p256(), SoftwareKey::p256());
        let der = request_of(&one);
        let info = signed::split("request", &der).unwrap();
        let forged = signed::join(info.to_be_signed, info.algorithm, &other.sign(info.to_be_signed)).unwrap();
        assert!(matches!(verify_csr(&forged), Err(CsrError::Signature(_))));
    }

    #[test]
    fn csr_with_compressed_point_rejected() {
        let key = SoftwareKey::p256();
        let compressed = with_spki(&key, &compressed(key.public()));
        assert!(matches!(verify_csr(&compressed), Err(CsrError::Key(_))), "{:?}", verify_csr(&compressed));
    }

    #[test]
    fn csr_with_other_rsa_parameters_returns_canonical_key() {
        let key = SoftwareKey::new(crate::keys::SignatureAlgorithm::RsaPkcs1Sha256);
        let mut spki = SubjectPublicKeyInfoOwned::from_der(key.public().spki_der()).unwrap();
        spki.algorithm.parameters = None;
        let parsed = verify_csr(&with_spki(&key, &spki.to_der().unwrap()));
        assert_eq!(parsed.unwrap(), *key.public());
    }

    /// The request of a key with another encoding of that key.
    fn with_spki(key: &SoftwareKey, spki: &[u8]) -> Vec<u8> {
        let der = request_of(key);
        let envelope = signed::split("request", &der).unwrap();
        let mut info = CertReqInfo::from_der(envelope.to_be_signed).unwrap();
        info.public_key = SubjectPublicKeyInfoOwned::from_der(spki).unwrap();
        let to_be_signed = info.to_der().unwrap();
        signed::join(&to_be_signed, key.algorithm(), &key.sign(&to_be_signed)).unwrap()
    }

    #[test]
    fn csr_truncated_extended_or_too_long_rejected() {
        let der = request_of(&SoftwareKey::p256());
        assert!(matches!(verify_csr(&[&der[..], &[0]].concat()), Err(CsrError::Unreadable(_))));
        assert!(matches!(verify_csr(&[0x30; MAX_CSR_LEN + 1]), Err(CsrError::TooLong(4097))));
        for length in 0..der.len() {
            assert!(verify_csr(&der[..length]).is_err());
        }
    }

    #[test]
    fn csr_with_flipped_bit_rejected() {
        let der = request_of(&SoftwareKey::new(crate::keys::SignatureAlgorithm::Ed25519));
        for position in 0..der.len() * 8 {
            let mut flipped = der.clone();
            flipped[position / 8] ^= 1 << (position % 8);
            assert!(verify_csr(&flipped).is_err(), "bit {position}");
        }
    }
}
