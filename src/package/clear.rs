//! Whether a secret stands in bytes that will be public: as it is, backwards, in hex, or in base64.

use memchr::memmem;

use crate::secret::SecretBytes;

/// Shorter bytes are found by chance.
const SHORTEST: usize = 8;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const BASE64_URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// In which form the secret stands in the bytes; `None` if it does not. At most 10 searches.
pub(super) fn find(secret: &SecretBytes, bytes: &[u8]) -> Option<&'static str> {
    // Exposed to be searched for. Each form is a secret of its own, wiped after its search.
    let secret = secret.expose().as_slice();
    if secret.len() < SHORTEST {
        return None;
    }
    let has = |form: SecretBytes| memmem::find(bytes, form.expose()).is_some();
    let hex =
        |digits: &[u8; 16]| encoded(secret, |byte| [digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]]);
    if memmem::find(bytes, secret).is_some() {
        return Some("as it is");
    }
    if has(SecretBytes::new(secret.iter().rev().copied().collect())) {
        return Some("in reversed order");
    }
    if has(hex(b"0123456789abcdef")) || has(hex(b"0123456789ABCDEF")) {
        return Some("in hex");
    }
    for alphabet in [BASE64, BASE64_URL] {
        // Base64 of the secret within other bytes depends on where in a group of three it starts. Leaving out up to
        // two bytes at each end leaves what is the same whatever stands beside it.
        for skipped in 0..3 {
            let inner = &secret[skipped..];
            if has(base64(&inner[..inner.len() / 3 * 3], alphabet)) {
                return Some("in base64");
            }
        }
    }
    None
}

fn encoded<const N: usize>(bytes: &[u8], encode: impl Fn(u8) -> [u8; N]) -> SecretBytes {
    let mut out = SecretBytes::new(Vec::with_capacity(bytes.len() * N));
    for byte in bytes {
        out.expose_mut().extend_from_slice(&encode(*byte));
    }
    out
}

/// Base64 (RFC 4648 §4, §5) of whole groups.
fn base64(groups: &[u8], alphabet: &[u8; 64]) -> SecretBytes {
    let mut out = SecretBytes::new(Vec::with_capacity(groups.len() / 3 * 4));
    for group in groups.chunks_exact(3) {
        let bits = group.iter().fold(0usize, |bits, byte| bits << 8 | usize::from(*byte));
        out.expose_mut().extend([18, 12, 6, 0].map(|shift| alphabet[bits >> shift & 63]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Base64 by another hand: the one of PEM.
    fn pem_base64(bytes: &[u8]) -> String {
        let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, bytes).unwrap();
        pem.lines().filter(|line| !line.starts_with('-')).collect()
    }

    proptest! {
        #[test]
        fn a_secret_is_found_in_every_form(
            secret in prop::collection::vec(any::<u8>(), 16..80),
            before in prop::collection::vec(any::<u8>(), 0..7),
            after in prop::collection::vec(any::<u8>(), 0..7),
        ) {
            let wrapped = |form: &[u8]| [&before, form, &after].concat();
            let found = |form: &[u8]| find(&SecretBytes::copy_of(&secret), &wrapped(form)).is_some();
            prop_assert!(found(&secret));
            prop_assert!(found(&secret.iter().rev().copied().collect::<Vec<_>>()));
            prop_assert!(found(hex::encode(&secret).as_bytes()));
            prop_assert!(found(hex::encode_upper(&secret).as_bytes()));
            let standard = pem_base64(&wrapped(&secret));
            prop_assert!(found(standard.as_bytes()));
            prop_assert!(found(standard.replace('+', "-").replace('/', "_").as_bytes()));
        }
    }

    #[test]
    fn what_is_not_there_is_not_found() {
        let secret = SecretBytes::copy_of(&[7; 32]);
        assert_eq!(find(&secret, &[7; 31]), None);
        assert_eq!(find(&secret, &[]), None);
        assert_eq!(find(&SecretBytes::copy_of(&[]), &[1, 2, 3]), None);
    }
}
