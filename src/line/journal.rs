//! The station's own journal, `line.jsonl`: which devices need no more work, with their receipts.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::LineError;
use super::orders::Order;
use crate::names::{ChipId, DeviceIdentity, ProfileName, SessionId};

const FILE: &str = "line.jsonl";

/// A device that is complete: whose, and where its record stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) chip_id: ChipId,
    pub(super) identity: DeviceIdentity,
    pub(super) profile: ProfileName,
    #[serde(flatten)]
    pub(super) receipt: Receipt,
}

impl Entry {
    pub(super) fn new(order: &Order, receipt: Receipt) -> Self {
        Self { chip_id: order.chip.clone(), identity: order.identity.clone(), profile: order.profile.clone(), receipt }
    }

    /// Whether the entry answers the order; the chip may have had another one.
    pub(super) fn answers(&self, order: &Order) -> bool {
        self.chip_id == order.chip && self.identity == order.identity && self.profile == order.profile
    }
}

/// The proof that a device is in the public database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Receipt {
    pub(super) session: SessionId,
    /// The record's place, counted from 0.
    pub(super) record_index: u64,
    /// SHA-256 of the record, in hex.
    pub(super) record_hash: String,
    /// When it was published, RFC 3339.
    pub(super) published: String,
}

/// The entries of the directory, by chip.
pub(super) fn read(devices: &Path) -> Result<HashMap<ChipId, Entry>, LineError> {
    let path = devices.join(FILE);
    match File::open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(HashMap::new()),
        Err(e) => Err(LineError::file("opening", &path)(e)),
        Ok(file) => entries(&file).map_err(LineError::file("reading", &path)),
    }
}

/// The journal of one run.
///
/// Entries are appended without a sync for each device. What a crash takes from the end, or leaves half written, is found
/// again: for such a device the daemon answers Assemble with `ALREADY_EXISTS` and `GetSession` with the same receipt. So the
/// journal saves calls, and nothing depends on it. The flash is what must be durable before Complete is called, and is.
pub(super) struct Journal {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Journal {
    /// Opens the journal for the only run that may work in this directory, and tells what is in it.
    pub(super) fn open(devices: &Path) -> Result<(Self, HashMap<ChipId, Entry>), LineError> {
        let path = devices.join(FILE);
        let doing = |doing| LineError::file(doing, &path);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).append(true).create(true).open(&path).map_err(doing("opening"))?;
        if file.try_lock().is_err() {
            return Err(LineError::content(&path, "another spp-line works in this directory; wait for it or end it"));
        }
        let entries = entries(&file).map_err(doing("reading"))?;
        finish_last_line(&mut file).map_err(doing("writing"))?;
        Ok((Self { path, file: BufWriter::new(file) }, entries))
    }

    /// Adds an entry; it is in the file after the next [`Self::flush`].
    pub(super) fn add(&mut self, entry: &Entry) -> Result<(), LineError> {
        let line = serde_json::to_string(entry).map_err(|e| LineError::content(&self.path, e))?;
        writeln!(self.file, "{line}").map_err(LineError::file("writing", &self.path))
    }

    /// Hands what was added to the system: from here on it survives the end of this process.
    pub(super) fn flush(&mut self) -> Result<(), LineError> {
        self.file.flush().map_err(LineError::file("writing", &self.path))
    }

    /// Ends the run: everything is on the disk.
    pub(super) fn close(mut self) -> Result<(), LineError> {
        self.flush()?;
        self.file.get_ref().sync_all().map_err(LineError::file("syncing", &self.path))
    }
}

/// The entries that can be read; others are as if they had been lost.
fn entries(file: &File) -> std::io::Result<HashMap<ChipId, Entry>> {
    let mut found = HashMap::new();
    for line in BufReader::new(file).split(b'\n') {
        if let Ok(entry) = serde_json::from_slice::<Entry>(&line?) {
            found.insert(entry.chip_id.clone(), entry);
        }
    }
    Ok(found)
}

/// A line that a crash cut off must not swallow the next one.
fn finish_last_line(file: &mut File) -> std::io::Result<()> {
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

    fn entry(number: u8) -> Entry {
        Entry {
            chip_id: ChipId::from_bytes(&[number; 16]).unwrap(),
            identity: format!("serial:{number}").parse().unwrap(),
            profile: "phone".parse().unwrap(),
            receipt: Receipt {
                session: SessionId::from_bytes(&[number; 16]).unwrap(),
                record_index: number.into(),
                record_hash: "00".repeat(32),
                published: "2024-01-01T00:00:00Z".to_owned(),
            },
        }
    }

    #[test]
    fn what_was_added_is_read_back() {
        let directory = spp_testkit::files::temp_dir();
        let (mut journal, known) = Journal::open(directory.path()).unwrap();
        assert!(known.is_empty());
        journal.add(&entry(1)).unwrap();
        journal.add(&entry(2)).unwrap();
        journal.close().unwrap();
        let known = read(directory.path()).unwrap();
        assert_eq!(known.len(), 2);
        assert_eq!(known.get(&entry(1).chip_id), Some(&entry(1)));
    }

    #[test]
    fn a_line_that_a_crash_cut_off_costs_itself_only() {
        let directory = spp_testkit::files::temp_dir();
        let (mut journal, _) = Journal::open(directory.path()).unwrap();
        journal.add(&entry(1)).unwrap();
        journal.add(&entry(2)).unwrap();
        journal.close().unwrap();
        let path = directory.path().join(FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let (mut journal, known) = Journal::open(directory.path()).unwrap();
        assert_eq!(known.len(), 1);
        journal.add(&entry(3)).unwrap();
        journal.close().unwrap();
        let known = read(directory.path()).unwrap();
        assert!(known.contains_key(&entry(1).chip_id) && known.contains_key(&entry(3).chip_id));
    }

    #[test]
    fn one_run_at_a_time_works_in_a_directory() {
        let directory = spp_testkit::files::temp_dir();
        let first = Journal::open(directory.path()).unwrap();
        let refused = Journal::open(directory.path()).map(|_| ()).unwrap_err();
        assert!(refused.to_string().contains("another spp-line"), "{refused}");
        drop(first);
        assert!(Journal::open(directory.path()).is_ok());
    }
}
