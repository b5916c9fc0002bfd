//! Objects that the daemon generates on the token: batch keys and stored pairs.

use cryptoki::object::Attribute;
use spp_format::keys::{DevicePrivateKey, KeyType, PublicKey};
use spp_format::names::KeyName;

use super::{TestToken, in_module, object_counts};
use crate::hsm::attributes::{KeyRole, Provenance};
use crate::hsm::failure_class::FailureClass;
use crate::hsm::objects::public_key;
use crate::hsm::operations::TokenOperations;
use crate::hsm::transport::TransportKey;
use crate::hsm::wire::{Answer, MadePair, Operation, StorageTarget, StoredForm};
use crate::hsm::{BatchName, Ceremony, StoreId, TokenPair, batch_key_id};

const STORE: StoreId = StoreId::from_random([9; 8]);

fn batch(number: u64) -> BatchName {
    BatchName { store: STORE, number }
}

struct Fixture {
    ceremony: Ceremony,
    operations: TokenOperations,
    transport: TransportKey,
}

fn fixture(token: &TestToken) -> Fixture {
    let ceremony = token.open();
    let (operations, transport) = token.operations_with_transport(&ceremony, super::KeyMap::new());
    Fixture { ceremony, operations, transport }
}

impl Fixture {
    fn objects(&self) -> (usize, usize) {
        object_counts(&self.ceremony.token.session().unwrap())
    }

    fn create(&mut self, key: &KeyName) {
        assert!(matches!(self.operations.perform(Operation::CreateBatchKey { key: key.clone() }), Ok(Answer::Created)));
    }

    fn destroy(&mut self, key: &KeyName) {
        assert!(matches!(
            self.operations.perform(Operation::DestroyBatchKey { key: key.clone() }),
            Ok(Answer::Destroyed)
        ));
    }

    fn make(&mut self, kind: KeyType, target: &StorageTarget, at_most: u32, within_ms: u32) -> Vec<MadePair> {
        let operation = Operation::MakePairs { kind, target: target.clone(), at_most, within_ms };
        match self.operations.perform(operation) {
            Ok(Answer::Made(made)) => made,
            other => panic!("{:?}", other.err()),
        }
    }

    fn deliver(&mut self, operation: Operation) -> Result<Vec<u8>, FailureClass> {
        match self.operations.perform(operation) {
            Ok(Answer::Rewrapped(delivered)) => Ok(delivered),
            Ok(_) => panic!("unexpected answer"),
            Err(failure) => Err(failure.class),
        }
    }

    fn open(&self, public: &PublicKey, delivered: &[u8]) -> DevicePrivateKey {
        DevicePrivateKey::from_unwrapped(public.clone(), &self.transport.unwrap(delivered).unwrap()).unwrap()
    }
}

const KINDS: [KeyType; 4] = [KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048];

#[test]
fn batch_key_create_and_destroy_are_idempotent() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let (_, before) = fixture.objects();
        let key = batch(1).key();
        for _ in 0..3 {
            fixture.create(&key);
        }
        assert_eq!(fixture.objects().1, before + 1);
        let session = fixture.ceremony.token.session().unwrap();
        let found = session.find_objects(&[Attribute::Id(batch_key_id(&key))]).unwrap();
        crate::hsm::attributes::audit(&session, found[0], &key, KeyRole::Wrapping, Provenance::Made).unwrap();
        for _ in 0..3 {
            fixture.destroy(&key);
        }
        assert_eq!(fixture.objects().1, before);
    });
}

/// No pair is wrapped under an extractable key, even if it has the name of a batch key.
#[test]
fn batch_key_with_wrong_attributes_is_refused() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let key = batch(1).key();
        let mut template = KeyRole::Wrapping.template(&key, &batch_key_id(&key), &token.profile);
        template.retain(|attribute| *attribute != Attribute::Extractable(false));
        template.extend([Attribute::Extractable(true), Attribute::ValueLen(32.into())]);
        let session = fixture.ceremony.token.session().unwrap();
        session.generate_key(&cryptoki::mechanism::Mechanism::AesKeyGen, &template).unwrap();
        let order =
            Operation::MakePairs { kind: KeyType::P256, target: StorageTarget::Wrapped(key), at_most: 1, within_ms: 0 };
        let failure = fixture.operations.perform(order).err().unwrap();
        assert!(failure.message.contains("CKA_EXTRACTABLE is not false"), "{}", failure.message);
    });
}

#[test]
fn rewrapped_pair_unwraps_only_under_new_batch_key() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let (from, to) = (batch(1).key(), batch(2).key());
        fixture.create(&from);
        fixture.create(&to);
        let before = fixture.objects();
        for kind in KINDS {
            let made = fixture.make(kind, &StorageTarget::Wrapped(from.clone()), 2, 60_000);
            let blobs: Vec<_> = made
                .iter()
                .map(|pair| match &pair.stored {
                    StoredForm::Blob(blob) => (kind, blob.clone()),
                    StoredForm::Id(_) => panic!("expected a wrapped pair"),
                })
                .collect();
            let order = Operation::Move { from: from.clone(), to: to.clone(), blobs: blobs.clone() };
            let Ok(Answer::Moved(moved)) = fixture.operations.perform(order) else { panic!("{kind}: not moved") };
            for ((pair, blob), (_, old)) in made.into_iter().zip(moved).zip(blobs) {
                let public = public_key(kind, pair.public).unwrap();
                let delivered = fixture.deliver(Operation::Rewrap { kind, wrapping_key: to.clone(), blob }).unwrap();
                fixture.open(&public, &delivered);
                let old_blob = Operation::Rewrap { kind, wrapping_key: to.clone(), blob: old };
                assert!(fixture.deliver(old_blob).is_err(), "{kind}: the old blob is wrapped under the old key");
            }
            assert_eq!(fixture.objects(), before, "{kind}: nothing is left in the HSM");
        }
        let pair = fixture.make(KeyType::P256, &StorageTarget::Wrapped(from.clone()), 1, 0).pop().unwrap();
        let StoredForm::Blob(blob) = pair.stored else { panic!("expected a wrapped pair") };
        fixture.destroy(&from);
        let order = Operation::Rewrap { kind: KeyType::P256, wrapping_key: from, blob };
        assert_eq!(fixture.deliver(order), Err(FailureClass::Absent));
    });
}

#[test]
fn token_pair_is_delivered_until_destroyed() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let before = fixture.objects();
        for kind in KINDS {
            let label = batch(3).pairs();
            let made = fixture.make(kind, &StorageTarget::OnToken(label.clone()), 2, 60_000);
            assert_eq!(fixture.objects(), (before.0, before.1 + 2), "{kind}");
            for pair in made {
                let public = public_key(kind, pair.public).unwrap();
                let StoredForm::Id(id) = pair.stored else { panic!("expected a pair on the token") };
                let pair = TokenPair { label: label.clone(), id };
                let order = || Operation::DeliverPair { kind, pair: pair.clone() };
                let delivered = fixture.deliver(order()).unwrap();
                fixture.open(&public, &delivered);
                // A new worker has no cached handles.
                let (mut other, transport) = token.operations_with_transport(&fixture.ceremony, super::KeyMap::new());
                let Ok(Answer::Rewrapped(delivered)) = other.perform(order()) else { panic!("{kind}: not found") };
                let plain = transport.unwrap(&delivered).unwrap();
                DevicePrivateKey::from_unwrapped(public, &plain).unwrap();
                for _ in 0..2 {
                    let destroyed = fixture.operations.perform(Operation::DestroyPair { kind, pair: pair.clone() });
                    assert!(matches!(destroyed, Ok(Answer::Destroyed)), "{kind}");
                }
                assert_eq!(fixture.deliver(order()), Err(FailureClass::Absent), "{kind}");
            }
            assert_eq!(fixture.objects().1, before.1, "{kind}");
        }
    });
}

#[test]
fn list_contains_only_daemon_objects() {
    in_module(|token| {
        let mut fixture = fixture(token);
        super::create_wrapping_key(&fixture.ceremony, &super::name("batch-of-another-kind")).unwrap();
        let other = BatchName { store: StoreId::from_random([1; 8]), number: 7 };
        for key in [batch(1), batch(2), other] {
            fixture.create(&key.key());
        }
        fixture.make(KeyType::P256, &StorageTarget::OnToken(batch(4).pairs()), 3, 60_000);
        fixture.make(KeyType::Ed25519, &StorageTarget::OnToken(other.pairs()), 1, 0);
        let Ok(Answer::Own { mut keys, pairs }) = fixture.operations.perform(Operation::ListOwn) else {
            panic!("no list")
        };
        keys.sort();
        let mut wanted = [batch(1).key(), batch(2).key(), other.key()];
        wanted.sort();
        assert_eq!(keys, wanted);
        let of = |name: BatchName| pairs.iter().filter(|pair| pair.label == name.pairs()).count();
        assert_eq!((of(batch(4)), of(other), pairs.len()), (3, 1, 4));
    });
}

#[test]
fn make_pairs_respects_count_and_time_limits() {
    in_module(|token| {
        let mut fixture = fixture(token);
        fixture.create(&batch(1).key());
        let target = StorageTarget::Wrapped(batch(1).key());
        assert_eq!(fixture.make(KeyType::P256, &target, 5, 60_000).len(), 5);
        assert_eq!(fixture.make(KeyType::P256, &target, 1000, 0).len(), 1);
        // This number of pairs would take months.
        let made = fixture.make(KeyType::P256, &target, u32::MAX, 1000).len();
        assert!(made > 1, "{made}");
    });
}

#[test]
fn removed_token_is_not_reported_as_destroyed_key() {
    in_module(|token| {
        let ceremony = token.open();
        let wrap = super::create_wrapping_key(&ceremony, &super::name("wrap")).unwrap();
        let key_map = || super::key_map([(&wrap, KeyRole::Wrapping)]);
        let (operations, transport) = token.operations_with_transport(&ceremony, key_map());
        let mut fixture = Fixture { ceremony, operations, transport };
        fixture.create(&batch(1).key());
        let stored = fixture.make(KeyType::P256, &StorageTarget::Wrapped(batch(1).key()), 1, 0).pop().unwrap().stored;
        let StoredForm::Blob(blob) = stored else { panic!("expected a wrapped pair") };
        let label = batch(3).pairs();
        let stored = fixture.make(KeyType::P256, &StorageTarget::OnToken(label.clone()), 1, 0).pop().unwrap().stored;
        let StoredForm::Id(id) = stored else { panic!("expected a pair on the token") };
        let orders = || {
            let pair = TokenPair { label: label.clone(), id: id.clone() };
            let (kind, wrapping_key) = (KeyType::P256, batch(1).key());
            [Operation::Rewrap { kind, wrapping_key, blob: blob.clone() }, Operation::DeliverPair { kind, pair }]
        };
        // Sessions without cached handles.
        let fresh = || token.operations_with_transport(&fixture.ceremony, key_map()).0;
        let mut looking: Vec<_> = orders().into_iter().map(|order| (fresh(), order)).collect();
        looking.push((fresh(), Operation::ListOwn));
        let (present, removed) = (token.directory.join("tokens"), token.directory.join("tokens-removed"));
        std::fs::rename(&present, &removed).unwrap();
        for (mut operations, order) in looking {
            let Err(failure) = operations.perform(order) else { panic!("the token is removed") };
            assert_eq!(failure.class, FailureClass::ModuleLost, "{}", failure.message);
        }
        std::fs::rename(&removed, &present).unwrap();
    });
}
