//! What an offline root answers to the request of a signing key, looked at before it is put to use.

use der::{Decode, Encode};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_cert::Certificate;
use x509_cert::ext::Extension;
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectKeyIdentifier};

use super::{CertificateError, IssuerCertificate, certificate_pem, signed};
use crate::keys::{PublicKey, SignatureAlgorithm};

/// Critical extensions that are understood here (RFC 5280 §4.2): basicConstraints and keyUsage.
const UNDERSTOOD: [&str; 2] = ["2.5.29.19", "2.5.29.15"];

/// Checks the answer to the request of a key: PEM, its certificate first, then those above it; the trusted root apart. The chain up to
/// and with the root as PEM, if everything is as it must be at that time (seconds since the Unix epoch). A key that is a root itself
/// must be allowed authorities under it.
pub fn check_answer(
    answer: &str,
    root: &str,
    key: &PublicKey,
    is_root: bool,
    now: u64,
) -> Result<String, CertificateError> {
    let mut chain = blocks(answer)?;
    let [root] = blocks(root)?.try_into().map_err(|_| refused("the root's file must have exactly one certificate"))?;
    must_be_a_root(&root)?;
    if !chain.contains(&root) {
        chain.push(root.clone());
    }
    if chain.last() != Some(&root) || chain.len() < 2 {
        return Err(refused(
            "the answer must be the key's certificate, then those above it, the root last or left out",
        ));
    }
    let issuer = IssuerCertificate::from_der_chain(chain, SignatureAlgorithm::default_for(key.kind()))?;
    if issuer.public_key() != key {
        return Err(refused("the certificate is of another key than the one on the token"));
    }
    for (lower, upper) in issuer.chain().iter().zip(issuer.chain().iter().skip(1)) {
        must_name_its_issuers_key(&read(lower)?, &read(upper)?)?;
    }
    for der in issuer.chain() {
        must_be_valid(&read(der)?, now)?;
    }
    must_be_an_authority(&read(issuer.as_der())?, is_root)?;
    issuer.chain().iter().map(|der| certificate_pem(der)).collect()
}

fn refused(why: &str) -> CertificateError {
    CertificateError::Issuer(why.to_owned())
}

fn blocks(pem: &str) -> Result<Vec<Vec<u8>>, CertificateError> {
    let blocks = CertificateDer::pem_slice_iter(pem.as_bytes()).map(|block| block.map(|der| der.to_vec()));
    let blocks: Vec<_> = blocks.collect::<Result<_, _>>().map_err(|e| CertificateError::Pem(e.to_string()))?;
    if blocks.is_empty() {
        return Err(CertificateError::Pem("there is no BEGIN CERTIFICATE block".into()));
    }
    Ok(blocks)
}

fn read(der: &[u8]) -> Result<Certificate, CertificateError> {
    Certificate::from_der(der).map_err(CertificateError::unreadable("issuer certificate"))
}

fn must_be_a_root(der: &[u8]) -> Result<(), CertificateError> {
    let certificate = read(der)?;
    let tbs = certificate.tbs_certificate();
    if tbs.issuer() != tbs.subject() {
        return Err(refused("the root's certificate is not self-signed"));
    }
    let spki = tbs.subject_public_key_info().to_der().map_err(CertificateError::unreadable("root certificate"))?;
    let key = PublicKey::from_spki_der(&spki).map_err(CertificateError::key("reading the root's key"))?;
    signed::split("root certificate", der)?.verify(&key)
}

fn must_be_valid(certificate: &Certificate, now: u64) -> Result<(), CertificateError> {
    let (subject, validity) = (certificate.tbs_certificate().subject(), certificate.tbs_certificate().validity());
    let [begin, end] = [validity.not_before, validity.not_after].map(|time| time.to_unix_duration().as_secs());
    if now < begin {
        return Err(refused(&format!("{subject}: it is not valid before {}", validity.not_before)));
    }
    if end < now {
        return Err(refused(&format!("{subject}: it ended at {}", validity.not_after)));
    }
    Ok(())
}

/// RFC 5280 §4.2.1.1: where it is there, it must be that of the key above.
fn must_name_its_issuers_key(lower: &Certificate, upper: &Certificate) -> Result<(), CertificateError> {
    let unreadable = || CertificateError::unreadable("issuer certificate");
    let named = lower.tbs_certificate().get_extension::<AuthorityKeyIdentifier>().map_err(unreadable())?;
    let above = upper.tbs_certificate().get_extension::<SubjectKeyIdentifier>().map_err(unreadable())?;
    match (named.and_then(|(_, named)| named.key_identifier), above) {
        (Some(named), Some((_, above))) if named != above.0 => {
            let subject = lower.tbs_certificate().subject();
            Err(refused(&format!("{subject}: its authorityKeyIdentifier is not that of the certificate above it")))
        }
        _ => Ok(()),
    }
}

/// RFC 5280 §4.2.1.9, §4.2.1.3: a CA says so in critical extensions; one that is critical and unknown forbids the use (§4.2).
fn must_be_an_authority(certificate: &Certificate, is_root: bool) -> Result<(), CertificateError> {
    let tbs = certificate.tbs_certificate();
    let unreadable = || CertificateError::unreadable("issuer certificate");
    let constraints = tbs.get_extension::<BasicConstraints>().map_err(unreadable())?;
    let Some((true, BasicConstraints { ca: true, path_len_constraint })) = constraints else {
        return Err(refused("basicConstraints must be critical and say CA"));
    };
    if is_root && path_len_constraint == Some(0) {
        return Err(refused("its path length constraint forbids the authorities under it"));
    }
    let usage = tbs.get_extension::<KeyUsage>().map_err(unreadable())?;
    if !usage.is_some_and(|(critical, usage)| critical && usage.key_cert_sign()) {
        return Err(refused("keyUsage must be critical and have keyCertSign"));
    }
    let unknown =
        |extension: &&Extension| extension.critical && !UNDERSTOOD.contains(&extension.extn_id.to_string().as_str());
    match tbs.extensions().and_then(|extensions| extensions.iter().find(unknown)) {
        Some(extension) => Err(refused(&format!("it has an unknown critical extension, {}", extension.extn_id))),
        None => Ok(()),
    }
}
