//! HTTP: records, transparency log and pages for the public; metrics on a loopback address only.
#![expect(clippy::disallowed_types, reason = "HTTP and metrics live here")]

mod metrics;
mod pages;
mod public;
mod rate;
mod response;
mod serve;
mod site;

pub use metrics::{HttpError, Metrics, MetricsSources};
pub use public::Public;
