//! Keys as every room means them: kinds, public keys, signatures, and a device's private key.

use std::fmt;

use aws_lc_rs::signature::{self, KeyPair as _, UnparsedPublicKey, VerificationAlgorithm};
use der::asn1::{BitString, ObjectIdentifier, UintRef};
use der::{Decode, Encode, Sequence};
use serde::{Deserialize, Serialize};
use spki::{SubjectPublicKeyInfoOwned, SubjectPublicKeyInfoRef};

use crate::names::KeyName;
use crate::secret::{Secret, SecretBytes};

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

/// What kind of key pair a device gets, or the manufacturer signs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyKind {
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

impl KeyKind {
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

    /// Bits of the modulus of an RSA kind.
    pub const fn rsa_bits(self) -> Option<usize> {
        match self {
            Self::Rsa2048 => Some(2048),
            Self::Rsa3072 => Some(3072),
            Self::Rsa4096 => Some(4096),
            Self::P256 | Self::P384 | Self::Ed25519 => None,
        }
    }
}

impl fmt::Display for KeyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a signature is made. ECDSA signatures are `Ecdsa-Sig-Value` DER (RFC 3279 §2.2.3) everywhere but inside COSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256.
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384.
    EcdsaP384Sha384,
    /// RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 §8.2).
    RsaPkcs1Sha256,
    /// RSASSA-PSS with SHA-256, MGF1-SHA-256 and a salt of 32 octets (RFC 8017 §8.1).
    RsaPssSha256,
    /// Ed25519 (RFC 8032).
    Ed25519,
}

impl SignatureAlgorithm {
    /// Whether a key of this kind can make such a signature.
    pub const fn fits(self, kind: KeyKind) -> bool {
        match self {
            Self::EcdsaP256Sha256 => matches!(kind, KeyKind::P256),
            Self::EcdsaP384Sha384 => matches!(kind, KeyKind::P384),
            Self::RsaPkcs1Sha256 | Self::RsaPssSha256 => kind.rsa_bits().is_some(),
            Self::Ed25519 => matches!(kind, KeyKind::Ed25519),
        }
    }

    /// What a key of this kind signs with unless something else is said.
    pub const fn default_for(kind: KeyKind) -> Self {
        match kind {
            KeyKind::P256 => Self::EcdsaP256Sha256,
            KeyKind::P384 => Self::EcdsaP384Sha384,
            KeyKind::Ed25519 => Self::Ed25519,
            KeyKind::Rsa2048 | KeyKind::Rsa3072 | KeyKind::Rsa4096 => Self::RsaPkcs1Sha256,
        }
    }

    fn verification(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::EcdsaP256Sha256 => &signature::ECDSA_P256_SHA256_ASN1,
            Self::EcdsaP384Sha384 => &signature::ECDSA_P384_SHA384_ASN1,
            Self::RsaPkcs1Sha256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::RsaPssSha256 => &signature::RSA_PSS_2048_8192_SHA256,
            Self::Ed25519 => &signature::ED25519,
        }
    }
}

/// A private key that only the HSM can open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// The key in the HSM under which it is wrapped (AES-KWP, RFC 5649).
    pub wrapping_key: KeyName,
    /// The wrapped octets.
    pub blob: Vec<u8>,
}

/// What is wrong with a key or a signature. Never says what the key is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a SubjectPublicKeyInfo of a supported kind.
    #[error("not a public key this system accepts: {0}")]
    UnsupportedPublicKey(String),
    /// The private key's encoding is not what the HSM is known to give for this kind.
    #[error("the private key of a {0} pair could not be read")]
    UnreadablePrivateKey(KeyKind),
    /// The private key does not belong to the public key.
    #[error("the private key does not belong to the public key")]
    Mismatch,
    /// The signature is not one of this key over this message.
    #[error("the signature does not verify")]
    BadSignature,
    /// The key cannot sign with this algorithm.
    #[error("a {1} key cannot sign with {0:?}")]
    WrongAlgorithm(SignatureAlgorithm, KeyKind),
}

/// A public key of a supported kind: its SubjectPublicKeyInfo in DER (RFC 5280 §4.1.2.7), parsed once.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    kind: KeyKind,
    spki: Vec<u8>,
}

impl PublicKey {
    /// Parses a DER SubjectPublicKeyInfo; RSA under 2048 bits, other sizes and other curves are refused.
    pub fn from_spki_der(der: &[u8]) -> Result<Self, KeyError> {
        let unsupported = |why: &str| KeyError::UnsupportedPublicKey(why.to_owned());
        let spki = SubjectPublicKeyInfoRef::from_der(der).map_err(|e| unsupported(&e.to_string()))?;
        let key_bits = spki.subject_public_key.as_bytes().ok_or_else(|| unsupported("unused bits in the key"))?;
        let curve = || spki.algorithm.parameters_oid().map_err(|_| unsupported("the curve is not a named one"));
        let kind = match spki.algorithm.oid {
            EC_PUBLIC_KEY => match curve()? {
                SECP256R1 => KeyKind::P256,
                SECP384R1 => KeyKind::P384,
                other => return Err(unsupported(&format!("curve {other}; P-256 and P-384 are accepted"))),
            },
            ED25519 => KeyKind::Ed25519,
            RSA_ENCRYPTION => rsa_kind(key_bits)?,
            other => return Err(unsupported(&format!("algorithm {other}"))),
        };
        let key = Self { kind, spki: der.to_vec() };
        // The provider checks the point or modulus itself; an EC point off the curve ends here.
        UnparsedPublicKey::new(SignatureAlgorithm::default_for(kind).verification(), &key.spki)
            .parse()
            .map_err(|e| unsupported(&e.to_string()))?;
        Ok(key)
    }

    /// From an uncompressed SEC 1 point (`04 || x || y`).
    pub fn from_ec_point(kind: KeyKind, point: &[u8]) -> Result<Self, KeyError> {
        let curve = match kind {
            KeyKind::P256 => SECP256R1,
            KeyKind::P384 => SECP384R1,
            _ => return Err(KeyError::UnsupportedPublicKey(format!("{kind} has no point"))),
        };
        Self::assemble(EC_PUBLIC_KEY, Some(der::Any::from(curve)), point)
    }

    /// From the 32 octets of an Ed25519 public key (RFC 8032 §5.1.5).
    pub fn from_ed25519(raw: &[u8]) -> Result<Self, KeyError> {
        Self::assemble(ED25519, None, raw)
    }

    /// From the big-endian modulus and public exponent of an RSA key.
    pub fn from_rsa(modulus: &[u8], exponent: &[u8]) -> Result<Self, KeyError> {
        let bad = |e: der::Error| KeyError::UnsupportedPublicKey(e.to_string());
        let key = pkcs1::RsaPublicKeyRef {
            modulus: UintRef::new(modulus).map_err(bad)?,
            public_exponent: UintRef::new(exponent).map_err(bad)?,
        };
        Self::assemble(RSA_ENCRYPTION, Some(der::Any::null()), &key.to_der().map_err(bad)?)
    }

    fn assemble(oid: ObjectIdentifier, parameters: Option<der::Any>, key: &[u8]) -> Result<Self, KeyError> {
        let bad = |e: der::Error| KeyError::UnsupportedPublicKey(e.to_string());
        let spki = SubjectPublicKeyInfoOwned {
            algorithm: spki::AlgorithmIdentifierOwned { oid, parameters },
            subject_public_key: BitString::from_bytes(key).map_err(bad)?,
        };
        Self::from_spki_der(&spki.to_der().map_err(bad)?)
    }

    /// The kind of the key.
    pub const fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The SubjectPublicKeyInfo in DER.
    pub fn spki_der(&self) -> &[u8] {
        &self.spki
    }

    /// The content of the BIT STRING: an EC point, an `RSAPublicKey`, or 32 octets of Ed25519.
    pub fn key_bits(&self) -> &[u8] {
        // Parsed when the value was made; an empty slice is not reachable.
        SubjectPublicKeyInfoRef::from_der(&self.spki).ok().and_then(|s| s.subject_public_key.as_bytes()).unwrap_or(&[])
    }

    /// Big-endian modulus and exponent of an RSA key, without leading zeros.
    pub fn rsa_components(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        self.kind.rsa_bits()?;
        let key = pkcs1::RsaPublicKeyRef::from_der(self.key_bits()).ok()?;
        Some((key.modulus.as_bytes().to_vec(), key.public_exponent.as_bytes().to_vec()))
    }

    /// SHA-256 of the SubjectPublicKeyInfo: the key's name in indexes and reports.
    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.spki)
    }

    /// Verifies a signature (ECDSA in DER form) over the message.
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

fn rsa_kind(rsa_public_key: &[u8]) -> Result<KeyKind, KeyError> {
    let key =
        pkcs1::RsaPublicKeyRef::from_der(rsa_public_key).map_err(|e| KeyError::UnsupportedPublicKey(e.to_string()))?;
    let modulus = key.modulus.as_bytes();
    let bits = modulus.len() * 8 - modulus.first().map_or(0, |b| b.leading_zeros() as usize);
    match bits {
        2048 => Ok(KeyKind::Rsa2048),
        3072 => Ok(KeyKind::Rsa3072),
        4096 => Ok(KeyKind::Rsa4096),
        _ => Err(KeyError::UnsupportedPublicKey(format!("RSA with {bits} bits; 2048, 3072 and 4096 are accepted"))),
    }
}

/// SHA-256 of the bytes.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref());
    hash
}

/// `Ecdsa-Sig-Value` of RFC 3279 §2.2.3.
#[derive(Sequence)]
struct EcdsaSigValue<'a> {
    r: UintRef<'a>,
    s: UintRef<'a>,
}

/// Turns the `r || s` of PKCS#11 and COSE into the DER of X.509; `None` if the length is odd or zero.
pub fn ecdsa_der_from_fixed(fixed: &[u8]) -> Option<Vec<u8>> {
    if fixed.is_empty() || !fixed.len().is_multiple_of(2) {
        return None;
    }
    let (r, s) = fixed.split_at(fixed.len() / 2);
    EcdsaSigValue { r: UintRef::new(r).ok()?, s: UintRef::new(s).ok()? }.to_der().ok()
}

/// Turns the DER of X.509 into `r || s` with each half as long as the group order.
pub fn ecdsa_fixed_from_der(der: &[u8], kind: KeyKind) -> Option<Vec<u8>> {
    let half = match kind {
        KeyKind::P256 => 32,
        KeyKind::P384 => 48,
        _ => return None,
    };
    let value = EcdsaSigValue::from_der(der).ok()?;
    let mut fixed = vec![0; 2 * half];
    for (part, end) in [(value.r.as_bytes(), half), (value.s.as_bytes(), 2 * half)] {
        let start = end.checked_sub(part.len()).filter(|start| start + half >= end)?;
        fixed[start..end].copy_from_slice(part);
    }
    Some(fixed)
}

/// The eight numbers of a two-prime RSA private key (RFC 8017 §3.2), big-endian; the public two are in the public key.
pub struct RsaPrivateParts {
    /// Private exponent.
    pub d: SecretBytes,
    /// First prime.
    pub p: SecretBytes,
    /// Second prime.
    pub q: SecretBytes,
    /// `d mod (p-1)`.
    pub dp: SecretBytes,
    /// `d mod (q-1)`.
    pub dq: SecretBytes,
    /// `q^-1 mod p`.
    pub qinv: SecretBytes,
}

/// The private half as numbers, the way COSE_Key wants it.
pub enum PrivateParts {
    /// The scalar of an EC key, as long as the group order.
    Ec(SecretBytes),
    /// The 32-octet seed (RFC 8032 calls it the private key).
    Ed25519(SecretBytes),
    /// RSA.
    Rsa(Box<RsaPrivateParts>),
}

/// A device's key pair with its private half in memory: on its way to the device, or inside it.
pub struct DevicePrivateKey {
    public: PublicKey,
    parts: PrivateParts,
}

impl DevicePrivateKey {
    /// From parts, checked: a private half that does not belong to the public one is refused.
    pub fn from_parts(public: PublicKey, parts: PrivateParts) -> Result<Self, KeyError> {
        let key = Self { public, parts };
        key.signer()?;
        Ok(key)
    }

    /// From what an HSM gives when a wrapped key is unwrapped: PKCS#8 (RFC 5958), or 32 raw octets for Ed25519.
    /// Zero octets behind the DER are allowed, since some modules pad before they wrap.
    pub fn from_unwrapped(public: PublicKey, plaintext: &SecretBytes) -> Result<Self, KeyError> {
        let kind = public.kind();
        let unreadable = || KeyError::UnreadablePrivateKey(kind);
        // Exposed to be taken apart; every part becomes a Secret of its own.
        let bytes = plaintext.expose().as_slice();
        let parts = if kind == KeyKind::Ed25519 {
            let seed = bytes.get(..32).ok_or_else(unreadable)?;
            PrivateParts::Ed25519(SecretBytes::copy_of(seed))
        } else {
            let pkcs8 = pkcs8::PrivateKeyInfoRef::from_der(der_prefix(bytes).ok_or_else(unreadable)?)
                .map_err(|_| unreadable())?;
            let inner = pkcs8.private_key.as_bytes();
            if kind.rsa_bits().is_some() {
                let rsa = pkcs1::RsaPrivateKey::from_der(inner).map_err(|_| unreadable())?;
                let secret = |number: UintRef<'_>| SecretBytes::copy_of(number.as_bytes());
                PrivateParts::Rsa(Box::new(RsaPrivateParts {
                    d: secret(rsa.private_exponent),
                    p: secret(rsa.prime1),
                    q: secret(rsa.prime2),
                    dp: secret(rsa.exponent1),
                    dq: secret(rsa.exponent2),
                    qinv: secret(rsa.coefficient),
                }))
            } else {
                let ec = sec1::EcPrivateKey::from_der(inner).map_err(|_| unreadable())?;
                PrivateParts::Ec(SecretBytes::copy_of(ec.private_key))
            }
        };
        Self::from_parts(public, parts)
    }

    /// The public half.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The private half, for encoding it.
    pub const fn parts(&self) -> &PrivateParts {
        &self.parts
    }

    /// The secret numbers that must be in no message in clear.
    pub fn secrets(&self) -> Vec<&SecretBytes> {
        match &self.parts {
            PrivateParts::Ec(d) => vec![d],
            PrivateParts::Ed25519(seed) => vec![seed],
            PrivateParts::Rsa(rsa) => vec![&rsa.d, &rsa.p, &rsa.q, &rsa.dp, &rsa.dq, &rsa.qinv],
        }
    }

    /// Signs the message; ECDSA gives DER.
    pub fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if !algorithm.fits(self.public.kind) {
            return Err(KeyError::WrongAlgorithm(algorithm, self.public.kind));
        }
        let rng = aws_lc_rs::rand::SystemRandom::new();
        let failed = |_| KeyError::UnreadablePrivateKey(self.public.kind);
        match self.signer()? {
            Signer::Ec(pair) => Ok(pair.sign(&rng, message).map_err(failed)?.as_ref().to_vec()),
            Signer::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Signer::Rsa(pair) => {
                let encoding: &'static dyn signature::RsaEncoding = match algorithm {
                    SignatureAlgorithm::RsaPssSha256 => &signature::RSA_PSS_SHA256,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut made = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &rng, message, &mut made).map_err(failed)?;
                Ok(made)
            }
        }
    }

    /// The provider's key; made only if the private half belongs to the public one.
    fn signer(&self) -> Result<Signer, KeyError> {
        let mismatch = |_| KeyError::Mismatch;
        let public = self.public.key_bits();
        // The exposures below hand the private half to the provider that signs.
        match &self.parts {
            PrivateParts::Ec(d) => {
                let algorithm = match self.public.kind {
                    KeyKind::P384 => &signature::ECDSA_P384_SHA384_ASN1_SIGNING,
                    _ => &signature::ECDSA_P256_SHA256_ASN1_SIGNING,
                };
                signature::EcdsaKeyPair::from_private_key_and_public_key(algorithm, d.expose(), public)
                    .map(Signer::Ec)
                    .map_err(mismatch)
            }
            PrivateParts::Ed25519(seed) => signature::Ed25519KeyPair::from_seed_and_public_key(seed.expose(), public)
                .map(Signer::Ed25519)
                .map_err(mismatch),
            PrivateParts::Rsa(rsa) => {
                let (n, e) = self.public.rsa_components().ok_or(KeyError::Mismatch)?;
                let pair = aws_lc_rs::rsa::KeyPair::from_components(&aws_lc_rs::rsa::KeyPairComponents {
                    public_key: aws_lc_rs::rsa::PublicKeyComponents { n: n.as_slice(), e: e.as_slice() },
                    d: rsa.d.expose().as_slice(),
                    p: rsa.p.expose().as_slice(),
                    q: rsa.q.expose().as_slice(),
                    dP: rsa.dp.expose().as_slice(),
                    dQ: rsa.dq.expose().as_slice(),
                    qInv: rsa.qinv.expose().as_slice(),
                })
                .map_err(mismatch)?;
                Ok(Signer::Rsa(Box::new(pair)))
            }
        }
    }
}

enum Signer {
    Ec(signature::EcdsaKeyPair),
    Ed25519(signature::Ed25519KeyPair),
    Rsa(Box<aws_lc_rs::rsa::KeyPair>),
}

/// The first DER value of the bytes; what follows it must be fewer than 8 zero octets (RFC 5649 padding kept by the module).
fn der_prefix(bytes: &[u8]) -> Option<&[u8]> {
    let reader = der::SliceReader::new(bytes).ok()?;
    let header = der::Header::peek(&reader).ok()?;
    let total = usize::try_from((header.encoded_len().ok()? + header.length()).ok()?).ok()?;
    let (value, rest) = bytes.split_at_checked(total)?;
    (rest.len() < 8 && rest.iter().all(|b| *b == 0)).then_some(value)
}

/// A P-256 key pair made in this process, as (public key, private scalar), for what never needs the HSM: TLS keys of
/// stations and officers, and the simulated chip.
pub fn generate_p256() -> Result<DevicePrivateKey, KeyError> {
    use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
    let failed = |_| KeyError::UnreadablePrivateKey(KeyKind::P256);
    let pair = signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
    let public = PublicKey::from_ec_point(KeyKind::P256, pair.public_key().as_ref())?;
    let scalar: EcPrivateKeyBin<'_> = pair.private_key().as_be_bytes().map_err(failed)?;
    let parts = PrivateParts::Ec(Secret::new(scalar.as_ref().to_vec()));
    DevicePrivateKey::from_parts(public, parts)
}

/// A P-256 key pair for TLS, made in this process: the public key, and the private one as PKCS#8 in PEM (RFC 7468 §10).
pub fn generate_p256_pkcs8() -> Result<(PublicKey, SecretBytes), KeyError> {
    let failed = |_| KeyError::UnreadablePrivateKey(KeyKind::P256);
    let pair = signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
    let public = PublicKey::from_ec_point(KeyKind::P256, pair.public_key().as_ref())?;
    let der = pair.to_pkcs8v1().map_err(failed)?;
    let pem = der::pem::encode_string("PRIVATE KEY", der::pem::LineEnding::LF, der.as_ref());
    let pem = pem.map_err(|_| KeyError::UnreadablePrivateKey(KeyKind::P256))?;
    Ok((public, Secret::new(pem.into_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_verifies_with_its_key_and_message_only() {
        let key = generate_p256().unwrap();
        let signature = key.sign(SignatureAlgorithm::EcdsaP256Sha256, b"message").unwrap();
        let verify = |message: &[u8]| key.public().verify(SignatureAlgorithm::EcdsaP256Sha256, message, &signature);
        assert_eq!(verify(b"message"), Ok(()));
        assert_eq!(verify(b"massage"), Err(KeyError::BadSignature));
    }

    #[test]
    fn a_private_key_of_another_pair_is_refused() {
        let (one, other) = (generate_p256().unwrap(), generate_p256().unwrap());
        let PrivateParts::Ec(scalar) = one.parts else { unreachable!() };
        assert!(DevicePrivateKey::from_parts(other.public, PrivateParts::Ec(scalar)).is_err());
    }

    #[test]
    fn ecdsa_signatures_turn_into_der_and_back() {
        for byte in [0x00, 0x01, 0x7f, 0x80, 0xff] {
            let fixed = [vec![0; 31], vec![byte | 1], vec![byte], vec![1; 31]].concat();
            let der = ecdsa_der_from_fixed(&fixed).unwrap();
            assert_eq!(ecdsa_fixed_from_der(&der, KeyKind::P256), Some(fixed));
        }
        assert_eq!(ecdsa_der_from_fixed(&[1, 2, 3]), None);
    }

    #[test]
    fn only_a_short_run_of_zeros_may_follow_the_der() {
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
        assert!(PublicKey::from_ec_point(KeyKind::P256, &[4; 65]).is_err(), "a point off the curve");
        assert!(PublicKey::from_spki_der(b"").is_err());
    }
}
