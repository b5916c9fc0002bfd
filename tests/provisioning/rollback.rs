//! Somebody puts an old copy of a store back. The public database knows what the state store forgot, and the other way
//! round; between them nothing is given twice and nothing is erased that is not public.

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::{PublicDatabase as _, StateName};

use spp_testkit::point::House;
use spp_testkit::point::breaking::Break;
use spp_testkit::point::device::{Kind, OnTheLine};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_store_of_before_completion_is_healed_by_the_public_database() {
    let house = House::new().await;
    let mut point = house.point();
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    let old = point.copy_of_state("issued");
    let answer = device.complete(&point).await.unwrap();

    point.put_state_back(&old);
    let error = device.assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "the pair is not delivered again: {error}");
    device.assert_complete(&point, answer).await;

    point.put_state_back(&old);
    assert!(device.has_wrapped_key(&point).await, "the old copy has the pair again");
    assert_eq!(device.complete(&point).await.unwrap(), answer);
    device.assert_complete(&point, answer).await;

    point.put_state_back(&old);
    assert_eq!(point.provisioner().restart().await.unwrap(), RecoveryReport { erased: 1, ..RecoveryReport::default() });
    device.assert_complete(&point, answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_store_that_forgot_a_device_gives_its_chip_and_identity_to_nobody() {
    let house = House::new().await;
    let mut point = house.point();
    let empty = point.copy_of_state("empty");
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    device.walk(&point).await;

    point.put_state_back(&empty);
    let error = device.assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
    let error = OnTheLine::with_identity(&house, Kind::Phone, 1, 2).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::ChipTaken { .. }), "{error}");
    let error = OnTheLine::with_identity(&house, Kind::Phone, 2, 1).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    assert_eq!(device.state(&point).await, None, "nothing was begun");
    assert_eq!(point.public().len().await.unwrap(), 1);
}

/// Two lives of the state store, each with a session for the chip; the other's was published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_another_life_of_the_state_store_is_never_published() {
    let house = House::new().await;
    let mut point = house.point();
    let empty = point.copy_of_state("empty");
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    let one_life = point.copy_of_state("one-life");
    let lost = device.completion(device.delivered[0].0);

    point.put_state_back(&empty);
    let answer = device.walk(&point).await;
    assert_ne!(device.delivered[0], device.delivered[1]);

    point.put_state_back(&one_life);
    let error = device.assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
    let error = point.provisioner().complete(lost).await.unwrap_err();
    assert!(matches!(error, ProvisionError::RolledBack(_)), "{error}");
    assert_eq!(point.public().len().await.unwrap(), 1);
    let found = point.record_of(&device.chip).await.unwrap();
    assert_eq!((found.record.session, found.publication), (device.delivered[1].0, answer));
    assert!(device.has_wrapped_key(&point).await, "what is not public is not erased");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pair_is_kept_when_the_public_database_lost_its_record() {
    let house = House::new().await;
    let mut point = house.point();
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    point.stop();
    let old = point.copy(&point.public_directory(), "old-public");
    point.start();
    point.faults.break_nth(2, Break::Failed);
    device.complete(&point).await.unwrap_err();
    assert_eq!(device.state(&point).await, Some(StateName::Published));

    point.stop();
    point.put_back(&old, &point.public_directory());
    point.start();
    let error = device.complete(&point).await.unwrap_err().to_string();
    assert!(error.contains("rolled back") && error.contains("the pair is kept"), "{error}");
    assert_eq!(point.provisioner().restart().await.unwrap(), RecoveryReport { failed: 1, ..RecoveryReport::default() });
    assert_eq!(device.state(&point).await, Some(StateName::Published));
    assert!(device.has_wrapped_key(&point).await);
}
