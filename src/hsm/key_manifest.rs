//! The key manifest (`keys.toml`): lists the keys of a token. A ceremony writes it, and every worker start checks the token
//! against it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use spp_format::keys::{PublicKey, sha256};
use spp_format::names::KeyName;
use spp_format::tlog::LogKey;

use super::attributes::{KeyRole, Provenance};
use super::kdf::Prf;
use super::token::TokenIdentity;

/// The keys that a token must hold. Validated: names and CKA_IDs are unique, public keys parse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyManifest {
    /// The token.
    pub token: TokenIdentity,
    /// Keys that sign certificates.
    pub signing: Vec<SigningKey>,
    /// Keys that sign the checkpoints of the public database.
    pub log: Vec<CheckpointKey>,
    /// Keys from which device keys are derived.
    pub master: Vec<MasterKey>,
    /// Keys that wrap other keys for their backup. The daemon does not use them.
    pub backup: Vec<BackupKey>,
    /// Destroyed keys. Their names are never reused.
    pub destroyed: Vec<DestroyedKey>,
}

/// A key pair that signs certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SigningKey {
    /// `CKA_LABEL` of both halves.
    pub name: KeyName,
    /// `CKA_ID` of both halves.
    pub id: Vec<u8>,
    /// Its use: device certificates, TLS certificates of stations and officers, or CA certificates.
    pub use_: SigningUse,
    /// The public key, against which the token is checked.
    pub public_key: PublicKey,
    /// The certificate chain, PEM, issuer first. For a key with a CSR the file exists only after the certificate was imported.
    pub certificate: PathBuf,
    /// The older key that it replaces.
    pub replaces: Option<KeyName>,
    /// How it came onto the token.
    pub provenance: Provenance,
}

/// An Ed25519 key pair that signs the checkpoints of a log, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointKey {
    /// `CKA_LABEL` of both halves.
    pub name: KeyName,
    /// `CKA_ID` of both halves.
    pub id: Vec<u8>,
    /// The log's origin and the public key, against which the token is checked.
    pub key: LogKey,
    /// The same public key as a SubjectPublicKeyInfo.
    pub public_key: PublicKey,
    /// How it came onto the token.
    pub provenance: Provenance,
}

/// The use of a signing key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SigningUse {
    /// Device certificates.
    Device,
    /// TLS certificates of stations, officers and the daemon.
    Access,
    /// Certificates of other signing keys, in ceremonies only.
    Root,
}

/// A master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MasterKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`.
    pub id: Vec<u8>,
    /// The version, counted from 1; part of every record.
    pub version: u32,
    /// The pseudorandom function.
    pub prf: Prf,
    /// SP 800-108 output for the label `spp/v1/check-value` and an empty context, 8 bytes.
    pub check_value: Vec<u8>,
    /// The older key that it replaces.
    pub replaces: Option<KeyName>,
    /// How it came onto the token.
    pub provenance: Provenance,
}

/// A key that wraps other keys for their backup. It cannot unwrap them: that requires the key's shares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`.
    pub id: Vec<u8>,
    /// The first 8 bytes of the result of wrapping 32 zero bytes (RFC 5649).
    pub check_value: Vec<u8>,
    /// Number of shares issued.
    pub shares: u8,
    /// Number of shares required to reconstruct the key.
    pub threshold: u8,
}

/// The record of a destroyed key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestroyedKey {
    /// The name.
    pub name: KeyName,
    /// The CKA_ID.
    pub id: Vec<u8>,
    /// The fingerprint: see [`KeyManifest::fingerprint_text`].
    pub fingerprint: String,
    /// The time of destruction, in seconds since the Unix epoch.
    pub time: u64,
    /// The version of a master key. It is not reused within its line of replacements.
    pub version: Option<u32>,
    /// The older key that it replaced.
    pub replaces: Option<KeyName>,
}

impl KeyManifest {
    /// The public keys that certify callers, including replaced ones.
    pub fn access_keys(&self) -> Vec<PublicKey> {
        let access = self.signing.iter().filter(|key| key.use_ == SigningUse::Access);
        access.map(|key| key.public_key.clone()).collect()
    }

    /// SHA-256 of the manifest's text.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(self.to_toml().unwrap_or_default().as_bytes())
    }

    /// Checks that two manifests list the same keys, regardless of their CKA_IDs. The error is the first difference.
    pub(super) fn check_same_keys(&self, other: &Self) -> Result<(), String> {
        self.check_contains(other, "is missing")?;
        other.check_contains(self, "exists only there")
    }

    fn check_contains(&self, other: &Self, missing: &str) -> Result<(), String> {
        for (name, public) in other.signers() {
            match self.signers().find(|(own_name, _)| *own_name == name) {
                Some((_, own_public)) if own_public == public => {}
                Some(_) => return Err(format!("the key pair {name} has another public key")),
                None => return Err(format!("the key pair {name} {missing}")),
            }
        }
        for key in &other.master {
            match self.master_key(&key.name) {
                Some(own) if (own.version, own.prf, &own.check_value) == (key.version, key.prf, &key.check_value) => {}
                Some(_) => return Err(format!("the master key {} has another version, PRF or check value", key.name)),
                None => return Err(format!("the master key {} {missing}", key.name)),
            }
        }
        Ok(())
    }

    /// Every key that the daemon requires: name, CKA_ID, role, provenance.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&KeyName, &[u8], KeyRole, Provenance)> {
        let pair = |public: &PublicKey| KeyRole::Signing(public.kind());
        let signing = self.signing.iter().map(move |k| (&k.name, k.id.as_slice(), pair(&k.public_key), k.provenance));
        let log = self.log.iter().map(move |k| (&k.name, k.id.as_slice(), pair(&k.public_key), k.provenance));
        let master = self.master.iter().map(|k| (&k.name, k.id.as_slice(), KeyRole::Master(k.prf), k.provenance));
        signing.chain(log).chain(master)
    }

    /// Every name and CKA_ID ever used on this token.
    pub(crate) fn used_names(&self) -> impl Iterator<Item = (&KeyName, &[u8])> {
        let backup = self.backup.iter().map(|k| (&k.name, k.id.as_slice()));
        let destroyed = self.destroyed.iter().map(|k| (&k.name, k.id.as_slice()));
        self.all().map(|(name, id, ..)| (name, id)).chain(backup).chain(destroyed)
    }

    /// Every key pair that signs, with its public key.
    pub fn signers(&self) -> impl Iterator<Item = (&KeyName, &PublicKey)> {
        let signing = self.signing.iter().map(|k| (&k.name, &k.public_key));
        signing.chain(self.log.iter().map(|k| (&k.name, &k.public_key)))
    }

    /// A log key by name.
    pub fn log_key(&self, name: &KeyName) -> Option<&CheckpointKey> {
        self.log.iter().find(|key| key.name == *name)
    }

    /// A signing key by name.
    pub fn signing_key(&self, name: &KeyName) -> Option<&SigningKey> {
        self.signing.iter().find(|key| key.name == *name)
    }

    /// A backup key by name.
    pub fn backup_key(&self, name: &KeyName) -> Option<&BackupKey> {
        self.backup.iter().find(|key| key.name == *name)
    }

    /// The key of a use that no other key replaces.
    pub fn current(&self, use_: SigningUse) -> Option<&SigningKey> {
        let replaced = |key: &SigningKey| self.signing.iter().any(|other| other.replaces.as_ref() == Some(&key.name));
        self.signing.iter().find(|key| key.use_ == use_ && !replaced(key))
    }

    /// The version for a key that replaces this master key: one more than the highest version in its line of replacements.
    pub fn next_version(&self, key: &KeyName) -> Option<u32> {
        let existing = self.master.iter().map(|k| (&k.name, k.replaces.as_ref(), Some(k.version)));
        let destroyed = self.destroyed.iter().map(|k| (&k.name, k.replaces.as_ref(), k.version));
        let all: Vec<_> = existing.chain(destroyed).collect();
        let mut line = std::collections::BTreeSet::from([key]);
        loop {
            let known = line.len();
            for (name, replaces, _) in &all {
                let linked = replaces.is_some_and(|older| line.contains(older));
                if linked || line.contains(name) {
                    line.extend([Some(*name), *replaces].into_iter().flatten());
                }
            }
            if line.len() == known {
                break;
            }
        }
        let versions = all.iter().filter(|(name, ..)| line.contains(name)).filter_map(|(.., version)| *version);
        versions.max()?.checked_add(1)
    }

    /// The fingerprint of a key as text: the hash of its public key, or its check value.
    pub fn fingerprint_text(&self, name: &KeyName) -> Option<String> {
        let public = self.signers().find(|(signer, _)| *signer == name).map(|(_, public)| public.fingerprint_text());
        let master = || self.master_key(name).map(|key| hex::encode(&key.check_value));
        let backup = || self.backup_key(name).map(|key| hex::encode(&key.check_value));
        public.or_else(master).or_else(backup)
    }

    /// A master key by name.
    pub fn master_key(&self, name: &KeyName) -> Option<&MasterKey> {
        self.master.iter().find(|key| key.name == *name)
    }
}
