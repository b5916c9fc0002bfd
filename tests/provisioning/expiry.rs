//! What time ends: a session that was not completed gives its chip and identity back, and its pair to nobody.

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::{PublicDatabase as _, StateName, StateStore as _};

use spp_testkit::point::breaking::{Break, Write};
use spp_testkit::point::device::{Kind, OnTheLine};
use spp_testkit::point::{House, Point};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_pair_is_destroyed_and_its_chip_and_identity_are_free() {
    let house = House::new().await;
    let point = house.point();
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    let expired = device.assemble(&point).await.unwrap();
    let mut intended = OnTheLine::new(&house, Kind::Phone, 2);
    point.faults.break_nth(1, Break::Failed);
    intended.assemble(&point).await.unwrap_err();
    point.let_sessions_expire();

    assert_eq!(
        point.provisioner().restart().await.unwrap(),
        RecoveryReport { expired: 2, ..RecoveryReport::default() }
    );
    assert_eq!(device.state(&point).await, Some(StateName::Aborted));
    assert_eq!(intended.state(&point).await, Some(StateName::Aborted));
    assert!(point.state().kept_key(&expired.session).await.unwrap().is_none());
    let error = device.complete(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::WrongState { state: StateName::Aborted, .. }), "{error}");
    assert!(!device.is_public(&point).await);

    // The chip takes another identity, the identity another chip; neither gets the old pair.
    let (mut chip, mut identity) =
        (OnTheLine::with_identity(&house, Kind::Phone, 1, 8), OnTheLine::with_identity(&house, Kind::Phone, 9, 1));
    for device in [&mut chip, &mut identity] {
        assert_ne!(device.assemble(&point).await.unwrap().public_key, expired.public_key);
        device.complete(&point).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_session_is_neither_completed_nor_delivered_again() {
    let house = House::new().await;
    for left in [StateName::Reserved, StateName::Issued] {
        let point = house.point();
        let mut device = OnTheLine::new(&house, Kind::Phone, 1);
        let expired = leave_in(left, &point, &mut device).await;
        point.let_sessions_expire();
        if left == StateName::Issued {
            let error = device.complete(&point).await.unwrap_err();
            assert!(matches!(error, ProvisionError::WrongState { state: StateName::Issued, .. }), "{error}");
        }
        // Nobody walked through the sessions yet: the order itself finds that the time is over.
        let fresh = device.assemble(&point).await.unwrap();
        assert_ne!(fresh.session, expired.id);
        assert_ne!(fresh.public_key.map(|key| key.spki_der().to_vec()), expired.public_key);
        let aborted = point.state().session(&expired.id).await.unwrap().unwrap();
        assert_eq!(aborted.state.name(), StateName::Aborted);
        assert!(point.state().kept_key(&expired.id).await.unwrap().is_none());
        device.complete(&point).await.unwrap();
    }
}

/// The record is public, the journal does not know it yet, and then the time is over: the device is complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_session_whose_record_is_public_is_complete() {
    let house = House::new().await;
    for then in ["assemble", "complete", "restart"] {
        let point = house.point();
        let mut device = OnTheLine::new(&house, Kind::Phone, 1);
        device.assemble(&point).await.unwrap();
        point.faults.break_nth(1, Break::Failed);
        device.complete(&point).await.unwrap_err();
        assert_eq!(point.faults.take_written().last(), Some(&Write::NotePublished));
        point.let_sessions_expire();
        match then {
            "assemble" => {
                let error = device.assemble(&point).await.unwrap_err();
                assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
            }
            "complete" => drop(device.complete(&point).await.unwrap()),
            _ => assert_eq!(
                point.provisioner().restart().await.unwrap(),
                RecoveryReport { erased: 1, ..RecoveryReport::default() }
            ),
        }
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
        assert_eq!(point.public().len().await.unwrap(), 1);
    }
}

async fn leave_in(state: StateName, point: &Point<'_>, device: &mut OnTheLine) -> spp::store::Session {
    if state == StateName::Reserved {
        point.faults.break_nth(1, Break::Failed);
        device.assemble(point).await.unwrap_err();
    } else {
        device.assemble(point).await.unwrap();
    }
    let left = device.session(point).await.unwrap();
    assert_eq!(left.state.name(), state);
    left
}
