//! Logging to standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// The log filter, which a reload can change.
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

/// Starts logging in the configured format.
pub fn start(log: &LogConfig) -> LogLevel {
    let (filter, level) = reload::Layer::new(filter(log));
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = match log.format {
        LogFormat::Human => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).init();
    LogLevel(level)
}

impl LogLevel {
    /// Replaces the log filter.
    pub fn replace(&self, log: &LogConfig) {
        if let Err(error) = self.0.reload(filter(log)) {
            tracing::warn!(%error, "log level not changed");
        }
    }
}

fn filter(log: &LogConfig) -> EnvFilter {
    // The configuration has validated the filter.
    EnvFilter::try_new(&log.level).unwrap_or_default()
}
