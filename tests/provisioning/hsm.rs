//! HSM failures between the intent and the signature.

use std::time::Duration;

use spp::provisioning::{ProvisionError, RecoveryReport};
use spp::store::StateName;

use spp_testkit::point::device::{Kind, TestDevice, covers_intent};
use spp_testkit::point::faulty_stores::{FaultMode, Write};
use spp_testkit::point::{Point, TestBed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_hsm_signs_same_bytes_after_recovery() {
    let testbed = TestBed::with_call_timeout(Duration::from_secs(3)).await;
    for restarts in [false, true] {
        let mut point = testbed.point();
        let mut device = TestDevice::new(&testbed, Kind::Phone, u32::from(restarts));
        lose_hsm_after(&point, Write::Reserve);
        let error = device.assemble(&point).await.unwrap_err();
        assert!(matches!(error, ProvisionError::Hsm(_)), "{error}");
        let intended = device.session(&point).await.unwrap();
        assert_eq!(intended.state.name(), StateName::Reserved);
        assert!(device.has_wrapped_key(&point).await);
        // While the HSM is unavailable, repeated calls fail and lose nothing.
        assert!(matches!(device.assemble(&point).await.unwrap_err(), ProvisionError::Hsm(_)));
        assert_eq!(
            point.provisioner().resume_sessions().await.unwrap(),
            RecoveryReport { waiting: 1, ..RecoveryReport::default() }
        );
        assert_eq!(device.session(&point).await.unwrap(), intended);

        restore_hsm(&testbed).await;
        if restarts {
            assert_eq!(point.restart().await, RecoveryReport { signed: 1, ..RecoveryReport::default() });
            assert_eq!(device.state(&point).await, Some(StateName::Issued));
        }
        let installed = device.assemble(&point).await.unwrap();
        assert_eq!(installed.session, intended.id);
        assert!(covers_intent(&installed.certificate, &intended));
        let answer = device.complete(&point).await.unwrap();
        device.assert_complete(&point, answer).await;
    }
}

/// Invariant 7: one HSM call makes the keys; the signature is requested only after the journal has the intent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signature_requires_journaled_intent() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    // No other HSM calls occur once the pool is full.
    point.wait_until_filled(8).await;
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    for how in [FaultMode::Failed, FaultMode::FailedButPersisted] {
        let before = testbed.hsm.status().members[0].calls_answered;
        point.faults.fail_nth(0, how);
        device.assemble(&point).await.unwrap_err();
        assert_eq!(testbed.hsm.status().members[0].calls_answered - before, 1, "the keys, and no signature");
    }
    // The intent is journaled now: one call for the signature, one for the keys of the package.
    let before = testbed.hsm.status().members[0].calls_answered;
    device.assemble(&point).await.unwrap();
    assert_eq!(testbed.hsm.status().members[0].calls_answered - before, 2);
}

/// Kills the worker and removes the token, so that no new worker can start.
fn lose_hsm_after(point: &Point<'_>, write: Write) {
    let (tokens, worker) = (point.testbed.tokens(), point.testbed.worker());
    point.faults.after(write, move || {
        std::fs::rename(&tokens, tokens.with_extension("removed")).unwrap();
        worker.kill();
    });
}

async fn restore_hsm(testbed: &TestBed) {
    let tokens = testbed.tokens();
    std::fs::rename(tokens.with_extension("removed"), tokens).unwrap();
    testbed.hsm.ready(Duration::from_secs(60)).await.unwrap();
}
