//! The embedded engines, on sled 0.34.7 behind a fence. No other room may touch sled.
//!
//! What sled does not do by itself, and where it is done here:
//!
//! | sled 0.34.7 | the fence |
//! |---|---|
//! | `flush` is no fsync on Linux (`sync_file_range`): acknowledged data is lost with the power | `engine`: `fdatasync` on an own handle after each flush |
//! | `flush_async` and its own flusher thread deadlock under load | `committer`: one thread, blocking flush, `flush_every_ms(None)` |
//! | large pages go to blob files that are never synced | `view`: every value is kept in pieces far below that limit |
//! | a half-written snapshot left by a kill is taken for the newest one: the database does not open | `engine`: removed before opening |
//! | a write error may leave `flush` waiting for ever | `engine`: a second thread calls it once more, which wakes it |
//! | after an error the handle is dead | `committer`: dropped and opened again, with backoff |
//! | deleted values stay in its file for long | `blobs`: wrapped keys are in files of their own, overwritten and removed with their batch |
//! | it cannot be opened on a full disk | `place`: a reserve file is given up |
//!
//! (`Mode` is not set: 0.34.7 stores it and never reads it.) Nobody but the committer's thread reads or writes the tree, and
//! it answers reads, too, only after everything that they could have seen is synced: what a caller learns is durable.

#![expect(clippy::disallowed_types, reason = "the one place where sled lives, fenced as described above")]

mod access;
mod batches;
mod blobs;
mod committer;
mod engine;
mod index;
mod pairs;
mod production;
mod state;
#[cfg(test)]
mod tests;
mod view;

pub(crate) use index::{IndexEntry, IndexMark, Location, SledIndex};
pub use state::SledStateStore;

use super::{StoreOptions, directory};
