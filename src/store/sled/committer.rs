//! The one thread that reads and writes a database: it takes what has queued up, commits it with one sync, then answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::StoreOptions;
use super::directory::{Fs, StoreDir};
use super::engine::{Engine, Kind};
use super::view::View;
use crate::store::StoreError;

/// Calls that may wait before more of them have to.
const QUEUE: usize = 1024;
/// Most transactions that share a sync. Their writes stay well below one of sled's segments in the usual case.
const BATCH: usize = 128;
/// When a caller is told that the disk does not answer. What it asked for may still happen.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LAST_BACKOFF: Duration = Duration::from_secs(5);
/// How long dropping a store waits for the last batch.
const CLOSE_WITHIN: Duration = Duration::from_secs(10);

/// A database behind its committer. Dropping it finishes what is queued and closes the database.
pub(super) struct Committer {
    place: Arc<StoreDir>,
    kind: &'static Kind,
    queue: Option<mpsc::Sender<Box<dyn Job>>>,
    away: Unavailable,
    closed: Mutex<Receiver<()>>,
}

/// Why the database is away, while it is.
type Unavailable = Arc<Mutex<Option<String>>>;

impl Committer {
    /// Makes a new database in a directory that does not exist, and opens it.
    pub(super) fn create(
        kind: &'static Kind,
        dir: &Path,
        options: &StoreOptions,
        door: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        let place = Arc::new(StoreDir::make(&kind.store, dir, options, door)?);
        Engine::found(place.clone(), kind)?;
        place.finish()?;
        Self::start(kind, place)
    }

    /// Opens an existing database.
    pub(super) fn open(
        kind: &'static Kind,
        dir: &Path,
        options: &StoreOptions,
        door: Arc<dyn Fs>,
    ) -> Result<Self, StoreError> {
        Self::start(kind, Arc::new(StoreDir::take(&kind.store, dir, options, door)?))
    }

    fn start(kind: &'static Kind, place: Arc<StoreDir>) -> Result<Self, StoreError> {
        let engine = Engine::open(&place, kind)?;
        let (queue, jobs) = mpsc::channel(QUEUE);
        let (closes, closed) = channel();
        let away = Unavailable::default();
        let worker = Worker { kind, place: place.clone(), jobs, away: away.clone(), _closes: closes };
        std::thread::Builder::new()
            .name(format!("commit-{}", kind.store.marker))
            .spawn(move || worker.run(engine))
            .map_err(|e| place.failed("starting the committer", e))?;
        Ok(Self { place, kind, queue: Some(queue), away, closed: Mutex::new(closed) })
    }

    /// Runs a transaction and returns its result once everything that it wrote or could have read is durable. Should the
    /// caller go away meanwhile, the transaction still happens.
    pub(super) async fn run<T, E, F>(&self, doing: &'static str, transaction: F) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        F: FnOnce(&mut View<'_>) -> Result<T, E> + Send + 'static,
    {
        self.must_be_open(doing)?;
        let (reply, answer) = oneshot::channel();
        let job = Transaction { kind: self.kind, doing, run: Some(transaction), result: None, reply };
        let answered = async {
            let queue = self.queue.as_ref().ok_or("it is closed")?;
            queue.send(Box::new(job)).await.map_err(|_| "its committer has ended")?;
            answer.await.map_err(|_| "its committer has ended")
        };
        match tokio::time::timeout(ANSWER_WITHIN, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(cause)) => Err(self.failed(doing, cause)),
            Err(_) => Err(self.failed(doing, "the disk does not answer")),
        }
    }

    /// Free bytes (at most a second old) and the floor.
    pub(super) fn room(&self) -> Result<(u64, u64), StoreError> {
        self.must_be_open("looking at the room on the disk")?;
        Ok((self.place.free()?, self.place.options.floor_bytes))
    }

    fn must_be_open(&self, doing: &'static str) -> Result<(), StoreError> {
        match self.away.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            Some(cause) => Err(self.failed(doing, format!("the store is being opened again after: {cause}"))),
            None => Ok(()),
        }
    }

    fn failed<E: From<StoreError>>(&self, doing: &'static str, cause: impl ToString) -> E {
        self.place.failed(doing, cause).into()
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        drop(self.queue.take());
        // The end of the worker drops its sender. A disk that hangs must not keep the process from ending.
        let _ = self.closed.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(CLOSE_WITHIN);
    }
}

/// A transaction in the queue.
trait Job: Send {
    /// Runs it; whether its writes are kept.
    fn run(&mut self, view: &mut View<'_>) -> bool;
    /// Tells the caller: its result, or why the batch failed.
    fn answer(self: Box<Self>, batch: &Result<(), String>);
}

struct Transaction<T, E, F> {
    kind: &'static Kind,
    doing: &'static str,
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

    /// A refusal, too, may rest on what an earlier transaction of the batch wrote: if the batch failed, nothing is known.
    fn answer(self: Box<Self>, batch: &Result<(), String>) {
        let failed = |cause: &str| {
            let (store, doing) = (self.kind.store.name, self.doing);
            Err(StoreError::Failed { store, doing, cause: cause.to_owned() }.into())
        };
        let answer = match (batch, self.result) {
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => failed("it was not run"),
            (Err(cause), _) => failed(cause),
        };
        // The caller may be gone.
        let _ = self.reply.send(answer);
    }
}

/// The thread.
struct Worker {
    kind: &'static Kind,
    place: Arc<StoreDir>,
    jobs: mpsc::Receiver<Box<dyn Job>>,
    away: Unavailable,
    /// Dropped last: tells [`Committer::drop`] that the database is closed.
    _closes: Sender<()>,
}

impl Worker {
    fn run(mut self, engine: Engine) {
        let mut open = Some(engine);
        while let Some(engine) = open.take() {
            let served = self.serve(&engine);
            close(engine);
            if let Err(cause) = served {
                tracing::error!(
                    store = self.kind.store.name, dir = %self.place.dir.display(), cause,
                    "the database failed; it is opened again"
                );
                open = self.reopen();
            }
        }
    }

    /// Serves until the store is closed (`Ok`), or until the handle is no longer good.
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
                // First, so that whoever is told and tries again at once is told at once, too.
                self.set_away(Some(cause.clone()));
            }
            for job in batch {
                job.answer(&outcome);
            }
            outcome?;
        }
        Ok(())
    }

    /// Runs a batch's transactions in order, each over what the ones before it wrote, and makes all of it durable.
    fn commit(&self, engine: &Engine, batch: &mut [Box<dyn Job>]) -> Result<(), String> {
        let mut view = engine.view(self.kind.store.name);
        for job in batch {
            if job.run(&mut view) {
                view.keep();
            } else {
                view.forget();
            }
            if let Some(cause) = view.broken() {
                return Err(cause);
            }
        }
        let changes = view.into_changes();
        if changes.is_empty() {
            // All that could be read was synced before: every earlier batch was, or its handle was given up.
            return Ok(());
        }
        engine.commit(changes)?;
        self.place.keep_reserve();
        Ok(())
    }

    /// Opens the database again, however long it takes; `None` once nobody needs it any more. Calls fail fast meanwhile.
    fn reopen(&mut self) -> Option<Engine> {
        let mut backoff = FIRST_BACKOFF;
        loop {
            let until = Instant::now() + backoff;
            while Instant::now() < until {
                if !self.refuse_waiting() {
                    return None;
                }
                std::thread::sleep(FIRST_BACKOFF / 5);
            }
            match Engine::open(&self.place, self.kind) {
                Ok(engine) => {
                    tracing::info!(store = self.kind.store.name, dir = %self.place.dir.display(), "the database is open again");
                    self.set_away(None);
                    return Some(engine);
                }
                Err(error) => {
                    tracing::warn!(store = self.kind.store.name, %error, "the database cannot be opened yet");
                    self.set_away(Some(error.to_string()));
                }
            }
            backoff = LAST_BACKOFF.min(backoff * 2);
        }
    }

    /// Answers the calls that came before they could see that the database is away; whether the store is still in use.
    fn refuse_waiting(&mut self) -> bool {
        loop {
            match self.jobs.try_recv() {
                Ok(job) => job.answer(&Err("the store is being opened again".into())),
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn set_away(&self, cause: Option<String>) {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = cause;
    }
}

/// sled panics when the last sync of a closing database fails. What was acknowledged was synced before.
fn close(engine: Engine) {
    let _ = catch_unwind(AssertUnwindSafe(|| drop(engine)));
}
