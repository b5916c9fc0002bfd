//! Stored device private keys: wrapped by the HSM, or on the token.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use spp_format::keys::sha256;
use spp_format::names::KeyName;

/// A private key that only the HSM can unwrap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// Name of the wrapping key in the HSM (AES-KWP, RFC 5649).
    pub wrapping_key: KeyName,
    /// The wrapped bytes.
    pub blob: Vec<u8>,
}

/// A private key that is a token object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TokenPair {
    /// `CKA_LABEL`, shared by all pairs of a batch ([`BatchName::pairs`]).
    pub label: KeyName,
    /// `CKA_ID`, random.
    pub id: Vec<u8>,
}

/// A stored device private key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredKey {
    /// Outside the HSM, wrapped.
    Wrapped(WrappedKey),
    /// On the token.
    OnToken(TokenPair),
}

impl StoredKey {
    /// The batch of the key; `None` if the name does not follow the daemon's naming scheme.
    pub fn batch(&self) -> Option<BatchName> {
        match self {
            Self::Wrapped(wrapped) => BatchName::from_key_name(&wrapped.wrapping_key),
            Self::OnToken(pair) => BatchName::from_pair_label(&pair.label),
        }
    }
}

/// The random identifier of a state store. Names of objects that the daemon creates on a token contain it, so that two stores
/// never touch each other's keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StoreId([u8; 8]);

impl StoreId {
    /// Creates an identifier from random bytes.
    pub const fn from_random(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The store and number of a batch, from which the names of its token objects derive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchName {
    /// The store that owns the batch.
    pub store: StoreId,
    /// Batch number, from 1, never reused.
    pub number: u64,
}

impl BatchName {
    /// The name of the batch key.
    pub fn key(self) -> KeyName {
        self.label(BATCH)
    }

    /// The label of the batch's pairs on the token.
    pub fn pairs(self) -> KeyName {
        self.label(PAIR)
    }

    fn label(self, prefix: &str) -> KeyName {
        let text = format!("{prefix}-{}-{}", self.store, self.number);
        text.parse().expect("hex and digits are allowed in a name, and it is shorter than 64 characters")
    }

    /// Parses the name of a batch key.
    pub fn from_key_name(name: &KeyName) -> Option<Self> {
        Self::from_label(name.as_str(), BATCH)
    }

    /// Parses the label of pairs on the token.
    pub fn from_pair_label(label: &KeyName) -> Option<Self> {
        Self::from_label(label.as_str(), PAIR)
    }

    fn from_label(label: &str, prefix: &str) -> Option<Self> {
        let (store, number) = label.strip_prefix(prefix)?.strip_prefix('-')?.split_once('-')?;
        let store = StoreId(hex::decode(store).ok()?.try_into().ok()?);
        let batch = Self { store, number: u64::from_str(number).ok()? };
        // Only the canonical name is accepted: no leading zeros, no upper case.
        (batch.label(prefix).as_str() == label).then_some(batch)
    }
}

/// The CKA_ID of a batch key. It derives from the name, so that a key is found again if the answer to its creation was lost.
pub fn batch_key_id(name: &KeyName) -> Vec<u8> {
    sha256(name.as_str().as_bytes())[..16].to_vec()
}

const BATCH: &str = "batch";
const PAIR: &str = "pair";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_name_parses_only_canonical_names() {
        let batch = BatchName { store: StoreId::from_random([0xab; 8]), number: 17 };
        assert_eq!(batch.key().as_str(), "batch-abababababababab-17");
        assert_eq!(BatchName::from_key_name(&batch.key()), Some(batch));
        assert_eq!(BatchName::from_pair_label(&batch.pairs()), Some(batch));
        assert_eq!(BatchName::from_key_name(&batch.pairs()), None);
        for other in ["batch-abababababababab-017", "batch-abab-1", "batch-1", "wrap-1", "batch-abababababababab-1-1"] {
            assert_eq!(BatchName::from_key_name(&other.parse().unwrap()), None, "{other}");
        }
    }
}
