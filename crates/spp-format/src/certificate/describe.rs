//! Human-readable fields of a device certificate. Verifies nothing.

use coset::cwt::{ClaimName, ClaimsSet, Timestamp};
use coset::{CborSerializable as _, CoseSign1, TaggedCborSerializable as _};
use der::{Decode as _, Encode as _};
use x509_cert::Certificate;
use x509_cert::ext::pkix::name::{GeneralName, HardwareModuleName};
use x509_cert::ext::pkix::{KeyUsage, SubjectAltName};
use x509_cert::name::Name;

use super::{CertificateError, cwt};
use crate::keys::PublicKey;

/// One field of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateField {
    /// The field's name.
    pub name: &'static str,
    /// The field's value.
    pub value: String,
    /// Whether the value is hex-encoded bytes.
    pub is_bytes: bool,
}

fn text_field(name: &'static str, value: impl ToString) -> CertificateField {
    CertificateField { name, value: value.to_string(), is_bytes: false }
}

fn bytes_field(name: &'static str, value: &[u8]) -> CertificateField {
    CertificateField { name, value: hex::encode(value), is_bytes: true }
}

/// Lists the certificate's fields in the order of the certificate.
pub fn describe(certificate: &[u8], is_cwt: bool) -> Result<Vec<CertificateField>, CertificateError> {
    if is_cwt { describe_cwt(certificate) } else { describe_x509(certificate) }
}

fn describe_x509(der: &[u8]) -> Result<Vec<CertificateField>, CertificateError> {
    let unreadable = || CertificateError::unreadable("device certificate");
    let certificate = Certificate::from_der(der).map_err(unreadable())?;
    let tbs = certificate.tbs_certificate();
    let spki = tbs.subject_public_key_info().to_der().map_err(unreadable())?;
    let mut fields = vec![
        text_field("Subject", name(tbs.subject())),
        text_field("Issuer", name(tbs.issuer())),
        bytes_field("Serial number", tbs.serial_number().as_bytes()),
        text_field("Valid from", tbs.validity().not_before),
        text_field("Valid until", tbs.validity().not_after),
    ];
    if let Ok(key) = PublicKey::from_spki_der(&spki) {
        fields.push(text_field("Public key", key.kind().name()));
        fields.push(bytes_field("SHA-256 of the public key", &key.fingerprint()));
    }
    if let Ok(Some((_, names))) = tbs.get_extension::<SubjectAltName>() {
        for alternative in &names.0 {
            match alternative {
                GeneralName::OtherName(other) => {
                    if let Ok(Some(module)) = HardwareModuleName::from_other_name(other) {
                        fields.push(text_field("Hardware type", module.hw_type));
                        fields.push(bytes_field("Hardware serial number", module.hw_serial_num.as_bytes()));
                    }
                }
                GeneralName::UniformResourceIdentifier(uri) => fields.push(text_field("Alternative name", uri)),
                _ => {}
            }
        }
    }
    if let Ok(Some((_, usage))) = tbs.get_extension::<KeyUsage>() {
        let uses = [(usage.digital_signature(), "digital signature"), (usage.key_encipherment(), "key encipherment")];
        let uses: Vec<_> = uses.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
        fields.push(text_field("Key usage", uses.join(", ")));
    }
    Ok(fields)
}

/// Formats a name as RFC 4514 does, with a space after each comma.
fn name(name: &Name) -> String {
    let parts: Vec<_> = name.iter_rdn().map(ToString::to_string).collect();
    parts.join(", ")
}

fn describe_cwt(cwt: &[u8]) -> Result<Vec<CertificateField>, CertificateError> {
    let message = CoseSign1::from_tagged_slice(cwt).map_err(cwt::cwt_error)?;
    let claims = ClaimsSet::from_slice(message.payload.as_deref().unwrap_or_default()).map_err(cwt::cwt_error)?;
    let mut fields = Vec::new();
    fields.extend(claims.subject.map(|subject| text_field("Subject", subject)));
    fields.extend(claims.issuer.map(|issuer| text_field("Issuer", issuer)));
    fields.extend(claims.cwt_id.map(|id| bytes_field("Serial number", &id)));
    let time = |time: Timestamp| match time {
        Timestamp::WholeSeconds(seconds) => time::OffsetDateTime::from_unix_timestamp(seconds).ok(),
        Timestamp::FractionalSeconds(_) => None,
    };
    fields.extend(claims.issued_at.and_then(time).map(|time| text_field("Valid from", time)));
    fields.extend(claims.expiration_time.and_then(time).map(|time| text_field("Valid until", time)));
    for (claim, value) in &claims.rest {
        if *claim == ClaimName::PrivateUse(cwt::CHIP_ID_CLAIM)
            && let Some(chip) = value.as_bytes()
        {
            fields.push(bytes_field("Hardware serial number", chip));
        }
    }
    Ok(fields)
}
