//! The log as anybody verifies it, from its first line to its last, also while a daemon writes it.

use std::fmt;
use std::path::Path;

use serde_json::json;

use super::{AuditError, Entries};

/// A log whose chain is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// How many entries it has.
    pub entries: u64,
    /// SHA-256 of the last line, in hex; zeros if there is none. Whoever keeps it elsewhere can tell later that the log up to
    /// here is still the same.
    pub head: String,
    /// Octets after the last whole line: an entry that is being written, or one that a crash cut off before anybody was told of
    /// it. The daemon cuts them off when it opens the log.
    pub unfinished: u64,
}

impl fmt::Display for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries, chain is whole", self.entries)?;
        match self.unfinished {
            0 => Ok(()),
            octets => write!(f, "; {octets} octets of an unfinished line follow"),
        }
    }
}

/// Reads the whole log and says that its chain is whole, or at which line and why it is not.
///
/// It finds a line that was changed, removed, added or moved, if any line follows it. It does not find that lines are missing at
/// the end, that the last one was changed, or that everything was written anew from some line on: for that the head must be
/// known from elsewhere.
pub fn verify(dir: &Path) -> Result<Verified, AuditError> {
    let mut entries = Entries::open(dir)?;
    while entries.next_entry()?.is_some() {}
    let head = entries.head();
    Ok(Verified { entries: head.lines(), head: hex::encode(head.hash), unfinished: entries.unfinished() })
}

/// What was found, for programs: `whole` says whether the chain is; if not, `line` is the first that does not fit, and `fault`
/// says why.
pub fn verified_json(found: &Result<Verified, AuditError>) -> serde_json::Value {
    match found {
        Ok(Verified { entries, head, unfinished }) => {
            json!({ "whole": true, "entries": entries, "head": head, "unfinished": unfinished })
        }
        Err(AuditError::Broken { line, why, .. }) => json!({ "whole": false, "line": line, "fault": why }),
        Err(error) => json!({ "whole": false, "line": null, "fault": error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::FILE;
    use super::super::chain::{MAX_LINE, TOO_LONG};
    use super::*;
    use crate::audit::{AuditLog, Entry, Outcome};

    /// The lines of a log of six entries, and a way to verify others in their place.
    struct Case {
        _place: tempfile::TempDir,
        dir: std::path::PathBuf,
        lines: Vec<String>,
    }

    impl Case {
        async fn new(caller: &str) -> Self {
            let place = tempfile::tempdir().unwrap();
            let dir = place.path().join("audit");
            AuditLog::create(&dir).unwrap();
            assert_eq!(verify(&dir).unwrap().to_string(), "0 entries, chain is whole");
            let log = AuditLog::open(&dir, "node-1").unwrap();
            for n in 0..6 {
                log.record(Entry::new(caller, "key.destroy", Outcome::Begun).with("n", n)).await.unwrap();
            }
            let lines = std::fs::read_to_string(dir.join(FILE)).unwrap().lines().map(str::to_owned).collect();
            Self { _place: place, dir, lines }
        }

        fn verify(&self, change: impl FnOnce(&mut Vec<String>)) -> Result<Verified, AuditError> {
            let mut lines = self.lines.clone();
            change(&mut lines);
            let text: String = lines.into_iter().map(|line| line + "\n").collect();
            std::fs::write(self.dir.join(FILE), text).unwrap();
            verify(&self.dir)
        }

        fn broken_at(&self, line: u64, why: &str, change: impl FnOnce(&mut Vec<String>)) {
            let found = self.verify(change);
            assert_eq!(verified_json(&found)["line"], line, "{found:?}");
            let error = found.unwrap_err().to_string();
            assert!(error.contains(&format!("line {line}: ")) && error.contains(why), "{error}");
        }
    }

    #[tokio::test]
    async fn every_change_inside_is_found_at_its_line() {
        let case = Case::new("officer o-1").await;
        let other = Case::new("officer o-2").await;
        let untouched = case.verify(|_| {}).unwrap();
        assert_eq!(untouched.entries, 6);
        assert_eq!(untouched.head, hex::encode(crate::keys::sha256(case.lines[5].as_bytes())));
        let (changed, moved) = ("one of the two was changed", "removed, added or moved");
        // Edited: it is the next line that no longer follows.
        case.broken_at(4, changed, |lines| lines[2] = lines[2].replace("o-1", "o-9"));
        case.broken_at(2, changed, |lines| lines[0].push(' '));
        // Removed, at the beginning, inside, and put in twice.
        case.broken_at(1, moved, |lines| drop(lines.remove(0)));
        case.broken_at(3, moved, |lines| drop(lines.remove(2)));
        case.broken_at(4, moved, |lines| lines.insert(3, lines[2].clone()));
        case.broken_at(3, moved, |lines| lines.swap(2, 3));
        // Removed and those after it numbered anew.
        case.broken_at(3, changed, |lines| {
            lines.remove(2);
            lines[2] = lines[2].replace("\"sequence\":3", "\"sequence\":2");
        });
        // A line of another log in its place.
        case.broken_at(3, changed, |lines| lines[2].clone_from(&other.lines[2]));
        case.broken_at(2, changed, |lines| lines[0].clone_from(&other.lines[0]));
        case.broken_at(6, "no entry", |lines| lines[5] = lines[5].replace("\"begun\"", "\"well\""));
        case.broken_at(5, "no entry", |lines| lines[4].clear());
        case.broken_at(5, TOO_LONG, |lines| lines[4] = " ".repeat(MAX_LINE));
    }

    #[tokio::test]
    async fn what_is_gone_at_the_end_shows_only_to_those_who_know_the_head() {
        let case = Case::new("officer o-1").await;
        let whole = case.verify(|_| {}).unwrap();
        let shorter = case.verify(|lines| lines.truncate(4)).unwrap();
        assert_eq!(shorter.entries, 4);
        assert_ne!(shorter.head, whole.head);
    }
}
