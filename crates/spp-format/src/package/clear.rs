//! Search for secrets in clear in bytes that will be public: raw, reversed, hex or base64.

use memchr::memmem;

use crate::secret::SecretBytes;

/// Minimum length of a secret to search for: shorter ones occur by chance.
const MIN_LEN: usize = 8;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const BASE64_URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Searches `bytes` for the secret and returns the encoding in which it was found. At most 10 searches.
pub(super) fn find(secret: &SecretBytes, bytes: &[u8]) -> Option<&'static str> {
    // Exposed to search for it. Each encoding is a secret too and is wiped after its search.
    let secret = secret.expose().as_slice();
    if secret.len() < MIN_LEN {
        return None;
    }
    let contains = |encoding: SecretBytes| memmem::find(bytes, encoding.expose()).is_some();
    let hex =
        |digits: &[u8; 16]| encoded(secret, |byte| [digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]]);
    if memmem::find(bytes, secret).is_some() {
        return Some("raw");
    }
    if contains(SecretBytes::new(secret.iter().rev().copied().collect())) {
        return Some("reversed");
    }
    if contains(hex(b"0123456789abcdef")) || contains(hex(b"0123456789ABCDEF")) {
        return Some("hex");
    }
    for alphabet in [BASE64, BASE64_URL] {
        // The base64 encoding of a secret inside other bytes depends on the secret's offset modulo 3. Omitting up to two bytes
        // at each end leaves a part whose encoding is independent of its surroundings.
        for skipped in 0..3 {
            let inner = &secret[skipped..];
            if contains(base64(&inner[..inner.len() / 3 * 3], alphabet)) {
                return Some("base64");
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

/// Base64 (RFC 4648 §4, §5) of complete groups.
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

    /// Base64 from an independent implementation (PEM).
    fn pem_base64(bytes: &[u8]) -> String {
        let pem = der::pem::encode_string("X", der::pem::LineEnding::LF, bytes).unwrap();
        pem.lines().filter(|line| !line.starts_with('-')).collect()
    }

    proptest! {
        #[test]
        fn secret_in_every_encoding_found(
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
    fn absent_secret_not_found() {
        let secret = SecretBytes::copy_of(&[7; 32]);
        assert_eq!(find(&secret, &[7; 31]), None);
        assert_eq!(find(&secret, &[]), None);
        assert_eq!(find(&SecretBytes::copy_of(&[]), &[1, 2, 3]), None);
    }
}
