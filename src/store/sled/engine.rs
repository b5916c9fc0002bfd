//! Opens a sled database and makes batches durable.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::Advice;

use super::blobs::Blobs;
use super::directory::{LOCK_TIMEOUT, MIN_FREE_BYTES, StoreDir, StoreKind, sync_dir};
use super::view::{Changes, View};
use crate::store::StoreError;

/// The type of a database, with its initial content and its check.
pub(super) struct DatabaseKind {
    /// Store type and format.
    pub(super) store: StoreKind,
    /// Writes the initial content of a new store.
    pub(super) init: fn(&mut View<'_>) -> Result<(), StoreError>,
    /// Checks that the required content is readable.
    pub(super) check: fn(&View<'_>) -> Result<(), StoreError>,
}

/// An open database. Only the committer thread uses it.
pub(super) struct Engine {
    store_dir: Arc<StoreDir>,
    /// A separate handle of sled's file, for the fsync that sled omits.
    file: File,
    waker: Waker,
    blobs: Blobs,
    db: sled::Db,
}

impl Engine {
    /// Creates the database of a new store. It and its directory entries are durable when this returns.
    pub(super) fn init(store_dir: Arc<StoreDir>, kind: &DatabaseKind) -> Result<(), StoreError> {
        let engine = Self::open_db(store_dir)?;
        let mut view = engine.view(kind.store.name);
        (kind.init)(&mut view)?;
        view.accept();
        let changes = view.into_changes();
        engine.commit(changes).map_err(|cause| engine.store_dir.failed("creating the database", cause))?;
        let store_dir = engine.store_dir.clone();
        drop(engine);
        sync_files(&store_dir).map_err(|e| store_dir.failed("syncing the new database", e))
    }

    /// Opens the database and checks that its required content is readable.
    pub(super) fn open(store_dir: &Arc<StoreDir>, kind: &DatabaseKind) -> Result<Self, StoreError> {
        let engine = match Self::open_db(store_dir.clone()) {
            // sled needs space for a segment and a snapshot to open. The reserve file provides it.
            Err(error) if store_dir.admit(MIN_FREE_BYTES).is_err() && store_dir.release_reserve() => {
                tracing::warn!(store = kind.store.name, %error, "opening failed; retrying after deleting the reserve file");
                Self::open_db(store_dir.clone())?
            }
            opened => opened?,
        };
        (kind.check)(&engine.view(kind.store.name))?;
        store_dir.ensure_reserve();
        Ok(engine)
    }

    /// The view with which a batch starts.
    pub(super) fn view(&self, store: &'static str) -> View<'_> {
        View::new(&self.db, &self.store_dir, &self.blobs, store)
    }

    /// Makes a batch durable, all or nothing. After an error the outcome is unknown.
    pub(super) fn commit(&self, changes: Changes) -> Result<(), String> {
        let _guard = self.waker.watch();
        self.store_dir.fs.before_apply().map_err(|e| e.to_string())?;
        // Wrapped keys first: the database must never refer to one that a power loss can still lose.
        self.blobs.write(changes.blobs).map_err(|e| format!("writing a batch's file: {e}"))?;
        if changes.writes.is_empty() {
            return Ok(());
        }
        let mut batch = sled::Batch::default();
        for (key, value) in changes.writes {
            match value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        // After a crash between here and the sync, recovery finds all of the batch or none of it: the batch is on one tree, and
        // sled recovers a batch only if its last entry is in the log. No caller has an answer yet.
        self.db.apply_batch(batch).map_err(|e| format!("applying a batch: {e}"))?;
        // From here on the batch survives `kill -9`, because the kernel has it. A power loss may still lose all or part of it;
        // recovery truncates the torn tail of the log. A full disk causes an error here at the latest.
        self.db.flush().map_err(|e| format!("writing to the log: {e}"))?;
        // A failed sync is never retried on this handle: after a failed fsync the kernel marks the lost pages clean, and a
        // second fsync would report success for data that is not on the disk.
        self.store_dir.fs.sync(&self.file).map_err(|e| format!("syncing the log: {e}"))
        // From here on the batch survives power loss, and the callers can be answered.
    }

    fn open_db(store_dir: Arc<StoreDir>) -> Result<Self, StoreError> {
        let clean_up = || -> io::Result<()> {
            drop_cached_pages(&store_dir)?;
            remove_partial_snapshots(&store_dir)
        };
        clean_up().map_err(|e| store_dir.failed("preparing to open the database", e))?;
        let config = sled::Config::new()
            .path(&store_dir.dir)
            .cache_capacity(store_dir.options.cache_bytes)
            .flush_every_ms(None)
            .use_compression(false);
        let db = open_sled(&config).map_err(|cause| store_dir.failed("opening the database", cause))?;
        let prepare = || {
            // Recovery may have written a snapshot or truncated the log. Both must be durable before new data depends on them,
            // and reads from now on must match the disk.
            sync_files(&store_dir)?;
            let file = OpenOptions::new().read(true).write(true).open(store_dir.dir.join("db"))?;
            let waker = Waker::start(db.clone())?;
            Ok((file, waker))
        };
        let (file, waker) = prepare().map_err(|e: io::Error| store_dir.failed("syncing the opened database", e))?;
        let blobs = Blobs::new(&store_dir);
        Ok(Self { store_dir, file, waker, blobs, db })
    }
}

/// Opens sled, retrying its lock. Our own lock excludes other daemons, but a child process that another thread forks holds a copy
/// of the previous handle, and with it sled's lock, until `exec`.
fn open_sled(config: &sled::Config) -> Result<sled::Db, String> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        // sled panics on some I/O errors during opening.
        let opened = catch_unwind(AssertUnwindSafe(|| config.open())).map_err(|_| "sled panicked".to_owned())?;
        match opened {
            Ok(db) => return Ok(db),
            Err(error) if error.to_string().contains("could not acquire lock") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Syncs all files of the directory, and the directory itself.
fn sync_files(store_dir: &StoreDir) -> io::Result<()> {
    for entry in fs::read_dir(&store_dir.dir)? {
        File::open(entry?.path())?.sync_all()?;
    }
    sync_dir(&store_dir.dir)
}

/// Drops the database file from the page cache. After a failed fsync the cache may hold pages that never reached the disk but are
/// marked clean. Reading them would acknowledge data that a power loss loses; without the cache, reads return the disk's content.
fn drop_cached_pages(store_dir: &StoreDir) -> io::Result<()> {
    match File::open(store_dir.dir.join("db")) {
        Ok(file) => Ok(rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes partial snapshots. A kill while sled writes a snapshot leaves `snap.….generating`, which sled takes for the newest
/// snapshot and reports as corrupt. Until its rename nothing depends on it: the log still has all data.
fn remove_partial_snapshots(store_dir: &StoreDir) -> io::Result<()> {
    for entry in fs::read_dir(&store_dir.dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Wakes a flush that is blocked forever. If sled's log write fails in a pool thread after a batch that filled a segment, sled
/// records the error but does not wake the waiting flush (`exit_reservation` in sled's `logger.rs`). Any other flush wakes it.
struct Waker {
    /// Start of the current commit.
    commit_start: Arc<Mutex<Option<Instant>>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Waker {
    const POLL_INTERVAL: Duration = Duration::from_secs(1);
    const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

    fn start(db: sled::Db) -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let commit_start = Arc::new(Mutex::new(None::<Instant>));
        let watched = commit_start.clone();
        let thread = std::thread::Builder::new().name("store-waker".into()).spawn(move || {
            while stopped.recv_timeout(Self::POLL_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let start = *watched.lock().unwrap_or_else(PoisonError::into_inner);
                if start.is_some_and(|start| start.elapsed() > Self::FLUSH_TIMEOUT) {
                    // The committer gets the same error and reports it.
                    let _ = db.flush();
                }
            }
        })?;
        Ok(Self { commit_start, stop: Some(stop), thread: Some(thread) })
    }

    fn watch(&self) -> impl Drop {
        *self.commit_start.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        WatchGuard(self.commit_start.clone())
    }
}

impl Drop for Waker {
    /// Joins the thread, because its database handle must be closed before the database can be reopened.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct WatchGuard(Arc<Mutex<Option<Instant>>>);

impl Drop for WatchGuard {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
