//! `[public]` of `sppd.toml`: the public listener.

use std::path::PathBuf;

use serde::Deserialize;
use spp_format::file_format::Faults;

/// The public listener's pages, rate limits and certificate.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublicConfig {
    /// Title of the pages: the owner of the devices.
    pub title: String,
    /// Average number of requests per second from one address. An IPv6 address counts with its /64 prefix.
    pub requests_per_second: u32,
    /// Maximum number of requests at once from one address.
    pub burst: u32,
    /// A certificate that browsers trust; `key` is its key. Without both, the certificate of `[tls]` is used.
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Default for PublicConfig {
    fn default() -> Self {
        Self { title: "Device records".to_owned(), requests_per_second: 100, burst: 400, certificate: None, key: None }
    }
}

impl PublicConfig {
    /// Paths of the public listener's own certificate and key.
    pub(super) fn own_identity(&self) -> Option<(&PathBuf, &PathBuf)> {
        self.certificate.as_ref().zip(self.key.as_ref())
    }

    pub(super) fn check(&self, place: &str, faults: &mut Faults) {
        if !(1..=80).contains(&self.title.chars().count()) {
            faults.add(format!("{place}: public.title"), "must have 1 to 80 characters");
        }
        if self.certificate.is_some() != self.key.is_some() {
            faults.add(format!("{place}: public.certificate"), "set both certificate and key, or neither");
        }
        for (name, value) in [("requests_per_second", self.requests_per_second), ("burst", self.burst)] {
            if !(1..=1_000_000).contains(&value) {
                faults.add(format!("{place}: public.{name}"), "must be from 1 to 1000000");
            }
        }
    }
}
