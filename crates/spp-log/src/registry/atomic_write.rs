//! Writes files atomically.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a file that is never changed. Writing the same content again, after a crash, succeeds.
pub fn write_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    match fs::read(path) {
        // The process that wrote it may have been killed before the sync.
        Ok(found) if found == bytes => {
            File::open(path)?.sync_all()?;
            sync_dir(path.parent().unwrap_or(Path::new(".")))
        }
        Ok(_) => {
            let problem = format!(
                "{} exists with different content; it is never overwritten: compare it with a mirror (sppctl registry verify)",
                path.display()
            );
            Err(io::Error::new(io::ErrorKind::AlreadyExists, problem))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => write_new(path, bytes),
        Err(error) => Err(error),
    }
}

/// Writes a file atomically: writes and syncs a temporary file, renames it and syncs the directory.
pub fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    create_directories(directory)?;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let staged = PathBuf::from(name);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&staged)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    sync_dir(directory)
}

fn create_directories(directory: &Path) -> io::Result<()> {
    if directory.as_os_str().is_empty() || directory.is_dir() {
        return Ok(());
    }
    let parent = directory.parent().unwrap_or(Path::new("."));
    create_directories(parent)?;
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_dir(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

fn sync_dir(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
