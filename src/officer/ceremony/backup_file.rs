//! `NAME.backup`: a wrapped key with the metadata to restore it on another token and to verify it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use spp_format::file_format::{Faults, read_toml};
use spp_format::keys::{PublicKey, sha384};
use spp_format::names::KeyName;
use spp_format::tlog::{LogKey, Origin};

use crate::hsm::{BackupKey, CheckpointKey, MasterKey, Prf, Restorable, SEALED_LEN, SigningKey, SigningUse};
use crate::officer::OfficerError;

const FORMAT: &str = "spp key backup v1";
/// Domain separation of the seal.
const SEAL_DOMAIN: &[u8] = b"spp/v1/backup-seal\0";

pub(super) struct BackupFile {
    pub(super) name: KeyName,
    /// `CKA_ID`.
    pub(super) id: Vec<u8>,
    /// RFC 5649: a secret key's bytes, a private key as PKCS#8, or the seed of an Ed25519 pair.
    pub(super) wrapped: Vec<u8>,
    pub(super) backup_key: BackupKey,
    pub(super) content: BackedUpKey,
    /// Authenticates all other fields with the backup key: see [`Self::digest`]. Verifying it needs the shares.
    pub(super) seal: Vec<u8>,
}

/// Type and metadata of the key.
pub(super) enum BackedUpKey {
    Signing {
        use_: SigningUse,
        public_key: PublicKey,
        replaces: Option<KeyName>,
        /// Certificate chain in PEM, if the key had one at the time of the backup.
        certificate: Option<String>,
    },
    Log {
        key: LogKey,
        public_key: PublicKey,
    },
    Master {
        version: u32,
        prf: Prf,
        check_value: Vec<u8>,
        replaces: Option<KeyName>,
    },
}

impl BackedUpKey {
    pub(super) fn signing(key: &SigningKey, certificate: Option<String>) -> Self {
        let (use_, public_key, replaces) = (key.use_, key.public_key.clone(), key.replaces.clone());
        Self::Signing { use_, public_key, replaces, certificate }
    }

    pub(super) fn log(key: &CheckpointKey) -> Self {
        Self::Log { key: key.key.clone(), public_key: key.public_key.clone() }
    }

    pub(super) fn master(key: &MasterKey) -> Self {
        let (version, prf, check_value, replaces) =
            (key.version, key.prf, key.check_value.clone(), key.replaces.clone());
        Self::Master { version, prf, check_value, replaces }
    }

    /// Parameters to restore the key on a token.
    pub(super) fn restorable(&self) -> Restorable {
        match self {
            Self::Signing { public_key, .. } | Self::Log { public_key, .. } => Restorable::Signing(public_key.clone()),
            Self::Master { prf, .. } => Restorable::Master(*prf),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    format: String,
    name: KeyName,
    id: String,
    wrapped: String,
    seal: String,
    under: UnderShape,
    what: BackedUpKeyShape,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UnderShape {
    name: KeyName,
    id: String,
    check_value: String,
    shares: u8,
    threshold: u8,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", rename_all_fields = "snake_case", deny_unknown_fields)]
enum BackedUpKeyShape {
    Signing {
        #[serde(rename = "use")]
        use_: SigningUse,
        public_key: String,
        replaces: Option<KeyName>,
        certificate: Option<String>,
    },
    Log {
        origin: Origin,
        public_key: String,
    },
    Master {
        version: u32,
        prf: Prf,
        check_value: String,
        replaces: Option<KeyName>,
    },
}

impl BackupFile {
    /// Reads the file.
    pub(super) fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let text = faults.note(&place, std::fs::read_to_string(path)).unwrap_or_default();
        let shape: Option<Shape> = if faults.is_empty() { read_toml(&place, &text, &mut faults) } else { None };
        let file = shape.and_then(|shape| Self::check(shape, &place, &mut faults));
        faults.into_result(file)
    }

    fn check(shape: Shape, place: &str, faults: &mut Faults) -> Option<Self> {
        if shape.format != FORMAT {
            faults.add(place, format!("not a key backup: expected format {FORMAT:?}"));
        }
        let id = faults.note(format!("{place}: id"), hex::decode(&shape.id));
        let wrapped = faults.note(format!("{place}: wrapped"), hex::decode(&shape.wrapped));
        let seal = faults.note(format!("{place}: seal"), hex::decode(&shape.seal));
        let UnderShape { name, id: under_id, check_value, shares, threshold } = shape.under;
        let under_id = faults.note(format!("{place}: under.id"), hex::decode(under_id));
        let check_value = faults.note(format!("{place}: under.check_value"), hex::decode(check_value));
        let content = faults.note(format!("{place}: what"), shape.what.check());
        let backup_key = BackupKey { name, id: under_id?, check_value: check_value?, shares, threshold };
        Some(Self { name: shape.name, id: id?, wrapped: wrapped?, backup_key, content: content?, seal: seal? })
    }

    /// Input of the seal: SHA-384 over all other fields as JSON without spaces, a deterministic encoding.
    pub(super) fn digest(&self) -> Result<[u8; SEALED_LEN], OfficerError> {
        let json = serde_json::to_vec(&self.shape(&[])).map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(sha384(&[SEAL_DOMAIN, &json].concat()))
    }

    pub(super) fn to_toml(&self) -> Result<String, OfficerError> {
        let backup_key = &self.backup_key;
        let head = format!(
            "# A key wrapped under {} (AES-KWP, RFC 5649). A ceremony with [[restore]] and {} of its shares reads it.\n\n",
            backup_key.name, backup_key.threshold
        );
        let text = toml::to_string(&self.shape(&self.seal)).map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(format!("{head}{text}"))
    }

    fn shape(&self, seal: &[u8]) -> Shape {
        let backup_key = &self.backup_key;
        Shape {
            format: FORMAT.to_owned(),
            name: self.name.clone(),
            id: hex::encode(&self.id),
            wrapped: hex::encode(&self.wrapped),
            seal: hex::encode(seal),
            under: UnderShape {
                name: backup_key.name.clone(),
                id: hex::encode(&backup_key.id),
                check_value: hex::encode(&backup_key.check_value),
                shares: backup_key.shares,
                threshold: backup_key.threshold,
            },
            what: BackedUpKeyShape::of(&self.content),
        }
    }
}

fn public_key(text: &str) -> Result<PublicKey, String> {
    let der = hex::decode(text).map_err(|e| e.to_string())?;
    PublicKey::from_spki_der(&der).map_err(|e| e.to_string())
}

impl BackedUpKeyShape {
    fn of(content: &BackedUpKey) -> Self {
        let hex_of = |key: &PublicKey| hex::encode(key.spki_der());
        match content {
            BackedUpKey::Signing { use_, public_key, replaces, certificate } => Self::Signing {
                use_: *use_,
                public_key: hex_of(public_key),
                replaces: replaces.clone(),
                certificate: certificate.clone(),
            },
            BackedUpKey::Log { key, public_key } => {
                Self::Log { origin: key.origin().clone(), public_key: hex_of(public_key) }
            }
            BackedUpKey::Master { version, prf, check_value, replaces } => Self::Master {
                version: *version,
                prf: *prf,
                check_value: hex::encode(check_value),
                replaces: replaces.clone(),
            },
        }
    }

    fn check(self) -> Result<BackedUpKey, String> {
        match self {
            Self::Signing { use_, public_key: key, replaces, certificate } => {
                Ok(BackedUpKey::Signing { use_, public_key: public_key(&key)?, replaces, certificate })
            }
            Self::Log { origin, public_key: key } => {
                let public_key = public_key(&key)?;
                let key = LogKey::new(origin, public_key.clone()).map_err(|e| e.to_string())?;
                Ok(BackedUpKey::Log { key, public_key })
            }
            Self::Master { version, prf, check_value, replaces } => {
                let check_value = hex::decode(check_value).map_err(|e| e.to_string())?;
                Ok(BackedUpKey::Master { version, prf, check_value, replaces })
            }
        }
    }
}
