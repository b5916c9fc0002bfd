//! Offline events: actions of officers' tools on the token, outside the daemon.
//!
//! A tool stores each event beside the log before it acts. The daemon, the only writer of the log, imports the events at its
//! next start or poll.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use spp_log::audit::chain::MAX_LINE_LEN;

use super::{AuditError, AuditLog, Entry, Outcome};

/// Directory of the pending events, beside the log file.
const SPOOL_DIR: &str = "spool";
/// Maximum number of files imported per poll.
const MAX_FILES: usize = 256;
/// The audit action of imported events. The detail `act` names the event's own action.
const ACTION: &str = "token.act";

/// An action on the token that is not in the log yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfflineEvent {
    /// Name of the action, for example `officer.enroll`.
    pub act: String,
    /// Details of the action.
    pub details: BTreeMap<String, String>,
    /// Outcome of the action.
    pub outcome: Outcome,
}

impl OfflineEvent {
    /// Stores the event durably beside the log in this directory. Does nothing if no log exists yet; the log's first entries
    /// show this.
    pub fn persist(&self, log: &Path) -> Result<(), AuditError> {
        if !log.join(spp_log::audit::FILE).exists() {
            return Ok(());
        }
        let (dir, nanos) =
            (log.join(SPOOL_DIR), SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()));
        let name = format!("{nanos:032}-{}", std::process::id());
        let write = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
            let new = dir.join(format!("{name}.new"));
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            serde_json::to_writer(&mut file, self)?;
            file.flush()?;
            file.sync_all()?;
            fs::rename(&new, dir.join(format!("{name}.json")))?;
            File::open(&dir)?.sync_all()?;
            File::open(log)?.sync_all()
        };
        write().map_err(|cause| AuditError::Failed {
            doing: "storing an offline event in",
            path: dir.clone(),
            cause: Arc::new(cause),
        })
    }
}

/// Imports the pending events, oldest first. A crash between entry and removal imports an event twice, which is better than
/// losing it.
pub(super) async fn import_pending(log: &AuditLog) -> Result<(), AuditError> {
    let dir = log.directory().join(SPOOL_DIR);
    for path in pending_files(&dir)? {
        let entry = match read(&path) {
            Ok(OfflineEvent { act, details, outcome }) => {
                let entry = Entry::new("officer at the token", ACTION, outcome).with("act", act);
                details.into_iter().fold(entry, |entry, (name, value)| entry.with(&name, value))
            }
            Err(why) => Entry::new("officer at the token", ACTION, Outcome::Failed(why)).with("file", path.display()),
        };
        log.record(entry).await?;
        let removed = fs::remove_file(&path);
        removed.map_err(|cause| AuditError::Failed { doing: "removing", path, cause: Arc::new(cause) })?;
    }
    Ok(())
}

fn pending_files(dir: &Path) -> Result<Vec<PathBuf>, AuditError> {
    let failed = |cause| AuditError::Failed { doing: "reading", path: dir.to_owned(), cause: Arc::new(cause) };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let paths: Result<Vec<_>, _> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut paths = paths.map_err(failed)?;
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    paths.sort();
    paths.truncate(MAX_FILES);
    Ok(paths)
}

fn read(path: &Path) -> Result<OfflineEvent, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(MAX_LINE_LEN as u64 / 4).read_to_string(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use spp_log::audit::{Entries, verify};

    use super::*;

    #[tokio::test]
    async fn offline_events_are_imported_once_and_in_order() {
        let temp = spp_testkit::files::temp_dir();
        let dir = temp.path().join("audit");
        let event = |n: u32| OfflineEvent {
            act: "officer.enroll".to_owned(),
            details: BTreeMap::from([("n".to_owned(), n.to_string())]),
            outcome: Outcome::Begun,
        };
        event(0).persist(&dir).unwrap();
        assert!(!dir.exists(), "nothing is created without a log");
        AuditLog::create(&dir).unwrap();
        for n in 1..=3 {
            event(n).persist(&dir).unwrap();
        }
        fs::write(dir.join("spool/9.json"), "{}").unwrap();
        fs::write(dir.join("spool/8.new"), "half").unwrap();
        let log = AuditLog::open(&dir, "node-1").unwrap();
        import_pending(&log).await.unwrap();
        import_pending(&log).await.unwrap();
        let mut reader = Entries::open(&dir).unwrap();
        let entries: Vec<_> = std::iter::from_fn(|| reader.next_entry().unwrap()).collect();
        let numbers: Vec<_> = entries.iter().filter_map(|entry| entry.details.get("n").cloned()).collect();
        assert_eq!((entries.len(), numbers), (4, ["1", "2", "3"].map(str::to_owned).to_vec()));
        assert!(matches!(entries[3].outcome, Outcome::Failed(_)), "an unreadable event is recorded as failed");
        verify(&dir).unwrap();
    }
}
