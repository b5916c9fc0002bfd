//! How the pools stand.

use std::collections::BTreeSet;

use super::batch_owners::BatchOwners;
use super::{KeyPool, PoolError};
use crate::keys::KeyKind;
use crate::store::{Batch, KeyStorage, PairCounts, Purpose};

/// The pools at this moment.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolStatus {
    /// How pairs are kept.
    pub keeping: KeyStorage,
    /// Whether store and token have been compared, and pairs are given out.
    pub serving: bool,
    /// One for each kind that has a pool, or had one and still has pairs.
    pub kinds: Vec<KindStatus>,
    /// Batches of pairs that are made on the spot.
    pub session_batches: u64,
    /// Pairs of unfinished sessions in them.
    pub session_pairs: u64,
    /// When the next of them is shredded at the latest; seconds since the Unix epoch.
    pub session_next_shred: Option<u64>,
    /// Pairs on the token that still have to be destroyed.
    pub condemned: u64,
    /// Why the store counts as an old copy, if so.
    pub rolled_back: Option<String>,
    /// What could not be done at the last look, and is tried again.
    pub trouble: Option<String>,
}

/// One kind's pool.
#[derive(Debug, Clone, PartialEq)]
pub struct KindStatus {
    /// The kind.
    pub kind: KeyKind,
    /// Below this many ready pairs it is filled.
    pub low: u64,
    /// Up to this many.
    pub high: u64,
    /// Pairs that wait for a device, on HSMs that are there.
    pub ready: u64,
    /// Pairs that wait on an HSM that is away.
    pub away: u64,
    /// Pairs of sessions that are not final.
    pub reserved: u64,
    /// Pairs that are not offered, since the store was an old copy.
    pub quarantined: u64,
    /// Pairs that were ever put in, reserved, given up.
    pub counts: PairCounts,
    /// Whether it is being filled.
    pub filling: bool,
    /// Pairs per second of this filling or the last one.
    pub fill_rate: f64,
    /// Why it is not filled though it should be, if so.
    pub paused: Option<String>,
    /// When the oldest batch with ready pairs was begun; seconds since the Unix epoch.
    pub oldest: Option<u64>,
    /// Batches, and with them keys on the token.
    pub batches: u64,
    /// When the next of them is shredded at the latest; seconds since the Unix epoch.
    pub next_shred: Option<u64>,
}

/// Condemned pairs that are counted; more are as bad.
const COUNTED: usize = 10_000;

impl KeyPool {
    /// How the pools stand.
    pub async fn status(&self) -> Result<PoolStatus, PoolError> {
        let batches = self.store.batches().await?;
        // A kind whose pool was taken out of the configuration is told as long as it has pairs.
        let left = batches.iter().filter_map(|batch| match batch.purpose {
            Purpose::Pool(kind) => Some(kind),
            Purpose::Sessions => None,
        });
        let all: BTreeSet<_> = self.pools.keys().copied().chain(left).collect();
        let keepers = self.keepers().await?;
        let mut kinds = Vec::new();
        for kind in all {
            kinds.push(self.kind_status(kind, &batches, &keepers).await?);
        }
        let of_sessions = || batches.iter().filter(|batch| batch.purpose == Purpose::Sessions);
        let condemned = self.store.condemned(COUNTED).await?.len() as u64;
        let notes = self.notes();
        Ok(PoolStatus {
            keeping: self.rules.keeping,
            serving: *self.reconciled.borrow(),
            kinds,
            session_batches: of_sessions().count() as u64,
            session_pairs: of_sessions().map(|batch| batch.reserved).sum(),
            session_next_shred: of_sessions().filter_map(|batch| self.shred_at(batch)).min(),
            condemned,
            rolled_back: notes.rolled_back.clone(),
            trouble: self.trouble(),
        })
    }

    async fn kind_status(
        &self,
        kind: KeyKind,
        all: &[Batch],
        keepers: &BatchOwners<'_>,
    ) -> Result<KindStatus, PoolError> {
        let counts = self.store.pair_counts(kind).await?;
        let batches = || all.iter().filter(|batch| batch.purpose == Purpose::Pool(kind));
        let offered = |ready_members| {
            batches().filter(|batch| keepers.are_at_hand(batch.number) == ready_members).map(Batch::offered).sum()
        };
        let pool = self.pools.get(&kind);
        let shares = || pool.into_iter().flat_map(|pool| pool.shares.values());
        let paused: BTreeSet<_> = shares().filter_map(|share| share.filling().paused.clone()).collect();
        Ok(KindStatus {
            kind,
            low: pool.map_or(0, |pool| pool.marks.low),
            high: pool.map_or(0, |pool| pool.marks.high),
            ready: offered(true),
            away: offered(false),
            reserved: batches().map(|batch| batch.reserved).sum(),
            quarantined: batches().filter(|batch| batch.quarantined.is_some()).map(|batch| batch.ready).sum(),
            counts,
            filling: shares().any(|share| share.filling().running),
            fill_rate: pool.map_or(0.0, |pool| pool.filling().rate.per_second()),
            paused: (!paused.is_empty()).then(|| paused.into_iter().collect::<Vec<_>>().join("; ")),
            oldest: batches().filter(|batch| batch.offered() > 0).map(|batch| batch.created).min(),
            batches: batches().count() as u64,
            next_shred: batches().filter_map(|batch| self.shred_at(batch)).min(),
        })
    }
}
