//! The audit log file and its single writer.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use spp_format::audit::LogHead;
use spp_format::keys::sha256;
use spp_log::audit::FILE;
use spp_log::audit::chain::{ChainHead, MAX_LINE_LEN, TAIL_LEN};
use tokio::sync::oneshot;

use super::{AuditError, Entry, Outcome};

/// Timeout for the file lock. After a kill -9 the kernel may release the lock with a delay.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of entries that wait for the disk; further ones are refused.
const QUEUE: usize = 4096;
/// Maximum number of entries per sync.
const BATCH: usize = 256;
/// Time after which [`AuditLog::record`] fails because the disk does not respond. The entry may still be written later.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// The audit log, open for appending. One process at a time may have it open.
pub struct AuditLog {
    shared: Arc<Shared>,
}

struct Shared {
    node: String,
    writer: Mutex<Writer>,
    queue: Mutex<Queue>,
    /// True if the last write failed.
    broken: AtomicBool,
}

#[derive(Default)]
struct Queue {
    pending: Vec<PendingEntry>,
    /// True while a task is writing. The task empties the queue before it ends.
    writing: bool,
}

struct PendingEntry {
    entry: Entry,
    reply: oneshot::Sender<Result<u64, AuditError>>,
}

/// Maximum number of bytes per read.
const CHUNK: usize = 64 * 1024;

impl AuditLog {
    /// Creates an empty log in its own directory, which must not exist. Only the owner has access to it.
    pub fn create(dir: &Path) -> Result<(), AuditError> {
        if fs::symlink_metadata(dir).is_ok() {
            return Err(AuditError::Exists(dir.to_owned()));
        }
        let create = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(FILE))?.sync_all()?;
            // The directory entries must be durable too: otherwise a power loss may remove the log with all its entries.
            File::open(dir)?.sync_all()?;
            let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(parent)?.sync_all()
        };
        create().map_err(|cause| AuditError::Failed { doing: "creating", path: dir.join(FILE), cause: Arc::new(cause) })
    }

    /// Opens the log in a directory and continues its chain. An incomplete last line, left by a crash, is removed, and an entry
    /// records its length. Only the end of the file is read; [`verify`](spp_log::audit::verify) reads all of it.
    pub fn open(dir: &Path, node: &str) -> Result<Self, AuditError> {
        Self::open_within(LOCK_TIMEOUT, dir, node)
    }

    fn open_within(lock_timeout: Duration, dir: &Path, node: &str) -> Result<Self, AuditError> {
        let mut writer =
            Writer { path: dir.join(FILE), node: node.to_owned(), lock_timeout, file: None, durable: None };
        let (file, head) = writer.load()?;
        (writer.file, writer.durable) = (Some(file), Some(head));
        let (writer, queue, broken) = (Mutex::new(writer), Mutex::default(), AtomicBool::new(false));
        Ok(Self { shared: Arc::new(Shared { node: node.to_owned(), writer, queue, broken }) })
    }

    /// The node that writes the log.
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// Reads durable bytes from `offset` on, at most `CHUNK`. Returns an empty vector at the end and `None` beyond it.
    pub async fn read(&self, offset: u64) -> Result<Option<Vec<u8>>, AuditError> {
        let shared = Arc::clone(&self.shared);
        let read = move || -> Result<Option<Vec<u8>>, AuditError> {
            let (path, end) = {
                let writer = shared.writer.lock().unwrap_or_else(PoisonError::into_inner);
                (writer.path.clone(), writer.durable.map_or(0, |head| head.end))
            };
            let Some(remaining) = end.checked_sub(offset) else { return Ok(None) };
            let mut bytes = vec![0; usize::try_from(remaining).unwrap_or(CHUNK).min(CHUNK)];
            let file = File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, offset));
            file.map_err(|cause| AuditError::Failed { doing: "reading", path, cause: Arc::new(cause) })?;
            Ok(Some(bytes))
        };
        tokio::task::spawn_blocking(read).await.map_err(|e| AuditError::Interrupted(e.to_string()))?
    }

    /// The directory of the log.
    pub(super) fn directory(&self) -> PathBuf {
        let path = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).path.clone();
        path.parent().map(Path::to_owned).unwrap_or_default()
    }

    /// The current head.
    pub async fn head(&self) -> Result<LogHead, AuditError> {
        let shared = Arc::clone(&self.shared);
        let head = move || shared.writer.lock().unwrap_or_else(PoisonError::into_inner).durable.unwrap_or_default();
        let head = tokio::task::spawn_blocking(head).await.map_err(|e| AuditError::Interrupted(e.to_string()))?;
        Ok(LogHead { entries: head.lines, hash: head.hash })
    }

    /// SHA-256 of line `number`, from 1; `None` if the log has fewer lines. Reads the file up to this line.
    pub(super) async fn hash_of_line(&self, number: u64) -> Result<Option<[u8; 32]>, AuditError> {
        let path = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).path.clone();
        let read = move || -> Result<Option<[u8; 32]>, AuditError> {
            let failed = |cause| AuditError::Failed { doing: "reading", path: path.clone(), cause: Arc::new(cause) };
            let mut lines = io::BufReader::with_capacity(1 << 20, File::open(&path).map_err(failed)?);
            let mut line = Vec::new();
            for _ in 0..number {
                line.clear();
                let bounded = lines.by_ref().take(MAX_LINE_LEN as u64);
                if { bounded }.read_until(b'\n', &mut line).map_err(failed)? == 0 {
                    return Ok(None);
                }
            }
            Ok(line.strip_suffix(b"\n").map(sha256))
        };
        tokio::task::spawn_blocking(read).await.map_err(|e| AuditError::Interrupted(e.to_string()))?
    }

    /// True if the last write failed. The next action could probably not be recorded either.
    pub fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::Acquire)
    }

    /// Appends an entry and returns its sequence number. The entry is durable when this returns. After an error it may or may
    /// not be in the log, and the action that it announces must not be done. Concurrent entries share a sync.
    pub async fn record(&self, entry: Entry) -> Result<u64, AuditError> {
        let (reply, recorded) = oneshot::channel();
        if self.shared.enqueue(PendingEntry { entry, reply })? {
            let shared = Arc::clone(&self.shared);
            tokio::task::spawn_blocking(move || shared.write_queue());
        }
        match tokio::time::timeout(WRITE_TIMEOUT, recorded).await {
            Ok(Ok(recorded)) => recorded,
            Ok(Err(_)) => Err(AuditError::Interrupted("the writer task ended".to_owned())),
            Err(_) => Err(AuditError::Interrupted("the disk does not respond".to_owned())),
        }
    }
}

impl Shared {
    /// Enqueues an entry. Returns true if the caller must start a writing task.
    fn enqueue(&self, pending: PendingEntry) -> Result<bool, AuditError> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.pending.len() >= QUEUE {
            return Err(AuditError::Interrupted(format!("queue full: {QUEUE} entries wait for the disk")));
        }
        queue.pending.push(pending);
        Ok(!std::mem::replace(&mut queue.writing, true))
    }

    fn write_queue(&self) {
        loop {
            let batch: Vec<_> = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                let count = queue.pending.len().min(BATCH);
                if count == 0 {
                    queue.writing = false;
                    return;
                }
                queue.pending.drain(..count).collect()
            };
            let (entries, replies): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|pending| (pending.entry, pending.reply)).unzip();
            // A panic leaves the writer without a file, so the next write opens the file again.
            let write = || self.writer.lock().unwrap_or_else(PoisonError::into_inner).append(entries);
            let written = catch_unwind(AssertUnwindSafe(write));
            let written = written.unwrap_or_else(|_| Err(AuditError::Interrupted("the writer panicked".to_owned())));
            self.broken.store(written.is_err(), Ordering::Release);
            match written {
                Ok(results) => replies.into_iter().zip(results).for_each(|(reply, result)| drop(reply.send(result))),
                Err(error) => replies.into_iter().for_each(|reply| drop(reply.send(Err(error.clone())))),
            }
        }
    }
}

struct Writer {
    path: PathBuf,
    node: String,
    lock_timeout: Duration,
    /// `None` after a failed write: the kernel may still write data through such a handle.
    file: Option<File>,
    /// The head up to which the log is durable; `None` before the log is opened.
    durable: Option<ChainHead>,
}

impl Writer {
    /// Appends the entries with one sync and returns their sequence numbers. An entry that is too long is refused alone.
    fn append(&mut self, entries: Vec<Entry>) -> Result<Vec<Result<u64, AuditError>>, AuditError> {
        // The file is put back only after success, so that every error leaves `None`.
        let (file, mut head) = match (self.file.take(), self.durable) {
            (Some(file), Some(head)) => (file, head),
            _ => self.load()?,
        };
        let (time, mut bytes) = (now(), Vec::new());
        let recorded = entries.into_iter().map(|entry| {
            let (line, next) = head.next_line(&self.node, time, entry)?;
            bytes.extend_from_slice(&line);
            Ok(std::mem::replace(&mut head, next).lines)
        });
        let recorded = recorded.collect();
        self.write(&file, &bytes)?;
        // This process is the only writer: a different length means that another program changed the file.
        if file.metadata().map_err(self.failed("examining"))?.len() != head.end {
            return Err(self.damaged("its length differs from the bytes written"));
        }
        (self.durable, self.file) = (Some(head), Some(file));
        Ok(recorded)
    }

    /// Opens the file and finds the chain head, so that the next line continues the chain on the disk.
    fn load(&mut self) -> Result<(File, ChainHead), AuditError> {
        let file = self.open_and_lock()?;
        let length = file.metadata().map_err(self.failed("examining"))?.len();
        // After a failed sync the kernel may show bytes that never reach the disk. No caller received a success for them, so
        // the bytes after the durable head are removed like an incomplete line.
        let end = self.durable.map_or(length, |durable| durable.end);
        if length < end {
            return Err(self.damaged("it is shorter than the bytes written"));
        }
        let mut head = self.read_head(&file, end)?;
        if self.durable.is_some_and(|durable| durable != head) {
            return Err(self.damaged("its last line is not the one written"));
        }
        let excess = length - head.end;
        if excess > 0 {
            // A crash between truncation and entry loses only the entry about bytes that were never acknowledged.
            file.set_len(head.end).map_err(self.failed("removing an incomplete line from"))?;
            let entry = Entry::new("sppd", "audit.cut", Outcome::Done).with("octets", excess);
            let (line, next) = head.next_line(&self.node, now(), entry)?;
            self.write(&file, &line)?;
            head = next;
            self.durable = Some(head);
            tracing::warn!(log = %self.path.display(), bytes = excess, "incomplete audit log line removed");
        }
        Ok((file, head))
    }

    fn open_and_lock(&self) -> Result<File, AuditError> {
        let opened = OpenOptions::new().read(true).append(true).open(&self.path);
        let file = opened.map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => AuditError::Missing { path: self.path.clone(), cause: Arc::new(cause) },
            _ => self.failed("opening")(cause),
        })?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(cause)) => return Err(self.failed("locking")(cause)),
                Err(TryLockError::WouldBlock) if started.elapsed() < self.lock_timeout => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::WouldBlock) => return Err(AuditError::InUse(self.path.clone())),
            }
        }
    }

    fn read_head(&self, file: &File, end: u64) -> Result<ChainHead, AuditError> {
        let begin = end.saturating_sub(TAIL_LEN);
        let mut tail = vec![0; (end - begin) as usize];
        file.read_exact_at(&mut tail, begin).map_err(self.failed("reading"))?;
        match ChainHead::node_in_tail(&tail) {
            Some(node) if node != self.node => {
                Err(self.damaged(&format!("it belongs to node {node}, not to node {}", self.node)))
            }
            _ => ChainHead::from_tail(&tail, begin).map_err(|why| self.damaged(&why)),
        }
    }

    /// Appends lines and syncs.
    fn write(&self, mut file: &File, lines: &[u8]) -> Result<(), AuditError> {
        file.write_all(lines).map_err(self.failed("writing"))?;
        file.sync_data().map_err(self.failed("syncing"))
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> AuditError + use<> {
        let path = self.path.clone();
        move |cause| AuditError::Failed { doing, path: path.clone(), cause: Arc::new(cause) }
    }

    fn damaged(&self, why: &str) -> AuditError {
        AuditError::Damaged { path: self.path.clone(), why: why.to_owned() }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use spp_log::audit::verify;

    use super::*;

    /// Creates a log with this number of entries.
    async fn log_of(entries: u64) -> (tempfile::TempDir, PathBuf, AuditLog) {
        let temp = spp_testkit::files::temp_dir();
        let dir = temp.path().join("some/audit");
        AuditLog::create(&dir).unwrap();
        let log = open(&dir).unwrap();
        for n in 0..entries {
            assert_eq!(log.record(entry(n)).await.unwrap(), n);
        }
        (temp, dir, log)
    }

    fn open(dir: &Path) -> Result<AuditLog, AuditError> {
        AuditLog::open_within(Duration::from_millis(100), dir, "node-1")
    }

    fn entry(n: u64) -> Entry {
        Entry::new("officer o-1", "pool.fill", Outcome::Begun).with("number", n).with("text", "two\nlines")
    }

    fn append(dir: &Path, bytes: &[u8]) {
        OpenOptions::new().append(true).open(dir.join(FILE)).unwrap().write_all(bytes).unwrap();
    }

    #[tokio::test]
    async fn entries_survive_reopening_and_chain_continues() {
        let (_place, dir, log) = log_of(3).await;
        drop(log);
        let log = open(&dir).unwrap();
        assert_eq!(log.record(entry(3)).await.unwrap(), 3);
        assert_eq!(verify(&dir).unwrap().entries, 4);
        let text = fs::read_to_string(dir.join(FILE)).unwrap();
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(
            (&first["sequence"], &first["node"], &first["outcome"]),
            (&0.into(), &"node-1".into(), &"begun".into())
        );
        assert_eq!(first["previous"], "0".repeat(64));
        assert_eq!(first["details"]["text"], "two\nlines");
        for (path, mode) in [(dir.clone(), 0o700), (dir.join(FILE), 0o600)] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, mode);
        }
    }

    #[tokio::test]
    async fn missing_log_is_not_created_by_open() {
        let (_place, dir, log) = log_of(1).await;
        assert!(matches!(AuditLog::create(&dir), Err(AuditError::Exists(_))));
        drop(log);
        fs::remove_file(dir.join(FILE)).unwrap();
        let missing = open(&dir).map(drop).unwrap_err();
        assert!(missing.to_string().contains("sppctl init"), "{missing}");
        assert!(!dir.join(FILE).exists());
        assert!(matches!(verify(&dir), Err(AuditError::Missing { .. })));
    }

    #[tokio::test]
    async fn second_writer_is_refused() {
        let (_place, dir, log) = log_of(1).await;
        assert!(matches!(open(&dir).map(drop), Err(AuditError::InUse(_))));
        drop(log);
        open(&dir).unwrap();
    }

    #[tokio::test]
    async fn incomplete_line_is_removed_and_recorded() {
        for whole_lines in [0, 1, 400] {
            let (_place, dir, log) = log_of(whole_lines).await;
            drop(log);
            append(&dir, b"{\"sequence\":9");
            assert_eq!(verify(&dir).unwrap().unfinished, 13);
            let log = open(&dir).unwrap();
            assert_eq!(log.record(entry(1)).await.unwrap(), whole_lines + 1);
            let verified = verify(&dir).unwrap();
            assert_eq!((verified.entries, verified.unfinished), (whole_lines + 2, 0));
            let text = fs::read_to_string(dir.join(FILE)).unwrap();
            assert!(text.contains("\"act\":\"audit.cut\",\"details\":{\"octets\":\"13\"}"), "{text}");
        }
    }

    #[tokio::test]
    async fn log_that_ends_in_an_invalid_line_is_refused() {
        let (_place, dir, log) = log_of(1).await;
        drop(log);
        let valid = fs::read(dir.join(FILE)).unwrap();
        append(&dir, b"{\"sequence\":1}\n");
        assert!(matches!(open(&dir).map(drop), Err(AuditError::Damaged { .. })));
        fs::write(dir.join(FILE), [&valid[..], &vec![b'x'; TAIL_LEN as usize]].concat()).unwrap();
        assert!(matches!(open(&dir).map(drop), Err(AuditError::Damaged { .. })));
        assert!(matches!(verify(&dir), Err(AuditError::Broken { line: 2, .. })));
    }

    #[tokio::test]
    async fn chain_continues_from_durable_head_after_failed_write() {
        let (_place, dir, log) = log_of(2).await;
        let lose_handle = || log.shared.writer.lock().unwrap().file = Some(File::open(dir.join(FILE)).unwrap());
        lose_handle();
        assert!(matches!(log.record(entry(2)).await, Err(AuditError::Failed { doing: "writing", .. })));
        assert_eq!(log.record(entry(2)).await.unwrap(), 2);
        // Failed but persisted: the line is in the file, but its writer received an error.
        let before = fs::read(dir.join(FILE)).unwrap();
        log.record(entry(3)).await.unwrap();
        let after = fs::read(dir.join(FILE)).unwrap();
        fs::write(dir.join(FILE), &before).unwrap();
        log.shared.writer.lock().unwrap().durable = Some(ChainHead::from_tail(&before, 0).unwrap());
        lose_handle();
        log.record(entry(4)).await.unwrap_err();
        append(&dir, &after[before.len()..]);
        assert_eq!(log.record(entry(4)).await.unwrap(), 4, "after the audit.cut entry");
        assert_eq!(verify(&dir).unwrap().entries, 5);
        // The loss of durable entries stops the log.
        fs::write(dir.join(FILE), &before).unwrap();
        lose_handle();
        log.record(entry(5)).await.unwrap_err();
        assert!(matches!(log.record(entry(5)).await, Err(AuditError::Damaged { .. })));
    }

    #[tokio::test]
    async fn too_long_entry_is_refused_alone() {
        let (_place, dir, log) = log_of(1).await;
        let long = entry(1).with("much", "x".repeat(spp_log::audit::chain::MAX_LINE_LEN));
        assert!(matches!(log.record(long).await, Err(AuditError::TooLong(_))));
        let longest = entry(1).with("much", "x".repeat(spp_log::audit::chain::MAX_LINE_LEN - 400));
        log.record(longest.clone()).await.unwrap();
        drop(log);
        append(&dir, &vec![b'x'; spp_log::audit::chain::MAX_LINE_LEN - 1]);
        let log = open(&dir).unwrap();
        assert_eq!(log.record(longest).await.unwrap(), 3);
        assert_eq!(verify(&dir).unwrap().entries, 4);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn concurrent_entries_form_one_chain() {
        let (_place, dir, log) = log_of(0).await;
        let log = Arc::new(log);
        let record = |n| {
            let log = Arc::clone(&log);
            tokio::spawn(async move { log.record(entry(n)).await.unwrap() })
        };
        let mut sequences = Vec::new();
        for task in (0..200).map(record).collect::<Vec<_>>() {
            sequences.push(task.await.unwrap());
        }
        sequences.sort_unstable();
        assert_eq!(sequences, (0..200).collect::<Vec<_>>());
        assert_eq!(verify(&dir).unwrap().entries, 200);
    }
}
