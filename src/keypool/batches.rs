//! Batches that take pairs: begun with a key of their own in the HSM.

use super::{KeyPool, PoolError};
use crate::hsm::HsmId;
use crate::keys::BatchName;
use crate::store::{Batch, BatchState, BatchStep, KeyStorage, Purpose};

impl KeyPool {
    /// The batch of a purpose that takes an HSM's pairs; a new one if there is none.
    pub(super) async fn open_batch(&self, purpose: Purpose, on: HsmId) -> Result<Batch, PoolError> {
        self.find_or_begin(purpose, self.keeping_of(purpose), None, on).await
    }

    /// A batch that takes the pairs of this one: of the same purpose, on the same HSM, and kept alike, whatever the configuration
    /// says by now.
    pub(super) async fn open_batch_beside(&self, batch: &Batch, on: HsmId) -> Result<Batch, PoolError> {
        self.find_or_begin(batch.purpose, batch.keeping, Some(batch.number), on).await
    }

    async fn find_or_begin(
        &self,
        purpose: Purpose,
        keeping: KeyStorage,
        except: Option<u64>,
        on: HsmId,
    ) -> Result<Batch, PoolError> {
        let _alone = self.bench(on)?.planning.lock().await;
        let closing = self.closing().clone();
        let keepers = self.keepers().await?;
        let fits = |batch: &Batch| {
            let takes = batch.state == BatchState::Open && batch.quarantined.is_none() && batch.keeping == keeping;
            let there = keepers.of(batch.number) == Some(on) || keepers.may_be_given_to_any(batch);
            takes
                && there
                && batch.purpose == purpose
                && Some(batch.number) != except
                && !closing.contains(&batch.number)
        };
        // The newest: pairs are offered in the order of the batches.
        match self.store.batches().await?.into_iter().rev().find(fits) {
            Some(batch) if self.hsm.adopt(keepers.name(batch.number), on) => Ok(batch),
            _ => self.begin_batch(purpose, keeping, on).await,
        }
    }

    async fn begin_batch(&self, purpose: Purpose, keeping: KeyStorage, on: HsmId) -> Result<Batch, PoolError> {
        let above = self.notes().highest_on_token;
        let store = self.store.origin().await?.0;
        // A crash or a failure from here on leaves the plan, and a key of that name or none: see `forget_plans`.
        let planned = {
            let _unseen = self.plans.lock().await;
            let planned = self.store.plan_batch(purpose, keeping, self.clock.now(), above).await?;
            self.hsm.add_keeper(BatchName { store, number: planned.number }, on);
            planned
        };
        let name = BatchName { store, number: planned.number };
        if keeping == KeyStorage::Wrapped {
            self.hsm.at(on).create_batch_key(name).await?;
        }
        let batch = self.store.step_batch(planned.number, BatchStep::Open).await?;
        tracing::info!(batch = batch.number, purpose = ?batch.purpose, "a batch of key pairs is begun");
        Ok(batch)
    }

    /// Plans that came to nothing: nothing was ever wrapped under a key whose batch was not open.
    pub(super) async fn forget_plans(&self, member: HsmId) -> Result<(), PoolError> {
        let _alone = self.bench(member)?.planning.lock().await;
        let keepers = self.keepers().await?;
        let given_up: Vec<_> = {
            let _unseen = self.plans.lock().await;
            let batches = self.store.batches().await?.into_iter();
            let planned = batches.filter(|batch| batch.state == BatchState::Planned).map(|batch| batch.number);
            planned.filter(|number| keepers.looks_after(member, *number) && keepers.are_at_hand(*number)).collect()
        };
        for number in given_up {
            let name = keepers.name(number);
            self.hsm.destroy_batch_key(name).await?;
            self.store.forget_batch(number).await?;
            self.hsm.forget_keepers(name);
        }
        Ok(())
    }

    /// New sessions find a batch for their pairs, on each HSM.
    pub(super) async fn keep_a_batch_for_sessions(&self, member: HsmId) -> Result<(), PoolError> {
        let current = self.for_sessions.borrow().get(&member).map(|current| current.number);
        let takes = |batch: &Batch| {
            current == Some(batch.number) && batch.state == BatchState::Open && batch.quarantined.is_none()
        };
        if !self.store.batches().await?.iter().any(takes) {
            // Nobody may end the batch between its being found and its being known as the one for sessions.
            let _alone = self.bench(member)?.shredding.lock().await;
            let batch = self.open_batch(Purpose::Sessions, member).await?;
            self.use_for_sessions(&batch, member).await?;
        }
        Ok(())
    }

    pub(super) async fn use_for_sessions(&self, batch: &Batch, on: HsmId) -> Result<(), PoolError> {
        let name = self.name(batch.number).await?;
        self.for_sessions.send_modify(|batches| {
            batches.insert(on, name);
        });
        Ok(())
    }

    /// The names of a batch on the token.
    pub(super) async fn name(&self, number: u64) -> Result<BatchName, PoolError> {
        Ok(BatchName { store: self.store.origin().await?.0, number })
    }

    /// Pairs of sessions are always kept wrapped: they come and go with the line.
    const fn keeping_of(&self, purpose: Purpose) -> KeyStorage {
        match purpose {
            Purpose::Sessions => KeyStorage::Wrapped,
            Purpose::Pool(_) => self.rules.keeping,
        }
    }
}
