//! Opens batches for new pairs. Each batch has its own key in the HSM.

use super::{KeyPool, PoolError};
use crate::hsm::{BatchName, HsmId};
use crate::store::{Batch, BatchState, BatchStep, KeyStorage, Purpose};

impl KeyPool {
    /// The open batch of a purpose on an HSM; creates one if there is none.
    pub(super) async fn open_batch(&self, purpose: Purpose, on: HsmId) -> Result<Batch, PoolError> {
        self.find_or_create(purpose, self.storage_of(purpose), None, on).await
    }

    /// Another open batch for the pairs of `batch`: same purpose, HSM and storage, independent of the current configuration.
    pub(super) async fn open_batch_beside(&self, batch: &Batch, on: HsmId) -> Result<Batch, PoolError> {
        self.find_or_create(batch.purpose, batch.storage, Some(batch.number), on).await
    }

    async fn find_or_create(
        &self,
        purpose: Purpose,
        storage: KeyStorage,
        excluded: Option<u64>,
        on: HsmId,
    ) -> Result<Batch, PoolError> {
        let _guard = self.tasks_of(on)?.planning.lock().await;
        let closing = self.closing().clone();
        let owners = self.batch_owners().await?;
        let fits = |batch: &Batch| {
            let accepts_pairs =
                batch.state == BatchState::Open && batch.quarantined.is_none() && batch.storage == storage;
            let is_on_member = owners.owner_of(batch.number) == Some(on) || owners.can_be_claimed(batch);
            accepts_pairs
                && is_on_member
                && batch.purpose == purpose
                && Some(batch.number) != excluded
                && !closing.contains(&batch.number)
        };
        // Use the newest batch, because pairs are offered in the order of the batches.
        match self.store.batches().await?.into_iter().rev().find(fits) {
            Some(batch) if self.hsm.claim_batch(owners.name(batch.number), on) => Ok(batch),
            _ => self.create_batch(purpose, storage, on).await,
        }
    }

    async fn create_batch(&self, purpose: Purpose, storage: KeyStorage, on: HsmId) -> Result<Batch, PoolError> {
        let above = self.reconcile_state().highest_on_token;
        let store = self.store.origin().await?.0;
        // A crash or failure from here on leaves the plan, with or without a key of that name: see `forget_abandoned_plans`.
        let planned = {
            let _plan_guard = self.plan_lock.lock().await;
            let planned = self.store.plan_batch(purpose, storage, self.clock.now(), above).await?;
            self.hsm.add_batch_owner(BatchName { store, number: planned.number }, on);
            planned
        };
        let name = BatchName { store, number: planned.number };
        if storage == KeyStorage::Wrapped {
            self.hsm.pinned_to(on).create_batch_key(name).await?;
        }
        let batch = self.store.step_batch(planned.number, BatchStep::Open).await?;
        tracing::info!(batch = batch.number, purpose = ?batch.purpose, "batch of key pairs created");
        Ok(batch)
    }

    /// Removes abandoned plans. Nothing was ever wrapped under their keys, because their batches were never open.
    pub(super) async fn forget_abandoned_plans(&self, member: HsmId) -> Result<(), PoolError> {
        let _guard = self.tasks_of(member)?.planning.lock().await;
        let owners = self.batch_owners().await?;
        let abandoned: Vec<_> = {
            let _plan_guard = self.plan_lock.lock().await;
            let batches = self.store.batches().await?.into_iter();
            let planned = batches.filter(|batch| batch.state == BatchState::Planned).map(|batch| batch.number);
            planned.filter(|number| owners.is_maintained_by(member, *number) && owners.is_available(*number)).collect()
        };
        for number in abandoned {
            let name = owners.name(number);
            self.hsm.destroy_batch_key(name).await?;
            self.store.delete_batch(number).await?;
            self.hsm.forget_batch_owners(name);
        }
        Ok(())
    }

    /// Ensures that the HSM has an open batch for the pairs of new sessions.
    pub(super) async fn ensure_session_batch(&self, member: HsmId) -> Result<(), PoolError> {
        let current = self.session_batches.borrow().get(&member).map(|current| current.number);
        let accepts_pairs = |batch: &Batch| {
            current == Some(batch.number) && batch.state == BatchState::Open && batch.quarantined.is_none()
        };
        if !self.store.batches().await?.iter().any(accepts_pairs) {
            // The batch must not be shredded between its selection and its registration as the batch for sessions.
            let _guard = self.tasks_of(member)?.shredding.lock().await;
            let batch = self.open_batch(Purpose::Sessions, member).await?;
            self.set_session_batch(&batch, member).await?;
        }
        Ok(())
    }

    pub(super) async fn set_session_batch(&self, batch: &Batch, on: HsmId) -> Result<(), PoolError> {
        let name = self.name(batch.number).await?;
        self.session_batches.send_modify(|batches| {
            batches.insert(on, name);
        });
        Ok(())
    }

    /// The name of a batch on the token.
    pub(super) async fn name(&self, number: u64) -> Result<BatchName, PoolError> {
        Ok(BatchName { store: self.store.origin().await?.0, number })
    }

    /// Session pairs are always stored wrapped: they are as short-lived as their sessions.
    const fn storage_of(&self, purpose: Purpose) -> KeyStorage {
        match purpose {
            Purpose::Sessions => KeyStorage::Wrapped,
            Purpose::Pool(_) => self.rules.storage,
        }
    }
}
