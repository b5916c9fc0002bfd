//! Where a log ended at one moment, as a text that the log key of the public database signs in the HSM.

use super::LogHead;
use crate::tlog::{LogKey, TlogError, UnsignedText, verify_text};

const TITLE: &str = "spp audit checkpoint v1";

/// The head of a node's audit log. There is no time in it: the same head has the same note, however often it is signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Whose log.
    pub node: String,
    /// Where it ended.
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

    /// Reads a note that the key has signed, and nothing but what [`Self::text`] writes.
    pub fn verified(note: &[u8], key: &LogKey) -> Result<Self, String> {
        let text = verify_text(note, key).map_err(|e| e.to_string())?;
        let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().to_owned();
        let hash = hex::decode(value("last      sha256:")).ok().and_then(|hash| hash.try_into().ok());
        let entries = value("entries   ").parse().ok();
        let head = entries.zip(hash).map(|(entries, hash)| LogHead { entries, hash });
        let read = head.map(|head| Self { node: value("node      "), head });
        let read = read.filter(|read| text == format!("{TITLE}\n{}", read.body()));
        read.ok_or_else(|| "it is signed, and no checkpoint of an audit log".to_owned())
    }
}
