//! Why there is no pair, or why a batch could not be looked after.

use std::time::Duration;

use crate::hsm::HsmError;
use crate::keys::KeyKind;
use crate::store::StoreError;

/// What the pool could not do. Nothing is lost by it.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No pair of the kind is ready.
    #[error(
        "no {kind} pair is ready: the pool is empty and is being filled with {fill_rate:.1} pairs per second{}",
        if *.paused { " (the filling is held up; sppctl pool status tells why)" } else { "" }
    )]
    Empty {
        /// The kind.
        kind: KeyKind,
        /// Pairs per second while it was filled last.
        fill_rate: f64,
        /// When a pair should be ready for this caller.
        retry_after: Duration,
        /// Whether it is not filled now. Why is the officers' business.
        paused: bool,
    },
    /// The configuration has no pool of the kind.
    #[error("there is no pool of {0} pairs; add a [[keypool.pool]] for it to sppd.toml")]
    NoPool(KeyKind),
    /// More pairs are ordered than the pool may have.
    #[error("the pool of {kind} pairs may have {most} pairs at most")]
    TooMany {
        /// The kind.
        kind: KeyKind,
        /// Its limit: with pairs on the token the high mark.
        most: u64,
    },
    /// There is less room on the disk than new pairs need.
    #[error("the disk has only {free} bytes free and new pairs need {floor}; it goes on by itself when there is room")]
    NoRoom {
        /// Free bytes.
        free: u64,
        /// The floor.
        floor: u64,
    },
    /// The token and the store do not fit together.
    #[error("{0}")]
    RolledBack(String),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// The secret store.
    #[error(transparent)]
    Store(#[from] StoreError),
}
