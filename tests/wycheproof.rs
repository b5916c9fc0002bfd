//! Google's and the C2SP's Wycheproof: signatures that were wrong in somebody's library once.
//!
//! AES-KWP and AES-GCM run where they are used: `src/hsm/transport.rs` and `src/package/gcm.rs`.

use spp::keys::{PublicKey, SignatureAlgorithm};
use wycheproof::{TestResult, ecdsa, eddsa, rsa_pkcs1_verify, rsa_pss_verify};

/// How many signatures had to verify, had to be refused, and could be either.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ran {
    valid: usize,
    invalid: usize,
    acceptable: usize,
}

impl Ran {
    fn check(&mut self, result: TestResult, accepted: bool, what: &str) {
        match result {
            TestResult::Valid => {
                assert!(accepted, "a valid signature was refused: {what}");
                self.valid += 1;
            }
            TestResult::Invalid => {
                assert!(!accepted, "an invalid signature was accepted: {what}");
                self.invalid += 1;
            }
            TestResult::Acceptable => self.acceptable += 1,
        }
    }
}

/// Runs every test of a set; the modules of the crate have the same names but not the same types.
macro_rules! run {
    ($module:ident, $set:ident, $algorithm:ident) => {{
        let mut ran = Ran::default();
        for group in $module::TestSet::load($module::TestName::$set).unwrap().test_groups {
            let key = PublicKey::from_spki_der(&group.der).unwrap();
            for test in group.tests {
                let accepted = key.verify(SignatureAlgorithm::$algorithm, &test.msg, &test.sig).is_ok();
                ran.check(test.result, accepted, &format!("{} {}", test.tc_id, test.comment));
            }
        }
        ran
    }};
}

#[test]
fn ecdsa_p256_takes_the_valid_signatures_and_no_other() {
    assert_eq!(run!(ecdsa, EcdsaSecp256r1Sha256, EcdsaP256Sha256), Ran { valid: 174, invalid: 310, acceptable: 0 });
}

#[test]
fn ecdsa_p384_takes_the_valid_signatures_and_no_other() {
    assert_eq!(run!(ecdsa, EcdsaSecp384r1Sha384, EcdsaP384Sha384), Ran { valid: 194, invalid: 310, acceptable: 0 });
}

#[test]
fn ed25519_takes_the_valid_signatures_and_no_other() {
    assert_eq!(run!(eddsa, Ed25519, Ed25519), Ran { valid: 88, invalid: 63, acceptable: 0 });
}

#[test]
fn rsa_takes_the_valid_signatures_and_no_other() {
    let pkcs1_2048 = run!(rsa_pkcs1_verify, Rsa2048Sha256, RsaPkcs1Sha256);
    let pkcs1_3072 = run!(rsa_pkcs1_verify, Rsa3072Sha256, RsaPkcs1Sha256);
    let pkcs1_4096 = run!(rsa_pkcs1_verify, Rsa4096Sha256, RsaPkcs1Sha256);
    let pss_2048 = run!(rsa_pss_verify, RsaPss2048Sha256Mgf1SaltLen32, RsaPssSha256);
    let pss_3072 = run!(rsa_pss_verify, RsaPss3072Sha256Mgf1SaltLen32, RsaPssSha256);
    assert_eq!(
        [pkcs1_2048, pkcs1_3072, pkcs1_4096, pss_2048, pss_3072],
        [
            Ran { valid: 9, invalid: 249, acceptable: 1 },
            Ran { valid: 8, invalid: 250, acceptable: 1 },
            Ran { valid: 7, invalid: 250, acceptable: 1 },
            Ran { valid: 63, invalid: 45, acceptable: 0 },
            Ran { valid: 63, invalid: 45, acceptable: 0 },
        ]
    );
}

/// Ours have a salt as long as the hash and its hash in MGF1; another length or hash is another algorithm.
#[test]
fn pss_with_other_parameters_is_refused() {
    let mut refused = 0;
    for set in
        [rsa_pss_verify::TestName::RsaPss2048Sha256Mgf1SaltLen0, rsa_pss_verify::TestName::RsaPss2048Sha256Mgf1Sha1_20]
    {
        for group in rsa_pss_verify::TestSet::load(set).unwrap().test_groups {
            let key = PublicKey::from_spki_der(&group.der).unwrap();
            for test in group.tests.into_iter().filter(|test| test.result == TestResult::Valid) {
                let verified = key.verify(SignatureAlgorithm::RsaPssSha256, &test.msg, &test.sig);
                assert!(verified.is_err(), "{} {}", test.tc_id, test.comment);
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 124);
}
