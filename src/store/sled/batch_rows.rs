//! The rows of the batches of the secret store on sled.
//!
//! | key | value |
//! |---|---|
//! | `o` | the store's ID on tokens, and the highest batch number |
//! | `b` + number, 8 bytes | batch |
//! | `e` + number | valid length of the batch's file |
//! | `k` + kind | pair counts of the kind since the store was created |

use spp_format::keys::KeyType;

use super::view::View;
use crate::hsm::{BatchName, StoreId};
use crate::store::secret::name_of;
use crate::store::{Batch, PairCounts, StoreError};

/// Writes the initial content of a new store.
pub(super) fn init(view: &mut View<'_>, id: StoreId) -> Result<(), StoreError> {
    view.put(ORIGIN, &(id, 0u64))
}

/// Checks that the required content is readable, and truncates batch files to their valid length.
pub(super) fn check(view: &View<'_>) -> Result<(), StoreError> {
    origin(view)?;
    all(view)?;
    view.trim_blobs()
}

pub(super) fn all(view: &View<'_>) -> Result<Vec<Batch>, StoreError> {
    let numbers = view.keys(b"b")?;
    let read = |key: Vec<u8>| {
        let bytes = key.get(1..).and_then(|bytes| bytes.try_into().ok());
        let number = bytes.ok_or_else(|| view.damaged("a batch key".into(), "batch number is not 8 bytes"))?;
        require(view, u64::from_be_bytes(number))
    };
    numbers.into_iter().map(read).collect()
}

/// The batch with a number. Fails with `WrongBatch` if it is missing.
pub(super) fn require(view: &View<'_>, number: u64) -> Result<Batch, StoreError> {
    let absent = || StoreError::WrongBatch { batch: number, problem: "does not exist".into() };
    get(view, number)?.ok_or_else(absent)
}

pub(super) fn get(view: &View<'_>, number: u64) -> Result<Option<Batch>, StoreError> {
    view.get(&batch_key(number), || format!("batch {number}"))
}

pub(super) fn put(view: &mut View<'_>, batch: &Batch) -> Result<(), StoreError> {
    view.put(&batch_key(batch.number), batch)
}

/// The name of a batch on the token.
pub(super) fn batch_name(view: &View<'_>, number: u64) -> Result<BatchName, StoreError> {
    Ok(name_of(origin(view)?.0, number))
}

pub(super) fn pair_counts(view: &View<'_>, kind: KeyType) -> Result<PairCounts, StoreError> {
    Ok(view.get(&kind_key(kind), || format!("the pair counts of {kind}"))?.unwrap_or_default())
}

pub(super) fn update_pair_counts(
    view: &mut View<'_>,
    kind: KeyType,
    update: impl FnOnce(&mut PairCounts),
) -> Result<(), StoreError> {
    let mut counts = pair_counts(view, kind)?;
    update(&mut counts);
    view.put(&kind_key(kind), &counts)
}

pub(super) fn batch_error(batch: &Batch, problem: String) -> StoreError {
    StoreError::WrongBatch { batch: batch.number, problem }
}

pub(super) fn origin(view: &View<'_>) -> Result<(StoreId, u64), StoreError> {
    view.get(ORIGIN, || "the store ID".into())?.ok_or_else(|| view.damaged("the store ID".into(), "missing"))
}

pub(super) const ORIGIN: &[u8] = b"o";

pub(super) fn batch_key(number: u64) -> Vec<u8> {
    [b"b", number.to_be_bytes().as_slice()].concat()
}

fn kind_key(kind: KeyType) -> Vec<u8> {
    [b"k", kind.name().as_bytes()].concat()
}
