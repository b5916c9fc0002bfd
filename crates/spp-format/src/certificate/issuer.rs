//! The certificate chain of a signing key: a manufacturer key or the access CA.

use der::asn1::{PrintableStringRef, Utf8StringRef};
use der::{Decode, Encode};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_cert::Certificate;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, SubjectKeyIdentifier};
use x509_cert::name::Name;

use super::name::COMMON_NAME;
use super::{CertificateError, signed};
use crate::keys::{KeyType, PublicKey, SignatureAlgorithm};

/// A CA certificate that may issue, with the part of its chain that is available.
#[derive(Debug, Clone)]
pub struct IssuerCertificate {
    chain: Vec<Vec<u8>>,
    public_key: PublicKey,
    algorithm: SignatureAlgorithm,
    subject: Name,
    key_identifier: Vec<u8>,
}

impl IssuerCertificate {
    /// Parses PEM: the issuer first, then optionally each certificate's issuer up to the root (text between the blocks is
    /// allowed). Each must be a CA with keyCertSign and each signature must verify; the issuer needs a subjectKeyIdentifier,
    /// and its key must match the algorithm.
    pub fn from_pem(pem: &str, algorithm: SignatureAlgorithm) -> Result<Self, CertificateError> {
        let mut chain = Vec::new();
        for block in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            chain.push(block.map_err(|e| CertificateError::Pem(e.to_string()))?.to_vec());
        }
        if chain.is_empty() {
            return Err(CertificateError::Pem("no BEGIN CERTIFICATE block".into()));
        }
        Self::from_der_chain(chain, algorithm)
    }

    /// Like [`Self::from_pem`], from DER certificates.
    pub fn from_der_chain(chain: Vec<Vec<u8>>, algorithm: SignatureAlgorithm) -> Result<Self, CertificateError> {
        let mut authorities = Vec::new();
        for (subordinates, der) in chain.iter().enumerate() {
            authorities.push(ChainCertificate::parse(der, subordinates)?);
        }
        for (lower, upper) in authorities.iter().zip(authorities.iter().skip(1)) {
            lower.check_issued_by(upper)?;
        }
        let Some(first) = authorities.into_iter().next() else {
            return Err(CertificateError::Issuer("the chain is empty".into()));
        };
        let key_identifier = first.key_identifier()?;
        let ChainCertificate { certificate, public_key, .. } = first;
        if !algorithm.fits(public_key.kind()) {
            return Err(CertificateError::AlgorithmMismatch { kind: public_key.kind(), algorithm });
        }
        let subject = certificate.tbs_certificate().subject().clone();
        Ok(Self { public_key, algorithm, subject, key_identifier, chain })
    }

    /// Parses a PEM chain and uses the default algorithm of the issuer's key type.
    pub fn from_pem_with_default_algorithm(pem: &str) -> Result<Self, CertificateError> {
        let kinds = KeyType::ALL.into_iter().map(SignatureAlgorithm::default_for);
        let mut refused = CertificateError::refused("unsupported key type");
        for algorithm in kinds {
            match Self::from_pem(pem, algorithm) {
                Err(error @ CertificateError::AlgorithmMismatch { .. }) => refused = error,
                parsed => return parsed,
            }
        }
        Err(refused)
    }

    /// Parses a PEM chain; if the first certificate is self-signed, its signature algorithm is used instead of the default.
    pub fn from_root_pem(pem: &str) -> Result<Self, CertificateError> {
        let mut issuer = Self::from_pem_with_default_algorithm(pem)?;
        let envelope = signed::split("issuer certificate", issuer.as_der())?;
        if envelope.verify(&issuer.public_key).is_ok() {
            issuer.algorithm = envelope.algorithm;
        }
        Ok(issuer)
    }

    /// The public key of the signing key.
    pub const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// The signature algorithm, unless a profile overrides it.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// The issuer certificate in DER.
    pub fn as_der(&self) -> &[u8] {
        // A chain has at least one certificate, so the empty slice is unreachable.
        self.chain.first().map_or(&[], Vec::as_slice)
    }

    /// The issuer certificate and its issuers, in DER.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.chain
    }

    /// The issuer certificate's notAfter, seconds since the Unix epoch.
    pub fn not_after(&self) -> Result<u64, CertificateError> {
        let certificate = Certificate::from_der(self.as_der());
        let certificate = certificate.map_err(CertificateError::unreadable("issuer certificate"))?;
        Ok(certificate.tbs_certificate().validity().not_after.to_unix_duration().as_secs())
    }

    /// The subjectKeyIdentifier, used as authorityKeyIdentifier (RFC 5280 §4.2.1.1) of issued certificates.
    pub fn key_identifier(&self) -> &[u8] {
        &self.key_identifier
    }

    /// The issuer's display name, also used as `iss` of a CWT: the common name, or the whole name in RFC 4514 form.
    pub fn display_name(&self) -> String {
        self.common_name().unwrap_or_else(|| self.subject.to_string())
    }

    /// The subject, used as issuer of issued certificates.
    pub(super) const fn subject(&self) -> &Name {
        &self.subject
    }

    fn common_name(&self) -> Option<String> {
        let attribute = self.subject.iter().find(|attribute| attribute.oid == COMMON_NAME)?;
        let utf8 = attribute.value.decode_as::<Utf8StringRef<'_>>().map(|text| text.as_str().to_owned());
        utf8.or_else(|_| attribute.value.decode_as::<PrintableStringRef<'_>>().map(|text| text.as_str().to_owned()))
            .ok()
    }
}

/// One certificate of the chain.
struct ChainCertificate<'a> {
    der: &'a [u8],
    certificate: Certificate,
    public_key: PublicKey,
}

impl<'a> ChainCertificate<'a> {
    /// Parses a certificate that has `subordinates` CA certificates below it (RFC 5280 §4.2.1.9).
    fn parse(der: &'a [u8], subordinates: usize) -> Result<Self, CertificateError> {
        let unreadable = || CertificateError::unreadable("issuer certificate");
        let certificate = Certificate::from_der(der).map_err(unreadable())?;
        let tbs = certificate.tbs_certificate();
        let refused = |reason: &str| Err(CertificateError::Issuer(format!("{}: {reason}", tbs.subject())));
        match tbs.get_extension::<BasicConstraints>().map_err(unreadable())? {
            Some((_, constraints)) if constraints.ca => {
                if constraints.path_len_constraint.is_some_and(|max| usize::from(max) < subordinates) {
                    return refused("the path length constraint forbids its subordinate CAs");
                }
            }
            _ => return refused("not a CA (basicConstraints)"),
        }
        match tbs.get_extension::<KeyUsage>().map_err(unreadable())? {
            Some((_, usage)) if usage.key_cert_sign() => {}
            // RFC 5280 §6.1.4 (n): keyUsage, if present, must include keyCertSign. Some roots have no keyUsage; the issuer must
            // have it.
            None if subordinates > 0 => {}
            _ => return refused("keyUsage lacks keyCertSign"),
        }
        let spki = tbs.subject_public_key_info().to_der().map_err(unreadable())?;
        let public_key = PublicKey::from_spki_der(&spki)
            .map_err(CertificateError::key("parsing the issuer certificate's public key"))?;
        Ok(Self { der, certificate, public_key })
    }

    fn check_issued_by(&self, upper: &Self) -> Result<(), CertificateError> {
        let (lower_name, upper_name) =
            (self.certificate.tbs_certificate().issuer(), upper.certificate.tbs_certificate().subject());
        if lower_name != upper_name {
            return Err(CertificateError::Issuer(format!(
                "the chain continues with {upper_name}, expected {lower_name}"
            )));
        }
        signed::split("issuer certificate", self.der)?.verify(&upper.public_key).map_err(|cause| {
            CertificateError::Issuer(format!(
                "cannot verify the signature made by {upper_name}: {cause}; \
                 the certificates after the issuer's may be omitted from the file"
            ))
        })
    }

    fn key_identifier(&self) -> Result<Vec<u8>, CertificateError> {
        let found = self.certificate.tbs_certificate().get_extension::<SubjectKeyIdentifier>();
        match found.map_err(CertificateError::unreadable("issuer certificate"))? {
            Some((_, identifier)) => Ok(identifier.0.as_bytes().to_vec()),
            None => Err(CertificateError::Issuer("no subjectKeyIdentifier (RFC 5280 §4.2.1.2)".into())),
        }
    }
}
