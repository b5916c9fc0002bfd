//! Verification of device certificates: signature, and binding to the chip.

use ciborium::Value;
use coset::cwt::{ClaimName, ClaimsSet, Timestamp};
use der::Encode;
use der::asn1::{ObjectIdentifier, PrintableStringRef};
use x509_cert::certificate::{TbsCertificate, Version};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::{GeneralName, HardwareModuleName};

use super::name::SERIAL_NUMBER;
use super::{CertificateError, cwt, signed, tbs};
use crate::keys::PublicKey;
use crate::names::{ChipId, DeviceIdentity};

/// The content of a certificate that the manufacturer signed for the expected chip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifiedCertificate {
    identity: Option<DeviceIdentity>,
    subject_serial_number: String,
    public_key: Option<PublicKey>,
    serial: Vec<u8>,
    hardware_type: ObjectIdentifier,
    not_before: u64,
    not_after: Option<u64>,
}

impl VerifiedCertificate {
    /// The identity, if the certificate states its type: always in a CWT, in X.509 only for an IMEI.
    pub const fn identity(&self) -> Option<&DeviceIdentity> {
        self.identity.as_ref()
    }

    /// The identity's value without its type: the subject's serialNumber.
    pub fn identity_value(&self) -> &str {
        &self.subject_serial_number
    }

    /// Whether the certificate binds `identity`.
    pub fn binds_identity(&self, identity: &DeviceIdentity) -> bool {
        match &self.identity {
            Some(certified) => certified == identity,
            // An IMEI certificate would contain the IMEI's URN.
            None => !matches!(identity, DeviceIdentity::Imei(_)) && identity.value() == self.subject_serial_number,
        }
    }

    /// The device's public key; `None` for a CWT.
    pub const fn public_key(&self) -> Option<&PublicKey> {
        self.public_key.as_ref()
    }

    /// The certificate's serial number, or the CWT's `cti`.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// `hwType`: the hardware's model and revision (RFC 4108 §5).
    pub const fn hardware_type(&self) -> ObjectIdentifier {
        self.hardware_type
    }

    /// Seconds since the Unix epoch. Not compared with the current time.
    pub const fn not_before(&self) -> u64 {
        self.not_before
    }

    /// Seconds since the Unix epoch; `None` for no expiry. Not compared with the current time.
    pub const fn not_after(&self) -> Option<u64> {
        self.not_after
    }
}

/// Verifies that the manufacturer's key signed the certificate, with an algorithm of that key, and that it is for this chip.
/// Validity times are returned, not checked.
pub fn verify_device_certificate(
    bytes: &[u8],
    is_cwt: bool,
    manufacturer: &PublicKey,
    chip: &ChipId,
) -> Result<VerifiedCertificate, CertificateError> {
    let (certified_chip, certificate) = if is_cwt {
        let (_, claims) = cwt::verify(bytes, manufacturer)?;
        from_claims(claims)?
    } else {
        let envelope = signed::split("device certificate", bytes)?;
        envelope.verify(manufacturer)?;
        from_x509(&envelope.certificate()?)?
    };
    if certified_chip == chip.as_bytes() {
        Ok(certificate)
    } else {
        Err(CertificateError::refused("issued for another chip"))
    }
}

fn from_x509(tbs: &TbsCertificate) -> Result<(Vec<u8>, VerifiedCertificate), CertificateError> {
    let unreadable = || CertificateError::unreadable("device certificate");
    if tbs.version() != Version::V3 {
        return Err(CertificateError::refused("not X.509 version 3"));
    }
    let (module, uris) = alternative_names(tbs)?;
    let subject_serial_number = subject_serial_number(tbs)?;
    let identity = parse_imei(&uris, &subject_serial_number)?;
    let spki = tbs.subject_public_key_info().to_der().map_err(unreadable())?;
    let public_key =
        PublicKey::from_spki_der(&spki).map_err(CertificateError::key("parsing the device's public key"))?;
    let seconds = |time: x509_cert::time::Time| time.to_unix_duration().as_secs();
    let validity = tbs.validity();
    let certificate = VerifiedCertificate {
        identity,
        subject_serial_number,
        public_key: Some(public_key),
        serial: tbs.serial_number().as_bytes().to_vec(),
        hardware_type: module.hw_type,
        not_before: seconds(validity.not_before),
        not_after: Some(seconds(validity.not_after)).filter(|time| *time != tbs::NO_EXPIRY),
    };
    Ok((module.hw_serial_num.as_bytes().to_vec(), certificate))
}

fn alternative_names(tbs: &TbsCertificate) -> Result<(HardwareModuleName, Vec<String>), CertificateError> {
    let unreadable = || CertificateError::unreadable("subjectAltName");
    let names = tbs.get_extension::<SubjectAltName>().map_err(unreadable())?;
    let mut modules = Vec::new();
    let mut uris = Vec::new();
    for name in names.map(|(_, names)| names.0).unwrap_or_default() {
        match &name {
            GeneralName::OtherName(other) => {
                modules.extend(HardwareModuleName::from_other_name(other).map_err(unreadable())?);
            }
            GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.to_string()),
            _ => {}
        }
    }
    match <[HardwareModuleName; 1]>::try_from(modules) {
        Ok([module]) => Ok((module, uris)),
        Err(_) => Err(CertificateError::refused("expected exactly one hardwareModuleName (RFC 4108 §5)")),
    }
}

fn subject_serial_number(tbs: &TbsCertificate) -> Result<String, CertificateError> {
    let mut values = tbs.subject().iter().filter(|attribute| attribute.oid == SERIAL_NUMBER);
    match (values.next(), values.next()) {
        (Some(one), None) => one
            .value
            .decode_as::<PrintableStringRef<'_>>()
            .map(|text| text.as_str().to_owned())
            .map_err(CertificateError::unreadable("subject's serialNumber")),
        _ => Err(CertificateError::refused("expected exactly one serialNumber in the subject")),
    }
}

/// The IMEI if there is an IMEI URN, which must match the serialNumber.
fn parse_imei(uris: &[String], serial_number: &str) -> Result<Option<DeviceIdentity>, CertificateError> {
    let mut urns = uris.iter().filter_map(|uri| uri.strip_prefix("urn:gsma:imei:"));
    let (Some(urn), None) = (urns.next(), urns.next()) else {
        return if uris.iter().any(|uri| uri.starts_with("urn:gsma:imei:")) {
            Err(CertificateError::refused("more than one IMEI URN"))
        } else {
            Ok(None)
        };
    };
    match format!("imei:{serial_number}").parse() {
        Ok(DeviceIdentity::Imei(imei)) if urn == format!("{}-{}-0", imei.tac(), imei.snr()) => {
            Ok(Some(DeviceIdentity::Imei(imei)))
        }
        _ => Err(CertificateError::refused("the IMEI URN and the serialNumber differ")),
    }
}

fn from_claims(claims: ClaimsSet) -> Result<(Vec<u8>, VerifiedCertificate), CertificateError> {
    let missing = |what: &str| CertificateError::Cwt(format!("claim {what} is missing or has the wrong type"));
    let subject = claims.subject.as_deref().ok_or_else(|| missing("sub"))?;
    let identity: DeviceIdentity = subject.parse().map_err(|e| CertificateError::Cwt(format!("sub: {e}")))?;
    let private = |key: i64| claims.rest.iter().find(|(name, _)| *name == ClaimName::PrivateUse(key)).map(|(_, v)| v);
    let chip = private(cwt::CHIP_ID_CLAIM).and_then(Value::as_bytes).ok_or_else(|| missing("chip ID"))?;
    let hardware_type = match private(cwt::HARDWARE_TYPE_CLAIM) {
        Some(Value::Tag(cwt::OID_TAG, oid)) => oid.as_bytes().and_then(|ber| ObjectIdentifier::from_bytes(ber).ok()),
        _ => None,
    };
    let seconds = |time: Option<Timestamp>| match time {
        Some(Timestamp::WholeSeconds(whole)) => u64::try_from(whole).ok(),
        _ => None,
    };
    let not_after = match claims.expiration_time {
        None => None,
        given => Some(seconds(given).ok_or_else(|| missing("exp"))?),
    };
    let certificate = VerifiedCertificate {
        subject_serial_number: identity.value(),
        identity: Some(identity),
        public_key: None,
        serial: claims.cwt_id.ok_or_else(|| missing("cti"))?,
        hardware_type: hardware_type.ok_or_else(|| missing("hardware type"))?,
        not_before: seconds(claims.issued_at).ok_or_else(|| missing("iat"))?,
        not_after,
    };
    Ok((chip.clone(), certificate))
}
