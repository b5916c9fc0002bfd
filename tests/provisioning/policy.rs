//! Invariants 1, 3, 4 and 5: one pair per chip, no erasure before publication, unique values are published once, and every call
//! is repeatable. Invariant 7 is in `hsm.rs`.

use std::collections::BTreeSet;
use std::sync::Arc;

use spp::provisioning::{AssembleRequest, Assembled, Completion, Delivery, ProvisionError, Provisioner};
use spp::store::{
    LogReader as _, ReserveError, Session, SessionCounts, SessionReader as _, SessionState, StateName, StateStore as _,
};
use spp_format::keys::PublicKey;
use spp_format::names::SessionId;
use spp_format::record::{AuditCheckpoint, DeviceRecord, Publication};

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

/// A device chooses its own key. What it chooses is no sign of a rolled-back state store, so it must not stop the pools.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn device_key_of_other_device_refused_pools_stay_available() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let assert_taken = |error: ProvisionError| assert!(matches!(error, ProvisionError::PublicKeyTaken(_)), "{error}");
    let (mut first, mut phone) =
        (TestDevice::new(&testbed, Kind::Gateway, 1), TestDevice::new(&testbed, Kind::Phone, 3));
    let second = TestDevice::new(&testbed, Kind::Gateway, 2);
    first.assemble(&point).await.unwrap();
    phone.assemble(&point).await.unwrap();
    let generated_here = phone.session(&point).await.unwrap().public_key.unwrap();
    let claimed = [first.order().own_key.unwrap(), PublicKey::from_spki_der(&generated_here).unwrap()];
    let order = |key: &PublicKey| AssembleRequest { own_key: Some(key.clone()), ..second.order() };
    for key in &claimed {
        assert_taken(point.provisioner().assemble(order(key)).await.err().expect("refused"));
    }
    first.complete(&point).await.unwrap();
    phone.complete(&point).await.unwrap();
    for key in &claimed {
        assert_taken(point.provisioner().assemble(order(key)).await.err().expect("refused"));
    }
    assert_eq!(second.state(&point).await, None, "nothing was begun");

    // Published while its session is open, as by another store history: found at the end only, and no pool stops either.
    let mut late = TestDevice::new(&testbed, Kind::Gateway, 4);
    late.assemble(&point).await.unwrap();
    let known = point.record_of(&first.chip).await.unwrap().record;
    let other = TestDevice::new(&testbed, Kind::Gateway, 5);
    let record = DeviceRecord {
        chip: other.chip.clone(),
        identity: other.identity.clone(),
        serial: vec![5; 16],
        certificate: vec![5; 600],
        session: SessionId::from_bytes(&[5; 16]).unwrap(),
        public_key: late.session(&point).await.unwrap().public_key,
        ..known
    };
    point.provisioner().registry().publish(&record).await.unwrap();
    assert_taken(late.complete(&point).await.unwrap_err());
    assert_eq!(point.pool().status().await.unwrap().rolled_back, None);
    TestDevice::new(&testbed, Kind::Pooled, 6).provision(&point).await;
    late.abort(&point).await.unwrap();
}

/// RFC 5280 §7.1: names that differ in case are equal, and the subject does not show the kind of the identity.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subject_of_other_identity_refused_until_abort() {
    let testbed = TestBed::new().await;
    let point = testbed.point();
    let device = |n, identity: &str| {
        let mut device = TestDevice::new(&testbed, Kind::Gateway, n);
        device.identity = identity.parse().unwrap();
        device
    };
    let assert_taken = |error: ProvisionError| assert!(matches!(error, ProvisionError::SubjectTaken { .. }), "{error}");
    let mut first = device(1, "eui48:d967458e6b6c");
    first.assemble(&point).await.unwrap();
    assert_taken(device(2, "serial:D967458E6B6C").assemble(&point).await.unwrap_err());
    // The transaction that reserves decides, whatever was read before it.
    let racing = Session {
        id: SessionId::from_bytes(&[9; 16]).unwrap(),
        chip: device(2, "serial:x").chip,
        identity: "serial:D967458E6B6C".parse().unwrap(),
        public_key: None,
        state: SessionState::Reserved,
        ..first.session(&point).await.unwrap()
    };
    let refused = point.state().reserve(&racing, None).await;
    assert!(matches!(refused, Err(ReserveError::SubjectTaken { .. })), "{refused:?}");
    first.complete(&point).await.unwrap();
    assert_taken(device(2, "serial:d967458E6b6c").assemble(&point).await.unwrap_err());

    let mut third = device(3, "serial:Sn-3");
    third.assemble(&point).await.unwrap();
    assert_taken(device(4, "serial:sN-3").assemble(&point).await.unwrap_err());
    third.abort(&point).await.unwrap();
    device(4, "serial:sN-3").provision(&point).await;

    for spaced in ["serial: 5", "serial:5 ", "serial:5  5"] {
        let error = device(5, spaced).assemble(&point).await.unwrap_err();
        assert!(matches!(error, ProvisionError::Invalid(_)), "{error}");
    }
}
