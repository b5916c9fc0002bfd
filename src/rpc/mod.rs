//! gRPC: the only room with tonic. Services, peers turned into callers, ONE table from errors to statuses, TLS, drain.
//!
//! Inner rooms never mention gRPC: a request is parsed here into values that are valid, a result is turned into a
//! message here, and `status` is the one place that decides what a caller may learn of a failure.
#![expect(clippy::disallowed_types, reason = "this is the room of gRPC")]

mod access;
mod access_messages;
mod call_gate;
mod callers;
mod health;
mod line;
mod messages;
mod mutual;
mod officer;
mod pool;
mod production;
mod recovery;
mod reports;
mod roles;
mod serve;
mod status;

pub(crate) use health::{line_trouble, missing};
pub use officer::{House, NodeInfo};
pub use serve::{Listening, ServeError};
pub(crate) use status::{busy, too_fast};
