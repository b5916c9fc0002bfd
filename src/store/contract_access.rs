//! Contract tests for access control data of every storage engine. `access_store_contract!(module, Factory)` instantiates them.

use std::collections::BTreeSet;
use std::sync::Arc;

use spp_format::approval::{ApprovalRules, ProtectedAction, Quota, RequestId, SignedStatement, Verdict};
use spp_format::certificate::{Caller, Role};
use spp_format::names::{DeviceIdentity, StationName};

use super::contract::{Factory, chip, session};
use super::*;
use crate::access::{
    AccessError, AppliedQuota, ApprovalRequest, Exceeded, IdentityRange, Refused, RequestError, RequestState, request,
    signed,
};

macro_rules! access_store_contract {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            access_store_contract!(@tests $factory:
                concurrent_reservations_never_exceed_quota,
                raising_configured_limits_requires_approval,
                last_approval_executes_action_durably,
                request_is_filed_once_within_limits,
                signatures_of_revoked_officer_are_void,
                stricter_rules_apply_to_pending_requests,
                ceremony_approval_is_consumed_once,
                identity_is_allocated_to_one_chip_permanently,
                allocation_skips_identities_in_use);
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            $crate::store::contract_access::$test(&<$factory as $crate::store::contract::Factory>::new()).await;
        }
    )+};
}
pub(super) use access_store_contract;

fn station() -> StationName {
    session(0).station
}

fn per_hour(limit: u64) -> Quota {
    Quota { devices_per_hour: Some(limit), devices_total: None }
}

fn total(limit: u64) -> Quota {
    Quota { devices_per_hour: None, devices_total: Some(limit) }
}

fn request_with_id(n: u8, action: ProtectedAction, needed: u8) -> ApprovalRequest {
    ApprovalRequest { id: RequestId::from_bytes([n; 8]), ..request(action, needed) }
}

fn raise_quota(quota: Quota) -> ProtectedAction {
    ProtectedAction::RaiseQuota { station: station(), quota }
}

fn revoke(role: Role, name: &str) -> ProtectedAction {
    ProtectedAction::Revoke { role, name: name.to_owned(), reason: "lost".to_owned() }
}

fn ceremony() -> ProtectedAction {
    ProtectedAction::Ceremony { destroys: true, file: "[[destroy]]".to_owned() }
}

async fn approve(
    store: &dyn AccessStore,
    request: &ApprovalRequest,
    by: SignedStatement,
) -> Result<ApprovalRequest, AccessError> {
    store.decide(request.id, Verdict::Approve, by).await
}

fn refused(result: Result<ApprovalRequest, AccessError>) -> RequestError {
    match result {
        Err(AccessError::Refused(Refused::Request(error))) => error,
        other => panic!("not refused: {other:?}"),
    }
}

pub(super) async fn concurrent_reservations_never_exceed_quota(engine: &impl Factory) {
    let store = engine.state();
    store.apply(ApprovalRules::default(), vec![(station(), total(10))], true).await.unwrap();
    let calls = (0..40).map(|n| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { store.reserve(&session(n), None).await })
    });
    let mut begun = 0;
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            Ok(()) => begun += 1,
            Err(ReserveError::QuotaExceeded { exceeded, .. }) => assert_eq!(exceeded, Exceeded::Total(10)),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!((begun, store.counts().await.unwrap().reserved), (10, 10));
    assert_eq!(store.stations().await.unwrap()[0].usage.total(), 10);
    let n = store.unfinished().await.unwrap()[0].created - 1000;
    store.reserve(&session(n), None).await.unwrap();
    assert_eq!(store.stations().await.unwrap()[0].usage.total(), 10, "a repeat is not counted again");
    drop(store);
    let store = engine.state();
    let exceeded = store.reserve(&session(50), None).await;
    assert!(matches!(exceeded, Err(ReserveError::QuotaExceeded { .. })), "also after reopening");
    let other = Session { station: "line-9/z".parse().unwrap(), ..session(51) };
    store.reserve(&other, None).await.unwrap();
}

pub(super) async fn raising_configured_limits_requires_approval(engine: &impl Factory) {
    let store = engine.state();
    let (rules, other) = (ApprovalRules::default(), ApprovalRules { destroy: 2, ..ApprovalRules::default() });
    let apply = async |rules, quota, all_or_nothing| {
        store.apply(rules, vec![(station(), quota)], all_or_nothing).await.unwrap()
    };
    assert!(apply(rules, per_hour(5), true).await.is_empty());
    assert!(apply(rules, per_hour(3), true).await.is_empty(), "lower limits apply immediately");
    let refused = apply(other, per_hour(4), true).await;
    assert!(refused.len() == 2 && refused[0].contains("approvals") && refused[1].contains("line-1/a"), "{refused:?}");
    assert_eq!(apply(rules, per_hour(4), false).await.len(), 1);
    let known = &store.stations().await.unwrap()[0];
    assert_eq!(known.quota, AppliedQuota { configured: per_hour(3), in_force: per_hour(3) });
    assert_eq!(store.rules().await.unwrap().unwrap().in_force, rules);
    // The approved rules are in force, so configuring them needs no approval.
    let filed = store.file_request(request_with_id(1, ProtectedAction::ChangeRules { rules: other }, 1)).await.unwrap();
    approve(&*store, &filed, signed("o-2", 200)).await.unwrap();
    assert_eq!(store.rules().await.unwrap().unwrap().in_force, other);
    assert!(apply(other, per_hour(3), true).await.is_empty());
}

pub(super) async fn last_approval_executes_action_durably(engine: &impl Factory) {
    let store = engine.state();
    store.apply(ApprovalRules::default(), vec![(station(), total(1))], true).await.unwrap();
    store.reserve(&session(1), None).await.unwrap();
    let filed = store.file_request(request_with_id(1, raise_quota(total(2)), 2)).await.unwrap();
    let approved_once = approve(&*store, &filed, signed("o-2", 200)).await.unwrap();
    assert_eq!((approved_once.state, approved_once.approvals.len()), (RequestState::Pending, 1));
    assert!(store.reserve(&session(2), None).await.is_err());
    assert!(matches!(refused(approve(&*store, &filed, signed("o-1", 300)).await), RequestError::OwnRequest(_)));
    let done = approve(&*store, &filed, signed("o-3", 300)).await.unwrap();
    assert_eq!(done.state, RequestState::Done(300));
    let revocation = store.file_request(request_with_id(2, revoke(Role::Station, "line-1/a"), 1)).await.unwrap();
    approve(&*store, &revocation, signed("o-2", 400)).await.unwrap();
    drop(store);
    let store = engine.state();
    store.reserve(&session(2), None).await.unwrap();
    assert!(store.reserve(&session(3), None).await.is_err());
    assert_eq!(store.request(filed.id).await.unwrap(), Some(done));
    let revocations = store.revocations().await.unwrap();
    assert_eq!((revocations.len(), &revocations[0].caller), (1, &Caller::Station(station())));
    assert_eq!((revocations[0].at, revocations[0].request), (400, revocation.id));
}

pub(super) async fn request_is_filed_once_within_limits(engine: &impl Factory) {
    let store = engine.state();
    let filed = store.file_request(request_with_id(1, raise_quota(total(2)), 1)).await.unwrap();
    assert_eq!(store.file_request(filed.clone()).await.unwrap(), filed);
    let other = request_with_id(1, raise_quota(total(3)), 1);
    assert!(matches!(refused(store.file_request(other).await), RequestError::Taken(_)));
    for n in 2..=20 {
        store.file_request(request_with_id(n, raise_quota(total(2)), 1)).await.unwrap();
    }
    assert!(matches!(
        refused(store.file_request(request_with_id(21, raise_quota(total(2)), 1)).await),
        RequestError::TooMany(_)
    ));
    for n in 0..5 {
        let request =
            ApprovalRequest { requested: signed("o-7", 100), ..request_with_id(30 + n, raise_quota(total(2)), 1) };
        store.file_request(request).await.unwrap();
    }
    let full = ApprovalRequest { requested: signed("o-7", 100), ..request_with_id(40, raise_quota(total(2)), 1) };
    assert!(matches!(refused(store.file_request(full).await), RequestError::TooMany(25)));
    let revocation =
        ApprovalRequest { requested: signed("o-7", 100), ..request_with_id(41, revoke(Role::Officer, "o-1"), 1) };
    store.file_request(revocation).await.expect("revocations have reserved capacity");
    let reject = Verdict::Reject("no".to_owned());
    store.decide(filed.id, reject, signed("o-1", 200)).await.unwrap();
    assert!(matches!(refused(approve(&*store, &filed, signed("o-2", 300)).await), RequestError::Decided { .. }));
    let unknown = request_with_id(200, raise_quota(total(1)), 1);
    assert!(matches!(refused(approve(&*store, &unknown, signed("o-2", 300)).await), RequestError::Unknown(_)));
}

pub(super) async fn signatures_of_revoked_officer_are_void(engine: &impl Factory) {
    let store = engine.state();
    let own = store.file_request(request_with_id(1, raise_quota(total(2)), 1)).await.unwrap();
    let others = ApprovalRequest { requested: signed("o-5", 100), ..request_with_id(2, raise_quota(total(3)), 2) };
    let others = store.file_request(others).await.unwrap();
    approve(&*store, &others, signed("o-1", 150)).await.unwrap();
    let revocation =
        ApprovalRequest { requested: signed("o-5", 100), ..request_with_id(3, revoke(Role::Officer, "o-1"), 1) };
    let revocation = store.file_request(revocation).await.unwrap();
    approve(&*store, &revocation, signed("o-6", 200)).await.unwrap();
    assert!(matches!(refused(approve(&*store, &own, signed("o-2", 300)).await), RequestError::Decided { .. }));
    // Signatures in flight during the revocation count as little as later ones.
    assert!(matches!(refused(approve(&*store, &others, signed("o-1", 300)).await), RequestError::Revoked(_)));
    let late = store.file_request(request_with_id(4, raise_quota(total(4)), 1)).await;
    assert!(matches!(refused(late), RequestError::Revoked(_)), "filed by o-1");
    let approved = approve(&*store, &others, signed("o-2", 300)).await.unwrap();
    assert_eq!((approved.state, approved.approvals.len()), (RequestState::Pending, 1));
}

pub(super) async fn stricter_rules_apply_to_pending_requests(engine: &impl Factory) {
    let store = engine.state();
    store.apply(ApprovalRules::default(), Vec::new(), true).await.unwrap();
    let early = store.file_request(request_with_id(1, raise_quota(total(2)), 1)).await.unwrap();
    let stricter = ProtectedAction::ChangeRules { rules: ApprovalRules { raise_quota: 2, ..ApprovalRules::default() } };
    let change = store.file_request(request_with_id(2, stricter, 1)).await.unwrap();
    approve(&*store, &change, signed("o-2", 200)).await.unwrap();
    assert_eq!(approve(&*store, &early, signed("o-2", 300)).await.unwrap().state, RequestState::Pending);
}

pub(super) async fn ceremony_approval_is_consumed_once(engine: &impl Factory) {
    let store = engine.state();
    let filed = store.file_request(request_with_id(1, ceremony(), 1)).await.unwrap();
    assert!(matches!(refused(store.consume_approval(filed.id, 150).await), RequestError::NotApproved(..)));
    approve(&*store, &filed, signed("o-2", 200)).await.unwrap();
    assert_eq!(store.consume_approval(filed.id, 250).await.unwrap().state, RequestState::Done(250));
    drop(store);
    assert!(matches!(refused(engine.state().consume_approval(filed.id, 251).await), RequestError::Decided { .. }));
}

pub(super) async fn identity_is_allocated_to_one_chip_permanently(engine: &impl Factory) {
    let store = engine.state();
    let (profile, officer) = (session(0).profile, Caller::Officer("o-1".parse().unwrap()));
    let range = IdentityRange::new("imei:490154203237518".parse().unwrap(), 20).unwrap();
    let loaded = store.load_range(profile.clone(), range.clone(), &officer, 100).await.unwrap();
    assert_eq!(store.load_range(profile.clone(), range, &officer, 200).await.unwrap(), loaded, "a repeat");
    let overlapping = IdentityRange::new(loaded.range.last(), 1).unwrap();
    let overlaps = store.load_range(profile.clone(), overlapping, &officer, 100).await;
    assert!(matches!(overlaps, Err(AccessError::Refused(Refused::Overlaps { number: 1, .. }))));
    let all = vec!["imei:".to_owned()];
    let allocate = |n, permitted: &Vec<String>| {
        let (store, profile, permitted) = (Arc::clone(&store), profile.clone(), permitted.clone());
        tokio::spawn(async move { store.allocate(&chip(n), &profile, &station(), permitted, None, 100).await })
    };
    let calls: Vec<_> = (0..10).flat_map(|n| [allocate(n, &all), allocate(n, &all)]).collect();
    let mut allocated = BTreeSet::new();
    for call in calls {
        allocated.insert(call.await.unwrap().unwrap().to_string());
    }
    assert_eq!(allocated.len(), 10, "one per chip, although each is requested twice concurrently");
    let not_permitted = allocate(30, &vec!["imei:35".to_owned()]).await.unwrap();
    assert!(matches!(not_permitted, Err(AccessError::Refused(Refused::NoIdentity { .. }))));
    drop(store);
    let store = engine.state();
    for n in 0..20 {
        allocated
            .insert(store.allocate(&chip(n), &profile, &station(), all.clone(), None, 100).await.unwrap().to_string());
    }
    assert_eq!((allocated.len(), store.ranges().await.unwrap()[0].used), (20, 20), "the same after reopening");
    let none = store.allocate(&chip(20), &profile, &station(), all, None, 100).await;
    assert!(matches!(none, Err(AccessError::Refused(Refused::NoIdentity { .. }))));
}

pub(super) async fn allocation_skips_identities_in_use(engine: &impl Factory) {
    let store = engine.state();
    let (profile, officer) = (session(0).profile, Caller::Officer("o-1".parse().unwrap()));
    let serial = |n: u32| -> DeviceIdentity { format!("serial:SN-{n:08}").parse().unwrap() };
    store.load_range(profile.clone(), IdentityRange::new(serial(1), 3000).unwrap(), &officer, 100).await.unwrap();
    for n in 1..=3 {
        store.reserve(&session(n), None).await.unwrap();
    }
    let all = vec!["serial:".to_owned()];
    let allocate =
        async |taken| store.allocate(&chip(90), &profile, &station(), all.clone(), taken, 100).await.unwrap();
    assert_eq!(allocate(None).await, serial(4));
    assert_eq!(allocate(None).await, serial(4));
    assert_eq!(allocate(Some(serial(4))).await, serial(5), "the public database has it for another chip");
    assert_eq!(allocate(Some(serial(4))).await, serial(5));
    store.apply(ApprovalRules::default(), vec![(station(), total(0))], true).await.unwrap();
    let none = store.allocate(&chip(91), &profile, &station(), all.clone(), None, 100).await;
    assert!(
        matches!(none, Err(AccessError::Refused(Refused::Quota { .. }))),
        "a device that cannot be begun uses up no identity"
    );
    assert_eq!(allocate(None).await, serial(5));
}
