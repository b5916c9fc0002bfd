//! Profiles: what every device of a product receives. A `Profile` is valid by construction; `profile_file` parses the file.

use der::asn1::ObjectIdentifier;

use super::name::SubjectName;
use crate::keys::{KeyType, SignatureAlgorithm};
use crate::names::{DeviceIdentity, KeyName, ProfileName};
use crate::package::BackupRules;

/// A product's profile: certificate template, keys, delivery, backup and confirmation rules.
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
    /// The profile's name.
    pub const fn name(&self) -> &ProfileName {
        &self.name
    }

    /// Description shown to operators.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// Identity types that its devices may have; at least one.
    pub fn identities(&self) -> &[IdentityKind] {
        &self.identities
    }

    /// Whether a device of this profile may have this identity.
    pub fn allows(&self, identity: &DeviceIdentity) -> bool {
        self.identities.contains(&IdentityKind::of(identity))
    }

    /// `hwType` of the hardwareModuleName (RFC 4108 §5): the hardware's model and revision.
    pub const fn hardware_type(&self) -> ObjectIdentifier {
        self.hardware_type
    }

    /// The manufacturer's signing key.
    pub const fn issuer(&self) -> &KeyName {
        &self.issuer
    }

    /// The signature algorithm, if it overrides the issuer's.
    pub const fn signature(&self) -> Option<SignatureAlgorithm> {
        self.signature
    }

    /// The constant part of the subject.
    pub const fn subject(&self) -> &SubjectName {
        &self.subject
    }

    /// Optional content of the certificate.
    pub const fn certificate(&self) -> &CertificateTemplate {
        &self.certificate
    }

    /// The source of the key pair.
    pub const fn key_pair(&self) -> &KeyPairRule {
        &self.key_pair
    }

    /// The symmetric keys, with unique purposes, all derived from one master key.
    pub fn symmetric_keys(&self) -> &[SymmetricKeyRule] {
        &self.symmetric_keys
    }

    /// The master key of the symmetric keys, if there are any.
    pub fn master_key(&self) -> Option<&KeyName> {
        self.symmetric_keys.first().map(|key| &key.master_key)
    }

    /// Whether the data package must be sealed.
    pub const fn sealing(&self) -> Sealing {
        self.sealing
    }

    /// The accepted backup format and size.
    pub const fn backup(&self) -> BackupRules {
        self.backup
    }

    /// Whether the device must prove possession of a delivered key. It always can: a profile without any key is rejected.
    pub const fn confirmation_required(&self) -> bool {
        self.confirmation_required
    }

    /// Whether the certificate is a CWT: without a key pair an X.509 certificate is impossible.
    pub const fn is_cwt(&self) -> bool {
        matches!(self.key_pair, KeyPairRule::None)
    }
}

/// A type of device identity.
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
    /// The type of an identity.
    pub const fn of(identity: &DeviceIdentity) -> Self {
        match identity {
            DeviceIdentity::Imei(_) => Self::Imei,
            DeviceIdentity::Meid(_) => Self::Meid,
            DeviceIdentity::Eui48(_) => Self::Eui48,
            DeviceIdentity::Eui64(_) => Self::Eui64,
            DeviceIdentity::Serial(_) => Self::Serial,
        }
    }

    /// The prefix of an identity's canonical form, for example `imei`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Imei => "imei",
            Self::Meid => "meid",
            Self::Eui48 => "eui48",
            Self::Eui64 => "eui64",
            Self::Serial => "serial",
        }
    }

    /// Looks up a type by name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Imei, Self::Meid, Self::Eui48, Self::Eui64, Self::Serial].into_iter().find(|kind| kind.name() == name)
    }
}

/// Optional content of the certificate, in addition to the fixed rules of IEEE 802.1AR.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CertificateTemplate {
    /// Whether to include a subjectKeyIdentifier (802.1AR advises against it, RFC 5280 §4.2.1.2 for it).
    pub subject_key_identifier: bool,
    /// Days from notBefore to notAfter; `None` for 99991231235959Z (RFC 5280 §4.1.2.5).
    pub validity_days: Option<u32>,
    /// Extended key usages; if empty, the extension is absent.
    pub extended_key_usages: Vec<ObjectIdentifier>,
    /// URLs of CRLs; if empty, the extension is absent.
    pub crl_distribution_points: Vec<String>,
    /// URLs about the issuer; if empty, the extension is absent.
    pub authority_info_access: AuthorityInfoAccess,
    /// Whether keyUsage has keyEncipherment besides digitalSignature. RSA only.
    pub key_encipherment: bool,
}

/// Authority information access (RFC 5280 §4.2.2.1).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuthorityInfoAccess {
    /// URLs of the issuer's certificate.
    pub ca_issuers: Vec<String>,
    /// URLs of OCSP responders.
    pub ocsp: Vec<String>,
}

impl AuthorityInfoAccess {
    /// Whether both lists are empty.
    pub const fn is_empty(&self) -> bool {
        self.ca_issuers.is_empty() && self.ocsp.is_empty()
    }
}

/// The source of the device's key pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPairRule {
    /// Generated in the HSM during assembly and delivered to the device.
    Generate {
        /// The key type.
        kind: KeyType,
    },
    /// Pregenerated and taken from the secret store.
    Pool {
        /// The key type.
        kind: KeyType,
        /// Whether to generate a pair during assembly if the pool is empty.
        or_generate: bool,
    },
    /// Generated by the device, which sends a PKCS#10 request.
    Csr {
        /// Accepted key types; at least one.
        accepted: Vec<KeyType>,
    },
    /// No key pair; the certificate is a CWT.
    None,
}

impl KeyPairRule {
    /// Whether a certificate of this profile may contain a key of this type.
    pub fn accepts(&self, kind: KeyType) -> bool {
        match self {
            Self::Generate { kind: expected } | Self::Pool { kind: expected, .. } => *expected == kind,
            Self::Csr { accepted } => accepted.contains(&kind),
            Self::None => false,
        }
    }
}

/// A symmetric key that the HSM derives from a master key and the identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SymmetricKeyRule {
    /// Purpose: 1 to 32 characters `a-z 0-9 -`. The derivation label is `spp/v1/` followed by the purpose.
    pub purpose: String,
    /// Length in bytes: 16, 24 or 32.
    pub length: u16,
    /// The master key to derive from.
    pub master_key: KeyName,
}

/// Whether the data package must be sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// Sealed if the chip provides a transport key.
    Optional,
    /// Orders without a transport key are rejected.
    Required,
}
