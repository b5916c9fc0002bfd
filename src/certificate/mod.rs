//! Device certificates and those around the system. Pure: no I/O, no clock, no HSM.
//!
//! A device certificate goes profile → [`prepare`] → [`PreparedCertificate`] → [`PreparedCertificate::lint`] →
//! [`LintedCertificate`] → signed elsewhere, from exactly its bytes → [`IssuedCertificate`]. Each step eats the one
//! before; only a linted certificate has bytes to be signed. Times and serial numbers are parameters.

mod access;
mod algorithm;
mod answer;
mod authority;
mod csr;
mod cwt;
mod describe;
#[cfg(test)]
mod device_tests;
mod issued;
mod issuer;
mod lint;
mod lint_cwt;
#[cfg(test)]
mod lint_tests;
mod name;
mod prepare;
mod profile;
mod profile_file;
mod published;
mod signed;
mod tbs;
#[cfg(test)]
mod testing;
mod verify;

pub use access::{
    AccessCertificate, AccessName, Caller, CallerCertificate, Role, access_certificate, caller_of, public_key_of,
    verify_caller,
};
pub use answer::check_answer;
pub use authority::{
    AuthorityCertificate, SignedDocument, UnsignedDocument, access_request, authority_certificate, authority_request,
    certificate_pem, root_certificate, root_request, subordinate_certificate,
};
pub use csr::{CsrError, MAX_CSR_LEN, verify_csr, verify_csr_pem};
pub use describe::{Statement, describe};
pub use issued::IssuedCertificate;
pub use issuer::IssuerCertificate;
pub use lint::{LintFinding, LintFindings, LintedCertificate};
pub use name::{SubjectFields, SubjectName};
pub use prepare::{CertificateRequest, CertificateSerial, PreparedCertificate, prepare};
pub use profile::{
    AuthorityInfoAccess, CertificateTemplate, IdentityKind, KeyPairRule, Profile, Sealing, SymmetricKeyRule,
};
pub use published::{PublishedClaims, lint_published};
pub use verify::{VerifiedCertificate, verify_device_certificate};

use crate::keys::{KeyError, KeyKind, SignatureAlgorithm};

/// Why a certificate could not be made, or is not to be trusted. Nothing in it is secret.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// Bytes that are not the DER structure they should be.
    #[error("{what} could not be read: {source}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// The decoder's words.
        source: der::Error,
    },
    /// A structure that could not be written: a value too long for its field, say.
    #[error("the {what} could not be encoded: {source}; shorten or correct the value")]
    Unwritable {
        /// What was being written.
        what: &'static str,
        /// The encoder's words.
        source: der::Error,
    },
    /// Bytes that are not the CBOR or COSE structure they should be.
    #[error("the CWT could not be read: {0}")]
    Cwt(String),
    /// The PEM text has no certificate or a damaged one.
    #[error("the PEM text could not be read: {0}; give BEGIN CERTIFICATE blocks, the issuer first")]
    Pem(String),
    /// The key in the certificate, or a signature.
    #[error("{doing}: {source}")]
    Key {
        /// What was being done.
        doing: &'static str,
        /// What is wrong.
        source: KeyError,
    },
    /// A signature algorithm that this system does not use.
    #[error("signature algorithm {0} is not one of ECDSA P-256/P-384, RSA (PKCS#1 v1.5 or PSS) with SHA-256, Ed25519")]
    UnknownAlgorithm(String),
    /// The signing key cannot make this kind of signature.
    #[error("a {kind} key cannot sign with {algorithm:?}; correct the profile's or the issuer's signature algorithm")]
    AlgorithmMismatch {
        /// The issuer's key.
        kind: KeyKind,
        /// What was asked for.
        algorithm: SignatureAlgorithm,
    },
    /// The issuer's certificate is not one that may issue.
    #[error("the issuer certificate cannot be used: {0}")]
    Issuer(String),
    /// The request does not fit the profile, or the profile not the request.
    #[error("the certificate cannot be prepared: {0}")]
    Request(String),
    /// The certificate is authentic in form, but it says something else than it must.
    #[error("the certificate is refused: {0}")]
    Refused(String),
}

impl CertificateError {
    fn unreadable(what: &'static str) -> impl FnOnce(der::Error) -> Self {
        move |source| Self::Unreadable { what, source }
    }

    fn unwritable(what: &'static str) -> impl FnOnce(der::Error) -> Self {
        move |source| Self::Unwritable { what, source }
    }

    fn key(doing: &'static str) -> impl FnOnce(KeyError) -> Self {
        move |source| Self::Key { doing, source }
    }

    fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }
}
