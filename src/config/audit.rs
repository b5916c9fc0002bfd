//! `[audit]` of `sppd.toml`.

use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Where the audit log is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditConfig {
    /// Its directory.
    pub directory: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AuditShape {
    directory: PathBuf,
}

impl Default for AuditShape {
    fn default() -> Self {
        Self { directory: PathBuf::from("audit") }
    }
}

impl AuditShape {
    /// The value, for a file in that directory.
    pub(super) fn under(&self, base: &Path) -> AuditConfig {
        AuditConfig { directory: base.join(&self.directory) }
    }
}
