//! The HSM goes away between the intent and the signature.

use std::time::Duration;

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::StateName;

use spp_testkit::point::breaking::{Break, Write};
use spp_testkit::point::device::{Kind, OnTheLine, is_over};
use spp_testkit::point::{House, Point};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hsm_lost_before_the_signature_signs_the_same_bytes_when_it_is_back() {
    let house = House::with_call_timeout(Duration::from_secs(3)).await;
    for restarts in [false, true] {
        let mut point = house.point();
        let mut device = OnTheLine::new(&house, Kind::Phone, u32::from(restarts));
        lose_the_hsm_after(&point, Write::Reserve);
        let error = device.assemble(&point).await.unwrap_err();
        assert!(matches!(error, ProvisionError::Hsm(_)), "{error}");
        let intended = device.session(&point).await.unwrap();
        assert_eq!(intended.state.name(), StateName::Reserved);
        assert!(device.has_wrapped_key(&point).await);
        // While it is away nothing else is tried, and nothing is lost by trying.
        assert!(matches!(device.assemble(&point).await.unwrap_err(), ProvisionError::Hsm(_)));
        assert_eq!(
            point.provisioner().restart().await.unwrap(),
            RecoveryReport { waiting: 1, ..RecoveryReport::default() }
        );
        assert_eq!(device.session(&point).await.unwrap(), intended);

        bring_the_hsm_back(&house).await;
        if restarts {
            assert_eq!(point.restart().await, RecoveryReport { signed: 1, ..RecoveryReport::default() });
            assert_eq!(device.state(&point).await, Some(StateName::Issued));
        }
        let installed = device.assemble(&point).await.unwrap();
        assert_eq!(installed.session, intended.id);
        assert!(is_over(&installed.certificate, &intended));
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
    }
}

/// Rule 7: the HSM is asked once for the keys, and for the signature only after the journal has the intent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_signed_without_a_journaled_intent() {
    let house = House::new().await;
    let point = house.point();
    // Nothing else asks the HSM once the pool is full.
    point.filled(8).await;
    let mut device = OnTheLine::new(&house, Kind::Phone, 1);
    for how in [Break::Failed, Break::FailedButPersisted] {
        let before = house.hsm.status().members[0].calls_answered;
        point.faults.break_nth(0, how);
        device.assemble(&point).await.unwrap_err();
        assert_eq!(house.hsm.status().members[0].calls_answered - before, 1, "the keys, and no signature");
    }
    // The intent is in the journal now: the signature, and the keys once more for the package.
    let before = house.hsm.status().members[0].calls_answered;
    device.assemble(&point).await.unwrap();
    assert_eq!(house.hsm.status().members[0].calls_answered - before, 2);
}

/// kill -9, and no token to start on.
fn lose_the_hsm_after(point: &Point<'_>, write: Write) {
    let (tokens, worker) = (point.house.tokens(), point.house.worker());
    point.faults.after(write, move || {
        std::fs::rename(&tokens, tokens.with_extension("away")).unwrap();
        worker.kill();
    });
}

async fn bring_the_hsm_back(house: &House) {
    let tokens = house.tokens();
    std::fs::rename(tokens.with_extension("away"), tokens).unwrap();
    house.hsm.ready(Duration::from_secs(60)).await.unwrap();
}
