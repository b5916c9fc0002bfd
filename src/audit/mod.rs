//! The audit log: what officers did and what was refused, in a file that is only ever added to.
//!
//! `audit.jsonl` has one JSON object per line. Each carries the SHA-256 of the line before it, so that nothing can be
//! changed, removed, added or moved inside without [`verify`] finding it. [`AuditLog::record`] returns when the line is on the
//! disk: whoever is about to act records that it begins, and does not act if that fails.
//!
//! What the chain alone cannot show: that lines are missing at the end, that the last one was changed, or that the whole file
//! was written anew. For that the [`AuditCheckpointer`] has the end signed in the HSM every now and then, and published in the public
//! database, where nobody can take it back: [`verify_with`] compares.

mod auditor;
mod chain;
mod checkpoint;
mod checkpointer;
mod entry;
mod log;
mod offline_events;
mod read;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;

pub use auditor::{Auditor, CheckpointStatus};
pub use checkpoint::Checkpoint;
pub use checkpointer::{AuditCheckpointer, CheckpointRules};
pub use entry::{Entry, Outcome, UnknownOutcome};
pub use log::{AuditLog, LogHead};
pub use offline_events::OfflineEvent;
pub use read::{Entries, Recorded};
pub use verify::{Published, PublishedTrail, Trust, Verified, verified_json, verify, verify_with};

/// The log's file in its directory.
pub(crate) const FILE: &str = "audit.jsonl";

/// The audit log could not be made, opened, written or followed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AuditError {
    /// Something is where a new log should be.
    #[error(
        "audit log: {0} exists already and is never overwritten; choose another place, or remove it if an interrupted sppctl \
         init left it without {FILE}"
    )]
    Exists(PathBuf),
    /// The log is not there. The daemon never makes one: an empty log in the place of a lost one would hide what was done.
    #[error(
        "audit log: there is none at {path} ({cause}); if it was never made, make it with sppctl init, or with sppctl audit init \
         where the stores exist already; if it was, its disk is missing"
    )]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// Another process writes it.
    #[error("audit log: {0} is in use by another process; only one daemon may write it, stop the other one")]
    InUse(PathBuf),
    /// The disk. What was to be recorded may be there or not; nobody was told that it is.
    #[error("audit log: {doing} {path}: {cause}; see to the disk, then repeat what was refused")]
    Failed {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system says.
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// The end of the log is not what was written there, so nothing can be added.
    #[error(
        "audit log: the end of {path} is damaged: {why}; keep the file as it is, find out who changed it, and name another \
         directory for a new log (sppctl audit init)"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The chain breaks.
    #[error("audit log: {path}, line {line}: {why}")]
    Broken {
        /// The file.
        path: PathBuf,
        /// The first line that does not fit, counted from 1.
        line: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The log is not what was signed.
    #[error("audit log: {path}: {why}")]
    NotAsSigned {
        /// The file.
        path: PathBuf,
        /// What is missing or another.
        why: String,
    },
    /// The entry has more bytes than a line may have.
    #[error("audit log: an entry of {0} bytes is too long; at most {max} are written", max = chain::MAX_LINE)]
    TooLong(usize),
    /// The entry cannot be written as JSON, or the task that writes was ended.
    #[error("audit log: recording an entry: {0}; what was to be recorded must not be done, try again")]
    Interrupted(String),
}
