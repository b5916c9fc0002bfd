//! What officers do on the token by themselves, while the daemon has the log or there is no daemon yet: written down beside the log before
//! it is done, and taken into it at the next start or look of the daemon.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::chain::MAX_LINE;
use super::{AuditError, AuditLog, Entry, Outcome};

/// Beside the log's file.
const SPOOL: &str = "spool";
/// Most files that are taken in at one look.
const MOST: usize = 256;
/// The act of whatever is taken in: the details name it.
const ACT: &str = "token.act";

/// An act on the token, as it waits beside the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfflineEvent {
    /// Which one, `officer.enroll` for example.
    pub act: String,
    /// With what.
    pub details: BTreeMap<String, String>,
    /// How it went.
    pub outcome: Outcome,
}

impl OfflineEvent {
    /// Writes it down beside the log of that directory, durably; nothing where there is no log yet, which its first entries then show.
    pub fn write_down(&self, log: &Path) -> Result<(), AuditError> {
        if !log.join(super::FILE).exists() {
            return Ok(());
        }
        let (dir, at) =
            (log.join(SPOOL), SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()));
        let name = format!("{at:032}-{}", std::process::id());
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
        write().map_err(|cause| AuditError::Failed { doing: "writing down", path: dir.clone(), cause: Arc::new(cause) })
    }
}

/// Takes in what was written down beside the log, oldest first. A crash between the entry and the removal has it taken in twice, which is
/// better than not at all.
pub(super) async fn take_in(log: &AuditLog) -> Result<(), AuditError> {
    let dir = log.directory().join(SPOOL);
    for path in waiting(&dir)? {
        let entry = match read(&path) {
            Ok(OfflineEvent { act, details, outcome }) => {
                let entry = Entry::new("officer at the token", ACT, outcome).with("act", act);
                details.into_iter().fold(entry, |entry, (name, value)| entry.with(&name, value))
            }
            Err(why) => Entry::new("officer at the token", ACT, Outcome::Failed(why)).with("file", path.display()),
        };
        log.record(entry).await?;
        let removed = fs::remove_file(&path);
        removed.map_err(|cause| AuditError::Failed { doing: "removing", path, cause: Arc::new(cause) })?;
    }
    Ok(())
}

fn waiting(dir: &Path) -> Result<Vec<PathBuf>, AuditError> {
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
    paths.truncate(MOST);
    Ok(paths)
}

fn read(path: &Path) -> Result<OfflineEvent, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(MAX_LINE as u64 / 4).read_to_string(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::{Entries, verify};
    use super::*;

    #[tokio::test]
    async fn what_waits_beside_the_log_is_taken_in_once_and_in_order() {
        let place = spp_testkit::files::temp_dir();
        let dir = place.path().join("audit");
        let act = |n: u32| OfflineEvent {
            act: "officer.enroll".to_owned(),
            details: BTreeMap::from([("n".to_owned(), n.to_string())]),
            outcome: Outcome::Begun,
        };
        act(0).write_down(&dir).unwrap();
        assert!(!dir.exists(), "where there is no log, nothing is made");
        AuditLog::create(&dir).unwrap();
        for n in 1..=3 {
            act(n).write_down(&dir).unwrap();
        }
        fs::write(dir.join("spool/9.json"), "{}").unwrap();
        fs::write(dir.join("spool/8.new"), "half").unwrap();
        let log = AuditLog::open(&dir, "node-1").unwrap();
        take_in(&log).await.unwrap();
        take_in(&log).await.unwrap();
        let mut entries = Entries::open(&dir).unwrap();
        let told: Vec<_> = std::iter::from_fn(|| entries.next_entry().unwrap()).collect();
        let numbers: Vec<_> = told.iter().filter_map(|entry| entry.details.get("n").cloned()).collect();
        assert_eq!((told.len(), numbers), (4, ["1", "2", "3"].map(str::to_owned).to_vec()));
        assert!(matches!(told[3].outcome, Outcome::Failed(_)), "what is no act is told as such");
        verify(&dir).unwrap();
    }
}
