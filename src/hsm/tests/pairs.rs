//! Pairs are made, wrapped twice and forgotten; what is kept comes back as the same key.

use cryptoki::object::Attribute;

use super::{Place, create_wrapping_key, in_module, name, object_counts, register};
use crate::hsm::failure::FailureClass;
use crate::hsm::objects::public_key;
use crate::hsm::operations::TokenOperations;
use crate::hsm::transport::TransportKey;
use crate::hsm::wire::{Answer, KeyOnToken, Operation};
use crate::hsm::{Ceremony, KeyRole, Provenance};
use crate::keys::{DevicePrivateKey, KeyKind, PublicKey, SignatureAlgorithm};

struct Workshop {
    ceremony: Ceremony,
    verbs: TokenOperations,
    transport: TransportKey,
}

/// The register has the wrapping key `wrap`, and `lost` that is not on the token.
fn workshop(place: &Place) -> Workshop {
    let ceremony = place.open();
    let wrap = create_wrapping_key(&ceremony, &name("wrap")).unwrap();
    let mut keys = register([(&wrap, KeyRole::Wrapping)]);
    keys.insert(name("lost"), KeyOnToken { id: vec![7; 16], role: KeyRole::Wrapping, provenance: Provenance::Made });
    let (verbs, transport) = place.operations_with_transport(&ceremony, keys);
    Workshop { ceremony, verbs, transport }
}

impl Workshop {
    fn objects(&self) -> (usize, usize) {
        object_counts(&self.ceremony.token.session().unwrap())
    }

    /// Public key, what is kept, what is delivered.
    fn pair(&mut self, kind: KeyKind) -> (PublicKey, Vec<u8>, Vec<u8>) {
        let answer = self.verbs.perform(Operation::GeneratePair { kind, wrapping_key: name("wrap") });
        let Ok(Answer::Pair { public, kept, delivered }) = answer else { panic!("{:?}", answer.err()) };
        (public_key(kind, public).unwrap(), kept, delivered)
    }

    fn rewrap(&mut self, kind: KeyKind, blob: &[u8]) -> Result<Vec<u8>, FailureClass> {
        let order = Operation::Rewrap { kind, wrapping_key: name("wrap"), blob: blob.to_vec() };
        match self.verbs.perform(order) {
            Ok(Answer::Rewrapped(delivered)) => Ok(delivered),
            Ok(_) => panic!("another answer"),
            Err(failure) => Err(failure.class),
        }
    }

    fn open(&self, public: &PublicKey, delivered: &[u8]) -> DevicePrivateKey {
        let plain = self.transport.unwrap(delivered).unwrap();
        DevicePrivateKey::from_unwrapped(public.clone(), &plain).unwrap()
    }
}

const KINDS: [KeyKind; 5] = [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048, KeyKind::Rsa3072];

#[test]
fn a_pair_of_every_kind_is_delivered_kept_and_delivered_again() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let before = workshop.objects();
        for kind in KINDS {
            let (public, kept, delivered) = workshop.pair(kind);
            let first = workshop.open(&public, &delivered);
            let algorithm = SignatureAlgorithm::default_for(kind);
            let signature = first.sign(algorithm, b"it belongs").unwrap();
            assert_eq!(public.verify(algorithm, b"it belongs", &signature), Ok(()), "{kind}");

            assert_ne!(kept, delivered, "{kind}: kept and delivered are wrapped under different keys");
            assert!(workshop.transport.unwrap(&kept).is_err(), "{kind}: what is kept needs the HSM");
            let again = workshop.rewrap(kind, &kept).unwrap();
            let again = workshop.open(&public, &again);
            let numbers = |key: &DevicePrivateKey| key.secrets().iter().map(|s| s.expose().clone()).collect::<Vec<_>>();
            assert_eq!(numbers(&first), numbers(&again), "{kind}");
            assert_eq!(workshop.objects(), before, "{kind}: nothing is left in the HSM");
        }
    });
}

#[test]
fn two_pairs_are_never_the_same() {
    in_module(|place| {
        let mut workshop = workshop(place);
        for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519] {
            let made: std::collections::BTreeSet<_> = (0..20).map(|_| workshop.pair(kind).0.fingerprint()).collect();
            assert_eq!(made.len(), 20, "{kind}");
        }
    });
}

#[test]
fn a_missing_wrapping_key_refuses_the_pair_and_leaves_nothing_behind() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let before = workshop.objects();
        for kind in [KeyKind::P256, KeyKind::Ed25519, KeyKind::Rsa2048] {
            for (key, class, says) in [
                (
                    "lost",
                    FailureClass::ModuleLost,
                    "lost (CKA_ID 07070707070707070707070707070707) is not on the token",
                ),
                ("unheard-of", FailureClass::Rejected, "unheard-of is not in the register of keys"),
            ] {
                let failure = workshop.verbs.perform(Operation::GeneratePair { kind, wrapping_key: name(key) });
                let failure = failure.err().unwrap();
                assert_eq!(failure.class, class, "{}", failure.message);
                assert!(failure.message.contains(says), "{}", failure.message);
                assert_eq!(workshop.objects(), before, "{kind} under {key}");
            }
        }
    });
}

#[test]
fn a_damaged_or_mistaken_blob_is_refused_without_a_trace_and_without_costing_the_worker() {
    in_module(|place| {
        let mut workshop = workshop(place);
        let (public, kept, delivered) = workshop.pair(KeyKind::P256);
        let before = workshop.objects();
        let mut damaged = kept.clone();
        damaged[20] ^= 1;
        for (what, blob) in [
            ("a flipped bit", damaged.as_slice()),
            ("cut short", &kept[..kept.len() - 8]),
            ("no whole block", &kept[..kept.len() - 1]),
            ("empty", &[]),
            ("wrapped under another key", &delivered),
        ] {
            let class = workshop.rewrap(KeyKind::P256, blob).unwrap_err();
            assert!(matches!(class, FailureClass::Transient | FailureClass::Rejected), "{what}: {class:?}");
            assert_eq!(workshop.objects(), before, "{what}");
        }
        assert!(workshop.rewrap(KeyKind::Rsa2048, &kept).is_err(), "an EC key is no RSA key");
        assert_eq!(workshop.objects(), before);
        let delivered = workshop.rewrap(KeyKind::P256, &kept).unwrap();
        workshop.open(&public, &delivered);
    });
}

#[test]
fn a_session_whose_transport_key_is_gone_does_not_pass_the_check() {
    in_module(|place| {
        let ceremony = place.open();
        let wrap = create_wrapping_key(&ceremony, &name("wrap")).unwrap();
        let (mut verbs, _) = place.operations_with_transport(&ceremony, register([(&wrap, KeyRole::Wrapping)]));
        verbs.check_keys().unwrap();
        let session = ceremony.token.session().unwrap();
        let transport_key = session.find_objects(&[Attribute::Token(false)]).unwrap();
        session.destroy_object(transport_key[0]).unwrap();
        let pair = Operation::GeneratePair { kind: KeyKind::P256, wrapping_key: name("wrap") };
        assert_eq!(verbs.perform(pair).err().unwrap().class, FailureClass::SessionLost);
        // The keys of the register are all there; yet only a new worker has a transport key again.
        assert_eq!(verbs.check_keys().unwrap_err().class, FailureClass::ModuleLost);
    });
}
