//! A text for people, signed by a log's key: a signed note (C2SP signed-note) that is no checkpoint.

use signed_note::{Note, NoteError, Signature, Verifier as _, VerifierList};

use super::{LogKey, TlogError};

/// A text that is about to be signed.
#[derive(Debug)]
pub struct UnsignedText(String);

impl UnsignedText {
    /// The title is the first line. It has a space, which no log's name has: what is signed can never be taken for a checkpoint.
    pub fn new(title: &str, body: &str) -> Result<Self, TlogError> {
        if !title.contains(' ') || title.contains('\n') {
            return Err(TlogError::malformed("signed text", "its title must be one line with a space"));
        }
        Ok(Self(format!("{title}\n{}\n", body.trim_end_matches('\n'))))
    }

    /// The bytes to be signed.
    pub fn to_be_signed(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// As it is where nobody signs it.
    pub fn unsigned(&self) -> &str {
        &self.0
    }

    /// Puts the signature to it; a wrong one is refused.
    pub fn signed(&self, key: &LogKey, signature: &[u8]) -> Result<String, TlogError> {
        let broken = |e: NoteError| TlogError::malformed("signed text", e);
        let line = Signature::new(key.origin().to_string(), key.verifier().key_id(), signature.to_vec());
        let note = Note::new(self.to_be_signed(), &[line.map_err(broken)?]).map_err(broken)?.to_bytes();
        verify_text(&note, key)?;
        String::from_utf8(note).map_err(|e| TlogError::malformed("signed text", e))
    }
}

/// The text of a signed note, if that key signed it.
pub fn verify_text(note: &[u8], key: &LogKey) -> Result<String, TlogError> {
    let parsed = Note::from_bytes(note).map_err(|e| TlogError::malformed("signed text", e))?;
    let known = VerifierList::new(vec![Box::new(key.verifier().clone())]);
    parsed.verify(&known).map_err(|e| match e {
        NoteError::InvalidSignature { .. } => {
            TlogError::malformed("signed text", format!("the signature of {} does not verify", key.origin()))
        }
        NoteError::UnverifiedNote => {
            TlogError::malformed("signed text", format!("it is not signed by the key of {}", key.origin()))
        }
        other => TlogError::malformed("signed text", other),
    })?;
    String::from_utf8(parsed.text().to_vec()).map_err(|e| TlogError::malformed("signed text", e))
}
