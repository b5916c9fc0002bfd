//! A PIN that was refused is not tried again by the daemon, whichever process it is by then, until an officer has acted: three wrong
//! ones lock a token. What an officer does with a tool is the officer's own act.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::pin::PinSource;

/// The file that remembers a refusal. It says nothing of the PIN.
#[derive(Debug, Clone)]
pub struct PinAttempts(PathBuf);

#[derive(Serialize, Deserialize)]
struct Refused {
    why: String,
    /// Seconds since the Unix epoch.
    at: u64,
    /// The state of the PIN's file then: one that was written since holds another PIN.
    pin: Option<Version>,
}

/// The state of a PIN's file.
#[derive(Serialize, Deserialize, PartialEq, Eq, Clone, Copy)]
pub(super) struct Version {
    inode: u64,
    modified: i64,
    modified_nanoseconds: i64,
}

impl PinAttempts {
    /// Where it is remembered; in a directory that the daemon writes.
    pub const fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Why the PIN must not be tried, if so. A refusal that cannot be read is one.
    pub(super) fn refused(&self, pin: &PinSource) -> Option<String> {
        let refused = match self.read() {
            Ok(None) => return None,
            Ok(Some(refused)) => refused,
            Err(e) => return Some(format!("{}: {e}; remove it if the PIN is right", self.0.display())),
        };
        // A file that cannot be looked at now is not another one.
        match (refused.pin, version(pin)) {
            (Some(then), Some(now)) if then != now => None,
            _ => Some(refused.why),
        }
    }

    /// Remembers, durably, that the PIN was refused which was in its file in that state.
    pub(super) fn remember(&self, tried: Option<Version>, why: &str) -> io::Result<()> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let text = serde_json::to_vec(&Refused { why: why.to_owned(), at, pin: tried })?;
        let new = self.0.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.0)?;
        self.sync()
    }

    /// Allows one more attempt; tells what had been refused.
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

/// A credential is written anew at each start, whatever is in it: only an officer's word counts there.
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
    fn a_refused_pin_is_remembered_until_its_file_is_another_or_an_officer_says_so() {
        let directory = spp_testkit::files::temp_dir();
        let (path, file) = (directory.path().join("pin-refused"), directory.path().join("pin"));
        fs::write(&file, "1").unwrap();
        let (pin, credential) = (PinSource::File(file.clone()), PinSource::Credential(file.clone()));
        let attempts = PinAttempts::new(path.clone());
        for source in [&pin, &credential] {
            assert_eq!(attempts.refused(source), None);
            attempts.remember(version(source), "CKR_PIN_INCORRECT").unwrap();
            for again in [&attempts, &PinAttempts::new(path.clone())] {
                assert_eq!(again.refused(source).as_deref(), Some("CKR_PIN_INCORRECT"));
            }
            assert_eq!(attempts.allow().unwrap().as_deref(), Some("CKR_PIN_INCORRECT"));
            assert_eq!(attempts.allow().unwrap(), None);
        }
        attempts.remember(version(&credential), "wrong").unwrap();
        fs::remove_file(&file).unwrap();
        fs::write(&file, "2").unwrap();
        assert_eq!(attempts.refused(&credential).as_deref(), Some("wrong"));
        attempts.remember(version(&pin), "wrong").unwrap();
        fs::rename(&file, directory.path().join("elsewhere")).unwrap();
        assert_eq!(attempts.refused(&pin).as_deref(), Some("wrong"), "a file that is away is no other PIN");
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
