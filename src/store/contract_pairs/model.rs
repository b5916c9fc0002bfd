//! The rules in the simplest words: all pairs in a list, each in one place.

use std::collections::{BTreeMap, BTreeSet};

use proptest::sample::Index;

use super::*;
use crate::names::SessionId;

/// Where a pair is: in one of these places, never in two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Ready,
    Held(u64),
    Erased,
    Discarded,
}

#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) public: u64,
    /// Where it is, or was last, in a pool.
    pub(super) id: PairId,
    /// As it is known to whoever holds it.
    pub(super) kept: StoredKey,
    /// Made in advance, of this kind.
    pub(super) kind: Option<KeyKind>,
    pub(super) place: Place,
    /// Still on the token, though erased or discarded here.
    pub(super) condemned: bool,
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
    pub(super) last: u64,
    pub(super) blobs: u64,
}

impl Model {
    pub(super) fn begin(store: &[Batch]) -> Self {
        let batches = store.iter().map(|batch| (batch.number, batch.clone())).collect();
        Self { batches, last: 1, ..Self::default() }
    }

    /// Any batch, one that fits most of the time, one that is not there now and then.
    pub(super) fn pick(&self, index: &Index, fits: impl Fn(&Batch) -> bool) -> u64 {
        let fitting = self.batches.values().filter(|batch| fits(batch)).flat_map(|batch| [batch.number; 5]);
        let numbers: Vec<_> = fitting.chain(self.batches.keys().copied()).chain([self.last + 7]).collect();
        numbers[index.index(numbers.len())]
    }

    pub(super) fn pick_session(&self, index: &Index) -> Option<(u64, &ModelSession)> {
        let at = index.index(self.sessions.len().max(1));
        self.sessions.iter().nth(at).map(|(n, known)| (*n, known))
    }

    pub(super) fn in_batch(&self, number: u64) -> impl Iterator<Item = &Pair> {
        let lives = |pair: &&Pair| matches!(pair.place, Place::Ready | Place::Held(_));
        self.pairs.iter().filter(lives).filter(move |pair| pair.id.batch == number)
    }

    /// The batch with its counters, which are nothing but what can be counted.
    pub(super) fn batch(&self, number: u64) -> Batch {
        let ready = self.in_batch(number).filter(|pair| pair.place == Place::Ready).count() as u64;
        let reserved = self.in_batch(number).count() as u64 - ready;
        Batch { ready, reserved, ..self.batches[&number].clone() }
    }

    pub(super) fn takes_pairs(&self, number: u64) -> bool {
        self.batches.get(&number).is_some_and(|batch| batch.state == BatchState::Open && batch.quarantined.is_none())
    }

    pub(super) fn new_blob(&mut self) -> Vec<u8> {
        self.blobs += 1;
        blob(self.blobs)
    }

    pub(super) fn new_id(&mut self, number: u64) -> PairId {
        let batch = self.batches.get_mut(&number).unwrap();
        batch.taken_in += 1;
        PairId { batch: number, number: batch.taken_in - 1 }
    }

    pub(super) fn step(&mut self, number: u64, step: &BatchStep) -> bool {
        use BatchState::{Emptied, Open, Planned, Sealed};
        let Some(batch) = self.batches.get(&number) else { return false };
        let left = self.in_batch(number).next().is_some()
            || self.pairs.iter().any(|pair| pair.condemned && pair.id.batch == number);
        let state = match (step, batch.state) {
            (BatchStep::Open, Planned | Open) => Open,
            (BatchStep::Seal, Open | Sealed) => Sealed,
            (BatchStep::Empty, Open | Sealed) if !left => Emptied,
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
            for pair in self.pairs.iter_mut().filter(|p| p.id.batch == number && p.place == Place::Ready) {
                (pair.place, pair.condemned) = (Place::Discarded, matches!(pair.kept, StoredKey::OnToken(_)));
            }
        }
        true
    }

    /// Whether chip and identity of a session that is not there yet are free.
    pub(super) fn admits(&self, new: &Session) -> bool {
        let taken =
            |known: &ModelSession| known.session.chip == new.chip && known.session.state.name() != StateName::Aborted;
        !self.sessions.values().any(taken)
    }

    /// Whether the session is there with that pair already; none if it is not there at all.
    pub(super) fn repeats(&self, n: u64, new: &Session) -> Option<bool> {
        self.sessions.get(&n).map(|known| known.session == *new)
    }

    pub(super) fn end(&mut self, n: u64, state: SessionState, at: u64) {
        let known = self.sessions.get_mut(&n).unwrap();
        known.session.state = state;
        let pair = &mut self.pairs[known.pair];
        pair.place = Place::Erased;
        pair.condemned = matches!(pair.kept, StoredKey::OnToken(_));
        if !pair.condemned {
            let since = &mut self.batches.get_mut(&pair.id.batch).unwrap().erased_since;
            *since = Some(since.map_or(at, |since| since.min(at)));
        }
    }

    pub(super) fn may_move(&self, from: u64, to: u64) -> bool {
        let (Some(source), Some(target)) = (self.batches.get(&from), self.batches.get(&to)) else { return false };
        let wrapped = [source, target].iter().all(|batch| batch.keeping == KeyStorage::Wrapped);
        from != to && wrapped && source.purpose == target.purpose && self.takes_pairs(to)
    }

    pub(super) async fn check(&self, store: &dyn PrivateStore) {
        assert_eq!(store.origin().await.unwrap().1, self.last);
        let batches: Vec<_> = self.batches.keys().map(|number| self.batch(*number)).collect();
        assert_eq!(store.batches().await.unwrap(), batches);
        for batch in &batches {
            let mut expected: Vec<_> = self.in_batch(batch.number).map(Pair::held).collect();
            let mut found = store.pairs_of_batch(batch.number, ALL).await.unwrap();
            expected.sort_by_key(by_holder);
            found.sort_by_key(by_holder);
            assert_eq!(found, expected, "each pair in one place, with the bytes that were put in last");
        }
        for (n, known) in &self.sessions {
            let pair = &self.pairs[known.pair];
            assert_eq!(store.session(&id(*n)).await.unwrap().as_ref(), Some(&known.session));
            assert_eq!(pair.place == Place::Held(*n), !known.session.state.is_final());
            let held = (pair.place == Place::Held(*n)).then_some(&pair.kept);
            assert_eq!(store.kept_key(&id(*n)).await.unwrap().as_ref(), held);
        }
        for kind in [KeyKind::P256, KeyKind::P384] {
            self.check_kind(store, kind).await;
        }
        let condemned = |pair: &Pair| match &pair.kept {
            StoredKey::OnToken(token) if pair.condemned => Some((pair.kind.unwrap().name(), token.clone())),
            _ => None,
        };
        let expected: BTreeSet<_> = self.pairs.iter().filter_map(condemned).collect();
        let found = store.condemned(ALL).await.unwrap();
        assert_eq!(found.into_iter().map(|c| (c.kind.name(), c.pair)).collect::<BTreeSet<_>>(), expected);
    }

    async fn check_kind(&self, store: &dyn PrivateStore, kind: KeyKind) {
        let offered = |pair: &&Pair| {
            let batch = &self.batches[&pair.id.batch];
            pair.kind == Some(kind) && pair.place == Place::Ready && batch.quarantined.is_none()
        };
        let live = self.pairs.iter().filter(|pair| self.batches.contains_key(&pair.id.batch));
        let mut expected: Vec<_> = live.filter(offered).map(Pair::pooled).collect();
        expected.sort_by_key(|(id, _)| *id);
        assert_eq!(store.ready_pairs(kind, None, ALL).await.unwrap(), expected);

        // What was made is ready, with a session, erased or discarded: nothing else.
        let count = |fits: &dyn Fn(&Place) -> bool| {
            self.pairs.iter().filter(|pair| pair.kind == Some(kind) && fits(&pair.place)).count() as u64
        };
        let found = store.pair_counts(kind).await.unwrap();
        let ready_now: u64 =
            store.batches().await.unwrap().iter().filter(|b| b.purpose == Purpose::Pool(kind)).map(|b| b.ready).sum();
        assert_eq!(found.made, ready_now + found.reserved + found.discarded);
        assert_eq!(ready_now, count(&|place| *place == Place::Ready));
        assert_eq!(found.reserved, count(&|place| matches!(place, Place::Held(_) | Place::Erased)));
        assert_eq!(found.discarded, count(&|place| *place == Place::Discarded));
    }
}

impl Pair {
    pub(super) fn holder(&self) -> Holder {
        match self.place {
            Place::Held(n) => Holder::Session(id(n)),
            _ => Holder::Ready(self.id),
        }
    }

    pub(super) fn pooled(&self) -> (PairId, PooledPair) {
        (self.id, PooledPair { public_key: public_key(self.public), kept: self.kept.clone() })
    }

    pub(super) fn held(&self) -> HeldPair {
        HeldPair { holder: self.holder(), public_key: public_key(self.public), kept: self.kept.clone() }
    }
}

fn by_holder(held: &HeldPair) -> (Option<SessionId>, Option<PairId>) {
    match held.holder {
        Holder::Session(id) => (Some(id), None),
        Holder::Ready(id) => (None, Some(id)),
    }
}
