//! `[audit]` of `sppd.toml`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::Faults;

/// Where the audit log is, and how often its end is signed and published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// Its directory.
    pub directory: PathBuf,
    /// Whose log it is: the node's name.
    pub node: String,
    /// After so many entries.
    pub checkpoint_entries: u64,
    /// After so long, if there are any.
    pub checkpoint_every: Duration,
    /// What of the log the checkpoint in that entry of the public database covers and the log does not have is known to be lost: it is gone
    /// on with.
    pub accepted_loss: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AuditShape {
    directory: PathBuf,
    checkpoint_entries: u64,
    #[serde(with = "humantime_serde")]
    checkpoint_every: Duration,
    accepted_loss: Option<u64>,
}

impl Default for AuditShape {
    fn default() -> Self {
        Self {
            directory: PathBuf::from("audit"),
            checkpoint_entries: 10_000,
            checkpoint_every: Duration::from_secs(60),
            accepted_loss: None,
        }
    }
}

impl AuditShape {
    /// The value, for a file in that directory.
    pub(super) fn check(self, node: &str, place: &str, base: &Path, faults: &mut Faults) -> AuditConfig {
        if self.checkpoint_entries == 0 {
            faults.add(format!("{place}: audit.checkpoint_entries"), "must be at least 1");
        }
        if !(1..=24 * 60 * 60).contains(&self.checkpoint_every.as_secs()) {
            faults
                .add(format!("{place}: audit.checkpoint_every"), "must be from 1 second to 1 day, for example \"60s\"");
        }
        let Self { directory, checkpoint_entries, checkpoint_every, accepted_loss } = self;
        let (directory, node) = (base.join(directory), node.to_owned());
        AuditConfig { directory, node, checkpoint_entries, checkpoint_every, accepted_loss }
    }
}
