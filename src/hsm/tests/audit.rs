//! The audit refuses a key whose attributes do not match its role, and names each wrong attribute.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType as CkKeyType, ObjectClass};
use cryptoki::session::Session;
use spp_format::keys::KeyType;

use super::{TestToken, create_wrapping_key, in_module, key_map, name};
use crate::hsm::attributes::pair_generation;
use crate::hsm::failure::Failure;
use crate::hsm::failure_class::FailureClass;
use crate::hsm::wire::KeyOnToken;
use crate::hsm::{Ceremony, KeyRole, Prf, Provenance};

const ID: &[u8] = b"0123456789abcdef";

/// The role's template with some attributes changed.
fn altered(token: &TestToken, role: KeyRole, key: &str, changes: &[Attribute]) -> Vec<Attribute> {
    let mut template = role.template(&name(key), ID, &token.profile);
    for change in changes {
        template.retain(|attribute| attribute.attribute_type() != change.attribute_type());
        template.push(change.clone());
    }
    template
}

fn make_secret(token: &TestToken, session: &Session, role: KeyRole, key: &str, changes: &[Attribute]) {
    let mut template = altered(token, role, key, changes);
    template.push(Attribute::ValueLen(32.into()));
    let mechanism = match role {
        KeyRole::Master(Prf::HmacSha256) => Mechanism::GenericSecretKeyGen,
        _ => Mechanism::AesKeyGen,
    };
    session.generate_key(&mechanism, &template).unwrap();
}

/// The key check of a worker start with this key.
fn check(token: &TestToken, ceremony: &Ceremony, key: &str, role: KeyRole) -> Result<(), Failure> {
    let keys = [(name(key), KeyOnToken { id: ID.to_vec(), role, provenance: Provenance::Made })].into();
    token.operations(ceremony, keys, None).check_keys()
}

fn assert_refused(token: &TestToken, ceremony: &Ceremony, key: &str, role: KeyRole, problem: &str) {
    let failure = check(token, ceremony, key, role).unwrap_err();
    assert_eq!(failure.class, FailureClass::Rejected, "{}", failure.message);
    assert!(failure.message.starts_with(&format!("the key {key} fails the attribute audit")), "{}", failure.message);
    assert!(failure.message.contains(problem), "{problem} is missing in: {}", failure.message);
    assert!(failure.message.contains("sppctl ceremony run"), "{}", failure.message);
}

const MASTER: KeyRole = KeyRole::Master(Prf::HmacSha256);

#[test]
fn secret_key_with_wrong_attribute_is_refused() {
    in_module(|token| {
        let ceremony = token.open();
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
            make_secret(token, &session, role, key, &[change]);
            assert_refused(token, &ceremony, key, role, problem);
        }
        make_secret(token, &session, MASTER, "valid", &[]);
        check(token, &ceremony, "valid", MASTER).unwrap();
        assert_refused(
            token,
            &ceremony,
            "valid",
            KeyRole::Master(Prf::AesCmac),
            "CKA_KEY_TYPE does not match its role",
        );
    });
}

#[test]
fn signing_key_with_wrong_attribute_is_refused() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let role = KeyRole::Signing(KeyType::Rsa2048);
        for (key, change, problem) in [
            ("signs-and-decrypts", Attribute::Decrypt(true), "CKA_DECRYPT is true"),
            ("signs-and-unwraps", Attribute::Unwrap(true), "CKA_UNWRAP is true"),
            ("extractable", Attribute::Extractable(true), "CKA_EXTRACTABLE is not false"),
        ] {
            let (mechanism, mut public) = pair_generation(KeyType::Rsa2048);
            public.push(Attribute::Token(false));
            session.generate_key_pair(&mechanism, &public, &altered(token, role, key, &[change])).unwrap();
            assert_refused(token, &ceremony, key, role, problem);
        }
    });
}

#[test]
fn imported_key_is_refused() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let mut template = altered(token, MASTER, "imported", &[]);
        template.extend([
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(CkKeyType::GENERIC_SECRET),
            Attribute::Value(vec![0x5a; 32]),
        ]);
        session.create_object(&template).unwrap();
        assert_refused(token, &ceremony, "imported", MASTER, "CKA_LOCAL is not true");
    });
}

#[test]
fn lookup_requires_exactly_one_key() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let missing = check(token, &ceremony, "master", MASTER).unwrap_err();
        assert!(missing.message.contains("the key master") && missing.message.contains("is not on the token"));

        make_secret(token, &session, MASTER, "master", &[]);
        check(token, &ceremony, "master", MASTER).unwrap();
        make_secret(token, &session, MASTER, "master", &[Attribute::Id(vec![1])]);
        check(token, &ceremony, "master", MASTER).unwrap_or_else(|f| panic!("another CKA_ID: {}", f.message));

        make_secret(token, &session, MASTER, "master", &[]);
        let twice = check(token, &ceremony, "master", MASTER).unwrap_err();
        assert_eq!(twice.class, FailureClass::Rejected);
        assert!(twice.message.contains("found 2 objects named master"), "{}", twice.message);
    });
}

#[test]
fn ceremony_keys_pass_the_audit() {
    in_module(|token| {
        let ceremony = token.open();
        let mut made = Vec::new();
        for kind in [KeyType::P256, KeyType::P384, KeyType::Ed25519, KeyType::Rsa2048] {
            let key = ceremony.create_signing_key(&name(&format!("sign-{kind}")), kind).unwrap();
            made.push((key, KeyRole::Signing(kind)));
        }
        for prf in [Prf::HmacSha256, Prf::AesCmac] {
            let key = ceremony.create_master_key(&name(&format!("{prf:?}").to_lowercase()), prf).unwrap();
            made.push((key, KeyRole::Master(prf)));
        }
        made.push((create_wrapping_key(&ceremony, &name("wrap")).unwrap(), KeyRole::Wrapping));
        let keys = key_map(made.iter().map(|(key, role)| (key, *role)));
        assert_eq!(keys.len(), 7);
        token.operations(&ceremony, keys, None).check_keys().unwrap();
    });
}
