//! Reference model of the secret store: a list of pairs, each in exactly one state.

use std::collections::{BTreeMap, BTreeSet};

use proptest::sample::Index;
use spp_format::names::SessionId;

use super::*;

/// The state of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PairState {
    Ready,
    Reserved(u64),
    Erased,
    Discarded,
}

#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) public: u64,
    /// Its current or last pair ID.
    pub(super) id: PairId,
    /// The private key as stored.
    pub(super) private_key: StoredKey,
    /// Key kind of a pooled pair; `None` for an on-demand pair.
    pub(super) kind: Option<KeyType>,
    pub(super) state: PairState,
    /// Erased or discarded in the store, but still on the token.
    pub(super) to_destroy: bool,
}

pub(super) struct ModelSession {
    pub(super) session: Session,
    pub(super) pair: usize,
}

#[derive(Default)]
pub(super) struct Model {
    pub(super) batches: BTreeMap<u64, Batch>,
    pub(super) pairs: Vec<Pair>,
    pub(super) sessions: BTreeMap<u64, ModelSession>,
    pub(super) last_batch: u64,
    pub(super) blobs: u64,
}

impl Model {
    pub(super) fn new(store: &[Batch]) -> Self {
        let batches = store.iter().map(|batch| (batch.number, batch.clone())).collect();
        Self { batches, last_batch: 1, ..Self::default() }
    }

    /// Picks a batch number: usually one that fits, sometimes any batch, occasionally a missing one.
    pub(super) fn pick(&self, index: &Index, fits: impl Fn(&Batch) -> bool) -> u64 {
        let fitting = self.batches.values().filter(|batch| fits(batch)).flat_map(|batch| [batch.number; 5]);
        let numbers: Vec<_> = fitting.chain(self.batches.keys().copied()).chain([self.last_batch + 7]).collect();
        numbers[index.index(numbers.len())]
    }

    pub(super) fn pick_session(&self, index: &Index) -> Option<(u64, &ModelSession)> {
        let position = index.index(self.sessions.len().max(1));
        self.sessions.iter().nth(position).map(|(n, known)| (*n, known))
    }

    pub(super) fn in_batch(&self, number: u64) -> impl Iterator<Item = &Pair> {
        let is_stored = |pair: &&Pair| matches!(pair.state, PairState::Ready | PairState::Reserved(_));
        self.pairs.iter().filter(is_stored).filter(move |pair| pair.id.batch == number)
    }

    /// The batch, with counters computed from its pairs.
    pub(super) fn batch(&self, number: u64) -> Batch {
        let ready = self.in_batch(number).filter(|pair| pair.state == PairState::Ready).count() as u64;
        let reserved = self.in_batch(number).count() as u64 - ready;
        Batch { ready, reserved, ..self.batches[&number].clone() }
    }

    pub(super) fn accepts_pairs(&self, number: u64) -> bool {
        self.batches.get(&number).is_some_and(|batch| batch.state == BatchState::Open && batch.quarantined.is_none())
    }

    pub(super) fn new_blob(&mut self) -> Vec<u8> {
        self.blobs += 1;
        blob(self.blobs)
    }

    pub(super) fn new_id(&mut self, number: u64) -> PairId {
        let batch = self.batches.get_mut(&number).unwrap();
        batch.pairs_added += 1;
        PairId { batch: number, number: batch.pairs_added - 1 }
    }

    pub(super) fn step(&mut self, number: u64, step: &BatchStep) -> bool {
        use BatchState::{Emptied, Open, Planned, Sealed};
        let Some(batch) = self.batches.get(&number) else { return false };
        let has_pairs = self.in_batch(number).next().is_some()
            || self.pairs.iter().any(|pair| pair.to_destroy && pair.id.batch == number);
        let state = match (step, batch.state) {
            (BatchStep::Open, Planned | Open) => Open,
            (BatchStep::Seal, Open | Sealed) => Sealed,
            (BatchStep::Empty, Open | Sealed) if !has_pairs => Emptied,
            (BatchStep::Empty, Emptied) => Emptied,
            (BatchStep::Quarantine(_) | BatchStep::Discard, Open | Sealed) => batch.state,
            _ => return false,
        };
        let batch = self.batches.get_mut(&number).unwrap();
        batch.state = state;
        if let BatchStep::Quarantine(reason) = step {
            batch.quarantined.get_or_insert(reason.clone());
        }
        if *step == BatchStep::Discard {
            for pair in self.pairs.iter_mut().filter(|p| p.id.batch == number && p.state == PairState::Ready) {
                (pair.state, pair.to_destroy) =
                    (PairState::Discarded, matches!(pair.private_key, StoredKey::OnToken(_)));
            }
        }
        true
    }

    /// Reports whether chip and identity of a new session are free.
    pub(super) fn admits(&self, new: &Session) -> bool {
        let taken =
            |known: &ModelSession| known.session.chip == new.chip && known.session.state.name() != StateName::Aborted;
        !self.sessions.values().any(taken)
    }

    /// Reports whether the call repeats an earlier reservation; `None` if the session does not exist.
    pub(super) fn repeats(&self, n: u64, new: &Session) -> Option<bool> {
        self.sessions.get(&n).map(|known| known.session == *new)
    }

    pub(super) fn finish_session(&mut self, n: u64, state: SessionState, at: u64) {
        let known = self.sessions.get_mut(&n).unwrap();
        known.session.state = state;
        let pair = &mut self.pairs[known.pair];
        pair.state = PairState::Erased;
        pair.to_destroy = matches!(pair.private_key, StoredKey::OnToken(_));
        if !pair.to_destroy {
            let since = &mut self.batches.get_mut(&pair.id.batch).unwrap().first_erased;
            *since = Some(since.map_or(at, |since| since.min(at)));
        }
    }

    pub(super) fn may_move(&self, from: u64, to: u64) -> bool {
        let (Some(source), Some(target)) = (self.batches.get(&from), self.batches.get(&to)) else { return false };
        let wrapped = [source, target].iter().all(|batch| batch.storage == KeyStorage::Wrapped);
        from != to && wrapped && source.purpose == target.purpose && self.accepts_pairs(to)
    }

    pub(super) async fn check(&self, store: &dyn PrivateStore) {
        assert_eq!(store.origin().await.unwrap().1, self.last_batch);
        let batches: Vec<_> = self.batches.keys().map(|number| self.batch(*number)).collect();
        assert_eq!(store.batches().await.unwrap(), batches);
        for batch in &batches {
            let mut expected: Vec<_> = self.in_batch(batch.number).map(Pair::in_batch).collect();
            let mut found = store.pairs_of_batch(batch.number, ALL).await.unwrap();
            expected.sort_by_key(by_assignment);
            found.sort_by_key(by_assignment);
            assert_eq!(found, expected, "each pair once, with its latest blob");
        }
        for (n, known) in &self.sessions {
            let pair = &self.pairs[known.pair];
            assert_eq!(store.session(&id(*n)).await.unwrap().as_ref(), Some(&known.session));
            assert_eq!(pair.state == PairState::Reserved(*n), !known.session.state.is_final());
            let expected = (pair.state == PairState::Reserved(*n)).then_some(&pair.private_key);
            assert_eq!(store.stored_key(&id(*n)).await.unwrap().as_ref(), expected);
        }
        for kind in [KeyType::P256, KeyType::P384] {
            self.check_kind(store, kind).await;
        }
        let to_destroy = |pair: &Pair| match &pair.private_key {
            StoredKey::OnToken(token) if pair.to_destroy => Some((pair.kind.unwrap().name(), token.clone())),
            _ => None,
        };
        let expected: BTreeSet<_> = self.pairs.iter().filter_map(to_destroy).collect();
        let found = store.pairs_to_destroy(ALL).await.unwrap();
        assert_eq!(found.into_iter().map(|pair| (pair.kind.name(), pair.pair)).collect::<BTreeSet<_>>(), expected);
    }

    async fn check_kind(&self, store: &dyn PrivateStore, kind: KeyType) {
        let offered = |pair: &&Pair| {
            let batch = &self.batches[&pair.id.batch];
            pair.kind == Some(kind) && pair.state == PairState::Ready && batch.quarantined.is_none()
        };
        let live = self.pairs.iter().filter(|pair| self.batches.contains_key(&pair.id.batch));
        let mut expected: Vec<_> = live.filter(offered).map(Pair::pooled).collect();
        expected.sort_by_key(|(id, _)| *id);
        assert_eq!(store.ready_pairs(kind, None, ALL).await.unwrap(), expected);

        // Every pair is ready, reserved, erased or discarded.
        let count = |fits: &dyn Fn(&PairState) -> bool| {
            self.pairs.iter().filter(|pair| pair.kind == Some(kind) && fits(&pair.state)).count() as u64
        };
        let found = store.pair_counts(kind).await.unwrap();
        let ready_now: u64 =
            store.batches().await.unwrap().iter().filter(|b| b.purpose == Purpose::Pool(kind)).map(|b| b.ready).sum();
        assert_eq!(found.made, ready_now + found.reserved + found.discarded);
        assert_eq!(ready_now, count(&|state| *state == PairState::Ready));
        assert_eq!(found.reserved, count(&|state| matches!(state, PairState::Reserved(_) | PairState::Erased)));
        assert_eq!(found.discarded, count(&|state| *state == PairState::Discarded));
    }
}

impl Pair {
    pub(super) fn assignment(&self) -> PairAssignment {
        match self.state {
            PairState::Reserved(n) => PairAssignment::Session(id(n)),
            _ => PairAssignment::Ready(self.id),
        }
    }

    pub(super) fn pooled(&self) -> (PairId, PooledPair) {
        (self.id, PooledPair { public_key: public_key(self.public), private_key: self.private_key.clone() })
    }

    pub(super) fn in_batch(&self) -> BatchPair {
        BatchPair {
            assignment: self.assignment(),
            public_key: public_key(self.public),
            private_key: self.private_key.clone(),
        }
    }
}

fn by_assignment(pair: &BatchPair) -> (Option<SessionId>, Option<PairId>) {
    match pair.assignment {
        PairAssignment::Session(id) => (Some(id), None),
        PairAssignment::Ready(id) => (None, Some(id)),
    }
}
