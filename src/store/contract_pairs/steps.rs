//! Random sequences of steps, in the store and in the model.

use proptest::prelude::*;
use proptest::sample::Index;

use super::model::{Model, ModelSession, Pair, Place};
use super::*;

pub(in crate::store) fn any_sequence_agrees_with_the_model_and_accounts_for_every_pair<F: Factory>() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let config = spp_testkit::random::cases(12, 400);
    proptest!(config, |(steps in proptest::collection::vec(any_step(), 1..120))| {
        runtime.block_on(follow::<F>(steps));
    });
}

/// A step that somebody might take; batches, pairs and sessions are few, so that they meet.
#[derive(Debug, Clone)]
enum Step {
    /// And opened right away, mostly.
    Plan(Purpose, KeyStorage, bool),
    Batch(Index, BatchStep),
    Forget(Index),
    Add(Index, u64),
    Pooled {
        session: u64,
        pair: Index,
    },
    Made {
        session: u64,
        batch: Index,
    },
    Erase(Index),
    Abort(Index, u64),
    /// Of all pairs those whose bit is set, whether they are in the batch or not.
    Move {
        from: Index,
        to: Index,
        pairs: u64,
    },
    Destroy(Index),
    Reopen,
}

const P384: Purpose = Purpose::Pool(KeyKind::P384);
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
        2 => (plan, any::<u8>()).prop_map(|((purpose, keeping), n)| Step::Plan(purpose, keeping, n > 40)),
        6 => (index(), batch_step).prop_map(|(batch, step)| Step::Batch(batch, step)),
        2 => index().prop_map(Step::Forget),
        8 => (index(), 1..5u64).prop_map(|(batch, pairs)| Step::Add(batch, pairs)),
        10 => (session(), index()).prop_map(|(session, pair)| Step::Pooled { session, pair }),
        4 => (session(), index()).prop_map(|(session, batch)| Step::Made { session, batch }),
        4 => index().prop_map(Step::Erase),
        4 => (index(), 1000..5000u64).prop_map(|(session, at)| Step::Abort(session, at)),
        9 => (index(), index(), any::<u64>()).prop_map(|(from, to, pairs)| Step::Move { from, to, pairs }),
        2 => index().prop_map(Step::Destroy),
        1 => Just(Step::Reopen),
    ]
}

async fn follow<F: Factory>(steps: Vec<Step>) {
    let engine = F::new();
    let mut store = engine.state();
    let mut model = Model::begin(&store.batches().await.unwrap());
    let begin = PLANS.map(|(purpose, keeping)| Step::Plan(purpose, keeping, true));
    for step in begin.into_iter().chain(steps) {
        if let Step::Reopen = step {
            drop(store);
            store = engine.state();
            model.check(&*store).await;
        } else {
            take(&*store, &mut model, step).await;
        }
    }
    model.check(&*store).await;
    drop(store);
    model.check(&*engine.state()).await;
}

/// Takes a step in the store and in the model: both do it, or both refuse.
async fn take(store: &dyn PrivateStore, model: &mut Model, step: Step) {
    match step {
        Step::Plan(purpose, keeping, opened) => {
            let above = model.last / 2;
            let planned = store.plan_batch(purpose, keeping, 1000, above).await.unwrap();
            model.last += 1;
            model.batches.insert(model.last, planned.clone());
            assert_eq!((planned.number, planned.state), (model.last, BatchState::Planned));
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
        Step::Forget(batch) => {
            let over = |batch: &Batch| matches!(batch.state, BatchState::Planned | BatchState::Emptied);
            let number = model.pick(&batch, over);
            let may = model.batches.get(&number).is_none_or(over);
            let answer = store.forget_batch(number).await;
            assert_eq!(answer.is_ok(), may, "{answer:?}");
            if may {
                model.batches.remove(&number);
            }
        }
        Step::Add(batch, pairs) => add_pairs(store, model, &batch, pairs).await,
        Step::Pooled { session, pair } => reserve_pooled(store, model, session, &pair).await,
        Step::Made { session, batch } => reserve_made(store, model, session, &batch).await,
        Step::Erase(session) => {
            let Some((n, known)) = model.pick_session(&session) else { return };
            if known.session.state.name() == StateName::Reserved {
                end(store, n).await;
                model.end(n, erased(n), 2000 + n);
            }
        }
        Step::Abort(session, at) => {
            let Some((n, known)) = model.pick_session(&session) else { return };
            let (may, is) = (known.session.state == SessionState::Reserved, known.session.state == given_up(at));
            let answer = store.advance(&id(n), StateName::Reserved, given_up(at)).await;
            assert_eq!(answer.is_ok(), may || is, "{answer:?}");
            if may {
                model.end(n, given_up(at), at);
            }
        }
        Step::Move { from, to, pairs } => move_some(store, model, [&from, &to], pairs).await,
        Step::Destroy(pair) => {
            let condemned: Vec<_> = model.pairs.iter_mut().filter(|pair| pair.condemned).collect();
            if condemned.is_empty() {
                return;
            }
            let at = pair.index(condemned.len());
            let Some(pair) = condemned.into_iter().nth(at) else { return };
            let StoredKey::OnToken(token) = &pair.kept else { panic!("it is on the token") };
            store.destroyed(token).await.unwrap();
            pair.condemned = false;
        }
        Step::Reopen => {}
    }
}

async fn add_pairs(store: &dyn PrivateStore, model: &mut Model, batch: &Index, pairs: u64) {
    let number = model.pick(batch, |batch| batch.state == BatchState::Open);
    let name = name(store, number).await;
    let keeping = model.batches.get(&number).map_or(KeyStorage::Wrapped, |batch| batch.keeping);
    let purpose = model.batches.get(&number).map_or(P256, |batch| batch.purpose);
    let mut new = Vec::new();
    for _ in 0..pairs {
        let bytes = model.new_blob();
        let public = model.blobs;
        let kept = match keeping {
            KeyStorage::Wrapped => wrapped(name, bytes),
            KeyStorage::Hsm => on_token(name, public),
        };
        new.push((public, kept));
    }
    let pooled = |(public, kept): &(u64, StoredKey)| PooledPair { public_key: public_key(*public), kept: kept.clone() };
    let answer = store.add_pairs(number, new.iter().map(pooled).collect()).await;
    let Purpose::Pool(kind) = purpose else { return assert!(is_wrong(answer)) };
    assert_eq!(answer.is_ok(), model.takes_pairs(number), "{answer:?}");
    if answer.is_ok() {
        for (public, kept) in new {
            let id = model.new_id(number);
            model.pairs.push(Pair { public, id, kept, kind: Some(kind), place: Place::Ready, condemned: false });
        }
    }
}

/// A session's chip and identity, of which there are few.
fn session_of(n: u64, pair: u64) -> Session {
    Session { chip: chip(n % 17), identity: identity(n % 17), ..session_with(n, pair) }
}

async fn reserve_pooled(store: &dyn PrivateStore, model: &mut Model, n: u64, pair: &Index) {
    let pooled: Vec<_> = (0..model.pairs.len()).filter(|at| model.pairs[*at].kind.is_some()).collect();
    if pooled.is_empty() {
        return;
    }
    let at = pooled[pair.index(pooled.len())];
    let pair = model.pairs[at].clone();
    let new = session_of(n, pair.public);
    let offered = model.batches.get(&pair.id.batch).is_some_and(|batch| batch.quarantined.is_none());
    let may = model.admits(&new) && offered && pair.place == Place::Ready;
    let answer = store.reserve(&new, Some(&PairToReserve::Pooled(pair.id))).await;
    assert_eq!(answer.is_ok(), model.repeats(n, &new).unwrap_or(may), "{answer:?} for {pair:?}");
    if answer.is_ok() && model.repeats(n, &new).is_none() {
        model.pairs[at].place = Place::Held(n);
        model.sessions.insert(n, ModelSession { session: new, pair: at });
    }
}

async fn reserve_made(store: &dyn PrivateStore, model: &mut Model, n: u64, batch: &Index) {
    let open = |batch: &Batch| batch.state == BatchState::Open && batch.purpose == Purpose::Sessions;
    let number = model.pick(batch, open);
    let bytes = model.new_blob();
    let public = model.blobs;
    let new = session_of(n, public);
    let may = model.admits(&new) && model.batches.get(&number).is_some_and(open);
    let answer = store.reserve(&new, Some(&PairToReserve::Made { batch: number, blob: bytes.clone() })).await;
    assert_eq!(answer.is_ok(), model.repeats(n, &new).unwrap_or(may), "{answer:?}");
    if answer.is_ok() {
        let (id, kept) = (model.new_id(number), wrapped(name(store, number).await, bytes));
        let place = Place::Held(n);
        model.sessions.insert(n, ModelSession { session: new, pair: model.pairs.len() });
        model.pairs.push(Pair { public, id, kept, kind: None, place, condemned: false });
    }
}

async fn move_some(store: &dyn PrivateStore, model: &mut Model, [from, to]: [&Index; 2], pairs: u64) {
    let from = model.pick(from, |batch| model.in_batch(batch.number).next().is_some());
    let to = model.pick(to, |batch| model.may_move(from, batch.number));
    let chosen: Vec<_> = (0..model.pairs.len()).filter(|at| pairs >> (at % 64) & 1 == 1).collect();
    let mut moved = Vec::new();
    for at in &chosen {
        let (holder, blob) = (model.pairs[*at].holder(), model.new_blob());
        moved.push(MovedPair { holder, blob });
    }
    let answer = store.move_pairs(from, to, moved.clone()).await;
    assert_eq!(answer.is_ok(), model.may_move(from, to), "{answer:?}");
    let Ok(count) = answer else { return assert!(is_wrong(answer)) };
    let mut expected = 0;
    for (at, MovedPair { blob, .. }) in chosen.into_iter().zip(moved) {
        let pair = &model.pairs[at];
        if pair.id.batch == from && matches!(pair.place, Place::Ready | Place::Held(_)) {
            let (id, kept) = (model.new_id(to), wrapped(name(store, to).await, blob));
            model.pairs[at] = Pair { id, kept, ..model.pairs[at].clone() };
            expected += 1;
        }
    }
    assert_eq!(count, expected);
}
