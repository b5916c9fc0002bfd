//! The entries as a person or a program reads them, from the first to the last, also while a daemon writes. Nothing is told that
//! does not fit the chain.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::chain::{ChainHead, MAX_LINE, TOO_LONG};
use super::{AuditError, FILE, Outcome};

/// An entry with its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recorded {
    /// Counted from 0.
    pub sequence: u64,
    /// Seconds since the Unix epoch.
    pub time: u64,
    /// Which node wrote it.
    pub node: String,
    /// Who acted.
    pub caller: String,
    /// What was done.
    pub act: String,
    /// With what.
    pub details: BTreeMap<String, String>,
    /// How it went.
    pub outcome: Outcome,
}

/// Reads entries one after the other; at the end it can be asked again later.
pub struct Entries {
    path: PathBuf,
    bytes: BufReader<File>,
    head: ChainHead,
    /// What was read of a line that has no end yet.
    begun: Vec<u8>,
}

impl Entries {
    /// From the first entry on.
    pub fn open(dir: &Path) -> Result<Self, AuditError> {
        let path = dir.join(FILE);
        let file = File::open(&path).map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => AuditError::Missing { path: path.clone(), cause: Arc::new(cause) },
            _ => AuditError::Failed { doing: "opening", path: path.clone(), cause: Arc::new(cause) },
        })?;
        Ok(Self { path, bytes: BufReader::new(file), head: ChainHead::default(), begun: Vec::new() })
    }

    /// The next entry; none if there is none yet.
    pub fn next_entry(&mut self) -> Result<Option<Recorded>, AuditError> {
        let room = MAX_LINE.saturating_sub(self.begun.len()) as u64;
        let read = self.bytes.by_ref().take(room).read_until(b'\n', &mut self.begun);
        read.map_err(|cause| AuditError::Failed { doing: "reading", path: self.path.clone(), cause: Arc::new(cause) })?;
        let broken = |why| AuditError::Broken { path: self.path.clone(), line: self.head.lines() + 1, why };
        let Some(line) = self.begun.strip_suffix(b"\n") else {
            return if self.begun.len() < MAX_LINE { Ok(None) } else { Err(broken(TOO_LONG.to_owned())) };
        };
        let (head, recorded) = self.head.follow(line).map_err(broken)?;
        self.head = head;
        self.begun.clear();
        Ok(Some(recorded))
    }

    /// The file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What is wrong with an entry.
    pub(super) fn broken_at(&self, sequence: u64, why: String) -> AuditError {
        AuditError::Broken { path: self.path.clone(), line: sequence + 1, why }
    }

    /// Where the chain is after the last entry that was read.
    pub(super) const fn head(&self) -> ChainHead {
        self.head
    }

    /// Bytes of a line that has no end yet.
    pub(super) const fn unfinished(&self) -> u64 {
        self.begun.len() as u64
    }
}
