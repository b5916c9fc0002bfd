//! A profile: what every device of a product gets. Valid by construction; the file's shape is in `profile_file`.

use der::asn1::ObjectIdentifier;

use super::name::SubjectName;
use super::profile_file;
use crate::config::Faults;
use crate::keys::{KeyKind, SignatureAlgorithm};
use crate::names::{DeviceIdentity, KeyName, ProfileName};
use crate::package::BackupRules;

/// What a product gets: certificate template, keys, delivery, backup and confirmation rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub(super) name: ProfileName,
    pub(super) description: String,
    pub(super) identities: Vec<IdentityKind>,
    pub(super) hardware_type: ObjectIdentifier,
    pub(super) issuer: KeyName,
    pub(super) signature: Option<SignatureAlgorithm>,
    pub(super) subject: SubjectName,
    pub(super) certificate: CertificateTemplate,
    pub(super) key_pair: KeyPairRule,
    pub(super) symmetric_keys: Vec<SymmetricKeyRule>,
    pub(super) sealing: Sealing,
    pub(super) backup: BackupRules,
    pub(super) confirmation_required: bool,
}

impl Profile {
    /// Reads a profile. `place` is the file's name as people know it, `profiles/phone.toml` say; all faults that can be
    /// found are returned together, each with its place in the file. An example of every key:
    ///
    /// ```toml
    /// description = "Phone, model 7"            # for people
    /// identities = ["imei"]                     # imei, meid, eui48, eui64, serial
    /// hardware_type = "1.3.6.1.4.1.32473.1.7"   # hwType of RFC 4108 §5: model and revision
    /// issuer = "manufacturer-2026"              # the signing key's name in the HSM
    /// signature = "ecdsa-p256-sha256"           # default: what the issuer is configured with
    ///
    /// [subject]                                 # all optional; serialNumber is always the identity
    /// country = "FI"
    /// organization = "Example Oy"
    /// organizational_unit = "Phones"
    /// common_name = "Model 7"
    ///
    /// [certificate]                             # X.509 only, but for validity_days
    /// subject_key_identifier = false            # IEEE 802.1AR advises against it
    /// validity_days = 3650                      # default: no expiry, 99991231235959Z
    /// extended_key_usages = ["1.3.6.1.5.5.7.3.2"]
    /// crl_distribution_points = ["http://pki.example/devices.crl"]
    /// authority_info_access = { ca_issuers = ["http://pki.example/ca.der"], ocsp = ["http://ocsp.example/"] }
    /// key_encipherment = false                  # RSA only
    ///
    /// [key_pair]
    /// source = "generate"                       # generate (in the HSM), pool (made in advance; the station waits for one),
    ///                                           # pool-or-generate, csr (the device's own), none
    /// kind = "p256"                             # for generate and pool: p256, p384, ed25519, rsa-2048, rsa-3072, rsa-4096
    /// # accepted = ["p256", "p384"]             # for csr: default all kinds
    ///
    /// [[symmetric_key]]
    /// purpose = "channel"                       # 1 to 32 of a-z 0-9 -; part of the derivation label
    /// length = 32                               # bytes: 16, 24 or 32 (default)
    /// master_key = "master"                     # one for all keys of a profile: a record holds one version
    ///
    /// [delivery]
    /// sealed = "optional"                       # or required: the station then sees no secret
    ///
    /// [backup]
    /// format = "cose"                           # or opaque: the chip's own
    /// max_bytes = 32768                         # at most this many
    ///
    /// [confirmation]
    /// required = true                           # the device proves that it holds a delivered key
    /// ```
    pub fn from_toml(name: ProfileName, place: &str, text: &str) -> Result<Self, Faults> {
        profile_file::read(name, place, text)
    }

    /// The profile's name.
    pub const fn name(&self) -> &ProfileName {
        &self.name
    }

    /// For people.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Which kinds of identity its devices may have; at least one.
    pub fn identities(&self) -> &[IdentityKind] {
        &self.identities
    }

    /// Whether a device of this profile may have such an identity.
    pub fn allows(&self, identity: &DeviceIdentity) -> bool {
        self.identities.contains(&IdentityKind::of(identity))
    }

    /// `hwType` of the hardwareModuleName (RFC 4108 §5): what model and revision of hardware it is.
    pub const fn hardware_type(&self) -> ObjectIdentifier {
        self.hardware_type
    }

    /// The manufacturer's signing key.
    pub const fn issuer(&self) -> &KeyName {
        &self.issuer
    }

    /// How certificates are signed, if not as the issuer is configured.
    pub const fn signature(&self) -> Option<SignatureAlgorithm> {
        self.signature
    }

    /// The constant part of the subject.
    pub const fn subject(&self) -> &SubjectName {
        &self.subject
    }

    /// What the certificate contains beyond the fixed rules.
    pub const fn certificate(&self) -> &CertificateTemplate {
        &self.certificate
    }

    /// Where the key pair comes from.
    pub const fn key_pair(&self) -> &KeyPairRule {
        &self.key_pair
    }

    /// The symmetric keys, each of another purpose, all from one master key.
    pub fn symmetric_keys(&self) -> &[SymmetricKeyRule] {
        &self.symmetric_keys
    }

    /// The one master key of the symmetric keys, if there are any.
    pub fn master_key(&self) -> Option<&KeyName> {
        self.symmetric_keys.first().map(|key| &key.master_key)
    }

    /// Whether a package may leave unsealed.
    pub const fn sealing(&self) -> Sealing {
        self.sealing
    }

    /// What backup is accepted.
    pub const fn backup(&self) -> BackupRules {
        self.backup
    }

    /// Whether the device must prove that it holds a delivered key. It always can: a profile without any key is refused.
    pub const fn confirmation_required(&self) -> bool {
        self.confirmation_required
    }

    /// Whether the certificate is a CWT: there is no key pair that an X.509 certificate could be for.
    pub const fn is_cwt(&self) -> bool {
        matches!(self.key_pair, KeyPairRule::None)
    }
}

/// A kind of device identity, without a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IdentityKind {
    /// See [`DeviceIdentity::Imei`].
    Imei,
    /// See [`DeviceIdentity::Meid`].
    Meid,
    /// See [`DeviceIdentity::Eui48`].
    Eui48,
    /// See [`DeviceIdentity::Eui64`].
    Eui64,
    /// See [`DeviceIdentity::Serial`].
    Serial,
}

impl IdentityKind {
    /// The kind of an identity.
    pub const fn of(identity: &DeviceIdentity) -> Self {
        match identity {
            DeviceIdentity::Imei(_) => Self::Imei,
            DeviceIdentity::Meid(_) => Self::Meid,
            DeviceIdentity::Eui48(_) => Self::Eui48,
            DeviceIdentity::Eui64(_) => Self::Eui64,
            DeviceIdentity::Serial(_) => Self::Serial,
        }
    }

    /// The kind as the canonical form of an identity starts: `imei` say.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Imei => "imei",
            Self::Meid => "meid",
            Self::Eui48 => "eui48",
            Self::Eui64 => "eui64",
            Self::Serial => "serial",
        }
    }

    /// The kind of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Imei, Self::Meid, Self::Eui48, Self::Eui64, Self::Serial].into_iter().find(|kind| kind.name() == name)
    }
}

/// What the certificate contains beyond the fixed rules of IEEE 802.1AR.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CertificateTemplate {
    /// Whether there is a subjectKeyIdentifier (802.1AR advises against it, RFC 5280 §4.2.1.2 for it).
    pub subject_key_identifier: bool,
    /// Days from notBefore to notAfter; none for 99991231235959Z (RFC 5280 §4.1.2.5).
    pub validity_days: Option<u32>,
    /// Extended key usages; the extension is absent if there are none.
    pub extended_key_usages: Vec<ObjectIdentifier>,
    /// URLs of CRLs; the extension is absent if there are none.
    pub crl_distribution_points: Vec<String>,
    /// URLs of the issuer; the extension is absent if there are none.
    pub authority_info_access: AuthorityInfoAccess,
    /// Whether keyUsage has keyEncipherment besides digitalSignature. RSA only.
    pub key_encipherment: bool,
}

/// Where to learn about the issuer (RFC 5280 §4.2.2.1).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuthorityInfoAccess {
    /// URLs of the issuer's certificate.
    pub ca_issuers: Vec<String>,
    /// URLs of OCSP responders.
    pub ocsp: Vec<String>,
}

impl AuthorityInfoAccess {
    /// Whether there is nothing to say.
    pub const fn is_empty(&self) -> bool {
        self.ca_issuers.is_empty() && self.ocsp.is_empty()
    }
}

/// Where the device's key pair comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPairRule {
    /// Generated in the HSM during assembly and delivered.
    Generate {
        /// Which kind.
        kind: KeyKind,
    },
    /// Generated in advance, waiting in the secret store.
    Pool {
        /// Which kind.
        kind: KeyKind,
        /// Whether one is generated on the spot when none is ready.
        or_generate: bool,
    },
    /// The device makes its own and sends a PKCS#10 request.
    Csr {
        /// Which kinds are accepted; at least one.
        accepted: Vec<KeyKind>,
    },
    /// There is none; the certificate is a CWT.
    None,
}

impl KeyPairRule {
    /// Whether a certificate of this profile may hold a key of this kind.
    pub fn accepts(&self, kind: KeyKind) -> bool {
        match self {
            Self::Generate { kind: made } | Self::Pool { kind: made, .. } => *made == kind,
            Self::Csr { accepted } => accepted.contains(&kind),
            Self::None => false,
        }
    }
}

/// A symmetric key, derived in the HSM from a master key and the identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SymmetricKeyRule {
    /// What it is for: 1 to 32 characters `a-z 0-9 -`. The derivation's label is `spp/v1/` and this.
    pub purpose: String,
    /// Bytes: 16, 24 or 32.
    pub length: u16,
    /// From which master key.
    pub master_key: KeyName,
}

/// Whether a package may leave unsealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// Sealed when the chip gives a transport key.
    Optional,
    /// Without a transport key the order is refused.
    Required,
}
