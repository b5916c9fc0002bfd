//! Backs up files that a module rewrites in place.
//!
//! A kill or a power loss during a rewrite leaves a damaged file. The copy is restored before the module is loaded again;
//! otherwise the token and every key on it would be lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Backs up one file in each subdirectory of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFileBackup {
    directory: PathBuf,
    name: String,
}

impl TokenFileBackup {
    /// Parses `DIRECTORY/*/NAME`; `None` for any other form.
    pub(super) fn parse(pattern: &str) -> Option<Self> {
        let (directory, name) = pattern.split_once("/*/")?;
        let is_literal = |text: &str| !text.is_empty() && !text.contains('*');
        (is_literal(directory) && is_literal(name) && !name.contains('/'))
            .then(|| Self { directory: directory.into(), name: name.to_owned() })
    }

    /// Copies each intact file, and restores each damaged one. This is safe while a module runs: a file caught during a rewrite
    /// is replaced by its previous content. Does nothing if the directory does not exist.
    pub(super) fn restore(&self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let file = entry?.path().join(&self.name);
            let copy = file.with_file_name(format!("{}.kept", self.name));
            let (content, copied) = (read(&file)?, read(&copy)?);
            match (content.filter(is_intact), copied.filter(is_intact)) {
                (Some(content), copied) if copied.as_ref() != Some(&content) => replace(&copy, &content)?,
                (None, Some(copied)) => {
                    replace(&file, &copied)?;
                    let file = file.display();
                    tracing::warn!(%file, "token file damaged, restored from its backup");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// An interrupted rewrite leaves an empty file; a power loss may leave zeros.
#[expect(clippy::ptr_arg, reason = "it filters options of vectors")]
fn is_intact(content: &Vec<u8>) -> bool {
    content.iter().any(|byte| *byte != 0)
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        content => content.map(Some),
    }
}

/// Replaces a file atomically: after a crash the old or the new content is there.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_file_is_restored() {
        let directory = spp_testkit::files::temp_dir();
        let backup = TokenFileBackup::parse(&format!("{}/*/token.object", directory.path().display())).unwrap();
        let file = directory.path().join("one/token.object");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(directory.path().join("not-a-directory"), b"").unwrap();
        backup.restore().unwrap();
        for content in [&b"first"[..], b"second, after another PIN was set"] {
            fs::write(&file, content).unwrap();
            backup.restore().unwrap();
            for damaged in [&b""[..], &[0; 320]] {
                fs::write(&file, damaged).unwrap();
                backup.restore().unwrap();
                assert_eq!(fs::read(&file).unwrap(), content);
            }
            fs::remove_file(&file).unwrap();
            backup.restore().unwrap();
            assert_eq!(fs::read(&file).unwrap(), content);
        }
    }

    #[test]
    fn damaged_file_without_backup_is_unchanged() {
        let directory = spp_testkit::files::temp_dir();
        let file = directory.path().join("one/token.object");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, b"").unwrap();
        let backup = TokenFileBackup::parse(&format!("{}/*/token.object", directory.path().display())).unwrap();
        backup.restore().unwrap();
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
        TokenFileBackup::parse("/nowhere/*/x").unwrap().restore().unwrap();
    }

    #[test]
    fn malformed_pattern_is_refused() {
        for pattern in ["", "x", "/a/b", "/a/*", "/*/x", "/a/*/", "/a/*/b/c", "/a/*/*", "/a*/*/b"] {
            assert_eq!(TokenFileBackup::parse(pattern), None, "{pattern}");
        }
    }
}
