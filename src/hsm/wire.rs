//! The messages between handle and worker over the socket pair: frames of a length and a postcard value.
//!
//! Both ends are the same program, so the format needs no version. Frames may contain secrets and are wiped after use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use spp_format::keys::{KeyType, SignatureAlgorithm};
use spp_format::names::KeyName;
use spp_format::secret::SecretBytes;
use zeroize::{Zeroize as _, Zeroizing};

use super::TokenPair;
use super::attributes::{KeyRole, Provenance};
use super::failure::Failure;
use super::kdf::Prf;
use super::module::ModuleProfile;
use super::pin::PinSource;
use super::token::TokenIdentity;

/// Maximum frame size in bytes. A larger frame is a fault of the peer.
pub(crate) const MAX_FRAME: usize = 1 << 20;

/// Secret bytes in a message. Wiped when dropped, never printed.
#[derive(Serialize, Deserialize)]
pub(crate) struct WireSecret(Vec<u8>);

impl WireSecret {
    pub(crate) const fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(crate) fn into_secret(mut self) -> SecretBytes {
        SecretBytes::new(std::mem::take(&mut self.0))
    }
}

impl Drop for WireSecret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// The first frame to a worker: the module, the token and the expected keys.
#[derive(Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) module: ModuleProfile,
    pub(crate) token: TokenIdentity,
    pub(crate) pin: PinSource,
    pub(crate) keys: BTreeMap<KeyName, KeyOnToken>,
    /// The RSA public key under which the transport key leaves the HSM.
    pub(crate) transport_rsa: TransportRsa,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct KeyOnToken {
    pub(crate) id: Vec<u8>,
    pub(crate) role: KeyRole,
    pub(crate) provenance: Provenance,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct TransportRsa {
    pub(crate) modulus: Vec<u8>,
    pub(crate) exponent: Vec<u8>,
}

/// The worker's answer to [`Start`].
#[derive(Serialize, Deserialize)]
pub(crate) struct Started {
    pub(crate) module: String,
    pub(crate) token: TokenIdentity,
    /// The transport key under RSA-OAEP.
    pub(crate) transport_key: Vec<u8>,
}

/// The priority of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Priority {
    /// A device on the line or an officer waits for the answer.
    Line,
    /// Background work: filling pools, rewrapping batches. Runs in separate threads that the system schedules when the line
    /// leaves processor time.
    Background,
}

/// A call: operations that one thread performs in order.
#[derive(Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) priority: Priority,
    /// Milliseconds until the deadline.
    pub(crate) budget_ms: u32,
    pub(crate) operations: Vec<Operation>,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Operation {
    Random {
        len: u32,
    },
    Sign {
        key: KeyName,
        algorithm: SignatureAlgorithm,
        message: Vec<u8>,
    },
    /// PRF outputs, concatenated and truncated to `len`.
    Derive {
        key: KeyName,
        prf: Prf,
        fixed_input: Vec<u8>,
        len: u32,
    },
    /// Generates a session pair, wraps it for storage and for delivery, and destroys it.
    GeneratePair {
        kind: KeyType,
        wrapping_key: KeyName,
    },
    /// Rewraps a stored key under the transport key.
    Rewrap {
        kind: KeyType,
        wrapping_key: KeyName,
        blob: Vec<u8>,
    },
    /// Wraps a pair of the token under the transport key.
    DeliverPair {
        kind: KeyType,
        pair: TokenPair,
    },
    /// Pregenerates pairs: at least one, then more until `within_ms` has elapsed.
    MakePairs {
        kind: KeyType,
        target: StorageTarget,
        at_most: u32,
        within_ms: u32,
    },
    /// Rewraps keys from one wrapping key to another inside the HSM.
    Move {
        from: KeyName,
        to: KeyName,
        blobs: Vec<(KeyType, Vec<u8>)>,
    },
    /// Generates a batch key durably, unless it exists.
    CreateBatchKey {
        key: KeyName,
    },
    /// Destroys a batch key, if it exists.
    DestroyBatchKey {
        key: KeyName,
    },
    /// Destroys a pair of the token, if it exists.
    DestroyPair {
        kind: KeyType,
        pair: TokenPair,
    },
    /// Lists the batch keys and pairs that daemons generated on the token.
    ListOwn,
    /// Destroys a key of the manifest.
    Destroy {
        key: KeyName,
    },
}

impl Operation {
    /// The name in statistics.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Random { .. } => "random",
            Self::Sign { .. } => "sign",
            Self::Derive { .. } => "derive",
            Self::GeneratePair { .. } => "generate_pair",
            Self::Rewrap { .. } => "rewrap",
            Self::DeliverPair { .. } => "deliver_pair",
            Self::MakePairs { .. } => "make_pairs",
            Self::Move { .. } => "move",
            Self::CreateBatchKey { .. } => "create_batch_key",
            Self::DestroyBatchKey { .. } => "destroy_batch_key",
            Self::DestroyPair { .. } => "destroy_pair",
            Self::ListOwn => "list",
            Self::Destroy { .. } => "destroy",
        }
    }
}

#[derive(Serialize, Deserialize)]
pub(crate) enum Answer {
    Random(WireSecret),
    /// ECDSA as `r || s`.
    Signature(Vec<u8>),
    Derived(WireSecret),
    Pair {
        public: WirePublicKey,
        /// Under the wrapping key.
        stored: Vec<u8>,
        /// Under the transport key.
        delivered: Vec<u8>,
    },
    /// Under the transport key.
    Rewrapped(Vec<u8>),
    Made(Vec<MadePair>),
    /// In the order of the blobs.
    Moved(Vec<Vec<u8>>),
    Created,
    Destroyed,
    Own {
        keys: Vec<KeyName>,
        pairs: Vec<TokenPair>,
    },
}

/// Where a new pair is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum StorageTarget {
    /// Wrapped under this key.
    Wrapped(KeyName),
    /// On the token, with this label.
    OnToken(KeyName),
}

/// A pregenerated pair.
#[derive(Serialize, Deserialize)]
pub(crate) struct MadePair {
    pub(crate) public: WirePublicKey,
    pub(crate) stored: StoredForm,
}

#[derive(Serialize, Deserialize)]
pub(crate) enum StoredForm {
    /// Wrapped bytes.
    Blob(Vec<u8>),
    /// CKA_ID.
    Id(Vec<u8>),
}

#[derive(Serialize, Deserialize)]
pub(crate) enum WirePublicKey {
    /// SEC 1 point.
    Ec(Vec<u8>),
    Ed25519(Vec<u8>),
    Rsa {
        modulus: Vec<u8>,
        exponent: Vec<u8>,
    },
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Reply {
    pub(crate) id: u64,
    /// Duration of each operation that was started, without waiting for a thread.
    pub(crate) took_us: Vec<u32>,
    pub(crate) result: Result<Vec<Answer>, Failure>,
}

/// Encodes a value as a frame.
pub(crate) fn frame<T: Serialize>(value: &T) -> Result<Zeroizing<Vec<u8>>, String> {
    let text = |e: postcard::Error| e.to_string();
    let len = postcard::experimental::serialized_size(value).map_err(text)?;
    if len > MAX_FRAME {
        return Err(format!("a message of {len} bytes is over the limit of {MAX_FRAME}"));
    }
    // Allocated in full size: a growing buffer would leave copies of secrets behind.
    let mut bytes = Zeroizing::new(vec![0; 4 + len]);
    postcard::to_slice(value, &mut bytes[4..]).map_err(text)?;
    let len = u32::try_from(len).map_err(|e| e.to_string())?;
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    Ok(bytes)
}

/// The frame length given by its first four bytes, if it is within the limit.
pub(crate) fn frame_len(prefix: [u8; 4]) -> Result<usize, String> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_FRAME { Err(format!("a message announces {len} bytes, the limit is {MAX_FRAME}")) } else { Ok(len) }
}

/// Decodes the value of a frame.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(body: &[u8]) -> Result<T, String> {
    postcard::from_bytes(body).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frame_round_trip() {
        let request =
            Request { id: 7, priority: Priority::Line, budget_ms: 9, operations: vec![Operation::Random { len: 3 }] };
        let bytes = frame(&request).unwrap();
        let len = frame_len(bytes[..4].try_into().unwrap()).unwrap();
        assert_eq!(len, bytes.len() - 4);
        let read: Request = parse(&bytes[4..]).unwrap();
        assert_eq!((read.id, read.budget_ms, read.operations.len()), (7, 9, 1));
    }

    #[test]
    fn frame_buffer_is_allocated_once() {
        let secret = WireSecret::new(vec![0x5a; 5000]);
        let bytes = frame(&Reply { id: 1, took_us: Vec::new(), result: Ok(vec![Answer::Random(secret)]) }).unwrap();
        assert_eq!(bytes.capacity(), bytes.len());
        assert!(frame(&WireSecret::new(vec![0; MAX_FRAME])).is_err());
    }

    #[test]
    fn oversized_frame_length_is_refused() {
        assert!(frame_len(u32::MAX.to_le_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn malformed_reply_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse::<Reply>(&bytes);
            let _ = parse::<Started>(&bytes);
        }
    }
}
