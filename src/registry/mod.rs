//! The permanent public database as a transparency log that anybody can read, mirror and verify. Its entries are the records of devices
//! and, among them, checkpoints of the daemon's audit log ([`audit_checkpoints`]).
//!
//! # The way of one record
//!
//! ```text
//!  publish(record) ─► queue ─► sequencer: 1 refuse what is taken   2 grow the tree    3 sign the checkpoint (HSM)
//!                                         4 append entries and checkpoint to the edge, ONE sync: the commit
//!                                         5 show the new tree      6 answer all       7 index   8 turn full bundles over
//! ```
//!
//! Told by `sequencer::Sequencer::sequence`.
//!
//! # The files are the truth
//!
//! | in the directory | is |
//! |---|---|
//! | `tile/<L>/<N>`, `tile/entries/<N>` | the full tiles and entry bundles, as C2SP tlog-tiles names them; written once, never again |
//! | `edge/<N>` | what does not fill a bundle yet: batches of entries, each with its signed checkpoint, appended with one sync |
//! | `signed/<N>` | the checkpoints that were the first to cover each entry of a full bundle, so that a receipt stays the same for ever; and the number of device records up to its end |
//! | `index/` | the sled index by chip and the other unique values; made anew from the files when it is missing or damaged |
//! | `store.toml`, `reserve` | the store's marker and lock, and the room that is given up on a full disk |
//!
//! A partial tile is the beginning of what the edge holds, so every partial tile of every checkpoint can be served and none is
//! written. A mirror ([`export`]) has them as files.
//!
//! Trust: whoever controls the directory can withhold entries; not alter, remove or reorder one unnoticed by anybody who
//! keeps a checkpoint ([`verify`]).

mod audited;
mod export;
mod fetch;
mod files;
mod first_checkpoints;
mod index;
mod index_sync;
mod log;
mod partial_bundle;
mod read;
mod sequencer;
mod signer;
mod snapshot;
mod source;
mod verify;
mod witness;

#[cfg(test)]
mod tests;

pub use audited::{AuditTrail, AuditTrailError, audit_checkpoints, published_checkpoints};
pub use export::{ExportError, Exported, export, shard};
pub use index::{Reindexed, reindex};
pub use log::{LogSettings, TransparencyLog};
pub use signer::{CheckpointSigner, HsmSigner};
pub use source::{LogSource, Mirror, SourceError, StoreDirectory, Website, open_source, read_chip};
pub use verify::{Finding, Verification, VerifyOptions, verify};
pub use witness::Witness;
