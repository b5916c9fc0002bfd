//! Lint of CWTs: checks the Sig_structure to be signed with a generic CBOR decoder.

use ciborium::Value;
use coset::CborSerializable;

use super::algorithm;
use super::cwt::{CHIP_ID_CLAIM, HARDWARE_TYPE_CLAIM, OID_TAG, SigStructure};
use super::lint_findings::LintFindings;
use super::request::CertificateRequest;

/// Checks that header parameters and claims are exactly the expected ones in exactly this order, which excludes duplicates,
/// additions and other encodings.
pub(super) fn check_all(request: &CertificateRequest<'_>, to_be_signed: &[u8], findings: &mut LintFindings) {
    let parts = match SigStructure::decode(to_be_signed) {
        Ok(parts) => parts,
        Err(cause) => return findings.add("structure", cause),
    };
    if !request.profile.is_cwt() {
        findings.add("public-key", "the profile requires a key pair, but the certificate has no public key");
    }
    header(request, &parts.protected, findings);
    claims(request, &parts.payload, findings);
}

/// RFC 9052 §3.1: alg and kid.
fn header(request: &CertificateRequest<'_>, bytes: &[u8], findings: &mut LintFindings) {
    let expected = [
        (1, "algorithm", Value::from(algorithm::cose(request.algorithm()) as i64)),
        (4, "key-id", Value::Bytes(request.issuer.key_identifier().to_vec())),
    ];
    compare("header", bytes, &expected, findings);
    let fits = request.algorithm().fits(request.issuer.public_key().kind());
    findings.require(fits, "algorithm", "does not match the issuer's key type");
}

/// RFC 8392 §3.1.
fn claims(request: &CertificateRequest<'_>, bytes: &[u8], findings: &mut LintFindings) {
    let days = request.profile.certificate().validity_days;
    let expiry = days.map(|days| Value::from(request.not_before.saturating_add(86_400 * u64::from(days))));
    let hardware_type = Value::Bytes(request.profile.hardware_type().as_bytes().to_vec());
    let mut expected = vec![
        (1, "issuer", Value::from(request.issuer.display_name())),
        (2, "subject", Value::from(request.identity.to_string())),
    ];
    expected.extend(expiry.map(|expiry| (4, "validity", expiry)));
    expected.extend([
        (6, "validity", Value::from(request.not_before)),
        (7, "serial-number", Value::Bytes(request.serial.as_bytes().to_vec())),
        (CHIP_ID_CLAIM, "chip-id", Value::Bytes(request.chip.as_bytes().to_vec())),
        (HARDWARE_TYPE_CLAIM, "hardware-type", Value::Tag(OID_TAG, Box::new(hardware_type))),
    ]);
    compare("claims", bytes, &expected, findings);
}

fn compare(what: &str, bytes: &[u8], expected: &[(i64, &'static str, Value)], findings: &mut LintFindings) {
    let Some(found) = Value::from_slice(bytes).ok().and_then(|value| value.into_map().ok()) else {
        return findings.add("structure", format!("{what}: not a CBOR map"));
    };
    let keys = |(key, _): &(Value, Value)| key.clone();
    if !found.iter().map(keys).eq(expected.iter().map(|(key, ..)| Value::from(*key))) {
        return findings.add("structure", format!("the {what} map does not have exactly the expected keys in order"));
    }
    for ((key, value), (_, rule, expected)) in found.iter().zip(expected) {
        if value != expected {
            findings.add(rule, format!("{what} {key:?} differs from the request"));
        }
    }
    let same = Value::Map(found).to_vec().is_ok_and(|encoded| encoded == bytes);
    findings.require(same, "structure", "not deterministic CBOR (RFC 8949 §4.2.1)");
}
