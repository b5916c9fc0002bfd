//! The clock that all time-dependent code uses.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// A replaceable clock in seconds since the Unix epoch.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::of(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }

    /// A clock for tests, which need not wait for real time to pass.
    pub fn of(seconds_since_epoch: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(seconds_since_epoch))
    }

    /// Seconds since the Unix epoch.
    pub(crate) fn now(&self) -> u64 {
        (self.0)()
    }
}
