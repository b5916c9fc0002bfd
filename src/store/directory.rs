//! The directory of a store: its marker and lock, the room on its disk, and the reserve file.

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

/// Free bytes that are never used up: sled needs about this much to open again (a segment, a snapshot).
pub(crate) const LAST_ROOM: u64 = 8 << 20;

/// How long the lock is awaited: after a kill -9 the kernel may hold it for a moment.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const ROOM_IS_FRESH: Duration = Duration::from_secs(1);
const MARKER: &str = "store.toml";
const RESERVE: &str = "reserve";

/// The calls to the operating system that decide about durability; tests put their own there.
pub(crate) trait Fs: Send + Sync {
    /// Called before a batch is given to sled.
    fn before_apply(&self) -> io::Result<()>;
    /// Makes the data of a file durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Free bytes where a directory is.
    fn free(&self, dir: &Path) -> io::Result<u64>;
}

/// The real calls.
pub(crate) struct System;

impl Fs for System {
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
    /// Free bytes below which new devices are refused. Give the public database less than the state store if both are on one
    /// disk: then what was reserved can still be published when nothing new is admitted.
    pub floor_bytes: u64,
    /// Bytes of the file that is given up when the disk is so full that sled cannot open; 0 for none.
    pub reserve_bytes: u64,
    /// Bytes of sled's page cache.
    pub cache_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { floor_bytes: 256 << 20, reserve_bytes: 64 << 20, cache_bytes: 16 << 20 }
    }
}

/// Which store a directory is.
pub(crate) struct StoreKind {
    /// How errors call it.
    pub(crate) name: &'static str,
    /// How its marker calls it.
    pub(crate) marker: &'static str,
    /// The form of what is in it; another one is refused.
    pub(crate) format: u32,
}

/// What `store.toml` says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Marker {
    kind: String,
    format: u32,
    created: u64,
}

/// A store's directory, locked for this process as long as the value lives.
pub(crate) struct StoreDir {
    pub(crate) dir: PathBuf,
    pub(crate) options: StoreOptions,
    pub(crate) door: Arc<dyn Fs>,
    kind: &'static StoreKind,
    room: Mutex<Option<(Instant, u64)>>,
    /// Set when the file system cannot make a reserve, so that not every commit tries.
    no_reserve: AtomicBool,
    _lock: File,
}

impl StoreDir {
    /// Makes the directory. The store in it does not count before [`Self::finish`].
    pub(crate) fn make(
        kind: &'static StoreKind,
        dir: &Path,
        options: &StoreOptions,
        door: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        if fs::symlink_metadata(dir).is_ok() {
            return Err(place(format!(
                "{}: {} exists already and is never overwritten; choose another place, or remove it if an interrupted \
                 sppctl init left it without {MARKER}",
                kind.name,
                dir.display()
            )));
        }
        let made = make_dir(dir).and_then(|()| lock_file(dir, true));
        let lock = made.map_err(|e| place(format!("{}: cannot make {}: {e}", kind.name, dir.display())))?;
        let place = Self::new(kind, dir, options, door, lock);
        place.lock()?;
        Ok(place)
    }

    /// Takes over an existing store. Never makes one: a store that is not where it should be is a lost disk or a wrong path,
    /// and an empty one in its stead would hand out taken identities again.
    pub(crate) fn take(
        kind: &'static StoreKind,
        dir: &Path,
        options: &StoreOptions,
        door: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let lock = lock_file(dir, false).map_err(|e| {
            place(format!(
                "{}: there is none at {} ({e}); if it was never made, make it with sppctl init; if it was, its disk is \
                 missing",
                kind.name,
                dir.display()
            ))
        })?;
        let place = Self::new(kind, dir, options, door, lock);
        place.lock()?;
        place.check_marker()?;
        Ok(place)
    }

    fn new(kind: &'static StoreKind, dir: &Path, options: &StoreOptions, door: Arc<dyn Fs>, lock: File) -> Self {
        let (dir, options) = (dir.to_owned(), options.clone());
        Self { dir, options, door, kind, room: Mutex::default(), no_reserve: AtomicBool::new(false), _lock: lock }
    }

    /// Writes the marker, which makes the directory a store. All else is durable by then: a crash before leaves a
    /// directory without (or with an empty) marker, which no daemon opens.
    pub(crate) fn finish(&self) -> Result<(), StoreError> {
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

    /// Free bytes, at most a second old.
    pub(crate) fn free(&self) -> Result<u64, StoreError> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, free)) = *room
            && when.elapsed() < ROOM_IS_FRESH
        {
            return Ok(free);
        }
        let free = self.door.free(&self.dir).map_err(|e| self.failed("asking for the free room", e))?;
        *room = Some((Instant::now(), free));
        Ok(free)
    }

    /// Whether room for a write that needs `floor` free bytes is there.
    pub(crate) fn admit(&self, floor: u64) -> Result<(), StoreError> {
        match self.free()? {
            free if free < floor => Err(StoreError::Full { store: self.kind.name, free, floor }),
            _ => Ok(()),
        }
    }

    /// Makes the reserve file if it is not there and leaves at least the floor. A store without one still works.
    pub(crate) fn keep_reserve(&self) {
        let (path, bytes) = (self.dir.join(RESERVE), self.options.reserve_bytes);
        if bytes == 0
            || self.no_reserve.load(Relaxed)
            || path.exists()
            || self.admit(self.options.floor_bytes.saturating_add(bytes)).is_err()
        {
            return;
        }
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|file| {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
            file.sync_all()
        });
        if let Err(error) = made {
            tracing::warn!(store = self.kind.name, dir = %self.dir.display(), %error, "no reserve file could be made");
            self.no_reserve.store(true, Relaxed);
            // A half-made one reserves nothing. If it cannot go either, the warning above tells of it.
            let _ = fs::remove_file(&path);
        }
    }

    /// Gives the reserve up; whether there was one.
    pub(crate) fn give_up_reserve(&self) -> bool {
        let given = fs::remove_file(self.dir.join(RESERVE)).is_ok();
        if given {
            tracing::warn!(
                store = self.kind.name,
                dir = %self.dir.display(),
                "the disk is full: the reserve file is given up so that the store can be opened; make room"
            );
            *self.room.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        given
    }

    /// An error that names this store.
    pub(crate) fn failed(&self, doing: &'static str, cause: impl ToString) -> StoreError {
        StoreError::Failed { store: self.kind.name, doing, cause: cause.to_string() }
    }

    /// One process per store. sled's own lock comes later, and what is tidied up before opening needs one already.
    fn lock(&self) -> Result<(), StoreError> {
        let begun = Instant::now();
        loop {
            match rustix::fs::flock(&self._lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => {
                    return Err(place(format!(
                        "{}: {} is in use by another process ({error}); only one daemon may use it, stop the other one",
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
                cause: format!("{cause}; an interrupted sppctl init leaves it so"),
            })?;
        if marker.kind != self.kind.marker {
            let (dir, found, wanted) = (self.dir.display(), marker.kind, self.kind.marker);
            return Err(place(format!("{dir} is a store of kind {found:?}, {wanted:?} is needed here")));
        }
        if marker.format != self.kind.format {
            let (dir, found, known) = (self.dir.display(), marker.format, self.kind.format);
            return Err(place(format!(
                "{dir} has format {found}, this version reads {known}; use the matching version"
            )));
        }
        Ok(())
    }
}

/// Makes a directory and those above it that are missing, each durable in the one above: without that the whole store may be
/// gone after a power loss.
fn make_dir(dir: &Path) -> io::Result<()> {
    let parent = match dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    if !parent.exists() {
        make_dir(parent)?;
    }
    DirBuilder::new().mode(0o700).create(dir)?;
    sync_dir(parent)
}

/// Makes a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn lock_file(dir: &Path, create: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(create).mode(0o600).open(dir.join(MARKER))
}

fn place(message: String) -> StoreError {
    StoreError::Directory(message)
}
