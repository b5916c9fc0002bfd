//! Public keys of the supported kinds.

use std::fmt;

use aws_lc_rs::signature::UnparsedPublicKey;
use curve25519_dalek::edwards::CompressedEdwardsY;
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

    /// The key in its canonical encoding, for a key that a device chose. An EC point must be uncompressed (RFC 5480 §2.2), an
    /// Ed25519 key canonical and of prime order (RFC 8032 §5.1.7 leaves that to the verifier); an RSA key is encoded anew.
    pub fn to_canonical(&self) -> Result<Self, KeyError> {
        let unsupported = |reason: &str| KeyError::UnsupportedPublicKey(reason.to_owned());
        match self.kind {
            KeyType::P256 | KeyType::P384 if self.key_bits().first() != Some(&0x04) => {
                Err(unsupported("compressed EC point; expected an uncompressed one"))
            }
            KeyType::P256 | KeyType::P384 => Self::from_ec_point(self.kind, self.key_bits()),
            KeyType::Ed25519 if !is_of_prime_order(self.key_bits()) => {
                Err(unsupported("Ed25519 key that is not canonical or not of prime order"))
            }
            KeyType::Ed25519 => Self::from_ed25519(self.key_bits()),
            KeyType::Rsa2048 | KeyType::Rsa3072 | KeyType::Rsa4096 => {
                let (modulus, exponent) = self.rsa_components().ok_or_else(|| unsupported("not an RSAPublicKey"))?;
                Self::from_rsa(&modulus, &exponent)
            }
        }
    }

    /// What makes a SubjectPublicKeyInfo unique, whatever its encoding: the curve and x coordinate of an EC key (a point and its
    /// negative share a private key up to its sign), the modulus of an RSA key, the key bytes of any other algorithm. The whole
    /// DER if it cannot be parsed.
    pub fn unique_part(spki_der: &[u8]) -> Vec<u8> {
        let parse = || -> Option<Vec<u8>> {
            let spki = SubjectPublicKeyInfoRef::from_der(spki_der).ok()?;
            let bits = spki.subject_public_key.as_bytes()?;
            let (curve, part) = match spki.algorithm.oid {
                EC_PUBLIC_KEY => {
                    let (form, coordinates) = bits.split_first()?;
                    // 06 and 07: the hybrid form of X9.62, both coordinates as well.
                    let x_len = if matches!(form, 0x02 | 0x03) { coordinates.len() } else { coordinates.len() / 2 };
                    (spki.algorithm.parameters_oid().ok(), coordinates.get(..x_len)?)
                }
                RSA_ENCRYPTION => (None, pkcs1::RsaPublicKeyRef::from_der(bits).ok()?.modulus.as_bytes()),
                _ => (None, bits),
            };
            let curve = curve.as_ref().map_or(&[][..], ObjectIdentifier::as_bytes);
            Some([spki.algorithm.oid.as_bytes(), curve, part].concat())
        };
        parse().unwrap_or_else(|| spki_der.to_vec())
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

/// Reports whether the bytes are the canonical encoding of a point of prime order. A signature by a key of small order verifies
/// for many messages, and keys that differ by such a point are accepted alternately by different verifiers.
fn is_of_prime_order(ed25519: &[u8]) -> bool {
    let Ok(compressed) = CompressedEdwardsY::from_slice(ed25519) else { return false };
    compressed
        .decompress()
        .is_some_and(|point| point.compress() == compressed && !point.is_small_order() && point.is_torsion_free())
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

/// The SubjectPublicKeyInfo of an EC key with its point compressed (SEC 1 §2.3.3).
#[cfg(test)]
pub(crate) fn compressed(key: &PublicKey) -> Vec<u8> {
    let mut spki = SubjectPublicKeyInfoOwned::from_der(key.spki_der()).unwrap();
    let (x, y) = key.key_bits()[1..].split_at(key.key_bits().len() / 2);
    let sign = 0x02 | (y.last().unwrap() & 1);
    spki.subject_public_key = BitString::from_bytes(&[&[sign], x].concat()).unwrap();
    spki.to_der().unwrap()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::encoding::AsDer as _;
    use aws_lc_rs::rsa::{KeyPair, KeySize};
    use aws_lc_rs::signature::{self, EcdsaKeyPair, KeyPair as _};
    use curve25519_dalek::constants::{ED25519_BASEPOINT_POINT, EIGHT_TORSION};

    use super::*;

    fn ec(kind: KeyType, algorithm: &'static signature::EcdsaSigningAlgorithm) -> PublicKey {
        let pair = EcdsaKeyPair::generate(algorithm).unwrap();
        PublicKey::from_ec_point(kind, pair.public_key().as_ref()).unwrap()
    }

    #[test]
    fn ec_key_has_one_canonical_encoding_and_unique_part() {
        let p256 = || ec(KeyType::P256, &signature::ECDSA_P256_SHA256_ASN1_SIGNING);
        for key in [p256(), ec(KeyType::P384, &signature::ECDSA_P384_SHA384_ASN1_SIGNING)] {
            assert_eq!(key.to_canonical().unwrap(), key);
            let other = compressed(&key);
            assert_eq!(PublicKey::unique_part(&other), PublicKey::unique_part(key.spki_der()));
            assert!(PublicKey::from_spki_der(&other).and_then(|key| key.to_canonical()).is_err());
            assert_ne!(PublicKey::unique_part(p256().spki_der()), PublicKey::unique_part(key.spki_der()));
        }
    }

    #[test]
    fn rsa_key_is_unique_by_its_modulus() {
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let key = PublicKey::from_spki_der(pair.public_key().as_der().unwrap().as_ref()).unwrap();
        assert_eq!(key.to_canonical().unwrap(), key);
        let (modulus, _) = key.rsa_components().unwrap();
        let other = PublicKey::from_rsa(&modulus, &[3]).unwrap();
        assert_eq!(PublicKey::unique_part(other.spki_der()), PublicKey::unique_part(key.spki_der()));
    }

    #[test]
    fn ed25519_keys_of_other_order_rejected() {
        let canonical = |bytes: &[u8]| PublicKey::from_ed25519(bytes).and_then(|key| key.to_canonical());
        let good = ED25519_BASEPOINT_POINT;
        assert!(canonical(good.compress().as_bytes()).is_ok());
        for (order, torsion) in EIGHT_TORSION.iter().enumerate() {
            assert!(canonical(torsion.compress().as_bytes()).is_err(), "small order, point {order}");
            let mixed = canonical((good + torsion).compress().as_bytes());
            assert_eq!(mixed.is_ok(), order == 0, "point {order} added to one of prime order");
        }
        // y = p + 1, which is the identity, and y = p, which has order 4: not reduced (RFC 8032 §5.1.3).
        for low in [0xee, 0xed] {
            let mut unreduced = [0xff; 32];
            (unreduced[0], unreduced[31]) = (low, 0x7f);
            assert!(canonical(&unreduced).is_err());
        }
    }

    #[test]
    fn unparsable_key_is_unique_by_its_bytes() {
        assert_eq!(PublicKey::unique_part(b"no key"), b"no key");
    }
}
