//! A key that is not what its role demands is refused, each fault by its name.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use cryptoki::session::Session;

use super::{Place, create_wrapping_key, in_module, name, register};
use crate::hsm::attributes::pair_generation;
use crate::hsm::failure::{Failure, FailureClass};
use crate::hsm::wire::KeyOnToken;
use crate::hsm::{Ceremony, KeyRole, Prf, Provenance};
use crate::keys::KeyKind;

const ID: &[u8] = b"0123456789abcdef";

/// The role's own template with some attributes said otherwise.
fn altered(place: &Place, role: KeyRole, key: &str, changes: &[Attribute]) -> Vec<Attribute> {
    let mut template = role.template(&name(key), ID, &place.profile);
    for change in changes {
        template.retain(|attribute| attribute.attribute_type() != change.attribute_type());
        template.push(change.clone());
    }
    template
}

fn make_secret(place: &Place, session: &Session, role: KeyRole, key: &str, changes: &[Attribute]) {
    let mut template = altered(place, role, key, changes);
    template.push(Attribute::ValueLen(32.into()));
    let mechanism = match role {
        KeyRole::Master(Prf::HmacSha256) => Mechanism::GenericSecretKeyGen,
        _ => Mechanism::AesKeyGen,
    };
    session.generate_key(&mechanism, &template).unwrap();
}

/// What a worker's start says to a token with this key.
fn check(place: &Place, ceremony: &Ceremony, key: &str, role: KeyRole) -> Result<(), Failure> {
    let keys = [(name(key), KeyOnToken { id: ID.to_vec(), role, provenance: Provenance::Made })].into();
    place.verbs(ceremony, keys, None).check_keys()
}

fn assert_refused(place: &Place, ceremony: &Ceremony, key: &str, role: KeyRole, problem: &str) {
    let failure = check(place, ceremony, key, role).unwrap_err();
    assert_eq!(failure.class, FailureClass::Rejected, "{}", failure.message);
    assert!(failure.message.starts_with(&format!("the key {key} is not fit to be used")), "{}", failure.message);
    assert!(failure.message.contains(problem), "{problem} is missing in: {}", failure.message);
    assert!(failure.message.contains("sppctl ceremony run"), "{}", failure.message);
}

const MASTER: KeyRole = KeyRole::Master(Prf::HmacSha256);

#[test]
fn secret_keys_with_one_wrong_attribute_are_refused() {
    in_module(|place| {
        let ceremony = place.open();
        let session = ceremony.token.session().unwrap();
        let wrong = [
            ("extractable", MASTER, Attribute::Extractable(true), "CKA_EXTRACTABLE is not false"),
            ("visible", MASTER, Attribute::Sensitive(false), "CKA_SENSITIVE is not true"),
            ("signs-and-wraps", MASTER, Attribute::Wrap(true), "CKA_WRAP is true"),
            ("signs-and-derives", MASTER, Attribute::Derive(true), "CKA_DERIVE is true"),
            ("cannot-sign", MASTER, Attribute::Sign(false), "CKA_SIGN is false"),
            ("wraps-and-decrypts", KeyRole::Wrapping, Attribute::Decrypt(true), "CKA_DECRYPT is true"),
            ("wraps-and-encrypts", KeyRole::Wrapping, Attribute::Encrypt(true), "CKA_ENCRYPT is true"),
            ("wraps-and-signs", KeyRole::Wrapping, Attribute::Sign(true), "CKA_SIGN is true"),
            ("cannot-unwrap", KeyRole::Wrapping, Attribute::Unwrap(false), "CKA_UNWRAP is false"),
        ];
        for (key, role, change, problem) in wrong {
            make_secret(place, &session, role, key, &[change]);
            assert_refused(place, &ceremony, key, role, problem);
        }
        make_secret(place, &session, MASTER, "fit", &[]);
        check(place, &ceremony, "fit", MASTER).unwrap();
        assert_refused(place, &ceremony, "fit", KeyRole::Master(Prf::AesCmac), "CKA_KEY_TYPE does not fit its role");
    });
}

#[test]
fn signing_keys_with_one_wrong_attribute_are_refused() {
    in_module(|place| {
        let ceremony = place.open();
        let session = ceremony.token.session().unwrap();
        let role = KeyRole::Signing(KeyKind::Rsa2048);
        for (key, change, problem) in [
            ("signs-and-decrypts", Attribute::Decrypt(true), "CKA_DECRYPT is true"),
            ("signs-and-unwraps", Attribute::Unwrap(true), "CKA_UNWRAP is true"),
            ("extractable", Attribute::Extractable(true), "CKA_EXTRACTABLE is not false"),
        ] {
            let (mechanism, mut public) = pair_generation(KeyKind::Rsa2048);
            public.push(Attribute::Token(false));
            session.generate_key_pair(&mechanism, &public, &altered(place, role, key, &[change])).unwrap();
            assert_refused(place, &ceremony, key, role, problem);
        }
    });
}

#[test]
fn a_key_that_was_not_made_on_the_token_is_refused() {
    in_module(|place| {
        let ceremony = place.open();
        let session = ceremony.token.session().unwrap();
        let mut template = altered(place, MASTER, "imported", &[]);
        template.extend([
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::Value(vec![0x5a; 32]),
        ]);
        session.create_object(&template).unwrap();
        assert_refused(place, &ceremony, "imported", MASTER, "CKA_LOCAL is not true");
    });
}

#[test]
fn a_look_up_demands_exactly_one_key() {
    in_module(|place| {
        let ceremony = place.open();
        let session = ceremony.token.session().unwrap();
        let missing = check(place, &ceremony, "master", MASTER).unwrap_err();
        assert!(missing.message.contains("the key master") && missing.message.contains("is not on the token"));

        make_secret(place, &session, MASTER, "master", &[]);
        check(place, &ceremony, "master", MASTER).unwrap();
        make_secret(place, &session, MASTER, "master", &[Attribute::Id(vec![1])]);
        check(place, &ceremony, "master", MASTER).unwrap_or_else(|f| panic!("another CKA_ID: {}", f.message));

        make_secret(place, &session, MASTER, "master", &[]);
        let twice = check(place, &ceremony, "master", MASTER).unwrap_err();
        assert_eq!(twice.class, FailureClass::Rejected);
        assert!(twice.message.contains("2 objects are named master"), "{}", twice.message);
    });
}

#[test]
fn what_a_ceremony_makes_passes() {
    in_module(|place| {
        let ceremony = place.open();
        let mut made = Vec::new();
        for kind in [KeyKind::P256, KeyKind::P384, KeyKind::Ed25519, KeyKind::Rsa2048] {
            let key = ceremony.create_signing_key(&name(&format!("sign-{kind}")), kind).unwrap();
            made.push((key, KeyRole::Signing(kind)));
        }
        for prf in [Prf::HmacSha256, Prf::AesCmac] {
            let key = ceremony.create_master_key(&name(&format!("{prf:?}").to_lowercase()), prf).unwrap();
            made.push((key, KeyRole::Master(prf)));
        }
        made.push((create_wrapping_key(&ceremony, &name("wrap")).unwrap(), KeyRole::Wrapping));
        let keys = register(made.iter().map(|(key, role)| (key, *role)));
        assert_eq!(keys.len(), 7);
        place.verbs(&ceremony, keys, None).check_keys().unwrap();
    });
}
