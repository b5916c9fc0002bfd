//! The attributes of token keys by role: the template for generation, and the audit of existing keys.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType as CkKeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use serde::{Deserialize, Serialize};
use spp_format::keys::KeyType;
use spp_format::names::KeyName;

use super::failure::{Failure, FailureContext as _};
use super::failure_class::FailureClass;
use super::kdf::Prf;
use super::module::{KdfRoute, ModuleProfile};

/// `secp256r1` in DER, for CKA_EC_PARAMS (PKCS#11 v2.40 §2.3.3).
const SECP256R1: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// `secp384r1` in DER.
const SECP384R1: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
/// `id-Ed25519` in DER (RFC 8410 §3).
const ED25519: &[u8] = &[0x06, 0x03, 0x2b, 0x65, 0x70];

/// The purpose of a key on the token. Each key has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyRole {
    /// Signs certificates: CKA_SIGN only.
    Signing(KeyType),
    /// Derives device keys: CKA_SIGN only (the MAC is the PRF).
    Master(Prf),
    /// Derives device keys by the module's own mechanism: CKA_DERIVE only.
    MasterDeriving(Prf),
    /// Wraps and unwraps key pairs only.
    Wrapping,
    /// Wraps other keys for their backup only. Unwrapping requires the key's shares.
    Backup,
}

/// The origin of a key on the token. PKCS#11 attributes and the key manifest record it for the life of the object.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Provenance {
    /// Generated on the token, never extractable.
    #[default]
    Made,
    /// Generated on the token; extractable during its ceremony, to be wrapped under a backup key.
    BackedUp,
    /// Imported: restored from a backup, or of a key type that the module can back up only this way.
    Imported,
}

impl Provenance {
    pub(super) fn is_made(&self) -> bool {
        *self == Self::Made
    }
}

/// The usage attributes in the order of PKCS#11's table. All except those of the role must be false.
const USAGES: [AttributeType; 6] = [
    AttributeType::Sign,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::Derive,
];

impl KeyRole {
    /// The role of a master key for a derivation route.
    pub(crate) const fn master(prf: Prf, route: KdfRoute) -> Self {
        match route {
            KdfRoute::Prf => Self::Master(prf),
            KdfRoute::Sp800108Counter => Self::MasterDeriving(prf),
        }
    }

    /// The role adapted to a module's derivation route.
    pub(crate) const fn with_route(self, route: KdfRoute) -> Self {
        match self {
            Self::Master(prf) | Self::MasterDeriving(prf) => Self::master(prf, route),
            other => other,
        }
    }

    /// The object class of the role's key.
    pub(crate) fn class(self) -> ObjectClass {
        match self {
            Self::Signing(_) => ObjectClass::PRIVATE_KEY,
            Self::Master(_) | Self::MasterDeriving(_) | Self::Wrapping | Self::Backup => ObjectClass::SECRET_KEY,
        }
    }

    /// The key types that the role allows.
    pub(crate) fn key_types(self) -> &'static [CkKeyType] {
        match self {
            Self::Signing(KeyType::P256 | KeyType::P384) => &[CkKeyType::EC],
            Self::Signing(KeyType::Ed25519) => &[CkKeyType::EC_EDWARDS],
            Self::Signing(_) => &[CkKeyType::RSA],
            Self::Master(Prf::HmacSha256) | Self::MasterDeriving(Prf::HmacSha256) => {
                &[CkKeyType::GENERIC_SECRET, CkKeyType::SHA256_HMAC]
            }
            Self::Master(Prf::AesCmac) | Self::MasterDeriving(Prf::AesCmac) | Self::Wrapping | Self::Backup => {
                &[CkKeyType::AES]
            }
        }
    }

    fn usages(self) -> &'static [AttributeType] {
        match self {
            Self::Signing(_) | Self::Master(_) => &[AttributeType::Sign],
            Self::MasterDeriving(_) => &[AttributeType::Derive],
            Self::Wrapping => &[AttributeType::Wrap, AttributeType::Unwrap],
            Self::Backup => &[AttributeType::Wrap],
        }
    }

    /// The template of a new token object with this role: a private key or a secret key.
    pub(crate) fn template(self, name: &KeyName, id: &[u8], module: &ModuleProfile) -> Vec<Attribute> {
        let mut template = vec![
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Modifiable(false),
            Attribute::Copyable(false),
            Attribute::Label(name.as_str().as_bytes().to_vec()),
            Attribute::Id(id.to_vec()),
        ];
        let of_class: &[AttributeType] = match self {
            // A private key has no CKA_WRAP and no CKA_ENCRYPT (PKCS#11 v2.40 §4.9).
            Self::Signing(_) => {
                &[AttributeType::Sign, AttributeType::Decrypt, AttributeType::Unwrap, AttributeType::Derive]
            }
            Self::Master(_) | Self::MasterDeriving(_) | Self::Wrapping | Self::Backup => &USAGES,
        };
        if module.no_copyable {
            template.retain(|attribute| *attribute != Attribute::Copyable(false));
        }
        template.extend(of_class.iter().filter_map(|usage| usage_attribute(*usage, self.usages().contains(usage))));
        template
    }
}

fn usage_attribute(usage: AttributeType, value: bool) -> Option<Attribute> {
    match usage {
        AttributeType::Sign => Some(Attribute::Sign(value)),
        AttributeType::Encrypt => Some(Attribute::Encrypt(value)),
        AttributeType::Decrypt => Some(Attribute::Decrypt(value)),
        AttributeType::Wrap => Some(Attribute::Wrap(value)),
        AttributeType::Unwrap => Some(Attribute::Unwrap(value)),
        AttributeType::Derive => Some(Attribute::Derive(value)),
        _ => None,
    }
}

/// The mechanism for generating a pair of a key type, and the type-specific attributes of the public template.
pub(crate) fn pair_generation(kind: KeyType) -> (Mechanism<'static>, Vec<Attribute>) {
    let curve = |params: &[u8]| vec![Attribute::EcParams(params.to_vec())];
    match kind {
        KeyType::P256 => (Mechanism::EccKeyPairGen, curve(SECP256R1)),
        KeyType::P384 => (Mechanism::EccKeyPairGen, curve(SECP384R1)),
        KeyType::Ed25519 => (Mechanism::EccEdwardsKeyPairGen, curve(ED25519)),
        KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => {
            let bits = kind.rsa_bits().unwrap_or(2048) as u64;
            let template = vec![Attribute::ModulusBits(bits.into()), Attribute::PublicExponent(vec![1, 0, 1])];
            (Mechanism::RsaPkcsKeyPairGen, template)
        }
    }
}

/// Refuses a key that is extractable, not sensitive, usable for more than its purpose, or whose attributes contradict the
/// provenance in the manifest.
pub(crate) fn audit(
    session: &Session,
    object: ObjectHandle,
    name: &KeyName,
    role: KeyRole,
    provenance: Provenance,
) -> Result<(), Failure> {
    let mut wanted = vec![
        AttributeType::KeyType,
        AttributeType::Sensitive,
        AttributeType::Extractable,
        AttributeType::AlwaysSensitive,
        AttributeType::NeverExtractable,
        AttributeType::Local,
    ];
    wanted.extend(USAGES);
    let found =
        session.get_attributes(object, &wanted).context(|| format!("reading the attributes of the key {name}"))?;
    let problems = problems(&found, role, provenance);
    if problems.is_empty() {
        return Ok(());
    }
    Err(Failure::new(
        FailureClass::Rejected,
        format!(
            "the key {name} fails the attribute audit: {}; generate a new one with `sppctl ceremony run`",
            problems.join(", ")
        ),
    ))
}

fn problems(found: &[Attribute], role: KeyRole, provenance: Provenance) -> Vec<String> {
    let mut problems = Vec::new();
    let must = |attribute: Attribute, problem: &str, problems: &mut Vec<String>| {
        if !found.contains(&attribute) {
            problems.push(problem.to_owned());
        }
    };
    must(Attribute::Sensitive(true), "CKA_SENSITIVE is not true", &mut problems);
    must(Attribute::Extractable(false), "CKA_EXTRACTABLE is not false", &mut problems);
    if provenance != Provenance::Imported {
        must(Attribute::AlwaysSensitive(true), "CKA_ALWAYS_SENSITIVE is not true", &mut problems);
        must(Attribute::Local(true), "CKA_LOCAL is not true: it was not generated on this token", &mut problems);
    }
    if provenance == Provenance::Made {
        must(Attribute::NeverExtractable(true), "CKA_NEVER_EXTRACTABLE is not true", &mut problems);
    }
    if !role.key_types().iter().any(|t| found.contains(&Attribute::KeyType(*t))) {
        problems.push("CKA_KEY_TYPE does not match its role".to_owned());
    }
    for usage in USAGES {
        let allowed = role.usages().contains(&usage);
        // A missing usage attribute counts as false: private keys have no CKA_WRAP.
        let is_set = usage_attribute(usage, true).is_some_and(|set| found.contains(&set));
        if is_set != allowed {
            problems.push(format!("CKA_{} is {is_set}", format!("{usage:?}").to_uppercase()));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid_attributes() -> Vec<Attribute> {
        vec![
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::AlwaysSensitive(true),
            Attribute::NeverExtractable(true),
            Attribute::Local(true),
            Attribute::KeyType(CkKeyType::AES),
            Attribute::Wrap(true),
            Attribute::Unwrap(true),
            Attribute::Sign(false),
        ]
    }

    #[test]
    fn valid_key_has_no_problems() {
        assert_eq!(problems(&valid_attributes(), KeyRole::Wrapping, Provenance::Made), Vec::<String>::new());
    }

    #[test]
    fn each_wrong_attribute_is_found() {
        for (right, wrong) in [
            (Attribute::Sensitive(true), Attribute::Sensitive(false)),
            (Attribute::Extractable(false), Attribute::Extractable(true)),
            (Attribute::AlwaysSensitive(true), Attribute::AlwaysSensitive(false)),
            (Attribute::NeverExtractable(true), Attribute::NeverExtractable(false)),
            (Attribute::Local(true), Attribute::Local(false)),
            (Attribute::KeyType(CkKeyType::AES), Attribute::KeyType(CkKeyType::GENERIC_SECRET)),
            (Attribute::Wrap(true), Attribute::Wrap(false)),
            (Attribute::Sign(false), Attribute::Sign(true)),
            (Attribute::Sign(false), Attribute::Decrypt(true)),
        ] {
            let mut attributes = valid_attributes();
            attributes.retain(|a| *a != right);
            assert!(attributes.len() < valid_attributes().len());
            attributes.push(wrong.clone());
            assert_eq!(problems(&attributes, KeyRole::Wrapping, Provenance::Made).len(), 1, "{wrong:?}");
        }
    }

    #[test]
    fn provenance_allows_only_its_own_attributes() {
        let departures = [
            (Attribute::NeverExtractable(true), 0, 0),
            (Attribute::Local(true), 1, 0),
            (Attribute::AlwaysSensitive(true), 1, 0),
            (Attribute::Extractable(false), 1, 1),
            (Attribute::Sensitive(true), 1, 1),
        ];
        for (missing, backed_up, imported) in departures {
            let mut attributes = valid_attributes();
            attributes.retain(|a| *a != missing);
            let count = |provenance| problems(&attributes, KeyRole::Wrapping, provenance).len();
            let counts = [Provenance::Made, Provenance::BackedUp, Provenance::Imported].map(count);
            assert_eq!(counts, [1, backed_up, imported], "{missing:?}");
        }
    }
}
