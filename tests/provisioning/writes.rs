//! Every provisioning write fails once, in both modes; then the call is repeated in the same process or after a restart.

use spp::provisioning::ProvisionError;
use spp::store::StateName;

use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::{FaultMode, Write};
use spp_testkit::point::{Point, TestBed};
use spp_testkit::random::scaled;

/// The provisioning writes, in order.
const WRITES: [Write; 5] = [Write::Reserve, Write::Issue, Write::Publish, Write::NotePublished, Write::Erase];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn phone_recovers_from_any_failed_write() {
    provision_with_each_fault(Kind::Phone).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sensor_recovers_from_any_failed_write() {
    provision_with_each_fault(Kind::Sensor).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_recovers_from_any_failed_write() {
    provision_with_each_fault(Kind::Gateway).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_device_recovers_from_any_failed_write() {
    provision_with_each_fault(Kind::Pooled).await;
}

async fn provision_with_each_fault(kind: Kind) {
    let testbed = TestBed::new().await;
    let mut n = 0;
    let mut next = || {
        n += 1;
        TestDevice::new(&testbed, kind, n)
    };
    provision_without_fault(&ready_point(&testbed).await, next()).await;
    for (nth, write) in WRITES.into_iter().enumerate() {
        for mode in [FaultMode::Failed, FaultMode::FailedButPersisted] {
            // Both in full runs, alternating in short runs.
            let in_turn = [NextAction::Repeat, NextAction::Restart][(nth + mode as usize + kind as usize) % 2];
            for next_action in scaled(vec![in_turn], vec![NextAction::Repeat, NextAction::Restart]) {
                println!("{kind:?}: {write:?} {mode:?}, then {next_action:?}");
                provision_with_fault(ready_point(&testbed).await, next(), (nth, write, mode), next_action).await;
            }
        }
    }
}

async fn ready_point(testbed: &TestBed) -> Point<'_> {
    let point = testbed.point();
    point.wait_until_filled(4).await;
    point
}

/// The action after the failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NextAction {
    Repeat,
    Restart,
}

async fn provision_without_fault(point: &Point<'_>, mut device: TestDevice) {
    let answer = device.provision(point).await;
    assert_eq!(point.faults.take_written(), WRITES);
    device.assert_complete(point, answer).await;
}

async fn provision_with_fault(
    mut point: Point<'_>,
    mut device: TestDevice,
    broken: (usize, Write, FaultMode),
    next_action: NextAction,
) {
    let (nth, write, mode) = broken;
    point.faults.fail_nth(nth, mode);

    let in_assemble = matches!(write, Write::Reserve | Write::Issue);
    let error = match device.assemble(&point).await {
        Ok(_) if !in_assemble => device.complete(&point).await.unwrap_err(),
        assembled => assembled.map(drop).unwrap_err(),
    };
    assert!(matches!(error, ProvisionError::Store(_)), "{error}");
    assert_eq!(observed_state(&point, &device).await, expected_state_after_fault(write, mode));
    device.assert_key_stored_until_final(&point).await;

    if next_action == NextAction::Restart {
        let report = point.restart().await;
        assert_eq!(report.failed, 0);
        assert_eq!(observed_state(&point, &device).await, expected_state_after_restart(write, mode));
        device.assert_key_stored_until_final(&point).await;
    }
    // A station may repeat Assemble until the device is complete, and gets the same package.
    let (state, public) = observed_state(&point, &device).await;
    if in_assemble || (state == Some(StateName::Issued) && !public) {
        device.assemble(&point).await.unwrap();
    }
    let answer = device.complete(&point).await.unwrap();
    device.assert_complete(&point, answer).await;
    assert_eq!(device.complete(&point).await.unwrap(), answer, "a repeat gives the same receipt");
    device.assert_complete(&point, answer).await;
}

/// The journaled state of the chip, and whether its record is public.
async fn observed_state(point: &Point<'_>, device: &TestDevice) -> (Option<StateName>, bool) {
    (device.state(point).await, device.is_public(point).await)
}

fn expected_state_after_fault(write: Write, mode: FaultMode) -> (Option<StateName>, bool) {
    let persisted = mode == FaultMode::FailedButPersisted;
    let (before, after) = match write {
        Write::Reserve => ((None, false), (Some(StateName::Reserved), false)),
        Write::Issue => ((Some(StateName::Reserved), false), (Some(StateName::Issued), false)),
        Write::Publish => ((Some(StateName::Issued), false), (Some(StateName::Issued), true)),
        Write::NotePublished => ((Some(StateName::Issued), true), (Some(StateName::Published), true)),
        Write::Erase => ((Some(StateName::Published), true), (Some(StateName::Erased), true)),
        Write::Abort => unreachable!("not on the way"),
    };
    if persisted { after } else { before }
}

/// Signed or published sessions are finished without a station; other sessions wait for theirs.
fn expected_state_after_restart(write: Write, mode: FaultMode) -> (Option<StateName>, bool) {
    match expected_state_after_fault(write, mode) {
        (Some(StateName::Reserved), public) => (Some(StateName::Issued), public),
        (Some(_), true) => (Some(StateName::Erased), true),
        waiting => waiting,
    }
}
