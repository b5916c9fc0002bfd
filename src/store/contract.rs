//! Contract tests for the session journal of every storage engine. `session_contract!(module, Factory)` instantiates them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;
use spp_format::certificate::CertificateToSign;
use spp_format::names::{ChipId, DeviceIdentity, SessionId, StationName};
use spp_format::record::Publication;

use super::*;
use crate::hsm::StoredKey;

/// The complete state store.
pub(super) trait PrivateStore: StateStore + SecretStore + AccessStore {}
impl<S: StateStore + SecretStore + AccessStore> PrivateStore for S {}

/// A state store, initially empty except for batch 1, an open batch for sessions. Each call reopens the store; drop the previous
/// handle first.
pub(super) trait Factory: Send + Sync {
    fn new() -> Self;
    fn state(&self) -> Arc<dyn PrivateStore>;
}

macro_rules! session_contract {
    ($module:ident, $factory:ty) => {
        mod $module {
            use super::*;
            session_contract!(@tests $factory:
                reservation_stores_session_and_key,
                chip_and_identity_are_held_until_abort,
                device_public_key_is_held_until_abort,
                open_sessions_are_counted_per_station,
                session_allows_only_legal_transitions,
                repeated_step_succeeds_different_step_is_refused,
                erased_session_has_no_key,
                unfinished_sessions_are_listed_oldest_first,
                concurrent_reservations_of_a_chip_one_wins,
                large_session_roundtrips,
                acknowledged_sessions_survive_reopening);

            #[test]
            fn random_session_steps_match_model() {
                $crate::store::contract::random_session_steps_match_model::<$factory>();
            }
        }
    };
    (@tests $factory:ty: $($test:ident),+) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            $crate::store::contract::$test(&<$factory as $crate::store::contract::Factory>::new()).await;
        }
    )+};
}
pub(super) use session_contract;

pub(crate) fn chip(n: u64) -> ChipId {
    ChipId::from_bytes(&[&[0xC4; 8], n.to_be_bytes().as_slice()].concat()).unwrap()
}

pub(crate) fn identity(n: u64) -> DeviceIdentity {
    format!("serial:SN-{n:08}").parse().unwrap()
}

pub(crate) fn id(n: u64) -> SessionId {
    SessionId::from_bytes(&[[0; 8], n.to_be_bytes()].concat()).unwrap()
}

pub(super) fn session(n: u64) -> Session {
    Session {
        id: id(n),
        chip: chip(n),
        identity: identity(n),
        profile: "phone".parse().unwrap(),
        station: "line-1/a".parse().unwrap(),
        created: 1000 + n,
        expires: 5000 + n,
        public_key: Some([&[4; 83], n.to_be_bytes().as_slice()].concat()),
        own_key_pair: false,
        sealed_to: None,
        recipe: [0; 32],
        master_key: Some(MasterKeyVersion { key: "master".parse().unwrap(), version: 1 }),
        certificate: CertificateToSign::of_bytes("issuer".parse().unwrap(), n.to_be_bytes().to_vec(), vec![7; 600]),
        state: SessionState::Reserved,
    }
}

/// A certificate of these bytes.
pub(super) fn unsigned(bytes: Vec<u8>) -> CertificateToSign {
    CertificateToSign::of_bytes("issuer".parse().unwrap(), vec![1], bytes)
}

/// An on-demand pair in batch 1.
pub(super) fn key(n: u64) -> PairToReserve {
    PairToReserve::OnDemand { batch: 1, blob: blob(n) }
}

pub(super) fn blob(n: u64) -> Vec<u8> {
    n.to_be_bytes().repeat(9)
}

/// The wrapped private key of a session.
pub(super) async fn stored_blob(store: &dyn StateStore, session: &SessionId) -> Option<Vec<u8>> {
    store.stored_key(session).await.unwrap().map(|key| match key {
        StoredKey::Wrapped(wrapped) => wrapped.blob,
        StoredKey::OnToken(_) => panic!("expected a wrapped key"),
    })
}

/// Opens batch 1. Uses a separate runtime, because factories are not async.
pub(super) fn open_session_batch(store: impl SecretStore + 'static) {
    let open = async move {
        let batch = store.plan_batch(Purpose::Sessions, KeyStorage::Wrapped, 1000, 0).await.unwrap();
        assert_eq!(batch.number, 1);
        store.step_batch(1, BatchStep::Open).await.unwrap();
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    std::thread::spawn(move || runtime.block_on(open)).join().unwrap();
}

pub(super) fn issued(n: u64) -> SessionState {
    SessionState::Issued { certificate: n.to_be_bytes().repeat(80) }
}

fn publication(n: u64) -> Publication {
    Publication { index: n, record_hash: [9; 32], published: 2000 + n }
}

pub(super) fn published(n: u64) -> SessionState {
    SessionState::Published { publication: publication(n) }
}

pub(super) fn erased(n: u64) -> SessionState {
    SessionState::Erased { publication: publication(n) }
}

fn aborted() -> SessionState {
    SessionState::Aborted { at: 3000, reason: "expired".into() }
}

pub(super) async fn reservation_stores_session_and_key(engine: &impl Factory) {
    let store = engine.state();
    assert_eq!(store.session(&id(1)).await.unwrap(), None);
    store.reserve(&session(1), Some(&key(1))).await.unwrap();
    store.reserve(&session(2), None).await.unwrap();
    assert_eq!(store.session(&id(1)).await.unwrap(), Some(session(1)));
    assert_eq!(store.session_of_chip(&chip(1)).await.unwrap(), Some(session(1)));
    assert_eq!(store.session_of_identity(&identity(1)).await.unwrap(), Some(session(1)));
    assert_eq!(stored_blob(&*store, &id(1)).await, Some(blob(1)));
    assert_eq!(stored_blob(&*store, &id(2)).await, None);
}

pub(super) async fn chip_and_identity_are_held_until_abort(engine: &impl Factory) {
    let store = engine.state();
    store.reserve(&session(1), Some(&key(1))).await.unwrap();
    let same_chip = Session { chip: chip(1), ..session(2) };
    let same_identity = Session { identity: identity(1), ..session(3) };
    for (rival, on_chip) in [(&same_chip, true), (&same_identity, false)] {
        match store.reserve(rival, Some(&key(2))).await.unwrap_err() {
            ReserveError::ChipTaken(holder) if on_chip => assert_eq!(*holder, session(1)),
            ReserveError::IdentityTaken(holder) if !on_chip => assert_eq!(*holder, session(1)),
            other => panic!("{other}"),
        }
        assert_eq!(store.session(&rival.id).await.unwrap(), None);
        assert_eq!(stored_blob(&*store, &rival.id).await, None);
    }
    let aborted_session = store.advance(&id(1), StateName::Reserved, aborted()).await.unwrap();
    assert_eq!(store.session_of_chip(&chip(1)).await.unwrap(), Some(aborted_session));
    assert_eq!(store.session_of_identity(&identity(1)).await.unwrap(), None);
    assert_eq!(stored_blob(&*store, &id(1)).await, None);
    store.reserve(&same_chip, None).await.unwrap();
    store.reserve(&same_identity, None).await.unwrap();
    assert_eq!(store.session_of_chip(&chip(1)).await.unwrap(), Some(same_chip));
    assert_eq!(store.session_of_identity(&identity(1)).await.unwrap(), Some(same_identity));
}

pub(super) async fn device_public_key_is_held_until_abort(engine: &impl Factory) {
    let store = engine.state();
    // Generated here, for session 1; the device of session 2 claims the same key with a request of its own.
    store.reserve(&session(1), Some(&key(1))).await.unwrap();
    let own = |n, claimed| Session { own_key_pair: true, public_key: session(claimed).public_key, ..session(n) };
    let assert_taken = async |rival: &Session, holder: u64| {
        match store.reserve(rival, None).await.unwrap_err() {
            ReserveError::PublicKeyTaken(found) => assert_eq!(found.id, id(holder)),
            other => panic!("{other}"),
        }
        assert_eq!(store.session(&rival.id).await.unwrap(), None);
    };
    assert_taken(&own(2, 1), 1).await;
    for state in [issued(1), published(1), erased(1)] {
        store.advance(&id(1), state.name().predecessor(), state).await.unwrap();
        assert_taken(&own(2, 1), 1).await;
    }
    store.reserve(&own(3, 3), None).await.unwrap();
    store.reserve(&own(3, 3), None).await.expect("a repeated reservation");
    assert_taken(&own(4, 3), 3).await;
    store.advance(&id(3), StateName::Reserved, aborted()).await.unwrap();
    store.reserve(&own(4, 3), None).await.unwrap();
    assert_taken(&own(5, 3), 4).await;
}

pub(super) async fn open_sessions_are_counted_per_station(engine: &impl Factory) {
    let store = engine.state();
    let (one, other): (StationName, StationName) = (session(1).station, "line-2/b".parse().unwrap());
    let count = async |station| store.open_sessions(station).await.unwrap();
    assert_eq!(count(&one).await, 0);
    for n in 1..=3 {
        store.reserve(&session(n), None).await.unwrap();
        store.reserve(&session(n), None).await.expect("a repeated reservation counts once");
    }
    store.reserve(&Session { station: other.clone(), ..session(4) }, None).await.unwrap();
    assert_eq!((count(&one).await, count(&other).await), (3, 1));
    for state in [issued(1), published(1)] {
        store.advance(&id(1), state.name().predecessor(), state).await.unwrap();
        assert_eq!(count(&one).await, 3);
    }
    for _ in 0..2 {
        store.advance(&id(1), StateName::Published, erased(1)).await.unwrap();
        store.advance(&id(2), StateName::Reserved, aborted()).await.unwrap();
    }
    assert_eq!((count(&one).await, count(&other).await), (1, 1));
    drop(store);
    assert_eq!(engine.state().open_sessions(&one).await.unwrap(), 1);
}

pub(super) async fn session_allows_only_legal_transitions(engine: &impl Factory) {
    let store = engine.state();
    let refused = |result: Result<Session, StoreError>| matches!(result, Err(StoreError::WrongState { .. }));
    assert!(matches!(store.advance(&id(1), StateName::Reserved, issued(1)).await, Err(StoreError::Damaged { .. })));
    store.reserve(&session(1), Some(&key(1))).await.unwrap();
    let transitions =
        [(StateName::Reserved, issued(1)), (StateName::Issued, published(1)), (StateName::Published, erased(1))];
    for (index, (from, to)) in transitions.iter().enumerate() {
        for (_, later) in &transitions[index + 1..] {
            assert!(refused(store.advance(&id(1), *from, later.clone()).await), "{from:?} to {later:?}");
        }
        assert!(refused(store.advance(&id(1), *from, SessionState::Reserved).await) || *from == StateName::Reserved);
        assert_eq!(store.advance(&id(1), *from, to.clone()).await.unwrap().state, *to);
    }
    for from in [StateName::Published, StateName::Erased, StateName::Issued, StateName::Reserved] {
        assert!(refused(store.advance(&id(1), from, aborted()).await), "abort from {from:?}");
    }
    assert_eq!(store.counts().await.unwrap(), SessionCounts { erased: 1, ..SessionCounts::default() });
}

pub(super) async fn repeated_step_succeeds_different_step_is_refused(engine: &impl Factory) {
    let store = engine.state();
    for _ in 0..2 {
        store.reserve(&session(1), Some(&key(1))).await.unwrap();
    }
    assert!(store.reserve(&session(1), Some(&key(2))).await.is_err(), "another key for the same session");
    for _ in 0..2 {
        assert_eq!(store.advance(&id(1), StateName::Reserved, issued(1)).await.unwrap().state, issued(1));
    }
    let other = store.advance(&id(1), StateName::Reserved, issued(2)).await;
    assert!(matches!(other, Err(StoreError::WrongState { found: StateName::Issued, .. })), "{other:?}");
    let late = store.reserve(&session(1), Some(&key(1))).await;
    assert!(matches!(late, Err(ReserveError::Store(StoreError::WrongState { .. }))), "{late:?}");
    assert_eq!(store.counts().await.unwrap(), SessionCounts { issued: 1, ..SessionCounts::default() });
    for _ in 0..2 {
        assert_eq!(store.advance(&id(1), StateName::Issued, published(1)).await.unwrap().state, published(1));
    }
    let other = store.advance(&id(1), StateName::Issued, published(2)).await;
    assert!(matches!(other, Err(StoreError::WrongState { found: StateName::Published, .. })), "{other:?}");
}

pub(super) async fn erased_session_has_no_key(engine: &impl Factory) {
    let store = engine.state();
    finish(&*store, 1).await;
    assert_eq!(stored_blob(&*store, &id(1)).await, None);
    drop(store);
    assert_eq!(stored_blob(&*engine.state(), &id(1)).await, None);
}

pub(super) async fn finish(store: &dyn StateStore, n: u64) {
    store.reserve(&session(n), Some(&key(n))).await.unwrap();
    store.advance(&id(n), StateName::Reserved, issued(n)).await.unwrap();
    store.advance(&id(n), StateName::Issued, published(n)).await.unwrap();
    assert_eq!(stored_blob(store, &id(n)).await, Some(blob(n)), "the key must stay until erasure");
    store.advance(&id(n), StateName::Published, erased(n)).await.unwrap();
}

pub(super) async fn unfinished_sessions_are_listed_oldest_first(engine: &impl Factory) {
    let store = engine.state();
    for n in [5, 2, 9, 7, 1] {
        store.reserve(&Session { created: 300 - n, ..session(n) }, None).await.unwrap();
    }
    store.advance(&id(7), StateName::Reserved, aborted()).await.unwrap();
    store.advance(&id(2), StateName::Reserved, issued(2)).await.unwrap();
    let listed: Vec<_> = store.unfinished().await.unwrap().into_iter().map(|s| s.id).collect();
    assert_eq!(listed, [9, 5, 2, 1].map(id));
}

pub(super) async fn concurrent_reservations_of_a_chip_one_wins(engine: &impl Factory) {
    let store = engine.state();
    let rivals: Vec<_> = (0..64)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.reserve(&Session { chip: chip(1), ..session(n) }, Some(&key(n))).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (n, rival) in (0..).zip(rivals) {
        match rival.await.unwrap() {
            Ok(()) => winners.push(n),
            Err(error) => assert!(matches!(error, ReserveError::ChipTaken(_)), "{error}"),
        }
    }
    assert_eq!(winners.len(), 1);
    assert_eq!(store.session_of_chip(&chip(1)).await.unwrap().unwrap().id, id(winners[0]));
    assert_eq!(store.counts().await.unwrap(), SessionCounts { reserved: 1, ..SessionCounts::default() });
}

pub(super) async fn large_session_roundtrips(engine: &impl Factory) {
    let store = engine.state();
    let bytes: Vec<u8> = (0..60_000u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut large = session(1);
    large.certificate = unsigned(bytes.clone());
    store.reserve(&large, None).await.unwrap();
    assert_eq!(store.session(&id(1)).await.unwrap(), Some(large));
    let to = SessionState::Issued { certificate: bytes };
    let issued = store.advance(&id(1), StateName::Reserved, to).await.unwrap();
    assert_eq!(store.session(&id(1)).await.unwrap(), Some(issued));
}

pub(super) async fn acknowledged_sessions_survive_reopening(engine: &impl Factory) {
    let store = engine.state();
    for n in 0..50 {
        store.reserve(&session(n), Some(&key(n))).await.unwrap();
    }
    drop(store);
    let store = engine.state();
    for n in 0..50 {
        assert_eq!(store.session(&id(n)).await.unwrap(), Some(session(n)));
        assert_eq!(stored_blob(&*store, &id(n)).await, Some(blob(n)));
    }
    assert_eq!(store.counts().await.unwrap(), SessionCounts { reserved: 50, ..SessionCounts::default() });
}

/// A random call. Few chips, identities and sessions exist, so that calls conflict.
#[derive(Debug, Clone)]
enum Step {
    Reserve { session: u64, chip: u64, identity: u64 },
    Advance { session: Index, from: Index, to: Index },
    Reopen,
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..12u64, 0..5u64, 0..5u64).prop_map(|(session, chip, identity)| Step::Reserve { session, chip, identity }),
        16 => (any::<Index>(), any::<Index>(), any::<Index>())
            .prop_map(|(session, from, to)| Step::Advance { session, from, to }),
        1 => Just(Step::Reopen),
    ]
}

const STATES: [StateName; 5] =
    [StateName::Reserved, StateName::Issued, StateName::Published, StateName::Erased, StateName::Aborted];

fn state(name: StateName, n: u64) -> SessionState {
    match name {
        StateName::Reserved => SessionState::Reserved,
        StateName::Issued => issued(n),
        StateName::Published => published(n),
        StateName::Erased => erased(n),
        StateName::Aborted => aborted(),
    }
}

/// Reference model: all sessions in the order of their reservation.
#[derive(Default)]
struct Model(Vec<(u64, Session)>);

impl Model {
    fn reserve(&mut self, n: u64, new: &Session) -> bool {
        if let Some((_, known)) = self.0.iter().find(|(known, _)| *known == n) {
            return known == new;
        }
        let taken = |known: &Session| {
            known.state.name() != StateName::Aborted && (known.chip == new.chip || known.identity == new.identity)
        };
        if self.0.iter().any(|(_, known)| taken(known)) {
            return false;
        }
        self.0.push((n, new.clone()));
        true
    }

    fn advance(&mut self, index: usize, from: StateName, to: &SessionState) -> bool {
        let session = &mut self.0[index].1;
        let legal = session.state.name() == from && from.can_advance_to(to.name());
        if legal {
            session.state = to.clone();
        }
        legal || session.state == *to
    }

    async fn check(&self, store: &dyn StateStore) {
        let mut counts = SessionCounts::default();
        let (mut chips, mut identities) = (HashMap::new(), HashMap::new());
        for (n, session) in &self.0 {
            *counts.count_mut(session.state.name()) += 1;
            chips.insert(session.chip.clone(), session);
            if session.state.name() != StateName::Aborted {
                identities.insert(session.identity.clone(), session);
            }
            assert_eq!(store.session(&session.id).await.unwrap().as_ref(), Some(session));
            let held = (!session.state.is_final()).then(|| blob(*n));
            assert_eq!(stored_blob(store, &session.id).await, held);
        }
        assert_eq!(store.counts().await.unwrap(), counts);
        for n in 0..5 {
            assert_eq!(store.session_of_chip(&chip(n)).await.unwrap().as_ref(), chips.get(&chip(n)).copied());
            let holder = store.session_of_identity(&identity(n)).await.unwrap();
            assert_eq!(holder.as_ref(), identities.get(&identity(n)).copied());
        }
        let open: BTreeMap<_, _> = self
            .0
            .iter()
            .filter(|(_, session)| !session.state.is_final())
            .map(|(_, session)| ((session.created, session.id), session.clone()))
            .collect();
        assert_eq!(store.unfinished().await.unwrap(), open.into_values().collect::<Vec<_>>());
    }
}

pub(super) fn random_session_steps_match_model<F: Factory>() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let config = spp_testkit::random::cases(12, 400);
    proptest!(config, |(steps in proptest::collection::vec(any_step(), 1..50))| {
        runtime.block_on(run_steps::<F>(steps));
    });
}

async fn run_steps<F: Factory>(steps: Vec<Step>) {
    let (engine, mut model) = (F::new(), Model::default());
    let mut store = engine.state();
    for step in steps {
        match step {
            Step::Reserve { session: n, chip: c, identity: i } => {
                let new = Session { chip: chip(c), identity: identity(i), ..session(n) };
                let answer = store.reserve(&new, Some(&key(n))).await;
                assert_eq!(answer.is_ok(), model.reserve(n, &new), "{answer:?}");
            }
            Step::Advance { session, from, to } if !model.0.is_empty() => {
                let index = session.index(model.0.len());
                let (from, to) = (*from.get(&STATES), state(*to.get(&STATES), model.0[index].0));
                let answer = store.advance(&model.0[index].1.id.clone(), from, to.clone()).await;
                assert_eq!(answer.is_ok(), model.advance(index, from, &to), "{answer:?}");
            }
            Step::Advance { .. } => {}
            Step::Reopen => {
                drop(store);
                store = engine.state();
            }
        }
    }
    model.check(&*store).await;
    drop(store);
    model.check(&*engine.state()).await;
}
