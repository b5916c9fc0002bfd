//! The register of keys (`keys.toml`): written by a ceremony, demanded by the daemon at every start of a worker.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::attributes::KeyRole;
use super::kdf::Prf;
use super::token::TokenIdentity;
use crate::config::{Faults, read_toml};
use crate::keys::PublicKey;
use crate::names::KeyName;
use crate::tlog::{LogKey, Origin};

/// What the token must hold, validated: names and CKA_IDs are unique, public keys parse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRegister {
    /// Which token.
    pub token: TokenIdentity,
    /// Keys that sign certificates.
    pub signing: Vec<SigningKey>,
    /// Keys that sign the checkpoints of the public database.
    pub log: Vec<CheckpointKey>,
    /// Keys from which device keys are derived.
    pub master: Vec<MasterKey>,
}

/// A key pair that signs certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    /// `CKA_LABEL` of both halves.
    pub name: KeyName,
    /// `CKA_ID` of both halves.
    pub id: Vec<u8>,
    /// What it signs: device certificates, or the TLS certificates of stations and officers.
    pub use_: SigningUse,
    /// The public half, against which the token is checked.
    pub public_key: PublicKey,
    /// The certificate chain, PEM, issuer first. For a key with a CSR it appears once the offline root has answered.
    pub certificate: PathBuf,
}

/// An Ed25519 key pair that signs the checkpoints of a log, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointKey {
    /// `CKA_LABEL` of both halves.
    pub name: KeyName,
    /// `CKA_ID` of both halves.
    pub id: Vec<u8>,
    /// The log's name and the public half, against which the token is checked.
    pub key: LogKey,
    /// The public half once more.
    pub public_key: PublicKey,
}

/// What a signing key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SigningUse {
    /// Device certificates.
    Device,
    /// TLS certificates of stations, officers and the daemon.
    Access,
}

/// A master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasterKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`.
    pub id: Vec<u8>,
    /// Counted from 1; part of every record.
    pub version: u32,
    /// The pseudorandom function.
    pub prf: Prf,
    /// SP 800-108 output for the label `spp/v1/check-value` and an empty context, 8 octets.
    pub check_value: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    token: TokenShape,
    #[serde(default)]
    signing_key: Vec<SigningShape>,
    #[serde(default)]
    log_key: Vec<CheckpointKeyShape>,
    #[serde(default)]
    master_key: Vec<MasterShape>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointKeyShape {
    name: KeyName,
    id: String,
    origin: Origin,
    public_key: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenShape {
    label: String,
    serial: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SigningShape {
    name: KeyName,
    id: String,
    #[serde(rename = "use")]
    use_: SigningUse,
    public_key: String,
    certificate: PathBuf,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MasterShape {
    name: KeyName,
    id: String,
    version: u32,
    prf: Prf,
    check_value: String,
}

impl KeyRegister {
    /// Reads the file; paths in it are relative to its directory.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let hint = "run a ceremony first: sppctl ceremony run";
        let text = std::fs::read_to_string(path).map_err(|e| format!("{e}; {hint}"));
        let text = faults.note(&place, text).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let base = path.parent().unwrap_or(Path::new("."));
        let register = shape.map(|shape| Self::check(shape, &place, base, &mut faults));
        faults.ok_or_all(register)
    }

    fn check(shape: Shape, place: &str, base: &Path, faults: &mut Faults) -> Self {
        let id = |text: &str, what: String, faults: &mut Faults| {
            let bytes = faults.note(&what, hex::decode(text)).unwrap_or_default();
            if bytes.is_empty() && faults.is_empty() {
                faults.add(what, "must not be empty");
            }
            bytes
        };
        let mut signing = Vec::new();
        for key in shape.signing_key {
            let at = format!("{place}: signing_key {}", key.name);
            let der = faults.note(format!("{at}: public_key"), hex::decode(&key.public_key)).unwrap_or_default();
            let Some(public_key) = faults.note(format!("{at}: public_key"), PublicKey::from_spki_der(&der)) else {
                continue;
            };
            let id = id(&key.id, format!("{at}: id"), faults);
            let certificate = base.join(key.certificate);
            signing.push(SigningKey { name: key.name, id, use_: key.use_, public_key, certificate });
        }
        let mut log = Vec::new();
        for key in shape.log_key {
            let at = format!("{place}: log_key {}", key.name);
            let der = faults.note(format!("{at}: public_key"), hex::decode(&key.public_key)).unwrap_or_default();
            let public_key = faults.note(format!("{at}: public_key"), PublicKey::from_spki_der(&der));
            let id = id(&key.id, format!("{at}: id"), faults);
            let Some(public_key) = public_key else { continue };
            let checked = faults.note(format!("{at}: public_key"), LogKey::new(key.origin, public_key.clone()));
            log.extend(checked.map(|checked| CheckpointKey { name: key.name, id, key: checked, public_key }));
        }
        let mut master = Vec::new();
        for key in shape.master_key {
            let at = format!("{place}: master_key {}", key.name);
            let check_value = id(&key.check_value, format!("{at}: check_value"), faults);
            let id = id(&key.id, format!("{at}: id"), faults);
            master.push(MasterKey { name: key.name, id, version: key.version, prf: key.prf, check_value });
        }
        let token = TokenIdentity { label: shape.token.label, serial: shape.token.serial };
        let register = Self { token, signing, log, master };
        register.check_unique(place, faults);
        register
    }

    fn check_unique(&self, place: &str, faults: &mut Faults) {
        let mut seen = std::collections::BTreeSet::new();
        for (name, id, _) in self.all() {
            if !seen.insert(name.to_string()) {
                faults.add(place, format!("the key name {name} is there twice"));
            }
            if !seen.insert(hex::encode(id)) {
                faults.add(place, format!("the CKA_ID {} is there twice", hex::encode(id)));
            }
        }
    }

    /// Whether another token has the same keys, under whatever CKA_ID; the first difference if not.
    pub(super) fn agrees_with(&self, other: &Self) -> Result<(), String> {
        self.has_what(other, "is not there")?;
        other.has_what(self, "is only there")
    }

    fn has_what(&self, other: &Self, missing: &str) -> Result<(), String> {
        for (name, public) in other.signers() {
            match self.signers().find(|(mine, _)| *mine == name) {
                Some((_, mine)) if mine == public => {}
                Some(_) => return Err(format!("the key pair {name} is another one")),
                None => return Err(format!("the key pair {name} {missing}")),
            }
        }
        for key in &other.master {
            match self.master_key(&key.name) {
                Some(mine)
                    if (mine.version, mine.prf, &mine.check_value) == (key.version, key.prf, &key.check_value) => {}
                Some(_) => return Err(format!("the master key {} is another one", key.name)),
                None => return Err(format!("the master key {} {missing}", key.name)),
            }
        }
        Ok(())
    }

    /// Every key: name, CKA_ID, role.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&KeyName, &[u8], KeyRole)> {
        let signing = self.signing.iter().map(|k| (&k.name, k.id.as_slice(), KeyRole::Signing(k.public_key.kind())));
        let log = self.log.iter().map(|k| (&k.name, k.id.as_slice(), KeyRole::Signing(k.public_key.kind())));
        let master = self.master.iter().map(|k| (&k.name, k.id.as_slice(), KeyRole::Master(k.prf)));
        signing.chain(log).chain(master)
    }

    /// Every key that signs, with its public half.
    pub fn signers(&self) -> impl Iterator<Item = (&KeyName, &PublicKey)> {
        let signing = self.signing.iter().map(|k| (&k.name, &k.public_key));
        signing.chain(self.log.iter().map(|k| (&k.name, &k.public_key)))
    }

    /// A log's key by name.
    pub fn log_key(&self, name: &KeyName) -> Option<&CheckpointKey> {
        self.log.iter().find(|key| key.name == *name)
    }

    /// A signing key by name.
    pub fn signing_key(&self, name: &KeyName) -> Option<&SigningKey> {
        self.signing.iter().find(|key| key.name == *name)
    }

    /// A master key by name.
    pub fn master_key(&self, name: &KeyName) -> Option<&MasterKey> {
        self.master.iter().find(|key| key.name == *name)
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        let relative = |path: &Path| path.file_name().map(PathBuf::from).unwrap_or_default();
        let shape = Shape {
            token: TokenShape { label: self.token.label.clone(), serial: self.token.serial.clone() },
            signing_key: self
                .signing
                .iter()
                .map(|k| SigningShape {
                    name: k.name.clone(),
                    id: hex::encode(&k.id),
                    use_: k.use_,
                    public_key: hex::encode(k.public_key.spki_der()),
                    certificate: relative(&k.certificate),
                })
                .collect(),
            log_key: self
                .log
                .iter()
                .map(|k| CheckpointKeyShape {
                    name: k.name.clone(),
                    id: hex::encode(&k.id),
                    origin: k.key.origin().clone(),
                    public_key: hex::encode(k.public_key.spki_der()),
                })
                .collect(),
            master_key: self
                .master
                .iter()
                .map(|k| MasterShape {
                    name: k.name.clone(),
                    id: hex::encode(&k.id),
                    version: k.version,
                    prf: k.prf,
                    check_value: hex::encode(&k.check_value),
                })
                .collect(),
        };
        let head =
            "# Written by `sppctl ceremony run`. The daemon demands to find exactly these keys on the token.\n\n";
        Ok(format!("{head}{}", toml::to_string(&shape)?))
    }
}
