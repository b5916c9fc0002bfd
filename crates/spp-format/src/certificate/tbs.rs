//! Encoding of the TBSCertificate (RFC 5280 §4.1) and of parts that all certificate types share.

use std::time::Duration;

use der::asn1::{Ia5String, ObjectIdentifier, OctetString};
use der::oid::AssociatedOid;
use der::{DateTime, Decode, Encode, Sequence};
use spki::{AlgorithmIdentifierOwned, SubjectPublicKeyInfoOwned};
use x509_cert::certificate::Version;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::{Extension, Extensions};
use x509_cert::name::Name;
use x509_cert::serial_number::SerialNumber;
use x509_cert::time::{Time, Validity};

use super::request::CertificateSerial;
use super::{CertificateError, algorithm};
use crate::keys::{PublicKey, SignatureAlgorithm, sha256};

/// Seconds of 99991231235959Z, which means "no well-defined expiration date" (RFC 5280 §4.1.2.5).
pub(super) const NO_EXPIRY: u64 = 253_402_300_799;

/// Key purposes that no device certificate may have: OCSPSigning (RFC 6960 §4.2.2.2), because such a key may vouch for the
/// status of every certificate of its issuer, and anyExtendedKeyUsage (RFC 5280 §4.2.1.12), because it includes the former.
pub(super) const FORBIDDEN_KEY_PURPOSES: [ObjectIdentifier; 2] =
    [ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.3.9"), ObjectIdentifier::new_unwrap("2.5.29.37.0")];

/// The TBSCertificate. Defined here because the library's builder cannot set its fields.
#[derive(Clone, Sequence)]
pub(super) struct TbsCertificate {
    #[asn1(context_specific = "0", default = "Default::default")]
    pub(super) version: Version,
    pub(super) serial: SerialNumber,
    pub(super) algorithm: AlgorithmIdentifierOwned,
    pub(super) issuer: Name,
    pub(super) validity: Validity,
    pub(super) subject: Name,
    pub(super) public_key: SubjectPublicKeyInfoOwned,
    #[asn1(context_specific = "3", tag_mode = "EXPLICIT", optional = "true")]
    pub(super) extensions: Option<Extensions>,
}

/// The variable content of a certificate.
pub(super) struct TbsFields<'a> {
    pub(super) serial: CertificateSerial,
    pub(super) algorithm: SignatureAlgorithm,
    pub(super) issuer: Name,
    /// Seconds since the Unix epoch.
    pub(super) not_before: u64,
    /// Seconds since the Unix epoch.
    pub(super) not_after: u64,
    pub(super) subject: Name,
    pub(super) public_key: &'a PublicKey,
    pub(super) extensions: Extensions,
}

/// Encodes the bytes to be signed.
pub(super) fn encode(fields: TbsFields<'_>) -> Result<Vec<u8>, CertificateError> {
    let algorithm = algorithm::identifier(fields.algorithm)?;
    let build = || {
        TbsCertificate {
            version: Version::V3,
            serial: SerialNumber::new(fields.serial.as_bytes())?,
            algorithm,
            issuer: fields.issuer,
            validity: Validity::new(time(fields.not_before)?, time(fields.not_after)?),
            subject: fields.subject,
            public_key: SubjectPublicKeyInfoOwned::from_der(fields.public_key.spki_der())?,
            extensions: Some(fields.extensions),
        }
        .to_der()
    };
    build().map_err(CertificateError::unwritable("certificate"))
}

/// Encodes a time: UTCTime through 2049, GeneralizedTime from 2050 (RFC 5280 §4.1.2.5).
fn time(unix: u64) -> der::Result<Time> {
    Ok(Time::from(DateTime::from_unix_duration(Duration::from_secs(unix))?))
}

/// Computes a key identifier: the leftmost 160 bits of the SHA-256 of the public key's BIT STRING (RFC 7093 §2 method 1).
pub(super) fn key_identifier(key: &PublicKey) -> [u8; 20] {
    let mut identifier = [0; 20];
    identifier.copy_from_slice(&sha256(key.key_bits())[..20]);
    identifier
}

/// Encodes an extension.
pub(super) fn extension<T: AssociatedOid + Encode>(critical: bool, value: &T) -> Result<Extension, CertificateError> {
    let bytes = value.to_der().and_then(OctetString::new).map_err(CertificateError::unwritable("extension"))?;
    Ok(Extension { extn_id: <T as AssociatedOid>::OID, critical, extn_value: bytes })
}

/// Encodes a URI as a GeneralName.
pub(super) fn uri(text: &str) -> Result<GeneralName, CertificateError> {
    Ia5String::new(text)
        .map(GeneralName::UniformResourceIdentifier)
        .map_err(CertificateError::unwritable("URI in the certificate"))
}

/// `id-ad-caIssuers`, RFC 5280 §4.2.2.1.
pub(super) const CA_ISSUERS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.2");
/// `id-ad-ocsp`, RFC 5280 §4.2.2.1.
pub(super) const OCSP: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.6.1.5.5.7.48.1");
