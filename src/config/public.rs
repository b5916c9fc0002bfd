//! `[public]` of `sppd.toml`: how anybody is served.

use std::path::PathBuf;

use serde::Deserialize;

use super::Faults;

/// The public listener: its page, and how much one address may ask.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublicConfig {
    /// Whose devices these are: the head of the pages.
    pub title: String,
    /// Requests a second that one address may make on average; an IPv6 address counts with its /64.
    pub requests_per_second: u32,
    /// Requests that it may make at once.
    pub burst: u32,
    /// A certificate that browsers know, with its key; that of `[tls]` if there is none.
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Default for PublicConfig {
    fn default() -> Self {
        Self { title: "Device records".to_owned(), requests_per_second: 100, burst: 400, certificate: None, key: None }
    }
}

impl PublicConfig {
    /// Where a certificate of its own is, and its key.
    pub(super) fn own_identity(&self) -> Option<(&PathBuf, &PathBuf)> {
        self.certificate.as_ref().zip(self.key.as_ref())
    }

    pub(super) fn check(&self, place: &str, faults: &mut Faults) {
        if !(1..=80).contains(&self.title.chars().count()) {
            faults.add(format!("{place}: public.title"), "must have 1 to 80 characters");
        }
        if self.certificate.is_some() != self.key.is_some() {
            faults.add(format!("{place}: public.certificate"), "give certificate and key, or neither");
        }
        for (name, value) in [("requests_per_second", self.requests_per_second), ("burst", self.burst)] {
            if !(1..=1_000_000).contains(&value) {
                faults.add(format!("{place}: public.{name}"), "must be from 1 to 1000000");
            }
        }
    }
}
