//! A device certificate in words, for people. Nothing is verified here.

use coset::cwt::{ClaimName, ClaimsSet, Timestamp};
use coset::{CborSerializable as _, CoseSign1, TaggedCborSerializable as _};
use der::{Decode as _, Encode as _};
use x509_cert::Certificate;
use x509_cert::ext::pkix::name::{GeneralName, HardwareModuleName};
use x509_cert::ext::pkix::{KeyUsage, SubjectAltName};
use x509_cert::name::Name;

use super::{CertificateError, cwt};
use crate::keys::PublicKey;

/// One thing that a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// Of what.
    pub name: &'static str,
    /// What.
    pub value: String,
    /// Whether it is bytes, in hex.
    pub is_bytes: bool,
}

fn words(name: &'static str, value: impl ToString) -> Statement {
    Statement { name, value: value.to_string(), is_bytes: false }
}

fn bytes(name: &'static str, value: &[u8]) -> Statement {
    Statement { name, value: hex::encode(value), is_bytes: true }
}

/// What the certificate says, in the order in which it says it.
pub fn describe(certificate: &[u8], is_cwt: bool) -> Result<Vec<Statement>, CertificateError> {
    if is_cwt { describe_cwt(certificate) } else { describe_x509(certificate) }
}

fn describe_x509(der: &[u8]) -> Result<Vec<Statement>, CertificateError> {
    let unreadable = || CertificateError::unreadable("device certificate");
    let certificate = Certificate::from_der(der).map_err(unreadable())?;
    let tbs = certificate.tbs_certificate();
    let spki = tbs.subject_public_key_info().to_der().map_err(unreadable())?;
    let mut said = vec![
        words("Subject", name(tbs.subject())),
        words("Issuer", name(tbs.issuer())),
        bytes("Serial number", tbs.serial_number().as_bytes()),
        words("Valid from", tbs.validity().not_before),
        words("Valid until", tbs.validity().not_after),
    ];
    if let Ok(key) = PublicKey::from_spki_der(&spki) {
        said.push(words("Public key", key.kind().name()));
        said.push(bytes("SHA-256 of the public key", &key.fingerprint()));
    }
    if let Ok(Some((_, names))) = tbs.get_extension::<SubjectAltName>() {
        for found in &names.0 {
            match found {
                GeneralName::OtherName(other) => {
                    if let Ok(Some(module)) = HardwareModuleName::from_other_name(other) {
                        said.push(words("Hardware type", module.hw_type));
                        said.push(bytes("Hardware serial number", module.hw_serial_num.as_bytes()));
                    }
                }
                GeneralName::UniformResourceIdentifier(uri) => said.push(words("Alternative name", uri)),
                _ => {}
            }
        }
    }
    if let Ok(Some((_, usage))) = tbs.get_extension::<KeyUsage>() {
        let uses = [(usage.digital_signature(), "digital signature"), (usage.key_encipherment(), "key encipherment")];
        let uses: Vec<_> = uses.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
        said.push(words("Key usage", uses.join(", ")));
    }
    Ok(said)
}

/// As RFC 4514 writes it, with room between the parts.
fn name(name: &Name) -> String {
    let parts: Vec<_> = name.iter_rdn().map(ToString::to_string).collect();
    parts.join(", ")
}

fn describe_cwt(bytes_of: &[u8]) -> Result<Vec<Statement>, CertificateError> {
    let message = CoseSign1::from_tagged_slice(bytes_of).map_err(cwt::cwt_error)?;
    let claims = ClaimsSet::from_slice(message.payload.as_deref().unwrap_or_default()).map_err(cwt::cwt_error)?;
    let mut said = Vec::new();
    said.extend(claims.subject.map(|subject| words("Subject", subject)));
    said.extend(claims.issuer.map(|issuer| words("Issuer", issuer)));
    said.extend(claims.cwt_id.map(|id| bytes("Serial number", &id)));
    let time = |time: Timestamp| match time {
        Timestamp::WholeSeconds(seconds) => time::OffsetDateTime::from_unix_timestamp(seconds).ok(),
        Timestamp::FractionalSeconds(_) => None,
    };
    said.extend(claims.issued_at.and_then(time).map(|at| words("Valid from", at)));
    said.extend(claims.expiration_time.and_then(time).map(|at| words("Valid until", at)));
    for (claim, value) in &claims.rest {
        if *claim == ClaimName::PrivateUse(cwt::CHIP_ID_CLAIM)
            && let Some(chip) = value.as_bytes()
        {
            said.push(bytes("Hardware serial number", chip));
        }
    }
    Ok(said)
}
