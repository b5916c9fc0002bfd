//! The hash chain of the audit log: line format, chaining rules and chain head.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use spp_format::keys::sha256;

use super::{AuditError, Entry, Outcome, RecordedEntry};

/// Maximum length of a line in bytes, including the newline.
pub const MAX_LINE_LEN: usize = 64 * 1024;

/// A line of the log. The fields are in the order in which they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainLine {
    /// Sequence number, from 0.
    sequence: u64,
    /// Seconds since the Unix epoch.
    time: u64,
    node: String,
    caller: String,
    act: String,
    details: BTreeMap<String, String>,
    outcome: Outcome,
    /// SHA-256 of the previous line without its newline, in hex; zeros in the first line.
    previous: String,
}

/// The head of the chain. It determines the sequence number and the `previous` hash of the next line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChainHead {
    /// Number of lines, which is the sequence number of the next line.
    pub lines: u64,
    /// SHA-256 of the last line; zeros if there is none.
    pub hash: [u8; 32],
    /// Length of all lines in bytes.
    pub end: u64,
}

impl ChainHead {
    /// Formats the next line, including the newline; returns it with the head after it.
    pub fn next_line(&self, node: &str, time: u64, entry: Entry) -> Result<(Vec<u8>, Self), AuditError> {
        let line = ChainLine {
            sequence: self.lines,
            time,
            node: node.to_owned(),
            caller: entry.caller,
            act: entry.action.to_owned(),
            details: entry.details,
            outcome: entry.outcome,
            previous: hex::encode(self.hash),
        };
        // JSON escapes newlines in strings, so the one at the end is the only one.
        let mut bytes = serde_json::to_vec(&line).map_err(|e| AuditError::Interrupted(e.to_string()))?;
        let next = Self::after(&line, &bytes, self.end).map_err(AuditError::Interrupted)?;
        bytes.push(b'\n');
        if bytes.len() > MAX_LINE_LEN { Err(AuditError::TooLong(bytes.len())) } else { Ok((bytes, next)) }
    }

    /// Verifies that a line, given without its newline, continues the chain. Returns the head after it and its content.
    pub fn verify_next(&self, bytes: &[u8]) -> Result<(Self, RecordedEntry), String> {
        let line = parse(bytes)?;
        if line.sequence != self.lines {
            let (found, expected) = (line.sequence, self.lines);
            return Err(format!("sequence is {found}, expected {expected}: lines were removed, added or moved"));
        }
        if line.previous != hex::encode(self.hash) {
            return Err("does not continue the previous line: one of the two was changed".to_owned());
        }
        let head = Self::after(&line, bytes, self.end)?;
        let ChainLine { sequence, time, node, caller, act, details, outcome, .. } = line;
        Ok((head, RecordedEntry { sequence, time, node, caller, act, details, outcome }))
    }

    /// Number of lines.
    pub const fn lines(&self) -> u64 {
        self.lines
    }

    /// The chain head of a log whose file ends with `bytes`, which start at offset `begin`. Only the last complete line is
    /// parsed. An incomplete line after it was truncated by a crash and is ignored.
    pub fn from_tail(bytes: &[u8], begin: u64) -> Result<Self, String> {
        let Some(last) = memchr::memrchr(b'\n', bytes) else {
            return if begin == 0 { Ok(Self::default()) } else { Err(LINE_TOO_LONG.to_owned()) };
        };
        let start = match memchr::memrchr(b'\n', &bytes[..last]) {
            Some(before) => before + 1,
            None if begin == 0 => 0,
            None => return Err(LINE_TOO_LONG.to_owned()),
        };
        let line = &bytes[start..last];
        Self::after(&parse(line)?, line, begin + start as u64)
    }

    /// The node that wrote the last complete line of `bytes`; `None` if there is none.
    pub fn node_in_tail(bytes: &[u8]) -> Option<String> {
        let last = memchr::memrchr(b'\n', bytes)?;
        let start = memchr::memrchr(b'\n', &bytes[..last]).map_or(0, |before| before + 1);
        parse(&bytes[start..last]).ok().map(|line| line.node)
    }

    /// The head after a line that starts at offset `begin`.
    fn after(line: &ChainLine, bytes: &[u8], begin: u64) -> Result<Self, String> {
        let lines = line.sequence.checked_add(1).ok_or("sequence number overflows")?;
        Ok(Self { lines, hash: sha256(bytes), end: begin + bytes.len() as u64 + 1 })
    }
}

/// Number of bytes at the end of the file that always contain a complete line: a line truncated by a crash, the complete line
/// before it, and the newline before that.
pub const TAIL_LEN: u64 = 2 * MAX_LINE_LEN as u64 + 1;

/// The problem of a line that exceeds [`MAX_LINE_LEN`].
pub const LINE_TOO_LONG: &str = "line exceeds the maximum length";

fn parse(line: &[u8]) -> Result<ChainLine, String> {
    serde_json::from_slice(line).map_err(|e| format!("not an audit entry: {e}"))
}
