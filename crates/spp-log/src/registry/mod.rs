//! Reads, mirrors and verifies the public database: a transparency log of device records and audit checkpoints.
//!
//! A log is read from a daemon's directory, a mirror's directory or a web server ([`open_source`]), copied
//! ([`export`](fn@export)) and verified ([`verify`](fn@verify)). The daemon is the only writer of a log; the modules that
//! are public here are the formats of files that it shares with readers.

pub mod atomic_write;
mod audited;
mod chip_files;
mod export;
pub mod fetch;
pub mod full_tiles;
pub mod partial_bundle;
mod source;
mod verify;

pub use audited::{AuditTrail, AuditTrailError, audit_checkpoints, published_checkpoints};
pub use chip_files::{chip_files, shard};
pub use export::{ExportError, ExportReport, export};
pub use source::{HttpSource, LogSource, Mirror, SourceError, StoreDirectory, open_source, read_chip};
pub use verify::{Finding, Verification, VerifyOptions, verify};
