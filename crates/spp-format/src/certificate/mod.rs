//! Certificates: device certificates (IDevID and CWT), access certificates and CA certificates. Pure: no I/O, no clock, no HSM.
//!
//! A device certificate passes through these types: profile → [`prepare`] → [`PreparedCertificate`] →
//! [`PreparedCertificate::lint`] → [`LintedCertificate`] → signature by the HSM over exactly its bytes →
//! [`IssuedCertificate`]. Each step consumes the previous type; only a linted certificate exposes bytes to sign. Times and
//! serial numbers are parameters.

mod access;
mod algorithm;
mod authority;
mod csr;
mod cwt;
mod describe;
#[cfg(test)]
mod device_tests;
mod issued;
mod issued_chain;
mod issuer;
mod lint;
mod lint_cwt;
mod lint_findings;
#[cfg(test)]
mod lint_tests;
mod name;
mod prepare;
mod profile;
mod profile_file;
mod published;
mod request;
mod signed;
mod subject;
mod tbs;
#[cfg(test)]
mod testing;
mod to_sign;
mod verify;

pub use access::{
    AccessCertificate, AccessName, Caller, CallerCertificate, Role, access_certificate, certificate_public_key,
    parse_caller_certificate, verify_caller_certificate,
};
pub use authority::{
    AuthorityCertificate, SignedDocument, UnsignedDocument, access_request, authority_certificate, authority_request,
    certificate_pem, root_certificate, root_request, subordinate_certificate,
};
pub use csr::{CsrError, MAX_CSR_LEN, verify_csr, verify_csr_pem};
pub use describe::{CertificateField, describe};
pub use issued::IssuedCertificate;
pub use issued_chain::verify_issued_chain;
pub use issuer::IssuerCertificate;
pub use lint::LintedCertificate;
pub use lint_findings::{LintFinding, LintFindings};
pub use name::{SubjectFields, SubjectName};
pub use prepare::{PreparedCertificate, prepare};
pub use profile::{
    AuthorityInfoAccess, CertificateTemplate, IdentityKind, KeyPairRule, Profile, Sealing, SymmetricKeyRule,
};
pub use published::{PublishedClaims, lint_published};
pub use request::{CertificateRequest, CertificateSerial};
pub use subject::{IssuedSubject, subjects_can_meet};
pub use to_sign::CertificateToSign;
pub use verify::{VerifiedCertificate, verify_device_certificate};

use crate::keys::{KeyError, KeyType, SignatureAlgorithm};

/// Why a certificate could not be built or was rejected. Contains no secret.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Invalid DER.
    #[error("invalid {what}: {source}")]
    Unreadable {
        /// The structure being decoded.
        what: &'static str,
        /// The decoder's error.
        source: der::Error,
    },
    /// A structure that could not be encoded, for example because a value is too long for its field.
    #[error("cannot encode the {what}: {source}; shorten or correct the value")]
    Unwritable {
        /// The structure being encoded.
        what: &'static str,
        /// The encoder's error.
        source: der::Error,
    },
    /// Invalid CBOR, COSE or CWT structure.
    #[error("invalid CWT: {0}")]
    Cwt(String),
    /// The PEM text contains no certificate or an invalid one.
    #[error("invalid PEM: {0}; provide BEGIN CERTIFICATE blocks, the issuer first")]
    Pem(String),
    /// An invalid key or signature.
    #[error("{operation}: {source}")]
    Key {
        /// The operation that failed.
        operation: &'static str,
        /// The error of the key module.
        source: KeyError,
    },
    /// An unsupported signature algorithm.
    #[error(
        "unsupported signature algorithm {0}: expected ECDSA P-256/P-384, RSA (PKCS#1 v1.5 or PSS) with SHA-256, or Ed25519"
    )]
    UnknownAlgorithm(String),
    /// The signature algorithm does not match the key type.
    #[error(
        "a {kind} key cannot sign with {algorithm:?}; correct the signature algorithm of the profile or the issuer"
    )]
    AlgorithmMismatch {
        /// The type of the issuer's key.
        kind: KeyType,
        /// The requested algorithm.
        algorithm: SignatureAlgorithm,
    },
    /// The issuer certificate must not be used to issue.
    #[error("unusable issuer certificate: {0}")]
    Issuer(String),
    /// The request and the profile do not match.
    #[error("cannot prepare the certificate: {0}")]
    Request(String),
    /// The certificate is well-formed, but its content is not acceptable.
    #[error("certificate rejected: {0}")]
    Refused(String),
}

impl CertificateError {
    fn unreadable(what: &'static str) -> impl FnOnce(der::Error) -> Self {
        move |source| Self::Unreadable { what, source }
    }

    fn unwritable(what: &'static str) -> impl FnOnce(der::Error) -> Self {
        move |source| Self::Unwritable { what, source }
    }

    fn key(operation: &'static str) -> impl FnOnce(KeyError) -> Self {
        move |source| Self::Key { operation, source }
    }

    fn refused(reason: impl Into<String>) -> Self {
        Self::Refused(reason.into())
    }
}
