//! `NAME.backup`: a wrapped key, and everything that is needed to put it into another token and to know it again.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::config::{Faults, read_toml};
use crate::hsm::{BackupKey, CheckpointKey, MasterKey, Prf, Restorable, SEALED_LEN, SigningKey, SigningUse};
use crate::keys::{PublicKey, sha384};
use crate::names::KeyName;
use crate::officer::OfficerError;
use crate::tlog::{LogKey, Origin};

const FORMAT: &str = "spp key backup v1";
/// What a seal is made of is of nothing else.
const SEAL_DOMAIN: &[u8] = b"spp/v1/backup-seal\0";

pub(super) struct BackupFile {
    pub(super) name: KeyName,
    /// `CKA_ID`.
    pub(super) id: Vec<u8>,
    /// RFC 5649: a secret key's bytes, a private key as PKCS#8, or the seed of an Ed25519 pair.
    pub(super) wrapped: Vec<u8>,
    pub(super) under: BackupKey,
    pub(super) what: What,
    /// Everything else of the file, bound to the backup key: see [`Self::digest`]. Only the shares can tell whether it is right.
    pub(super) seal: Vec<u8>,
}

/// What the key is.
pub(super) enum What {
    Signing {
        use_: SigningUse,
        public_key: PublicKey,
        replaces: Option<KeyName>,
        /// Its chain in PEM, if it had one when it was backed up.
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

impl What {
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

    /// What the token must know of it.
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
    what: WhatShape,
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
enum WhatShape {
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
        faults.ok_or_all(file)
    }

    fn check(shape: Shape, place: &str, faults: &mut Faults) -> Option<Self> {
        if shape.format != FORMAT {
            faults.add(place, format!("is no {FORMAT}"));
        }
        let id = faults.note(format!("{place}: id"), hex::decode(&shape.id));
        let wrapped = faults.note(format!("{place}: wrapped"), hex::decode(&shape.wrapped));
        let seal = faults.note(format!("{place}: seal"), hex::decode(&shape.seal));
        let UnderShape { name, id: under_id, check_value, shares, threshold } = shape.under;
        let under_id = faults.note(format!("{place}: under.id"), hex::decode(under_id));
        let check_value = faults.note(format!("{place}: under.check_value"), hex::decode(check_value));
        let what = faults.note(format!("{place}: what"), shape.what.check());
        let under = BackupKey { name, id: under_id?, check_value: check_value?, shares, threshold };
        Some(Self { name: shape.name, id: id?, wrapped: wrapped?, under, what: what?, seal: seal? })
    }

    /// What the seal is made of: SHA-384 over everything but the seal, as JSON without spaces, which is always the same bytes.
    pub(super) fn digest(&self) -> Result<[u8; SEALED_LEN], OfficerError> {
        let json = serde_json::to_vec(&self.shape(&[])).map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(sha384(&[SEAL_DOMAIN, &json].concat()))
    }

    pub(super) fn to_toml(&self) -> Result<String, OfficerError> {
        let under = &self.under;
        let head = format!(
            "# A key wrapped under {} (AES-KWP, RFC 5649). A ceremony with [[restore]] and {} of its shares reads it.\n\n",
            under.name, under.threshold
        );
        let text = toml::to_string(&self.shape(&self.seal)).map_err(|e| OfficerError::Other(e.to_string()))?;
        Ok(format!("{head}{text}"))
    }

    fn shape(&self, seal: &[u8]) -> Shape {
        let under = &self.under;
        Shape {
            format: FORMAT.to_owned(),
            name: self.name.clone(),
            id: hex::encode(&self.id),
            wrapped: hex::encode(&self.wrapped),
            seal: hex::encode(seal),
            under: UnderShape {
                name: under.name.clone(),
                id: hex::encode(&under.id),
                check_value: hex::encode(&under.check_value),
                shares: under.shares,
                threshold: under.threshold,
            },
            what: WhatShape::of(&self.what),
        }
    }
}

fn public_key(text: &str) -> Result<PublicKey, String> {
    let der = hex::decode(text).map_err(|e| e.to_string())?;
    PublicKey::from_spki_der(&der).map_err(|e| e.to_string())
}

impl WhatShape {
    fn of(what: &What) -> Self {
        let hex_of = |key: &PublicKey| hex::encode(key.spki_der());
        match what {
            What::Signing { use_, public_key, replaces, certificate } => Self::Signing {
                use_: *use_,
                public_key: hex_of(public_key),
                replaces: replaces.clone(),
                certificate: certificate.clone(),
            },
            What::Log { key, public_key } => Self::Log { origin: key.origin().clone(), public_key: hex_of(public_key) },
            What::Master { version, prf, check_value, replaces } => Self::Master {
                version: *version,
                prf: *prf,
                check_value: hex::encode(check_value),
                replaces: replaces.clone(),
            },
        }
    }

    fn check(self) -> Result<What, String> {
        match self {
            Self::Signing { use_, public_key: key, replaces, certificate } => {
                Ok(What::Signing { use_, public_key: public_key(&key)?, replaces, certificate })
            }
            Self::Log { origin, public_key: key } => {
                let public_key = public_key(&key)?;
                let key = LogKey::new(origin, public_key.clone()).map_err(|e| e.to_string())?;
                Ok(What::Log { key, public_key })
            }
            Self::Master { version, prf, check_value, replaces } => {
                let check_value = hex::decode(check_value).map_err(|e| e.to_string())?;
                Ok(What::Master { version, prf, check_value, replaces })
            }
        }
    }
}
