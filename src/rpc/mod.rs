//! The gRPC layer: services, caller authentication, role checks, audit, error statuses, TLS and drain.
//!
//! Only this module uses tonic. It parses requests into validated values and converts results to messages; `status` alone
//! decides what a caller may learn about a failure.
#![expect(clippy::disallowed_types, reason = "only this module uses gRPC types")]

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

pub(crate) use health::{line_trouble, missing_dependencies};
pub use officer::{NodeInfo, OfficerContext};
pub use serve::{Listening, ServeError};
pub(crate) use status::{overloaded, rate_limited};
