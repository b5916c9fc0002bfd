//! Every write of the pool fails once, in both modes, while a batch is filled, shredded or destroyed; then work resumes in the
//! same process or after a restart. No unused pair is lost, and no orphaned batch key remains on the token.

use spp::hsm::{BatchName, PairStorage};
use spp::keypool::{Marks, PoolRules, ShredOrder};
use spp::store::{KeyStorage, Purpose, SecretStore as _};
use spp_format::keys::KeyType;

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::{FaultMode, PoolWrite};
use spp_testkit::point::{TestBed, assert_pool_is_consistent};
use spp_testkit::random::scaled;

const MODES: [FaultMode; 2] = [FaultMode::Failed, FaultMode::FailedButPersisted];

/// Whether the process restarts after the fault: both in full runs, alternating in short runs.
fn restarts(turn: usize) -> Vec<bool> {
    scaled(vec![turn % 2 == 1], vec![false, true])
}

fn rules(storage: KeyStorage, high: u64) -> PoolRules {
    let pools = [(KeyType::P256, Marks { low: 1, high })].into();
    PoolRules { storage, batch_size: 8, pools, ..PoolRules::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shredding_recovers_from_any_failed_write() {
    let testbed = TestBed::new().await;
    let writes =
        [PoolWrite::Plan, PoolWrite::Open, PoolWrite::Seal, PoolWrite::Move, PoolWrite::Empty, PoolWrite::Forget];
    for write in writes {
        for mode in MODES {
            for restarts in restarts(write as usize + mode as usize) {
                println!("{write:?} {mode:?}, restarts: {restarts}");
                let mut point = testbed.point_with(rules(KeyStorage::Wrapped, 6));
                point.wait_until_filled(6).await;
                let mut devices: Vec<_> = (0..3).map(|n| TestDevice::new(&testbed, Kind::Pooled, n)).collect();
                devices[0].provision(&point).await;
                devices[1].assemble(&point).await.unwrap();
                point.pool_faults.fail_next(write, mode);
                point.pool().shred(&ShredOrder::default(), |_, _| ()).await.unwrap_err();
                assert!(point.pool_faults.has_fired());
                if restarts {
                    point.restart().await;
                    point.wait_until_filled(4).await;
                }
                point
                    .wait_until("it is shredded", async || {
                        point.pool().shred(&ShredOrder::default(), |_, _| ()).await.is_ok()
                            && point.p256().await.next_shred.is_none()
                    })
                    .await;
                assert_pool_is_consistent(&point, &[&devices[0], &devices[1]]).await;
                assert_eq!(point.p256().await.ready, 4, "none is lost, none is made twice");
                devices[1].complete(&point).await.unwrap();
                devices[2].provision(&point).await;
                assert_pool_is_consistent(&point, &devices.iter().collect::<Vec<_>>()).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filling_recovers_from_any_failed_write() {
    let testbed = TestBed::new().await;
    for storage in [KeyStorage::Wrapped, KeyStorage::Hsm] {
        for write in [PoolWrite::Plan, PoolWrite::Open, PoolWrite::Add, PoolWrite::Seal] {
            for mode in MODES {
                for restarts in restarts(write as usize + mode as usize) {
                    println!("{storage:?}: {write:?} {mode:?}, restarts: {restarts}");
                    let mut point = testbed.point_with(rules(storage, 10));
                    point.pool_faults.fail_next(write, mode);
                    point.wait_until("the fault has occurred", async || point.pool_faults.has_fired()).await;
                    if restarts {
                        point.restart().await;
                        // Above the low mark, filling needs an order.
                        point.pool().order_fill(KeyType::P256, None).unwrap();
                    }
                    point.wait_until_filled(10).await;
                    assert_pool_is_consistent(&point, &[]).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_token_pair_is_destroyed_despite_any_failed_write() {
    let testbed = TestBed::new().await;
    for write in [PoolWrite::Destroyed, PoolWrite::Empty, PoolWrite::Forget] {
        for mode in MODES {
            for restarts in restarts(write as usize + mode as usize) {
                println!("{write:?} {mode:?}, restarts: {restarts}");
                let mut point = testbed.point_with(PoolRules { batch_size: 2, ..rules(KeyStorage::Hsm, 4) });
                point.wait_until_filled(4).await;
                point.pool_faults.fail_next(write, mode);
                let mut devices: Vec<_> = (0..2).map(|n| TestDevice::new(&testbed, Kind::Pooled, n)).collect();
                for device in &mut devices {
                    device.provision(&point).await;
                }
                point.wait_until("the fault has occurred", async || point.pool_faults.has_fired()).await;
                if restarts {
                    point.restart().await;
                    point.wait_until_filled(2).await;
                }
                point
                    .wait_until("the batch is over", async || {
                        point.pool().status().await.unwrap().pairs_to_destroy == 0 && point.p256().await.batches == 1
                    })
                    .await;
                assert_pool_is_consistent(&point, &devices.iter().collect::<Vec<_>>()).await;
            }
        }
    }
}

/// A power loss of the HSM leaves the key of a finished batch, and a pair without a row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orphaned_token_objects_are_destroyed_at_startup() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point_with(rules(KeyStorage::Hsm, 4));
    point.wait_until_filled(4).await;
    let (store, _) = point.state().origin().await.unwrap();
    let pools: Vec<_> = point.state().batches().await.unwrap();
    let number = pools.iter().find(|batch| batch.purpose != Purpose::Sessions).unwrap().number;
    let over = point.state().plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 0, 0).await.unwrap();
    point.state().delete_batch(over.number).await.unwrap();
    point.stop();
    testbed.hsm.create_batch_key(BatchName { store, number: over.number }).await.unwrap();
    let stray = PairStorage::OnToken(BatchName { store, number });
    testbed.hsm.make_pairs(KeyType::P256, stray, 2, std::time::Duration::from_secs(1)).await.unwrap();
    point.start();
    // The pool was full before the restart, so its size does not show that startup is complete.
    point.wait_until("store and token are compared", async || point.pool().status().await.unwrap().serving).await;
    point.wait_until_filled(4).await;
    assert_pool_is_consistent(&point, &[]).await;
}
