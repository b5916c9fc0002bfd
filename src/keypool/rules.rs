//! Defines the configuration of the key pools: sizes, marks and intervals.

use std::collections::BTreeMap;
use std::time::Duration;

use spp_format::keys::KeyType;

use crate::store::KeyStorage;

/// Upper limit of a pool's size: more pairs than an assembly line uses before its pool is filled again.
pub const MAX_POOL_PAIRS: u64 = 10_000_000;

/// Configuration of the pools, and of the time for which an old copy of the disk may still yield erased pairs.
#[derive(Debug, Clone)]
pub struct PoolRules {
    /// How private keys are stored.
    pub storage: KeyStorage,
    /// Maximum time from an erasure to the destruction of the key that could unwrap the pair.
    pub shred_after: Duration,
    /// Maximum number of pairs in a batch.
    pub batch_size: u64,
    /// The marks of the pools, by key type.
    pub pools: BTreeMap<KeyType, Marks>,
    /// Intervals of the pool's background tasks.
    pub pacing: PoolPacing,
}

/// Intervals of the pool's background tasks. The default is for production; tests use shorter ones.
#[derive(Debug, Clone, Copy)]
pub struct PoolPacing {
    /// The interval between two checks for batches to shred and pools to fill, when nothing wakes the task before.
    pub poll_interval: Duration,
    /// The pause after a failed fill.
    pub pause: Duration,
}

impl Default for PoolPacing {
    fn default() -> Self {
        Self { poll_interval: Duration::from_secs(1), pause: Duration::from_secs(2) }
    }
}

/// The low and high marks of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Filling starts below this number of ready pairs …
    pub low: u64,
    /// … and ends at this number.
    pub high: u64,
}

impl Default for PoolRules {
    fn default() -> Self {
        Self {
            storage: KeyStorage::Wrapped,
            shred_after: Duration::from_secs(3600),
            batch_size: 1000,
            pools: BTreeMap::new(),
            pacing: PoolPacing::default(),
        }
    }
}
