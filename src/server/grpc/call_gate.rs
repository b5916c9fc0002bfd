//! Admission control, tracing and audit for every RPC.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use spp_format::certificate::Caller;
use tokio::sync::Semaphore;
use tonic::metadata::MetadataValue;
use tonic::{Code, Response, Status};
use tracing::Instrument as _;

use super::status::{is_refusal, reason_of, status_of};
use crate::audit::{Auditor, Entry, Outcome};
use crate::provisioning::ProvisionError;
use crate::server::call_error::CallError;

/// Maximum length of an audit detail, in characters.
const MAX_DETAIL_LEN: usize = 128;
/// Maximum length of a refusal's reason in the audit log, in characters.
const MAX_REASON_LEN: usize = 512;
/// Response header that identifies a request in logs and answers.
const REQUEST_ID: &str = "x-request-id";

/// Limits the calls in progress on one listener and rejects further ones as `OVERLOADED`, because each call costs memory and
/// the queues of the layers below are about as long as the line's limit. The public listener has its own gate, so that public
/// callers cannot crowd out the line.
#[derive(Clone)]
pub(super) struct CallGate {
    capacity: usize,
    permits: Arc<Semaphore>,
    /// Records calls and refusals. Absent for the public listener: its callers are anonymous and could fill the log.
    auditor: Option<Arc<Auditor>>,
}

impl CallGate {
    /// The gate for stations.
    pub(super) fn line(auditor: &Arc<Auditor>) -> Self {
        Self::with_capacity(1024, Some(Arc::clone(auditor)))
    }

    /// The gate for officers.
    pub(super) fn officer(auditor: &Arc<Auditor>) -> Self {
        Self::with_capacity(64, Some(Arc::clone(auditor)))
    }

    /// The gate for the public listener.
    pub(super) fn public() -> Self {
        Self::with_capacity(128, None)
    }

    fn with_capacity(capacity: usize, auditor: Option<Arc<Auditor>>) -> Self {
        Self { capacity, permits: Arc::new(Semaphore::new(capacity)), auditor }
    }

    /// Runs a read-only call (see [`run_call`]), or rejects it at once if the gate is full. Records refusals only.
    pub(super) async fn call<T, F>(&self, method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        // "Not found" is a normal answer: stations look devices up before they begin.
        let is_refusal = |error: &CallError| {
            !matches!(error, CallError::Provision(ProvisionError::NoSession(_) | ProvisionError::NoRecord))
        };
        self.call_recording(method, caller, is_refusal, work).await
    }

    /// Runs a call that writes its own audit entries. Records only the errors that occur before the call writes its first one.
    pub(super) async fn call_self_audited<T, F>(
        &self,
        method: &'static str,
        caller: &Caller,
        work: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let is_early = |error: &CallError| matches!(error, CallError::Invalid(_) | CallError::Overloaded(_));
        self.call_recording(method, caller.to_string(), is_early, work).await
    }

    async fn call_recording<T, F>(
        &self,
        method: &'static str,
        caller: String,
        is_recorded: fn(&CallError) -> bool,
        work: F,
    ) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let (permit, capacity) = (Arc::clone(&self.permits).try_acquire_owned(), self.capacity);
        let (auditor, entry) = (self.auditor.clone(), Entry::new(&caller, method, Outcome::Begun));
        run_call(method, caller, async move {
            let result = match permit {
                Ok(_permit) => work.await,
                Err(_) => Err(CallError::Overloaded(capacity)),
            };
            if let (Err(error), Some(auditor)) = (&result, &auditor)
                && is_recorded(error)
            {
                record_refusal(auditor, &entry, error).await;
            }
            result
        })
        .await
    }

    /// Runs a state-changing call. It starts only if the audit log is writable, and answers only after its entry is written. If
    /// the state changed but the entry could not be written, the repeated call finds the change done and records it.
    pub(super) async fn call_audited<T, F>(&self, audited: AuditedCall<T>, work: F) -> Result<Response<T>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, CallError>> + Send + 'static,
    {
        let AuditedCall { method, entry, records_start, audit_fields } = audited;
        let caller = entry.caller().to_owned();
        let (permit, capacity) = (Arc::clone(&self.permits).try_acquire_owned(), self.capacity);
        let auditor = self.auditor.clone();
        run_call(method, caller, async move {
            let Some(auditor) = auditor else { return work.await };
            let Ok(_permit) = permit else {
                let overloaded = CallError::Overloaded(capacity);
                record_refusal(&auditor, &entry, &overloaded).await;
                return Err(overloaded);
            };
            auditor.ready().await?;
            if records_start {
                auditor.record(entry.ended(Outcome::Begun)).await?;
            }
            match work.await {
                Ok(response) => {
                    let fields = audit_fields(&response).into_iter();
                    let entry = fields.fold(entry, |entry, (name, value)| entry.with(name, value));
                    auditor.record(entry).await?;
                    Ok(response)
                }
                Err(error) if records_start => {
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

/// The audit entry of a state-changing call.
pub(super) struct AuditedCall<T> {
    method: &'static str,
    entry: Entry,
    records_start: bool,
    audit_fields: AuditFields<T>,
}

/// Extracts audit details from a response.
type AuditFields<T> = fn(&T) -> Vec<(&'static str, String)>;

impl<T> AuditedCall<T> {
    /// `method` is the name in logs, `action` the name in the audit log.
    pub(super) fn new(method: &'static str, action: &'static str, caller: &Caller) -> Self {
        let entry = Entry::new(caller, action, Outcome::Done);
        Self { method, entry, records_start: false, audit_fields: |_| Vec::new() }
    }

    /// Adds a request detail. Truncates it, because the value comes from the caller.
    pub(super) fn with(self, name: &str, value: impl std::fmt::Display) -> Self {
        let value: String = value.to_string().chars().take(MAX_DETAIL_LEN).collect();
        Self { entry: self.entry.with(name, value), ..self }
    }

    /// Also records the start of the call; if that entry cannot be written, the call does not run.
    pub(super) fn record_start(self) -> Self {
        Self { records_start: true, ..self }
    }

    /// Adds details from the response.
    pub(super) fn audit_fields(self, audit_fields: AuditFields<T>) -> Self {
        Self { audit_fields, ..self }
    }
}

async fn record_refusal(auditor: &Auditor, entry: &Entry, error: &CallError) {
    auditor.refused(entry.ended(outcome_of(error)), reason_of(error)).await;
}

fn outcome_of(error: &CallError) -> Outcome {
    let reason = error.to_string().chars().take(MAX_REASON_LEN).collect();
    if is_refusal(error) { Outcome::Refused(reason) } else { Outcome::Failed(reason) }
}

/// Runs a call in its own task and logs its result. A client that disconnects does not interrupt the call between two steps.
async fn run_call<T, F>(method: &'static str, caller: String, work: F) -> Result<Response<T>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<T, CallError>> + Send + 'static,
{
    let id = request_id();
    let span = tracing::info_span!("rpc", method, request_id = %id, %caller);
    let started = Instant::now();
    let task = tokio::spawn(work.instrument(span.clone()));
    let result = task.await.unwrap_or_else(|e| Err(CallError::Ended(e.to_string())));
    let _in_span = span.enter();
    let milliseconds = started.elapsed().as_millis();
    let header = MetadataValue::try_from(&id).ok();
    match result {
        Ok(message) => {
            tracing::debug!(milliseconds, "call answered");
            let mut response = Response::new(message);
            header.map(|value| response.metadata_mut().insert(REQUEST_ID, value));
            Ok(response)
        }
        Err(error) => {
            let mut status = status_of(&error);
            if status.code() == Code::Internal {
                tracing::error!(milliseconds, %error, "call failed");
            } else {
                tracing::info!(milliseconds, code = ?status.code(), %error, "call refused");
            }
            header.map(|value| status.metadata_mut().insert(REQUEST_ID, value));
            Err(status)
        }
    }
}

/// Returns 8 random bytes in hex: enough to find a request in one day's log.
fn request_id() -> String {
    let mut bytes = [0; 8];
    // If the random source fails, the ID is all zeros: the request is served with an ID that is not unique.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    hex::encode(bytes)
}
