//! The secret store on sled: batches.
//!
//! | key | value |
//! |---|---|
//! | `o` | the store's name on tokens, and the highest number of a batch |
//! | `b` + number, 8 bytes | batch |
//! | `e` + number | the end of the batch's file, as far as it counts |
//! | `k` + kind | pairs of the kind since the store was made |

use async_trait::async_trait;

use super::pairs;
use super::state::SledStateStore;
use super::view::View;
use crate::keys::{BatchName, KeyKind, StoreId, TokenPair};
use crate::store::secret::name_of;
use crate::store::{
    Batch, BatchState, BatchStep, CondemnedPair, HeldPair, KeyStorage, MovedPair, PairCounts, PairId, PooledPair,
    Purpose, SecretStore, StoreError,
};

#[async_trait]
impl SecretStore for SledStateStore {
    async fn origin(&self) -> Result<(StoreId, u64), StoreError> {
        self.0.run("reading the store's name", |view| origin(view)).await
    }

    async fn batches(&self) -> Result<Vec<Batch>, StoreError> {
        self.0.run("listing batches", |view| all(view)).await
    }

    async fn plan_batch(
        &self,
        purpose: Purpose,
        keeping: KeyStorage,
        at: u64,
        above: u64,
    ) -> Result<Batch, StoreError> {
        self.0.run("planning a batch", move |view| plan(view, purpose, keeping, at, above)).await
    }

    async fn step_batch(&self, number: u64, step: BatchStep) -> Result<Batch, StoreError> {
        self.0.run("taking a batch further", move |view| take_step(view, number, &step)).await
    }

    async fn forget_batch(&self, number: u64) -> Result<(), StoreError> {
        self.0.run("forgetting a batch", move |view| forget(view, number)).await
    }

    async fn add_pairs(&self, batch: u64, pairs: Vec<PooledPair>) -> Result<Batch, StoreError> {
        self.0.run("adding pairs", move |view| pairs::add(view, batch, pairs)).await
    }

    async fn ready_pairs(
        &self,
        kind: KeyKind,
        after: Option<PairId>,
        limit: usize,
    ) -> Result<Vec<(PairId, PooledPair)>, StoreError> {
        self.0.run("reading pairs", move |view| pairs::ready(view, kind, after, limit)).await
    }

    async fn pairs_of_batch(&self, batch: u64, limit: usize) -> Result<Vec<HeldPair>, StoreError> {
        self.0.run("reading a batch's pairs", move |view| pairs::of_batch(view, batch, limit)).await
    }

    async fn move_pairs(&self, from: u64, to: u64, pairs: Vec<MovedPair>) -> Result<u64, StoreError> {
        self.0.run("moving pairs", move |view| pairs::move_all(view, from, to, pairs)).await
    }

    async fn condemned(&self, limit: usize) -> Result<Vec<CondemnedPair>, StoreError> {
        self.0.run("listing pairs to be destroyed", move |view| pairs::condemned(view, limit)).await
    }

    async fn destroyed(&self, pair: &TokenPair) -> Result<(), StoreError> {
        let pair = pair.clone();
        self.0.run("forgetting a destroyed pair", move |view| pairs::destroyed(view, &pair)).await
    }

    async fn pair_counts(&self, kind: KeyKind) -> Result<PairCounts, StoreError> {
        self.0.run("reading the counts of pairs", move |view| pair_counts(view, kind)).await
    }
}

/// What an empty store contains.
pub(super) fn found(view: &mut View<'_>, id: StoreId) -> Result<(), StoreError> {
    view.put(ORIGIN, &(id, 0u64))
}

/// What every store must contain.
pub(super) fn check(view: &View<'_>) -> Result<(), StoreError> {
    origin(view)?;
    all(view)?;
    view.trim_blobs()
}

fn plan(view: &mut View<'_>, purpose: Purpose, keeping: KeyStorage, at: u64, above: u64) -> Result<Batch, StoreError> {
    let (id, last) = origin(view)?;
    let number = last.max(above) + 1;
    view.put(ORIGIN, &(id, number))?;
    let batch = Batch {
        number,
        purpose,
        keeping,
        state: BatchState::Planned,
        quarantined: None,
        created: at,
        taken_in: 0,
        ready: 0,
        reserved: 0,
        erased_since: None,
    };
    put(view, &batch)?;
    Ok(batch)
}

fn take_step(view: &mut View<'_>, number: u64, step: &BatchStep) -> Result<Batch, StoreError> {
    use BatchState::{Emptied, Open, Planned, Sealed};
    let mut batch = existing(view, number)?;
    match (step, batch.state) {
        (BatchStep::Open, Planned) => batch.state = Open,
        (BatchStep::Seal, Open) => batch.state = Sealed,
        (BatchStep::Empty, Open | Sealed) if batch.is_used_up() && !pairs::has_condemned(view, number)? => {
            batch.state = Emptied;
        }
        (BatchStep::Open, Open) | (BatchStep::Seal, Sealed) | (BatchStep::Empty, Emptied) => {}
        (BatchStep::Quarantine(reason), Open | Sealed) => {
            batch.quarantined.get_or_insert_with(|| reason.clone());
        }
        (BatchStep::Discard, Open | Sealed) => return pairs::discard(view, batch),
        (_, state) => return Err(wrong(&batch, format!("is {state:?}, which does not allow the step {step:?}"))),
    }
    put(view, &batch)?;
    Ok(batch)
}

fn forget(view: &mut View<'_>, number: u64) -> Result<(), StoreError> {
    let Some(batch) = get(view, number)? else { return Ok(()) };
    if !matches!(batch.state, BatchState::Planned | BatchState::Emptied) {
        return Err(wrong(&batch, format!("is {:?} and cannot be forgotten", batch.state)));
    }
    if view.is_pending(&batch_key(number)) {
        return Err(wrong(&batch, "is only now being emptied; once that is answered it can be forgotten".into()));
    }
    // Its state is durable: nothing needs a byte of the file any more. A crash before the row is gone finds it and comes
    // here again.
    view.remove_blobs(number)?;
    view.remove(&batch_key(number))
}

fn all(view: &View<'_>) -> Result<Vec<Batch>, StoreError> {
    let numbers = view.keys(b"b")?;
    let one = |key: Vec<u8>| {
        let bytes = key.get(1..).and_then(|bytes| bytes.try_into().ok());
        let number = bytes.ok_or_else(|| view.damaged("a batch's number".into(), "it has not 8 bytes"))?;
        existing(view, u64::from_be_bytes(number))
    };
    numbers.into_iter().map(one).collect()
}

/// A batch that somebody was told of.
pub(super) fn existing(view: &View<'_>, number: u64) -> Result<Batch, StoreError> {
    let absent = || StoreError::WrongBatch { batch: number, problem: "is not there".into() };
    get(view, number)?.ok_or_else(absent)
}

pub(super) fn get(view: &View<'_>, number: u64) -> Result<Option<Batch>, StoreError> {
    view.get(&batch_key(number), || format!("batch {number}"))
}

pub(super) fn put(view: &mut View<'_>, batch: &Batch) -> Result<(), StoreError> {
    view.put(&batch_key(batch.number), batch)
}

/// The names of a batch on the token.
pub(super) fn name(view: &View<'_>, number: u64) -> Result<BatchName, StoreError> {
    Ok(name_of(origin(view)?.0, number))
}

pub(super) fn pair_counts(view: &View<'_>, kind: KeyKind) -> Result<PairCounts, StoreError> {
    Ok(view.get(&kind_key(kind), || format!("the counts of {kind} pairs"))?.unwrap_or_default())
}

pub(super) fn count(view: &mut View<'_>, kind: KeyKind, add: impl FnOnce(&mut PairCounts)) -> Result<(), StoreError> {
    let mut counts = pair_counts(view, kind)?;
    add(&mut counts);
    view.put(&kind_key(kind), &counts)
}

pub(super) fn wrong(batch: &Batch, problem: String) -> StoreError {
    StoreError::WrongBatch { batch: batch.number, problem }
}

fn origin(view: &View<'_>) -> Result<(StoreId, u64), StoreError> {
    view.get(ORIGIN, || "the store's name".into())?
        .ok_or_else(|| view.damaged("the store's name".into(), "it is not there"))
}

const ORIGIN: &[u8] = b"o";

fn batch_key(number: u64) -> Vec<u8> {
    [b"b", number.to_be_bytes().as_slice()].concat()
}

fn kind_key(kind: KeyKind) -> Vec<u8> {
    [b"k", kind.name().as_bytes()].concat()
}
