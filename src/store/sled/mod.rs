//! Embedded storage engines on sled 0.34.7. No other module may use sled.
//!
//! Known problems of sled and the workarounds in this module:
//!
//! | sled 0.34.7 | workaround |
//! |---|---|
//! | `flush` does not fsync on Linux (`sync_file_range`): a power loss loses acknowledged data | `engine`: `fdatasync` on a separate handle after each flush |
//! | `flush_async` and its own flusher thread deadlock under load | `committer`: one thread, blocking flush, `flush_every_ms(None)` |
//! | large pages go to blob files that are never synced | `view`: values are split into pieces far below that limit |
//! | a partial snapshot left by a kill counts as the newest one, and the database does not open | `engine`: partial snapshots are deleted before opening |
//! | after a write error `flush` may block forever | `engine`: a second thread calls `flush` again, which unblocks it |
//! | after an error the handle is unusable | `committer`: the database is reopened, with backoff |
//! | deleted values stay in its file for a long time | `blobs`: wrapped keys are in separate files, overwritten and deleted with their batch |
//! | it does not open on a full disk | `directory`: a reserve file is deleted |
//!
//! (`Mode` is not set: 0.34.7 stores it and never reads it.) Only the committer thread reads and writes the tree. It answers
//! reads only after all data they may have seen is synced, so callers see durable data only.

#![expect(clippy::disallowed_types, reason = "the only module that uses sled, with the workarounds described above")]

mod access;
mod batch_rows;
mod batches;
mod blobs;
mod committer;
mod engine;
mod index;
mod pairs;
mod production;
mod session_rows;
mod state;
mod state_store;
#[cfg(test)]
mod tests;
mod view;

pub(crate) use index::{IndexEntry, IndexMark, Location, SledIndex};
pub use state_store::SledStateStore;

use super::{StoreOptions, directory};
