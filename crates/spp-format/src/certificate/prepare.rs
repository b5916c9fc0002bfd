//! Builds the bytes to be signed of a device certificate, X.509 or CWT, from a request. The result is not linted yet.

use der::asn1::OctetString;
use x509_cert::ext::pkix::crl::dp::DistributionPoint;
use x509_cert::ext::pkix::name::{DistributionPointName, GeneralName, HardwareModuleName, OtherName};
use x509_cert::ext::pkix::{
    AccessDescription, AuthorityInfoAccessSyntax, AuthorityKeyIdentifier, CrlDistributionPoints, ExtendedKeyUsage,
    KeyUsage, KeyUsages, SubjectAltName, SubjectKeyIdentifier,
};
use x509_cert::ext::{Extension, Extensions};

use super::profile::Profile;
use super::request::CertificateRequest;
use super::tbs::{self, TbsFields};
use super::{CertificateError, cwt};
use crate::keys::PublicKey;
use crate::names::DeviceIdentity;

/// A certificate that has been built but not linted. Only [`PreparedCertificate::lint`] makes it signable.
#[derive(Debug)]
pub struct PreparedCertificate<'a> {
    pub(super) request: CertificateRequest<'a>,
    pub(super) to_be_signed: Vec<u8>,
}

/// Builds a device certificate: an IEEE 802.1AR IDevID in X.509, or a CWT if there is no public key.
pub fn prepare<'a>(request: &CertificateRequest<'a>) -> Result<PreparedCertificate<'a>, CertificateError> {
    check_request(request)?;
    let to_be_signed = match request.public_key {
        Some(public_key) => idevid(request, public_key)?,
        None => cwt::to_be_signed(request)?,
    };
    Ok(PreparedCertificate { request: *request, to_be_signed })
}

fn check_request(request: &CertificateRequest<'_>) -> Result<(), CertificateError> {
    let (profile, identity) = (request.profile, request.identity);
    let invalid = |reason: String| Err(CertificateError::Request(format!("profile {}: {reason}", profile.name())));
    if !profile.allows(identity) {
        return invalid(format!("identity type {} is not allowed", identity.kind()));
    }
    match request.public_key {
        Some(_) if profile.is_cwt() => return invalid("unexpected public key: the profile has no key pair".into()),
        Some(key) if !profile.key_pair().accepts(key.kind()) => {
            return invalid(format!("key type {} is not accepted", key.kind()));
        }
        None if !profile.is_cwt() => return invalid("the device's public key is missing".into()),
        _ => {}
    }
    let (kind, algorithm) = (request.issuer.public_key().kind(), request.algorithm());
    if algorithm.fits(kind) { Ok(()) } else { Err(CertificateError::AlgorithmMismatch { kind, algorithm }) }
}

fn idevid(request: &CertificateRequest<'_>, public_key: &PublicKey) -> Result<Vec<u8>, CertificateError> {
    tbs::encode(TbsFields {
        serial: request.serial,
        algorithm: request.algorithm(),
        issuer: request.issuer.subject().clone(),
        not_before: request.not_before,
        not_after: request.not_after().unwrap_or(tbs::NO_EXPIRY),
        subject: request.profile.subject().to_name(Some(&request.identity.value()))?,
        public_key,
        extensions: extensions(request, public_key)?,
    })
}

fn extensions(request: &CertificateRequest<'_>, public_key: &PublicKey) -> Result<Extensions, CertificateError> {
    let template = request.profile.certificate();
    let unwritable = || CertificateError::unwritable("key identifier");
    let mut usage = KeyUsages::DigitalSignature.into();
    if template.key_encipherment {
        usage |= KeyUsages::KeyEncipherment;
    }
    let issuer = AuthorityKeyIdentifier {
        key_identifier: Some(OctetString::new(request.issuer.key_identifier()).map_err(unwritable())?),
        ..AuthorityKeyIdentifier::default()
    };
    let mut extensions = vec![
        tbs::extension(false, &issuer)?,
        tbs::extension(true, &KeyUsage(usage))?,
        tbs::extension(false, &SubjectAltName(alternative_names(request)?))?,
    ];
    if template.subject_key_identifier {
        let identifier = OctetString::new(tbs::key_identifier(public_key)).map_err(unwritable())?;
        extensions.push(tbs::extension(false, &SubjectKeyIdentifier(identifier))?);
    }
    extensions.extend(optional_extensions(request.profile)?);
    Ok(extensions)
}

/// The hardwareModuleName and, for an IMEI, its URN.
fn alternative_names(request: &CertificateRequest<'_>) -> Result<Vec<GeneralName>, CertificateError> {
    let hardware = || -> der::Result<GeneralName> {
        let name = HardwareModuleName {
            hw_type: request.profile.hardware_type(),
            hw_serial_num: OctetString::new(request.chip.as_bytes())?,
        };
        Ok(GeneralName::OtherName(OtherName::try_from(&name)?))
    };
    let mut names = vec![hardware().map_err(CertificateError::unwritable("hardwareModuleName"))?];
    if let DeviceIdentity::Imei(imei) = request.identity {
        // RFC 7254 §4.2.3: the last digit is the spare digit, which is always 0, not the check digit.
        names.push(tbs::uri(&format!("urn:gsma:imei:{}-{}-0", imei.tac(), imei.snr()))?);
    }
    Ok(names)
}

/// The extensions that depend on the profile.
fn optional_extensions(profile: &Profile) -> Result<Vec<Extension>, CertificateError> {
    let template = profile.certificate();
    let mut extensions = Vec::new();
    if !template.extended_key_usages.is_empty() {
        extensions.push(tbs::extension(false, &ExtendedKeyUsage(template.extended_key_usages.clone()))?);
    }
    if !template.crl_distribution_points.is_empty() {
        let point = |url: &String| {
            let name = DistributionPointName::FullName(vec![tbs::uri(url)?]);
            Ok(DistributionPoint { distribution_point: Some(name), reasons: None, crl_issuer: None })
        };
        let points: Result<Vec<_>, CertificateError> = template.crl_distribution_points.iter().map(point).collect();
        extensions.push(tbs::extension(false, &CrlDistributionPoints(points?))?);
    }
    let access = &template.authority_info_access;
    if !access.is_empty() {
        let issuers = access.ca_issuers.iter().map(|url| (tbs::CA_ISSUERS, url));
        let responders = access.ocsp.iter().map(|url| (tbs::OCSP, url));
        let describe = |(access_method, url): (_, &String)| {
            Ok(AccessDescription { access_method, access_location: tbs::uri(url)? })
        };
        let descriptions: Result<Vec<_>, CertificateError> = issuers.chain(responders).map(describe).collect();
        extensions.push(tbs::extension(false, &AuthorityInfoAccessSyntax(descriptions?))?);
    }
    Ok(extensions)
}
