//! Syncs files that a PKCS#11 module wrote without syncing them.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Tolerance for coarse file system timestamps.
const SLACK: Duration = Duration::from_secs(2);

/// Syncs every directory below `directory`, and every file changed after `since`. This also makes removed files stay removed.
pub(super) fn sync_changed(directory: &Path, since: SystemTime) -> io::Result<()> {
    let since = since.checked_sub(SLACK).unwrap_or(SystemTime::UNIX_EPOCH);
    sync_below(directory, since)
}

fn sync_below(directory: &Path, since: SystemTime) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            sync_below(&path, since)?;
            continue;
        }
        let synced = || -> io::Result<()> {
            if entry.metadata()?.modified()? >= since { File::open(&path)?.sync_all() } else { Ok(()) }
        };
        match synced() {
            // Another thread removed the file.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            synced => synced?,
        }
    }
    File::open(directory)?.sync_all()
}
