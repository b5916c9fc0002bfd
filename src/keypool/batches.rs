//! Batches that take pairs: begun with a key of their own in the HSM.

use super::{KeyPool, PoolError};
use crate::keys::BatchName;
use crate::store::{Batch, BatchState, BatchStep, Keeping, Purpose};

impl KeyPool {
    /// The batch of a purpose that takes pairs; a new one if there is none.
    pub(super) async fn open_batch(&self, purpose: Purpose) -> Result<Batch, PoolError> {
        self.find_or_begin(purpose, self.keeping_of(purpose), None).await
    }

    /// A batch that takes the pairs of this one: of the same purpose, and kept alike, whatever the configuration says by now.
    pub(super) async fn open_batch_beside(&self, batch: &Batch) -> Result<Batch, PoolError> {
        self.find_or_begin(batch.purpose, batch.keeping, Some(batch.number)).await
    }

    async fn find_or_begin(&self, purpose: Purpose, keeping: Keeping, except: Option<u64>) -> Result<Batch, PoolError> {
        let _alone = self.planning.lock().await;
        let closing = self.closing().clone();
        let fits = |batch: &Batch| {
            let takes = batch.state == BatchState::Open && batch.quarantined.is_none() && batch.keeping == keeping;
            takes && batch.purpose == purpose && Some(batch.number) != except && !closing.contains(&batch.number)
        };
        // The newest: pairs are offered in the order of the batches.
        match self.store.batches().await?.into_iter().rev().find(fits) {
            Some(batch) => Ok(batch),
            None => self.begin_batch(purpose, keeping).await,
        }
    }

    async fn begin_batch(&self, purpose: Purpose, keeping: Keeping) -> Result<Batch, PoolError> {
        let above = self.notes().highest_on_token;
        let planned = self.store.plan_batch(purpose, keeping, self.clock.now(), above).await?;
        // A crash or a failure from here on leaves the plan, and a key of that name or none: see `forget_plans`.
        if keeping == Keeping::Wrapped {
            self.hsm.create_batch_key(self.name(planned.number).await?).await?;
        }
        let batch = self.store.step_batch(planned.number, BatchStep::Open).await?;
        tracing::info!(batch = batch.number, purpose = ?batch.purpose, "a batch of key pairs is begun");
        Ok(batch)
    }

    /// Plans that came to nothing: nothing was ever wrapped under a key whose batch was not open.
    pub(super) async fn forget_plans(&self) -> Result<(), PoolError> {
        let _alone = self.planning.lock().await;
        for batch in self.store.batches().await?.into_iter().filter(|batch| batch.state == BatchState::Planned) {
            self.hsm.destroy_batch_key(self.name(batch.number).await?).await?;
            self.store.forget_batch(batch.number).await?;
        }
        Ok(())
    }

    /// New sessions find a batch for their pairs.
    pub(super) async fn keep_a_batch_for_sessions(&self) -> Result<(), PoolError> {
        let current = *self.for_sessions.borrow();
        let takes = |batch: &Batch| {
            let current = current.is_some_and(|current| current.number == batch.number);
            current && batch.state == BatchState::Open && batch.quarantined.is_none()
        };
        if !self.store.batches().await?.iter().any(takes) {
            // Nobody may end the batch between its being found and its being known as the one for sessions.
            let _alone = self.shredding.lock().await;
            let batch = self.open_batch(Purpose::Sessions).await?;
            self.use_for_sessions(&batch).await?;
        }
        Ok(())
    }

    pub(super) async fn use_for_sessions(&self, batch: &Batch) -> Result<(), PoolError> {
        let name = self.name(batch.number).await?;
        self.for_sessions.send_replace(Some(name));
        Ok(())
    }

    /// The names of a batch on the token.
    pub(super) async fn name(&self, number: u64) -> Result<BatchName, PoolError> {
        Ok(BatchName { store: self.store.origin().await?.0, number })
    }

    /// Pairs of sessions are always kept wrapped: they come and go with the line.
    const fn keeping_of(&self, purpose: Purpose) -> Keeping {
        match purpose {
            Purpose::Sessions => Keeping::Wrapped,
            Purpose::Pool(_) => self.rules.keeping,
        }
    }
}
