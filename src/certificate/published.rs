//! A certificate that is public, looked at by somebody who knows neither its profile nor its request: what must be true of each.

use der::Decode as _;
use der::oid::AssociatedOid as _;
use x509_cert::certificate::{Raw, TbsCertificateInner};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, KeyUsage, SubjectAltName};

use super::lint::LintFindings;
use super::{IssuerCertificate, signed, verify_device_certificate};
use crate::names::{ChipId, DeviceIdentity};

/// What a record says of its device; its certificate must say the same.
#[derive(Debug, Clone, Copy)]
pub struct PublishedClaims<'a> {
    /// The chip.
    pub chip: &'a ChipId,
    /// The identity.
    pub identity: &'a DeviceIdentity,
    /// The certificate's serial number, or the CWT's `cti`.
    pub serial: &'a [u8],
    /// The public key, SubjectPublicKeyInfo in DER.
    pub public_key: Option<&'a [u8]>,
}

/// Verifies the signature under one of the issuers, and every rule that no profile can change.
pub fn lint_published(
    certificate: &[u8],
    is_cwt: bool,
    claims: &PublishedClaims<'_>,
    issuers: &[IssuerCertificate],
) -> LintFindings {
    let mut findings = LintFindings::default();
    let mut why = "no issuer is known".to_owned();
    let verified = issuers.iter().find_map(|issuer| {
        let verified = verify_device_certificate(certificate, is_cwt, issuer.public_key(), claims.chip);
        verified.map_err(|error| why = error.to_string()).ok().map(|verified| (issuer, verified))
    });
    let Some((issuer, verified)) = verified else {
        findings.add("signature", why);
        return findings;
    };
    findings.must(verified.is_for(claims.identity), "identity", "it is not the record's");
    findings.must(verified.serial() == claims.serial, "serial-number", "it is not the record's");
    let public_key = verified.public_key().map(|key| key.spki_der());
    findings.must(public_key == claims.public_key, "public-key", "it is not the record's");
    let ends = verified.not_after().unwrap_or(u64::MAX);
    findings.must(verified.not_before() < ends, "validity", "notBefore is not before notAfter");
    if !is_cwt {
        x509(certificate, issuer, &mut findings);
    }
    findings
}

fn x509(certificate: &[u8], issuer: &IssuerCertificate, findings: &mut LintFindings) {
    let parsed = signed::split("device certificate", certificate).map_err(|e| e.to_string());
    let tbs =
        parsed.and_then(|parts| TbsCertificateInner::<Raw>::from_der(parts.to_be_signed).map_err(|e| e.to_string()));
    let tbs = match tbs {
        Ok(tbs) => tbs,
        Err(cause) => return findings.add("structure", cause),
    };
    findings.must(tbs.issuer() == issuer.subject(), "issuer", "it is not the subject of the issuer's certificate");
    let serial = tbs.serial_number().as_bytes();
    findings.must((8..=20).contains(&serial.len()), "serial-number", "it has not 8 to 20 bytes");
    findings.must(serial.first().is_some_and(|first| first & 0x80 == 0), "serial-number", "it is not positive");
    let all = tbs.extensions().map(Vec::as_slice).unwrap_or_default();
    for (index, extension) in all.iter().enumerate() {
        let oid = extension.extn_id;
        if all[..index].iter().any(|earlier| earlier.extn_id == oid) {
            findings.add("duplicate-extension", format!("{oid} is there twice"));
        }
        if extension.critical != (oid == KeyUsage::OID) {
            findings.add("criticality", format!("{oid}: keyUsage is critical, everything else is not"));
        }
    }
    let value = |oid| all.iter().find(|extension| extension.extn_id == oid).map(|e| e.extn_value.as_bytes());
    for oid in [AuthorityKeyIdentifier::OID, KeyUsage::OID, SubjectAltName::OID] {
        if value(oid).is_none() {
            findings.add("missing-extension", format!("{oid} is not there"));
        }
    }
    if let Some(authority) = value(AuthorityKeyIdentifier::OID) {
        let found = AuthorityKeyIdentifier::from_der(authority).ok().and_then(|found| found.key_identifier);
        let same = found.is_some_and(|id| id.as_bytes() == issuer.key_identifier());
        findings.must(same, "authority-key-identifier", "it is not the issuer's");
    }
    if let Some(Ok(usage)) = value(KeyUsage::OID).map(KeyUsage::from_der) {
        findings.must(usage.digital_signature(), "key-usage", "digitalSignature is missing");
        findings.must(
            !usage.key_cert_sign() && !usage.crl_sign(),
            "key-usage",
            "a device may sign certificates with it",
        );
    }
    findings.must(value(BasicConstraints::OID).is_none(), "basic-constraints", "a device is no authority");
}
