//! The only thread that reads and writes a database. It commits all queued transactions with one sync, then answers them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::StoreOptions;
use super::directory::{Fs, StoreDir};
use super::engine::{DatabaseKind, Engine};
use super::view::View;
use crate::store::StoreError;

/// Capacity of the call queue. Further callers wait.
const QUEUE: usize = 1024;
/// Maximum transactions per sync. Their writes usually stay well below the size of a sled segment.
const BATCH: usize = 128;
/// Timeout of a call. The transaction may still be committed later.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
const MIN_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Maximum wait for the last batch when a store is dropped.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Handle of a committer thread. Dropping it commits all queued transactions and closes the database.
pub(super) struct Committer {
    store_dir: Arc<StoreDir>,
    kind: &'static DatabaseKind,
    queue: Option<mpsc::Sender<Box<dyn Job>>>,
    outage: Outage,
    closed: Mutex<Receiver<()>>,
}

/// Why the database is unavailable; `None` while it is open.
type Outage = Arc<Mutex<Option<String>>>;

impl Committer {
    /// Creates a database and opens it. The directory must not exist.
    pub(super) fn create(
        kind: &'static DatabaseKind,
        dir: &Path,
        options: &StoreOptions,
        fs: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let store_dir = Arc::new(StoreDir::create(&kind.store, dir, options, fs)?);
        Engine::init(store_dir.clone(), kind)?;
        store_dir.write_marker()?;
        Self::start(kind, store_dir)
    }

    /// Opens an existing database.
    pub(super) fn open(
        kind: &'static DatabaseKind,
        dir: &Path,
        options: &StoreOptions,
        fs: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        Self::start(kind, Arc::new(StoreDir::open(&kind.store, dir, options, fs)?))
    }

    fn start(kind: &'static DatabaseKind, store_dir: Arc<StoreDir>) -> Result<Self, StoreError> {
        let engine = Engine::open(&store_dir, kind)?;
        let (queue, jobs) = mpsc::channel(QUEUE);
        let (closing, closed) = channel();
        let outage = Outage::default();
        let worker = Worker { kind, store_dir: store_dir.clone(), jobs, outage: outage.clone(), _closing: closing };
        std::thread::Builder::new()
            .name(format!("commit-{}", kind.store.marker))
            .spawn(move || worker.run(engine))
            .map_err(|e| store_dir.failed("starting the committer", e))?;
        Ok(Self { store_dir, kind, queue: Some(queue), outage, closed: Mutex::new(closed) })
    }

    /// Runs a transaction and returns its result once all data that it wrote or may have read is durable. Cancelling the call
    /// does not cancel the transaction.
    pub(super) async fn run<T, E, F>(&self, operation: &'static str, transaction: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        F: FnOnce(&mut View<'_>) -> Result<T, E> + Send + 'static,
    {
        self.check_open(operation)?;
        let (reply, answer) = oneshot::channel();
        let job = Transaction { kind: self.kind, operation, run: Some(transaction), result: None, reply };
        let answered = async {
            let queue = self.queue.as_ref().ok_or("the store is closed")?;
            queue.send(Box::new(job)).await.map_err(|_| "the committer thread has ended")?;
            answer.await.map_err(|_| "the committer thread has ended")
        };
        match tokio::time::timeout(CALL_TIMEOUT, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(cause)) => Err(self.failed(operation, cause)),
            Err(_) => Err(self.failed(operation, "the disk does not respond")),
        }
    }

    /// Free bytes, at most one second old, and the floor.
    pub(super) fn disk_space(&self) -> Result<(u64, u64), StoreError> {
        self.check_open("reading the free disk space")?;
        Ok((self.store_dir.free()?, self.store_dir.options.floor_bytes))
    }

    fn check_open(&self, operation: &'static str) -> Result<(), StoreError> {
        match self.outage.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(cause) => Err(self.failed(operation, format!("the store is being reopened after an error: {cause}"))),
            None => Ok(()),
        }
    }

    fn failed<E: From<StoreError>>(&self, operation: &'static str, cause: impl ToString) -> E {
        self.store_dir.failed(operation, cause).into()
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        drop(self.queue.take());
        // The worker's end drops its sender. The timeout lets the process exit even if the disk hangs.
        let _ = self.closed.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(CLOSE_TIMEOUT);
    }
}

/// A queued transaction.
trait Job: Send {
    /// Runs the transaction. Returns whether to keep its writes.
    fn run(&mut self, view: &mut View<'_>) -> bool;
    /// Sends the caller the result, or why the batch failed.
    fn answer(self: Box<Self>, batch: &Result<(), String>);
}

struct Transaction<T, E, F> {
    kind: &'static DatabaseKind,
    operation: &'static str,
    run: Option<F>,
    result: Option<Result<T, E>>,
    reply: oneshot::Sender<Result<T, E>>,
}

impl<T, E, F> Job for Transaction<T, E, F>
where
    T: Send,
    E: From<StoreError> + Send,
    F: FnOnce(&mut View<'_>) -> Result<T, E> + Send,
{
    fn run(&mut self, view: &mut View<'_>) -> bool {
        self.result = self.run.take().map(|run| run(view));
        matches!(self.result, Some(Ok(_)))
    }

    /// If the batch failed, its error replaces every result, because each may depend on an earlier transaction of the batch.
    fn answer(self: Box<Self>, batch: &Result<(), String>) {
        let failed = |cause: &str| {
            let (store, operation) = (self.kind.store.name, self.operation);
            Err(StoreError::Failed { store, operation, cause: cause.to_owned() }.into())
        };
        let answer = match (batch, self.result) {
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => failed("the transaction did not run"),
            (Err(cause), _) => failed(cause),
        };
        // The caller may have dropped the call.
        let _ = self.reply.send(answer);
    }
}

/// State of the committer thread.
struct Worker {
    kind: &'static DatabaseKind,
    store_dir: Arc<StoreDir>,
    jobs: mpsc::Receiver<Box<dyn Job>>,
    outage: Outage,
    /// Dropped last: signals [`Committer::drop`] that the database is closed.
    _closing: Sender<()>,
}

impl Worker {
    fn run(mut self, engine: Engine) {
        let mut open = Some(engine);
        while let Some(engine) = open.take() {
            let outcome = self.serve(&engine);
            close(engine);
            if let Err(cause) = outcome {
                tracing::error!(
                    store = self.kind.store.name, dir = %self.store_dir.dir.display(), cause,
                    "database failed; reopening"
                );
                open = self.reopen();
            }
        }
    }

    /// Serves until the store is closed (`Ok`) or the database handle becomes unusable.
    fn serve(&mut self, engine: &Engine) -> Result<(), String> {
        while let Some(first) = self.jobs.blocking_recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok(next) = self.jobs.try_recv()
            {
                batch.push(next);
            }
            let outcome = catch_unwind(AssertUnwindSafe(|| self.commit(engine, &mut batch)))
                .unwrap_or_else(|_| Err("a transaction or sled panicked".into()));
            if let Err(cause) = &outcome {
                // Set before answering, so that an immediate retry fails fast.
                self.set_outage(Some(cause.clone()));
            }
            for job in batch {
                job.answer(&outcome);
            }
            outcome?;
        }
        Ok(())
    }

    /// Runs the transactions of a batch in order, each on the results of earlier ones, and makes them durable.
    fn commit(&self, engine: &Engine, batch: &mut [Box<dyn Job>]) -> Result<(), String> {
        let mut view = engine.view(self.kind.store.name);
        for job in batch {
            if job.run(&mut view) {
                view.accept();
            } else {
                view.roll_back();
            }
            if let Some(cause) = view.read_error() {
                return Err(cause);
            }
        }
        let changes = view.into_changes();
        if changes.is_empty() {
            // All readable data is synced: every earlier batch was synced, or its handle was closed.
            return Ok(());
        }
        engine.commit(changes)?;
        self.store_dir.ensure_reserve();
        Ok(())
    }

    /// Reopens the database, retrying until it succeeds or the store is dropped (`None`). Calls fail fast while it retries.
    fn reopen(&mut self) -> Option<Engine> {
        let mut backoff = MIN_BACKOFF;
        loop {
            let deadline = Instant::now() + backoff;
            while Instant::now() < deadline {
                if !self.reject_queued() {
                    return None;
                }
                std::thread::sleep(MIN_BACKOFF / 5);
            }
            match Engine::open(&self.store_dir, self.kind) {
                Ok(engine) => {
                    tracing::info!(store = self.kind.store.name, dir = %self.store_dir.dir.display(), "database reopened");
                    self.set_outage(None);
                    return Some(engine);
                }
                Err(error) => {
                    tracing::warn!(store = self.kind.store.name, %error, "cannot reopen database; retrying");
                    self.set_outage(Some(error.to_string()));
                }
            }
            backoff = MAX_BACKOFF.min(backoff * 2);
        }
    }

    /// Fails the calls that were queued before the outage was visible. Returns whether the store is still in use.
    fn reject_queued(&mut self) -> bool {
        loop {
            match self.jobs.try_recv() {
                Ok(job) => job.answer(&Err("the store is being reopened".into())),
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn set_outage(&self, cause: Option<String>) {
        *self.outage.lock().unwrap_or_else(PoisonError::into_inner) = cause;
    }
}

/// Closes the database. sled panics if the last sync fails; acknowledged data is already synced by then.
fn close(engine: Engine) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(engine)));
}
