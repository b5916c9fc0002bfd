//! Files that a module rewrites in place, kept whole beside them. What a kill or a power cut in the middle of a rewrite leaves
//! is put back before the module is loaded again; without that, a token and every key on it would be gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One file in each directory below a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenFileBackup {
    directory: PathBuf,
    name: String,
}

impl TokenFileBackup {
    /// Reads `DIRECTORY/*/NAME`; `None` if it is not of this form.
    pub(super) fn parse(pattern: &str) -> Option<Self> {
        let (directory, name) = pattern.split_once("/*/")?;
        let plain = |text: &str| !text.is_empty() && !text.contains('*');
        (plain(directory) && plain(name) && !name.contains('/'))
            .then(|| Self { directory: directory.into(), name: name.to_owned() })
    }

    /// Keeps a copy of each file that is whole, and puts back each that is not. While a module is at work this is safe too: a
    /// file that it rewrites at this moment is replaced by what it was before. Nothing is done where there is no directory yet.
    pub(super) fn look(&self) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let file = entry?.path().join(&self.name);
            let kept = file.with_file_name(format!("{}.kept", self.name));
            let (content, before) = (read(&file)?, read(&kept)?);
            match (content.filter(is_whole), before.filter(is_whole)) {
                (Some(content), before) if before.as_ref() != Some(&content) => replace(&kept, &content)?,
                (None, Some(before)) => {
                    replace(&file, &before)?;
                    let file = file.display();
                    tracing::warn!(%file, "the module had left it half-written; its kept copy was put back");
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A rewrite that was cut off leaves nothing; one that a power cut met may leave zeros.
#[expect(clippy::ptr_arg, reason = "it filters options of vectors")]
fn is_whole(content: &Vec<u8>) -> bool {
    content.iter().any(|byte| *byte != 0)
}

fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        content => content.map(Some),
    }
}

/// In one step: a crash leaves the old or the new one.
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
    fn a_file_that_was_left_half_written_is_put_back() {
        let directory = spp_testkit::files::temp_dir();
        let guard = TokenFileBackup::parse(&format!("{}/*/token.object", directory.path().display())).unwrap();
        let file = directory.path().join("one/token.object");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(directory.path().join("not-a-directory"), b"").unwrap();
        guard.look().unwrap();
        for content in [&b"first"[..], b"second, after another PIN was set"] {
            fs::write(&file, content).unwrap();
            guard.look().unwrap();
            for damaged in [&b""[..], &[0; 320]] {
                fs::write(&file, damaged).unwrap();
                guard.look().unwrap();
                assert_eq!(fs::read(&file).unwrap(), content);
            }
            fs::remove_file(&file).unwrap();
            guard.look().unwrap();
            assert_eq!(fs::read(&file).unwrap(), content);
        }
    }

    #[test]
    fn what_was_never_whole_is_left_alone() {
        let directory = spp_testkit::files::temp_dir();
        let file = directory.path().join("one/token.object");
        fs::create_dir(file.parent().unwrap()).unwrap();
        fs::write(&file, b"").unwrap();
        let guard = TokenFileBackup::parse(&format!("{}/*/token.object", directory.path().display())).unwrap();
        guard.look().unwrap();
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
        TokenFileBackup::parse("/nowhere/*/x").unwrap().look().unwrap();
    }

    #[test]
    fn only_one_form_of_pattern_is_read() {
        for pattern in ["", "x", "/a/b", "/a/*", "/*/x", "/a/*/", "/a/*/b/c", "/a/*/*", "/a*/*/b"] {
            assert_eq!(TokenFileBackup::parse(pattern), None, "{pattern}");
        }
    }
}
