//! What the daemon makes on the token by itself: batch keys, and pairs that are kept there.

use cryptoki::object::Attribute;

use super::{Place, in_module, object_counts};
use crate::hsm::Ceremony;
use crate::hsm::attributes::{KeyRole, Provenance};
use crate::hsm::failure::FailureClass;
use crate::hsm::objects::public_key;
use crate::hsm::operations::TokenOperations;
use crate::hsm::transport::TransportKey;
use crate::hsm::wire::{Answer, Keep, Kept, MadePair, Operation};
use crate::keys::{BatchName, DevicePrivateKey, KeyKind, PublicKey, StoreId, TokenPair, batch_key_id};
use crate::names::KeyName;

const STORE: StoreId = StoreId::from_random([9; 8]);

fn batch(number: u64) -> BatchName {
    BatchName { store: STORE, number }
}

struct Workshop {
    ceremony: Ceremony,
    verbs: TokenOperations,
    transport: TransportKey,
}

fn workshop(place: &Place) -> Workshop {
    let ceremony = place.open();
    let (verbs, transport) = place.operations_with_transport(&ceremony, super::Register::new());
    Workshop { ceremony, verbs, transport }
}

impl Workshop {
    fn objects(&self) -> (usize, usize) {
        object_counts(&self.ceremony.token.session().unwrap())
    }

    fn create(&mut self, key: &KeyName) {
        assert!(matches!(self.verbs.perform(Operation::CreateBatchKey { key: key.clone() }), Ok(Answer::Created)));
    }

    fn destroy(&mut self, key: &KeyName) {
        assert!(matches!(self.verbs.perform(Operation::DestroyBatchKey { key: key.clone() }), Ok(Answer::Destroyed)));
    }

    fn make(&mut self, kind: KeyKind, keep: &Keep, at_most: u32, within_ms: u32) -> Vec<MadePair> {
        let order = Operation::MakePairs { kind, keep: keep.clone(), at_most, within_ms };
        match self.verbs.perform(order) {
            Ok(Answer::Made(made)) => made,
            other => panic!("{:?}", other.err()),
        }
    }

    fn deliver(&mut self, operation: Operation) -> Result<Vec<u8>, FailureClass> {
        match self.verbs.perform(operation) {
            Ok(Answer::Rewrapped(delivered)) => Ok(delivered),
            Ok(_) => panic!("another answer"),
            Err(failure) => Err(failure.class),
        }
    }

    fn open(&self, public: &PublicKey, delivered: &[u8]) -> DevicePrivateKey {
        DevicePrivateKey::from_unwrapped(public.clone(), &self.transport.unwrap(delivered).unwrap()).unwrap()
    }
}

const KINDS: [KeyKind; 4] = [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048];

#[test]
fn a_batch_key_is_made_once_and_destroyed_once_however_often_it_is_asked_for() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let (_, before) = workshop.objects();
        let key = batch(1).key();
        for _ in 0..3 {
            workshop.create(&key);
        }
        assert_eq!(workshop.objects().1, before + 1);
        let session = workshop.ceremony.token.session().unwrap();
        let found = session.find_objects(&[Attribute::Id(batch_key_id(&key))]).unwrap();
        crate::hsm::attributes::audit(&session, found[0], &key, KeyRole::Wrapping, Provenance::Made).unwrap();
        for _ in 0..3 {
            workshop.destroy(&key);
        }
        assert_eq!(workshop.objects().1, before);
    });
}

/// A key of that name that can do more than wrap, or leave the token, is not wrapped under.
#[test]
fn a_batch_key_that_is_not_fit_is_refused() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let key = batch(1).key();
        let mut template = KeyRole::Wrapping.template(&key, &batch_key_id(&key), &place.profile);
        template.retain(|attribute| *attribute != Attribute::Extractable(false));
        template.extend([Attribute::Extractable(true), Attribute::ValueLen(32.into())]);
        let session = workshop.ceremony.token.session().unwrap();
        session.generate_key(&cryptoki::mechanism::Mechanism::AesKeyGen, &template).unwrap();
        let order = Operation::MakePairs { kind: KeyKind::P256, keep: Keep::Wrapped(key), at_most: 1, within_ms: 0 };
        let failure = workshop.verbs.perform(order).err().unwrap();
        assert!(failure.message.contains("CKA_EXTRACTABLE is not false"), "{}", failure.message);
    });
}

#[test]
fn pairs_are_moved_from_one_key_to_another_and_the_old_one_opens_them_no_more() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let (from, to) = (batch(1).key(), batch(2).key());
        workshop.create(&from);
        workshop.create(&to);
        let before = workshop.objects();
        for kind in KINDS {
            let made = workshop.make(kind, &Keep::Wrapped(from.clone()), 2, 60_000);
            let blobs: Vec<_> = made
                .iter()
                .map(|pair| match &pair.kept {
                    Kept::Blob(blob) => (kind, blob.clone()),
                    Kept::Id(_) => panic!("it is not on the token"),
                })
                .collect();
            let order = Operation::Move { from: from.clone(), to: to.clone(), blobs: blobs.clone() };
            let Ok(Answer::Moved(moved)) = workshop.verbs.perform(order) else { panic!("{kind}: not moved") };
            for ((pair, blob), (_, old)) in made.into_iter().zip(moved).zip(blobs) {
                let public = public_key(kind, pair.public).unwrap();
                let delivered = workshop.deliver(Operation::Rewrap { kind, wrapping_key: to.clone(), blob }).unwrap();
                workshop.open(&public, &delivered);
                let under_the_other = Operation::Rewrap { kind, wrapping_key: to.clone(), blob: old };
                assert!(workshop.deliver(under_the_other).is_err(), "{kind}: it is under the old key");
            }
            assert_eq!(workshop.objects(), before, "{kind}: nothing is left in the HSM");
        }
        let pair = workshop.make(KeyKind::P256, &Keep::Wrapped(from.clone()), 1, 0).pop().unwrap();
        let Kept::Blob(blob) = pair.kept else { panic!("it is not on the token") };
        workshop.destroy(&from);
        let order = Operation::Rewrap { kind: KeyKind::P256, wrapping_key: from, blob };
        assert_eq!(workshop.deliver(order), Err(FailureClass::Absent));
    });
}

#[test]
fn a_pair_on_the_token_is_delivered_by_any_session_until_it_is_destroyed() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let before = workshop.objects();
        for kind in KINDS {
            let label = batch(3).pairs();
            let made = workshop.make(kind, &Keep::OnToken(label.clone()), 2, 60_000);
            assert_eq!(workshop.objects(), (before.0, before.1 + 2), "{kind}");
            for pair in made {
                let public = public_key(kind, pair.public).unwrap();
                let Kept::Id(id) = pair.kept else { panic!("it is on the token") };
                let pair = TokenPair { label: label.clone(), id };
                let order = || Operation::DeliverPair { kind, pair: pair.clone() };
                let delivered = workshop.deliver(order()).unwrap();
                workshop.open(&public, &delivered);
                // A worker that was just started has looked nothing up.
                let (mut other, transport) =
                    place.operations_with_transport(&workshop.ceremony, super::Register::new());
                let Ok(Answer::Rewrapped(delivered)) = other.perform(order()) else { panic!("{kind}: not found") };
                let plain = transport.unwrap(&delivered).unwrap();
                DevicePrivateKey::from_unwrapped(public, &plain).unwrap();
                for _ in 0..2 {
                    let gone = workshop.verbs.perform(Operation::DestroyPair { kind, pair: pair.clone() });
                    assert!(matches!(gone, Ok(Answer::Destroyed)), "{kind}");
                }
                assert_eq!(workshop.deliver(order()), Err(FailureClass::Absent), "{kind}");
            }
            assert_eq!(workshop.objects().1, before.1, "{kind}");
        }
    });
}

#[test]
fn what_daemons_made_is_listed_and_nothing_else() {
    in_module(|place| {
        let mut workshop = workshop(place);
        super::create_wrapping_key(&workshop.ceremony, &super::name("batch-of-another-kind")).unwrap();
        let other = BatchName { store: StoreId::from_random([1; 8]), number: 7 };
        for key in [batch(1), batch(2), other] {
            workshop.create(&key.key());
        }
        workshop.make(KeyKind::P256, &Keep::OnToken(batch(4).pairs()), 3, 60_000);
        workshop.make(KeyKind::Ed25519, &Keep::OnToken(other.pairs()), 1, 0);
        let Ok(Answer::Own { mut keys, pairs }) = workshop.verbs.perform(Operation::ListOwn) else { panic!("no list") };
        keys.sort();
        let mut wanted = [batch(1).key(), batch(2).key(), other.key()];
        wanted.sort();
        assert_eq!(keys, wanted);
        let of = |name: BatchName| pairs.iter().filter(|pair| pair.label == name.pairs()).count();
        assert_eq!((of(batch(4)), of(other), pairs.len()), (3, 1, 4));
    });
}

#[test]
fn a_call_makes_one_pair_at_least_and_ends_when_its_time_is_over() {
    in_module(|place| {
        let mut workshop = workshop(place);
        workshop.create(&batch(1).key());
        let keep = Keep::Wrapped(batch(1).key());
        assert_eq!(workshop.make(KeyKind::P256, &keep, 5, 60_000).len(), 5);
        assert_eq!(workshop.make(KeyKind::P256, &keep, 1000, 0).len(), 1);
        // So many would take months.
        let made = workshop.make(KeyKind::P256, &keep, u32::MAX, 1000).len();
        assert!(made > 1, "{made}");
    });
}

#[test]
fn nothing_is_told_as_destroyed_while_the_token_is_away() {
    in_module(|place| {
        let ceremony = place.open();
        let wrap = super::create_wrapping_key(&ceremony, &super::name("wrap")).unwrap();
        let register = || super::register([(&wrap, KeyRole::Wrapping)]);
        let (verbs, transport) = place.operations_with_transport(&ceremony, register());
        let mut workshop = Workshop { ceremony, verbs, transport };
        workshop.create(&batch(1).key());
        let kept = workshop.make(KeyKind::P256, &Keep::Wrapped(batch(1).key()), 1, 0).pop().unwrap().kept;
        let Kept::Blob(blob) = kept else { panic!("it is not on the token") };
        let label = batch(3).pairs();
        let kept = workshop.make(KeyKind::P256, &Keep::OnToken(label.clone()), 1, 0).pop().unwrap().kept;
        let Kept::Id(id) = kept else { panic!("it is on the token") };
        let orders = || {
            let pair = TokenPair { label: label.clone(), id: id.clone() };
            let (kind, wrapping_key) = (KeyKind::P256, batch(1).key());
            [Operation::Rewrap { kind, wrapping_key, blob: blob.clone() }, Operation::DeliverPair { kind, pair }]
        };
        // Sessions that have looked nothing up.
        let fresh = || place.operations_with_transport(&workshop.ceremony, register()).0;
        let mut looking: Vec<_> = orders().into_iter().map(|order| (fresh(), order)).collect();
        looking.push((fresh(), Operation::ListOwn));
        let (there, away) = (place.directory.join("tokens"), place.directory.join("tokens-away"));
        std::fs::rename(&there, &away).unwrap();
        for (mut verbs, order) in looking {
            let Err(failure) = verbs.perform(order) else { panic!("it is away") };
            assert_eq!(failure.class, FailureClass::ModuleLost, "{}", failure.message);
        }
        std::fs::rename(&away, &there).unwrap();
    });
}
