//! The directory of a store: marker file, lock, free disk space and reserve file.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, FlockOperation};
use serde::{Deserialize, Serialize};

use super::StoreError;

/// Free bytes that no write may use: sled needs about this much to reopen (a segment and a snapshot).
pub(crate) const MIN_FREE_BYTES: u64 = 8 << 20;

/// Maximum wait for the lock. After `kill -9` the kernel may hold it for a moment.
pub(crate) const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
const FREE_SPACE_TTL: Duration = Duration::from_secs(1);
const MARKER: &str = "store.toml";
const RESERVE: &str = "reserve";

/// The operating system calls that affect durability. Tests replace them to inject faults.
pub(crate) trait Fs: Send + Sync {
    /// Called before a batch is applied to sled.
    fn before_apply(&self) -> io::Result<()>;
    /// Makes the data of a file durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Free bytes on the disk of a directory.
    fn free(&self, dir: &Path) -> io::Result<u64>;
}

/// The operating system's implementation.
pub(crate) struct OsFs;

impl Fs for OsFs {
    fn before_apply(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn free(&self, dir: &Path) -> io::Result<u64> {
        let disk = rustix::fs::statvfs(dir)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

/// How an embedded store uses its disk and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Free bytes below which new devices are refused. If the state store and the public database share a disk, give the public
    /// database a lower floor, so that reserved sessions can still be published when no new device is admitted.
    pub floor_bytes: u64,
    /// Size of the reserve file, which is deleted when the disk is too full for sled to open; 0 for none.
    pub reserve_bytes: u64,
    /// Size of sled's page cache in bytes.
    pub cache_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { floor_bytes: 256 << 20, reserve_bytes: 64 << 20, cache_bytes: 16 << 20 }
    }
}

/// The type of store in a directory.
pub(crate) struct StoreKind {
    /// Name in error messages.
    pub(crate) name: &'static str,
    /// Name in the marker file.
    pub(crate) marker: &'static str,
    /// Storage format version. Other versions are refused.
    pub(crate) format: u32,
}

/// The content of `store.toml`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    kind: String,
    format: u32,
    created: u64,
}

/// A store's directory, locked for this process while the value exists.
pub(crate) struct StoreDir {
    pub(crate) dir: PathBuf,
    pub(crate) options: StoreOptions,
    pub(crate) fs: Arc<dyn Fs>,
    kind: &'static StoreKind,
    /// Cached free bytes.
    free_space: Mutex<Option<(Instant, u64)>>,
    /// Set when the reserve file cannot be created, so that later commits do not retry.
    reserve_failed: AtomicBool,
    _lock: File,
}

impl StoreDir {
    /// Creates the directory. It is not a valid store until [`Self::write_marker`].
    pub(crate) fn create(
        kind: &'static StoreKind,
        dir: &Path,
        options: &StoreOptions,
        fs: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        if fs::symlink_metadata(dir).is_ok() {
            return Err(directory_error(format!(
                "{}: {} exists and is never overwritten; choose another directory, or delete it if an interrupted sppctl \
                 init left it without {MARKER}",
                kind.name,
                dir.display()
            )));
        }
        let lock = create_dir(dir).and_then(|()| lock_file(dir, true));
        let lock = lock.map_err(|e| directory_error(format!("{}: cannot create {}: {e}", kind.name, dir.display())))?;
        let store_dir = Self::new(kind, dir, options, fs, lock);
        store_dir.lock()?;
        Ok(store_dir)
    }

    /// Opens an existing store. Never creates one: a missing store means a missing disk or a wrong path, and an empty store in
    /// its place would allocate used identities again.
    pub(crate) fn open(
        kind: &'static StoreKind,
        dir: &Path,
        options: &StoreOptions,
        fs: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let lock = lock_file(dir, false).map_err(|e| {
            directory_error(format!(
                "{}: not found at {} ({e}); if the store existed before, mount its disk; create a first one with sppctl init",
                kind.name,
                dir.display()
            ))
        })?;
        let store_dir = Self::new(kind, dir, options, fs, lock);
        store_dir.lock()?;
        store_dir.check_marker()?;
        Ok(store_dir)
    }

    fn new(kind: &'static StoreKind, dir: &Path, options: &StoreOptions, fs: Arc<dyn Fs>, lock: File) -> Self {
        let (dir, options) = (dir.to_owned(), options.clone());
        let (free_space, reserve_failed) = (Mutex::default(), AtomicBool::new(false));
        Self { dir, options, fs, kind, free_space, reserve_failed, _lock: lock }
    }

    /// Writes the marker, which makes the directory a valid store. All other files must be durable by then: an earlier crash
    /// leaves a directory with no marker or an empty one, which no daemon opens.
    pub(crate) fn write_marker(&self) -> Result<(), StoreError> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        let marker = Marker { kind: self.kind.marker.into(), format: self.kind.format, created };
        let text = toml::to_string(&marker).map_err(|e| self.failed("writing the marker", e))?;
        let write = || {
            let mut file = OpenOptions::new().write(true).open(self.dir.join(MARKER))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            sync_dir(&self.dir)
        };
        write().map_err(|e| self.failed("writing the marker", e))
    }

    /// Free bytes on the disk, at most one second old.
    pub(crate) fn free(&self) -> Result<u64, StoreError> {
        let mut cached = self.free_space.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, free)) = *cached
            && when.elapsed() < FREE_SPACE_TTL
        {
            return Ok(free);
        }
        let free = self.fs.free(&self.dir).map_err(|e| self.failed("reading the free disk space", e))?;
        *cached = Some((Instant::now(), free));
        Ok(free)
    }

    /// Fails with `Full` if fewer than `floor` bytes are free.
    pub(crate) fn admit(&self, floor: u64) -> Result<(), StoreError> {
        match self.free()? {
            free if free < floor => Err(StoreError::Full { store: self.kind.name, free, floor }),
            _ => Ok(()),
        }
    }

    /// Creates the reserve file if it is missing and leaves at least the floor free. A store works without one.
    pub(crate) fn ensure_reserve(&self) {
        let (path, bytes) = (self.dir.join(RESERVE), self.options.reserve_bytes);
        if bytes == 0
            || self.reserve_failed.load(Relaxed)
            || path.exists()
            || self.admit(self.options.floor_bytes.saturating_add(bytes)).is_err()
        {
            return;
        }
        let created = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|file| {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
            file.sync_all()
        });
        if let Err(error) = created {
            tracing::warn!(store = self.kind.name, dir = %self.dir.display(), %error, "cannot create reserve file");
            self.reserve_failed.store(true, Relaxed);
            // A partial file reserves nothing. If removing it fails too, the warning above covers it.
            let _ = fs::remove_file(&path);
        }
    }

    /// Deletes the reserve file. Returns whether it existed.
    pub(crate) fn release_reserve(&self) -> bool {
        let released = fs::remove_file(self.dir.join(RESERVE)).is_ok();
        if released {
            tracing::warn!(
                store = self.kind.name,
                dir = %self.dir.display(),
                "disk full: deleted the reserve file to open the store; free disk space"
            );
            *self.free_space.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        released
    }

    /// An error that names this store.
    pub(crate) fn failed(&self, operation: &'static str, cause: impl ToString) -> StoreError {
        StoreError::Failed { store: self.kind.name, operation, cause: cause.to_string() }
    }

    /// Locks the store for this process. sled locks later, but the cleanup before opening needs the lock already.
    fn lock(&self) -> Result<(), StoreError> {
        let start = Instant::now();
        loop {
            match rustix::fs::flock(&self._lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < LOCK_TIMEOUT => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => {
                    return Err(directory_error(format!(
                        "{}: {} is in use by another process ({error}); stop the other daemon",
                        self.kind.name,
                        self.dir.display()
                    )));
                }
            }
        }
    }

    fn check_marker(&self) -> Result<(), StoreError> {
        let path = self.dir.join(MARKER);
        let marker: Marker = fs::read_to_string(&path)
            .map_err(|e| e.to_string())
            .and_then(|text| toml::from_str(&text).map_err(|e| e.to_string()))
            .map_err(|cause| StoreError::Damaged {
                store: self.kind.name,
                what: path.display().to_string(),
                cause: format!("{cause}; an interrupted sppctl init leaves it so; if the store was ever used, keep it and restore {MARKER} from a copy"),
            })?;
        if marker.kind != self.kind.marker {
            let (dir, found, expected) = (self.dir.display(), marker.kind, self.kind.marker);
            return Err(directory_error(format!("{dir} is a store of kind {found:?}; expected {expected:?}")));
        }
        if marker.format != self.kind.format {
            let (dir, found, supported) = (self.dir.display(), marker.format, self.kind.format);
            return Err(directory_error(format!(
                "{dir} has format {found}; this version supports {supported}; use the matching version"
            )));
        }
        Ok(())
    }
}

/// Creates a directory and its missing parents and syncs each parent. Without the syncs a power loss may remove the whole store.
fn create_dir(dir: &Path) -> io::Result<()> {
    let parent = match dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.exists() {
        create_dir(parent)?;
    }
    DirBuilder::new().mode(0o700).create(dir)?;
    sync_dir(parent)
}

/// Syncs the entries of a directory.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn lock_file(dir: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(create).mode(0o600).open(dir.join(MARKER))
}

fn directory_error(message: String) -> StoreError {
    StoreError::Directory(message)
}
