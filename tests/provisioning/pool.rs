//! Pooled pairs: each goes to one chip, in order, and an erased pair is never offered again.

use std::collections::BTreeSet;
use std::time::Duration;

use spp::access::AccessStore as _;
use spp::keypool::{Marks, PoolError, PoolRules, ShredOrder};
use spp::provisioning::ProvisionError;
use spp::store::{KeyStorage, StateName};
use spp_format::approval::{ApprovalRules, Quota};
use spp_format::keys::KeyType;

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::{FaultMode, Write};
use spp_testkit::point::{TestBed, assert_pool_is_consistent, station};
use spp_testkit::wait::never;

fn rules(storage: KeyStorage, low: u64, high: u64) -> PoolRules {
    PoolRules { storage, pools: [(KeyType::P256, Marks { low, high })].into(), ..PoolRules::default() }
}

const STORAGES: [KeyStorage; 2] = [KeyStorage::Wrapped, KeyStorage::Hsm];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_pair_is_delivered_and_destroyed() {
    let testbed = TestBed::new().await;
    for storage in STORAGES {
        let point = testbed.point_with(rules(storage, 1, 6));
        point.wait_until_filled(6).await;
        let mut device = TestDevice::new(&testbed, Kind::Pooled, 1);
        let installed = device.assemble(&point).await.unwrap();
        let status = point.p256().await;
        assert_eq!((status.ready, status.reserved), (5, 1));
        device.assert_key_stored_until_final(&point).await;
        assert_eq!(
            device.assemble(&point).await.unwrap().public_key,
            installed.public_key,
            "a repeat gives the same pair"
        );
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
        point
            .wait_until("the pair is destroyed", async || point.pool().status().await.unwrap().pairs_to_destroy == 0)
            .await;
        let status = point.p256().await;
        assert_eq!((status.ready, status.reserved, status.counts.made, status.counts.reserved), (5, 0, 6, 1));
        assert_eq!(status.next_shred.is_some(), storage == KeyStorage::Wrapped);
        assert_pool_is_consistent(&point, &[&device]).await;
    }
}

/// After a restart the package is not cached: the pair is unwrapped again, even under another batch key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reserved_pair_survives_shredding_and_restart() {
    let testbed = TestBed::new().await;
    for kind in [Kind::Pooled, Kind::Phone] {
        let mut point = testbed.point_with(rules(KeyStorage::Wrapped, 1, 6));
        point.wait_until_filled(6).await;
        let (mut device, mut other) = (TestDevice::new(&testbed, kind, 1), TestDevice::new(&testbed, kind, 2));
        let installed = device.assemble(&point).await.unwrap();
        other.provision(&point).await;
        let shredded = point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_eq!(shredded.batches, 1);
        assert_eq!(shredded.moved, if kind == Kind::Pooled { 5 } else { 1 }, "what is left, the session's included");
        point.restart().await;
        let again = device.assemble(&point).await.unwrap();
        assert_eq!((again.session, again.public_key), (installed.session, installed.public_key));
        device.complete(&point).await.unwrap();
        point.wait_until_filled(4).await;
        assert_pool_is_consistent(&point, &[&device, &other]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pair_of_aborted_session_is_never_offered_again() {
    let testbed = TestBed::new().await;
    for storage in STORAGES {
        let point = testbed.point_with(rules(storage, 4, 6));
        let mut seen = BTreeSet::new();
        for n in 0..12 {
            point.wait_until_filled(4).await;
            let mut device = TestDevice::new(&testbed, Kind::Pooled, n);
            let installed = device.assemble(&point).await.unwrap();
            assert!(seen.insert(installed.public_key.unwrap().fingerprint()), "it was given to another chip before");
            if n % 2 == 0 {
                device.abort(&point).await.unwrap();
            } else {
                point.expire_sessions();
                point.provisioner().resume_sessions().await.unwrap();
            }
            assert_eq!(device.state(&point).await, Some(StateName::Aborted));
            assert!(!device.has_wrapped_key(&point).await);
        }
        point
            .wait_until("they are destroyed", async || point.pool().status().await.unwrap().pairs_to_destroy == 0)
            .await;
        point.wait_until_filled(4).await;
        // The clock has advanced: shred due batches now, not during the assertions.
        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_pool_is_consistent(&point, &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_order_returns_pair_to_pool() {
    let testbed = TestBed::new().await;
    let point = testbed.point_with(rules(KeyStorage::Wrapped, 1, 3));
    let quota = Quota { devices_per_hour: Some(2), devices_total: None };
    point.state().apply(ApprovalRules::default(), vec![(station(), quota)], true).await.unwrap();
    point.wait_until_filled(3).await;
    let mut first = TestDevice::new(&testbed, Kind::Pooled, 1);
    first.assemble(&point).await.unwrap();
    for n in 0..20 {
        let error = TestDevice::with_identity(&testbed, Kind::Pooled, 100 + n, 1).assemble(&point).await.unwrap_err();
        assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    }
    // Also if the store refuses in the transaction that reserves the pair.
    let racing: Vec<_> = (0..8).map(|n| TestDevice::with_identity(&testbed, Kind::Pooled, 200 + n, 2)).collect();
    let calls = racing.iter().map(|device| {
        let (provisioner, order) = (point.provisioner().clone(), device.order());
        tokio::spawn(async move { provisioner.assemble(order).await.is_ok() })
    });
    let mut won = 0;
    for call in calls.collect::<Vec<_>>() {
        won += u32::from(call.await.unwrap());
    }
    assert_eq!((won, point.p256().await.ready), (1, 1));
    // Also if the same transaction finds that the station has reached its quota.
    let error = TestDevice::new(&testbed, Kind::Pooled, 3).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::QuotaExceeded { .. }), "{error}");
    point.advance_clock(Duration::from_secs(3600));
    TestDevice::new(&testbed, Kind::Pooled, 3).assemble(&point).await.expect("the last one is still there");
}

/// The outcome of the reservation is unknown: the pair goes to this chip or to the next one, never to both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unknown_reservation_outcome_gives_pair_to_one_chip() {
    let testbed = TestBed::new().await;
    for mode in [FaultMode::Failed, FaultMode::FailedButPersisted] {
        let point = testbed.point_with(rules(KeyStorage::Wrapped, 1, 3));
        point.wait_until_filled(3).await;
        // Prevent refilling, so that every pair is accounted for.
        point.faults.set_full(true);
        let mut devices: Vec<_> = (0..3).map(|n| TestDevice::new(&testbed, Kind::Pooled, n)).collect();
        point.faults.fail_nth(0, mode);
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
async fn empty_pool_refuses_until_filled_unless_generate_allowed() {
    let testbed = TestBed::new().await;
    let point = testbed.point_with(rules(KeyStorage::Wrapped, 1, 2));
    point.wait_until_filled(2).await;
    // No pairs are made while the disk is full.
    point.faults.set_full(true);
    for n in 0..2 {
        TestDevice::new(&testbed, Kind::Pooled, n).assemble(&point).await.unwrap();
    }
    point
        .wait_until("the filling is paused", async || {
            point.p256().await.paused.is_some_and(|why| why.contains("the disk"))
        })
        .await;
    let mut waiting = TestDevice::new(&testbed, Kind::Pooled, 10);
    match waiting.assemble(&point).await.unwrap_err() {
        ProvisionError::Pool(PoolError::Empty { kind: KeyType::P256, fill_rate, retry_after, paused: true }) => {
            assert!(fill_rate > 0.0 && !retry_after.is_zero(), "{fill_rate} {retry_after:?}");
        }
        error => panic!("{error}"),
    }
    let mut other = TestDevice::new(&testbed, Kind::PooledOrMade, 11);
    other.provision(&point).await;
    // Filling resumes automatically when space is free.
    point.faults.set_full(false);
    point.wait_until_filled(2).await;
    waiting.provision(&point).await;
    assert_pool_is_consistent(&point, &[&waiting, &other]).await;
}

/// Many times the interval of the pool's tasks.
const LONG: Duration = Duration::from_millis(800);

/// An officer may order a fill beyond the marks; the marks are maintained without orders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pool_fills_below_low_mark_and_on_order() {
    let testbed = TestBed::new().await;
    let point = testbed.point_with(rules(KeyStorage::Wrapped, 2, 5));
    point.wait_until_filled(5).await;
    for n in 0..3 {
        TestDevice::new(&testbed, Kind::Pooled, n).assemble(&point).await.unwrap();
    }
    never("it is filled above its low mark", LONG, async || point.p256().await.ready != 2).await;
    assert_eq!(point.pool().order_fill(KeyType::P256, Some(3)).unwrap(), 3);
    point.wait_until_filled(3).await;
    never("an order goes further than it says", LONG, async || point.p256().await.ready != 3).await;
    TestDevice::new(&testbed, Kind::Pooled, 4).assemble(&point).await.unwrap();
    TestDevice::new(&testbed, Kind::Pooled, 3).assemble(&point).await.unwrap();
    point.wait_until_filled(5).await;
    assert_eq!(point.pool().order_fill(KeyType::P256, Some(40)).unwrap(), 40);
    point.wait_until_filled(40).await;
    assert!(matches!(point.pool().order_fill(KeyType::Rsa4096, None), Err(PoolError::NoPool(KeyType::Rsa4096))));
    assert!(matches!(point.pool().order_fill(KeyType::P256, Some(u64::MAX)), Err(PoolError::TooMany { .. })));
}

/// The old copy has the newest record's session, and its batch was not shredded: only the public database reveals the used pair.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn used_pair_of_old_copy_is_refused_and_quarantined() {
    let testbed = TestBed::new().await;
    for storage in STORAGES {
        let mut point = testbed.point_with(rules(storage, 1, 4));
        point.wait_until_filled(4).await;
        let (mut known, mut used) =
            (TestDevice::new(&testbed, Kind::Phone, 1), TestDevice::new(&testbed, Kind::Pooled, 2));
        known.assemble(&point).await.unwrap();
        let old = point.copy_state("old");
        let installed = used.assemble(&point).await.unwrap();
        used.complete(&point).await.unwrap();
        known.complete(&point).await.unwrap();
        if storage == KeyStorage::Hsm {
            point
                .wait_until("it is destroyed", async || point.pool().status().await.unwrap().pairs_to_destroy == 0)
                .await;
        }

        point.restore_state(&old);
        point.wait_until_filled(4).await;
        assert_eq!(point.pool().status().await.unwrap().rolled_back, None, "nothing shows it yet");
        let mut third = TestDevice::new(&testbed, Kind::Pooled, 3);
        let error = third.assemble(&point).await.unwrap_err();
        assert!(error.to_string().contains("the state store was rolled back"), "{error}");
        let status = point.pool().status().await.unwrap();
        assert!(status.rolled_back.is_some_and(|why| why.contains("the state store was rolled back")));
        assert_eq!(point.p256().await.quarantined, 4);
        // New pairs are made, and provisioning continues with them.
        point.wait_until_filled(4).await;
        let fresh = third.assemble(&point).await.unwrap();
        assert_ne!(fresh.public_key, installed.public_key);
        third.complete(&point).await.unwrap();
        let order = ShredOrder { quarantined: true, ..ShredOrder::default() };
        assert!(point.pool().shred(&order, |_, _| ()).await.unwrap().discarded >= 4);
        assert_eq!(point.p256().await.quarantined, 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_copy_is_detected_by_newest_record_and_token() {
    let testbed = TestBed::new().await;
    for shredded in [false, true] {
        let mut point = testbed.point_with(rules(KeyStorage::Wrapped, 1, 4));
        point.wait_until_filled(4).await;
        let old = point.copy_state("old");
        let mut used = TestDevice::new(&testbed, Kind::Pooled, 1);
        let installed = used.assemble(&point).await.unwrap();
        used.complete(&point).await.unwrap();
        if shredded {
            point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        }
        point.restore_state(&old);
        point.wait_for_rollback_detection().await;
        let why = point.pool().status().await.unwrap().rolled_back.unwrap();
        let evidence = if shredded { "the token has batch" } else { "the public database has a record" };
        assert!(why.starts_with("the state store was rolled back") && why.contains(evidence), "{why}");
        point.wait_until_filled(4).await;
        for n in 2..6 {
            point.wait_until_filled(1).await;
            let fresh = TestDevice::new(&testbed, Kind::Pooled, n).assemble(&point).await.unwrap();
            assert_ne!(fresh.public_key, installed.public_key);
        }
        let mut phone = TestDevice::new(&testbed, Kind::Phone, 7);
        phone.provision(&point).await;
    }
}
