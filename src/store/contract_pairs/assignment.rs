//! Contract tests for the assignment of pairs: reserve, erase, move, discard.

use super::*;

pub(in crate::store) async fn pooled_pair_is_assigned_with_its_session(engine: &impl Factory) {
    let store = engine.state();
    let token = open_batch(&*store, P256, KeyStorage::Hsm).await;
    let wrapped = open_pool(&*store).await;
    for (n, number) in [(10, wrapped), (20, token)] {
        add(&*store, number, n..n + 3).await;
        let (id_of_pair, pair) = ready(&*store).await.into_iter().find(|(id, _)| id.batch == number).unwrap();
        for _ in 0..2 {
            store.reserve(&session_with(n, n), Some(&PairToReserve::Pooled(id_of_pair))).await.unwrap();
            assert_eq!(store.stored_key(&id(n)).await.unwrap().as_ref(), Some(&pair.private_key));
            assert!(!ready_ids(&*store).await.contains(&id_of_pair));
            let batch = batch(&*store, number).await;
            assert_eq!((batch.pairs_added, batch.ready, batch.reserved), (3, 2, 1));
        }
        assert!(is_unavailable(&store.reserve(&session_with(n + 1, n), Some(&pooled(number, 0))).await));
        let another = store.reserve(&session_with(n, n + 1), Some(&pooled(number, 1))).await;
        assert!(matches!(another, Err(ReserveError::Store(StoreError::WrongState { .. }))), "{another:?}");
    }
    let counts = PairCounts { made: 6, reserved: 2, discarded: 0 };
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), counts);
    assert_same_after_reopening(store, engine).await;
}

pub(in crate::store) async fn refused_reservation_leaves_pair_ready(engine: &impl Factory) {
    let store = engine.state();
    let number = open_pool(&*store).await;
    add(&*store, number, 0..2).await;
    store.reserve(&session(1), None).await.unwrap();
    let before = snapshot(&*store).await;
    let (first, absent) = (pooled(number, 0), [pooled(number, 2), pooled(99, 0), pooled(1, 0)]);
    let on_chip = Session { chip: chip(1), ..session_with(2, 0) };
    let refused = store.reserve(&on_chip, Some(&first)).await;
    assert!(matches!(refused, Err(ReserveError::ChipTaken(_))), "{refused:?}");
    let of_identity = Session { identity: identity(1), ..session_with(2, 0) };
    let refused = store.reserve(&of_identity, Some(&first)).await;
    assert!(matches!(refused, Err(ReserveError::IdentityTaken(_))), "{refused:?}");
    for public_key in [Some(public_key(1)), None] {
        let refused = store.reserve(&Session { public_key, ..session(2) }, Some(&first)).await;
        assert!(matches!(refused, Err(ReserveError::Store(StoreError::Damaged { .. }))), "{refused:?}");
    }
    for absent in &absent {
        assert!(is_unavailable(&store.reserve(&session_with(2, 0), Some(absent)).await));
    }
    assert_eq!(store.session(&id(2)).await.unwrap(), None);
    assert_eq!(snapshot(&*store).await, before);
    store.reserve(&session_with(2, 0), Some(&first)).await.unwrap();
}

pub(in crate::store) async fn concurrent_reservations_of_a_pair_one_wins(engine: &impl Factory) {
    let store = engine.state();
    let number = open_pool(&*store).await;
    add(&*store, number, 7..8).await;
    let rivals: Vec<_> = (0..32)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.reserve(&session_with(n, 7), Some(&pooled(number, 0))).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (n, rival) in (0..).zip(rivals) {
        match rival.await.unwrap() {
            Ok(()) => winners.push(n),
            Err(error) => assert!(matches!(error, ReserveError::PairUnavailable), "{error}"),
        }
    }
    let [winner] = winners.as_slice() else { panic!("{winners:?} won") };
    for n in 0..32 {
        let held = (n == *winner).then_some(wrapped(name(&*store, number).await, blob(7)));
        assert_eq!(store.stored_key(&id(n)).await.unwrap(), held);
        assert_eq!(store.session(&id(n)).await.unwrap().is_some(), n == *winner);
    }
    assert_eq!(batch(&*store, number).await.reserved, 1);
}

pub(in crate::store) async fn on_demand_pair_requires_open_session_batch(engine: &impl Factory) {
    let store = engine.state();
    let on_demand = |batch| PairToReserve::OnDemand { batch, blob: blob(1) };
    let planned = store.plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    let sealed = open_batch(&*store, Purpose::Sessions, KeyStorage::Wrapped).await;
    store.step_batch(sealed, BatchStep::Seal).await.unwrap();
    let emptied = open_batch(&*store, Purpose::Sessions, KeyStorage::Wrapped).await;
    store.step_batch(emptied, BatchStep::Empty).await.unwrap();
    let pool = open_pool(&*store).await;
    let before = snapshot(&*store).await;
    for number in [planned, sealed, emptied, pool, 99] {
        assert!(is_unavailable(&store.reserve(&session(1), Some(&on_demand(number))).await), "batch {number}");
        assert_eq!(store.session(&id(1)).await.unwrap(), None);
    }
    assert_eq!(snapshot(&*store).await, before);
    store.reserve(&session(1), Some(&on_demand(1))).await.unwrap();
    assert_eq!(store.stored_key(&id(1)).await.unwrap(), Some(wrapped(name(&*store, 1).await, blob(1))));
    let batch = batch(&*store, 1).await;
    assert_eq!((batch.pairs_added, batch.ready, batch.reserved), (1, 0, 1));
}

pub(in crate::store) async fn erased_pair_never_becomes_ready(engine: &impl Factory) {
    let store = engine.state();
    let number = open_pool(&*store).await;
    add(&*store, number, 0..4).await;
    for n in 0..3 {
        store.reserve(&session_with(n, n), Some(&pooled(number, n))).await.unwrap();
    }
    assert_eq!(batch(&*store, number).await.first_erased, None);
    erase_session(&*store, 0).await;
    for (n, at, since) in [(0, 0, 2000), (1, 1500, 1500), (2, 9000, 1500)] {
        for _ in 0..2 {
            if n > 0 {
                abort_session(&*store, n, at).await;
            }
            let batch = batch(&*store, number).await;
            assert_eq!((batch.pairs_added, batch.ready, batch.first_erased), (4, 1, Some(since)), "the earliest");
            assert_eq!(batch.reserved, 2 - n);
        }
        assert_eq!(store.stored_key(&id(n)).await.unwrap(), None);
        assert!(is_unavailable(&store.reserve(&session_with(10, n), Some(&pooled(number, n))).await));
    }
    let counts = PairCounts { made: 4, reserved: 3, discarded: 0 };
    assert_eq!(ready_ids(&*store).await, [PairId { batch: number, number: 3 }]);
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), counts);
    assert_eq!(store.pairs_to_destroy(ALL).await.unwrap(), []);
    assert_same_after_reopening(store, engine).await;
}

pub(in crate::store) async fn erased_token_pair_is_listed_until_destroyed(engine: &impl Factory) {
    let store = engine.state();
    let numbers = [
        open_batch(&*store, P256, KeyStorage::Hsm).await,
        open_batch(&*store, Purpose::Pool(KeyType::Ed25519), KeyStorage::Hsm).await,
    ];
    let mut expected = Vec::new();
    for (number, kind, n) in [(numbers[0], KeyType::P256, 10), (numbers[1], KeyType::Ed25519, 20)] {
        add(&*store, number, n..n + 3).await;
        for number_in_batch in 0..2 {
            let session = n + number_in_batch;
            store.reserve(&session_with(session, session), Some(&pooled(number, number_in_batch))).await.unwrap();
            let StoredKey::OnToken(pair) = store.stored_key(&id(session)).await.unwrap().unwrap() else { panic!() };
            assert_eq!(StoredKey::OnToken(pair.clone()), on_token(name(&*store, number).await, session));
            expected.push(PairToDestroy { kind, pair });
        }
        erase_session(&*store, n).await;
        abort_session(&*store, n + 1, 3000).await;
        let batch = batch(&*store, number).await;
        assert_eq!(
            (batch.ready, batch.reserved, batch.first_erased),
            (1, 0, None),
            "no batch key can recover a token pair"
        );
        assert_eq!(store.stored_key(&id(n)).await.unwrap(), None);
    }
    assert_eq!(store.pairs_to_destroy(ALL).await.unwrap(), expected);
    assert_eq!(store.pairs_to_destroy(3).await.unwrap(), expected[..3]);
    let unknown = TokenPair { label: "something-else".parse().unwrap(), id: vec![7] };
    store.confirm_destroyed(&unknown).await.unwrap();
    for remaining in (0..4).rev() {
        for _ in 0..2 {
            store.confirm_destroyed(&expected[remaining].pair).await.unwrap();
            assert_eq!(store.pairs_to_destroy(ALL).await.unwrap(), expected[..remaining]);
        }
    }
    assert_same_after_reopening(store, engine).await;
}

/// Simulates rewrapping a pair under another batch key.
pub(in crate::store) fn rewrapped(pair: &BatchPair) -> RewrappedPair {
    let StoredKey::Wrapped(WrappedKey { blob, .. }) = &pair.private_key else { panic!("expected a wrapped key") };
    RewrappedPair { assignment: pair.assignment, blob: blob.iter().map(|byte| byte ^ 0xA5).chain([1]).collect() }
}

pub(in crate::store) async fn moved_pairs_keep_assignment_and_get_new_blobs(engine: &impl Factory) {
    let store = engine.state();
    let (from, to) = (open_pool(&*store).await, open_pool(&*store).await);
    add(&*store, from, 0..4).await;
    add(&*store, to, 10..11).await;
    store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await.unwrap();
    store.step_batch(from, BatchStep::Seal).await.unwrap();
    let held = store.pairs_of_batch(from, ALL).await.unwrap();
    assert_eq!((held.len(), held[0].assignment), (4, PairAssignment::Session(id(1))));
    let pairs: Vec<_> = held.iter().map(rewrapped).collect();
    for moved in [4, 0] {
        assert_eq!(store.move_pairs(from, to, pairs.clone()).await.unwrap(), moved);
        let (old, new) = (batch(&*store, from).await, batch(&*store, to).await);
        assert_eq!((old.pairs_added, old.ready, old.reserved), (4, 0, 0));
        assert_eq!((new.pairs_added, new.ready, new.reserved), (5, 4, 1));
    }
    assert_eq!(store.pairs_of_batch(from, ALL).await.unwrap(), []);
    let new = name(&*store, to).await;
    let expected =
        held.iter().zip(&pairs).map(|(held, pair)| (held.public_key.clone(), wrapped(new, pair.blob.clone())));
    let found: Vec<_> = store.pairs_of_batch(to, ALL).await.unwrap();
    assert_eq!(found[0].assignment, PairAssignment::Session(id(1)));
    let found: Vec<_> = found.into_iter().map(|held| (held.public_key, held.private_key)).collect();
    assert_eq!(found.len(), 5);
    assert!(expected.clone().all(|pair| found.contains(&pair)));
    assert_eq!(store.stored_key(&id(1)).await.unwrap(), expected.map(|(_, private_key)| private_key).next());
    assert!(ready_ids(&*store).await.iter().all(|id| id.batch == to));
    assert!(is_unavailable(&store.reserve(&session_with(2, 0), Some(&pooled(from, 0))).await));
    store.step_batch(from, BatchStep::Empty).await.unwrap();
    store.delete_batch(from).await.unwrap();
    erase_session(&*store, 1).await;
    assert_eq!(batch(&*store, to).await.first_erased, Some(2001));
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), PairCounts { made: 5, reserved: 1, discarded: 0 });
    assert_same_after_reopening(store, engine).await;
}

pub(in crate::store) async fn move_skips_pairs_that_changed_since(engine: &impl Factory) {
    let store = engine.state();
    let [from, to, other] = [open_pool(&*store).await, open_pool(&*store).await, open_pool(&*store).await];
    add(&*store, from, 0..6).await;
    for n in 0..3 {
        store.reserve(&session_with(n, n), Some(&pooled(from, n))).await.unwrap();
    }
    let held = store.pairs_of_batch(from, ALL).await.unwrap();
    let moved_first = [PairAssignment::Session(id(1)), PairAssignment::Ready(PairId { batch: from, number: 4 })];
    let to_other = held.iter().filter(|held| moved_first.contains(&held.assignment)).map(rewrapped).collect();
    assert_eq!(store.move_pairs(from, other, to_other).await.unwrap(), 2);
    abort_session(&*store, 0, 3000).await;
    store.reserve(&session_with(3, 3), Some(&pooled(from, 3))).await.unwrap();
    let in_other = store.pairs_of_batch(other, ALL).await.unwrap();
    let twice = held.iter().chain(&held).map(rewrapped).collect();
    assert_eq!(store.move_pairs(from, to, twice).await.unwrap(), 2, "session 2 and pair 5");
    assert_eq!(store.pairs_of_batch(other, ALL).await.unwrap(), in_other);
    let remaining: Vec<_> = store.pairs_of_batch(from, ALL).await.unwrap();
    assert_eq!(remaining.iter().map(|held| held.assignment).collect::<Vec<_>>(), [PairAssignment::Session(id(3))]);
    assert_eq!(remaining[0].private_key, wrapped(name(&*store, from).await, blob(3)));
    for (number, ready, reserved) in [(from, 0, 1), (to, 1, 1), (other, 1, 1)] {
        let batch = batch(&*store, number).await;
        assert_eq!((batch.ready, batch.reserved), (ready, reserved), "batch {number}");
    }
    assert_eq!(store.stored_key(&id(0)).await.unwrap(), None);
}

pub(in crate::store) async fn move_requires_open_batch_of_same_purpose(engine: &impl Factory) {
    let store = engine.state();
    let (from, token) = (open_pool(&*store).await, open_batch(&*store, P256, KeyStorage::Hsm).await);
    add(&*store, from, 0..2).await;
    add(&*store, token, 2..4).await;
    store.reserve(&session_with(1, 1), Some(&pooled(from, 1))).await.unwrap();
    let planned = store.plan_batch(P256, KeyStorage::Wrapped, 1000, 0).await.unwrap().number;
    let other = open_batch(&*store, Purpose::Pool(KeyType::P384), KeyStorage::Wrapped).await;
    let [sealed, emptied, quarantined, open] =
        [open_pool(&*store).await, open_pool(&*store).await, open_pool(&*store).await, open_pool(&*store).await];
    store.step_batch(sealed, BatchStep::Seal).await.unwrap();
    store.step_batch(emptied, BatchStep::Empty).await.unwrap();
    store.step_batch(quarantined, BatchStep::Quarantine("why".into())).await.unwrap();
    let before = snapshot(&*store).await;
    let pairs: Vec<_> = store.pairs_of_batch(from, ALL).await.unwrap().iter().map(rewrapped).collect();
    for to in [planned, sealed, emptied, quarantined, other, token, 1, from, 99] {
        assert!(is_wrong_batch(store.move_pairs(from, to, pairs.clone()).await), "to batch {to}");
    }
    let on_token = PairAssignment::Ready(PairId { batch: token, number: 0 });
    let token_pair = vec![RewrappedPair { assignment: on_token, blob: blob(2) }];
    assert!(is_wrong_batch(store.move_pairs(token, open, token_pair).await), "token pairs cannot be moved");
    assert_eq!(snapshot(&*store).await, before);
    assert_eq!(store.move_pairs(from, open, pairs).await.unwrap(), 2);
}

pub(in crate::store) async fn repeated_reservation_succeeds_after_move(engine: &impl Factory) {
    let store = engine.state();
    let (pool, next_pool) = (open_pool(&*store).await, open_pool(&*store).await);
    let next = open_batch(&*store, Purpose::Sessions, KeyStorage::Wrapped).await;
    add(&*store, pool, 1..2).await;
    let on_demand = PairToReserve::OnDemand { batch: 1, blob: blob(2) };
    for (n, pair, from, to) in [(1, pooled(pool, 0), pool, next_pool), (2, on_demand, 1, next)] {
        store.reserve(&session_with(n, n), Some(&pair)).await.unwrap();
        let held = store.pairs_of_batch(from, ALL).await.unwrap();
        assert_eq!(store.move_pairs(from, to, held.iter().map(rewrapped).collect()).await.unwrap(), 1);
        store.step_batch(from, BatchStep::Empty).await.unwrap();
        store.delete_batch(from).await.unwrap();
        let before = snapshot(&*store).await;
        store.reserve(&session_with(n, n), Some(&pair)).await.unwrap();
        assert!(
            store.reserve(&session_with(n, n), None).await.is_err(),
            "without a pair it is a different reservation"
        );
        assert_eq!(snapshot(&*store).await, before);
    }
}

pub(in crate::store) async fn pairs_of_batch_lists_session_pairs_first(engine: &impl Factory) {
    let store = engine.state();
    let number = open_pool(&*store).await;
    add(&*store, number, 0..7).await;
    for n in [6, 0, 3] {
        store.reserve(&session_with(n, n), Some(&pooled(number, n))).await.unwrap();
    }
    let all = store.pairs_of_batch(number, ALL).await.unwrap();
    let assignments: Vec<_> = all.iter().map(|held| held.assignment).collect();
    assert!(
        assignments[..3].iter().all(|assignment| matches!(assignment, PairAssignment::Session(_))),
        "{assignments:?}"
    );
    let ready = |pair| PairAssignment::Ready(PairId { batch: number, number: pair });
    assert_eq!(assignments[3..], [1, 2, 4, 5].map(ready));
    for limit in 0..8 {
        assert_eq!(store.pairs_of_batch(number, limit).await.unwrap(), all[..limit.min(7)]);
    }
    assert_eq!(store.pairs_of_batch(1, ALL).await.unwrap(), []);
}

pub(in crate::store) async fn discard_keeps_session_pairs(engine: &impl Factory) {
    let store = engine.state();
    let (wrapped, token) = (open_pool(&*store).await, open_batch(&*store, P256, KeyStorage::Hsm).await);
    for (number, n) in [(wrapped, 10), (token, 20)] {
        add(&*store, number, n..n + 4).await;
        store.reserve(&session_with(n, n), Some(&pooled(number, 0))).await.unwrap();
        let private_key = store.stored_key(&id(n)).await.unwrap();
        store.step_batch(number, BatchStep::Quarantine("why".into())).await.unwrap();
        for _ in 0..2 {
            let batch = store.step_batch(number, BatchStep::Discard).await.unwrap();
            assert_eq!((batch.pairs_added, batch.ready, batch.reserved, batch.first_erased), (4, 0, 1, None));
        }
        assert_eq!(store.stored_key(&id(n)).await.unwrap(), private_key);
        let remaining = store.pairs_of_batch(number, ALL).await.unwrap();
        assert_eq!(remaining.iter().map(|held| held.assignment).collect::<Vec<_>>(), [PairAssignment::Session(id(n))]);
        assert!(is_unavailable(&store.reserve(&session_with(n + 1, n + 1), Some(&pooled(number, 1))).await));
    }
    let to_destroy: Vec<_> =
        store.pairs_to_destroy(ALL).await.unwrap().into_iter().map(|pair| StoredKey::OnToken(pair.pair)).collect();
    let name = name(&*store, token).await;
    assert_eq!(to_destroy, [21, 22, 23].map(|n| on_token(name, n)));
    assert_eq!(store.pair_counts(KeyType::P256).await.unwrap(), PairCounts { made: 8, reserved: 2, discarded: 6 });
    assert_same_after_reopening(store, engine).await;
}
