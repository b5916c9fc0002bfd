//! gRPC: services, caller authentication, roles, limits on calls, audit of calls, statuses.
#![expect(clippy::disallowed_types, reason = "gRPC lives here")]

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
mod services;
mod status;

pub(super) use health::{line_unavailable_reason, missing_dependencies};
pub use officer::{NodeInfo, OfficerContext};
pub(super) use services::Services;
pub(super) use status::{overloaded, rate_limited};
