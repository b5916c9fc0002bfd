//! Session expiry: an expired session releases its chip and identity, and its pair is destroyed.

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::{LogReader as _, SessionReader as _, StateName};

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::{FaultMode, Write};
use spp_testkit::point::{Point, TestBed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_session_destroys_pair_and_frees_chip_and_identity() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    let expired = device.assemble(&point).await.unwrap();
    let mut intended = TestDevice::new(&testbed, Kind::Phone, 2);
    point.faults.fail_nth(1, FaultMode::Failed);
    intended.assemble(&point).await.unwrap_err();
    point.expire_sessions();

    assert_eq!(
        point.provisioner().resume_sessions().await.unwrap(),
        RecoveryReport { expired: 2, ..RecoveryReport::default() }
    );
    assert_eq!(device.state(&point).await, Some(StateName::Aborted));
    assert_eq!(intended.state(&point).await, Some(StateName::Aborted));
    assert!(point.state().stored_key(&expired.session).await.unwrap().is_none());
    let error = device.complete(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::WrongState { state: StateName::Aborted, .. }), "{error}");
    assert!(!device.is_public(&point).await);

    // The chip gets another identity, and the identity another chip; neither gets the old pair.
    let (mut chip, mut identity) = (
        TestDevice::with_identity(&testbed, Kind::Phone, 1, 8),
        TestDevice::with_identity(&testbed, Kind::Phone, 9, 1),
    );
    for device in [&mut chip, &mut identity] {
        assert_ne!(device.assemble(&point).await.unwrap().public_key, expired.public_key);
        device.complete(&point).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_session_is_not_completed_or_redelivered() {
    let testbed = TestBed::new().await;
    for left in [StateName::Reserved, StateName::Issued] {
        let point = testbed.point();
        let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
        let expired = device_in_state(left, &point, &mut device).await;
        point.expire_sessions();
        if left == StateName::Issued {
            let error = device.complete(&point).await.unwrap_err();
            assert!(matches!(error, ProvisionError::WrongState { state: StateName::Issued, .. }), "{error}");
        }
        // No recovery pass has run yet: the order itself detects the expiry.
        let fresh = device.assemble(&point).await.unwrap();
        assert_ne!(fresh.session, expired.id);
        assert_ne!(fresh.public_key.map(|key| key.spki_der().to_vec()), expired.public_key);
        let aborted = point.state().session(&expired.id).await.unwrap().unwrap();
        assert_eq!(aborted.state.name(), StateName::Aborted);
        assert!(point.state().stored_key(&expired.id).await.unwrap().is_none());
        device.complete(&point).await.unwrap();
    }
}

/// The record is public, but the journal does not have the publication when the session expires: the device is complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_session_with_public_record_is_complete() {
    let testbed = TestBed::new().await;
    for action in ["assemble", "complete", "restart"] {
        let point = testbed.point();
        let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
        device.assemble(&point).await.unwrap();
        point.faults.fail_nth(1, FaultMode::Failed);
        device.complete(&point).await.unwrap_err();
        assert_eq!(point.faults.take_written().last(), Some(&Write::NotePublished));
        point.expire_sessions();
        match action {
            "assemble" => {
                let error = device.assemble(&point).await.unwrap_err();
                assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
            }
            "complete" => drop(device.complete(&point).await.unwrap()),
            _ => assert_eq!(
                point.provisioner().resume_sessions().await.unwrap(),
                RecoveryReport { erased: 1, ..RecoveryReport::default() }
            ),
        }
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
        assert_eq!(point.public().len().await.unwrap(), 1);
    }
}

async fn device_in_state(state: StateName, point: &Point<'_>, device: &mut TestDevice) -> spp::store::Session {
    if state == StateName::Reserved {
        point.faults.fail_nth(1, FaultMode::Failed);
        device.assemble(point).await.unwrap_err();
    } else {
        device.assemble(point).await.unwrap();
    }
    let left = device.session(point).await.unwrap();
    assert_eq!(left.state.name(), state);
    left
}
