//! Creates output files: never overwritten, synced to disk, secrets created with mode 0600.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// A file or directory could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {cause}")]
pub struct FileError {
    path: PathBuf,
    cause: std::io::Error,
}

/// Writes a new file with mode 0644.
pub(super) fn write_new(path: &Path, content: &[u8]) -> Result<(), FileError> {
    write(path, content, 0o644)
}

/// Writes a new file with mode 0600.
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

/// Replaces a file atomically: a crash leaves the old or the new content.
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

/// Creates a directory and its parents if they do not exist.
pub(super) fn make_directory(path: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(path).map_err(|cause| FileError { path: path.to_owned(), cause })
}

/// Returns an error if the path exists.
pub(super) fn must_be_new(path: &Path) -> Result<(), FileError> {
    if path.exists() {
        let cause = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "file exists and is never overwritten");
        return Err(FileError { path: path.to_owned(), cause });
    }
    Ok(())
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}
