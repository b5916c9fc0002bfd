//! Search for secrets in clear in bytes that will be public: raw, hex or base64, reversed, wrapped into lines.

use memchr::memmem;

use crate::secret::SecretBytes;

/// Minimum length of a secret to search for: shorter ones occur by chance.
const MIN_LEN: usize = 8;

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const BASE64_URL: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Bytes to be searched, in the forms that the encodings of a secret need.
pub(super) struct Haystack<'a> {
    raw: &'a [u8],
    /// Without ASCII white space, because text encodings may be wrapped into lines (RFC 4648 §3.1).
    unwrapped: Vec<u8>,
    /// The same in lower case, for hex digits of either case.
    lower: Vec<u8>,
}

impl<'a> Haystack<'a> {
    pub(super) fn new(raw: &'a [u8]) -> Self {
        let unwrapped: Vec<u8> = raw.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
        let lower = unwrapped.to_ascii_lowercase();
        Self { raw, unwrapped, lower }
    }

    /// Searches for the secret and returns the encoding in which it was found. At most 16 searches.
    pub(super) fn find(&self, secret: &SecretBytes) -> Option<&'static str> {
        // Exposed to search for it. Each encoding is a secret too and is wiped after its search.
        let secret = secret.expose().as_slice();
        if secret.len() < MIN_LEN {
            return None;
        }
        let reversed = SecretBytes::new(secret.iter().rev().copied().collect());
        self.find_in_order(secret)
            .or_else(|| self.find_in_order(reversed.expose()).map(|form| if form == "raw" { "reversed" } else { form }))
    }

    fn find_in_order(&self, secret: &[u8]) -> Option<&'static str> {
        if memmem::find(self.raw, secret).is_some() {
            return Some("raw");
        }
        let digits = b"0123456789abcdef";
        let hex = encoded(secret, |byte| [digits[usize::from(byte >> 4)], digits[usize::from(byte & 15)]]);
        if memmem::find(&self.lower, hex.expose()).is_some() {
            return Some("hex");
        }
        for alphabet in [BASE64, BASE64_URL] {
            // The base64 encoding of a secret inside other bytes depends on the secret's offset modulo 3. Omitting up to two bytes
            // at each end leaves a part whose encoding is independent of its surroundings.
            for skipped in 0..3 {
                let inner = &secret[skipped..];
                let form = base64(&inner[..inner.len() / 3 * 3], alphabet);
                if memmem::find(&self.unwrapped, form.expose()).is_some() {
                    return Some("base64");
                }
            }
        }
        None
    }
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
            let inside = |form: &[u8]| [&before, form, &after].concat();
            let found = |form: &[u8]| Haystack::new(&inside(form)).find(&SecretBytes::copy_of(&secret)).is_some();
            let reversed: Vec<u8> = secret.iter().rev().copied().collect();
            for order in [&secret, &reversed] {
                prop_assert!(found(order));
                let hex = hex::encode(order);
                let mixed: String = hex.char_indices().map(|(i, c)| if i % 3 == 0 { c.to_ascii_uppercase() } else { c }).collect();
                let standard = pem_base64(&inside(order));
                let url = standard.replace('+', "-").replace('/', "_");
                for text in [hex, hex::encode_upper(order), mixed, standard, url] {
                    prop_assert!(found(text.as_bytes()), "{text}");
                    for (width, end) in [(76, "\r\n"), (7, "\n"), (2, " ")] {
                        let lines: Vec<_> = text.as_bytes().chunks(width).map(String::from_utf8_lossy).collect();
                        prop_assert!(found(lines.join(end).as_bytes()), "{width} columns");
                    }
                }
            }
        }
    }

    #[test]
    fn absent_secret_not_found() {
        let secret = SecretBytes::copy_of(&[7; 32]);
        assert_eq!(Haystack::new(&[7; 31]).find(&secret), None);
        assert_eq!(Haystack::new(&[]).find(&secret), None);
        assert_eq!(Haystack::new(&[1, 2, 3]).find(&SecretBytes::copy_of(&[])), None);
    }
}
