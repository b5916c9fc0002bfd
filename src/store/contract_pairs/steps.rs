//! Random sequences of calls on the store and the reference model.

use proptest::prelude::*;
use proptest::sample::Index;

use super::model::{Model, ModelSession, Pair, PairState};
use super::*;

pub(in crate::store) fn random_pair_steps_match_model<F: Factory>() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let config = spp_testkit::random::cases(12, 400);
    proptest!(config, |(steps in proptest::collection::vec(any_step(), 1..120))| {
        runtime.block_on(run_steps::<F>(steps));
    });
}

/// A random call. Few batches, pairs and sessions exist, so that calls conflict.
#[derive(Debug, Clone)]
enum Step {
    /// Plans a batch; the flag opens it immediately.
    Plan(Purpose, KeyStorage, bool),
    Batch(Index, BatchStep),
    Delete(Index),
    Add(Index, u64),
    Pooled {
        session: u64,
        pair: Index,
    },
    OnDemand {
        session: u64,
        batch: Index,
    },
    Erase(Index),
    Abort(Index, u64),
    /// Moves the pairs whose bit is set, whether they are in the batch or not.
    Move {
        from: Index,
        to: Index,
        pairs: u64,
    },
    Destroy(Index),
    Reopen,
}

const P384: Purpose = Purpose::Pool(KeyType::P384);
const PLANS: [(Purpose, KeyStorage); 6] = [
    (P256, KeyStorage::Wrapped),
    (P256, KeyStorage::Wrapped),
    (P256, KeyStorage::Hsm),
    (Purpose::Sessions, KeyStorage::Wrapped),
    (P384, KeyStorage::Wrapped),
    (P384, KeyStorage::Hsm),
];

fn any_step() -> impl Strategy<Value = Step> {
    let index = any::<Index>;
    let plan = proptest::sample::select(PLANS.as_slice());
    let batch_step = prop_oneof![
        2 => Just(BatchStep::Open),
        2 => Just(BatchStep::Seal),
        3 => Just(BatchStep::Empty),
        1 => "[a-z]{3}".prop_map(BatchStep::Quarantine),
        1 => Just(BatchStep::Discard),
    ];
    let session = || 0..40u64;
    prop_oneof![
        2 => (plan, any::<u8>()).prop_map(|((purpose, storage), n)| Step::Plan(purpose, storage, n > 40)),
        6 => (index(), batch_step).prop_map(|(batch, step)| Step::Batch(batch, step)),
        2 => index().prop_map(Step::Delete),
        8 => (index(), 1..5u64).prop_map(|(batch, pairs)| Step::Add(batch, pairs)),
        10 => (session(), index()).prop_map(|(session, pair)| Step::Pooled { session, pair }),
        4 => (session(), index()).prop_map(|(session, batch)| Step::OnDemand { session, batch }),
        4 => index().prop_map(Step::Erase),
        4 => (index(), 1000..5000u64).prop_map(|(session, at)| Step::Abort(session, at)),
        9 => (index(), index(), any::<u64>()).prop_map(|(from, to, pairs)| Step::Move { from, to, pairs }),
        2 => index().prop_map(Step::Destroy),
        1 => Just(Step::Reopen),
    ]
}

async fn run_steps<F: Factory>(steps: Vec<Step>) {
    let engine = F::new();
    let mut store = engine.state();
    let mut model = Model::new(&store.batches().await.unwrap());
    let setup = PLANS.map(|(purpose, storage)| Step::Plan(purpose, storage, true));
    for step in setup.into_iter().chain(steps) {
        if let Step::Reopen = step {
            drop(store);
            store = engine.state();
            model.check(&*store).await;
        } else {
            run_step(&*store, &mut model, step).await;
        }
    }
    model.check(&*store).await;
    drop(store);
    model.check(&*engine.state()).await;
}

/// Runs a call on the store and the model: both must accept or both must refuse it.
async fn run_step(store: &dyn PrivateStore, model: &mut Model, step: Step) {
    match step {
        Step::Plan(purpose, storage, opened) => {
            let above = model.last_batch / 2;
            let planned = store.plan_batch(purpose, storage, 1000, above).await.unwrap();
            model.last_batch += 1;
            model.batches.insert(model.last_batch, planned.clone());
            assert_eq!((planned.number, planned.state), (model.last_batch, BatchState::Planned));
            if opened {
                store.step_batch(planned.number, BatchStep::Open).await.unwrap();
                assert!(model.step(planned.number, &BatchStep::Open));
            }
        }
        Step::Batch(batch, step) => {
            let number = model.pick(&batch, |_| false);
            let answer = store.step_batch(number, step.clone()).await;
            assert_eq!(answer.is_ok(), model.step(number, &step), "{step:?}: {answer:?}");
            if let Ok(batch) = answer {
                assert_eq!(batch, model.batch(number));
            }
        }
        Step::Delete(batch) => {
            let is_deletable = |batch: &Batch| matches!(batch.state, BatchState::Planned | BatchState::Emptied);
            let number = model.pick(&batch, is_deletable);
            let may = model.batches.get(&number).is_none_or(is_deletable);
            let answer = store.delete_batch(number).await;
            assert_eq!(answer.is_ok(), may, "{answer:?}");
            if may {
                model.batches.remove(&number);
            }
        }
        Step::Add(batch, pairs) => add_pairs(store, model, &batch, pairs).await,
        Step::Pooled { session, pair } => reserve_pooled(store, model, session, &pair).await,
        Step::OnDemand { session, batch } => reserve_made(store, model, session, &batch).await,
        Step::Erase(session) => {
            let Some((n, known)) = model.pick_session(&session) else { return };
            if known.session.state.name() == StateName::Reserved {
                erase_session(store, n).await;
                model.finish_session(n, erased(n), 2000 + n);
            }
        }
        Step::Abort(session, at) => {
            let Some((n, known)) = model.pick_session(&session) else { return };
            let (is_reserved, is_repeat) =
                (known.session.state == SessionState::Reserved, known.session.state == aborted_at(at));
            let answer = store.advance(&id(n), StateName::Reserved, aborted_at(at)).await;
            assert_eq!(answer.is_ok(), is_reserved || is_repeat, "{answer:?}");
            if is_reserved {
                model.finish_session(n, aborted_at(at), at);
            }
        }
        Step::Move { from, to, pairs } => move_random_pairs(store, model, [&from, &to], pairs).await,
        Step::Destroy(pair) => {
            let to_destroy: Vec<_> = model.pairs.iter_mut().filter(|pair| pair.to_destroy).collect();
            if to_destroy.is_empty() {
                return;
            }
            let position = pair.index(to_destroy.len());
            let Some(pair) = to_destroy.into_iter().nth(position) else { return };
            let StoredKey::OnToken(token) = &pair.private_key else { panic!("expected a token pair") };
            store.confirm_destroyed(token).await.unwrap();
            pair.to_destroy = false;
        }
        Step::Reopen => {}
    }
}

async fn add_pairs(store: &dyn PrivateStore, model: &mut Model, batch: &Index, pairs: u64) {
    let number = model.pick(batch, |batch| batch.state == BatchState::Open);
    let name = name(store, number).await;
    let storage = model.batches.get(&number).map_or(KeyStorage::Wrapped, |batch| batch.storage);
    let purpose = model.batches.get(&number).map_or(P256, |batch| batch.purpose);
    let mut new = Vec::new();
    for _ in 0..pairs {
        let bytes = model.new_blob();
        let public = model.blobs;
        let private_key = match storage {
            KeyStorage::Wrapped => wrapped(name, bytes),
            KeyStorage::Hsm => on_token(name, public),
        };
        new.push((public, private_key));
    }
    let pooled = |(public, private_key): &(u64, StoredKey)| PooledPair {
        public_key: public_key(*public),
        private_key: private_key.clone(),
    };
    let answer = store.add_pairs(number, new.iter().map(pooled).collect()).await;
    let Purpose::Pool(kind) = purpose else { return assert!(is_wrong_batch(answer)) };
    assert_eq!(answer.is_ok(), model.accepts_pairs(number), "{answer:?}");
    if answer.is_ok() {
        for (public, private_key) in new {
            let id = model.new_id(number);
            let state = PairState::Ready;
            model.pairs.push(Pair { public, id, private_key, kind: Some(kind), state, to_destroy: false });
        }
    }
}

/// A session with one of a few chips and identities.
fn session_of(n: u64, pair: u64) -> Session {
    Session { chip: chip(n % 17), identity: identity(n % 17), ..session_with(n, pair) }
}

async fn reserve_pooled(store: &dyn PrivateStore, model: &mut Model, n: u64, pair: &Index) {
    let pooled: Vec<_> = (0..model.pairs.len()).filter(|index| model.pairs[*index].kind.is_some()).collect();
    if pooled.is_empty() {
        return;
    }
    let index = pooled[pair.index(pooled.len())];
    let pair = model.pairs[index].clone();
    let new = session_of(n, pair.public);
    let offered = model.batches.get(&pair.id.batch).is_some_and(|batch| batch.quarantined.is_none());
    let may = model.admits(&new) && offered && pair.state == PairState::Ready;
    let answer = store.reserve(&new, Some(&PairToReserve::Pooled(pair.id))).await;
    assert_eq!(answer.is_ok(), model.repeats(n, &new).unwrap_or(may), "{answer:?} for {pair:?}");
    if answer.is_ok() && model.repeats(n, &new).is_none() {
        model.pairs[index].state = PairState::Reserved(n);
        model.sessions.insert(n, ModelSession { session: new, pair: index });
    }
}

async fn reserve_made(store: &dyn PrivateStore, model: &mut Model, n: u64, batch: &Index) {
    let open = |batch: &Batch| batch.state == BatchState::Open && batch.purpose == Purpose::Sessions;
    let number = model.pick(batch, open);
    let bytes = model.new_blob();
    let public = model.blobs;
    let new = session_of(n, public);
    let may = model.admits(&new) && model.batches.get(&number).is_some_and(open);
    let answer = store.reserve(&new, Some(&PairToReserve::OnDemand { batch: number, blob: bytes.clone() })).await;
    assert_eq!(answer.is_ok(), model.repeats(n, &new).unwrap_or(may), "{answer:?}");
    if answer.is_ok() {
        let (id, private_key) = (model.new_id(number), wrapped(name(store, number).await, bytes));
        let state = PairState::Reserved(n);
        model.sessions.insert(n, ModelSession { session: new, pair: model.pairs.len() });
        model.pairs.push(Pair { public, id, private_key, kind: None, state, to_destroy: false });
    }
}

async fn move_random_pairs(store: &dyn PrivateStore, model: &mut Model, [from, to]: [&Index; 2], pairs: u64) {
    let from = model.pick(from, |batch| model.in_batch(batch.number).next().is_some());
    let to = model.pick(to, |batch| model.may_move(from, batch.number));
    let chosen: Vec<_> = (0..model.pairs.len()).filter(|index| pairs >> (index % 64) & 1 == 1).collect();
    let mut moved = Vec::new();
    for index in &chosen {
        let (assignment, blob) = (model.pairs[*index].assignment(), model.new_blob());
        moved.push(RewrappedPair { assignment, blob });
    }
    let answer = store.move_pairs(from, to, moved.clone()).await;
    assert_eq!(answer.is_ok(), model.may_move(from, to), "{answer:?}");
    let Ok(count) = answer else { return assert!(is_wrong_batch(answer)) };
    let mut expected = 0;
    for (index, RewrappedPair { blob, .. }) in chosen.into_iter().zip(moved) {
        let pair = &model.pairs[index];
        if pair.id.batch == from && matches!(pair.state, PairState::Ready | PairState::Reserved(_)) {
            let (id, private_key) = (model.new_id(to), wrapped(name(store, to).await, blob));
            model.pairs[index] = Pair { id, private_key, ..model.pairs[index].clone() };
            expected += 1;
        }
    }
    assert_eq!(count, expected);
}
