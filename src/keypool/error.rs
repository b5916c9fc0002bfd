//! Errors of the key pool.

use std::time::Duration;

use spp_format::keys::KeyType;

use crate::hsm::HsmError;
use crate::store::StoreError;

/// The reason why a pool operation failed. No pair is lost.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No pair of the key type is ready.
    #[error(
        "no {kind} pair is ready: the pool is empty; refilling at {fill_rate:.1} pairs/s{}",
        if *.paused { " (filling is paused; sppctl pool status shows the reason)" } else { "" }
    )]
    Empty {
        /// The kind.
        kind: KeyType,
        /// Pairs per second of the current or last filling.
        fill_rate: f64,
        /// The time after which a pair should be ready for this caller.
        retry_after: Duration,
        /// Whether filling is paused. The reason is shown to officers only.
        paused: bool,
    },
    /// The configuration has no pool of the key type.
    #[error("no pool of {0} pairs; add a [[keypool.pool]] for it to sppd.toml")]
    NoPool(KeyType),
    /// The ordered number of pairs is above the pool's limit.
    #[error("cannot fill the {kind} pool beyond its limit of {limit} pairs; choose a lower target")]
    TooMany {
        /// The kind.
        kind: KeyType,
        /// The pool's limit: the high mark if pairs are stored on the token.
        limit: u64,
    },
    /// Free disk space is below the floor that new pairs require.
    #[error("the disk has only {free} bytes free, new pairs require {floor}; filling resumes when space is free")]
    DiskFull {
        /// Free disk space in bytes.
        free: u64,
        /// The required free space in bytes.
        floor: u64,
    },
    /// The token and the store are inconsistent.
    #[error("{0}")]
    RolledBack(String),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// The secret store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
