//! The connection to a worker that serves: calls go out, answers find who waits for them.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

use super::failure::{Failure, FailureClass};
use super::statistics::CallStatistics;
use super::token::TokenIdentity;
use super::transport::TransportKey;
use super::wire::{self, Answer, Operation, Priority, Reply, Request, Started};
use crate::names::KeyName;

/// How long a call may take, waiting for a processor that the line needs included: one RSA-4096 pair takes seconds of it.
pub(super) const BACKGROUND_LIMIT: Duration = Duration::from_secs(15 * 60);

/// What handle and supervisor share: figures for the status, and what was destroyed since the register was read.
#[derive(Default)]
pub(crate) struct Counters {
    /// Keys of the register that no worker is to look for any more.
    pub(crate) destroyed: Mutex<BTreeSet<KeyName>>,
    pub(crate) starts: AtomicU64,
    /// What was asked of workers, by verb, and what came of it.
    pub(crate) calls: CallStatistics,
    /// Calls of the line that were answered.
    pub(crate) answered: AtomicU64,
    /// What was done by workers, each pair of a batch counted, to replace those that leak.
    pub(crate) operations: AtomicU64,
}

/// A call that waits so long may be one that is never answered.
const LATE: Duration = Duration::from_secs(1);

/// A worker that serves.
pub(crate) struct Connection {
    outgoing: mpsc::Sender<Zeroizing<Vec<u8>>>,
    pub(super) pending: Arc<Pending>,
    next_id: AtomicU64,
    pub(crate) transport: TransportKey,
    pub(crate) module: String,
    pub(crate) token: TokenIdentity,
    /// Why the worker must be replaced, once somebody says so.
    condemned: watch::Sender<Option<String>>,
    failures: Mutex<Failures>,
}

/// A call that is with the worker.
struct Waiting {
    lane: Priority,
    verbs: Vec<&'static str>,
    since: Instant,
    waiter: oneshot::Sender<Result<Vec<Answer>, Failure>>,
}

/// Calls that are with the worker; none once its replies have ended, since nobody would answer them.
pub(super) struct Pending(Mutex<Option<HashMap<u64, Waiting>>>);

impl Pending {
    fn new() -> Self {
        Self(Mutex::new(Some(HashMap::new())))
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, Waiting>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The receiver of the answer; it ends at once if the worker has ended.
    fn wait_for(
        &self,
        id: u64,
        lane: Priority,
        verbs: Vec<&'static str>,
    ) -> oneshot::Receiver<Result<Vec<Answer>, Failure>> {
        let (waiter, answer) = oneshot::channel();
        if let Some(map) = self.map().as_mut() {
            map.insert(id, Waiting { lane, verbs, since: Instant::now(), waiter });
        }
        answer
    }

    fn take(&self, id: u64) -> Option<Waiting> {
        self.map().as_mut()?.remove(&id)
    }

    /// Tells everybody who waits, and who comes later, that the worker has ended.
    pub(super) fn close(&self) {
        *self.map() = None;
    }

    pub(super) fn count(&self, lane: Priority) -> usize {
        self.map().as_ref().map_or(0, |map| map.values().filter(|call| call.lane == lane).count())
    }

    /// Whether a call of the line waits so long that another HSM is asked first, if there is one.
    fn is_late(&self) -> bool {
        let late = |call: &Waiting| call.lane == Priority::Line && call.since.elapsed() > LATE;
        self.map().as_ref().is_some_and(|map| map.values().any(late))
    }

    /// Whether a call waits longer than any should.
    pub(super) fn has_one_that_hangs(&self, hang_after: Duration) -> bool {
        let limit = |lane| if lane == Priority::Line { hang_after } else { BACKGROUND_LIMIT.max(hang_after) };
        self.map().as_ref().is_some_and(|map| map.values().any(|call| call.since.elapsed() > limit(call.lane)))
    }
}

/// Starts the two tasks that carry frames.
pub(super) fn connect(
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
    transport: TransportKey,
    started: Started,
    counters: Arc<Counters>,
) -> (Connection, oneshot::Receiver<String>) {
    let (outgoing, frames) = mpsc::channel(1024);
    let (closing, closed) = oneshot::channel();
    let pending = Arc::new(Pending::new());
    tokio::spawn(send_frames(write, frames));
    let (condemned, _) = watch::channel(None);
    tokio::spawn(receive_replies(read, Arc::clone(&pending), counters, closing));
    let (next_id, Started { module, token, .. }) = (AtomicU64::new(1), started);
    (Connection { outgoing, pending, next_id, transport, module, token, condemned, failures: Mutex::default() }, closed)
}

async fn send_frames(mut write: OwnedWriteHalf, mut frames: mpsc::Receiver<Zeroizing<Vec<u8>>>) {
    while let Some(frame) = frames.recv().await {
        if write.write_all(&frame).await.is_err() {
            return;
        }
    }
}

async fn receive_replies(
    mut read: BufReader<OwnedReadHalf>,
    pending: Arc<Pending>,
    counters: Arc<Counters>,
    closing: oneshot::Sender<String>,
) {
    let why = loop {
        let body = match read_frame(&mut read).await {
            Ok(Some(body)) => body,
            Ok(None) => break "it ended".to_owned(),
            Err(e) => break e,
        };
        let reply: Reply = match wire::parse(&body) {
            Ok(reply) => reply,
            Err(e) => break format!("it sent what cannot be read: {e}"),
        };
        counters.operations.fetch_add(reply.result.as_ref().map_or(1, |answers| weight(answers)), Ordering::Relaxed);
        if let Some(call) = pending.take(reply.id) {
            counters.calls.count(&call.verbs, &reply);
            if call.lane == Priority::Line {
                counters.answered.fetch_add(1, Ordering::Relaxed);
            }
            let _ = call.waiter.send(reply.result);
        }
    };
    pending.close();
    let _ = closing.send(why);
}

/// Calls that failed with none in between that did not. A module that only fails is helped by a new worker, whatever it says.
#[derive(Default)]
struct Failures {
    count: u32,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Failures {
    /// So many in a row, over so long.
    const LIMIT: (u32, Duration) = (8, Duration::from_secs(1));
    /// So long after a failure others are asked first. Whoever fails at once has always least to do.
    const AVOIDED: Duration = Duration::from_secs(1);
    /// So long after one that nothing has come well since, it is looked whether anything would.
    const DOUBTED: Duration = Duration::from_millis(500);

    /// Why the worker must be replaced, if it must.
    fn count(&mut self, failure: Option<&Failure>) -> Option<String> {
        let Some(failure) = failure else {
            *self = Self::default();
            return None;
        };
        self.count += 1;
        self.last = Some(Instant::now());
        let since = self.first.get_or_insert_with(Instant::now).elapsed();
        let (count, long) = Self::LIMIT;
        (self.count >= count && since >= long)
            .then(|| format!("{} calls failed one after the other; the last: {}", self.count, failure.message))
    }
}

/// What a request counts for in a worker's life.
fn weight(answers: &[Answer]) -> u64 {
    let one = |answer: &Answer| match answer {
        Answer::Made(pairs) => pairs.len(),
        Answer::Moved(blobs) => blobs.len(),
        _ => 0,
    };
    answers.iter().map(one).sum::<usize>().max(1) as u64
}

impl Connection {
    /// Sends operations and waits; `None` if the worker was lost meanwhile.
    pub(crate) async fn call(
        &self,
        lane: Priority,
        operations: Vec<Operation>,
        until: Instant,
    ) -> Option<Result<Vec<Answer>, Failure>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let budget_ms = u32::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u32::MAX);
        let verbs = operations.iter().map(Operation::verb).collect();
        let frame = wire::frame(&Request { id, lane, budget_ms, operations });
        let frame = match frame {
            Ok(frame) => frame,
            Err(e) => return Some(Err(Failure::new(FailureClass::Rejected, e))),
        };
        // Only what is on its way to the worker is waited for: a call that is given up before must not look like a hang.
        let place = self.outgoing.reserve().await.ok()?;
        let answer = self.pending.wait_for(id, lane, verbs);
        place.send(frame);
        answer.await.ok()
    }

    /// A call was answered, or failed at its first attempt. One that is tried again and again counts once: it may be the call's fault.
    pub(crate) fn note(&self, failure: Option<&Failure>) {
        let why = self.failures.lock().unwrap_or_else(PoisonError::into_inner).count(failure);
        why.inspect(|why| self.condemn(why));
    }

    /// It did not answer in its time.
    pub(crate) fn note_late(&self) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.count += 1;
        failures.last = Some(Instant::now());
    }

    /// Its keys work: whatever failed before, it may be asked again. That calls failed in a row is not forgotten, since other verbs
    /// may still do nothing else.
    pub(crate) fn note_checked(&self) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).last = None;
    }

    /// Whether the last call failed and nobody has asked again: where there are others, nobody does.
    pub(crate) fn is_doubtful(&self) -> bool {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.count > 0 && failures.last.is_some_and(|last| last.elapsed() >= Failures::DOUBTED)
    }

    /// Whether others are asked first: the last call failed a moment ago, or one is late.
    pub(crate) fn is_avoided(&self) -> bool {
        let last = self.failures.lock().unwrap_or_else(PoisonError::into_inner).last;
        last.is_some_and(|last| last.elapsed() < Failures::AVOIDED) || self.pending.is_late()
    }

    /// Has the worker replaced: what it answers is not right.
    pub(crate) fn condemn(&self, why: &str) {
        self.condemned.send_if_modified(|condemned| condemned.replace(why.to_owned()).is_none());
    }

    /// Resolves once the worker must be replaced, and says why.
    pub(crate) async fn condemned(&self) -> String {
        let mut condemned = self.condemned.subscribe();
        let why = condemned.wait_for(Option::is_some).await;
        why.ok().and_then(|why| why.clone()).unwrap_or_default()
    }
}

pub(super) async fn read_frame(read: &mut BufReader<OwnedReadHalf>) -> Result<Option<Zeroizing<Vec<u8>>>, String> {
    let mut prefix = [0; 4];
    match read.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e.to_string()),
    }
    let mut body = Zeroizing::new(vec![0; wire::frame_len(prefix)?]);
    read.read_exact(&mut body).await.map_err(|e| e.to_string())?;
    Ok(Some(body))
}

pub(super) async fn write_frame<T: serde::Serialize>(write: &mut OwnedWriteHalf, value: &T) -> Result<(), String> {
    write.write_all(&wire::frame(value)?).await.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixStream;

    use super::*;
    use crate::secret::SecretBytes;

    /// A call may reach a connection that has just ended, before the supervisor has told everybody.
    #[tokio::test]
    async fn a_call_on_an_ended_connection_is_told_at_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (read, write) = ours.into_split();
        let token = TokenIdentity { label: String::new(), serial: String::new() };
        let started = Started { module: String::new(), token, transport_key: Vec::new() };
        let transport =
            TransportKey::new(SecretBytes::new(Vec::new()), super::super::module::WrapMechanism::AesKeyWrapPad);
        let counters = Arc::new(Counters::default());
        let (connection, closed) = connect(BufReader::new(read), write, transport, started, counters);
        let call = async || {
            let call = connection.call(
                Priority::Line,
                vec![Operation::Random { len: 1 }],
                Instant::now() + Duration::from_secs(30),
            );
            tokio::time::timeout(Duration::from_secs(1), call).await
        };

        let (waiting, ()) = tokio::join!(call(), async { drop(theirs) });
        assert!(matches!(waiting, Ok(None)), "it waits for an answer that nobody will give");
        assert_eq!(closed.await.as_deref(), Ok("it ended"));
        for _ in 0..3 {
            assert!(matches!(call().await, Ok(None)), "a late call waits for an answer that nobody will give");
        }
        assert_eq!(connection.pending.count(Priority::Line), 0);
    }
}
