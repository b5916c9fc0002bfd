//! Every rule a device certificate must keep, checked on the bytes that will be signed.
//!
//! The lint reads the bytes again with another decoder than the one that wrote them and compares with the request,
//! sharing no helper with `prepare`: a fault in the builder does not hide itself.

use std::fmt;

use der::asn1::{ObjectIdentifier, PrintableStringRef};
use der::oid::AssociatedOid;
use der::{Decode, Encode, Tag, Tagged};
use spki::AlgorithmIdentifierRef;
use x509_cert::certificate::{Raw, TbsCertificateInner, Version};
use x509_cert::ext::pkix::name::{DistributionPointName, GeneralName, HardwareModuleName};
use x509_cert::ext::pkix::{
    AuthorityInfoAccessSyntax, AuthorityKeyIdentifier, CrlDistributionPoints, ExtendedKeyUsage, KeyUsage,
    SubjectAltName, SubjectKeyIdentifier,
};
use x509_cert::time::Time;

use super::name::{COMMON_NAME, COUNTRY, ORGANIZATION, ORGANIZATIONAL_UNIT, SERIAL_NUMBER};
use super::prepare::{CertificateRequest, PreparedCertificate};
use super::{algorithm, lint_cwt, tbs};
use crate::keys::{PublicKey, SignatureAlgorithm, sha256};
use crate::names::{DeviceIdentity, KeyName};
use crate::store::CertificateToSign;

impl PreparedCertificate<'_> {
    /// Checks every rule; only a certificate that breaks none becomes one that can be signed.
    pub fn lint(self) -> Result<LintedCertificate, LintFindings> {
        let Self { request, to_be_signed } = self;
        let mut findings = LintFindings::default();
        let is_cwt = request.public_key.is_none();
        match request.public_key {
            Some(public_key) => match Tbs::from_der(&to_be_signed) {
                Ok(tbs) => {
                    Lint { request: &request, public_key, tbs: &tbs, findings: &mut findings }.all(&to_be_signed)
                }
                Err(cause) => findings.add("structure", cause),
            },
            None => lint_cwt::all(&request, &to_be_signed, &mut findings),
        }
        if !findings.0.is_empty() {
            return Err(findings);
        }
        Ok(LintedCertificate {
            issuer: request.profile.issuer().clone(),
            algorithm: request.algorithm(),
            is_cwt,
            serial: request.serial.as_bytes().to_vec(),
            to_be_signed,
        })
    }
}

/// A certificate that keeps every rule: the only one whose bytes can be had to sign them.
#[derive(Debug, PartialEq, Eq)]
pub struct LintedCertificate {
    issuer: KeyName,
    algorithm: SignatureAlgorithm,
    is_cwt: bool,
    serial: Vec<u8>,
    to_be_signed: Vec<u8>,
}

impl LintedCertificate {
    /// The bytes to be signed: a TBSCertificate, or the Sig_structure of a CWT.
    pub fn to_be_signed(&self) -> &[u8] {
        &self.to_be_signed
    }

    /// The serial number, or the `cti` of a CWT.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Whether it is a CWT.
    pub const fn is_cwt(&self) -> bool {
        self.is_cwt
    }

    /// How it is to be signed.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// What the journal keeps of it.
    pub fn into_to_sign(self) -> CertificateToSign {
        CertificateToSign {
            issuer: self.issuer,
            algorithm: self.algorithm,
            is_cwt: self.is_cwt,
            serial: self.serial,
            to_be_signed: self.to_be_signed,
        }
    }
}

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LintFinding {
    /// Which rule: `serial-number` say. Stable, for tests and metrics.
    pub rule: &'static str,
    /// What is wrong.
    pub problem: String,
}

/// All broken rules of a certificate. A finding is a fault of the profile or of this program, never of a station.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LintFindings(Vec<LintFinding>);

impl LintFindings {
    /// The findings in the order they were found.
    pub fn iter(&self) -> impl Iterator<Item = &LintFinding> {
        self.0.iter()
    }

    pub(super) fn add(&mut self, rule: &'static str, problem: impl fmt::Display) {
        self.0.push(LintFinding { rule, problem: problem.to_string() });
    }

    pub(super) fn must(&mut self, holds: bool, rule: &'static str, problem: &str) {
        if !holds {
            self.add(rule, problem);
        }
    }
}

impl fmt::Display for LintFindings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the certificate breaks rules and was not signed:")?;
        self.0.iter().try_for_each(|finding| write!(f, " [{}] {};", finding.rule, finding.problem))
    }
}

impl std::error::Error for LintFindings {}

/// The library's decoder without its leniency: nothing is adjusted.
type Tbs = TbsCertificateInner<Raw>;

struct Lint<'a> {
    request: &'a CertificateRequest<'a>,
    public_key: &'a PublicKey,
    tbs: &'a Tbs,
    findings: &'a mut LintFindings,
}

impl Lint<'_> {
    fn all(&mut self, bytes: &[u8]) {
        self.must(
            self.tbs.to_der().is_ok_and(|der| der == bytes),
            "structure",
            "the encoding is not the distinguished one",
        );
        self.must(self.tbs.version() == Version::V3, "version", "it is not version 3");
        let unique_ids = self.tbs.issuer_unique_id().is_some() || self.tbs.subject_unique_id().is_some();
        self.must(!unique_ids, "unique-id", "it has unique identifiers, which RFC 5280 §4.1.2.8 forbids");
        self.serial_number();
        self.algorithm();
        self.names();
        self.validity();
        let spki = self.tbs.subject_public_key_info().to_der();
        self.must(spki.is_ok_and(|der| der == self.public_key.spki_der()), "public-key", "it is not the device's");
        self.extensions();
    }

    fn must(&mut self, holds: bool, rule: &'static str, problem: &str) {
        self.findings.must(holds, rule, problem);
    }

    /// RFC 5280 §4.1.2.2, and 16 bytes at least before any sign byte.
    fn serial_number(&mut self) {
        let rule = "serial-number";
        let encoded = self.tbs.serial_number().to_der().unwrap_or_default();
        let bytes = encoded.get(2..).unwrap_or_default();
        self.must(bytes.first().is_some_and(|first| first & 0x80 == 0), rule, "it is not positive");
        self.must(bytes.len() <= 20, rule, "it has more than 20 bytes");
        let without_sign = bytes.strip_prefix(&[0]).unwrap_or(bytes);
        self.must(without_sign.len() >= 16, rule, "it has fewer than 16 bytes");
        self.must(bytes == self.request.serial.as_bytes(), rule, "it is not the requested one");
    }

    fn algorithm(&mut self) {
        let rule = "algorithm";
        let expected = self.request.algorithm();
        let der = self.tbs.signature().to_der().unwrap_or_default();
        let found = AlgorithmIdentifierRef::from_der(&der).ok().and_then(|id| algorithm::from_identifier(&id).ok());
        self.must(found == Some(expected), rule, "it is not the one of the profile and its issuer");
        self.must(expected.fits(self.request.issuer.public_key().kind()), rule, "the issuer's key cannot make it");
    }

    /// IEEE 802.1AR §8.6: the subject names the device in exactly one serialNumber.
    fn names(&mut self) {
        let issuer_fits = self.tbs.issuer() == self.request.issuer.subject();
        self.must(issuer_fits, "issuer", "it is not the subject of the issuer's certificate");
        let mut serial_numbers = Vec::new();
        let mut others = Vec::new();
        for attribute in self.tbs.subject().iter() {
            if attribute.oid == SERIAL_NUMBER {
                serial_numbers.push(&attribute.value);
            } else {
                others.push((attribute.oid, String::from_utf8_lossy(attribute.value.value()).into_owned()));
            }
        }
        let one = if let [value] = serial_numbers.as_slice() {
            let text = value.decode_as::<PrintableStringRef<'_>>().map(|text| text.as_str().to_owned());
            let bounded = text.as_ref().is_ok_and(|text| (1..=64).contains(&text.len()));
            self.must(
                value.tag() == Tag::PrintableString && bounded,
                "subject",
                "serialNumber is no PrintableString of 1 to 64",
            );
            text.ok()
        } else {
            None
        };
        self.must(
            one == Some(self.request.identity.value()),
            "subject",
            "it has not the identity as its one serialNumber",
        );
        let fields = self.request.profile.subject().fields();
        let expected: Vec<_> = [
            (COUNTRY, &fields.country),
            (ORGANIZATION, &fields.organization),
            (ORGANIZATIONAL_UNIT, &fields.organizational_unit),
            (COMMON_NAME, &fields.common_name),
        ]
        .into_iter()
        .filter_map(|(oid, text)| Some((oid, text.clone()?)))
        .collect();
        self.must(others == expected, "subject", "its constant attributes are not the profile's");
    }

    /// RFC 5280 §4.1.2.5.
    fn validity(&mut self) {
        let rule = "validity";
        let (from, to) = (self.tbs.validity().not_before, self.tbs.validity().not_after);
        let seconds = |time: Time| time.to_unix_duration().as_secs();
        self.must(seconds(from) < seconds(to), rule, "notBefore is not before notAfter");
        self.must(seconds(from) == self.request.not_before, rule, "notBefore is not the requested time");
        let expected = match self.request.profile.certificate().validity_days {
            Some(days) => self.request.not_before.checked_add(u64::from(days) * 86_400),
            None => Some(tbs::NO_EXPIRY),
        };
        self.must(Some(seconds(to)) == expected, rule, "notAfter is not what the profile says");
        let form_fits = |time: Time| matches!(time, Time::UtcTime(_)) == (time.to_date_time().year() < 2050);
        self.must(
            form_fits(from) && form_fits(to),
            rule,
            "UTCTime is for years before 2050, GeneralizedTime for later ones",
        );
    }

    fn extensions(&mut self) {
        let template = self.request.profile.certificate();
        let access = &template.authority_info_access;
        let allowed: [(ObjectIdentifier, bool); 7] = [
            (AuthorityKeyIdentifier::OID, true),
            (KeyUsage::OID, true),
            (SubjectAltName::OID, true),
            (SubjectKeyIdentifier::OID, template.subject_key_identifier),
            (ExtendedKeyUsage::OID, !template.extended_key_usages.is_empty()),
            (CrlDistributionPoints::OID, !template.crl_distribution_points.is_empty()),
            (AuthorityInfoAccessSyntax::OID, !access.ca_issuers.is_empty() || !access.ocsp.is_empty()),
        ];
        let all = self.tbs.extensions().map(Vec::as_slice).unwrap_or_default();
        for (index, extension) in all.iter().enumerate() {
            let oid = extension.extn_id;
            if all[..index].iter().any(|earlier| earlier.extn_id == oid) {
                self.findings.add("duplicate-extension", format!("{oid} is there twice"));
            }
            if !allowed.contains(&(oid, true)) {
                self.findings.add("unexpected-extension", format!("{oid} is not what the profile asks for"));
            }
            if extension.critical != (oid == KeyUsage::OID) {
                self.findings.add("criticality", format!("{oid}: keyUsage is critical, everything else is not"));
            }
        }
        for (oid, _) in allowed.iter().filter(|(oid, wanted)| *wanted && !all.iter().any(|e| e.extn_id == *oid)) {
            self.findings.add("missing-extension", format!("{oid} is not there"));
        }
        self.key_identifiers();
        self.key_usage();
        self.alternative_names();
        self.optional_extensions();
    }

    /// The extension's value; absence and doubles are found elsewhere.
    fn value<T: for<'d> Decode<'d, Error = der::Error> + AssociatedOid>(&mut self) -> Option<T> {
        let all = self.tbs.extensions().map(Vec::as_slice).unwrap_or_default();
        let extension = all.iter().find(|extension| extension.extn_id == <T as AssociatedOid>::OID)?;
        let decoded = T::from_der(extension.extn_value.as_bytes());
        decoded.map_err(|cause| self.findings.add("structure", format!("{}: {cause}", extension.extn_id))).ok()
    }

    fn key_identifiers(&mut self) {
        if let Some(authority) = self.value::<AuthorityKeyIdentifier>() {
            let same = authority
                .key_identifier
                .as_ref()
                .is_some_and(|id| id.as_bytes() == self.request.issuer.key_identifier());
            let alone = authority.authority_cert_issuer.is_none() && authority.authority_cert_serial_number.is_none();
            self.must(same && alone, "authority-key-identifier", "it is not the issuer's subjectKeyIdentifier alone");
        }
        if let Some(own) = self.value::<SubjectKeyIdentifier>() {
            let expected = &sha256(self.public_key.key_bits())[..20];
            self.must(
                own.0.as_bytes() == expected,
                "subject-key-identifier",
                "it is not that of the public key (RFC 7093 §2)",
            );
        }
    }

    fn key_usage(&mut self) {
        let Some(usage) = self.value::<KeyUsage>() else { return };
        let encipherment = self.request.profile.certificate().key_encipherment;
        self.must(usage.digital_signature(), "key-usage", "digitalSignature is missing");
        self.must(usage.key_encipherment() == encipherment, "key-usage", "keyEncipherment is not as the profile says");
        let rsa = self.public_key.kind().rsa_bits().is_some();
        self.must(!usage.key_encipherment() || rsa, "key-usage", "keyEncipherment is for RSA keys (RFC 5480 §3)");
        let expected = if encipherment { 2 } else { 1 };
        self.must(usage.0.into_iter().count() == expected, "key-usage", "it has more usages than the profile says");
    }

    fn alternative_names(&mut self) {
        let Some(names) = self.value::<SubjectAltName>() else { return };
        let mut modules = Vec::new();
        let mut uris = Vec::new();
        for name in &names.0 {
            match name {
                GeneralName::OtherName(other) => match HardwareModuleName::from_other_name(other) {
                    Ok(Some(module)) => modules.push(module),
                    _ => self.findings.add("alternative-names", format!("otherName {} is not expected", other.type_id)),
                },
                GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.to_string()),
                _ => self.findings.add("alternative-names", "a name is neither hardwareModuleName nor URI"),
            }
        }
        let rule = "hardware-module-name";
        if let [module] = modules.as_slice() {
            self.must(
                module.hw_serial_num.as_bytes() == self.request.chip.as_bytes(),
                rule,
                "hwSerialNum is not the chip ID",
            );
            self.must(module.hw_type == self.request.profile.hardware_type(), rule, "hwType is not the profile's");
        } else {
            self.findings.add(rule, format!("there must be exactly one, there are {}", modules.len()));
        }
        // RFC 7254 §4.2.3: TAC, SNR and the spare digit 0.
        let expected: Vec<String> = match self.request.identity {
            DeviceIdentity::Imei(imei) => {
                let digits = imei.digits();
                vec!["urn:gsma:imei:".to_owned() + &digits[..8] + "-" + &digits[8..14] + "-0"]
            }
            _ => Vec::new(),
        };
        self.must(uris == expected, "imei-urn", "the URIs are not exactly the IMEI's URN with spare digit 0, or none");
    }

    fn optional_extensions(&mut self) {
        let template = self.request.profile.certificate();
        if let Some(usages) = self.value::<ExtendedKeyUsage>() {
            self.must(usages.0 == template.extended_key_usages, "extended-key-usage", "it is not the profile's");
        }
        if let Some(points) = self.value::<CrlDistributionPoints>() {
            let urls = points.0.iter().map(|point| match &point.distribution_point {
                Some(DistributionPointName::FullName(names)) if point.reasons.is_none() => only_uri(names),
                _ => None,
            });
            let same = urls.eq(template.crl_distribution_points.iter().cloned().map(Some));
            self.must(same, "crl-distribution-points", "they are not the profile's");
        }
        if let Some(access) = self.value::<AuthorityInfoAccessSyntax>() {
            let of = |method| -> Vec<String> {
                let described = access.0.iter().filter(|description| description.access_method == method);
                described.filter_map(|d| only_uri(std::slice::from_ref(&d.access_location))).collect()
            };
            let expected = &template.authority_info_access;
            let same = of(tbs::CA_ISSUERS) == expected.ca_issuers && of(tbs::OCSP) == expected.ocsp;
            let count = expected.ca_issuers.len() + expected.ocsp.len();
            self.must(same && access.0.len() == count, "authority-info-access", "it is not the profile's");
        }
    }
}

fn only_uri(names: &[GeneralName]) -> Option<String> {
    match names {
        [GeneralName::UniformResourceIdentifier(uri)] => Some(uri.to_string()),
        _ => None,
    }
}
