//! Human-readable texts signed by a log's key: signed notes (C2SP signed-note) that are not checkpoints.

use signed_note::{Note, NoteError, Signature, Verifier as _, VerifierList};

use super::{LogKey, TlogError};

/// A text before it is signed.
#[derive(Debug)]
pub struct UnsignedText(String);

impl UnsignedText {
    /// A text with a title as its first line. The title must contain a space: log names have none, so the text cannot be mistaken
    /// for a checkpoint.
    pub fn new(title: &str, body: &str) -> Result<Self, TlogError> {
        if !title.contains(' ') || title.contains('\n') {
            return Err(TlogError::malformed("signed text", "the title must be one line and contain a space"));
        }
        Ok(Self(format!("{title}\n{}\n", body.trim_end_matches('\n'))))
    }

    /// The bytes to be signed.
    pub fn to_be_signed(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The text without a signature.
    pub fn unsigned(&self) -> &str {
        &self.0
    }

    /// Adds the signature. Fails if it does not verify.
    pub fn signed(&self, key: &LogKey, signature: &[u8]) -> Result<String, TlogError> {
        let broken = |e: NoteError| TlogError::malformed("signed text", e);
        let line = Signature::new(key.origin().to_string(), key.verifier().key_id(), signature.to_vec());
        let note = Note::new(self.to_be_signed(), &[line.map_err(broken)?]).map_err(broken)?.to_bytes();
        verify_text(&note, key)?;
        String::from_utf8(note).map_err(|e| TlogError::malformed("signed text", e))
    }
}

/// Verifies the key's signature on a note and returns the text.
pub fn verify_text(note: &[u8], key: &LogKey) -> Result<String, TlogError> {
    let parsed = Note::from_bytes(note).map_err(|e| TlogError::malformed("signed text", e))?;
    let known = VerifierList::new(vec![Box::new(key.verifier().clone())]);
    parsed.verify(&known).map_err(|e| match e {
        NoteError::InvalidSignature { .. } => {
            TlogError::malformed("signed text", format!("the signature of {} does not verify", key.origin()))
        }
        NoteError::UnverifiedNote => {
            TlogError::malformed("signed text", format!("not signed by the key of {}", key.origin()))
        }
        other => TlogError::malformed("signed text", other),
    })?;
    String::from_utf8(parsed.text().to_vec()).map_err(|e| TlogError::malformed("signed text", e))
}
