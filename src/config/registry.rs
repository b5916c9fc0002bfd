//! `[registry]` of `sppd.toml`: the transparency log of the public database.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use spp_format::file_format::Faults;
use spp_format::names::KeyName;
use spp_format::tlog::WitnessKey;

use crate::hsm::{CheckpointKey, KeyManifest};
use crate::registry::{LogSettings, Witness};

/// The transparency log of the public database.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// The key that signs checkpoints.
    pub key: CheckpointKey,
    /// Batches and witnesses.
    pub settings: LogSettings,
    /// Accepted number of devices that are published according to the state store but have no record.
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
    let setting = |field: &str| format!("{place}: registry.{field}");
    if !(1..=256).contains(&shape.batch_size) {
        faults.add(setting("batch_size"), "must be from 1 to 256");
    }
    if shape.batch_period > Duration::from_secs(5) {
        faults.add(setting("batch_period"), "must be at most 5 seconds, for example \"50ms\"");
    }
    let mut witnesses: Vec<Witness> = Vec::new();
    for (number, WitnessShape { url, key, ca }) in shape.witness.into_iter().enumerate() {
        let setting = |field: &str| setting(&format!("witness[{number}].{field}"));
        let host =
            url.split_once("://").filter(|(scheme, rest)| ["http", "https"].contains(scheme) && !rest.is_empty());
        if host.is_none() {
            faults
                .add(setting("url"), "must be the witness's submission prefix, for example https://witness.example/w1");
        }
        if witnesses.iter().any(|witness| witness.key.name() == key.name()) {
            faults.add(setting("key"), format!("witness {} is configured twice", key.name()));
        }
        let authority = ca.map(|ca| base.join(ca));
        if let Some(path) = &authority {
            faults.note(setting("ca"), std::fs::read(path).map_err(|e| format!("{}: {e}", path.display())));
        }
        witnesses.push(Witness { url, key, authority });
    }
    let log_key = keys.log_key(&shape.key).cloned().ok_or_else(|| {
        format!("log key {} is not in the key manifest; create it with [[log_key]] in a ceremony", shape.key)
    });
    let key = faults.note(setting("key"), log_key)?;
    let (batch_size, batch_period) = (shape.batch_size, shape.batch_period);
    let settings = LogSettings { batch_size, batch_period, witnesses, ..LogSettings::default() };
    Some(RegistryConfig { key, settings, accepted_loss: shape.accepted_loss })
}
