//! Reads, validates and writes the key manifest file, `keys.toml`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spp_format::file_format::{Faults, read_toml};
use spp_format::keys::PublicKey;
use spp_format::names::KeyName;
use spp_format::tlog::{LogKey, Origin};
use time::OffsetDateTime;

use super::attributes::Provenance;
use super::kdf::Prf;
use super::key_manifest::{BackupKey, CheckpointKey, DestroyedKey, KeyManifest, MasterKey, SigningKey, SigningUse};
use super::token::TokenIdentity;

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
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    backup_key: Vec<BackupShape>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    destroyed: Vec<DestroyedShape>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckpointKeyShape {
    name: KeyName,
    id: String,
    origin: Origin,
    public_key: String,
    #[serde(default, skip_serializing_if = "Provenance::is_made")]
    provenance: Provenance,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyName>,
    #[serde(default, skip_serializing_if = "Provenance::is_made")]
    provenance: Provenance,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MasterShape {
    name: KeyName,
    id: String,
    version: u32,
    prf: Prf,
    check_value: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyName>,
    #[serde(default, skip_serializing_if = "Provenance::is_made")]
    provenance: Provenance,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BackupShape {
    name: KeyName,
    id: String,
    check_value: String,
    shares: u8,
    threshold: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DestroyedShape {
    name: KeyName,
    id: String,
    fingerprint: String,
    #[serde(with = "time::serde::rfc3339")]
    time: OffsetDateTime,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replaces: Option<KeyName>,
}

impl KeyManifest {
    /// The manifest of a token before its first ceremony.
    pub fn empty(token: TokenIdentity) -> Self {
        let (signing, log, master) = (Vec::new(), Vec::new(), Vec::new());
        Self { token, signing, log, master, backup: Vec::new(), destroyed: Vec::new() }
    }

    /// Reads the file; paths in it are relative to its directory.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let hint = "create it with `sppctl ceremony run`";
        let text = std::fs::read_to_string(path).map_err(|e| format!("{e}; {hint}"));
        let text = faults.note(&place, text).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let base = path.parent().unwrap_or(Path::new("."));
        let manifest = shape.map(|shape| Self::check(shape, &place, base, &mut faults));
        faults.into_result(manifest)
    }

    fn check(shape: Shape, place: &str, base: &Path, faults: &mut Faults) -> Self {
        let mut manifest = Self::empty(TokenIdentity { label: shape.token.label, serial: shape.token.serial });
        for key in shape.signing_key {
            manifest.signing.extend(key.check(place, base, faults));
        }
        for key in shape.log_key {
            manifest.log.extend(key.check(place, faults));
        }
        for key in shape.master_key {
            let at = format!("{place}: master_key {}", key.name);
            let check_value = bytes(&key.check_value, format!("{at}: check_value"), faults);
            let id = bytes(&key.id, format!("{at}: id"), faults);
            let MasterShape { name, version, prf, replaces, provenance, .. } = key;
            manifest.master.push(MasterKey { name, id, version, prf, check_value, replaces, provenance });
        }
        for key in shape.backup_key {
            let at = format!("{place}: backup_key {}", key.name);
            let check_value = bytes(&key.check_value, format!("{at}: check_value"), faults);
            let id = bytes(&key.id, format!("{at}: id"), faults);
            let BackupShape { name, shares, threshold, .. } = key;
            manifest.backup.push(BackupKey { name, id, check_value, shares, threshold });
        }
        for key in shape.destroyed {
            let at = format!("{place}: destroyed {}", key.name);
            let id = bytes(&key.id, format!("{at}: id"), faults);
            let time = key.time.unix_timestamp().try_into().unwrap_or_default();
            let DestroyedShape { name, fingerprint, version, replaces, .. } = key;
            manifest.destroyed.push(DestroyedKey { name, id, fingerprint, time, version, replaces });
        }
        manifest.check_unique(place, faults);
        manifest
    }

    fn check_unique(&self, place: &str, faults: &mut Faults) {
        let mut seen = BTreeSet::new();
        for (name, id) in self.used_names() {
            if !seen.insert(name.to_string()) {
                faults.add(place, format!("duplicate key name {name}"));
            }
            if !seen.insert(hex::encode(id)) {
                faults.add(place, format!("duplicate CKA_ID {}", hex::encode(id)));
            }
        }
    }

    /// The file's text.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        let token = TokenShape { label: self.token.label.clone(), serial: self.token.serial.clone() };
        let shape = Shape {
            token,
            signing_key: self.signing.iter().map(SigningShape::of).collect(),
            log_key: self.log.iter().map(CheckpointKeyShape::of).collect(),
            master_key: self.master.iter().map(MasterShape::of).collect(),
            backup_key: self.backup.iter().map(BackupShape::of).collect(),
            destroyed: self.destroyed.iter().map(DestroyedShape::of).collect(),
        };
        // `KeyManifest::fingerprint` hashes this line, too: it must not change.
        let head =
            "# Written by `sppctl ceremony run`. The daemon demands to find exactly these keys on the token.\n\n";
        Ok(format!("{head}{}", toml::to_string(&shape)?))
    }
}

fn bytes(text: &str, what: String, faults: &mut Faults) -> Vec<u8> {
    let bytes = faults.note(&what, hex::decode(text)).unwrap_or_default();
    if bytes.is_empty() && faults.is_empty() {
        faults.add(what, "must not be empty");
    }
    bytes
}

fn public_key(text: &str, at: &str, faults: &mut Faults) -> Option<PublicKey> {
    let der = faults.note(format!("{at}: public_key"), hex::decode(text))?;
    faults.note(format!("{at}: public_key"), PublicKey::from_spki_der(&der))
}

impl SigningShape {
    fn check(self, place: &str, base: &Path, faults: &mut Faults) -> Option<SigningKey> {
        let at = format!("{place}: signing_key {}", self.name);
        let id = bytes(&self.id, format!("{at}: id"), faults);
        let public_key = public_key(&self.public_key, &at, faults)?;
        let certificate = base.join(self.certificate);
        let Self { name, use_, replaces, provenance, .. } = self;
        Some(SigningKey { name, id, use_, public_key, certificate, replaces, provenance })
    }

    fn of(key: &SigningKey) -> Self {
        Self {
            name: key.name.clone(),
            id: hex::encode(&key.id),
            use_: key.use_,
            public_key: hex::encode(key.public_key.spki_der()),
            certificate: key.certificate.file_name().map(PathBuf::from).unwrap_or_default(),
            replaces: key.replaces.clone(),
            provenance: key.provenance,
        }
    }
}

impl CheckpointKeyShape {
    fn check(self, place: &str, faults: &mut Faults) -> Option<CheckpointKey> {
        let at = format!("{place}: log_key {}", self.name);
        let id = bytes(&self.id, format!("{at}: id"), faults);
        let public_key = public_key(&self.public_key, &at, faults)?;
        let key = faults.note(format!("{at}: public_key"), LogKey::new(self.origin, public_key.clone()))?;
        Some(CheckpointKey { name: self.name, id, key, public_key, provenance: self.provenance })
    }

    fn of(key: &CheckpointKey) -> Self {
        Self {
            name: key.name.clone(),
            id: hex::encode(&key.id),
            origin: key.key.origin().clone(),
            public_key: hex::encode(key.public_key.spki_der()),
            provenance: key.provenance,
        }
    }
}

impl MasterShape {
    fn of(key: &MasterKey) -> Self {
        Self {
            name: key.name.clone(),
            id: hex::encode(&key.id),
            version: key.version,
            prf: key.prf,
            check_value: hex::encode(&key.check_value),
            replaces: key.replaces.clone(),
            provenance: key.provenance,
        }
    }
}

impl BackupShape {
    fn of(key: &BackupKey) -> Self {
        let (name, id, check_value) = (key.name.clone(), hex::encode(&key.id), hex::encode(&key.check_value));
        Self { name, id, check_value, shares: key.shares, threshold: key.threshold }
    }
}

impl DestroyedShape {
    fn of(key: &DestroyedKey) -> Self {
        let seconds = key.time.try_into().unwrap_or_default();
        Self {
            name: key.name.clone(),
            id: hex::encode(&key.id),
            fingerprint: key.fingerprint.clone(),
            time: OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH),
            version: key.version,
            replaces: key.replaces.clone(),
        }
    }
}
