//! Reloads the configuration of a running daemon.
//!
//! Settings that need a restart stay unchanged (see [`DaemonConfig::changes`]); profiles, stations, TLS and the log level are
//! replaced. Calls and connections in progress finish under the earlier configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use spp_format::file_format::Faults;
use tokio::sync::Mutex;

use crate::access::{AccessControl, AccessError};
use crate::audit::{AuditError, AuditLog, Entry, Outcome};
use crate::config::DaemonConfig;
use crate::logging::LogLevel;
use crate::provisioning::{Policy, Provisioner};
use crate::server::connections::ActiveTls;

/// Maximum length in bytes of the list of changes or faults. It is bounded by an audit log line and by the HTTP/2 header size;
/// entries beyond it are counted.
const MAX_SUMMARY_LEN: usize = 4096;

/// The reason why the earlier configuration stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The new configuration is invalid or needs a restart.
    #[error("configuration refused, the earlier one stays in force: {0}")]
    Refused(String),
    /// The reload could not be recorded in the audit log, so it was not performed.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The state store.
    #[error(transparent)]
    Access(#[from] AccessError),
}

/// The result of a reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// The changes as text, for example `station line-1/b: new`.
    pub changes: Vec<String>,
    /// SHA-256 of the configuration file in force.
    pub fingerprint: [u8; 32],
}

/// Reloads the configuration file of a running daemon.
pub struct Reloader {
    path: PathBuf,
    in_force: Mutex<DaemonConfig>,
    targets: ReloadTargets,
    audit: Arc<AuditLog>,
}

/// The components that a reload updates.
pub struct ReloadTargets {
    /// Profiles and stations.
    pub provisioner: Arc<Provisioner>,
    /// Quotas and approval rules.
    pub access: Arc<AccessControl>,
    /// TLS configurations of the listeners.
    pub tls: ActiveTls,
    /// The log level.
    pub log: LogLevel,
}

impl Reloader {
    /// Creates the reloader of a daemon that started with configuration `in_force`, read from `path`.
    pub fn new(path: PathBuf, in_force: DaemonConfig, targets: ReloadTargets, audit: Arc<AuditLog>) -> Self {
        Self { path, in_force: Mutex::new(in_force), targets, audit }
    }

    /// Reads the file and puts it in force as a whole, or not at all. `caller` is a role and a name, for the audit log.
    pub async fn reload(&self, caller: &str) -> Result<Reloaded, ReloadError> {
        // 1. Serialise reloads: each one is compared with the configuration that the previous one put in force.
        let mut in_force = self.in_force.lock().await;
        // 2. Read and check the new configuration, then compare it with the one in force.
        let admitted = match read(&self.path).await {
            Ok(new) => in_force.changes(&new).map(|changes| (new, changes)),
            Err(faults) => Err(faults),
        };
        let (new, changes) = match admitted {
            Ok(admitted) => admitted,
            Err(faults) => return Err(self.refuse(caller, faults.iter().map(ToString::to_string).collect()).await?),
        };
        // 3. Record.
        let entry = Entry::new(caller, "config.reload", Outcome::Begun)
            .with("configuration", hex::encode(new.fingerprint))
            .with("changes", summarize(&changes));
        self.audit.record(entry.clone()).await?;
        // 4. Apply approval rules and quotas, within what officers have approved: durable, all or nothing.
        match self.targets.access.apply(new.approvals, new.stations.quotas(), true).await {
            Ok(refused) if refused.is_empty() => {}
            Ok(refused) => return Err(self.refuse(caller, refused).await?),
            Err(error) => {
                self.audit.record(entry.ended(Outcome::Failed(error.to_string()))).await?;
                return Err(error.into());
            }
        }
        // 5. Put it in force. These steps cannot fail.
        self.targets.provisioner.replace_policy(Policy::new(&new));
        self.targets.tls.replace(&new.tls);
        self.targets.log.replace(&new.log);
        let reloaded = Reloaded { changes, fingerprint: new.fingerprint };
        *in_force = new;
        tracing::info!(caller, changes = ?reloaded.changes, "configuration reloaded");
        self.audit.record(entry.ended(Outcome::Done)).await?;
        Ok(reloaded)
    }

    async fn refuse(&self, caller: &str, faults: Vec<String>) -> Result<ReloadError, AuditError> {
        let why = summarize(&faults);
        tracing::warn!(caller, reason = %why, "configuration refused, the earlier one stays in force");
        self.audit.record(Entry::new(caller, "config.reload", Outcome::Refused(why.clone()))).await?;
        Ok(ReloadError::Refused(why))
    }
}

/// Reads the files on a blocking thread, so that a slow disk delays no call.
async fn read(path: &Path) -> Result<DaemonConfig, Faults> {
    let (file, location) = (path.to_owned(), path.display().to_string());
    let read = tokio::task::spawn_blocking(move || DaemonConfig::load(&file)).await;
    read.unwrap_or_else(|error| {
        let mut faults = Faults::default();
        faults.add(location, error);
        Err(faults)
    })
}

/// Joins the entries up to the maximum length, and counts the rest.
fn summarize(all: &[String]) -> String {
    let mut text = String::new();
    for (count, entry) in all.iter().enumerate() {
        if text.len() + entry.len() > MAX_SUMMARY_LEN {
            return format!("{text}; and {} more: run sppd --config FILE --check for all", all.len() - count);
        }
        text.push_str(if count > 0 { "; " } else { "" });
        text.push_str(entry);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_counts_entries_beyond_limit() {
        assert_eq!(summarize(&[]), "");
        assert_eq!(summarize(&["a: new".to_owned(), "b: changed".to_owned()]), "a: new; b: changed");
        let many: Vec<_> = (0..1000).map(|n| format!("station line-{n:03}: new")).collect();
        let text = summarize(&many);
        assert!(
            text.len() < MAX_SUMMARY_LEN + 100 && text.starts_with("station line-000: new; station line-001"),
            "{text}"
        );
        let listed = text.matches(": new").count();
        assert!(text.contains(&format!("; and {} more: ", 1000 - listed)), "{text}");
    }
}
