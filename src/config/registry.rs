//! `[registry]` of `sppd.toml`: the log of the public database.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::daemon::{base_of, read_shape};
use super::{Faults, store};
use crate::certificate::IssuerCertificate;
use crate::hsm::{CheckpointKey, DestroyedKey, KeyManifest, SigningUse};
use crate::keys::PublicKey;
use crate::names::KeyName;
use crate::registry::{LogSettings, Witness};
use crate::store::StoreOptions;
use crate::tlog::{LogKey, WitnessKey};

/// The log of the public database.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Who signs its checkpoints.
    pub key: CheckpointKey,
    /// Its batches and witnesses.
    pub settings: LogSettings,
    /// So many devices may be published by this state store's account and have no record.
    pub accepted_loss: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RegistryShape {
    key: KeyName,
    #[serde(default = "default_batch_size")]
    batch_size: usize,
    #[serde(default = "default_batch_period", with = "humantime_serde")]
    batch_period: Duration,
    #[serde(default)]
    accepted_loss: u64,
    #[serde(default)]
    witness: Vec<WitnessShape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WitnessShape {
    url: String,
    key: WitnessKey,
    ca: Option<PathBuf>,
}

fn default_batch_size() -> usize {
    LogSettings::default().batch_size
}

fn default_batch_period() -> Duration {
    LogSettings::default().batch_period
}

pub(super) fn check(
    shape: RegistryShape,
    place: &str,
    base: &Path,
    keys: &KeyManifest,
    faults: &mut Faults,
) -> Option<RegistryConfig> {
    let at = |field: &str| format!("{place}: registry.{field}");
    if !(1..=256).contains(&shape.batch_size) {
        faults.add(at("batch_size"), "must be from 1 to 256");
    }
    if shape.batch_period > Duration::from_secs(5) {
        faults.add(at("batch_period"), "must be 5 seconds at most, for example \"50ms\"");
    }
    let mut witnesses: Vec<Witness> = Vec::new();
    for (number, WitnessShape { url, key, ca }) in shape.witness.into_iter().enumerate() {
        let at = |field: &str| at(&format!("witness[{number}].{field}"));
        let host =
            url.split_once("://").filter(|(scheme, rest)| ["http", "https"].contains(scheme) && !rest.is_empty());
        if host.is_none() {
            faults.add(at("url"), "write the witness's submission prefix, https://witness.example/w1");
        }
        if witnesses.iter().any(|witness| witness.key.name() == key.name()) {
            faults.add(at("key"), format!("the witness {} is there twice", key.name()));
        }
        let authority = ca.map(|ca| base.join(ca));
        if let Some(path) = &authority {
            faults.note(at("ca"), std::fs::read(path).map_err(|e| format!("{}: {e}", path.display())));
        }
        witnesses.push(Witness { url, key, authority });
    }
    let found = keys.log_key(&shape.key).cloned().ok_or_else(|| {
        format!("the log key {} is not in the register of keys; make one with [[log_key]] in a ceremony", shape.key)
    });
    let key = faults.note(at("key"), found)?;
    let (batch_size, batch_period) = (shape.batch_size, shape.batch_period);
    let settings = LogSettings { batch_size, batch_period, witnesses, ..LogSettings::default() };
    Some(RegistryConfig { key, settings, accepted_loss: shape.accepted_loss })
}

/// The certificates of keys that were destroyed, where they are still beside the register: what those signed is verified ever after.
fn destroyed(keys: &KeyManifest, dir: &Path) -> Vec<(PathBuf, PublicKey)> {
    let certificate = |key: &DestroyedKey| {
        let path = dir.join(format!("{}-ca.pem", key.name));
        let certificate = IssuerCertificate::from_pem_alone(&std::fs::read_to_string(&path).ok()?).ok()?;
        let public_key = certificate.public_key().clone();
        // Another file of that name is of no key that was here.
        (public_key.known_by() == key.fingerprint).then_some((path, public_key))
    };
    keys.destroyed.iter().filter_map(certificate).collect()
}

/// What a tool needs to work on the public database: where it is and who signs it; neither the HSM nor the PIN.
pub struct RegistryAccess {
    /// Its directory.
    pub directory: PathBuf,
    /// How it uses its disk.
    pub options: StoreOptions,
    /// The key of its checkpoints.
    pub key: LogKey,
    /// The certificates of the keys that sign device certificates, PEM files.
    pub issuers: Vec<PathBuf>,
    /// The keys that certify callers.
    pub callers: Vec<PublicKey>,
}

impl RegistryAccess {
    /// Reads what it needs of `sppd.toml`.
    pub fn load(path: &Path) -> Result<Self, Faults> {
        let place = path.display().to_string();
        let mut faults = Faults::default();
        let access = read_shape(path, &place, &mut faults).and_then(|shape| {
            let base = base_of(path);
            let store = store::check(&shape.store, &place, base, &mut faults);
            let keys = faults.keep(KeyManifest::load(&shape.hsm.keys(base)))?;
            let key = check(shape.registry, &place, base, &keys, &mut faults)?.key.key;
            let of_devices = keys.signing.iter().filter(|key| key.use_ == SigningUse::Device);
            let mut issuers: Vec<_> = of_devices.map(|key| key.certificate.clone()).collect();
            let mut callers = keys.access_keys();
            for (path, public_key) in destroyed(&keys, shape.hsm.keys(base).parent().unwrap_or(base)) {
                issuers.push(path);
                callers.push(public_key);
            }
            Some(Self { directory: store.public, options: store.public_options, key, issuers, callers })
        });
        faults.ok_or_all(access)
    }
}
