//! Conversion between the two encodings of an ECDSA signature.

use der::asn1::UintRef;
use der::{Decode as _, Encode as _, Sequence};

use super::KeyType;

/// `Ecdsa-Sig-Value` of RFC 3279 §2.2.3.
#[derive(Sequence)]
struct EcdsaSigValue<'a> {
    r: UintRef<'a>,
    s: UintRef<'a>,
}

/// Converts `r || s` (PKCS#11, COSE) to DER (X.509). Returns `None` if the length is odd or zero.
pub fn ecdsa_der_from_fixed(fixed: &[u8]) -> Option<Vec<u8>> {
    if fixed.is_empty() || !fixed.len().is_multiple_of(2) {
        return None;
    }
    let (r, s) = fixed.split_at(fixed.len() / 2);
    EcdsaSigValue { r: UintRef::new(r).ok()?, s: UintRef::new(s).ok()? }.to_der().ok()
}

/// Converts DER (X.509) to `r || s`, each half as long as the group order. Returns `None` for an invalid encoding.
pub fn ecdsa_fixed_from_der(der: &[u8], kind: KeyType) -> Option<Vec<u8>> {
    let half = match kind {
        KeyType::P256 => 32,
        KeyType::P384 => 48,
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
