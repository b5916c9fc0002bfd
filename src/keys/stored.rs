//! How a private key is kept until its device has it: wrapped by the HSM, or inside it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::sha256;
use crate::names::KeyName;

/// A private key that only the HSM can open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrappedKey {
    /// The key in the HSM under which it is wrapped (AES-KWP, RFC 5649).
    pub wrapping_key: KeyName,
    /// The wrapped bytes.
    pub blob: Vec<u8>,
}

/// A private key that is an object of the token.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TokenPair {
    /// `CKA_LABEL`: all pairs of a batch share it ([`BatchName::pairs`]).
    pub label: KeyName,
    /// `CKA_ID`, random.
    pub id: Vec<u8>,
}

/// A private key that is kept, either way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredKey {
    /// Outside the HSM, wrapped.
    Wrapped(WrappedKey),
    /// On the token.
    OnToken(TokenPair),
}

impl StoredKey {
    /// The batch that it belongs to; none for a name that no daemon gave.
    pub fn batch(&self) -> Option<BatchName> {
        match self {
            Self::Wrapped(wrapped) => BatchName::of_key(&wrapped.wrapping_key),
            Self::OnToken(pair) => BatchName::of_pairs(&pair.label),
        }
    }
}

/// The identifier of a state store, random: what the daemon makes on a token carries it, so that two stores never touch each
/// other's keys.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StoreId([u8; 8]);

impl StoreId {
    /// From random bytes.
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

/// A batch of key pairs by its store and number, and with that the names of what belongs to it on the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchName {
    /// Whose.
    pub store: StoreId,
    /// Counted from 1, never used twice.
    pub number: u64,
}

impl BatchName {
    /// The name of the key under which the batch's pairs are wrapped.
    pub fn key(self) -> KeyName {
        self.label(BATCH)
    }

    /// The label of pairs that are kept on the token.
    pub fn pairs(self) -> KeyName {
        self.label(PAIR)
    }

    fn label(self, what: &str) -> KeyName {
        let text = format!("{what}-{}-{}", self.store, self.number);
        text.parse().expect("hex and digits are allowed in a name, and it is shorter than 64 characters")
    }

    /// The batch whose key has that name.
    pub fn of_key(name: &KeyName) -> Option<Self> {
        Self::of_label(name.as_str(), BATCH)
    }

    /// The batch whose pairs on the token have that label.
    pub fn of_pairs(label: &KeyName) -> Option<Self> {
        Self::of_label(label.as_str(), PAIR)
    }

    fn of_label(label: &str, what: &str) -> Option<Self> {
        let (store, number) = label.strip_prefix(what)?.strip_prefix('-')?.split_once('-')?;
        let store = StoreId(hex::decode(store).ok()?.try_into().ok()?);
        let batch = Self { store, number: u64::from_str(number).ok()? };
        // One name for one batch: no leading zeros, no capitals.
        (batch.label(what).as_str() == label).then_some(batch)
    }
}

/// The CKA_ID of a batch key. It follows from the name, so that a key whose creation was not answered is found again.
pub fn batch_key_id(name: &KeyName) -> Vec<u8> {
    sha256(name.as_str().as_bytes())[..16].to_vec()
}

const BATCH: &str = "batch";
const PAIR: &str = "pair";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_found_in_the_names_of_what_belongs_to_it_and_in_no_other() {
        let batch = BatchName { store: StoreId::from_random([0xab; 8]), number: 17 };
        assert_eq!(batch.key().as_str(), "batch-abababababababab-17");
        assert_eq!(BatchName::of_key(&batch.key()), Some(batch));
        assert_eq!(BatchName::of_pairs(&batch.pairs()), Some(batch));
        assert_eq!(BatchName::of_key(&batch.pairs()), None);
        for other in ["batch-abababababababab-017", "batch-abab-1", "batch-1", "wrap-1", "batch-abababababababab-1-1"] {
            assert_eq!(BatchName::of_key(&other.parse().unwrap()), None, "{other}");
        }
    }
}
