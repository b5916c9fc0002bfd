//! Keys created in ceremonies work, have the reported attributes, and are never overwritten.

use spp_format::keys::{KeyType, SignatureAlgorithm};

use super::{create_wrapping_key, in_module, key_map, name, object_counts};
use crate::hsm::wire::{Answer, Operation};
use crate::hsm::{HsmError, KeyRole, Prf};

#[test]
fn signatures_of_every_algorithm_verify() {
    in_module(|token| {
        let ceremony = token.open();
        for (kind, algorithms) in [
            (KeyType::P256, [SignatureAlgorithm::EcdsaP256Sha256].as_slice()),
            (KeyType::P384, &[SignatureAlgorithm::EcdsaP384Sha384]),
            (KeyType::Ed25519, &[SignatureAlgorithm::Ed25519]),
            (KeyType::Rsa2048, &[SignatureAlgorithm::RsaPkcs1Sha256, SignatureAlgorithm::RsaPssSha256]),
        ] {
            let key = ceremony.create_signing_key(&name(kind.name()), kind).unwrap();
            let public = key.public.unwrap();
            for algorithm in algorithms {
                // Enough messages that r or s of some ECDSA signatures has a leading zero byte.
                for message in (0..100u8).map(|i| vec![i; usize::from(i)]) {
                    let signature = ceremony.sign(&key.name, &key.id, kind, *algorithm, &message).unwrap();
                    assert_eq!(public.verify(*algorithm, &message, &signature), Ok(()), "{algorithm:?}");
                    assert!(public.verify(*algorithm, b"something else", &signature).is_err());
                }
            }
        }
    });
}

#[test]
fn used_name_is_refused_and_creates_nothing() {
    in_module(|token| {
        let ceremony = token.open();
        let taken = name("taken");
        assert!(ceremony.is_free(&taken).unwrap());
        create_wrapping_key(&ceremony, &taken).unwrap();
        assert!(!ceremony.is_free(&taken).unwrap());
        let session = ceremony.token.session().unwrap();
        let before = object_counts(&session);
        let attempts = [
            create_wrapping_key(&ceremony, &taken),
            ceremony.create_master_key(&taken, Prf::AesCmac),
            ceremony.create_signing_key(&taken, KeyType::P256),
        ];
        for attempt in attempts {
            let Err(HsmError::Refused(why)) = attempt else { panic!("{attempt:?}") };
            assert!(why.contains("already has an object named taken"), "{why}");
        }
        assert_eq!(object_counts(&session), before);
    });
}

#[test]
fn created_key_reports_token_attributes() {
    in_module(|token| {
        let ceremony = token.open();
        let master = ceremony.create_master_key(&name("master"), Prf::HmacSha256).unwrap();
        let wrap = create_wrapping_key(&ceremony, &name("wrap")).unwrap();
        let signing = ceremony.create_signing_key(&name("sign"), KeyType::P256).unwrap();
        assert!(master.public.is_none() && wrap.public.is_none());
        assert_eq!(signing.public.as_ref().unwrap().kind(), KeyType::P256);
        for (key, uses) in [(&master, ["Sign"].as_slice()), (&wrap, &["Wrap", "Unwrap"]), (&signing, &["Sign"])] {
            assert_eq!(key.id.len(), 16);
            for (attribute, value) in [
                ("Token", "true"),
                ("Private", "true"),
                ("Sensitive", "true"),
                ("Extractable", "false"),
                ("AlwaysSensitive", "true"),
                ("NeverExtractable", "true"),
                ("Local", "true"),
                ("Modifiable", "false"),
                ("Copyable", "false"),
            ] {
                assert_eq!(key.attributes.get(attribute).map(String::as_str), Some(value), "{} {attribute}", key.name);
            }
            let all = ["Sign", "Encrypt", "Decrypt", "Wrap", "Unwrap", "Derive"];
            let allowed: Vec<_> =
                all.into_iter().filter(|a| key.attributes.get(*a).is_some_and(|v| v == "true")).collect();
            assert_eq!(allowed, uses, "{}", key.name);
        }
        assert!(master.id != wrap.id && wrap.id != signing.id);
    });
}

#[test]
fn check_value_is_stable_and_unique_per_key() {
    in_module(|token| {
        let ceremony = token.open();
        let mut values = std::collections::BTreeSet::new();
        for (key, prf) in [("a", Prf::HmacSha256), ("b", Prf::HmacSha256), ("c", Prf::AesCmac)] {
            let key = ceremony.create_master_key(&name(key), prf).unwrap();
            let value = ceremony.check_value(&key.name, &key.id, prf).unwrap();
            assert_eq!(value.len(), 8);
            assert_eq!(ceremony.check_value(&key.name, &key.id, prf).unwrap(), value);
            assert!(values.insert(value));
        }
    });
}

#[test]
fn destroyed_key_is_unusable_in_every_session() {
    in_module(|token| {
        let ceremony = token.open();
        let doomed = create_wrapping_key(&ceremony, &name("doomed")).unwrap();
        let other = create_wrapping_key(&ceremony, &name("other")).unwrap();
        let keys = || key_map([(&doomed, KeyRole::Wrapping), (&other, KeyRole::Wrapping)]);
        let (mut one, _) = token.operations_with_transport(&ceremony, keys());
        let (mut two, _) = token.operations_with_transport(&ceremony, keys());
        let pair = |key| Operation::GeneratePair { kind: KeyType::P256, wrapping_key: name(key) };
        two.perform(pair("doomed")).map(drop).unwrap();

        assert!(matches!(one.perform(Operation::Destroy { key: name("doomed") }), Ok(Answer::Destroyed)));
        assert!(ceremony.is_free(&name("doomed")).unwrap());
        for operations in [&mut one, &mut two] {
            operations.perform(pair("doomed")).map(drop).unwrap_err();
            operations.perform(pair("other")).map(drop).unwrap();
        }
        let again = one.perform(Operation::Destroy { key: name("doomed") }).map(drop).unwrap_err();
        assert!(again.message.contains("is not on the token"), "{}", again.message);
    });
}
