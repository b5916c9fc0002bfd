//! The KDF matches NIST's test vectors, and different inputs give different keys.

use cryptoki::object::{Attribute, KeyType as CkKeyType, ObjectClass};
use serde::Deserialize;

use super::{in_module, key_map, name};
use crate::hsm::wire::KeyOnToken;
use crate::hsm::{Derivation, KeyRole, Prf, Provenance};

#[derive(Deserialize)]
struct Vectors {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prf: Prf,
    count: u32,
    /// The key.
    ki: String,
    fixed_input: String,
    /// The derived bytes.
    ko: String,
}

/// The NIST CAVP vectors; the file names their source.
fn vectors() -> Vec<Case> {
    let vectors: Vectors = serde_json::from_str(include_str!("../../../tests/vectors/sp800-108-counter.json")).unwrap();
    vectors.cases
}

#[test]
fn kdf_matches_nist_cavp_vectors() {
    in_module(|token| {
        let ceremony = token.open();
        let session = ceremony.token.session().unwrap();
        let (mut cmac, mut hmac) = (0, 0);
        for case in vectors() {
            let (key_type, ran) = match case.prf {
                Prf::AesCmac => (CkKeyType::AES, &mut cmac),
                Prf::HmacSha256 => (CkKeyType::GENERIC_SECRET, &mut hmac),
            };
            let key = name(&format!("cavp-{}-{}", key_type, case.count).replace(' ', "-").to_lowercase());
            let id = case.count.to_be_bytes().to_vec();
            let import = [
                Attribute::Class(ObjectClass::SECRET_KEY),
                Attribute::KeyType(key_type),
                Attribute::Token(false),
                Attribute::Sign(true),
                Attribute::Label(key.as_str().as_bytes().to_vec()),
                Attribute::Id(id.clone()),
                Attribute::Value(hex::decode(&case.ki).unwrap()),
            ];
            session.create_object(&import).unwrap();
            let role = KeyRole::Master(case.prf);
            let mut operations = token.operations(
                &ceremony,
                [(key.clone(), KeyOnToken { id, role, provenance: Provenance::Made })].into(),
                None,
            );
            let fixed_input = hex::decode(&case.fixed_input).unwrap();
            let derived = operations.derive(&key, case.prf, &fixed_input, case.ko.len() / 2).unwrap();
            assert_eq!(hex::encode(derived), case.ko, "{:?} {}", case.prf, case.count);
            *ran += 1;
        }
        assert_eq!((cmac, hmac), (40, 40));
    });
}

#[test]
fn derived_key_depends_on_every_input() {
    in_module(|token| {
        let ceremony = token.open();
        let mut seen = std::collections::BTreeSet::new();
        for prf in [Prf::AesCmac, Prf::HmacSha256] {
            for master in ["one", "two"] {
                let key = name(&format!("{master}-{prf:?}").to_lowercase());
                let key = ceremony.create_master_key(&key, prf).unwrap();
                let derive = |purpose: &str, identity: &str, length| {
                    let identity = identity.parse().unwrap();
                    let order = Derivation::device_key(key.name.clone(), purpose, &identity, length);
                    // A new session for each call, without cached handles.
                    let mut operations = token.operations(&ceremony, key_map([(&key, KeyRole::Master(prf))]), None);
                    operations.derive(&key.name, prf, &order.fixed_input(), length).unwrap()
                };
                for (purpose, identity) in [("channel", "serial:A"), ("storage", "serial:A"), ("channel", "serial:B")] {
                    for length in [16, 24, 32, 64] {
                        let derived = derive(purpose, identity, length);
                        assert_eq!(derived.len(), length);
                        assert_eq!(derived, derive(purpose, identity, length), "equal inputs give equal keys");
                        // The length is part of the input (SP 800-108r1 §4): a short key is not a prefix of a long one.
                        assert!(seen.insert(derived[..16].to_vec()), "{prf:?} {master} {purpose} {identity} {length}");
                    }
                }
            }
        }
        assert_eq!(seen.len(), 2 * 2 * 3 * 4);
    });
}
