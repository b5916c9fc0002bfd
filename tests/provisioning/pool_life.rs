//! Pools over time: worker crashes, configuration changes, disk corruption, old copies of the store.

use std::time::Duration;

use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::store::{KeyStorage, SecretStore as _};
use spp_format::keys::KeyType;

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::{Point, TestBed, assert_pool_is_consistent};

fn rules(storage: KeyStorage, high: u64) -> PoolRules {
    PoolRules { storage, pools: [(KeyType::P256, Marks { low: 1, high })].into(), ..PoolRules::default() }
}

/// A killed worker leaves pairs on the token that the daemon does not know; the daemon keeps running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_worker_leaves_no_unknown_pairs_on_token() {
    let testbed = TestBed::new().await;
    let point = testbed.point_with(rules(KeyStorage::Hsm, 120));
    for milliseconds in [150, 250, 350] {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        testbed.worker().kill();
        testbed.hsm.ready(Duration::from_secs(30)).await.unwrap();
    }
    point.wait_until_filled(120).await;
    assert_pool_is_consistent(&point, &[]).await;
}

/// Batches with the previous storage are used up and shredded unchanged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changed_storage_loses_no_pair_and_shreds_old_batches() {
    let testbed = TestBed::new().await;
    for (before, after) in [(KeyStorage::Wrapped, KeyStorage::Hsm), (KeyStorage::Hsm, KeyStorage::Wrapped)] {
        let mut point = testbed.point_with(rules(before, 6));
        point.wait_until_filled(6).await;
        let mut devices: Vec<_> = (0..8).map(|n| TestDevice::new(&testbed, Kind::Pooled, n)).collect();
        devices[0].provision(&point).await;
        devices[1].assemble(&point).await.unwrap();
        point.rules.storage = after;
        point.restart().await;
        point.wait_until_filled(4).await;
        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_pool_is_consistent(&point, &[&devices[0], &devices[1]]).await;
        devices[1].complete(&point).await.unwrap();
        for device in &mut devices[2..] {
            point.wait_until_filled(1).await;
            device.provision(&point).await;
        }
        point.wait_until_filled(1).await;
        assert_pool_is_consistent(&point, &devices.iter().collect::<Vec<_>>()).await;
    }
}

/// Until an officer has decided, keys that only the right store knows are retained, so that it can be restored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn right_store_can_be_restored_after_old_copy_ran() {
    let testbed = TestBed::new().await;
    let soon = Duration::from_secs(10);
    let mut point = testbed.point_with(PoolRules { shred_after: soon, ..rules(KeyStorage::Wrapped, 4) });
    point.wait_until_filled(4).await;
    let old = point.copy_state("old");
    let mut used = TestDevice::new(&testbed, Kind::Pooled, 1);
    used.provision(&point).await;
    point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
    let mut assembled_device = TestDevice::new(&testbed, Kind::Pooled, 2);
    let installed = assembled_device.assemble(&point).await.unwrap();
    let right = point.copy_state("right");

    point.restore_state(&old);
    for n in 10..13 {
        point.wait_for_rollback_detection().await;
        point.wait_until_filled(1).await;
        TestDevice::new(&testbed, Kind::Pooled, n).provision(&point).await;
        point.advance_clock(10 * soon);
        point.restart().await;
    }

    point.restore_state(&right);
    point.wait_until("it serves", async || point.pool().status().await.unwrap().serving).await;
    let again = assembled_device.assemble(&point).await.unwrap();
    assert_eq!(again.public_key, installed.public_key, "its batch's key is still there");
    assembled_device.complete(&point).await.unwrap();
}

/// Unwrapping detects a flipped bit. The pair is unusable, and the next device gets another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn corrupted_pair_fails_one_call_only() {
    let testbed = TestBed::with_call_timeout(Duration::from_secs(1)).await;
    let mut point = testbed.point_with(rules(KeyStorage::Wrapped, 4));
    point.wait_until_filled(4).await;
    let first = point.state().ready_pairs(KeyType::P256, None, 1).await.unwrap()[0].0;
    point.stop();
    let path = point.state_directory().join(format!("pairs/{}", first.batch));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    point.start();
    point.wait_until_filled(4).await;
    let mut device = TestDevice::new(&testbed, Kind::Pooled, 1);
    device.assemble(&point).await.unwrap_err();
    device.provision(&point).await;
    TestDevice::new(&testbed, Kind::Pooled, 2).provision(&point).await;
}

/// A pool that was removed from the configuration is reported until its pairs are used up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_reports_pairs_of_removed_pool() {
    let testbed = TestBed::new().await;
    let mut point: Point<'_> = testbed.point_with(rules(KeyStorage::Wrapped, 4));
    point.wait_until_filled(4).await;
    point.rules.pools = [(KeyType::Ed25519, Marks { low: 1, high: 2 })].into();
    point.restart().await;
    point
        .wait_until("both pools are reported", async || {
            let kinds = point.pool().status().await.unwrap().kinds;
            let ready = |kind| kinds.iter().find(|found| found.kind == kind).map(|found| found.ready);
            ready(KeyType::P256) == Some(4) && ready(KeyType::Ed25519) == Some(2)
        })
        .await;
}
