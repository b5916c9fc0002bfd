//! What the daemon tells over plain HTTP: its metrics, to this machine alone.
#![expect(clippy::disallowed_types, reason = "this is the room of HTTP and of metrics")]

mod metrics;
mod serve;

pub use metrics::{Metrics, WebError};
