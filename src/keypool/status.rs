//! Status of the pools.

use std::collections::BTreeSet;

use spp_format::keys::KeyType;

use super::batch_owners::BatchOwners;
use super::{KeyPool, PoolError};
use crate::store::{Batch, KeyStorage, PairCounts, Purpose};

/// The current status of the pools.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolStatus {
    /// How private keys are stored.
    pub storage: KeyStorage,
    /// Whether store and token have been compared, so that pairs are offered.
    pub serving: bool,
    /// The status per key type that has a pool or still has pairs of a removed pool.
    pub kinds: Vec<KindStatus>,
    /// Number of batches for pairs generated for a session.
    pub session_batches: u64,
    /// Number of pairs of unfinished sessions in these batches.
    pub session_pairs: u64,
    /// Latest time of the next shredding, in seconds since the Unix epoch.
    pub session_next_shred: Option<u64>,
    /// Number of on-token pairs that remain to be destroyed.
    pub pairs_to_destroy: u64,
    /// Why the store is considered an old copy, if it is.
    pub rolled_back: Option<String>,
    /// The error of the last maintenance run, if it failed. Maintenance is retried.
    pub last_error: Option<String>,
}

/// The status of one key type's pool.
#[derive(Debug, Clone, PartialEq)]
pub struct KindStatus {
    /// The kind.
    pub kind: KeyType,
    /// The low mark: filling starts below this number of ready pairs.
    pub low: u64,
    /// The high mark: filling ends at this number.
    pub high: u64,
    /// Ready pairs on available HSMs.
    pub ready: u64,
    /// Ready pairs on unavailable HSMs.
    pub unavailable: u64,
    /// Pairs reserved by unfinished sessions.
    pub reserved: u64,
    /// Quarantined pairs, which are not offered because the store was an old copy.
    pub quarantined: u64,
    /// Totals of pairs made, reserved and discarded.
    pub counts: PairCounts,
    /// Whether the pool is being filled.
    pub filling: bool,
    /// Pairs per second of the current or last filling.
    pub fill_rate: f64,
    /// Why filling is paused, if it is.
    pub paused: Option<String>,
    /// Creation time of the oldest batch with ready pairs, in seconds since the Unix epoch.
    pub oldest: Option<u64>,
    /// Number of batches, and so of batch keys on the token.
    pub batches: u64,
    /// Latest time of the next shredding, in seconds since the Unix epoch.
    pub next_shred: Option<u64>,
}

/// Upper limit of the count of pairs to be destroyed.
const MAX_COUNTED: usize = 10_000;

impl KeyPool {
    /// Reports the status of the pools.
    pub async fn status(&self) -> Result<PoolStatus, PoolError> {
        let batches = self.store.batches().await?;
        // Include key types whose pool was removed from the configuration while pairs remain.
        let left = batches.iter().filter_map(|batch| match batch.purpose {
            Purpose::Pool(kind) => Some(kind),
            Purpose::Sessions => None,
        });
        let all: BTreeSet<_> = self.pools.keys().copied().chain(left).collect();
        let owners = self.batch_owners().await?;
        let mut kinds = Vec::new();
        for kind in all {
            kinds.push(self.kind_status(kind, &batches, &owners).await?);
        }
        let of_sessions = || batches.iter().filter(|batch| batch.purpose == Purpose::Sessions);
        let pairs_to_destroy = self.store.pairs_to_destroy(MAX_COUNTED).await?.len() as u64;
        let reconcile_state = self.reconcile_state();
        Ok(PoolStatus {
            storage: self.rules.storage,
            serving: *self.reconciled.borrow(),
            kinds,
            session_batches: of_sessions().count() as u64,
            session_pairs: of_sessions().map(|batch| batch.reserved).sum(),
            session_next_shred: of_sessions().filter_map(|batch| self.shred_at(batch)).min(),
            pairs_to_destroy,
            rolled_back: reconcile_state.rolled_back.clone(),
            last_error: self.last_errors(),
        })
    }

    async fn kind_status(
        &self,
        kind: KeyType,
        all: &[Batch],
        owners: &BatchOwners<'_>,
    ) -> Result<KindStatus, PoolError> {
        let counts = self.store.pair_counts(kind).await?;
        let batches = || all.iter().filter(|batch| batch.purpose == Purpose::Pool(kind));
        let ready_pairs = |is_available| {
            batches().filter(|batch| owners.is_available(batch.number) == is_available).map(Batch::available).sum()
        };
        let pool = self.pools.get(&kind);
        let shares = || pool.into_iter().flat_map(|pool| pool.shares.values());
        let paused: BTreeSet<_> = shares().filter_map(|share| share.fill_state().paused.clone()).collect();
        Ok(KindStatus {
            kind,
            low: pool.map_or(0, |pool| pool.marks.low),
            high: pool.map_or(0, |pool| pool.marks.high),
            ready: ready_pairs(true),
            unavailable: ready_pairs(false),
            reserved: batches().map(|batch| batch.reserved).sum(),
            quarantined: batches().filter(|batch| batch.quarantined.is_some()).map(|batch| batch.ready).sum(),
            counts,
            filling: shares().any(|share| share.fill_state().running),
            fill_rate: pool.map_or(0.0, |pool| pool.fill_state().rate.per_second()),
            paused: (!paused.is_empty()).then(|| paused.into_iter().collect::<Vec<_>>().join("; ")),
            oldest: batches().filter(|batch| batch.available() > 0).map(|batch| batch.created).min(),
            batches: batches().count() as u64,
            next_shred: batches().filter_map(|batch| self.shred_at(batch)).min(),
        })
    }
}
