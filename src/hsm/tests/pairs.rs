//! Pairs are generated, wrapped twice and destroyed; the stored blob unwraps to the same key.

use cryptoki::object::Attribute;
use spp_format::keys::{DevicePrivateKey, KeyType, PublicKey, SignatureAlgorithm};

use super::{TestToken, create_wrapping_key, in_module, key_map, name, object_counts};
use crate::hsm::failure_class::FailureClass;
use crate::hsm::objects::public_key;
use crate::hsm::operations::TokenOperations;
use crate::hsm::transport::TransportKey;
use crate::hsm::wire::{Answer, KeyOnToken, Operation};
use crate::hsm::{Ceremony, KeyRole, Provenance};

struct Fixture {
    ceremony: Ceremony,
    operations: TokenOperations,
    transport: TransportKey,
}

/// The session expects the wrapping key `wrap`, and the key `lost`, which is not on the token.
fn fixture(token: &TestToken) -> Fixture {
    let ceremony = token.open();
    let wrap = create_wrapping_key(&ceremony, &name("wrap")).unwrap();
    let mut keys = key_map([(&wrap, KeyRole::Wrapping)]);
    keys.insert(name("lost"), KeyOnToken { id: vec![7; 16], role: KeyRole::Wrapping, provenance: Provenance::Made });
    let (operations, transport) = token.operations_with_transport(&ceremony, keys);
    Fixture { ceremony, operations, transport }
}

impl Fixture {
    fn objects(&self) -> (usize, usize) {
        object_counts(&self.ceremony.token.session().unwrap())
    }

    /// The public key, the stored blob and the delivered blob of a new pair.
    fn pair(&mut self, kind: KeyType) -> (PublicKey, Vec<u8>, Vec<u8>) {
        let answer = self.operations.perform(Operation::GeneratePair { kind, wrapping_key: name("wrap") });
        let Ok(Answer::Pair { public, stored, delivered }) = answer else { panic!("{:?}", answer.err()) };
        (public_key(kind, public).unwrap(), stored, delivered)
    }

    fn rewrap(&mut self, kind: KeyType, blob: &[u8]) -> Result<Vec<u8>, FailureClass> {
        let order = Operation::Rewrap { kind, wrapping_key: name("wrap"), blob: blob.to_vec() };
        match self.operations.perform(order) {
            Ok(Answer::Rewrapped(delivered)) => Ok(delivered),
            Ok(_) => panic!("unexpected answer"),
            Err(failure) => Err(failure.class),
        }
    }

    fn open(&self, public: &PublicKey, delivered: &[u8]) -> DevicePrivateKey {
        let plain = self.transport.unwrap(delivered).unwrap();
        DevicePrivateKey::from_unwrapped(public.clone(), &plain).unwrap()
    }
}

const KINDS: [KeyType; 5] = [KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048, KeyType::Rsa3072];

#[test]
fn pair_of_every_type_is_delivered_twice() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let before = fixture.objects();
        for kind in KINDS {
            let (public, stored, delivered) = fixture.pair(kind);
            let first = fixture.open(&public, &delivered);
            let algorithm = SignatureAlgorithm::default_for(kind);
            let signature = first.sign(algorithm, b"message").unwrap();
            assert_eq!(public.verify(algorithm, b"message", &signature), Ok(()), "{kind}");

            assert_ne!(stored, delivered, "{kind}: stored and delivered are wrapped under different keys");
            assert!(fixture.transport.unwrap(&stored).is_err(), "{kind}: unwrapping the stored blob needs the HSM");
            let again = fixture.rewrap(kind, &stored).unwrap();
            let again = fixture.open(&public, &again);
            let numbers = |key: &DevicePrivateKey| key.secrets().iter().map(|s| s.expose().clone()).collect::<Vec<_>>();
            assert_eq!(numbers(&first), numbers(&again), "{kind}");
            assert_eq!(fixture.objects(), before, "{kind}: nothing is left in the HSM");
        }
    });
}

#[test]
fn generated_pairs_are_distinct() {
    in_module(|token| {
        let mut fixture = fixture(token);
        for kind in [KeyType::P256, KeyType::P384, KeyType::Ed25519] {
            let made: std::collections::BTreeSet<_> = (0..20).map(|_| fixture.pair(kind).0.fingerprint()).collect();
            assert_eq!(made.len(), 20, "{kind}");
        }
    });
}

#[test]
fn missing_wrapping_key_refuses_pair_and_leaves_no_object() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let before = fixture.objects();
        for kind in [KeyType::P256, KeyType::Ed25519, KeyType::Rsa2048] {
            for (key, class, expected) in [
                (
                    "lost",
                    FailureClass::ModuleLost,
                    "lost (CKA_ID 07070707070707070707070707070707) is not on the token",
                ),
                ("unheard-of", FailureClass::Rejected, "unheard-of is not in the key manifest"),
            ] {
                let failure = fixture.operations.perform(Operation::GeneratePair { kind, wrapping_key: name(key) });
                let failure = failure.err().unwrap();
                assert_eq!(failure.class, class, "{}", failure.message);
                assert!(failure.message.contains(expected), "{}", failure.message);
                assert_eq!(fixture.objects(), before, "{kind} under {key}");
            }
        }
    });
}

#[test]
fn damaged_blob_is_refused_without_losing_the_worker() {
    in_module(|token| {
        let mut fixture = fixture(token);
        let (public, stored, delivered) = fixture.pair(KeyType::P256);
        let before = fixture.objects();
        let mut damaged = stored.clone();
        damaged[20] ^= 1;
        for (what, blob) in [
            ("a flipped bit", damaged.as_slice()),
            ("cut short", &stored[..stored.len() - 8]),
            ("no whole block", &stored[..stored.len() - 1]),
            ("empty", &[]),
            ("wrapped under another key", &delivered),
        ] {
            let class = fixture.rewrap(KeyType::P256, blob).unwrap_err();
            assert!(matches!(class, FailureClass::Transient | FailureClass::Rejected), "{what}: {class:?}");
            assert_eq!(fixture.objects(), before, "{what}");
        }
        assert!(fixture.rewrap(KeyType::Rsa2048, &stored).is_err(), "an EC key cannot be unwrapped as an RSA key");
        assert_eq!(fixture.objects(), before);
        let delivered = fixture.rewrap(KeyType::P256, &stored).unwrap();
        fixture.open(&public, &delivered);
    });
}

#[test]
fn missing_transport_key_fails_the_key_check() {
    in_module(|token| {
        let ceremony = token.open();
        let wrap = create_wrapping_key(&ceremony, &name("wrap")).unwrap();
        let (mut operations, _) = token.operations_with_transport(&ceremony, key_map([(&wrap, KeyRole::Wrapping)]));
        operations.check_keys().unwrap();
        let session = ceremony.token.session().unwrap();
        let transport_key = session.find_objects(&[Attribute::Token(false)]).unwrap();
        session.destroy_object(transport_key[0]).unwrap();
        let pair = Operation::GeneratePair { kind: KeyType::P256, wrapping_key: name("wrap") };
        assert_eq!(operations.perform(pair).err().unwrap().class, FailureClass::SessionLost);
        // All keys of the manifest exist, but only a new worker generates another transport key.
        assert_eq!(operations.check_keys().unwrap_err().class, FailureClass::ModuleLost);
    });
}
