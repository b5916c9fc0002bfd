//! The configuration in force, and a new one in its place without a restart.
//!
//! What the daemon has built upon since its start stays (see [`DaemonConfig::changes`]); profiles, stations, TLS and the log level are
//! exchanged. Calls and connections that have begun end as they began.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::access::{AccessControl, AccessError};
use crate::audit::{AuditError, AuditLog, Entry, Outcome};
use crate::config::{DaemonConfig, Faults};
use crate::connections::TlsInForce;
use crate::logging::LogLevel;
use crate::provisioning::{Policy, Provisioner};

/// Bytes that changes or faults may have in an answer or on record: a line of the audit log, and what HTTP/2 takes as the head of an
/// answer, have an end. More of them are counted.
const WORDS: usize = 4096;

/// Why the configuration is still the earlier one.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The new one is not usable, or needs a restart.
    #[error("the configuration is refused, the earlier one stays in force: {0}")]
    Refused(String),
    /// What cannot be recorded is not done.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The state store.
    #[error(transparent)]
    Access(#[from] AccessError),
}

/// What a reload did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// What is another now, in words: `station line-1/b: new`.
    pub changes: Vec<String>,
    /// SHA-256 of the file that is in force now.
    pub fingerprint: [u8; 32],
}

/// Exchanges the configuration of a running daemon.
pub struct Reloader {
    path: PathBuf,
    in_force: Mutex<DaemonConfig>,
    exchanged: Exchanged,
    audit: Arc<AuditLog>,
}

/// What goes by the configuration, and may be told of another one.
pub struct Exchanged {
    /// Profiles and stations.
    pub provisioner: Arc<Provisioner>,
    /// Quotas and the rules of approval.
    pub desk: Arc<AccessControl>,
    /// Certificates.
    pub tls: TlsInForce,
    /// The log's level.
    pub log: LogLevel,
}

impl Reloader {
    /// For the daemon that was started with this configuration, of this file.
    pub fn new(path: PathBuf, in_force: DaemonConfig, exchanged: Exchanged, audit: Arc<AuditLog>) -> Self {
        Self { path, in_force: Mutex::new(in_force), exchanged, audit }
    }

    /// Reads the file again and puts it in force as a whole, or not at all. The caller is a role and a name, for the record.
    pub async fn reload(&self, caller: &str) -> Result<Reloaded, ReloadError> {
        // 1. One after the other: whoever comes second is compared with what the first one put in force.
        let mut in_force = self.in_force.lock().await;
        // 2. Read and check: the new one by itself, then against what is in force.
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
            .with("changes", brief(&changes));
        self.audit.record(entry.clone()).await?;
        // 4. Settle with what officers have agreed on: durable, all of it or nothing.
        match self.exchanged.desk.settle(new.approvals, new.stations.quotas(), true).await {
            Ok(kept) if kept.is_empty() => {}
            Ok(kept) => return Err(self.refuse(caller, kept).await?),
            Err(error) => {
                self.audit.record(entry.ended(Outcome::Failed(error.to_string()))).await?;
                return Err(error.into());
            }
        }
        // 5. Put it in force: nothing here can fail.
        self.exchanged.provisioner.exchange(Policy::new(&new));
        self.exchanged.tls.exchange(&new.tls);
        self.exchanged.log.exchange(&new.log);
        let reloaded = Reloaded { changes, fingerprint: new.fingerprint };
        *in_force = new;
        tracing::info!(caller, changes = ?reloaded.changes, "the configuration was read again");
        self.audit.record(entry.ended(Outcome::Done)).await?;
        Ok(reloaded)
    }

    async fn refuse(&self, caller: &str, faults: Vec<String>) -> Result<ReloadError, AuditError> {
        let why = brief(&faults);
        tracing::warn!(caller, %why, "the configuration is refused, the earlier one stays in force");
        self.audit.record(Entry::new(caller, "config.reload", Outcome::Refused(why.clone()))).await?;
        Ok(ReloadError::Refused(why))
    }
}

/// The files are read where waiting for a disk holds up no call.
async fn read(path: &Path) -> Result<DaemonConfig, Faults> {
    let (file, place) = (path.to_owned(), path.display().to_string());
    let read = tokio::task::spawn_blocking(move || DaemonConfig::load(&file)).await;
    read.unwrap_or_else(|error| {
        let mut faults = Faults::default();
        faults.add(place, error);
        Err(faults)
    })
}

/// As many as there is room for.
fn brief(all: &[String]) -> String {
    let mut text = String::new();
    for (told, one) in all.iter().enumerate() {
        if text.len() + one.len() > WORDS {
            return format!("{text}; and {} more: sppd --config FILE --check tells all", all.len() - told);
        }
        text.push_str(if told > 0 { "; " } else { "" });
        text.push_str(one);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_counted() {
        assert_eq!(brief(&[]), "");
        assert_eq!(brief(&["a: new".to_owned(), "b: changed".to_owned()]), "a: new; b: changed");
        let many: Vec<_> = (0..1000).map(|n| format!("station line-{n:03}: new")).collect();
        let text = brief(&many);
        assert!(text.len() < WORDS + 100 && text.starts_with("station line-000: new; station line-001"), "{text}");
        let told = text.matches(": new").count();
        assert!(text.contains(&format!("; and {} more: ", 1000 - told)), "{text}");
    }
}
