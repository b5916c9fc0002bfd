//! `[audit]` of `sppd.toml`: the audit log and its checkpoints.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use spp_format::file_format::Faults;

/// Location of the audit log and frequency of its checkpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// Directory of the log.
    pub directory: PathBuf,
    /// Name of the node that writes the log.
    pub node: String,
    /// Number of new entries after which a checkpoint is due.
    pub checkpoint_entries: u64,
    /// Time after which a checkpoint is due, if there are new entries.
    pub checkpoint_every: Duration,
    /// Index of a checkpoint in the public database. Entries that it covers and that the log lacks are accepted as lost.
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
    /// Validates the section. Relative paths start at `base`.
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
