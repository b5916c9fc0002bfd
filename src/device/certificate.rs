//! The one place where the device verifies a certificate.

use coset::{CoseSign1, TaggedCborSerializable as _};
use der::asn1::{ObjectIdentifier, OctetString};
use der::{Decode as _, Encode as _, Sequence};
use x509_cert::Certificate;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::DeviceError;
use crate::keys::{KeyKind, PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed};
use crate::names::{ChipId, DeviceIdentity};

/// What a certificate says whose signature is the manufacturer's and which is for the chip in question.
pub(super) struct VerifiedCertificate {
    /// The identity's kind is in a CWT alone.
    kind: Option<String>,
    value: String,
    public_key: Option<PublicKey>,
}

impl VerifiedCertificate {
    /// The device's public key; none in a CWT.
    pub(super) const fn public_key(&self) -> Option<&PublicKey> {
        self.public_key.as_ref()
    }

    /// The identity's value without its kind: the subject's serialNumber.
    pub(super) fn identity_value(&self) -> &str {
        &self.value
    }

    /// Whether the certificate binds this identity.
    pub(super) fn is_for(&self, identity: &DeviceIdentity) -> bool {
        self.kind.as_ref().is_none_or(|kind| kind == identity.kind()) && self.value == identity.value()
    }
}

/// Verifies that the manufacturer bound an identity to this chip.
pub(super) fn verify_certificate(
    octets: &[u8],
    is_cwt: bool,
    manufacturer: &PublicKey,
    chip: &ChipId,
) -> Result<VerifiedCertificate, DeviceError> {
    let verified =
        if is_cwt { verify_cwt(octets, manufacturer, chip) } else { verify_x509(octets, manufacturer, chip) };
    verified.map_err(DeviceError::Certificate)
}

/// `id-on-hardwareModuleName`, RFC 4108 §5.
const HARDWARE_MODULE_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.8.4");
/// `serialNumber`, X.520 §6.2.9.
const SERIAL_NUMBER: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.5");
/// `ecdsa-with-SHA256` and `-SHA384` (RFC 5758 §3.2), `sha256WithRSAEncryption` and `id-RSASSA-PSS` (RFC 4055), `id-Ed25519`
/// (RFC 8410).
const ALGORITHMS: [(ObjectIdentifier, SignatureAlgorithm); 5] = [
    (ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.2"), SignatureAlgorithm::EcdsaP256Sha256),
    (ObjectIdentifier::new_unwrap("1.2.840.10045.4.3.3"), SignatureAlgorithm::EcdsaP384Sha384),
    (ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.11"), SignatureAlgorithm::RsaPkcs1Sha256),
    (ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10"), SignatureAlgorithm::RsaPssSha256),
    (ObjectIdentifier::new_unwrap("1.3.101.112"), SignatureAlgorithm::Ed25519),
];
/// Claims of the CWT: `sub` (RFC 8392 §3.1.2), and the chip ID under a key for private use (RFC 8392 §9.1).
const SUB: i64 = 2;
const CHIP: i64 = -70_001;

#[derive(Sequence)]
struct HardwareModuleName {
    hw_type: ObjectIdentifier,
    hw_serial_num: OctetString,
}

fn verify_x509(octets: &[u8], manufacturer: &PublicKey, chip: &ChipId) -> Result<VerifiedCertificate, String> {
    let certificate = Certificate::from_der(octets).map_err(|e| format!("it is not X.509: {e}"))?;
    let tbs = certificate.tbs_certificate();
    let said = certificate.signature_algorithm();
    let algorithm = ALGORITHMS.iter().find(|(oid, _)| *oid == said.oid && tbs.signature() == said);
    let (_, algorithm) = algorithm.ok_or_else(|| format!("its signature algorithm {} is not known", said.oid))?;
    let signed = tbs.to_der().map_err(|e| e.to_string())?;
    let signature = certificate.signature().as_bytes().unwrap_or_default();
    manufacturer.verify(*algorithm, &signed, signature).map_err(|e| format!("not signed by the manufacturer: {e}"))?;

    let (_, names) = tbs.get_extension::<SubjectAltName>().map_err(|e| e.to_string())?.ok_or("it names no chip")?;
    let mut chips = names.0.iter().filter_map(|name| match name {
        GeneralName::OtherName(other) if other.type_id == HARDWARE_MODULE_NAME => Some(&other.value),
        _ => None,
    });
    let (Some(value), None) = (chips.next(), chips.next()) else {
        return Err("it does not name exactly one chip".into());
    };
    let named: HardwareModuleName = value.decode_as().map_err(|e| format!("its chip cannot be read: {e}"))?;
    expect_chip(named.hw_serial_num.as_bytes(), chip)?;

    let public_key = tbs.subject_public_key_info().to_der().map_err(|e| e.to_string())?;
    let subject =
        tbs.subject().iter().find(|attribute| attribute.oid == SERIAL_NUMBER).ok_or("it has no serialNumber")?;
    let value = std::str::from_utf8(subject.value.value()).map_err(|e| e.to_string())?.to_owned();
    let public_key = PublicKey::from_spki_der(&public_key).map_err(|e| e.to_string())?;
    Ok(VerifiedCertificate { kind: None, value, public_key: Some(public_key) })
}

fn verify_cwt(octets: &[u8], manufacturer: &PublicKey, chip: &ChipId) -> Result<VerifiedCertificate, String> {
    let cwt = CoseSign1::from_tagged_slice(octets).map_err(|e| format!("it is not a CWT: {e}"))?;
    let kind = manufacturer.kind();
    let algorithm = match kind.rsa_bits() {
        Some(_) => SignatureAlgorithm::RsaPssSha256,
        None => SignatureAlgorithm::default_for(kind),
    };
    cwt.verify_signature(&[], |signature, message| {
        let ecdsa = matches!(kind, KeyKind::P256 | KeyKind::P384);
        let der = if ecdsa { ecdsa_der_from_fixed(signature).unwrap_or_default() } else { signature.to_vec() };
        manufacturer.verify(algorithm, message, &der)
    })
    .map_err(|e| format!("not signed by the manufacturer: {e}"))?;

    let payload = cwt.payload.unwrap_or_default();
    let claims: ciborium::Value = ciborium::from_reader(payload.as_slice()).map_err(|e| e.to_string())?;
    let claims = claims.into_map().map_err(|_| "its claims are no map")?;
    let claim = |key: i64| claims.iter().find(|(found, _)| *found == key.into()).map(|(_, value)| value);
    expect_chip(claim(CHIP).and_then(ciborium::Value::as_bytes).ok_or("it names no chip")?, chip)?;
    let identity = claim(SUB).and_then(ciborium::Value::as_text).ok_or("it names no identity")?;
    let identity: DeviceIdentity = identity.parse().map_err(|e| format!("its sub: {e}"))?;
    Ok(VerifiedCertificate { kind: Some(identity.kind().to_owned()), value: identity.value(), public_key: None })
}

fn expect_chip(found: &[u8], chip: &ChipId) -> Result<(), String> {
    if found == chip.as_bytes() {
        Ok(())
    } else {
        Err(format!("it is for chip {}, this is chip {chip}", hex::encode(found)))
    }
}
