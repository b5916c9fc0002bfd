//! Key derivation: NIST SP 800-108r1 §4.1, KDF in counter mode with the HSM's MAC as the pseudorandom function.

use serde::{Deserialize, Serialize};
use spp_format::names::KeyName;

/// The pseudorandom function of a master key. Fixed at key generation, because the key type depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prf {
    /// HMAC-SHA-256 (FIPS 198-1); the key is a generic secret of 32 bytes.
    #[serde(rename = "hmac-sha-256")]
    HmacSha256,
    /// AES-256-CMAC (SP 800-38B).
    #[serde(rename = "aes-cmac")]
    AesCmac,
}

impl std::fmt::Display for Prf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::HmacSha256 => "hmac-sha-256",
            Self::AesCmac => "aes-cmac",
        })
    }
}

impl Prf {
    /// Output length of one call in bytes.
    pub const fn output_len(self) -> usize {
        match self {
            Self::HmacSha256 => 32,
            Self::AesCmac => 16,
        }
    }
}

/// The parameters of a derivation from a master key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    /// The master key.
    pub master_key: KeyName,
    /// `spp/v1/` + purpose.
    pub label: String,
    /// The canonical device identity.
    pub context: Vec<u8>,
    /// Length of the derived key in bytes; at most [`Derivation::MAX_LEN`].
    pub length: usize,
}

impl Derivation {
    /// Maximum length of a derived key in bytes.
    pub const MAX_LEN: usize = 64;

    /// A device's symmetric key for a purpose.
    pub fn device_key(
        master_key: KeyName,
        purpose: &str,
        identity: &spp_format::names::DeviceIdentity,
        length: usize,
    ) -> Self {
        Self { master_key, label: format!("spp/v1/{purpose}"), context: identity.to_string().into_bytes(), length }
    }

    /// The check value that identifies a master key: 8 bytes that reveal nothing about device keys.
    pub(crate) fn check_value(master_key: KeyName) -> Self {
        Self { master_key, label: "spp/v1/check-value".to_owned(), context: Vec::new(), length: 8 }
    }

    /// The fixed input, which follows the counter in each block: `Label ‖ 00 ‖ Context ‖ [L]`.
    pub(crate) fn fixed_input(&self) -> Vec<u8> {
        let bits = u32::try_from(self.length * 8).unwrap_or(u32::MAX);
        [self.label.as_bytes(), &[0], &self.context, &bits.to_be_bytes()].concat()
    }
}

/// The PRF inputs, one per block: `[i] ‖ fixed input`, where i is a 32-bit counter that starts at 1.
pub(crate) fn prf_inputs(prf: Prf, fixed_input: &[u8], length: usize) -> impl Iterator<Item = Vec<u8>> {
    let blocks = u32::try_from(length.div_ceil(prf.output_len())).unwrap_or(u32::MAX);
    (1..=blocks).map(move |i| [&i.to_be_bytes(), fixed_input].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_input_contains_label_context_and_length() {
        let key: KeyName = "master".parse().unwrap();
        let identity = "serial:A".parse().unwrap();
        let channel = Derivation::device_key(key, "channel", &identity, 32);
        assert_eq!(channel.fixed_input(), b"spp/v1/channel\0serial:A\0\0\x01\0");
    }

    #[test]
    fn prf_inputs_count_from_one_and_cover_length() {
        let inputs: Vec<_> = prf_inputs(Prf::AesCmac, b"x", 33).collect();
        assert_eq!(inputs, [b"\0\0\0\x01x", b"\0\0\0\x02x", b"\0\0\0\x03x"].map(|b| b.to_vec()));
        assert_eq!(prf_inputs(Prf::HmacSha256, b"x", 32).count(), 1);
    }
}
