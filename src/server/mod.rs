//! The daemon's listeners: gRPC for stations, officers and the public, HTTP for the public and for metrics.
//!
//! `listeners.rs` starts and drains them, `reload.rs` replaces their configuration. A call passes the TLS handshake
//! (`connections.rs`), authorization (`grpc/roles.rs`) and admission (`grpc/call_gate.rs`) before its service runs. Services parse
//! requests into validated values and convert results to messages. A failure is a `CallError` (`call_error.rs`), and
//! `grpc/status.rs` alone decides what a caller may learn about it.
#![expect(clippy::disallowed_types, reason = "only this module uses gRPC, HTTP and metrics types")]

mod call_error;
mod connections;
mod grpc;
mod http;
mod listeners;
mod reload;

pub use connections::ActiveTls;
pub use grpc::{NodeInfo, OfficerContext};
pub use http::{HttpError, Metrics, MetricsSources, Public};
pub use listeners::{Listening, ServeError};
pub use reload::{ReloadError, ReloadTargets, Reloaded, Reloader};
