//! Key types, public keys, signatures, and device private keys, as used by all crates. The daemon's module `hsm` defines
//! how private keys are stored.

mod private;
mod public;
mod signature;

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::signature::{self as provider, VerificationAlgorithm};
use serde::{Deserialize, Serialize};

pub use private::{DevicePrivateKey, PrivateParts, RsaPrivateParts, TlsKey, generate_p256};
pub use public::PublicKey;
#[cfg(test)]
pub(crate) use public::compressed;
pub use signature::{ecdsa_der_from_fixed, ecdsa_fixed_from_der};

/// The kind of a key pair: algorithm and curve or modulus size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyType {
    /// NIST P-256.
    P256,
    /// NIST P-384.
    P384,
    /// Ed25519 (RFC 8032).
    Ed25519,
    /// RSA with a 2048-bit modulus.
    #[serde(rename = "rsa-2048")]
    Rsa2048,
    /// RSA with a 3072-bit modulus.
    #[serde(rename = "rsa-3072")]
    Rsa3072,
    /// RSA with a 4096-bit modulus.
    #[serde(rename = "rsa-4096")]
    Rsa4096,
}

impl KeyType {
    /// Every kind.
    pub const ALL: [Self; 6] = [Self::P256, Self::P384, Self::Ed25519, Self::Rsa2048, Self::Rsa3072, Self::Rsa4096];

    /// The name in configuration files, reports and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::P256 => "p256",
            Self::P384 => "p384",
            Self::Ed25519 => "ed25519",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa3072 => "rsa-3072",
            Self::Rsa4096 => "rsa-4096",
        }
    }

    /// Modulus size in bits of an RSA kind.
    pub const fn rsa_bits(self) -> Option<usize> {
        match self {
            Self::Rsa2048 => Some(2048),
            Self::Rsa3072 => Some(3072),
            Self::Rsa4096 => Some(4096),
            Self::P256 | Self::P384 | Self::Ed25519 => None,
        }
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KeyType {
    type Err = KeyError;
    fn from_str(text: &str) -> Result<Self, KeyError> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == text);
        known.ok_or_else(|| KeyError::UnknownKind(text.to_owned()))
    }
}

/// A signature algorithm. ECDSA signatures are `Ecdsa-Sig-Value` DER (RFC 3279 §2.2.3), except inside COSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256.
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384.
    EcdsaP384Sha384,
    /// RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 §8.2).
    RsaPkcs1Sha256,
    /// RSASSA-PSS with SHA-256, MGF1-SHA-256 and a salt of 32 bytes (RFC 8017 §8.1).
    RsaPssSha256,
    /// Ed25519 (RFC 8032).
    Ed25519,
}

impl SignatureAlgorithm {
    /// Reports whether a key of this kind supports the algorithm.
    pub const fn fits(self, kind: KeyType) -> bool {
        match self {
            Self::EcdsaP256Sha256 => matches!(kind, KeyType::P256),
            Self::EcdsaP384Sha384 => matches!(kind, KeyType::P384),
            Self::RsaPkcs1Sha256 | Self::RsaPssSha256 => kind.rsa_bits().is_some(),
            Self::Ed25519 => matches!(kind, KeyType::Ed25519),
        }
    }

    /// The default algorithm of a key type.
    pub const fn default_for(kind: KeyType) -> Self {
        match kind {
            KeyType::P256 => Self::EcdsaP256Sha256,
            KeyType::P384 => Self::EcdsaP384Sha384,
            KeyType::Ed25519 => Self::Ed25519,
            KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => Self::RsaPkcs1Sha256,
        }
    }

    fn verification(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::EcdsaP256Sha256 => &provider::ECDSA_P256_SHA256_ASN1,
            Self::EcdsaP384Sha384 => &provider::ECDSA_P384_SHA384_ASN1,
            Self::RsaPkcs1Sha256 => &provider::RSA_PKCS1_2048_8192_SHA256,
            Self::RsaPssSha256 => &provider::RSA_PSS_2048_8192_SHA256,
            Self::Ed25519 => &provider::ED25519,
        }
    }
}

/// An error of a key or a signature. Never contains key material.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a SubjectPublicKeyInfo of a supported kind.
    #[error("unsupported public key: {0}")]
    UnsupportedPublicKey(String),
    /// The private key's encoding is not one that HSMs produce for this kind.
    #[error("cannot decode the private key of a {0} pair")]
    UnreadablePrivateKey(KeyType),
    /// Not PKCS#8 PEM, or of an unsupported kind.
    #[error(
        "unsupported private key: expected PKCS#8 PEM (P-256, P-384, Ed25519 or RSA); generate one with sppctl request"
    )]
    UnsupportedPrivateKey,
    /// The private key does not belong to the public key.
    #[error("the private key does not belong to the public key")]
    Mismatch,
    /// The signature does not verify with this key over this message.
    #[error("the signature does not verify")]
    BadSignature,
    /// Unknown name of a key type.
    #[error("unknown key type {0:?}: expected p256, p384, ed25519, rsa-2048, rsa-3072 or rsa-4096")]
    UnknownKind(String),
    /// The key type does not support the algorithm.
    #[error("a {1} key cannot sign with {0:?}")]
    WrongAlgorithm(SignatureAlgorithm, KeyType),
}

/// The SHA-256 hash of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref());
    hash
}

/// The SHA-384 hash of `bytes`.
pub fn sha384(bytes: &[u8]) -> [u8; 48] {
    let mut hash = [0; 48];
    hash.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA384, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::private::der_prefix;
    use super::*;
    use crate::secret::SecretBytes;

    #[test]
    fn signature_over_another_message_is_refused() {
        let key = generate_p256().unwrap();
        let signature = key.sign(SignatureAlgorithm::EcdsaP256Sha256, b"message").unwrap();
        let verify = |message: &[u8]| key.public().verify(SignatureAlgorithm::EcdsaP256Sha256, message, &signature);
        assert_eq!(verify(b"message"), Ok(()));
        assert_eq!(verify(b"massage"), Err(KeyError::BadSignature));
    }

    #[test]
    fn private_key_of_another_pair_is_refused() {
        let (one, other) = (generate_p256().unwrap(), generate_p256().unwrap());
        let PrivateParts::Ec(scalar) = one.parts() else { unreachable!() };
        let scalar = PrivateParts::Ec(SecretBytes::copy_of(scalar.expose()));
        assert!(DevicePrivateKey::from_parts(other.public().clone(), scalar).is_err());
    }

    #[test]
    fn ecdsa_signature_der_roundtrips() {
        for byte in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let fixed = [vec![0; 31], vec![byte | 1], vec![byte], vec![1; 31]].concat();
            let der = ecdsa_der_from_fixed(&fixed).unwrap();
            assert_eq!(ecdsa_fixed_from_der(&der, KeyType::P256), Some(fixed));
        }
        assert_eq!(ecdsa_der_from_fixed(&[1, 2, 3]), None);
    }

    #[test]
    fn der_prefix_accepts_only_short_zero_padding() {
        let der = [0x30, 0x01, 0x05];
        assert_eq!(der_prefix(&[0x30, 0x01, 0x05, 0, 0]), Some(der.as_slice()));
        assert_eq!(der_prefix(&[0x30, 0x01, 0x05, 0, 1]), None);
        assert_eq!(der_prefix(&[&der[..], &[0; 8]].concat()), None);
        assert_eq!(der_prefix(&[0x30, 0x05, 0]), None);
    }

    #[test]
    fn weak_and_foreign_keys_are_refused() {
        let short = PublicKey::from_rsa(&[0xff; 128], &[1, 0, 1]);
        assert!(matches!(short, Err(KeyError::UnsupportedPublicKey(why)) if why.contains("1024 bits")));
        assert!(PublicKey::from_ec_point(KeyType::P256, &[4; 65]).is_err(), "a point off the curve");
        assert!(PublicKey::from_spki_der(b"").is_err());
    }
}
