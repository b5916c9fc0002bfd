//! Public keys of the supported kinds.

use std::fmt;

use aws_lc_rs::signature::UnparsedPublicKey;
use der::asn1::{BitString, ObjectIdentifier, UintRef};
use der::{Decode as _, Encode as _};
use spki::{SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef};

use super::{KeyError, KeyType, SignatureAlgorithm, sha256};

/// A public key of a supported kind: its SubjectPublicKeyInfo in DER (RFC 5280 §4.1.2.7), parsed once.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    kind: KeyType,
    spki: Vec<u8>,
}

impl PublicKey {
    /// Parses a DER SubjectPublicKeyInfo. Unsupported curves and RSA sizes are refused.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, KeyError> {
        let unsupported = |reason: &str| KeyError::UnsupportedPublicKey(reason.to_owned());
        let spki = SubjectPublicKeyInfoRef::from_der(der).map_err(|e| unsupported(&e.to_string()))?;
        let key_bits =
            spki.subject_public_key.as_bytes().ok_or_else(|| unsupported("unused bits in the BIT STRING"))?;
        let curve = || spki.algorithm.parameters_oid().map_err(|_| unsupported("not a named curve"));
        let kind = match spki.algorithm.oid {
            EC_PUBLIC_KEY => match curve()? {
                SECP256R1 => KeyType::P256,
                SECP384R1 => KeyType::P384,
                other => return Err(unsupported(&format!("curve {other}; expected P-256 or P-384"))),
            },
            ED25519 => KeyType::Ed25519,
            RSA_ENCRYPTION => rsa_kind(key_bits)?,
            other => return Err(unsupported(&format!("algorithm {other}"))),
        };
        let key = Self { kind, spki: der.to_vec() };
        // The provider validates the key. For example, it refuses an EC point that is not on the curve.
        UnparsedPublicKey::new(SignatureAlgorithm::default_for(kind).verification(), &key.spki)
            .parse()
            .map_err(|e| unsupported(&e.to_string()))?;
        Ok(key)
    }

    /// Creates an EC key from an uncompressed SEC 1 point (`04 || x || y`).
    pub fn from_ec_point(kind: KeyType, point: &[u8]) -> Result<Self, KeyError> {
        let curve = match kind {
            KeyType::P256 => SECP256R1,
            KeyType::P384 => SECP384R1,
            _ => return Err(KeyError::UnsupportedPublicKey(format!("{kind} is not an EC kind"))),
        };
        Self::assemble(EC_PUBLIC_KEY, Some(der::Any::from(curve)), point)
    }

    /// Creates an Ed25519 key from the 32 bytes of its public key (RFC 8032 §5.1.5).
    pub fn from_ed25519(raw: &[u8]) -> Result<Self, KeyError> {
        Self::assemble(ED25519, None, raw)
    }

    /// Creates an RSA key from its big-endian modulus and public exponent.
    pub fn from_rsa(modulus: &[u8], exponent: &[u8]) -> Result<Self, KeyError> {
        let invalid = |e: der::Error| KeyError::UnsupportedPublicKey(e.to_string());
        let key = pkcs1::RsaPublicKeyRef {
            modulus: UintRef::new(modulus).map_err(invalid)?,
            public_exponent: UintRef::new(exponent).map_err(invalid)?,
        };
        Self::assemble(RSA_ENCRYPTION, Some(der::Any::null()), &key.to_der().map_err(invalid)?)
    }

    fn assemble(oid: ObjectIdentifier, parameters: Option<der::Any>, key: &[u8]) -> Result<Self, KeyError> {
        let invalid = |e: der::Error| KeyError::UnsupportedPublicKey(e.to_string());
        let spki = SubjectPublicKeyInfoOwned {
            algorithm: spki::AlgorithmIdentifierOwned { oid, parameters },
            subject_public_key: BitString::from_bytes(key).map_err(invalid)?,
        };
        Self::from_spki_der(&spki.to_der().map_err(invalid)?)
    }

    /// The kind of the key.
    pub const fn kind(&self) -> KeyType {
        self.kind
    }

    /// The SubjectPublicKeyInfo in DER.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki
    }

    /// The content of the BIT STRING: an EC point, an `RSAPublicKey`, or 32 bytes of Ed25519.
    pub fn key_bits(&self) -> &[u8] {
        // Parsed when the value was created; the empty slice is unreachable.
        SubjectPublicKeyInfoRef::from_der(&self.spki).ok().and_then(|s| s.subject_public_key.as_bytes()).unwrap_or(&[])
    }

    /// The big-endian modulus and exponent of an RSA key, without leading zeros.
    pub fn rsa_components(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        self.kind.rsa_bits()?;
        let key = pkcs1::RsaPublicKeyRef::from_der(self.key_bits()).ok()?;
        Some((key.modulus.as_bytes().to_vec(), key.public_exponent.as_bytes().to_vec()))
    }

    /// SHA-256 of the SubjectPublicKeyInfo, which identifies the key in indexes and reports.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.spki)
    }

    /// The fingerprint in text form: `sha256:` and hex digits.
    pub fn fingerprint_text(&self) -> String {
        format!("sha256:{}", hex::encode(self.fingerprint()))
    }

    /// Verifies a signature over the message. ECDSA signatures are in DER.
    pub fn verify(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> Result<(), KeyError> {
        if !algorithm.fits(self.kind) {
            return Err(KeyError::WrongAlgorithm(algorithm, self.kind));
        }
        UnparsedPublicKey::new(algorithm.verification(), &self.spki)
            .verify(message, signature)
            .map_err(|_| KeyError::BadSignature)
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({}, sha256:{})", self.kind, hex::encode(self.fingerprint()))
    }
}

fn rsa_kind(rsa_public_key: &[u8]) -> Result<KeyType, KeyError> {
    let key =
        pkcs1::RsaPublicKeyRef::from_der(rsa_public_key).map_err(|e| KeyError::UnsupportedPublicKey(e.to_string()))?;
    let modulus = key.modulus.as_bytes();
    let bits = modulus.len() * 8 - modulus.first().map_or(0, |b| b.leading_zeros() as usize);
    match bits {
        2048 => Ok(KeyType::Rsa2048),
        3072 => Ok(KeyType::Rsa3072),
        4096 => Ok(KeyType::Rsa4096),
        _ => Err(KeyError::UnsupportedPublicKey(format!("RSA with {bits} bits; expected 2048, 3072 or 4096"))),
    }
}

/// `id-ecPublicKey`, RFC 5480 §2.1.1.
const EC_PUBLIC_KEY: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
/// `secp256r1`, RFC 5480 §2.1.1.1.
const SECP256R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
/// `secp384r1`, RFC 5480 §2.1.1.1.
const SECP384R1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
/// `id-Ed25519`, RFC 8410 §3.
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
/// `rsaEncryption`, RFC 8017 Appendix A.1.
const RSA_ENCRYPTION: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
