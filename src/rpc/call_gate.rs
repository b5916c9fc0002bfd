//! The door of every call: a request identifier, a span, a log line, and a task of its own.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use tonic::metadata::MetadataValue;
use tonic::{Code, Response, Status};
use tracing::Instrument as _;

use super::status::{is_refusal, reason_of, status_of};
use crate::audit::{Auditor, Entry, Outcome};
use crate::certificate::Caller;
use crate::provisioning::ProvisionError;

/// Most characters of a detail, and of the reason for a refusal, in the audit log.
const DETAIL: usize = 128;
const REASON: usize = 512;
/// The header that names a request in logs and answers.
const REQUEST_ID: &str = "x-request-id";

/// The door of one listener: so many calls may be inside at once, more are told to come again. Each costs memory, and the rooms
/// behind have queues of about the line's length. The public has a door of its own, so that it cannot crowd out the line.
#[derive(Clone)]
pub(super) struct CallGate {
    places: usize,
    free: Arc<Semaphore>,
    /// Where acts and refusals are recorded. The public's are not: nobody is behind them, and anybody could fill the log.
    auditor: Option<Arc<Auditor>>,
}

impl CallGate {
    /// For stations.
    pub(super) fn line(auditor: &Arc<Auditor>) -> Self {
        Self::with_places(1024, Some(Arc::clone(auditor)))
    }

    /// For officers.
    pub(super) fn officer(auditor: &Arc<Auditor>) -> Self {
        Self::with_places(64, Some(Arc::clone(auditor)))
    }

    /// For anybody.
    pub(super) fn public() -> Self {
        Self::with_places(128, None)
    }

    fn with_places(places: usize, auditor: Option<Arc<Auditor>>) -> Self {
        Self { places, free: Arc::new(Semaphore::new(places)), auditor }
    }

    /// A call that changes nothing: see [`call`]; refused at once when the house is full. What is refused is recorded.
    pub(super) async fn call<T, F>(&self, method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
    {
        // That something is not there is an answer, and stations ask so before they begin.
        let is_refusal =
            |error: &ProvisionError| !matches!(error, ProvisionError::NoSession(_) | ProvisionError::NoRecord);
        self.call_recording(method, caller, is_refusal, work).await
    }

    /// A call whose work records what it does, and how that ends, by itself; only what does not come that far is recorded here.
    pub(super) async fn call_on_record<T, F>(
        &self,
        method: &'static str,
        caller: &Caller,
        work: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
    {
        let not_begun =
            |error: &ProvisionError| matches!(error, ProvisionError::Invalid(_) | ProvisionError::Overloaded(_));
        self.call_recording(method, caller.to_string(), not_begun, work).await
    }

    async fn call_recording<T, F>(
        &self,
        method: &'static str,
        caller: String,
        is_recorded: fn(&ProvisionError) -> bool,
        work: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
    {
        let (place, places) = (Arc::clone(&self.free).try_acquire_owned(), self.places);
        let (auditor, refusal) = (self.auditor.clone(), Entry::new(&caller, method, Outcome::Begun));
        call(method, caller, async move {
            let done = match place {
                Ok(_place) => work.await,
                Err(_) => Err(ProvisionError::Overloaded(places)),
            };
            if let (Err(error), Some(auditor)) = (&done, &auditor)
                && is_recorded(error)
            {
                record_refusal(auditor, &refusal, error).await;
            }
            done
        })
        .await
    }

    /// A call that changes something: it is begun only if it can be recorded, and answered only when it is. What it did without an
    /// answer, a repeat finds done and has recorded. `told` adds what only the answer knows.
    pub(super) async fn act<T, F>(&self, act: AuditedCall<T>, work: F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
    {
        let AuditedCall { method, entry, announced, told } = act;
        let caller = entry.caller().to_owned();
        let (place, places) = (Arc::clone(&self.free).try_acquire_owned(), self.places);
        let auditor = self.auditor.clone();
        call(method, caller, async move {
            let Some(auditor) = auditor else { return work.await };
            let Ok(_place) = place else {
                let full = ProvisionError::Overloaded(places);
                record_refusal(&auditor, &entry, &full).await;
                return Err(full);
            };
            auditor.ready().await?;
            if announced {
                auditor.record(entry.ended(Outcome::Begun)).await?;
            }
            match work.await {
                Ok(done) => {
                    let entry = told(&done).into_iter().fold(entry, |entry, (name, value)| entry.with(name, value));
                    auditor.record(entry).await?;
                    Ok(done)
                }
                Err(error) if announced => {
                    auditor.count_refusal(reason_of(&error));
                    auditor.record(entry.ended(outcome_of(&error))).await?;
                    Err(error)
                }
                Err(error) => {
                    record_refusal(&auditor, &entry, &error).await;
                    Err(error)
                }
            }
        })
        .await
    }
}

/// What is recorded of a call that changes something.
pub(super) struct AuditedCall<T> {
    method: &'static str,
    entry: Entry,
    announced: bool,
    told: Told<T>,
}

type Told<T> = fn(&T) -> Vec<(&'static str, String)>;

impl<T> AuditedCall<T> {
    /// The method as logs name it, the act as the audit log does, and who calls.
    pub(super) fn new(method: &'static str, act: &'static str, caller: &Caller) -> Self {
        Self { method, entry: Entry::new(caller, act, Outcome::Done), announced: false, told: |_| Vec::new() }
    }

    /// With what it is done. What a caller wrote may be no more than a name.
    pub(super) fn with(self, name: &str, value: impl std::fmt::Display) -> Self {
        let value: String = value.to_string().chars().take(DETAIL).collect();
        Self { entry: self.entry.with(name, value), ..self }
    }

    /// Its beginning is recorded, too: what cannot be is not done.
    pub(super) fn announced(self) -> Self {
        Self { announced: true, ..self }
    }

    /// What the answer adds.
    pub(super) fn tell(self, told: Told<T>) -> Self {
        Self { told, ..self }
    }
}

async fn record_refusal(auditor: &Auditor, entry: &Entry, error: &ProvisionError) {
    auditor.refused(entry.ended(outcome_of(error)), reason_of(error)).await;
}

fn outcome_of(error: &ProvisionError) -> Outcome {
    let why = error.to_string().chars().take(REASON).collect();
    if is_refusal(error) { Outcome::Refused(why) } else { Outcome::Failed(why) }
}

/// Runs a call in a task of its own, so that a caller who hangs up does not stop a story between two steps, and tells how
/// it ended.
async fn call<T, F>(method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ProvisionError>> + Send + 'static,
{
    let id = request_id();
    let span = tracing::info_span!("rpc", method, request_id = %id, %caller);
    let began = Instant::now();
    let task = tokio::spawn(work.instrument(span.clone()));
    let result =
        task.await.unwrap_or_else(|e| Err(ProvisionError::Internal { doing: "answering", cause: e.to_string() }));
    let _in_span = span.enter();
    let milliseconds = began.elapsed().as_millis();
    let header = MetadataValue::try_from(&id).ok();
    match result {
        Ok(message) => {
            tracing::debug!(milliseconds, "answered");
            let mut response = Response::new(message);
            header.map(|value| response.metadata_mut().insert(REQUEST_ID, value));
            Ok(response)
        }
        Err(error) => {
            let mut status = status_of(&error);
            if status.code() == Code::Internal {
                tracing::error!(milliseconds, %error, "failed");
            } else {
                tracing::info!(milliseconds, code = ?status.code(), %error, "refused");
            }
            header.map(|value| status.metadata_mut().insert(REQUEST_ID, value));
            Err(status)
        }
    }
}

/// 8 random bytes in hex: enough to find a request in a day's log.
fn request_id() -> String {
    let mut bytes = [0; 8];
    // A failure of the random source leaves zeros: the request is served, its name is not unique.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    hex::encode(bytes)
}
