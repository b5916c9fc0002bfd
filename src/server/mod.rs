//! The daemon's listeners: gRPC for stations, officers and the public, HTTP for the public and for metrics.
//!
//! `listeners.rs` starts and drains them, `reload.rs` replaces their configuration. A call of a station or an officer passes
//! the TLS handshake (`connections.rs`), authorization (`grpc/roles.rs`) and the limit on calls (`grpc/call_gate.rs`) before
//! its service runs; public clients have no certificate, and their request rate is limited per address (`http/rate.rs`).
//! Services parse requests into validated values and convert results to messages. A failure is a `CallError`
//! (`call_error.rs`); `grpc/status.rs` and `http/public.rs` decide what gRPC and HTTP clients may learn about it.

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
