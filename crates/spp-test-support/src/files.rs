//! Files and directories of tests.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// Creates a directory, in memory (`/dev/shm`) if available, because hundreds of tests that sync to one disk slow each other
/// down. Data written by a killed process survives there as on a disk. `SPP_TEST_DIR` selects a directory on a real disk, as
/// `make soak` does.
pub fn temp_dir() -> TempDir {
    let parent = std::env::var_os("SPP_TEST_DIR").map_or_else(in_memory, PathBuf::from);
    tempfile::tempdir_in(&parent).unwrap_or_else(|e| panic!("{}: {e}", parent.display()))
}

fn in_memory() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() }
}

/// Writes a file that only its owner may read, as PINs and keys must be.
pub fn write_private(path: &Path, content: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Copies a directory recursively, including modes. Existing files at `to` are overwritten; other files there stay.
pub fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    std::fs::set_permissions(to, std::fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}
