//! What the store and a token say of each other, both ways, once for each HSM when it is there for the first time. A crash leaves
//! a plan without its key, a key without its batch, or a pair on the token that no row names; an old copy of the store that was put
//! back leaves more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{KeyPool, Pool, PoolError};
use crate::hsm::{HsmId, OwnObjects};
use crate::keys::{BatchName, StoreId, StoredKey};
use crate::store::{Batch, BatchState, BatchStep, KeyStorage, Purpose, StoreError};

/// Pairs on the token that are compared at once: more than any module is good for.
const ALL: usize = 1_000_000;
/// How long the first HSM is waited for before it is said that there is none.
const PATIENCE: Duration = Duration::from_secs(5);

impl KeyPool {
    /// Compares an HSM's token with the store, if that was not done before. Waits a moment for one that is not there.
    pub(super) async fn reconcile(&self, member: HsmId) -> Result<(), PoolError> {
        if self.notes().compared.contains(&member) {
            return Ok(());
        }
        let waited = self.hsm.at(member).ready(PATIENCE).await;
        match waited {
            Ok(()) => self.compare(member).await,
            // One of several that is away is no trouble of the batches'.
            Err(_) if *self.reconciled.borrow() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Nothing of an HSM is offered, filled or shredded before this is done: nobody works meanwhile on what is compared.
    async fn compare(&self, member: HsmId) -> Result<(), PoolError> {
        let own = self.hsm.at(member).own_objects().await?;
        let (store, _) = self.store.origin().await?;
        let own = of_store(own, store);
        let mut numbers = BTreeSet::new();
        numbers.extend(own.keys.iter().map(|key| key.number));
        numbers.extend(own.pairs.iter().map(|(batch, _)| batch.number));
        {
            let mut notes = self.notes();
            notes.highest_on_token = notes.highest_on_token.max(numbers.last().copied().unwrap_or(0));
        }
        let batches = {
            let _alone = self.comparing.lock().await;
            // Read after the token: what others begin meanwhile is in the store before it is on theirs.
            let (_, highest) = self.store.origin().await?;
            let batches = self.store.batches().await?;
            // While it is not decided which store counts nothing is destroyed: it may belong to the one that should be here.
            if let Some(known) = batches.iter().find_map(|batch| batch.quarantined.clone()) {
                tracing::error!(why = %known, "an officer must decide which state store counts; see sppctl pool status");
                self.notes().rolled_back.get_or_insert(known);
                None
            } else if let Some(why) = self.evidence_of_an_old_copy(&numbers, (store, highest), member).await? {
                self.quarantine_all(why).await?;
                None
            } else {
                Some(batches)
            }
        };
        if let Some(batches) = &batches {
            self.recover_sessions(member, &own, batches).await?;
        }
        let _alone = self.comparing.lock().await;
        let all = self.store.batches().await?;
        for batch in all.iter().filter(|batch| numbers.contains(&batch.number)) {
            self.hsm.add_keeper(BatchName { store, number: batch.number }, member);
        }
        self.notes().compared.insert(member);
        // Another one may have been compared meanwhile, and neither was the last.
        if batches.is_some()
            && self.is_last(member)
            && let Some(why) = self.lost_batch(&numbers, store, member).await?
        {
            self.quarantine_all(why).await?;
        }
        self.reconciled.send_replace(true);
        self.pools.values().for_each(Pool::wake);
        Ok(())
    }

    /// Whether every other token has been looked at.
    fn is_last(&self, member: HsmId) -> bool {
        let notes = self.notes();
        self.hsm.each().all(|other| other == member || notes.compared.contains(&other))
    }

    /// A batch whose key is neither on this token nor on one that was looked at before.
    async fn lost_batch(
        &self,
        on_token: &BTreeSet<u64>,
        store: StoreId,
        member: HsmId,
    ) -> Result<Option<String>, PoolError> {
        // What is on record of this very HSM is of a life before, when it had the key.
        let found = |number| {
            on_token.contains(&number)
                || self.hsm.keepers(BatchName { store, number }).iter().any(|keeper| *keeper != member)
        };
        let lost = |batch: &Batch| {
            let lives = matches!(batch.state, BatchState::Open | BatchState::Sealed);
            lives && batch.keeping == KeyStorage::Wrapped && batch.quarantined.is_none() && !found(batch.number)
        };
        let suspect = self.store.batches().await?.into_iter().find(lost);
        let Some(number) = suspect.map(|batch| batch.number) else { return Ok(None) };
        // One that is being shredded at this moment is gone from both.
        let lives = self.store.batches().await?.into_iter().any(|batch| batch.number == number && lost(&batch));
        Ok(lives.then(|| {
            format!(
                "the key of batch {number} is not on the token: it was shredded since, or this is another token or an old copy of it"
            )
        }))
    }

    /// Why this store must be an old copy, if so. Only the last token that is looked at tells which key is on none.
    async fn evidence_of_an_old_copy(
        &self,
        on_token: &BTreeSet<u64>,
        (store, highest): (StoreId, u64),
        member: HsmId,
    ) -> Result<Option<String>, PoolError> {
        let later = self.notes().highest_on_token;
        if later > highest {
            return Ok(Some(format!("the token has batch {later} of this store, which knows {highest} batches only")));
        }
        let elsewhere = |number: &&u64| {
            self.hsm.keepers(BatchName { store, number: **number }).iter().any(|keeper| *keeper != member)
        };
        if let Some(number) = on_token.iter().find(elsewhere) {
            return Ok(Some(format!(
                "batch {number} is on two HSMs: one was copied when it had batches already, or began them for an older copy"
            )));
        }
        if self.is_last(member)
            && let Some(why) = self.lost_batch(on_token, store, member).await?
        {
            return Ok(Some(why));
        }
        if let Some(session) = self.registry.newest_session().await?
            && !self.journal.knows(&session).await?
        {
            return Ok(Some(format!(
                "the public database has a record of session {session}, of which nothing is known here"
            )));
        }
        Ok(None)
    }

    /// The state store is an old copy: any pair that it calls ready may be on a device. None of them is offered any more.
    pub async fn quarantine_all(&self, why: String) -> Result<(), PoolError> {
        let why = format!("the state store was rolled back: {why}");
        self.notes().rolled_back.get_or_insert_with(|| why.clone());
        tracing::error!(%why, "no pair that was ready is offered any more; see sppctl pool status");
        for batch in self.store.batches().await? {
            let lives = matches!(batch.state, BatchState::Open | BatchState::Sealed);
            if lives && batch.quarantined.is_none() && (batch.ready > 0 || batch.purpose == Purpose::Sessions) {
                match self.store.step_batch(batch.number, BatchStep::Quarantine(why.clone())).await {
                    // It has just ended by itself.
                    Ok(_) | Err(StoreError::WrongBatch { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.for_sessions.send_replace(BTreeMap::new());
        for pool in self.pools.values() {
            pool.shares.values().for_each(|share| share.shelf.begin_again());
            pool.wake();
        }
        self.erased();
        Ok(())
    }

    /// What a crash left.
    async fn recover_sessions(&self, member: HsmId, own: &OwnObjects, batches: &[Batch]) -> Result<(), PoolError> {
        let known: BTreeSet<_> = batches.iter().map(|batch| batch.number).collect();
        for key in own.keys.iter().filter(|key| !known.contains(&key.number)) {
            // A batch is forgotten after its key is gone; one that came back was not destroyed durably.
            tracing::warn!(batch = key.number, "a key of a batch that is over is still on the token; it is destroyed");
            self.hsm.at(member).destroy_batch_key(*key).await?;
        }
        let with_pairs: BTreeSet<_> = own.pairs.iter().map(|(batch, _)| batch.number).collect();
        for number in with_pairs {
            self.destroy_strays(number, member).await?;
        }
        Ok(())
    }

    /// Destroys the pairs of a batch that are on the token and in no row: their making was cut off before anybody knew of them.
    /// Nobody makes pairs for the batch meanwhile.
    pub(super) async fn destroy_strays(&self, number: u64, member: HsmId) -> Result<(), PoolError> {
        let (store, _) = self.store.origin().await?;
        let hsm = self.hsm.at(member);
        let own = of_store(hsm.own_objects().await?, store);
        let held = self.store.pairs_of_batch(number, ALL).await?;
        let condemned = self.store.condemned(ALL).await?;
        let kept = held.into_iter().filter_map(|held| match held.kept {
            StoredKey::OnToken(pair) => Some(pair),
            StoredKey::Wrapped(_) => None,
        });
        let named: BTreeSet<_> = kept.chain(condemned.into_iter().map(|condemned| condemned.pair)).collect();
        let purpose = self.store.batches().await?.into_iter().find(|batch| batch.number == number);
        for (_, pair) in own.pairs.iter().filter(|(batch, pair)| batch.number == number && !named.contains(pair)) {
            tracing::warn!(batch = number, "a pair on the token that nothing names is destroyed");
            match purpose.as_ref().map(|batch| batch.purpose) {
                Some(Purpose::Pool(kind)) => hsm.destroy_pair(kind, pair).await?,
                // Whose kind is not known any more is found as whatever it is.
                _ => {
                    for kind in [crate::keys::KeyKind::P256, crate::keys::KeyKind::Ed25519] {
                        hsm.destroy_pair(kind, pair).await?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn of_store(own: OwnObjects, store: StoreId) -> OwnObjects {
    OwnObjects {
        keys: own.keys.into_iter().filter(|key| key.store == store).collect(),
        pairs: own.pairs.into_iter().filter(|(batch, _)| batch.store == store).collect(),
    }
}
