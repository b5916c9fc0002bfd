//! What happens to pools in a long life: workers die, configurations change, disks rot, old copies stay for a while.

use std::time::Duration;

use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::keys::KeyKind;
use spp::store::{KeyStorage, SecretStore as _};

use spp_testkit::point::assert_pool_is_whole;
use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::point::{House, Point};

fn rules(keeping: KeyStorage, high: u64) -> PoolRules {
    PoolRules { keeping, pools: [(KeyKind::P256, Marks { low: 1, high })].into(), ..PoolRules::default() }
}

/// A killed worker leaves pairs on the token that it never told of; the daemon lives on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_dies_while_it_makes_pairs_on_the_token_leaves_none_behind() {
    let house = House::new().await;
    let point = house.point_with(rules(KeyStorage::Hsm, 120));
    for milliseconds in [150, 250, 350] {
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        house.worker().kill();
        house.hsm.ready(Duration::from_secs(30)).await.unwrap();
    }
    point.filled(120).await;
    assert_pool_is_whole(&point, &[]).await;
}

/// Batches that are kept in the old way are used up and shredded in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pool_that_is_kept_otherwise_from_now_on_loses_nothing_and_shreds_what_was() {
    let house = House::new().await;
    for (before, after) in [(KeyStorage::Wrapped, KeyStorage::Hsm), (KeyStorage::Hsm, KeyStorage::Wrapped)] {
        let mut point = house.point_with(rules(before, 6));
        point.filled(6).await;
        let mut devices: Vec<_> = (0..8).map(|n| OnTheLine::new(&house, Kind::Pooled, n)).collect();
        devices[0].walk(&point).await;
        devices[1].assemble(&point).await.unwrap();
        point.rules.keeping = after;
        point.restart().await;
        point.filled(4).await;
        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
        assert_pool_is_whole(&point, &[&devices[0], &devices[1]]).await;
        devices[1].complete(&point).await.unwrap();
        for device in &mut devices[2..] {
            point.filled(1).await;
            device.walk(&point).await;
        }
        point.filled(1).await;
        assert_pool_is_whole(&point, &devices.iter().collect::<Vec<_>>()).await;
    }
}

/// Until an officer has decided, the keys that only the right store knows are kept: it may be put back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_store_can_be_put_back_after_an_old_copy_ran_for_a_while() {
    let house = House::new().await;
    let soon = Duration::from_secs(10);
    let mut point = house.point_with(PoolRules { shred_after: soon, ..rules(KeyStorage::Wrapped, 4) });
    point.filled(4).await;
    let old = point.copy_of_state("old");
    let mut used = OnTheLine::new(&house, Kind::Pooled, 1);
    used.walk(&point).await;
    point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap();
    let mut half_way = OnTheLine::new(&house, Kind::Pooled, 2);
    let installed = half_way.assemble(&point).await.unwrap();
    let right = point.copy_of_state("right");

    point.put_state_back(&old);
    for n in 10..13 {
        point.found_out().await;
        point.filled(1).await;
        OnTheLine::new(&house, Kind::Pooled, n).walk(&point).await;
        point.let_pass(10 * soon);
        point.restart().await;
    }

    point.put_state_back(&right);
    point.until("it serves", async || point.pool().status().await.unwrap().serving).await;
    let again = half_way.assemble(&point).await.unwrap();
    assert_eq!(again.public_key, installed.public_key, "its batch's key is still there");
    half_way.complete(&point).await.unwrap();
}

/// The wrapping notices a flipped bit. That pair is of no use, and the next device does not have to wait for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_that_rotted_on_the_disk_costs_one_call() {
    let house = House::with_call_timeout(Duration::from_secs(1)).await;
    let mut point = house.point_with(rules(KeyStorage::Wrapped, 4));
    point.filled(4).await;
    let first = point.state().ready_pairs(KeyKind::P256, None, 1).await.unwrap()[0].0;
    point.stop();
    let path = point.state_directory().join(format!("pairs/{}", first.batch));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[20] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    point.start();
    point.filled(4).await;
    let mut device = OnTheLine::new(&house, Kind::Pooled, 1);
    device.assemble(&point).await.unwrap_err();
    device.walk(&point).await;
    OnTheLine::new(&house, Kind::Pooled, 2).walk(&point).await;
}

/// What is not configured any more is still told, and ends when it is used up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pairs_of_a_pool_that_is_not_configured_any_more_are_told() {
    let house = House::new().await;
    let mut point: Point<'_> = house.point_with(rules(KeyStorage::Wrapped, 4));
    point.filled(4).await;
    point.rules.pools = [(KeyKind::Ed25519, Marks { low: 1, high: 2 })].into();
    point.restart().await;
    point
        .until("both are told", async || {
            let kinds = point.pool().status().await.unwrap().kinds;
            let ready = |kind| kinds.iter().find(|found| found.kind == kind).map(|found| found.ready);
            ready(KeyKind::P256) == Some(4) && ready(KeyKind::Ed25519) == Some(2)
        })
        .await;
}
