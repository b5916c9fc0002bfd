//! The connection to a running worker: sends calls and dispatches the replies to their callers.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use spp_format::names::KeyName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

use super::failure::Failure;
use super::failure_class::FailureClass;
use super::statistics::CallStatistics;
use super::token::TokenIdentity;
use super::transport::TransportKey;
use super::wire::{self, Answer, Operation, Priority, Reply, Request, Started};

/// Deadline of a background call. Includes waiting for a processor that the line uses: one RSA-4096 pair takes seconds.
pub(super) const BACKGROUND_LIMIT: Duration = Duration::from_secs(15 * 60);

/// State shared by handle and supervisor: status counters, and the keys destroyed since the manifest was read.
#[derive(Default)]
pub(crate) struct Counters {
    /// Destroyed keys of the manifest; workers must no longer look for them.
    pub(crate) destroyed: Mutex<BTreeSet<KeyName>>,
    pub(crate) starts: AtomicU64,
    /// Calls by operation and outcome.
    pub(crate) calls: CallStatistics,
    /// Line calls answered.
    pub(crate) answered: AtomicU64,
    /// Operations performed, each pair of a batch counted. Limits the life of workers whose module leaks memory.
    pub(crate) operations: AtomicU64,
}

/// A line call pending for longer counts as late: it may have hung.
const LATE: Duration = Duration::from_secs(1);

/// The connection to one worker.
pub(crate) struct Connection {
    outgoing: mpsc::Sender<Zeroizing<Vec<u8>>>,
    pub(super) pending: Arc<Pending>,
    next_id: AtomicU64,
    pub(crate) transport: TransportKey,
    pub(crate) module: String,
    pub(crate) token: TokenIdentity,
    /// Why the worker must be replaced, once a replacement was requested.
    replacement: watch::Sender<Option<String>>,
    failures: Mutex<Failures>,
}

/// A call sent to the worker and not yet answered.
struct PendingCall {
    priority: Priority,
    names: Vec<&'static str>,
    since: Instant,
    reply: oneshot::Sender<Result<Vec<Answer>, Failure>>,
}

/// The unanswered calls. `None` after the worker has ended, because no reply can arrive any more.
pub(super) struct Pending(Mutex<Option<HashMap<u64, PendingCall>>>);

impl Pending {
    fn new() -> Self {
        Self(Mutex::new(Some(HashMap::new())))
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Option<HashMap<u64, PendingCall>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a call and returns the receiver of its answer, which closes at once if the worker has ended.
    fn wait_for(
        &self,
        id: u64,
        priority: Priority,
        names: Vec<&'static str>,
    ) -> oneshot::Receiver<Result<Vec<Answer>, Failure>> {
        let (reply, answer) = oneshot::channel();
        if let Some(map) = self.map().as_mut() {
            map.insert(id, PendingCall { priority, names, since: Instant::now(), reply });
        }
        answer
    }

    fn take(&self, id: u64) -> Option<PendingCall> {
        self.map().as_mut()?.remove(&id)
    }

    /// Fails all pending and all later calls: the worker has ended.
    pub(super) fn close(&self) {
        *self.map() = None;
    }

    pub(super) fn count(&self, priority: Priority) -> usize {
        self.map().as_ref().map_or(0, |map| map.values().filter(|call| call.priority == priority).count())
    }

    /// Whether a line call has been pending for so long that other HSMs are preferred.
    fn is_late(&self) -> bool {
        let late = |call: &PendingCall| call.priority == Priority::Line && call.since.elapsed() > LATE;
        self.map().as_ref().is_some_and(|map| map.values().any(late))
    }

    /// Whether a call has been pending for longer than its limit.
    pub(super) fn has_hung_call(&self, hang_after: Duration) -> bool {
        let limit = |priority| if priority == Priority::Line { hang_after } else { BACKGROUND_LIMIT.max(hang_after) };
        self.map().as_ref().is_some_and(|map| map.values().any(|call| call.since.elapsed() > limit(call.priority)))
    }
}

/// Starts the two tasks that send and receive frames.
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
    let (replacement, _) = watch::channel(None);
    tokio::spawn(receive_replies(read, Arc::clone(&pending), counters, closing));
    let (next_id, Started { module, token, .. }) = (AtomicU64::new(1), started);
    (
        Connection { outgoing, pending, next_id, transport, module, token, replacement, failures: Mutex::default() },
        closed,
    )
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
    let reason = loop {
        let body = match read_frame(&mut read).await {
            Ok(Some(body)) => body,
            Ok(None) => break "worker ended".to_owned(),
            Err(e) => break e,
        };
        let reply: Reply = match wire::parse(&body) {
            Ok(reply) => reply,
            Err(e) => break format!("unreadable reply: {e}"),
        };
        counters.operations.fetch_add(reply.result.as_ref().map_or(1, |answers| weight(answers)), Ordering::Relaxed);
        if let Some(call) = pending.take(reply.id) {
            counters.calls.count(&call.names, &reply);
            if call.priority == Priority::Line {
                counters.answered.fetch_add(1, Ordering::Relaxed);
            }
            let _ = call.reply.send(reply.result);
        }
    };
    pending.close();
    let _ = closing.send(reason);
}

/// Counts consecutive failed calls. A module that only fails gets a new worker, whatever return value it gives.
#[derive(Default)]
struct Failures {
    count: u32,
    first: Option<Instant>,
    last: Option<Instant>,
}

impl Failures {
    /// The worker is replaced after this number of consecutive failures over at least this time.
    const LIMIT: (u32, Duration) = (8, Duration::from_secs(1));
    /// Other HSMs are preferred for this time after a failure. An HSM that fails at once would otherwise always have the lowest
    /// load.
    const DEPRIORITIZED_FOR: Duration = Duration::from_secs(1);
    /// The keys are checked if no call has succeeded for this time after a failure.
    const CHECK_AFTER: Duration = Duration::from_millis(500);

    /// Counts a result; returns the reason if the worker must be replaced.
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
            .then(|| format!("{} consecutive calls failed, the last with: {}", self.count, failure.message))
    }
}

/// The number of operations that a request counts towards the worker's operation limit.
fn weight(answers: &[Answer]) -> u64 {
    let one = |answer: &Answer| match answer {
        Answer::Made(pairs) => pairs.len(),
        Answer::Moved(blobs) => blobs.len(),
        _ => 0,
    };
    answers.iter().map(one).sum::<usize>().max(1) as u64
}

impl Connection {
    /// Sends operations and waits for the answer; `None` if the worker ended before it answered.
    pub(crate) async fn call(
        &self,
        priority: Priority,
        operations: Vec<Operation>,
        until: Instant,
    ) -> Option<Result<Vec<Answer>, Failure>> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let budget_ms = u32::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u32::MAX);
        let names = operations.iter().map(Operation::name).collect();
        let frame = wire::frame(&Request { id, priority, budget_ms, operations });
        let frame = match frame {
            Ok(frame) => frame,
            Err(e) => return Some(Err(Failure::new(FailureClass::Rejected, e))),
        };
        // Register the call only when it can be sent: a call cancelled before that must not look hung.
        let permit = self.outgoing.reserve().await.ok()?;
        let answer = self.pending.wait_for(id, priority, names);
        permit.send(frame);
        answer.await.ok()
    }

    /// Records that a call succeeded, or failed at its first attempt. Retries do not count: the call itself may be at fault.
    pub(crate) fn record(&self, failure: Option<&Failure>) {
        let reason = self.failures.lock().unwrap_or_else(PoisonError::into_inner).count(failure);
        reason.inspect(|reason| self.request_replacement(reason));
    }

    /// Records that a call was not answered in time.
    pub(crate) fn record_late(&self) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.count += 1;
        failures.last = Some(Instant::now());
    }

    /// Records that the key check passed, so that the HSM is preferred again. The count of consecutive failures stays, because
    /// other operations may still fail.
    pub(crate) fn record_check(&self) {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).last = None;
    }

    /// Whether the last call failed and no call has followed. With several HSMs none follows, because the others are preferred.
    pub(crate) fn needs_check(&self) -> bool {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.count > 0 && failures.last.is_some_and(|last| last.elapsed() >= Failures::CHECK_AFTER)
    }

    /// Whether other HSMs are preferred: a call failed recently, or one is late.
    pub(crate) fn is_deprioritized(&self) -> bool {
        let last = self.failures.lock().unwrap_or_else(PoisonError::into_inner).last;
        last.is_some_and(|last| last.elapsed() < Failures::DEPRIORITIZED_FOR) || self.pending.is_late()
    }

    /// Requests the replacement of the worker, for this reason.
    pub(crate) fn request_replacement(&self, reason: &str) {
        self.replacement.send_if_modified(|replacement| replacement.replace(reason.to_owned()).is_none());
    }

    /// Resolves with the reason when a replacement is requested.
    pub(crate) async fn replacement_requested(&self) -> String {
        let mut replacement = self.replacement.subscribe();
        let reason = replacement.wait_for(Option::is_some).await;
        reason.ok().and_then(|reason| reason.clone()).unwrap_or_default()
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
    use spp_format::secret::SecretBytes;
    use tokio::net::UnixStream;

    use super::*;

    /// A call can reach a connection that has just ended, before the supervisor has published the new state.
    #[tokio::test]
    async fn call_on_ended_connection_fails_at_once() {
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
        assert!(matches!(waiting, Ok(None)), "the call waits for an answer that cannot arrive");
        assert_eq!(closed.await.as_deref(), Ok("worker ended"));
        for _ in 0..3 {
            assert!(matches!(call().await, Ok(None)), "a late call waits for an answer that cannot arrive");
        }
        assert_eq!(connection.pending.count(Priority::Line), 0);
    }
}
