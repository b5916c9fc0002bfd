//! Opens files with secrets that a configuration names.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// A refused file with a secret. The error never contains the content.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The file cannot be read.
    #[error("{path}: {cause}")]
    Unreadable {
        /// The file.
        path: String,
        /// The system error.
        cause: std::io::Error,
    },
    /// Other users may read the file.
    #[error("{path} is readable by other users (mode {mode:04o}): run chmod 0400 {path}")]
    Open {
        /// The file.
        path: String,
        /// Mode of the file.
        mode: u32,
    },
    /// The file belongs to another user.
    #[error("{path} belongs to user {owner}, not to the user of this process or root: change its owner with chown")]
    Foreign {
        /// The file.
        path: String,
        /// User ID of the owner.
        owner: u32,
    },
}

/// Opens a file that only its owner may access. The owner must be the user of this process or root.
pub fn open_private(path: &Path) -> Result<File, PrivateFileError> {
    let name = path.display().to_string();
    let unreadable = |cause| PrivateFileError::Unreadable { path: name.clone(), cause };
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if meta.mode() & 0o077 != 0 {
        return Err(PrivateFileError::Open { path: name, mode: meta.mode() & 0o7777 });
    }
    let user = rustix::process::geteuid().as_raw();
    if meta.uid() != user && meta.uid() != 0 {
        return Err(PrivateFileError::Foreign { path: name, owner: meta.uid() });
    }
    Ok(file)
}
