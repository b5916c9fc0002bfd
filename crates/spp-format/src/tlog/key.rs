//! Keys of signed notes: a name and an Ed25519 public key, encoded as a vkey (C2SP signed-note).

use std::fmt;
use std::str::FromStr;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Deserialize, Serialize};
use signed_note::Verifier;

use super::TlogError;
use crate::keys::{KeyType, PublicKey, SignatureAlgorithm};
use crate::names::text_form;

/// Signature type of an Ed25519 signature over the note's text.
const ED25519: u8 = 0x01;
/// Signature type of a timestamped Ed25519 cosignature (C2SP tlog-cosignature).
const COSIGNATURE: u8 = 0x04;
/// The first line of the statement that a cosignature signs.
const COSIGNATURE_HEADER: &str = "cosignature/v1";

/// The name of a log: the first line of its checkpoints and the name of its key. It is the URL of the log's tiles without the
/// scheme, for example `log.example.com/devices`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin(String);

impl Origin {
    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Origin {
    type Err = TlogError;
    fn from_str(text: &str) -> Result<Self, TlogError> {
        let fits = (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'+');
        if fits && !text.contains("://") && !text.ends_with('/') {
            return Ok(Self(text.to_owned()));
        }
        let problem = "write a URL without scheme and final slash, up to 255 visible ASCII characters without +, for example \
                       log.example.com/devices";
        Err(TlogError::malformed("log name", problem))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The key that signs a log's checkpoints.
#[derive(Clone, PartialEq, Eq)]
pub struct LogKey {
    origin: Origin,
    key: NoteKey<ED25519>,
}

impl LogKey {
    /// The key of a log. Rejects keys other than Ed25519 (C2SP tlog-tiles: public logs sign with Ed25519).
    pub fn new(origin: Origin, public: PublicKey) -> Result<Self, TlogError> {
        Ok(Self { key: NoteKey::new(origin.to_string(), public)?, origin })
    }

    /// The log's name.
    pub const fn origin(&self) -> &Origin {
        &self.origin
    }

    pub(super) const fn verifier(&self) -> &NoteKey<ED25519> {
        &self.key
    }
}

impl FromStr for LogKey {
    type Err = TlogError;
    fn from_str(vkey: &str) -> Result<Self, TlogError> {
        let key: NoteKey<ED25519> = vkey.parse()?;
        Ok(Self { origin: key.name.parse()?, key })
    }
}

/// The key of a witness, which cosigns consistent checkpoints.
#[derive(Clone, PartialEq, Eq)]
pub struct WitnessKey(NoteKey<COSIGNATURE>);

impl WitnessKey {
    /// The witness's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    pub(super) const fn verifier(&self) -> &NoteKey<COSIGNATURE> {
        &self.0
    }
}

impl FromStr for WitnessKey {
    type Err = TlogError;
    fn from_str(vkey: &str) -> Result<Self, TlogError> {
        vkey.parse().map(Self)
    }
}

/// A key that verifies signatures of one type.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct NoteKey<const TYPE: u8> {
    name: String,
    public: PublicKey,
}

impl<const TYPE: u8> NoteKey<TYPE> {
    fn new(name: String, public: PublicKey) -> Result<Self, TlogError> {
        if public.kind() != KeyType::Ed25519 {
            return Err(TlogError::malformed("note key", format!("{} found, Ed25519 expected", public.kind())));
        }
        if !signed_note::is_key_name_valid(&name) {
            return Err(TlogError::malformed("note key", "the name is empty, or has a space or a +"));
        }
        Ok(Self { name, public })
    }

    fn encoded(&self) -> Vec<u8> {
        [&[TYPE], self.public.key_bits()].concat()
    }
}

impl<const TYPE: u8> fmt::Display for NoteKey<TYPE> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:08x}+{}", self.name, self.key_id(), BASE64_STANDARD.encode(self.encoded()))
    }
}

impl<const TYPE: u8> FromStr for NoteKey<TYPE> {
    type Err = TlogError;
    fn from_str(vkey: &str) -> Result<Self, TlogError> {
        let wrong = |problem: &str| TlogError::malformed("vkey", problem);
        let form = "expected NAME+ID+KEY: a name, 8 hex digits, base64";
        let mut parts = vkey.trim_end().splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong(form));
        };
        let bytes = BASE64_STANDARD.decode(key).map_err(|_| wrong(form))?;
        let Some((&kind, raw)) = bytes.split_first() else { return Err(wrong(form)) };
        if kind != TYPE {
            return Err(wrong(&format!("signature type {kind:#04x} found, {TYPE:#04x} expected")));
        }
        let public = PublicKey::from_ed25519(raw).map_err(|e| wrong(&e.to_string()))?;
        let parsed = Self::new(name.to_owned(), public)?;
        if format!("{:08x}", parsed.key_id()) != id {
            return Err(wrong("the key ID does not match the name and key"));
        }
        Ok(parsed)
    }
}

impl<const TYPE: u8> Verifier for NoteKey<TYPE> {
    fn name(&self) -> &str {
        &self.name
    }

    fn key_id(&self) -> u32 {
        signed_note::key_id(&self.name, &self.encoded())
    }

    fn verify(&self, text: &[u8], signature: &[u8]) -> bool {
        let verifies = |message: &[u8], signature: &[u8]| {
            self.public.verify(SignatureAlgorithm::Ed25519, message, signature).is_ok()
        };
        if TYPE != COSIGNATURE {
            return verifies(text, signature);
        }
        let Some((time, signature)) = signature.split_first_chunk::<8>() else { return false };
        let time = u64::from_be_bytes(*time);
        let statement = [format!("{COSIGNATURE_HEADER}\ntime {time}\n").as_bytes(), text].concat();
        i64::try_from(time).is_ok() && verifies(&statement, signature)
    }
}

impl fmt::Display for LogKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.fmt(f)
    }
}

impl fmt::Display for WitnessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

text_form!(Origin, LogKey, WitnessKey);
