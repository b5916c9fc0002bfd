//! One opened sled database: how it is opened, and how a batch becomes durable.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::Advice;

use super::blobs::Blobs;
use super::directory::{LAST_ROOM, LOCK_PATIENCE, StoreDir, StoreKind, sync_dir};
use super::view::{Changes, View};
use crate::store::StoreError;

/// Which store a database is, and what must be in it.
pub(super) struct Kind {
    /// Its name and format.
    pub(super) store: StoreKind,
    /// Puts in what an empty store contains.
    pub(super) found: fn(&mut View<'_>) -> Result<(), StoreError>,
    /// Reads what every store must contain.
    pub(super) check: fn(&View<'_>) -> Result<(), StoreError>,
}

/// An open database. Only the committer's thread reads and writes through it.
pub(super) struct Engine {
    place: Arc<StoreDir>,
    /// An own handle of sled's file, for the fsync that sled does not do.
    file: File,
    waker: Waker,
    blobs: Blobs,
    db: sled::Db,
}

impl Engine {
    /// Makes the database of a new store, durable with its directory entries when this returns.
    pub(super) fn found(place: Arc<StoreDir>, kind: &Kind) -> Result<(), StoreError> {
        let engine = Self::open_db(place)?;
        let mut view = engine.view(kind.store.name);
        (kind.found)(&mut view)?;
        view.keep();
        let changes = view.into_changes();
        engine.commit(changes).map_err(|cause| engine.place.failed("making the database", cause))?;
        let place = engine.place.clone();
        drop(engine);
        sync_files(&place).map_err(|e| place.failed("syncing the new database", e))
    }

    /// Opens the database and checks that what must be there can be read.
    pub(super) fn open(place: &Arc<StoreDir>, kind: &Kind) -> Result<Self, StoreError> {
        let engine = match Self::open_db(place.clone()) {
            // sled cannot open without room for a segment and a snapshot. The reserve was kept for this moment.
            Err(error) if place.admit(LAST_ROOM).is_err() && place.give_up_reserve() => {
                tracing::warn!(store = kind.store.name, %error, "opening again after the reserve was given up");
                Self::open_db(place.clone())?
            }
            opened => opened?,
        };
        (kind.check)(&engine.view(kind.store.name))?;
        place.keep_reserve();
        Ok(engine)
    }

    /// What a batch starts from.
    pub(super) fn view(&self, store: &'static str) -> View<'_> {
        View::new(&self.db, &self.place, &self.blobs, store)
    }

    /// Makes a batch durable: all of it or, after an error, nobody knows (all or nothing).
    pub(super) fn commit(&self, changes: Changes) -> Result<(), String> {
        let _watched = self.waker.watch();
        self.place.door.before_apply().map_err(|e| e.to_string())?;
        // Wrapped keys first: the database must never name one that a power loss could take.
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
        // A crash from here to the sync finds all of the batch or nothing of it: it is on one tree, and sled recovers a
        // batch only if its last entry is in the log. Nobody was told anything about it.
        self.db.apply_batch(batch).map_err(|e| format!("applying a batch: {e}"))?;
        // A kill -9 from here on finds the batch: the kernel has it. A power loss may still take it or part of it, which
        // recovery takes for a torn tail of the log and cuts off. A full disk shows here at the latest.
        self.db.flush().map_err(|e| format!("writing to the log: {e}"))?;
        // Never tried again on this handle: after a failed fsync the kernel calls the lost pages clean, and a second fsync
        // would report success for data that is not on the disk.
        self.place.door.sync(&self.file).map_err(|e| format!("syncing the log: {e}"))
        // From here on a power loss finds it, too, and the callers may be told.
    }

    fn open_db(place: Arc<StoreDir>) -> Result<Self, StoreError> {
        let tidy = || -> io::Result<()> {
            forget_cached_pages(&place)?;
            remove_half_written_snapshots(&place)
        };
        tidy().map_err(|e| place.failed("preparing to open the database", e))?;
        let config = sled::Config::new()
            .path(&place.dir)
            .cache_capacity(place.options.cache_bytes)
            .flush_every_ms(None)
            .use_compression(false);
        let db = open_sled(&config).map_err(|cause| place.failed("opening the database", cause))?;
        let prepare = || {
            // Recovery wrote (a snapshot, a cut-off tail). It must be durable before anything is built upon it, and what
            // is read from now on must be what the disk has.
            sync_files(&place)?;
            let file = OpenOptions::new().read(true).write(true).open(place.dir.join("db"))?;
            let waker = Waker::start(db.clone())?;
            Ok((file, waker))
        };
        let (file, waker) = prepare().map_err(|e: io::Error| place.failed("syncing the opened database", e))?;
        let blobs = Blobs::new(&place);
        Ok(Self { place, file, waker, blobs, db })
    }
}

/// sled tries its own lock once. Nobody else can be using it, the place is ours; but when another thread starts a process, that
/// process has a copy of the last handle until it runs its program, and with it the lock.
fn open_sled(config: &sled::Config) -> Result<sled::Db, String> {
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        // sled panics on some I/O errors while it opens.
        let opened = catch_unwind(AssertUnwindSafe(|| config.open())).map_err(|_| "sled panicked".to_owned())?;
        match opened {
            Ok(db) => return Ok(db),
            Err(error) if error.to_string().contains("could not acquire lock") && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// Syncs all that sled has written in its directory, and the directory.
fn sync_files(place: &StoreDir) -> io::Result<()> {
    for entry in fs::read_dir(&place.dir)? {
        File::open(entry?.path())?.sync_all()?;
    }
    sync_dir(&place.dir)
}

/// After a failed fsync the cache may hold pages that never reached the disk and count as clean. Reading them back would
/// acknowledge what a power loss takes away; dropped from the cache, they are read as the disk has them.
fn forget_cached_pages(place: &StoreDir) -> io::Result<()> {
    match File::open(place.dir.join("db")) {
        Ok(file) => Ok(rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// A kill while sled writes a snapshot leaves `snap.….generating`, and sled takes that for the newest snapshot and calls it
/// corrupt. Until it is renamed nothing depends on it: the log still has all of it.
fn remove_half_written_snapshots(place: &StoreDir) -> io::Result<()> {
    for entry in fs::read_dir(&place.dir)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Wakes a flush that waits for ever. When sled's log write fails in a thread of its pool after a batch that filled a segment,
/// the error is noted but the waiting flush is not told (`exit_reservation` in sled's `logger.rs`); any other flush tells it.
struct Waker {
    since: Arc<Mutex<Option<Instant>>>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Waker {
    const LOOKS_EVERY: Duration = Duration::from_secs(1);
    const TOO_LONG: Duration = Duration::from_secs(2);

    fn start(db: sled::Db) -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let since = Arc::new(Mutex::new(None::<Instant>));
        let watched = since.clone();
        let thread = std::thread::Builder::new().name("store-waker".into()).spawn(move || {
            while stopped.recv_timeout(Self::LOOKS_EVERY) == Err(RecvTimeoutError::Timeout) {
                let since = *watched.lock().unwrap_or_else(PoisonError::into_inner);
                if since.is_some_and(|since| since.elapsed() > Self::TOO_LONG) {
                    // The committer gets the same error and reports it.
                    let _ = db.flush();
                }
            }
        })?;
        Ok(Self { since, stop: Some(stop), thread: Some(thread) })
    }

    fn watch(&self) -> impl Drop {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Watched(self.since.clone())
    }
}

impl Drop for Waker {
    /// Its handle of the database must be gone before the database can be opened again.
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Watched(Arc<Mutex<Option<Instant>>>);

impl Drop for Watched {
    fn drop(&mut self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
