//! What the daemon tells over HTTP: its records, its log and its pages to anybody, its metrics to this machine alone.
#![expect(clippy::disallowed_types, reason = "this is the room of HTTP and of metrics")]

mod metrics;
mod pages;
mod public;
mod rate;
mod serve;

pub use metrics::{Metrics, Told, WebError};
pub use public::Public;
