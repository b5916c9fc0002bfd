//! The request of a device that made its own key pair: PKCS#10 (RFC 2986).

use der::{Decode, Encode};
use x509_cert::request::CertReqInfo;

use super::{CertificateError, signed};
use crate::keys::{KeyError, PublicKey};

/// Most bytes of a request.
pub const MAX_CSR_LEN: usize = 4096;

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// Too long to be looked at.
    #[error("the certificate request has {0} bytes, at most {MAX_CSR_LEN} are read")]
    TooLong(usize),
    /// Not PKCS#10, or signed in a way that is not supported.
    #[error("the certificate request could not be read: {0}")]
    Unreadable(#[source] CertificateError),
    /// A key that is weak or of a kind that is not supported.
    #[error("the key of the certificate request is refused: {0}")]
    Key(#[source] KeyError),
    /// Not signed by its own key: whoever sent it may not have the private key.
    #[error("the certificate request is not signed by its own key: {0}")]
    Signature(#[source] CertificateError),
}

/// Verifies a PKCS#10 request in DER and gives its public key. Of what else it asks for nothing is used: the profile decides.
pub fn verify_csr(der: &[u8]) -> Result<PublicKey, CsrError> {
    if der.len() > MAX_CSR_LEN {
        return Err(CsrError::TooLong(der.len()));
    }
    let unreadable = |cause| CsrError::Unreadable(CertificateError::unreadable("PKCS#10 structure")(cause));
    let shell = signed::split("PKCS#10 structure", der).map_err(CsrError::Unreadable)?;
    let info = CertReqInfo::from_der(shell.to_be_signed).map_err(unreadable)?;
    let spki = info.public_key.to_der().map_err(unreadable)?;
    let key = PublicKey::from_spki_der(&spki).map_err(CsrError::Key)?;
    shell.verify(&key).map_err(CsrError::Signature)?;
    Ok(key)
}

/// The same for one in PEM (RFC 7468 §7).
pub fn verify_csr_pem(pem: &[u8]) -> Result<PublicKey, CsrError> {
    if pem.len() > 2 * MAX_CSR_LEN {
        return Err(CsrError::TooLong(pem.len()));
    }
    let unreadable =
        |cause: der::Error| CsrError::Unreadable(CertificateError::unreadable("PKCS#10 request in PEM")(cause));
    let (label, der) = der::pem::decode_vec(pem).map_err(|e| unreadable(e.into()))?;
    match label {
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => verify_csr(&der),
        other => {
            Err(CsrError::Unreadable(CertificateError::refused(format!("it is a {other}, not a CERTIFICATE REQUEST"))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::testing::{ALGORITHMS, SignWith, request_of};

    #[test]
    fn a_request_signed_by_its_own_key_gives_that_key() {
        for algorithm in ALGORITHMS {
            let key = SignWith::new(algorithm);
            assert_eq!(verify_csr(&request_of(&key)).unwrap(), *key.public());
        }
    }

    #[test]
    fn a_request_signed_by_another_key_is_refused() {
        let (one, other) = (SignWith::p256(), SignWith::p256());
        let der = request_of(&one);
        let info = signed::split("request", &der).unwrap();
        let forged = signed::join(info.to_be_signed, info.algorithm, &other.sign(info.to_be_signed)).unwrap();
        assert!(matches!(verify_csr(&forged), Err(CsrError::Signature(_))));
    }

    #[test]
    fn what_follows_the_request_or_is_too_long_is_refused() {
        let der = request_of(&SignWith::p256());
        assert!(matches!(verify_csr(&[&der[..], &[0]].concat()), Err(CsrError::Unreadable(_))));
        assert!(matches!(verify_csr(&[0x30; MAX_CSR_LEN + 1]), Err(CsrError::TooLong(4097))));
        for length in 0..der.len() {
            assert!(verify_csr(&der[..length]).is_err());
        }
    }

    #[test]
    fn no_flipped_bit_passes() {
        let der = request_of(&SignWith::new(crate::keys::SignatureAlgorithm::Ed25519));
        for position in 0..der.len() * 8 {
            let mut flipped = der.clone();
            flipped[position / 8] ^= 1 << (position % 8);
            assert!(verify_csr(&flipped).is_err(), "bit {position}");
        }
    }
}
