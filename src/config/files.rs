//! Reading files that people name in configuration.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Why a file with a secret in it was refused. Never says what is in it.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// It cannot be read.
    #[error("{path}: {cause}")]
    Unreadable {
        /// Which.
        path: String,
        /// Why.
        cause: std::io::Error,
    },
    /// Others may read it.
    #[error("{path} may be read by others (mode {mode:04o}): chmod 0400 {path}")]
    Open {
        /// Which.
        path: String,
        /// Its mode.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("{path} belongs to user {owner}, not to the user who runs this: chown it")]
    Foreign {
        /// Which.
        path: String,
        /// Its owner.
        owner: u32,
    },
}

/// Opens a file that only its owner, who runs this process or is root, may read.
pub fn open_private(path: &Path) -> Result<File, PrivateFileError> {
    let name = path.display().to_string();
    let unreadable = |cause| PrivateFileError::Unreadable { path: name.clone(), cause };
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if meta.mode() & 0o077 != 0 {
        return Err(PrivateFileError::Open { path: name, mode: meta.mode() & 0o7777 });
    }
    let me = rustix::process::geteuid().as_raw();
    if meta.uid() != me && meta.uid() != 0 {
        return Err(PrivateFileError::Foreign { path: name, owner: meta.uid() });
    }
    Ok(file)
}
