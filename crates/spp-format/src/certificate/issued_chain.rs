//! Verification of the certificate chain that an offline root issues for a signing key, before the chain is installed.

use der::{Decode, Encode};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_cert::Certificate;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectKeyIdentifier};

use super::{CertificateError, IssuerCertificate, certificate_pem, signed};
use crate::keys::{PublicKey, SignatureAlgorithm};

/// Critical extensions that this module processes (RFC 5280 §4.2): basicConstraints and keyUsage.
const UNDERSTOOD: [&str; 2] = ["2.5.29.19", "2.5.29.15"];

/// Verifies the PEM chain issued for the CSR of `key`: the key's certificate first, then its issuers; `root` is the trusted
/// root's PEM. Returns the chain including the root as PEM if every check holds at `now` (seconds since the Unix epoch). If the
/// key is itself a root, its path length must allow subordinate CAs.
pub fn verify_issued_chain(
    issued: &str,
    root: &str,
    key: &PublicKey,
    is_root: bool,
    now: u64,
) -> Result<String, CertificateError> {
    let mut chain = pem_certificates(issued)?;
    let [root] = pem_certificates(root)?
        .try_into()
        .map_err(|_| unusable("the root file must contain exactly one certificate"))?;
    check_root(&root)?;
    if !chain.contains(&root) {
        chain.push(root.clone());
    }
    if chain.last() != Some(&root) || chain.len() < 2 {
        return Err(unusable("expected the key's certificate first, then its issuers, the root last or omitted"));
    }
    let issuer = IssuerCertificate::from_der_chain(chain, SignatureAlgorithm::default_for(key.kind()))?;
    if issuer.public_key() != key {
        return Err(unusable("the certificate's public key is not the token's key"));
    }
    for (lower, upper) in issuer.chain().iter().zip(issuer.chain().iter().skip(1)) {
        check_authority_key_identifier(&parse(lower)?, &parse(upper)?)?;
    }
    for der in issuer.chain() {
        check_validity(&parse(der)?, now)?;
    }
    check_ca_extensions(&parse(issuer.as_der())?, is_root)?;
    issuer.chain().iter().map(|der| certificate_pem(der)).collect()
}

fn unusable(reason: &str) -> CertificateError {
    CertificateError::Issuer(reason.to_owned())
}

fn pem_certificates(pem: &str) -> Result<Vec<Vec<u8>>, CertificateError> {
    let blocks = CertificateDer::pem_slice_iter(pem.as_bytes()).map(|block| block.map(|der| der.to_vec()));
    let blocks: Vec<_> = blocks.collect::<Result<_, _>>().map_err(|e| CertificateError::Pem(e.to_string()))?;
    if blocks.is_empty() {
        return Err(CertificateError::Pem("no BEGIN CERTIFICATE block".into()));
    }
    Ok(blocks)
}

fn parse(der: &[u8]) -> Result<Certificate, CertificateError> {
    Certificate::from_der(der).map_err(CertificateError::unreadable("issuer certificate"))
}

fn check_root(der: &[u8]) -> Result<(), CertificateError> {
    let certificate = parse(der)?;
    let tbs = certificate.tbs_certificate();
    if tbs.issuer() != tbs.subject() {
        return Err(unusable("the root certificate is not self-signed"));
    }
    let spki = tbs.subject_public_key_info().to_der().map_err(CertificateError::unreadable("root certificate"))?;
    let key = PublicKey::from_spki_der(&spki).map_err(CertificateError::key("parsing the root's public key"))?;
    signed::split("root certificate", der)?.verify(&key)
}

fn check_validity(certificate: &Certificate, now: u64) -> Result<(), CertificateError> {
    let (subject, validity) = (certificate.tbs_certificate().subject(), certificate.tbs_certificate().validity());
    let [begin, end] = [validity.not_before, validity.not_after].map(|time| time.to_unix_duration().as_secs());
    if now < begin {
        return Err(unusable(&format!("{subject}: not valid before {}", validity.not_before)));
    }
    if end < now {
        return Err(unusable(&format!("{subject}: expired at {}", validity.not_after)));
    }
    Ok(())
}

/// RFC 5280 §4.2.1.1: an authorityKeyIdentifier, if present, must match the issuer's subjectKeyIdentifier.
fn check_authority_key_identifier(lower: &Certificate, upper: &Certificate) -> Result<(), CertificateError> {
    let unreadable = || CertificateError::unreadable("issuer certificate");
    let authority = lower.tbs_certificate().get_extension::<AuthorityKeyIdentifier>().map_err(unreadable())?;
    let subject = upper.tbs_certificate().get_extension::<SubjectKeyIdentifier>().map_err(unreadable())?;
    match (authority.and_then(|(_, authority)| authority.key_identifier), subject) {
        (Some(authority), Some((_, subject))) if authority != subject.0 => {
            let subject = lower.tbs_certificate().subject();
            Err(unusable(&format!(
                "{subject}: authorityKeyIdentifier does not match the issuer's subjectKeyIdentifier"
            )))
        }
        _ => Ok(()),
    }
}

/// RFC 5280 §4.2.1.9, §4.2.1.3: a CA has critical basicConstraints and keyUsage; an unknown critical extension forbids use
/// (§4.2).
fn check_ca_extensions(certificate: &Certificate, is_root: bool) -> Result<(), CertificateError> {
    let tbs = certificate.tbs_certificate();
    let unreadable = || CertificateError::unreadable("issuer certificate");
    let constraints = tbs.get_extension::<BasicConstraints>().map_err(unreadable())?;
    let Some((true, BasicConstraints { ca: true, path_len_constraint })) = constraints else {
        return Err(unusable("basicConstraints must be critical with cA TRUE"));
    };
    if is_root && path_len_constraint == Some(0) {
        return Err(unusable("the path length constraint forbids subordinate CAs"));
    }
    let usage = tbs.get_extension::<KeyUsage>().map_err(unreadable())?;
    if !usage.is_some_and(|(critical, usage)| critical && usage.key_cert_sign()) {
        return Err(unusable("keyUsage must be critical and include keyCertSign"));
    }
    let unknown =
        |extension: &&Extension| extension.critical && !UNDERSTOOD.contains(&extension.extn_id.to_string().as_str());
    match tbs.extensions().and_then(|extensions| extensions.iter().find(unknown)) {
        Some(extension) => Err(unusable(&format!("unknown critical extension {}", extension.extn_id))),
        None => Ok(()),
    }
}
