//! Where everything that waits for a time takes it from.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Gives seconds since the Unix epoch.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// The system's clock.
    pub fn system() -> Self {
        Self::of(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }

    /// Another one, so that a test need not wait for a day to be over.
    pub fn of(seconds_since_epoch: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(seconds_since_epoch))
    }

    /// Seconds since the Unix epoch.
    pub(crate) fn now(&self) -> u64 {
        (self.0)()
    }
}
