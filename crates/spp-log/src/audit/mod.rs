//! Reads and verifies audit logs: append-only, hash-chained files that record the actions of all callers, and refusals.
//!
//! `audit.jsonl` has one JSON object per line. Each line contains the SHA-256 of the previous one, so that
//! [`verify`](fn@verify) detects every line that was changed, removed, added or moved inside the log. [`verify_with`]
//! compares the log with its signed checkpoints in the public database, which detects a truncated or rewritten log. The
//! daemon is the only writer of a log.

pub mod chain;
mod entry;
mod read;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

pub use entry::{Entry, Outcome, RecordedEntry, UnknownOutcome};
pub use read::Entries;
pub use verify::{PublishedCheckpoint, PublishedCheckpoints, Trust, Verified, verified_json, verify, verify_with};

/// Name of the log file in its directory.
pub const FILE: &str = "audit.jsonl";

/// A failure to create, open, write or verify the audit log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuditError {
    /// The directory of a new log exists already.
    #[error(
        "audit log: {0} exists already and is never overwritten; choose another directory, or remove this one if an interrupted \
         sppctl init left it without {FILE}"
    )]
    Exists(PathBuf),
    /// The log is missing. The daemon never creates one: an empty log in place of a lost one would hide past actions.
    #[error(
        "audit log: cannot open {path} ({cause}); create a first log with sppctl init, or with sppctl audit init if the stores \
         exist; if the log existed before, mount its disk"
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// The system error.
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// Another process has the log open.
    #[error("audit log: {0} is in use by another process; only one daemon may write it, stop the other one")]
    InUse(PathBuf),
    /// An I/O error. The entry may or may not be in the log; the caller that recorded it received this error.
    #[error("audit log: {doing} {path}: {cause}; check the disk, then repeat the refused action")]
    Failed {
        /// The operation.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system error.
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// The end of the log differs from what was written, so nothing can be appended.
    #[error(
        "audit log: the end of {path} is damaged: {why}; preserve the file, find out who changed it, and configure another \
         directory for a new log (sppctl audit init)"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The damage.
        why: String,
    },
    /// The chain is broken.
    #[error("audit log: {path}, line {line}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// The first line that does not continue the chain, from 1.
        line: u64,
        /// The mismatch.
        why: String,
    },
    /// The log does not match its signed checkpoints.
    #[error("audit log: {path}: {why}")]
    CheckpointMismatch {
        /// The file.
        path: PathBuf,
        /// The mismatch.
        why: String,
    },
    /// The entry exceeds the maximum line length.
    #[error("audit log: an entry of {0} bytes exceeds the limit of {max}", max = chain::MAX_LINE_LEN)]
    TooLong(usize),
    /// The entry has no JSON form, or the writer task was interrupted.
    #[error("audit log: entry not recorded: {0}; check whether the action took effect before you repeat it")]
    Interrupted(String),
}
