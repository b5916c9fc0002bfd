//! Files that officers' acts make: never overwritten, synced, secrets closed to others from the first byte.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A file could not be made.
#[derive(Debug, thiserror::Error)]
#[error("writing {path}: {cause}")]
pub struct FileError {
    path: PathBuf,
    cause: std::io::Error,
}

/// Writes a new file that anybody may read.
pub(super) fn write_new(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, 0o644)
}

/// Writes a new file that only its owner may read.
pub(super) fn write_new_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, 0o600)
}

fn write(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let run = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        file.sync_all()?;
        sync_parent(path)
    };
    run().map_err(|cause| FileError { path: path.to_owned(), cause })
}

/// Replaces a file in one step: a crash leaves the old or the new one.
pub(super) fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let run = || -> std::io::Result<()> {
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        sync_parent(path)
    };
    run().map_err(|cause| FileError { path: path.to_owned(), cause })
}

/// Makes a directory; one that exists is kept.
pub(super) fn make_directory(path: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(path).map_err(|cause| FileError { path: path.to_owned(), cause })
}

/// Refuses if the file is there.
pub(super) fn must_be_new(path: &Path) -> Result<(), FileError> {
    if path.exists() {
        let cause = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it exists; nothing is overwritten");
        return Err(FileError { path: path.to_owned(), cause });
    }
    Ok(())
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}
