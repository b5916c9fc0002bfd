//! Key confirmation: proves that the device holds the key, the package and the backup (`key-confirmation` in
//! `proto/data-package.cddl`).
//!
//! COSE_Sign1 (RFC 9052 §4.2) with the private key, or COSE_Mac0 (RFC 9052 §6.2) with the first symmetric key.

use aws_lc_rs::hmac;
use coset::{
    Algorithm, CoseMac0, CoseMac0Builder, CoseSign1, CoseSign1Builder, Header, HeaderBuilder, MacContext,
    TaggedCborSerializable as _, iana, mac_structure_data,
};

use super::MAX_CONFIRMATION_LEN;
use crate::cbor::{CborError, Reader, Writer};
use crate::keys::{
    DevicePrivateKey, KeyError, KeyType, PublicKey, SignatureAlgorithm, ecdsa_der_from_fixed, ecdsa_fixed_from_der,
    sha256,
};
use crate::names::{ChipId, SessionId};
use crate::secret::SecretBytes;

/// The confirmed values.
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
    /// Creates the claims for a package and its backup.
    pub fn new(session: SessionId, chip: ChipId, package: &SecretBytes, backup: &[u8]) -> Self {
        // Exposed to hash it.
        Self { session, chip, package_hash: sha256(package.expose()), backup_hash: sha256(backup) }
    }

    fn to_payload(&self) -> Result<Vec<u8>, ConfirmationError> {
        let mut out = Writer::with_limit(256);
        out.map(4).int(1).bytes(self.session.as_bytes()).int(2).bytes(self.chip.as_bytes());
        out.int(3).bytes(&self.package_hash).int(4).bytes(&self.backup_hash);
        out.finish_public().ok_or(ConfirmationError::Shape("claims too long".into()))
    }

    /// Rejects a payload with other claims and names the first difference.
    fn expect(&self, payload: &[u8]) -> Result<(), ConfirmationError> {
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
                return Err(ConfirmationError::OtherClaim(claim));
            }
        }
        map.end().map_err(shape)?;
        reader.end().map_err(shape)
    }
}

/// The key with which the device confirms.
pub enum ConfirmationSigner<'a> {
    /// The delivered private key, or the device's own.
    Pair(&'a DevicePrivateKey),
    /// The first symmetric key of the package, if there is no key pair.
    Symmetric(&'a SecretBytes),
}

/// The key that verifies the confirmation.
pub enum ConfirmationKey<'a> {
    /// The public key of the certificate.
    Pair(&'a PublicKey),
    /// The first symmetric key of the package.
    Symmetric(&'a SecretBytes),
}

/// Proof that the device holds its key, the package and the backup. Only [`verify_confirmation`] creates one.
#[derive(Debug)]
pub struct KeyConfirmation {
    claims: ConfirmationClaims,
}

impl KeyConfirmation {
    /// The proven claims.
    pub const fn claims(&self) -> &ConfirmationClaims {
        &self.claims
    }
}

/// Why a confirmation was rejected or could not be created.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfirmationError {
    /// Larger than [`MAX_CONFIRMATION_LEN`].
    #[error("key confirmation too large: {0} bytes, at most {MAX_CONFIRMATION_LEN} are allowed")]
    TooLarge(usize),
    /// Not a COSE_Sign1 or COSE_Mac0 of claims.
    #[error("invalid key confirmation: {0}")]
    Shape(String),
    /// A claim differs.
    #[error("key confirmation for another {0}; the device must confirm the package of this session")]
    OtherClaim(&'static str),
    /// The algorithm does not match the key type.
    #[error("key confirmation: expected algorithm {expected} in the protected header, as the device's key requires")]
    WrongAlgorithm {
        /// The COSE algorithm of the device's key.
        expected: i64,
    },
    /// Signed by another key, or modified.
    #[error("key confirmation: the signature or MAC does not verify with the device's key")]
    BadSignature,
    /// The key failed to sign.
    #[error("cannot sign the key confirmation: {0}")]
    CannotSign(#[source] KeyError),
}

/// Creates a confirmation, inside the device.
///
/// # Errors
/// If the key cannot sign.
pub fn confirm(claims: &ConfirmationClaims, signer: &ConfirmationSigner<'_>) -> Result<Vec<u8>, ConfirmationError> {
    let payload = claims.to_payload()?;
    match signer {
        ConfirmationSigner::Pair(pair) => {
            let (cose, algorithm) = algorithms(pair.public().kind());
            let unsigned = CoseSign1Builder::new().protected(header(cose)).payload(payload);
            let signed = unsigned.try_create_signature(&[], |message| sign(pair, algorithm, message));
            signed.map_err(ConfirmationError::CannotSign)?.build().to_tagged_vec().map_err(shape)
        }
        ConfirmationSigner::Symmetric(key) => CoseMac0Builder::new()
            .protected(header(iana::Algorithm::HMAC_256_256))
            .payload(payload)
            // Exposed to the provider to compute the MAC.
            .create_tag(&[], |message| hmac::sign(&hmac_key(key), message).as_ref().to_vec())
            .build()
            .to_tagged_vec()
            .map_err(shape),
    }
}

/// Verifies a device's confirmation of exactly the expected claims.
///
/// # Errors
/// The error names the claim that differs, or states that the algorithm or signature is wrong.
pub fn verify_confirmation(
    bytes: &[u8],
    expected: &ConfirmationClaims,
    key: &ConfirmationKey<'_>,
) -> Result<KeyConfirmation, ConfirmationError> {
    if bytes.len() > MAX_CONFIRMATION_LEN {
        return Err(ConfirmationError::TooLarge(bytes.len()));
    }
    // Check claims first, to distinguish a mixed-up device from a wrong key. Nothing uses them before the key is checked.
    match key {
        ConfirmationKey::Pair(public) => {
            let cose = CoseSign1::from_tagged_slice(bytes).map_err(shape)?;
            let (expected_algorithm, algorithm) = algorithms(public.kind());
            expect_algorithm(&cose.protected.header, expected_algorithm)?;
            expected.expect(attached(cose.payload.as_deref())?)?;
            cose.verify_signature(&[], |signature, message| verify(public, algorithm, message, signature))?;
        }
        ConfirmationKey::Symmetric(key) => {
            let cose = CoseMac0::from_tagged_slice(bytes).map_err(shape)?;
            expect_algorithm(&cose.protected.header, iana::Algorithm::HMAC_256_256)?;
            let payload = attached(cose.payload.as_deref())?;
            expected.expect(payload)?;
            let message = mac_structure_data(MacContext::CoseMac0, cose.protected.clone(), &[], payload);
            // Constant time.
            hmac::verify(&hmac_key(key), &message, &cose.tag).map_err(|_| ConfirmationError::BadSignature)?;
        }
    }
    Ok(KeyConfirmation { claims: expected.clone() })
}

/// COSE and X.509 signature algorithms of a key type: RFC 9053 §2.1 and §2.2, RFC 8230 §2.
const fn algorithms(kind: KeyType) -> (iana::Algorithm, SignatureAlgorithm) {
    match kind {
        KeyType::P256 => (iana::Algorithm::ES256, SignatureAlgorithm::EcdsaP256Sha256),
        KeyType::P384 => (iana::Algorithm::ES384, SignatureAlgorithm::EcdsaP384Sha384),
        KeyType::Ed25519 => (iana::Algorithm::EdDSA, SignatureAlgorithm::Ed25519),
        KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => {
            (iana::Algorithm::PS256, SignatureAlgorithm::RsaPssSha256)
        }
    }
}

/// COSE encodes ECDSA signatures as `r || s` (RFC 9053 §2.1).
fn sign(pair: &DevicePrivateKey, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, KeyError> {
    let signature = pair.sign(algorithm, message)?;
    match pair.public().kind() {
        kind @ (KeyType::P256 | KeyType::P384) => ecdsa_fixed_from_der(&signature, kind).ok_or(KeyError::BadSignature),
        _ => Ok(signature),
    }
}

fn verify(
    public: &PublicKey,
    algorithm: SignatureAlgorithm,
    message: &[u8],
    signature: &[u8],
) -> Result<(), ConfirmationError> {
    let ecdsa_bytes = match public.kind() {
        KeyType::P256 => Some(64),
        KeyType::P384 => Some(96),
        _ => None,
    };
    let signature = match ecdsa_bytes {
        Some(bytes) if signature.len() != bytes => None,
        Some(_) => ecdsa_der_from_fixed(signature),
        None => Some(signature.to_vec()),
    };
    let signature = signature.ok_or(ConfirmationError::BadSignature)?;
    public.verify(algorithm, message, &signature).map_err(|_| ConfirmationError::BadSignature)
}

fn header(algorithm: iana::Algorithm) -> Header {
    HeaderBuilder::new().algorithm(algorithm).build()
}

fn expect_algorithm(header: &Header, expected: iana::Algorithm) -> Result<(), ConfirmationError> {
    if header.alg != Some(Algorithm::Assigned(expected)) {
        return Err(ConfirmationError::WrongAlgorithm { expected: expected as i64 });
    }
    if !header.crit.is_empty() {
        return Err(ConfirmationError::Shape("unsupported critical headers".into()));
    }
    Ok(())
}

fn attached(payload: Option<&[u8]>) -> Result<&[u8], ConfirmationError> {
    payload.ok_or(ConfirmationError::Shape("payload missing or detached; it must be attached".into()))
}

fn hmac_key(key: &SecretBytes) -> hmac::Key {
    // Exposed to the provider, which wipes its key schedule.
    hmac::Key::new(hmac::HMAC_SHA256, key.expose())
}

fn shape(problem: impl std::fmt::Display) -> ConfirmationError {
    ConfirmationError::Shape(problem.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, KINDS, chip, session};
    use super::*;
    use proptest::prelude::*;

    fn claims() -> ConfirmationClaims {
        ConfirmationClaims::new(session(1), chip(2), &SecretBytes::copy_of(b"package"), b"backup")
    }

    fn rejection(bytes: &[u8], expected: &ConfirmationClaims, key: &ConfirmationKey<'_>) -> ConfirmationError {
        verify_confirmation(bytes, expected, key).unwrap_err()
    }

    #[test]
    fn confirmation_verifies_for_every_key_type() {
        for kind in KINDS {
            let (pair, other) = (samples::pair(kind), samples::pair(kind));
            let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&pair)).unwrap();
            let proof = verify_confirmation(&bytes, &claims(), &ConfirmationKey::Pair(pair.public())).unwrap();
            assert_eq!(proof.claims(), &claims());
            let rejected = rejection(&bytes, &claims(), &ConfirmationKey::Pair(other.public()));
            assert_eq!(rejected, ConfirmationError::BadSignature, "{kind}");
        }
        let (key, other) = (SecretBytes::new(vec![1; 32]), SecretBytes::new(vec![2; 32]));
        let bytes = confirm(&claims(), &ConfirmationSigner::Symmetric(&key)).unwrap();
        assert!(verify_confirmation(&bytes, &claims(), &ConfirmationKey::Symmetric(&key)).is_ok());
        let rejected = rejection(&bytes, &claims(), &ConfirmationKey::Symmetric(&other));
        assert_eq!(rejected, ConfirmationError::BadSignature);
    }

    #[test]
    fn confirmation_of_other_claims_names_difference() {
        let pair = samples::pair(KeyType::P256);
        let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&pair)).unwrap();
        for (expected, differs) in [
            (ConfirmationClaims { session: session(9), ..claims() }, "session"),
            (ConfirmationClaims { chip: chip(9), ..claims() }, "chip"),
            (ConfirmationClaims { package_hash: [9; 32], ..claims() }, "package hash"),
            (ConfirmationClaims { backup_hash: [9; 32], ..claims() }, "backup hash"),
        ] {
            let rejected = rejection(&bytes, &expected, &ConfirmationKey::Pair(pair.public()));
            assert_eq!(rejected, ConfirmationError::OtherClaim(differs));
        }
    }

    #[test]
    fn confirmation_with_wrong_algorithm_rejected() {
        let key = SecretBytes::new(vec![1; 32]);
        let (p256, ed25519) = (samples::pair(KeyType::P256), samples::pair(KeyType::Ed25519));
        let bytes = confirm(&claims(), &ConfirmationSigner::Pair(&p256)).unwrap();
        let reject = |key| rejection(&bytes, &claims(), &key);
        let expected = ConfirmationError::WrongAlgorithm { expected: -8 };
        assert_eq!(reject(ConfirmationKey::Pair(ed25519.public())), expected);
        let rejected = reject(ConfirmationKey::Symmetric(&key));
        assert!(matches!(rejected, ConfirmationError::Shape(_)), "a signature is not a MAC");
    }

    #[test]
    fn altered_or_truncated_confirmation_rejected() {
        let pair = samples::pair(KeyType::P384);
        let key = SecretBytes::new(vec![1; 32]);
        for (signer, verifier) in [
            (ConfirmationSigner::Pair(&pair), ConfirmationKey::Pair(pair.public())),
            (ConfirmationSigner::Symmetric(&key), ConfirmationKey::Symmetric(&key)),
        ] {
            let bytes = confirm(&claims(), &signer).unwrap();
            for index in 0..bytes.len() {
                let mut altered = bytes.clone();
                altered[index] ^= 1;
                assert!(verify_confirmation(&altered, &claims(), &verifier).is_err(), "{index}");
                assert!(verify_confirmation(&bytes[..index], &claims(), &verifier).is_err(), "{index}");
            }
            assert!(verify_confirmation(&[&bytes[..], &[0]].concat(), &claims(), &verifier).is_err());
            let large = [&bytes[..], &[0; MAX_CONFIRMATION_LEN]].concat();
            assert!(matches!(rejection(&large, &claims(), &verifier), ConfirmationError::TooLarge(_)));
        }
    }

    proptest! {
        #[test]
        fn verify_confirmation_never_panics(bytes: Vec<u8>) {
            let key = SecretBytes::new(vec![1; 32]);
            for bytes in [bytes.clone(), [&[0xd1, 0x84], bytes.as_slice()].concat()] {
                prop_assert!(verify_confirmation(&bytes, &claims(), &ConfirmationKey::Symmetric(&key)).is_err());
            }
        }
    }
}
