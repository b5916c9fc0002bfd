//! The daemon's log, on standard error.

use std::io::IsTerminal as _;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// How much is logged, which may be changed meanwhile.
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

/// From now on this process logs, in this form.
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
    /// From now on so much.
    pub fn exchange(&self, log: &LogConfig) {
        if let Err(error) = self.0.reload(filter(log)) {
            tracing::warn!(%error, "the log level stays as it is");
        }
    }
}

fn filter(log: &LogConfig) -> EnvFilter {
    // The configuration has checked it.
    EnvFilter::try_new(&log.level).unwrap_or_default()
}
