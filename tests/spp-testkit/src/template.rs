//! Template directories that are slow to create and quick to copy: created once, under a file lock, and copied by every test.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use sha2::{Digest as _, Sha256};

use crate::files::copy_directory;

/// Copies the template `name` to `to`. If there is none for these inputs yet, `make` fills an empty directory first, while other
/// processes wait. A template is recreated when one of its inputs (files or directories) changes, and every day, because its
/// certificates expire and a build directory may be older.
pub fn copy_template(name: &str, inputs: &[&Path], to: &Path, make: impl FnOnce(&Path)) {
    let directory = templates();
    std::fs::create_dir_all(&directory).unwrap();
    let template = directory.join(format!("{name}-{}", fingerprint(inputs)));
    let lock = File::options().create(true).append(true).open(directory.join("lock")).unwrap();
    lock.lock_shared().unwrap();
    if !template.exists() {
        lock.unlock().unwrap();
        lock.lock().unwrap();
        if !template.exists() {
            remove_old(&directory, name);
            let new = directory.join(format!("{name}-new"));
            std::fs::create_dir(&new).unwrap();
            make(&new);
            std::fs::rename(&new, &template).unwrap();
        }
    }
    copy_directory(&template, to);
}

/// The template directory beside the build, so that `cargo clean` removes it.
fn templates() -> PathBuf {
    std::env::current_exe().unwrap().parent().expect("a test is in a directory").join("spp-testkit-templates")
}

/// Removes templates of earlier days and builds, and unfinished ones.
fn remove_old(directory: &Path, name: &str) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(name) {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }
}

/// A fingerprint of the day and of every input file's path, size and modification time.
fn fingerprint(inputs: &[&Path]) -> String {
    let day = UNIX_EPOCH.elapsed().expect("the clock is after 1970").as_secs() / 86_400;
    let mut hash = Sha256::new_with_prefix(day.to_be_bytes());
    inputs.iter().for_each(|input| add(&mut hash, input));
    let digest = hash.finalize();
    digest[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

fn add(hash: &mut Sha256, path: &Path) {
    let metadata = std::fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    hash.update(path.as_os_str().as_encoded_bytes());
    if metadata.is_dir() {
        let mut entries: Vec<_> = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| add(hash, entry));
    } else {
        hash.update(format!("{} {:?}", metadata.len(), metadata.modified().unwrap()));
    }
}
