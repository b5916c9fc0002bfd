//! The log as its one writer has it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufRead as _, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;

use super::chain::{ChainHead, MAX_LINE, TAIL};
use super::{AuditError, Entry, FILE, Outcome};
use crate::keys::sha256;

/// How long the lock is awaited: after a kill -9 the kernel may hold it for a moment.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// Entries that may wait for the disk at once; more are refused.
const QUEUE: usize = 4096;
/// Most entries that share a sync.
const BATCH: usize = 256;
/// When a caller is told that the disk does not answer. What it recorded may still come to be there.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The audit log, open for adding; one process at a time has it.
pub struct AuditLog {
    shared: Arc<Shared>,
}

struct Shared {
    node: String,
    writer: Mutex<Writer>,
    queue: Mutex<Queue>,
    /// Whether the last write failed.
    broken: AtomicBool,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    /// Whether a task is writing, which takes what waits before it ends.
    writing: bool,
}

struct Waiting {
    entry: Entry,
    answer: oneshot::Sender<Result<u64, AuditError>>,
}

/// Where a log ended at one moment: how many entries it had, and the SHA-256 of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogHead {
    /// How many entries.
    pub entries: u64,
    /// SHA-256 of the last line; zeros if there is none.
    pub hash: [u8; 32],
}

/// Bytes that are read from the file at once.
const CHUNK: usize = 64 * 1024;

impl AuditLog {
    /// Makes an empty log in a directory of its own, which must not exist; nobody but its owner may look into it.
    pub fn create(dir: &Path) -> Result<(), AuditError> {
        if fs::symlink_metadata(dir).is_ok() {
            return Err(AuditError::Exists(dir.to_owned()));
        }
        let run = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(FILE))?.sync_all()?;
            // The names are durable too, else a power loss may take the log with all that was added to it.
            File::open(dir)?.sync_all()?;
            let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(parent)?.sync_all()
        };
        run().map_err(|cause| AuditError::Failed { doing: "making", path: dir.join(FILE), cause: Arc::new(cause) })
    }

    /// Opens the log of a directory and goes on with its chain. What a crash left of an unfinished last line is cut off, and
    /// an entry tells how much that was. Only the end is read; [`verify`](super::verify) reads all.
    pub fn open(dir: &Path, node: &str) -> Result<Self, AuditError> {
        Self::open_within(LOCK_PATIENCE, dir, node)
    }

    fn open_within(patience: Duration, dir: &Path, node: &str) -> Result<Self, AuditError> {
        let mut writer = Writer { path: dir.join(FILE), node: node.to_owned(), patience, file: None, known: None };
        let (file, head) = writer.load()?;
        (writer.file, writer.known) = (Some(file), Some(head));
        let (writer, queue, broken) = (Mutex::new(writer), Mutex::default(), AtomicBool::new(false));
        Ok(Self { shared: Arc::new(Shared { node: node.to_owned(), writer, queue, broken }) })
    }

    /// The node that writes it.
    pub fn node(&self) -> &str {
        &self.shared.node
    }

    /// The bytes from that one on, at most so many as are sent at once, of what is durable; empty at its end, none beyond it.
    pub async fn read(&self, offset: u64) -> Result<Option<Vec<u8>>, AuditError> {
        let shared = Arc::clone(&self.shared);
        let read = move || -> Result<Option<Vec<u8>>, AuditError> {
            let (path, end) = {
                let writer = shared.writer.lock().unwrap_or_else(PoisonError::into_inner);
                (writer.path.clone(), writer.known.map_or(0, |known| known.end))
            };
            let Some(left) = end.checked_sub(offset) else { return Ok(None) };
            let mut bytes = vec![0; usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)];
            let file = File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, offset));
            file.map_err(|cause| AuditError::Failed { doing: "reading", path, cause: Arc::new(cause) })?;
            Ok(Some(bytes))
        };
        tokio::task::spawn_blocking(read).await.map_err(|e| AuditError::Interrupted(e.to_string()))?
    }

    /// The directory that it is in.
    pub(super) fn directory(&self) -> PathBuf {
        let path = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).path.clone();
        path.parent().map(Path::to_owned).unwrap_or_default()
    }

    /// Where it ends now.
    pub async fn head(&self) -> Result<LogHead, AuditError> {
        let shared = Arc::clone(&self.shared);
        let head = move || shared.writer.lock().unwrap_or_else(PoisonError::into_inner).known.unwrap_or_default();
        let head = tokio::task::spawn_blocking(head).await.map_err(|e| AuditError::Interrupted(e.to_string()))?;
        Ok(LogHead { entries: head.lines, hash: head.hash })
    }

    /// SHA-256 of the line with that number, counted from 1; none if there are not so many. All before it is read.
    pub(super) async fn hash_of_line(&self, number: u64) -> Result<Option<[u8; 32]>, AuditError> {
        let path = self.shared.writer.lock().unwrap_or_else(PoisonError::into_inner).path.clone();
        let read = move || -> Result<Option<[u8; 32]>, AuditError> {
            let failed = |cause| AuditError::Failed { doing: "reading", path: path.clone(), cause: Arc::new(cause) };
            let mut lines = io::BufReader::with_capacity(1 << 20, File::open(&path).map_err(failed)?);
            let mut line = Vec::new();
            for _ in 0..number {
                line.clear();
                let room = lines.by_ref().take(MAX_LINE as u64);
                if { room }.read_until(b'\n', &mut line).map_err(failed)? == 0 {
                    return Ok(None);
                }
            }
            Ok(line.strip_suffix(b"\n").map(sha256))
        };
        tokio::task::spawn_blocking(read).await.map_err(|e| AuditError::Interrupted(e.to_string()))?
    }

    /// Whether the last write failed: what is about to be done could not be recorded.
    pub fn is_broken(&self) -> bool {
        self.shared.broken.load(Ordering::Acquire)
    }

    /// Adds an entry and gives its sequence. It is on the disk when this returns; after an error it may be there or not, and
    /// the act that it announces must not be done. Entries that come together share a sync.
    pub async fn record(&self, entry: Entry) -> Result<u64, AuditError> {
        let (answer, answered) = oneshot::channel();
        if self.shared.enqueue(Waiting { entry, answer })? {
            let shared = Arc::clone(&self.shared);
            tokio::task::spawn_blocking(move || shared.write_what_waits());
        }
        match tokio::time::timeout(ANSWER_WITHIN, answered).await {
            Ok(Ok(recorded)) => recorded,
            Ok(Err(_)) => Err(AuditError::Interrupted("its writer has ended".to_owned())),
            Err(_) => Err(AuditError::Interrupted("the disk does not answer".to_owned())),
        }
    }
}

impl Shared {
    /// Whether somebody must write.
    fn enqueue(&self, waiting: Waiting) -> Result<bool, AuditError> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.waiting.len() >= QUEUE {
            return Err(AuditError::Interrupted(format!("{QUEUE} entries wait for the disk already")));
        }
        queue.waiting.push(waiting);
        Ok(!std::mem::replace(&mut queue.writing, true))
    }

    fn write_what_waits(&self) {
        loop {
            let batch: Vec<_> = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                let count = queue.waiting.len().min(BATCH);
                if count == 0 {
                    queue.writing = false;
                    return;
                }
                queue.waiting.drain(..count).collect()
            };
            let (entries, answers): (Vec<_>, Vec<_>) =
                batch.into_iter().map(|waiting| (waiting.entry, waiting.answer)).unzip();
            // A panic leaves the writer without a file, so that the next one opens it anew.
            let write = || self.writer.lock().unwrap_or_else(PoisonError::into_inner).add(entries);
            let written = catch_unwind(AssertUnwindSafe(write));
            let written = written.unwrap_or_else(|_| Err(AuditError::Interrupted("its writer panicked".to_owned())));
            self.broken.store(written.is_err(), Ordering::Release);
            match written {
                Ok(recorded) => answers.into_iter().zip(recorded).for_each(|(answer, one)| drop(answer.send(one))),
                Err(error) => answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone())))),
            }
        }
    }
}

struct Writer {
    path: PathBuf,
    node: String,
    patience: Duration,
    /// None after a write that failed: nobody knows what such a handle still writes.
    file: Option<File>,
    /// Up to where the log is known to be on the disk; none before it was opened first.
    known: Option<ChainHead>,
}

impl Writer {
    /// Appends the entries with one sync, and gives each its sequence; one that is too long is refused alone.
    fn add(&mut self, entries: Vec<Entry>) -> Result<Vec<Result<u64, AuditError>>, AuditError> {
        // Taken and put back: every other way out leaves none.
        let (file, mut head) = match (self.file.take(), self.known) {
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
        // Nobody else writes it: another length is somebody's work.
        if file.metadata().map_err(self.failed("looking at"))?.len() != head.end {
            return Err(self.damaged("it has not the length of what was written"));
        }
        (self.known, self.file) = (Some(head), Some(file));
        Ok(recorded)
    }

    /// Opens the file and finds the end of the chain, so that the next line follows from what the disk has.
    fn load(&mut self) -> Result<(File, ChainHead), AuditError> {
        let file = self.open_and_lock()?;
        let length = file.metadata().map_err(self.failed("looking at"))?.len();
        // After a failed sync the system may show bytes that never reach the disk, and call them written. They were told to
        // nobody: what is known to be durable counts, and the rest goes as if it had been cut off.
        let end = self.known.map_or(length, |known| known.end);
        if length < end {
            return Err(self.damaged("it is shorter than what was written"));
        }
        let mut head = self.read_head(&file, end)?;
        if self.known.is_some_and(|known| known != head) {
            return Err(self.damaged("its last line is not the one that was written"));
        }
        let cut = length - head.end;
        if cut > 0 {
            // A crash between the two loses the entry that tells of the cut: of bytes that were told to nobody.
            file.set_len(head.end).map_err(self.failed("cutting an unfinished line off"))?;
            let entry = Entry::new("sppd", "audit.cut", Outcome::Done).with("bytes", cut);
            let (line, next) = head.next_line(&self.node, now(), entry)?;
            self.write(&file, &line)?;
            head = next;
            self.known = Some(head);
            tracing::warn!(log = %self.path.display(), bytes = cut, "an unfinished line was cut off the audit log");
        }
        Ok((file, head))
    }

    fn open_and_lock(&self) -> Result<File, AuditError> {
        let opened = OpenOptions::new().read(true).append(true).open(&self.path);
        let file = opened.map_err(|cause| match cause.kind() {
            io::ErrorKind::NotFound => AuditError::Missing { path: self.path.clone(), cause: Arc::new(cause) },
            _ => self.failed("opening")(cause),
        })?;
        let begun = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(cause)) => return Err(self.failed("locking")(cause)),
                Err(TryLockError::WouldBlock) if begun.elapsed() < self.patience => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(TryLockError::WouldBlock) => return Err(AuditError::InUse(self.path.clone())),
            }
        }
    }

    fn read_head(&self, file: &File, end: u64) -> Result<ChainHead, AuditError> {
        let begin = end.saturating_sub(TAIL);
        let mut tail = vec![0; (end - begin) as usize];
        file.read_exact_at(&mut tail, begin).map_err(self.failed("reading"))?;
        match ChainHead::node_of_tail(&tail) {
            Some(node) if node != self.node => {
                Err(self.damaged(&format!("it is the log of the node {node}, not of {}", self.node)))
            }
            _ => ChainHead::of_tail(&tail, begin).map_err(|why| self.damaged(&why)),
        }
    }

    /// Appends lines, durably.
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

    use super::super::verify;
    use super::*;

    /// A log that was made and has so many entries.
    async fn log_of(entries: u64) -> (tempfile::TempDir, PathBuf, AuditLog) {
        let place = spp_testkit::files::temp_dir();
        let dir = place.path().join("some/audit");
        AuditLog::create(&dir).unwrap();
        let log = open(&dir).unwrap();
        for n in 0..entries {
            assert_eq!(log.record(entry(n)).await.unwrap(), n);
        }
        (place, dir, log)
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
    async fn what_was_recorded_is_there_in_the_next_life_and_the_chain_goes_on() {
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
    async fn a_log_is_made_by_an_officer_once_and_by_nobody_else() {
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
    async fn only_one_writer_has_it() {
        let (_place, dir, log) = log_of(1).await;
        assert!(matches!(open(&dir).map(drop), Err(AuditError::InUse(_))));
        drop(log);
        open(&dir).unwrap();
    }

    #[tokio::test]
    async fn a_line_that_a_crash_cut_off_goes_and_its_length_is_told() {
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
            assert!(text.contains("\"act\":\"audit.cut\",\"details\":{\"bytes\":\"13\"}"), "{text}");
        }
    }

    #[tokio::test]
    async fn an_end_that_is_no_entry_is_not_gone_on_from() {
        let (_place, dir, log) = log_of(1).await;
        drop(log);
        let right = fs::read(dir.join(FILE)).unwrap();
        append(&dir, b"{\"sequence\":1}\n");
        assert!(matches!(open(&dir).map(drop), Err(AuditError::Damaged { .. })));
        fs::write(dir.join(FILE), [&right[..], &vec![b'x'; TAIL as usize]].concat()).unwrap();
        assert!(matches!(open(&dir).map(drop), Err(AuditError::Damaged { .. })));
        assert!(matches!(verify(&dir), Err(AuditError::Broken { line: 2, .. })));
    }

    #[tokio::test]
    async fn after_a_failed_write_the_chain_goes_on_from_what_is_durable() {
        let (_place, dir, log) = log_of(2).await;
        let lose_handle = || log.shared.writer.lock().unwrap().file = Some(File::open(dir.join(FILE)).unwrap());
        lose_handle();
        assert!(matches!(log.record(entry(2)).await, Err(AuditError::Failed { doing: "writing", .. })));
        assert_eq!(log.record(entry(2)).await.unwrap(), 2);
        // Failed but persisted: the line is there, yet whoever wrote it was told that it is not.
        let before = fs::read(dir.join(FILE)).unwrap();
        log.record(entry(3)).await.unwrap();
        let after = fs::read(dir.join(FILE)).unwrap();
        fs::write(dir.join(FILE), &before).unwrap();
        log.shared.writer.lock().unwrap().known = Some(ChainHead::of_tail(&before, 0).unwrap());
        lose_handle();
        log.record(entry(4)).await.unwrap_err();
        append(&dir, &after[before.len()..]);
        assert_eq!(log.record(entry(4)).await.unwrap(), 4, "after the entry that tells of the cut");
        assert_eq!(verify(&dir).unwrap().entries, 5);
        // What was durable and no longer is stops everything.
        fs::write(dir.join(FILE), &before).unwrap();
        lose_handle();
        log.record(entry(5)).await.unwrap_err();
        assert!(matches!(log.record(entry(5)).await, Err(AuditError::Damaged { .. })));
    }

    #[tokio::test]
    async fn an_entry_that_is_too_long_is_refused_and_costs_nothing_else() {
        let (_place, dir, log) = log_of(1).await;
        let long = entry(1).with("much", "x".repeat(crate::audit::chain::MAX_LINE));
        assert!(matches!(log.record(long).await, Err(AuditError::TooLong(_))));
        let longest = entry(1).with("much", "x".repeat(crate::audit::chain::MAX_LINE - 400));
        log.record(longest.clone()).await.unwrap();
        drop(log);
        append(&dir, &vec![b'x'; crate::audit::chain::MAX_LINE - 1]);
        let log = open(&dir).unwrap();
        assert_eq!(log.record(longest).await.unwrap(), 3);
        assert_eq!(verify(&dir).unwrap().entries, 4);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_at_once_make_one_chain() {
        let (_place, dir, log) = log_of(0).await;
        let log = Arc::new(log);
        let record = |n| {
            let log = Arc::clone(&log);
            tokio::spawn(async move { log.record(entry(n)).await.unwrap() })
        };
        let mut given = Vec::new();
        for task in (0..200).map(record).collect::<Vec<_>>() {
            given.push(task.await.unwrap());
        }
        given.sort_unstable();
        assert_eq!(given, (0..200).collect::<Vec<_>>());
        assert_eq!(verify(&dir).unwrap().entries, 200);
    }
}
