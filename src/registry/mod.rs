//! Writes the permanent public database: a transparency log that anyone can read, mirror and verify. Its entries are device
//! records and checkpoints of the daemon's audit log ([`audit_checkpoints`]).
//!
//! [`spp_format::record`] and [`spp_format::tlog`] define the formats. [`spp_log::registry`] defines the file formats that
//! readers share, and reads, mirrors and verifies a log without the daemon.
//!
//! # How a record is published
//!
//! ```text
//!  publish(record) ─► queue ─► sequencer: 1 reject duplicates   2 grow the tree   3 sign the checkpoint (HSM)
//!                                         4 append entries and checkpoint to the partial bundle, ONE sync: the commit
//!                                         5 publish the new tree   6 answer callers   7 index, seal full bundles
//! ```
//!
//! Implemented by `sequencer::Sequencer::sequence`.
//!
//! # Files
//!
//! | in the directory | content |
//! |---|---|
//! | `tile/<L>/<N>`, `tile/entries/<N>` | the full tiles and entry bundles, named as in C2SP tlog-tiles; written once, never changed |
//! | `edge/<N>` (historic name) | the partial bundle: batches of entries, each with its signed checkpoint, appended with one sync |
//! | `signed/<N>` | the first checkpoints that covered the entries of a full bundle, so that a receipt never changes; and the number of device records up to its end |
//! | `index/` | the sled index by chip ID and the other unique values; rebuilt from the files if missing or damaged |
//! | `store.toml`, `reserve` | the store's marker and lock, and the space that is released on a full disk |
//!
//! The other files are authoritative; the index is derived from them. The log writes no partial tiles: the partial bundle
//! contains the entries of every partial tile of every checkpoint. A mirror ([`export`]) has partial tiles as files.
//!
//! Trust: an attacker who controls the directory can withhold entries. Anyone who has kept a checkpoint detects altered, removed
//! or reordered entries ([`verify`]).
//!
//! [`audit_checkpoints`]: fn@spp_log::registry::audit_checkpoints
//! [`export`]: fn@spp_log::registry::export
//! [`verify`]: fn@spp_log::registry::verify

mod files;
mod first_checkpoints;
mod index;
mod index_sync;
mod log;
mod read;
mod sequencer;
mod shared;
mod signer;
mod snapshot;
mod witness;

#[cfg(test)]
mod tests;

pub use index::{ReindexReport, reindex};
pub use log::{LogSettings, TransparencyLog};
pub use signer::{HsmSigner, LogSigner};
pub use witness::Witness;
