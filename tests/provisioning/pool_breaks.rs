//! Every write of the pool breaks once, in both ways, while a batch is filled, shredded or given up; then it goes on, in the
//! same process or in a new one. No unused pair is lost, no key of a batch is left on the token.

use spp::hsm::KeepIn;
use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::keys::{BatchName, KeyKind};
use spp::store::{KeyStorage, Purpose, SecretStore as _};

use spp_testkit::point::breaking::{Break, PoolWrite};
use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::point::{House, assert_pool_is_whole};
use spp_testkit::random::scaled;

const BOTH: [Break; 2] = [Break::Failed, Break::FailedButPersisted];

/// Whether the process is restarted after the break: both in the full size, one or the other in turn in the short one.
fn restarts(turn: usize) -> Vec<bool> {
    scaled(vec![turn % 2 == 1], vec![false, true])
}

fn rules(keeping: KeyStorage, high: u64) -> PoolRules {
    let pools = [(KeyKind::P256, Marks { low: 1, high })].into();
    PoolRules { keeping, batch_size: 8, pools, ..PoolRules::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shredding_is_whole_whichever_write_breaks() {
    let house = House::new().await;
    let writes =
        [PoolWrite::Plan, PoolWrite::Open, PoolWrite::Seal, PoolWrite::Move, PoolWrite::Empty, PoolWrite::Forget];
    for write in writes {
        for how in BOTH {
            for restarts in restarts(write as usize + how as usize) {
                println!("{write:?} {how:?}, restarts: {restarts}");
                let mut point = house.point_with(rules(KeyStorage::Wrapped, 6));
                point.filled(6).await;
                let mut devices: Vec<_> = (0..3).map(|n| OnTheLine::new(&house, Kind::Pooled, n)).collect();
                devices[0].walk(&point).await;
                devices[1].assemble(&point).await.unwrap();
                point.pool_faults.break_next(write, how);
                point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap_err();
                assert!(point.pool_faults.have_struck());
                if restarts {
                    point.restart().await;
                    point.filled(4).await;
                }
                point
                    .until("it is shredded", async || {
                        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.is_ok()
                            && point.p256().await.next_shred.is_none()
                    })
                    .await;
                assert_pool_is_whole(&point, &[&devices[0], &devices[1]]).await;
                assert_eq!(point.p256().await.ready, 4, "none is lost, none is made twice");
                devices[1].complete(&point).await.unwrap();
                devices[2].walk(&point).await;
                assert_pool_is_whole(&point, &devices.iter().collect::<Vec<_>>()).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_filling_is_whole_whichever_write_breaks() {
    let house = House::new().await;
    for keeping in [KeyStorage::Wrapped, KeyStorage::Hsm] {
        for write in [PoolWrite::Plan, PoolWrite::Open, PoolWrite::Add, PoolWrite::Seal] {
            for how in BOTH {
                for restarts in restarts(write as usize + how as usize) {
                    println!("{keeping:?}: {write:?} {how:?}, restarts: {restarts}");
                    let mut point = house.point_with(rules(keeping, 10));
                    point.pool_faults.break_next(write, how);
                    point.until("it breaks", async || point.pool_faults.have_struck()).await;
                    if restarts {
                        point.restart().await;
                        // Above its low mark nothing is filled without an order.
                        point.pool().order_fill(KeyKind::P256, None).unwrap();
                    }
                    point.filled(10).await;
                    assert_pool_is_whole(&point, &[]).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_on_the_token_is_destroyed_whichever_write_breaks() {
    let house = House::new().await;
    for write in [PoolWrite::Destroyed, PoolWrite::Empty, PoolWrite::Forget] {
        for how in BOTH {
            for restarts in restarts(write as usize + how as usize) {
                println!("{write:?} {how:?}, restarts: {restarts}");
                let mut point = house.point_with(PoolRules { batch_size: 2, ..rules(KeyStorage::Hsm, 4) });
                point.filled(4).await;
                point.pool_faults.break_next(write, how);
                let mut devices: Vec<_> = (0..2).map(|n| OnTheLine::new(&house, Kind::Pooled, n)).collect();
                for device in &mut devices {
                    device.walk(&point).await;
                }
                point.until("it breaks", async || point.pool_faults.have_struck()).await;
                if restarts {
                    point.restart().await;
                    point.filled(2).await;
                }
                point
                    .until("the batch is over", async || {
                        point.pool().status().await.unwrap().condemned == 0 && point.p256().await.batches == 1
                    })
                    .await;
                assert_pool_is_whole(&point, &devices.iter().collect::<Vec<_>>()).await;
            }
        }
    }
}

/// What a module that loses its power in the middle leaves: a key whose batch is over, a pair that no row names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_on_the_token_is_destroyed_at_the_next_start() {
    let house = House::new().await;
    let mut point = house.point_with(rules(KeyStorage::Hsm, 4));
    point.filled(4).await;
    let (store, _) = point.state().origin().await.unwrap();
    let pools: Vec<_> = point.state().batches().await.unwrap();
    let number = pools.iter().find(|batch| batch.purpose != Purpose::Sessions).unwrap().number;
    let over = point.state().plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 0, 0).await.unwrap();
    point.state().forget_batch(over.number).await.unwrap();
    point.stop();
    house.hsm.create_batch_key(BatchName { store, number: over.number }).await.unwrap();
    let stray = KeepIn::OnToken(BatchName { store, number });
    house.hsm.make_pairs(KeyKind::P256, stray, 2, std::time::Duration::from_secs(1)).await.unwrap();
    point.start();
    // Full from before, it says nothing of how far the start is.
    point.until("store and token are compared", async || point.pool().status().await.unwrap().serving).await;
    point.filled(4).await;
    assert_pool_is_whole(&point, &[]).await;
}
