//! What every engine must do with what officers have agreed on.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::contract::{Factory, chip, session};
use super::*;
use crate::access::{
    AccessError, ApprovalRequest, ApprovalRules, Exceeded, IdentityRange, ProtectedAction, Quota, Refused,
    RequestError, RequestId, RequestState, SettledQuota, SignedStatement, Verdict, request, signed,
};
use crate::certificate::{Caller, Role};
use crate::names::{DeviceIdentity, StationName};

macro_rules! contract_of_access {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            contract_of_access!(@tests $factory:
                a_quota_is_never_exceeded_however_many_ask_at_once,
                the_first_configuration_is_in_force_and_more_takes_an_approval,
                an_act_is_done_with_its_last_approval_and_lasts,
                a_request_is_filed_once_and_not_without_end,
                what_a_revoked_officer_signed_is_void,
                rules_that_became_stricter_count,
                a_ceremony_is_held_once,
                an_identity_is_given_to_one_chip_for_ever,
                identities_of_sessions_and_of_others_are_passed_over);
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            $crate::store::contract_access::$test(&<$factory as $crate::store::contract::Factory>::new()).await;
        }
    )+};
}
pub(super) use contract_of_access;

fn station() -> StationName {
    session(0).station
}

fn per_hour(limit: u64) -> Quota {
    Quota { devices_per_hour: Some(limit), devices_total: None }
}

fn total(limit: u64) -> Quota {
    Quota { devices_per_hour: None, devices_total: Some(limit) }
}

fn named(n: u8, act: ProtectedAction, needed: u8) -> ApprovalRequest {
    ApprovalRequest { id: RequestId::from_bytes([n; 8]), ..request(act, needed) }
}

fn raise(quota: Quota) -> ProtectedAction {
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

pub(super) async fn a_quota_is_never_exceeded_however_many_ask_at_once(engine: &impl Factory) {
    let store = engine.state();
    store.settle(ApprovalRules::default(), vec![(station(), total(10))], true).await.unwrap();
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
    assert_eq!(store.stations().await.unwrap()[0].usage.total(), 10, "a repeat is no other device");
    drop(store);
    let store = engine.state();
    let exceeded = store.reserve(&session(50), None).await;
    assert!(matches!(exceeded, Err(ReserveError::QuotaExceeded { .. })), "also in the next life");
    let other = Session { station: "line-9/z".parse().unwrap(), ..session(51) };
    store.reserve(&other, None).await.unwrap();
}

pub(super) async fn the_first_configuration_is_in_force_and_more_takes_an_approval(engine: &impl Factory) {
    let store = engine.state();
    let (rules, other) = (ApprovalRules::default(), ApprovalRules { destroy: 2, ..ApprovalRules::default() });
    let settle = async |rules, quota, whole| store.settle(rules, vec![(station(), quota)], whole).await.unwrap();
    assert!(settle(rules, per_hour(5), true).await.is_empty());
    assert!(settle(rules, per_hour(3), true).await.is_empty(), "less is in force at once");
    let kept = settle(other, per_hour(4), true).await;
    assert!(kept.len() == 2 && kept[0].contains("approvals") && kept[1].contains("line-1/a"), "{kept:?}");
    assert_eq!(settle(rules, per_hour(4), false).await.len(), 1);
    let known = &store.stations().await.unwrap()[0];
    assert_eq!(known.quota, SettledQuota { configured: per_hour(3), in_force: per_hour(3) });
    assert_eq!(store.rules().await.unwrap().unwrap().in_force, rules);
    // The approved rules are in force, and the file may say so.
    let asked = store.file_request(named(1, ProtectedAction::ChangeRules { rules: other }, 1)).await.unwrap();
    approve(&*store, &asked, signed("o-2", 200)).await.unwrap();
    assert_eq!(store.rules().await.unwrap().unwrap().in_force, other);
    assert!(settle(other, per_hour(3), true).await.is_empty());
}

pub(super) async fn an_act_is_done_with_its_last_approval_and_lasts(engine: &impl Factory) {
    let store = engine.state();
    store.settle(ApprovalRules::default(), vec![(station(), total(1))], true).await.unwrap();
    store.reserve(&session(1), None).await.unwrap();
    let asked = store.file_request(named(1, raise(total(2)), 2)).await.unwrap();
    let once = approve(&*store, &asked, signed("o-2", 200)).await.unwrap();
    assert_eq!((once.state, once.approvals.len()), (RequestState::Pending, 1));
    assert!(store.reserve(&session(2), None).await.is_err());
    assert!(matches!(refused(approve(&*store, &asked, signed("o-1", 300)).await), RequestError::OwnRequest(_)));
    let done = approve(&*store, &asked, signed("o-3", 300)).await.unwrap();
    assert_eq!(done.state, RequestState::Done(300));
    let revocation = store.file_request(named(2, revoke(Role::Station, "line-1/a"), 1)).await.unwrap();
    approve(&*store, &revocation, signed("o-2", 400)).await.unwrap();
    drop(store);
    let store = engine.state();
    store.reserve(&session(2), None).await.unwrap();
    assert!(store.reserve(&session(3), None).await.is_err());
    assert_eq!(store.request(asked.id).await.unwrap(), Some(done));
    let revocations = store.revocations().await.unwrap();
    assert_eq!((revocations.len(), &revocations[0].caller), (1, &Caller::Station(station())));
    assert_eq!((revocations[0].at, revocations[0].request), (400, revocation.id));
}

pub(super) async fn a_request_is_filed_once_and_not_without_end(engine: &impl Factory) {
    let store = engine.state();
    let asked = store.file_request(named(1, raise(total(2)), 1)).await.unwrap();
    assert_eq!(store.file_request(asked.clone()).await.unwrap(), asked);
    let other = named(1, raise(total(3)), 1);
    assert!(matches!(refused(store.file_request(other).await), RequestError::Taken(_)));
    for n in 2..=20 {
        store.file_request(named(n, raise(total(2)), 1)).await.unwrap();
    }
    assert!(matches!(refused(store.file_request(named(21, raise(total(2)), 1)).await), RequestError::TooMany(_)));
    for n in 0..5 {
        let of_others = ApprovalRequest { requested: signed("o-7", 100), ..named(30 + n, raise(total(2)), 1) };
        store.file_request(of_others).await.unwrap();
    }
    let full = ApprovalRequest { requested: signed("o-7", 100), ..named(40, raise(total(2)), 1) };
    assert!(matches!(refused(store.file_request(full).await), RequestError::TooMany(25)));
    let revocation = ApprovalRequest { requested: signed("o-7", 100), ..named(41, revoke(Role::Officer, "o-1"), 1) };
    store.file_request(revocation).await.expect("there is always room for a revocation");
    let no = Verdict::Reject("no".to_owned());
    store.decide(asked.id, no, signed("o-1", 200)).await.unwrap();
    assert!(matches!(refused(approve(&*store, &asked, signed("o-2", 300)).await), RequestError::Decided { .. }));
    let unknown = named(200, raise(total(1)), 1);
    assert!(matches!(refused(approve(&*store, &unknown, signed("o-2", 300)).await), RequestError::Unknown(_)));
}

pub(super) async fn what_a_revoked_officer_signed_is_void(engine: &impl Factory) {
    let store = engine.state();
    let his = store.file_request(named(1, raise(total(2)), 1)).await.unwrap();
    let others = ApprovalRequest { requested: signed("o-5", 100), ..named(2, raise(total(3)), 2) };
    let others = store.file_request(others).await.unwrap();
    approve(&*store, &others, signed("o-1", 150)).await.unwrap();
    let revocation = ApprovalRequest { requested: signed("o-5", 100), ..named(3, revoke(Role::Officer, "o-1"), 1) };
    let revocation = store.file_request(revocation).await.unwrap();
    approve(&*store, &revocation, signed("o-6", 200)).await.unwrap();
    assert!(matches!(refused(approve(&*store, &his, signed("o-2", 300)).await), RequestError::Decided { .. }));
    // What was on its way when the revocation came counts no more than what is signed after it.
    assert!(matches!(refused(approve(&*store, &others, signed("o-1", 300)).await), RequestError::Revoked(_)));
    let late = store.file_request(named(4, raise(total(4)), 1)).await;
    assert!(matches!(refused(late), RequestError::Revoked(_)), "asked by o-1");
    let again = approve(&*store, &others, signed("o-2", 300)).await.unwrap();
    assert_eq!((again.state, again.approvals.len()), (RequestState::Pending, 1));
}

pub(super) async fn rules_that_became_stricter_count(engine: &impl Factory) {
    let store = engine.state();
    store.settle(ApprovalRules::default(), Vec::new(), true).await.unwrap();
    let early = store.file_request(named(1, raise(total(2)), 1)).await.unwrap();
    let stricter = ProtectedAction::ChangeRules { rules: ApprovalRules { raise_quota: 2, ..ApprovalRules::default() } };
    let change = store.file_request(named(2, stricter, 1)).await.unwrap();
    approve(&*store, &change, signed("o-2", 200)).await.unwrap();
    assert_eq!(approve(&*store, &early, signed("o-2", 300)).await.unwrap().state, RequestState::Pending);
}

pub(super) async fn a_ceremony_is_held_once(engine: &impl Factory) {
    let store = engine.state();
    let asked = store.file_request(named(1, ceremony(), 1)).await.unwrap();
    assert!(matches!(refused(store.use_up(asked.id, 150).await), RequestError::NotApproved(..)));
    approve(&*store, &asked, signed("o-2", 200)).await.unwrap();
    assert_eq!(store.use_up(asked.id, 250).await.unwrap().state, RequestState::Done(250));
    drop(store);
    assert!(matches!(refused(engine.state().use_up(asked.id, 251).await), RequestError::Decided { .. }));
}

pub(super) async fn an_identity_is_given_to_one_chip_for_ever(engine: &impl Factory) {
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
    let mut given = BTreeSet::new();
    for call in calls {
        given.insert(call.await.unwrap().unwrap().to_string());
    }
    assert_eq!(given.len(), 10, "each chip one, asked for twice at once");
    let elsewhere = allocate(30, &vec!["imei:35".to_owned()]).await.unwrap();
    assert!(matches!(elsewhere, Err(AccessError::Refused(Refused::NoIdentity { .. }))));
    drop(store);
    let store = engine.state();
    for n in 0..20 {
        given.insert(store.allocate(&chip(n), &profile, &station(), all.clone(), None, 100).await.unwrap().to_string());
    }
    assert_eq!((given.len(), store.ranges().await.unwrap()[0].used), (20, 20), "the same in the next life");
    let none = store.allocate(&chip(20), &profile, &station(), all, None, 100).await;
    assert!(matches!(none, Err(AccessError::Refused(Refused::NoIdentity { .. }))));
}

pub(super) async fn identities_of_sessions_and_of_others_are_passed_over(engine: &impl Factory) {
    let store = engine.state();
    let (profile, officer) = (session(0).profile, Caller::Officer("o-1".parse().unwrap()));
    let of = |n: u32| -> DeviceIdentity { format!("serial:SN-{n:08}").parse().unwrap() };
    store.load_range(profile.clone(), IdentityRange::new(of(1), 3000).unwrap(), &officer, 100).await.unwrap();
    for n in 1..=3 {
        store.reserve(&session(n), None).await.unwrap();
    }
    let all = vec!["serial:".to_owned()];
    let allocate =
        async |taken| store.allocate(&chip(90), &profile, &station(), all.clone(), taken, 100).await.unwrap();
    assert_eq!(allocate(None).await, of(4));
    assert_eq!(allocate(None).await, of(4));
    assert_eq!(allocate(Some(of(4))).await, of(5), "the public database knows it from another chip");
    assert_eq!(allocate(Some(of(4))).await, of(5));
    store.settle(ApprovalRules::default(), vec![(station(), total(0))], true).await.unwrap();
    let none = store.allocate(&chip(91), &profile, &station(), all.clone(), None, 100).await;
    assert!(
        matches!(none, Err(AccessError::Refused(Refused::Quota { .. }))),
        "a device that cannot be begun uses none up"
    );
    assert_eq!(allocate(None).await, of(5));
}
