//! Parsing of profile files (TOML). All faults are reported together.

use der::asn1::ObjectIdentifier;
use serde::Deserialize;

use super::name::{SubjectFields, SubjectName};
use super::profile::{
    AuthorityInfoAccess, CertificateTemplate, IdentityKind, KeyPairRule, Profile, Sealing, SymmetricKeyRule,
};
use super::tbs::FORBIDDEN_KEY_PURPOSES;
use crate::file_format::{Faults, read_toml};
use crate::keys::{KeyType, SignatureAlgorithm};
use crate::names::{KeyName, ProfileName};
use crate::package::{BackupFormat, BackupRules, MAX_BACKUP_LEN};

/// A hundred years. A longer validity should be expressed as no expiry.
const MAX_VALIDITY_DAYS: u32 = 36_525;

impl Profile {
    /// Parses a profile. `place` names the file in messages, for example `profiles/phone.toml`. All detectable faults are
    /// returned together, each with its place in the file. An example with every key:
    ///
    /// ```toml
    /// description = "Phone, model 7"            # shown to operators
    /// identities = ["imei"]                     # imei, meid, eui48, eui64, serial
    /// hardware_type = "1.3.6.1.4.1.32473.1.7"   # hwType of RFC 4108 §5: model and revision
    /// issuer = "manufacturer-2026"              # the signing key's name in the HSM
    /// signature = "ecdsa-p256-sha256"           # default: the issuer's configured algorithm
    ///
    /// [subject]                                 # all optional; serialNumber is always the identity
    /// country = "FI"
    /// organization = "Example Oy"
    /// organizational_unit = "Phones"
    /// common_name = "Model 7"
    ///
    /// [certificate]                             # X.509 only, except validity_days
    /// subject_key_identifier = false            # IEEE 802.1AR advises against it
    /// validity_days = 3650                      # default: no expiry, 99991231235959Z
    /// extended_key_usages = ["1.3.6.1.5.5.7.3.2"]
    /// crl_distribution_points = ["http://pki.example/devices.crl"]
    /// authority_info_access = { ca_issuers = ["http://pki.example/ca.der"], ocsp = ["http://ocsp.example/"] }
    /// key_encipherment = false                  # RSA only
    ///
    /// [key_pair]
    /// source = "generate"                       # generate (in the HSM), pool (pregenerated; the station waits),
    ///                                           # pool-or-generate, csr (the device generates its own), none
    /// kind = "p256"                             # for generate and pool: p256, p384, ed25519, rsa-2048, rsa-3072, rsa-4096
    /// # accepted = ["p256", "p384"]             # for csr; default: all
    ///
    /// [[symmetric_key]]
    /// purpose = "channel"                       # 1 to 32 of a-z 0-9 -; part of the derivation label
    /// length = 32                               # bytes: 16, 24 or 32 (default)
    /// master_key = "master"                     # the same for all keys: a record holds one version
    ///
    /// [delivery]
    /// sealed = "optional"                       # or required: the station sees no secret
    ///
    /// [backup]
    /// format = "cose"                           # or opaque: the chip's own format
    /// max_bytes = 32768                         # upper limit
    ///
    /// [confirmation]
    /// required = true                           # the device proves possession of a delivered key
    /// ```
    pub fn from_toml(name: ProfileName, place: &str, text: &str) -> Result<Self, Faults> {
        let mut faults = Faults::default();
        let file: Option<ProfileFile> = read_toml(place, text, &mut faults);
        let profile = file.and_then(|file| Reader { place, faults: &mut faults }.profile(name, file));
        faults.into_result(profile)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProfileFile {
    #[serde(default)]
    description: String,
    identities: Vec<String>,
    hardware_type: String,
    issuer: String,
    signature: Option<String>,
    #[serde(default)]
    subject: SubjectFields,
    #[serde(default)]
    certificate: CertificateFields,
    key_pair: KeyPairFields,
    #[serde(default, rename = "symmetric_key")]
    symmetric_keys: Vec<SymmetricKeyFields>,
    #[serde(default)]
    delivery: DeliveryFields,
    #[serde(default)]
    backup: BackupFields,
    #[serde(default)]
    confirmation: ConfirmationFields,
}

#[derive(Deserialize, Default, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct CertificateFields {
    subject_key_identifier: bool,
    validity_days: Option<u32>,
    extended_key_usages: Vec<String>,
    crl_distribution_points: Vec<String>,
    authority_info_access: AccessFields,
    key_encipherment: bool,
}

#[derive(Deserialize, Default, PartialEq)]
#[serde(deny_unknown_fields, default)]
struct AccessFields {
    ca_issuers: Vec<String>,
    ocsp: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyPairFields {
    source: String,
    kind: Option<String>,
    accepted: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SymmetricKeyFields {
    purpose: String,
    length: Option<u16>,
    master_key: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct DeliveryFields {
    sealed: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct BackupFields {
    format: Option<String>,
    max_bytes: Option<usize>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ConfirmationFields {
    required: Option<bool>,
}

/// Parses the values of a profile file; records a fault for each invalid value and continues.
struct Reader<'a> {
    place: &'a str,
    faults: &'a mut Faults,
}

impl Reader<'_> {
    fn profile(&mut self, name: ProfileName, file: ProfileFile) -> Option<Profile> {
        let identities = self.identities(&file.identities);
        let hardware_type = self.oid("hardware_type", &file.hardware_type);
        let issuer = self.key_name("issuer", &file.issuer);
        let signature = file.signature.as_deref().and_then(|text| self.signature(text));
        let subject = self.faults.merge(SubjectName::from_fields(&self.at("subject"), file.subject));
        let key_pair = self.key_pair(&file.key_pair);
        let symmetric_keys = self.symmetric_keys(&file.symmetric_keys);
        if let Some(rule) = &key_pair {
            self.check_certificate_settings(rule, &file.certificate);
            if *rule == KeyPairRule::None && file.symmetric_keys.is_empty() {
                self.add(
                    "key_pair.source",
                    "none without [[symmetric_key]] leaves the device without any key; add one",
                );
            }
        }
        let certificate = self.certificate(file.certificate);
        let sealing = self.sealing(file.delivery.sealed.as_deref());
        let backup = self.backup(&file.backup);
        Some(Profile {
            name,
            description: file.description,
            identities,
            hardware_type: hardware_type?,
            issuer: issuer?,
            signature,
            subject: subject?,
            certificate,
            key_pair: key_pair?,
            symmetric_keys,
            sealing,
            backup,
            confirmation_required: file.confirmation.required.unwrap_or(true),
        })
    }

    fn at(&self, key: &str) -> String {
        format!("{}: {key}", self.place)
    }

    fn add(&mut self, key: &str, problem: impl std::fmt::Display) {
        self.faults.add(self.at(key), problem);
    }

    fn identities(&mut self, names: &[String]) -> Vec<IdentityKind> {
        if names.is_empty() {
            self.add("identities", "list at least one of imei, meid, eui48, eui64, serial");
        }
        let mut kinds = Vec::new();
        for name in names {
            match IdentityKind::from_name(name) {
                None => self.add("identities", format!("{name:?} is not one of imei, meid, eui48, eui64, serial")),
                Some(kind) if kinds.contains(&kind) => self.add("identities", format!("{name} is listed twice")),
                Some(kind) => kinds.push(kind),
            }
        }
        kinds
    }

    fn oid(&mut self, key: &str, text: &str) -> Option<ObjectIdentifier> {
        let parsed = ObjectIdentifier::new(text);
        if parsed.is_err() {
            self.add(key, format!("{text:?} is not an object identifier such as 1.3.6.1.4.1.32473.1.1"));
        }
        parsed.ok()
    }

    fn key_name(&mut self, key: &str, text: &str) -> Option<KeyName> {
        let place = self.at(key);
        self.faults.note(place, text.parse())
    }

    fn signature(&mut self, text: &str) -> Option<SignatureAlgorithm> {
        let parsed = from_name(text);
        if parsed.is_none() {
            self.add(
                "signature",
                format!(
                    "{text:?} is not one of ecdsa-p256-sha256, ecdsa-p384-sha384, rsa-pkcs1-sha256, rsa-pss-sha256, ed25519"
                ),
            );
        }
        parsed
    }

    fn key_type(&mut self, key: &str, text: &str) -> Option<KeyType> {
        let parsed = from_name(text);
        if parsed.is_none() {
            self.add(key, format!("{text:?} is not one of p256, p384, ed25519, rsa-2048, rsa-3072, rsa-4096"));
        }
        parsed
    }

    fn key_pair(&mut self, fields: &KeyPairFields) -> Option<KeyPairRule> {
        let has_kind = ["generate", "pool", "pool-or-generate"].contains(&fields.source.as_str());
        if fields.kind.is_some() && !has_kind {
            self.add("key_pair.kind", "only the sources generate, pool and pool-or-generate have a kind; remove it");
        }
        if fields.accepted.is_some() && fields.source != "csr" {
            self.add("key_pair.accepted", "only source = \"csr\" has accepted kinds; remove it");
        }
        match fields.source.as_str() {
            source if has_kind => match &fields.kind {
                Some(kind) => {
                    let kind = self.key_type("key_pair.kind", kind)?;
                    Some(match source {
                        "generate" => KeyPairRule::Generate { kind },
                        _ => KeyPairRule::Pool { kind, or_generate: source == "pool-or-generate" },
                    })
                }
                None => {
                    self.add("key_pair.kind", format!("source = {source:?} requires a kind such as p256"));
                    None
                }
            },
            "csr" => self.accepted(fields.accepted.as_deref()).map(|accepted| KeyPairRule::Csr { accepted }),
            "none" => Some(KeyPairRule::None),
            other => {
                self.add(
                    "key_pair.source",
                    format!("{other:?} is not one of generate, pool, pool-or-generate, csr, none"),
                );
                None
            }
        }
    }

    fn accepted(&mut self, names: Option<&[String]>) -> Option<Vec<KeyType>> {
        use KeyType::{Ed25519, P256, P384, Rsa2048, Rsa3072, Rsa4096};
        let Some(names) = names else { return Some(vec![P256, P384, Ed25519, Rsa2048, Rsa3072, Rsa4096]) };
        if names.is_empty() {
            self.add("key_pair.accepted", "the list is empty; list a kind, or remove the key to accept all");
        }
        let kinds: Vec<_> = names.iter().map(|name| self.key_type("key_pair.accepted", name)).collect();
        kinds.into_iter().collect()
    }

    fn symmetric_keys(&mut self, all: &[SymmetricKeyFields]) -> Vec<SymmetricKeyRule> {
        let mut rules: Vec<SymmetricKeyRule> = Vec::new();
        for (index, fields) in all.iter().enumerate() {
            let at = |key: &str| format!("symmetric_key[{index}].{key}");
            let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
            if !(1..=32).contains(&fields.purpose.len()) || !fields.purpose.bytes().all(letters) {
                self.add(&at("purpose"), "expected 1 to 32 characters: lower-case letters, digits and -");
            }
            if all[..index].iter().any(|earlier| earlier.purpose == fields.purpose) {
                self.add(&at("purpose"), "duplicate purpose; both keys would have the same value");
            }
            let length = fields.length.unwrap_or(32);
            if ![16, 24, 32].contains(&length) {
                self.add(&at("length"), format!("unsupported length {length}: expected 16, 24 or 32 bytes"));
            }
            if all[0].master_key != fields.master_key {
                self.add(
                    &at("master_key"),
                    "all symmetric keys of a profile must use the same master key: a record holds one version",
                );
            }
            if let Some(master_key) = self.key_name(&at("master_key"), &fields.master_key) {
                rules.push(SymmetricKeyRule { purpose: fields.purpose.clone(), length, master_key });
            }
        }
        rules
    }

    /// Checks settings that require a certain key pair.
    fn check_certificate_settings(&mut self, rule: &KeyPairRule, fields: &CertificateFields) {
        let only_validity = CertificateFields { validity_days: fields.validity_days, ..CertificateFields::default() };
        if *rule == KeyPairRule::None && *fields != only_validity {
            self.add("certificate", "without a key pair the certificate is a CWT: only validity_days is allowed");
            return;
        }
        let rsa_only = match rule {
            KeyPairRule::Generate { kind } | KeyPairRule::Pool { kind, .. } => kind.rsa_bits().is_some(),
            KeyPairRule::Csr { accepted } => accepted.iter().all(|kind| kind.rsa_bits().is_some()),
            KeyPairRule::None => false,
        };
        if fields.key_encipherment && !rsa_only {
            self.add("certificate.key_encipherment", "requires that all key pairs are RSA (RFC 5480 §3)");
        }
    }

    fn certificate(&mut self, fields: CertificateFields) -> CertificateTemplate {
        if fields.validity_days.is_some_and(|days| !(1..=MAX_VALIDITY_DAYS).contains(&days)) {
            self.add(
                "certificate.validity_days",
                format!("expected 1 to {MAX_VALIDITY_DAYS} days; remove it for no expiry"),
            );
        }
        let mut extended_key_usages = Vec::new();
        for text in &fields.extended_key_usages {
            match self.oid("certificate.extended_key_usages", text) {
                Some(oid) if extended_key_usages.contains(&oid) => {
                    self.add("certificate.extended_key_usages", format!("{oid} is listed twice"));
                }
                Some(oid) if FORBIDDEN_KEY_PURPOSES.contains(&oid) => {
                    self.add(
                        "certificate.extended_key_usages",
                        format!("{oid} is not for devices (OCSPSigning, anyExtendedKeyUsage)"),
                    );
                }
                Some(oid) => extended_key_usages.push(oid),
                None => {}
            }
        }
        self.urls("certificate.crl_distribution_points", &fields.crl_distribution_points);
        self.urls("certificate.authority_info_access.ca_issuers", &fields.authority_info_access.ca_issuers);
        self.urls("certificate.authority_info_access.ocsp", &fields.authority_info_access.ocsp);
        CertificateTemplate {
            subject_key_identifier: fields.subject_key_identifier,
            validity_days: fields.validity_days,
            extended_key_usages,
            crl_distribution_points: fields.crl_distribution_points,
            authority_info_access: AuthorityInfoAccess {
                ca_issuers: fields.authority_info_access.ca_issuers,
                ocsp: fields.authority_info_access.ocsp,
            },
            key_encipherment: fields.key_encipherment,
        }
    }

    fn urls(&mut self, key: &str, urls: &[String]) {
        for url in urls {
            let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).unwrap_or("");
            if rest.is_empty() || !url.bytes().all(|b| b.is_ascii_graphic()) {
                self.add(key, format!("{url:?} is not a URL that starts with http:// or https://"));
            }
        }
    }

    fn sealing(&mut self, text: Option<&str>) -> Sealing {
        match text {
            None | Some("optional") => Sealing::Optional,
            Some("required") => Sealing::Required,
            Some(other) => {
                self.add("delivery.sealed", format!("{other:?} is not one of optional, required"));
                Sealing::Required
            }
        }
    }

    fn backup(&mut self, fields: &BackupFields) -> BackupRules {
        let format = match fields.format.as_deref() {
            None | Some("cose") => BackupFormat::Cose,
            Some("opaque") => BackupFormat::Opaque,
            Some(other) => {
                self.add("backup.format", format!("{other:?} is not one of cose, opaque"));
                BackupFormat::Cose
            }
        };
        let max_bytes = fields.max_bytes.unwrap_or(MAX_BACKUP_LEN);
        if !(1..=MAX_BACKUP_LEN).contains(&max_bytes) {
            self.add("backup.max_bytes", format!("expected 1 to {}", MAX_BACKUP_LEN));
        }
        BackupRules { format, max_bytes }
    }
}

/// Parses a value by its serde name.
fn from_name<T: serde::de::DeserializeOwned>(name: &str) -> Option<T> {
    use serde::de::value::{Error, StrDeserializer};
    T::deserialize(StrDeserializer::<Error>::new(name)).ok()
}
#[cfg(test)]
mod tests;
