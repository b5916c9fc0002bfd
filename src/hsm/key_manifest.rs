//! The register of keys (`keys.toml`): written by a ceremony, demanded by the daemon at every start of a worker.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::attributes::{KeyRole, Provenance};
use super::kdf::Prf;
use super::token::TokenIdentity;
use crate::keys::{PublicKey, sha256};
use crate::names::KeyName;
use crate::tlog::LogKey;

/// What the token must hold, validated: names and CKA_IDs are unique, public keys parse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyManifest {
    /// Which token.
    pub token: TokenIdentity,
    /// Keys that sign certificates.
    pub signing: Vec<SigningKey>,
    /// Keys that sign the checkpoints of the public database.
    pub log: Vec<CheckpointKey>,
    /// Keys from which device keys are derived.
    pub master: Vec<MasterKey>,
    /// Keys under which keys leave the token for their backup. The daemon has no use for them.
    pub backup: Vec<BackupKey>,
    /// Keys that were destroyed: their names are never used again.
    pub destroyed: Vec<DestroyedKey>,
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
    /// The older key whose work it took over.
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
    /// The log's name and the public half, against which the token is checked.
    pub key: LogKey,
    /// The public half once more.
    pub public_key: PublicKey,
    /// How it came onto the token.
    pub provenance: Provenance,
}

/// What a signing key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SigningUse {
    /// Device certificates.
    Device,
    /// TLS certificates of stations, officers and the daemon.
    Access,
    /// Certificates of the other signing keys, in ceremonies alone.
    Root,
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
    /// SP 800-108 output for the label `spp/v1/check-value` and an empty context, 8 bytes.
    pub check_value: Vec<u8>,
    /// The older key whose work it took over.
    pub replaces: Option<KeyName>,
    /// How it came onto the token.
    pub provenance: Provenance,
}

/// A key that wraps others for their backup, and can unwrap nothing: for that its shares are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupKey {
    /// `CKA_LABEL`.
    pub name: KeyName,
    /// `CKA_ID`.
    pub id: Vec<u8>,
    /// What it makes of 32 zero bytes (RFC 5649), the first 8 bytes.
    pub check_value: Vec<u8>,
    /// In how many shares it is given out.
    pub shares: u8,
    /// How many of them give it back.
    pub threshold: u8,
}

/// What is remembered of a key that was destroyed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DestroyedKey {
    /// Its name.
    pub name: KeyName,
    /// Its CKA_ID.
    pub id: Vec<u8>,
    /// What it was known by: see [`KeyManifest::known_by`].
    pub fingerprint: String,
    /// When; seconds since the Unix epoch.
    pub time: u64,
    /// The version of a master key: it is not given again in its line.
    pub version: Option<u32>,
    /// The older key whose work it had taken over.
    pub replaces: Option<KeyName>,
}

impl KeyManifest {
    /// The public keys that certify callers, those that were replaced included.
    pub fn access_keys(&self) -> Vec<PublicKey> {
        let access = self.signing.iter().filter(|key| key.use_ == SigningUse::Access);
        access.map(|key| key.public_key.clone()).collect()
    }

    /// SHA-256 of all that it says.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(self.to_toml().unwrap_or_default().as_bytes())
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

    /// Every key that the daemon must find: name, CKA_ID, role, provenance.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&KeyName, &[u8], KeyRole, Provenance)> {
        let pair = |public: &PublicKey| KeyRole::Signing(public.kind());
        let signing = self.signing.iter().map(move |k| (&k.name, k.id.as_slice(), pair(&k.public_key), k.provenance));
        let log = self.log.iter().map(move |k| (&k.name, k.id.as_slice(), pair(&k.public_key), k.provenance));
        let master = self.master.iter().map(|k| (&k.name, k.id.as_slice(), KeyRole::Master(k.prf), k.provenance));
        signing.chain(log).chain(master)
    }

    /// Every name and CKA_ID that was ever given on this token.
    pub(crate) fn given(&self) -> impl Iterator<Item = (&KeyName, &[u8])> {
        let backup = self.backup.iter().map(|k| (&k.name, k.id.as_slice()));
        let destroyed = self.destroyed.iter().map(|k| (&k.name, k.id.as_slice()));
        self.all().map(|(name, id, ..)| (name, id)).chain(backup).chain(destroyed)
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

    /// A backup key by name.
    pub fn backup_key(&self, name: &KeyName) -> Option<&BackupKey> {
        self.backup.iter().find(|key| key.name == *name)
    }

    /// The key of a use that no other one has replaced.
    pub fn current(&self, use_: SigningUse) -> Option<&SigningKey> {
        let replaced = |key: &SigningKey| self.signing.iter().any(|other| other.replaces.as_ref() == Some(&key.name));
        self.signing.iter().find(|key| key.use_ == use_ && !replaced(key))
    }

    /// The version for a master key that takes over the work of this one: one more than any in its line ever had.
    pub fn next_version(&self, key: &KeyName) -> Option<u32> {
        let living = self.master.iter().map(|k| (&k.name, k.replaces.as_ref(), Some(k.version)));
        let gone = self.destroyed.iter().map(|k| (&k.name, k.replaces.as_ref(), k.version));
        let all: Vec<_> = living.chain(gone).collect();
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

    /// What people know a key of the register by: the hash of its public half, or its check value.
    pub fn known_by(&self, name: &KeyName) -> Option<String> {
        let public = self.signers().find(|(signer, _)| *signer == name).map(|(_, public)| public.known_by());
        let master = || self.master_key(name).map(|key| hex::encode(&key.check_value));
        let backup = || self.backup_key(name).map(|key| hex::encode(&key.check_value));
        public.or_else(master).or_else(backup)
    }

    /// A master key by name.
    pub fn master_key(&self, name: &KeyName) -> Option<&MasterKey> {
        self.master.iter().find(|key| key.name == *name)
    }
}
