//! Key confirmation: the device proves that it holds the key, the package and the backup (`key-confirmation` in
//! `proto/data-package.cddl`).
//!
//! COSE_Sign1 (RFC 9052 §4.2) by the private key, or COSE_Mac0 (RFC 9052 §6.2) by the first symmetric key.

use aws_lc_rs::hmac;
use coset::{
    Algorithm, CoseMac0, CoseMac0Builder, CoseSign1, CoseSign1Builder, Header, HeaderBuilder, MacContext,
    TaggedCborSerializable as _, iana, mac_structure_data,
};

use super::MAX_CONFIRMATION_LEN;
use super::cbor::{CborError, Reader, Writer};
use crate::keys::{
    DevicePrivateKey, KeyError, KeyKind, PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed, ecdsa_fixed_from_der,
    sha256,
};
use crate::names::{ChipId, SessionId};
use crate::secret::SecretBytes;

/// What is confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfirmationClaims {
    /// The session.
    pub session: SessionId,
    /// The chip.
    pub chip: ChipId,
    /// SHA-256 of the data package.
    pub package_hash: [u8; 32],
    /// SHA-256 of the backup package.
    pub backup_hash: [u8; 32],
}

impl ConfirmationClaims {
    /// The claims about a package and its backup.
    pub fn about(session: SessionId, chip: ChipId, package: &SecretBytes, backup: &[u8]) -> Self {
        // Exposed to be hashed.
        Self { session, chip, package_hash: sha256(package.expose()), backup_hash: sha256(backup) }
    }

    fn to_payload(&self) -> Result<Vec<u8>, ConfirmationRefused> {
        let mut out = Writer::with_limit(256);
        out.map(4).int(1).bytes(self.session.as_bytes()).int(2).bytes(self.chip.as_bytes());
        out.int(3).bytes(&self.package_hash).int(4).bytes(&self.backup_hash);
        out.finish_public().ok_or(ConfirmationRefused::Shape("the claims are too long".into()))
    }

    /// Refuses a payload that claims anything else, saying what.
    fn expect(&self, payload: &[u8]) -> Result<(), ConfirmationRefused> {
        let mut reader = Reader::new(payload);
        let mut map = reader.map().map_err(shape)?;
        let expected: [(i64, &'static str, &[u8]); 4] = [
            (1, "session", self.session.as_bytes()),
            (2, "chip", self.chip.as_bytes()),
            (3, "package hash", &self.package_hash),
            (4, "backup hash", &self.backup_hash),
        ];
        for (key, claim, value) in expected {
            if !map.key(key).map_err(shape)? {
                return Err(shape(CborError::MissingKey(key)));
            }
            if map.reader.bytes().map_err(shape)? != value {
                return Err(ConfirmationRefused::OtherClaim(claim));
            }
        }
        map.end().map_err(shape)?;
        reader.end().map_err(shape)
    }
}

/// With what the device confirms.
pub enum ConfirmationSigner<'a> {
    /// The delivered private key, or the device's own.
    Pair(&'a DevicePrivateKey),
    /// The first symmetric key of the package, where there is no pair.
    Symmetric(&'a SecretBytes),
}

/// With what the confirmation is verified.
pub enum ConfirmationKey<'a> {
    /// The public key of the certificate.
    Pair(&'a PublicKey),
    /// The first symmetric key of the package.
    Symmetric(&'a SecretBytes),
}

/// The proof that the device holds its key, the package and the backup. Only [`verify_confirmation`] makes one.
#[derive(Debug)]
pub struct KeyConfirmation {
    claims: ConfirmationClaims,
}

impl KeyConfirmation {
    /// What was proved.
    pub const fn claims(&self) -> &ConfirmationClaims {
        &self.claims
    }
}

/// Why bytes do not confirm what they should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfirmationRefused {
    /// More bytes than any confirmation has.
    #[error("the key confirmation has {0} bytes, at most {MAX_CONFIRMATION_LEN} are allowed")]
    TooLarge(usize),
    /// Not a COSE_Sign1 or COSE_Mac0 of claims.
    #[error("not a key confirmation: {0}")]
    Shape(String),
    /// It confirms something else.
    #[error("the key confirmation is about another {0}; the device must confirm what it got in this session")]
    OtherClaim(&'static str),
    /// The key cannot make such a signature or MAC.
    #[error(
        "the key confirmation does not say algorithm {expected} in its protected header, which the device's key needs"
    )]
    WrongAlgorithm {
        /// The COSE algorithm of the device's key.
        expected: i64,
    },
    /// Made by another key, or altered.
    #[error("the key confirmation's signature or MAC does not verify with the device's key")]
    BadSignature,
    /// The key cannot sign.
    #[error("the key confirmation cannot be signed: {0}")]
    CannotSign(#[source] KeyError),
}

/// Confirms, in the device.
///
/// # Errors
/// If the key cannot sign.
pub fn confirm(claims: &ConfirmationClaims, with: &ConfirmationSigner<'_>) -> Result<Vec<u8>, ConfirmationRefused> {
    let payload = claims.to_payload()?;
    match with {
        ConfirmationSigner::Pair(pair) => {
            let (cose, algorithm) = algorithms(pair.public().kind());
            let unsigned = CoseSign1Builder::new().protected(header(cose)).payload(payload);
            let signed = unsigned.try_create_signature(&[], |message| sign(pair, algorithm, message));
            signed.map_err(ConfirmationRefused::CannotSign)?.build().to_tagged_vec().map_err(shape)
        }
        ConfirmationSigner::Symmetric(key) => CoseMac0Builder::new()
            .protected(header(iana::Algorithm::HMAC_256_256))
            .payload(payload)
            // Exposed to the provider for the MAC.
            .create_tag(&[], |message| hmac::sign(&hmac_key(key), message).as_ref().to_vec())
            .build()
            .to_tagged_vec()
            .map_err(shape),
    }
}

/// Verifies a device's confirmation of exactly these claims.
///
/// # Errors
/// Says which claim differs, or that the algorithm or the signature is wrong.
pub fn verify_confirmation(
    bytes: &[u8],
    expected: &ConfirmationClaims,
    key: &ConfirmationKey<'_>,
) -> Result<KeyConfirmation, ConfirmationRefused> {
    if bytes.len() > MAX_CONFIRMATION_LEN {
        return Err(ConfirmationRefused::TooLarge(bytes.len()));
    }
    // The claims first: they tell a mixed-up device from a wrong key. Nothing of them is used before the key is checked.
    match key {
        ConfirmationKey::Pair(public) => {
            let cose = CoseSign1::from_tagged_slice(bytes).map_err(shape)?;
            let (wanted, algorithm) = algorithms(public.kind());
            expect_algorithm(&cose.protected.header, wanted)?;
            expected.expect(attached(cose.payload.as_deref())?)?;
            cose.verify_signature(&[], |signature, message| verify(public, algorithm, message, signature))?;
        }
        ConfirmationKey::Symmetric(key) => {
            let cose = CoseMac0::from_tagged_slice(bytes).map_err(shape)?;
            expect_algorithm(&cose.protected.header, iana::Algorithm::HMAC_256_256)?;
            let payload = attached(cose.payload.as_deref())?;
            expected.expect(payload)?;
            let message = mac_structure_data(MacContext::CoseMac0, cose.protected.clone(), &[], payload);
            // In constant time.
            hmac::verify(&hmac_key(key), &message, &cose.tag).map_err(|_| ConfirmationRefused::BadSignature)?;
        }
    }
    Ok(KeyConfirmation { claims: expected.clone() })
}

/// How a key of this kind signs in COSE: RFC 9053 §2.1 and §2.2, RFC 8230 §2.
const fn algorithms(kind: KeyKind) -> (iana::Algorithm, SignatureAlgorithm) {
    match kind {
        KeyKind::P256 => (iana::Algorithm::ES256, SignatureAlgorithm::EcdsaP256Sha256),
        KeyKind::P384 => (iana::Algorithm::ES384, SignatureAlgorithm::EcdsaP384Sha384),
        KeyKind::Ed25519 => (iana::Algorithm::EdDSA, SignatureAlgorithm::Ed25519),
        KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => {
            (iana::Algorithm::PS256, SignatureAlgorithm::RsaPssSha256)
        }
    }
}

/// COSE has ECDSA as `r || s` (RFC 9053 §2.1).
fn sign(pair: &DevicePrivateKey, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, KeyError> {
    let signature = pair.sign(algorithm, message)?;
    match pair.public().kind() {
        kind @ (KeyKind::P256 | KeyKind::P384) => ecdsa_fixed_from_der(&signature, kind).ok_or(KeyError::BadSignature),
        _ => Ok(signature),
    }
}

fn verify(
    public: &PublicKey,
    algorithm: SignatureAlgorithm,
    message: &[u8],
    signature: &[u8],
) -> Result<(), ConfirmationRefused> {
    let ecdsa_bytes = match public.kind() {
        KeyKind::P256 => Some(64),
        KeyKind::P384 => Some(96),
        _ => None,
    };
    let signature = match ecdsa_bytes {
        Some(bytes) if signature.len() != bytes => None,
        Some(_) => ecdsa_der_from_fixed(signature),
        None => Some(signature.to_vec()),
    };
    let signature = signature.ok_or(ConfirmationRefused::BadSignature)?;
    public.verify(algorithm, message, &signature).map_err(|_| ConfirmationRefused::BadSignature)
}

fn header(algorithm: iana::Algorithm) -> Header {
    HeaderBuilder::new().algorithm(algorithm).build()
}

fn expect_algorithm(header: &Header, wanted: iana::Algorithm) -> Result<(), ConfirmationRefused> {
    if header.alg != Some(Algorithm::Assigned(wanted)) {
        return Err(ConfirmationRefused::WrongAlgorithm { expected: wanted as i64 });
    }
    if !header.crit.is_empty() {
        return Err(ConfirmationRefused::Shape("critical headers are not understood".into()));
    }
    Ok(())
}

fn attached(payload: Option<&[u8]>) -> Result<&[u8], ConfirmationRefused> {
    payload.ok_or(ConfirmationRefused::Shape("the payload is not attached".into()))
}

fn hmac_key(key: &SecretBytes) -> hmac::Key {
    // Exposed to the provider, which wipes its key schedule.
    hmac::Key::new(hmac::HMAC_SHA256, key.expose())
}

fn shape(problem: impl std::fmt::Display) -> ConfirmationRefused {
    ConfirmationRefused::Shape(problem.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, KINDS, chip, session};
    use super::*;
    use proptest::prelude::*;

    fn claims() -> ConfirmationClaims {
        ConfirmationClaims::about(session(1), chip(2), &SecretBytes::copy_of(b"package"), b"backup")
    }

    fn refused(bytes: &[u8], expected: &ConfirmationClaims, key: &ConfirmationKey<'_>) -> ConfirmationRefused {
        verify_confirmation(bytes, expected, key).unwrap_err()
    }

    #[test]
    fn every_kind_of_key_confirms() {
        for kind in KINDS {
            let (pair, other) = (samples::pair(kind), samples::pair(kind));
            let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&pair)).unwrap();
            let proof = verify_confirmation(&bytes, &claims(), &ConfirmationKey::Pair(pair.public())).unwrap();
            assert_eq!(proof.claims(), &claims());
            let by_other = refused(&bytes, &claims(), &ConfirmationKey::Pair(other.public()));
            assert_eq!(by_other, ConfirmationRefused::BadSignature, "{kind}");
        }
        let (key, other) = (SecretBytes::new(vec![1; 32]), SecretBytes::new(vec![2; 32]));
        let bytes = confirm(&claims(), &ConfirmationSigner::Symmetric(&key)).unwrap();
        assert!(verify_confirmation(&bytes, &claims(), &ConfirmationKey::Symmetric(&key)).is_ok());
        let by_other = refused(&bytes, &claims(), &ConfirmationKey::Symmetric(&other));
        assert_eq!(by_other, ConfirmationRefused::BadSignature);
    }

    #[test]
    fn a_confirmation_of_something_else_says_what_differs() {
        let pair = samples::pair(KeyKind::P256);
        let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&pair)).unwrap();
        for (expected, differs) in [
            (ConfirmationClaims { session: session(9), ..claims() }, "session"),
            (ConfirmationClaims { chip: chip(9), ..claims() }, "chip"),
            (ConfirmationClaims { package_hash: [9; 32], ..claims() }, "package hash"),
            (ConfirmationClaims { backup_hash: [9; 32], ..claims() }, "backup hash"),
        ] {
            let refused = refused(&bytes, &expected, &ConfirmationKey::Pair(pair.public()));
            assert_eq!(refused, ConfirmationRefused::OtherClaim(differs));
        }
    }

    #[test]
    fn the_algorithm_must_fit_the_key() {
        let key = SecretBytes::new(vec![1; 32]);
        let (p256, ed25519) = (samples::pair(KeyKind::P256), samples::pair(KeyKind::Ed25519));
        let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&p256)).unwrap();
        let refused_by = |key| refused(&bytes, &claims(), &key);
        let expected = ConfirmationRefused::WrongAlgorithm { expected: -8 };
        assert_eq!(refused_by(ConfirmationKey::Pair(ed25519.public())), expected);
        let mac_expected = refused_by(ConfirmationKey::Symmetric(&key));
        assert!(matches!(mac_expected, ConfirmationRefused::Shape(_)), "a signature is no MAC");
    }

    #[test]
    fn no_altered_or_cut_confirmation_verifies() {
        let pair = samples::pair(KeyKind::P384);
        let key = SecretBytes::new(vec![1; 32]);
        for (signer, verifier) in [
            (ConfirmationSigner::Pair(&pair), ConfirmationKey::Pair(pair.public())),
            (ConfirmationSigner::Symmetric(&key), ConfirmationKey::Symmetric(&key)),
        ] {
            let bytes = confirm(&claims(), &signer).unwrap();
            for at in 0..bytes.len() {
                let mut altered = bytes.clone();
                altered[at] ^= 1;
                assert!(verify_confirmation(&altered, &claims(), &verifier).is_err(), "{at}");
                assert!(verify_confirmation(&bytes[..at], &claims(), &verifier).is_err(), "{at}");
            }
            assert!(verify_confirmation(&[&bytes[..], &[0]].concat(), &claims(), &verifier).is_err());
            let large = [&bytes[..], &[0; MAX_CONFIRMATION_LEN]].concat();
            assert!(matches!(refused(&large, &claims(), &verifier), ConfirmationRefused::TooLarge(_)));
        }
    }

    proptest! {
        #[test]
        fn verifying_never_panics(bytes: Vec<u8>) {
            let key = SecretBytes::new(vec![1; 32]);
            for bytes in [bytes.clone(), [&[0xd1, 0x84], bytes.as_slice()].concat()] {
                prop_assert!(verify_confirmation(&bytes, &claims(), &ConfirmationKey::Symmetric(&key)).is_err());
            }
        }
    }
}
