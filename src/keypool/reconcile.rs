//! Compares the store with each token, in both directions, once per HSM when the HSM is first ready. A crash may leave a
//! planned batch without its key, a batch key without its batch, or an on-token pair that the store does not list. A
//! restored old copy of the store causes further differences.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::pool_state::Pool;
use super::{KeyPool, PoolError};
use crate::hsm::{BatchName, DaemonObjects, HsmId, StoreId, StoredKey};
use crate::store::{Batch, BatchState, BatchStep, KeyStorage, Purpose, StoreError};

/// Maximum number of on-token pairs to compare: above the capacity of any module.
const MAX_PAIRS: usize = 1_000_000;
/// How long to wait for the first HSM before reporting that none is ready.
const FIRST_HSM_TIMEOUT: Duration = Duration::from_secs(5);

impl KeyPool {
    /// Compares an HSM's token with the store, unless that is done already. Waits briefly for an HSM that is not ready.
    pub(super) async fn reconcile(&self, member: HsmId) -> Result<(), PoolError> {
        if self.reconcile_state().compared_members.contains(&member) {
            return Ok(());
        }
        let result = self.hsm.pinned_to(member).ready(FIRST_HSM_TIMEOUT).await;
        match result {
            Ok(()) => self.compare(member).await,
            // Once one HSM has been compared, an unavailable HSM is not an error of the pool.
            Err(_) if *self.reconciled.borrow() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Compares the store with an HSM's token. Until this is done, no pair of that HSM is offered, filled or shredded, so nothing
    /// changes during the comparison.
    async fn compare(&self, member: HsmId) -> Result<(), PoolError> {
        let objects = self.hsm.pinned_to(member).daemon_objects().await?;
        let (store, _) = self.store.origin().await?;
        let objects = objects_of_store(objects, store);
        let mut on_token = BTreeSet::new();
        on_token.extend(objects.keys.iter().map(|key| key.number));
        on_token.extend(objects.pairs.iter().map(|(batch, _)| batch.number));
        {
            let mut reconcile_state = self.reconcile_state();
            reconcile_state.highest_on_token =
                reconcile_state.highest_on_token.max(on_token.last().copied().unwrap_or(0));
        }
        let batches = {
            let _guard = self.compare_lock.lock().await;
            // Read the store after the token: a batch that another task opens now is in the store before it is on that
            // task's token.
            let (_, highest) = self.store.origin().await?;
            let batches = self.store.batches().await?;
            // Destroy nothing until an officer has decided which store is valid: an object may belong to the valid store.
            if let Some(reason) = batches.iter().find_map(|batch| batch.quarantined.clone()) {
                tracing::error!(
                    %reason,
                    "state store quarantined: an officer must decide which copy is valid; see sppctl pool status");
                self.reconcile_state().rolled_back.get_or_insert(reason);
                None
            } else if let Some(why) = self.rollback_evidence(&on_token, (store, highest), member).await? {
                self.quarantine_all(why).await?;
                None
            } else {
                Some(batches)
            }
        };
        if let Some(batches) = &batches {
            self.remove_crash_leftovers(member, &objects, batches).await?;
        }
        let _guard = self.compare_lock.lock().await;
        let all = self.store.batches().await?;
        for batch in all.iter().filter(|batch| on_token.contains(&batch.number)) {
            self.hsm.add_batch_owner(BatchName { store, number: batch.number }, member);
        }
        self.reconcile_state().compared_members.insert(member);
        // Another HSM may have been compared concurrently, so that neither comparison knew the other's batches, or was the
        // last one.
        if batches.is_some() {
            let why = match self.cloned_batch(&on_token, store, member) {
                None if self.is_last(member) => self.lost_batch(&on_token, store, member).await?,
                cloned => cloned,
            };
            if let Some(why) = why {
                self.quarantine_all(why).await?;
            }
        }
        self.reconciled.send_replace(true);
        self.pools.values().for_each(Pool::wake);
        Ok(())
    }

    /// Whether all other tokens have been compared.
    fn is_last(&self, member: HsmId) -> bool {
        let reconcile_state = self.reconcile_state();
        self.hsm.members().all(|other| other == member || reconcile_state.compared_members.contains(&other))
    }

    /// Reports a batch of this token that is also on one that was compared before.
    fn cloned_batch(&self, on_token: &BTreeSet<u64>, store: StoreId, member: HsmId) -> Option<String> {
        let is_on_other_hsm = |number: &&u64| {
            self.hsm.batch_owners(BatchName { store, number: **number }).iter().any(|owner| *owner != member)
        };
        let number = on_token.iter().find(is_on_other_hsm)?;
        Some(format!(
            "batch {number} is on two HSMs: one token was cloned after batches were created, or served an older copy of the store"
        ))
    }

    /// Reports a batch whose key is neither on this token nor on one that was compared before.
    async fn lost_batch(
        &self,
        on_token: &BTreeSet<u64>,
        store: StoreId,
        member: HsmId,
    ) -> Result<Option<String>, PoolError> {
        // Ignore an owner record of this HSM: it dates from an earlier connection, when the token had the key.
        let has_key = |number| {
            on_token.contains(&number)
                || self.hsm.batch_owners(BatchName { store, number }).iter().any(|owner| *owner != member)
        };
        let is_lost = |batch: &Batch| {
            let is_active = matches!(batch.state, BatchState::Open | BatchState::Sealed);
            is_active && batch.storage == KeyStorage::Wrapped && batch.quarantined.is_none() && !has_key(batch.number)
        };
        let candidate = self.store.batches().await?.into_iter().find(is_lost);
        let Some(number) = candidate.map(|batch| batch.number) else { return Ok(None) };
        // Read again: a batch that is being shredded now is missing on both sides.
        let is_active = self.store.batches().await?.into_iter().any(|batch| batch.number == number && is_lost(&batch));
        Ok(is_active.then(|| {
            format!(
                "the key of batch {number} is not on the token: it was shredded later, or this is another token or an old copy of it"
            )
        }))
    }

    /// Returns evidence that this store is an old copy, if there is any. A missing key is known only when the last token is
    /// compared.
    async fn rollback_evidence(
        &self,
        on_token: &BTreeSet<u64>,
        (store, highest): (StoreId, u64),
        member: HsmId,
    ) -> Result<Option<String>, PoolError> {
        let highest_on_token = self.reconcile_state().highest_on_token;
        if highest_on_token > highest {
            return Ok(Some(format!(
                "the token has batch {highest_on_token} of this store, but the store knows only {highest} batches"
            )));
        }
        if let Some(why) = self.cloned_batch(on_token, store, member) {
            return Ok(Some(why));
        }
        if self.is_last(member)
            && let Some(why) = self.lost_batch(on_token, store, member).await?
        {
            return Ok(Some(why));
        }
        if let Some(session) = self.registry.newest_session().await?
            && !self.journal.contains(&session).await?
        {
            return Ok(Some(format!(
                "the public database has a record of session {session}, which the state store does not know"
            )));
        }
        Ok(None)
    }

    /// Quarantines every active batch with ready pairs, and the batches of sessions, because the state store is an old copy:
    /// any pair that it lists as ready may be on a device.
    pub async fn quarantine_all(&self, why: String) -> Result<(), PoolError> {
        let why = format!("the state store was rolled back: {why}");
        self.reconcile_state().rolled_back.get_or_insert_with(|| why.clone());
        tracing::error!(reason = %why, "all ready pairs quarantined; see sppctl pool status");
        for batch in self.store.batches().await? {
            let is_active = matches!(batch.state, BatchState::Open | BatchState::Sealed);
            if is_active && batch.quarantined.is_none() && (batch.ready > 0 || batch.purpose == Purpose::Sessions) {
                match self.store.step_batch(batch.number, BatchStep::Quarantine(why.clone())).await {
                    // The batch has just ended.
                    Ok(_) | Err(StoreError::WrongBatch { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.session_batches.send_replace(BTreeMap::new());
        for pool in self.pools.values() {
            pool.shares.values().for_each(|share| share.queue.restart_prefetch());
            pool.wake();
        }
        self.erased();
        Ok(())
    }

    /// Removes objects that a crash left on the token.
    async fn remove_crash_leftovers(
        &self,
        member: HsmId,
        objects: &DaemonObjects,
        batches: &[Batch],
    ) -> Result<(), PoolError> {
        let known_batches: BTreeSet<_> = batches.iter().map(|batch| batch.number).collect();
        for key in objects.keys.iter().filter(|key| !known_batches.contains(&key.number)) {
            // A batch is forgotten after its key is destroyed; a key that reappears was not destroyed durably.
            tracing::warn!(batch = key.number, "destroying the key of a finished batch that is still on the token");
            self.hsm.pinned_to(member).destroy_batch_key(*key).await?;
        }
        let with_pairs: BTreeSet<_> = objects.pairs.iter().map(|(batch, _)| batch.number).collect();
        for number in with_pairs {
            self.destroy_strays(number, member).await?;
        }
        Ok(())
    }

    /// Destroys on-token pairs of a batch that have no row: the call that made them was interrupted. No task makes pairs for the
    /// batch during this.
    pub(super) async fn destroy_strays(&self, number: u64, member: HsmId) -> Result<(), PoolError> {
        let (store, _) = self.store.origin().await?;
        let hsm = self.hsm.pinned_to(member);
        let objects = objects_of_store(hsm.daemon_objects().await?, store);
        let stored = self.store.pairs_of_batch(number, MAX_PAIRS).await?;
        let pending = self.store.pairs_to_destroy(MAX_PAIRS).await?;
        let on_token_pairs = stored.into_iter().filter_map(|stored| match stored.private_key {
            StoredKey::OnToken(pair) => Some(pair),
            StoredKey::Wrapped(_) => None,
        });
        let referenced: BTreeSet<_> = on_token_pairs.chain(pending.into_iter().map(|pending| pending.pair)).collect();
        let purpose = self.store.batches().await?.into_iter().find(|batch| batch.number == number);
        for (_, pair) in
            objects.pairs.iter().filter(|(batch, pair)| batch.number == number && !referenced.contains(pair))
        {
            tracing::warn!(batch = number, "destroying an on-token pair that the state store does not list");
            match purpose.as_ref().map(|batch| batch.purpose) {
                Some(Purpose::Pool(kind)) => hsm.destroy_pair(kind, pair).await?,
                // The key type of the batch is unknown: try the types.
                _ => {
                    for kind in [spp_format::keys::KeyType::P256, spp_format::keys::KeyType::Ed25519] {
                        hsm.destroy_pair(kind, pair).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn objects_of_store(objects: DaemonObjects, store: StoreId) -> DaemonObjects {
    DaemonObjects {
        keys: objects.keys.into_iter().filter(|key| key.store == store).collect(),
        pairs: objects.pairs.into_iter().filter(|(batch, _)| batch.store == store).collect(),
    }
}
