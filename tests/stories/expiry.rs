//! What time ends: a session that was not completed gives its chip and identity back, and its pair to nobody.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use spp::provisioning::{ProvisionError, Tidied};
use spp::store::{PublicDatabase as _, StateName, StateStore as _};

use crate::breaking::{Break, Write};
use crate::device::{Kind, OnTheLine};
use crate::point::{House, Point};

/// Long enough for a busy machine to complete a device in it, its first second being cut short by the clock's whole seconds.
const LIFETIME: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_pair_is_destroyed_and_its_chip_and_identity_are_free() {
    let house = House::new().await;
    let point = house.point_with_lifetime(LIFETIME);
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    let expired = device.assemble(&point).await.unwrap();
    let mut intended = OnTheLine::new(&house, Kind::Phone, 2);
    point.faults.break_nth(1, Break::Failed);
    intended.assemble(&point).await.unwrap_err();
    until_expired(&point, &intended).await;

    assert_eq!(point.provisioner().restart().await.unwrap(), Tidied { expired: 2, ..Tidied::default() });
    assert_eq!(device.state(&point).await, Some(StateName::Aborted));
    assert_eq!(intended.state(&point).await, Some(StateName::Aborted));
    assert!(point.state().wrapped_key(&expired.session).await.unwrap().is_none());
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
    let point = house.point_with_lifetime(LIFETIME);
    let mut intended = OnTheLine::new(&house, Kind::Phone, 1);
    point.faults.break_nth(1, Break::Failed);
    intended.assemble(&point).await.unwrap_err();
    assert_eq!(intended.state(&point).await, Some(StateName::Reserved));
    let mut issued = OnTheLine::new(&house, Kind::Phone, 2);
    issued.assemble(&point).await.unwrap();
    until_expired(&point, &issued).await;

    let error = issued.complete(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::WrongState { state: StateName::Issued, .. }), "{error}");
    for device in [&mut intended, &mut issued] {
        // Nobody walked through the sessions yet: the order itself finds that the time is over.
        let expired = device.session(&point).await.unwrap();
        let fresh = device.assemble(&point).await.unwrap();
        assert_ne!(fresh.session, expired.id);
        assert_ne!(fresh.public_key.map(|key| key.spki_der().to_vec()), expired.public_key);
        let aborted = point.state().session(&expired.id).await.unwrap().unwrap();
        assert_eq!(aborted.state.name(), StateName::Aborted);
        assert!(point.state().wrapped_key(&expired.id).await.unwrap().is_none());
        device.complete(&point).await.unwrap();
    }
}

/// The record is public, the journal does not know it yet, and then the time is over: the device is complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_session_whose_record_is_public_is_complete() {
    let house = House::new().await;
    let points = [0, 1, 2].map(|_| house.point_with_lifetime(LIFETIME));
    let mut devices = [0, 1, 2].map(|n| OnTheLine::new(&house, Kind::Phone, n));
    for (point, device) in points.iter().zip(&mut devices) {
        device.assemble(point).await.unwrap();
        point.faults.break_nth(1, Break::Failed);
        device.complete(point).await.unwrap_err();
        assert_eq!(point.faults.take_written().last(), Some(&Write::NotePublished));
    }
    until_expired(&points[2], &devices[2]).await;

    let error = devices[0].assemble(&points[0]).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
    devices[1].complete(&points[1]).await.unwrap();
    let tidied = points[2].provisioner().restart().await.unwrap();
    assert_eq!(tidied, Tidied { erased: 1, ..Tidied::default() });
    for (point, device) in points.iter().zip(&mut devices) {
        let answer = device.complete(point).await.unwrap();
        device.assert_complete(point, answer).await;
        assert_eq!(point.public().len().await.unwrap(), 1);
    }
}

/// Waits for the end of the newest session; all before it have ended then, too.
async fn until_expired(point: &Point<'_>, newest: &OnTheLine) {
    let expires = newest.session(point).await.unwrap().expires;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    tokio::time::sleep(Duration::from_secs(expires).saturating_sub(now) + Duration::from_millis(20)).await;
}
