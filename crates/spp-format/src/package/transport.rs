//! The chip's transport key pair, to which packages are sealed, and key agreement with it.

use aws_lc_rs::agreement::{self, ECDH_P256, PrivateKey, UnparsedPublicKey, X25519};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};

use super::PackageError;
use crate::secret::{Secret, SecretBytes};

/// Curves that a chip may use for ECDH-ES+A256KW.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportCurve {
    /// NIST P-256.
    P256,
    /// X25519 (RFC 7748).
    X25519,
}

impl TransportCurve {
    const fn algorithm(self) -> &'static agreement::Algorithm {
        match self {
            Self::P256 => &ECDH_P256,
            Self::X25519 => &X25519,
        }
    }
}

/// A chip's validated transport public key: key agreement with it succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportPublicKey {
    curve: TransportCurve,
    bytes: Vec<u8>,
}

impl TransportPublicKey {
    /// Parses an uncompressed point of 65 bytes (SEC 1 §2.3.3) or 32 bytes of X25519 (RFC 7748 §5).
    ///
    /// # Errors
    /// For other lengths, points off the curve and points of small order (RFC 7748 §6.1).
    pub fn new(curve: TransportCurve, bytes: &[u8]) -> Result<Self, PackageError> {
        let valid_form = match curve {
            TransportCurve::P256 => bytes.len() == 65 && bytes[0] == 4,
            TransportCurve::X25519 => bytes.len() == 32,
        };
        if !valid_form {
            return Err(PackageError::TransportKey("expected 65 bytes starting with 04 (P-256) or 32 bytes (X25519)"));
        }
        let key = Self { curve, bytes: bytes.to_vec() };
        // Trial agreement: a key that the provider rejects must be rejected before a session is opened.
        let trial = TransportPrivateKey::generate(curve)?;
        trial.agree(&key, |_| ()).ok_or(PackageError::TransportKey("not a point of the curve's prime-order group"))?;
        Ok(key)
    }

    /// The curve.
    pub const fn curve(&self) -> TransportCurve {
        self.curve
    }

    /// SHA-256 of the curve and the bytes: identifies the key in the journal.
    pub fn fingerprint(&self) -> [u8; 32] {
        let curve: u8 = match self.curve {
            TransportCurve::P256 => 1,
            TransportCurve::X25519 => 2,
        };
        crate::keys::sha256(&[&[curve], self.bytes.as_slice()].concat())
    }

    /// The encoded public key.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A transport private key: in the chip, or ephemeral in the sender. The provider wipes it.
pub struct TransportPrivateKey {
    curve: TransportCurve,
    key: PrivateKey,
}

impl TransportPrivateKey {
    /// Parses 32 bytes: a P-256 scalar, or an X25519 private key (RFC 7748 §5).
    ///
    /// # Errors
    /// If the bytes are not a private key of the curve.
    pub fn from_bytes(curve: TransportCurve, bytes: &SecretBytes) -> Result<Self, PackageError> {
        // Exposed to the provider, which stores and wipes its own copy.
        let key = PrivateKey::from_private_key(curve.algorithm(), bytes.expose())
            .map_err(|_| PackageError::TransportKey("the private key is invalid for the curve"))?;
        Ok(Self { curve, key })
    }

    /// Generates an ephemeral key for one message.
    pub(super) fn generate(curve: TransportCurve) -> Result<Self, PackageError> {
        let key =
            PrivateKey::generate(curve.algorithm()).map_err(|_| PackageError::Provider("generating a key pair"))?;
        Ok(Self { curve, key })
    }

    /// The curve.
    pub const fn curve(&self) -> TransportCurve {
        self.curve
    }

    /// The public key.
    ///
    /// # Errors
    /// If the provider fails.
    pub fn public(&self) -> Result<TransportPublicKey, PackageError> {
        let public = self.key.compute_public_key().map_err(|_| PackageError::Provider("computing a public key"))?;
        Ok(TransportPublicKey { curve: self.curve, bytes: public.as_ref().to_vec() })
    }

    /// Derives 32 bytes: HKDF-SHA-256 without salt over the shared secret (RFC 9053 §5.1). `None` if the agreement fails.
    pub(super) fn derive_with(&self, other: &TransportPublicKey, context: &[u8]) -> Option<Secret<[u8; 32]>> {
        self.agree(other, |shared| {
            let mut key = Secret::new([0; 32]);
            let prk = Salt::none(HKDF_SHA256).extract(shared);
            // Exposed to fill it.
            prk.expand(&[context], HKDF_SHA256).ok()?.fill(key.expose_mut()).ok()?;
            Some(key)
        })?
    }

    fn agree<T>(&self, other: &TransportPublicKey, derive: impl FnOnce(&[u8]) -> T) -> Option<T> {
        let other = UnparsedPublicKey::new(other.curve.algorithm(), &other.bytes);
        agreement::agree(&self.key, other, (), |shared| Ok(derive(shared))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unusable_transport_keys_rejected() {
        for curve in [TransportCurve::P256, TransportCurve::X25519] {
            let good = TransportPrivateKey::generate(curve).unwrap().public().unwrap();
            assert_eq!(TransportPublicKey::new(curve, good.as_bytes()), Ok(good.clone()));
            assert!(TransportPublicKey::new(curve, &good.as_bytes()[1..]).is_err());
            assert!(TransportPublicKey::new(curve, &[]).is_err());
        }
        assert!(TransportPublicKey::new(TransportCurve::P256, &[4; 65]).is_err(), "point off the curve");
        assert!(TransportPublicKey::new(TransportCurve::X25519, &[0; 32]).is_err(), "point of small order");
    }
}
