//! `[keypool]` of `sppd.toml`: which key pairs are made in advance.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::Faults;
use crate::certificate::{KeyPairRule, Profile};
use crate::hsm::ModuleProfile;
use crate::keypool::{MOST_PAIRS, Marks, PoolPacing, PoolRules};
use crate::keys::KeyKind;
use crate::names::ProfileName;
use crate::store::KeyStorage;

/// Batch keys are token objects, and all batches are looked through now and again: they must stay few.
const MOST_BATCHES: u64 = 500;

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
    kind: KeyKind,
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

/// The rules, and whether the modules can keep them and every profile has its pool.
pub(super) fn check<'a>(
    shape: KeyPoolShape,
    place: &str,
    mut modules: impl Iterator<Item = &'a ModuleProfile>,
    profiles: &BTreeMap<ProfileName, Profile>,
    faults: &mut Faults,
) -> PoolRules {
    let at = |key: &str| format!("{place}: keypool.{key}");
    if !(1..=7 * 24 * 3600).contains(&shape.shred_after.as_secs()) {
        faults.add(at("shred_after"), "must be from 1 second to 7 days, for example \"1h\"");
    }
    if !(1..=1_000_000).contains(&shape.batch_size) {
        faults.add(at("batch_size"), "must be from 1 to 1000000 pairs");
    }
    let mut pools = BTreeMap::new();
    for pool in &shape.pool {
        let at = at(&format!("pool {}", pool.kind));
        if pool.low == 0 || pool.low > pool.high || pool.high > MOST_PAIRS {
            faults.add(&at, format!("low must be at least 1 and at most high, and high at most {MOST_PAIRS}"));
        }
        if pools.insert(pool.kind, Marks { low: pool.low, high: pool.high }).is_some() {
            faults.add(at, "is there twice");
        }
    }
    let batches: u64 = shape.pool.iter().map(|pool| pool.high / shape.batch_size.max(1)).sum();
    if batches > MOST_BATCHES {
        let problem =
            format!("the pools would have {batches} batches, each with a key on the token; {MOST_BATCHES} are enough");
        faults.add(at("batch_size"), problem);
    }
    let keeping = match shape.store {
        KeyStorageShape::Wrapped => KeyStorage::Wrapped,
        KeyStorageShape::Hsm => KeyStorage::Hsm,
    };
    let all: u64 = shape.pool.iter().map(|pool| pool.high.min(MOST_PAIRS)).sum();
    // Of several HSMs one may have to keep them all.
    if keeping == KeyStorage::Hsm
        && let Some(module) = modules.find(|module| all > module.token_pairs)
    {
        let problem = format!(
            "the pools may have {all} pairs together, and {} is good for {} on its token (objects.token_pairs of its file); \
             use lower marks, or store = \"wrapped\"",
            module.name, module.token_pairs
        );
        faults.add(at("store"), problem);
    }
    for (name, profile) in profiles {
        if let KeyPairRule::Pool { kind, .. } = profile.key_pair()
            && !pools.contains_key(kind)
        {
            let problem =
                format!("takes {kind} pairs from a pool; add [[keypool.pool]] with kind = \"{kind}\" to {place}");
            faults.add(format!("profile {name}: key_pair"), problem);
        }
    }
    PoolRules {
        keeping,
        shred_after: shape.shred_after,
        batch_size: shape.batch_size,
        pools,
        pacing: PoolPacing::default(),
    }
}
