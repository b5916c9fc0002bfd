//! Stores wrapped private keys in one file per batch beside the database: `pairs/NUMBER`.
//!
//! sled retains deleted values for a long time and offers no way to purge them. A file can be overwritten and deleted, so that
//! shredding a batch destroys not only its key but also every byte wrapped under it. The database records which bytes of a file
//! are valid. Files are therefore written and synced before the database.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::directory::{StoreDir, sync_dir};

/// The range of a blob in its batch's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BlobRange {
    offset: u64,
    len: u32,
}

impl BlobRange {
    /// The offset after the blob.
    pub(super) const fn end(self) -> u64 {
        self.offset + self.len as u64
    }
}

/// The batch files. Only the committer thread uses them.
pub(super) struct Blobs {
    store_dir: Arc<StoreDir>,
    directory: PathBuf,
    open: RefCell<BTreeMap<u64, BlobFile>>,
}

struct BlobFile {
    file: File,
    /// Offset of the next blob.
    end: u64,
}

/// Pending appends to the files. [`Blobs::write`] writes them.
#[derive(Default)]
pub(super) struct Appends(BTreeMap<u64, Append>);

struct Append {
    begin: u64,
    bytes: Vec<u8>,
    /// Number of bytes that belong to accepted transactions.
    accepted: usize,
}

impl Blobs {
    pub(super) fn new(store_dir: &Arc<StoreDir>) -> Self {
        Self { store_dir: Arc::clone(store_dir), directory: store_dir.dir.join("pairs"), open: RefCell::default() }
    }

    /// Adds a blob to the pending appends and returns its future range.
    pub(super) fn append(&self, appends: &mut Appends, batch: u64, blob: &[u8]) -> io::Result<BlobRange> {
        let append = match appends.0.entry(batch) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let begin = self.with_file(batch, true, |file| Ok(file.end))?;
                entry.insert(Append { begin, bytes: Vec::new(), accepted: 0 })
            }
        };
        let len = u32::try_from(blob.len()).map_err(io::Error::other)?;
        let offset = append.begin + append.bytes.len() as u64;
        append.bytes.extend_from_slice(blob);
        Ok(BlobRange { offset, len })
    }

    /// Reads a blob, written or pending.
    pub(super) fn read(&self, appends: &Appends, batch: u64, range: BlobRange) -> io::Result<Vec<u8>> {
        let len = range.len as usize;
        if let Some(append) = appends.0.get(&batch)
            && let Some(begin) = range.offset.checked_sub(append.begin)
        {
            let begin = usize::try_from(begin).map_err(io::Error::other)?;
            let pending = append.bytes.get(begin..begin.saturating_add(len));
            return pending.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
        }
        self.with_file(batch, false, |file| {
            let mut blob = vec![0; len];
            file.file.read_exact_at(&mut blob, range.offset)?;
            Ok(blob)
        })
    }

    /// Writes and syncs the appends of accepted transactions. A crash after it leaves bytes that the database does not refer to.
    pub(super) fn write(&self, appends: Appends) -> io::Result<()> {
        for (batch, append) in appends.0.into_iter().filter(|(_, append)| append.accepted > 0) {
            self.with_file(batch, true, |file| {
                let bytes = &append.bytes[..append.accepted];
                file.file.write_all_at(bytes, append.begin)?;
                self.store_dir.fs.sync(&file.file)?;
                file.end = append.begin + bytes.len() as u64;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Overwrites and truncates the bytes that a crash left after the valid ones, for example pairs that were being moved to
    /// another batch and have since been erased in their old batch. `ends` has the valid length of every file; other files are
    /// deleted.
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

    /// Overwrites a batch's file and deletes it. The content is no longer needed, so after a crash the call can be repeated.
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
        operation: impl FnOnce(&mut BlobFile) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut open = self.open.borrow_mut();
        let file = match open.entry(batch) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(self.open_file(batch, create)?),
        };
        operation(file)
    }

    fn open_file(&self, batch: u64, create: bool) -> io::Result<BlobFile> {
        let path = self.path(batch);
        if create && !path.exists() {
            if !self.directory.exists() {
                DirBuilder::new().mode(0o700).create(&self.directory)?;
                sync_dir(&self.store_dir.dir)?;
            }
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            sync_dir(&self.directory)?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path)?;
        // Bytes that a crash left after the last valid blob stay: the database does not refer to them, and they are deleted with
        // the batch.
        let end = file.metadata()?.len();
        Ok(BlobFile { file, end })
    }

    fn path(&self, batch: u64) -> PathBuf {
        self.directory.join(batch.to_string())
    }
}

/// Overwrites the file with zeros from offset `from` to its end and syncs it.
fn overwrite(file: &File, from: u64) -> io::Result<()> {
    let zeros = [0; 64 << 10];
    let (mut offset, len) = (from, file.metadata()?.len());
    while offset < len {
        let piece = usize::try_from(len - offset).unwrap_or(zeros.len()).min(zeros.len());
        file.write_all_at(&zeros[..piece], offset)?;
        offset += piece as u64;
    }
    file.sync_all()
}

impl Appends {
    /// Keeps the appends of the current transaction.
    pub(super) fn accept(&mut self) {
        for append in self.0.values_mut() {
            append.accepted = append.bytes.len();
        }
    }

    /// Discards the appends of the current transaction.
    pub(super) fn roll_back(&mut self) {
        for append in self.0.values_mut() {
            append.bytes.truncate(append.accepted);
        }
    }

    /// Reports whether there is nothing to write.
    pub(super) fn is_empty(&self) -> bool {
        self.0.values().all(|append| append.accepted == 0)
    }
}
