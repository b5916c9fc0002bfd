//! Reads the entries of an audit log from the first to the last, also while a daemon writes. Each entry is returned only after
//! its position in the chain is verified.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{ChainHead, LINE_TOO_LONG, MAX_LINE_LEN};
use super::{AuditError, FILE, RecordedEntry};

/// Reads entries in order. At the end of the file, reading can continue later.
pub struct Entries {
    path: PathBuf,
    bytes: BufReader<File>,
    head: ChainHead,
    /// The part of an incomplete line that was read.
    partial_line: Vec<u8>,
}

impl Entries {
    /// Opens the log of a directory at its first entry.
    pub fn open(dir: &Path) -> Result<Self, AuditError> {
        let path = dir.join(FILE);
        let file = File::open(&path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => AuditError::Missing { path: path.clone(), cause: Arc::new(cause) },
            _ => AuditError::Failed { doing: "opening", path: path.clone(), cause: Arc::new(cause) },
        })?;
        Ok(Self { path, bytes: BufReader::new(file), head: ChainHead::default(), partial_line: Vec::new() })
    }

    /// Reads the next entry; `None` if the log has no further complete entry yet.
    pub fn next_entry(&mut self) -> Result<Option<RecordedEntry>, AuditError> {
        let limit = MAX_LINE_LEN.saturating_sub(self.partial_line.len()) as u64;
        let read = self.bytes.by_ref().take(limit).read_until(b'\n', &mut self.partial_line);
        read.map_err(|cause| AuditError::Failed { doing: "reading", path: self.path.clone(), cause: Arc::new(cause) })?;
        let broken = |why| AuditError::Broken { path: self.path.clone(), line: self.head.lines() + 1, why };
        let Some(line) = self.partial_line.strip_suffix(b"\n") else {
            return if self.partial_line.len() < MAX_LINE_LEN {
                Ok(None)
            } else {
                Err(broken(LINE_TOO_LONG.to_owned()))
            };
        };
        let (head, recorded) = self.head.verify_next(line).map_err(broken)?;
        self.head = head;
        self.partial_line.clear();
        Ok(Some(recorded))
    }

    /// Path of the log file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The error for an invalid entry.
    pub(super) fn broken_at(&self, sequence: u64, why: String) -> AuditError {
        AuditError::Broken { path: self.path.clone(), line: sequence + 1, why }
    }

    /// The chain head after the last entry that was read.
    pub(super) const fn head(&self) -> ChainHead {
        self.head
    }

    /// Number of bytes of an incomplete last line.
    pub(super) const fn unfinished(&self) -> u64 {
        self.partial_line.len() as u64
    }
}
