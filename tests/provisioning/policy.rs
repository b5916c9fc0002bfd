//! Invariants 1, 3, 4 and 5: one pair per chip, no erasure before publication, unique values are published once, and every call
//! is repeatable. Invariant 7 is in `hsm.rs`.

use std::collections::BTreeSet;
use std::sync::Arc;

use spp::provisioning::{AssembleRequest, Assembled, Completion, Delivery, ProvisionError, Provisioner};
use spp::store::{PublicDatabase as _, SessionCounts, StateName, StateStore as _};
use spp_format::record::{AuditCheckpoint, Publication};

use spp_testkit::point::TestBed;
use spp_testkit::point::device::{Kind, TestDevice};
use spp_testkit::point::faulty_stores::{FaultMode, Write};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_orders_for_one_identity_admit_one_chip() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let chips: Vec<_> = (0..8).map(|chip| TestDevice::with_identity(&testbed, Kind::Phone, chip, 1)).collect();
    let outcomes = run_concurrently(chips.iter().map(|chip| assemble(point.provisioner().clone(), chip.order()))).await;

    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 7));
    for error in lost.into_iter().filter_map(Result::err) {
        assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    }
    let holder = point.state().session_of_identity(&chips[0].identity).await.unwrap().unwrap();
    assert_eq!(holder.id, won.into_iter().flatten().next().unwrap().session);
    assert_eq!(point.state().counts().await.unwrap(), SessionCounts { issued: 1, ..SessionCounts::default() });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_orders_for_one_chip_return_same_package() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let device = TestDevice::new(&testbed, Kind::Phone, 1);
    let outcomes = run_concurrently((0..16).map(|_| assemble(point.provisioner().clone(), device.order()))).await;

    let delivered: BTreeSet<_> = outcomes.into_iter().map(|outcome| bytes(outcome.unwrap())).collect();
    assert_eq!(delivered.len(), 1);
    let written = point.faults.take_written();
    assert_eq!(written, [Write::Reserve, Write::Issue], "one intent and one signature");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_completions_return_same_receipt() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    let session = device.delivered[0].0;
    let completions = (0..16).map(|_| complete(point.provisioner().clone(), device.completion(session)));
    let receipts: Vec<_> = run_concurrently(completions).await.into_iter().map(Result::unwrap).collect();
    assert!(receipts.iter().all(|receipt| *receipt == receipts[0]));
    device.assert_complete(&point, receipts[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pair_is_not_erased_before_publication() {
    let testbed = TestBed::new().await;
    let mut point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    device.assemble(&point).await.unwrap();
    for _ in 0..3 {
        point.faults.fail_nth(0, FaultMode::Failed);
        device.complete(&point).await.unwrap_err();
        point.restart().await;
        assert!(device.has_wrapped_key(&point).await);
        assert!(!device.is_public(&point).await);
    }
    assert!(!point.faults.take_written().contains(&Write::Erase));
    let answer = device.complete(&point).await.unwrap();
    device.assert_complete(&point, answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invalid_backup_or_confirmation_changes_nothing() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let (mut device, mut other) =
        (TestDevice::new(&testbed, Kind::Phone, 1), TestDevice::new(&testbed, Kind::Phone, 2));
    device.assemble(&point).await.unwrap();
    other.assemble(&point).await.unwrap();
    let (session, theirs) = (device.delivered[0].0, other.delivered[0].0);
    point.faults.take_written();
    let provisioner = || point.provisioner().clone();
    for error in [
        device.complete_session(&point, theirs).await.unwrap_err(),
        other.complete_session(&point, session).await.unwrap_err(),
        complete(provisioner(), Completion { backup: Vec::new(), ..device.completion(session) }).await.unwrap_err(),
        complete(provisioner(), Completion { confirmation: Vec::new(), ..device.completion(session) })
            .await
            .unwrap_err(),
    ] {
        assert!(matches!(error, ProvisionError::NotAccepted(_)), "{error}");
    }
    assert_eq!(point.faults.take_written(), []);
    device.complete(&point).await.unwrap();
    other.complete(&point).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chip_identity_serial_and_key_are_published_once() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let mut devices: Vec<_> = (0..6).map(|n| TestDevice::new(&testbed, Kind::Phone, n)).collect();
    for device in &mut devices {
        device.provision(&point).await;
    }
    let (mut serials, mut keys) = (BTreeSet::new(), BTreeSet::new());
    for device in &devices {
        let record = point.record_of(&device.chip).await.unwrap().record;
        serials.insert(record.serial);
        keys.insert(record.public_key.unwrap());
    }
    assert_eq!((serials.len(), keys.len()), (6, 6));

    let taken = |chip, identity| TestDevice::with_identity(&testbed, Kind::Phone, chip, identity);
    let error = taken(0, 0).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::AlreadyComplete { .. }), "{error}");
    let error = taken(0, 77).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::ChipTaken { .. }), "{error}");
    let error = taken(77, 0).assemble(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::IdentityTaken { .. }), "{error}");
    assert_eq!(point.public().len().await.unwrap(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn audit_checkpoints_are_provable_and_not_device_records() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let registry = point.provisioner().registry();
    let checkpoint = |entries| AuditCheckpoint {
        node: "node-1".to_owned(),
        entries,
        note: format!("{entries} entries").into_bytes(),
        recorded: 1,
    };
    registry.append_audit(&checkpoint(10)).await.unwrap();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    let answer = device.provision(&point).await;
    registry.append_audit(&checkpoint(20)).await.unwrap();

    assert_eq!(answer.index, 1);
    assert_eq!(registry.newest_session().await.unwrap(), Some(device.delivered[0].0));
    assert_eq!(registry.newest_audit("node-1").await.unwrap(), Some((2, checkpoint(20))));
    let bytes = [
        checkpoint(10).to_bytes().unwrap(),
        point.record_of(&device.chip).await.unwrap().bytes,
        checkpoint(20).to_bytes().unwrap(),
    ];
    for (index, bytes) in (0..).zip(&bytes) {
        let proof = point.provisioner().prove(index).await.unwrap();
        assert_eq!(proof.verify(bytes, &point.log_key()).unwrap().index, index);
    }
    assert!(matches!(point.provisioner().prove(3).await, Err(ProvisionError::NoRecord)));
    device.assert_complete(&point, answer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aborted_pair_is_destroyed_and_replaced() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let mut device = TestDevice::new(&testbed, Kind::Phone, 1);
    let first = device.assemble(&point).await.unwrap();
    point.faults.fail_nth(0, FaultMode::Failed);
    device.abort(&point).await.unwrap_err();
    assert_eq!(device.state(&point).await, Some(StateName::Issued));
    point.faults.fail_nth(0, FaultMode::FailedButPersisted);
    device.abort(&point).await.unwrap_err();
    device.abort(&point).await.unwrap();
    assert_eq!(device.state(&point).await, Some(StateName::Aborted));
    assert!(!device.has_wrapped_key(&point).await);
    let error = device.complete(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::WrongState { state: StateName::Aborted, .. }), "{error}");

    let second = device.assemble(&point).await.unwrap();
    assert_ne!(second.session, first.session);
    assert_ne!(second.public_key, first.public_key);
    device.complete(&point).await.unwrap();
    let error = device.abort(&point).await.unwrap_err();
    assert!(matches!(error, ProvisionError::WrongState { state: StateName::Erased, .. }), "{error}");
}

/// Runs calls concurrently, each in its own task, like calls from clients.
async fn run_concurrently<T, F>(calls: impl Iterator<Item = F>) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let calls: Vec<_> = calls.map(tokio::spawn).collect();
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap());
    }
    outcomes
}

async fn assemble(provisioner: Arc<Provisioner>, order: AssembleRequest) -> Result<Assembled, ProvisionError> {
    provisioner.assemble(order).await
}

async fn complete(provisioner: Arc<Provisioner>, completion: Completion) -> Result<Publication, ProvisionError> {
    provisioner.complete(completion).await.map(|receipt| receipt.publication)
}

fn bytes(assembled: Assembled) -> (Vec<u8>, Vec<u8>) {
    let Delivery::Plain(package) = assembled.delivery else { panic!("a phone's package is not sealed here") };
    (assembled.certificate, package.expose().clone())
}
