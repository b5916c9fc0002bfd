//! `[keypool]` of `sppd.toml`: the pools of pregenerated key pairs.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use spp_format::certificate::{KeyPairRule, Profile};
use spp_format::file_format::Faults;
use spp_format::keys::KeyType;
use spp_format::names::ProfileName;

use crate::hsm::ModuleProfile;
use crate::keypool::{MAX_POOL_PAIRS, Marks, PoolPacing, PoolRules};
use crate::store::KeyStorage;

/// Maximum number of batches. Batch keys are token objects, and background work scans all batches periodically.
const MAX_BATCHES: u64 = 500;

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct KeyPoolShape {
    store: KeyStorageShape,
    #[serde(with = "humantime_serde")]
    shred_after: Duration,
    batch_size: u64,
    pool: Vec<PoolShape>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolShape {
    kind: KeyType,
    low: u64,
    high: u64,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
enum KeyStorageShape {
    /// In the state store, wrapped by the HSM.
    Wrapped,
    /// As objects of the token.
    Hsm,
}

impl Default for KeyPoolShape {
    fn default() -> Self {
        let PoolRules { shred_after, batch_size, .. } = PoolRules::default();
        Self { store: KeyStorageShape::Wrapped, shred_after, batch_size, pool: Vec::new() }
    }
}

/// Validates the section. Checks that the modules can hold the pairs and that every profile has its pool.
pub(super) fn check<'a>(
    shape: KeyPoolShape,
    place: &str,
    mut modules: impl Iterator<Item = &'a ModuleProfile>,
    profiles: &BTreeMap<ProfileName, Profile>,
    faults: &mut Faults,
) -> PoolRules {
    let setting = |key: &str| format!("{place}: keypool.{key}");
    if !(1..=7 * 24 * 3600).contains(&shape.shred_after.as_secs()) {
        faults.add(setting("shred_after"), "must be from 1 second to 7 days, for example \"1h\"");
    }
    if !(1..=1_000_000).contains(&shape.batch_size) {
        faults.add(setting("batch_size"), "must be from 1 to 1000000 pairs");
    }
    let mut pools = BTreeMap::new();
    for pool in &shape.pool {
        let pool_setting = setting(&format!("pool {}", pool.kind));
        if pool.low == 0 || pool.low > pool.high || pool.high > MAX_POOL_PAIRS {
            faults.add(
                &pool_setting,
                format!("low must be at least 1 and at most high, and high at most {MAX_POOL_PAIRS}"),
            );
        }
        if pools.insert(pool.kind, Marks { low: pool.low, high: pool.high }).is_some() {
            faults.add(pool_setting, "is configured twice");
        }
    }
    let batches: u64 = shape.pool.iter().map(|pool| pool.high / shape.batch_size.max(1)).sum();
    if batches > MAX_BATCHES {
        let problem = format!(
            "the pools need {batches} batches, each with a key on the token; the limit is {MAX_BATCHES}: increase batch_size or lower the high marks"
        );
        faults.add(setting("batch_size"), problem);
    }
    let storage = match shape.store {
        KeyStorageShape::Wrapped => KeyStorage::Wrapped,
        KeyStorageShape::Hsm => KeyStorage::Hsm,
    };
    let total: u64 = shape.pool.iter().map(|pool| pool.high.min(MAX_POOL_PAIRS)).sum();
    // With several HSMs, one of them may have to hold all pairs.
    if storage == KeyStorage::Hsm
        && let Some(module) = modules.find(|module| total > module.token_pairs)
    {
        let problem = format!(
            "the pools may hold {total} pairs, but {} supports {} on its token (objects.token_pairs of its file); lower the \
             high marks, or use store = \"wrapped\"",
            module.name, module.token_pairs
        );
        faults.add(setting("store"), problem);
    }
    for (name, profile) in profiles {
        if let KeyPairRule::Pool { kind, .. } = profile.key_pair()
            && !pools.contains_key(kind)
        {
            let problem =
                format!("uses a pool of {kind} pairs; add [[keypool.pool]] with kind = \"{kind}\" to {place}");
            faults.add(format!("profile {name}: key_pair"), problem);
        }
    }
    PoolRules {
        storage,
        shred_after: shape.shred_after,
        batch_size: shape.batch_size,
        pools,
        pacing: PoolPacing::default(),
    }
}
