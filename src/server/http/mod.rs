//! HTTP: records, transparency log and pages for the public; metrics on a loopback address only.

mod metrics;
mod pages;
mod public;
mod rate;
mod response;
mod serve;
mod site;

pub use metrics::{HttpError, Metrics, MetricsSources};
pub use public::Public;
