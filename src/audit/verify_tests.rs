//! Verification of logs that this crate has written.

use spp_log::audit::chain::{LINE_TOO_LONG, MAX_LINE_LEN};
use spp_log::audit::{FILE, Verified, verified_json, verify};

use super::{AuditError, AuditLog, Entry, Outcome};

/// A log of six entries, and methods that verify a changed copy of its lines.
struct Case {
    _temp: tempfile::TempDir,
    dir: std::path::PathBuf,
    lines: Vec<String>,
}

impl Case {
    async fn new(caller: &str) -> Self {
        let temp = spp_testkit::files::temp_dir();
        let dir = temp.path().join("audit");
        AuditLog::create(&dir).unwrap();
        assert_eq!(verify(&dir).unwrap().to_string(), "0 entries, chain intact");
        let log = AuditLog::open(&dir, "node-1").unwrap();
        for n in 0..6 {
            log.record(Entry::new(caller, "key.destroy", Outcome::Begun).with("n", n)).await.unwrap();
        }
        let lines = std::fs::read_to_string(dir.join(FILE)).unwrap().lines().map(str::to_owned).collect();
        Self { _temp: temp, dir, lines }
    }

    fn verify(&self, change: impl FnOnce(&mut Vec<String>)) -> Result<Verified, AuditError> {
        let mut lines = self.lines.clone();
        change(&mut lines);
        let text: String = lines.into_iter().map(|line| line + "\n").collect();
        std::fs::write(self.dir.join(FILE), text).unwrap();
        verify(&self.dir)
    }

    fn assert_broken_at(&self, line: u64, why: &str, change: impl FnOnce(&mut Vec<String>)) {
        let result = self.verify(change);
        assert_eq!(verified_json(&result)["line"], line, "{result:?}");
        let error = result.unwrap_err().to_string();
        assert!(error.contains(&format!("line {line}: ")) && error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn change_inside_the_log_is_found_at_its_line() {
    let case = Case::new("officer o-1").await;
    let other = Case::new("officer o-2").await;
    let untouched = case.verify(|_| {}).unwrap();
    assert_eq!(untouched.entries, 6);
    assert_eq!(untouched.head, hex::encode(spp_format::keys::sha256(case.lines[5].as_bytes())));
    let (changed, moved) = ("one of the two was changed", "removed, added or moved");
    // Edited: the next line no longer continues the chain.
    case.assert_broken_at(4, changed, |lines| lines[2] = lines[2].replace("o-1", "o-9"));
    case.assert_broken_at(2, changed, |lines| lines[0].push(' '));
    // Removed at the beginning, removed inside, duplicated, swapped.
    case.assert_broken_at(1, moved, |lines| drop(lines.remove(0)));
    case.assert_broken_at(3, moved, |lines| drop(lines.remove(2)));
    case.assert_broken_at(4, moved, |lines| lines.insert(3, lines[2].clone()));
    case.assert_broken_at(3, moved, |lines| lines.swap(2, 3));
    // Removed, and the following line renumbered.
    case.assert_broken_at(3, changed, |lines| {
        lines.remove(2);
        lines[2] = lines[2].replace("\"sequence\":3", "\"sequence\":2");
    });
    // Replaced by a line of another log.
    case.assert_broken_at(3, changed, |lines| lines[2].clone_from(&other.lines[2]));
    case.assert_broken_at(2, changed, |lines| lines[0].clone_from(&other.lines[0]));
    case.assert_broken_at(6, "not an audit entry", |lines| lines[5] = lines[5].replace("\"begun\"", "\"well\""));
    case.assert_broken_at(5, "not an audit entry", |lines| lines[4].clear());
    case.assert_broken_at(5, LINE_TOO_LONG, |lines| lines[4] = " ".repeat(MAX_LINE_LEN));
}

#[tokio::test]
async fn truncated_log_verifies_with_another_head() {
    let case = Case::new("officer o-1").await;
    let whole = case.verify(|_| {}).unwrap();
    let shorter = case.verify(|lines| lines.truncate(4)).unwrap();
    assert_eq!(shorter.entries, 4);
    assert_ne!(shorter.head, whole.head);
}
