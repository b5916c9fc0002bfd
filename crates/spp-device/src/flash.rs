//! Simulated flash in a file. A power failure during a write leaves either the old content or the new content complete.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::DeviceError;

/// Capacity in bytes.
pub(super) const CAPACITY: usize = 64 * 1024;

/// The value of an erased flash cell.
const ERASED: u8 = 0xff;

/// A device's flash.
pub struct Flash {
    path: PathBuf,
}

impl Flash {
    /// Creates a flash that is stored in this file; a missing file is an empty flash.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Reads the content; `None` if the flash is empty.
    ///
    /// # Errors
    /// If the file cannot be read, or exceeds the capacity.
    pub fn read(&self) -> Result<Option<Vec<u8>>, DeviceError> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => self.with_context("opening", opened)?,
        };
        let mut content = Vec::new();
        self.with_context("reading", file.take(CAPACITY as u64 + 1).read_to_end(&mut content))?;
        if content.len() > CAPACITY {
            return Err(DeviceError::Damaged(format!("{} exceeds the flash capacity", self.path.display())));
        }
        Ok(Some(content))
    }

    /// Replaces the content durably.
    ///
    /// # Errors
    /// If the file cannot be written; the old content then remains.
    pub fn write(&mut self, content: &[u8]) -> Result<(), DeviceError> {
        self.stage(content)?;
        self.commit()
    }

    /// Erases the flash, including leftovers of an interrupted write. Erasing an empty flash is a no-op.
    ///
    /// # Errors
    /// If a file cannot be overwritten or removed.
    pub fn wipe(&mut self) -> Result<(), DeviceError> {
        for path in [self.staging(), self.path.clone()] {
            match erase(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                erased => self.with_context("wiping", erased)?,
            }
        }
        self.sync_directory()
    }

    /// Writes the new content to a staging file. A power failure here leaves the old content; the next write overwrites the
    /// file.
    fn stage(&self, content: &[u8]) -> Result<(), DeviceError> {
        let written = File::create(self.staging()).and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        });
        self.with_context("writing", written)
    }

    /// Replaces the old content with the staging file: rename is atomic, and durable once the directory is synced.
    fn commit(&self) -> Result<(), DeviceError> {
        self.with_context("replacing", std::fs::rename(self.staging(), &self.path))?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), DeviceError> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.with_context("syncing the directory of", File::open(directory).and_then(|directory| directory.sync_all()))
    }

    fn staging(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        name.into()
    }

    fn with_context<T>(&self, operation: &'static str, result: io::Result<T>) -> Result<T, DeviceError> {
        result.map_err(|source| DeviceError::File { operation, path: self.path.clone(), source })
    }
}

fn erase(path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    let length = usize::try_from(file.metadata()?.len()).unwrap_or(CAPACITY).min(CAPACITY);
    file.write_all(&vec![ERASED; length])?;
    file.sync_all()?;
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash(directory: &tempfile::TempDir) -> Flash {
        Flash::new(directory.path().join("device.flash"))
    }

    #[test]
    fn flash_returns_last_written_content() {
        let directory = spp_test_support::files::temp_dir();
        let mut flash = flash(&directory);
        assert_eq!(flash.read().unwrap(), None);
        flash.write(b"one").unwrap();
        flash.write(b"two").unwrap();
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"two"[..]));
        flash.wipe().unwrap();
        flash.wipe().unwrap();
        assert_eq!(flash.read().unwrap(), None);
    }

    #[test]
    fn interrupted_write_leaves_old_content() {
        let directory = spp_test_support::files::temp_dir();
        let mut flash = flash(&directory);
        flash.write(b"old").unwrap();
        // Power fails between the two steps, with the staging file complete or half written.
        flash.stage(b"new").unwrap();
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"old"[..]));
        std::fs::write(flash.staging(), b"ne").unwrap();
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"old"[..]));
        flash.write(b"newer").unwrap();
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"newer"[..]));
        flash.stage(b"newest").unwrap();
        flash.wipe().unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn failed_write_names_operation_and_leaves_old_content() {
        let directory = spp_test_support::files::temp_dir();
        let mut flash = flash(&directory);
        flash.write(b"old").unwrap();
        std::fs::create_dir(flash.staging()).unwrap();
        let message = flash.write(b"new").unwrap_err().to_string();
        assert!(message.starts_with("writing") && message.contains("device.flash"), "{message}");
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"old"[..]));
    }

    #[test]
    fn file_over_capacity_rejected() {
        let directory = spp_test_support::files::temp_dir();
        let flash = flash(&directory);
        std::fs::write(&flash.path, vec![0; CAPACITY + 1]).unwrap();
        assert!(matches!(flash.read(), Err(DeviceError::Damaged(_))));
    }
}
