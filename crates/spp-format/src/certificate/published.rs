//! Lint of a published certificate by a verifier that knows neither its profile nor its request.

use der::Decode as _;
use der::oid::AssociatedOid as _;
use x509_cert::certificate::{Raw, TbsCertificateInner};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, BasicConstraints, ExtendedKeyUsage, KeyUsage, SubjectAltName};

use super::lint_findings::LintFindings;
use super::tbs::FORBIDDEN_KEY_PURPOSES;
use super::{IssuerCertificate, signed, verify_device_certificate};
use crate::names::{ChipId, DeviceIdentity};

/// The record's claims about its device; its certificate must contain the same values.
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

/// Verifies the signature under one of the issuers, and every rule that is independent of the profile.
pub fn lint_published(
    certificate: &[u8],
    is_cwt: bool,
    claims: &PublishedClaims<'_>,
    issuers: &[IssuerCertificate],
) -> LintFindings {
    let mut findings = LintFindings::default();
    let mut reason = "no issuer known".to_owned();
    let verified = issuers.iter().find_map(|issuer| {
        let verified = verify_device_certificate(certificate, is_cwt, issuer.public_key(), claims.chip);
        verified.map_err(|error| reason = error.to_string()).ok().map(|verified| (issuer, verified))
    });
    let Some((issuer, verified)) = verified else {
        findings.add("signature", reason);
        return findings;
    };
    findings.require(verified.binds_identity(claims.identity), "identity", "differs from the record");
    findings.require(verified.serial() == claims.serial, "serial-number", "differs from the record");
    let public_key = verified.public_key().map(|key| key.spki_der());
    findings.require(public_key == claims.public_key, "public-key", "differs from the record");
    let not_after = verified.not_after().unwrap_or(u64::MAX);
    findings.require(verified.not_before() < not_after, "validity", "notBefore is not before notAfter");
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
    findings.require(tbs.issuer() == issuer.subject(), "issuer", "not the subject of the issuer certificate");
    let serial = tbs.serial_number().as_bytes();
    findings.require((8..=20).contains(&serial.len()), "serial-number", "length not 8 to 20 bytes");
    findings.require(serial.first().is_some_and(|first| first & 0x80 == 0), "serial-number", "not positive");
    let all = tbs.extensions().map(Vec::as_slice).unwrap_or_default();
    for (index, extension) in all.iter().enumerate() {
        let oid = extension.extn_id;
        if all[..index].iter().any(|earlier| earlier.extn_id == oid) {
            findings.add("duplicate-extension", format!("{oid} is duplicated"));
        }
        if extension.critical != (oid == KeyUsage::OID) {
            findings.add("criticality", format!("{oid}: only keyUsage may be critical, and must be"));
        }
    }
    let value = |oid| all.iter().find(|extension| extension.extn_id == oid).map(|e| e.extn_value.as_bytes());
    for oid in [AuthorityKeyIdentifier::OID, KeyUsage::OID, SubjectAltName::OID] {
        if value(oid).is_none() {
            findings.add("missing-extension", format!("{oid} is missing"));
        }
    }
    if let Some(authority) = value(AuthorityKeyIdentifier::OID) {
        let found = AuthorityKeyIdentifier::from_der(authority).ok().and_then(|found| found.key_identifier);
        let same = found.is_some_and(|id| id.as_bytes() == issuer.key_identifier());
        findings.require(same, "authority-key-identifier", "not the issuer's");
    }
    if let Some(Ok(usage)) = value(KeyUsage::OID).map(KeyUsage::from_der) {
        findings.require(usage.digital_signature(), "key-usage", "digitalSignature is missing");
        findings.require(
            !usage.key_cert_sign() && !usage.crl_sign(),
            "key-usage",
            "keyCertSign and cRLSign are forbidden for devices",
        );
    }
    if let Some(Ok(usages)) = value(ExtendedKeyUsage::OID).map(ExtendedKeyUsage::from_der) {
        let forbidden = usages.0.iter().any(|oid| FORBIDDEN_KEY_PURPOSES.contains(oid));
        findings.require(
            !forbidden,
            "extended-key-usage",
            "OCSPSigning and anyExtendedKeyUsage are forbidden for devices",
        );
    }
    findings.require(value(BasicConstraints::OID).is_none(), "basic-constraints", "forbidden for devices");
}
