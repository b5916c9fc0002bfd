//! Contract tests for the secret store of every storage engine. `secret_store_contract!(module, Factory)` instantiates them.

mod assignment;
mod model;
mod steps;

use std::ops::Range;
use std::sync::Arc;

use spp_format::keys::KeyType;

use super::contract::{Factory, PrivateStore, blob, chip, erased, id, identity, issued, published, session};
use super::*;
use crate::hsm::{BatchName, StoredKey, TokenPair, WrappedKey};

pub(super) use assignment::*;
pub(super) use steps::random_pair_steps_match_model;

macro_rules! secret_store_contract {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            secret_store_contract!(@tests $factory:
                batch_allows_only_legal_steps,
                batch_number_is_never_reused,
                batch_with_pairs_cannot_be_emptied,
                only_open_batch_accepts_matching_pairs,
                ready_pairs_are_listed_once_oldest_batch_first,
                paging_during_concurrent_adds_lists_each_pair_once,
                ready_pairs_excludes_quarantine_includes_sealed,
                pooled_pair_is_assigned_with_its_session,
                refused_reservation_leaves_pair_ready,
                concurrent_reservations_of_a_pair_one_wins,
                on_demand_pair_requires_open_session_batch,
                erased_pair_never_becomes_ready,
                erased_token_pair_is_listed_until_destroyed,
                moved_pairs_keep_assignment_and_get_new_blobs,
                move_skips_pairs_that_changed_since,
                move_requires_open_batch_of_same_purpose,
                repeated_reservation_succeeds_after_move,
                pairs_of_batch_lists_session_pairs_first,
                discard_keeps_session_pairs);

            #[test]
            fn random_pair_steps_match_model() {
                $crate::store::contract_pairs::random_pair_steps_match_model::<$factory>();
            }
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            $crate::store::contract_pairs::$test(&<$factory as $crate::store::contract::Factory>::new()).await;
        }
    )+};
}
pub(super) use secret_store_contract;

pub(super) const P256: Purpose = Purpose::Pool(KeyType::P256);
/// A limit above the number of pairs of any test.
pub(super) const ALL: usize = 100_000;

/// The public key of pair `n`, which ends with `n`.
pub(super) fn public_key(n: u64) -> Vec<u8> {
    [&[4; 83], n.to_be_bytes().as_slice()].concat()
}

/// Session `n` with the public key of pair `pair`.
pub(super) fn session_with(n: u64, pair: u64) -> Session {
    Session { public_key: Some(public_key(pair)), ..session(n) }
}

pub(super) fn aborted_at(at: u64) -> SessionState {
    SessionState::Aborted { at, reason: "expired".into() }
}

pub(super) async fn open_batch(store: &dyn SecretStore, purpose: Purpose, storage: KeyStorage) -> u64 {
    let batch = store.plan_batch(purpose, storage, 1000, 0).await.unwrap().number;
    store.step_batch(batch, BatchStep::Open).await.unwrap();
    batch
}

pub(super) async fn open_pool(store: &dyn SecretStore) -> u64 {
    open_batch(store, P256, KeyStorage::Wrapped).await
}

pub(super) async fn batch(store: &dyn SecretStore, number: u64) -> Batch {
    store.batches().await.unwrap().into_iter().find(|batch| batch.number == number).unwrap()
}

pub(super) async fn name(store: &dyn SecretStore, number: u64) -> BatchName {
    BatchName { store: store.origin().await.unwrap().0, number }
}

pub(super) fn wrapped(batch: BatchName, blob: Vec<u8>) -> StoredKey {
    StoredKey::Wrapped(WrappedKey { wrapping_key: batch.key(), blob })
}

fn on_token(batch: BatchName, n: u64) -> StoredKey {
    StoredKey::OnToken(TokenPair { label: batch.pairs(), id: n.to_be_bytes().to_vec() })
}

/// Adds pairs with these numbers, each with its own public and private key.
pub(super) async fn add(store: &dyn SecretStore, number: u64, pairs: Range<u64>) -> Batch {
    let name = name(store, number).await;
    let private_key: fn(BatchName, u64) -> StoredKey = match batch(store, number).await.storage {
        KeyStorage::Wrapped => |name, n| wrapped(name, blob(n)),
        KeyStorage::Hsm => on_token,
    };
    let pairs = pairs.map(|n| PooledPair { public_key: public_key(n), private_key: private_key(name, n) }).collect();
    store.add_pairs(number, pairs).await.unwrap()
}

pub(super) async fn ready(store: &dyn SecretStore) -> Vec<(PairId, PooledPair)> {
    store.ready_pairs(KeyType::P256, None, ALL).await.unwrap()
}

async fn ready_ids(store: &dyn SecretStore) -> Vec<PairId> {
    ready(store).await.into_iter().map(|(id, _)| id).collect()
}

/// State that a refused call must not change, and that must survive reopening.
#[derive(Debug, PartialEq)]
pub(super) struct StoreSnapshot {
    batches: Vec<Batch>,
    pairs: Vec<BatchPair>,
    ready: Vec<(PairId, PooledPair)>,
    pairs_to_destroy: Vec<PairToDestroy>,
    counts: PairCounts,
    unfinished: Vec<Session>,
}

pub(super) async fn snapshot(store: &dyn PrivateStore) -> StoreSnapshot {
    let batches = store.batches().await.unwrap();
    let mut pairs = Vec::new();
    for batch in &batches {
        pairs.extend(store.pairs_of_batch(batch.number, ALL).await.unwrap());
    }
    let (ready, pairs_to_destroy) = (ready(store).await, store.pairs_to_destroy(ALL).await.unwrap());
    let counts = store.pair_counts(KeyType::P256).await.unwrap();
    StoreSnapshot { batches, pairs, ready, pairs_to_destroy, counts, unfinished: store.unfinished().await.unwrap() }
}

async fn assert_same_after_reopening(store: Arc<dyn PrivateStore>, engine: &impl Factory) {
    let before = snapshot(&*store).await;
    drop(store);
    assert_eq!(snapshot(&*engine.state()).await, before);
}

pub(super) async fn erase_session(store: &dyn StateStore, n: u64) {
    store.advance(&id(n), StateName::Reserved, issued(n)).await.unwrap();
    store.advance(&id(n), StateName::Issued, published(n)).await.unwrap();
    store.advance(&id(n), StateName::Published, erased(n)).await.unwrap();
}

pub(super) async fn abort_session(store: &dyn StateStore, n: u64, at: u64) {
    store.advance(&id(n), StateName::Reserved, aborted_at(at)).await.unwrap();
}

pub(super) fn is_wrong_batch<T: std::fmt::Debug>(result: Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::WrongBatch { .. }))
}

fn is_unavailable(result: &Result<(), ReserveError>) -> bool {
    matches!(result, Err(ReserveError::PairUnavailable))
}

pub(super) fn pooled(batch: u64, number: u64) -> PairToReserve {
    PairToReserve::Pooled(PairId { batch, number })
}

pub(super) async fn batch_allows_only_legal_steps(engine: &impl Factory) {
    let store = engine.state();
    let quarantine = BatchStep::Quarantine("why".into());
    let steps = [
        (None, BatchState::Planned, vec![BatchStep::Seal, BatchStep::Empty, quarantine.clone(), BatchStep::Discard]),
        (Some(BatchStep::Open), BatchState::Open, vec![]),
        (Some(BatchStep::Seal), BatchState::Sealed, vec![BatchStep::Open]),
        (
            Some(BatchStep::Empty),
            BatchState::Emptied,
            vec![BatchStep::Open, BatchStep::Seal, quarantine, BatchStep::Discard],
        ),
    ];
    let mut expected = store.plan_batch(P256, KeyStorage::Wrapped, 1234, 0).await.unwrap();
    let number = expected.number;
    assert_eq!((expected.purpose, expected.storage, expected.created), (P256, KeyStorage::Wrapped, 1234));
    for (step, state, refused) in steps {
        for _ in 0..2 {
            let Some(step) = step.clone() else { continue };
            let stepped = store.step_batch(number, step).await.unwrap();
            assert_eq!(stepped, Batch { state, ..expected.clone() });
            expected = stepped;
        }
        assert_eq!(expected.state, state);
        for step in refused {
            assert!(is_wrong_batch(store.step_batch(number, step.clone()).await), "{step:?} in state {state:?}");
        }
        if matches!(state, BatchState::Open | BatchState::Sealed) {
            assert!(is_wrong_batch(store.delete_batch(number).await), "{state:?}");
        }
        assert_eq!(batch(&*store, number).await, expected);
    }
    let planned = store.plan_batch(P256, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    for number in [number, planned, 99] {
        for _ in 0..2 {
            store.delete_batch(number).await.unwrap();
        }
        assert!(is_wrong_batch(store.step_batch(number, BatchStep::Open).await));
    }
    assert_eq!(store.batches().await.unwrap().len(), 1, "only the initial batch");
    let unused = open_pool(&*store).await;
    assert_eq!(store.step_batch(unused, BatchStep::Empty).await.unwrap().state, BatchState::Emptied);
}

pub(super) async fn batch_number_is_never_reused(engine: &impl Factory) {
    let mut store = engine.state();
    let (origin, mut last) = store.origin().await.unwrap();
    for (above, number) in [(0, 2), (9, 10), (3, 11), (11, 12)] {
        last = store.plan_batch(P256, KeyStorage::Hsm, 1000, above).await.unwrap().number;
        assert_eq!(last, number);
    }
    for number in [12, 11, 2] {
        store.delete_batch(number).await.unwrap();
    }
    drop(store);
    store = engine.state();
    assert_eq!(store.origin().await.unwrap(), (origin, last));
    let plans = (0..16).map(|_| {
        let store = store.clone();
        tokio::spawn(async move { store.plan_batch(P256, KeyStorage::Wrapped, 1000, 5).await.unwrap().number })
    });
    let mut numbers = Vec::new();
    for plan in plans.collect::<Vec<_>>() {
        numbers.push(plan.await.unwrap());
    }
    numbers.sort_unstable();
    assert_eq!(numbers, (13..29).collect::<Vec<_>>());
    let listed: Vec<_> = store.batches().await.unwrap().iter().map(|batch| batch.number).collect();
    assert_eq!(listed, [[1, 10].as_slice(), &numbers].concat(), "oldest first");
}

pub(super) async fn batch_with_pairs_cannot_be_emptied(engine: &impl Factory) {
    let store = engine.state();
    let (wrapped, token) = (open_pool(&*store).await, open_batch(&*store, P256, KeyStorage::Hsm).await);
    for (n, number) in [(1, wrapped), (2, token)] {
        let empty = || store.step_batch(number, BatchStep::Empty);
        add(&*store, number, n..n + 1).await;
        assert!(is_wrong_batch(empty().await), "with a ready pair");
        store.reserve(&session_with(n, n), Some(&pooled(number, 0))).await.unwrap();
        store.step_batch(number, BatchStep::Seal).await.unwrap();
        assert!(is_wrong_batch(empty().await), "with a session's pair");
        erase_session(&*store, n).await;
        if number == token {
            assert!(is_wrong_batch(empty().await), "with a pair on the token");
            let to_destroy = store.pairs_to_destroy(ALL).await.unwrap();
            store.confirm_destroyed(&to_destroy[0].pair).await.unwrap();
        }
        assert_eq!(empty().await.unwrap().state, BatchState::Emptied);
    }
    let made = PairToReserve::OnDemand { batch: 1, blob: blob(3) };
    store.reserve(&session(3), Some(&made)).await.unwrap();
    assert!(is_wrong_batch(store.step_batch(1, BatchStep::Empty).await));
    abort_session(&*store, 3, 3000).await;
    store.step_batch(1, BatchStep::Empty).await.unwrap();
}

pub(super) async fn only_open_batch_accepts_matching_pairs(engine: &impl Factory) {
    let store = engine.state();
    let (one, other) = (open_pool(&*store).await, open_pool(&*store).await);
    let token = open_batch(&*store, P256, KeyStorage::Hsm).await;
    let batch_name = |batch| name(&*store, batch);
    let add_one = |batch, wrapped_for| {
        let pair = PooledPair { public_key: public_key(7), private_key: wrapped(wrapped_for, blob(7)) };
        store.add_pairs(batch, vec![pair])
    };
    for (batch, owner) in [(one, other), (one, token), (token, token), (1, 1), (99, 99)] {
        assert!(is_wrong_batch(add_one(batch, batch_name(owner).await).await), "a pair of {owner} into {batch}");
    }
    let mixed = [wrapped(batch_name(one).await, blob(1)), on_token(batch_name(one).await, 2)];
    let mixed = mixed.map(|private_key| PooledPair { public_key: public_key(1), private_key });
    assert!(is_wrong_batch(store.add_pairs(one, mixed.into()).await), "all or none");
    store.step_batch(one, BatchStep::Seal).await.unwrap();
    store.step_batch(other, BatchStep::Quarantine("why".into())).await.unwrap();
    let planned = store.plan_batch(P256, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    for closed in [one, other, planned] {
        assert!(is_wrong_batch(add_one(closed, batch_name(closed).await).await));
        assert_eq!(batch(&*store, closed).await.pairs_added, 0);
    }
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), PairCounts::default());
    assert_eq!(ready(&*store).await, []);
}

pub(super) async fn ready_pairs_are_listed_once_oldest_batch_first(engine: &impl Factory) {
    let store = engine.state();
    let batches = [open_pool(&*store).await, open_pool(&*store).await, open_pool(&*store).await];
    let [first, second, third] = batches;
    for (batch, pairs) in [(third, 10..15), (first, 0..5), (second, 8..10), (first, 5..8)] {
        add(&*store, batch, pairs).await;
    }
    let mut expected = Vec::new();
    for (batch, pairs) in [(first, 0..8), (second, 8..10), (third, 10..15)] {
        for (number, n) in (0..).zip(pairs) {
            let private_key = wrapped(name(&*store, batch).await, blob(n));
            expected.push((PairId { batch, number }, PooledPair { public_key: public_key(n), private_key }));
        }
    }
    assert_eq!(ready(&*store).await, expected);
    for limit in [1, 2, 4, 8, 14, 15, 16] {
        assert_eq!(pages(&*store, limit).await, expected, "pages of {limit}");
    }
    assert_eq!(store.ready_pairs(KeyType::P256, None, 0).await.unwrap(), []);
}

/// All ready pairs, read page by page.
async fn pages(store: &dyn SecretStore, limit: usize) -> Vec<(PairId, PooledPair)> {
    let mut all: Vec<(PairId, PooledPair)> = Vec::new();
    loop {
        let after = all.last().map(|(id, _)| *id);
        let page = store.ready_pairs(KeyType::P256, after, limit).await.unwrap();
        assert!(page.len() <= limit);
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

pub(super) async fn paging_during_concurrent_adds_lists_each_pair_once(engine: &impl Factory) {
    let store = engine.state();
    let (old, new) = (open_pool(&*store).await, open_pool(&*store).await);
    let adders: Vec<_> = [(old, 0), (old, 1000), (new, 2000), (new, 3000)]
        .map(|(batch, first)| {
            let store = store.clone();
            tokio::spawn(async move {
                for n in 0..20 {
                    add(&*store, batch, first + 3 * n..first + 3 * n + 3).await;
                }
            })
        })
        .into();
    let mut seen = Vec::new();
    loop {
        let is_last_round = adders.iter().all(tokio::task::JoinHandle::is_finished);
        let found = pages(&*store, 7).await;
        assert!(found.is_sorted_by(|(a, _), (b, _)| a < b), "each pair once, in order");
        let missing = seen.iter().find(|pair| !found.contains(pair));
        assert_eq!(missing, None, "listed pairs stay listed");
        seen = found;
        if is_last_round {
            break;
        }
    }
    for adder in adders {
        adder.await.unwrap();
    }
    let mut public: Vec<_> = seen.into_iter().map(|(_, pair)| pair.public_key).collect();
    public.sort_unstable();
    let added = [0, 1000, 2000, 3000].into_iter().flat_map(|first| (first..first + 60).map(public_key));
    assert_eq!(public, added.collect::<Vec<_>>());
}

pub(super) async fn ready_pairs_excludes_quarantine_includes_sealed(engine: &impl Factory) {
    let store = engine.state();
    let (quarantined, sealed) = (open_pool(&*store).await, open_pool(&*store).await);
    let other = open_batch(&*store, Purpose::Pool(KeyType::P384), KeyStorage::Wrapped).await;
    for (batch, pairs) in [(quarantined, 0..3), (sealed, 3..6), (other, 6..9)] {
        add(&*store, batch, pairs).await;
    }
    store.step_batch(sealed, BatchStep::Seal).await.unwrap();
    for reason in ["the first", "a later one"] {
        let batch = store.step_batch(quarantined, BatchStep::Quarantine(reason.into())).await.unwrap();
        assert_eq!((batch.quarantined.as_deref(), batch.ready, batch.available()), (Some("the first"), 3, 0));
    }
    assert_eq!(ready_ids(&*store).await, [0, 1, 2].map(|number| PairId { batch: sealed, number }));
    let p384 = store.ready_pairs(KeyType::P384, None, ALL).await.unwrap();
    assert!(p384.iter().map(|(id, _)| id.batch).eq([other; 3]));
    assert_eq!(store.ready_pairs(KeyType::Ed25519, None, ALL).await.unwrap(), []);
    assert!(is_unavailable(&store.reserve(&session_with(1, 0), Some(&pooled(quarantined, 0))).await));
    store.reserve(&session_with(1, 3), Some(&pooled(sealed, 0))).await.unwrap();
}
