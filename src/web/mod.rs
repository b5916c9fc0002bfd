//! HTTP: records, transparency log and pages for the public; metrics on a loopback address only.
#![expect(clippy::disallowed_types, reason = "only this module uses HTTP and metrics types")]

mod metrics;
mod pages;
mod public;
mod rate;
mod response;
mod serve;
mod site;

pub use metrics::{Metrics, MetricsSources, WebError};
pub use public::Public;
