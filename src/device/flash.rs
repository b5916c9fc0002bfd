//! The flash, as a file. A power cut during a write leaves the old content or the new one, whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::DeviceError;

/// Most bytes a flash holds.
pub(super) const CAPACITY: usize = 64 * 1024;

/// What an erased flash cell reads as.
const ERASED: u8 = 0xff;

/// A device's flash.
pub struct Flash {
    path: PathBuf,
}

impl Flash {
    /// The flash in this file; no file is an empty flash.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The content; `None` if the flash is empty.
    ///
    /// # Errors
    /// If the file cannot be read, or is larger than a flash.
    pub fn read(&self) -> Result<Option<Vec<u8>>, DeviceError> {
        let file = match File::open(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => self.done("opening", opened)?,
        };
        let mut content = Vec::new();
        self.done("reading", file.take(CAPACITY as u64 + 1).read_to_end(&mut content))?;
        if content.len() > CAPACITY {
            return Err(DeviceError::Damaged(format!("{} is larger than a flash", self.path.display())));
        }
        Ok(Some(content))
    }

    /// Replaces the content. It is on the disk when this returns.
    ///
    /// # Errors
    /// If the file cannot be written; the old content is still there then.
    pub fn write(&mut self, content: &[u8]) -> Result<(), DeviceError> {
        self.stage(content)?;
        self.commit()
    }

    /// Empties the flash, the remains of an interrupted write included. An empty flash stays empty.
    ///
    /// # Errors
    /// If a file cannot be overwritten or removed.
    pub fn wipe(&mut self) -> Result<(), DeviceError> {
        for path in [self.staging(), self.path.clone()] {
            match erase(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                erased => self.done("wiping", erased)?,
            }
        }
        self.sync_directory()
    }

    /// Writes the new content beside the old one. A power cut here leaves the old one; the next write overwrites the rest.
    fn stage(&self, content: &[u8]) -> Result<(), DeviceError> {
        let written = File::create(self.staging()).and_then(|mut file| {
            file.write_all(content)?;
            file.sync_all()
        });
        self.done("writing", written)
    }

    /// Puts the new content in the place of the old one: rename is atomic, and durable when the directory is synced.
    fn commit(&self) -> Result<(), DeviceError> {
        self.done("replacing", std::fs::rename(self.staging(), &self.path))?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> Result<(), DeviceError> {
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.done("syncing the directory of", File::open(directory).and_then(|directory| directory.sync_all()))
    }

    fn staging(&self) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        name.into()
    }

    fn done<T>(&self, doing: &'static str, result: io::Result<T>) -> Result<T, DeviceError> {
        result.map_err(|source| DeviceError::File { doing, path: self.path.clone(), source })
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
        Flash::at(directory.path().join("device.flash"))
    }

    #[test]
    fn a_flash_holds_what_was_written_last() {
        let directory = spp_testkit::files::temp_dir();
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
    fn an_interrupted_write_leaves_the_old_content() {
        let directory = spp_testkit::files::temp_dir();
        let mut flash = flash(&directory);
        flash.write(b"old").unwrap();
        // The power goes between the two steps, with the new content complete or half written.
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
    fn a_failed_write_says_what_failed_and_leaves_the_old_content() {
        let directory = spp_testkit::files::temp_dir();
        let mut flash = flash(&directory);
        flash.write(b"old").unwrap();
        std::fs::create_dir(flash.staging()).unwrap();
        let refused = flash.write(b"new").unwrap_err().to_string();
        assert!(refused.starts_with("writing") && refused.contains("device.flash"), "{refused}");
        assert_eq!(flash.read().unwrap().as_deref(), Some(&b"old"[..]));
    }

    #[test]
    fn no_more_than_a_flash_is_read() {
        let directory = spp_testkit::files::temp_dir();
        let flash = flash(&directory);
        std::fs::write(&flash.path, vec![0; CAPACITY + 1]).unwrap();
        assert!(matches!(flash.read(), Err(DeviceError::Damaged(_))));
    }
}
