//! Writes the audit log: an append-only, hash-chained file that records the actions of all callers, and refusals.
//! [`spp_log::audit`] defines the format, and reads and verifies the log.
//!
//! `audit.jsonl` has one JSON object per line. Each line contains the SHA-256 of the previous one, so that [`verify`] detects
//! every line that was changed, removed, added or moved inside the log. [`AuditLog::record`] returns when the line is durable.
//! A call that changes state is answered only after its entry is durable. Changes to access control are also recorded
//! before they begin, and do not begin if that fails.
//!
//! The chain alone cannot show that lines are missing at the end, that the last line was changed, or that the whole file was
//! rewritten. For this purpose the [`AuditCheckpointer`] periodically signs the head of the log in the HSM and publishes it in
//! the append-only public database. [`verify_with`] compares the log with these checkpoints.
//!
//! [`verify`]: fn@spp_log::audit::verify
//! [`verify_with`]: fn@spp_log::audit::verify_with

mod auditor;
mod checkpointer;
mod log;
mod offline_events;
#[cfg(test)]
mod verify_tests;

pub use auditor::{Auditor, CheckpointStatus};
pub use checkpointer::{AuditCheckpointer, CheckpointRules};
pub use log::AuditLog;
pub use offline_events::OfflineEvent;
pub use spp_log::audit::{AuditError, Entry, Outcome};
