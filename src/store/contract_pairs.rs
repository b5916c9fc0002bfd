//! What every engine's secret store must do, told once: `contract_of_pairs!(module, Factory)` makes the tests for one of them.

mod holders;
mod model;
mod steps;

use std::ops::Range;
use std::sync::Arc;

use super::contract::{Factory, PrivateStore, blob, chip, erased, id, identity, issued, published, session};
use super::*;
use crate::keys::{BatchName, KeyKind, StoredKey, TokenPair, WrappedKey};

pub(super) use holders::*;
pub(super) use steps::any_sequence_agrees_with_the_model_and_accounts_for_every_pair;

macro_rules! contract_of_pairs {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            contract_of_pairs!(@tests $factory:
                a_batch_goes_its_way_and_no_other,
                a_number_of_a_batch_is_never_used_twice,
                a_batch_with_a_pair_cannot_be_emptied,
                a_batch_takes_pairs_of_its_own_while_it_is_open,
                pairs_are_offered_oldest_batch_first_and_each_once,
                paging_beside_concurrent_adds_sees_each_pair_once,
                quarantined_pairs_and_other_kinds_are_not_offered_and_sealed_ones_are,
                a_pooled_pair_goes_to_its_session_in_one_transaction,
                a_refused_reservation_leaves_the_pair_ready,
                of_many_racing_for_a_pair_one_wins,
                a_pair_made_on_the_spot_needs_an_open_batch_for_sessions,
                an_erased_pair_is_never_ready_again,
                an_erased_pair_on_the_token_is_condemned_until_it_is_destroyed,
                moved_pairs_keep_their_holders_and_get_their_new_blobs,
                what_changed_before_a_move_is_left,
                pairs_move_only_to_an_open_batch_of_the_same_purpose,
                a_moved_reservation_is_answered_again,
                pairs_of_sessions_are_listed_first_and_no_more_than_asked,
                only_ready_pairs_are_discarded);

            #[test]
            fn any_sequence_agrees_with_the_model_and_accounts_for_every_pair() {
                $crate::store::contract_pairs::any_sequence_agrees_with_the_model_and_accounts_for_every_pair::<$factory>();
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
pub(super) use contract_of_pairs;

pub(super) const P256: Purpose = Purpose::Pool(KeyKind::P256);
/// More pairs than any test has.
pub(super) const ALL: usize = 100_000;

/// The public key of pair `n`: its last bytes say which.
pub(super) fn public_key(n: u64) -> Vec<u8> {
    [&[4; 83], n.to_be_bytes().as_slice()].concat()
}

/// Session `n` with the public key of pair `pair`.
pub(super) fn session_with(n: u64, pair: u64) -> Session {
    Session { public_key: Some(public_key(pair)), ..session(n) }
}

pub(super) fn given_up(at: u64) -> SessionState {
    SessionState::Aborted { at, reason: "expired".into() }
}

pub(super) async fn open_batch(store: &dyn SecretStore, purpose: Purpose, keeping: KeyStorage) -> u64 {
    let batch = store.plan_batch(purpose, keeping, 1000, 0).await.unwrap().number;
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

/// Adds pairs of these numbers, each with its own public key and private half.
pub(super) async fn add(store: &dyn SecretStore, number: u64, pairs: Range<u64>) -> Batch {
    let name = name(store, number).await;
    let kept: fn(BatchName, u64) -> StoredKey = match batch(store, number).await.keeping {
        KeyStorage::Wrapped => |name, n| wrapped(name, blob(n)),
        KeyStorage::Hsm => on_token,
    };
    let pairs = pairs.map(|n| PooledPair { public_key: public_key(n), kept: kept(name, n) }).collect();
    store.add_pairs(number, pairs).await.unwrap()
}

pub(super) async fn ready(store: &dyn SecretStore) -> Vec<(PairId, PooledPair)> {
    store.ready_pairs(KeyKind::P256, None, ALL).await.unwrap()
}

async fn ready_ids(store: &dyn SecretStore) -> Vec<PairId> {
    ready(store).await.into_iter().map(|(id, _)| id).collect()
}

/// All that a refused call must leave as it was, and a closed store must come back with.
#[derive(Debug, PartialEq)]
pub(super) struct Everything {
    batches: Vec<Batch>,
    held: Vec<HeldPair>,
    ready: Vec<(PairId, PooledPair)>,
    condemned: Vec<CondemnedPair>,
    counts: PairCounts,
    unfinished: Vec<Session>,
}

pub(super) async fn everything(store: &dyn PrivateStore) -> Everything {
    let batches = store.batches().await.unwrap();
    let mut held = Vec::new();
    for batch in &batches {
        held.extend(store.pairs_of_batch(batch.number, ALL).await.unwrap());
    }
    let (ready, condemned) = (ready(store).await, store.condemned(ALL).await.unwrap());
    let counts = store.pair_counts(KeyKind::P256).await.unwrap();
    Everything { batches, held, ready, condemned, counts, unfinished: store.unfinished().await.unwrap() }
}

async fn is_the_same_after_reopening(store: Arc<dyn PrivateStore>, engine: &impl Factory) {
    let before = everything(&*store).await;
    drop(store);
    assert_eq!(everything(&*engine.state()).await, before);
}

pub(super) async fn end(store: &dyn StateStore, n: u64) {
    store.advance(&id(n), StateName::Reserved, issued(n)).await.unwrap();
    store.advance(&id(n), StateName::Issued, published(n)).await.unwrap();
    store.advance(&id(n), StateName::Published, erased(n)).await.unwrap();
}

pub(super) async fn abort(store: &dyn StateStore, n: u64, at: u64) {
    store.advance(&id(n), StateName::Reserved, given_up(at)).await.unwrap();
}

pub(super) fn is_wrong<T: std::fmt::Debug>(result: Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::WrongBatch { .. }))
}

fn is_gone(result: &Result<(), ReserveError>) -> bool {
    matches!(result, Err(ReserveError::PairGone))
}

pub(super) fn pooled(batch: u64, number: u64) -> PairToReserve {
    PairToReserve::Pooled(PairId { batch, number })
}

pub(super) async fn a_batch_goes_its_way_and_no_other(engine: &impl Factory) {
    let store = engine.state();
    let quarantine = BatchStep::Quarantine("why".into());
    let way = [
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
    assert_eq!((expected.purpose, expected.keeping, expected.created), (P256, KeyStorage::Wrapped, 1234));
    for (step, state, refused) in way {
        for _ in 0..2 {
            let Some(step) = step.clone() else { continue };
            let stepped = store.step_batch(number, step).await.unwrap();
            assert_eq!(stepped, Batch { state, ..expected.clone() });
            expected = stepped;
        }
        assert_eq!(expected.state, state);
        for step in refused {
            assert!(is_wrong(store.step_batch(number, step.clone()).await), "{step:?} of a {state:?} one");
        }
        if matches!(state, BatchState::Open | BatchState::Sealed) {
            assert!(is_wrong(store.forget_batch(number).await), "{state:?}");
        }
        assert_eq!(batch(&*store, number).await, expected);
    }
    let planned = store.plan_batch(P256, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    for number in [number, planned, 99] {
        for _ in 0..2 {
            store.forget_batch(number).await.unwrap();
        }
        assert!(is_wrong(store.step_batch(number, BatchStep::Open).await));
    }
    assert_eq!(store.batches().await.unwrap().len(), 1, "the one that was there before");
    let unused = open_pool(&*store).await;
    assert_eq!(store.step_batch(unused, BatchStep::Empty).await.unwrap().state, BatchState::Emptied);
}

pub(super) async fn a_number_of_a_batch_is_never_used_twice(engine: &impl Factory) {
    let mut store = engine.state();
    let (origin, mut last) = store.origin().await.unwrap();
    for (above, number) in [(0, 2), (9, 10), (3, 11), (11, 12)] {
        last = store.plan_batch(P256, KeyStorage::Hsm, 1000, above).await.unwrap().number;
        assert_eq!(last, number);
    }
    for number in [12, 11, 2] {
        store.forget_batch(number).await.unwrap();
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

pub(super) async fn a_batch_with_a_pair_cannot_be_emptied(engine: &impl Factory) {
    let store = engine.state();
    let (here, there) = (open_pool(&*store).await, open_batch(&*store, P256, KeyStorage::Hsm).await);
    for (n, number) in [(1, here), (2, there)] {
        let empty = || store.step_batch(number, BatchStep::Empty);
        add(&*store, number, n..n + 1).await;
        assert!(is_wrong(empty().await), "with a ready pair");
        store.reserve(&session_with(n, n), Some(&pooled(number, 0))).await.unwrap();
        store.step_batch(number, BatchStep::Seal).await.unwrap();
        assert!(is_wrong(empty().await), "with a session's pair");
        end(&*store, n).await;
        if number == there {
            assert!(is_wrong(empty().await), "with a pair on the token");
            let condemned = store.condemned(ALL).await.unwrap();
            store.destroyed(&condemned[0].pair).await.unwrap();
        }
        assert_eq!(empty().await.unwrap().state, BatchState::Emptied);
    }
    let made = PairToReserve::Made { batch: 1, blob: blob(3) };
    store.reserve(&session(3), Some(&made)).await.unwrap();
    assert!(is_wrong(store.step_batch(1, BatchStep::Empty).await));
    abort(&*store, 3, 3000).await;
    store.step_batch(1, BatchStep::Empty).await.unwrap();
}

pub(super) async fn a_batch_takes_pairs_of_its_own_while_it_is_open(engine: &impl Factory) {
    let store = engine.state();
    let (one, other) = (open_pool(&*store).await, open_pool(&*store).await);
    let token = open_batch(&*store, P256, KeyStorage::Hsm).await;
    let kept = |batch| name(&*store, batch);
    let add_one = |batch, kept| {
        let good = PooledPair { public_key: public_key(7), kept: wrapped(kept, blob(7)) };
        store.add_pairs(batch, vec![good])
    };
    for (batch, of) in [(one, other), (one, token), (token, token), (1, 1), (99, 99)] {
        assert!(is_wrong(add_one(batch, kept(of).await).await), "a pair of {of} into {batch}");
    }
    let mixed = [wrapped(kept(one).await, blob(1)), on_token(kept(one).await, 2)];
    let mixed = mixed.map(|kept| PooledPair { public_key: public_key(1), kept });
    assert!(is_wrong(store.add_pairs(one, mixed.into()).await), "all or none");
    store.step_batch(one, BatchStep::Seal).await.unwrap();
    store.step_batch(other, BatchStep::Quarantine("why".into())).await.unwrap();
    let planned = store.plan_batch(P256, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    for closed in [one, other, planned] {
        assert!(is_wrong(add_one(closed, kept(closed).await).await));
        assert_eq!(batch(&*store, closed).await.taken_in, 0);
    }
    assert_eq!(store.pair_counts(KeyKind::P256).await.unwrap(), PairCounts::default());
    assert_eq!(ready(&*store).await, []);
}

pub(super) async fn pairs_are_offered_oldest_batch_first_and_each_once(engine: &impl Factory) {
    let store = engine.state();
    let batches = [open_pool(&*store).await, open_pool(&*store).await, open_pool(&*store).await];
    let [first, second, third] = batches;
    for (batch, pairs) in [(third, 10..15), (first, 0..5), (second, 8..10), (first, 5..8)] {
        add(&*store, batch, pairs).await;
    }
    let mut expected = Vec::new();
    for (batch, pairs) in [(first, 0..8), (second, 8..10), (third, 10..15)] {
        for (number, n) in (0..).zip(pairs) {
            let kept = wrapped(name(&*store, batch).await, blob(n));
            expected.push((PairId { batch, number }, PooledPair { public_key: public_key(n), kept }));
        }
    }
    assert_eq!(ready(&*store).await, expected);
    for limit in [1, 2, 4, 8, 14, 15, 16] {
        assert_eq!(pages(&*store, limit).await, expected, "pages of {limit}");
    }
    assert_eq!(store.ready_pairs(KeyKind::P256, None, 0).await.unwrap(), []);
}

/// All that is ready, read page by page.
async fn pages(store: &dyn SecretStore, limit: usize) -> Vec<(PairId, PooledPair)> {
    let mut all: Vec<(PairId, PooledPair)> = Vec::new();
    loop {
        let after = all.last().map(|(id, _)| *id);
        let page = store.ready_pairs(KeyKind::P256, after, limit).await.unwrap();
        assert!(page.len() <= limit);
        if page.is_empty() {
            return all;
        }
        all.extend(page);
    }
}

pub(super) async fn paging_beside_concurrent_adds_sees_each_pair_once(engine: &impl Factory) {
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
        let over = adders.iter().all(tokio::task::JoinHandle::is_finished);
        let found = pages(&*store, 7).await;
        assert!(found.is_sorted_by(|(a, _), (b, _)| a < b), "each once, in order");
        let missing = seen.iter().find(|pair| !found.contains(pair));
        assert_eq!(missing, None, "what was seen stays");
        seen = found;
        if over {
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

pub(super) async fn quarantined_pairs_and_other_kinds_are_not_offered_and_sealed_ones_are(engine: &impl Factory) {
    let store = engine.state();
    let (bad, sealed) = (open_pool(&*store).await, open_pool(&*store).await);
    let other = open_batch(&*store, Purpose::Pool(KeyKind::P384), KeyStorage::Wrapped).await;
    for (batch, pairs) in [(bad, 0..3), (sealed, 3..6), (other, 6..9)] {
        add(&*store, batch, pairs).await;
    }
    store.step_batch(sealed, BatchStep::Seal).await.unwrap();
    for reason in ["the first", "a later one"] {
        let batch = store.step_batch(bad, BatchStep::Quarantine(reason.into())).await.unwrap();
        assert_eq!((batch.quarantined.as_deref(), batch.ready, batch.offered()), (Some("the first"), 3, 0));
    }
    assert_eq!(ready_ids(&*store).await, [0, 1, 2].map(|number| PairId { batch: sealed, number }));
    let p384 = store.ready_pairs(KeyKind::P384, None, ALL).await.unwrap();
    assert!(p384.iter().map(|(id, _)| id.batch).eq([other; 3]));
    assert_eq!(store.ready_pairs(KeyKind::Ed25519, None, ALL).await.unwrap(), []);
    assert!(is_gone(&store.reserve(&session_with(1, 0), Some(&pooled(bad, 0))).await));
    store.reserve(&session_with(1, 3), Some(&pooled(sealed, 0))).await.unwrap();
}
