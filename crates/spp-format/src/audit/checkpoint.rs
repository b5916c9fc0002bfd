//! Audit checkpoints: the head of an audit log as a note that the log key of the public database signs in the HSM.

use crate::tlog::{LogKey, TlogError, UnsignedText, verify_text};

const TITLE: &str = "spp audit checkpoint v1";

/// The head of a log at one point in time: number of entries and SHA-256 of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogHead {
    /// Number of entries.
    pub entries: u64,
    /// SHA-256 of the last line; zeros if there is none.
    pub hash: [u8; 32],
}

/// The head of a node's audit log. It contains no time, so that the same head always has the same note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// The node that writes the log.
    pub node: String,
    /// The head of the log.
    pub head: LogHead,
}

impl Checkpoint {
    /// The text to be signed.
    pub fn text(&self) -> Result<UnsignedText, TlogError> {
        UnsignedText::new(TITLE, &self.body())
    }

    fn body(&self) -> String {
        let (node, entries, hash) = (&self.node, self.head.entries, hex::encode(self.head.hash));
        format!("node      {node}\nentries   {entries}\nlast      sha256:{hash}\n")
    }

    /// Verifies a signed note and parses it. Accepts only the exact format of [`Self::text`].
    pub fn verified(note: &[u8], key: &LogKey) -> Result<Self, String> {
        let text = verify_text(note, key).map_err(|e| e.to_string())?;
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
        let hash = hex::decode(value("last      sha256:")).ok().and_then(|hash| hash.try_into().ok());
        let entries = value("entries   ").parse().ok();
        let head = entries.zip(hash).map(|(entries, hash)| LogHead { entries, hash });
        let checkpoint = head.map(|head| Self { node: value("node      "), head });
        let checkpoint = checkpoint.filter(|checkpoint| text == format!("{TITLE}\n{}", checkpoint.body()));
        checkpoint.ok_or_else(|| "the signed note is not an audit checkpoint".to_owned())
    }
}
