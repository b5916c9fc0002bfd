//! Private keys in memory: device keys and TLS keys.

use std::sync::OnceLock;

use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::signature::{self, KeyPair as _};
use der::asn1::UintRef;
use der::{Decode as _, Encode as _};

use super::{KeyError, KeyType, PublicKey, SignatureAlgorithm};
use crate::secret::{Secret, SecretBytes};

/// The private components of a two-prime RSA key (RFC 8017 §3.2), big-endian. Modulus and exponent are in the public key.
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

/// The components of a private key, as COSE_Key encodes them.
pub enum PrivateParts {
    /// The scalar of an EC key, as long as the group order.
    Ec(SecretBytes),
    /// The 32-byte seed, the private key of RFC 8032.
    Ed25519(SecretBytes),
    /// RSA.
    Rsa(Box<RsaPrivateParts>),
}

/// A device's key pair with its private key in memory, in the daemon during delivery or in the device.
pub struct DevicePrivateKey {
    public: PublicKey,
    parts: PrivateParts,
    /// The provider's key object, created on first use. The provider zeroizes it.
    signer: OnceLock<Signer>,
}

impl DevicePrivateKey {
    /// Creates a key pair from its parts. Fails if they do not belong together.
    pub fn from_parts(public: PublicKey, parts: PrivateParts) -> Result<Self, KeyError> {
        let key = Self::unchecked(public, parts);
        key.signer()?;
        Ok(key)
    }

    const fn unchecked(public: PublicKey, parts: PrivateParts) -> Self {
        Self { public, parts, signer: OnceLock::new() }
    }

    /// Decodes the output of the HSM's unwrap operation: PKCS#8 (RFC 5958), or 32 raw bytes for Ed25519. Trailing zero bytes are
    /// allowed, because some modules pad before they wrap.
    ///
    /// For RSA only the modulus and the exponent are compared. The other components are not verified here: the integrity check of
    /// the wrapping (RFC 5649 §3) protects what the HSM generated, and the device verifies them again. Verifying them here would
    /// double the cost of a device.
    pub fn from_unwrapped(public: PublicKey, plaintext: &SecretBytes) -> Result<Self, KeyError> {
        let kind = public.kind();
        let unreadable = || KeyError::UnreadablePrivateKey(kind);
        // Exposed to decode it; every component becomes a separate Secret.
        let bytes = plaintext.expose().as_slice();
        let parts = if kind == KeyType::Ed25519 {
            let seed = bytes.get(..32).ok_or_else(unreadable)?;
            PrivateParts::Ed25519(SecretBytes::copy_of(seed))
        } else {
            let pkcs8 = pkcs8::PrivateKeyInfoRef::from_der(der_prefix(bytes).ok_or_else(unreadable)?)
                .map_err(|_| unreadable())?;
            let inner = pkcs8.private_key.as_bytes();
            if kind.rsa_bits().is_some() {
                let rsa = pkcs1::RsaPrivateKeyRef::from_der(inner).map_err(|_| unreadable())?;
                let (n, e) = public.rsa_components().ok_or(KeyError::Mismatch)?;
                if (rsa.modulus.as_bytes(), rsa.public_exponent.as_bytes()) != (n.as_slice(), e.as_slice()) {
                    return Err(KeyError::Mismatch);
                }
                let secret = |number: UintRef<'_>| SecretBytes::copy_of(number.as_bytes());
                let parts = PrivateParts::Rsa(Box::new(RsaPrivateParts {
                    d: secret(rsa.private_exponent),
                    p: secret(rsa.prime1),
                    q: secret(rsa.prime2),
                    dp: secret(rsa.exponent1),
                    dq: secret(rsa.exponent2),
                    qinv: secret(rsa.coefficient),
                }));
                return Ok(Self::unchecked(public, parts));
            } else {
                let ec = sec1::EcPrivateKey::from_der(inner).map_err(|_| unreadable())?;
                PrivateParts::Ec(SecretBytes::copy_of(ec.private_key))
            }
        };
        // Checked, but the signer is dropped: a key in delivery does not sign.
        let key = Self::unchecked(public, parts);
        key.make_signer()?;
        Ok(key)
    }

    /// The public key.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The private components, for encoding.
    pub const fn parts(&self) -> &PrivateParts {
        &self.parts
    }

    /// The secret components, which must never appear in clear text in a message.
    pub fn secrets(&self) -> Vec<&SecretBytes> {
        match &self.parts {
            PrivateParts::Ec(d) => vec![d],
            PrivateParts::Ed25519(seed) => vec![seed],
            PrivateParts::Rsa(rsa) => vec![&rsa.d, &rsa.p, &rsa.q, &rsa.dp, &rsa.dq, &rsa.qinv],
        }
    }

    /// Signs a message. ECDSA signatures are in DER.
    pub fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if !algorithm.fits(self.public.kind()) {
            return Err(KeyError::WrongAlgorithm(algorithm, self.public.kind()));
        }
        self.signer()?.sign(algorithm, message, self.public.kind())
    }

    fn signer(&self) -> Result<&Signer, KeyError> {
        match self.signer.get() {
            Some(signer) => Ok(signer),
            None => self.make_signer().map(|signer| self.signer.get_or_init(|| signer)),
        }
    }

    /// Creates the provider's key object. Fails if the private key does not belong to the public key.
    fn make_signer(&self) -> Result<Signer, KeyError> {
        let mismatch = |_| KeyError::Mismatch;
        let public = self.public.key_bits();
        // The exposures below pass the private key to the provider that signs.
        match &self.parts {
            PrivateParts::Ec(d) => {
                let algorithm = match self.public.kind() {
                    KeyType::P384 => &signature::ECDSA_P384_SHA384_ASN1_SIGNING,
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

impl Signer {
    fn sign(&self, algorithm: SignatureAlgorithm, message: &[u8], kind: KeyType) -> Result<Vec<u8>, KeyError> {
        let rng = aws_lc_rs::rand::SystemRandom::new();
        let failed = |_| KeyError::UnreadablePrivateKey(kind);
        match self {
            Self::Ec(pair) => Ok(pair.sign(&rng, message).map_err(failed)?.as_ref().to_vec()),
            Self::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
            Self::Rsa(pair) => {
                let encoding: &'static dyn signature::RsaEncoding = match algorithm {
                    SignatureAlgorithm::RsaPssSha256 => &signature::RSA_PSS_SHA256,
                    _ => &signature::RSA_PKCS1_SHA256,
                };
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(encoding, &rng, message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
        }
    }
}

/// The leading DER value. At most 7 zero bytes may follow it (RFC 5649 padding that the module did not strip).
pub(super) fn der_prefix(bytes: &[u8]) -> Option<&[u8]> {
    let reader = der::SliceReader::new(bytes).ok()?;
    let header = der::Header::peek(&reader).ok()?;
    let total = usize::try_from((header.encoded_len().ok()? + header.length()).ok()?).ok()?;
    let (value, rest) = bytes.split_at_checked(total)?;
    (rest.len() < 8 && rest.iter().all(|b| *b == 0)).then_some(value)
}

/// Generates a P-256 key pair in software, for keys outside the HSM: TLS keys of stations and officers, and the simulated chip.
pub fn generate_p256() -> Result<DevicePrivateKey, KeyError> {
    use aws_lc_rs::encoding::{AsBigEndian, EcPrivateKeyBin};
    let failed = |_| KeyError::UnreadablePrivateKey(KeyType::P256);
    let pair = signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
    let public = PublicKey::from_ec_point(KeyType::P256, pair.public_key().as_ref())?;
    let scalar: EcPrivateKeyBin<'_> = pair.private_key().as_be_bytes().map_err(failed)?;
    let parts = PrivateParts::Ec(Secret::new(scalar.as_ref().to_vec()));
    DevicePrivateKey::from_parts(public, parts)
}

/// A TLS key pair in memory, which also signs certificate requests and officers' statements.
pub struct TlsKey {
    public: PublicKey,
    signer: Signer,
    pem: SecretBytes,
}

impl TlsKey {
    /// Generates a P-256 key pair.
    pub fn generate() -> Result<Self, KeyError> {
        let failed = |_| KeyError::UnreadablePrivateKey(KeyType::P256);
        let pair = signature::EcdsaKeyPair::generate(&signature::ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
        let der = pair.to_pkcs8v1().map_err(failed)?;
        let pem = der::pem::encode_string("PRIVATE KEY", der::pem::LineEnding::LF, der.as_ref());
        let pem = pem.map_err(|_| KeyError::UnreadablePrivateKey(KeyType::P256))?;
        Self::from_signer(Signer::Ec(pair), Secret::new(pem.into_bytes()))
    }

    /// Reads a key pair of any supported kind from PKCS#8 PEM (RFC 7468 §10).
    pub fn from_pem(pem: SecretBytes) -> Result<Self, KeyError> {
        // Exposed to load it into the provider.
        let (label, der) = der::pem::decode_vec(pem.expose()).map_err(|_| KeyError::UnsupportedPrivateKey)?;
        let der = Secret::new(der);
        if label != "PRIVATE KEY" {
            return Err(KeyError::UnsupportedPrivateKey);
        }
        let ec = |algorithm| signature::EcdsaKeyPair::from_pkcs8(algorithm, der.expose()).map(Signer::Ec);
        let signer = ec(&signature::ECDSA_P256_SHA256_ASN1_SIGNING)
            .or_else(|_| ec(&signature::ECDSA_P384_SHA384_ASN1_SIGNING))
            .or_else(|_| signature::Ed25519KeyPair::from_pkcs8(der.expose()).map(Signer::Ed25519))
            .or_else(|_| aws_lc_rs::rsa::KeyPair::from_pkcs8(der.expose()).map(|pair| Signer::Rsa(Box::new(pair))));
        Self::from_signer(signer.map_err(|_| KeyError::UnsupportedPrivateKey)?, pem)
    }

    fn from_signer(signer: Signer, pem: SecretBytes) -> Result<Self, KeyError> {
        let spki: Result<PublicKeyX509Der<'_>, _> = match &signer {
            Signer::Ec(pair) => pair.public_key().as_der(),
            Signer::Ed25519(pair) => pair.public_key().as_der(),
            Signer::Rsa(pair) => pair.public_key().as_der(),
        };
        let public = PublicKey::from_spki_der(spki.map_err(|_| KeyError::UnsupportedPrivateKey)?.as_ref())?;
        Ok(Self { public, signer, pem })
    }

    /// The public key.
    pub const fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The private key as PKCS#8 PEM (RFC 7468 §10).
    pub const fn pem(&self) -> &SecretBytes {
        &self.pem
    }

    /// The signature algorithm of the key.
    pub const fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::default_for(self.public.kind())
    }

    /// Signs a message.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        self.signer.sign(self.algorithm(), message, self.public.kind())
    }
}
