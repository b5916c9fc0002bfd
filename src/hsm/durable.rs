//! Making durable what a module wrote and did not sync.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Clocks of file systems are coarse.
const SLACK: Duration = Duration::from_secs(2);

/// Syncs every file and directory below that changed since then; with that, objects that were removed stay removed.
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
            // Another thread has removed it meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            synced => synced?,
        }
    }
    File::open(directory)?.sync_all()
}
