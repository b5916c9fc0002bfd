//! The station's journal, `line.jsonl`: completed devices with their receipts.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use spp_format::names::{ChipId, DeviceIdentity, ProfileName, SessionId};

use super::LineError;
use super::orders::Order;

const FILE: &str = "line.jsonl";

/// A completed device and its record in the public database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct JournalEntry {
    pub(super) chip_id: ChipId,
    pub(super) identity: DeviceIdentity,
    pub(super) profile: ProfileName,
    #[serde(flatten)]
    pub(super) receipt: StoredReceipt,
}

impl JournalEntry {
    pub(super) fn new(order: &Order, receipt: StoredReceipt) -> Self {
        Self { chip_id: order.chip.clone(), identity: order.identity.clone(), profile: order.profile.clone(), receipt }
    }

    /// Whether the entry belongs to the order; the chip may have had another order.
    pub(super) fn matches_order(&self, order: &Order) -> bool {
        self.chip_id == order.chip && self.identity == order.identity && self.profile == order.profile
    }
}

/// The position of a device's record in the public database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredReceipt {
    pub(super) session: SessionId,
    /// The record's index in the log, counted from 0.
    pub(super) record_index: u64,
    /// SHA-256 of the record, in hex.
    pub(super) record_hash: String,
    /// Publication time, RFC 3339.
    pub(super) published: String,
}

/// Reads the directory's entries, by chip.
pub(super) fn read(devices: &Path) -> Result<HashMap<ChipId, JournalEntry>, LineError> {
    let path = devices.join(FILE);
    match File::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(e) => Err(LineError::file("opening", &path)(e)),
        Ok(file) => read_entries(&file).map_err(LineError::file("reading", &path)),
    }
}

/// The journal of one run.
///
/// Entries are appended without a sync per device. If a crash loses or truncates the last entries, they are recovered: for such
/// a device the daemon answers Assemble with `ALREADY_EXISTS`, and `GetSession` returns the session for the same receipt. The
/// journal therefore only saves calls. The flash must be durable before Complete is called, and it is.
pub(super) struct CompletionLog {
    path: PathBuf,
    file: BufWriter<File>,
}

impl CompletionLog {
    /// Opens and locks the journal for one run per directory, and returns its entries.
    pub(super) fn open(devices: &Path) -> Result<(Self, HashMap<ChipId, JournalEntry>), LineError> {
        let path = devices.join(FILE);
        let context = |operation| LineError::file(operation, &path);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(&path).map_err(context("opening"))?;
        if file.try_lock().is_err() {
            return Err(LineError::content(&path, "another spp-line uses this directory; wait for it or stop it"));
        }
        let entries = read_entries(&file).map_err(context("reading"))?;
        terminate_last_line(&mut file).map_err(context("writing"))?;
        Ok((Self { path, file: BufWriter::new(file) }, entries))
    }

    /// Buffers an entry; [`Self::flush`] writes it to the file.
    pub(super) fn add(&mut self, entry: &JournalEntry) -> Result<(), LineError> {
        let line = serde_json::to_string(entry).map_err(|e| LineError::content(&self.path, e))?;
        writeln!(self.file, "{line}").map_err(LineError::file("writing", &self.path))
    }

    /// Writes the buffered entries to the file, so that they survive the end of this process.
    pub(super) fn flush(&mut self) -> Result<(), LineError> {
        self.file.flush().map_err(LineError::file("writing", &self.path))
    }

    /// Writes and syncs all entries.
    pub(super) fn close(mut self) -> Result<(), LineError> {
        self.flush()?;
        self.file.get_ref().sync_all().map_err(LineError::file("syncing", &self.path))
    }
}

/// Parses the valid entries; invalid ones are treated as lost.
fn read_entries(file: &File) -> std::io::Result<HashMap<ChipId, JournalEntry>> {
    let mut entries = HashMap::new();
    for line in BufReader::new(file).split(b'\n') {
        if let Ok(entry) = serde_json::from_slice::<JournalEntry>(&line?) {
            entries.insert(entry.chip_id.clone(), entry);
        }
    }
    Ok(entries)
}

/// Terminates a line that a crash truncated, so that the next entry starts on its own line.
fn terminate_last_line(file: &mut File) -> std::io::Result<()> {
    if file.metadata()?.len() == 0 {
        return Ok(());
    }
    file.seek(std::io::SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    if last == *b"\n" { Ok(()) } else { file.write_all(b"\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(number: u8) -> JournalEntry {
        JournalEntry {
            chip_id: ChipId::from_bytes(&[number; 16]).unwrap(),
            identity: format!("serial:{number}").parse().unwrap(),
            profile: "phone".parse().unwrap(),
            receipt: StoredReceipt {
                session: SessionId::from_bytes(&[number; 16]).unwrap(),
                record_index: number.into(),
                record_hash: "00".repeat(32),
                published: "2024-01-01T00:00:00Z".to_owned(),
            },
        }
    }

    #[test]
    fn added_entries_read_back() {
        let directory = spp_test_support::files::temp_dir();
        let (mut journal, known) = CompletionLog::open(directory.path()).unwrap();
        assert!(known.is_empty());
        journal.add(&entry(1)).unwrap();
        journal.add(&entry(2)).unwrap();
        journal.close().unwrap();
        let known = read(directory.path()).unwrap();
        assert_eq!(known.len(), 2);
        assert_eq!(known.get(&entry(1).chip_id), Some(&entry(1)));
    }

    #[test]
    fn truncated_line_loses_only_itself() {
        let directory = spp_test_support::files::temp_dir();
        let (mut journal, _) = CompletionLog::open(directory.path()).unwrap();
        journal.add(&entry(1)).unwrap();
        journal.add(&entry(2)).unwrap();
        journal.close().unwrap();
        let path = directory.path().join(FILE);
        let complete = std::fs::read(&path).unwrap();
        std::fs::write(&path, &complete[..complete.len() - 9]).unwrap();
        let (mut journal, known) = CompletionLog::open(directory.path()).unwrap();
        assert_eq!(known.len(), 1);
        journal.add(&entry(3)).unwrap();
        journal.close().unwrap();
        let known = read(directory.path()).unwrap();
        assert!(known.contains_key(&entry(1).chip_id) && known.contains_key(&entry(3).chip_id));
    }

    #[test]
    fn second_run_in_directory_rejected() {
        let directory = spp_test_support::files::temp_dir();
        let first = CompletionLog::open(directory.path()).unwrap();
        let error = CompletionLog::open(directory.path()).map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("another spp-line"), "{error}");
        drop(first);
        assert!(CompletionLog::open(directory.path()).is_ok());
    }
}
