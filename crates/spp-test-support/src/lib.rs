//! Test support that names no type of this workspace: directories, ports, processes, seeds and sizes, waiting.
//!
//! Crates below `spp` use it for their tests, because `spp-testkit` builds `spp`. `spp-testkit` re-exports these modules; its
//! documentation has the policy for writing tests.
#![allow(clippy::unwrap_used, clippy::panic, clippy::missing_panics_doc, reason = "test support fails by a panic")]
#![allow(missing_docs, reason = "the names of fields and methods are self-explanatory")]

pub mod files;
pub mod ports;
pub mod process;
pub mod random;
pub mod wait;
