//! The chain: what a line says, what may follow it, and where the log ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{AuditError, Entry, Outcome, Recorded};
use crate::keys::sha256;

/// Most bytes of a line, its newline included.
pub(super) const MAX_LINE: usize = 64 * 1024;

/// A line, in the order in which it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChainLine {
    /// Counted from 0.
    sequence: u64,
    /// Seconds since the Unix epoch.
    time: u64,
    node: String,
    caller: String,
    act: String,
    details: BTreeMap<String, String>,
    outcome: Outcome,
    /// SHA-256 of the previous line's bytes without its newline, in hex; zeros in the first.
    previous: String,
}

/// Where the chain ends, and so what the next line must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ChainHead {
    /// How many lines there are, which is the next one's sequence.
    pub(super) lines: u64,
    /// SHA-256 of the last line; zeros if there is none.
    pub(super) hash: [u8; 32],
    /// How many bytes they have.
    pub(super) end: u64,
}

impl ChainHead {
    /// The bytes of the next line, newline included, and the head after it.
    pub(super) fn next_line(&self, node: &str, time: u64, entry: Entry) -> Result<(Vec<u8>, Self), AuditError> {
        let line = ChainLine {
            sequence: self.lines,
            time,
            node: node.to_owned(),
            caller: entry.caller,
            act: entry.act.to_owned(),
            details: entry.details,
            outcome: entry.outcome,
            previous: hex::encode(self.hash),
        };
        // JSON escapes a newline in a string, so the one at the end is the only one.
        let mut bytes = serde_json::to_vec(&line).map_err(|e| AuditError::Interrupted(e.to_string()))?;
        let next = Self::after(&line, &bytes, self.end).map_err(AuditError::Interrupted)?;
        bytes.push(b'\n');
        if bytes.len() > MAX_LINE { Err(AuditError::TooLong(bytes.len())) } else { Ok((bytes, next)) }
    }

    /// The head after a line that fits here, given without its newline, and what the line says; or why it does not fit.
    pub(super) fn follow(&self, bytes: &[u8]) -> Result<(Self, Recorded), String> {
        let line = parse(bytes)?;
        if line.sequence != self.lines {
            let (found, wanted) = (line.sequence, self.lines);
            return Err(format!("its sequence is {found} instead of {wanted}: lines were removed, added or moved"));
        }
        if line.previous != hex::encode(self.hash) {
            return Err("it does not follow from the line before: one of the two was changed".to_owned());
        }
        let head = Self::after(&line, bytes, self.end)?;
        let ChainLine { sequence, time, node, caller, act, details, outcome, .. } = line;
        Ok((head, Recorded { sequence, time, node, caller, act, details, outcome }))
    }

    /// How many lines there are.
    pub(super) const fn lines(&self) -> u64 {
        self.lines
    }

    /// The head that a log has which ends with these bytes, the first of them being number `begin` of the file. Nothing is
    /// asked of what is before its last whole line; what is after it, a crash cut off.
    pub(super) fn of_tail(bytes: &[u8], begin: u64) -> Result<Self, String> {
        let Some(last) = memchr::memrchr(b'\n', bytes) else {
            return if begin == 0 { Ok(Self::default()) } else { Err(TOO_LONG.to_owned()) };
        };
        let start = match memchr::memrchr(b'\n', &bytes[..last]) {
            Some(before) => before + 1,
            None if begin == 0 => 0,
            None => return Err(TOO_LONG.to_owned()),
        };
        let line = &bytes[start..last];
        Self::after(&parse(line)?, line, begin + start as u64)
    }

    /// Who wrote the last whole line of these bytes; none if there is none.
    pub(super) fn node_of_tail(bytes: &[u8]) -> Option<String> {
        let last = memchr::memrchr(b'\n', bytes)?;
        let start = memchr::memrchr(b'\n', &bytes[..last]).map_or(0, |before| before + 1);
        parse(&bytes[start..last]).ok().map(|line| line.node)
    }

    /// The head after a line whose first byte has that number.
    fn after(line: &ChainLine, bytes: &[u8], begin: u64) -> Result<Self, String> {
        let lines = line.sequence.checked_add(1).ok_or("its sequence is the last there is")?;
        Ok(Self { lines, hash: sha256(bytes), end: begin + bytes.len() as u64 + 1 })
    }
}

/// Bytes from the end that always have a whole line in them: one that a crash cut off, a whole one before it, and the end of
/// the one before that.
pub(super) const TAIL: u64 = 2 * MAX_LINE as u64 + 1;

pub(super) const TOO_LONG: &str = "a line is longer than any that is written";

fn parse(line: &[u8]) -> Result<ChainLine, String> {
    serde_json::from_slice(line).map_err(|e| format!("it is no entry: {e}"))
}
