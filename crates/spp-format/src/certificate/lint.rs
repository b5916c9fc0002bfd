//! Lint of device certificates: checks every rule on the bytes to be signed.
//!
//! The lint decodes the bytes with another decoder than the one that encoded them and compares them with the request. It shares
//! no helper with `prepare`, so that an error in the builder cannot hide itself.

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

use super::lint_findings::LintFindings;
use super::name::{COMMON_NAME, COUNTRY, ORGANIZATION, ORGANIZATIONAL_UNIT, SERIAL_NUMBER};
use super::prepare::PreparedCertificate;
use super::request::CertificateRequest;
use super::to_sign::CertificateToSign;
use super::{algorithm, lint_cwt, tbs};
use crate::keys::{PublicKey, SignatureAlgorithm, sha256};
use crate::names::{DeviceIdentity, KeyName};

impl PreparedCertificate<'_> {
    /// Checks every rule. Only a certificate without findings can be signed.
    pub fn lint(self) -> Result<LintedCertificate, LintFindings> {
        let Self { request, to_be_signed } = self;
        let mut findings = LintFindings::default();
        let is_cwt = request.public_key.is_none();
        match request.public_key {
            Some(public_key) => match Tbs::from_der(&to_be_signed) {
                Ok(tbs) => {
                    Lint { request: &request, public_key, tbs: &tbs, findings: &mut findings }.check_all(&to_be_signed)
                }
                Err(cause) => findings.add("structure", cause),
            },
            None => lint_cwt::check_all(&request, &to_be_signed, &mut findings),
        }
        if !findings.is_empty() {
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

/// A certificate that passed the lint: the only type that exposes bytes to sign.
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

    /// Whether the certificate is a CWT.
    pub const fn is_cwt(&self) -> bool {
        self.is_cwt
    }

    /// The signature algorithm.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        self.algorithm
    }

    /// Converts into the form that the journal stores.
    pub fn into_to_sign(self) -> CertificateToSign {
        CertificateToSign::new(self.issuer, self.algorithm, self.is_cwt, self.serial, self.to_be_signed)
    }
}

/// Decodes without the library's leniency: nothing is normalised.
type Tbs = TbsCertificateInner<Raw>;

struct Lint<'a> {
    request: &'a CertificateRequest<'a>,
    public_key: &'a PublicKey,
    tbs: &'a Tbs,
    findings: &'a mut LintFindings,
}

impl Lint<'_> {
    fn check_all(&mut self, bytes: &[u8]) {
        self.require(self.tbs.to_der().is_ok_and(|der| der == bytes), "structure", "not DER");
        self.require(self.tbs.version() == Version::V3, "version", "not version 3");
        let unique_ids = self.tbs.issuer_unique_id().is_some() || self.tbs.subject_unique_id().is_some();
        self.require(!unique_ids, "unique-id", "unique identifiers are forbidden (RFC 5280 §4.1.2.8)");
        self.serial_number();
        self.algorithm();
        self.names();
        self.validity();
        let spki = self.tbs.subject_public_key_info().to_der();
        self.require(
            spki.is_ok_and(|der| der == self.public_key.spki_der()),
            "public-key",
            "not the device's public key",
        );
        self.extensions();
    }

    fn require(&mut self, holds: bool, rule: &'static str, problem: &str) {
        self.findings.require(holds, rule, problem);
    }

    /// RFC 5280 §4.1.2.2; at least 16 bytes without a sign byte.
    fn serial_number(&mut self) {
        let rule = "serial-number";
        let encoded = self.tbs.serial_number().to_der().unwrap_or_default();
        let bytes = encoded.get(2..).unwrap_or_default();
        self.require(bytes.first().is_some_and(|first| first & 0x80 == 0), rule, "not positive");
        self.require(bytes.len() <= 20, rule, "more than 20 bytes");
        let without_sign = bytes.strip_prefix(&[0]).unwrap_or(bytes);
        self.require(without_sign.len() >= 16, rule, "fewer than 16 bytes");
        self.require(bytes == self.request.serial.as_bytes(), rule, "not the requested serial number");
    }

    fn algorithm(&mut self) {
        let rule = "algorithm";
        let expected = self.request.algorithm();
        let der = self.tbs.signature().to_der().unwrap_or_default();
        let found = AlgorithmIdentifierRef::from_der(&der).ok().and_then(|id| algorithm::from_identifier(&id).ok());
        self.require(found == Some(expected), rule, "not the algorithm of the profile or its issuer");
        self.require(
            expected.fits(self.request.issuer.public_key().kind()),
            rule,
            "does not match the issuer's key type",
        );
    }

    /// IEEE 802.1AR §8.6: the subject identifies the device in exactly one serialNumber.
    fn names(&mut self) {
        let issuer_fits = self.tbs.issuer() == self.request.issuer.subject();
        self.require(issuer_fits, "issuer", "not the subject of the issuer certificate");
        let mut serial_numbers = Vec::new();
        let mut others = Vec::new();
        for attribute in self.tbs.subject().iter() {
            if attribute.oid == SERIAL_NUMBER {
                serial_numbers.push(&attribute.value);
            } else {
                others.push((attribute.oid, String::from_utf8_lossy(attribute.value.value()).into_owned()));
            }
        }
        let identity = if let [value] = serial_numbers.as_slice() {
            let text = value.decode_as::<PrintableStringRef<'_>>().map(|text| text.as_str().to_owned());
            let bounded = text.as_ref().is_ok_and(|text| (1..=64).contains(&text.len()));
            self.require(
                value.tag() == Tag::PrintableString && bounded,
                "subject",
                "serialNumber is not a PrintableString of 1 to 64 characters",
            );
            text.ok()
        } else {
            None
        };
        self.require(
            identity == Some(self.request.identity.value()),
            "subject",
            "the identity is not its only serialNumber",
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
        self.require(others == expected, "subject", "the constant attributes differ from the profile");
    }

    /// RFC 5280 §4.1.2.5.
    fn validity(&mut self) {
        let rule = "validity";
        let (from, to) = (self.tbs.validity().not_before, self.tbs.validity().not_after);
        let seconds = |time: Time| time.to_unix_duration().as_secs();
        self.require(seconds(from) < seconds(to), rule, "notBefore is not before notAfter");
        self.require(seconds(from) == self.request.not_before, rule, "notBefore is not the requested time");
        let expected = match self.request.profile.certificate().validity_days {
            Some(days) => self.request.not_before.checked_add(u64::from(days) * 86_400),
            None => Some(tbs::NO_EXPIRY),
        };
        self.require(Some(seconds(to)) == expected, rule, "notAfter does not match the profile");
        let form_fits = |time: Time| matches!(time, Time::UtcTime(_)) == (time.to_date_time().year() < 2050);
        self.require(form_fits(from) && form_fits(to), rule, "expected UTCTime before 2050, GeneralizedTime from 2050");
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
                self.findings.add("duplicate-extension", format!("{oid} is duplicated"));
            }
            if !allowed.contains(&(oid, true)) {
                self.findings.add("unexpected-extension", format!("{oid} is not in the profile"));
            }
            if extension.critical != (oid == KeyUsage::OID) {
                self.findings.add("criticality", format!("{oid}: only keyUsage may be critical, and must be"));
            }
        }
        for (oid, _) in allowed.iter().filter(|(oid, required)| *required && !all.iter().any(|e| e.extn_id == *oid)) {
            self.findings.add("missing-extension", format!("{oid} is missing"));
        }
        self.key_identifiers();
        self.key_usage();
        self.alternative_names();
        self.optional_extensions();
    }

    /// The decoded value of an extension. [`Self::extensions`] reports missing and duplicate extensions.
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
            self.require(same && alone, "authority-key-identifier", "not exactly the issuer's subjectKeyIdentifier");
        }
        if let Some(identifier) = self.value::<SubjectKeyIdentifier>() {
            let expected = &sha256(self.public_key.key_bits())[..20];
            self.require(
                identifier.0.as_bytes() == expected,
                "subject-key-identifier",
                "not the identifier of the public key (RFC 7093 §2)",
            );
        }
    }

    fn key_usage(&mut self) {
        let Some(usage) = self.value::<KeyUsage>() else { return };
        let encipherment = self.request.profile.certificate().key_encipherment;
        self.require(usage.digital_signature(), "key-usage", "digitalSignature is missing");
        self.require(usage.key_encipherment() == encipherment, "key-usage", "keyEncipherment differs from the profile");
        let rsa = self.public_key.kind().rsa_bits().is_some();
        self.require(
            !usage.key_encipherment() || rsa,
            "key-usage",
            "keyEncipherment requires an RSA key (RFC 5480 §3)",
        );
        let expected = if encipherment { 2 } else { 1 };
        self.require(usage.0.into_iter().count() == expected, "key-usage", "more usages than the profile allows");
    }

    fn alternative_names(&mut self) {
        let Some(names) = self.value::<SubjectAltName>() else { return };
        let mut modules = Vec::new();
        let mut uris = Vec::new();
        for name in &names.0 {
            match name {
                GeneralName::OtherName(other) => match HardwareModuleName::from_other_name(other) {
                    Ok(Some(module)) => modules.push(module),
                    _ => self.findings.add("alternative-names", format!("unexpected otherName {}", other.type_id)),
                },
                GeneralName::UniformResourceIdentifier(uri) => uris.push(uri.to_string()),
                _ => self.findings.add("alternative-names", "expected only hardwareModuleName and URI"),
            }
        }
        let rule = "hardware-module-name";
        if let [module] = modules.as_slice() {
            self.require(
                module.hw_serial_num.as_bytes() == self.request.chip.as_bytes(),
                rule,
                "hwSerialNum is not the chip ID",
            );
            self.require(
                module.hw_type == self.request.profile.hardware_type(),
                rule,
                "hwType differs from the profile",
            );
        } else {
            self.findings.add(rule, format!("expected exactly one, found {}", modules.len()));
        }
        // RFC 7254 §4.2.3: TAC, SNR and spare digit 0.
        let expected: Vec<String> = match self.request.identity {
            DeviceIdentity::Imei(imei) => {
                let digits = imei.digits();
                vec!["urn:gsma:imei:".to_owned() + &digits[..8] + "-" + &digits[8..14] + "-0"]
            }
            _ => Vec::new(),
        };
        self.require(uris == expected, "imei-urn", "expected exactly the IMEI's URN with spare digit 0, or no URI");
    }

    fn optional_extensions(&mut self) {
        let template = self.request.profile.certificate();
        if let Some(usages) = self.value::<ExtendedKeyUsage>() {
            self.require(usages.0 == template.extended_key_usages, "extended-key-usage", "differs from the profile");
            let forbidden = usages.0.iter().any(|oid| tbs::FORBIDDEN_KEY_PURPOSES.contains(oid));
            self.require(!forbidden, "extended-key-usage", "OCSPSigning or anyExtendedKeyUsage");
        }
        if let Some(points) = self.value::<CrlDistributionPoints>() {
            let urls = points.0.iter().map(|point| match &point.distribution_point {
                Some(DistributionPointName::FullName(names)) if point.reasons.is_none() => only_uri(names),
                _ => None,
            });
            let same = urls.eq(template.crl_distribution_points.iter().cloned().map(Some));
            self.require(same, "crl-distribution-points", "differ from the profile");
        }
        if let Some(access) = self.value::<AuthorityInfoAccessSyntax>() {
            let urls = |method| -> Vec<String> {
                let described = access.0.iter().filter(|description| description.access_method == method);
                described.filter_map(|d| only_uri(std::slice::from_ref(&d.access_location))).collect()
            };
            let expected = &template.authority_info_access;
            let same = urls(tbs::CA_ISSUERS) == expected.ca_issuers && urls(tbs::OCSP) == expected.ocsp;
            let count = expected.ca_issuers.len() + expected.ocsp.len();
            self.require(same && access.0.len() == count, "authority-info-access", "differs from the profile");
        }
    }
}

fn only_uri(names: &[GeneralName]) -> Option<String> {
    match names {
        [GeneralName::UniformResourceIdentifier(uri)] => Some(uri.to_string()),
        _ => None,
    }
}
