//! `[listen]` of `sppd.toml`: the addresses of the listeners.

use std::net::SocketAddr;

use serde::Deserialize;

/// Listen addresses.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Stations, mutual TLS.
    pub line: SocketAddr,
    /// Officers, mutual TLS.
    pub officer: SocketAddr,
    /// The public, TLS without client certificates.
    pub public: SocketAddr,
    /// Metrics, plain HTTP, on a loopback address only. `None` disables metrics.
    pub metrics: Option<SocketAddr>,
}
