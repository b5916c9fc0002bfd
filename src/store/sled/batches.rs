//! The secret store on sled, and the steps of its batches.

use async_trait::async_trait;
use spp_format::keys::KeyType;

use super::batch_rows::{ORIGIN, all, batch_error, batch_key, get, origin, pair_counts, put, require};
use super::pairs;
use super::state_store::SledStateStore;
use super::view::View;
use crate::hsm::{StoreId, TokenPair};
use crate::store::{
    Batch, BatchPair, BatchState, BatchStep, KeyStorage, PairCounts, PairId, PairToDestroy, PooledPair, Purpose,
    RewrappedPair, SecretStore, StoreError,
};

#[async_trait]
impl SecretStore for SledStateStore {
    async fn origin(&self) -> Result<(StoreId, u64), StoreError> {
        self.0.run("reading the store ID", |view| origin(view)).await
    }

    async fn batches(&self) -> Result<Vec<Batch>, StoreError> {
        self.0.run("listing batches", |view| all(view)).await
    }

    async fn plan_batch(
        &self,
        purpose: Purpose,
        storage: KeyStorage,
        at: u64,
        above: u64,
    ) -> Result<Batch, StoreError> {
        self.0.run("planning a batch", move |view| plan(view, purpose, storage, at, above)).await
    }

    async fn step_batch(&self, number: u64, step: BatchStep) -> Result<Batch, StoreError> {
        self.0.run("changing a batch's state", move |view| take_step(view, number, &step)).await
    }

    async fn delete_batch(&self, number: u64) -> Result<(), StoreError> {
        self.0.run("deleting a batch", move |view| delete(view, number)).await
    }

    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
        self.0.run("adding pairs", move |view| pairs::add(view, batch, pairs)).await
    }

    async fn ready_pairs(
        &self,
        kind: KeyType,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
        self.0.run("reading pairs", move |view| pairs::ready(view, kind, after, limit)).await
    }

    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<BatchPair>, StoreError> {
        self.0.run("reading a batch's pairs", move |view| pairs::of_batch(view, batch, limit)).await
    }

    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<RewrappedPair>) -> Result<u64, StoreError> {
        self.0.run("moving pairs", move |view| pairs::move_all(view, from, to, pairs)).await
    }

    async fn pairs_to_destroy(&self, limit: usize) -> Result<Vec<PairToDestroy>, StoreError> {
        self.0.run("listing pairs to destroy", move |view| pairs::to_destroy(view, limit)).await
    }

    async fn confirm_destroyed(&self, pair: &TokenPair) -> Result<(), StoreError> {
        let pair = pair.clone();
        self.0.run("recording a destroyed pair", move |view| pairs::confirm_destroyed(view, &pair)).await
    }

    async fn pair_counts(&self, kind: KeyType) -> Result<PairCounts, StoreError> {
        self.0.run("reading pair counts", move |view| pair_counts(view, kind)).await
    }
}

fn plan(view: &mut View<'_>, purpose: Purpose, storage: KeyStorage, at: u64, above: u64) -> Result<Batch, StoreError> {
    let (id, last) = origin(view)?;
    let number = last.max(above) + 1;
    view.put(ORIGIN, &(id, number))?;
    let batch = Batch {
        number,
        purpose,
        storage,
        state: BatchState::Planned,
        quarantined: None,
        created: at,
        pairs_added: 0,
        ready: 0,
        reserved: 0,
        first_erased: None,
    };
    put(view, &batch)?;
    Ok(batch)
}

fn take_step(view: &mut View<'_>, number: u64, step: &BatchStep) -> Result<Batch, StoreError> {
    use BatchState::{Emptied, Open, Planned, Sealed};
    let mut batch = require(view, number)?;
    match (step, batch.state) {
        (BatchStep::Open, Planned) => batch.state = Open,
        (BatchStep::Seal, Open) => batch.state = Sealed,
        (BatchStep::Empty, Open | Sealed) if batch.has_no_pairs() && !pairs::has_pairs_to_destroy(view, number)? => {
            batch.state = Emptied;
        }
        (BatchStep::Open, Open) | (BatchStep::Seal, Sealed) | (BatchStep::Empty, Emptied) => {}
        (BatchStep::Quarantine(reason), Open | Sealed) => {
            batch.quarantined.get_or_insert_with(|| reason.clone());
        }
        (BatchStep::Discard, Open | Sealed) => return pairs::discard(view, batch),
        (_, state) => {
            return Err(batch_error(&batch, format!("is in state {state:?}, which does not allow the step {step:?}")));
        }
    }
    put(view, &batch)?;
    Ok(batch)
}

fn delete(view: &mut View<'_>, number: u64) -> Result<(), StoreError> {
    let Some(batch) = get(view, number)? else { return Ok(()) };
    if !matches!(batch.state, BatchState::Planned | BatchState::Emptied) {
        return Err(batch_error(&batch, format!("is in state {:?} and cannot be deleted", batch.state)));
    }
    if view.is_pending(&batch_key(number)) {
        return Err(batch_error(
            &batch,
            "is not durably empty yet; retry once the change of its state is acknowledged".into(),
        ));
    }
    // The state is durable, so the file is no longer needed. After a crash before the row is removed, the caller repeats the
    // deletion.
    view.remove_blobs(number)?;
    view.remove(&batch_key(number))
}
