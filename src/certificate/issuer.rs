//! The certificate of a signing key: the manufacturer's, or that of the authority for access certificates.

use der::asn1::{PrintableStringRef, Utf8StringRef};
use der::{Decode, Encode};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_cert::Certificate;
use x509_cert::ext::pkix::{BasicConstraints, KeyUsage, SubjectKeyIdentifier};
use x509_cert::name::Name;

use super::name::COMMON_NAME;
use super::{CertificateError, signed};
use crate::keys::{KeyKind, PublicKey, SignatureAlgorithm};

/// A certificate that may issue, with what stands above it as far as it is given.
#[derive(Debug, Clone)]
pub struct IssuerCertificate {
    chain: Vec<Vec<u8>>,
    public_key: PublicKey,
    algorithm: SignatureAlgorithm,
    subject: Name,
    key_identifier: Vec<u8>,
}

impl IssuerCertificate {
    /// Reads PEM blocks: the issuer first, then each one's issuer up to the root (all of them optional; text between
    /// the blocks is allowed). Each must be a CA that may sign certificates, and each link must verify; the issuer needs a
    /// subjectKeyIdentifier, and its key must fit the algorithm.
    pub fn from_pem(pem: &str, algorithm: SignatureAlgorithm) -> Result<Self, CertificateError> {
        let mut chain = Vec::new();
        for block in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            chain.push(block.map_err(|e| CertificateError::Pem(e.to_string()))?.to_vec());
        }
        if chain.is_empty() {
            return Err(CertificateError::Pem("there is no BEGIN CERTIFICATE block".into()));
        }
        Self::from_der_chain(chain, algorithm)
    }

    /// As [`Self::from_pem`], from the certificates in DER.
    pub fn from_der_chain(chain: Vec<Vec<u8>>, algorithm: SignatureAlgorithm) -> Result<Self, CertificateError> {
        let mut authorities = Vec::new();
        for (below, der) in chain.iter().enumerate() {
            authorities.push(Authority::read(der, below)?);
        }
        for (lower, upper) in authorities.iter().zip(authorities.iter().skip(1)) {
            lower.must_be_issued_by(upper)?;
        }
        let Some(first) = authorities.into_iter().next() else {
            return Err(CertificateError::Issuer("the chain is empty".into()));
        };
        let key_identifier = first.key_identifier()?;
        let Authority { certificate, public_key, .. } = first;
        if !algorithm.fits(public_key.kind()) {
            return Err(CertificateError::AlgorithmMismatch { kind: public_key.kind(), algorithm });
        }
        let subject = certificate.tbs_certificate().subject().clone();
        Ok(Self { public_key, algorithm, subject, key_identifier, chain })
    }

    /// Reads a PEM chain of which nothing else is known: the algorithm is the usual one of its key.
    pub fn from_pem_alone(pem: &str) -> Result<Self, CertificateError> {
        let kinds = KeyKind::ALL.into_iter().map(SignatureAlgorithm::default_for);
        let mut refused = CertificateError::refused("its key is of no kind that signs here");
        for algorithm in kinds {
            match Self::from_pem(pem, algorithm) {
                Err(error @ CertificateError::AlgorithmMismatch { .. }) => refused = error,
                read => return read,
            }
        }
        Err(refused)
    }

    /// Reads a PEM chain that begins with a root: one that has signed itself says so how its key signs.
    pub fn from_pem_of_root(pem: &str) -> Result<Self, CertificateError> {
        let mut read = Self::from_pem_alone(pem)?;
        let shell = signed::split("issuer certificate", read.as_der())?;
        if shell.verify(&read.public_key).is_ok() {
            read.algorithm = shell.algorithm;
        }
        Ok(read)
    }

    /// The public half of the signing key.
    pub const fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// How it signs, unless a profile says otherwise.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// The issuer's certificate in DER.
    pub fn as_der(&self) -> &[u8] {
        // A chain has at least one certificate; an empty slice is not reachable.
        self.chain.first().map_or(&[], Vec::as_slice)
    }

    /// The issuer's certificate and those above it, in DER.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.chain
    }

    /// When the issuer's certificate ends; seconds since the Unix epoch.
    pub fn not_after(&self) -> Result<u64, CertificateError> {
        let certificate = Certificate::from_der(self.as_der());
        let certificate = certificate.map_err(CertificateError::unreadable("issuer certificate"))?;
        Ok(certificate.tbs_certificate().validity().not_after.to_unix_duration().as_secs())
    }

    /// The subjectKeyIdentifier: what the authorityKeyIdentifier (RFC 5280 §4.2.1.1) of an issued certificate holds.
    pub fn key_identifier(&self) -> &[u8] {
        &self.key_identifier
    }

    /// The issuer for people and for the `iss` of a CWT: the common name, or the whole name in RFC 4514 form.
    pub fn display_name(&self) -> String {
        self.common_name().unwrap_or_else(|| self.subject.to_string())
    }

    /// The subject, which becomes the issuer of what is issued.
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
struct Authority<'a> {
    der: &'a [u8],
    certificate: Certificate,
    public_key: PublicKey,
}

impl<'a> Authority<'a> {
    /// Reads a certificate that has `below` CA certificates under it (RFC 5280 §4.2.1.9).
    fn read(der: &'a [u8], below: usize) -> Result<Self, CertificateError> {
        let unreadable = || CertificateError::unreadable("issuer certificate");
        let certificate = Certificate::from_der(der).map_err(unreadable())?;
        let tbs = certificate.tbs_certificate();
        let refused = |why: &str| Err(CertificateError::Issuer(format!("{}: {why}", tbs.subject())));
        match tbs.get_extension::<BasicConstraints>().map_err(unreadable())? {
            Some((_, constraints)) if constraints.ca => {
                if constraints.path_len_constraint.is_some_and(|most| usize::from(most) < below) {
                    return refused("its path length constraint forbids the authorities under it");
                }
            }
            _ => return refused("it is not a CA (basicConstraints)"),
        }
        match tbs.get_extension::<KeyUsage>().map_err(unreadable())? {
            Some((_, usage)) if usage.key_cert_sign() => {}
            // RFC 5280 §6.1.4 (n): where it is present it must allow signing. Some roots have none; the issuer must.
            None if below > 0 => {}
            _ => return refused("its keyUsage has no keyCertSign"),
        }
        let spki = tbs.subject_public_key_info().to_der().map_err(unreadable())?;
        let public_key =
            PublicKey::from_spki_der(&spki).map_err(CertificateError::key("reading the issuer certificate's key"))?;
        Ok(Self { der, certificate, public_key })
    }

    fn must_be_issued_by(&self, upper: &Self) -> Result<(), CertificateError> {
        let (lower_name, upper_name) =
            (self.certificate.tbs_certificate().issuer(), upper.certificate.tbs_certificate().subject());
        if lower_name != upper_name {
            return Err(CertificateError::Issuer(format!(
                "the file goes on with {upper_name} where {lower_name} should follow"
            )));
        }
        signed::split("issuer certificate", self.der)?.verify(&upper.public_key).map_err(|cause| {
            CertificateError::Issuer(format!(
                "the signature by {upper_name} cannot be confirmed: {cause}; \
                 what stands above the issuer may be left out of the file"
            ))
        })
    }

    fn key_identifier(&self) -> Result<Vec<u8>, CertificateError> {
        let found = self.certificate.tbs_certificate().get_extension::<SubjectKeyIdentifier>();
        match found.map_err(CertificateError::unreadable("issuer certificate"))? {
            Some((_, identifier)) => Ok(identifier.0.as_bytes().to_vec()),
            None => Err(CertificateError::Issuer("it has no subjectKeyIdentifier (RFC 5280 §4.2.1.2)".into())),
        }
    }
}
