//! Rollback of a store to an old copy. The public database knows devices that the state store lost, and vice versa; no value is
//! issued twice, and nothing is erased that is not public.

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::{LogReader as _, StateName};

use spp_testkit::point::TestBed;
use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::FaultMode;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_store_from_before_completion_recovers_from_public_db() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    let old = point.copy_state("issued");
    let answer = device.complete(&point).await.unwrap();

    point.restore_state(&old);
    let error = device.assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "the pair is not delivered again: {error}");
    device.assert_complete(&point, answer).await;

    point.restore_state(&old);
    assert!(device.has_wrapped_key(&point).await, "the old copy has the pair again");
    assert_eq!(device.complete(&point).await.unwrap(), answer);
    device.assert_complete(&point, answer).await;

    point.restore_state(&old);
    assert_eq!(
        point.provisioner().resume_sessions().await.unwrap(),
        RecoveryReport { erased: 1, ..RecoveryReport::default() }
    );
    device.assert_complete(&point, answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn empty_state_store_does_not_reissue_chip_or_identity() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point();
    let empty = point.copy_state("empty");
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.provision(&point).await;

    point.restore_state(&empty);
    let error = device.assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
    let error = TestDevice::with_identity(&testbed, Kind::Phone, 1, 2).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::ChipTaken { .. }), "{error}");
    let error = TestDevice::with_identity(&testbed, Kind::Phone, 2, 1).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    assert_eq!(device.state(&point).await, None, "nothing was begun");
    assert_eq!(point.public().len().await.unwrap(), 1);
}

/// Two histories of the state store, each with a session for the chip; the other history's session was published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_of_other_store_history_is_not_published() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point();
    let empty = point.copy_state("empty");
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    let first_history = point.copy_state("one-life");
    let lost = device.completion(device.delivered[0].0);

    point.restore_state(&empty);
    let answer = device.provision(&point).await;
    assert_ne!(device.delivered[0], device.delivered[1]);

    point.restore_state(&first_history);
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
async fn pair_is_retained_if_public_database_lost_record() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    point.stop();
    let old = point.copy(&point.public_directory(), "old-public");
    point.start();
    point.faults.fail_nth(2, FaultMode::Failed);
    device.complete(&point).await.unwrap_err();
    assert_eq!(device.state(&point).await, Some(StateName::Published));

    point.stop();
    point.restore_copy(&old, &point.public_directory());
    point.start();
    let error = device.complete(&point).await.unwrap_err().to_string();
    assert!(error.contains("rolled back") && error.contains("the pair is retained"), "{error}");
    assert_eq!(
        point.provisioner().resume_sessions().await.unwrap(),
        RecoveryReport { failed: 1, ..RecoveryReport::default() }
    );
    assert_eq!(device.state(&point).await, Some(StateName::Published));
    assert!(device.has_wrapped_key(&point).await);
}
