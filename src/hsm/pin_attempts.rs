//! Records a refused PIN durably, so that no daemon process tries it again before an officer acts: three wrong PINs lock a token.
//! The officer's own tools are not restricted.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::pin::PinSource;

/// The file that records a refused PIN. It contains nothing about the PIN itself.
#[derive(Debug, Clone)]
pub struct PinAttempts(PathBuf);

#[derive(Serialize, Deserialize)]
struct Refused {
    why: String,
    /// Seconds since the Unix epoch.
    at: u64,
    /// The version of the PIN file at that time. A file written since holds another PIN.
    pin: Option<Version>,
}

/// The version of a PIN file.
#[derive(Serialize, Deserialize, PartialEq, Eq, Clone, Copy)]
pub(super) struct Version {
    inode: u64,
    modified: i64,
    modified_nanoseconds: i64,
}

impl PinAttempts {
    /// Uses this file, in a directory that the daemon can write.
    pub const fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The reason why the PIN must not be tried, if there is one. An unreadable record counts as a refusal.
    pub(super) fn refused(&self, pin: &PinSource) -> Option<String> {
        let refused = match self.read() {
            Ok(None) => return None,
            Ok(Some(refused)) => refused,
            Err(e) => return Some(format!("{}: {e}; remove the file if the PIN is correct", self.0.display())),
        };
        // A PIN file that is missing now does not count as changed.
        match (refused.pin, version(pin)) {
            (Some(refused_version), Some(current)) if refused_version != current => None,
            _ => Some(refused.why),
        }
    }

    /// Records durably that the PIN in this version of its file was refused.
    pub(super) fn record(&self, pin_version: Option<Version>, why: &str) -> io::Result<()> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let text = serde_json::to_vec(&Refused { why: why.to_owned(), at, pin: pin_version })?;
        let new = self.0.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.0)?;
        self.sync()
    }

    /// Allows one more attempt. Returns the reason of the recorded refusal.
    pub fn allow(&self) -> io::Result<Option<String>> {
        let refused = self.read().map_or_else(|e| Some(e.to_string()), |refused| Some(refused?.why));
        match fs::remove_file(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            removed => removed?,
        }
        self.sync()?;
        Ok(refused)
    }

    fn read(&self) -> io::Result<Option<Refused>> {
        match fs::read(&self.0) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            text => Ok(Some(serde_json::from_slice(&text?)?)),
        }
    }

    fn sync(&self) -> io::Result<()> {
        File::open(self.0.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// The version of the PIN file; `None` for other sources. systemd writes a credential again at each start, so its file version
/// says nothing about the PIN.
pub(super) fn version(pin: &PinSource) -> Option<Version> {
    use std::os::unix::fs::MetadataExt as _;
    let PinSource::File(path) = pin else { return None };
    let metadata = fs::metadata(path).ok()?;
    Some(Version { inode: metadata.ino(), modified: metadata.mtime(), modified_nanoseconds: metadata.mtime_nsec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_pin_is_blocked_until_file_changes_or_officer_allows() {
        let directory = spp_testkit::files::temp_dir();
        let (path, file) = (directory.path().join("pin-refused"), directory.path().join("pin"));
        fs::write(&file, "1").unwrap();
        let (pin, credential) = (PinSource::File(file.clone()), PinSource::Credential(file.clone()));
        let attempts = PinAttempts::new(path.clone());
        for source in [&pin, &credential] {
            assert_eq!(attempts.refused(source), None);
            attempts.record(version(source), "CKR_PIN_INCORRECT").unwrap();
            for reopened in [&attempts, &PinAttempts::new(path.clone())] {
                assert_eq!(reopened.refused(source).as_deref(), Some("CKR_PIN_INCORRECT"));
            }
            assert_eq!(attempts.allow().unwrap().as_deref(), Some("CKR_PIN_INCORRECT"));
            assert_eq!(attempts.allow().unwrap(), None);
        }
        attempts.record(version(&credential), "wrong").unwrap();
        fs::remove_file(&file).unwrap();
        fs::write(&file, "2").unwrap();
        assert_eq!(attempts.refused(&credential).as_deref(), Some("wrong"));
        attempts.record(version(&pin), "wrong").unwrap();
        fs::rename(&file, directory.path().join("elsewhere")).unwrap();
        assert_eq!(attempts.refused(&pin).as_deref(), Some("wrong"), "a missing file does not count as another PIN");
        fs::rename(directory.path().join("elsewhere"), &file).unwrap();
        assert_eq!(attempts.refused(&pin).as_deref(), Some("wrong"));
        let before = fs::metadata(&file).unwrap().modified().unwrap();
        while fs::metadata(&file).unwrap().modified().unwrap() == before {
            fs::write(&file, "3").unwrap();
        }
        assert_eq!(attempts.refused(&pin), None);
        fs::write(&path, "nonsense").unwrap();
        assert!(attempts.refused(&pin).is_some());
    }
}
