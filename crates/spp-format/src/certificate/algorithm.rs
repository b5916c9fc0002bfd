//! Signature algorithm identifiers of X.509 and COSE.

use coset::iana;
use der::asn1::ObjectIdentifier;
use der::{Any, AnyRef, Decode, Encode};
use spki::{AlgorithmIdentifierOwned, AlgorithmIdentifierRef};

use super::CertificateError;
use crate::keys::SignatureAlgorithm;

/// `ecdsa-with-SHA256`, RFC 5758 §3.2.
const ECDSA_WITH_SHA256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2");
/// `ecdsa-with-SHA384`, RFC 5758 §3.2.
const ECDSA_WITH_SHA384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3");
/// `sha256WithRSAEncryption`, RFC 4055 §5.
const SHA256_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11");
/// `id-RSASSA-PSS`, RFC 4055 §3.1.
const RSASSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
/// `id-Ed25519`, RFC 8410 §3.
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// `RSASSA-PSS-params` (RFC 4055 §3.1): SHA-256, MGF1 with SHA-256, 32-byte salt; hash parameters are NULL, as all common
/// implementations encode them.
const PSS_SHA256_PARAMETERS: [u8; 54] = *b"\x30\x34\
    \xa0\x0f\x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\
    \xa1\x1c\x30\x1a\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\
    \x30\x0d\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\x05\x00\
    \xa2\x03\x02\x01\x20";
/// The same parameters with absent hash parameters, which RFC 4055 §2.1 requires to be accepted.
const PSS_SHA256_PARAMETERS_WITHOUT_NULL: [u8; 50] = *b"\x30\x30\
    \xa0\x0d\x30\x0b\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\
    \xa1\x1a\x30\x18\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08\
    \x30\x0b\x06\x09\x60\x86\x48\x01\x65\x03\x04\x02\x01\
    \xa2\x03\x02\x01\x20";

/// Encodes the AlgorithmIdentifier (RFC 5280 §4.1.1.2).
pub(super) fn identifier(algorithm: SignatureAlgorithm) -> Result<AlgorithmIdentifierOwned, CertificateError> {
    let (oid, parameters) = match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 => (ECDSA_WITH_SHA256, None),
        SignatureAlgorithm::EcdsaP384Sha384 => (ECDSA_WITH_SHA384, None),
        SignatureAlgorithm::RsaPkcs1Sha256 => (SHA256_WITH_RSA, Some(Any::null())),
        SignatureAlgorithm::RsaPssSha256 => {
            let parameters = Any::from_der(&PSS_SHA256_PARAMETERS);
            (RSASSA_PSS, Some(parameters.map_err(CertificateError::unwritable("signature algorithm"))?))
        }
        SignatureAlgorithm::Ed25519 => (ED25519, None),
    };
    Ok(AlgorithmIdentifierOwned { oid, parameters })
}

/// Decodes an AlgorithmIdentifier; unsupported parameters make the algorithm unsupported.
pub(super) fn from_identifier(identifier: &AlgorithmIdentifierRef<'_>) -> Result<SignatureAlgorithm, CertificateError> {
    let parameters = identifier.parameters;
    let algorithm = match identifier.oid {
        ECDSA_WITH_SHA256 if parameters.is_none() => SignatureAlgorithm::EcdsaP256Sha256,
        ECDSA_WITH_SHA384 if parameters.is_none() => SignatureAlgorithm::EcdsaP384Sha384,
        // RFC 4055 §5: NULL is encoded; absent parameters are accepted.
        SHA256_WITH_RSA if parameters.is_none_or(AnyRef::is_null) => SignatureAlgorithm::RsaPkcs1Sha256,
        RSASSA_PSS if parameters.is_some_and(is_pss_sha256) => SignatureAlgorithm::RsaPssSha256,
        ED25519 if parameters.is_none() => SignatureAlgorithm::Ed25519,
        other => return Err(CertificateError::UnknownAlgorithm(other.to_string())),
    };
    Ok(algorithm)
}

fn is_pss_sha256(parameters: AnyRef<'_>) -> bool {
    parameters.to_der().is_ok_and(|der| der == PSS_SHA256_PARAMETERS || der == PSS_SHA256_PARAMETERS_WITHOUT_NULL)
}

/// The COSE algorithm (RFC 9053 §2, RFC 8812 §2, RFC 8230 §2).
pub(super) const fn cose(algorithm: SignatureAlgorithm) -> iana::Algorithm {
    match algorithm {
        SignatureAlgorithm::EcdsaP256Sha256 => iana::Algorithm::ES256,
        SignatureAlgorithm::EcdsaP384Sha384 => iana::Algorithm::ES384,
        SignatureAlgorithm::RsaPkcs1Sha256 => iana::Algorithm::RS256,
        SignatureAlgorithm::RsaPssSha256 => iana::Algorithm::PS256,
        SignatureAlgorithm::Ed25519 => iana::Algorithm::EdDSA,
    }
}

/// Decodes the algorithm of a COSE header.
pub(super) fn from_cose(algorithm: Option<&coset::Algorithm>) -> Result<SignatureAlgorithm, CertificateError> {
    match algorithm {
        Some(coset::Algorithm::Assigned(iana::Algorithm::ES256)) => Ok(SignatureAlgorithm::EcdsaP256Sha256),
        Some(coset::Algorithm::Assigned(iana::Algorithm::ES384)) => Ok(SignatureAlgorithm::EcdsaP384Sha384),
        Some(coset::Algorithm::Assigned(iana::Algorithm::RS256)) => Ok(SignatureAlgorithm::RsaPkcs1Sha256),
        Some(coset::Algorithm::Assigned(iana::Algorithm::PS256)) => Ok(SignatureAlgorithm::RsaPssSha256),
        Some(coset::Algorithm::Assigned(iana::Algorithm::EdDSA)) => Ok(SignatureAlgorithm::Ed25519),
        other => Err(CertificateError::UnknownAlgorithm(format!("{other:?} (COSE)"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certificate::testing::ALGORITHMS;

    #[test]
    fn algorithm_encoded_as_x509_and_cose_decodes_to_itself() {
        for algorithm in ALGORITHMS {
            let der = identifier(algorithm).unwrap().to_der().unwrap();
            assert_eq!(from_identifier(&AlgorithmIdentifierRef::from_der(&der).unwrap()).unwrap(), algorithm);
            assert_eq!(from_cose(Some(&coset::Algorithm::Assigned(cose(algorithm)))).unwrap(), algorithm);
        }
    }

    #[test]
    fn pss_with_other_parameters_rejected() {
        let mut parameters = PSS_SHA256_PARAMETERS;
        parameters[53] = 20;
        let identifier =
            AlgorithmIdentifierRef { oid: RSASSA_PSS, parameters: Some(AnyRef::from_der(&parameters).unwrap()) };
        assert!(from_identifier(&identifier).is_err());
        let without = AnyRef::from_der(&PSS_SHA256_PARAMETERS_WITHOUT_NULL).unwrap();
        assert!(from_identifier(&AlgorithmIdentifierRef { oid: RSASSA_PSS, parameters: Some(without) }).is_ok());
        assert!(from_identifier(&AlgorithmIdentifierRef { oid: RSASSA_PSS, parameters: None }).is_err());
    }
}
