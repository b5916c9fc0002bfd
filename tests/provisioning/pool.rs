//! Pairs that are made in advance: each goes to one chip, in the order in which they came, and when it is erased it stays so.

use std::collections::BTreeSet;

use spp::keypool::{Marks, PoolError, PoolRules, ShredOrder};
use spp::keys::KeyKind;
use spp::provisioning::ProvisionError;
use spp::store::{KeyStorage, StateName};

use spp_testkit::point::House;
use spp_testkit::point::assert_pool_is_whole;
use spp_testkit::point::breaking::{Break, Write};
use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::wait::never;

fn rules(keeping: KeyStorage, low: u64, high: u64) -> PoolRules {
    PoolRules { keeping, pools: [(KeyKind::P256, Marks { low, high })].into(), ..PoolRules::default() }
}

const EITHER_WAY: [KeyStorage; 2] = [KeyStorage::Wrapped, KeyStorage::Hsm];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooled_pair_goes_the_whole_way_and_is_destroyed() {
    let house = House::new().await;
    for keeping in EITHER_WAY {
        let point = house.point_with(rules(keeping, 1, 6));
        point.filled(6).await;
        let mut device = OnTheLine::new(&house, Kind::Pooled, 1);
        let installed = device.assemble(&point).await.unwrap();
        let status = point.p256().await;
        assert_eq!((status.ready, status.reserved), (5, 1));
        device.assert_key_is_kept_until_the_end(&point).await;
        assert_eq!(
            device.assemble(&point).await.unwrap().public_key,
            installed.public_key,
            "a repeat gives the same pair"
        );
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
        point.until("the pair is destroyed", async || point.pool().status().await.unwrap().condemned == 0).await;
        let status = point.p256().await;
        assert_eq!((status.ready, status.reserved, status.counts.made, status.counts.reserved), (5, 0, 6, 1));
        assert_eq!(status.next_shred.is_some(), keeping == KeyStorage::Wrapped);
        assert_pool_is_whole(&point, &[&device]).await;
    }
}

/// Another process has the session but not the package at hand: the pair is opened again, even under another batch's key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_in_use_lives_through_a_shredding_and_a_restart() {
    let house = House::new().await;
    for kind in [Kind::Pooled, Kind::Phone] {
        let mut point = house.point_with(rules(KeyStorage::Wrapped, 1, 6));
        point.filled(6).await;
        let (mut device, mut other) = (OnTheLine::new(&house, kind, 1), OnTheLine::new(&house, kind, 2));
        let installed = device.assemble(&point).await.unwrap();
        other.walk(&point).await;
        let shredded = point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_eq!(shredded.batches, 1);
        assert_eq!(shredded.moved, if kind == Kind::Pooled { 5 } else { 1 }, "what is left, the session's included");
        point.restart().await;
        let again = device.assemble(&point).await.unwrap();
        assert_eq!((again.session, again.public_key), (installed.session, installed.public_key));
        device.complete(&point).await.unwrap();
        point.filled(4).await;
        assert_pool_is_whole(&point, &[&device, &other]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_of_a_session_that_was_given_up_is_never_offered_again() {
    let house = House::new().await;
    for keeping in EITHER_WAY {
        let point = house.point_with(rules(keeping, 4, 6));
        let mut seen = BTreeSet::new();
        for n in 0..12 {
            point.filled(4).await;
            let mut device = OnTheLine::new(&house, Kind::Pooled, n);
            let installed = device.assemble(&point).await.unwrap();
            assert!(seen.insert(installed.public_key.unwrap().fingerprint()), "it was given to another chip before");
            if n % 2 == 0 {
                device.abort(&point).await.unwrap();
            } else {
                point.let_sessions_expire();
                point.provisioner().restart().await.unwrap();
            }
            assert_eq!(device.state(&point).await, Some(StateName::Aborted));
            assert!(!device.has_wrapped_key(&point).await);
        }
        point.until("they are destroyed", async || point.pool().status().await.unwrap().condemned == 0).await;
        point.filled(4).await;
        // The clock has gone on: what is due is done now, not while it is looked at.
        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_pool_is_whole(&point, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_order_leaves_its_pair_to_the_next_device() {
    let house = House::new().await;
    let point = house.point_with(rules(KeyStorage::Wrapped, 1, 3));
    point.filled(3).await;
    let mut first = OnTheLine::new(&house, Kind::Pooled, 1);
    first.assemble(&point).await.unwrap();
    for n in 0..20 {
        let error = OnTheLine::with_identity(&house, Kind::Pooled, 100 + n, 1).assemble(&point).await.unwrap_err();
        assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    }
    // Not even when the store itself refuses, in the transaction that takes the pair.
    let racing: Vec<_> = (0..8).map(|n| OnTheLine::with_identity(&house, Kind::Pooled, 200 + n, 2)).collect();
    let calls = racing.iter().map(|device| {
        let (provisioner, order) = (point.provisioner().clone(), device.order());
        tokio::spawn(async move { provisioner.assemble(order).await.is_ok() })
    });
    let mut won = 0;
    for call in calls.collect::<Vec<_>>() {
        won += u32::from(call.await.unwrap());
    }
    assert_eq!((won, point.p256().await.ready), (1, 1));
    OnTheLine::new(&house, Kind::Pooled, 3).assemble(&point).await.expect("the last one is still there");
}

/// Whether the reservation was kept or not, nobody knows at first: the pair goes to this chip or to the next, never to two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reservation_whose_answer_was_lost_gives_its_pair_to_one_chip() {
    let house = House::new().await;
    for how in [Break::Failed, Break::FailedButPersisted] {
        let point = house.point_with(rules(KeyStorage::Wrapped, 1, 3));
        point.filled(3).await;
        // A pool that runs empty is filled again: not here, where every pair is accounted for.
        point.faults.set_full(true);
        let mut devices: Vec<_> = (0..3).map(|n| OnTheLine::new(&house, Kind::Pooled, n)).collect();
        point.faults.break_nth(0, how);
        devices[0].assemble(&point).await.unwrap_err();
        let mut seen = BTreeSet::new();
        for device in devices.iter_mut().rev() {
            let installed = device.assemble(&point).await.unwrap();
            assert!(seen.insert(installed.public_key.unwrap().fingerprint()));
        }
        assert_eq!(seen.len(), 3, "none is lost: each of the three pairs is used");
        assert_eq!(point.faults.take_written().first(), Some(&Write::Reserve));
        assert_eq!((point.p256().await.counts.made, point.p256().await.counts.reserved), (3, 3));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_pool_says_so_until_it_is_filled_and_a_profile_may_do_without_it() {
    let house = House::new().await;
    let point = house.point_with(rules(KeyStorage::Wrapped, 1, 2));
    point.filled(2).await;
    // Nothing is made while the disk has no room for it.
    point.faults.set_full(true);
    for n in 0..2 {
        OnTheLine::new(&house, Kind::Pooled, n).assemble(&point).await.unwrap();
    }
    point
        .until("the filling is paused", async || point.p256().await.paused.is_some_and(|why| why.contains("the disk")))
        .await;
    let mut waiting = OnTheLine::new(&house, Kind::Pooled, 10);
    match waiting.assemble(&point).await.unwrap_err() {
        ProvisionError::Pool(PoolError::Empty { kind: KeyKind::P256, fill_rate, retry_after, paused: true }) => {
            assert!(fill_rate > 0.0 && !retry_after.is_zero(), "{fill_rate} {retry_after:?}");
        }
        error => panic!("{error}"),
    }
    let mut other = OnTheLine::new(&house, Kind::PooledOrMade, 11);
    other.walk(&point).await;
    // Nobody has to do anything when there is room again.
    point.faults.set_full(false);
    point.filled(2).await;
    waiting.walk(&point).await;
    assert_pool_is_whole(&point, &[&waiting, &other]).await;
}

/// Many times as long as the pool's tasks wait between two looks.
const LONG: std::time::Duration = std::time::Duration::from_millis(800);

/// What the background does not do by itself, an officer may order; the marks are kept without one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_is_filled_below_its_low_mark_and_on_an_order() {
    let house = House::new().await;
    let point = house.point_with(rules(KeyStorage::Wrapped, 2, 5));
    point.filled(5).await;
    for n in 0..3 {
        OnTheLine::new(&house, Kind::Pooled, n).assemble(&point).await.unwrap();
    }
    never("it is filled above its low mark", LONG, async || point.p256().await.ready != 2).await;
    assert_eq!(point.pool().order_fill(KeyKind::P256, Some(3)).unwrap(), 3);
    point.filled(3).await;
    never("an order goes further than it says", LONG, async || point.p256().await.ready != 3).await;
    OnTheLine::new(&house, Kind::Pooled, 4).assemble(&point).await.unwrap();
    OnTheLine::new(&house, Kind::Pooled, 3).assemble(&point).await.unwrap();
    point.filled(5).await;
    assert_eq!(point.pool().order_fill(KeyKind::P256, Some(40)).unwrap(), 40);
    point.filled(40).await;
    assert!(matches!(point.pool().order_fill(KeyKind::Rsa4096, None), Err(PoolError::NoPool(KeyKind::Rsa4096))));
    assert!(matches!(point.pool().order_fill(KeyKind::P256, Some(u64::MAX)), Err(PoolError::TooMany { .. })));
}

/// The old copy knows the newest record's session, and its batch was not shredded: only the public database knows the pair.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_used_pair_of_an_old_copy_is_refused_by_the_public_database_and_its_batch_quarantined() {
    let house = House::new().await;
    for keeping in EITHER_WAY {
        let mut point = house.point_with(rules(keeping, 1, 4));
        point.filled(4).await;
        let (mut known, mut used) = (OnTheLine::new(&house, Kind::Phone, 1), OnTheLine::new(&house, Kind::Pooled, 2));
        known.assemble(&point).await.unwrap();
        let old = point.copy_of_state("old");
        let installed = used.assemble(&point).await.unwrap();
        used.complete(&point).await.unwrap();
        known.complete(&point).await.unwrap();
        if keeping == KeyStorage::Hsm {
            point.until("it is destroyed", async || point.pool().status().await.unwrap().condemned == 0).await;
        }

        point.put_state_back(&old);
        point.filled(4).await;
        assert_eq!(point.pool().status().await.unwrap().rolled_back, None, "nothing shows it yet");
        let mut third = OnTheLine::new(&house, Kind::Pooled, 3);
        let error = third.assemble(&point).await.unwrap_err();
        assert!(error.to_string().contains("the state store was rolled back"), "{error}");
        let status = point.pool().status().await.unwrap();
        assert!(status.rolled_back.is_some_and(|why| why.contains("the state store was rolled back")));
        assert_eq!(point.p256().await.quarantined, 4);
        // New pairs are made, and the line goes on with them.
        point.filled(4).await;
        let fresh = third.assemble(&point).await.unwrap();
        assert_ne!(fresh.public_key, installed.public_key);
        third.complete(&point).await.unwrap();
        let given_up = ShredOrder { quarantined: true, ..ShredOrder::default() };
        assert!(point.pool().shred(&given_up, |_, _| ()).await.unwrap().discarded >= 4);
        assert_eq!(point.p256().await.quarantined, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_is_known_by_the_newest_record_and_by_the_token() {
    let house = House::new().await;
    for shredded in [false, true] {
        let mut point = house.point_with(rules(KeyStorage::Wrapped, 1, 4));
        point.filled(4).await;
        let old = point.copy_of_state("old");
        let mut used = OnTheLine::new(&house, Kind::Pooled, 1);
        let installed = used.assemble(&point).await.unwrap();
        used.complete(&point).await.unwrap();
        if shredded {
            point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        }
        point.put_state_back(&old);
        point.found_out().await;
        let why = point.pool().status().await.unwrap().rolled_back.unwrap();
        let evidence = if shredded { "the token has batch" } else { "the public database has a record" };
        assert!(why.starts_with("the state store was rolled back") && why.contains(evidence), "{why}");
        point.filled(4).await;
        for n in 2..6 {
            point.filled(1).await;
            let fresh = OnTheLine::new(&house, Kind::Pooled, n).assemble(&point).await.unwrap();
            assert_ne!(fresh.public_key, installed.public_key);
        }
        let mut phone = OnTheLine::new(&house, Kind::Phone, 7);
        phone.walk(&point).await;
    }
}
