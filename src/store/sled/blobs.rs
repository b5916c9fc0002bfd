//! The wrapped private halves, in one file for each batch beside the database: `pairs/NUMBER`.
//!
//! sled keeps deleted values for long, and nobody can tell it to let go of one. A file can be overwritten and removed: with
//! the end of a batch not only its key is gone, but every byte that was wrapped under it. The database says which bytes of
//! which file belong to whom; what it does not name does not count, so the file is written and synced first.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::directory::{StoreDir, sync_dir};

/// Where a blob is in its batch's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlobPlace {
    at: u64,
    len: u32,
}

impl BlobPlace {
    /// The byte behind it.
    pub(super) const fn end(self) -> u64 {
        self.at + self.len as u64
    }
}

/// The files of the batches. Only the committer's thread uses them.
pub(super) struct Blobs {
    place: Arc<StoreDir>,
    directory: PathBuf,
    open: RefCell<BTreeMap<u64, BlobFile>>,
}

struct BlobFile {
    file: File,
    /// Where the next blob goes.
    end: u64,
}

/// What transactions add to the files; nothing is written before [`Blobs::write`].
#[derive(Default)]
pub(super) struct Appends(BTreeMap<u64, Append>);

struct Append {
    begin: u64,
    bytes: Vec<u8>,
    /// How many of the bytes belong to transactions that were accepted.
    kept: usize,
}

impl Blobs {
    pub(super) fn new(place: &Arc<StoreDir>) -> Self {
        Self { place: Arc::clone(place), directory: place.dir.join("pairs"), open: RefCell::default() }
    }

    /// Where a blob will be, once it is written.
    pub(super) fn append(&self, appends: &mut Appends, batch: u64, blob: &[u8]) -> io::Result<BlobPlace> {
        let append = match appends.0.entry(batch) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let begin = self.with_file(batch, true, |file| Ok(file.end))?;
                entry.insert(Append { begin, bytes: Vec::new(), kept: 0 })
            }
        };
        let len = u32::try_from(blob.len()).map_err(io::Error::other)?;
        let at = append.begin + append.bytes.len() as u64;
        append.bytes.extend_from_slice(blob);
        Ok(BlobPlace { at, len })
    }

    /// A blob, written or not yet.
    pub(super) fn read(&self, appends: &Appends, batch: u64, place: BlobPlace) -> io::Result<Vec<u8>> {
        let len = place.len as usize;
        if let Some(append) = appends.0.get(&batch)
            && let Some(begin) = place.at.checked_sub(append.begin)
        {
            let begin = usize::try_from(begin).map_err(io::Error::other)?;
            let pending = append.bytes.get(begin..begin.saturating_add(len));
            return pending.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
        }
        self.with_file(batch, false, |file| {
            let mut blob = vec![0; len];
            file.file.read_exact_at(&mut blob, place.at)?;
            Ok(blob)
        })
    }

    /// Writes what the accepted transactions added, and syncs it. A crash after it leaves bytes that nobody names.
    pub(super) fn write(&self, appends: Appends) -> io::Result<()> {
        for (batch, append) in appends.0.into_iter().filter(|(_, append)| append.kept > 0) {
            self.with_file(batch, true, |file| {
                let bytes = &append.bytes[..append.kept];
                file.file.write_all_at(bytes, append.begin)?;
                self.place.door.sync(&file.file)?;
                file.end = append.begin + bytes.len() as u64;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Overwrites and cuts off what a crash left behind the bytes that count: pairs that were being moved to another batch's
    /// key, say, and were erased where they came from. `ends` has the end of every file that counts.
    pub(super) fn trim(&self, ends: &BTreeMap<u64, u64>) -> io::Result<()> {
        let entries = match fs::read_dir(&self.directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Some(batch) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match ends.get(&batch) {
                None => self.remove(batch)?,
                Some(end) if entry.metadata()?.len() > *end => {
                    let file = OpenOptions::new().write(true).open(entry.path())?;
                    overwrite(&file, *end)?;
                    file.set_len(*end)?;
                    file.sync_all()?;
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Overwrites a batch's file and removes it. Nothing in it is needed any more, so a crash in between is made good by doing it
    /// again.
    pub(super) fn remove(&self, batch: u64) -> io::Result<()> {
        self.open.borrow_mut().remove(&batch);
        let path = self.path(batch);
        let file = match OpenOptions::new().write(true).open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        overwrite(&file, 0)?;
        file.sync_all()?;
        fs::remove_file(&path)?;
        sync_dir(&self.directory)
    }

    fn with_file<T>(
        &self,
        batch: u64,
        create: bool,
        work: impl FnOnce(&mut BlobFile) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut open = self.open.borrow_mut();
        let file = match open.entry(batch) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(self.open_file(batch, create)?),
        };
        work(file)
    }

    fn open_file(&self, batch: u64, create: bool) -> io::Result<BlobFile> {
        let path = self.path(batch);
        if create && !path.exists() {
            if !self.directory.exists() {
                DirBuilder::new().mode(0o700).create(&self.directory)?;
                sync_dir(&self.place.dir)?;
            }
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            sync_dir(&self.directory)?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        // What a crash left behind the last blob that counts stays: nobody names it, and it ends with the batch.
        let end = file.metadata()?.len();
        Ok(BlobFile { file, end })
    }

    fn path(&self, batch: u64) -> PathBuf {
        self.directory.join(batch.to_string())
    }
}

/// Zeros from there to the end, on the disk when this returns.
fn overwrite(file: &File, from: u64) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let (mut at, len) = (from, file.metadata()?.len());
    while at < len {
        let piece = usize::try_from(len - at).unwrap_or(zeros.len()).min(zeros.len());
        file.write_all_at(&zeros[..piece], at)?;
        at += piece as u64;
    }
    file.sync_all()
}

impl Appends {
    /// The transaction is accepted.
    pub(super) fn keep(&mut self) {
        for append in self.0.values_mut() {
            append.kept = append.bytes.len();
        }
    }

    /// The transaction is refused.
    pub(super) fn forget(&mut self) {
        for append in self.0.values_mut() {
            append.bytes.truncate(append.kept);
        }
    }

    /// Whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.0.values().all(|append| append.kept == 0)
    }
}
